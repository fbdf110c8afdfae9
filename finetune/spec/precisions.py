"""The precisions by name: in which type activations are kept and matrices multiplied.

| precision | activations | matrix products | weights, moments, sums, loss |
| --- | --- | --- | --- |
| `float32` | float32 | float32 | float32 |
| `tf32` | float32 | TensorFloat-32, on GPUs that have it | float32 |
| `bf16` | bfloat16 | bfloat16 | float32 |
| `fp16` | float16 | float16 | float32 |

Only `float32` is exact. By default TensorFlow multiplies in TensorFloat-32, with 10 bits of
mantissa instead of 23, on every GPU that can. Here TensorFloat-32 must be asked for.

Sums of many numbers stay float32 with `bf16` and `fp16` too: means and variances of LayerNorm, the
inner sums of attention's gradient, and gradients of biases. So does everything that lives longer
than a layer's backward pass. Weights are rounded to the smaller type where they are used, but they
are never stored in it.

`fp16` is for GPUs that have no bfloat16. The largest float16 number is 65,504, and the smallest is
6e-8, so gradients need `finetune.train.loss_scaling`.
"""

from __future__ import annotations

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
"""Names of the precisions; the published recipe has the first."""

EXACT_PRECISION = PRECISIONS[0]

_COMPUTE_TYPES = {
    "float32": "float32",
    "tf32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


def compute_type(precision: str) -> str:
    """Return the name of the type of activations.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}")
    return _COMPUTE_TYPES[precision]


def compute_bytes(precision: str) -> int:
    """Return the bytes of one number of an activation."""
    return 4 if compute_type(precision) == "float32" else 2


def scales_loss(precision: str) -> bool:
    """Return whether gradients would vanish without `finetune.train.loss_scaling`."""
    return compute_type(precision) == "float16"


def allow_tensor_float_32(precision: str) -> None:
    """Let this process's float32 matrix products be TensorFloat-32 for `tf32`, and for no other."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
