"""The wings of the three packages, from the highest to the lowest."""

from __future__ import annotations

# A wing may import the wings in the rows below its own, and no other.
ROWS = (
    ("bertbench", "bertbench.__main__"),
    ("bertbench.cli", "bertbench.api"),
    ("reports",),
    ("bertbench.running",),
    ("bertbench.planning", "bertbench.probing"),
    ("bertbench.fetch",),
    ("bertbench.ledger",),
    ("bertbench.compiling",),
    ("bertbench.trials",),
    ("bertbench.memory",),
    ("bertbench.hardware",),
    ("bertbench.core",),
    ("finetune",),
    ("finetune.train", "finetune.export", "finetune.tasks"),
    ("finetune.model",),
    ("finetune.model_files",),
    ("finetune.text",),
    ("finetune.spec",),
    ("finetune.storage",),
    ("finetune.errors",),
)
