"""`bertbench probe`: the largest batch that really fits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bertbench.cli.options.common import (
    BATCH,
    CONTEXT,
    MAX_SECONDS,
    REPLICAS,
    FiniteFloat,
    MemorySize,
    PathName,
    Whole,
    given_flags,
    json_option,
    ledger_option,
    write_json,
)
from bertbench.cli.probe_product import ProductProbe, check_product, probe_product
from bertbench.cli.views.probe_view import (
    View,
    describe_trial,
    describe_workload,
    show_checks,
    show_results,
    shown,
)
from bertbench.core.errors import WorkError
from bertbench.core.published import PAPER_MODELS, PAPER_SEQ_LENS
from bertbench.core.terminal import say
from bertbench.core.units import format_bytes
from bertbench.core.workload import MAX_BATCH, Levers, Setup
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.device import Budget, Device, TpuSettings
from bertbench.hardware.discover import resolve_device, tpu_device
from bertbench.hardware.lock import devices_held
from bertbench.ledger.database import default_ledger_path, open_ledger
from bertbench.ledger.question import versions_key
from bertbench.probing.cell import ProbedCell, ProbeSettings
from bertbench.probing.compiled.claims import is_compiled
from bertbench.probing.grid import check_usable, equal_budgets, make_grid, probe_grid
from bertbench.probing.recheck import Check, check_claim, read_claims
from bertbench.probing.search import MAX_PROBED_BATCH
from bertbench.probing.time_estimates import predict_cell_seconds
from bertbench.trials.measure import measure_batches
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import HEADS
from finetune.spec.optimizers import EXACT_OPTIMIZER, OPTIMIZERS, PLACEMENTS
from finetune.spec.precisions import EXACT_PRECISION, PRECISIONS

# Models and sequence lengths, as their flags take them.
_CPU_GRID = "bert-tiny,bert-mini", "64,128"
_PAPER_GRID = ",".join(PAPER_MODELS), ",".join(map(str, PAPER_SEQ_LENS))

_BESIDE_CHECK = ("checked_file", "ledger_file", "json_file", "share", "trial_timeout")

_WITH_GPU = (
    "product", "models", "seq_lens", "head", "memory", "checkpointing", "accumulation", "precision",
    "optimizer", "xla", "max_batch", "resume", "jobs", "ledger_file", "json_file",
)  # fmt: skip


@click.command(context_settings=CONTEXT)
@click.option("--models", help="Published sizes, as in bert-base,bert-large.")
@click.option("--seq-lens", help="Tokens per example, as in 128,384.")
@click.option("--head", type=click.Choice(HEADS), default="squad", show_default=True)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, gpu:N, gpu:UUID, cpu or tpu:NAME. Like GPUs with commas between share the work.",
)
@click.option(
    "--gpu",
    "product",
    metavar="NAME",
    help="Ask the compiler of this product of the catalogue, a GPU or TPU that need not be here, "
    "as in titan-x or tpu-v2-8.",
)
@click.option("--tpu-zone", help="Zone of a TPU. Default: asked of the environment.")
@click.option("--gcp-project", help="Its project. Default: likewise.")
@click.option("--num-tpu-cores", type=REPLICAS, default=8, show_default=True)
@click.option(
    "--memory",
    type=MemorySize(),
    help="Bytes the allocator may use, as in 12GiB. "
    "Default: what is free of a GPU, 512MiB of a CPU.",
)
@click.option(
    "--checkpointing",
    default="none",
    show_default=True,
    help="none, selective, full, nested, or full:N for N layers.",
)
@click.option(
    "--accumulation",
    type=BATCH,
    default=1,
    show_default=True,
    help="Micro-batches per step; above 1 there are accumulators.",
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default=EXACT_PRECISION, show_default=True
)
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default=EXACT_OPTIMIZER, show_default=True
)
@click.option(
    "--placement",
    type=click.Choice(PLACEMENTS),
    default=PLACEMENTS[0],
    show_default=True,
    help="Where the optimizer's state is.",
)
@click.option("--xla", is_flag=True, help="Compile the step with XLA.")
@click.option("--max-batch", type=Whole(1, MAX_BATCH), help="Look no further than this batch.")
@click.option(
    "--trial-timeout",
    type=FiniteFloat(1, MAX_SECONDS),
    metavar="SECONDS",
    help="Kill a trial that takes longer. Default: ten times what the others let expect, at "
    "least 15 minutes.",
)
@click.option(
    "--jobs",
    type=Whole(1),
    help="With --gpu: compilations at once. Default: one a core, as far as memory allows.",
)
@click.option("--share", is_flag=True, help="Go on though others use the GPU, with what is free.")
@click.option("--no-certify", is_flag=True, help="Do not repeat the limit in fresh processes.")
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Take what the ledger knows, or measure again.",
)
@ledger_option
@click.option(
    "--check",
    "checked_file",
    type=PathName(dir_okay=False),
    help="Repeat both trials, or both compilations, of every limit in an earlier --json FILE.",
)
@json_option
def command(
    models: str | None,
    seq_lens: str | None,
    head: str,
    device: str,
    product: str | None,
    tpu_zone: str | None,
    gcp_project: str | None,
    num_tpu_cores: int,
    memory: int | None,
    checkpointing: str,
    accumulation: int,
    precision: str,
    optimizer: str,
    placement: str,
    xla: bool,
    max_batch: int | None,
    trial_timeout: float | None,
    jobs: int | None,
    share: bool,
    no_certify: bool,
    resume: bool,
    ledger_file: Path | None,
    checked_file: Path | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Largest batch that really fits, per model and sequence length, certified.

    A trial is a real training step in a process of its own: batch b fits, batch b + 1 runs out of
    memory. Without an accelerator the trials run on the CPU under a memory cap, and the default
    grid is a small one.

    With --gpu nothing runs: the compiler of that product tells what a step needs there, with XLA.

    \b
    Example:
      bertbench probe --models bert-base --seq-lens 128,384 --memory 12GiB
    """
    ledger_path = ledger_file or default_ledger_path()
    context = click.get_current_context()
    settings = ProbeSettings(
        max_batch,
        certify=not no_certify,
        ignore_ledger=not resume,
        timeout_seconds=trial_timeout,
        measure=context.obj or measure_batches,  # a test gives simulated trials
    )
    if checked_file is not None:
        _only(context, _BESIDE_CHECK, "--check, which repeats what the file says")
        if is_compiled(checked_file):
            check_product(checked_file, json_file)
        else:
            _check(checked_file, ledger_path, share, settings, json_file)
        return
    policy = parse_checkpointing(checkpointing)
    levers = Levers(policy, accumulation, precision, optimizer, xla, placement)
    if product is not None:
        _only(context, _WITH_GPU, "--gpu, which asks a compiler and runs no trial")
        cap = max_batch or MAX_PROBED_BATCH
        sizes = _sizes(models, seq_lens)
        probe = ProductProbe(ledger_path, cap, not resume, json_file, jobs)
        compiled = dataclasses.replace(levers, xla=True)
        probe_product(find_accelerator(product), memory, sizes, head, compiled, probe)
        return
    if jobs is not None:
        raise InputError("--jobs is for compilations", hint="name a product with --gpu")
    tpu = TpuSettings(None, tpu_zone, gcp_project, num_tpu_cores)
    devices = _devices(device, tpu, memory)
    on_cpu = devices[0].kind == "cpu"
    default_models, default_seq_lens = _CPU_GRID if on_cpu else _PAPER_GRID
    names = _items(default_models if models is None else models)
    lengths = _items(default_seq_lens if seq_lens is None else seq_lens)
    setups = make_grid(devices[0], names, [_length(item) for item in lengths], head, levers)
    with devices_held(devices):
        budgets = equal_budgets(devices, memory, share)
        if on_cpu and models is None and seq_lens is None:
            say(_small_grid_notice(device, budgets[0]))
        view, interrupted = _probe(ledger_path, budgets, setups, settings)
    _show(view, budgets, levers, json_file, interrupted)


