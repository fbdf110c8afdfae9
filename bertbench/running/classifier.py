"""`bertbench run classifier`: from labelled texts and weights to scores and test predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertbench.core.terminal import say
from bertbench.core.workload import Workload
from bertbench.running.job import FineTuned, Job, TrainingData, feature_arrays, fine_tune
from bertbench.running.model_files import check_segments, load_config_and_tokenizer
from bertbench.running.output.run_record import hash_arrays, settings_json
from bertbench.running.predict import OnProgress, Predict, Scoring, predict_with_progress
from bertbench.running.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.model_files.head_labels import read_trained_head, recorded_labels
from finetune.spec.config import INPUT_NAMES, TARGET_NAMES
from finetune.tasks.classification import (
    ClassificationData,
    ClassificationFeatures,
    featurize,
    write_eval_results,
    write_test_results,
)
from finetune.tasks.classification_metrics import evaluate
from finetune.tasks.glue import find_task, read_task
from finetune.tasks.table_files import TableTask, read_table_task

_Splits = Mapping[str, ClassificationFeatures]


@dataclasses.dataclass(frozen=True)
class GlueSource:
    """A task of `finetune.tasks.glue` and the folder of its files."""

    task_name: str
    data_dir: Path
    xnli_language: str = "zh"


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """Flags that only classification has; names as in the original's `run_classifier.py`.

    Attributes:
        source: a GLUE task and its folder, or tables of one's own.
        do_train: train on the train split.
        do_eval: evaluate on the dev split.
        do_predict: write probabilities for the test split.
        max_train_examples: use only the first so many examples.
    """

    source: GlueSource | TableTask
    do_train: bool
    do_eval: bool
    do_predict: bool
    max_train_examples: int | None = None


def run_classifier(request: RunRequest, classifier: ClassifierSettings) -> dict[str, Any]:
    """Fine-tune, evaluate and predict.

    Args:
        request: the model, settings of training and output, and the device.
        classifier: task and what to do.

    Returns:
        Results for `--json`: steps, loss, seconds, and the task's metrics as `eval_…`.

    Raises:
        InputError: something the user can mend.
        bertbench.core.errors.WorkError: training failed.
    """
    files, settings = request.files, request.settings
    config, tokenizer = load_config_and_tokenizer(
        files, settings.tokenizer_flags, settings.max_seq_length, settings.earlier_run
    )
    # All splits before training: a bad file should not be found out hours later.
    data = read_data(classifier, settings.output_dir, files.weights_folder)
    if any(examples.texts_b is not None for examples in data.splits.values()):
        check_segments(config, files.config_file)
    splits = {
        name: featurize(examples, tokenizer, max_seq_length=settings.max_seq_length)
        for name, examples in data.splits.items()
    }
    skipped = {name: len(e.skipped_lines) for name, e in data.splits.items() if e.skipped_lines}
    for name, count in skipped.items():
        say(f"{name}: left out {count} malformed lines")
    head = "regressor" if data.is_regression else "classifier"
    job = Job(
        request,
        task=data.name,
        workload=Workload(
            files.config_file.parent.name,
            config,
            head,
            settings.max_seq_length,
            len(data.labels) or 1,
        ),
        tokenizer=tokenizer,
        data=_training_data(splits, head, classifier.max_train_examples),
        scoring=_make_scoring(settings, data, splits),
        details={
            "labels": list(data.labels),
            "classifier": settings_json(classifier),
            "skipped_lines": skipped,
        },
        labels=data.labels,
    )
    with fine_tune(job) as tuned:
        return predict_splits(tuned, data, splits)


def _training_data(splits: _Splits, head: str, most: int | None) -> TrainingData | None:
    """The first examples of the train split, or all of them; None if it is not wanted."""
    if "train" not in splits:
        return None
    arrays = feature_arrays(splits["train"], INPUT_NAMES + TARGET_NAMES[head])
    first = {name: array[:most] for name, array in arrays.items()}
    return TrainingData(first, len(first["input_ids"]))


def _make_scoring(
    settings: RunSettings, data: ClassificationData, splits: _Splits
) -> Scoring | None:
    """How the model is scored on the dev split while it is trained; None if it is not.

    Raises:
        InputError: it is to be, and there is no dev split.
    """
    if settings.evaluate_every_steps is None:
        return None
    if "dev" not in splits:
        raise InputError("--evaluate_every_steps needs --do_eval")

    def score(predict: Predict, on_progress: OnProgress) -> dict[str, float]:
        logits = predict(feature_arrays(splits["dev"], INPUT_NAMES), on_progress)
        return score_logits(data, splits["dev"], logits)

    metric = data.metrics[0]
    depends_on = {"data_sha256": hash_arrays(splits["dev"].arrays()), "metric": metric}
    return Scoring(score, metric, depends_on)


def predict_splits(tuned: FineTuned, data: ClassificationData, splits: _Splits) -> dict[str, Any]:
    """Evaluate and predict; what is known is written before the next split is begun.

    Args:
        tuned: the model and its output folder.
        data: the task.
        splits: features by name of the split; those to train on are left out.

    Returns:
        The results of the training, and the scores and files of the splits.

    Raises:
        FolderLostError: the output folder is not there any more.
        bertbench.core.errors.WorkError: the model predicts no numbers, or memory runs out.
    """
    output, results = tuned.output, dict(tuned.results)
    scored: dict[str, Any] = {}
    for name, features in splits.items():
        kind, _, part = name.partition("_")
        if kind == "train":
            continue
        # As in the original, the first part's results have no suffix.
        suffix = f"_{part}" if part else ""
        doing = "eval" if kind == "dev" else "predict"
        logits = predict_with_progress(
            tuned.predict, feature_arrays(features, INPUT_NAMES), f"{doing} {part}".strip()
        )
        output.check()
        if kind == "dev":
            scores = score_logits(data, features, logits)
            scored |= {f"eval{suffix}_{metric}": value for metric, value in scores.items()}
            # The original's `loss` is that of the evaluation too.
            scored["loss"] = scored["eval_loss"]
            results |= scored
            # The original's step is that of the weights, which may be the best ones.
            step = {"global_step": results["weights_step"]} if "weights_step" in results else {}
            write_eval_results(output.path / "eval_results.txt", {**scored, **step})
        else:
            path = output.path / f"test_results{suffix}.tsv"
            rows = logits if data.is_regression else np.exp(_log_softmax(logits))
            write_test_results(path, rows)
            results[f"test_results{suffix}"] = str(path)
        output.add_results(results)
    return results


def read_data(
    classifier: ClassifierSettings, output_dir: Path, weights_folder: Path | None = None
) -> ClassificationData:
    """Read the splits that are needed.

    Labels of one's own tables are those of the training file; without training, those that an
    earlier training left in the output folder, or that the folder of the weights names.

    Raises:
        InputError: a file or label is wrong, or unknown.
    """
    wanted = {
        "train": classifier.do_train,
        "dev": classifier.do_eval,
        "test": classifier.do_predict,
    }
    names = [split for split, is_wanted in wanted.items() if is_wanted]
    source = classifier.source
    if isinstance(source, GlueSource):
        task = find_task(source.task_name, language=source.xnli_language)
        return read_task(task, source.data_dir, names)
    labels = source.labels
    if not source.is_regression and "train" not in names:
        recorded = recorded_labels(output_dir)
        if None not in (labels, recorded) and labels != recorded:
            # The columns of the probabilities would have other names than in the record.
            raise InputError(
                f"--labels {','.join(labels or ())} are not those that were trained",
                path=output_dir,
                hint=f"give --labels {','.join(recorded or ())}, or none",
            )
        labels = labels or recorded
        if labels is None and weights_folder is not None:
            labels = read_trained_head(weights_folder).labels
    chosen = {split: source.files[split] for split in names}
    return read_table_task(dataclasses.replace(source, files=chosen, labels=labels))


def score_logits(
    data: ClassificationData, features: ClassificationFeatures, logits: np.ndarray
) -> dict[str, float]:
    """The task's metrics and the mean loss, of finite logits `[n, labels]` or `[n, 1]`."""
    # In float64, where no loss of finite float32 numbers overflows.
    logits = logits.astype(np.float64)
    if features.label_values is not None:
        values = logits[:, 0]
        scores = evaluate(data.metrics, features.label_values, values)
        return {**scores, "loss": float(np.mean((values - features.label_values) ** 2))}
    log_probabilities = _log_softmax(logits)
    scores = evaluate(data.metrics, features.label_ids, log_probabilities.argmax(axis=1))
    rows = np.arange(len(features))
    return {**scores, "loss": float(-log_probabilities[rows, features.label_ids].mean())}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
