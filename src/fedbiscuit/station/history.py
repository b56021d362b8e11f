"""The whole history as JSON lines, out and in: to move to another machine, or to look at it with other tools.

A line with ``event: pair`` is a pair; every other is a line of the history, and names its pair by id.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from fedbiscuit.data.jsonlines import shown
from fedbiscuit.station.nouns import MAX_REASON, Event, Pair, pair_id
from fedbiscuit.station.store import Store
from fedbiscuit.types import DataError

__all__ = ["history_records", "read_history"]

PAIR_KEYS = ("prompt", "output_a", "output_b", "source_a", "source_b", "blind")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")


def history_records(store: Store, person: str | None = None) -> Iterator[dict[str, Any]]:
    """All pairs, or those that this person was asked about; then what was said, oldest first."""
    with store.in_turn():
        events, pairs = store.history(person), store.pairs()
    asked = {event.pair for event in events}
    for pair in pairs:
        if person is None or pair.id in asked:
            yield {"event": "pair"} | {key: getattr(pair, key) for key in PAIR_KEYS}
    for event in events:
        row = asdict(event)
        yield {"event": row.pop("kind")} | {key: row[key] for key in EVENT_CHECKS if key != "event"}


def read_history(store: Store, path: Path, lines: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[int, int]:
    """Add the pairs and the lines of an exported history; how many of each were new.

    A pair that is here keeps the order of its answers, so choices of a history that has them the other way are turned round.
    """
    pairs: dict[str, Pair] = {}
    events: list[tuple[Event, Pair]] = []
    for number, record in lines:
        try:
            if record["event"] == "pair":
                _check(record, PAIR_CHECKS)
                pair = Pair.of(*(record[key] for key in PAIR_KEYS))
                pairs[pair.id] = pair
                if pair.blind:  # version 1 of the store named it so
                    pairs.setdefault(pair_id(pair.prompt, pair.output_a, pair.output_b), pair)
                continue
            _check(record, EVENT_CHECKS)
            if record["pair"] not in pairs:
                raise DataError(f"pair: {shown(record['pair'])} is in no line before; export the history again")
            pair = pairs[record["pair"]]
            told = {key: record[key] for key in EVENT_CHECKS if key != "event"} | {"pair": pair.id}
            events.append((Event(number=0, kind=record["event"], **told), pair))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    new = store.add_pairs(list(pairs.values()))
    here = {pair.id: pair for pair in store.pairs()} if pairs else {}
    turned = [_turned(event) if here[pair.id].output_a != pair.output_a else event for event, pair in events]
    return new, store.restore(turned)


def _turned(event: Event) -> Event:
    """The same said of the pair with its answers in the other order."""
    choice: dict[int | None, Literal[0, 1] | None] = {None: None, 0: 1, 1: 0}
    return replace(event, choice=choice[event.choice], swapped=not event.swapped)


def _check(record: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]]) -> None:
    for key in [*checks, *record]:
        if key not in record:
            raise DataError(f"{key}: missing; export the history again")
        if key not in checks:
            raise DataError(f"{shown(key)}: unknown key in a line of a history; remove it")
        if not checks[key](record[key]):
            raise DataError(f"{key}: {shown(record[key])} cannot stand here; export the history again")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _short(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200


PAIR_CHECKS: dict[str, Callable[[Any], bool]] = {
    "event": lambda value: value == "pair",
    "prompt": _text,
    "output_a": _text,
    "output_b": _text,
    "source_a": _text,
    "source_b": _text,
    "blind": lambda value: isinstance(value, bool),
}
EVENT_CHECKS: dict[str, Callable[[Any], bool]] = {
    "event": lambda value: value in ("judged", "skipped", "undone", "flagged"),
    "token": _short,
    "person": _short,
    "pair": _short,
    "showing": lambda value: type(value) is int and value in (0, 1),
    "swapped": lambda value: isinstance(value, bool),
    "choice": lambda value: value is None or (type(value) is int and value in (0, 1)),
    "seconds": lambda value: value is None or (type(value) in (int, float) and math.isfinite(value) and value >= 0),
    "reason": lambda value: isinstance(value, str) and len(value) <= MAX_REASON,
    "time": lambda value: isinstance(value, str) and TIME.fullmatch(value) is not None,
}
