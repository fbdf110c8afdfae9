"""The search on simulated devices: always the true limit, with few trials."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertbench.core.bisection import largest_passing
from bertbench.probing.search import (
    MAX_PROBED_BATCH,
    Measure,
    Predictions,
    SearchResult,
    find_max_batch,
)
from bertbench.trials.trial import Trial

Calls = list[tuple[list[int], bool]]


@dataclasses.dataclass(frozen=True)
class Formula:
    """Predicts peaks, and the limit by them."""

    peak_bytes: Callable[[int], int]
    budget_bytes: int

    def max_micro_batch(self, at_most: int, fitting: int) -> int:
        return largest_passing(lambda b: self.peak_bytes(b) <= self.budget_bytes, fitting, at_most)


@dataclasses.dataclass(frozen=True)
class Located:
    """A replay that tells the limit by what has fitted."""

    limit: Callable[[int], int | None]

    def max_micro_batch(self, at_most: int, fitting: int) -> int | None:
        return self.limit(fitting)


def device(
    fits: Callable[[int], bool], peak: Callable[[int], int], calls: Calls | None = None
) -> Measure:
    """Return the `measure` of a device on which batch b fits if `fits(b)` says so."""

    def measure(batches: Sequence[int], fresh: bool) -> list[Trial]:
        if calls is not None:
            calls.append((list(batches), fresh))
        trials: list[Trial] = []
        for batch in batches:
            if not fits(batch):
                trials.append(Trial(batch, "oom", message=f"OOM at {batch}"))
                break
            trials.append(Trial(batch, "fits", peak(batch), 0.1))
        return trials

    return measure


def affine(constant: int, slope: int, budget: int, calls: Calls | None = None) -> Measure:
    def peak(batch: int) -> int:
        return constant + slope * batch

    return device(lambda batch: peak(batch) <= budget, peak, calls)


def assert_certified(result: SearchResult, limit: int) -> None:
    assert result.max_batch == limit
    assert result.stopped_by == "oom"
    assert result.certificate is not None
    fits, oom = result.certificate.fits, result.certificate.oom
    assert (oom.batch, oom.outcome, oom.fresh) == (limit + 1, "oom", True)
    if limit == 0:
        assert fits is None
    else:
        assert fits is not None
        assert (fits.batch, fits.outcome, fits.fresh) == (limit, "fits", True)


def test_the_exact_sequence_on_an_affine_device() -> None:
    calls: Calls = []
    result = find_max_batch(affine(100, 10, 373, calls), budget_bytes=373)
    assert_certified(result, 27)
    assert calls == [([2, 4], False), ([27], True), ([28], True)]
    assert [t.batch for t in result.trials] == [2, 4, 27, 28]
    assert result.measured == 4
    assert result.message == "OOM at 28"
    assert result.contradictions == ()


def test_a_line_is_not_believed_ten_times_beyond_what_fits() -> None:
    """As measured: a small model's peak is flat first, and its slope there promises too much."""

    def peak(batch: int) -> int:
        return max(1000 + batch, 900 + 10 * batch)

    calls: Calls = []
    result = find_max_batch(device(lambda b: peak(b) <= 1873, peak, calls), budget_bytes=1873)
    assert_certified(result, 97)
    assert calls == [([2, 4], False), ([16, 32], False), ([97], True), ([98], True)]


def test_a_good_prediction_moves_the_first_two_batches() -> None:
    calls: Calls = []

    def predict(batch: int) -> int:
        return 95 + 10 * batch

    predictions = Predictions(formula=Formula(predict, 1073))
    result = find_max_batch(
        affine(100, 10, 1073, calls), budget_bytes=1073, predictions=predictions
    )
    assert_certified(result, 97)
    assert calls == [([12, 32], False), ([97], True), ([98], True)]


@given(constant=st.integers(0, 10**6), slope=st.integers(1, 10**6), limit=st.integers(0, 3000))
def test_an_affine_device_takes_at_most_four_trials(constant: int, slope: int, limit: int) -> None:
    budget = constant + slope * limit + slope // 2
    result = find_max_batch(affine(constant, slope, budget), budget_bytes=budget)
    assert_certified(result, limit)
    assert result.measured <= 4 + 2 * (limit > 32) + 2 * (limit > 256) + 2 * (limit > 2048)
    result = find_max_batch(
        affine(constant, slope, budget),
        budget_bytes=budget,
        predictions=Predictions(formula=Formula(lambda batch: constant + slope * batch, budget)),
    )
    assert_certified(result, limit)
    assert result.measured <= 4


