"""Weights for other tools: Hugging Face folders and TensorFlow checkpoints.

`open_model` finds out which model a checkpoint holds, from the names and shapes of its tensors.
Each function `export_…` writes one format into an empty folder, which, with
`finetune.export.export_folder`, appears complete or not at all. No export holds more than one copy
of the weights in memory. `finetune.export.saved_model` exports SavedModels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from safetensors import SafetensorError
from safetensors.numpy import save_file

from finetune.errors import InputError
from finetune.model.weights import (
    NO_WEIGHTS,
    check_encoder,
    find_checkpoint,
    is_optimizer_state,
    missing_weight,
    open_weights,
)
from finetune.spec.config import BertConfig, to_original_json, variable_shapes
from finetune.storage.json_files import json_text
from finetune.text.tokenization import Tokenizer
from finetune.text.tokenizer_files import write_tokenizer_files

_POOLER_PREFIX = "bert/pooler/"
# The state of a training that is not an optimizer's state of a variable.
_TRAINING_STATE = frozenset({"global_step", "loss_scale", "loss_scale_updates"})
_ARCHITECTURES = {
    "squad": "BertForQuestionAnswering",
    "classifier": "BertForSequenceClassification",
    None: "BertModel",
}
# Hugging Face has two names for the tanh approximation. Every version knows gelu_new, which has the
# original's formula. Its gelu is the exact function.
_HUGGING_FACE_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}
_HUGGING_FACE_HEADS = {
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
    "cls/squad/output_weights": "qa_outputs.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
}
_HUGGING_FACE_KINDS = {"kernel": "weight", "gamma": "weight", "beta": "bias"}


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model in a checkpoint, whose weights are not read yet.

    Attributes:
        checkpoint: the file or the prefix of the checkpoint.
        config: configuration of the encoder.
        head: `squad`, `classifier`, or None for an encoder alone.
        num_labels: number of classes of the classifier; 1 for a regression, 0 without classifier.
        shapes: shapes of the variables by the original's names, in the original's order. The pooler
            may be missing unless the head is the classifier.
        left_out: names of the checkpoint's other tensors, such as those of another head, without
            the optimizer's.
        read: returns the value of a variable as float32, kernels as `[inputs, outputs]`.
    """

    checkpoint: Path
    config: BertConfig
    head: str | None
    num_labels: int
    shapes: Mapping[str, tuple[int, ...]]
    left_out: tuple[str, ...]
    read: Callable[[str], np.ndarray]

    @property
    def architecture(self) -> str:
        """Hugging Face's class for this model."""
        return _ARCHITECTURES[self.head]

    @property
    def is_regression(self) -> bool:
        """Whether the classifier has a single output, which predicts a number."""
        return self.num_labels == 1

    @property
    def has_pooler(self) -> bool:
        """Whether the checkpoint has the pooler."""
        return f"{_POOLER_PREFIX}dense/kernel" in self.shapes

    @property
    def parameters(self) -> int:
        """Number of parameters in the checkpoint."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def open_model(checkpoint: str | Path, config: BertConfig) -> StoredModel:
    """Find out which model a checkpoint holds.

    Args:
        checkpoint: see `finetune.model.weights.find_checkpoint`.
        config: configuration of the encoder.

    Raises:
        InputError: there is no such checkpoint, it cannot be read, a variable is missing or has
            another shape than the configuration says, or it has two heads.
    """
    source = find_checkpoint(checkpoint)
    there, read = open_weights(source)
    head, num_labels = _find_head(source, there)
    shapes = {}
    for name, wanted in variable_shapes(config, head or "squad", num_labels).items():
        if head is None and not name.startswith("bert/"):
            continue
        shape = there.get(name)
        if shape is None and head != "classifier" and name.startswith(_POOLER_PREFIX):
            continue
        if shape is None:
            raise missing_weight(source, name, there)
        if list(shape) != wanted:
            raise InputError(
                f"{name} has shape {list(shape)} in the checkpoint but {wanted} by the "
                "configuration",
                path=source,
                hint="use the configuration and vocabulary that belong to this checkpoint",
            )
        shapes[name] = shape
    check_encoder(source, there, shapes)
    unused = set(there) - set(shapes) - _TRAINING_STATE - NO_WEIGHTS
    return StoredModel(
        checkpoint=source,
        config=config,
        head=head,
        num_labels=num_labels,
        shapes=shapes,
        left_out=tuple(sorted(name for name in unused if not is_optimizer_state(name, there))),
        read=lambda name: np.asarray(read(name), np.float32),
    )


def _find_head(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str | None, int]:
    squad, classes = "cls/squad/output_weights" in shapes, shapes.get("output_weights")
    if squad and classes is not None:
        raise InputError(
            "the checkpoint has the head of SQuAD and that of a classifier",
            path=source,
            hint="export one that was fine-tuned for a single task",
        )
    if classes is not None:
        return "classifier", classes[0] if classes else 0
    return ("squad" if squad else None), 0


# Hugging Face


def export_hugging_face(
    model: StoredModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    labels: Sequence[str] | None = None,
) -> None:
    """Write a folder that `from_pretrained` of `transformers` opens.

    A SQuAD model is written with its pooler, so that no weight is lost. `BertForQuestionAnswering`
    does not use the pooler: `transformers` calls it unexpected, and loads the rest.

    Args:
        model: the model.
        tokenizer: the tokenizer with which it was trained.
        folder: an empty folder.
        labels: the classifier's classes; None names them LABEL_0 and so on.

    Raises:
        InputError: the weights cannot be read, or the number of labels differs.
        OSError: the disk is full.
    """
    named = _label_keys(model, labels)
    write_tokenizer_files(folder, tokenizer, model.config.max_position_embeddings)
    config = {
        "architectures": [model.architecture],
        "model_type": "bert",
        **model.config.values(),
        "hidden_act": _HUGGING_FACE_ACTIVATIONS[model.config.hidden_act],
        "pad_token_id": tokenizer.pad_id,
        "position_embedding_type": "absolute",
    }
    if model.is_regression:
        config["problem_type"] = "regression"
    _write_json(folder / "config.json", {**config, **named})
    prefix = "" if model.head is None else "bert."
    arrays = {}
    for name in model.shapes:
        value = model.read(name)
        if name.endswith("/kernel"):
            value = value.T
        arrays[hugging_face_name(name, prefix)] = np.ascontiguousarray(value)
    # transformers refuses a file that does not say which framework's tensors it holds.
    with file_errors(folder):
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    # The library makes the file readable only for its owner.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _label_keys(model: StoredModel, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return a configuration's keys for the labels of a classifier; none for other heads."""
    if model.head != "classifier":
        return {}
    if labels is None:
        labels = [f"LABEL_{index}" for index in range(model.num_labels)]
    if len(labels) != model.num_labels:
        raise InputError(
            f"{len(labels)} labels are named for a classifier of {model.num_labels}",
            path=model.checkpoint,
        )
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def hugging_face_name(name: str, prefix: str = "bert.") -> str:
    """Translate the name of a variable into that of Hugging Face's parameter.

    The inverse of `finetune.model_files.safetensors_files.original_name`.

    Args:
        name: name of a variable, see `finetune.spec.config.variable_shapes`.
        prefix: prefix of the encoder's parameters; empty for a `BertModel`.
    """
    if name in _HUGGING_FACE_HEADS:
        return _HUGGING_FACE_HEADS[name]
    stem, _, last = name.removeprefix("bert/").replace("/layer_", "/layer/").rpartition("/")
    if last.endswith("_embeddings"):
        last += ".weight"
    return f"{prefix}{stem.replace('/', '.')}.{_HUGGING_FACE_KINDS.get(last, last)}"


