"""`bertbench plan`: the fastest setting that fits, decided without running anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from bertbench.bytes import format_bytes
from bertbench.catalogue import ACCELERATORS, check_levers, find_accelerator
from bertbench.cli.common import (
    CONTEXT,
    allowed_levers,
    device_options,
    json_option,
    lever_options,
    resolve_budget,
    terminal,
    write_json,
)
from bertbench.cost import Rates, device_rates, gpu_rates
from bertbench.paper import PAPER_MODELS, PAPER_SEQ_LENS
from bertbench.planner import Plan, PlanEntry, make_plan
from bertbench.workload import Levers, Workload, published_workload
from finetune.checkpointing import parse_checkpointing
from finetune.config import HEADS
from finetune.errors import InputError
from finetune.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class _Target:
    """The device that is planned for, attached or not."""

    name: str
    kind: str
    budget_bytes: int
    rates: Rates


@click.command(context_settings=CONTEXT)
@click.option(
    "--target-batch",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Effective batch to reach.",
)
@click.option("--model", help="A published size, as in bert-base. Default: the paper's grid.")
@click.option("--seq-len", type=click.IntRange(1), help="Tokens per example. Default: the grid.")
@click.option("--head", type=click.Choice(HEADS), default="squad", show_default=True)
@device_options
@click.option("--gpu", help="Plan for a product of the catalogue; `list` shows it.")
@click.option(
    "--checkpointing",
    help="Insist on a policy: none, selective, full, nested, or full:N for N layers.",
)
@lever_options
@json_option
def command(
    target_batch: int,
    model: str | None,
    seq_len: int | None,
    head: str,
    device: str,
    gpu: str | None,
    memory: int | None,
    checkpointing: str | None,
    precision: str | None,
    optimizer: str | None,
    placement: str | None,
    allow: str | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Fastest micro-batch x accumulation x checkpointing for a target batch.

    The update is the one that the target batch would give at once, unless --allow names levers
    that change it. Peak and time are predicted; `bertbench probe` measures.

    \b
    Example:
      bertbench plan --target-batch 32 --model bert-large --seq-len 384 \\
        --memory 12GiB --json plan.json
    """
    if gpu is not None and gpu.lower() == "list":
        _show_catalogue(json_file)
        return
    target = _target(device, gpu, memory)
    policies = None if checkpointing is None else [parse_checkpointing(checkpointing)]
    allowed = allowed_levers(precision, optimizer, placement, allow)
    for levers in allowed:
        check_levers(target.kind, target.name, levers)

    def plan(workload: Workload) -> Plan:
        return make_plan(
            workload,
            target_batch,
            target.budget_bytes,
            target.rates,
            device=target.name,
            device_kind=target.kind,
            policies=policies,
            allowed=allowed,
            host_if_needed=placement is None,
        )

    if model is not None and seq_len is not None:
        found = plan(published_workload(model, seq_len, head))
        if json_file is not None:
            write_json(json_file, found.to_json())
        if str(json_file) != "-":
            _show_plan(found)
        return
    cells: list[Plan | tuple[Workload, str]] = []
    for name in PAPER_MODELS if model is None else (model,):
        for length in PAPER_SEQ_LENS if seq_len is None else (seq_len,):
            workload = published_workload(name, length, head)
            try:
                cells.append(plan(workload))
            except InputError as error:
                cells.append((workload, str(error)))
    if json_file is not None:
        write_json(json_file, _grid_json(target, target_batch, cells))
    if str(json_file) != "-":
        _show_grid(target, target_batch, cells)


def _target(device: str, gpu: str | None, memory: int | None) -> _Target:
    if gpu is not None:
        accelerator = find_accelerator(gpu)
        if memory is not None and memory > accelerator.memory_bytes:
            raise InputError(
                f"--memory {format_bytes(memory)} is more than the "
                f"{format_bytes(accelerator.memory_bytes)} of {accelerator.name}"
            )
        budget_bytes = accelerator.usable_bytes if memory is None else memory
        return _Target(accelerator.name, "gpu", budget_bytes, gpu_rates(accelerator))
    budget = resolve_budget(device, memory)
    return _Target(
        budget.device.name, budget.device.kind, budget.budget_bytes, device_rates(budget.device)
    )


def _grid_json(
    target: _Target, target_batch: int, cells: Sequence[Plan | tuple[Workload, str]]
) -> dict[str, Any]:
    plans = [
        cell.to_json()
        if isinstance(cell, Plan)
        else {"model": cell[0].model, "seq_len": cell[0].seq_len, "chosen": None, "why": cell[1]}
        for cell in cells
    ]
    return {
        "target_batch": target_batch,
        "device": target.name,
        "budget_bytes": target.budget_bytes,
        "plans": plans,
    }


