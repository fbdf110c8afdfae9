"""Pictures of trials: limits, speed, and predicted beside measured peaks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bertbench.core.published import PUBLISHED_MAX_BATCH
from bertbench.core.units import MIB_BYTES
from bertbench.ledger.limit import AT_LEAST, CERTIFIED
from reports.environments import Environment
from reports.measured_cells import MeasuredCell, levers_order, model_order
from reports.peak_predictions import PeakPrediction
from reports.pictures.figures import INK, Look, Picture, add_legend, look_of, panels
from reports.tables import system_name

_MAX_PANELS = 6
_MAX_SETTINGS = 8


def limits_picture(cells: Sequence[MeasuredCell], where: str) -> Picture | None:
    """Draw the largest micro-batch against sequence length, a panel for each model.

    Args:
        cells: cells of one environment and one task.
        where: name of the environment and the task.
    """
    known = [cell for cell in cells if cell.max_batch is not None and cell.is_of_search]
    models = sorted({cell.model for cell in known}, key=model_order)[-_MAX_PANELS:]
    settings = sorted({(levers_order(c.levers), c.levers_text) for c in known})
    looks = {name: look_of(number) for number, (_, name) in enumerate(settings[:_MAX_SETTINGS])}
    if not models:
        return None
    caption = "Filled marks are certified: the next batch runs out of memory in a fresh process."
    if any(cell.max_batch == 0 for cell in known):
        caption += " 0 is drawn at the bottom."
    if len(settings) > _MAX_SETTINGS or len({cell.model for cell in known}) > _MAX_PANELS:
        caption += f" The first {_MAX_SETTINGS} settings of the largest {_MAX_PANELS} models."

    def draw(columns: int = 2) -> Figure:
        figure, axes = panels(len(models), columns)
        for axis, model in zip(axes, models, strict=True):
            _limits_panel(axis, model, [c for c in known if c.model == model], looks)
        add_legend(figure, axes)
        return figure

    return Picture(
        f"limits-{known[0].newest.head}",
        f"Largest micro-batch by sequence length: {where}",
        caption,
        draw,
        wide=len(models) > 1,
        draw_narrow=functools.partial(draw, 1) if len(models) > 1 else None,
    )


def _limits_panel(
    axis: Axes, model: str, cells: Sequence[MeasuredCell], looks: dict[str, Look]
) -> None:
    lengths = sorted({cell.newest.seq_len for cell in cells})
    drawn: list[float] = []
    for setting, look in looks.items():
        points = [(c.newest.seq_len, c) for c in cells if c.levers_text == setting]
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
"""Position of 0 on a logarithmic axis."""


def _log_counts(axis: Axes, values: Sequence[float]) -> None:
    axis.set_yscale("log")
    low, high = 0.7 * min(values), 1.5 * max(values)
    axis.set_ylim(low, high)
    # Whole numbers only, and all of them where they are few.
    ticks = [m * 10**power for power in range(6) for m in (1, 2, 5)]
    if high / low < 6:
        step = 10 ** max(0, math.floor(math.log10(high - low)) - 1)
        shown = [tick for tick in range(0, math.ceil(high), step) if low <= tick <= high]
        ticks = shown[:: max(1, len(shown) // 6)]
    axis.yaxis.set_major_locator(FixedLocator([_NOTHING, *ticks]))
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: "0" if y <= _NOTHING else f"{y:,.0f}")
    )
    axis.yaxis.set_minor_locator(NullLocator())


def _log_mib(axis: Axis, low: float, high: float) -> None:
    """Label as many sizes of a logarithmic axis as fit."""
    subs: tuple[float, ...] = (1.0, 3.0)
    if high / low < 60:
        subs = (1.0, 2.0, 5.0) if high / low > 6 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.set_minor_locator(NullLocator())


def throughput_picture(
    cells: Sequence[MeasuredCell], names: Mapping[Environment, str]
) -> Picture | None:
    """Draw examples a second against the micro-batch, up to the one that runs out of memory."""
    timed = [cell for cell in cells if len(cell.rates) >= 2]
    if not timed:
        return None
    chosen = sorted(timed, key=lambda cell: (-len(cell.rates), -cell.newest.id))[:_MAX_PANELS]
    # Two points say little beside a curve of many.
    chosen = [cell for cell in chosen if 2 * len(cell.rates) >= len(chosen[0].rates)]
    chosen.sort(key=lambda c: (model_order(c.model), c.newest.seq_len, c.levers_text))
    where = [f"{cell.task}, {names[cell.environment]}" for cell in chosen]
    same = len(set(where)) == 1
    caption = (
        "Each point is a trial that fits; the dashed line is the smallest batch that does not."
    )
    if len(timed) > len(chosen):
        caption += f" Of {len(timed)} cells, those with the most batches."

    def draw(columns: int = 2) -> Figure:
        figure, axes = panels(len(chosen), columns)
        for axis, cell, its_environment in zip(axes, chosen, where, strict=True):
            points = sorted(cell.rates.items())
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
            title = f"{system_name(cell.model)}, {cell.newest.seq_len}, {cell.levers_text}"
            axis.set(
                title=title if same else f"{title}\n{its_environment}",
                xlabel="micro-batch (examples)", ylabel="examples a second",
            )  # fmt: skip
        return figure

    return Picture(
        "throughput",
        "Speed by micro-batch, up to the limit" + (f": {where[0]}" if same else ""),
        caption,
        draw,
        wide=len(chosen) > 1,
        draw_narrow=functools.partial(draw, 1) if len(chosen) > 1 else None,
    )


def predictions_picture(predictions: Sequence[PeakPrediction]) -> Picture | None:
    """Draw predicted against measured peaks, with a band of 5 %."""
    if not predictions:
        return None

    def draw(columns: int = 2) -> Figure:
        figure, (left, right) = panels(2, columns)
        kinds: tuple[tuple[str, Callable[[PeakPrediction], bool], int], ...] = (
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
        "Trials in fresh processes that fit; above 0 the predicted peak is larger than the "
        "measured one.",
        draw,
        draw_narrow=functools.partial(draw, 1),
    )
