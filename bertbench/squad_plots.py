"""Pictures of SQuAD 2.0 results: precision-recall curves and histograms of the null odds.

The pictures that `evaluate-v2.0.py` draws, under its file names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from finetune.tasks.squad_metrics import PrecisionRecall, QuestionScores, precision_recall


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
    """
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
    # The script's range, 0 to 1, is that of probabilities, and would leave most of BERT's odds out.
    edges = np.histogram_bin_edges(scores.no_answer_odds, 20)
    for name, group in (("hasAns", scores.has_answer), ("noAns", ~scores.has_answer)):
        if group.any():
            files.append(folder / f"na_prob_hist_{name}.png")
            odds_figure(scores.no_answer_odds[group], edges, name).savefig(files[-1])
    return files


def precision_recall_figure(curve: PrecisionRecall, title: str) -> Figure:
    """Draw a curve as steps: a recall is reached at a threshold, not between two."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(curve.recalls, curve.precisions, where="post", color="tab:blue")
    axes.fill_between(curve.recalls, curve.precisions, step="post", alpha=0.2, color="tab:blue")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.05), ylim=(0, 1.05))
    axes.set_title(title, fontsize="medium")
    return figure


def odds_figure(odds: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], name: str) -> Figure:
    """Draw the distribution of null odds; the same edges make two pictures comparable."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        odds, bins=edges.tolist(), weights=np.full(len(odds), 1 / len(odds)), color="tab:blue"
    )
    kind = "with an answer" if name == "hasAns" else "without an answer"
    axes.set(xlabel="null odds", ylabel="proportion of questions")
    axes.set_title(f"Questions {kind}", fontsize="medium")
    return figure
