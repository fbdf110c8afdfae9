"""The limit of a setup by replays of what smaller batches have asked of the allocator."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from bertbench.core.workload import Setup
from bertbench.memory.allocator.bfc import Memory
from bertbench.memory.limit_search import largest_batch
from bertbench.memory.traces.loops import Recorded
from bertbench.probing.evidence import Evidence
from bertbench.probing.extrapolation import extrapolate
from bertbench.probing.search import MAX_PROBED_BATCH
from finetune.spec.checkpointing import examples_per_chunk


class LimitFromRecordings:
    """A `bertbench.memory.prediction.LimitSource` by recordings, if there are enough of them.

    Attributes:
        evidence: has the recordings; more of them may come while the search goes on.
        memory: what the allocator has.
    """

    def __init__(self, evidence: Evidence, memory: Memory) -> None:
        """Take recordings and memory; nothing is read or replayed yet."""
        self.evidence = evidence
        self.memory = memory
        self._answers: dict[tuple[int, int], int | None] = {}

    def max_micro_batch(self, at_most: int, fitting: int) -> int | None:
        """See `bertbench.memory.prediction.LimitSource`; an answer may be above `at_most`."""
        recordings = self.evidence.recordings
        key = len(recordings), fitting  # The search asks again after a trial that did not fit.
        if key not in self._answers:
            self._answers[key] = self._replay(recordings, fitting)
        return self._answers[key]

    def _replay(self, recordings: Sequence[Recorded], fitting: int) -> int | None:
        setup = self.evidence.question.setup
        limit = None
        for few_chunks in (False, True):
            extrapolation = extrapolate(
                recordings,
                setup.workload.seq_len,
                lambda seq_len: chunk_sizes(setup, seq_len),
                few_chunks=few_chunks,
            )
            if extrapolation is None:
                return None
            limit = largest_batch(
                functools.partial(extrapolation.replay, memory=self.memory),
                self.memory.total_bytes,
                begin=extrapolation.batch,
                at_most=MAX_PROBED_BATCH,
                fitting=fitting,
                known_up_to=extrapolation.largest,
            )
            if limit is None or limit >= extrapolation.batch:
                break
        return limit


def chunk_sizes(setup: Setup, seq_len: int | None = None) -> list[int]:
    """Most examples of a chunk, for every policy in use that computes layers in chunks.

    Args:
        setup: workload and levers.
        seq_len: tokens per example; None takes the workload's.
    """
    length = setup.workload.seq_len if seq_len is None else seq_len
    policies = setup.levers.checkpointing.chunked_policies(setup.workload.config.num_hidden_layers)
    return [examples_per_chunk(policy, length) or 1 for policy in policies]
