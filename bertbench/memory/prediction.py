"""Predicts the memory of a training step: its peak, whether it fits, and the largest micro-batch.

There are three ways to predict, and `predict_memory` chooses. Where the step has a trace, the trace
is replayed. On a CPU the replay has the requests of the real step, so even the pieces that free
memory is in are right. On other devices a margin covers what differs there. Where XLA compiles the
step, the word of the device's compiler counts, see `bertbench.memory.compiled_prediction`. Else the
formula of `bertbench.memory.footprint` predicts the peak. Its margin is the largest error that was
measured of it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import ClassVar, Protocol

from bertbench.core.bisection import largest_passing
from bertbench.core.terminal import say
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Setup, TrainingStep
from bertbench.memory.allocator.bfc import Memory, Replay
from bertbench.memory.allocator.budget import memory_of
from bertbench.memory.compiled_prediction import CompiledPrediction
from bertbench.memory.footprint import Footprint, inference_bytes, predict_footprint
from bertbench.memory.formula_prediction import FormulaPrediction, all_reduce, or_all_reduce
from bertbench.memory.limit_search import largest_batch
from bertbench.memory.room import Room
from bertbench.memory.traced_footprint import traced_footprint
from bertbench.memory.traces.archive import other_tensorflow, package_archive
from bertbench.memory.traces.step_requests import left_out_bytes, replay_step, trace_of
from bertbench.memory.traces.traced_peak import traced_peak_bytes

SAFETY_MARGIN = 0.08
"""Part of a prediction by a trace to add on a device that no trace was recorded on."""

_RECORDED_MULTIPLES, _OTHER_LENGTHS_MARGIN = 16, 0.005
"""Traces were recorded of sequence lengths that are multiples of 16. Of others TensorFlow copies
some rows, and matrix products take more workspace: the largest error that was measured of lengths
50 and 100, one policy with chunks and one without, was 0.13 %."""

FORMULA_MARGIN = 0.22
"""Part of a prediction by the formula to add before it is compared with a budget. It makes up for
the largest errors that were measured. Of the peak, where memory is plenty
(`benchmarks/footprint.py`):

| kind | settings | error |
| --- | --- | --- |
| float32, GELU | 156, BERT-Tiny to BERT-Large | -13.3 % to +8.7 % |
| `bf16` | 9, BERT-Tiny and BERT-Mini | -8.0 % to -0.2 % |
| `fp16` | the same 9 | -7.3 % to -0.1 % |
| ReLU | the same 9 | -9.9 % to +8.8 % |

The smallest budget in which a step fits is larger than the formula, because the last memory is in
pieces. With a trace it was up to 20.2 % larger, in 471 random settings of BERT-Tiny to BERT-Base
(most with BERT-Tiny, seq 96, `none`, 8 examples). By trials it was up to 21.2 % larger, in three
settings of BERT-Tiny with `bf16`.
"""

_BEGIN_SHARE = 0.98
"""The first micro-batch to replay, in the largest whose live bytes are within the memory."""


class LimitSource(Protocol):
    """Something that predicts the largest micro-batch of a setup: a trace, recordings, a formula.

    A probe takes the first source that can tell.
    """

    def max_micro_batch(self, at_most: int, fitting: int) -> int | None:
        """Predict the largest micro-batch up to which all from `fitting` on fit.

        Args:
            at_most: largest micro-batch of interest; a larger answer says that this one fits.
            fitting: a micro-batch that fits, as a trial has said; 0 before the first.

        Returns:
            None if the source cannot tell, or cannot tell yet.
        """


class MemoryPrediction(LimitSource, Protocol):
    """Predicted memory of the steps of one setup in one room.

    A step is named by its micro-batch, the examples of one forward and backward pass.
    """

    @property
    def source(self) -> str:
        """What answers: `trace`, `compiled` or `formula`."""

    @property
    def margin(self) -> float:
        """Part of a peak to add before it is compared with the budget."""

    @property
    def usable_bytes(self) -> int:
        """What a peak may reach, so that the step fits with the margin."""

    def peak_bytes(self, micro_batch: int) -> int:
        """Most live bytes of a step; no less for a larger micro-batch.

        It takes a fraction of a millisecond and is a lower bound: what the allocator loses between
        the pieces of free memory, and in pieces that it hands out whole, is not in it.
        """

    def footprint(self, micro_batch: int, *, replayed: bool = True) -> Footprint:
        """The peak part by part; with `replayed` also what the allocator loses, if it is known."""

    def fits(self, micro_batch: int) -> bool:
        """Whether a step fits, as far as can be told without running it; up to a second."""

    def max_micro_batch(self, at_most: int = sys.maxsize, fitting: int = 0) -> int:
        """The largest micro-batch that fits, as do all between `fitting` and it.

        Args:
            at_most: largest micro-batch of interest.
            fitting: a micro-batch that fits, as a trial has said; smaller ones are not asked about.

        Returns:
            `fitting` if no larger one fits.
        """


def predict_memory(setup: Setup, room: Room, *, tensorflow: str | None = None) -> MemoryPrediction:
    """Choose what predicts the memory of a setup's steps.

    Args:
        setup: workload and levers.
        room: what the steps have to fit in.
        tensorflow: version that the steps run with; None takes the installed one.
    """
    if setup.levers.xla or room.device_kind == "tpu":
        levers = dataclasses.replace(setup.levers, xla=True)
        return CompiledPrediction(dataclasses.replace(setup, levers=levers), room)
    if not has_trace(setup, room.device_kind):
        return FormulaPrediction(setup, room, FORMULA_MARGIN)
    margin = _trace_margin(setup, room, other_tensorflow(tensorflow) is not None)
    return TracePrediction(setup, room, margin, left_out_bytes(setup))


def _trace_margin(setup: Setup, room: Room, other_version: bool) -> float:
    """Margin of a prediction by a trace."""
    if other_version:
        # Nothing has been measured with it. Trials are those with the version that is used.
        return FORMULA_MARGIN if room.margin is None else room.margin
    if room.device_kind == "cpu":
        recorded = setup.workload.seq_len % _RECORDED_MULTIPLES == 0
        return 0.0 if recorded else _OTHER_LENGTHS_MARGIN
    return SAFETY_MARGIN if room.margin is None else room.margin


@functools.cache
def note_other_tensorflow(tensorflow: str | None = None) -> None:
    """Say in one line that predictions keep a larger margin, if the traces are of another version.

    It is said once in a process.

    Args:
        tensorflow: see `predict_memory`.
    """
    other = other_tensorflow(tensorflow)
    if other is not None:
        recorded = package_archive().manifest.tensorflow
        say(
            f"warning: memory was recorded with TensorFlow {recorded}, and this is {other}: a plan "
            f"leaves {FORMULA_MARGIN:.0%} of the predicted memory free until trials tell the error"
        )


def has_trace(setup: Setup, device_kind: str) -> bool:
    """Whether a step's requests are known; those of XLA, as for a TPU, are in another order."""
    return device_kind != "tpu" and trace_of(setup) is not None