def test_noise_costs_about_one_trial_more() -> None:
    """Fragmentation makes the peak uneven by 3 %, and the prediction is 5 % off."""
    counts = []
    for seed in range(300):
        draw = random.Random(seed)
        constant, slope, limit = draw.randint(1, 4000), draw.randint(1, 400), draw.randint(1, 200)
        peaks = {0: 0}
        for batch in range(1, 2 * limit + 10):
            noisy = int(constant + slope * batch * (1 + draw.uniform(0, 0.03)))
            peaks[batch] = max(noisy, peaks[batch - 1])
        budget = constant + slope * limit
        truth = max(batch for batch, peak in peaks.items() if peak <= budget)
        measure = device(
            lambda b, peaks=peaks, budget=budget: peaks.get(b, budget + 1) <= budget,
            lambda b, peaks=peaks: peaks[b],
        )

        def predict(batch: int, constant: int = constant, slope: int = slope) -> int:
            return int(0.95 * (constant + slope * batch))

        result = find_max_batch(
            measure, budget_bytes=budget, predictions=Predictions(formula=Formula(predict, budget))
        )
        assert_certified(result, truth)
        counts.append(result.measured)
    assert statistics.median(counts) <= 5


@settings(max_examples=400)
@given(
    steps=st.lists(st.integers(0, 1000), min_size=1, max_size=300),
    budget=st.integers(1, 10**5),
    reported=st.sampled_from(["true", "none", "constant"]),
    scale=st.none() | st.floats(0.01, 100),
    located=st.none() | st.integers(0, 400),
    limit=st.none() | st.integers(1, 400),
)
def test_any_monotone_device_gives_its_true_limit(
    steps: list[int],
    budget: int,
    reported: str,
    scale: float | None,
    located: int | None,
    limit: int | None,
) -> None:
    peaks = [0]
    for step in steps:
        peaks.append(peaks[-1] + step)

    def peak(batch: int) -> int:
        # Past the end of the list nothing fits, so that every device has a limit.
        return peaks[batch] if batch < len(peaks) else budget + 1

    def trial(batch: int) -> Trial:
        if peak(batch) > budget:
            return Trial(batch, "oom")
        told = {"true": peak(batch), "none": None, "constant": 7}[reported]
        return Trial(batch, "fits", told)

    def measure(batches: Sequence[int], fresh: bool) -> list[Trial]:
        assert fresh or len(batches) > 1
        assert list(batches) == sorted(set(batches))
        assert all(1 <= batch <= (limit or MAX_PROBED_BATCH) for batch in batches)
        trials: list[Trial] = []
        for batch in batches:
            trials.append(trial(batch))
            if trials[-1].outcome == "oom":
                break
        return trials

    truth = max(batch for batch in range(len(peaks)) if peaks[batch] <= budget)
    formula = None if scale is None else Formula(lambda batch: int(peak(batch) * scale), budget)
    result = find_max_batch(
        measure,
        predictions=Predictions(Located(lambda fitting: located), formula),
        budget_bytes=budget,
        max_batch=limit,
    )
    if limit is not None and limit <= truth:
        assert (result.max_batch, result.stopped_by) == (limit, "max_batch")
        assert result.certificate is None
    else:
        assert_certified(result, truth)
    assert result.contradictions == ()
    assert result.measured <= 40
    batches = [t.batch for t in result.trials if t.fresh]
    assert len(batches) == len(set(batches)), "a fresh trial was repeated"


def test_a_plateau_with_a_jump_needs_a_handful_of_trials() -> None:
    """A kernel with a workspace above batch 40 ends an affine device early."""

    def peak(batch: int) -> int:
        return 100 + 10 * batch + (5000 if batch > 40 else 0)

    result = find_max_batch(device(lambda b: peak(b) <= 1100, peak), budget_bytes=1100)
    assert_certified(result, 40)
    assert result.measured <= 14


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5])
def test_small_limits(limit: int) -> None:
    result = find_max_batch(affine(0, 10, 10 * limit), budget_bytes=10 * limit)
    assert_certified(result, limit)
    assert result.measured <= 4
    assert sum(t.outcome == "oom" for t in result.trials) <= 2


