"""YAML without surprises: plain values, each with its line, and no feature that can hide or build something.

Scalars follow the core schema of YAML 1.2 (``1e-5`` is a number; ``no``, ``off`` and ``12:30:45`` are texts; ``010`` is
ten). Tags, anchors and aliases are refused, a key that stands twice is an error, and size and depth are bounded. Only
the parser of PyYAML is used, never a constructor.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbiscuit.types import ConfigError

__all__ = ["Document", "KeyPath", "parse_yaml", "read_yaml", "scalar_text"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_DIGITS = 100

KeyPath = tuple[str, ...]
"""Where a value stands: the keys from the top, an item of a list by its number."""

NULL = re.compile(r"(?:|~|null|Null|NULL)")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
INF_NAN = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
BAD_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(?::[A-Za-z0-9_./-]+)*")
NOT_PLAIN = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


@dataclass(frozen=True)
class Document:
    """The value of a YAML text (dict, list, str, int, float, bool or None) and the line of every key and item."""

    value: Any
    lines: Mapping[KeyPath, int]


def read_yaml(path: Path) -> Document:
    """The document in a file: UTF-8, a regular file, at most 1 MiB.

    Raises ``ConfigError`` that starts with ``FILE:LINE:`` (or ``FILE:`` where there is no line).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path}: not a regular file; give a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give a config, such as configs/demo.yaml, or the folder of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; a config is a short text")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(
            f"{path}:1: this is UTF-16; save it as UTF-8, for example: iconv -f UTF-16 -t UTF-8 OLD > NEW"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """The document in a text; ``name`` stands in front of the line in error messages.

    >>> parse_yaml("lr: 1e-5", "x.yaml").value
    {'lr': 1e-05}
    """
    import yaml

    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES} bytes; a config is a short text")
    try:
        return _Reader(text, name).document()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_message(error, text, name)) from None


class _Reader:
    """Builds values from the events of PyYAML's parser."""

    def __init__(self, text: str, name: str) -> None:
        import yaml

        self.yaml = yaml
        self.name = name
        self.events: Any = yaml.SafeLoader(text)
        self.lines: dict[KeyPath, int] = {}

    def document(self) -> Document:
        """The one document of the text."""
        events, yaml = self.events, self.yaml
        events.get_event()  # start of stream
        value: Any = None
        if not events.check_event(yaml.StreamEndEvent):
            events.get_event()  # start of document
            value = self.value(events.get_event(), ())
            events.get_event()  # end of document
        if not events.check_event(yaml.StreamEndEvent):
            raise self.error(events.peek_event(), (), "a second document starts here; keep one document in a file")
        return Document(value, self.lines)

    def value(self, event: Any, path: KeyPath) -> Any:
        """What starts at this event; everything that is not plain is refused here."""
        yaml = self.yaml
        self.lines[path] = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise self.error(event, path, f"alias *{event.anchor} is not allowed; write the value out")
        if event.anchor is not None:
            raise self.error(
                event, path, f"anchor &{event.anchor} is not allowed; write the value out where it is used"
            )
        if event.tag is not None:
            raise self.error(event, path, f"tags are not allowed ({event.tag}); write a plain value")
        if len(path) > MAX_DEPTH:
            raise self.error(event, path[:2], f"nested too deeply; at most {MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        return self.mapping(path)

    def sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not self.events.check_event(self.yaml.SequenceEndEvent):
            items.append(self.value(self.events.get_event(), (*path, str(len(items)))))
        self.events.get_event()
        return items

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not self.events.check_event(self.yaml.MappingEndEvent):
            event = self.events.get_event()
            line = event.start_mark.line + 1
            if not isinstance(event, self.yaml.ScalarEvent):
                raise self.error(event, path, "a key must be a plain text")
            key = event.value
            here = (*path, key)
            self.check(event, here)
            if key in values:
                raise self.error(event, here, f"key stands twice, in lines {self.lines[here]} and {line}; remove one")
            values[key] = self.value(self.events.get_event(), here)
            self.lines[here] = line
        self.events.get_event()
        return values

    def scalar(self, event: Any, path: KeyPath) -> Any:
        self.check(event, path)
        text: str = event.value
        if event.style is not None:
            return text
        if NULL.fullmatch(text):
            return None
        if BOOL.fullmatch(text):
            return text.lower() == "true"
        if len(text) > MAX_DIGITS and (INT.fullmatch(text) or FLOAT.fullmatch(text)):
            raise self.error(event, path, f"a number of {len(text)} characters; at most {MAX_DIGITS}")
        if INT.fullmatch(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if FLOAT.fullmatch(text):
            return float(text)
        if INF_NAN.fullmatch(text):
            return float(text.replace(".", "", 1))
        return text

    def check(self, event: Any, path: KeyPath) -> None:
        if event.anchor is not None or event.tag is not None:
            raise self.error(event, path, "tags and anchors are not allowed; write a plain value")
        if bad := BAD_CHARACTER.search(event.value):
            shown = tuple(BAD_CHARACTER.sub("?", key) for key in path)
            raise self.error(event, shown, f"character U+{ord(bad[0]):04X} is not allowed; remove it")

    def error(self, event: Any, path: KeyPath, problem: str) -> ConfigError:
        key = f"{'.'.join(path)}: " if path else ""
        return ConfigError(f"{self.name}:{event.start_mark.line + 1}: {key}{problem}")


def _syntax_message(error: Exception, text: str, name: str) -> str:
    """One line for a text that is no YAML: what the parser met, where, and what to do."""
    position = getattr(error, "position", None)
    if position is not None:  # of the reader: a character that no YAML text may have
        line = text.count("\n", 0, position) + 1
        return f"{name}:{line}: character U+{ord(text[position]):04X} is not allowed; remove it"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    number = mark.line + 1 if mark else 1
    rows = text.split("\n")
    for row_number in (number, number - 1):  # where a tab spoils the indentation, the parser may stop a line later
        row = rows[row_number - 1] if 0 < row_number <= len(rows) else ""
        if "\t" in row[: len(row) - len(row.lstrip())] or "'\\t'" in str(error):
            return f"{name}:{row_number}: a tab where YAML wants spaces; use spaces"
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    what = f"{context}: {problem}" if context else problem
    return f"{name}:{number}: not valid YAML ({what}); check colons, quotes, brackets and indentation"


def scalar_text(value: str | int | float | bool | None) -> str:
    """A scalar as YAML that every reader, of YAML 1.1 too, understands as the same value.

    >>> scalar_text("no"), scalar_text(1e-5), scalar_text(" A"), scalar_text("configs/demo.yaml")
    ('"no"', '1.0e-05', '" A"', 'configs/demo.yaml')
    """
    if isinstance(value, str):
        if PLAIN.fullmatch(value) and value.lower() not in NOT_PLAIN:
            return value
        quoted = json.dumps(value, ensure_ascii=False)
        return re.sub("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]", lambda bad: f"\\u{ord(bad[0]):04x}", quoted)
    if isinstance(value, float) and not isinstance(value, bool):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e", 1)
    return json.dumps(value)
