"""Weights in and out: TensorFlow checkpoints of the original release, Hugging Face folders."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from safetensors import SafetensorError, safe_open

from finetune.checkpoint_files import other_checkpoints, preferred_checkpoints
from finetune.checkpoint_index import check_index
from finetune.errors import DamagedFileError, InputError
from finetune.modeling import Variables

_logger = logging.getLogger(__name__)

_HEAD_NAMES = frozenset(
    {"output_weights", "output_bias", "cls/squad/output_weights", "cls/squad/output_bias"}
)
_POOLER_PREFIX = "bert/pooler/"
_LAYER_NORM_NAMES = {"weight": "gamma", "bias": "beta"}


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
            `.safetensors` file, or a folder that holds one of them. In a folder that training
            left, the best weights come first if they were kept, then the newest checkpoint, see
            `finetune.checkpoint_files`. One that is damaged is passed over with a warning.

    Returns:
        A `.safetensors` file, or the prefix of a TensorFlow checkpoint.

    Raises:
        InputError: nothing is there, several checkpoints that are not steps of one training, or
            only a format that is not read, such as pickles.
        DamagedFileError: all checkpoints of the folder are damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
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
        for name in ("model.safetensors", "bert_model.ckpt"):
            found = path / name
            if found.is_file() or Path(f"{found}.index").is_file():
                return found
        readable = _first_readable(other_checkpoints(path))
        if readable is not None:
            return readable
        if (path / "pytorch_model.bin").is_file():
            raise InputError(
                "only pytorch_model.bin is there, a pickle, and pickles are never loaded",
                path=path,
                hint="get the model's model.safetensors",
            )
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
                # What belongs to a variable, as the optimizer's moments, is no weight.
                if name.rpartition("/")[0] not in shapes:
                    read(name)
        except DamagedFileError as error:
            _logger.warning("passing over a damaged checkpoint: %s", error)
            first_damage = first_damage or error
            continue
        return prefix
    if first_damage is not None:
        raise first_damage
    return None


def load_weights(variables: Variables, init_checkpoint: str | Path) -> LoadReport:
    """Set a model's variables from a checkpoint, one at a time.

    The encoder must be there in full; the pooler and the task head may be missing and then keep
    their values. A head of another shape (a different number of labels) counts as missing.

    Args:
        variables: the model; changed.
        init_checkpoint: see `find_checkpoint`.

    Returns:
        What was loaded and what was not.

    Raises:
        InputError: no such checkpoint, it cannot be read, an encoder variable is missing, or a
            shape differs (as when the configuration or vocabulary belongs to another model).
    """
    source = find_checkpoint(init_checkpoint)
    opened = open_safetensors if source.suffix == ".safetensors" else open_tf_checkpoint
    names, read = opened(source)
    loaded, initialised = [], []
    for name, variable in variables.items():
        optional = name in _HEAD_NAMES or name.startswith(_POOLER_PREFIX)
        shape = names.get(name)
        wanted = tuple(variable.shape)
        if shape == wanted:
            variable.assign(np.asarray(read(name), np.float32))
            loaded.append(name)
        elif shape is None and optional:
            initialised.append(name)
        elif shape is None:
            raise InputError(
                f"the checkpoint has no {name}",
                path=source,
                hint="is its configuration file the one that belongs to it?",
            )
        elif name in _HEAD_NAMES:
            initialised.append(name)
        else:
            raise InputError(
                f"{name} has shape {list(shape)} in the checkpoint but {list(wanted)} by the "
                "configuration",
                path=source,
                hint="use the configuration and vocabulary that belong to this checkpoint",
            )
    unused = sorted(set(names) - set(loaded))
    return LoadReport(source, tuple(loaded), tuple(initialised), tuple(unused))


_Reader = tuple[Mapping[str, tuple[int, ...]], Callable[[str], np.ndarray]]


def open_tf_checkpoint(prefix: Path, *, hint: str = "fetch or export it again") -> _Reader:
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


def open_safetensors(path: Path) -> _Reader:
    """Open a safetensors file of Hugging Face's BERT, under the original's names.

    Args:
        path: the file.

    Returns:
        Shapes by name, kernels as `[inputs, outputs]`, and a function from a name to its array.

    Raises:
        InputError: it cannot be read; the function raises it too.
    """
    try:
        file = safe_open(path, framework="numpy")
        theirs = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read the safetensors file ({error})", path=path) from error
    by_name = {original_name(name): name for name in theirs}
    shapes = {}
    for name, their_name in by_name.items():
        shape = tuple(file.get_slice(their_name).get_shape())
        shapes[name] = shape[::-1] if name.endswith("kernel") else shape

    def read(name: str) -> np.ndarray:
        try:
            value = np.asarray(file.get_tensor(by_name[name]))
        except (SafetensorError, TypeError) as error:
            raise InputError(f"cannot read {by_name[name]} ({error})", path=path) from error
        return np.ascontiguousarray(value.T) if name.endswith("kernel") else value

    return shapes, read


def original_name(hugging_face_name: str) -> str:
    """Translate a parameter's name in Hugging Face's BERT into the original's.

    Their linear layers hold `[outputs, inputs]`, the original's kernels the transpose; a name
    that ends in `kernel` says that the value is to be transposed.
    """
    heads = {
        "classifier.weight": "output_weights",
        "classifier.bias": "output_bias",
        "qa_outputs.weight": "cls/squad/output_weights",
        "qa_outputs.bias": "cls/squad/output_bias",
    }
    if hugging_face_name in heads:
        return heads[hugging_face_name]
    name = hugging_face_name.removeprefix("bert.").replace("encoder.layer.", "encoder.layer_")
    stem, _, kind = name.rpartition(".")
    if stem.startswith("embeddings.") and stem.endswith("_embeddings"):
        name = stem
    elif stem.endswith("LayerNorm"):
        name = f"{stem}.{_LAYER_NORM_NAMES.get(kind, kind)}"
    elif kind == "weight":
        name = f"{stem}.kernel"
    return f"bert/{name.replace('.', '/')}"