def test_zero_is_an_answer_with_the_missing_bytes() -> None:
    result = find_max_batch(
        affine(900, 100, 700),
        budget_bytes=700,
        predictions=Predictions(formula=Formula(lambda batch: 880 + 100 * batch, 700)),
    )
    assert_certified(result, 0)
    assert result.missing_bytes == 280
    assert result.message == "OOM at 1"


def test_a_bound_is_not_reported_as_a_limit() -> None:
    calls: Calls = []
    result = find_max_batch(affine(0, 1, 10**9, calls), budget_bytes=10**9, max_batch=32)
    assert (result.max_batch, result.stopped_by, result.certificate) == (32, "max_batch", None)
    assert calls == [([2, 4], False), ([32], True)]
    result = find_max_batch(device(lambda _: True, lambda _: 5), budget_bytes=10)
    assert (result.max_batch, result.stopped_by) == (MAX_PROBED_BATCH, "max_batch")


def test_a_complete_certificate_that_is_known_costs_nothing() -> None:
    first = find_max_batch(affine(100, 10, 373), budget_bytes=373)
    calls: Calls = []
    again = find_max_batch(affine(100, 10, 373, calls), known=first.trials, budget_bytes=373)
    assert calls == []
    assert again.measured == 0
    assert (again.certificate, again.trials) == (first.certificate, first.trials)


@pytest.mark.parametrize("interrupted_after", [1, 2, 3])
def test_an_interrupted_search_continues(interrupted_after: int) -> None:
    first = find_max_batch(affine(100, 10, 373), budget_bytes=373)
    known = first.trials[:interrupted_after]
    again = find_max_batch(affine(100, 10, 373), known=known, budget_bytes=373)
    assert_certified(again, 27)
    if interrupted_after > 1:
        assert again.measured == 4 - interrupted_after


def test_what_failed_before_is_tried_again_and_a_new_failure_stops() -> None:
    failed = Trial(27, "failed", message="killed by SIGSEGV", fresh=True)
    result = find_max_batch(affine(100, 10, 373), known=[failed], budget_bytes=373)
    assert_certified(result, 27)

    def measure(batches: Sequence[int], fresh: bool) -> list[Trial]:
        return [failed] if fresh else [Trial(2, "fits", 120), Trial(4, "fits", 140)]

    result = find_max_batch(measure, budget_bytes=373)
    assert (result.max_batch, result.stopped_by) == (4, "failed")
    assert result.certificate is None
    assert result.message == "killed by SIGSEGV"


def test_a_limit_that_only_holds_in_fresh_processes_moves_down_and_up() -> None:
    """Batch 4 fits after 2, but not alone; then batch 4 does not fit after 2, but alone."""
    for fresh_limit in (3, 6):

        def measure(
            batches: Sequence[int], fresh: bool, fresh_limit: int = fresh_limit
        ) -> list[Trial]:
            if not fresh:
                other: Trial = Trial(4, "fits", 400) if fresh_limit == 3 else Trial(4, "oom")
                return [Trial(2, "fits", 200), other]
            [batch] = batches
            fits = batch <= fresh_limit
            return [Trial(batch, "fits" if fits else "oom", 100 * batch if fits else None)]

        result = find_max_batch(measure, budget_bytes=400)
        assert_certified(result, fresh_limit)
        assert (4, 4) in {(a.batch, b.batch) for a, b in result.contradictions}


def test_a_fresh_trial_counts_more_than_a_later_one_in_a_used_process() -> None:
    known = [
        Trial(4, "fits", 400, fresh=True),
        Trial(5, "oom", message="alone", fresh=True),
        Trial(5, "fits", 500, fresh=False),
    ]
    calls: Calls = []
    result = find_max_batch(affine(0, 100, 499, calls), known=known, budget_bytes=499)
    assert_certified(result, 4)
    assert calls == []
    assert result.message == "alone"


