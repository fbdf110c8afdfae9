"""Limits of products by their compilers, as the ledger knows them."""

from __future__ import annotations

import dataclasses
from typing import Any

from bertbench.compiling.target import CompileTarget
from bertbench.core.workload import (
    Levers,
    Setup,
    Workload,
    levers_from_json,
    workload_from_key,
)
from bertbench.hardware.accelerators import ACCELERATORS
from bertbench.ledger.compilations import CompiledQuestion, find_compilations
from bertbench.ledger.database import Ledger, explained
from finetune.errors import InputError
from finetune.spec.config import PRESETS
from finetune.storage.json_files import build, parse_json


@dataclasses.dataclass(frozen=True)
class CompiledLimit:
    """What a product's compiler has said of a setup.

    Attributes:
        target: what was compiled for.
        workload: what is trained.
        levers: lever settings.
        budget_bytes: usable memory of each device, by the catalogue.
        max_batch: the largest micro-batch known to fit below `exceeds`; None if none is.
        exceeds: the smallest micro-batch known not to fit; None if there is none.
        compilations: how many there are.
    """

    target: CompileTarget
    workload: Workload
    levers: Levers
    budget_bytes: int
    max_batch: int | None
    exceeds: int | None
    compilations: int

    @property
    def text(self) -> str:
        """The limit: `31`; `31-39`, between known sides; `>=31` or `<40`, with one side known.

        It is `0` if not even one example fits.
        """
        if self.max_batch is None:
            return "0" if self.exceeds == 1 else f"<{self.exceeds}"
        if self.exceeds is None:
            return f">={self.max_batch}"
        if self.exceeds > self.max_batch + 1:
            return f"{self.max_batch}-{self.exceeds - 1}"
        return str(self.max_batch)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "product": self.target.name,
            "replicas": self.target.replicas,
            "model": self.workload.model,
            "head": self.workload.head,
            "seq_len": self.workload.seq_len,
            "levers": self.levers.to_json(),
            "budget_bytes": self.budget_bytes,
            "max_batch": self.max_batch,
            "exceeds": self.exceeds,
            "compilations": self.compilations,
        }


def read_compiled_limits(ledger: Ledger) -> list[CompiledLimit]:
    """Read what is known of each product, workload and levers, by the newest versions.

    Rows that cannot be read, or of products that are in the catalogue no more, are left out.
    """
    with explained(ledger):
        rows = ledger.execute(
            "SELECT target_key, versions_key, workload_key, levers_key, max(time_utc) "
            "FROM compilations GROUP BY target_key, versions_key, workload_key, levers_key "
            "ORDER BY max(time_utc)"
        ).fetchall()
    limits: dict[tuple[str, int, str, str], CompiledLimit] = {}
    for target_key, versions, workload_key, levers_key, _ in rows:
        try:
            limit = _limit(ledger, target_key, versions, workload_key, levers_key)
        except (ValueError, KeyError, TypeError, InputError):
            ledger.damaged.add(("compilations", target_key, workload_key, levers_key))
            continue
        if limit is not None:
            key = (limit.target.name, limit.target.replicas, workload_key, levers_key)
            limits[key] = limit  # the newest, which comes last
    return sorted(
        limits.values(),
        key=lambda one: (
            one.workload.config.hidden_size,
            one.workload.config.num_hidden_layers,
            one.workload.model,
            one.workload.head,
            one.workload.seq_len,
            one.target.name,
            one.levers.key(),
        ),
    )


def _limit(
    ledger: Ledger, target_key: str, versions: str, workload_key: str, levers_key: str
) -> CompiledLimit | None:
    """Read a limit; None if nothing is known of it, or its product is in the catalogue no more.

    Raises:
        ValueError: a text is damaged, as are KeyError and TypeError.
        InputError: a text is of another version.
    """
    target = build(CompileTarget, parse_json(target_key)["compiled_for"])
    if target.name not in ACCELERATORS:
        return None
    budget_bytes = ACCELERATORS[target.name].usable_bytes
    setup = Setup(_named(workload_key), levers_from_json(parse_json(levers_key)))
    compilations = find_compilations(ledger, CompiledQuestion(target, setup, versions))
    if not compilations:
        return None
    fits = {
        one.micro_batch: one.fits_in(setup.step(one.micro_batch), target.kind, budget_bytes)
        for one in compilations
    }
    exceeds = min((batch for batch, one in fits.items() if not one), default=None)
    below = [batch for batch, one in fits.items() if one and (exceeds is None or batch < exceeds)]
    return CompiledLimit(
        target,
        setup.workload,
        setup.levers,
        budget_bytes,
        max(below, default=None),
        exceeds,
        len(compilations),
    )


def _named(workload_key: str) -> Workload:
    """The workload of a key, under the name of a published model if it is one."""
    for name in PRESETS:
        workload = workload_from_key(name, workload_key)
        if workload.config == PRESETS[name]:
            return workload
    return workload_from_key("another model", workload_key)
