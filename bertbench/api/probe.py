"""`bertbench.probe()`: the largest batch that fits, certified."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bertbench.api.inputs import find_probed_device, find_workload
from bertbench.api.results import Result
from bertbench.core.errors import WorkError
from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Setup, Workload, check_layers
from bertbench.hardware.accelerators import check_levers
from bertbench.hardware.device import Budget
from bertbench.hardware.lock import devices_held
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.probing.cell import ProbedCell, ProbeSettings, probe_cell
from bertbench.probing.grid import equal_budgets


@dataclasses.dataclass(frozen=True)
class ProbeResult(Result):
    """A limit; its rows are the trials that it rests on.

    Attributes:
        budget: the device, and what its allocator could use.
        cell: workload, levers, the limit and its evidence.
    """

    budget: Budget
    cell: ProbedCell

    @property
    def max_batch(self) -> int:
        """The largest batch that fits; 0 if not even one example does."""
        return self.cell.result.max_batch

    @property
    def certified(self) -> bool:
        """Whether trials show that this batch fits and that the next one does not."""
        return self.cell.result.certificate is not None

    def describe(self) -> str:
        """Describe the result in one line."""
        workload = self.cell.setup.workload
        evidence = "certified" if self.certified else "not certified"
        limit = f"batch {self.max_batch} fits" if self.max_batch else "batch 1 does not fit"
        return (
            f"{workload.model}, sequence length {workload.seq_len}, in "
            f"{format_bytes(self.budget.budget_bytes)} on {self.budget.device.name}: "
            f"{limit}, {evidence}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each trial, in their order."""
        return [
            {**trial.to_json(), "examples_per_second": self.cell.examples_per_second(trial)}
            for trial in self.cell.result.trials
        ]


def probe(
    model: str | Workload,
    seq_len: int | None = None,
    *,
    on: str | Budget = "auto",
    memory: str | int | None = None,
    levers: Levers | None = None,
    settings: ProbeSettings | None = None,
    ledger: str | Path | None = None,
) -> ProbeResult:
    """Find the largest batch that fits, by real training steps in processes of their own.

    Example:
        >>> import bertbench
        >>> found = bertbench.probe("bert-tiny", 128, on="cpu", memory="256MiB")  # doctest: +SKIP
        >>> found.max_batch, found.certified  # doctest: +SKIP
        (64, True)
        >>> found.to_frame()[["batch", "outcome", "peak_bytes"]]  # doctest: +SKIP

    Args:
        model: a published model such as "bert-base", or a workload.
        seq_len: tokens of an example; not needed for a workload.
        on: a budget, or an attached device: "auto", "gpu:0", "cpu".
        memory: bytes that the allocator may use, or text such as "12GiB"; None takes what is free,
            and 512 MiB of a CPU.
        levers: lever settings; None takes those of the published recipe.
        settings: largest batch of interest, whether to certify, steps of a trial; None takes the
            usual ones.
        ledger: record of trials; those in it are not repeated. None takes the user's.

    Returns:
        The limit and its evidence.

    Raises:
        finetune.errors.InputError: the model, the device or a lever is unknown, or others use the
            device.
        bertbench.core.errors.WorkError: a trial failed for another reason than memory.
    """
    setup = Setup(find_workload(model, seq_len), levers or Levers())
    device, budget_bytes = find_probed_device(on, memory)
    check_levers(device.kind, device.name, setup.levers)
    check_layers(setup.workload, setup.levers.checkpointing)
    with devices_held([device]), open_ledger(ledger) as opened:
        # The device as it is now: another probe of it may have ended only just before.
        (budget,) = equal_budgets([device], budget_bytes, share=False)
        cell = probe_cell(opened, Question(budget, setup), settings or ProbeSettings())
    if cell.result.stopped_by == "failed":
        raise WorkError(f"a trial failed: {cell.result.message}")
    return ProbeResult(budget, cell)
