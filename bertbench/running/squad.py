"""`bertbench run squad`: from question files and weights to predictions and scores."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from bertbench.core.terminal import say
from bertbench.core.workload import Workload
from bertbench.running.job import Job, TrainingData, feature_arrays, fine_tune
from bertbench.running.model_files import check_segments, load_config_and_tokenizer
from bertbench.running.output.run_folder import OutputFolder
from bertbench.running.output.run_record import describe_file, settings_json
from bertbench.running.predict import OnProgress, Predict, Scoring, predict_with_progress
from bertbench.running.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.spec.config import INPUT_NAMES, TARGET_NAMES
from finetune.storage.files import write_atomically
from finetune.tasks.squad_cache import SquadSource, default_cache_dir, load_squad_features
from finetune.tasks.squad_examples import SquadExamples, describe_skipped
from finetune.tasks.squad_features import SquadFeatures
from finetune.tasks.squad_metrics import (
    evaluate_v1,
    evaluate_v2,
    score_questions,
    tune_threshold,
)
from finetune.tasks.squad_predictions import (
    AnswerSettings,
    SquadPredictions,
    answers_at_threshold,
    predict_answers,
    write_predictions,
)
from finetune.text.tokenization import Normalization, Tokenizer

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
        tune_threshold: find that threshold on the prediction file, which has answers.
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
    tune_threshold: bool = False
    max_train_examples: int | None = None


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions to answer, and how to answer them.

    Attributes:
        examples: the questions.
        features: the windows that their paragraphs are cut into.
        squad: how answers are chosen and scored.
        normalization: of the model's tokenizer.
    """

    examples: SquadExamples
    features: SquadFeatures
    squad: SquadSettings
    normalization: Normalization

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """What a model is fed: one row a window."""
        return feature_arrays(self.features, INPUT_NAMES)

    @property
    def can_be_scored(self) -> bool:
        """Whether the file has right answers to compare with."""
        has_answer = [bool(example.gold_answers) for example in self.examples]
        return any(has_answer) if self.squad.version_2_with_negative else all(has_answer)


@dataclasses.dataclass(frozen=True)
class _SquadData:
    """What was read from the files of questions.

    Attributes:
        train: to train on; None does not train.
        dev: to answer; None does not predict.
        details: what the run's record says of the files.
    """

    train: TrainingData | None
    dev: Questions | None
    details: dict[str, Any]


def run_squad(request: RunRequest, squad: SquadSettings) -> dict[str, Any]:
    """Fine-tune, predict and evaluate.

    Args:
        request: the model, settings of training and output, and the device.
        squad: data and prediction.

    Returns:
        Results for `--json`: steps, loss, seconds, and where the prediction file has answers the
        metrics of `score_answers`.

    Raises:
        InputError: something the user can mend.
        bertbench.core.errors.WorkError: training failed.
    """
    files, settings = request.files, request.settings
    config, tokenizer = load_config_and_tokenizer(
        files, settings.tokenizer_flags, settings.max_seq_length, settings.earlier_run
    )
    check_segments(config, files.config_file)
    # All files before training: a bad one should not be found out hours later.
    data = _read_data(settings, squad, tokenizer)
    job = Job(
        request,
        task="squad",
        workload=Workload(files.config_file.parent.name, config, "squad", settings.max_seq_length),
        tokenizer=tokenizer,
        data=data.train,
        scoring=_make_scoring(settings, squad, data),
        details=data.details,
    )
    with fine_tune(job) as tuned:
        results = dict(tuned.results)
        if data.details.get("skipped_answers"):
            results["skipped_answers"] = data.details["skipped_answers"]
        if data.dev is not None:
            logits = predict_with_progress(tuned.predict, data.dev.inputs, "predict", "windows")
            results |= _write_answers(tuned.output, data.dev, answer_questions(data.dev, logits))
        tuned.output.add_results(results)
    return results


