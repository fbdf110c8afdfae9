"""Would a step with all layers in one loop be smaller? It is compiled, and not run.

    python benchmarks/rolled_layers.py [--quick] [--gpu NAME,NAME] [--model NAME] [--seq-len N]
        [--batch N] [--json FILE]

The training step has its layers one after the other, so its program grows with their number. Here
all layers but the first are put into one loop forwards and one backwards, with checkpointing
`full`. The loop needs the weights of its layers as one array for each kind of weight, which is a
copy of them. Both steps are compiled for a product, and their bytes and seconds are compared. The
loop draws the same dropout masks for every layer, which changes nothing of the size: it is for
measuring, not for training. `--quick` compiles BERT-Tiny for a T4 alone.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bertbench.compiling.compilation import compile_lowered
from bertbench.compiling.target import compile_target
from bertbench.core.workload import Levers, Setup, TrainingStep, published_workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.trials.temporary_folders import temporary_folder
from finetune.spec.checkpointing import parse_checkpointing
from finetune.storage.json_files import json_text


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", default="a100,tpu-v2-8", help="products, with commas")
    parser.add_argument("--model", default="bert-small")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--json", type=Path, help="results, one line for each compilation")
    arguments = parser.parse_args()
    names, model = arguments.gpu.split(","), arguments.model
    if arguments.quick:
        names, model = ["t4"], "bert-tiny"
    levers = Levers(parse_checkpointing("full"), xla=True)
    step = Setup(published_workload(model, arguments.seq_len), levers).step(arguments.batch)
    with temporary_folder() as folder:
        for rolled in (False, True):
            module, began = Path(folder) / "module.hlo", time.monotonic()
            _in_another_process(functools.partial(lower, step, module, rolled=rolled))
            lowering_seconds = round(time.monotonic() - began, 1)
            for name in names:
                target = compile_target(find_accelerator(name))
                compilation = compile_lowered(module, step.micro_batch, target)
                row = {
                    "product": name, "model": model, "seq_len": arguments.seq_len,
                    "micro_batch": arguments.batch, "rolled": rolled,
                    "module_bytes": module.stat().st_size, "lowering_seconds": lowering_seconds,
                    **compilation.to_json(),
                }  # fmt: skip
                print(json_text(row), flush=True)
                if arguments.json is not None:
                    with arguments.json.open("a", encoding="utf-8") as file:
                        file.write(json_text(row) + "\n")


def _in_another_process(work: Callable[[], None]) -> None:
    """Fork, so that TensorFlow is started anew for each step."""
    process = os.fork()
    if not process:
        work()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit("the step could not be lowered")


def lower(step: TrainingStep, module: Path, *, rolled: bool) -> None:
    """Lower a step to a file, with its layers in a loop or one after the other."""
    from finetune.train import gradients
    from finetune.train.lowering import lower_step
    from finetune.train.optimization import OptimizerSettings

    if rolled:
        gradients.encode = encode_rolled  # type: ignore[assignment]
    optimizer = OptimizerSettings(1e-5, num_train_steps=1_000_000)
    settings = step.levers.step_settings()
    module.write_bytes(lower_step(step.workload.spec, optimizer, step.micro_batch, settings))


def encode_rolled(variables: Mapping[str, Any], config: Any, batch: Any, forward: Any) -> Any:
    """Stand for `finetune.model.modeling.encode`, with checkpointing `full`."""
    import tensorflow as tf

    from finetune.model import modeling
    from finetune.model.encoder_layer import EncoderLayer, layer_weight_names, norm_weight_names
    from finetune.model.layers import layer_norm
    from finetune.spec.config import INPUT_NAMES

    input_ids, input_mask, segment_ids = (batch[name] for name in INPUT_NAMES)
    rows, seq_len = tf.shape(input_ids)[0], input_ids.shape[1]
    sums = modeling._embed(variables, config, input_ids, segment_ids)
    adder = (1.0 - tf.cast(input_mask, tf.float32)) * -10000.0
    adder = tf.reshape(adder, [rows, 1, 1, seq_len])
    first = EncoderLayer(config, 0, forward.dropout_key)
    sums = modeling._run_layer(first, variables, sums, adder, forward, rows)
    names = [layer_weight_names(index) for index in range(1, config.num_hidden_layers)]
    stacked = [tf.stack([variables[name] for name in kind]) for kind in zip(*names, strict=True)]
    layer = EncoderLayer(config, 1, forward.dropout_key)
    sums = _loop(layer, sums, adder, stacked, len(names))
    last = norm_weight_names(config.num_hidden_layers)
    gamma, beta = (tf.convert_to_tensor(variables[name]) for name in last)
    output = layer_norm(sums, gamma, beta, config.layer_norm_eps, tf.float32)
    return tf.reshape(output, [rows, seq_len, config.hidden_size])


def _loop(layer: Any, sums: Any, adder: Any, stacked: list[Any], count: int) -> Any:
    """Run layers in a loop, and their backward pass in another, which runs them again."""
    import tensorflow as tf

    from finetune.model.barriers import after
    from finetune.model.recomputation import compute

    def one_layer(index: Any, x: Any, weights: list[Any]) -> Any:
        first = tf.zeros([], tf.int32) * index
        return layer(first, [x], weights, [adder], compute)

    @tf.custom_gradient
    def looped(sums: Any, *stacked: Any) -> Any:
        saved = tf.TensorArray(sums.dtype, size=count, infer_shape=False)

        def forwards(index: Any, x: Any, saved: Any) -> Any:
            y = one_layer(index, x, [weights[index] for weights in stacked])
            return index + 1, tf.ensure_shape(y, sums.shape), saved.write(index, x)

        start = (tf.zeros([], tf.int32), sums, saved)
        _, result, saved = tf.while_loop(lambda index, *_: index < count, forwards, start)

        def gradient(upstream: Any) -> list[Any]:
            def backwards(index: Any, dy: Any, gradients: list[Any]) -> Any:
                x = tf.ensure_shape(saved.read(index), sums.shape)
                weights = [one[index] for one in stacked]
                with tf.GradientTape() as tape:
                    tape.watch([x, *weights])
                    y = one_layer(index, x, weights)
                dx, *found = tape.gradient(y, [x, *weights], output_gradients=dy)
                gradients = [
                    tf.tensor_scatter_nd_update(total, [[index]], one[None])
                    for total, one in zip(gradients, found, strict=True)
                ]
                return index - 1, tf.ensure_shape(dx, sums.shape), gradients

            zero = after([upstream], tf.zeros([]))
            zeros = [tf.fill(one.shape, zero) for one in stacked]
            _, dx, found = tf.while_loop(
                lambda index, *_: index >= 0,
                backwards,
                (tf.constant(count - 1), upstream, zeros),
            )
            return [dx, *found]

        return result, gradient

    return looped(sums, *stacked)


if __name__ == "__main__":
    main()
