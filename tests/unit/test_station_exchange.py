"""Comparisons out of the station and into it, and the folder as the data of a site."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from fedbiscuit.config import DataSettings
from fedbiscuit.data.comparisons import COMPARISONS, check_files, read_comparisons
from fedbiscuit.data.sources import load
from fedbiscuit.station.exchange import export, import_file, import_prompts, records, refresh
from fedbiscuit.station.nouns import Pair, pair_id
from fedbiscuit.station.queue import Asking, consistency, present
from fedbiscuit.station.station import Station
from fedbiscuit.station.status import status_lines
from fedbiscuit.station.store import Store
from fedbiscuit.types import ConfigError, DataError


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "station", seed=1) as found:
        yield found


def judged(store: Store, count: int, person: str = "ann", how: Asking = Asking(), start: int = 0) -> None:  # noqa: B008
    """New pairs, all of which this person judges: A, B, A, ..."""
    store.add_pairs(
        [Pair.of(f"prompt {i}", f"first of {i}", f"the second of {i}") for i in range(start, start + count)]
    )
    number = 0
    while (shown := present(store, person, how)) is not None:
        store.judge(shown.token, number % 2, 2.0 + number)  # type: ignore[arg-type]
        number += 1


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Out


def test_an_export_says_who_preferred_what_and_how_far_it_can_be_relied_on(store, tmp_path):
    pair = Pair.of("Basil?", "Water.", "Sing.", "model tiny", "model tiny")
    store.add_pairs([pair])
    store.judge(store.show("ann", pair.id, 0, True).token, 0, 2.53)
    again = store.show("ann", pair.id, 1, False)
    store.flag(again.token, "rude")
    event = store.judge(again.token, 0)
    assert export(store, tmp_path / "out.jsonl") == 1
    [row] = lines(tmp_path / "out.jsonl")
    [first, *_] = store.history()
    assert row == {
        "prompt": "Basil?",
        "output_a": "Water.",
        "output_b": "Sing.",
        "choice": 1,
        "client": "ann",
        "split": "train",
        "id": row["id"],
        "meta": {
            "shown_first": "b",
            "time": first.time,
            "seconds": 2.5,
            "again": "other",
            "flagged": True,
            "sources": ["model tiny", "model tiny"],
        },
    }
    assert event.choice == 0
    assert row["id"].startswith(pair.id[:16])
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o600


def test_data_check_finds_nothing_to_say_about_an_export(store, tmp_path):
    for person in ("ann", "bo"):
        judged(store, 60, person)
    export(store, tmp_path / "out.jsonl")
    report = check_files(tmp_path / "out.jsonl")
    assert report.errors == []
    assert [text for text in report.warnings if "pairs of answers are in train of one client" not in text] == []
    assert report.num_comparisons == 120
    assert all(row["train"] > 40 and row["test"] >= 1 for row in report.clients.values())


def test_ties_skips_undone_answers_and_the_blind_test_are_not_trained_on(store):
    pairs = [Pair.of(f"p{i}", "a", f"b{i}", blind=i == 3) for i in range(5)]
    store.add_pairs(pairs)
    tokens = [store.show("ann", pair.id, 0, False).token for pair in pairs]
    store.judge(tokens[0], None)
    store.skip(tokens[1])
    store.judge(tokens[2], 0)
    store.undo("ann", tokens[2])
    store.judge(tokens[3], 0)
    store.judge(tokens[4], 0)
    assert [row["prompt"] for row in records(store)] == ["p4"]
    assert [row["event"] for row in records(store, "history")].count("judged") == 4


def test_a_flag_that_was_taken_back_is_not_exported(store):
    token = present_new(store, "p")
    store.flag(token, "a slip")
    store.judge(token, 0)
    again = store.undo("ann", token)
    store.judge(again.token, 0)
    [row] = records(store)
    assert "flagged" not in row["meta"]
    store.flag(again.token, "meant")
    assert next(records(store))["meta"]["flagged"] is True


def test_what_is_held_out_stays_held_out_when_more_is_judged(store):
    seen: dict[str, set[str]] = {}
    for start in range(0, 120, 20):
        judged(store, 20, start=start)
        for row in records(store):
            seen.setdefault(row["prompt"], set()).add(row["split"])
    assert len(seen) == 120
    moved = [prompt for prompt, splits in seen.items() if len(splits) > 1]
    assert len(moved) <= 1  # the single one of a small set, until one comes whose turn it is
    assert 5 <= sum("test" in splits for splits in seen.values()) <= 25


def test_the_export_for_trl_has_its_three_columns(store, tmp_path):
    judged(store, 4)
    export(store, tmp_path / "trl.jsonl", "trl")
    mine, theirs = list(records(store)), lines(tmp_path / "trl.jsonl")
    assert [set(row) for row in theirs] == [{"prompt", "chosen", "rejected"}] * 4
    for row, other in zip(mine, theirs, strict=True):
        assert other["chosen"] == row[("output_a", "output_b")[row["choice"]]]
        assert other["rejected"] == row[("output_b", "output_a")[row["choice"]]]


def test_nothing_is_written_where_nothing_was_judged(store, tmp_path):
    with pytest.raises(DataError, match="nobody has judged"):
        export(store, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="bo has judged nothing"):
        export(store, tmp_path / "out.jsonl", person="bo")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_export_replaces_nothing(store, tmp_path):
    judged(store, 2)
    (tmp_path / "letter.jsonl").write_text("dear mother")
    with pytest.raises(ConfigError, match="replaces nothing"):
        export(store, tmp_path / "letter.jsonl")
    assert (tmp_path / "letter.jsonl").read_text() == "dear mother"


# The derived file


def test_the_folder_has_what_was_judged_and_a_torn_or_older_file_is_put_right_at_the_next_start(store):
    station, path = Station(store, "ann"), store.folder / COMPARISONS
    assert not path.exists()
    judged(store, 3)
    station.ask(["anything changes"])
    station.settle()
    assert [row["prompt"] for row in lines(path)] == [row["prompt"] for row in records(store)]
    station.close()
    path.write_text("torn")
    Station(store, "ann").close()
    assert len(lines(path)) == 3


def test_a_file_that_is_right_is_not_written_again(store):
    judged(store, 3)
    refresh(store)
    before = (store.folder / COMPARISONS).stat()
    refresh(store)
    after = (store.folder / COMPARISONS).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_folder_of_a_station_stands_for_its_file_wherever_data_is_named(store):
    judged(store, 30)
    refresh(store)
    file = str(store.folder / COMPARISONS)
    assert check_files(store.folder).files == check_files(file).files
    comparisons, report = read_comparisons([store.folder])
    assert list(report.files) == [file]
    dataset = load(DataSettings(source="jsonl", path=(str(store.folder),)), 0)
    assert len(comparisons) == 30
    assert set(dataset.clients) == {"ann"}
    assert len(dataset.clients["ann"].test) == sum(one.split == "test" for one in comparisons)


def test_a_folder_without_that_file_is_still_refused(tmp_path):
    with pytest.raises(DataError, match="a folder; name the files in it"):
        read_comparisons([tmp_path])


def test_the_folder_of_a_station_at_which_nothing_was_judged_says_so(store):
    store.judge(present_new(store, "a tie"), None)
    refresh(store)
    with pytest.raises(
        DataError, match=r"nothing that can be trained on has been judged at this station yet; .* station"
    ):
        read_comparisons([store.folder])
    with pytest.raises(DataError, match="nothing that can be trained on"):
        check_files(store.folder)


# In


def test_pairs_come_without_a_choice_and_choices_of_others_are_not_taken_for_mine(store, tmp_path):
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "output_a": "x", "output_b": "y"},
        {"prompt": "p", "output_a": "y", "output_b": "x", "choice": 1, "client": "bo"},
        {"prompt": "q", "chosen": "x", "rejected": "y"},
    ]
    found = import_file(store, write_lines(tmp_path / "pairs.jsonl", rows))
    assert (found.pairs, found.judgements, found.known) == (2, 0, 1)
    assert {pair.source_a for pair in store.pairs()} == {"imported"}
    assert store.history() == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "p", "output_a": "x"}, "2: output_b: expected text"),
        ({"prompt": "p", "output_a": "x", "output_b": " x"}, "2: output_b: the same text"),
        ({"prompt": "p", "output_a": "x", "output_b": ""}, "2: output_b: empty"),
        ({"prompt": "p", "output_a": "x", "output_c": "y"}, "2: 'output_c': unknown key; did you mean"),
        ({"event": "judged"}, "2: token: missing"),
        ({"event": "pair", "prompt": 1}, "2: prompt: 1 cannot stand here"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_taken(store, tmp_path, row, why):
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "output_a": "x", "output_b": "y"}, row])
    with pytest.raises(DataError, match=f"{path}:{why}"):
        import_file(store, path)
    assert store.pairs() == []


def test_a_history_moves_to_another_machine_whole_and_twice_is_once(store, tmp_path):
    judged(store, 25)
    token = store.judge(present_new(store, "late one"), None).token
    store.undo("ann", token)
    store.flag(present_new(store, "another"), "odd")
    export(store, tmp_path / "history.jsonl", "history")
    with Store.open(tmp_path / "other", seed=99) as other:
        found = import_file(other, tmp_path / "history.jsonl")
        assert (found.pairs, found.judgements) == (27, len(store.history()))
        assert [_said(e) for e in other.history()] == [_said(e) for e in store.history()]
        assert list(records(other)) == list(records(store))
        assert consistency(other.history("ann")) == consistency(store.history("ann"))
        again = import_file(other, tmp_path / "history.jsonl")
        assert (again.pairs, again.judgements, again.known) == (0, 0, 27 + len(store.history()))


def test_what_i_have_answered_here_stays_when_a_history_says_otherwise(store, tmp_path):
    judged(store, 3)
    export(store, tmp_path / "history.jsonl", "history")
    with Store.open(tmp_path / "other", seed=2) as other:
        pair = store.pairs()[0]
        other.add_pairs([pair])
        other.judge(other.show("ann", pair.id, 0, False).token, None, reason="mine")
        found = import_file(other, tmp_path / "history.jsonl")
        assert (found.pairs, found.judgements, found.known) == (2, 2, 2)
        assert [e.reason for e in other.history() if e.pair == pair.id] == ["mine"]


def test_a_history_says_the_same_of_a_pair_that_is_here_in_the_other_order(store, tmp_path):
    pair = Pair.of("p", "x", "y")
    store.add_pairs([pair])
    store.judge(store.show("ann", pair.id, 0, True).token, 1)  # y stood first, x was chosen
    store.judge(store.show("bo", pair.id, 0, False).token, None)
    export(store, tmp_path / "history.jsonl", "history")
    with Store.open(tmp_path / "other", seed=2) as other:
        other.add_pairs([Pair.of("p", "y", "x")])
        found = import_file(other, tmp_path / "history.jsonl")
        assert (found.pairs, found.judgements) == (0, 2)
        [row] = records(other)
        assert (row["output_a"], row["choice"], row["meta"]["shown_first"]) == ("y", 1, "a")
        shown = other.presentation(other.history("ann")[0].token)
        assert (shown.first, shown.second) == ("y", "x")
        assert other.history("bo")[0].choice is None


def test_a_pair_of_the_blind_test_takes_no_judgements_to_learn_from(store, tmp_path):
    judged(store, 2)
    export(store, tmp_path / "history.jsonl", "history")
    with Store.open(tmp_path / "other", seed=2) as other:
        pair = store.pairs()[1]
        blind = Pair.of(pair.prompt, pair.output_a, pair.output_b, "raw", "aligned", blind=True)
        other.add_pairs([blind])
        assert import_file(other, tmp_path / "history.jsonl").pairs == 2
        assert list(records(other)) == list(records(store))
        assert blind.id not in {event.pair for event in other.history()}


def test_a_store_and_a_history_that_name_pairs_of_the_blind_test_by_their_texts_alone_are_read(store, tmp_path):
    """So did version 1 of the store."""
    blind, usual = Pair.of("p", "x", "y", "raw", "one", blind=True), Pair.of("q", "x", "y")
    store.add_pairs([blind, usual])
    for pair in (blind, usual):
        store.judge(store.show("ann", pair.id, 0, False).token, 1)
    store.show("bo", blind.id, 0, True)
    said = [_said(event) for event in store.history()]
    named = pair_id("p", "x", "y")
    with store._transaction() as db:
        db.execute("PRAGMA defer_foreign_keys = ON")
        db.execute("UPDATE pairs SET id = ? WHERE blind", (named,))
        db.execute("UPDATE presentations SET pair = ? WHERE pair = ?", (named, blind.id))
        db.execute("PRAGMA user_version = 1")
    assert {event.pair for event in store.history()} == {named, usual.id}
    export(store, tmp_path / "history.jsonl", "history")
    with Store.open(store.folder) as later:
        assert later.pairs() == [blind, usual]
        assert [_said(event) for event in later.history()] == said
        assert present(later, "bo", Asking(blind=True)).pair == blind
        found = import_file(later, tmp_path / "history.jsonl")
        assert (found.pairs, found.judgements) == (0, 0)
    with Store.open(tmp_path / "other", seed=2) as other:
        assert import_file(other, tmp_path / "history.jsonl").judgements == 2
        assert [_said(event) for event in other.history()] == said


def test_a_history_comes_back_into_a_copy_of_its_folder_where_the_same_showings_had_other_answers(store, tmp_path):
    judged(store, 1)  # known to both
    tokens = [present_new(store, f"new {number}") for number in range(4)]
    with Store.open(tmp_path / "copy", seed=5) as copy:
        store._connection.backup(copy._connection)
    with Store.open(tmp_path / "copy") as copy:
        here = [copy.judge(tokens[0], 1), copy.skip(tokens[1]), copy.judge(tokens[2], 0)]
        store.skip(tokens[0])
        store.undo("ann", tokens[0])
        store.judge(tokens[1], 0)
        store.flag(tokens[1], "of another answer")
        store.judge(tokens[2], 0)
        store.judge(tokens[3], 1)
        export(store, tmp_path / "history.jsonl", "history")
        before = len(copy.history())
        found = import_file(copy, tmp_path / "history.jsonl")
        assert (found.pairs, found.judgements) == (0, 1)
        assert [event for event in copy.history() if event.token in tokens[:3]] == here
        assert [event.token for event in copy.history()[before:]] == [tokens[3]]
        assert list(records(copy))[-1]["prompt"] == "new 3"


def test_an_undo_in_a_copy_of_the_folder_takes_back_nothing_that_stands_here(store, tmp_path):
    token = present_new(store, "known to both")
    store.judge(token, 0)
    with Store.open(tmp_path / "copy", seed=5) as copy:
        store._connection.backup(copy._connection)
    with Store.open(tmp_path / "copy") as copy:
        again = copy.undo("ann", token)
        copy.judge(again.token, 1)
        gone = copy.judge(present_new(copy, "only there"), 0).token
        copy.undo("ann", gone)
        export(copy, tmp_path / "history.jsonl", "history")
    found = import_file(store, tmp_path / "history.jsonl")
    assert (found.pairs, found.judgements) == (1, 2)
    assert [(event.kind, event.token, event.undone) for event in store.history()] == [
        ("judged", token, False),
        ("judged", gone, True),
        ("undone", gone, False),
    ]
    assert [(row["prompt"], row["choice"]) for row in records(store)] == [("known to both", 0)]


def test_prompts_come_from_lines_of_text_or_of_json(store, tmp_path):
    (tmp_path / "prompts.txt").write_text("Why is the sky blue?\n\nWho was Ada?\n", encoding="utf-8")
    assert import_prompts(store, tmp_path / "prompts.txt") == (2, 0)
    rows = [{"prompt": "Who was Ada?"}, {"prompt": "New?"}]
    assert import_prompts(store, write_lines(tmp_path / "p.jsonl", rows)) == (1, 1)
    assert [prompt.text for prompt in store.prompts("waiting")] == ["Why is the sky blue?", "Who was Ada?", "New?"]


# Status


def test_status_says_what_there_is_with_names_shown_safely(store):
    judged(store, 22, "ann\u202e")
    refresh(store)
    told = "\n".join(status_lines(store))
    assert "22 pairs" in told
    assert "'ann\\u202e': 22 judged, 0 of them ties" in told
    assert "came again: 2" in told
    assert f"data check {store.folder / COMPARISONS}" in told


def present_new(store: Store, prompt: str) -> str:
    pair = Pair.of(prompt, "a", "b")
    store.add_pairs([pair])
    return store.show("ann", pair.id, 0, False).token


def _said(event: Any) -> tuple[Any, ...]:
    return (event.kind, event.token, event.person, event.pair, event.choice, event.swapped, event.time, event.undone)
