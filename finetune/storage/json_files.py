"""JSON files: read within bounds, with errors that say where a file is wrong.

The files that this package writes are read with the same care: a disk may have damaged them, or
another program may have written them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeVar

from finetune.errors import InputError
from finetune.storage.files import DATA_LIMIT_BYTES, decode_utf8, read_bytes

OWN_LIMIT_BYTES = 64 << 20
"""Largest file of settings or results."""

MAX_WHOLE = 2**63 - 1
"""Largest integer that is read; SQLite, NumPy and TensorFlow hold no larger one."""

LargeIntegers = Literal["refuse", "float", "keep"]
"""What to do with a larger integer."""

_MAX_DEPTH = 100
_MAX_DIGITS = 1000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def parse_json(text: str, *, finite: bool = True, large_integers: LargeIntegers = "refuse") -> Any:
    """Parse a JSON text whose numbers and depth are within bounds.

    Args:
        text: the text.
        finite: refuse NaN, infinities and numbers that are too large for a float.
        large_integers: what to do with integers beyond 64 bits. An integer of more than 1,000
            digits is refused even if large ones are kept.

    Raises:
        ValueError: the text is not JSON, or not within the bounds; `json.JSONDecodeError` where the
            position is known.
    """
    odd: dict[str, Any] = {"parse_float": _finite, "parse_constant": _refuse} if finite else {}
    try:
        value = json.loads(text, parse_int=_WHOLE[large_integers], **odd)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_depth(value)
    return value


def _whole(digits: str) -> int:
    # Python refuses more than 4,300 digits with a message about its own settings.
    if len(digits) > 20 or abs(number := int(digits)) > MAX_WHOLE:
        raise ValueError(f"the number {digits[:20]}... is beyond 64 bits")
    return number


def _whole_or_float(digits: str) -> int | float:
    return float(digits) if len(digits) > 18 else int(digits)


def _any_whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:20]}... has more than {_MAX_DIGITS:,} digits")
    return int(digits)


_WHOLE = {"refuse": _whole, "float": _whole_or_float, "keep": _any_whole}


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _check_depth(value: Any) -> None:
    """Refuse values nested so deeply that Python could not always write or compare them."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for node in level:
            inner += node.values() if isinstance(node, dict) else node
        level = [node for node in inner if isinstance(node, (dict, list))]
        if not level:
            return
    raise ValueError("nested too deeply")


