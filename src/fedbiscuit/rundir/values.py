"""Plain values as JSON, in and out, and what differs between two of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbiscuit.types import IntegrityError

__all__ = ["dump_json", "first_difference", "leaves_of", "load_json", "plain"]

UNSAFE = re.compile("[\ud800-\udfff\u0085\u2028\u2029]")
"""Characters that break UTF-8 or that some readers take for the end of a line: written as escapes."""


def plain(value: Any, *, strict: bool = False, place: str = "") -> Any:
    """The value as JSON can hold it: tuples and sets become lists, a float that is not finite becomes null.

    ``strict`` is for what must come back as it was: a float that is not finite is an ``IntegrityError`` that names its
    key. A key that is no text, or a value of another type, is a ``TypeError``.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place or 'value'}: key {key!r} is not text; JSON would turn it into one")
        return {str(key): plain(item, strict=strict, place=f"{place}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, strict=strict, place=f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return plain(sorted(value), strict=strict, place=place)
    if isinstance(value, float) and not math.isfinite(value):
        if strict:
            raise IntegrityError(
                f"{place}: {value} cannot be saved; training has diverged, use a smaller learning rate"
            )
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{place or 'value'}: {type(value).__name__} is not a plain value; convert it first")


def dump_json(value: Any, indent: int | None = None) -> str:
    """JSON text in UTF-8 that every line reader takes for the same lines; keys in the order they have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def load_json(path: Path, data: bytes | bytearray, line: int | None = None) -> Any:
    """Strict JSON; what cannot be read is an ``IntegrityError`` that names file and line."""
    try:
        return strict_json(data)
    except RecursionError as error:
        raise IntegrityError(f"{path}: nested too deeply; this is not the file that was written") from error
    except ValueError as error:
        where = line if line is not None else getattr(error, "lineno", None)
        place = f"{path}:{where}" if where else f"{path}"
        why = getattr(error, "msg", None) or str(error)
        raise IntegrityError(
            f"{place}: cannot be read ({why}); take the file from a backup or write it again"
        ) from error


def strict_json(data: bytes | bytearray) -> Any:
    """JSON in UTF-8 without a key twice, NaN or infinity; else ``ValueError``, or ``RecursionError`` where it is too deep."""

    def no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(data.decode("utf-8"), object_pairs_hook=no_twice, parse_constant=no_constant)


def leaves_of(value: Any, place: str = "") -> dict[str, Any]:
    """``{"a": {"b": [1, 2]}}`` as ``{"a.b[0]": 1, "a.b[1]": 2}``, to name what differs."""
    if isinstance(value, Mapping) and value:
        parts = [leaves_of(item, f"{place}.{key}".lstrip(".")) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        parts = [leaves_of(item, f"{place}[{index}]") for index, item in enumerate(value)]
    else:
        return {place: value}
    return {key: item for part in parts for key, item in part.items()}


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Key, value before, value now of the first key that differs; None where all are the same."""
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in before or key not in after or before[key] != after[key]:
            was, now = (f"{table[key]!s:.80}" if key in table else "absent" for table in (before, after))
            return key, was, now
    return None
