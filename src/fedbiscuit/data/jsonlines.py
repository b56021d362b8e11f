"""Bytes to JSON objects, strictly: bounded lines, bounded depth, no surprises in keys, numbers or texts.

People's files come from everywhere, so whatever is not plain JSON lines in UTF-8 is refused with its line and key
instead of being guessed at. Nothing here knows what a comparison is.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import stat
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedbiscuit.data.visible import HIDDEN
from fedbiscuit.types import DataError

__all__ = [
    "BLOCK_BYTES",
    "MAX_DEPTH",
    "MAX_LINE_BYTES",
    "check_texts",
    "is_array",
    "iter_array",
    "iter_lines",
    "iter_objects",
    "shown",
]

MAX_LINE_BYTES = 1 << 20
"""Longest line, in bytes after decompression. A file is never held in memory beyond this and one block."""
MAX_ARRAY_BYTES = 1 << 29
"""Longest file that is one JSON array, after decompression: such a file is held in memory."""
MAX_DEPTH = 64
"""Deepest nesting of objects and lists in one record."""

BLOCK_BYTES = 1 << 18
_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_SPACE = re.compile(r"[ \t\r\n]*")
_BAD_CHARACTERS = re.compile("[\x00\ud800-\udfff]")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+\\?+(?:"|\Z)|([\[{])|([\]}])', re.DOTALL)


def iter_objects(path: str | Path, digest: Any = None) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The line number (from 1) and the JSON object of every line that is not blank; blank lines only count.

    A broken line is a value, a ``DataError`` without the place, so that a caller may go on; where the rest of the file
    cannot be read either it is the last value. ``digest``, if given, is a ``hashlib`` object that is fed with the bytes
    of the file as it lies on the disk and is complete when the iterator is exhausted. Raises ``DataError`` when the
    file cannot be opened or holds nothing.
    """
    empty = True
    for number, line in iter_lines(path, digest):
        if isinstance(line, bytes):
            if not line.strip():
                continue
            other = _other_format(path, line) if empty else None
            empty = False
            if other:
                yield number, DataError(other)
                return
            try:
                yield number, _parse(_decode(line))
            except DataError as error:
                yield number, error
        else:
            empty = False
            yield number, line
    if empty:
        raise DataError(f"{path}: the file is empty; expected one JSON object a line")


def is_array(path: str | Path) -> bool:
    """Whether the first character of a file says that it is one JSON array."""
    with _open(path, hashlib.sha256()) as stream:
        return bool(stream.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


def iter_array(path: str | Path, digest: Any = None) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The objects of a file that is one JSON array, each with the line (from 1) on which it starts.

    As strict as ``iter_objects``; a fault is the last value, since nothing behind it can be trusted.
    """
    with _open(path, hashlib.sha256() if digest is None else digest) as stream:
        try:
            raw = stream.read(MAX_ARRAY_BYTES + 1)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            yield 1, DataError(f"the compressed file is damaged ({error}); copy or compress it again")
            return
        if len(raw) > MAX_ARRAY_BYTES:
            yield 1, DataError(f"an array of more than {MAX_ARRAY_BYTES} bytes; write one JSON object a line")
            return
    line, seen = 1, 0
    try:
        text = _decode(raw.removeprefix(b"\xef\xbb\xbf"))
        at = _space(text, _space(text, 0) + 1)
        while text[at : at + 1] != "]":
            line, seen = line + text.count("\n", seen, at), at
            value, at = _DECODER.raw_decode(text, at)
            if not isinstance(value, dict):
                raise DataError(f"expected objects in the array, got {shown(value)}")
            _check_values(value, "")
            yield line, value
            at = _space(text, at)
            if text[at : at + 1] == ",":
                at = _space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise DataError("the array goes on without a comma or ends early; copy the file again")
    except json.JSONDecodeError as error:
        yield (
            line,
            DataError(f"not JSON ({error.msg}, column {error.colno} of line {error.lineno}); copy the file again"),
        )
    except RecursionError:
        yield line, DataError("nested too deeply; a comparison is one flat object")
    except DataError as error:
        yield line, error
    except ValueError:
        yield line, DataError("a number has too many digits; write it as text or leave it out")


def _space(text: str, at: int) -> int:
    """Where the white space that begins at ``at`` ends."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _other_format(path: str | Path, first: bytes) -> str | None:
    """What to do with a file whose first line says that it is no JSON lines at all."""
    if (first.lstrip().startswith(b"[") and not first.rstrip().endswith(b"]")) or first.lstrip().startswith(b"[{"):
        return f"a JSON array, not one JSON object a line; convert it: jq -c '.[]' {path} > NEW.jsonl"
    if re.search(r"\.[ct]sv(\.gz)?\Z", str(path)) and not first.lstrip().startswith(b"{"):
        return "a table, not JSON lines; convert it, as pandas does: read_csv(FILE).to_json(NEW, orient='records', lines=True)"
    return None


def iter_lines(path: str | Path, digest: Any = None) -> Iterator[tuple[int, bytes | DataError]]:
    """The number and the bytes of every line; a line ends with LF, CRLF or CR, and with nothing else.

    So a U+2028 inside a text does not end a line. A gzip or xz file is recognized by its first bytes. A byte order mark is
    dropped. A line over ``MAX_LINE_BYTES`` is a ``DataError``, and reading goes on behind it.
    """
    with _open(path, hashlib.sha256() if digest is None else digest) as stream:
        number = 0
        try:
            start = stream.peek(4)[:4]
            if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in start[:2]:
                yield 1, DataError(f"looks like UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW")
                return
            for number, line in _split(stream):
                if line is None:
                    yield number, DataError(f"line longer than {MAX_LINE_BYTES} bytes; shorten its texts")
                else:
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except EOFError:
            yield number + 1, DataError("the compressed file ends early; copy or compress it again")
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            yield number + 1, DataError(f"the compressed file is damaged ({error}); copy or compress it again")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def shown(value: object, limit: int = 60) -> str:
    """A value as it may be shown on a terminal or page: quoted, short, invisible and control characters escaped.

    >>> shown("abc\\u202edef")
    "'abc\\\\u202edef'"
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        if isinstance(value, dict | list):
            return "an object" if isinstance(value, dict) else "a list"
        return "a huge number" if isinstance(value, int) and value.bit_length() > 64 else repr(value)
    text = value if len(value) <= limit else value[:limit] + "..."
    return "'" + "".join(_visible(character) for character in text) + "'"


def _visible(character: str) -> str:
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    if unicodedata.category(character) in HIDDEN:
        return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
    return character


class _HashedReader(io.RawIOBase):
    """Feeds a digest with every byte that is read: what is used and what is written down are the same bytes."""

    def __init__(self, raw: io.RawIOBase | io.BufferedReader, update: Callable[[Any], object]) -> None:
        self._raw = raw
        self._update = update

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer)) or b""
        self._update(data)
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _open(path: str | Path, digest: Any) -> Iterator[Any]:
    """A regular file, opened without waiting, so that a FIFO or a device is refused instead of hanging."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        kind = os.stat(path)
        descriptor = os.open(path, flags) if stat.S_ISREG(kind.st_mode) else -1
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; the path is relative to {Path.cwd()}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(str(path), 200)}: cannot be opened: {reason}") from error
    if descriptor < 0 or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        if descriptor >= 0:
            os.close(descriptor)
        is_folder = stat.S_ISDIR(kind.st_mode)
        raise DataError(
            f"{path}: {'a folder; name the files in it' if is_folder else 'not a regular file; copy it into one'}"
        )
    with open(descriptor, "rb") as file:
        stream = io.BufferedReader(_HashedReader(file, digest.update), BLOCK_BYTES)
        packed = stream.peek(2)[:2] == _GZIP
        if stream.peek(6)[:6] == _XZ:
            with lzma.LZMAFile(stream) as unpacked:
                yield io.BufferedReader(unpacked, BLOCK_BYTES)
            return
        if not packed and str(path).endswith(".gz") and stream.peek(1):
            raise DataError(f"{path}: named .gz but not a gzip file; rename or compress it")
        yield io.BufferedReader(gzip.GzipFile(fileobj=stream), BLOCK_BYTES) if packed else stream