def _read_data(settings: RunSettings, squad: SquadSettings, tokenizer: Tokenizer) -> _SquadData:
    """Read the files of questions, and cut them into windows or take those from the cache.

    Raises:
        InputError: a file cannot be used.
    """
    cache_dir = default_cache_dir() if settings.feature_cache else None
    source = functools.partial(
        SquadSource,
        tokenizer=tokenizer,
        max_seq_length=settings.max_seq_length,
        doc_stride=squad.doc_stride,
        max_query_length=squad.max_query_length,
        version_2_with_negative=squad.version_2_with_negative,
    )
    train, dev = None, None
    details: dict[str, Any] = {"squad": settings_json(squad)}
    if squad.train_file is not None:
        entry = load_squad_features(
            source(squad.train_file, is_training=True, max_examples=squad.max_train_examples),
            cache_dir,
        )
        arrays = {name: entry.arrays[name] for name in _TRAIN_NAMES}
        train = TrainingData(arrays, entry.extra["num_examples"])
        details["train_file"] = describe_file(squad.train_file)
        details["skipped_answers"] = sum(entry.extra["skipped"].values())
        if entry.was_there and entry.extra["skipped"]:
            say(describe_skipped(entry.extra["skipped"]))
    if squad.predict_file is not None:
        dev_source = source(squad.predict_file, is_training=False)
        examples = dev_source.read()
        dev_arrays = load_squad_features(dev_source, cache_dir, examples).arrays
        features = SquadFeatures.from_arrays(dev_arrays, tokenizer)
        dev = Questions(examples, features, squad, tokenizer.normalization)
        details["predict_file"] = describe_file(squad.predict_file)
    return _SquadData(train, dev, details)


def _make_scoring(settings: RunSettings, squad: SquadSettings, data: _SquadData) -> Scoring | None:
    """How the model is scored while it is trained; None if it is not.

    Raises:
        InputError: flags need scores where there can be none.
    """
    questions = data.dev
    can_be_scored = questions is not None and questions.can_be_scored
    evaluates = settings.evaluate_every_steps is not None
    if squad.tune_threshold and not squad.version_2_with_negative:
        raise InputError("--tune_threshold needs --version_2_with_negative")
    for wanted, flag in (
        (squad.tune_threshold, "--tune_threshold"),
        (evaluates, "--evaluate_every_steps"),
    ):
        if wanted and not can_be_scored:
            raise InputError(f"{flag} needs a --predict_file with answers", path=squad.predict_file)
    if questions is None or not evaluates:
        return None

    def score(predict: Predict, on_progress: OnProgress) -> dict[str, float]:
        logits = predict(questions.inputs, on_progress)
        return score_answers(questions, answer_questions(questions, logits))

    depends_on = {
        "data_sha256": data.details["predict_file"]["sha256"],
        "version_2_with_negative": squad.version_2_with_negative,
        "tune_threshold": squad.tune_threshold,
        "null_score_diff_threshold": squad.null_score_diff_threshold,
    }
    return Scoring(score, "f1", depends_on)


def _write_answers(
    output: OutputFolder, questions: Questions, predictions: SquadPredictions
) -> dict[str, Any]:
    """Write predictions, and their scores where the questions have answers."""
    results: dict[str, Any] = {}
    if questions.squad.tune_threshold:
        threshold = best_threshold(questions.examples, predictions)
        say(f"best null_score_diff_threshold: {threshold:.4f}")
        results["null_score_diff_threshold"] = threshold
    output.check()
    write_predictions(predictions, output.path)
    results["predictions"] = str(output.path / "predictions.json")
    if questions.can_be_scored:
        scores = score_answers(questions, predictions)
        results |= scores
        lines = "".join(f"{key} = {value}\n" for key, value in sorted(scores.items()))
        write_atomically(output.path / "eval_results.txt", lines)
    return results


def answer_questions(questions: Questions, logits: np.ndarray) -> SquadPredictions:
    """Turn logits `[2, n, s]` into answers, at the best threshold if it is to be tuned."""
    squad = questions.squad
    start_logits, end_logits = logits
    settings = AnswerSettings(
        squad.n_best_size,
        squad.max_answer_length,
        squad.version_2_with_negative,
        squad.null_score_diff_threshold,
    )
    predictions = predict_answers(
        questions.examples,
        questions.features,
        start_logits,
        end_logits,
        questions.normalization,
        settings,
    )
    if not squad.tune_threshold:
        return predictions
    threshold = best_threshold(questions.examples, predictions)
    return dataclasses.replace(
        predictions, predictions=answers_at_threshold(predictions, threshold)
    )


def best_threshold(examples: SquadExamples, predictions: SquadPredictions) -> float:
    """The threshold on the null odds that gives the best F1."""
    answered = answers_at_threshold(predictions, math.inf)
    scores = score_questions(examples, answered, predictions.null_odds)
    return tune_threshold(scores, scores.f1)


def score_answers(questions: Questions, predictions: SquadPredictions) -> dict[str, float]:
    """Official metrics: `exact_match` and `f1`; for version 2.0 those of `evaluate_v2`."""
    if not questions.squad.version_2_with_negative:
        return evaluate_v1(questions.examples, predictions.predictions)
    scores = score_questions(questions.examples, predictions.predictions, predictions.null_odds)
    return evaluate_v2(scores, best_thresholds=True)
