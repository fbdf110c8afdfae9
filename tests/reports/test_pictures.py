"""What is drawn: the data of the pictures, not their pixels."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bertbench.core.units import GIB_BYTES, MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Device, TpuSettings
from bertbench.memory.traces.archive import read_trace
from bertbench.memory.traces.traced_peak import traced_peak_bytes
from bertbench.planning.planner import Plan
from finetune.spec.checkpointing import POLICIES, parse_checkpointing
from helpers.ledger_rows import fits, oom, rows_of
from reports.environments import name_environments
from reports.measured_cells import collect_cells
from reports.peak_predictions import PeakPrediction, describe_errors, predict_peaks
from reports.pictures.figures import INK, Picture, styled
from reports.pictures.plan_plots import footprint_picture, front_picture, timeline_picture
from reports.pictures.timeline import BACKWARD, BOTH_PASSES, FORWARD, UPDATE, step_timeline
from reports.pictures.trial_plots import limits_picture, predictions_picture, throughput_picture
from reports.recommendations import recommend_plans
from reports.report import Report

ROWS = [
    *rows_of(fits(31), oom(32), seq_len=384, mib=11430),
    *rows_of(fits(21, fresh=False), oom(22), seq_len=512, mib=11430),
    *rows_of(fits(90), seq_len=384, policy="full", mib=11430),
    *rows_of(oom(1), model="bert-large", seq_len=384, mib=11430),
]


def drawn(picture: Picture | None) -> Any:
    assert picture is not None
    with styled():
        return picture.draw()


def lines(axis: Any) -> dict[str, list[tuple[float, float]]]:
    """Labelled lines of a panel."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }


def test_limits_are_drawn_beside_the_published_ones() -> None:
    cells = collect_cells(ROWS)
    picture = limits_picture(cells, "squad, here")
    assert picture is not None
    assert picture.title.endswith(": squad, here")
    assert "0 is drawn at the bottom" in picture.caption
    figure = drawn(picture)
    base, large = figure.axes
    assert (base.get_title(loc="left"), large.get_title(loc="left")) == ("BERT-Base", "BERT-Large")
    found = lines(base)
    assert found["none"] == [(384, 31), (512, 21)]
    assert found["full"] == [(384, 90)]
    assert dict(found["published, Titan X 12 GB"])[384] == 12
    assert base.get_yscale() == "log"
    # Certified ones are filled, and nothing else; what was not limited points up.
    filled = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in base.get_lines()
        if line.get_label().startswith("_")
    ]
    assert filled == [(384, 31)]
    assert len(base.texts) == 1
    # 0 has a place on the logarithmic axis.
    assert lines(large)["none"] == [(384, 0.5)]
    assert large.yaxis.get_major_formatter()(0.5) == "0"
    assert limits_picture([], "nowhere") is None
    above = limits_picture(collect_cells(rows_of(fits(3), oom(4))), "here")
    assert above is not None
    assert "0 is drawn" not in above.caption


def test_few_small_limits_of_long_settings_can_be_read() -> None:
    policies = ("none", "selective", "nested:1+selective", "full:2")
    rows = [
        row
        for policy in policies
        for steps in (1, 2)
        for row in rows_of(fits(3), oom(5), policy=policy, steps=steps, optimizer="adafactor")
    ]
    figure = drawn(limits_picture(collect_cells(rows), "here"))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high and tick >= 1]
    labels = [axis.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert labels == [f"{tick:g}" for tick in ticks]
    assert len(set(labels)) == len(labels) >= 3


@pytest.mark.parametrize("limit", [1, 2, 9, 77, 480, 9_000, 65_000])
def test_limits_have_ticks(limit: int) -> None:
    figure = drawn(limits_picture(collect_cells(rows_of(fits(limit), model="bert-tiny")), "here"))
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert 1 <= len(ticks) <= 12
    assert limit > 9 or limit in ticks


def test_what_was_tried_for_a_plan_is_not_drawn_as_a_limit() -> None:
    cells = collect_cells([*ROWS, *rows_of(fits(8), steps=4, mib=11430)])
    base, _ = drawn(limits_picture(cells, "squad, here")).axes
    assert "none" in lines(base)
    assert "none, 4 micro-batches" not in lines(base)


@pytest.mark.parametrize(
    ("model", "seq_len", "mib"),
    [
        ("bert-base", 512, 11430),
        ("bert-large", 320, 11430),
        ("bert-large", 512, 11430),
        ("bert-large", 384, 6000),
        ("bert-mini", 128, 6000),
        ("bert-large", 384, 8000),
    ],
)
def test_labels_of_settings_do_not_lie_on_each_other(model: str, seq_len: int, mib: int) -> None:
    rows = rows_of(fits(1), model=model, seq_len=seq_len, mib=mib)
    (planned,) = recommend_plans(collect_cells(rows), 32)
    figure = drawn(front_picture(planned, "here"))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts]
    assert boxes
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)
    # None lies on a mark but perhaps its own corner.
    marks = axis.transData.transform([p for line in axis.lines[1:3] for p in line.get_xydata()])
    assert not any(box.shrunk(0.98, 0.9).contains(*mark) for box in boxes for mark in marks)