def _split(stream: Any) -> Iterator[tuple[int, bytes | None]]:
    """Lines without their ends, ``None`` for one that is too long; memory stays below two blocks and a line."""
    number, rest, too_long = 0, b"", False
    while block := stream.read(BLOCK_BYTES):
        text = rest + block
        half = b"\r" if text.endswith(b"\r") else b""  # maybe the first half of a CRLF: look again with the next block
        whole = text[: len(text) - len(half)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = whole.split(b"\n")
        for line in lines:
            number += 1
            yield number, None if too_long or len(line) > MAX_LINE_BYTES else line
            too_long = False
        if too_long or len(rest) > MAX_LINE_BYTES:
            too_long, rest = True, b""
        rest += half
    rest = rest.removesuffix(b"\r")
    if rest or too_long:
        yield number + 1, None if too_long else rest


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1}: not UTF-8 (0x{line[error.start]:02x}); save the file in the encoding UTF-8"
        ) from None


def _parse(text: str) -> dict[str, Any]:
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise DataError(f"nested too deeply (over {MAX_DEPTH} levels); a comparison is one flat object")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            problem = "more text after the record; write one JSON object a line"
        elif text.strip() in {"[", "{"}:
            problem = "the record goes on in the next line; write one JSON object a line (jq -c does that)"
        else:
            problem = f"not JSON ({error.msg}); write one JSON object a line"
        raise DataError(f"column {error.colno}: {problem}") from None
    except RecursionError:
        raise DataError("nested too deeply; a comparison is one flat object") from None
    except ValueError:
        raise DataError("a number has too many digits; write it as text or leave it out") from None
    if not isinstance(value, dict):
        raise DataError(f'expected one JSON object a line, such as {{"prompt": ...}}, got {shown(value)}')
    _check_values(value, "")
    return value


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings; one linear pass that cannot overflow a stack."""
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        if match[1]:
            depth += 1
            deepest = max(deepest, depth)
        elif match[2]:
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{shown(twice)}: duplicate key; keep one of the two values")
    return record


def check_texts(value: Any, where: str = "") -> None:
    """Raise ``DataError`` where a text in a row, at any depth, has a NUL or half of a character."""
    _check_values(value, where, numbers=False)


def _check_values(value: Any, where: str, numbers: bool = True) -> None:
    if isinstance(value, str):
        found = _BAD_CHARACTERS.search(value)
        if found:
            what = "NUL character" if found[0] == "\x00" else f"half of a character ({shown(found[0])})"
            raise DataError(f"{where}: {what} at position {found.start() + 1}; remove it from the text")
    elif isinstance(value, float):
        if numbers and not math.isfinite(value):
            raise DataError(f"{where}: {value} is not a finite number; NaN, Infinity and 1e400 are no JSON numbers")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(key, f"key {shown(key)}", numbers)
            _check_values(item, f"{where}.{key}" if where else key, numbers)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_values(item, f"{where}[{i}]", numbers)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
