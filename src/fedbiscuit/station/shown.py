"""What the pages show, as values: no markup, no request. Texts of people and models stay texts; the templates escape them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from fedbiscuit.data.visible import pieces
from fedbiscuit.station.looking import RoundAccuracy
from fedbiscuit.station.nouns import Event, Pair, Presentation
from fedbiscuit.station.queue import Progress, share
from fedbiscuit.station.store import Store
from fedbiscuit.station.writing import Writing

__all__ = [
    "SAID",
    "Curve",
    "Line",
    "State",
    "count",
    "curve",
    "lines",
    "percent",
    "share",
    "shown",
    "state_of",
    "time_left",
    "writing_line",
]

State = Literal["pair", "writing", "failed", "elsewhere", "empty", "done"]

SAID = {
    "first": "You chose A.",
    "second": "You chose B.",
    "tie": "Kept as a tie.",
    "skip": "Skipped; it does not come again.",
    "undo": "Taken back. Here it is again.",
    "nothing": "There is nothing to take back.",
    "already": "That pair had its answer already. The first one is kept.",
    "gone": "That pair is not here any more. This is the next one.",
    "forgot-pair": "The pair and all that was said about it are removed.",
    "forgot-prompt": "The prompt is removed.",
    "no-lines": "You have judged nothing yet that could be taken along.",
    "forgot-person": "All that you were shown and said is removed.",
    "forgot-all": "Everything is removed.",
    "retry": "Trying again.",
}
"""What the page says after an action, by the word that the address carries; never a text of the request itself."""


def shown(text: object) -> Markup:
    """A text for a place in the page: it is no markup, and a character that would hide or reorder it is written out."""
    return Markup("").join(
        Markup('<span class="code" title="{}">{}</span>').format(_name(hidden), piece) if hidden else escape(piece)
        for piece, hidden in pieces(str(text))
    )


def _name(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, 'a character without a name')}"


def state_of(pair: Presentation | None, progress: Progress, writing: Writing | None) -> State:
    """What the place for comparing shows. elsewhere: the writer waits for pairs that are asked on the other page."""
    if pair is not None:
        return "pair"
    if writing is not None and progress.waiting:
        if writing.state == "failed":
            return "failed"
        if writing.state == "full":
            return "elsewhere"
        return "writing"
    return "done" if progress.total else "empty"


def time_left(minutes: float | None) -> str:
    """``about 6 minutes left``; empty while nobody can know."""
    if minutes is None:
        return ""
    if minutes < 1:
        return "less than a minute left"
    if minutes < 90:
        whole = round(minutes)
        return f"about {whole} minute{'s' if whole > 1 else ''} left"
    return f"about {minutes / 60:.0f} hours left"


def writing_line(writing: Writing) -> str:
    """What the writer does, in a sentence."""
    if writing.state == "loading":
        return "The model is being loaded."
    waiting = f" {count(writing.waiting, 'prompt')} to go." if writing.waiting else ""
    return {
        "writing": f"{100 * writing.share:.0f}% of the next pair is written.{waiting}",
        "full": f"The model waits until you have judged some pairs.{waiting}",
        "failed": "The model could not write.",
        "idle": f"The model is about to start.{waiting}" if waiting else "The model has nothing to do.",
    }[writing.state]


def percent(share: float | None) -> str:
    """``0.784`` as ``78%``."""
    return "–" if share is None else f"{100 * share:.0f}%"


def count(number: int, noun: str) -> str:
    """``1 prompt``, ``2,000 prompts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy by round as a line in a box of 640 by 220: its points, and the labels of both axes."""

    points: str
    last: tuple[float, float]
    rounds: tuple[tuple[float, int], ...]
    shares: tuple[tuple[float, str], ...]


def curve(rounds: Sequence[RoundAccuracy]) -> Curve | None:
    """None for fewer than two rounds, which are no line."""
    if len(rounds) < 2:
        return None
    first, span = rounds[0].round, max(1, rounds[-1].round - rounds[0].round)

    def place(number: int, share: float) -> tuple[float, float]:
        return round(52 + 570 * (number - first) / span, 1), round(16 + 168 * (1 - share), 1)

    places = [place(one.round, one.accuracy) for one in rounds]
    ticks = sorted({first, rounds[len(rounds) // 2].round, rounds[-1].round})
    return Curve(
        points=" ".join(f"{x},{y}" for x, y in places),
        last=places[-1],
        rounds=tuple((place(number, 0)[0], number) for number in ticks),
        shares=tuple((place(first, share)[1], percent(share)) for share in (0, 0.5, 1)),
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One answer of the history, with its pair. said: what the person answered, as they saw it."""

    event: Event
    pair: Pair
    said: str
    reason: str


def lines(store: Store, person: str, start: int, num: int) -> tuple[list[Line], int]:
    """Answers that stand, newest first, and how many there are in all."""
    answers = [e for e in store.history(person) if e.kind in ("judged", "skipped", "flagged") and not e.undone][::-1]
    return [Line(e, store.pair(e.pair), _said(e), e.reason) for e in answers[start : start + num]], len(answers)


def _said(event: Event) -> str:
    if event.kind != "judged":
        return event.kind
    return {True: "A", False: "B", None: "tie"}[event.first_preferred]
