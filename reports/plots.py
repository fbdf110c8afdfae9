"""Pictures of limits, speed and footprints."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bertbench.bytes import MIB_BYTES
from bertbench.fitting import has_trace
from bertbench.paper import PUBLISHED_MAX_BATCH
from bertbench.planner import Plan, PlanEntry, describe_setting
from reports.cells import AT_LEAST, CERTIFIED, Cell, model_order, setting_order, trial_rate
from reports.figures import INK, Look, Picture, add_legend, labelled, look_of
from reports.places import Place
from reports.planning import Planned
from reports.predictions import Prediction
from reports.tables import system_name
from reports.timeline import step_timeline

_MOST_PANELS = 6
_MOST_SETTINGS = 8
_PANEL_WIDTH, _PANEL_HEIGHT = 4.2, 3.1

_PARTS = (
    "weights", "optimizer_state", "accumulators", "gradients", "saved_activations", "working_set",
    "all_reduce",
)  # fmt: skip
"""Those that may be large; all else is drawn as one."""


def _panels(count: int, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each thing."""
    width = _PANEL_WIDTH
    if count == 1:
        columns, width = 1, 1.35 * _PANEL_WIDTH
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, _PANEL_HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def limits_picture(cells: Sequence[Cell], where: str) -> Picture | None:
    """Largest micro-batch against sequence length, a panel for each model.

    Args:
        cells: of one place and one task.
        where: names the two.
    """
    known = [cell for cell in cells if cell.max_batch is not None and cell.of_limit]
    models = sorted({cell.model for cell in known}, key=model_order)[-_MOST_PANELS:]
    settings = sorted({(setting_order(c.levers), c.setting) for c in known}, key=lambda s: s[0])
    looks = {name: look_of(number) for number, (_, name) in enumerate(settings[:_MOST_SETTINGS])}
    if not models:
        return None
    caption = "Filled marks are certified: the next batch runs out of memory in a fresh process."
    if any(cell.max_batch == 0 for cell in known):
        caption += " 0 is drawn at the bottom."
    if len(settings) > _MOST_SETTINGS or len({cell.model for cell in known}) > _MOST_PANELS:
        caption += f" The first {_MOST_SETTINGS} settings of the largest {_MOST_PANELS} models."

    def draw(columns: int = 2) -> Figure:
        figure, axes = _panels(len(models), columns)
        for axis, model in zip(axes, models, strict=True):
            _limits_panel(axis, model, [c for c in known if c.model == model], looks)
        add_legend(figure, labelled(axes))
        return figure

    return Picture(
        f"limits-{known[0].newest.head}",
        f"Largest micro-batch by sequence length: {where}",
        caption,
        draw,
        wide=len(models) > 1,
        draw_narrow=functools.partial(draw, 1) if len(models) > 1 else None,
    )


def _limits_panel(axis: Axes, model: str, cells: Sequence[Cell], looks: dict[str, Look]) -> None:
    lengths = sorted({cell.newest.seq_len for cell in cells})
    drawn: list[float] = []
    for setting, look in looks.items():
        points = [(c.newest.seq_len, c) for c in cells if c.setting == setting]
        points.sort(key=lambda point: point[0])
        if not points:
            continue
        x = [seq_len for seq_len, _ in points]
        y = [max(c.max_batch or 0, _NOTHING) for _, c in points]
        drawn += y
        axis.plot(x, y, color=look.color, linestyle=look.line, marker=look.marker, label=setting,
                  markerfacecolor="none")  # fmt: skip
        for seq_len, value, (_, cell) in zip(x, y, points, strict=True):
            if cell.evidence == CERTIFIED:
                axis.plot(seq_len, value, look.marker, color=look.color)
            if cell.evidence == AT_LEAST:
                axis.annotate(
                    "", (seq_len, value * 1.35), (seq_len, value),
                    arrowprops={"arrowstyle": "->", "color": look.color},
                )  # fmt: skip
    published = [
        (s, max(batch, _NOTHING)) for (m, s), batch in PUBLISHED_MAX_BATCH.items() if m == model
    ]
    if published:
        x, y = [s for s, _ in published], [b for _, b in published]
        axis.plot(x, y, "x-", color=INK, linewidth=0.8, label="published, Titan X 12 GB")
        lengths = sorted({*lengths, *x})
        drawn += y
    _log_counts(axis, drawn or [1.0])
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(title=system_name(model), xlabel="sequence length (tokens)",
             ylabel="largest micro-batch (examples)")  # fmt: skip


_NOTHING = 0.5
"""Where 0 is drawn on a logarithmic axis."""