def _devices(device: str, tpu: TpuSettings, memory: int | None) -> list[Device]:
    """Find the devices that `--device` names, a TPU with the settings of the other flags."""
    devices = [resolve_device(name) for name in _items(device)]
    if devices[0].tpu is not None:
        if memory is not None or len(devices) > 1:
            raise InputError(
                f"--device {device}: a TPU is probed alone, and with all memory of a core",
                hint="leave --memory and other devices out",
            )
        return [tpu_device(dataclasses.replace(tpu, name=devices[0].tpu.name))]
    if tpu.zone or tpu.project:
        raise InputError(
            f"--tpu-zone and --gcp-project do not go with --device {device}",
            hint="name the TPU with --device tpu:NAME",
        )
    return devices


def _small_grid_notice(device: str, budget: Budget) -> str:
    """Say that the default grid is a small one, and how to ask for the paper's."""
    models, seq_lens = _PAPER_GRID
    return (
        f"{'no accelerator: ' if device == 'auto' else ''}probing small models on the CPU under a "
        f"cap of {format_bytes(budget.budget_bytes)}; for the paper's grid give "
        f"--models {models} --seq-lens {seq_lens} --memory 12GiB"
    )


def _probe(
    ledger_path: Path, budgets: Sequence[Budget], setups: Sequence[Setup], settings: ProbeSettings
) -> tuple[View, bool]:
    """Probe the cells and show how far they are; tell whether that was interrupted."""
    estimates = [predict_cell_seconds(budgets[0], setup) for setup in setups]
    workloads = [setup.workload for setup in setups]
    with shown(workloads, estimates, len(budgets)) as view:
        try:
            probe_grid(ledger_path, budgets, setups, settings, view)
        except KeyboardInterrupt:
            return view, True
    return view, False


