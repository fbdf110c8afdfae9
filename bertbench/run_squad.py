"""`bertbench run squad`: from question files and weights to predictions and scores."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from bertbench.devices import Budget
from bertbench.fine_tuning import feature_arrays, fine_tune
from bertbench.running import ModelFiles, RunSettings, load_config_and_tokenizer, predict_all
from bertbench.workload import Workload
from finetune.config import INPUT_NAMES, TARGET_NAMES
from finetune.errors import InputError
from finetune.files import write_atomically
from finetune.tasks.squad import featurize
from finetune.tasks.squad_examples import SquadExamples, read_squad
from finetune.tasks.squad_metrics import evaluate_v1
from finetune.tasks.squad_predictions import predict_answers, write_predictions

_TRAIN_NAMES = INPUT_NAMES + TARGET_NAMES["squad"]


@dataclasses.dataclass(frozen=True)
class SquadSettings:
    """Flags that only SQuAD has; names and defaults as in the original's `run_squad.py`.

    Attributes:
        train_file: None does not train.
        predict_file: None does not predict.
        doc_stride: tokens between the beginnings of two windows.
        max_query_length: tokens of a question.
        n_best_size: answers to list per question.
        max_answer_length: tokens of an answer.
        version_2_with_negative: some questions have no answer.
        null_score_diff_threshold: from which on no answer is given.
        max_train_examples: use only the first so many questions.
    """

    train_file: Path | None
    predict_file: Path | None
    doc_stride: int = 128
    max_query_length: int = 64
    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0
    max_train_examples: int | None = None


def run_squad(
    files: ModelFiles, settings: RunSettings, squad: SquadSettings, budget: Budget
) -> dict[str, Any]:
    """Fine-tune, predict and evaluate.

    Args:
        files: the model.
        settings: training and output.
        squad: data and prediction.
        budget: the device and what may be used of it.

    Returns:
        Results for `--json`: steps, loss, seconds, and `exact_match` and `f1` where the
        prediction file has answers.

    Raises:
        InputError: something the user can mend.
        bertbench.errors.WorkError: training failed.
    """
    config, tokenizer = load_config_and_tokenizer(
        files, settings.do_lower_case, settings.max_seq_length
    )
    cut = functools.partial(
        featurize,
        tokenizer=tokenizer,
        max_seq_length=settings.max_seq_length,
        doc_stride=squad.doc_stride,
        max_query_length=squad.max_query_length,
    )
    train_examples = train_features = predict_examples = predict_features = None
    if squad.train_file is not None:
        train_examples = _read(squad.train_file, squad, is_training=True)
        train_features = cut(train_examples, is_training=True)
    if squad.predict_file is not None:
        # Read before training: a bad file should not be found out hours later.
        predict_examples = _read(squad.predict_file, squad, is_training=False)
        predict_features = cut(predict_examples, is_training=False)
    workload = Workload(files.config_file.parent.name, config, "squad", settings.max_seq_length)

    tuned = fine_tune(
        files,
        settings,
        budget,
        workload,
        "squad",
        None if train_features is None else feature_arrays(train_features, _TRAIN_NAMES),
        0 if train_examples is None else len(train_examples),
    )
    results = dict(tuned.results)
    if predict_features is not None and predict_examples is not None:
        batches = predict_all(
            tuned.variables,
            workload,
            feature_arrays(predict_features, INPUT_NAMES),
            tuned.predict_batch,
            "predict",
        )
        start_logits, end_logits = np.concatenate(batches, axis=1)
        predictions = predict_answers(
            predict_examples,
            predict_features,
            start_logits,
            end_logits,
            n_best_size=squad.n_best_size,
            max_answer_length=squad.max_answer_length,
            do_lower_case=settings.do_lower_case,
            version_2_with_negative=squad.version_2_with_negative,
            null_score_diff_threshold=squad.null_score_diff_threshold,
        )
        write_predictions(predictions, settings.output_dir)
        results["predictions"] = str(settings.output_dir / "predictions.json")
        if not squad.version_2_with_negative and all(e.gold_answers for e in predict_examples):
            scores = evaluate_v1(predict_examples, predictions.predictions)
            results |= scores
            lines = "".join(f"{name} = {value}\n" for name, value in sorted(scores.items()))
            write_atomically(settings.output_dir / "eval_results.txt", lines)
    return results


def _read(path: Path, squad: SquadSettings, *, is_training: bool) -> SquadExamples:
    examples = read_squad(
        path, is_training=is_training, version_2_with_negative=squad.version_2_with_negative
    )
    if is_training and squad.max_train_examples is not None:
        examples = dataclasses.replace(examples, items=examples.items[: squad.max_train_examples])
    if not len(examples):
        raise InputError("there are no questions in the file", path=path)
    return examples
