"""Published fine-tuning recipes: what to train with, and where that is written."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a published fine-tuning.

    Attributes:
        task: what is fine-tuned, for people.
        head: task head.
        batch_size: effective batch.
        learning_rate: peak of the schedule.
        epochs: passes over the examples.
        source: where this is written.
        examples: of the training set; 0 where there are several sets.
        models: beginnings of the models' names that it is for; all by default.
    """

    task: str
    head: str
    batch_size: int
    learning_rate: float
    epochs: float
    source: str
    examples: int = 0
    models: tuple[str, ...] = ("",)


_SQUAD_1, _SQUAD_2 = 87_599, 130_319
_PAPER, _README = "Devlin et al. 2019", "README of google-research/bert"

RECIPES = (
    Recipe("SQuAD 1.1", "squad", 32, 5e-5, 3.0, f"{_PAPER}, section 4.2", examples=_SQUAD_1),
    Recipe("SQuAD 2.0", "squad", 48, 5e-5, 2.0, f"{_PAPER}, section 4.3", examples=_SQUAD_2),
    Recipe(
        "SQuAD 1.1", "squad", 12, 3e-5, 2.0, _README, examples=_SQUAD_1, models=("bert-base",)
    ),
    Recipe(
        "SQuAD 1.1 and 2.0", "squad", 24, 3e-5, 2.0, _README, examples=_SQUAD_1,
        models=("bert-large",),
    ),
    Recipe("GLUE", "classifier", 32, 5e-5, 3.0, f"{_PAPER}, section 4.1"),
    Recipe("GLUE", "classifier", 16, 5e-5, 3.0, f"{_PAPER}, appendix A.3"),
)  # fmt: skip
"""The paper's first, by head. The paper chose GLUE's learning rate on the dev set among 5e-5, 4e-5,
3e-5 and 2e-5."""


def find_recipe(head: str, model: str, batch_size: int) -> Recipe:
    """Find the recipe with an effective batch; where there is none, the paper's first.

    Args:
        head: task head; a regressor's is the classifier's.
        model: name of the model.
        batch_size: effective batch.
    """
    of_head = [r for r in RECIPES if r.head == ("squad" if head == "squad" else "classifier")]
    fitting = [
        r for r in of_head if r.batch_size == batch_size and model.lower().startswith(r.models)
    ]
    return (fitting or of_head)[0]


def train_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a training, as the original counts them.

    For SQuAD the examples are questions, not the windows that long contexts are cut into.
    """
    return int(num_examples / batch_size * epochs)
