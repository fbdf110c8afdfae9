"""`bertbench probe`: the largest batch that really fits."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bertbench.cli.options.common import (
    BATCH,
    CONTEXT,
    MOST_SECONDS,
    REPLICAS,
    FiniteFloat,
    MemorySize,
    Whole,
    given_flags,
    json_option,
    ledger_option,
    resolve_budget,
    write_json,
)
from bertbench.cli.probe_view import (
    build_check_table,
    build_table,
    describe,
    headline,
    holes,
    shown,
)
from bertbench.core.errors import WorkError
from bertbench.core.published import PAPER_MODELS, PAPER_SEQ_LENS
from bertbench.core.terminal import say, terminal
from bertbench.core.units import MIB_BYTES, format_bytes
from bertbench.core.workload import MOST_BATCH, Levers, check_layers, published_workload
from bertbench.devices.accelerators import check_levers
from bertbench.devices.device import (
    Budget,
    Device,
    TpuSettings,
    check_alike,
    check_alone,
    check_free,
    make_budget,
)
from bertbench.devices.discover import resolve_device, tpu_device
from bertbench.devices.lock import devices_held
from bertbench.ledger.database import default_ledger_path, open_ledger
from bertbench.ledger.limit import find_limit
from bertbench.ledger.question import versions_key
from bertbench.probe.cell import predict_cell_seconds, probe_cell
from bertbench.probe.recheck import Check, check_claim, read_claims
from bertbench.probe.workers import share_out
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import HEADS
from finetune.spec.optimizers import EXACT_OPTIMIZER, OPTIMIZERS, PLACEMENTS
from finetune.spec.precisions import EXACT_PRECISION, PRECISIONS

_CPU_DEFAULT_BYTES = 512 * MIB_BYTES
_CPU_MODELS, _CPU_SEQ_LENS = "bert-tiny,bert-mini", "64,128"
_BESIDE_CHECK = ("checked_file", "ledger_file", "json_file", "share", "trial_timeout")
_PAPER_MODELS = ",".join(PAPER_MODELS)
_PAPER_SEQ_LENS = ",".join(map(str, PAPER_SEQ_LENS))


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
@click.option("--max-batch", type=Whole(1, MOST_BATCH), help="Look no further than this batch.")
@click.option(
    "--trial-timeout",
    type=FiniteFloat(1, MOST_SECONDS),
    metavar="SECONDS",
    help="Kill a trial that takes longer. Default: ten times what the others let expect, at "
    "least 15 minutes.",
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
    type=click.Path(dir_okay=False, path_type=Path),
    help="Repeat both trials of every certificate in an earlier probe's --json FILE.",
)
@json_option
def command(
    models: str | None,
    seq_lens: str | None,
    head: str,
    device: str,
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

    \b
    Example:
      bertbench probe --models bert-base --seq-lens 128,384 --memory 12GiB
    """
    ledger_path = ledger_file or default_ledger_path()
    if checked_file is not None:
        _nothing_else(click.get_current_context())
        _check(checked_file, ledger_path, share, trial_timeout, json_file)
        return
    named = [resolve_device(name) for name in _items(device)]
    if named[0].tpu is not None:
        if memory is not None or len(named) > 1:
            raise InputError(
                f"--device {device}: a TPU is probed alone, and with all memory of a core",
                hint="leave --memory and other devices out",
            )
        tpu = TpuSettings(named[0].tpu.name, tpu_zone, gcp_project, num_tpu_cores)
        named[0] = tpu_device(tpu)
    elif tpu_zone or gcp_project:
        raise InputError(
            f"--tpu-zone and --gcp-project do not go with --device {device}",
            hint="name the TPU with --device tpu:NAME",
        )
    on_cpu = named[0].kind == "cpu"
    if models is None:
        models = _CPU_MODELS if on_cpu else _PAPER_MODELS
    if seq_lens is None:
        seq_lens = _CPU_SEQ_LENS if on_cpu else _PAPER_SEQ_LENS
    names, lengths = _items(models), [_length(item) for item in _items(seq_lens)]
    levers = Levers(
        parse_checkpointing(checkpointing), accumulation, precision, optimizer, xla, placement
    )
    check_levers(named[0].kind, named[0].name, levers)
    workloads = [published_workload(name, length, head) for name in names for length in lengths]
    for workload in workloads:
        check_layers(workload, levers.checkpointing)
    interrupted = False
    with devices_held(named):
        budgets = _budgets(named, memory, share)
        if on_cpu and models is None and seq_lens is None:
            say(
                f"no accelerator: probing small models on the CPU under a cap of "
                f"{format_bytes(budgets[0].budget_bytes)}; for the paper's grid give "
                f"--models {_PAPER_MODELS} --seq-lens {_PAPER_SEQ_LENS} --memory 12GiB"
            )
        estimates = [predict_cell_seconds(budgets[0], workload, levers) for workload in workloads]
        with shown(workloads, estimates, len(budgets)) as view:

            def work(budget: Budget, index: int, check: Callable[[], None]) -> None:
                # A connection belongs to the thread that made it.
                with open_ledger(ledger_path) as ledger:
                    view.begin(index, budget.device.label)
                    cell = probe_cell(
                        ledger,
                        budget,
                        workloads[index],
                        levers,
                        max_batch=max_batch,
                        certify=not no_certify,
                        fresh=not resume,
                        timeout_seconds=trial_timeout,
                        on_attempt=functools.partial(view.attempt, index),
                        on_trial=functools.partial(view.trial, index),
                        check=check,
                    )
                    view.cell(index, cell)

            try:
                share_out(len(workloads), budgets, work)
            except KeyboardInterrupt:
                interrupted = True
    cells = [cell for _, cell in sorted(view.cells.items())]
    if json_file is not None:
        write_json(
            json_file,
            {
                **_measured_on(budgets[0]),
                # The other devices that cells were shared out among.
                "more_devices": [_device_json(budget) for budget in budgets[1:]],
                "cells": [cell.to_json() for cell in cells],
            },
        )
    if str(json_file) != "-":
        console = terminal()
        console.print(headline(budgets[0], levers), soft_wrap=True)
        finished = [workload for index, workload in enumerate(workloads) if index in view.cells]
        console.print(build_table(dict(enumerate(cells)), finished))
        for cell in cells:
            for line in holes(cell):
                console.print(line, soft_wrap=True)
        for index, running in view.running.items():
            fitting = find_limit(running.trials).max_batch or 0
            console.print(
                f"interrupted at {view.title(index)}: batch {fitting} fits; the same command goes "
                "on from there",
                soft_wrap=True,
            )
    if interrupted:
        raise KeyboardInterrupt
    failed = [cell for cell in cells if cell.result.stopped_by == "failed"]
    if failed:
        raise WorkError(
            f"{len(failed)} of {len(cells)} cells failed, the first one with: "
            f"{failed[0].result.message}"
        )


