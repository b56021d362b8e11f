"""One JSON object to one comparison, in both shapes, with an error that names the key, the value and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedbiscuit.data.jsonlines import shown
from fedbiscuit.types import Comparison, DataError, seed_for

__all__ = ["EmptyTextError", "LeftOutError", "client_of", "comparison_of", "pair_of", "required_text", "text_of"]

MAX_CLIENT_CHARACTERS = 200
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
COMMON_KEYS = ("prompt", "client", "split", "id", "domain", "meta")
AB_KEYS = ("output_a", "output_b", "choice")
RANKED_KEYS = ("chosen", "rejected")

Turns = list[tuple[str, str]]
"""(role, text) of each message of a chat."""


class EmptyTextError(DataError):
    """A prompt or an answer without any visible text; `drop_empty` leaves such comparisons out instead."""


class LeftOutError(DataError):
    """A record of a public set that is no comparison; the message is the reason, by which such records are counted."""


def comparison_of(record: Mapping[str, Any]) -> Comparison:
    """The comparison in a record {prompt, output_a, output_b, choice, ...} or {prompt, chosen, rejected, ...}.

    Texts may be chat messages [{role, content}, ...]: several turns become one text, ``User: ...``, ``Assistant: ...``;
    ``chosen`` and ``rejected`` may repeat the prompt's messages, and then need no ``prompt``. Which of chosen and
    rejected is shown as A depends on a hash of the texts only: half and half, and the same whichever is preferred.
    Raises ``DataError("KEY: problem; what to do")`` without a place.
    """
    ranked = _shape_is_ranked(record)
    first_key, second_key = RANKED_KEYS if ranked else AB_KEYS[:2]
    prompt, first, second = _texts(record, first_key, second_key)
    choice: Literal[0, 1] = 0 if ranked else _choice(record)
    comparison = Comparison(
        prompt,
        first,
        second,
        choice,
        client=client_of(record),
        domain=_optional_text(record, "domain"),
        id=_optional_text(record, "id"),
        split=_split_of(record),
        meta=_meta(record),
    )
    for key, text in (("prompt", prompt), (first_key, first), (second_key, second)):
        if not text.strip():
            raise EmptyTextError(f"{key}: empty; fill it in, or leave such comparisons out with drop_empty")
    return comparison.swapped() if ranked and _chosen_is_b(comparison) else comparison


def pair_of(comparison: Comparison) -> tuple[str, str, str]:
    """Prompt and both answers, the answers in sorted order: the same for a comparison and its swapped twin."""
    a, b = comparison.output_a, comparison.output_b
    return (comparison.prompt, a, b) if a <= b else (comparison.prompt, b, a)


def text_of(record: Mapping[str, Any], key: str) -> str:
    """The text under a key, which may be chat messages: several turns become one text."""
    value = record.get(key)
    return _rendered(_turns(value, key)) if isinstance(value, list) else required_text(record, key)


def required_text(record: Mapping[str, Any], key: str, where: str = "") -> str:
    """The text under a key; ``where`` is put before the key in the error's name, such as ``info.``."""
    value = record.get(key)
    if not isinstance(value, str):
        if key not in record:
            raise DataError(
                f"{where}{key}: expected text, got nothing (the key is missing); add it, or look whether this is the file that "
                "was meant"
            )
        raise DataError(f"{where}{key}: expected text, got {shown(value)}; write it in quotes")
    return value


def _shape_is_ranked(record: Mapping[str, Any]) -> bool:
    known = COMMON_KEYS + AB_KEYS + RANKED_KEYS
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else "put what you want to keep under `meta`"
            raise DataError(f"{shown(key)}: unknown key; {hint}")
    ranked, ab = [[key for key in keys if key in record] for keys in (RANKED_KEYS, AB_KEYS)]
    if ranked and ab:
        raise DataError(
            f"{ab[0]}: cannot stand beside {ranked[0]!r}; use output_a, output_b, choice or chosen, rejected"
        )
    return bool(ranked)


