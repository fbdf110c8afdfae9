"""The precisions by name: in which type activations are kept and matrices multiplied.

| precision | activations | matrix products | weights, moments, sums, loss |
| --- | --- | --- | --- |
| `float32` | float32 | float32 | float32 |
| `tf32` | float32 | TensorFloat-32, on GPUs that have it | float32 |
| `bf16` | bfloat16 | bfloat16 | float32 |
| `fp16` | float16 | float16 | float32 |

Only `float32` is exact. TensorFlow multiplies in TensorFloat-32, with 10 bits of mantissa instead
of 23, wherever a GPU can and nobody says otherwise; here it has to be asked for.

With both half types the numbers that many others are added up to stay float32: means and
variances of LayerNorm, the inner sums of attention's gradient, gradients of biases, and everything
that lives longer than a layer's backward pass. Weights are rounded where they are used, and never
kept so.

float16 is for GPUs that have no bfloat16. Its numbers end at 65,504 and 6e-8, so that gradients
need `finetune.train.loss_scaling`.

This module does not import TensorFlow until it has to.
"""

from __future__ import annotations

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
"""The first is the published recipe's."""

EXACT_PRECISION = PRECISIONS[0]

_COMPUTE_TYPES = {
    "float32": "float32",
    "tf32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


def compute_type(precision: str) -> str:
    """Name of the type of activations.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}")
    return _COMPUTE_TYPES[precision]


def compute_bytes(precision: str) -> int:
    """Bytes of one number of an activation."""
    return 4 if compute_type(precision) == "float32" else 2


def scales_loss(precision: str) -> bool:
    """Whether gradients would vanish without `finetune.train.loss_scaling`."""
    return compute_type(precision) == "float16"


def allow_tensor_float_32(precision: str) -> None:
    """Let this process's float32 matrix products be TensorFloat-32 for `tf32`, and for no other."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
