"""Files of weights, made up, in the formats that people bring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf
from safetensors.numpy import save_file

from finetune.model.modeling import create_variables
from finetune.spec.config import BertConfig, variable_shapes
from finetune.train.checkpoints import save_state
from finetune.train.optimization import create_state
from helpers.tiny_models import CONFIG, NUM_LABELS, Arrays

POOLER = ("bert/pooler/dense/kernel", "bert/pooler/dense/bias")


def random_values(
    head: str, config: BertConfig = CONFIG, num_labels: int = NUM_LABELS, seed: int = 1
) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in variable_shapes(config, head, num_labels).items()
    }


def hugging_face_arrays(
    values: Arrays, prefix: str = "bert.", *, old_names: bool = False
) -> Arrays:
    """Name and transpose as `transformers` does, spelled out here once more."""
    layer_norm = {"gamma": "weight", "beta": "bias"}
    if old_names:
        layer_norm = {"gamma": "gamma", "beta": "beta"}
    heads = {
        "cls/squad/output_weights": "qa_outputs.weight",
        "cls/squad/output_bias": "qa_outputs.bias",
        "output_weights": "classifier.weight",
        "output_bias": "classifier.bias",
    }
    arrays = {}
    for name, value in values.items():
        if name in heads:
            arrays[heads[name]] = value
            continue
        *stem, last = name.removeprefix("bert/").split("/")
        for i, part in enumerate(stem):
            if part.startswith("layer_"):
                stem[i] = f"layer.{part.removeprefix('layer_')}"
        if last.endswith("_embeddings"):
            last += ".weight"
        elif last == "kernel":
            last, value = "weight", np.ascontiguousarray(value.T)
        last = layer_norm.get(last, last)
        arrays[prefix + ".".join([*stem, last])] = value
    return arrays


def model(head: str = "squad", config: BertConfig = CONFIG, num_labels: int = NUM_LABELS) -> dict:
    return create_variables(config, head, num_labels=num_labels, seed=3)


def save_tf(folder: Path, values: Arrays) -> Path:
    folder.mkdir(exist_ok=True)
    variables = {name: tf.Variable(value) for name, value in values.items()}
    return save_state(folder, variables, create_state(list(variables.values())))


def save_safetensors(folder: Path, arrays: Arrays) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    return folder / "model.safetensors"
