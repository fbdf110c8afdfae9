"""The optimizers by name, and what each remembers of a variable.

Bytes a parameter, with float32 weights and gradients counted (4 + 4), for a model of matrices:

| optimizer | remembers | bytes a parameter | update |
| --- | --- | --- | --- |
| `adamw` | two moments | 16 | BERT's own: exact |
| `lion` | one moment | 12 | another one |
| `adafactor` | a number a row and a number a column | 8 | another one |

Exact means that the weights are those of the published recipe. The others are optimizers in their
own right, for those whom 16 bytes a parameter leave no room:

- `adafactor` (Shazeer and Stern 2018, "Adafactor: adaptive learning rates with sublinear memory
  cost") factors the second moment and keeps no first one. Here it takes the schedule's learning
  rate, not one relative to the weights, so a rate that suits AdamW is a fair start.
- `lion` (Chen et al. 2023, "Symbolic discovery of optimization algorithms") moves every weight by
  the learning rate, up or down. Its authors advise a learning rate 3 to 10 times smaller than
  AdamW's and a weight decay that many times larger.

Placement: what an optimizer remembers may be kept in the host's memory while the model is on a GPU.
The update is the same one, made by the host: 4 bytes a parameter cross the bus in each direction,
and AdamW takes 8 bytes a parameter of the device instead of 16.

This module does not import TensorFlow.
"""

from __future__ import annotations

from collections.abc import Sequence

OPTIMIZERS = ("adamw", "lion", "adafactor")
"""From most memory to least; the first is the published recipe's."""

EXACT_OPTIMIZER = OPTIMIZERS[0]

PLACEMENTS = ("device", "host")
"""Where an optimizer's state may be kept."""


def slot_shapes(optimizer: str, shape: Sequence[int]) -> dict[str, list[int]]:
    """Shapes of what an optimizer remembers of a variable, by name.

    Args:
        optimizer: one of `OPTIMIZERS`.
        shape: of the variable.

    Raises:
        ValueError: unknown optimizer.
    """
    whole = list(shape)
    if optimizer == "adamw":
        return {"adam_m": whole, "adam_v": whole}
    if optimizer == "lion":
        return {"lion_m": whole}
    if optimizer == "adafactor":
        if len(shape) < 2:
            return {"adafactor_v": whole}
        return {"adafactor_row": whole[:-1], "adafactor_column": whole[:-2] + whole[-1:]}
    raise ValueError(f"unknown optimizer {optimizer!r}")
