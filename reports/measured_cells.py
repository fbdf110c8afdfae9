"""Measured cells: the trials of one setup under one budget, and the limit that they show."""

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
    """All trials of one setup (workload and levers) under one budget.

    Attributes:
        rows: the trials, in the order of recording; at least one.
        limit: the limit that these trials show, see `bertbench.ledger.limit`.
        model: name of the model: the published name of its shape, or else the recorded name. Shapes
            with the same recorded name get a number.
    """

    rows: tuple[LedgerRow, ...]
    limit: Limit
    model: str

    @property
    def max_batch(self) -> int | None:
        """The limit: the largest batch that fits below all that ran out; None if it is unknown."""
        return self.limit.max_batch

    @property
    def evidence(self) -> str:
        """Evidence for the limit, one of the words of `bertbench.ledger.limit`."""
        return self.limit.evidence

    @property
    def fits(self) -> Trial | None:
        """Trial of `max_batch`."""
        return self.limit.fits

    @property
    def oom(self) -> Trial | None:
        """Trial of the smallest batch that ran out of memory."""
        return self.limit.oom

    @property
    def newest(self) -> LedgerRow:
        """Row of the newest trial."""
        return self.rows[-1]

    @functools.cached_property
    def levers(self) -> Levers | None:
        """Levers; None if another version wrote them and this one cannot read them."""
        with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
            return levers_from_json(dict(self.newest.levers))
        return None

    @functools.cached_property
    def workload(self) -> Workload | None:
        """Workload; None if another version wrote it and this one cannot read it."""
        return _workload(self.newest)

    @functools.cached_property
    def levers_text(self) -> str:
        """Levers in words."""
        if self.levers is None:
            # The name may be any text. A column's name must not have half of a surrogate pair.
            return clean_text(", ".join(map(str, self.newest.levers.values())))
        return self.levers.describe_fully()

    @property
    def task(self) -> str:
        """The head in words."""
        labels = 2 if self.workload is None else self.workload.num_labels
        return self.newest.head + (f", {labels} labels" if labels != 2 else "")

    @property
    def is_of_search(self) -> bool:
        """Whether the trials searched for the limit, and did not only verify a plan."""
        accumulated = self.levers is not None and self.levers.accumulation_steps > 1
        return not (accumulated and self.evidence == AT_LEAST)

    @property
    def published(self) -> int | None:
        """Maximum batch of the original release on a Titan X."""
        return PUBLISHED_MAX_BATCH.get((self.model, self.newest.seq_len))

    @property
    def bounded_max_batch(self) -> int | None:
        """The limit, if a larger batch is known to run out of memory; else None."""
        return self.max_batch if self.evidence in (CERTIFIED, MEASURED) else None

    @functools.cached_property
    def rates(self) -> dict[int, float]:
        """Examples a second by batch, by the newest trial of each."""
        return {
            row.trial.batch: rate
            for row in self.rows
            if (rate := trial_rate(row, row.trial)) is not None
        }

    @property
    def examples_per_second(self) -> float | None:
        """Examples a second at the largest batch."""
        return None if self.fits is None else trial_rate(self.newest, self.fits)

    @property
    def environment(self) -> Environment:
        """Environment of the trials."""
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
    """Return the examples a second of a trial on one device; None if it was not timed."""
    steps = row.levers.get("accumulation_steps", 1)
    if not trial.step_seconds or type(steps) is not int:
        return None
    return trial.batch * steps / trial.step_seconds


def collect_cells(rows: Iterable[LedgerRow]) -> list[MeasuredCell]:
    """Group trials by setup and budget; see `bertbench.ledger.limit`.

    Training steps of runs are left out, because they do not search for a limit.

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
    """Name the models of some rows, so that two models of different shape have different names."""
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
    """Sort key: published models by their size, then others by name."""
    sizes = ("tiny", "mini", "small", "medium", "base", "large")
    ranks = [rank for rank, size in enumerate(sizes) if model.startswith(f"bert-{size}")]
    return (ranks[0] if ranks else len(sizes), model)


def levers_order(levers: Levers | None) -> tuple[Any, ...]:
    """Sort key: exact levers first, then by accumulation and checkpointing policy."""
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
