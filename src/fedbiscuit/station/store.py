"""The station's store: one SQLite file with prompts, pairs, what was shown, and an append-only history.

```
~/.fedbiscuit/station/   0700
  station.sqlite         0600, with -wal and -shm beside it while it is open
  comparisons.jsonl      0600, derived from it (``exchange.py``)
```

A transaction is on the disk before its call returns, so a crash loses at most the click in flight. Every showing of a pair
has a token, and a token is answered once: a second click, tab or request changes nothing.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fedbiscuit.data.jsonlines import check_texts
from fedbiscuit.station.database import DATABASE, fault_of, open_database, private_folder
from fedbiscuit.station.nouns import (
    MAX_REASON,
    Event,
    Kind,
    Pair,
    Presentation,
    Prompt,
    check_readable,
    utc_now,
)
from fedbiscuit.types import DataError, EnvironmentFault, seed_for

__all__ = ["Store"]


class Store:
    """An open store. Any thread may call it; calls take turns."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._connection = connection
        self._lock = threading.RLock()
        self.seed = int(self._one("SELECT value FROM facts WHERE key = 'seed'")[0])

    @classmethod
    def open(cls, folder: str | Path, seed: int | None = None) -> Store:
        """Open the store of a folder, or make it. seed: of the orders in a new one; drawn if not given.

        A folder that others may read is a ``ConfigError``, a store of a newer version an ``EnvironmentFault``, a file that is
        no such store an ``IntegrityError``.
        """
        folder = Path(folder).expanduser()
        private_folder(folder)
        return cls(folder, open_database(folder / DATABASE, seed))

    def close(self) -> None:
        """Close the file; the log beside it goes into it."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is asked

    def add_prompts(self, texts: Sequence[str], blind: bool = False) -> int:
        """Add prompts that wait for answers, or for those of the blind test; how many were new.

        A prompt of the blind test that is there already waits again: another policy may answer it.
        """
        for text in texts:
            check_readable({"prompt": text})
        again = "UPDATE SET state = 'waiting', error = '' WHERE blind AND state != 'waiting'"
        query = f"INSERT INTO prompts (text, blind, state, time) VALUES (?, ?, 'waiting', ?) ON CONFLICT DO {again}"
        with self._transaction() as db:
            return sum(db.execute(query, (text, int(blind), utc_now())).rowcount for text in texts)

    def prompts(self, state: str | None = None) -> list[Prompt]:
        """All prompts, oldest first, or those of one state."""
        query = "SELECT id, text, blind, state, error FROM prompts WHERE ?1 IS NULL OR state = ?1 ORDER BY id"
        return [Prompt(id, text, bool(blind), *rest) for id, text, blind, *rest in self._all(query, state)]

    def count_prompts(self, state: str, blind: bool) -> int:
        """How many prompts of the blind test, or of all others, are in this state."""
        return int(self._one("SELECT count(*) FROM prompts WHERE state = ? AND blind = ?", state, int(blind))[0])

    def count_ahead(self, person: str, blind: bool) -> int:
        """How many pairs that were written here this person has not answered yet."""
        query = (
            f"SELECT count(*) FROM pairs p WHERE {_ASKED} AND source_a != 'imported' AND NOT EXISTS "
            f"(SELECT 1 FROM presentations s WHERE s.pair = p.id AND s.person = ? AND {_STANDS})"
        )
        return int(self._one(query, int(blind), person)[0])

    def answered(self, prompt: Prompt, pair: Pair) -> bool:
        """Keep what was written for a prompt; False where somebody has removed the prompt since."""
        with self._transaction() as db:
            if not db.execute("UPDATE prompts SET state = 'written', error = '' WHERE id = ?", (prompt.id,)).rowcount:
                return False
            _insert_pair(db, pair)
        return True

    def tested_before(self, prompt: Prompt, raw: str, aligned: str) -> bool:
        """Whether these two have written for this prompt of the blind test; it then waits no more."""
        pair = "SELECT 1 FROM pairs WHERE blind AND prompt = text AND (source_a, source_b) = (?, ?)"
        query = f"UPDATE prompts SET state = 'written', error = '' WHERE id = ? AND blind AND EXISTS ({pair})"
        with self._transaction() as db:
            return bool(db.execute(query, (prompt.id, raw, aligned)).rowcount)

    def failed(self, prompt: Prompt, error: str) -> None:
        """Note that answers to a prompt could not be written, and why."""
        with self._transaction() as db:
            db.execute("UPDATE prompts SET state = 'failed', error = ? WHERE id = ?", (error, prompt.id))

    def retry(self) -> int:
        """Let prompts that failed wait again; how many."""
        with self._transaction() as db:
            return db.execute("UPDATE prompts SET state = 'waiting', error = '' WHERE state = 'failed'").rowcount

    def add_pairs(self, pairs: Sequence[Pair]) -> int:
        """Add pairs; how many were new. A pair that is there already, in either order, stays as it is."""
        with self._transaction() as db:
            return sum(_insert_pair(db, pair) for pair in pairs)

    def pairs(self, ids: Sequence[str] | None = None) -> list[Pair]:
        """All pairs, or those of ``ids`` that are there, in the order in which they came."""
        if ids is None:
            return [_pair(row) for row in self._all(f"SELECT {_PAIR} FROM pairs ORDER BY number")]
        marks = ", ".join("?" * len(ids))
        return [
            _pair(row) for row in self._all(f"SELECT {_PAIR} FROM pairs WHERE id IN ({marks}) ORDER BY number", *ids)
        ]

    def pair(self, id: str) -> Pair:
        """One pair; ``DataError`` if it is not there."""
        rows = self._all(f"SELECT {_PAIR} FROM pairs WHERE id = ?", id)
        if not rows:
            raise DataError(f"pair {id[:40]!r}: not in this store; it may have been deleted")
        return _pair(rows[0])

    def whole_id(self, start: str) -> str:
        """The id of the one pair whose id begins so, at least 8 digits, or with the first part of an id in an export."""
        start = start.partition("-")[0].lower()
        found = [row[0] for row in self._all("SELECT id FROM pairs WHERE substr(id, 1, ?) = ?", len(start), start)]
        if len(start) < 8 or len(found) != 1:
            raise DataError(f"pair {start[:40]!r}: {len(found)} pairs have an id that begins so; give more of it")
        return str(found[0])

    def pair_ids(self, blind: bool) -> list[str]:
        """The ids of the pairs of the blind test, or of all others. Nobody is asked to choose between two equal texts."""
        return [row[0] for row in self._all(f"SELECT id FROM pairs WHERE {_ASKED} ORDER BY number", int(blind))]

    def put_disagreements(self, selectors: str, values: dict[str, float]) -> None:
        """Keep how much the selectors with this digest disagree on pairs (``queue.py``)."""
        with self._transaction() as db:
            for pair, value in values.items():
                db.execute(
                    "INSERT OR REPLACE INTO disagreements SELECT id, ?, ? FROM pairs WHERE id = ?",
                    (selectors, value, pair),
                )

    def disagreements(self, selectors: str) -> dict[str, float]:
        """By pair, as far as it is known."""
        return dict(self._all("SELECT pair, value FROM disagreements WHERE selectors = ?", selectors))

    # What is shown and answered

    def open_presentation(self, person: str, blind: bool = False) -> Presentation | None:
        """What this person sees now: the latest showing without an answer. So a reload shows the same.

        A repeat whose first judgement has been taken back is none.
        """
        rows = self._all(
            f"SELECT {_PRESENTATION} FROM presentations s JOIN pairs p ON p.id = s.pair "
            "WHERE person = ? AND p.blind = ? AND NOT EXISTS "
            "(SELECT 1 FROM history WHERE token = s.token AND kind IN ('judged', 'skipped')) "
            f"AND (showing = 0 OR {_HAS_FIRST}) ORDER BY s.number DESC LIMIT 1",
            person,
            int(blind),
        )
        return self._presentation(rows[0]) if rows else None

    def presentation(self, token: str) -> Presentation:
        """What was shown under a token; ``DataError`` if nothing was."""
        rows = self._all(f"SELECT {_PRESENTATION} FROM presentations s WHERE token = ?", token)
        if not rows:
            raise DataError("this page is not known here (any more): the pair may have been deleted; reload the page")
        return self._presentation(rows[0])

    def is_answered(self, token: str) -> bool:
        """Whether what was shown under a token has been judged or skipped, also if that was taken back since."""
        return bool(self._all("SELECT 1 FROM history WHERE token = ? AND kind IN ('judged', 'skipped')", token))

    def show(self, person: str, pair: str, showing: int, swapped: bool) -> Presentation:
        """Note that a pair is shown. The same (person, pair, showing) has one token until it is undone."""
        with self._transaction() as db:
            attempt = db.execute(
                "SELECT count(*) FROM history h JOIN presentations s USING (token) "
                "WHERE h.kind = 'undone' AND s.person = ? AND s.pair = ? AND s.showing = ?",
                (person, pair, showing),
            ).fetchone()[0]
            token = f"{seed_for(self.seed, person, pair, showing, attempt):016x}{pair[:8]}"
            db.execute(
                "INSERT OR IGNORE INTO presentations (token, person, pair, showing, attempt, swapped, time) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (token, person, pair, showing, attempt, int(swapped), utc_now()),
            )
        return self.presentation(token)

    def judge(self, token: str, picked: Literal[0, 1] | None, seconds: float | None = None, reason: str = "") -> Event:
        """Keep a judgement. picked: 0 the answer shown first, 1 the second, None a tie or "can't say".

        A token that has its answer already keeps it: the event that is there comes back.
        """
        with self._transaction():
            swapped = self.presentation(token).swapped
            choice = None if picked is None else picked ^ int(swapped)
            return self._answer("judged", token, choice, seconds, reason)

    def skip(self, token: str, seconds: float | None = None, reason: str = "") -> Event:
        """Keep that a pair was passed over; it does not come again to this person, unless that is undone."""
        with self._transaction():
            self.presentation(token)
            return self._answer("skipped", token, None, seconds, reason)

    def flag(self, token: str, reason: str = "") -> Event:
        """Keep that something is wrong with a pair. It stays open, or judged as it was."""
        with self._transaction() as db:
            self.presentation(token)
            number = _append(db, "flagged", token, None, None, reason)
        return self.event(number)

    def undo(self, person: str, token: str | None = None) -> Presentation | None:
        """Take back this person's last answer, or the one of ``token``, by a line of its own; the pair is shown again.

        The same undo twice is one. None where there is nothing to take back.
        """
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT {_PRESENTATION} FROM history h JOIN presentations s USING (token) "
                "WHERE h.kind IN ('judged', 'skipped') AND s.person = ?1 AND (?2 IS NULL OR token = ?2) AND NOT EXISTS "
                "(SELECT 1 FROM history u WHERE u.token = h.token AND u.kind = 'undone') ORDER BY h.number DESC LIMIT 1",
                (person, token),
            ).fetchall()
            if not rows:
                return None
            shown = self._presentation(rows[0])
            _append(db, "undone", shown.token, None, None, "")
            return self.show(person, shown.pair.id, shown.showing, shown.swapped)

    def history(self, person: str | None = None) -> list[Event]:
        """All lines, oldest first, of one person or of everybody."""
        rows = self._all(f"{_HISTORY} WHERE ?1 IS NULL OR s.person = ?1 ORDER BY h.number", person)
        return [_event(row) for row in rows]

    def event(self, number: int) -> Event:
        """One line of the history."""
        return _event(self._all(f"{_HISTORY} WHERE h.number = ?", number)[0])

    def restore(self, events: Sequence[Event]) -> int:
        """Append lines of another store's history, with their tokens and times; how many were not known.

        What this person has answered here already stays, and the other store's lines about it are left out, also an undo.
        """
        # In a copy of this folder a token of ours may have another answer: its lines speak of that one.
        other, known = set[str](), set[str]()
        new = 0
        with self._transaction() as db:
            for event in events:
                if event.kind in ("judged", "skipped"):
                    here = db.execute(
                        "SELECT kind, choice, time FROM history WHERE token = ? AND kind IN ('judged', 'skipped')",
                        (event.token,),
                    ).fetchall()
                    if here:
                        known.add(event.token)
                    if here not in ([], [(event.kind, event.choice, event.time)]):
                        other.add(event.token)
                if event.token not in other and not (event.kind == "undone" and event.token in known):
                    new += _restore(db, event)
        return new

    def people(self) -> list[str]:
        """Who has been shown something, sorted."""
        return [row[0] for row in self._all("SELECT DISTINCT person FROM presentations ORDER BY person")]

    # Forgetting

    def forget_pair(self, id: str) -> None:
        """Remove a pair, all that was said about it, and its prompt if no other pair has it; from the disk too."""
        prompt = self.pair(id).prompt
        with self._transaction() as db:
            db.execute("DELETE FROM pairs WHERE id = ?", (id,))
            db.execute(
                "DELETE FROM prompts WHERE text = ?1 AND NOT EXISTS (SELECT 1 FROM pairs WHERE prompt = ?1)", (prompt,)
            )
        self._wipe()

    def forget_prompt(self, id: int) -> None:
        """Remove a prompt, from the disk too; the pairs that were written for it stay."""
        with self._transaction() as db:
            db.execute("DELETE FROM prompts WHERE id = ?", (id,))
        self._wipe()

    def forget_person(self, person: str) -> None:
        """Remove all that one person was shown and said; pairs and prompts stay."""
        with self._transaction() as db:
            db.execute("DELETE FROM presentations WHERE person = ?", (person,))
        self._wipe()

    def forget_all(self) -> None:
        """Remove everything: prompts, pairs, history. Numbers go on, so what is still being written for a prompt finds none."""
        with self._transaction() as db:
            for table in ("prompts", "pairs", "presentations", "history"):
                db.execute(f"DELETE FROM {table}")
        self._wipe()

    def _wipe(self) -> None:
        """Free pages are zeroed when they are freed (secure_delete); here the file is written anew and the log emptied."""
        with self._lock, self._faults():
            self._connection.execute("VACUUM")
            busy = self._one("PRAGMA wal_checkpoint(TRUNCATE)")[0]
        if busy:
            raise EnvironmentFault(
                f"{self.folder / DATABASE}: deleted, but another process reads the store, so copies may stay in its log until "
                "the last one closes it; end every station of this folder"
            )

    # Below

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Several calls of this process as one, so that no other thread comes between."""
        with self._lock:
            yield

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Several calls as one change, which nobody else, also no other process, comes between."""
        with self._transaction():
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, on the disk at the end; inside another one, part of it."""
        with self._lock, self._faults():
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself has taken back what met a full disk
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _answer(self, kind: Kind, token: str, choice: int | None, seconds: float | None, reason: str) -> Event:
        with self._transaction() as db:
            rows = db.execute(
                "SELECT number FROM history WHERE token = ? AND kind IN ('judged', 'skipped')", (token,)
            ).fetchall()
            number = rows[0][0] if rows else _append(db, kind, token, choice, seconds, reason)
        return self.event(number)

    def _presentation(self, row: Sequence[Any]) -> Presentation:
        token, person, pair, showing, swapped = row
        return Presentation(token, person, self.pair(pair), showing, bool(swapped))

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock, self._faults():
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> Any:
        return self._all(query, *values)[0]

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise fault_of(error, self.folder / DATABASE) from error


