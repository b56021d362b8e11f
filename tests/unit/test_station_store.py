"""The station's store: what is kept once, what is taken back, who may read it, and what is left when it is deleted."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fedbiscuit.cli.station import station_forget
from fedbiscuit.station.app import create_app
from fedbiscuit.station.background import Background
from fedbiscuit.station.database import DATABASE
from fedbiscuit.station.exchange import COMPARISONS, export, refresh
from fedbiscuit.station.nouns import Pair, pair_id
from fedbiscuit.station.queue import Asking
from fedbiscuit.station.station import Station
from fedbiscuit.station.store import Store
from fedbiscuit.types import ConfigError, DataError, EnvironmentFault, IntegrityError

BASIL = Pair.of("How do I keep basil alive?", "Water it.", "Sing to it.")


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "station", seed=1) as found:
        found.add_pairs([BASIL])
        yield found


def kinds(store: Store) -> list[str]:
    return [event.kind for event in store.history()]


# Judging


def test_the_answer_shown_first_is_kept_in_the_pairs_own_order(store):
    turned = store.show("ann", BASIL.id, 0, True)
    assert (turned.first, turned.second) == (BASIL.output_b, BASIL.output_a)
    event = store.judge(turned.token, 0, 2.5, "it made me laugh")
    assert (event.choice, event.first_preferred, event.seconds, event.reason) == (1, True, 2.5, "it made me laugh")
    straight = store.show("bo", BASIL.id, 0, False)
    assert store.judge(straight.token, 0).choice == 0
    assert event.time.endswith("Z")


def test_a_token_is_answered_once_whatever_is_clicked_next(store):
    token = store.show("ann", BASIL.id, 0, False).token
    first = store.judge(token, 0)
    assert store.judge(token, 1) == store.judge(token, None) == store.skip(token) == first
    assert kinds(store) == ["judged"]


def test_twenty_threads_that_click_at_once_give_one_judgement(store):
    token, start = store.show("ann", BASIL.id, 0, False).token, threading.Barrier(20)

    def click(number: int) -> None:
        start.wait(30)
        store.judge(token, number % 2)  # type: ignore[arg-type]

    threads = [threading.Thread(target=click, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert kinds(store) == ["judged"]


CLICKS = """
import sys
from fedbiscuit.station.store import Store

folder, picked, *tokens = sys.argv[1:]
with Store.open(folder) as store:
    print("ready", flush=True)
    sys.stdin.readline()  # both begin at once
    for token in tokens:
        store.judge(token, int(picked))
