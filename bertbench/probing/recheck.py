"""Whether the certificates of an earlier probe hold: the trials on both sides, once more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertbench.core.workload import Setup
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_device, tpu_device
from bertbench.ledger.database import Ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import find, record
from bertbench.probing.cell import ProbeSettings
from bertbench.probing.probe_file import read_probe_file
from bertbench.probing.time_estimates import default_timeout_seconds
from bertbench.trials.measure import TrialListener, TrialSettings
from bertbench.trials.trial import Trial
from finetune.errors import InputError


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a probe's file says of one cell.

    Attributes:
        setup: workload and levers.
        fits: batch that is said to fit; 0 if none does.
        oom: batch that is said to run out of memory.
    """

    setup: Setup
    fits: int
    oom: int


@dataclasses.dataclass(frozen=True)
class Check:
    """A claim, and the trials that were made to check it.

    Attributes:
        claim: what was said.
        trials: of the batch that should fit, if there is one, and of the one that should not.
    """

    claim: Claim
    trials: tuple[Trial, ...]

    @property
    def wrong(self) -> tuple[Trial, ...]:
        """Trials that contradict the claim."""
        contrary = {True: "oom", False: "fits"}
        return tuple(t for t in self.trials if t.outcome == contrary[t.batch == self.claim.fits])

    @property
    def failed(self) -> tuple[Trial, ...]:
        """Trials that tell nothing."""
        return tuple(trial for trial in self.trials if trial.outcome == "failed")

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        claim = self.claim
        return {
            "model": claim.setup.workload.model,
            "head": claim.setup.workload.head,
            "seq_len": claim.setup.workload.seq_len,
            "levers": claim.setup.levers.to_json(),
            "max_batch": claim.fits,
            "confirmed": False if self.wrong else None if self.failed else True,
            "trials": [trial.to_json() for trial in self.trials],
        }


def read_claims(path: Path) -> tuple[Budget, list[Claim], int]:
    """Read a file that `bertbench probe --json` wrote.

    Returns:
        The budget, on the device as it is now; the certified cells; the number of other cells.

    Raises:
        InputError: not such a file, a cell whose certificate is none, or of a device that is not
            here.
    """
    probed = read_probe_file(path)
    claimed = probed.device
    claims: list[Claim] = []
    for number, cell in enumerate(probed.cells, 1):
        if cell.certificate is None:
            continue
        workload = cell.setup.workload
        named = f"cell {number} ({workload.model} {workload.seq_len})"
        wrong = _no_certificate(*cell.certificate)
        if any(cell.setup == claim.setup for claim in claims):
            wrong = "is there twice"
        if wrong:
            raise InputError(f"{named} {wrong}", path=path, hint="probe it again")
        fits, oom = cell.certificate
        claims.append(Claim(cell.setup, fits.batch if fits else 0, oom.batch))
    if claimed.tpu is not None:
        found = tpu_device(claimed.tpu, claimed.total_bytes)
    else:
        found = resolve_device(f"gpu:{claimed.uuid}" if claimed.uuid else claimed.label)
    if (found.name, found.driver) != (claimed.name, claimed.driver):
        raise InputError(
            f"measured on {claimed.name} with driver {claimed.driver}, and {found.label} here is "
            f"{found.name} with driver {found.driver}",
            path=path,
            hint="certificates hold for the device that they were measured on; probe this one",
        )
    return make_budget(found, probed.budget_bytes), claims, len(probed.cells) - len(claims)


def _no_certificate(fits: Trial | None, oom: Trial) -> str:
    """Say why two trials do not show where memory ends; "" if they do."""
    for trial, outcome in ((fits, "fits"), (oom, "oom")):
        if trial is not None and trial.outcome != outcome:
            cause = f" ({trial.message})" if trial.message else ""
            return f"has no certificate: batch {trial.batch} {trial.outcome}{cause}"
        if trial is not None and not trial.fresh:
            return f"has no certificate: batch {trial.batch} was not tried in a fresh process"
    low = 0 if fits is None else fits.batch
    if oom.batch != low + 1:
        return (
            f"has no certificate: batch {low} fits and batch {oom.batch} does not; a certificate "
            f"is of {low} and {low + 1}"
        )
    return ""


def check_claim(
    ledger: Ledger,
    budget: Budget,
    claim: Claim,
    settings: ProbeSettings,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Check:
    """Repeat both trials of a certificate in fresh processes; the ledger keeps them too.

    Args:
        ledger: open.
        budget: device and bytes.
        claim: what is checked.
        settings: how the trials are made.
        on_trial: takes each trial.
    """
    question = Question(budget, claim.setup)

    def add(trial: Trial) -> None:
        record(ledger, question, trial)
        on_trial(trial)

    trials: list[Trial] = []
    known = find(ledger, question)
    for batch in (claim.fits, claim.oom):
        if batch:
            seconds = settings.timeout_seconds or default_timeout_seconds(
                budget, claim.setup.step(batch), known, settings.steps
            )
            trials += settings.measure(
                claim.setup,
                budget,
                [batch],
                TrialSettings(settings.steps, seconds),
                TrialListener(on_trial=add),
            )
    return Check(claim, tuple(trials))