def _show(
    view: View, budgets: Sequence[Budget], levers: Levers, json_file: Path | None, interrupted: bool
) -> None:
    """Show and write the finished cells.

    Raises:
        KeyboardInterrupt: the probe was interrupted.
        WorkError: cells failed.
    """
    cells = view.finished()
    if json_file is not None:
        write_json(json_file, _to_json(budgets, cells))
    if str(json_file) != "-":
        show_results(view, budgets[0], levers)
    if interrupted:
        raise KeyboardInterrupt
    failed = [cell for cell in cells if cell.result.stopped_by == "failed"]
    if failed:
        raise WorkError(
            f"{len(failed)} of {len(cells)} cells failed, the first one with: "
            f"{failed[0].result.message}"
        )


def _only(context: click.Context, allowed: Sequence[str], what: str) -> None:
    """Refuse all flags but some beside one that leaves nothing for them to say."""
    for flag in given_flags(context, allowed):
        raise InputError(f"{flag} does not go with {what}", hint=f"leave {flag} out")


def _check(
    path: Path, ledger_path: Path, share: bool, settings: ProbeSettings, json_file: Path | None
) -> None:
    """Repeat the certificates of a file and say which hold."""
    budget, claims, others = read_claims(path)
    if not claims:
        raise InputError("no cell has a certificate", path=path)
    checks: list[Check] = []
    interrupted = False
    with devices_held([budget.device]), open_ledger(ledger_path) as ledger:
        budget, claims, others = read_claims(path)  # the device as it is now
        check_usable(budget, share)
        try:
            for number, claim in enumerate(claims, 1):
                title = f"[{number}/{len(claims)}] {describe_workload(claim.setup.workload)}"

                def on_trial(trial: Trial, title: str = title) -> None:
                    say(f"{title}: {describe_trial(trial)}")

                checks.append(check_claim(ledger, budget, claim, settings, on_trial))
        except KeyboardInterrupt:
            interrupted = True
    if json_file is not None:
        write_json(
            json_file, {**_measured_on(budget), "cells": [check.to_json() for check in checks]}
        )
    if str(json_file) != "-":
        show_checks(checks, others)
    if interrupted:
        raise KeyboardInterrupt
    for found, word in (
        ([check for check in checks if check.wrong], "do not hold"),
        ([check for check in checks if check.failed], "could not be checked"),
    ):
        if found:
            workload, trial = found[0].claim.setup.workload, (found[0].wrong or found[0].failed)[0]
            raise WorkError(
                f"{len(found)} of {len(checks)} certificates {word}, the first one of "
                f"{describe_workload(workload)}: {describe_trial(trial)}"
            )


def _items(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise InputError(f"{text!r} names nothing", hint="separate names with commas")
    return items


def _sizes(models: str | None, seq_lens: str | None) -> list[tuple[str, int]]:
    """Every model with every length; the paper's if none are named."""
    names = _items(_PAPER_GRID[0] if models is None else models)
    lengths = [_length(item) for item in _items(_PAPER_GRID[1] if seq_lens is None else seq_lens)]
    return [(model, length) for model in names for length in lengths]


def _length(item: str) -> int:
    if not item.isdecimal() or len(item) > 9 or not int(item):
        raise InputError(f"{item!r} is not a sequence length", hint="as in --seq-lens 128,384")
    return int(item)


def _to_json(budgets: Sequence[Budget], cells: Sequence[ProbedCell]) -> dict[str, Any]:
    """Values of a probe's file."""
    return {
        **_measured_on(budgets[0]),
        # The other devices that cells were shared out among.
        "more_devices": [_device_json(budget) for budget in budgets[1:]],
        "cells": [cell.to_json() for cell in cells],
    }


def _measured_on(budget: Budget) -> dict[str, Any]:
    """Device and versions, as a probe's file has them."""
    return {"device": _device_json(budget), "versions": json.loads(versions_key())}


def _device_json(budget: Budget) -> dict[str, Any]:
    return {**budget.device.to_json(), "budget_bytes": budget.budget_bytes}
