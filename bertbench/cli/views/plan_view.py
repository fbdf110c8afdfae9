"""Tables and notes that `bertbench plan` prints."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from bertbench.compiling.compilation import Compilation
from bertbench.core.terminal import terminal
from bertbench.core.units import GIB_BYTES, format_bytes
from bertbench.core.workload import Levers, Workload
from bertbench.hardware.accelerators import Accelerator, gpus_with, match_accelerator
from bertbench.hardware.tensorflow_support import TENSORFLOW
from bertbench.planning.min_memory import MinMemory
from bertbench.planning.planner import Plan, PlannedStep, describe_split
from bertbench.planning.requests import PlannedDevice
from bertbench.planning.workload_plans import NoPlan
from bertbench.trials.trial import Trial
from finetune.spec.recipes import find_recipe, train_steps


class _Marks:
    """Stars for settings that change the update, and notes below the table that explain them."""

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


def _describe_budget(budget_bytes: int, replicas: int, device: str) -> str:
    """Write `4,096 MiB on t4`, or `4,096 MiB on each of 2 replicas on t4`."""
    each = f"each of {replicas} replicas on " if replicas > 1 else ""
    return f"{format_bytes(budget_bytes)} on {each}{device}"


def _unmeasured(plans: Iterable[Plan]) -> list[str]:
    """Notes on plans whose predictions no measurement has confirmed."""
    if any(plan.device_kind == "tpu" for plan in plans):
        return ["tpu: by a formula, unless compiled (--verify); it multiplies in bfloat16"]
    return []


def _on_host(levers: Levers) -> str:
    return " + host" if levers.placement == "host" else ""


def _row(planned: PlannedStep, marks: _Marks) -> tuple[str, ...]:
    levers = planned.step.levers
    steps = levers.accumulation_steps
    return (
        str(planned.step.micro_batch),
        str(steps),
        f"{levers.checkpointing}{marks.star(levers)}{_on_host(levers)}",
        format_bytes(planned.footprint.peak_bytes),
        f"{planned.predicted_step_seconds:.3g} s",
    )


_TITLES = ("micro-batch", "accum", "checkpointing", "peak", "time/batch")


def _table(*first: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in (*first, *_TITLES):
        left = title in ("model", "checkpointing", "")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    return table


def show_plan(
    plan: Plan, *, explain: bool = False, evidence: Sequence[Trial] | Sequence[Compilation] = ()
) -> None:
    """Show a plan: the chosen setting, those that need less memory, those that would be faster.

    Args:
        plan: the plan.
        explain: show what the memory is used for.
        evidence: trials or compilations of larger plans that did not fit, and then of this one.
    """
    console = terminal()
    budget = _describe_budget(plan.budget_bytes, plan.chosen.replicas, plan.device)
    console.print(
        f"{plan.workload.model}, sequence length {plan.workload.seq_len}, effective batch "
        f"{plan.target_batch}, {budget}",
        soft_wrap=True,
    )
    table, marks = _table(""), _Marks()
    table.add_row("chosen", *_row(plan.chosen, marks))
    for planned in plan.alternatives[:6]:
        table.add_row("smaller", *_row(planned, marks))
    console.print(table)
    _print_notes(console, marks, [plan], on_host=False)
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
            f"not {describe_split(rejection.step)} with "
            f"checkpointing {rejection.step.levers.describe()}: {rejection.why}",
            soft_wrap=True,
        )
    if plan.timed_trials:
        console.print(f"Times are as in {plan.timed_trials} trials on this device.")
    for one in evidence:
        said = (
            _measured(plan, one) if isinstance(one, Trial) else _compiled(one, one is evidence[-1])
        )
        console.print(said, soft_wrap=True)
    if explain:
        show_parts(plan.chosen, plan.budget_bytes)
    for line in _recipe_lines(plan):
        console.print(line, soft_wrap=True)


def _measured(plan: Plan, trial: Trial) -> str:
    """Describe the result of a trial; all but the last are of plans that did not fit."""
    if trial.outcome == "oom":
        return f"measured: micro-batch {trial.batch} of a larger plan runs out of memory"
    assert trial.peak_bytes is not None
    assert trial.step_seconds is not None
    error = plan.chosen.footprint.peak_bytes / trial.peak_bytes - 1
    return (
        f"measured: fits, peak {format_bytes(trial.peak_bytes)} (predicted {error:+.2%}), "
        f"{trial.step_seconds:.3g} s a batch"
    )


def _compiled(compilation: Compilation, is_last: bool) -> str:
    """Describe a compilation; all but the last are of plans that did not fit."""
    memory = compilation.memory
    needs = "" if memory is None else f", needs {format_bytes(memory.device_bytes)}"
    if not is_last:
        return (
            f"compiled: micro-batch {compilation.micro_batch} of a larger plan is too large{needs}"
        )
    return f"compiled: fits{needs}; the compiler's word, nothing was run"


def _recipe_lines(plan: Plan) -> list[str]:
    """Describe the recipe of the task, and how long it takes."""
    recipe = find_recipe(plan.workload.head, plan.workload.model, plan.target_batch)
    rate = f"learning rate {recipe.learning_rate:g}"
    lines = [
        f"recipe: {recipe.task}, batch {recipe.batch_size}, {rate}, {recipe.epochs:g} epochs "
        f"({recipe.source})"
    ]
    if recipe.examples:
        steps = train_steps(recipe.examples, plan.target_batch, recipe.epochs)
        lines.append(
            f"{recipe.examples:,} examples: {steps:,} steps of {plan.target_batch}, about "
            f"{_duration(steps * plan.chosen.predicted_step_seconds)}"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:,.0f} h"


_BAR_COLUMNS = 42


def show_parts(planned: PlannedStep, budget_bytes: int) -> None:
    """Show the footprint as bars, a line for each part, from 0 bytes to the budget."""
    console = terminal()
    footprint = planned.footprint
    console.print(
        f"{format_bytes(footprint.peak_bytes)} of {format_bytes(budget_bytes)} at the peak, in the "
        f"{footprint.phase}",
        soft_wrap=True,
    )
    below = 0
    parts: Mapping[str, int] = {**footprint.parts, "free": budget_bytes - footprint.peak_bytes}
    for name, size_bytes in parts.items():
        start, end = (
            round(_BAR_COLUMNS * edge / budget_bytes) for edge in (below, below + size_bytes)
        )
        bar = " " * start + ("\u2591" if name == "free" else "\u2588") * (end - start)
        below += size_bytes
        if size_bytes:
            console.print(
                f"{name.replace('_', ' '):18s} {format_bytes(size_bytes):>10s} "
                f"{size_bytes / budget_bytes:5.1%} {bar}"
            )


def show_grid(target_batch: int, device: PlannedDevice, answers: Sequence[Plan | NoPlan]) -> None:
    """Show plans for several workloads, a line for each."""
    console = terminal()
    budget = _describe_budget(device.budget_bytes, device.replicas, device.name)
    console.print(f"effective batch {target_batch}, {budget}", soft_wrap=True)
    table, marks = _table("model", "seq"), _Marks()
    for answer in answers:
        first = answer.workload.model, str(answer.workload.seq_len)
        if isinstance(answer, Plan):
            table.add_row(*first, *_row(answer.chosen, marks))
        else:
            table.add_row(*first, "-", "-", "does not fit", "-", "-")
    console.print(table)
    plans = [answer for answer in answers if isinstance(answer, Plan)]
    _print_notes(console, marks, plans)
    same = "every other" if marks.notes() else "every"
    console.print(f"Peak and time are predicted; {same} setting gives the same update.")


def show_accelerators(
    target_batch: int, workload: Workload, answers: Mapping[Accelerator, Plan | NoPlan]
) -> None:
    """Show the plans of one workload for many accelerators, a line for each."""
    console = terminal()
    console.print(
        f"{workload.model}, sequence length {workload.seq_len}, effective batch {target_batch}",
        soft_wrap=True,
    )
    table, marks = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0)), _Marks()
    for title in ("accelerator", "memory", "batch", "accum", "checkpointing", "peak", "time"):
        left = title in ("accelerator", "checkpointing")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    plans = {a: answer for a, answer in answers.items() if isinstance(answer, Plan)}
    for accelerator, plan in plans.items():
        memory = f"{accelerator.memory_bytes // GIB_BYTES} GiB"
        many = f"{plan.chosen.replicas} x " if plan.chosen.replicas > 1 else ""
        table.add_row(accelerator.name, many + memory, *_row(plan.chosen, marks))
    console.print(table)
    none = [accelerator.name for accelerator in answers if accelerator not in plans]
    if none:
        console.print(f"no plan for {', '.join(none)}", soft_wrap=True)
    _print_notes(console, marks, list(plans.values()))
    console.print("Batch is the micro-batch. Peak and time, of an effective batch, are predicted.")


def _print_notes(
    console: Console, marks: _Marks, plans: Sequence[Plan], on_host: bool = True
) -> None:
    """Print what a reader must know of the plans in a table."""
    for note in (*marks.notes(), *_unmeasured(plans)):
        console.print(note, soft_wrap=True)
    accelerators = {plan.device: match_accelerator(plan.device) for plan in plans}
    _print_cautions(console, [found for found in accelerators.values() if found is not None])
    if on_host and any(_on_host(plan.chosen.step.levers) for plan in plans):
        console.print("host: the optimizer's state is in the host's memory")


def show_min_memory(target_batch: int, found: Sequence[MinMemory]) -> None:
    """Show the smallest memory for a target and the smallest GPU with it, a workload a line."""
    console = terminal()
    console.print(f"smallest memory for an effective batch of {target_batch}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for title in ("model", "seq", "memory", "micro-batch", "accum", "checkpointing", "GPU"):
        left = title in ("model", "checkpointing", "GPU")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for smallest in found:
        step, gpus = smallest.step, gpus_with(smallest.on_gpu_bytes)
        table.add_row(
            step.workload.model,
            str(step.workload.seq_len),
            format_bytes(smallest.budget_bytes),
            str(step.micro_batch),
            str(step.levers.accumulation_steps),
            str(step.levers.checkpointing),
            gpus[0].name if gpus else "none",
        )
    console.print(table)


def show_catalogue(accelerators: Sequence[Accelerator], refused: Mapping[str, float]) -> None:
    """Show the accelerators of the catalogue, a line for each, under the names of generations.

    Args:
        accelerators: the accelerators, those of a generation one after the other.
        refused: GPUs that TensorFlow has no kernels for, with their compute capability.
    """
    console = terminal()
    table = Table(box=None, pad_edge=False)
    for title in ("name", "memory", "usable", "float32", "bandwidth"):
        table.add_column(title, justify="left" if title == "name" else "right", no_wrap=True)
    for generation, group in itertools.groupby(accelerators, key=lambda one: one.generation):
        members = list(group)
        if table.row_count:
            table.add_row()
        table.add_row(_heading(generation, members))
        for accelerator in members:
            many = f"{accelerator.replicas} x " if accelerator.replicas > 1 else ""
            table.add_row(
                f"  {accelerator.name}",
                f"{many}{accelerator.memory_bytes // GIB_BYTES} GiB",
                format_bytes(accelerator.usable_bytes),
                f"{accelerator.flops_per_second / 1e12:,.1f} TFLOP/s",
                f"{accelerator.bytes_per_second / 1e9:,.0f} GB/s",
            )
    console.print(table)
    console.print("Of a TPU: each of its devices, and the rate of bfloat16.")
    _print_cautions(console, accelerators)
    names = ", ".join(f"{name} ({capability})" for name, capability in refused.items())
    console.print(f"{TENSORFLOW} has no kernels for these, which are refused: {names}.")


def _heading(generation: str, members: Sequence[Accelerator]) -> str:
    """Name a generation, and the compute capabilities of its GPUs."""
    capabilities = sorted({a.compute_capability for a in members if a.compute_capability})
    return " ".join([generation, ", ".join(map(str, capabilities))]).strip()


def _print_cautions(console: Console, accelerators: Iterable[Accelerator]) -> None:
    """Print, once each, why TensorFlow may not run on some accelerators."""
    named: dict[str, list[str]] = {}
    for accelerator in accelerators:
        if accelerator.caution is not None:
            named.setdefault(accelerator.caution, []).append(accelerator.name)
    for caution, names in named.items():
        console.print(f"{', '.join(names)}: {caution}.")
