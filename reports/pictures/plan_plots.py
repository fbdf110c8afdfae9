"""Pictures of plans: their peak by part, their alternatives, and memory during a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Setup
from bertbench.memory.prediction import has_trace
from bertbench.planning.planner import Plan, PlannedStep, describe_setting
from reports.environments import Environment
from reports.pictures.figures import INK, Picture, add_legend, look_of, panels
from reports.pictures.timeline import step_timeline
from reports.recommendations import Recommendation
from reports.tables import system_name

_PARTS = (
    "weights", "optimizer_state", "accumulators", "gradients", "saved_activations", "working_set",
    "all_reduce",
)  # fmt: skip
"""Parts of a footprint that may be large; all others are drawn as one."""


def footprint_picture(
    recommendations: Sequence[Recommendation], names: Mapping[Environment, str]
) -> Picture | None:
    """Draw the peak of the chosen plans, part by part, beside the measured peak."""
    chosen = [(one, one.plan) for one in recommendations if isinstance(one.plan, Plan)]
    if not chosen:
        return None
    where = [f"{one.task}, {names[one.environment]}" for one, _ in chosen]
    same = len(set(where)) == 1
    labels = [_plan_name(one, plan) for one, plan in chosen]
    if not same:  # told where it changes
        before = ["", *where]
        labels = [
            f"{w}\n{label}" if w != b else label
            for label, w, b in zip(labels, where, before, strict=False)
        ]

    def draw() -> Figure:
        figure = Figure(figsize=(5.8, 0.55 * len(chosen) + 1.5), layout="constrained")
        axis = figure.subplots()
        parts = [_large_parts(plan) for _, plan in chosen]
        left = [0.0] * len(chosen)
        for number, name in enumerate([*_PARTS, _OTHER]):
            sizes = [part.get(name, 0) / MIB_BYTES for part in parts]
            if not any(sizes):
                continue
            look = look_of(number)
            axis.barh(
                [y - 0.16 for y in range(len(chosen))], sizes, 0.34, left=left, color=look.color,
                hatch=look.hatch, edgecolor=INK, linewidth=0.4, label=name.replace("_", " "),
            )  # fmt: skip
            left = [low + size for low, size in zip(left, sizes, strict=True)]
        measured = [
            (y + 0.2, (one.trial.peak_bytes or 0) / MIB_BYTES)
            for y, (one, _) in enumerate(chosen)
            if one.trial is not None
        ]
        if measured:
            axis.barh(
                [y for y, _ in measured], [size for _, size in measured], 0.28, color="none",
                edgecolor=INK, linewidth=1.0, label="measured",
            )  # fmt: skip
        for y, (one, _) in enumerate(chosen):
            budget = one.environment.budget_bytes / MIB_BYTES
            axis.plot([budget, budget], [y - 0.38, y + 0.38], color=look_of(5).color, linewidth=1.6)
        axis.plot([], [], color=look_of(5).color, linewidth=1.6, label="budget")
        axis.set_yticks(range(len(chosen)), labels, fontsize=9 if same else 8)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.set(xlabel="bytes in use at the peak of a step (MiB)")
        add_legend(figure, [axis])
        return figure

    return Picture(
        "footprint",
        "What the chosen plans hold at their peak" + (f": {where[0]}" if same else ""),
        "Predicted part by part; the open bar is the peak of a trial of the same setting.",
        draw,
        wide=False,
    )


_OTHER = "inputs, small tensors, allocator"


def _large_parts(plan: Plan) -> dict[str, int]:
    parts = plan.chosen.footprint.parts
    large = {name: parts.get(name, 0) for name in _PARTS}
    return {**large, _OTHER: sum(parts.values()) - sum(large.values())}


def _plan_name(recommendation: Recommendation, plan: Plan) -> str:
    workload = recommendation.workload
    return f"{system_name(workload.model)} {workload.seq_len}\n{_setting(plan.chosen)}"


def _setting(planned: PlannedStep) -> str:
    text = describe_setting(planned.step)
    return text.replace("checkpointing ", "")


_CHARACTER = 0.012
"""Width of a letter of a label, as a fraction of the budget."""


def front_picture(recommendation: Recommendation, where: str) -> Picture | None:
    """Draw seconds against bytes: the chosen setting, and those that need less memory."""
    plan = recommendation.plan
    if not isinstance(plan, Plan):
        return None

    def draw() -> Figure:
        figure, (axis,) = panels(1)
        steps = [plan.chosen, *plan.alternatives]
        points = [(e.footprint.peak_bytes / MIB_BYTES, e.predicted_step_seconds) for e in steps]
        look, wall = look_of(0), look_of(5).color
        axis.step(*zip(*points, strict=True), where="pre", color=look.color, linewidth=1.0)
        axis.plot(*zip(*points[1:], strict=True), "o", color=look.color, markerfacecolor="none",
                  label="needs less, takes longer") if points[1:] else None  # fmt: skip
        axis.plot(*points[0], "*", markersize=13, color=look_of(1).color, markeredgecolor=INK,
                  label="chosen")  # fmt: skip
        axis.axvline(plan.budget_bytes / MIB_BYTES, color=wall, linestyle="--", label="budget")
        right, highest = plan.budget_bytes / MIB_BYTES, max(y for _, y in points)
        width = _CHARACTER * right * (len(_setting(plan.chosen)) + 2)
        x, y = points[0]  # nothing is drawn below the chosen one
        beside = "left" if x < width / 2 else "right" if x + width / 2 > right else "center"
        axis.annotate(_setting(plan.chosen), (x, y), xytext=(0, -8), fontsize=7.5,
                      textcoords="offset points", ha=beside, va="top")  # fmt: skip
        labels: list[tuple[float, float, float]] = []  # left, right and height
        for planned, (x, y) in zip(steps[1:], points[1:], strict=True):
            text = _setting(planned)
            width = _CHARACTER * right * (len(text) + 2)
            # Above the line, which goes to the right from every point.
            to_the_right = x < width or x + width < right
            starts = x if to_the_right else x - width
            on_another = any(
                starts < end and start < starts + width and abs(y - height) < 0.08 * highest
                for start, end, height in labels
            )
            on_a_mark = any(
                starts < other < starts + width and 0 < height - y < 0.12 * highest
                for other, height in points
            )
            if on_another or on_a_mark:
                continue
            labels.append((starts, starts + width, y))
            axis.annotate(
                text, (x, y), xytext=(3 if to_the_right else -6, 6), fontsize=7.5,
                textcoords="offset points", ha="left" if to_the_right else "right",
            )  # fmt: skip
        axis.set_xlim(left=0, right=1.08 * plan.budget_bytes / MIB_BYTES)
        axis.set_ylim(bottom=0, top=1.2 * max(y for _, y in points))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.set(xlabel="predicted peak (MiB)", ylabel="seconds of an effective batch")
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    model, seq_len = recommendation.workload.model, recommendation.workload.seq_len
    return Picture(
        f"front-{model}-{seq_len}",
        f"Time against memory: {system_name(model)}, sequence length {seq_len}, "
        f"effective batch {plan.target_batch}",
        f"{recommendation.task}, {where}. Each setting is the fastest of those that need as "
        "little; all are predicted.",
        draw,
        wide=False,
    )


def timeline_picture(recommendation: Recommendation, where: str) -> Picture | None:
    """Draw the bytes in use during one step, by phase.

    Returns:
        None if there is no trace of the step.
    """
    plan = recommendation.plan
    if not isinstance(plan, Plan):
        return None
    levers, kind = plan.chosen.step.levers, recommendation.environment.kind
    if not has_trace(Setup(recommendation.workload, levers), kind):
        return None
    timeline = step_timeline(recommendation.workload, levers, plan.chosen.step.micro_batch)
    if timeline is None:
        return None

    def draw() -> Figure:
        figure = Figure(figsize=(5.8, 3.2), layout="constrained")
        axis = figure.subplots()
        x = timeline.sampled
        layers: list[tuple[str, list[int]]] = [
            ("weights and optimizer state", [timeline.state_bytes] * len(x)),
            ("gradients and their sums", timeline.gradient_bytes[x].tolist()),
            ("activations", timeline.activation_bytes[x].tolist()),
        ]
        below = [0.0] * len(x)
        for number, (name, values) in enumerate(layers):
            look = look_of((0, 2, 1)[number])
            above = [low + value / MIB_BYTES for low, value in zip(below, values, strict=True)]
            axis.fill_between(x, below, above, color=look.color, alpha=0.75, linewidth=0,
                              label=name)  # fmt: skip
            below = above
        axis.axhline(plan.budget_bytes / MIB_BYTES, color=look_of(5).color, linestyle="--",
                     label="budget")  # fmt: skip
        top = 1.12 * max(plan.budget_bytes / MIB_BYTES, max(below))
        for number, phase in enumerate(timeline.phases):
            if number:
                axis.axvline(phase.start, color=INK, linewidth=0.7, linestyle=":")
            axis.text((phase.start + phase.end) / 2, 0.99 * top, phase.name, ha="center", va="top",
                      fontsize=7)  # fmt: skip
        axis.set_ylim(0, top)
        axis.set_xlim(0, timeline.events)
        axis.set_xticks([])
        axis.grid(False, axis="x")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axis.set(xlabel="allocate and free events of one optimizer step, in their order",
                 ylabel="in use (MiB)")  # fmt: skip
        add_legend(figure, [axis])
        return figure

    recorded = "" if kind == "cpu" else " on a CPU"
    steps, shown = levers.accumulation_steps, timeline.micro_batches
    more = (
        f" {shown} of the {steps} micro-batches are shown; the others are alike."
        if steps > shown
        else ""
    )
    return Picture(
        f"timeline-{recommendation.workload.model}-{recommendation.workload.seq_len}",
        f"Memory over one step: {_plan_name(recommendation, plan).replace(chr(10), ', ')}",
        f"{recommendation.task}, {where}. Replayed from the trace of steps that were "
        f"recorded{recorded}.{more}",
        draw,
        wide=False,
    )
