"""What a ledger's trials say together: the limit of every cell, and the evidence for it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from bertbench.core.published import PUBLISHED_MAX_BATCH
from bertbench.core.terminal import clean_text
from bertbench.core.workload import Levers, Workload, levers_from_json, workload_from_key
from bertbench.ledger.limit import AT_LEAST, CERTIFIED, MEASURED, Limit, find_limit
from bertbench.ledger.question import QuestionKey
from bertbench.ledger.records import LedgerRow
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import POLICIES
from finetune.spec.config import PRESETS, BertConfig
from reports.environments import Environment, environment_of


@dataclasses.dataclass(frozen=True)
class MeasuredCell:
    """All trials of one workload with the same levers under the same budget.

    Attributes:
        rows: the trials, in the order of recording; at least one.
        limit: the limit that these trials show, see `bertbench.ledger.limit`.
        model: its name for people: the published one of the same shape, or the recorded one, made
            longer where several shapes have it.
    """

    rows: tuple[LedgerRow, ...]
    limit: Limit
    model: str

    @property
    def max_batch(self) -> int | None:
        """Largest micro-batch below which none ran out of memory; None if nothing tells."""
        return self.limit.max_batch

    @property
    def evidence(self) -> str:
        """How that is known, one of the words of `bertbench.ledger.limit`."""
        return self.limit.evidence

    @property
    def fits(self) -> Trial | None:
        """The trial of `max_batch`."""
        return self.limit.fits

    @property
    def oom(self) -> Trial | None:
        """The trial of the smallest batch that ran out of memory."""
        return self.limit.oom

    @property
    def newest(self) -> LedgerRow:
        """The last trial."""
        return self.rows[-1]

    @functools.cached_property
    def levers(self) -> Levers | None:
        """Lever settings; None for those of another version."""
        with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
            return levers_from_json(dict(self.newest.levers))
        return None

    @functools.cached_property
    def workload(self) -> Workload | None:
        """What is trained; None if it is of another version."""
        return _workload(self.newest)

    @functools.cached_property
    def levers_text(self) -> str:
        """Levers for people."""
        if self.levers is None:
            # Of any text; it becomes the name of a column, which half a surrogate pair cannot be.
            return clean_text(", ".join(map(str, self.newest.levers.values())))
        return self.levers.describe_fully()

    @property
    def task(self) -> str:
        """Head for people."""
        labels = 2 if self.workload is None else self.workload.num_labels
        return self.newest.head + (f", {labels} labels" if labels != 2 else "")

    @property
    def is_of_search(self) -> bool:
        """Whether somebody looked for the limit, and did not just try what a plan had chosen."""
        accumulated = self.levers is not None and self.levers.accumulation_steps > 1
        return not (accumulated and self.evidence == AT_LEAST)

    @property
    def published(self) -> int | None:
        """Maximum batch of the original release on a Titan X."""
        return PUBLISHED_MAX_BATCH.get((self.model, self.newest.seq_len))

    @property
    def bounded_max_batch(self) -> int | None:
        """The largest micro-batch where larger ones are known not to fit; None elsewhere."""
        return self.max_batch if self.evidence in (CERTIFIED, MEASURED) else None

    @functools.cached_property
    def rates(self) -> dict[int, float]:
        """Examples a second by batch; of several trials of one the newest."""
        return {
            row.trial.batch: rate
            for row in self.rows
            if (rate := trial_rate(row, row.trial)) is not None
        }

    @property
    def examples_per_second(self) -> float | None:
        """At the largest batch."""
        return None if self.fits is None else trial_rate(self.newest, self.fits)

    @property
    def environment(self) -> Environment:
        """Where it was measured."""
        return environment_of(self.newest)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        row = self.newest
        return {
            "device": row.device,
            "budget_bytes": row.budget_bytes,
            "versions": row.versions,
            "model": self.model,
            "head": row.head,
            "seq_len": row.seq_len,
            "levers": row.levers,
            "max_batch": self.max_batch,
            "evidence": self.evidence,
            "fits_again": [trial.batch for trial in self.limit.fits_again],
            "published_max_batch": self.published,
            "peak_bytes": None if self.fits is None else self.fits.peak_bytes,
            "examples_per_second": self.examples_per_second,
            "trials": len(self.rows),
        }


def trial_rate(row: LedgerRow, trial: Trial) -> float | None:
    """Examples a second of an optimizer step on one device; None for what is not timed."""
    steps = row.levers.get("accumulation_steps", 1)
    if not trial.step_seconds or type(steps) is not int:
        return None
    return trial.batch * steps / trial.step_seconds


def collect_cells(rows: Iterable[LedgerRow]) -> list[MeasuredCell]:
    """Put trials together that answer the same question; see `bertbench.ledger.limit`.

    Steps of runs are left out, for nobody had asked where their limit is.

    Returns:
        Cells by device, budget, model, length and levers.
    """
    by_question: collections.defaultdict[QuestionKey, list[LedgerRow]]
    by_question = collections.defaultdict(list)
    for row in rows:
        if not row.trial.of_run:
            by_question[row.question].append(row)
    groups = list(by_question.values())
    names = _model_names([group[-1] for group in groups])
    return sorted(map(_cell, groups, names), key=_order)


def _model_names(rows: Sequence[LedgerRow]) -> list[str]:
    """Names of the models of some rows, one for each shape."""
    published = {shape: name for name, shape in PRESETS.items()}
    shapes: dict[str, list[BertConfig | None]] = {}
    found: list[tuple[str, BertConfig | None]] = []
    for row in rows:
        shape = None if (workload := _workload(row)) is None else workload.config
        name = row.model if shape is None else published.get(shape, row.model)
        found.append((name, shape))
        if shape not in shapes.setdefault(name, []):
            shapes[name].append(shape)
    names = []
    for name, shape in found:
        if shape in published:
            names.append(name)
            continue
        number = shapes[name].index(shape)
        of = "" if shape is None else f", {shape.num_hidden_layers} x {shape.hidden_size}"
        names.append(f"{name} (#{number + 1}{of})" if len(shapes[name]) > 1 else name)
    return names


def _workload(row: LedgerRow) -> Workload | None:
    with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
        return workload_from_key(row.model, row.question.workload)
    return None


def _cell(rows: Sequence[LedgerRow], model: str) -> MeasuredCell:
    return MeasuredCell(tuple(rows), find_limit(row.trial for row in rows), model)


def model_order(model: str) -> tuple[int, str]:
    """Published models by their size, then others by name."""
    sizes = ("tiny", "mini", "small", "medium", "base", "large")
    ranks = [rank for rank, size in enumerate(sizes) if model.startswith(f"bert-{size}")]
    return (ranks[0] if ranks else len(sizes), model)


def levers_order(levers: Levers | None) -> tuple[Any, ...]:
    """Exact settings first, then by policy, as people know them."""
    if levers is None:
        return (2,)
    policy = levers.checkpointing
    return (
        0 if levers.exact else 1,
        levers.accumulation_steps,
        POLICIES.index(policy.policy),
        policy.layers is not None,
        str(policy),
        levers.key(),
    )


def _order(cell: MeasuredCell) -> tuple[Any, ...]:
    row = cell.newest
    return (
        cell.environment,
        model_order(cell.model),
        cell.task,
        row.seq_len,
        levers_order(cell.levers),
    )
