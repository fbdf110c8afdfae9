"""How TensorFlow is set up before its first operation, alike in trials and in runs."""

from __future__ import annotations

from bertbench.core.quiet import muted_stderr
from bertbench.hardware.device import Budget
from bertbench.hardware.threads import check_threads
from bertbench.memory.allocator.budget import apply_budget
from finetune.spec.precisions import EXACT_PRECISION, allow_tensor_float_32


def start_tensorflow(budget: Budget) -> str:
    """Bind this process to a budget.

    On a CPU one operation runs at a time, on all cores. With several at a time, the order in which
    activations are freed would change from step to step, and the peak with it.

    Matrix products are not fused with their bias on a CPU. The fused kernel (oneDNN's, in
    TensorFlow 2.20 and 2.21) does not check whether its output could be allocated. It ends the
    process with a segmentation fault where it should report that memory is exhausted.

    Args:
        budget: what this process's environment was set for by
            `bertbench.memory.allocator.budget.child_environment`.

    Returns:
        TensorFlow's name of the device, as in `GPU:0`.

    Raises:
        InputError: the device, or this budget on it, is not available.
        WorkError: the system does not allow the threads that TensorFlow needs.
        RuntimeError: TensorFlow has already run an operation.
    """
    check_threads()
    with muted_stderr():
        import tensorflow as tf

        # TensorFlow's default differs, and applies also where a model predicts without training.
        allow_tensor_float_32(EXACT_PRECISION)
        if budget.device.kind == "cpu":
            tf.config.threading.set_inter_op_parallelism_threads(1)
            tf.config.optimizer.set_experimental_options({"remapping": False})
        return apply_budget(budget)
