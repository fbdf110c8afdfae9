"""`bertbench run classifier`: from a GLUE folder and weights to accuracy and test predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bertbench.devices import Budget
from bertbench.fine_tuning import Job, feature_arrays, fine_tune
from bertbench.output_folder import record_results
from bertbench.progress import progress
from bertbench.running import ModelFiles, RunSettings, load_config_and_tokenizer
from bertbench.training import OnProgress, Predict, Scorer, predict_with_progress
from bertbench.workload import Workload
from finetune.config import INPUT_NAMES, TARGET_NAMES
from finetune.errors import InputError
from finetune.tasks.glue import (
    ClassificationFeatures,
    evaluate,
    featurize,
    find_task,
    read_examples,
    write_eval_results,
    write_test_results,
)

_TRAIN_NAMES = INPUT_NAMES + TARGET_NAMES["classifier"]


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """Flags that only classification has; names as in the original's `run_classifier.py`.

    Attributes:
        task_name: as in `MRPC`.
        data_dir: folder of its files.
        do_train: train on the train split.
        do_eval: evaluate on the dev split.
        do_predict: write probabilities for the test split.
        max_train_examples: use only the first so many examples.
    """

    task_name: str
    data_dir: Path
    do_train: bool
    do_eval: bool
    do_predict: bool
    max_train_examples: int | None = None


def run_classifier(
    files: ModelFiles, settings: RunSettings, classifier: ClassifierSettings, budget: Budget
) -> dict[str, Any]:
    """Fine-tune, evaluate and predict.

    Args:
        files: the model.
        settings: training and output.
        classifier: task and what to do.
        budget: the device and what may be used of it.

    Returns:
        Results for `--json`: steps, loss, seconds, and the task's metrics as `eval_…`.

    Raises:
        InputError: something the user can mend.
        bertbench.errors.WorkError: training failed.
    """
    task = find_task(classifier.task_name)
    config, tokenizer = load_config_and_tokenizer(
        files, settings.do_lower_case, settings.max_seq_length
    )
    # All splits before training: a bad file should not be found out hours later.
    splits: dict[str, ClassificationFeatures] = {}
    wanted = {
        "train": classifier.do_train,
        "dev": classifier.do_eval,
        "test": classifier.do_predict,
    }
    for split in ("train", "dev", "test"):
        if wanted[split]:
            examples = read_examples(task, classifier.data_dir, split)
            splits[split] = featurize(examples, tokenizer, max_seq_length=settings.max_seq_length)
    train_arrays = None
    if "train" in splits:
        arrays = feature_arrays(splits["train"], _TRAIN_NAMES)
        train_arrays = {name: a[: classifier.max_train_examples] for name, a in arrays.items()}

    def score(predict: Predict, on_progress: OnProgress) -> dict[str, float]:
        labels = splits["dev"].label_ids
        log_probabilities = _log_softmax(
            predict(feature_arrays(splits["dev"], INPUT_NAMES), on_progress)
        )
        scores = evaluate(task, labels, log_probabilities.argmax(axis=1))
        loss = -log_probabilities[np.arange(len(labels)), labels].mean()
        return {**scores, "loss": float(loss)}

    if settings.evaluate_every_steps is not None and "dev" not in splits:
        raise InputError("--evaluate_every_steps needs --do_eval")
    tuned = fine_tune(
        files,
        settings,
        budget,
        Job(
            task=task.name,
            workload=Workload(
                files.config_file.parent.name,
                config,
                "classifier",
                settings.max_seq_length,
                len(task.labels),
            ),
            train_arrays=train_arrays,
            num_examples=0 if train_arrays is None else len(train_arrays["label_ids"]),
            make_scorer=None
            if settings.evaluate_every_steps is None
            else lambda predict: Scorer(
                lambda told: score(predict, told), task.metric or "accuracy"
            ),
            record={"labels": list(task.labels), "data_dir": str(classifier.data_dir)},
        ),
    )
    results = dict(tuned.results)
    if "dev" in splits:
        with progress("eval", len(splits["dev"]), "examples") as advance:
            scores = score(tuned.predict, lambda done, _: advance(done, ""))
        scored: dict[str, Any] = {f"eval_{name}": value for name, value in scores.items()}
        for name in ("global_step", "loss"):
            if name in results:
                scored[name] = results[name]
        write_eval_results(settings.output_dir / "eval_results.txt", scored)
        results |= scored
    if "test" in splits:
        logits = predict_with_progress(
            tuned.predict, feature_arrays(splits["test"], INPUT_NAMES), "predict"
        )
        path = settings.output_dir / "test_results.tsv"
        write_test_results(path, np.exp(_log_softmax(logits)))
        results["test_results"] = str(path)
    record_results(settings, results)
    return results


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
