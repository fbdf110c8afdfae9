"""What a run has recorded about itself in its folder, whoever else touches it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bertbench.core.errors import WorkError
from bertbench.running.output.run_folder import OutputFolder, alone_in, begin_run, clear_remains
from bertbench.running.output.run_record import RunDescription, add_step_down
from bertbench.running.settings import RunSettings
from finetune.model_files.model_folder import RUN_FILE
from finetune.storage.folders import FolderLostError

TRAINED = {"global_step": 30, "train_loss": 0.5, "train_seconds": 12.0}
SCORES = {"f1": 80.0, "weights_step": 20}
EXTRA = {"predict_file": {"path": "dev.json", "sha256": "0"}}


def settings(folder: Path, **more: Any) -> RunSettings:
    return RunSettings(
        **{
            "output_dir": folder, "max_seq_length": 128, "do_lower_case": True,
            "train_batch_size": 16, "predict_batch_size": 8, "learning_rate": 1e-4,
            "num_train_epochs": 1.0, "warmup_proportion": 0.1, "save_checkpoints_steps": 100,
            "seed": 1, **more,
        }
    )  # fmt: skip


def begin(asked: RunSettings, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    return begin_run(asked, RunDescription({"seed": 1}, {"micro_batch": 4}, extra or EXTRA))


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())["results"]
    return found


def test_a_repeated_run_keeps_what_it_knew(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    begun = begin(asked)
    with alone_in(tmp_path) as folder:
        OutputFolder(folder, begun).add_results(TRAINED)
        assert results_of(tmp_path) == TRAINED
        OutputFolder(folder, begun).add_results(SCORES)
    assert results_of(tmp_path) == TRAINED | SCORES
    begin(asked)
    assert results_of(tmp_path) == TRAINED | SCORES
    assert len(json.loads((tmp_path / RUN_FILE).read_text())["invocations"]) == 2


@pytest.mark.parametrize(
    ("more", "extra"),
    [({}, {"predict_file": {"path": "dev.json", "sha256": "1"}}), ({"keep_best": True}, None)],
)
def test_scores_of_something_else_are_not_kept(
    tmp_path: Path, more: dict[str, Any], extra: dict[str, Any] | None
) -> None:
    begun = begin(settings(tmp_path))
    with alone_in(tmp_path) as folder:
        OutputFolder(folder, begun).add_results(TRAINED | SCORES)
    begin(settings(tmp_path, **more), extra)
    assert results_of(tmp_path) == TRAINED


@pytest.mark.parametrize("damage", [None, "", "[]", '{"identity": ', '{"results": 3}', "[" * 99999])
def test_a_record_that_somebody_deletes_or_damages_is_written_again(
    tmp_path: Path, damage: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(tmp_path)
    begun = begin(asked)
    whole = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).unlink()
    if damage is not None:
        (tmp_path / RUN_FILE).write_text(damage)
    if damage != '{"results": 3}':
        with pytest.raises(WorkError, match="deleted or damaged while the run"):
            add_step_down(tmp_path, {"step": 3})
    with alone_in(tmp_path) as folder:
        OutputFolder(folder, begun).add_results(TRAINED)
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {**whole, "results": TRAINED}
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.json was deleted or changed by somebody: it is written again" in line


def test_what_a_person_adds_to_the_record_stays(tmp_path: Path) -> None:
    begun = begin(settings(tmp_path))
    record = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).write_text(json.dumps({**record, "note": "for the thesis"}))
    with alone_in(tmp_path) as folder:
        OutputFolder(folder, begun).add_results(TRAINED)
    assert json.loads((tmp_path / RUN_FILE).read_text())["note"] == "for the thesis"


def test_prediction_alone_leaves_a_folder_without_a_record_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone_in(tmp_path / "new") as folder:
        OutputFolder(folder).add_results(SCORES)
        assert not os.listdir(tmp_path / "new")
        (tmp_path / "new" / RUN_FILE).write_text("{")
        OutputFolder(folder).add_results(SCORES)
    assert (tmp_path / "new" / RUN_FILE).read_text() == "{"
    assert "run.json is damaged: the results are not added" in capsys.readouterr().err


def test_results_of_a_folder_that_was_renamed_go_nowhere_else(tmp_path: Path) -> None:
    begun = begin(settings(tmp_path / "out"))
    with alone_in(tmp_path / "out") as folder:
        (tmp_path / "out").rename(tmp_path / "aside")
        with pytest.raises(FolderLostError):
            OutputFolder(folder, begun).add_results(TRAINED)
    assert os.listdir(tmp_path) == ["aside"]


def test_what_killed_runs_left_is_cleared_away(tmp_path: Path) -> None:
    best = tmp_path / "best"
    best.mkdir()
    token = "0123456789abcdef"
    gone = [
        f".run.json.{token}.tmp", ".run.json.4711.tmp", f".checkpoint.{token}.tmp",
        f".test_results_mm.tsv.{token}.tmp", f".vocab.txt.{token}.tmp",
        f"best/.checkpoint.{token}.tmp", "best/.tmp-model.ckpt-7.data-00000-of-00001",
        ".tmp-model.ckpt-9.index", "model.ckpt-9.data-00000-of-00001",
    ]  # fmt: skip
    kept = [f".notes.txt.{token}.tmp", "notes.txt", RUN_FILE, "best/bert_config.json"]
    for name in gone + kept:
        (tmp_path / name).write_text("{}")
    clear_remains(tmp_path)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert there == {*kept, "best"}
    # Without a record it is not a run's folder: a part of a checkpoint may be anybody's.
    (tmp_path / RUN_FILE).unlink()
    (tmp_path / "model.ckpt-9.data-00000-of-00001").write_text("")
    clear_remains(tmp_path)
    assert (tmp_path / "model.ckpt-9.data-00000-of-00001").exists()


def test_overwriting_forgets_results(tmp_path: Path) -> None:
    begun = begin(settings(tmp_path))
    with alone_in(tmp_path) as folder:
        OutputFolder(folder, begun).add_results(TRAINED)
    (tmp_path / "test_results_mm.tsv").write_text("")
    begin(dataclasses.replace(settings(tmp_path), overwrite=True))
    assert "results" not in json.loads((tmp_path / RUN_FILE).read_text())
    assert os.listdir(tmp_path) == [RUN_FILE]
