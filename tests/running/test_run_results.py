"""What a run writes after its training, when it is interrupted or its folder goes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertbench.core.errors import WorkError
from bertbench.running.classifier import ClassifierSettings, GlueSource, predict_splits, read_data
from bertbench.running.job import FineTuned, lost_folder_explained
from bertbench.running.output.run_folder import OutputFolder, alone_in
from bertbench.running.predict import OnProgress
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE
from finetune.tasks.classification import featurize
from finetune.tasks.demo_data import demo_files
from finetune.text.tokenization import load_tokenizer

DEMO = demo_files()
EVALUATED = ClassifierSettings(
    GlueSource("MRPC", DEMO.mrpc_dir), do_train=False, do_eval=True, do_predict=True
)
BEGUN = {"identity": {"seed": 1}}


class Model:
    """Predicts class 1 for everything; on a call that is chosen it does something else."""

    def __init__(self, on_call: int, what: Any) -> None:
        self.on_call, self.what, self.calls = on_call, what, 0

    def __call__(self, data: Mapping[str, np.ndarray], on_progress: OnProgress) -> np.ndarray:
        self.calls += 1
        if self.calls == self.on_call:
            self.what()
        return np.tile(np.float32([0.0, 1.0]), (len(data["input_ids"]), 1))


def run(folder: Path, model: Model) -> dict[str, Any]:
    """Predict as after a training of 30 steps whose 20th was the best."""
    data = read_data(EVALUATED, folder)
    tokenizer = load_tokenizer(DEMO.vocab_file, do_lower_case=True)
    splits = {name: featurize(split, tokenizer, max_seq_length=32)
              for name, split in data.splits.items()}  # fmt: skip
    with lost_folder_explained(), alone_in(folder) as held:
        (folder / RUN_FILE).write_text(json.dumps(BEGUN))
        output = OutputFolder(held, BEGUN)
        tuned = FineTuned(model, {"global_step": 30, "weights_step": 20}, output)
        return predict_splits(tuned, data, splits)


def results_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())["results"]
    return found


def test_the_step_of_the_scores(tmp_path: Path) -> None:
    results = run(tmp_path, Model(0, None))
    lines = (tmp_path / "eval_results.txt").read_text().splitlines()
    assert "global_step = 20" in lines  # to the original, the step of the weights
    assert f"eval_accuracy = {results['eval_accuracy']}" in lines
    assert (results["global_step"], results["weights_step"]) == (30, 20)
    assert results_in(tmp_path) == results


def test_scores_are_written_before_the_next_prediction(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Model(2, interrupt))
    assert "eval_accuracy" in (tmp_path / "eval_results.txt").read_text()
    assert {"eval_accuracy", "eval_f1", "global_step", "weights_step"} <= results_in(
        tmp_path
    ).keys()
    assert not (tmp_path / "test_results.tsv").exists()


@pytest.mark.parametrize("call", [1, 2])
def test_a_folder_that_is_renamed_during_prediction(tmp_path: Path, call: int) -> None:
    folder, aside = tmp_path / "out", tmp_path / "aside"
    with pytest.raises(WorkError, match=rf"{folder} is gone; .* to {aside}; nothing was written"):
        run(folder, Model(call, lambda: folder.rename(aside)))
    assert os.listdir(tmp_path) == ["aside"]
    assert (aside / "eval_results.txt").exists() == (call == 2)


def test_nobody_else_writes_to_the_folder_until_the_end(tmp_path: Path) -> None:
    def attempt() -> None:
        with pytest.raises(InputError, match="another run is writing"), alone_in(tmp_path):
            pass

    model = Model(2, attempt)
    run(tmp_path, model)
    assert model.calls == 2
    with alone_in(tmp_path):
        pass
