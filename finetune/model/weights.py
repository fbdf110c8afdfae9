"""Weights in and out: TensorFlow checkpoints of the original release, Hugging Face folders."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from finetune.errors import DamagedFileError, InputError
from finetune.model.modeling import Variables
from finetune.model_files.checkpoint_files import other_checkpoints, preferred_checkpoints
from finetune.model_files.checkpoint_index import check_index
from finetune.model_files.safetensors_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Reader,
    open_safetensors,
)

_logger = logging.getLogger(__name__)

_HEAD_NAMES = frozenset(
    {"output_weights", "output_bias", "cls/squad/output_weights", "cls/squad/output_bias"}
)
_POOLER_PREFIX = "bert/pooler/"
_ENCODER_PREFIXES = ("bert/embeddings/", "bert/encoder/")
NO_WEIGHTS = frozenset({"bert/embeddings/position_ids", "bert/embeddings/token_type_ids"})
"""Constants that Hugging Face's folders store like weights: 0, 1, 2 and so on, and all 0."""

_CONFIG_HINT = "is its configuration file the one that belongs to it?"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHER_FORMATS = ("tf_model.h5", "flax_model.msgpack", "adapter_model.safetensors", "model.onnx")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to each name.

    Attributes:
        source: the checkpoint that was read.
        loaded: variables that now have the checkpoint's value.
        initialised: variables that the checkpoint does not have, left as they were.
        unused: the checkpoint's tensors that the model has no place for.
    """

    source: Path
    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    unused: tuple[str, ...]


def find_checkpoint(path: str | Path) -> Path:
    """Find the weights that a path means.

    Args:
        path: the prefix of a TensorFlow checkpoint (`bert_model.ckpt`), its `.index` file, a
            `.safetensors` file or the index of several, or a folder that holds one of them. In a
            folder that training left, the best weights come first if they were kept, then the
            newest checkpoint, see `finetune.model_files.checkpoint_files`. One that is damaged is
            passed over with a warning.

    Returns:
        A `.safetensors` file, the index of several, or the prefix of a TensorFlow checkpoint.

    Raises:
        InputError: nothing is there, several checkpoints that are not steps of one training, or
            only a format that is not read, such as pickles.
        DamagedFileError: all checkpoints of the folder are damaged.
    """
    path = Path(path)
    if path.name.endswith((".safetensors", ".safetensors.index.json")) and path.is_file():
        return path
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    if Path(f"{path}.index").is_file():
        return path
    if path.is_dir():
        places = (path / "best", path)
        trained = (prefix for place in places for prefix in preferred_checkpoints(place))
        readable = _first_readable(trained)
        if readable is not None:
            return readable
        for name in (WEIGHTS_FILE, INDEX_FILE, "bert_model.ckpt"):
            found = path / name
            if found.is_file() or Path(f"{found}.index").is_file():
                return found
        readable = _first_readable(other_checkpoints(path))
        if readable is not None:
            return readable
        _refuse_other_formats(path)
    raise InputError(
        "no checkpoint found",
        path=path,
        hint="give the prefix of a TensorFlow checkpoint (…/bert_model.ckpt) or a folder with "
        "model.safetensors",
    )


def _first_readable(prefixes: Iterable[Path]) -> Path | None:
    """The first of several checkpoints whose weights can all be read; None if there are none.

    Raises:
        DamagedFileError: of the first one, if none can be read.
    """
    first_damage: DamagedFileError | None = None
    for prefix in prefixes:
        try:
            shapes, read = open_tf_checkpoint(prefix)
            for name in shapes:
                if not is_optimizer_state(name, shapes):
                    read(name)
        except DamagedFileError as error:
            _logger.warning("passing over a damaged checkpoint: %s", error)
            first_damage = first_damage or error
            continue
        return prefix
    if first_damage is not None:
        raise first_damage
    return None


def _refuse_other_formats(folder: Path) -> None:
    for name in (*_PICKLES, *_OTHER_FORMATS):
        if (folder / name).is_file():
            why = "a pickle, and pickles are never loaded"
            raise InputError(
                f"only {name} is there, {why if name in _PICKLES else 'which is not read'}",
                path=folder,
                hint="get the model's model.safetensors",
            )


def load_weights(
    variables: Variables, init_checkpoint: str | Path, *, with_head: bool = True
) -> LoadReport:
    """Set a model's variables from a checkpoint, one at a time.

    The encoder must be there in full; the pooler and the task head may be missing and then keep
    their values. A head of another shape (a different number of labels) counts as missing.

    Args:
        variables: the model; changed.
        init_checkpoint: see `find_checkpoint`.
        with_head: False leaves the task head's values.

    Returns:
        What was loaded and what was not.

    Raises:
        InputError: no such checkpoint, it cannot be read, an encoder variable is missing or has no
            place in the model, or a shape differs (as when the configuration or vocabulary belongs
            to another model).
    """
    source = find_checkpoint(init_checkpoint)
    names, read = open_weights(source)
    loaded, initialised = [], []
    for name, variable in variables.items():
        optional = name in _HEAD_NAMES or name.startswith(_POOLER_PREFIX)
        shape = names.get(name)
        wanted = tuple(variable.shape)
        if name in _HEAD_NAMES and not with_head:
            initialised.append(name)
        elif shape == wanted:
            variable.assign(np.asarray(read(name), np.float32))
            loaded.append(name)
        elif shape is None and optional:
            initialised.append(name)
        elif shape is None:
            raise missing_weight(source, name, names)
        elif name in _HEAD_NAMES:
            initialised.append(name)
        else:
            raise InputError(
                f"{name} has shape {list(shape)} in the checkpoint but {list(wanted)} by the "
                "configuration",
                path=source,
                hint="use the configuration and vocabulary that belong to this checkpoint",
            )
    check_encoder(source, names, variables)
    unused = sorted(set(names) - set(loaded))
    return LoadReport(source, tuple(loaded), tuple(initialised), tuple(unused))


def open_weights(source: Path) -> Reader:
    """Open what `find_checkpoint` has found.

    Returns:
        Shapes by name, and a function from a name to its array.

    Raises:
        InputError: it cannot be read.
    """
    if source.suffix in (".safetensors", ".json"):
        return open_safetensors(source)
    return open_tf_checkpoint(source)


def check_encoder(source: Path, there: Collection[str], placed: Collection[str]) -> None:
    """See that nothing of a checkpoint's encoder is left out: it would compute something else.

    Args:
        source: the checkpoint.
        there: its names.
        placed: names for which the model has a place.

    Raises:
        InputError: something would be.
    """
    for name in sorted(name for name in there if name.startswith(_ENCODER_PREFIXES)):
        known = name in placed or name in NO_WEIGHTS
        if not known and not is_optimizer_state(name, there):
            raise InputError(
                f"the checkpoint has {name}, for which the configuration has no place",
                path=source,
                hint=_CONFIG_HINT,
            )


def is_optimizer_state(name: str, there: Collection[str]) -> bool:
    """Whether a tensor is an optimizer's for a variable, after which it is named.

    Args:
        name: the tensor's.
        there: all names of the checkpoint.
    """
    return name.rpartition("/")[0] in there


def missing_weight(source: Path, name: str, there: Collection[str]) -> InputError:
    """Say that a checkpoint lacks a weight, or all of BERT's."""
    if not any(name.startswith(_ENCODER_PREFIXES) for name in there):
        found = ", ".join(sorted(there)[:2]) or "nothing"
        return InputError(f"there are no weights of BERT in it, but {found}", path=source)
    return InputError(f"the checkpoint has no {name}", path=source, hint=_CONFIG_HINT)


def open_tf_checkpoint(prefix: Path, *, hint: str = "fetch or export it again") -> Reader:
    """Open a TensorFlow checkpoint.

    Args:
        prefix: its files' name without `.index`.
        hint: what the user should do if it cannot be read.

    Returns:
        Shapes by name of the tensors that hold numbers, and a function from a name to its array.

    Raises:
        DamagedFileError: it cannot be read; the function raises it too.
    """

    def damaged(what: str, error: Exception) -> DamagedFileError:
        return DamagedFileError(f"cannot read {what} ({error})", path=prefix, hint=hint)

    numbers = check_index(prefix, hint=hint)
    # TensorFlow's reader raises by the kind of damage: OpError, or Python's own exceptions.
    kinds = (tf.errors.OpError, RuntimeError, ValueError, LookupError)
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes = reader.get_variable_to_shape_map()
    except kinds as error:
        raise damaged("the TensorFlow checkpoint", error) from error

    def read(name: str) -> np.ndarray:
        try:
            return np.asarray(reader.get_tensor(name))
        except kinds as error:
            raise damaged(f"{name} from the TensorFlow checkpoint", error) from error

    return {name: tuple(shape) for name, shape in shapes.items() if name in numbers}, read
