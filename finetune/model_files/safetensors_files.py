"""Hugging Face's safetensors files of BERT, one or several, under the original's names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

# Only for its types, which NumPy then knows: bfloat16 is one.
import ml_dtypes  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from finetune.errors import InputError
from finetune.storage.json_files import load_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Reader = tuple[Mapping[str, tuple[int, ...]], Callable[[str], np.ndarray]]
"""Shapes by name, and a function that returns the array of a name."""

_HINT = "get the model's folder again"
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
_LAYER_NORM_NAMES = {"weight": "gamma", "bias": "beta"}
# Prefixes of all names if the saved model was wrapped in another one.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.|auto_model\.|0\.)+")
_HEADS = {
    "classifier.weight": "output_weights",
    "classifier.bias": "output_bias",
    "qa_outputs.weight": "cls/squad/output_weights",
    "qa_outputs.bias": "cls/squad/output_bias",
}


def open_safetensors(path: Path) -> Reader:
    """Open a safetensors file, or the index of several.

    Args:
        path: `….safetensors`, or `….safetensors.index.json` beside the files that it names.

    Returns:
        Shapes by name, kernels as `[inputs, outputs]`, and a function that returns the array of a
        name.

    Raises:
        InputError: the file cannot be read, or two tensors are the same weight; the function raises
            it too.
    """
    parts: Mapping[Path, list[str] | None] = (
        dict(_parts(path)) if path.suffix == ".json" else {path: None}
    )
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, wanted in parts.items():
        for their_name, shape in _shapes(part, wanted).items():
            name = original_name(their_name)
            if name in places:
                raise InputError(
                    f"{their_name} and {places[name][1]} are the same weight", path=part, hint=_HINT
                )
            places[name] = part, their_name
            shapes[name] = shape[::-1] if name.endswith("kernel") else shape

    def read(name: str) -> np.ndarray:
        part, their_name = places[name]
        with _errors(part, f"cannot read {their_name}"), safe_open(part, "numpy") as file:
            kind = file.get_slice(their_name).get_dtype()
            if kind not in _WEIGHT_TYPES:
                raise InputError(
                    f"{their_name} is of type {kind}, not one of {', '.join(_WEIGHT_TYPES)}",
                    path=part,
                    hint="get the model in float32, float16 or bfloat16",
                )
            value = np.asarray(file.get_tensor(their_name))
        return np.ascontiguousarray(value.T) if name.endswith("kernel") else value

    return shapes, read


def _shapes(path: Path, wanted: Iterable[str] | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors, all or the wanted ones, by their names in the file."""
    with _errors(path, "cannot read the safetensors file"), safe_open(path, "numpy") as file:
        there = set(file.keys())
        missing = sorted(set(wanted or ()) - there)
        if missing:
            raise InputError(f"there is no {missing[0]}, which the index has here", path=path)
        names = sorted(there if wanted is None else set(wanted))
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _parts(index: Path) -> Mapping[Path, list[str]]:
    """Return the files that an index names, with the names of their tensors."""
    named = load_object(index, hint=_HINT, what="the index of the weights").get("weight_map")
    if not isinstance(named, dict) or not named:
        raise InputError("there is no weight_map in it", path=index, hint=_HINT)
    parts: dict[Path, list[str]] = {}
    for name, file in named.items():
        # The index must not name files outside of the folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith("safetensors"):
            raise InputError(f"{file!r:.60} is no file of the folder", path=index, hint=_HINT)
        if not (index.parent / file).is_file():
            raise InputError(f"{file} is missing", path=index, hint=_HINT)
        parts.setdefault(index.parent / file, []).append(name)
    return parts


@contextlib.contextmanager
def _errors(path: Path, what: str) -> Iterator[None]:
    # The library raises by the kind of damage; AttributeError for types that NumPy has not.
    try:
        yield
    except InputError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{what} ({error})", path=path) from error


def original_name(hugging_face_name: str) -> str:
    """Translate the name of a parameter of Hugging Face's BERT into the original's.

    Hugging Face's linear layers are `[outputs, inputs]`, the original's kernels the transpose. So a
    value must be transposed if the translated name ends in `kernel`.

    Example:
        >>> original_name("bert.encoder.layer.0.output.dense.weight")
        'bert/encoder/layer_0/output/dense/kernel'
    """
    plain = _WRAPPERS.sub("", hugging_face_name)
    if plain in _HEADS:
        return _HEADS[plain]
    name = plain.removeprefix("bert.").replace("encoder.layer.", "encoder.layer_")
    stem, _, kind = name.rpartition(".")
    if stem.startswith("embeddings.") and stem.endswith("_embeddings"):
        name = stem
    elif stem.endswith("LayerNorm"):
        name = f"{stem}.{_LAYER_NORM_NAMES.get(kind, kind)}"
    elif kind == "weight":
        name = f"{stem}.kernel"
    return f"bert/{name.replace('.', '/')}"
