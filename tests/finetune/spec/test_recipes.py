"""Published recipes, by effective batch."""

from __future__ import annotations

import pytest

from finetune.spec.recipes import find_recipe, train_steps


@pytest.mark.parametrize(
    ("head", "model", "batch_size", "expected"),
    [
        ("squad", "bert-large", 32, ("SQuAD 1.1", 32, 5e-5, 3)),
        ("squad", "bert-base", 48, ("SQuAD 2.0", 48, 5e-5, 2)),
        ("squad", "bert-large", 24, ("SQuAD 1.1 and 2.0", 24, 3e-5, 2)),
        ("squad", "bert-base", 12, ("SQuAD 1.1", 12, 3e-5, 2)),
        # The README has it for the other size.
        ("squad", "bert-base", 24, ("SQuAD 1.1", 32, 5e-5, 3)),
        ("squad", "bert-large", 12, ("SQuAD 1.1", 32, 5e-5, 3)),
        ("squad", "bert-tiny", 7, ("SQuAD 1.1", 32, 5e-5, 3)),
        ("classifier", "bert-base", 16, ("GLUE", 16, 5e-5, 3)),
        ("regressor", "bert-base", 32, ("GLUE", 32, 5e-5, 3)),
        ("classifier", "bert-base", 48, ("GLUE", 32, 5e-5, 3)),
    ],
)
def test_recipe_of_a_batch(
    head: str, model: str, batch_size: int, expected: tuple[str, int, float, float]
) -> None:
    recipe = find_recipe(head, model, batch_size)
    found = (recipe.task, recipe.batch_size, recipe.learning_rate, recipe.epochs)
    assert found == expected


def test_steps_of_the_papers_squad() -> None:
    recipe = find_recipe("squad", "bert-large", 32)
    assert train_steps(recipe.examples, recipe.batch_size, recipe.epochs) == 8212