def _budgets(named: Sequence[Device], memory: int | None, share: bool) -> list[Budget]:
    """Budgets of devices, as they are now: of the same size, as trials count for all of them.

    Raises:
        InputError: others use one, or the devices are not alike.
    """
    if memory is None and named[0].kind == "cpu":
        memory = min(_CPU_DEFAULT_BYTES, named[0].total_bytes)
    names = [(device.uuid and f"gpu:{device.uuid}") or device.label for device in named]
    budgets = [
        make_budget(device, memory) if device.tpu else resolve_budget(name, memory)
        for name, device in zip(names, named, strict=True)
    ]
    check_alike([budget.device for budget in budgets])
    smallest_bytes = min(budget.budget_bytes for budget in budgets)
    budgets = [make_budget(budget.device, smallest_bytes) for budget in budgets]
    for budget in budgets:
        if not share:
            check_alone(budget.device)
        check_free(budget)
    return budgets


def _nothing_else(context: click.Context) -> None:
    """Refuse flags beside `--check` that the file answers already."""
    for flag in given_flags(context, _BESIDE_CHECK):
        raise InputError(
            f"{flag} does not go with --check, which repeats what the file says",
            hint=f"leave {flag} out",
        )


def _check(
    path: Path,
    ledger_path: Path,
    share: bool,
    timeout_seconds: float | None,
    json_file: Path | None,
) -> None:
    """Repeat the certificates of a file and say which hold."""
    budget, claims, others = read_claims(path)
    if not claims:
        raise InputError("no cell has a certificate", path=path)
    checks: list[Check] = []
    interrupted = False
    with devices_held([budget.device]), open_ledger(ledger_path) as ledger:
        budget, claims, others = read_claims(path)  # the device as it is now
        if not share:
            check_alone(budget.device)
        check_free(budget)
        try:
            for number, claim in enumerate(claims, 1):
                title = f"[{number}/{len(claims)}] {claim.workload.model} {claim.workload.seq_len}"

                def on_trial(trial: Trial, title: str = title) -> None:
                    say(f"{title}: {describe(trial)}")

                checks.append(
                    check_claim(
                        ledger, budget, claim, timeout_seconds=timeout_seconds, on_trial=on_trial
                    )
                )
        except KeyboardInterrupt:
            interrupted = True
    if json_file is not None:
        write_json(
            json_file,
            {**_measured_on(budget), "cells": [check.to_json() for check in checks]},
        )
    if str(json_file) != "-":
        console = terminal()
        console.print(build_check_table(checks))
        if others:
            console.print(f"{others} more without a certificate, not checked", soft_wrap=True)
    if interrupted:
        raise KeyboardInterrupt
    for found, word in (
        ([check for check in checks if check.wrong], "do not hold"),
        ([check for check in checks if check.failed], "could not be checked"),
    ):
        if found:
            claim, trial = found[0].claim, (found[0].wrong or found[0].failed)[0]
            raise WorkError(
                f"{len(found)} of {len(checks)} certificates {word}, the first one of "
                f"{claim.workload.model} {claim.workload.seq_len}: {describe(trial)}"
            )


def _items(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise InputError(f"{text!r} names nothing", hint="separate names with commas")
    return items


def _length(item: str) -> int:
    if not item.isdecimal() or len(item) > 9 or not int(item):
        raise InputError(f"{item!r} is not a sequence length", hint="as in --seq-lens 128,384")
    return int(item)


def _measured_on(budget: Budget) -> dict[str, Any]:
    """Device and versions, as a probe's file has them."""
    return {"device": _device_json(budget), "versions": json.loads(versions_key())}


def _device_json(budget: Budget) -> dict[str, Any]:
    return {**budget.device.to_json(), "budget_bytes": budget.budget_bytes}