@dataclasses.dataclass(frozen=True)
class TracePrediction:
    """A `MemoryPrediction` by replays of the trace of the setup's steps, which there must be.

    Attributes:
        setup: workload and levers.
        room: what the steps have to fit in.
        margin: part of a peak to add before it is compared with the budget.
        left_out_bytes: what a step may hold that its trace does not have.
        before_replay: called before each replay; what it raises ends the search and is raised on.
    """

    source: ClassVar[str] = "trace"

    setup: Setup
    room: Room
    margin: float = 0.0
    left_out_bytes: int = 0
    before_replay: Callable[[], None] = lambda: None

    @property
    def usable_bytes(self) -> int:
        """See `MemoryPrediction`."""
        return self.room.usable_bytes(self.margin) - self.left_out_bytes

    def peak_bytes(self, micro_batch: int) -> int:
        """See `MemoryPrediction`."""
        step = self.setup.step(micro_batch)
        live_bytes = traced_peak_bytes(step)
        assert live_bytes is not None
        peak_bytes = live_bytes + self.room.memory().held_bytes
        if self.room.replicas == 1:
            return peak_bytes
        return max(peak_bytes, all_reduce(step, self.room).peak_bytes)

    def footprint(self, micro_batch: int, *, replayed: bool = True) -> Footprint:
        """See `MemoryPrediction`; by the formula if the replay runs out of memory."""
        step = self.setup.step(micro_batch)
        footprint = traced_footprint(step, self._memory(), replayed=replayed)
        if footprint is None:
            footprint = predict_footprint(step)
        return or_all_reduce(footprint, step, self.room)

    def fits(self, micro_batch: int) -> bool:
        """See `MemoryPrediction`."""
        if self.peak_bytes(micro_batch) > self.usable_bytes:
            return False
        return self._replay(micro_batch).fits

    def max_micro_batch(self, at_most: int = sys.maxsize, fitting: int = 0) -> int:
        """See `MemoryPrediction`."""
        # A replay takes up to a second, the live bytes take a fraction of a millisecond.
        bound = largest_passing(lambda n: self.peak_bytes(n) <= self.usable_bytes, fitting, at_most)
        if bound <= fitting:
            return fitting
        largest = largest_batch(
            self._replay,
            self._memory().total_bytes,
            begin=int(_BEGIN_SHARE * bound),
            at_most=bound,
            fitting=fitting,
        )
        assert largest is not None
        return largest

    def _replay(self, micro_batch: int) -> Replay:
        self.before_replay()
        return replay_step(self.setup.step(micro_batch), self._memory())

    def _memory(self) -> Memory:
        """What the allocator has for what the trace knows of."""
        return memory_of(self.room.device_kind, max(self.usable_bytes, 0))


def min_budget_bytes(step: TrainingStep, device_kind: str, *, replicas: int = 1) -> int:
    """The smallest budget, in whole MiB, in which a step fits.

    In a little more memory it may not fit again, as free memory may be in pieces that are too
    small. No budget below this one is enough; from here to 10 % above it not every budget has been
    looked at.
    """

    def predict(mebibytes: int) -> MemoryPrediction:
        room = Room(device_kind, mebibytes * MIB_BYTES, replicas=replicas)
        return predict_memory(step.setup, room)

    low = predict(1).peak_bytes(step.micro_batch) // MIB_BYTES - 1
    too_small = largest_passing(lambda size: not predict(size).fits(step.micro_batch), low)
    return (too_small + 1) * MIB_BYTES


def inference_batch(setup: Setup, budget_bytes: int, at_most: int) -> int:
    """How many examples a model can answer at a time while it is trained, at least 1.

    It may be fewer than a micro-batch that fits: with `nested` a training step computes a layer for
    a few examples at a time, inference for all of them.

    Args:
        setup: of the training.
        budget_bytes: what the allocator of one device may use.
        at_most: examples.
    """
    usable_bytes = int(budget_bytes / (1 + FORMULA_MARGIN))
    return largest_passing(
        lambda examples: inference_bytes(setup, examples) <= usable_bytes, low=1, at_most=at_most
    )
