"""JSON data files from outside: read with errors that say where the file is wrong."""

from __future__ import annotations

import json
import math
import os
from typing import Any, TypeVar

from finetune.errors import InputError

_T = TypeVar("_T")


def load_json(path: str | os.PathLike[str], *, hint: str, what: str = "the questions") -> Any:
    """Reads a JSON file, with or without a byte order mark.

    Args:
        path: the file.
        hint: what to do if there is no such file.
        what: what it holds, for that message.

    Raises:
        InputError: it cannot be read or is not JSON in UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON ({error.msg}, column {error.colno})",
            path=path,
            line=error.lineno,
            hint="fetch the file again",
        ) from error
    # Beside text that is not UTF-8, a ValueError is a number of too many digits.
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", path=path, hint="fetch the file again") from error
    except OSError as error:
        raise InputError(f"cannot read {what} ({error.strerror})", path=path, hint=hint) from error


def get_value(
    node: object,
    key: str,
    kind: type[_T],
    where: str,
    path: str | os.PathLike[str],
    default: _T | None = None,
    *,
    hint: str,
) -> _T:
    """Returns `node[key]` if it is of the right kind, or `default` if there is no such key.

    Args:
        node: a part of the file.
        key: what is wanted of it.
        kind: type that the value must have.
        where: the part's place, for messages.
        path: the file, for messages.
        default: None for a key that must be there.
        hint: what to do if the file is wrong.

    Raises:
        InputError: the node is not an object, or the key is missing or of another kind.
    """
    if not isinstance(node, dict):
        raise InputError(f"{where} is not an object", path=path, hint=hint)
    if key not in node and default is None:
        raise InputError(f"{where} has no {key!r}", path=path, hint=hint)
    value: Any = node.get(key, default)
    # To Python, true is also an int.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(
            f"{key!r} in {where} is {type(value).__name__}, not {kind.__name__}",
            path=path,
            hint=hint,
        )
    return value


def json_text(
    values: Any,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    separators: tuple[str, str] | None = None,
) -> str:
    """Returns values as JSON, where a number that is not finite is null.

    JSON has no NaN and no infinity: most readers refuse a whole file for one of them.

    Args:
        values: as for `json.dumps`, whose further arguments have the same meaning here.
        indent: as there.
        sort_keys: as there.
        separators: as there.
    """
    style: dict[str, Any] = {"indent": indent, "sort_keys": sort_keys, "separators": separators}
    try:
        return json.dumps(values, allow_nan=False, **style)
    except ValueError:
        return json.dumps(_with_nulls(values), allow_nan=False, **style)


def _with_nulls(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {key: _with_nulls(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_with_nulls(value) for value in values]
    return values
