"""The station's SQLite file: its tables, and how it is opened: durable, for its owner alone, of a version that we know."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
from pathlib import Path

from fedbiscuit.data.comparisons import STATION
from fedbiscuit.rundir.disk import Steps, disk_faults
from fedbiscuit.station.nouns import pair_id
from fedbiscuit.types import ConfigError, EnvironmentFault, IntegrityError

__all__ = ["DATABASE", "STEPS", "fault_of", "open_database", "private_folder"]

DATABASE = STATION
VERSION = 2
STEPS = Steps(
    "make room; what was answered before is kept",
    "give yourself the right to write there, or name another --folder",
)
BUSY_SECONDS = 30.0
"""So long a call waits for another process that is at the file."""

SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE prompts (
  id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL, blind INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('waiting', 'written', 'failed')), error TEXT NOT NULL DEFAULT '',
  time TEXT NOT NULL, UNIQUE (text, blind)
) STRICT;
CREATE TABLE pairs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
  prompt TEXT NOT NULL, output_a TEXT NOT NULL, output_b TEXT NOT NULL,
  source_a TEXT NOT NULL, source_b TEXT NOT NULL, blind INTEGER NOT NULL, time TEXT NOT NULL
) STRICT;
CREATE TABLE disagreements (
  pair TEXT NOT NULL REFERENCES pairs (id) ON DELETE CASCADE, selectors TEXT NOT NULL, value REAL NOT NULL,
  PRIMARY KEY (pair, selectors)
) STRICT;
CREATE TABLE presentations (
  number INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE, person TEXT NOT NULL,
  pair TEXT NOT NULL REFERENCES pairs (id) ON DELETE CASCADE,
  showing INTEGER NOT NULL, attempt INTEGER NOT NULL, swapped INTEGER NOT NULL, time TEXT NOT NULL,
  UNIQUE (person, pair, showing, attempt)
) STRICT;
CREATE TABLE history (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL CHECK (kind IN ('judged', 'skipped', 'undone', 'flagged')),
  token TEXT NOT NULL REFERENCES presentations (token) ON DELETE CASCADE,
  choice INTEGER CHECK (choice IN (0, 1)), seconds REAL, reason TEXT NOT NULL DEFAULT '', time TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX answered_once ON history (token) WHERE kind IN ('judged', 'skipped');
CREATE UNIQUE INDEX undone_once ON history (token) WHERE kind = 'undone';
CREATE TRIGGER append_only BEFORE UPDATE ON history BEGIN SELECT RAISE(ABORT, 'history is append-only'); END;
"""

# Also made in a store that was there before: any version reads and writes beside them.
INDEXES = """
CREATE INDEX IF NOT EXISTS history_token ON history (token);
CREATE INDEX IF NOT EXISTS presentations_pair ON presentations (pair);
CREATE INDEX IF NOT EXISTS pairs_without_texts ON pairs (blind, number, id, source_a);
CREATE INDEX IF NOT EXISTS pairs_alike ON pairs (number) WHERE output_a = output_b;
"""


def private_folder(folder: Path) -> None:
    """The folder, for its owner alone. One that holds other things is not closed without being asked."""
    with disk_faults(folder, steps=STEPS):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise ConfigError(f"{folder}: belongs to another user; name a folder of yours with --folder")
        if stat.S_IMODE(found.st_mode) & 0o077:
            if any(folder.iterdir()):
                raise ConfigError(f"{folder}: others on this machine may read it; close it with `chmod 700 {folder}`")
            folder.chmod(0o700)


def open_database(path: Path, seed: int | None) -> sqlite3.Connection:
    """A connection to a file that is made if it is not there; ``seed`` is kept in a new one."""
    with disk_faults(path, steps=STEPS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.close(descriptor)
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _prepare(connection, path, seed)
    except sqlite3.Error as error:
        connection.close()
        raise fault_of(error, path) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, seed: int | None) -> None:
    """Durable, private, of this version."""
    _version(connection, path)  # before anything is changed: it may be somebody else's
    with disk_faults(path, steps=STEPS):
        path.chmod(0o600)  # SQLite gives -wal and -shm the same mode
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "secure_delete = ON",
        "foreign_keys = ON",
        "temp_store = MEMORY",  # VACUUM would write a copy of all texts to /tmp
        "trusted_schema = OFF",
    ):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("BEGIN IMMEDIATE")
    version = _version(connection, path)  # again: another process may have made it since
    if version == 0:
        _execute(connection, SCHEMA)
        drawn = secrets.randbits(62) if seed is None else seed
        connection.execute("INSERT INTO facts VALUES ('seed', ?)", (str(drawn),))
    if version == 1:
        _name_blind_pairs(connection)
    if version < VERSION:
        connection.execute(f"PRAGMA user_version = {VERSION}")
    _execute(connection, INDEXES)
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Of the store; 0: an empty file. Errors for what is none, or a newer one."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for [name] in connection.execute("SELECT name FROM sqlite_master")}
    if tables and (version == 0 or "facts" not in tables):
        raise IntegrityError(f"{path}: a database, but none of the station's; move it away, or name another --folder")
    if version > VERSION:
        raise EnvironmentFault(
            f"{path}: written by a newer fedbiscuit (version {version} of the store, this one reads up to {VERSION}); "
            "install the newer one: pip install -U fedbiscuit"
        )
    return version


def _name_blind_pairs(connection: sqlite3.Connection) -> None:
    """Version 1 named pairs of the blind test by their texts alone, so that a second policy lost those that it wrote alike."""
    connection.execute("PRAGMA defer_foreign_keys = ON")
    columns = "id, prompt, output_a, output_b, source_a, source_b"
    for old, prompt, a, b, *sources in connection.execute(f"SELECT {columns} FROM pairs WHERE blind").fetchall():
        new = pair_id(prompt, a, b, (sources[0], sources[1]))
        for table, column in (("pairs", "id"), ("presentations", "pair"), ("disagreements", "pair")):
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (new, old))


def _execute(connection: sqlite3.Connection, statements: str) -> None:
    """In the transaction that is open, which ``executescript`` would end."""
    for statement in statements.split(";\n"):
        if statement.strip():
            connection.execute(statement)


def fault_of(error: sqlite3.Error, path: Path) -> EnvironmentFault | IntegrityError:
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return IntegrityError(
            f"{path}: no store that can be read ({error}); take it from a backup, or name another --folder"
        )
    if code.startswith("SQLITE_FULL"):
        return EnvironmentFault(f"{path}: the disk is full; make room. What was answered before is kept")
    return EnvironmentFault(f"{path}: {error}; check the disk, its rights, and whether another station holds the file")
