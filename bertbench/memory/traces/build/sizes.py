"""Find the formulas of recorded sizes: products of the dimensions of a model and a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bertbench.memory.traces.build.samples import Sample, StepItem, Steps, UnlikeError
from bertbench.memory.traces.loops import examples_of_chunk
from bertbench.memory.traces.step_requests import dimensions_of
from bertbench.memory.traces.trace import Size


def find_sizes(
    base: Sample, steps: Steps, items: Sequence[StepItem], varied: Mapping[str, Sample]
) -> tuple[tuple[Size, ...], list[int]]:
    """Find the formulas of all allocations' sizes.

    Args:
        base: a sample.
        steps: its events.
        items: the same as items.
        varied: by dimension, a sample with another value of it.

    Returns:
        The different formulas, and the number of the formula of each allocation.

    Raises:
        UnlikeError: the operations of the samples differ.
    """
    others = {name: Steps(sample) for name, sample in varied.items()}
    for name, other in others.items():
        if other.operations[-len(steps.made_at) :] != steps.operations[-len(steps.made_at) :]:
            raise UnlikeError(f"another {name} makes other operations")
    chunk_of: dict[int, tuple[int, int]] = {}
    for item in items:
        if item.policy is not None:
            for index in item.events:
                chunks = len(item.events) // item.length
                chunk_of[steps.events[index]] = (index - item.events[0]) // item.length, chunks
    words = {name: [_words(sample)[name] for sample in (base, *varied.values())] for name in "uw"}
    numbers: dict[Size, int] = {}
    size_of = [-1] * len(steps.sizes)
    for allocation in steps.made_at:
        its = {name: other.sizes[allocation - len(steps.sizes)] for name, other in others.items()}
        found = _of_words([steps.sizes[allocation], *its.values()], words, base, varied) or _size(
            steps.sizes[allocation],
            its,
            base,
            varied,
            chunk_of.get(allocation),
            in_loop="while" in steps.operations[allocation],
        )
        size_of[allocation] = numbers.setdefault(found, len(numbers))
    return tuple(numbers), size_of


def _words(sample: Sample) -> dict[str, int]:
    """Numbers of different words in the first two micro-batches, as a trial draws them."""
    workload, batch = sample.step.workload, sample.step.micro_batch
    shape = (batch * sample.step.levers.accumulation_steps, workload.seq_len)
    generator = np.random.default_rng(0)
    words = generator.integers(0, workload.config.vocab_size, shape, np.int32)
    return {
        name: len(np.unique(words[number * batch : (number + 1) * batch]))
        for number, name in enumerate("uw")
    }


def _of_words(
    sizes: Sequence[int],
    words: Mapping[str, Sequence[int]],
    base: Sample,
    varied: Mapping[str, Sample],
) -> Size | None:
    """Formula of sizes that have a number, or a whole embedding, for each different word."""
    hidden = [sample.step.workload.config.hidden_size for sample in (base, *varied.values())]
    for name, counts in words.items():
        for power in (0, 1):
            products = [c * h**power for c, h in zip(counts, hidden, strict=True)]
            if [4 * product for product in products] == list(sizes):
                return Size(0, 4.0, (("h", power), (name, 1))[not power :])
    return None


def _size(
    size_bytes: int,
    others: Mapping[str, int],
    base: Sample,
    varied: Mapping[str, Sample],
    chunk: tuple[int, int] | None,
    *,
    in_loop: bool,
) -> Size:
    def dimensions(sample: Sample) -> dict[str, int]:
        values = dimensions_of(sample.step)
        if chunk is not None:
            values["e"] = examples_of_chunk(sample.step.micro_batch, chunk[1], chunk[0])
        return values

    here = dimensions(base)
    powers: dict[str, int] = {}
    regular = True
    for name, other_bytes in others.items():
        there = dimensions(varied[name])
        if name == "n" and chunk is not None and other_bytes != size_bytes:
            # Of the chunk, or of all examples: the chunks are of unequal sizes there.
            name = "e" if other_bytes * here["e"] == size_bytes * there["e"] else "n"
        power = _power(other_bytes / size_bytes, there[name] / here[name])
        regular = regular and power is not None
        if power:
            powers[name] = power
    if not regular:
        return _irregular(size_bytes, others, here, lambda name: dimensions(varied[name]))
    if powers.get("n") and base.step.levers.accumulation_steps > 1 and not in_loop:
        powers["r"] = powers.pop("n")
    product = math.prod(here[name] ** power for name, power in powers.items())
    return Size(0, size_bytes / product, tuple(sorted(powers.items())))


def _power(ratio: float, of_dimension: float) -> int | None:
    """The whole power of a dimension that gives a ratio of sizes."""
    power = round(math.log(ratio) / math.log(of_dimension))
    return power if math.isclose(ratio, of_dimension**power, rel_tol=1e-9) else None


def _irregular(
    size_bytes: int,
    others: Mapping[str, int],
    here: Mapping[str, int],
    dimensions: Callable[[str], Mapping[str, int]],
) -> Size:
    """Workspace of a kernel: a constant and something for each token, or of the size of a head."""
    for name, powers in (("s", (("s", 1),)), ("h", (("a", -1), ("h", 1)))):
        there = dimensions(name)

        def product(
            values: Mapping[str, int], powers: tuple[tuple[str, int], ...] = powers
        ) -> float:
            return math.prod(values[name] ** power for name, power in powers)

        factor = (others[name] - size_bytes) / (product(there) - product(here))
        if others[name] != size_bytes:
            return Size(size_bytes - factor * product(here), factor, powers)
    return Size(size_bytes, 0, ())
