"""What a ledger's trials say together: the limit of every cell, and the evidence for it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from bertbench.devices import Device
from bertbench.ledger import LedgerRow
from bertbench.paper import PUBLISHED_MAX_BATCH
from bertbench.trial import Trial
from bertbench.workload import Levers, Workload, levers_from_json, workload_from_key
from finetune.checkpointing import POLICIES
from finetune.errors import InputError

CERTIFIED, MEASURED, AT_LEAST, BELOW, FAILED = (
    "certified",
    "measured",
    "at least",
    "below",
    "failed",
)
"""Evidence for a limit: both sides of it in fresh processes; both sides, but not in fresh ones, or
not next to each other; only batches that fit; only batches that do not; no trial with an answer."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All trials of one workload with the same levers under the same budget.

    Attributes:
        rows: the trials, in the order of recording; at least one.
        max_batch: largest micro-batch that fits; 0 if 1 does not; None if nothing tells.
        evidence: how that is known, one of the words above.
        fits: the trial of `max_batch`.
        oom: the trial of the smallest batch beyond it that runs out of memory.
    """

    rows: tuple[LedgerRow, ...]
    max_batch: int | None
    evidence: str
    fits: Trial | None
    oom: Trial | None

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
        with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
            return workload_from_key(self.newest.model, self.newest.question[2])
        return None

    @functools.cached_property
    def setting(self) -> str:
        """Levers for people."""
        if self.levers is None:
            return ", ".join(map(str, self.newest.levers.values()))
        steps = self.levers.accumulation_steps
        return self.levers.describe() + (f", {steps} micro-batches" if steps > 1 else "")

    @property
    def of_limit(self) -> bool:
        """Whether somebody looked for the limit, and did not just try what a plan had chosen."""
        accumulated = self.levers is not None and self.levers.accumulation_steps > 1
        return not (accumulated and self.evidence == AT_LEAST)

    @property
    def published(self) -> int | None:
        """Maximum batch of the original release on a Titan X."""
        return PUBLISHED_MAX_BATCH.get((self.newest.model, self.newest.seq_len))

    @property
    def examples_per_second(self) -> float | None:
        """At the largest batch."""
        return None if self.fits is None else trial_rate(self.newest, self.fits)

    @property
    def place(self) -> Place:
        """Where it was measured."""
        return place_of(self.newest)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        row = self.newest
        return {
            "device": row.device,
            "budget_bytes": row.budget_bytes,
            "versions": row.versions,
            "model": row.model,
            "head": row.head,
            "seq_len": row.seq_len,
            "levers": row.levers,
            "max_batch": self.max_batch,
            "evidence": self.evidence,
            "published_max_batch": self.published,
            "peak_bytes": None if self.fits is None else self.fits.peak_bytes,
            "examples_per_second": self.examples_per_second,
            "trials": len(self.rows),
        }


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where, and with what, trials were run that may be compared with each other.

    Attributes:
        device: name.
        budget_bytes: what the allocator could use.
        kind: `cpu`, `gpu` or `tpu`.
        driver: of a GPU; empty for others.
        versions: as the ledger has them.
    """

    device: str
    budget_bytes: int
    kind: str
    driver: str
    versions: str

    def as_device(self) -> Device:
        """The device, as large as the budget."""
        size = self.budget_bytes
        return Device(self.kind, 0, self.device, None, size, size, driver=self.driver or None)


@functools.lru_cache(maxsize=1024)
def _place(device: str, budget_bytes: int, budget_key: str, versions: str) -> Place:
    try:
        values = json.loads(budget_key)
        kind, driver = str(values["kind"]), str(values.get("driver") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        kind, driver = "cpu", ""
    return Place(device, budget_bytes, kind, driver, versions)


def place_of(row: LedgerRow) -> Place:
    """Where a trial was run."""
    return _place(row.device, row.budget_bytes, *row.question[:2])


def trial_rate(row: LedgerRow, trial: Trial) -> float | None:
    """Examples a second of an optimizer step on one device."""
    if not trial.step_seconds:
        return None
    return trial.batch * int(row.levers.get("accumulation_steps", 1)) / trial.step_seconds


def read_cells(rows: Iterable[LedgerRow]) -> list[Cell]:
    """Put trials together that answer the same question.

    Of two trials of a batch the newer one counts, but a failed one never replaces an answer.

    Returns:
        Cells by device, budget, model, length and levers.
    """
    by_question: collections.defaultdict[tuple[str, ...], list[LedgerRow]]
    by_question = collections.defaultdict(list)
    for row in rows:
        by_question[row.question].append(row)
    return sorted(map(_cell, by_question.values()), key=_order)


def _cell(rows: Sequence[LedgerRow]) -> Cell:
    newest: dict[int, Trial] = {}
    fresh: dict[int, Trial] = {}
    for row in rows:
        if row.trial.outcome != "failed":
            newest[row.trial.batch] = row.trial
            if row.trial.fresh:
                fresh[row.trial.batch] = row.trial
    # What a fresh process says of a batch is better than what another one says.
    known = {**newest, **fresh}
    fits = max((t for t in known.values() if t.outcome == "fits"), key=_batch, default=None)
    largest = 0 if fits is None else fits.batch
    # What runs out below a batch that fits is no limit: memory was in pieces, or others held it.
    ooms = (t for t in known.values() if t.outcome == "oom" and t.batch > largest)
    oom = min(ooms, key=_batch, default=None)
    if fits is not None and oom is not None:
        certified = oom.batch == fits.batch + 1 and fits.fresh and oom.fresh
        return Cell(tuple(rows), fits.batch, CERTIFIED if certified else MEASURED, fits, oom)
    if fits is not None:
        return Cell(tuple(rows), fits.batch, AT_LEAST, fits, None)
    if oom is not None and oom.batch == 1:
        return Cell(tuple(rows), 0, CERTIFIED if oom.fresh else MEASURED, None, oom)
    return Cell(tuple(rows), None, FAILED if oom is None else BELOW, None, oom)


def _batch(trial: Trial) -> int:
    return trial.batch


def model_order(model: str) -> tuple[int, str]:
    """Published models by their size, then others by name."""
    sizes = ("tiny", "mini", "small", "medium", "base", "large")
    ranks = [rank for rank, size in enumerate(sizes) if model.startswith(f"bert-{size}")]
    return (ranks[0] if ranks else len(sizes), model)


def setting_order(levers: Levers | None) -> tuple[Any, ...]:
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


def _order(cell: Cell) -> tuple[Any, ...]:
    row = cell.newest
    return (cell.place, model_order(row.model), row.head, row.seq_len, setting_order(cell.levers))
