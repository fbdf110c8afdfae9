"""What a training step is asked for: the model that is trained, and how the step is done."""

from __future__ import annotations

import dataclasses

from finetune.spec.checkpointing import NO_CHECKPOINTING, Checkpointing
from finetune.spec.config import BertConfig
from finetune.spec.optimizers import PLACEMENTS
from finetune.spec.precisions import EXACT_PRECISION


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model and the length of its examples.

    Attributes:
        config: the encoder's configuration.
        head: the task head, one of `finetune.spec.config.HEADS`.
        seq_len: tokens of each example.
    """

    config: BertConfig
    head: str
    seq_len: int


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """How an optimizer step is done; the optimizer itself has settings of its own.

    Example:
        >>> StepSettings(accumulation_steps=4, checkpointing=parse_checkpointing("nested"))

    Attributes:
        accumulation_steps: micro-batches of an optimizer step, at least 1. With more than one,
            the sums of their gradients, 4 bytes a parameter, live from the first micro-batch on.
            With one, gradients come to life while activations are freed.
        checkpointing: policy of each layer.
        precision: one of `finetune.spec.precisions.PRECISIONS`.
        xla: compile the step with XLA, once for every micro-batch size.
        placement: where the optimizer's state is, one of `finetune.spec.optimizers.PLACEMENTS`.
        seed: seed of the dropout masks, at least 0.
    """

    accumulation_steps: int = 1
    checkpointing: Checkpointing = NO_CHECKPOINTING
    precision: str = EXACT_PRECISION
    xla: bool = False
    placement: str = PLACEMENTS[0]
    seed: int = 0


PLAIN_STEP = StepSettings()
"""One micro-batch, without checkpointing, in float32."""
