"""What is known of a question: the ledger's trials and recordings, and those of this probe."""

from __future__ import annotations

import functools

from bertbench.ledger.database import Ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import find, find_allocations, record, record_allocations
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.traces.loops import Recorded
from bertbench.trials.trial import Trial


class Evidence:
    """Trials and recordings of a question; new ones go to the ledger at once.

    Attributes:
        question: what the trials answer.
        known: trials that the ledger had at first.
        trials: those and the new ones, in the order of recording.
    """

    def __init__(self, ledger: Ledger, question: Question, *, ignore_ledger: bool = False) -> None:
        """Read the ledger's trials; with `ignore_ledger` no trials and no recordings."""
        self.question = question
        self.known = () if ignore_ledger else tuple(find(ledger, question))
        self.trials = list(self.known)
        self._ledger = ledger
        self._ignore_ledger = ignore_ledger

    def add_trial(self, trial: Trial) -> None:
        """Take a new trial; it is on the disk when this returns."""
        self.trials.append(trial)
        record(self._ledger, self.question, trial)

    @functools.cached_property
    def recordings(self) -> list[Recorded]:
        """What trials asked of the allocator; read when first needed, for it is long."""
        return [] if self._ignore_ledger else find_allocations(self._ledger, self.question)

    def add_recording(self, batch: int, recording: Recording) -> None:
        """Take what a batch that fits has asked of the allocator."""
        self.recordings.append(Recorded(self.question.setup.workload.seq_len, batch, recording))
        record_allocations(self._ledger, self.question, batch, recording)

    def lacks_recordings(self) -> bool:
        """Whether more recordings would tell more."""
        if self.question.budget.device.kind == "tpu":
            return False  # The compiler lays its memory out, before the step.
        seq_len = self.question.setup.workload.seq_len
        own = {one.batch for one in self.recordings if one.seq_len == seq_len}
        return len(own - {1}) < 2  # Batch 1 tells nothing, see `extrapolate`.
