"""Published fine-tuning recipes: what to train with, and where that is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a published fine-tuning.

    Attributes:
        task: what is fine-tuned.
        batch_size: effective batch.
        learning_rate: peak of the schedule.
        epochs: passes over the examples.
        warmup_proportion: part of the steps that the learning rate rises for.
        seq_len: longest sequence.
        source: where this is written.
        examples: of the training set; 0 where there are several sets.
    """

    task: str
    batch_size: int
    learning_rate: float
    epochs: float
    seq_len: int
    source: str
    warmup_proportion: float = 0.1
    examples: int = 0


RECIPES: Mapping[str, Recipe] = {
    recipe.task: recipe
    for recipe in (
        Recipe(
            "squad",
            32,
            5e-5,
            3.0,
            384,
            "Devlin et al. 2019, section 4.2; run_squad.py",
            examples=87_599,
        ),
        Recipe("squad2", 48, 5e-5, 2.0, 384, "Devlin et al. 2019, section 4.3", examples=130_319),
        Recipe("glue", 32, 5e-5, 3.0, 128, "Devlin et al. 2019, section 4.1; run_classifier.py"),
    )
}
"""By task. The paper chose GLUE's learning rate on the dev set among 5e-5, 4e-5, 3e-5, 2e-5;
the original's README fine-tunes SQuAD with batch 24 (Large) or 12 (Base), 3e-5 and 2 epochs."""


def train_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a training, as the original counts them.

    For SQuAD the examples are questions, not the windows that long contexts are cut into.
    """
    return int(num_examples / batch_size * epochs)
