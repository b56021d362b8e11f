"""Settings from YAML files and the words of a command line.

A file may extend another one, or be one of the original FedBiscuit, which is translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import to_json

from fedbiscuit.config.settings import Config, Section
from fedbiscuit.original import KEYS, is_original, translate
from fedbiscuit.schema import fields_at, problem, settings_of, shown
from fedbiscuit.strict_yaml import Document, KeyPath, parse_yaml, read_yaml
from fedbiscuit.types import ConfigError

__all__ = ["load_config", "load_settings", "load_translated", "parse_config"]

Places = dict[KeyPath, str]
"""Setting to the file and line, or the words, where it stands."""

S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings in a YAML file, with ``key=value`` or ``key value`` words of a command line on top.

    A file with the keys of the original FedBiscuit is translated; there its keys may stand on the command line too. Raises
    ``ConfigError`` that names the file and line, the key, the value and what is permitted; every problem that can be found
    at once has its own line.
    """
    return load_translated(path, overrides)[0]


def load_translated(path: str | Path, overrides: Sequence[str] = (), fill: str = "") -> tuple[Config, tuple[str, ...]]:
    """The same, and what to know about the translation of an old file, a line each; none for a file of ours.

    ``fill`` stands for a placeholder such as <choice_ckpt> in an old file's names.
    """
    value, places = _read(Path(path))
    return _resolve(value, places, str(path), overrides, fill)


def parse_config(text: str, overrides: Sequence[str] = (), name: str = "config") -> Config:
    """The same for a text; ``name`` stands for the file in error messages.

    >>> parse_config("seed: 3", ["selectors.rounds", "7"]).selectors.rounds
    7
    """
    return _resolve(*_placed(parse_yaml(text, name), name), name, overrides)[0]


def _placed(document: Document, name: str) -> tuple[dict[str, Any], Places]:
    """The settings of a document, and in words where each of them stands."""
    value = {} if document.value is None else document.value
    if not isinstance(value, dict):
        raise ConfigError(f"{name}:{document.lines[()]}: expected settings such as `seed: 0`, got {shown(value)}")
    return value, {path: f"{name}:{line}" for path, line in document.lines.items()}


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Places]:
    """The settings of a file; where it ``extends`` another one, that file's with its own on top."""
    value, places = _placed(read_yaml(path), str(path))
    if "extends" not in value or is_original(value):
        return value, places
    here, named = places.pop(("extends",)), value.pop("extends")
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{here}: extends: {shown(named)} is not the path of a config, seen from this file's folder")
    base, above = path.parent / named, (*above, path.resolve())
    if base.resolve() in above:
        raise ConfigError(f"{here}: extends: {named} is this file, or extends it in turn; remove one of the two")
    if not base.is_file():
        raise ConfigError(f"{here}: extends: there is no file {base}")
    under, under_places = _read(base, above)
    if is_original(under):
        raise ConfigError(
            f"{here}: extends: {named} has the keys of the original; write it in ours first: "
            f"`fedbiscuit config {base} > NEW.yaml`"
        )
    return _on_top(under, value), _places_under(under_places, value) | places


