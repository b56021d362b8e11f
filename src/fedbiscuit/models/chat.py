"""Texts as token ids: plain ones, and turns of a conversation by the model's chat template."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from fedbiscuit.types import ConfigError, first_line

__all__ = ["chat_ids", "plain_ids", "prompt_ids", "start_ids"]


def plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text. Special tokens written in it stay plain text; nothing is added."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def start_ids(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before every text."""
    return tuple(t for t in tokenizer("").input_ids if t != tokenizer.eos_token_id)


def prompt_ids(
    tokenizer: Any,
    name: str,
    prompt: str,
    system: str = "",
    chat: bool = True,
    encode: Callable[[str], tuple[int, ...]] | None = None,
) -> tuple[int, ...]:
    """Token ids up to where the answer begins, by the model's chat template where it has one."""
    encode = encode or functools.partial(plain_ids, tokenizer)
    if not chat or not tokenizer.chat_template:
        return start_ids(tokenizer) + encode(prompt if not system else f"{system}\n\n{prompt}")
    turns = [("system", system)] if system else []
    try:
        return chat_ids(tokenizer, [*turns, ("user", prompt)], encode, asks=True)
    except (TemplateError, TypeError) as error:
        raise ConfigError(
            f"generation.chat: the chat template of {name} does not take these messages: {first_line(error)}; "
            "leave generation.system empty, or set generation.chat to false"
        ) from error


def chat_ids(
    tokenizer: Any, turns: Sequence[tuple[str, str]], encode: Callable[[str], tuple[int, ...]], asks: bool
) -> tuple[int, ...]:
    """Token ids of (role, text) turns by the tokenizer's chat template; ``asks``: up to where the next answer begins.

    The texts are encoded as plain text between the template's own parts, so that no special token gets in with them.
    """
    marks = {f"\ue000{number}\ue000": text for number, (_, text) in enumerate(turns)}
    messages = [{"role": role, "content": mark} for (role, _), mark in zip(turns, marks, strict=True)]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(marks)})", rendered):
        ids += encode(marks[part]) if part in marks else tokenizer(part, add_special_tokens=False).input_ids
    return tuple(ids)