def _texts(record: Mapping[str, Any], first_key: str, second_key: str) -> tuple[str, str, str]:
    """Prompt and both answers as texts."""
    first_before, first = _answer(record, first_key)
    second_before, second = _answer(record, second_key)
    if first_before != second_before:
        raise DataError(
            f"{second_key}: its messages before the answer differ from those of {first_key!r}; they must agree"
        )
    prompt = record.get("prompt")
    if "prompt" not in record and first_before:
        return _rendered(first_before), first, second
    turns = _turns(prompt, "prompt") if isinstance(prompt, list) else [("user", required_text(record, "prompt"))]
    if first_before and first_before != turns and _rendered(first_before) != _rendered(turns):
        raise DataError(f"{first_key}: its messages before the answer are not those of 'prompt'; they must agree")
    return _rendered(turns), first, second


def _answer(record: Mapping[str, Any], key: str) -> tuple[Turns, str]:
    """The messages before the answer, none for a plain text, and the answer."""
    value = record.get(key)
    if not isinstance(value, list):
        return [], required_text(record, key)
    turns = _turns(value, key)
    if turns[-1][0] != "assistant":
        raise DataError(
            f"{key}: the last message is from {turns[-1][0]!r}; the answer must be the last, from 'assistant'"
        )
    return turns[:-1], turns[-1][1]


def _turns(messages: Sequence[Any], key: str) -> Turns:
    turns: Turns = []
    for i, message in enumerate(messages):
        where = f"{key}[{i}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f'{where}: expected {{"role": ..., "content": ...}} and nothing else')
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise DataError(f"{where}.role: expected 'system', 'user' or 'assistant', got {shown(role)}")
        if not isinstance(content, str):
            raise DataError(f"{where}.content: expected text, got {shown(content)}; only texts can be compared")
        turns.append((role, content))
    if not turns:
        raise DataError(f"{key}: no messages; write at least one")
    return turns


def _rendered(turns: Turns) -> str:
    """A single user message is its own text; anything longer becomes a transcript."""
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{ROLES[role]}: {text}" for role, text in turns)


def _chosen_is_b(comparison: Comparison) -> bool:
    # The hash sees the unordered pair, so swapping the preference swaps the letter and leaves the positions.
    prompt, first, second = pair_of(comparison)
    smaller_is_a = seed_for("position", prompt, first, second) % 2 == 0
    return (comparison.output_a == first) != smaller_is_a


def _choice(record: Mapping[str, Any]) -> Literal[0, 1]:
    value = record.get("choice")
    if type(value) is int and value in (0, 1):
        return 1 if value else 0
    got = shown(value) if "choice" in record else "nothing (the key is missing)"
    letter = {"a": "; write 0 for A", "b": "; write 1 for B"}.get(str(value).strip().lower(), "")
    raise DataError(f"choice: expected the integer 0 (A is preferred) or 1 (B is preferred), got {got}{letter}")


def client_of(record: Mapping[str, Any], key: str = "client") -> str | None:
    """The client's name: any text that is not blank and not too long, only ever a key, never part of a path."""
    client = _optional_text(record, key)
    if client is not None and len(client) > MAX_CLIENT_CHARACTERS:
        raise DataError(
            f"{key}: {len(client)} characters, {shown(client, 20)}; use a name of at most {MAX_CLIENT_CHARACTERS}"
        )
    return client


def _optional_text(record: Mapping[str, Any], key: str) -> str | None:
    if record.get(key) is None:
        return None
    text = required_text(record, key)
    if not text.strip():
        raise DataError(f"{key}: empty; write a name, or leave the key out")
    return text


def _split_of(record: Mapping[str, Any]) -> str | None:
    value = record.get("split")
    if value is None:
        return None
    if not isinstance(value, str) or value not in SPLITS:
        raise DataError(f"split: expected train, validation (val, valid) or test, got {shown(value)}")
    return SPLITS[value]


def _meta(record: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = record.get("meta")
    if meta is None:
        return {}
    if not isinstance(meta, dict):
        raise DataError(f"meta: expected an object, got {shown(meta)}; it is free inside")
    fields = meta.get("fields", {})
    if not isinstance(fields, dict) or not all(isinstance(text, str) for text in fields.values()):
        raise DataError("meta.fields: expected texts by name, the extra fields of a template; rename it for other uses")
    return meta
