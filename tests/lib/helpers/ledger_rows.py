"""Trials as a ledger has them, made up."""

from __future__ import annotations

import json
from collections.abc import Mapping

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Budget, Device
from bertbench.ledger.question import Question
from bertbench.ledger.records import LedgerRow
from bertbench.trials.trial import Trial
from finetune.spec.checkpointing import parse_checkpointing

VERSIONS = {"bertbench": "0.2.0", "python": "3.11", "tensorflow": "2.21.0"}
CPU = Device("cpu", 0, "Some & CPU (2 cores)", None, 1 << 40, 1 << 40)
OOM = "ResourceExhaustedError: OOM when allocating <tensor>"


def fits(batch: int, peak_mib: int = 400, seconds: float = 2.0, *, fresh: bool = True) -> Trial:
    return Trial(batch, "fits", peak_mib * MIB_BYTES, seconds, 5.0, fresh=fresh)


def oom(batch: int, *, fresh: bool = True) -> Trial:
    return Trial(batch, "oom", seconds=12.0, message=OOM, fresh=fresh)


def failed(batch: int) -> Trial:
    return Trial(batch, "failed", seconds=3.0, message="killed by SIGSEGV", fresh=True)


def rows_of(
    *trials: Trial,
    model: str = "bert-base",
    seq_len: int = 384,
    head: str = "squad",
    policy: str = "none",
    steps: int = 1,
    optimizer: str = "adamw",
    precision: str = "float32",
    mib: int = 512,
    device: Device = CPU,
    first: int = 1,
    versions: Mapping[str, str] = VERSIONS,
) -> list[LedgerRow]:
    """Rows of one cell, recorded one after the other."""
    workload = published_workload(model, seq_len, head)
    levers = Levers(
        parse_checkpointing(policy),
        accumulation_steps=steps,
        precision=precision,
        optimizer=optimizer,
    )
    budget = Budget(device, mib * MIB_BYTES)
    versions_key = json.dumps(versions, sort_keys=True)
    question = Question(budget, Setup(workload, levers), versions_key)
    return [
        LedgerRow(
            id=first + number,
            time_utc=f"2026-11-{1 + number % 28:02}T10:00:00+00:00",
            device=device.name,
            budget_bytes=budget.budget_bytes,
            model=model,
            head=head,
            seq_len=seq_len,
            levers=levers.to_json(),
            versions=dict(versions),
            trial=trial,
            question=question.key(),
        )
        for number, trial in enumerate(trials)
    ]