def _write_json(path: Path, values: object) -> None:
    path.write_text(json_text(values, indent=2) + "\n", encoding="utf-8")


# The original's format


def export_checkpoint(
    model: StoredModel, tokenizer: Tokenizer, folder: Path, labels: Sequence[str] | None = None
) -> None:
    """Write a folder like those of the original release, with weights but no optimizer state.

    Args:
        model: the model.
        tokenizer: the tokenizer with which it was trained.
        folder: an empty folder, for `bert_model.ckpt.*`, `bert_config.json`, `vocab.txt` and
            `tokenizer_config.json`, which the original does not read.
        labels: the classifier's classes.

    Raises:
        InputError: the weights cannot be read, or the number of labels differs.
        OSError: the disk is full.
    """
    write_original_files(model, tokenizer, folder, labels)
    with tf.device("CPU:0"), file_errors(folder):
        tf.raw_ops.SaveV2(
            prefix=str(folder / "bert_model.ckpt"),
            tensor_names=list(model.shapes),
            shape_and_slices=[""] * len(model.shapes),
            # Not tf.constant: in a measurement it took twice the array's size.
            tensors=[tf.identity(model.read(name)) for name in model.shapes],
        )


def write_original_files(
    model: StoredModel, tokenizer: Tokenizer, folder: Path, labels: Sequence[str] | None
) -> None:
    """Write configuration and tokenizer as in the original release; a run can read them.

    Raises:
        InputError: the number of labels differs.
        OSError: the disk is full.
    """
    write_tokenizer_files(folder, tokenizer, model.config.max_position_embeddings)
    named = {} if labels is None else _label_keys(model, labels)
    text = to_original_json(model.config, named)
    (folder / "bert_config.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def file_errors(folder: Path) -> Iterator[None]:
    """Turn a library's errors for problems of the file system into OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write to {folder} ({error})") from error
    except tf.errors.OpError as error:
        raise OSError(f"cannot write to {folder} ({error.message})") from error
