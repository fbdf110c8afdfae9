"""Published fine-tuning recipes: hyperparameters, and where they were published."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a published fine-tuning.

    Attributes:
        task: name of the task, to be shown to people.
        head: task head.
        batch_size: effective batch.
        learning_rate: peak of the schedule.
        epochs: passes over the examples.
        source: where the recipe was published.
        examples: number of examples of the training set; 0 where there are several sets.
        models: first parts of the names of the models that it is for; by default it is for all.
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
"""All recipes; for each head those of the paper come first. For GLUE the paper chose the learning
rate on the dev set, among 5e-5, 4e-5, 3e-5 and 2e-5."""


def find_recipe(head: str, model: str, batch_size: int) -> Recipe:
    """Find the recipe for a model and an effective batch.

    Args:
        head: task head; a regressor has the recipes of the classifier.
        model: name of the model.
        batch_size: effective batch.

    Returns:
        The paper's first recipe for the head if none has this effective batch.
    """
    of_head = [r for r in RECIPES if r.head == ("squad" if head == "squad" else "classifier")]
    fitting = [
        r for r in of_head if r.batch_size == batch_size and model.lower().startswith(r.models)
    ]
    return (fitting or of_head)[0]


def train_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Return the optimizer steps of a training, as the original counts them.

    For SQuAD the examples are questions, not the windows that long contexts are cut into.

    Example:
        >>> train_steps(87_599, 32, 3.0)
        8212
    """
    return int(num_examples / batch_size * epochs)
