"""`bertbench plan`: the fastest setting that fits, predicted without running anything."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
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
from bertbench.cli.plan_product import verify_for_product
from bertbench.cli.views.plan_view import (
    show_accelerators,
    show_catalogue,
    show_grid,
    show_min_memory,
    show_plan,
)
from bertbench.compiling.compilation import Compilation, compile_step
from bertbench.core.progress import Advance, progress
from bertbench.core.published import PAPER_MODELS, PAPER_SEQ_LENS
from bertbench.core.terminal import say
from bertbench.core.workload import Workload, check_layers, published_workload
from bertbench.hardware.accelerators import (
    ACCELERATORS,
    WITHOUT_KERNELS,
    check_levers,
    find_accelerator,
    gpus_with,
)
from bertbench.hardware.device import Budget
from bertbench.hardware.discover import resolve_devices
from bertbench.ledger.database import (
    default_ledger_path,
    ledger_exists,
    open_ledger,
    read_ledger,
)
from bertbench.planning.min_memory import MinMemory
from bertbench.planning.planner import Plan, describe_planned_step
from bertbench.planning.requests import (
    PlannedDevice,
    PlanRequest,
    attached_device,
    catalogue_device,
    check_request,
)
from bertbench.planning.verify import verify_plan
from bertbench.planning.workload_plans import (
    min_memories,
    plan_accelerators,
    plan_or_reason,
    plan_workload,
)
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import HEADS


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
    help="Plan for a GPU or TPU of the catalogue; `list` shows it, `all` plans for each.",
)
@click.option(
    "--replicas",
    type=REPLICAS,
    help="Devices, all alike, that share the effective batch. Default: 1, or a TPU's.",
)
@click.option(
    "--checkpointing",
    help="Use this policy only: none, selective, full, nested, or full:N for N layers.",
)
@lever_options
@click.option("--explain", is_flag=True, help="Show what the memory is used for.")
@click.option(
    "--min-memory",
    is_flag=True,
    help="Find the smallest memory for the target instead (on a GPU: --gpu all).",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Run two steps of the plan to see that it fits; with --gpu NAME --xla, or for a TPU, "
    "compile it for the product instead.",
)
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
    xla: bool,
    allow: str | None,
    explain: bool,
    min_memory: bool,
    verify: bool,
    ledger_file: Path | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Fastest micro-batch x accumulation x checkpointing for a target batch.

    The update is the one that the whole target batch would give, unless --allow names
    levers that change it. Peak and time are predicted; `bertbench probe` measures.

    \b
    Example:
      bertbench plan --target-batch 32 --model bert-large --seq-len 384 \\
        --memory 12GiB --json plan.json
      bertbench plan --target-batch 24 --model bert-large --seq-len 384 \\
        --min-memory
    """
    product = (gpu or "").lower()
    if product == "list":
        _list_catalogue(json_file)
        return
    request = PlanRequest(
        target_batch,
        None if checkpointing is None else [parse_checkpointing(checkpointing)],
        allowed_levers(precision, optimizer, placement, allow, xla=xla),
        host_if_needed=placement is None,
        ledger_file=ledger_file,
    )
    if ledger_file is not None and ledger_exists(ledger_file):
        with read_ledger(ledger_file):
            pass  # Otherwise each workload would have its damage for a reason.
    single = model is not None and seq_len is not None
    for_each = product == "all" and not min_memory
    if for_each and (explain or verify):
        raise InputError(
            f"{'--verify' if verify else '--explain'} does not go with --gpu all",
            hint="name one product",
        )
    if not single:
        _check_single({"--gpu all": for_each, "--explain": explain, "--verify": verify})
    workloads = _workloads(request, model, seq_len, head)
    if min_memory:
        _check_min_memory(
            {"--memory": memory is not None, "--explain": explain, "--verify": verify}, gpu
        )
        kind, own_replicas = _kind_and_replicas(device, product)
        if xla and kind == "cpu":
            raise InputError(
                "--min-memory --xla on a CPU tells nothing of GPUs", hint="add --gpu all"
            )
        for levers in request.allowed:
            check_levers(kind, kind, levers, replicas or own_replicas)
        _find_min_memory(request, workloads, kind, replicas or own_replicas, json_file)
    elif for_each:
        _plan_accelerators(request, workloads[0], memory, replicas, json_file)
    elif single:
        target = _device(device, gpu, memory, replicas)
        _plan_one(request, workloads[0], target, explain, verify, json_file)
    else:
        _plan_grid(request, workloads, _device(device, gpu, memory, replicas), json_file)


def _check_single(given: dict[str, bool]) -> None:
    """Refuse flags that need a single workload."""
    for flag in (flag for flag, is_given in given.items() if is_given):
        raise InputError(f"{flag} is for one workload", hint="give --model and --seq-len")


def _check_min_memory(given: dict[str, bool], gpu: str | None) -> None:
    """Refuse flags that do not go with --min-memory."""
    for flag in (flag for flag, is_given in given.items() if is_given):
        raise InputError(f"--min-memory does not go with {flag}", hint="leave it out")
    if gpu is not None and gpu.lower() != "all":
        raise InputError(
            f"--min-memory does not go with --gpu {gpu}",
            hint="leave --gpu out; --min-memory shows which GPUs are large enough",
        )


