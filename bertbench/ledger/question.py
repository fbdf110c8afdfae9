"""What a trial answers: the question by which the ledger finds it again."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata

from bertbench.core.workload import Setup
from bertbench.hardware.device import Budget
from bertbench.hardware.tensorflow_support import tensorflow_version
from finetune.storage.json_files import json_text


def versions_key() -> str:
    """Canonical text of the versions that decide a trial's outcome, without importing them."""
    versions = {
        "tensorflow": tensorflow_version() or "unknown",
        "bertbench": _bertbench_version(),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    return json_text(versions, sort_keys=True)


def _bertbench_version() -> str:
    try:
        return metadata.version("bertbench")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclasses.dataclass(frozen=True)
class Question:
    """Whether a batch of a setup fits in a budget, with certain versions of the software.

    Example:
        >>> question = Question(budget, Setup(published_workload("bert-tiny", 128)))
        >>> with open_ledger() as ledger:
        ...     trials = find(ledger, question)

    Attributes:
        budget: device, and the bytes of it that the allocator may use.
        setup: workload and levers.
        versions: as `versions_key` writes them; those of this process if left out.
    """

    budget: Budget
    setup: Setup
    versions: str = dataclasses.field(default_factory=versions_key)

    def key(self) -> QuestionKey:
        """Texts that are equal exactly for equal questions."""
        return QuestionKey(
            budget=self.budget.key(),
            versions=self.versions,
            workload=self.setup.workload.key(),
            levers=self.setup.levers.key(),
        )


@dataclasses.dataclass(frozen=True)
class QuestionKey:
    """Canonical texts of a question: trials with equal keys answer the same question.

    The texts of an older version may be ones that this version cannot read.

    Attributes:
        budget: of device and bytes, see `bertbench.hardware.device.Budget.key`.
        versions: see `versions_key`.
        workload: see `bertbench.core.workload.Workload.key`.
        levers: see `bertbench.core.workload.Levers.key`.
    """

    budget: str
    versions: str
    workload: str
    levers: str
