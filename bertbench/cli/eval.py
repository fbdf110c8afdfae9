"""`bertbench eval`: official metrics of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bertbench.cli.options.common import CONTEXT, Number, PathName, json_option, write_json
from bertbench.core.terminal import echo, say
from finetune.errors import InputError
from finetune.storage.json_files import load_json

if TYPE_CHECKING:
    from finetune.tasks.squad_examples import SquadExamples
    from finetune.tasks.squad_metrics import QuestionScores

_SCRIPT_THRESHOLD = 1.0
"""Default of `--na-prob-thresh` in evaluate-v2.0.py, which is meant for probabilities."""

_FILE = PathName(dir_okay=False)


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Score predictions with a data set's official metrics.

    \b
    Example:
      bertbench eval squad dev-v1.1.json squad_out/predictions.json
    """


@command.command(context_settings=CONTEXT)
@click.argument("data", type=_FILE)
@click.argument("predictions", type=_FILE)
@click.option(
    "--version",
    type=click.Choice(["1.1", "2.0"]),
    help="Metrics of SQuAD 1.1 or 2.0. Default: 2.0 if a question has no answer.",
)
@click.option("--na_prob_file", type=_FILE, help="Null odds (null_odds.json): also find the best "
              "thresholds (2.0).")  # fmt: skip
@click.option(
    "--na_prob_thresh",
    type=Number(infinite=True),
    help="Leave questions with greater null odds unanswered (2.0). Default: 1, as in the official "
    "script; inf keeps all answers.",
)
@click.option("--out_file", type=_FILE, help="Also write the scores as JSON to this file.")
@click.option("--out_image_dir", type=PathName(file_okay=False),
              help="Draw precision-recall curves and histograms (2.0).")  # fmt: skip
@json_option
def squad(
    data: Path,
    predictions: Path,
    version: str | None,
    na_prob_file: Path | None,
    na_prob_thresh: float | None,
    out_file: Path | None,
    out_image_dir: Path | None,
    json_file: Path | None,
) -> None:
    """Exact match and F1, as evaluate-v1.1.py and evaluate-v2.0.py give them.

    \b
    Example:
      bertbench eval squad dev-v2.0.json squad_out/predictions.json \\
        --na-prob-file squad_out/null_odds.json --out-image-dir pictures
    """
    examples = _read_examples(data)
    answers = _read_values(predictions, str)
    if (version or _version_of(examples)) == "1.1":
        _refuse(
            na_prob_file=na_prob_file, na_prob_thresh=na_prob_thresh, out_image_dir=out_image_dir
        )
        results = _score_v1(examples, answers)
    else:
        odds = None if na_prob_file is None else _read_values(na_prob_file, float)
        if odds is None and na_prob_thresh is not None:
            raise InputError("--na_prob_thresh needs --na_prob_file")
        results = _score_v2(examples, answers, odds, na_prob_thresh, out_image_dir)
    for path in (out_file, json_file):
        if path is not None:
            write_json(path, results)
    if str(json_file) != "-":
        for name, score in results.items():
            echo(f"{name} = {score}")


def _read_examples(data: Path) -> SquadExamples:
    from finetune.tasks.squad_examples import read_squad

    examples = read_squad(data, is_training=False, version_2_with_negative=True)
    if not len(examples):
        raise InputError("there are no questions in the file", path=data)
    if not any(example.gold_answers or example.is_impossible for example in examples):
        raise InputError("no question of the file has an answer to compare with", path=data)
    return examples


def _version_of(examples: SquadExamples) -> str:
    """SQuAD's version: 2.0 if a question has no answer, else 1.1."""
    unanswerable = any(e.is_impossible or not e.gold_answers for e in examples)
    return "2.0" if unanswerable else "1.1"


def _refuse(**flags: Any) -> None:
    """Refuse flags that SQuAD 1.1 has no use for."""
    for name, value in flags.items():
        if value is not None:
            raise InputError(
                f"--{name} is for SQuAD 2.0, but every question of the data has an answer",
                hint="give --version 2.0 to use its metrics",
            )


def _score_v1(examples: SquadExamples, answers: dict[str, str]) -> dict[str, float]:
    from finetune.tasks.squad_metrics import evaluate_v1

    missing = sum(example.qas_id not in answers for example in examples)
    if missing:
        say(f"{missing} questions without a prediction count as wrong")
    return evaluate_v1(examples, answers)


def _score_v2(
    examples: SquadExamples,
    answers: dict[str, str],
    odds: dict[str, float] | None,
    given_threshold: float | None,
    picture_folder: Path | None,
) -> dict[str, float]:
    """Score with the metrics of SQuAD 2.0, and draw the pictures that are asked for.

    Args:
        examples: all questions.
        answers: the prediction for each question.
        odds: null odds of each question, if there are any.
        given_threshold: the greatest null odds of a question that is answered; None takes the
            official script's.
        picture_folder: where to draw; None draws nothing.
    """
    from finetune.tasks.squad_metrics import evaluate_v2, score_questions

    scores = score_questions(examples, answers, odds)
    threshold = None if odds is None else _threshold(scores, given_threshold)
    results: dict[str, float]
    results = evaluate_v2(scores, threshold=threshold, best_thresholds=odds is not None)
    if picture_folder is not None:
        if odds is None:
            raise InputError("--out_image_dir needs --na_prob_file")
        results |= _draw(scores, picture_folder)
    return results


def _draw(scores: QuestionScores, folder: Path) -> dict[str, float]:
    """Draw the pictures of SQuAD 2.0; return the average precision of each curve."""
    from reports.pictures.squad_plots import average_precisions, draw_pictures

    curves = average_precisions(scores)
    for path in draw_pictures(scores, folder):
        say(f"wrote {path}")
    return {f"{name}_ap": curve.average_precision for name, curve in curves.items()}


def _threshold(scores: QuestionScores, given: float | None) -> float:
    """The threshold on the null odds; say how many answers the script's default leaves out."""
    if given is not None:
        return given
    left_out = scores.is_answered & (scores.no_answer_odds > _SCRIPT_THRESHOLD)
    if left_out.any():
        say(
            f"{int(left_out.sum()):,} answers count as no answer, as in the official script: their "
            f"null odds are above {_SCRIPT_THRESHOLD:g}; --na_prob_thresh inf keeps them"
        )
    return _SCRIPT_THRESHOLD


def _read_values(path: Path, kind: type) -> dict[str, Any]:
    """Read a JSON object whose values are texts or numbers."""
    values = load_json(
        path, what="the file", hint="give a file that `bertbench run squad` has written"
    )
    kinds = (int, float) if kind is float else (kind,)
    what = "a number" if kind is float else "a text"
    if not isinstance(values, dict):
        raise InputError("not an object of question ids", path=path)
    for qas_id, value in values.items():
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{qas_id!r} has {value!r:.40}, not {what}", path=path)
    return values