def test_speed_is_drawn_up_to_the_wall() -> None:
    cells = collect_cells(rows_of(fits(8, seconds=1.0), fits(16, seconds=1.6), oom(21)))
    (axis,) = drawn(throughput_picture(cells, name_environments(c.environment for c in cells))).axes
    curve, wall = axis.get_lines()
    assert list(zip(*curve.get_data(), strict=True)) == [(8, 8.0), (16, 10.0)]
    assert set(wall.get_xdata()) == {21}
    assert axis.texts[0].get_text() == "21 runs\nout of memory"
    assert throughput_picture(collect_cells(ROWS), {}) is None
    # Two points beside a curve are left out, and that is said.
    curve = rows_of(*(fits(n) for n in range(1, 7)))
    cells = collect_cells([*curve, *rows_of(fits(8), fits(16), seq_len=64)])
    picture = throughput_picture(cells, name_environments(c.environment for c in cells))
    assert picture is not None
    assert picture.caption.endswith("Of 2 cells, those with the most batches.")
    assert [axis.get_title(loc="left") for axis in drawn(picture).axes] == ["BERT-Base, 384, none"]
    # Two places are told apart.
    rows = [row for mib in (100, 200) for row in rows_of(fits(8), fits(16), mib=mib)]
    cells = collect_cells(rows)
    figure = drawn(throughput_picture(cells, name_environments(c.environment for c in cells)))
    assert [axis.get_title(loc="left").splitlines()[1] for axis in figure.axes] == [
        "squad, 100 MiB on Some & CPU (2 cores)",
        "squad, 200 MiB on Some & CPU (2 cores)",
    ]


def test_plans_are_drawn_with_their_footprints() -> None:
    rows = rows_of(fits(3), oom(4), model="bert-mini", seq_len=128, mib=400)
    (planned,) = recommend_plans(collect_cells(rows), 32)
    assert isinstance(planned.plan, Plan)
    assert planned.trial is None
    chosen = planned.plan.chosen
    tried = rows_of(
        fits(chosen.step.micro_batch, 333), model="bert-mini", seq_len=128, mib=400, first=3,
        policy=str(chosen.step.levers.checkpointing), steps=chosen.step.levers.accumulation_steps,
    )  # fmt: skip
    (planned,) = recommend_plans(collect_cells([*rows, *tried]), 32)
    assert planned.trial is not None
    plan_command, run_command = planned.commands
    assert "--model bert-mini --seq-len 128" in plan_command
    assert "--device cpu --memory 400MiB" in plan_command
    assert "--plan plan.json" in run_command
    (axis,) = drawn(footprint_picture([planned], {planned.environment: "here"})).axes
    widths = [bar.get_width() for bar in axis.patches]
    assert sum(widths[:-1]) == pytest.approx(chosen.footprint.peak_bytes / MIB_BYTES)
    assert widths[-1] == 333  # measured
    assert footprint_picture([], {}) is None

    (axis,) = drawn(front_picture(planned, "here")).axes
    found = lines(axis)
    assert found["chosen"] == [
        (chosen.footprint.peak_bytes / MIB_BYTES, chosen.predicted_step_seconds)
    ]
    assert [x for x, _ in found["needs less, takes longer"]] == [
        entry.footprint.peak_bytes / MIB_BYTES for entry in planned.plan.alternatives
    ]
    assert {x for x, _ in found["budget"]} == {400}

    timeline = step_timeline(planned.workload, chosen.step.levers, chosen.step.micro_batch)
    assert timeline is not None
    (axis,) = drawn(timeline_picture(planned, "here")).axes
    highest = max(area.get_paths()[0].vertices[:, 1].max() for area in axis.collections)
    assert highest == pytest.approx(timeline.peak_bytes / MIB_BYTES)
    assert [text.get_text() for text in axis.texts] == [phase.name for phase in timeline.phases]


