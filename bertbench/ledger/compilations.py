"""What compilers have said, kept in the ledger: a table of its own, beside the trials that ran.

A compilation does not depend on a budget: the same one answers for every size of memory.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone

from bertbench.compiling.compilation import COMPILED, NO_ROOM, Compilation
from bertbench.compiling.installed import compiler_versions
from bertbench.compiling.target import CompileTarget
from bertbench.core.workload import MAX_BATCH, Setup, Workload, levers_from_json
from bertbench.ledger.database import Ledger, explained
from bertbench.ledger.question import versions_key
from bertbench.memory.compiled import (
    CompiledMemory,
    CompiledSteps,
    compiled_memory_from_json,
)
from finetune.errors import InputError
from finetune.storage.json_files import json_text, parse_json


@dataclasses.dataclass(frozen=True)
class CompiledQuestion:
    """What steps of a setup need of a target, by certain versions of its compiler.

    Attributes:
        target: what is compiled for.
        setup: workload and levers.
        versions: of the software that lowers and compiles, as text.
    """

    target: CompileTarget
    setup: Setup
    versions: str

    def key(self) -> tuple[str, str, str, str]:
        """Texts that are equal exactly for equal questions."""
        setup = self.setup
        return self.target.key(), self.versions, setup.workload.key(), setup.levers.key()


def compiled_question(target: CompileTarget, setup: Setup) -> CompiledQuestion:
    """Ask about a setup with the versions that are installed.

    Raises:
        InputError: the target's compiler is not installed.
    """
    versions = {**parse_json(versions_key()), **compiler_versions(target.kind)}
    return CompiledQuestion(target, setup, json_text(versions, sort_keys=True))


def record_compilation(
    ledger: Ledger, question: CompiledQuestion, compilation: Compilation
) -> None:
    """Write one compilation; it is on the disk when this returns. Failed ones are not kept.

    Raises:
        InputError: the file cannot be written, for instance because the disk is full.
    """
    if compilation.outcome not in (COMPILED, NO_ROOM):
        return
    memory = None if compilation.memory is None else json_text(compilation.memory.to_json())
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with explained(ledger):
        ledger.execute(
            "INSERT OR REPLACE INTO compilations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *question.key(), compilation.micro_batch, now, compilation.outcome, memory,
                compilation.message, compilation.seconds,
            ),
        )  # fmt: skip


def find_compilations(ledger: Ledger, question: CompiledQuestion) -> list[Compilation]:
    """Compilations that answer a question, by rising micro-batch; damaged rows are counted."""
    with explained(ledger):
        rows = ledger.execute(
            "SELECT micro_batch, outcome, memory, message, seconds FROM compilations "
            "WHERE target_key = ? AND versions_key = ? AND workload_key = ? AND levers_key = ? "
            "ORDER BY micro_batch",
            question.key(),
        ).fetchall()
    found = []
    for row in rows:
        try:
            found.append(_compilation(*row))
        except ValueError:
            ledger.damaged.add(("compilations", *question.key(), row[0]))
    return found


def read_compiled_steps(ledger: Ledger, target: CompileTarget, workload: Workload) -> CompiledSteps:
    """Read all that the installed compiler of a target has said of a workload.

    Raises:
        InputError: the target's compiler is not installed.
    """
    # The versions do not depend on the levers.
    versions = compiled_question(target, Setup(workload)).versions
    with explained(ledger):
        rows = ledger.execute(
            "SELECT DISTINCT levers_key FROM compilations "
            "WHERE target_key = ? AND versions_key = ? AND workload_key = ?",
            (target.key(), versions, workload.key()),
        ).fetchall()
    steps: dict[Setup, dict[int, CompiledMemory | None]] = {}
    for (key,) in rows:
        try:
            setup = Setup(workload, levers_from_json(parse_json(key)))
        except (ValueError, TypeError, KeyError, AttributeError, InputError):
            ledger.damaged.add(("compilations", target.key(), versions, workload.key(), key))
            continue
        found = find_compilations(ledger, CompiledQuestion(target, setup, versions))
        steps[setup] = {one.micro_batch: one.memory for one in found}
    return steps


def _compilation(
    micro_batch: object, outcome: object, memory: object, message: object, seconds: object
) -> Compilation:
    """Read a row.

    Raises:
        ValueError: it is damaged.
    """
    if type(micro_batch) is not int or not 1 <= micro_batch <= MAX_BATCH:
        raise ValueError("no micro-batch")
    if not isinstance(message, str) or not isinstance(seconds, float) or not 0 <= seconds < 1e9:
        raise ValueError("no message, or no time")
    if outcome == NO_ROOM and memory is None:
        return Compilation(micro_batch, NO_ROOM, None, message, seconds)
    if outcome != COMPILED or not isinstance(memory, str):
        raise ValueError("no outcome")
    values = compiled_memory_from_json(parse_json(memory))
    return Compilation(micro_batch, COMPILED, values, message, seconds)
