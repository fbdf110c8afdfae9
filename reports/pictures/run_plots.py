"""Pictures of runs: training curves, and precision-recall of SQuAD 2.0."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from finetune.errors import InputError
from finetune.storage.json_files import load_json
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.squad_metrics import QuestionScores, precision_recall, score_questions
from reports.pictures.figures import INK, Picture, add_legend, look_of, panels
from reports.runs import Run, prediction_files

_MAX_RUNS = 8
_DRAWN = 800
_METRICS = ("f1", "exact_match", "accuracy", "matthews", "pearson")
"""Metrics by priority: the first that a run has is drawn."""

_SMOOTHED = 40
"""A curve is smoothed over its number of steps, divided by this."""


def training_picture(runs: Sequence[Run]) -> Picture | None:
    """Draw loss and scores of runs by optimizer step."""
    shown = [run for run in runs if len(run.steps) > 1][:_MAX_RUNS]
    if not shown:
        return None
    there = {
        name
        for run in shown
        for name in run.evaluations.columns
        if name != "step" and run.evaluations[name].notna().any()
    }
    labels = _labels(shown)
    metrics = [name for name in (*_METRICS, *sorted(there)) if name in there][:1]

    def draw(columns: int = 1 + len(metrics)) -> Figure:
        figure, axes = panels(1 + len(metrics), columns)
        for number, run in enumerate(shown):
            look = look_of(number)
            steps = run.steps
            span = max(1, len(steps) // _SMOOTHED)
            smooth = steps["loss"].rolling(span, min_periods=1).mean()
            every = max(1, len(steps) // _DRAWN)
            axes[0].plot(steps["step"][::every], steps["loss"][::every], color=look.color,
                         alpha=0.25, linewidth=0.8)  # fmt: skip
            axes[0].plot(steps["step"][::every], smooth[::every], color=look.color,
                         linestyle=look.line, label=labels[number])  # fmt: skip
            for axis, metric in zip(axes[1:], metrics, strict=True):
                if metric in run.evaluations:
                    axis.plot(run.evaluations["step"], run.evaluations[metric], color=look.color,
                              linestyle=look.line, marker=look.marker)  # fmt: skip
                    axis.set_ylabel(metric.replace("_", " "))
        axes[0].set_ylabel("loss of the effective batch")
        axes[0].set_ylim(bottom=0)
        for axis in axes:
            axis.set_xlabel("optimizer step")
        add_legend(figure, axes)
        return figure

    smoothed = any(len(run.steps) >= 2 * _SMOOTHED for run in shown)
    caption = "Thin: every step; thick: its running mean." if smoothed else "Loss of every step."
    narrow = functools.partial(draw, 1) if metrics else None
    return Picture("training", "Training", caption, draw, draw_narrow=narrow)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return different names for a legend, which leaves out names that begin with an underscore."""
    labels: list[str] = []
    for run in runs:
        name = f" {run.name}" if run.name.startswith("_") else run.name
        same = sum(other.name == run.name for other in runs[: len(labels)])
        labels.append(f"{name} ({same + 1})" if same else name)
    return labels


def precision_recall_picture(run: Run) -> Picture | None:
    """Draw precision against recall of a SQuAD 2.0 run, and mark the threshold on the null odds.

    Each question gets its best candidate that is not empty. It counts as answered if its null odds
    are below the threshold.

    Returns:
        None for other runs, and if the data are missing or have changed.
    """
    files = prediction_files(run)
    if files is None:
        return None
    data, candidates, odds = files
    try:
        examples = read_squad(data, is_training=False, version_2_with_negative=True)
        scores = score_questions(
            examples,
            best_answers(load_json(candidates, what="the candidates")),
            load_json(odds, what="the null odds"),
        )
    except (InputError, ValueError, OSError, TypeError, AttributeError, KeyError):
        return None
    curve = precision_recall(scores, scores.f1)
    if curve is None:
        return None
    told = run.results.get("null_score_diff_threshold")
    if told is None:
        told = run.record["squad"].get("null_score_diff_threshold")
    threshold = told if isinstance(told, (int, float)) else 0.0
    precision, recall = point_at(scores, float(threshold))

    def draw() -> Figure:
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axis = figure.subplots()
        look = look_of(0)
        axis.step(curve.recalls, curve.precisions, where="post", color=look.color, label="by F1")
        axis.plot(recall, precision, "*", markersize=13, color=look_of(1).color,
                  markeredgecolor=INK, label=f"null odds up to {float(threshold):.3g}")  # fmt: skip
        axis.set(xlim=(0, 1.03), ylim=(0, 1.05), xlabel="recall", ylabel="precision")
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    return Picture(
        f"precision-recall-{run.name}",
        f"Precision and recall of {run.name}",
        f"SQuAD 2.0, average precision {curve.average_precision:.1f} %: questions are answered in "
        "the order of their null odds, up to the star when the run chose its answers.",
        draw,
        wide=False,
    )


def best_answers(candidates: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return the best candidate of each question that is not empty, or else "".

    Args:
        candidates: content of a run's `nbest_predictions.json`, the best first.
    """
    return {
        name: next((str(one["text"]) for one in some if one["text"]), "")
        for name, some in candidates.items()
    }


def point_at(scores: QuestionScores, threshold: float) -> tuple[float, float]:
    """Return precision and recall, by F1, at a threshold on the null odds."""
    answered = scores.no_answer_odds <= threshold
    right = float(np.where(scores.has_answer & answered, scores.f1, 0.0).sum())
    return (
        right / max(int(answered.sum()), 1),
        right / max(int(scores.has_answer.sum()), 1),
    )