def _log_counts(axis: Axes, values: Sequence[float]) -> None:
    axis.set_yscale("log")
    low, high = 0.7 * min(values), 1.5 * max(values)
    axis.set_ylim(low, high)
    # Whole numbers only, and all of them where they are few.
    ticks = [m * 10**power for power in range(6) for m in (1, 2, 5)]
    if high / low < 6:
        ticks = [*range(1, 20), *range(20, 200, 10), *range(200, 5000, 200)]
        shown = [tick for tick in ticks if low <= tick <= high]
        ticks = shown[:: max(1, len(shown) // 6)]
    axis.yaxis.set_major_locator(FixedLocator([_NOTHING, *ticks]))
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: "0" if y <= _NOTHING else f"{y:,.0f}")
    )
    axis.yaxis.set_minor_locator(NullLocator())


def _log_mib(axis: Axis, low: float, high: float) -> None:
    """Label as many sizes of a logarithmic axis as there is room for."""
    subs: tuple[float, ...] = (1.0, 3.0)
    if high / low < 60:
        subs = (1.0, 2.0, 5.0) if high / low > 6 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.set_minor_locator(NullLocator())


def throughput_picture(cells: Sequence[Cell], names: Mapping[Place, str]) -> Picture | None:
    """Examples a second against micro-batch, with the batch that runs out of memory."""
    timed = [cell for cell in cells if len(_speeds(cell)) >= 2]
    if not timed:
        return None
    chosen = sorted(timed, key=lambda cell: (-len(_speeds(cell)), -cell.newest.id))[:_MOST_PANELS]
    # Two points say little beside a curve of many.
    chosen = [cell for cell in chosen if 2 * len(_speeds(cell)) >= len(_speeds(chosen[0]))]
    chosen.sort(key=lambda c: (model_order(c.model), c.newest.seq_len, c.setting))
    where = [f"{cell.task}, {names[cell.place]}" for cell in chosen]
    same = len(set(where)) == 1
    caption = (
        "Each point is a trial that fits; the dashed line is the smallest batch that does not."
    )
    if len(timed) > len(chosen):
        caption += f" Of {len(timed)} cells, those with the most batches."

    def draw(columns: int = 2) -> Figure:
        figure, axes = _panels(len(chosen), columns)
        for axis, cell, its_place in zip(axes, chosen, where, strict=True):
            points = _speeds(cell)
            look = look_of(0)
            axis.plot(*zip(*points, strict=True), color=look.color, marker=look.marker)
            axis.set_ylim(0, 1.15 * max(rate for _, rate in points))
            if cell.oom is not None:
                axis.axvline(cell.oom.batch, color=look_of(5).color, linestyle="--")
                axis.annotate(
                    f"{cell.oom.batch} runs\nout of memory", (cell.oom.batch, 0.03),
                    xycoords=("data", "axes fraction"), textcoords="offset points",
                    xytext=(-4, 0), ha="right", va="bottom", fontsize=8,
                )  # fmt: skip
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            title = f"{system_name(cell.model)}, {cell.newest.seq_len}, {cell.setting}"
            axis.set(
                title=title if same else f"{title}\n{its_place}",
                xlabel="micro-batch (examples)", ylabel="examples a second",
            )  # fmt: skip
        return figure

    return Picture(
        "throughput",
        "Speed by micro-batch, up to the wall" + (f": {where[0]}" if same else ""),
        caption,
        draw,
        wide=len(chosen) > 1,
        draw_narrow=functools.partial(draw, 1) if len(chosen) > 1 else None,
    )


def _speeds(cell: Cell) -> list[tuple[int, float]]:
    """Examples a second by batch; of several trials of one the newest."""
    rates = {
        row.trial.batch: rate
        for row in cell.rows
        if (rate := trial_rate(row, row.trial)) is not None
    }
    return sorted(rates.items())


def footprint_picture(planned: Sequence[Planned], names: Mapping[Place, str]) -> Picture | None:
    """What the chosen plans hold at their peak, part by part, beside what was measured."""
    chosen = [(one, one.plan) for one in planned if isinstance(one.plan, Plan)]
    if not chosen:
        return None
    where = [f"{one.task}, {names[one.place]}" for one, _ in chosen]
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
            budget = one.place.budget_bytes / MIB_BYTES
            axis.plot([budget, budget], [y - 0.38, y + 0.38], color=look_of(5).color, linewidth=1.6)
        axis.plot([], [], color=look_of(5).color, linewidth=1.6, label="budget")
        axis.set_yticks(range(len(chosen)), labels, fontsize=9 if same else 8)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.set(xlabel="bytes in use at the peak of a step (MiB)")
        add_legend(figure, labelled([axis]))
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


def _plan_name(planned: Planned, plan: Plan) -> str:
    return f"{system_name(planned.model)} {planned.workload.seq_len}\n{_setting(plan.chosen)}"


