"""The station's nouns: a prompt, a pair, one showing of it, a line of the history."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from fedbiscuit.data.jsonlines import MAX_LINE_BYTES, check_texts
from fedbiscuit.rundir.values import dump_json
from fedbiscuit.types import DataError

__all__ = ["MAX_REASON", "Event", "Pair", "Presentation", "Prompt", "check_readable", "pair_id", "utc_now"]

MAX_REASON = 4000
"""Characters of a reason; what is longer is cut off."""
MAX_BYTES = MAX_LINE_BYTES - (1 << 16)
"""Of a pair's texts as JSON, so that the line that it becomes in an export can be read again."""

Kind = Literal["judged", "skipped", "undone", "flagged"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What somebody asked; ``state`` says whether answers have been written. error: why they could not be.

    blind: it is for the blind test, where two policies answer it.
    """

    id: int
    text: str
    blind: bool
    state: Literal["waiting", "written", "failed"]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two answers, each with where it is from: ``imported``, or the model or policy that wrote it.

    blind: it compares two policies (``writing.py``); such a judgement measures them and is no training comparison.
    """

    id: str
    prompt: str
    output_a: str
    output_b: str
    source_a: str = "imported"
    source_b: str = "imported"
    blind: bool = False

    @classmethod
    def of(
        cls,
        prompt: str,
        output_a: str,
        output_b: str,
        source_a: str = "imported",
        source_b: str = "imported",
        blind: bool = False,
    ) -> Pair:
        """A pair with its id."""
        id = pair_id(prompt, output_a, output_b, (source_a, source_b) if blind else None)
        return cls(id, prompt, output_a, output_b, source_a, source_b, blind)


@dataclass(frozen=True, slots=True)
class Presentation:
    """One showing of a pair to a person. showing: 0 the first time, 1 the repeat. swapped: ``output_b`` stands first."""

    token: str
    person: str
    pair: Pair
    showing: int
    swapped: bool

    @property
    def first(self) -> str:
        """The answer on the left, or above."""
        return self.pair.output_b if self.swapped else self.pair.output_a

    @property
    def second(self) -> str:
        """The answer on the right, or below."""
        return self.pair.output_a if self.swapped else self.pair.output_b


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the history. choice: 0 ``output_a``, 1 ``output_b``, None a tie; in the pair's own order, not the shown one.

    undone: whether a later line takes this one back. seconds: how long the person took, as the page says. time: UTC.
    """

    number: int
    kind: Kind
    token: str
    person: str
    pair: str
    showing: int
    swapped: bool
    choice: Literal[0, 1] | None
    seconds: float | None
    reason: str
    time: str
    undone: bool = False

    @property
    def first_preferred(self) -> bool | None:
        """Whether the answer that was shown first was preferred; None for a tie."""
        return None if self.choice is None else (self.choice == 0) != self.swapped


def pair_id(prompt: str, output_a: str, output_b: str, sources: tuple[str, str] | None = None) -> str:
    """32 hex digits that depend on the prompt and both answers, not on their order.

    sources: who wrote each answer of a pair of the blind test. Two policies may write the same, and each is tested by itself.
    """
    parts = [prompt, *sorted((output_a, output_b))]
    if sources is not None:
        parts += [source for _, source in sorted(zip((output_a, output_b), sources, strict=True))]
    text = "\x00".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def utc_now() -> str:
    """``2026-01-31T12:00:00.123Z``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check_readable(texts: dict[str, str]) -> None:
    """``DataError`` for what an export could not carry: blank or too long texts, NUL, half a character."""
    check_texts(texts)
    for key, text in texts.items():
        if not text.strip():
            raise DataError(f"{key}: empty; write something, or leave it out")
    if len(dump_json(texts).encode()) > MAX_BYTES:
        raise DataError(f"{', '.join(texts)}: more than {MAX_BYTES} bytes; shorten the text")
