"""The cells of a probe: which they are, and which device measures each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, check_layers, published_workload
from bertbench.hardware.accelerators import check_levers
from bertbench.hardware.device import (
    Budget,
    Device,
    check_alike,
    check_alone,
    check_free,
    make_budget,
)
from bertbench.hardware.discover import resolve_device
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.probing.cell import ProbedCell, ProbeListener, ProbeSettings, probe_cell
from bertbench.probing.workers import share_out
from bertbench.trials.trial import Trial

_CPU_DEFAULT_BYTES = 512 * MIB_BYTES


def make_grid(
    device: Device, models: Sequence[str], seq_lens: Sequence[int], head: str, levers: Levers
) -> list[Setup]:
    """Make the cells of every model with every sequence length.

    Args:
        device: where they will be probed.
        models: names of published models.
        seq_lens: tokens per example.
        head: task head.
        levers: of all cells.

    Raises:
        InputError: an unknown model, a length that it has no positions for, or levers that the
            device or the model does not have.
    """
    check_levers(device.kind, device.name, levers)
    workloads = [published_workload(model, length, head) for model in models for length in seq_lens]
    for workload in workloads:
        check_layers(workload, levers.checkpointing)
    return [Setup(workload, levers) for workload in workloads]


def equal_budgets(devices: Sequence[Device], memory_bytes: int | None, share: bool) -> list[Budget]:
    """Make budgets of the same size on devices as they are now: trials on one count for all.

    Args:
        devices: like ones.
        memory_bytes: of each; None takes 512 MiB of a CPU, and of others what is free on the
            fullest of them.
        share: accept that others use the devices.

    Raises:
        InputError: others use a device, one has less memory, or the devices are not alike.
    """
    if memory_bytes is None and devices[0].kind == "cpu":
        memory_bytes = min(_CPU_DEFAULT_BYTES, devices[0].total_bytes)
    budgets = [make_budget(_as_now(device), memory_bytes) for device in devices]
    check_alike([budget.device for budget in budgets])
    smallest_bytes = min(budget.budget_bytes for budget in budgets)
    budgets = [make_budget(budget.device, smallest_bytes) for budget in budgets]
    for budget in budgets:
        check_usable(budget, share)
    return budgets


def check_usable(budget: Budget, share: bool) -> None:
    """Refuse a device that others use, unless they share it, and a budget that is not free.

    Raises:
        InputError: it is so.
    """
    if not share:
        check_alone(budget.device)
    check_free(budget)


def _as_now(device: Device) -> Device:
    if device.tpu is not None:
        return device
    return resolve_device(f"gpu:{device.uuid}" if device.uuid else device.label)


class GridListener(Protocol):
    """Is told what happens to the cells, which it knows by their indices.

    Threads call it, one for each device.
    """

    def begin(self, index: int, device: str) -> None:
        """A cell is being probed now, on a device of this label."""

    def attempt(self, index: int, batches: Sequence[int]) -> None:
        """Trials of these batches begin."""

    def trial(self, index: int, trial: Trial) -> None:
        """A trial has ended."""

    def cell(self, index: int, cell: ProbedCell) -> None:
        """A cell has its answer."""


def probe_grid(
    ledger_path: Path,
    budgets: Sequence[Budget],
    setups: Sequence[Setup],
    settings: ProbeSettings,
    listener: GridListener,
) -> None:
    """Probe cells, which all devices take from one queue.

    Args:
        ledger_path: gets the trials; those in it are not repeated, unless the settings say so.
        budgets: a device each.
        setups: of the cells.
        settings: of each cell.
        listener: is told the results.

    Raises:
        KeyboardInterrupt: the probe was interrupted; the listener has been told what was finished.
    """

    def work(budget: Budget, index: int, poll: Callable[[], None]) -> None:
        # A connection belongs to the thread that made it.
        with open_ledger(ledger_path) as ledger:
            listener.begin(index, budget.device.label)
            cell = probe_cell(
                ledger,
                Question(budget, setups[index]),
                settings,
                ProbeListener(
                    on_attempt=lambda batches: listener.attempt(index, batches),
                    on_trial=lambda trial: listener.trial(index, trial),
                    poll=poll,
                ),
            )
            listener.cell(index, cell)

    share_out(len(setups), budgets, work)
