"""Make the step traces of other optimizers out of AdamW's.

Forward and backward pass are the same; the update is another one. It goes through the variables one
after the other, so it is enough to put what the other optimizer asks for of a variable in the place
of what AdamW asks for. Biases of keys get no gradient with these optimizers, but they are asked for
here: a few kilobytes too much.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from bertbench.memory.traces.build.samples import UnlikeError
from bertbench.memory.traces.trace import (
    NEWEST,
    Allocate,
    Free,
    Item,
    PerChunk,
    PerLayer,
    Size,
    StepTrace,
)

_OF_MATRIX, _OF_VECTOR = 0, 1
_UPDATES = {
    "lion": ("a+ b+ b- a- g-", "a+ b+ b- a- g-"),
    "adafactor": ("a+ r+ r- c+ c- a- r+ r- c+ c- a+ a- g-", "a+ a- b+ g- a+ a- b-"),
}
"""What is asked for (+) and let go of (-) after a matrix's weight decay, and for a vector, which
has none. a and b are as large as the variable, r has a number for each row, c for each column, and
g is the gradient. From recordings of `finetune.train.optimization`'s Lion and Adafactor."""

_EXAMPLES = frozenset("neruws")


def with_optimizer(trace: StepTrace, optimizer: str) -> StepTrace:
    """Put another optimizer's update in the place of AdamW's.

    Args:
        trace: of a step with AdamW.
        optimizer: `lion` or `adafactor`.

    Returns:
        A trace without peaks.

    Raises:
        UnlikeError: the trace has no update that is understood.
    """
    update = _Update(trace, _UPDATES[optimizer])
    items: list[Item] = []
    found = 0
    for inside, part in _parts(trace):
        found += inside
        items += update.rewritten(_begin_with_requests(part)) if inside else part
    if found != 2:
        raise UnlikeError(f"{found} updates in two steps")
    return StepTrace(tuple(update.sizes), tuple(update.free_order), tuple(items))


def _parts(trace: StepTrace) -> Iterator[tuple[bool, list[Item]]]:
    """Cut a trace into its updates (True) and what is between them."""
    part: list[Item] = []
    last = False
    for item in trace.items:
        now = _of_update(trace, item)
        if now != last:
            yield last and _updates_words(trace, part), part
            part = []
        last = now
        part.append(item)
    yield last and _updates_words(trace, part), part


def _of_update(trace: StepTrace, item: Item) -> bool:
    """Whether an update may have it: an end, or a request that no example makes larger."""
    if isinstance(item, PerLayer):
        return all(_of_update(trace, inner) for inner in item.body)
    if isinstance(item, Allocate):
        return not _EXAMPLES & dict(trace.sizes[item.size].powers).keys()
    return isinstance(item, Free)


def _updates_words(trace: StepTrace, part: Sequence[Item]) -> bool:
    """Whether the weight decay of the word embeddings is made, and let go of at once."""
    return any(
        isinstance(item, Allocate)
        and following == Free(item.site)
        and "v" in dict(trace.sizes[item.size].powers)
        for item, following in itertools.pairwise(part)
    )


def _begin_with_requests(part: Sequence[Item]) -> list[Item]:
    """Let no layer's part of the update begin with the end of the gradient before it."""
    result: list[Item] = []
    for item in part:
        if isinstance(item, PerLayer) and any(isinstance(one, Allocate) for one in item.body):
            count = next(n for n, one in enumerate(item.body) if isinstance(one, Allocate))
            first, rest = item.body[:count], item.body[count:]
            again = PerLayer(item.kind, item.extra - bool(count), (*rest, *first))
            # Of what an update asks for nothing is in chunks.
            result += [*first, again, *(rest if count else ())]
        else:
            result.append(item)
    return result


class _Update:
    """Rewrites an update.

    Attributes:
        sizes: of the trace, and those that come to them.
        ends: likewise.
    """

    def __init__(self, trace: StepTrace, updates: tuple[str, str]) -> None:
        self.sizes, self.free_order = list(trace.sizes), list(trace.free_order)
        self._updates = updates
        self._size_of = dict(_sizes_of_sites(trace.items))
        self._sites: dict[tuple[str, int], int] = {}

    def rewritten(self, part: Sequence[Item]) -> list[Item]:
        """Put the update of a variable after its weight decay, where its gradient ended."""
        result: list[Item] = []
        place = 0
        while place < len(part):
            item = part[place]
            if isinstance(item, PerLayer):
                body = tuple(self.rewritten(item.body))
                result.append(dataclasses.replace(item, body=body))  # type: ignore[arg-type]
            else:
                result.append(item)
            place += 1
            if isinstance(item, Allocate) and self._is_decay(item, part[place]):
                ends = itertools.takewhile(lambda one: isinstance(one, Free), part[place:])
                decay, *ended = (one for one in ends if isinstance(one, Free))
                result += [decay, *self._variables(self.sizes[item.size], ended)]
                place += 1 + len(ended)
        return result

    def _is_decay(self, ask: Allocate, following: Item) -> bool:
        """Whether it is of a matrix, and let go of at once."""
        sides = sum(power for _, power in self.sizes[ask.size].powers)
        return sides >= 2 and following == Free(ask.site)

    def _variables(self, decayed: Size, ended: Sequence[Free]) -> Iterator[Allocate | Free]:
        """The update of the matrix whose decay has been made, and of the vectors after it."""

        def size_of(end: Free) -> Size:
            return self.sizes[self._size_of[end.site]]

        gradients = [end for end in ended if not _EXAMPLES & dict(size_of(end).powers).keys()]
        matrix = next((end for end in gradients if size_of(end) == decayed), None)
        if matrix is None:
            raise UnlikeError("a weight decay that is not followed by the end of its gradient")
        # Ends that follow each other are in the order of their requests, the newest first. Sums
        # over micro-batches are asked for in the order of the variables, gradients in the reverse,
        # which is the update's.
        if matrix is not gradients[0]:
            gradients.reverse()
        gradients.sort(key=lambda end: end is not matrix)
        for end in gradients:
            sizes = _sizes_for(size_of(end))
            kind = _OF_MATRIX if end is matrix else _OF_VECTOR
            for one in self._updates[kind].split():
                if one == "g-":
                    yield end
                    continue
                size = self._number(sizes[one[0]])
                site = self._site(one[0], size)
                yield Allocate(site, size) if one[1] == "+" else Free(site)
        yield from (end for end in ended if end not in gradients)

    def _number(self, size: Size) -> int:
        if size not in self.sizes:
            self.sizes.append(size)
        return self.sizes.index(size)

    def _site(self, what: str, size: int) -> int:
        if (what, size) not in self._sites:
            self._sites[what, size] = len(self.free_order)
            self.free_order.append(NEWEST)
        return self._sites[what, size]


def _sizes_for(variable: Size) -> dict[str, Size]:
    """What the letters of an update stand for."""
    dimensions = [name for name, power in variable.powers for _ in range(power)]
    sides = [Size(0, 4, ((name, 1),)) for name in dimensions]
    return {"a": variable, "b": variable, "r": sides[0], "c": sides[-1]}


def _sizes_of_sites(items: Sequence[Item]) -> Iterator[tuple[int, int]]:
    for item in items:
        if isinstance(item, Allocate):
            yield item.site, item.size
        elif isinstance(item, PerChunk | PerLayer):
            yield from _sizes_of_sites(item.body)
