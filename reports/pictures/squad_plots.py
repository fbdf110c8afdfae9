"""Pictures of SQuAD 2.0 results: precision-recall curves and histograms of the null odds.

The pictures that `evaluate-v2.0.py` draws, under its file names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from finetune.errors import InputError
from finetune.tasks.squad_metrics import PrecisionRecall, QuestionScores, precision_recall

# Sums and differences of axes stay finite.
_MAX_DRAWN = 1e300


def average_precisions(scores: QuestionScores) -> dict[str, PrecisionRecall]:
    """Trace the official script's three curves by the names of its results, `pr_exact` and so on.

    Empty if no question has an answer.
    """
    oracle = scores.has_answer.astype(np.float64)
    curves = {"pr_exact": scores.exact, "pr_f1": scores.f1, "pr_oracle": oracle}
    traced = {name: precision_recall(scores, values) for name, values in curves.items()}
    return {name: curve for name, curve in traced.items() if curve is not None}


def draw_pictures(scores: QuestionScores, folder: Path) -> list[Path]:
    """Draw the curves and one histogram for questions with answers and one for those without.

    Args:
        scores: of all questions.
        folder: made if missing; pictures of the same names are replaced.

    Returns:
        The files.

    Raises:
        InputError: the odds are beyond what can be drawn.
    """
    largest = float(np.abs(scores.no_answer_odds).max())
    if largest > _MAX_DRAWN:
        raise InputError(
            f"null odds of {largest:g} cannot be drawn", hint="leave out --out_image_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    titles = {
        "pr_exact": "Precision-recall curve for exact match",
        "pr_f1": "Precision-recall curve for F1",
        "pr_oracle": "Oracle precision-recall curve (answerable or not)",
    }
    files = []
    for name, curve in average_precisions(scores).items():
        title = f"{titles[name]}, average precision {curve.average_precision:.1f} %"
        files.append(folder / f"{name}.png")
        precision_recall_figure(curve, title).savefig(files[-1])
    edges = _bin_edges(scores.no_answer_odds)
    for name, group in (("hasAns", scores.has_answer), ("noAns", ~scores.has_answer)):
        if group.any():
            files.append(folder / f"na_prob_hist_{name}.png")
            odds_figure(scores.no_answer_odds[group], edges, name).savefig(files[-1])
    return files


def precision_recall_figure(curve: PrecisionRecall, title: str) -> Figure:
    """Draw a precision-recall curve as steps, because no recall lies between two thresholds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(curve.recalls, curve.precisions, where="post", color="tab:blue")
    axes.fill_between(curve.recalls, curve.precisions, step="post", alpha=0.2, color="tab:blue")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.05), ylim=(0, 1.05))
    axes.set_title(title, fontsize="medium")
    return figure


def _bin_edges(odds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Edges of 20 bins that hold all odds, and have a width also where the odds hardly differ.

    The script's range, 0 to 1, is that of probabilities, and would leave most of BERT's odds out.
    """
    low, high = float(odds.min()), float(odds.max())
    least = 40 * float(np.spacing(max(abs(low), abs(high))))
    if high - low <= least:
        low, high = low - max(least, 0.5), high + max(least, 0.5)
    return np.linspace(low, high, 21)


def odds_figure(odds: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], name: str) -> Figure:
    """Draw a histogram of null odds; give two pictures the same edges to compare them."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        odds, bins=edges.tolist(), weights=np.full(len(odds), 1 / len(odds)), color="tab:blue"
    )
    kind = "with an answer" if name == "hasAns" else "without an answer"
    axes.set(xlabel="null odds", ylabel="proportion of questions")
    axes.set_title(f"Questions {kind}", fontsize="medium")
    return figure