def test_without_monotonicity_the_smallest_limit_counts_and_the_rest_is_reported() -> None:
    def fits(batch: int) -> bool:
        return batch <= 10 or 20 <= batch <= 30

    known = [Trial(25, "fits", 250, fresh=True), Trial(15, "oom", fresh=True)]
    result = find_max_batch(device(fits, lambda b: 10 * b), known=known, budget_bytes=150)
    assert_certified(result, 10)
    assert {(11, 25), (15, 25)} <= {(a.batch, b.batch) for a, b in result.contradictions}


def test_no_certificate_when_not_asked_for() -> None:
    calls: Calls = []
    result = find_max_batch(affine(0, 10, 45, calls), budget_bytes=45, certify=False)
    assert (result.max_batch, result.certificate) == (4, None)
    assert calls == [([2, 4], False), ([5], True)]
    assert result.stopped_by == "oom"


def test_a_trial_says_itself_whether_it_was_fresh() -> None:
    """Known trials of a used process do not make a certificate."""
    first = find_max_batch(affine(100, 10, 373), budget_bytes=373)
    used = [dataclasses.replace(trial, fresh=False) for trial in first.trials]
    calls: Calls = []
    find_max_batch(affine(100, 10, 373, calls), known=used, budget_bytes=373)
    assert calls == [([27], True), ([28], True)]


@pytest.mark.parametrize(
    ("located", "trials"), [(97, 4), (96, 6), (98, 5), (120, 14), (0, 14), (1, 14)]
)
def test_what_was_recorded_is_tried_at_once_and_believed_for_a_while(
    located: int, trials: int
) -> None:
    def uneven(batch: int) -> int:
        return 100 + 10 * batch + 7 * (batch % 5)

    calls: Calls = []
    result = find_max_batch(
        device(lambda b: b <= 97, uneven, calls),
        budget_bytes=1100,
        predictions=Predictions(
            Located(lambda fitting: located if calls else None),
            Formula(lambda batch: 95 + 10 * batch, 1100),
        ),
    )
    assert_certified(result, 97)
    assert calls[0] == ([12, 33], True)
    assert result.measured <= trials
    assert all(trial.fresh for trial in result.trials)


def test_layers_in_chunks_have_several_of_them_in_the_larger_of_the_first_two_trials() -> None:
    for examples_per_chunk, large in (
        (1, 32),
        (4, 23),
        (9, 53),
        (10, 39),
        (14, 55),
        (19, 56),
        (20, 39),
        (30, 33),
        (79, 82),
        (80, 32),
    ):
        calls: Calls = []
        located = Predictions(
            Located(lambda fitting: 97),
            Formula(lambda batch: 95 + 10 * batch, 1073),
            examples_per_chunk,
        )
        find_max_batch(affine(100, 10, 1073, calls), budget_bytes=1073, predictions=located)
        assert calls[0] == ([97], True)
        calls.clear()
        predictions = dataclasses.replace(located, replay=None)
        find_max_batch(affine(100, 10, 1073, calls), budget_bytes=1073, predictions=predictions)
        assert calls[0] == ([min(12, large - 1), large], False)


def test_a_recording_that_is_there_already_leaves_two_trials() -> None:
    calls: Calls = []
    predictions = Predictions(Located(lambda fitting: 27))
    result = find_max_batch(affine(100, 10, 373, calls), budget_bytes=373, predictions=predictions)
    assert_certified(result, 27)
    assert calls == [([27], True), ([28], True)]


def test_a_hole_below_what_fits_does_not_stop_the_search() -> None:
    """Nearly full memory has room for some batches and not for smaller ones."""
    fitting = (1, 2, 4, 5, 6)

    def locate(low: int) -> int | None:
        return max(b for b in range(low, 7) if all(n in fitting for n in range(low, b + 1)))

    calls: Calls = []
    result = find_max_batch(
        device(lambda b: b in fitting, lambda b: 100 + b, calls),
        budget_bytes=110,
        predictions=Predictions(
            Located(lambda low: locate(low) if calls else None),
            Formula(lambda batch: 100 + 2 * batch, 110),
        ),
    )
    assert_certified(result, 6)
    assert calls == [([2, 4], True), ([6], True), ([7], True)]
