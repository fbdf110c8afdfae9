"""Shape of a BERT model: configuration files, published sizes, parameter counts."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune.errors import InputError
from finetune.spec.config_keys import unknown_keys
from finetune.storage.json_files import json_text, load_object

_logger = logging.getLogger(__name__)

ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu")
"""Activation functions of a layer's feed-forward sublayer."""

HEADS = ("squad", "classifier", "regressor")
"""Task heads. `squad` scores each token as start and as end of the answer, `classifier` scores each
class from the pooled output, `regressor` computes one number from it."""

INPUT_NAMES = ("input_ids", "input_mask", "segment_ids")
"""Names of the inputs of every model, arrays `[examples, sequence length]`."""

TARGET_NAMES: Mapping[str, tuple[str, ...]] = {
    "squad": ("start_positions", "end_positions"),
    "classifier": ("label_ids",),
    "regressor": ("label_values",),
}
"""Names of the targets of each head, arrays `[examples]`: int32, but `label_values` are float32."""


# Many of TensorFlow's kernels count the rows of a matrix in 32 bits.
_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 1000

# A hundred times the largest BERT (Shoeybi et al. 2019, "Megatron-LM": 3.9 billion).
_MAX_PARAMETERS = 400 * 10**9


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Configuration of a BERT encoder, with the field names of `bert_config.json`.

    Attributes:
        hidden_act: `gelu_tanh` (the original's approximation), `gelu_erf` (exact) or `relu`.
            Configuration files say only `gelu`; which of the two is meant depends on who wrote
            the file, see `from_json_file`.
        layer_norm_eps: 1e-12 in the original and in Hugging Face's configurations of BERT.
        classifier_dropout: dropout rate of a classifier's pooled output; None means
            `hidden_dropout_prob`.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_tanh"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers with which building the graph would fail, with a message hard to read."""
        for field in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            value = getattr(self, field)
            # To Python, true is also an int.
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{field} must be a positive integer, not {value!r}")
            most = _MAX_LAYERS if field == "num_hidden_layers" else _MAX_SIZE
            if value > most:
                raise InputError(f"{field} is {value:,}, and at most {most:,} can be built")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        layer = 4 * self.hidden_size + 2 * self.intermediate_size
        rows = self.vocab_size + self.max_position_embeddings + self.num_hidden_layers * layer
        if rows * self.hidden_size > _MAX_PARAMETERS:
            raise InputError(
                f"a model of {rows * self.hidden_size:,} parameters, and at most "
                f"{_MAX_PARAMETERS:,} can be built"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"hidden_act {self.hidden_act!r} is not supported", hint="use gelu or relu"
            )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, field)
            if value is None and field == "classifier_dropout":
                continue
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise InputError(f"{field} must be in [0, 1), not {value!r}")
        for field in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{field} must be a number, 0 or above, not {value!r}")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def without_dropout(self) -> BertConfig:
        """Return the same model with every dropout rate 0."""
        return dataclasses.replace(
            self,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            classifier_dropout=None,
        )

    def values(self) -> dict[str, Any]:
        """Return the fields by name for JSON, without those that are None."""
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if value is not None}


_SHAPE_KEYS = frozenset(field.name for field in dataclasses.fields(BertConfig))

# Other names of the two GELU functions in Hugging Face's code.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu_erf",
}


def from_json_file(path: str | Path) -> BertConfig:
    """Read a `bert_config.json` of the original release or a Hugging Face `config.json`.

    The word `gelu` means the tanh approximation in the original's `modeling.py`, but the exact
    function in Hugging Face's code. A file with a `model_type` or `architectures` key is one of
    Hugging Face's. Unknown keys are logged as a warning.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing, not JSON, not of a BERT model, or inconsistent.
    """
    raw = load_object(
        path,
        what="the model configuration",
        hint="give the bert_config.json that came with the checkpoint",
        finite=False,  # BertConfig refuses NaN, and its message names the field.
        large_integers="float",
    )
    try:
        config = from_mapping(raw)
        unknown = unknown_keys(raw, _SHAPE_KEYS)
    except InputError as error:
        raise InputError(str(error), path=path) from error
    if unknown:
        _logger.warning("%s: keys that are not used: %s", path, ", ".join(unknown)[:200])
    return config


def from_mapping(raw: Mapping[str, Any]) -> BertConfig:
    """Make a configuration from the parsed JSON of either kind of file, see `from_json_file`."""
    hugging_face = "model_type" in raw or "architectures" in raw
    unknown_keys(raw, _SHAPE_KEYS)
    if "vocab_size" not in raw:
        raise InputError("vocab_size is missing", hint="is this a BERT configuration?")
    values = {key: value for key, value in raw.items() if key in _SHAPE_KEYS}
    activation = values.get("hidden_act", "gelu")
    if activation == "gelu":
        values["hidden_act"] = "gelu_erf" if hugging_face else "gelu_tanh"
    elif isinstance(activation, str):
        values["hidden_act"] = _ACTIVATIONS.get(activation, activation)
    return BertConfig(**values)


