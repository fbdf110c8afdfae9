"""The optimizers by name, and the state that each keeps for a variable.

The bytes include float32 weights and gradients (4 + 4), for a model that consists of matrices:

| optimizer | state | bytes for each parameter | update |
| --- | --- | --- | --- |
| `adamw` | two moments | 16 | BERT's own: exact |
| `lion` | one moment | 12 | another one |
| `adafactor` | a number for each row and one for each column | 8 | another one |

Exact means that training gives the weights of the published recipe. The other optimizers are for
models for which 16 bytes a parameter are too many:

- `adafactor` (Shazeer and Stern 2018, "Adafactor: adaptive learning rates with sublinear memory
  cost") factors the second moment and keeps no first moment. Here it uses the schedule's learning
  rate, not one relative to the weights, so try a learning rate that suits AdamW first.
- `lion` (Chen et al. 2023, "Symbolic discovery of optimization algorithms") moves every weight by
  the learning rate, up or down. Its authors advise a learning rate 3 to 10 times smaller than
  AdamW's and a weight decay that many times larger.

Placement: the optimizer's state is on the device, or in the host's memory while the model is on a
GPU (also known as offloading). The host then computes the same update. 4 bytes for each parameter
cross the bus in each direction, and AdamW takes 8 bytes of the device for each parameter instead of
16.
"""

from __future__ import annotations

from collections.abc import Sequence

OPTIMIZERS = ("adamw", "lion", "adafactor")
"""Names of the optimizers, from most memory to least; the published recipe has the first."""

EXACT_OPTIMIZER = OPTIMIZERS[0]

PLACEMENTS = ("device", "host")
"""Where an optimizer's state may be kept."""


def slot_shapes(optimizer: str, shape: Sequence[int]) -> dict[str, list[int]]:
    """Return the shapes of the state that an optimizer keeps for a variable, by name.

    Example:
        >>> slot_shapes("adafactor", [768, 3072])
        {'adafactor_row': [768], 'adafactor_column': [3072]}

    Args:
        optimizer: one of `OPTIMIZERS`.
        shape: shape of the variable.

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