def _setting(entry: PlanEntry) -> str:
    text = describe_setting(entry.micro_batch, entry.levers)
    return text.replace("checkpointing ", "")


_CHARACTER = 0.012
"""Width of a letter of a label, as a part of the budget."""


def front_picture(planned: Planned, where: str) -> Picture | None:
    """Seconds against bytes: the chosen plan, what needs less, and what does not fit."""
    plan = planned.plan
    if not isinstance(plan, Plan):
        return None

    def draw() -> Figure:
        figure, (axis,) = _panels(1)
        entries = [plan.chosen, *plan.alternatives]
        points = [(e.footprint.peak_bytes / MIB_BYTES, e.predicted_step_seconds) for e in entries]
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
        for entry, (x, y) in zip(entries[1:], points[1:], strict=True):
            text = _setting(entry)
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

    seq_len = planned.workload.seq_len
    return Picture(
        f"front-{planned.model}-{seq_len}",
        f"Time against memory: {system_name(planned.model)}, sequence length {seq_len}, "
        f"effective batch {plan.target_batch}",
        f"{planned.task}, {where}. Each setting is the fastest of those that need as little; all "
        "are predicted.",
        draw,
        wide=False,
    )


def timeline_picture(planned: Planned, where: str) -> Picture | None:
    """Bytes in use in the course of one step, by phase.

    Returns:
        None where a step's requests are not known.
    """
    plan = planned.plan
    if not isinstance(plan, Plan):
        return None
    levers, kind = plan.chosen.levers, planned.place.kind
    if not has_trace(planned.workload, levers, kind):
        return None
    timeline = step_timeline(planned.workload, levers, plan.chosen.micro_batch)
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
        axis.set(xlabel="requests and releases of one optimizer step, in their order",
                 ylabel="in use (MiB)")  # fmt: skip
        add_legend(figure, labelled([axis]))
        return figure

    recorded = "" if kind == "cpu" else " on a CPU"
    steps, shown = levers.accumulation_steps, timeline.micro_batches
    more = (
        f" {shown} of the {steps} micro-batches are shown; the others are alike."
        if steps > shown
        else ""
    )
    return Picture(
        f"timeline-{planned.model}-{planned.workload.seq_len}",
        f"Memory over one step: {_plan_name(planned, plan).replace(chr(10), ', ')}",
        f"{planned.task}, {where}. Replayed from what recorded steps{recorded} ask of the "
        f"allocator.{more}",
        draw,
        wide=False,
    )


def predictions_picture(predictions: Sequence[Prediction]) -> Picture | None:
    """Predicted against measured peaks, with a band of 5 %."""
    if not predictions:
        return None

    def draw(columns: int = 2) -> Figure:
        figure, (left, right) = _panels(2, columns)
        kinds: tuple[tuple[str, Callable[[Prediction], bool], int], ...] = (
            ("replayed", lambda p: p.traced, 0),
            ("by formula", lambda p: not p.traced, 1),
        )
        sizes = [p.measured_bytes / MIB_BYTES for p in predictions]
        low, high = 0.8 * min(sizes), 1.25 * max(sizes)
        left.plot([low, high], [low, high], color=INK, linewidth=0.8)
        left.fill_between(
            [low, high], [0.95 * low, 0.95 * high], [1.05 * low, 1.05 * high], color=INK,
            alpha=0.12, linewidth=0, label="within 5 %",
        )  # fmt: skip
        right.axhspan(-5, 5, color=INK, alpha=0.12, linewidth=0)
        for name, belongs, number in kinds:
            some = [p for p in predictions if belongs(p)]
            if not some:
                continue
            look = look_of(number)
            x = [p.measured_bytes / MIB_BYTES for p in some]
            left.plot(x, [p.predicted_bytes / MIB_BYTES for p in some], look.marker,
                      color=look.color, markerfacecolor="none", label=name)  # fmt: skip
            right.plot(x, [100 * p.error for p in some], look.marker, color=look.color,
                       markerfacecolor="none")  # fmt: skip
        for axis in (left, right):
            axis.set_xscale("log")
            axis.set_xlim(low, high)
            _log_mib(axis.xaxis, low, high)
            axis.set_xlabel("measured peak (MiB)")
        left.set_yscale("log")
        left.set_ylim(low, high)
        _log_mib(left.yaxis, low, high)
        left.set_ylabel("predicted peak (MiB)")
        most = max(6.0, 1.1 * max(abs(100 * p.error) for p in predictions))
        right.set(ylim=(-most, most), ylabel="error of the prediction (%)")
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    return Picture(
        "predictions",
        "Predicted against measured peaks",
        "Trials in fresh processes that fit; above 0 more was predicted than used.",
        draw,
        draw_narrow=functools.partial(draw, 1),
    )