_PAIR = "id, prompt, output_a, output_b, source_a, source_b, blind"
_ASKED = "blind = ? AND number NOT IN (SELECT number FROM pairs WHERE output_a = output_b)"  # reads no texts
_PRESENTATION = "s.token, s.person, s.pair, s.showing, s.swapped"
_SAID = "kind, token, choice, seconds, reason, time"
_STANDS = (
    "EXISTS (SELECT 1 FROM history WHERE token = s.token AND kind IN ('judged', 'skipped')) AND "
    "NOT EXISTS (SELECT 1 FROM history WHERE token = s.token AND kind = 'undone')"
)
_HAS_FIRST = (
    "EXISTS (SELECT 1 FROM presentations f JOIN history h USING (token) WHERE f.person = s.person AND f.pair = s.pair "
    "AND f.showing = 0 AND h.kind = 'judged' AND NOT EXISTS "
    "(SELECT 1 FROM history WHERE token = f.token AND kind = 'undone'))"
)
_HISTORY = (
    "SELECT h.number, h.kind, h.token, s.person, s.pair, s.showing, s.swapped, h.choice, h.seconds, h.reason, h.time, "
    "h.kind != 'undone' AND EXISTS (SELECT 1 FROM history u WHERE u.token = h.token AND u.kind = 'undone') "
    "FROM history h JOIN presentations s USING (token)"
)