"""


def test_two_processes_that_click_at_once_give_one_judgement_of_each_showing(store):
    pairs = [Pair.of(f"prompt {number}", "x", "y") for number in range(40)]
    store.add_pairs(pairs)
    tokens = [store.show("ann", pair.id, 0, False).token for pair in pairs]
    clicks = [
        subprocess.Popen(
            [sys.executable, "-c", CLICKS, str(store.folder), picked, *tokens],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for picked in "01"
    ]  # fmt: skip
    limit = threading.Timer(300, lambda: [process.kill() for process in clicks])
    limit.start()
    try:
        assert [process.stdout.readline() for process in clicks] == ["ready\n"] * 2
        for process in clicks:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait(300) for process in clicks] == [0, 0]
    finally:
        limit.cancel()
        for process in clicks:
            process.kill()
            process.communicate()
    assert sorted(event.token for event in store.history()) == sorted(tokens)
    assert {event.kind for event in store.history()} == {"judged"}


def test_an_undo_is_a_record_and_the_pair_comes_again_as_it_was(store):
    shown = store.show("ann", BASIL.id, 0, True)
    store.judge(shown.token, 0)
    again = store.undo("ann", shown.token)
    assert again is not None
    assert (again.pair, again.swapped, store.open_presentation("ann")) == (BASIL, True, again)
    assert again.token != shown.token
    assert [(event.kind, event.undone) for event in store.history()] == [("judged", True), ("undone", False)]
    assert store.undo("ann", shown.token) is None  # a second click
    assert store.judge(shown.token, 1).number == 1  # a tab from before the undo
    assert store.judge(again.token, 1).choice == 0
    assert kinds(store) == ["judged", "undone", "judged"]


def test_a_flag_leaves_the_pair_open(store):
    shown = store.show("ann", BASIL.id, 0, False)
    store.flag(shown.token, "rude")
    assert store.open_presentation("ann") == shown
    store.judge(shown.token, 0)
    assert kinds(store) == ["flagged", "judged"]


def test_what_was_written_down_cannot_be_changed(store):
    store.judge(store.show("ann", BASIL.id, 0, False).token, 0)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        store._connection.execute("UPDATE history SET choice = 1")


def test_seconds_that_cannot_be_are_not_kept(store):
    for number, seconds in enumerate((float("nan"), -1.0, 1e9)):
        store.add_pairs([Pair.of("p", "a", f"b{number}")])
        shown = store.show("ann", pair_id("p", "a", f"b{number}"), 0, False)
        assert store.judge(shown.token, 0, seconds).seconds is None


def test_a_token_of_nobody_is_refused(store):
    with pytest.raises(DataError, match="not known here"):
        store.judge("made-up", 0)


def test_a_pair_is_one_pair_in_either_order(store):
    assert store.add_pairs([Pair.of(BASIL.prompt, BASIL.output_b, BASIL.output_a)]) == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("a\x00b", "NUL"),
        ("a\ud800b", "half of a character"),
        ("x" * (1 << 20), "shorten"),
    ],
)
def test_fault_04_05_texts_that_an_export_could_not_carry_are_refused(store, text, why):
    with pytest.raises(DataError, match=why):
        store.add_pairs([Pair.of("p", text, "b")])
    with pytest.raises(DataError, match=why):
        store.add_prompts([text])
    assert store.pairs() == [BASIL]


def test_fault_28_hidden_characters_come_back_as_they_were_written(store):
    """The page shows them as escapes (test_station_page.py); what is trained on is what was compared."""
    odd = Pair.of("\u202edrawkcab\u200b", "\x1b[31mred", "<script>alert(1)</script>")
    store.add_pairs([odd])
    assert store.pair(odd.id) == odd


def test_a_choice_is_on_the_disk_when_the_call_returns(store):
    """The settings of SQLite that promise it; that a power cut keeps it cannot be tried here."""
    told = [
        store._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "secure_delete")
    ]
    assert told == ["wal", 2, 1]


# Who may read it


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_every_file_is_for_its_owner_alone_while_it_is_open_and_after(tmp_path):
    folder = tmp_path / "deep" / "station"
    with Store.open(folder) as store:
        store.add_pairs([BASIL])
        store.judge(store.show("ann", BASIL.id, 0, False).token, 0)
        refresh(store)
        found = modes(folder)
        assert found.keys() >= {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", COMPARISONS}
        assert set(found.values()) == {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert set(modes(folder).values()) == {0o600}


def test_a_folder_that_others_may_read_is_refused_unless_it_is_empty(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match=f"chmod 700 {folder}"):
        Store.open(folder)
    (folder / "holiday.jpg").unlink()
    Store.open(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_link_in_the_place_of_the_store_is_not_followed(tmp_path):
    (tmp_path / "station").mkdir(mode=0o700)
    (tmp_path / "station" / DATABASE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentFault):
        Store.open(tmp_path / "station")
    assert not (tmp_path / "elsewhere").exists()


# Files that are not ours


def test_a_store_of_a_newer_version_is_left_alone(tmp_path):
    Store.open(tmp_path / "s").close()
    path = tmp_path / "s" / DATABASE
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA user_version = 7")
    db.close()
    before = path.read_bytes()
    with pytest.raises(EnvironmentFault, match=r"version 7 .* pip install -U fedbiscuit"):
        Store.open(tmp_path / "s")
    assert path.read_bytes() == before


def test_what_is_no_store_is_named_and_left_alone(tmp_path):
    (tmp_path / "s").mkdir(mode=0o700)
    path = tmp_path / "s" / DATABASE
    path.write_bytes(b"a letter to my mother" * 100)
    with pytest.raises(IntegrityError, match=str(path)):
        Store.open(tmp_path / "s")
    assert path.read_bytes().startswith(b"a letter")
    for version in (0, 1):
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE money (amount)")
            db.execute(f"PRAGMA user_version = {version}")
        db.close()
        path.chmod(0o640)
        before = path.read_bytes()
        with pytest.raises(IntegrityError, match="none of the station's"):
            Store.open(tmp_path / "s")
        assert path.read_bytes() == before
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


# Deleting


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


SECRETS = {
    "prompt": "my-secret-illness",
    "output_a": "answer-with-a-name",
    "output_b": "other-answer-with-a-name",
    "reason": "because-of-my-boss",
}


@pytest.fixture
def confessed(tmp_path: Path):
    """A station with two pairs, one of them private, judged by two people, and much that came and went."""
    store = Store.open(tmp_path / "station", seed=1)
    secret = Pair.of(*(SECRETS[key] + " " + "long " * 900 for key in ("prompt", "output_a", "output_b")))
    store.add_prompts([secret.prompt, BASIL.prompt])
    store.add_pairs([BASIL, secret, *(Pair.of(f"filler {i} " * 50, "a", "b") for i in range(20))])
    station = Station(store, "ann")
    for person in ("ann", "bo"):
        for pair in (BASIL, secret):
            store.judge(
                store.show(person, pair.id, 0, False).token, 0, 3.0, SECRETS["reason"] if pair == secret else ""
            )
    station.settle()
    refresh(store)
    for text in SECRETS.values():
        assert text.encode() in bytes_of(store.folder)
    yield station, secret
    station.close()
    store.close()


@pytest.mark.parametrize("after", ["at once", "after closing"])
@pytest.mark.parametrize("what", ["the pair", "everything"])
def test_what_is_deleted_is_in_no_file_of_the_folder(confessed, what, after):
    station, secret = confessed
    (station.store.folder / f".tmp-{COMPARISONS}-4194305").write_text(SECRETS["prompt"])  # a crash has left these
    upload = station.store.folder / ".upload-x"
    upload.mkdir()
    (upload / "upload.jsonl").write_text(SECRETS["prompt"])
    os.utime(upload, (0, 0))
    if what == "the pair":
        station.forget_pair(secret.id)
        assert {event.pair for event in station.store.history()} == {BASIL.id}
    else:
        station.forget_all()
        assert station.store.pairs() == station.store.prompts() == station.store.history() == []
        assert not (station.store.folder / COMPARISONS).exists()
    if after == "after closing":
        station.close()
        station.store.close()
    left = bytes_of(station.store.folder)
    assert [text for text in SECRETS.values() if text.encode() in left] == []
    assert (BASIL.output_a.encode() in left) == (what == "the pair")


@pytest.mark.parametrize("name", [f".tmp-{COMPARISONS}-x", f".tmp-{COMPARISONS}-{10**30}", ".upload-gone"])
def test_nothing_that_lies_beside_the_store_keeps_a_deleted_text_in_the_file_beside_it(confessed, monkeypatch, name):
    """Neither a file whose name is none of ours, nor an upload that goes away while it is looked at."""
    station, secret = confessed
    (station.store.folder / name).touch()
    stat_of = Path.stat

    def gone(path: Path, *_: Any, **__: Any) -> Any:
        if path.name == ".upload-gone":
            raise FileNotFoundError(path)
        return stat_of(path)

    monkeypatch.setattr(Path, "stat", gone)
    station.forget_pair(secret.id)
    assert SECRETS["prompt"].encode() not in (station.store.folder / COMPARISONS).read_bytes()


def test_the_file_beside_the_store_is_put_right_also_where_sweeping_meets_trouble(confessed, monkeypatch):
    station, secret = confessed

    def trouble(store: Store) -> None:
        raise OSError("the disk is in a bad mood")

    monkeypatch.setattr("fedbiscuit.station.exchange.sweep", trouble)
    with pytest.raises(OSError, match="bad mood"):
        station.forget_pair(secret.id)
    assert SECRETS["prompt"].encode() not in (station.store.folder / COMPARISONS).read_bytes()


def test_forget_me_removes_what_one_person_said_and_nothing_else(confessed):
    station, _ = confessed
    filler = station.store.pairs()[-1]
    station.judge(station.store.show("ann", filler.id, 0, False).token, 1, 2.0, "only ann says this")
    assert b"only ann says this" in bytes_of(station.store.folder)
    station.forget_person()
    assert {event.person for event in station.store.history()} == {"bo"}
    assert station.store.people() == ["bo"]
    assert len(station.store.pairs()) == 22
    left = bytes_of(station.store.folder)
    assert (b'"ann"' in left, b"only ann says this" in left, SECRETS["reason"].encode() in left) == (False, False, True)


def test_a_pair_that_is_deleted_may_come_back_and_is_asked_anew(confessed):
    station, secret = confessed
    station.forget_pair(secret.id)
    assert station.store.add_pairs([secret]) == 1
    assert secret.id not in {event.pair for event in station.store.history()}


@pytest.mark.parametrize("by", ["the page", "the command line"])
def test_deleting_says_so_where_another_process_still_reads_what_was_there(confessed, monkeypatch, by):
    station, secret = confessed
    folder = station.store.folder
    assert SECRETS["prompt"].encode() in (folder / COMPARISONS).read_bytes()
    with contextlib.closing(sqlite3.connect(folder / DATABASE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM pairs").fetchone()
        monkeypatch.setattr("fedbiscuit.station.database.BUSY_SECONDS", 0.05)
        station.store._connection.execute("PRAGMA busy_timeout = 50")
        forget = station.forget_pair if by == "the page" else lambda id: station_forget(pair=id, folder=folder)
        with pytest.raises(EnvironmentFault, match=r"deleted, but another process .* end every station of this folder"):
            forget(secret.id)
        assert SECRETS["prompt"].encode() not in (folder / COMPARISONS).read_bytes()
        assert BASIL.prompt.encode() in (folder / COMPARISONS).read_bytes()
        assert secret not in station.store.pairs()
    station.close()
    station.store.close()
    assert [text for text in SECRETS.values() if text.encode() in bytes_of(folder)] == []


def test_a_full_disk_is_called_so_and_the_store_goes_on_when_there_is_room(store):
    [pages] = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(EnvironmentFault, match="the disk is full; make room"):
        store.add_pairs([Pair.of(f"prompt {number}", "x" * 5000, "y") for number in range(50)])
    assert store.pairs() == [BASIL]
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert store.add_pairs([Pair.of("p", "x", "y")]) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("what", ["the folder", "the store", "the file beside it", "an export"])
def test_what_the_disk_refuses_comes_with_a_step_that_a_station_has(store, tmp_path, monkeypatch, what, number):
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    store.judge(store.show("ann", BASIL.id, 0, False).token, 0)
    place, do = {
        "the folder": ("pathlib.Path.mkdir", lambda: Store.open(tmp_path / "new")),
        "the store": ("os.open", lambda: Store.open(store.folder)),
        "the file beside it": ("fedbiscuit.rundir.disk.write_synced", lambda: refresh(store)),
        "an export": ("fedbiscuit.rundir.disk.write_synced", lambda: export(store, tmp_path / "mine.jsonl")),
    }[what]
    monkeypatch.setattr(place, refused)
    with pytest.raises(EnvironmentFault) as error:
        do()
    said = str(error.value)
    assert "--resume" not in said
    assert "runs_dir" not in said
    if number == errno.ENOSPC:
        assert "the disk is full" in said
        assert "make room" in said
    else:
        assert ("name another file" if what == "an export" else "name another --folder") in said


# The work of a click


def test_a_store_of_before_gets_its_indexes_and_counts_read_no_texts(tmp_path):
    with Store.open(tmp_path / "s", 1) as store:
        store.add_pairs([BASIL, Pair.of("alike", "x", "x"), Pair.of("blind", "x", "y", "raw", "new", blind=True)])
        for [name] in store._all("SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE 'CREATE INDEX%'"):
            store._connection.execute(f"DROP INDEX {name}")
        before = [store.pair_ids(blind) for blind in (False, True)]
    with Store.open(tmp_path / "s") as store:
        assert [store.pair_ids(blind) for blind in (False, True)] == before
        assert [len(ids) for ids in before] == [1, 1]
        assert (store.count_ahead("ann", False), store.count_ahead("ann", True)) == (0, 1)
        asked: list[str] = []
        store._connection.set_trace_callback(asked.append)
        store.pair_ids(False)
        store.is_answered("token")
        store.count_ahead("ann", False)
        store._connection.set_trace_callback(None)
        plans = [str(store._all(f"EXPLAIN QUERY PLAN {query}")) for query in asked]
        assert ["COVERING INDEX pairs_without_texts" in plan for plan in plans] == [True, False, True]
        assert not any("SCAN history" in plan or "SCAN presentations" in plan for plan in plans)


def test_what_was_shown_is_answered_once_it_is_judged_or_skipped_and_not_by_a_flag(store):
    token = store.show("ann", BASIL.id, 0, False).token
    assert not store.is_answered(token)
    store.flag(token)
    assert not store.is_answered(token)
    store.skip(token)
    assert store.is_answered(token)
    again = store.undo("ann", token)
    assert (store.is_answered(token), store.is_answered(again.token)) == (True, False)


def test_the_file_beside_the_store_is_written_once_for_many_clicks(store, monkeypatch):
    written: list[int] = []
    monkeypatch.setattr("fedbiscuit.station.exchange.refresh", lambda store: written.append(len(store.history())))
    monkeypatch.setattr("fedbiscuit.station.station.MIRROR_SECONDS", 3600.0)
    station = Station(store, "ann", Asking(repeat_every=0))
    store.add_pairs([Pair.of(f"prompt {number}", "x", "y") for number in range(9)])
    while (shown := station.present()) is not None:
        station.judge(shown.token, 0)
    assert written == [0]  # at the start
    station.settle()
    assert written == [0, 10]
    station.ask(["anything changes"])
    station.forget_prompt(1)
    assert written == [0, 10, 10]  # what is deleted does not wait
    station.close()
    assert written == [0, 10, 10, 10]


def test_background_work_waits_for_a_pause_that_comes_by_itself():
    done = threading.Event()
    thread = Background("test", lambda: bool(done.set()), 0.01)
    thread.nudge()
    assert done.wait(60)
    thread.close()


def test_of_two_clicks_at_once_what_is_said_is_what_is_kept(store, monkeypatch):
    """The second click comes while the first one is between looking and keeping."""
    token, station = store.show("ann", BASIL.id, 0, False).token, Station(store, "ann", Asking(repeat_every=0))
    app = create_app(station, "token", ["127.0.0.1:1"]).app
    judge = next(route.endpoint for route in app.routes if getattr(route, "path", "") == "/judge")
    said: dict[str, str] = {}
    looked, second = threading.Event(), threading.Thread(target=lambda: click("second"))
    is_answered = store.is_answered

    def click(picked: str) -> None:
        said[picked] = judge(token=token, picked=picked).headers["location"]

    def slowly(token: str) -> bool:
        found = is_answered(token)
        if not looked.is_set():
            looked.set()
            second.start()
            second.join(0.5)  # it waits for the first one, so this limit is reached
        return found

    monkeypatch.setattr(store, "is_answered", slowly)
    click("first")
    second.join(60)
    assert said == {"first": "/?said=first", "second": "/?said=already"}
    assert [event.choice for event in store.history()] == [0]
    station.close()