def to_original_json(config: BertConfig, more: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Write a configuration as JSON that `from_json_file` and the original code both read.

    `gelu_tanh` becomes `gelu`, which means the same function in the original. The other activations
    keep their names.

    Args:
        config: the configuration.
        more: further keys, which the original ignores.
    """
    values = {**config.values(), **more}
    if config.hidden_act == "gelu_tanh":
        values["hidden_act"] = "gelu"
    return json_text(values, indent=2, sort_keys=True) + "\n"


def _preset(layers: int, hidden: int, vocab_size: int = 30522) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )


PRESETS: Mapping[str, BertConfig] = {
    "bert-tiny": _preset(2, 128),
    "bert-mini": _preset(4, 256),
    "bert-small": _preset(4, 512),
    "bert-medium": _preset(8, 512),
    "bert-base": _preset(12, 768),
    "bert-base-cased": _preset(12, 768, 28996),
    "bert-large": _preset(24, 1024),
    "bert-large-cased": _preset(24, 1024, 28996),
}
"""Sizes from the README of the original release; uncased unless the name says cased."""


def preset(name: str) -> BertConfig:
    """Return a published size by name; `-uncased` may be appended.

    Example:
        >>> preset("bert-large-uncased").num_hidden_layers
        24

    Raises:
        InputError: there is no such size.
    """
    key = name.lower().replace("_", "-").removesuffix("-uncased")
    if key not in PRESETS:
        raise InputError(f"unknown model {name!r}", hint=f"known models: {', '.join(PRESETS)}")
    return PRESETS[key]


def variable_shapes(config: BertConfig, head: str, num_labels: int = 2) -> dict[str, list[int]]:
    """Return name and shape of every variable, in the original's order of creation.

    Names are those of the original's checkpoints (`modeling.py`, `run_classifier.py`,
    `run_squad.py`), so a checkpoint's tensors and a model's variables are matched by name.

    Args:
        config: the encoder.
        head: one of `HEADS`.
        num_labels: number of classes of the classifier. The head of SQuAD has two outputs, the
            regressor one.

    Returns:
        Shapes by name; kernels are `[inputs, outputs]`.

    Raises:
        InputError: the head is unknown.
    """
    h, f = config.hidden_size, config.intermediate_size
    shapes: dict[str, list[int]] = {
        "bert/embeddings/word_embeddings": [config.vocab_size, h],
        "bert/embeddings/token_type_embeddings": [config.type_vocab_size, h],
        "bert/embeddings/position_embeddings": [config.max_position_embeddings, h],
        "bert/embeddings/LayerNorm/beta": [h],
        "bert/embeddings/LayerNorm/gamma": [h],
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"bert/encoder/layer_{layer}/"
        for projection in ("query", "key", "value"):
            shapes[f"{prefix}attention/self/{projection}/kernel"] = [h, h]
            shapes[f"{prefix}attention/self/{projection}/bias"] = [h]
        shapes[f"{prefix}attention/output/dense/kernel"] = [h, h]
        shapes[f"{prefix}attention/output/dense/bias"] = [h]
        shapes[f"{prefix}attention/output/LayerNorm/beta"] = [h]
        shapes[f"{prefix}attention/output/LayerNorm/gamma"] = [h]
        shapes[f"{prefix}intermediate/dense/kernel"] = [h, f]
        shapes[f"{prefix}intermediate/dense/bias"] = [f]
        shapes[f"{prefix}output/dense/kernel"] = [f, h]
        shapes[f"{prefix}output/dense/bias"] = [h]
        shapes[f"{prefix}output/LayerNorm/beta"] = [h]
        shapes[f"{prefix}output/LayerNorm/gamma"] = [h]
    shapes["bert/pooler/dense/kernel"] = [h, h]
    shapes["bert/pooler/dense/bias"] = [h]
    if head == "squad":
        shapes["cls/squad/output_weights"] = [2, h]
        shapes["cls/squad/output_bias"] = [2]
    elif head in ("classifier", "regressor"):
        outputs = num_labels if head == "classifier" else 1
        shapes["output_weights"] = [outputs, h]
        shapes["output_bias"] = [outputs]
    else:
        raise InputError(f"unknown task head {head!r}", hint=f"use one of {', '.join(HEADS)}")
    return shapes


def is_trained(name: str, head: str) -> bool:
    """Return whether a variable is trained: with the SQuAD head the pooler is not.

    The pooler then has no gradient. Like the original, training leaves a variable without gradient
    as it is: no moments, no weight decay.
    """
    return head != "squad" or not name.startswith("bert/pooler/")


def has_no_gradient(name: str, head: str, config: BertConfig) -> bool:
    """Return whether a variable's gradient is zero by algebra, whatever the batch.

    What is computed as its gradient is rounding noise. A softmax does not change when the same
    number is added to all its inputs. That is what the bias of a key does to all scores of a
    query, and what, with the SQuAD head, the output bias and the shift of the last LayerNorm do to
    all positions.
    """
    last_shift = f"bert/encoder/layer_{config.num_hidden_layers - 1}/output/LayerNorm/beta"
    return name.endswith("attention/self/key/bias") or (
        head == "squad" and name in ("cls/squad/output_bias", last_shift)
    )


def parameter_count(config: BertConfig, head: str, num_labels: int = 2) -> int:
    """Return the number of parameters, encoder and head together."""
    return sum(math.prod(shape) for shape in variable_shapes(config, head, num_labels).values())
