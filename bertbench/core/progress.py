"""Progress with an estimate of the time left: a bar on a terminal, lines elsewhere.

It is written to standard error; standard output is for results.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bertbench.core.terminal import PlainConsole, clean_text, say

LINE_EVERY_SECONDS = 15.0
"""Time between two lines where standard error is not a terminal."""

Advance = Callable[[int, str], None]
"""Takes the number of items that are finished in all, and a note to show beside it."""


@contextlib.contextmanager
def progress(description: str, total: int, unit: str, first: int = 0) -> Iterator[Advance]:
    """Show how many items of some work are finished.

    Args:
        description: what is being done, as in `train`.
        total: items in all.
        unit: name of the items, as in `steps`.
        first: items that were finished before the work began; the rate is that of later ones.

    Yields:
        A function to call after every item.
    """
    console = PlainConsole(stderr=True)
    description = clean_text(description)
    if console.is_terminal:
        with Progress(
            TextColumn(description, markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=False,
        ) as bar:
            task = bar.add_task(description, total=total, completed=first, note="")
            yield lambda done, note: bar.update(task, completed=done, note=clean_text(note))
        return
    began = said = time.monotonic()
    ended = False

    def advance(done: int, note: str) -> None:
        nonlocal said, ended
        now = time.monotonic()
        ends_now = done >= total and not ended
        if now - said < LINE_EVERY_SECONDS and not ends_now:
            return
        said, ended = now, ended or ends_now
        left = (now - began) / max(done - first, 1) * (total - done)
        more = f", {note}" if note else ""
        say(f"{description}: {done}/{total} {unit}, {describe_duration(left)} left{more}")

    yield advance


def describe_duration(seconds: float) -> str:
    """Write a time as in `2 min 05 s`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