def test_a_tpu_is_asked_for_by_its_own_flags() -> None:
    tpu = Device("tpu", 0, "TPU v2", None, 1 << 40, 1 << 40, tpu=TpuSettings("t"))
    rows = rows_of(fits(8), oom(9), mib=7618, device=tpu)
    (planned,) = recommend_plans(collect_cells(rows), 32)
    plan, run = planned.commands
    assert "--gpu tpu-v2-8" in plan
    assert "--use_tpu --tpu_name" in run
    assert "--device" not in plan + run
    # XLA asks in another order, so there is nothing to replay.
    assert timeline_picture(planned, "here") is None


def test_what_does_not_fit_is_said() -> None:
    (planned,) = recommend_plans(collect_cells(rows_of(oom(1), model="bert-large", mib=300)), 32)
    assert not isinstance(planned.plan, Plan)
    assert "does not fit" in str(planned.plan)
    assert footprint_picture([planned], {planned.environment: "here"}) is None
    assert planned.commands == ()
    assert front_picture(planned, "here") is None
    assert timeline_picture(planned, "here") is None


@pytest.mark.parametrize("head", ["squad", "classifier"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("policy", [*POLICIES, "selective:3", "full:2", "nested:3+selective"])
@pytest.mark.parametrize("model", ["bert-tiny", "bert-mini", "bert-base"])
def test_a_step_goes_through_its_phases(model: str, policy: str, steps: int, head: str) -> None:
    workload = published_workload(model, 128, head)
    levers = Levers(parse_checkpointing(policy), accumulation_steps=steps)
    timeline = step_timeline(workload, levers, 5)
    if timeline is None:
        assert traced_peak_bytes(Setup(workload, levers).step(5)) is None
        return
    names = [phase.name for phase in timeline.phases]
    passes = [FORWARD, BACKWARD]
    micro_batches = 1 if steps == 1 else 2
    both = [BOTH_PASSES] * micro_batches
    assert names == [*(passes * micro_batches if names[0] == FORWARD else both), UPDATE]
    assert model == "bert-tiny" or names[0] == FORWARD
    assert timeline.micro_batches == micro_batches
    borders = [timeline.phases[0].start, *(phase.end for phase in timeline.phases)]
    assert borders == sorted({*borders, 0, timeline.events})
    assert timeline.peak_bytes == traced_peak_bytes(Setup(workload, levers).step(5))
    # It begins and ends with nothing but the state.
    assert timeline.gradient_bytes.min() >= 0
    assert timeline.activation_bytes.min() >= 0
    assert timeline.activation_bytes[-1] == timeline.gradient_bytes[-1] == 0
    # What is drawn has the peak in it.
    total = timeline.gradient_bytes + timeline.activation_bytes
    assert total[timeline.sampled].max() == total.max()
    assert len(timeline.sampled) <= 1300
    for phase in timeline.phases[:-1]:
        inside = timeline.activation_bytes[phase.start : phase.end]
        if phase.name == FORWARD:
            assert inside[-1] > inside[0]


def test_no_trace_no_timeline() -> None:
    assert read_trace("telepathic") is None
    levers = Levers(precision="bf16")
    assert step_timeline(published_workload("bert-tiny", 64), levers, 5) is None


def test_predictions_are_of_fresh_trials() -> None:
    workload = published_workload("bert-mini", 128)
    peak = traced_peak_bytes(Setup(workload).step(8))
    assert peak is not None
    rows = [
        *rows_of(fits(8, peak // MIB_BYTES), fits(9, fresh=False), oom(60),
                 model="bert-mini", seq_len=128),
        *rows_of(fits(8, peak // MIB_BYTES), model="bert-mini", seq_len=128, precision="bf16"),
    ]  # fmt: skip
    found = sorted(predict_peaks(collect_cells(rows)), key=lambda p: p.traced)
    assert [(p.traced, p.measured_bytes) for p in found] == [
        (False, peak // MIB_BYTES * MIB_BYTES), (True, peak // MIB_BYTES * MIB_BYTES),
    ]  # fmt: skip
    assert abs(found[1].error) < 0.03
    one = [
        PeakPrediction(100, 106, True),
        PeakPrediction(100, 99, True),
        PeakPrediction(100, 102, True),
    ]
    assert describe_errors(one) == (
        "3 peaks predicted with a median error of 2.00 %, from -1.00 % to +6.00 %."
    )
    assert describe_errors([]) == ""
    left, right = drawn(predictions_picture(one)).axes
    points = left.get_lines()[-1]
    assert [y * MIB_BYTES for y in points.get_ydata()] == pytest.approx([106, 99, 102])
    assert [round(y, 6) for y in right.get_lines()[-1].get_ydata()] == [6, -1, 2]
    assert right.get_ylim()[1] > 6
    assert predictions_picture([]) is None


def test_pictures_are_files_and_parts_of_a_page() -> None:
    cells = collect_cells(ROWS)
    picture = limits_picture(cells, "squad, here")
    assert picture is not None
    assert picture.png()[:4] == b"\x89PNG"
    xml.etree.ElementTree.fromstring(picture.svg())
    inline = picture.inline_svg()
    xml.etree.ElementTree.fromstring(inline)
    # In the page's colour, with names of its own, and nothing of a width that is fixed.
    assert INK not in inline
    assert "currentColor" in inline
    assert f'id="{picture.name}-' in inline
    assert 'width="' not in inline[: inline.index(">")]
    assert picture.svg() == picture.svg()  # the same every time


def test_a_report_has_all_pictures(tmp_path: Path) -> None:
    more = rows_of(fits(8), fits(9), oom(10), model="bert-mini", seq_len=64, first=100)
    rows = [*ROWS, *more]
    report = Report(tmp_path / "l", rows, [], 32, datetime.now(timezone.utc))
    names = [picture.name for picture in report.pictures]
    assert len(set(names)) == len(names)
    kinds = {name.partition("-")[0] for name in names}
    assert kinds == {"limits", "throughput", "footprint", "front", "timeline", "predictions"}
    assert names.count("limits-squad") == 1
    assert "limits-squad-2" in names  # of another budget
    # The paper's systems come first, whatever was tried last.
    assert next(p.title for p in report.pictures if p.name == "limits-squad").endswith(
        ": squad, 11.2 GiB on Some & CPU (2 cores)"
    )
    json.dumps([cell.to_json() for cell in report.cells])
    assert all(p.environment.budget_bytes <= 12 * GIB_BYTES for p in report.recommendations)


def test_panels_are_below_each_other_on_a_narrow_screen() -> None:
    picture = limits_picture(collect_cells(ROWS), "here")
    assert picture is not None
    assert picture.draw_narrow is not None
    with styled():
        narrow = picture.draw_narrow()
    assert narrow.get_figwidth() < 5
    assert len(narrow.axes) == len(drawn(picture).axes) == 2
    inline = picture.inline_svg(picture.draw_narrow)
    assert f'id="{picture.name}-narrow-' in inline
    alone = limits_picture(collect_cells(ROWS[:2]), "here")
    assert alone is not None
    assert alone.draw_narrow is None


def test_names_from_outside_are_no_markup() -> None:
    def draw() -> Figure:
        figure = Figure()
        figure.subplots().set_title("m$\\foo$ & <b> 0.000123")
        return figure

    picture = Picture('q" onload="alert(1)/../ü', '"<a>" & b', "", draw)
    assert picture.name == "q-onload-alert-1-..-"
    root = xml.etree.ElementTree.fromstring(picture.inline_svg())
    assert root.attrib["aria-label"] == '"<a>" & b'
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert "m$\\foo$ & <b> 0.000123" in "".join(root.itertext())