def _workloads(
    request: PlanRequest, model: str | None, seq_len: int | None, head: str
) -> list[Workload]:
    """The workloads to plan: of the paper's grid, where no model or no length is given."""
    workloads = [
        published_workload(name, length, head)
        for name in (PAPER_MODELS if model is None else (model,))
        for length in (PAPER_SEQ_LENS if seq_len is None else (seq_len,))
    ]
    for workload in workloads:
        for policy in request.policies or ():
            check_layers(workload, policy)
    return workloads


def _kind_and_replicas(device: str, product: str) -> tuple[str, int]:
    """Kind and number of the devices that --device names, or those of `--gpu all`."""
    if product == "all":
        return "gpu", 1
    resolved = resolve_devices(device)
    return resolved.kind, resolved.replicas


def _device(
    device: str, gpu: str | None, memory: int | None, replicas: int | None
) -> PlannedDevice:
    if gpu is not None:
        return catalogue_device(find_accelerator(gpu), memory, replicas)
    return attached_device(resolve_budget(device, memory), replicas)


def _list_catalogue(json_file: Path | None) -> None:
    products = list(ACCELERATORS.values())
    values = [dataclasses.asdict(a) for a in products]
    _write_or_show(json_file, values, lambda: show_catalogue(products, WITHOUT_KERNELS))


def _find_min_memory(
    request: PlanRequest,
    workloads: Sequence[Workload],
    device_kind: str,
    replicas: int,
    json_file: Path | None,
) -> None:
    found: list[MinMemory] = []
    # A single workload takes a second or two.
    shown: contextlib.AbstractContextManager[Advance]
    shown = contextlib.nullcontext(lambda done, note: None)
    if len(workloads) > 1:
        shown = progress("smallest memory", len(workloads), "workloads")
    with shown as advance:
        for smallest in min_memories(request, workloads, device_kind, replicas):
            found.append(smallest)
            workload = smallest.step.workload
            advance(len(found), f"{workload.model} {workload.seq_len}")
    values = [
        {**smallest.to_json(), "cards": [a.name for a in gpus_with(smallest.on_gpu_bytes)]}
        for smallest in found
    ]
    _write_or_show(
        json_file,
        {"target_batch": request.target_batch, "device_kind": device_kind, "workloads": values},
        lambda: show_min_memory(request.target_batch, found),
    )


def _plan_accelerators(
    request: PlanRequest,
    workload: Workload,
    memory: int | None,
    replicas: int | None,
    json_file: Path | None,
) -> None:
    # The table does not show them.
    request = dataclasses.replace(request, alternatives=json_file is not None)
    answers = plan_accelerators(request, workload, memory, replicas)
    values = [{"card": a.name, **answer.to_json()} for a, answer in answers.items()]
    _write_or_show(
        json_file,
        {"target_batch": request.target_batch, "cards": values},
        lambda: show_accelerators(request.target_batch, workload, answers),
    )


def _plan_one(
    request: PlanRequest,
    workload: Workload,
    device: PlannedDevice,
    explain: bool,
    verify: bool,
    json_file: Path | None,
) -> None:
    evidence: list[Trial] | list[Compilation] = []
    if not verify:
        plan = plan_workload(request, workload, device)
    elif device.accelerator is not None:
        # A test gives a simulated compiler.
        compile_ = click.get_current_context().obj or compile_step
        plan, evidence = verify_for_product(request, workload, device, compile_)
    else:
        plan, evidence = _verified(request, workload, device)
    values = plan.to_json()
    if evidence:
        values["verified"] = [one.to_json() for one in evidence]
    _write_or_show(json_file, values, lambda: show_plan(plan, explain=explain, evidence=evidence))


def _verified(
    request: PlanRequest, workload: Workload, device: PlannedDevice
) -> tuple[Plan, list[Trial]]:
    """Return a plan that a trial has shown to fit, and the trials of it and of those before.

    Raises:
        InputError: several devices are to share the batch.
    """
    if device.attached is None or device.replicas > 1:
        raise InputError(
            "--verify needs one device alone", hint="leave --replicas out, and name one --device"
        )
    with open_ledger(request.ledger_file or default_ledger_path()) as ledger:
        plan, trial, refuted = verify_plan(
            lambda spare_bytes: plan_workload(
                request, workload, dataclasses.replace(device, spare_bytes=spare_bytes)
            ),
            Budget(device.attached, device.budget_bytes),
            ledger,
            on_attempt=lambda tried: say(f"trying {describe_planned_step(tried.chosen)}"),
        )
    return plan, [*refuted, trial]


def _plan_grid(
    request: PlanRequest,
    workloads: Sequence[Workload],
    device: PlannedDevice,
    json_file: Path | None,
) -> None:
    # Otherwise each workload would have this for a reason.
    check_request(request, device)
    # The table does not show them.
    request = dataclasses.replace(request, alternatives=json_file is not None)
    answers = [plan_or_reason(request, workload, device) for workload in workloads]
    _write_or_show(
        json_file,
        {
            "target_batch": request.target_batch,
            "device": device.name,
            "budget_bytes": device.budget_bytes,
            "plans": [answer.to_json() for answer in answers],
        },
        lambda: show_grid(request.target_batch, device, answers),
    )


def _write_or_show(json_file: Path | None, values: Any, show: Callable[[], None]) -> None:
    if json_file is not None:
        write_json(json_file, values)
    if str(json_file) != "-":
        show()