def load_json(
    path: str | os.PathLike[str],
    *,
    hint: str = "",
    what: str = "the questions",
    finite: bool = True,
    large_integers: LargeIntegers = "refuse",
    limit_bytes: int = DATA_LIMIT_BYTES,
) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Args:
        path: the file.
        hint: what the user should do if there is no such file.
        what: what the file holds, for that message.
        finite: see `parse_json`.
        large_integers: see `parse_json`.
        limit_bytes: largest file that is read.

    Raises:
        InputError: the file cannot be read, or is not JSON in UTF-8.
    """
    try:
        data = read_bytes(path, limit_bytes=limit_bytes).removeprefix(_BYTE_ORDER_MARK)
    except OSError as error:
        raise InputError(f"cannot read {what} ({error.strerror})", path=path, hint=hint) from error
    again = "make or fetch the file again"
    text = decode_utf8(data, path, hint=again)
    try:
        return parse_json(text, finite=finite, large_integers=large_integers)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON ({error.msg}, column {error.colno})",
            path=path,
            line=error.lineno,
            hint=again,
        ) from error
    except ValueError as error:
        raise InputError(f"not JSON ({error})", path=path, hint=again) from error


def load_object(
    path: str | os.PathLike[str],
    *,
    what: str,
    hint: str = "",
    finite: bool = True,
    large_integers: LargeIntegers = "refuse",
) -> dict[str, Any]:
    """Read a file of settings or results: a JSON object of moderate size.

    Args:
        path: the file.
        what: what the file holds, such as `the plan`.
        hint: what the user should do if it holds something else.
        finite: see `parse_json`; False for files that earlier versions may have written.
        large_integers: see `parse_json`; "float" for Hugging Face's files, where 10^30 means "no
            limit".

    Raises:
        InputError: the file cannot be read, or is not a JSON object.
    """
    values = load_json(
        path,
        hint=hint,
        what=what,
        finite=finite,
        large_integers=large_integers,
        limit_bytes=OWN_LIMIT_BYTES,
    )
    if not isinstance(values, dict):
        raise InputError(f"{_kind(values)}, not {what}: not a JSON object", path=path, hint=hint)
    return values


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """The content of a file of JSON lines.

    Attributes:
        values: the objects, in the file's order.
        damaged: number of lines that are not a JSON object. A last line that was cut short by a
            kill is not counted.
    """

    values: tuple[dict[str, Any], ...]
    damaged: int = 0


def load_json_lines(path: str | os.PathLike[str]) -> JsonLines:
    """Read a log with a JSON object on each line, and skip damaged lines.

    Raises:
        InputError: the file is far too large.
        OSError: the file cannot be read.
    """
    lines = read_bytes(path).split(b"\n")
    cut_short = lines.pop()  # Empty if the last line is complete.
    found: list[dict[str, Any]] = []
    damaged = 0
    for number, line in enumerate([*lines, cut_short], 1):
        try:
            value = parse_json(line.decode("utf-8"), finite=False)
        except ValueError:  # Not UTF-8, or not JSON.
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif number <= len(lines):
            damaged += 1
    return JsonLines(tuple(found), damaged)


def warn_of_damage(path: str | os.PathLike[str], damaged: int) -> None:
    """Log a warning that damaged lines were skipped, if there were any."""
    if damaged:
        lines = "a damaged line" if damaged == 1 else f"{damaged:,} damaged lines"
        _logger.warning("%s: passed over %s", os.fspath(path), lines)


def build(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Make a dataclass from the values of a JSON object; unknown keys are ignored.

    The types of fields are checked if they are `int`, `float`, `str`, `bool`, a union of these and
    None, or `Literal`.

    Example:
        >>> build(Schedule, {"effective_batch": 32, "rows": 32, "num_train_steps": 9, "seed": 0})

    Args:
        kind: the dataclass.
        values: values by the names of the fields.

    Raises:
        InputError: a value is missing, has another type, or is an integer beyond 64 bits.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{_kind(values)} instead of an object")
    fields = _fields(kind)  # type: ignore[arg-type]
    for name, (wanted, optional) in fields.items():
        if name not in values:
            if not optional:
                raise InputError(f"no {name!r}")
        elif not _fits(values[name], wanted):
            raise InputError(f"{name!r} is {str(values[name])[:40]!r}")
    return kind(**{name: value for name, value in values.items() if name in fields})


@functools.cache  # A ledger may have a hundred thousand rows.
def _fields(kind: type) -> dict[str, tuple[tuple[Any, ...], bool]]:
    """Return for each field its allowed types, or texts, and whether it has a default.

    The types are empty if they are not checked, see `build`.
    """
    found = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if typing.get_origin(hint) is typing.Literal:
            found[field.name] = typing.get_args(hint), optional
            continue
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        several = typing.get_args(hint) if union else (hint,)
        plain = (int, float, str, bool, type(None))
        wanted = several if all(one in plain for one in several) else ()
        found[field.name] = wanted, optional
    return found


def _fits(value: Any, wanted: tuple[Any, ...]) -> bool:
    if not wanted:
        return True
    if isinstance(wanted[0], str):
        return isinstance(value, str) and value in wanted
    # To Python, true is also an int.
    if isinstance(value, bool):
        return bool in wanted
    if isinstance(value, int):
        return (int in wanted or float in wanted) and abs(value) <= MAX_WHOLE
    return isinstance(value, wanted)


def get_whole(
    node: Mapping[str, Any], key: str, least: int, most: int, default: int | None = None
) -> int:
    """Return `node[key]` if it is an integer within bounds, or `default` without such a key.

    Raises:
        InputError: the value is not such an integer.
    """
    value = node.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{key!r} is {str(value)[:40]!r}, not an integer from {least} to {most:,}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


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
    """Return `node[key]` if it has the right type, or `default` without such a key.

    Args:
        node: a part of the file.
        key: the key.
        kind: type that the value must have.
        where: position of the part, for messages.
        path: the file, for messages.
        default: None if the key is required.
        hint: what the user should do if the file is wrong.

    Raises:
        InputError: the node is not an object, the key is missing, or the value has another type.
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
    """Return values as JSON; numbers that are not finite become null.

    JSON has no NaN and no infinity: most readers refuse a whole file because of one.

    Args:
        values: see `json.dumps`.
        indent: see `json.dumps`.
        sort_keys: see `json.dumps`.
        separators: see `json.dumps`.
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
