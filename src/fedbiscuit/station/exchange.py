"""Comparisons out of the store and into it: our JSON lines, TRL's, and the whole history."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbiscuit.config import DataSettings
from fedbiscuit.data.comparisons import COMPARISONS
from fedbiscuit.data.jsonlines import iter_objects, shown
from fedbiscuit.data.records import comparison_of
from fedbiscuit.data.sources import read_prompts, split_prompts
from fedbiscuit.rundir.disk import Steps, atomic_write
from fedbiscuit.rundir.lock import process_lives
from fedbiscuit.rundir.values import dump_json
from fedbiscuit.station.database import STEPS
from fedbiscuit.station.history import history_records, read_history
from fedbiscuit.station.nouns import Event, Pair
from fedbiscuit.station.store import Store
from fedbiscuit.types import ConfigError, DataError

__all__ = [
    "COMPARISONS",
    "FORMS",
    "Form",
    "Imported",
    "export",
    "forgetting",
    "import_file",
    "import_prompts",
    "records",
    "refresh",
    "sweep",
]

Form = Literal["comparisons", "trl", "history"]
TEST_SHARE = 0.1
UPLOAD_SECONDS = 60.0
"""After this an upload that still lies there is one that a crash has left."""


@dataclass(frozen=True, slots=True)
class Imported:
    """How many pairs and lines of history were new, and how many lines said what was known already."""

    pairs: int
    judgements: int
    known: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair with the judgement of it that counts, the first one, and that of the repeat if there is one."""

    pair: Pair
    event: Event
    again: Event | None
    flagged: bool


# Out


def records(store: Store, form: Form = "comparisons", person: str | None = None) -> Iterator[dict[str, Any]]:
    """What an export has, line by line, of one person or of all.

    Ties, skips, what was undone and the blind test are in ``history`` only. A repeat is no second comparison: what it says is in
    ``meta`` of the first.
    """
    yield from FORMS[form](store, person)


def export(store: Store, path: Path, form: Form = "comparisons", person: str | None = None) -> int:
    """Write a new file that only its owner may read, whole or not at all; how many lines.

    ``DataError`` where there are none, ``ConfigError`` where there is a file already.
    """
    if path.exists():
        raise ConfigError(f"{path}: is there already, and an export replaces nothing; name another file, or remove it")
    lines = [dump_json(record) + "\n" for record in records(store, form, person)]
    if not lines:
        who = "nobody" if person is None else person
        raise DataError(f"{store.folder}: {who} has judged nothing that could be exported; nothing was written")
    steps = Steps("make room, then export again", "give yourself the right to write there, or name another file")
    atomic_write(path, "".join(lines), 0o600, steps)
    return len(lines)


def refresh(store: Store) -> None:
    """Bring ``comparisons.jsonl`` in the store's folder up to date; without a judgement there is none."""
    path = store.folder / COMPARISONS
    with store.all_or_nothing():  # nobody deletes a text between our reading it and our writing it
        text = "".join(dump_json(record) + "\n" for record in records(store)).encode()
        before = None
        with contextlib.suppress(FileNotFoundError):
            before = path.read_bytes()
        if not text:
            path.unlink(missing_ok=True)
        elif text != before:
            atomic_write(path, text, 0o600, STEPS)


@contextlib.contextmanager
def forgetting(store: Store) -> Iterator[None]:
    """Around what deletes from the store: the texts go from the files beside it too, also where the store has a complaint."""
    try:
        yield
    finally:
        try:
            refresh(store)
        finally:
            sweep(store)


def sweep(store: Store) -> None:
    """Remove what a crash has left of a file that was being written or uploaded: there are texts in it."""
    for torn in store.folder.glob(f".tmp-{COMPARISONS}-*"):
        with contextlib.suppress(ValueError, OverflowError):  # no number of a process: not ours
            if not process_lives(int(torn.name.rpartition("-")[2])):
                torn.unlink(missing_ok=True)
    for torn in store.folder.glob(".upload-*"):
        with contextlib.suppress(FileNotFoundError):  # somebody else has just removed it
            if time.time() - torn.stat().st_mtime > UPLOAD_SECONDS:
                shutil.rmtree(torn, ignore_errors=True)


