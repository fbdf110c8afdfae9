"""`bertbench plan`: the fastest setting that fits, decided without running anything."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bertbench.cli.options.common import (
    BATCH,
    CONTEXT,
    REPLICAS,
    Whole,
    allowed_levers,
    device_options,
    json_option,
    ledger_option,
    lever_options,
    resolve_budget,
    write_json,
)
from bertbench.cli.plan_view import (
    Cell,
    cards_of,
    describe_place,
    show_cards,
    show_catalogue,
    show_grid,
    show_min_memory,
    show_plan,
)
from bertbench.core.progress import progress
from bertbench.core.published import PAPER_MODELS, PAPER_SEQ_LENS
from bertbench.core.terminal import say
from bertbench.core.units import format_bytes
from bertbench.core.workload import Workload, check_layers, published_workload
from bertbench.devices.accelerators import ACCELERATORS, check_levers, find_accelerator
from bertbench.devices.device import Device
from bertbench.devices.discover import resolve_devices
from bertbench.devices.step_time import Rates, device_rates, gpu_rates
from bertbench.ledger.database import default_ledger_path, open_ledger
from bertbench.plan.calibration import experience_of
from bertbench.plan.min_memory import MinMemory, find_min_memory
from bertbench.plan.planner import Plan, describe_entry, make_plan
from bertbench.plan.verify import verify_plan
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import HEADS


@dataclasses.dataclass(frozen=True)
class _Target:
    """The device that is planned for, attached or not."""

    name: str
    kind: str
    budget_bytes: int
    rates: Rates
    replicas: int
    attached: Device | None = None


@click.command(context_settings=CONTEXT)
@click.option(
    "--target-batch",
    type=BATCH,
    default=32,
    show_default=True,
    help="Effective batch to reach.",
)
@click.option("--model", help="A published size, as in bert-base. Default: the paper's grid.")
@click.option("--seq-len", type=Whole(1), help="Tokens per example. Default: the grid.")
@click.option("--head", type=click.Choice(HEADS), default="squad", show_default=True)
@device_options
@click.option(
    "--gpu",
    help="Plan for a product of the catalogue, GPU or TPU; `list` shows it, `all` plans for each.",
)
@click.option(
    "--replicas",
    type=REPLICAS,
    help="Devices, all alike, that share the effective batch. Default: 1, or a TPU's.",
)
@click.option(
    "--checkpointing",
    help="Insist on a policy: none, selective, full, nested, or full:N for N layers.",
)
@lever_options
@click.option("--explain", is_flag=True, help="Show what the memory is used for.")
@click.option(
    "--min-memory",
    is_flag=True,
    help="Ask the other way round: the smallest memory for the target (on a GPU: --gpu all).",
)
@click.option("--verify", is_flag=True, help="Run two steps of the plan before it is believed.")
@ledger_option
@json_option
def command(
    target_batch: int,
    model: str | None,
    seq_len: int | None,
    head: str,
    device: str,
    gpu: str | None,
    replicas: int | None,
    memory: int | None,
    checkpointing: str | None,
    precision: str | None,
    optimizer: str | None,
    placement: str | None,
    allow: str | None,
    explain: bool,
    min_memory: bool,
    verify: bool,
    ledger_file: Path | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Fastest micro-batch x accumulation x checkpointing for a target batch.

    The update is the one that the target batch would give at once, unless --allow names levers
    that change it. Peak and time are predicted; `bertbench probe` measures.

    \b
    Example:
      bertbench plan --target-batch 32 --model bert-large --seq-len 384 \\
        --memory 12GiB --json plan.json
      bertbench plan --target-batch 24 --model bert-large --seq-len 384 \\
        --min-memory
    """
    if gpu is not None and gpu.lower() == "list":
        products = list(ACCELERATORS.values())
        values = [{**dataclasses.asdict(a), "usable_bytes": a.usable_bytes} for a in products]
        _write_or_show(json_file, values, lambda: show_catalogue(products))
        return
    policies = None if checkpointing is None else [parse_checkpointing(checkpointing)]
    allowed = allowed_levers(precision, optimizer, placement, allow)
    every_card = gpu is not None and gpu.lower() == "all"
    single = model is not None and seq_len is not None
    all_cards = every_card and not min_memory
    for flag, given in (("--gpu all", all_cards), ("--explain", explain), ("--verify", verify)):
        if given and not single:
            raise InputError(f"{flag} is for one workload", hint="give --model and --seq-len")
    workloads = [
        published_workload(name, length, head)
        for name in (PAPER_MODELS if model is None else (model,))
        for length in (PAPER_SEQ_LENS if seq_len is None else (seq_len,))
    ]
    for workload in workloads:
        for policy in policies or ():
            check_layers(workload, policy)
    if min_memory:
        for flag, given in (
            ("--memory", memory is not None), ("--explain", explain), ("--verify", verify)
        ):  # fmt: skip
            if given:
                raise InputError(f"--min-memory does not go with {flag}", hint="leave it out")
        if gpu is not None and not every_card:
            raise InputError(
                f"--min-memory does not go with --gpu {gpu}", hint="it tells which cards are enough"
            )
        resolved = resolve_devices(device)
        kind = "gpu" if every_card else resolved.kind
        shared_by = replicas or (1 if every_card else resolved.replicas)
        found: list[MinMemory] = []
        shown = progress("smallest memory", len(workloads), "workloads")
        # One alone takes a second or two.
        with shown if not single else contextlib.nullcontext(lambda done, note: None) as advance:
            for workload in workloads:
                least = find_min_memory(
                    workload, target_batch, policies, allowed, kind, replicas=shared_by
                )
                found.append(least)
                advance(len(found), f"{workload.model} {workload.seq_len}")
        values = [{**least.to_json(), "cards": _names(least)} for least in found]
        _write_or_show(
            json_file,
            {"target_batch": target_batch, "device_kind": kind, "workloads": values},
            lambda: show_min_memory(target_batch, found),
        )
        return

    def plan(workload: Workload, target: _Target, spare_bytes: int = 0) -> Plan:
        for levers in allowed:
            check_levers(target.kind, target.name, levers, target.replicas)
        experience = None
        if target.attached is not None:
            experience = experience_of(target.attached, workload, target.rates, ledger_file)
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
            spare_bytes=spare_bytes,
            replicas=target.replicas,
            experience=experience,
        )

    def plan_or_why(workload: Workload, target: _Target) -> Cell:
        try:
            return plan(workload, target)
        except InputError as error:
            return workload, str(error)

    if every_card:
        (workload,) = workloads
        cards = [
            (card, plan_or_why(workload, _target(device, card.name, memory, replicas)))
            for card in sorted(ACCELERATORS.values(), key=lambda card: card.memory_bytes)
            if (memory is None or memory <= card.memory_bytes)
            and (replicas is None or card.kind == "gpu")
        ]
        title = (
            f"{workload.model}, sequence length {workload.seq_len}, effective batch {target_batch}"
        )
        _write_or_show(
            json_file,
            {"target_batch": target_batch,
             "cards": [{"card": card.name, **_cell_json(cell)} for card, cell in cards]},
            lambda: show_cards(title, cards),
        )  # fmt: skip
        return
    target = _target(device, gpu, memory, replicas)
    if verify and (gpu is not None or target.replicas > 1):
        raise InputError(
            "--verify needs the device itself, and one alone",
            hint="leave --gpu and --replicas out, and name one --device",
        )
    if single:
        trials: list[Trial] = []
        if verify:
            with open_ledger(ledger_file or default_ledger_path()) as ledger:
                found_plan, trial, trials = verify_plan(
                    lambda spare_bytes: plan(workloads[0], target, spare_bytes),
                    resolve_budget(device, memory),
                    ledger,
                    on_attempt=lambda tried: say(f"trying {describe_entry(tried.chosen)}"),
                )
            trials = [*trials, trial]
        else:
            found_plan = plan(workloads[0], target)
        plan_json = found_plan.to_json()
        if trials:
            plan_json["verified"] = [trial.to_json() for trial in trials]
        _write_or_show(
            json_file, plan_json, lambda: show_plan(found_plan, explain=explain, trials=trials)
        )
        return
    for levers in allowed:
        check_levers(target.kind, target.name, levers, target.replicas)
    cells = [plan_or_why(workload, target) for workload in workloads]
    place = describe_place(target.budget_bytes, target.replicas, target.name)
    title = f"effective batch {target_batch}, {place}"
    _write_or_show(
        json_file,
        {
            "target_batch": target_batch,
            "device": target.name,
            "budget_bytes": target.budget_bytes,
            "plans": [_cell_json(cell) for cell in cells],
        },
        lambda: show_grid(title, cells),
    )