class _Marks:
    """Stars for settings that change the update, and the notes below the table that explain."""

    def __init__(self) -> None:
        self._stars: dict[tuple[str, ...], str] = {}

    def star(self, levers: Levers) -> str:
        if levers.exact:
            return ""
        return self._stars.setdefault(levers.inexact, "*" * (len(self._stars) + 1))

    def notes(self) -> list[str]:
        return [
            f"{star} with {', '.join(names)}: another update than the recipe's"
            for names, star in self._stars.items()
        ]


def _on_host(levers: Levers) -> str:
    return " + host" if levers.placement == "host" else ""


def _row(entry: PlanEntry, marks: _Marks) -> tuple[str, ...]:
    steps = entry.levers.accumulation_steps
    return (
        str(entry.micro_batch),
        str(steps),
        f"{entry.levers.checkpointing}{marks.star(entry.levers)}{_on_host(entry.levers)}",
        format_bytes(entry.footprint.peak_bytes),
        f"{entry.predicted_step_seconds:.3g} s",
    )


_TITLES = ("micro-batch", "steps", "checkpointing", "peak", "time/batch")


def _table(*first: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in (*first, *_TITLES):
        left = title in ("model", "checkpointing", "")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    return table


def _show_plan(plan: Plan) -> None:
    console = terminal()
    console.print(
        f"{plan.workload.model}, sequence length {plan.workload.seq_len}, effective batch "
        f"{plan.target_batch}, {format_bytes(plan.budget_bytes)} on {plan.device}",
        soft_wrap=True,
    )
    table, marks = _table(""), _Marks()
    table.add_row("chosen", *_row(plan.chosen, marks))
    for entry in plan.alternatives[:6]:
        table.add_row("smaller", *_row(entry, marks))
    console.print(table)
    for note in marks.notes():
        console.print(note, soft_wrap=True)
    padding = plan.chosen.rows - plan.target_batch
    if padding:
        console.print(f"{padding} of {plan.chosen.rows} rows are padding and weigh nothing.")
    if plan.chosen.footprint.host_bytes:
        console.print(
            f"The optimizer's state is in {format_bytes(plan.chosen.footprint.host_bytes)} of the "
            "host's memory."
        )
    for rejection in plan.rejected[:4]:
        console.print(
            f"not {rejection.levers.accumulation_steps} x {rejection.micro_batch} with "
            f"checkpointing {rejection.levers.describe()}: {rejection.why}",
            soft_wrap=True,
        )
    recipe = RECIPES["squad" if plan.workload.head == "squad" else "glue"]
    console.print(
        f"recipe: learning rate {recipe.learning_rate:g}, {recipe.epochs:g} epochs, batch "
        f"{recipe.batch_size} ({recipe.source})",
        soft_wrap=True,
    )


def _show_grid(
    target: _Target, target_batch: int, cells: Sequence[Plan | tuple[Workload, str]]
) -> None:
    console = terminal()
    console.print(
        f"effective batch {target_batch}, {format_bytes(target.budget_bytes)} on {target.name}",
        soft_wrap=True,
    )
    table, marks = _table("model", "seq"), _Marks()
    for cell in cells:
        if isinstance(cell, Plan):
            table.add_row(
                cell.workload.model, str(cell.workload.seq_len), *_row(cell.chosen, marks)
            )
        else:
            workload = cell[0]
            table.add_row(workload.model, str(workload.seq_len), "-", "-", "does not fit", "-", "-")
    console.print(table)
    notes = marks.notes()
    for note in notes:
        console.print(note, soft_wrap=True)
    if any(isinstance(cell, Plan) and _on_host(cell.chosen.levers) for cell in cells):
        console.print("host: the optimizer's state is in the host's memory")
    same = "every other" if notes else "every"
    console.print(f"Peak and time are predicted; {same} setting gives the same update.")


def _show_catalogue(json_file: Path | None) -> None:
    products = list(ACCELERATORS.values())
    if json_file is not None:
        write_json(
            json_file,
            [{**dataclasses.asdict(a), "usable_bytes": a.usable_bytes} for a in products],
        )
    if str(json_file) == "-":
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "memory", "usable", "float32", "bandwidth"):
        table.add_column(title, justify="left" if title == "name" else "right")
    for product in products:
        table.add_row(
            product.name,
            format_bytes(product.memory_bytes),
            format_bytes(product.usable_bytes),
            f"{product.flops_per_second / 1e12:.1f} TFLOP/s",
            f"{product.bytes_per_second / 1e9:,.0f} GB/s",
        )
    terminal().print(table)