def _on_top(under: dict[str, Any], over: dict[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    """``over`` wins, setting by setting; a section in which it says nothing is the other's."""
    both = dict(under)
    for key, value in over.items():
        here = (*path, key)
        if not isinstance(under.get(key), dict) or fields_at(Config, here) is None:
            both[key] = value
        elif isinstance(value, dict):
            both[key] = _on_top(under[key], value, here)
        elif value is not None or here == ("policy_model",):
            both[key] = value
    return both


def _places_under(places: Places, over: Any, path: KeyPath = ()) -> Places:
    """``places`` without those of what ``over`` replaces."""
    section = fields_at(Config, path) is not None
    if section and over is None and path != ("policy_model",):
        return places
    if not section or not isinstance(over, dict):
        return {key: place for key, place in places.items() if key[: len(path)] != path}
    for key, value in over.items():
        places = _places_under(places, value, (*path, key))
    return places


def _resolve(
    value: dict[str, Any], places: Places, name: str, overrides: Sequence[str], fill: str = ""
) -> tuple[Config, tuple[str, ...]]:
    changes = list(_read_overrides(overrides))
    notes: tuple[str, ...] = ()
    if is_original(value):
        old_changes = [one for one in changes if not _is_ours(one[0])]
        value, places, notes = _translated(value, places, name, old_changes, fill)
        changes = [one for one in changes if _is_ours(one[0])]
    for path, new in changes:
        _put(value, path, new)
        places = {key: place for key, place in places.items() if key[: len(path)] != path}
        places[path] = "command line"
    changed = {".".join(path) for path, _ in changes}
    notes = tuple(note for note in notes if note.partition(":")[0] not in changed)
    return _checked(Config, _without_empty_sections(value), places, name), notes


def load_settings(model: type[S], path: Path) -> S:
    """The settings of a YAML file that is no config of a run, with the same checks and messages."""
    return _checked(model, *_placed(read_yaml(path), str(path)), str(path))


def _checked(model: type[S], value: dict[str, Any], places: Places, name: str) -> S:
    try:
        return model.model_validate_json(to_json(value, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        problems = dict.fromkeys(
            problem(model, dict(found), value, places, name) for found in error.errors(include_url=False)
        )
        raise ConfigError("\n".join(problems)) from None


def _is_ours(path: KeyPath) -> bool:
    """Whether a key of a command line is one of ours and none of the original's."""
    return path in settings_of(Config) and ".".join(path) not in KEYS


def _translated(
    value: dict[str, Any], places: Places, name: str, changes: Sequence[tuple[KeyPath, Any]], fill: str
) -> tuple[dict[str, Any], Places, tuple[str, ...]]:
    """An old file in our keys, where each comes from, and the notes."""
    for path, new in changes:
        section = value
        for key in path[:-1]:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[path[-1]] = new
        places[path] = "command line"
    found = translate(value, places, name, fill)
    here = {ours: f"{places.get(old, name)}: {'.'.join(old)}" for ours, old in found.sources.items()}
    return found.values, here, found.notes


def _read_overrides(words: Sequence[str]) -> Iterator[tuple[KeyPath, Any]]:
    """The settings in ``["a.b=1", "c", "2"]``: key path and value, by the same YAML rules as in a file."""
    seen: set[str] = set()
    rest = list(words)
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not re.fullmatch(r"[^\s.=-][^\s.=]*(\.[^\s.=]+)*", key):
            raise ConfigError(f"command line: {key!r} is not the name of a setting; write key=value, such as seed=1")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: {key}: no value; write {key}=VALUE")
            text = rest.pop(0)
        if key in seen:
            raise ConfigError(f"command line: {key}: given twice; remove one")
        seen.add(key)
        try:
            yield tuple(key.split(".")), parse_yaml(text, "value").value if text.strip() else ""
        except ConfigError as error:
            told = str(error).removeprefix("value:1: ").removeprefix("value: ")
            raise ConfigError(f"command line: {key}: {shown(text)}: {told}") from None


def _put(values: dict[str, Any], path: KeyPath, new: Any) -> None:
    """Set one value in the tree, making sections on the way."""
    if isinstance(new, dict) and fields_at(Config, path) is not None:
        raise ConfigError(
            f"command line: {'.'.join(path)}: this is a section; set its keys one by one, as section.key=value"
        )
    for end, key in enumerate(path[:-1], 1):
        if path[:end] in settings_of(Config) and settings_of(Config)[path[:end]].get("type") != "object":
            raise ConfigError(f"command line: {'.'.join(path)}: {'.'.join(path[:end])} is a setting, not a section")
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = new


def _without_empty_sections(values: Any, path: KeyPath = ()) -> Any:
    """A section without a line of its own (all commented out) has all its defaults."""
    if not isinstance(values, dict):
        return values
    result = {}
    for key, value in values.items():
        here = (*path, key)
        if value is not None or fields_at(Config, here) is None:
            result[key] = _without_empty_sections(value, here)
    return result