def _write_or_show(json_file: Path | None, values: Any, show: Callable[[], None]) -> None:
    if json_file is not None:
        write_json(json_file, values)
    if str(json_file) != "-":
        show()


def _cell_json(cell: Cell) -> dict[str, Any]:
    if isinstance(cell, Plan):
        return cell.to_json()
    workload, why = cell
    return {"model": workload.model, "seq_len": workload.seq_len, "chosen": None, "why": why}


def _names(least: MinMemory) -> list[str]:
    return [card.name for card in cards_of(least.on_gpu_bytes)]


def _target(device: str, gpu: str | None, memory: int | None, replicas: int | None) -> _Target:
    if gpu is not None:
        accelerator = find_accelerator(gpu)
        if memory is not None and memory > accelerator.memory_bytes:
            raise InputError(
                f"--memory {format_bytes(memory)} is more than the "
                f"{format_bytes(accelerator.memory_bytes)} of {accelerator.name}"
            )
        if replicas is not None and accelerator.kind == "tpu":
            raise InputError(
                f"{accelerator.name} has {accelerator.replicas} devices",
                hint="leave --replicas out",
            )
        budget_bytes = accelerator.usable_bytes if memory is None else memory
        return _Target(
            accelerator.name,
            accelerator.kind,
            budget_bytes,
            gpu_rates(accelerator),
            replicas or accelerator.replicas,
        )
    budget = resolve_budget(device, memory)
    if replicas is not None and budget.device.peers and replicas != budget.device.replicas:
        raise InputError(
            f"--device {device} names {budget.device.replicas} GPUs, not {replicas}",
            hint="leave --replicas out",
        )
    return _Target(
        budget.device.name,
        budget.device.kind,
        budget.budget_bytes,
        device_rates(budget.device),
        replicas or budget.device.replicas,
        budget.device,
    )