def _comparisons(store: Store, person: str | None) -> Iterator[dict[str, Any]]:
    """Our format. The split is decided by a hash of the prompt: what is held out stays so when other prompts come."""
    for who in store.people() if person is None else [person]:
        judged = _judged(store, who)
        train, held_out = split_prompts((one.pair.prompt for one in judged), 0, TEST_SHARE)
        test = set(held_out).difference(train)
        for one in judged:
            pair, event = one.pair, one.event
            yield {
                "prompt": pair.prompt,
                "output_a": pair.output_a,
                "output_b": pair.output_b,
                "choice": event.choice,
                "client": who,
                "split": "test" if pair.prompt in test else "train",
                "id": f"{pair.id[:16]}-{hashlib.sha256(who.encode()).hexdigest()[:8]}",
                "meta": _meta(one),
            }


def _meta(one: Judged) -> dict[str, Any]:
    """What says how far the choice can be relied on; it stays with the data."""
    event, again = one.event, one.again
    meta: dict[str, Any] = {"shown_first": "b" if event.swapped else "a", "time": event.time}
    if event.seconds is not None:
        meta["seconds"] = round(event.seconds, 1)
    if again is not None:
        meta["again"] = "tie" if again.choice is None else "same" if again.choice == event.choice else "other"
    if one.flagged:
        meta["flagged"] = True
    meta["sources"] = [one.pair.source_a, one.pair.source_b]
    return meta


def _trl(store: Store, person: str | None) -> Iterator[dict[str, Any]]:
    """TRL's preference format and nothing else, for tools that know nothing of clients."""
    for record in _comparisons(store, person):
        answers = (record["output_a"], record["output_b"])
        choice = record["choice"]
        yield {"prompt": record["prompt"], "chosen": answers[choice], "rejected": answers[1 - choice]}


def _judged(store: Store, person: str) -> list[Judged]:
    """What a person has decided, in the order of the pairs; no ties, nothing of the blind test."""
    first: dict[str, Event] = {}
    again: dict[str, Event] = {}
    flagged: set[str] = set()
    for event in store.history(person):
        if event.kind == "flagged" and not event.undone:
            flagged.add(event.pair)
        elif event.kind == "judged" and not event.undone:
            (again if event.showing else first)[event.pair] = event
    return [
        Judged(pair, first[pair.id], again.get(pair.id), pair.id in flagged)
        for pair in store.pairs()
        if not pair.blind and pair.id in first and first[pair.id].choice is not None
    ]


FORMS: dict[str, Callable[[Store, str | None], Iterator[dict[str, Any]]]] = {
    "comparisons": _comparisons,
    "trl": _trl,
    "history": history_records,
}


# In


def import_file(store: Store, path: Path) -> Imported:
    """Pairs (prompt, output_a, output_b), comparisons in either of our shapes, or an exported history, also mixed.

    Of comparisons the texts are taken and not the choice: it is the person at the station who judges. All or nothing: the first
    fault is a ``DataError`` with file and line.
    """
    pairs: list[Pair] = []
    lines: list[tuple[int, Mapping[str, Any]]] = []
    for number, record in iter_objects(path):
        try:
            if isinstance(record, DataError):
                raise record
            if "event" in record:
                lines.append((number, record))
            else:
                pairs.append(_pair_of(record))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    with store.all_or_nothing():
        new = store.add_pairs(pairs)
        more, events = read_history(store, path, lines)
    return Imported(new + more, events, len(pairs) + len(lines) - new - more - events)


def _pair_of(record: Mapping[str, Any]) -> Pair:
    """Read as any comparison is; a choice is not needed, and not kept."""
    whole = record if {"choice", "chosen", "rejected"} & record.keys() else {**record, "choice": 0}
    found = comparison_of(whole)
    if found.output_a.strip() == found.output_b.strip():
        raise DataError(f"output_b: the same text as output_a, {shown(found.output_b, 30)}; remove the line")
    return Pair.of(found.prompt, found.output_a, found.output_b)


def import_prompts(store: Store, path: Path, blind: bool = False) -> tuple[int, int]:
    """Prompts from a text file, one a line, or from JSON lines with ``prompt``; how many were new, and how many known."""
    prompts, _, _ = read_prompts(DataSettings(prompts=str(path)))
    new = store.add_prompts(prompts, blind)
    return new, len(set(prompts)) - new
