"""How long a cell of a probe will take, and how long one of its trials may take."""

from __future__ import annotations

from collections.abc import Sequence

from bertbench.core.workload import Setup, TrainingStep
from bertbench.hardware.device import Budget
from bertbench.hardware.step_time import device_rates, predict_step_seconds
from bertbench.memory.formula_prediction import FormulaPrediction
from bertbench.memory.room import Room
from bertbench.probing.limit_from_trace import is_traced
from bertbench.trials.measure import TIMEOUT_SECONDS
from bertbench.trials.trial import Trial

_TIMEOUT_FACTOR = 10.0
_START_SECONDS = 5.0
_ALLOCATOR_WAITS_SECONDS = 10.0


def predict_cell_seconds(budget: Budget, setup: Setup, steps: int = 3) -> float:
    """Predict how long a cell takes.

    It tries the limit, and a batch that does not fit; without a trace two small batches before.

    Args:
        budget: device and bytes.
        setup: workload and levers.
        steps: optimizer steps of a trial.
    """
    room = Room(budget.device.kind, budget.budget_bytes)
    limit = FormulaPrediction(setup, room).max_micro_batch()
    rates = device_rates(budget.device)
    seconds = _ALLOCATOR_WAITS_SECONDS
    batches = [(limit, steps), (limit + 1, 1)]
    if not is_traced(budget, setup):
        batches += [(limit // 8, steps + 2), (limit // 3, steps + 2)]
    for batch, its_steps in batches:
        step_seconds = predict_step_seconds(setup.step(max(batch, 1)), rates)
        seconds += _START_SECONDS + its_steps * step_seconds
    return seconds


def default_timeout_seconds(
    budget: Budget, step: TrainingStep, trials: Sequence[Trial], steps: int
) -> float:
    """Return ten times what a trial should take: one that takes longer must be hanging.

    Args:
        budget: device and bytes.
        step: what the trial runs.
        trials: earlier ones of the same setup, which tell the seconds of an example; without any
            they are predicted.
        steps: optimizer steps of the trial.
    """
    timed = [t.step_seconds / t.batch for t in trials if t.step_seconds is not None]
    if timed:
        step_seconds = max(timed) * step.micro_batch
    else:
        step_seconds = predict_step_seconds(step, device_rates(budget.device))
    # A first step takes longer than the others, and recording repeats it.
    return max(TIMEOUT_SECONDS, _TIMEOUT_FACTOR * step_seconds * (steps + 3))
