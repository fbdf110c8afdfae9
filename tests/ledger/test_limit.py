"""One definition of a limit, and everybody who uses it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bertbench.cli import ledger as ledger_cli
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Device, make_budget
from bertbench.hardware.step_time import device_rates
from bertbench.ledger.database import open_ledger
from bertbench.ledger.limit import (
    AT_LEAST,
    BELOW,
    CERTIFIED,
    FAILED,
    MEASURED,
    Limit,
    find_limit,
    verdicts,
)
from bertbench.ledger.question import Question
from bertbench.ledger.records import find, read_rows, record
from bertbench.planning.calibration import calibrate
from bertbench.probing.search import find_max_batch
from bertbench.trials.trial import Trial
from helpers.ledger_rows import failed, fits, oom, rows_of
from reports.measured_cells import collect_cells

HOLE = [fits(4), oom(5), fits(7), oom(8)]


@pytest.mark.parametrize(
    ("trials", "max_batch", "evidence", "again"),
    [
        (HOLE, 4, CERTIFIED, [7]),
        ([fits(4), oom(5, fresh=False)], 4, MEASURED, []),
        ([fits(4), oom(6)], 4, MEASURED, []),
        ([fits(4), fits(9)], 9, AT_LEAST, []),
        ([oom(1), fits(2)], 0, CERTIFIED, [2]),
        ([oom(1, fresh=False)], 0, MEASURED, []),
        ([oom(5), fits(7)], None, BELOW, [7]),
        ([failed(5)], None, FAILED, []),
        ([], None, FAILED, []),
        # The newer of two alike, and a fresh one above one in a used process.
        ([oom(5), fits(4), fits(5), oom(6)], 5, CERTIFIED, []),
        ([fits(4), oom(5), fits(5, fresh=False), oom(4, fresh=False)], 4, CERTIFIED, []),
    ],
)
def test_what_trials_say_together(
    trials: list[Trial], max_batch: int | None, evidence: str, again: list[int]
) -> None:
    limit = find_limit(trials)
    assert (limit.max_batch, limit.evidence) == (max_batch, evidence)
    assert [trial.batch for trial in limit.fits_again] == again


def test_four_trials_are_one_limit_for_everybody(tmp_path: Path) -> None:
    device = Device("cpu", 0, "Some CPU", None, 1 << 40, 1 << 40)
    budget = make_budget(device, 512 * MIB_BYTES)
    question = Question(budget, Setup(published_workload("bert-tiny", 64)), "{}")
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        for trial in HOLE:
            record(ledger, question, trial)
        known = find(ledger, question)
        rows = read_rows(ledger)

    def measure(batches: Sequence[int], fresh: bool) -> list[Trial]:
        raise AssertionError(f"{batches} would be tried again")

    probed = find_max_batch(measure, known=known, budget_bytes=budget.budget_bytes)
    assert (probed.max_batch, probed.stopped_by, probed.measured) == (4, "oom", 0)
    assert probed.certificate is not None
    assert probed.certificate.fits is not None
    assert (probed.certificate.fits.batch, probed.certificate.oom.batch) == (4, 5)

    (cell,) = collect_cells(rows)
    assert (cell.max_batch, cell.evidence, cell.bounded_max_batch) == (4, "certified", 4)
    assert cell.to_json()["fits_again"] == [7]

    arguments = ["list", "--ledger", str(path)]
    result = CliRunner().invoke(ledger_cli.command, [*arguments, "--json", "-"])
    (listed,) = json.loads(result.output)["cells"]
    assert (listed["max_batch"], listed["smallest_out_of_memory"]) == (4, 5)
    assert (listed["evidence"], listed["fits_again"]) == ("certified", [7])
    line = CliRunner().invoke(ledger_cli.command, arguments).output.splitlines()[-1]
    assert line.split()[-4:] == ["4", "5", "certified", "4"]

    calibration = calibrate(rows, question.setup.workload, device_rates(device), "cpu")
    told = {batch: calibration.fits(Levers(), batch, budget.budget_bytes) for batch in range(3, 10)}
    assert told == {3: None, 4: True, 5: False, 6: None, 7: True, 8: False, 9: None}


TRIALS = st.lists(
    st.builds(
        Trial,
        batch=st.integers(1, 12),
        outcome=st.sampled_from(["fits", "oom", "failed"]),
        fresh=st.booleans(),
        seconds=st.integers(0, 10**6).map(float),
    ),
    max_size=25,
)


@given(trials=TRIALS, seed=st.integers(0, 2**32))
def test_the_order_of_batches_does_not_matter(trials: list[Trial], seed: int) -> None:
    """Only that of trials of the same batch does."""
    of_batch: dict[int, list[Trial]] = {}
    for trial in trials:
        of_batch.setdefault(trial.batch, []).append(trial)
    batches = [trial.batch for trial in trials]
    random.Random(seed).shuffle(batches)
    queues = {batch: iter(some) for batch, some in of_batch.items()}
    assert find_limit(next(queues[batch]) for batch in batches) == find_limit(trials)


@given(trials=TRIALS)
def test_failed_trials_change_nothing(trials: list[Trial]) -> None:
    assert find_limit(t for t in trials if t.outcome != "failed") == find_limit(trials)


@given(trials=TRIALS)
def test_a_limit_is_the_largest_batch_below_which_none_ran_out(trials: list[Trial]) -> None:
    limit = find_limit(trials)
    counted = verdicts(trials)
    ran_out = [batch for batch, trial in counted.items() if trial.outcome == "oom"]
    fitting = [batch for batch, trial in counted.items() if trial.outcome == "fits"]
    below = [batch for batch in fitting if not any(other <= batch for other in ran_out)]
    assert (limit.fits and limit.fits.batch) == max(below, default=None)
    assert (limit.oom and limit.oom.batch) == min(ran_out, default=None)
    assert sorted([*below, *(t.batch for t in limit.fits_again)]) == sorted(fitting)


@given(trials=TRIALS, fitting=st.integers(0, 12), batch=st.integers(1, 12))
def test_a_trial_that_agrees_never_loosens(trials: list[Trial], fitting: int, batch: int) -> None:
    """A device with a true limit: every trial leaves it between the two sides, closer or as far."""
    true = [
        dataclasses.replace(trial, outcome="fits" if trial.batch <= fitting else "oom")
        for trial in trials
        if trial.outcome != "failed"
    ]
    sides = []
    for some in (true, [*true, Trial(batch, "fits" if batch <= fitting else "oom", fresh=True)]):
        limit = find_limit(some)
        assert limit.fits_again == ()
        low = limit.max_batch or 0
        high = 99 if limit.oom is None else limit.oom.batch
        assert low <= fitting < high
        sides.append((low, high))
    (low, high), (next_low, next_high) = sides
    assert low <= next_low
    assert next_high <= high


@given(trials=TRIALS)
def test_the_search_and_the_report_read_alike(trials: list[Trial]) -> None:
    limit = find_limit(trials)
    if trials:
        (cell,) = collect_cells(rows_of(*trials))
        assert (cell.max_batch, cell.evidence) == (limit.max_batch, limit.evidence)
    if limit.evidence == CERTIFIED:

        def measure(batches: Sequence[int], fresh: bool) -> list[Trial]:
            raise AssertionError(f"{batches} would be tried again")

        result = find_max_batch(measure, known=trials, budget_bytes=1)
        assert (result.max_batch, result.stopped_by) == (limit.max_batch, "oom")


def test_nothing_known_is_no_limit() -> None:
    assert Limit().evidence == FAILED
    assert not Limit().neighbours
