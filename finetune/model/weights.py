"""Reading weights: TensorFlow checkpoints of the original release, Hugging Face's folders."""

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
"""Constants that Hugging Face's folders store beside the weights: 0, 1, 2 …, and zeros."""

_CONFIG_HINT = "is its configuration file the one that belongs to it?"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHER_FORMATS = ("tf_model.h5", "flax_model.msgpack", "adapter_model.safetensors", "model.onnx")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Which weights were loaded, and which were not.

    Attributes:
        source: the checkpoint that was read.
        loaded: names of the variables that were set from the checkpoint.
        initialised: names of the variables that the checkpoint does not have, and that keep their
            values.
        unused: names of the checkpoint's tensors that the model does not have.
    """

    source: Path
    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    unused: tuple[str, ...]


def find_checkpoint(path: str | Path) -> Path:
    """Find the weights that a path stands for.

    Args:
        path: the prefix of a TensorFlow checkpoint (`bert_model.ckpt`), its `.index` file, a
            `.safetensors` file or the index of several, or a folder with one of these. In the
            output folder of a training the best weights come first, if they were kept, and then the
            newest checkpoint, see `finetune.model_files.checkpoint_files`. A damaged checkpoint is
            skipped with a warning.

    Returns:
        A `.safetensors` file, the index of several, or the prefix of a TensorFlow checkpoint.

    Raises:
        InputError: there are no weights, only weights in a format that is not read, such as
            pickles, or several checkpoints that are not steps of one training.
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
    """Return the first checkpoint whose weights can all be read; None without checkpoints.

    Raises:
        DamagedFileError: no checkpoint can be read; the error is that of the first.
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

    The checkpoint must have the whole encoder. Pooler and task head may be missing, and then keep
    their values. A head of another shape (for another number of labels) counts as missing.

    Example:
        >>> variables = create_variables(config, "squad")
        >>> load_weights(variables, "uncased_L-12_H-768_A-12").initialised
        ('cls/squad/output_weights', 'cls/squad/output_bias')

    Args:
        variables: the model; changed.
        init_checkpoint: see `find_checkpoint`.
        with_head: load the task head too.

    Returns:
        Which weights were loaded, and which were not.

    Raises:
        InputError: there is no such checkpoint, it cannot be read, model or checkpoint has a
            variable of the encoder that the other has not, or a shape differs (as if the
            configuration or the vocabulary belongs to another model).
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
    """Open the weights that `find_checkpoint` has found.

    Returns:
        Shapes by name, and a function that returns the array of a name.

    Raises:
        InputError: the weights cannot be read.
    """
    if source.suffix in (".safetensors", ".json"):
        return open_safetensors(source)
    return open_tf_checkpoint(source)


def check_encoder(source: Path, there: Collection[str], placed: Collection[str]) -> None:
    """Check that the model has all variables of a checkpoint's encoder.

    Without them it would compute something else.

    Args:
        source: the checkpoint.
        there: names of the checkpoint's tensors.
        placed: names of the model's variables.

    Raises:
        InputError: a variable of the checkpoint's encoder is not in the model.
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
    """Return whether a tensor is an optimizer's state of a variable.

    The name of such a tensor begins with the name of the variable, as in `output_bias/adam_m`.

    Args:
        name: name of the tensor.
        there: all names of the checkpoint.
    """
    return name.rpartition("/")[0] in there


def missing_weight(source: Path, name: str, there: Collection[str]) -> InputError:
    """Make the error for a checkpoint without a weight, or without any weight of BERT."""
    if not any(name.startswith(_ENCODER_PREFIXES) for name in there):
        found = ", ".join(sorted(there)[:2]) or "nothing"
        return InputError(f"there are no weights of BERT in it, but {found}", path=source)
    return InputError(f"the checkpoint has no {name}", path=source, hint=_CONFIG_HINT)


def open_tf_checkpoint(prefix: Path, *, hint: str = "fetch or export it again") -> Reader:
    """Open a TensorFlow checkpoint.

    Args:
        prefix: name of the checkpoint's files without `.index`.
        hint: what the user should do if it cannot be read.

    Returns:
        Shapes by name of the tensors that hold numbers, and a function that returns the array of a
        name.

    Raises:
        DamagedFileError: the checkpoint cannot be read; the function raises it too.
    """

    def damaged(what: str, error: Exception) -> DamagedFileError:
        return DamagedFileError(f"cannot read {what} ({error})", path=prefix, hint=hint)

    numbers = check_index(prefix, hint=hint)
    # What TensorFlow's reader raises depends on the damage: OpError or Python's own exceptions.
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
