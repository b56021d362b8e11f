"""What a pydantic model permits, and what it found wrong, in words that a user can act on.

A line says where (file and line), which key, which value, what is permitted, and what was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from fedbiscuit.strict_yaml import KeyPath, scalar_text

__all__ = ["fields_at", "permitted", "problem", "sections", "settings_of", "shown"]


def problem(
    model: type[BaseModel], error: dict[str, Any], values: Any, places: Mapping[KeyPath, str], name: str
) -> str:
    """One line for one error of pydantic."""
    path = tuple(map(str, error["loc"]))
    if error["type"] == "together":
        path, told = tuple(error["ctx"]["key"].split(".", 2)), error["ctx"]["problem"]
        return f"{_place(path, places, name)}: {error['ctx']['key']}: {told}"
    if error["type"] == "extra_forbidden":
        return f"{_place(path, places, name)}: {'.'.join(path)}: unknown key; {_nearest(model, path)}"
    value: Any = values
    shown_path: KeyPath = ()
    for key in path:  # as far into the value as it goes: into lists and groups, not into the branches of a union
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            break
        shown_path = (*shown_path, key)
    told = f"{shown(value)} is not permitted" if value is not None else "no value"
    wanted = f"it must be {permitted(model, shown_path)}{_hint(model, value, shown_path)}"
    return f"{_place(shown_path, places, name)}: {'.'.join(shown_path)}: {told}; {wanted}"


def _place(path: KeyPath, places: Mapping[KeyPath, str], name: str) -> str:
    """FILE:LINE of a key, or of the nearest section above it that is written somewhere."""
    above = (path[:end] for end in range(len(path), 0, -1))
    return next((places[key] for key in above if key in places), name)


def _nearest(model: type[BaseModel], path: KeyPath) -> str:
    """The valid key that was probably meant: in the same section first, then anywhere."""
    section, key = path[:-1], path[-1]
    own = list(fields_at(model, section) or ())
    if close := difflib.get_close_matches(key, own, 1, 0.7):
        return f"did you mean {close[0]}?"
    first: dict[type[BaseModel], KeyPath] = {}  # a kind of section that stands twice is told once
    for where, kind in sections(model):
        first.setdefault(kind, where)
    known = [(*where, name) for kind, where in first.items() for name in kind.model_fields]
    names = {name[-1] for name in known}
    for wanted in [key, *difflib.get_close_matches(key, names, 1, 0.75)]:
        if elsewhere := [".".join(name) for name in known if name[-1] == wanted]:
            return f"did you mean {' or '.join(elsewhere[:4])}?"
    return f"known here: {', '.join(own)}" if own else "see `fedbiscuit config --help`"


def _hint(model: type[BaseModel], value: Any, path: KeyPath) -> str:
    """What to write instead, where the value shows it."""
    schema = _schema_at(model, path)
    words = [word for word in schema.get("enum", ()) if isinstance(word, str)]
    if isinstance(value, str) and (close := difflib.get_close_matches(value, words, 1)):
        return f"; did you mean {close[0]}?"
    if schema.get("type") == "boolean" and str(value).lower() in ("yes", "no", "on", "off", "y", "n", "0", "1"):
        return f"; write {'true' if str(value).lower() in ('yes', 'on', 'y', '1') else 'false'}"
    if schema.get("type") == "integer" and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if schema.get("type") == "string" and isinstance(value, int | float):
        return "; put it in quotes"
    return ""


def shown(value: Any) -> str:
    """A value in a message: short, and as YAML would have it."""
    text = scalar_text(value) if isinstance(value, int | float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What is permitted: read off the JSON schema, which pydantic makes from the sections above

PATTERNS = {
    r"^[a-z0-9][a-z0-9._-]{0,63}$": "1 to 64 of the characters a-z 0-9 . _ -, starting with a letter or digit",
    r"^(nf4:)?[0-9a-f]{64}$": "the digest of a model, 64 of 0-9 a-f",
    r"^(auto|cpu|mps|cuda(:\d+)?)$": "auto, cpu, mps, cuda or cuda:NUMBER",
}


def sections(model: type[BaseModel], path: KeyPath = ()) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    """Every section with its path, the top (no path) first."""
    yield path, model
    for key, info in model.model_fields.items():
        for inner in (info.annotation, *get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from sections(inner, (*path, key))


@cache
def settings_of(model: type[BaseModel]) -> dict[KeyPath, dict[str, Any]]:
    """Setting (not section) -> its part of the JSON schema."""
    whole = model.model_json_schema()
    parts = {model.__name__: whole, **whole.get("$defs", {})}
    inner = dict(sections(model))
    return {
        (*path, key): part
        for path, section in inner.items()
        for key, part in parts[section.__name__]["properties"].items()
        if (*path, key) not in inner
    }


def fields_at(model: type[BaseModel], path: KeyPath) -> Sequence[str] | None:
    """The keys of a section, or None where the path is no section."""
    section = dict(sections(model)).get(path)
    return None if section is None else list(section.model_fields)


def _schema_at(model: type[BaseModel], path: KeyPath) -> dict[str, Any]:
    """The schema of a setting, or of an item inside a list or a group; empty for a section."""
    setting = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in settings_of(model)), ())
    schema = settings_of(model).get(setting, {})
    for key in path[len(setting) :] if setting else ():
        parts = [schema, *schema.get("anyOf", ())]
        items = [part["prefixItems"][int(key)] for part in parts if "prefixItems" in part and key.isdigit()]
        items += [part[name] for part in parts for name in ("items", "additionalProperties") if part.get(name)]
        schema = items[0] if items else schema
    return schema


def permitted(model: type[BaseModel], path: KeyPath) -> str:
    """What a value may be, in words: "a whole number from 1 to 1000000000"."""
    return _in_words(_schema_at(model, path)) if _schema_at(model, path) else "a section: keys and values, indented"


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_in_words(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        words = [str(word) for word in schema.get("enum", [schema.get("const")])]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _range_in_words(schema)
    if kind == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} items, each {_in_words(schema['prefixItems'][0])}"
        return f"a list, each item {_in_words(schema['items'])}"
    if kind == "object":
        return f"keys, each with {_in_words(schema.get('additionalProperties', {}))}"
    if kind == "string" and "pattern" in schema:
        return PATTERNS.get(schema["pattern"], f"a text like {schema['pattern']}")
    return {"boolean": "true or false", "string": "a text", "null": "null"}.get(str(kind), "a value")


def _range_in_words(schema: Mapping[str, Any]) -> str:
    whole = schema["type"] == "integer"
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if whole and below is not None:
        high, below = below - 1, None
    bounds = [
        ("from", schema.get("minimum")),
        ("above", schema.get("exclusiveMinimum")),
        ("to" if "minimum" in schema else "and at most", high),
        ("and below", below),
    ]
    said = [f"{word} {bound if whole else format(bound, '.12g')}" for word, bound in bounds if bound is not None]
    return " ".join(["a whole number" if whole else "a number", *said])
