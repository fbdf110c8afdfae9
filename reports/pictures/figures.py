"""The style of pictures, and their formats: PNG and SVG files, and SVG inside a page.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), which colour-blind people can
distinguish. Each has a line style, a marker and a hatch of its own, so that greyscale is enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bertbench.core.terminal import clean_text

INK = "#1b1e23"
"""Colour of text and axes; inside a page it is replaced by the page's colour of text."""

_STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    # Text stays text: it can be selected and searched, and the file is small.
    "svg.fonttype": "none",
    "svg.hashsalt": "bertbench",
    # Names from outside may have dollars in them.
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
         "ytick.color", "grid.color", "hatch.color"),
        INK,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Look:
    """Colour, line style, marker and hatch of one of several lines or bars."""

    color: str
    line: Any
    marker: str
    hatch: str


LOOKS = (
    Look("#0072B2", "-", "o", ""),
    Look("#E69F00", "--", "s", "//"),
    Look("#009E73", "-.", "^", ".."),
    Look("#CC79A7", ":", "D", "xx"),
    Look("#56B4E9", (0, (5, 1, 1, 1)), "v", "\\\\"),
    Look("#D55E00", (0, (3, 1, 1, 1, 1, 1)), "P", "++"),
    Look("#8C6D00", (0, (1, 3)), "X", "--"),
    Look("#7F7F7F", (0, (6, 3)), "*", "||"),
)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Use this style in the block, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # The style is a mapping of names that matplotlib knows.
        matplotlib.rcParams.update(dict(_STYLE))
        yield


def look_of(number: int) -> Look:
    """Return the look of the n-th line or bar; the ninth has the same look as the first."""
    return LOOKS[number % len(LOOKS)]


_PANEL_WIDTH, _PANEL_HEIGHT = 4.2, 3.1


def panels(count: int, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """Make a figure with a number of panels."""
    width = _PANEL_WIDTH
    if count == 1:
        columns, width = 1, 1.35 * _PANEL_WIDTH
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, _PANEL_HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Add a legend of some panels below them, with each name once and as many columns as fit."""
    handles = {
        text: handle
        for axis in axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    longest = max(map(len, handles), default=1)  # names of settings and runs are long
    columns = max(1, min(4, int(figure.get_figwidth() / (0.065 * longest + 0.6))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that is drawn when it is written.

    Attributes:
        name: name of its files, and prefix of its ids. Characters other than ASCII letters, digits,
            dots, underscores and dashes are replaced by dashes.
        title: its title.
        caption: how to read it, in a sentence or two.
        draw: draws the figure, in the style of this module.
        wide: whether it needs the whole width of a page.
        draw_narrow: draws the figure for a narrow screen; None draws none.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]
    wide: bool = True
    draw_narrow: Callable[[], Figure] | None = None

    def __post_init__(self) -> None:
        """Replace characters that a file name or an id cannot have."""
        object.__setattr__(self, "name", re.sub(r"[^A-Za-z0-9._-]+", "-", self.name))

    def png(self) -> bytes:
        """Return the PNG file, on a white background."""
        with styled():
            buffer = io.BytesIO()
            self.draw().savefig(buffer, format="png", dpi=150, facecolor="white")
        return buffer.getvalue()

    def svg(self) -> str:
        """Return the SVG file, on a white background."""
        return self._svg(self.draw, "white")

    def inline_svg(self, draw: Callable[[], Figure] | None = None) -> str:
        """Return the SVG for a page: without a background, in the page's colour and width.

        Args:
            draw: draws the figure; None takes `Picture.draw`.
        """
        text = self._svg(draw or self.draw, "none")
        text = text[text.index("<svg") :].replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # Ids must differ between the pictures of a page.
        name = self.name if draw is None else f"{self.name}-narrow"
        text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
        text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
        # A hundredth of a point is enough.
        text = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), text)
        label = html.escape(self.title)
        return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)

    def _svg(self, draw: Callable[[], Figure], background: str) -> str:
        with styled():
            buffer = io.StringIO()
            figure = draw()
            figure.savefig(
                buffer, format="svg", facecolor=background,
                metadata={"Date": None, "Creator": "bertbench", "Title": self.title},
            )  # fmt: skip
        return clean_text(buffer.getvalue())
