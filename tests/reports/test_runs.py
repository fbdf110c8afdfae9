"""Run folders, and what is drawn of SQuAD 2.0."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.errors import InputError
from finetune.tasks.squad_metrics import QuestionScores
from helpers.command_line import bertbench
from helpers.run_folders import squad_run
from reports.page import build_page
from reports.pictures.run_plots import (
    best_answers,
    point_at,
    precision_recall_picture,
    training_picture,
)
from reports.report import Report
from reports.runs import read_run
from reports.text import show_report


def test_precision_and_recall_are_drawn_with_the_threshold(tmp_path: Path) -> None:
    picture = precision_recall_picture(read_run(squad_run(tmp_path)))
    assert picture is not None
    curve, star = picture.draw().axes[0].get_lines()
    # In the order of the odds: a is right, d has no answer, b is wrong, c has no answer.
    assert list(curve.get_xdata()) == [0, 0.5, 0.5, 0.5, 0.5]
    assert list(curve.get_ydata()) == [1, 1, 1 / 2, 1 / 3, 1 / 4]
    # At -1.5 a and d are answered.
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([0.5], [0.5])
    assert star.get_label() == "null odds up to -1.5"


@pytest.mark.parametrize(
    "changes",
    [
        {"squad": {"version_2_with_negative": False}},
        {"predict_file": {"sha256": "0"}},
        {"squad": None},
    ],
)
def test_other_runs_have_no_such_picture(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert precision_recall_picture(read_run(squad_run(tmp_path, **changes))) is None


@pytest.mark.parametrize(
    "text", ['{"a": [{"text": "Paris"}]}', "[]", '{"a": 1}', "{", '{"a": [{}]}']
)
def test_damaged_predictions_are_left_out(tmp_path: Path, text: str) -> None:
    folder = squad_run(tmp_path)
    (folder / "nbest_predictions.json").write_text(text)
    assert precision_recall_picture(read_run(folder)) is None
    (folder / "null_odds.json").unlink()
    assert precision_recall_picture(read_run(folder)) is None


def test_the_best_answer_is_one() -> None:
    found = best_answers({"a": [{"text": ""}, {"text": "x"}, {"text": "y"}], "b": [{"text": ""}]})
    assert found == {"a": "x", "b": ""}


def test_the_point_of_a_threshold() -> None:
    scores = QuestionScores(
        np.array([True, True, False]), np.array([True, True, True]), np.array([1.0, 0.0, 0.0]),
        np.array([1.0, 0.5, 0.0]), np.array([0.0, 1.0, 2.0]),
        np.array([0, 1, 2]),
    )  # fmt: skip
    assert point_at(scores, 0.5) == (1.0, 0.5)
    assert point_at(scores, 1.0) == (0.75, 0.75)
    assert point_at(scores, 9.0) == (0.5, 0.75)
    assert point_at(scores, -1.0) == (0.0, 0.0)


def test_a_page_of_a_run(tmp_path: Path) -> None:
    folder, page = squad_run(tmp_path), tmp_path / "page.html"
    environment = {**os.environ, "BERTBENCH_LEDGER": str(tmp_path / "none.sqlite")}
    result = bertbench("report", f"--run={folder}", f"--out={page}", env=environment)
    assert result.stderr.endswith(f"wrote {page}\n")
    assert "Precision and recall of run" in page.read_text()


def test_scores_are_scores(tmp_path: Path) -> None:
    results = {
        "HasAns_exact": 10.5, "HasAns_f1": 12.0, "HasAns_total": 674, "best_exact": 50.2,
        "best_exact_thresh": 0.0, "best_f1": 51.0, "best_step": 90, "exact": 50.0, "f1": 50.5,
        "global_step": 344, "levers": {"xla": False}, "micro_batch": 24, "total": 1354,
        "null_score_diff_threshold": 1.7, "stopped_early": False, "task": "squad",
        "train_loss": 1.7, "train_seconds": 1258.0, "matthews": float("nan"),
    }  # fmt: skip
    run = read_run(squad_run(tmp_path, results=results))
    assert run.scores == {
        "HasAns_exact": 10.5, "HasAns_f1": 12.0, "best_exact": 50.2, "best_f1": 51.0,
        "exact": 50.0, "f1": 50.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": None, "results": None, "steps_down": None, "invocations": []},
        {"identity": ["a"], "invocations": ["a"], "task": None},
        {"identity": {"train_batch_size": "24"}, "invocations": [{"levers": None}]},
        {"invocations": {"0": 1}, "squad": ["x"], "predict_file": "x", "results": [1]},
        {"results": {"f1": "high", "null_score_diff_threshold": "low"}},
    ],
)
def test_a_damaged_record_is_shown_as_far_as_it_goes(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = squad_run(tmp_path, **changes)
    step = '{"step": 1, "loss": 2.0, "learning_rate": 0.1, "gradient_norm": 1, "seconds": 2}\n'
    bad = step.replace('"step": 1', '"step": "one"')
    (folder / "train_log.jsonl").write_bytes(f"{step}{bad}".encode() + b'{"step": \xff')
    (folder / "eval_log.jsonl").write_text('{"step": 1, "f1": "good", "exact": {}}\n[]\n7\n')
    run = read_run(folder)
    assert (len(run.steps), run.summary()["seconds"]) == (1, 2.0)
    report = Report(tmp_path / "l", [], [run], 32, datetime.now(timezone.utc))
    assert "run" in build_page(report)
    show_report(report)
    assert "None" not in capsys.readouterr().out
    json.dumps(run.summary(), allow_nan=False)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = squad_run(tmp_path, results={})
    run = read_run(folder)
    assert (len(run.steps), len(run.evaluations), run.scores) == (0, 0, {})
    assert run.summary()["steps"] == 0
    assert training_picture([run]) is None


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_what_is_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json.*not (JSON|the record of a run)"):
        read_run(tmp_path)


def test_metrics_with_names_of_no_text(tmp_path: Path) -> None:
    folder = squad_run(tmp_path)
    step = '{"step": %d, "loss": 2.0, "learning_rate": 0.1, "gradient_norm": 1, "seconds": 2}\n'
    (folder / "train_log.jsonl").write_text(step % 1 + step % 2)
    (folder / "eval_log.jsonl").write_text('{"step": 1, "\\ud800": 3}\n{"step": 2, "\\ud800": 4}\n')
    run = read_run(folder)
    assert list(run.evaluations.columns) == ["step", "\\ud800"]
    picture = training_picture([run])
    assert picture is not None
    assert "\\ud800" in picture.svg()


def test_damaged_lines_of_a_log_are_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = squad_run(tmp_path)
    step = '{"step": %d, "loss": 2.0, "learning_rate": 0.1, "gradient_norm": 1, "seconds": 2}\n'
    lines = [(step % number).encode() for number in range(1, 7)]
    lines[1], lines[3] = b"\xff" + lines[1], lines[3][:20] + b"\n"
    (folder / "train_log.jsonl").write_bytes(b"".join(lines) + b'{"step": 7')
    assert read_run(folder).steps["step"].tolist() == [1, 3, 5, 6]
    assert [r.message for r in caplog.records] == [
        f"{folder / 'train_log.jsonl'}: passed over 2 damaged lines"
    ]