def _pair(row: Any) -> Pair:
    id, prompt, output_a, output_b, source_a, source_b, blind = row
    return Pair(id, prompt, output_a, output_b, source_a, source_b, bool(blind))


def _event(row: Any) -> Event:
    number, kind, token, person, pair, showing, swapped, choice, seconds, reason, time, undone = row
    place = (number, kind, token, person, pair, showing, bool(swapped))
    return Event(*place, choice, seconds, reason, time, bool(undone))


def _insert_pair(db: sqlite3.Connection, pair: Pair) -> int:
    check_readable({"prompt": pair.prompt, "output_a": pair.output_a, "output_b": pair.output_b})
    return db.execute(
        f"INSERT OR IGNORE INTO pairs ({_PAIR}, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            pair.id,
            pair.prompt,
            pair.output_a,
            pair.output_b,
            pair.source_a,
            pair.source_b,
            int(pair.blind),
            utc_now(),
        ),
    ).rowcount


def _restore(db: sqlite3.Connection, event: Event) -> bool:
    place = (event.person, event.pair, event.showing)
    if not db.execute("SELECT 1 FROM presentations WHERE token = ?", (event.token,)).fetchall():
        here = "person = ? AND pair = ? AND showing = ?"
        unanswered = f"{here} AND NOT EXISTS (SELECT 1 FROM history WHERE token = presentations.token)"
        db.execute(f"DELETE FROM presentations WHERE {unanswered}", place)
        if db.execute(f"SELECT 1 FROM presentations s WHERE {here} AND {_STANDS}", place).fetchall():
            return False
        attempt = db.execute(f"SELECT count(*) FROM presentations WHERE {here}", place).fetchone()[0]
        db.execute(
            "INSERT INTO presentations (token, person, pair, showing, attempt, swapped, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (event.token, *place, attempt, int(event.swapped), event.time),
        )
    said = (event.kind, event.token, event.choice, event.seconds, event.reason, event.time)
    same = "kind = ? AND token = ? AND (kind != 'flagged' OR (reason, time) = (?, ?))"
    if db.execute(
        f"SELECT 1 FROM history WHERE {same}", (event.kind, event.token, event.reason, event.time)
    ).fetchall():
        return False
    db.execute(f"INSERT INTO history ({_SAID}) VALUES (?, ?, ?, ?, ?, ?)", said)
    return True


def _append(
    db: sqlite3.Connection, kind: Kind, token: str, choice: int | None, seconds: float | None, reason: str
) -> int:
    taken = seconds if seconds is not None and 0 <= seconds < 1e6 else None  # NaN is none of these
    check_texts({"reason": reason})
    row = (kind, token, choice, taken, reason[:MAX_REASON], utc_now())
    found = db.execute(f"INSERT INTO history ({_SAID}) VALUES (?, ?, ?, ?, ?, ?)", row).lastrowid
    assert found is not None
    return found
