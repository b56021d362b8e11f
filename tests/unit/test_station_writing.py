"""Answers that are written in the background: at most so many ahead, errors kept and shown, and a test that is blind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedbiscuit.cli.station import station as station_command
from fedbiscuit.station.nouns import Pair
from fedbiscuit.station.queue import Asking
from fedbiscuit.station.scoring import Scorer, digest_of_selectors
from fedbiscuit.station.station import Station
from fedbiscuit.station.store import Store
from fedbiscuit.station.writing import Author, Authors, Writer, authors_of, blind_result
from fedbiscuit.types import ConfigError, DataError


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "station", seed=1) as found:
        yield found


def echo(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
    progress(0.5)
    return [f"answer {number} to {prompt}" for number in range(count)]


def authors(write=echo, aligned=None) -> Callable[[], Authors]:
    raw = Author("model tiny", write)
    return lambda: Authors(raw, (raw, Author("policy one", aligned)) if aligned else None)


def settled(writer: Writer) -> None:
    writer.nudge()
    assert writer.settle(60)


def test_two_answers_to_each_prompt_come_while_nobody_waits(store):
    station = Station(store, "ann", authors=authors())
    assert station.ask(["one", "two ", "  ", "one"]) == 2
    settled(station.writer)
    assert [(pair.prompt, pair.output_a, pair.output_b, pair.source_a) for pair in store.pairs()] == [
        (prompt, f"answer 0 to {prompt}", f"answer 1 to {prompt}", "model tiny") for prompt in ("one", "two")
    ]
    found = station.writing()
    assert (found.state, found.written, found.waiting, found.failed) == ("idle", 2, 0, 0)
    station.close()


def test_a_full_queue_waits_until_something_is_judged_and_nothing_that_waits_is_lost(store):
    store.add_prompts([f"prompt {number}" for number in range(6)])
    store.add_pairs([Pair.of(f"imported {number}", "x", "y") for number in range(9)])  # these count for nothing
    writer = Writer(store, "ann", authors(), ahead=2)
    settled(writer)
    assert (writer.status().state, writer.status().waiting) == ("full", 4)
    written = [pair for pair in store.pairs() if pair.source_a != "imported"]
    store.judge(store.show("ann", written[0].id, 0, False).token, 0)
    settled(writer)
    assert writer.status().waiting == 3
    store.judge(store.show("bo", written[1].id, 0, False).token, 0)  # it is ann's queue
    settled(writer)
    assert writer.status().waiting == 3
    writer.close()
    later = Writer(store, "ann", authors(), ahead=20)
    settled(later)
    assert later.status().waiting == 0
    later.close()


def test_a_prompt_that_cannot_be_answered_is_kept_with_the_reason_and_the_others_go_on(store):
    def write(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        if prompt == "too long":
            raise DataError("this prompt has 9000 tokens; shorten it")
        return {"dumb": [""] * count, "stubborn": ["yes"] * count}.get(prompt) or echo(prompt, count, progress)

    store.add_prompts(["too long", "dumb", "stubborn", "fine"])
    writer = Writer(store, "ann", authors(write))
    settled(writer)
    assert {prompt.text: prompt.error for prompt in store.prompts("failed")} == {
        "too long": "this prompt has 9000 tokens; shorten it",
        "dumb": "model tiny wrote nothing 6 times; ask in other words",
        "stubborn": "model tiny wrote the same 6 times; ask in other words",
    }
    assert [pair.prompt for pair in store.pairs()] == ["fine"]
    writer.close()


def test_a_model_that_cannot_be_loaded_is_said_and_tried_again_when_asked(store):
    tries: list[int] = []

    def load() -> Authors:
        tries.append(1)
        if len(tries) == 1:
            raise ConfigError("model.base: nowhere: not found as a folder or a .gguf file")
        return authors()()

    store.add_prompts(["one"])
    writer = Writer(store, "ann", load)
    assert writer.settle(60)
    assert writer.status().state == "failed"
    assert "not found as a folder" in writer.status().error
    assert [prompt.state for prompt in store.prompts()] == ["waiting"]
    writer.retry()
    assert writer.settle(60)
    assert (writer.status().state, writer.status().error, len(store.pairs())) == ("idle", "", 1)
    writer.close()


def test_what_went_wrong_is_not_said_any_more_once_it_is_tried_again(store):
    """Neither while the model is loaded, nor while the rest of a long queue is written."""
    steps = {name: (threading.Event(), threading.Event()) for name in ("load", "one", "two")}
    broken = [True]

    def step(name: str) -> None:
        begun, go_on = steps[name]
        begun.set()
        assert go_on.wait(60)

    def load() -> Authors:
        if broken:
            raise RuntimeError("out of memory")
        step("load")
        return authors(write)()

    def write(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        step(prompt)
        if prompt == "two":
            raise RuntimeError("out of memory again")
        return echo(prompt, count, progress)

    store.add_prompts(["one", "two"])
    writer = Writer(store, "ann", load)
    assert writer.settle(60)
    assert (writer.status().state, writer.status().error) == ("failed", "RuntimeError: out of memory")
    broken.clear()
    writer.retry()
    assert writer.status().error == ""
    for name, state in (("load", "loading"), ("one", "writing"), ("two", "writing")):
        assert steps[name][0].wait(60)
        assert (writer.status().state, writer.status().error) == (state, "")
        steps[name][1].set()
    assert writer.settle(60)
    assert (writer.status().state, writer.status().error) == ("failed", "RuntimeError: out of memory again")
    steps["two"][0].clear()
    steps["two"][1].clear()
    writer.nudge()  # as after a judgement
    assert steps["two"][0].wait(60)
    assert (writer.status().state, writer.status().error) == ("writing", "")
    steps["two"][1].set()
    writer.close()


def test_no_model_is_loaded_before_a_prompt_waits(store):
    def load() -> Authors:
        raise AssertionError("loaded for nothing")

    writer = Writer(store, "ann", load)
    settled(writer)
    assert (writer.status().state, writer.status().error) == ("idle", "")
    writer.close()


def test_a_model_that_cannot_be_loaded_is_tried_again_for_a_new_prompt_and_not_after_each_judgement(store):
    tries: list[int] = []

    def load() -> Authors:
        tries.append(1)
        raise ConfigError("model.base: nowhere: not found")

    store.add_prompts(["one"])
    writer = Writer(store, "ann", load)
    for _ in range(3):
        settled(writer)
    assert (len(tries), writer.status().state, writer.status().error) == (1, "failed", "model.base: nowhere: not found")
    store.add_prompts(["two"])
    settled(writer)
    settled(writer)
    assert len(tries) == 2
    writer.retry()
    assert writer.settle(60)
    assert (len(tries), writer.status().state) == (3, "failed")
    writer.close()


def test_an_answer_that_cannot_be_kept_is_said_and_the_next_prompt_gets_its_answers(store):
    def write(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        return [f"answer\x00{number}" for number in range(count)] if prompt == "odd" else echo(prompt, count, progress)

    store.add_prompts(["odd", "fine"])
    writer = Writer(store, "ann", authors(write))
    settled(writer)
    assert [pair.prompt for pair in store.pairs()] == ["fine"]
    [failed] = store.prompts("failed")
    assert "NUL" in failed.error
    assert writer.status().error == ""
    writer.close()


def test_closing_stops_in_the_middle_of_an_answer_and_the_prompt_waits_for_the_next_start(store):
    begun, seen = threading.Event(), []

    def endless(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        while True:
            progress(0.25)
            seen.append(1)
            begun.set()

    store.add_prompts(["one"])
    writer = Writer(store, "ann", authors(endless))
    assert begun.wait(60)
    assert (writer.status().state, writer.status().share) == ("writing", 0.25)
    writer.close()
    assert [prompt.state for prompt in store.prompts()] == ["waiting"]
    assert store.pairs() == []


def test_what_was_written_for_a_prompt_that_has_been_deleted_meanwhile_is_dropped(store):
    begun, go_on = threading.Event(), threading.Event()

    def slow(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        begun.set()
        assert go_on.wait(60)
        return echo(prompt, count, progress)

    store.add_prompts(["my secret"])
    writer = Writer(store, "ann", authors(slow))
    assert begun.wait(60)
    store.forget_all()
    go_on.set()
    settled(writer)
    writer.close()
    assert store.pairs() == []


def test_what_was_written_for_a_deleted_prompt_does_not_come_back_as_the_answer_to_another(store):
    store.add_prompts(["my secret"])
    [old] = store.prompts()
    store.forget_all()
    store.add_prompts(["harmless"])
    assert not store.answered(old, Pair.of(old.text, "answer", "other answer"))
    store.failed(old, "too long")
    assert store.pairs() == []
    assert [(prompt.text, prompt.state) for prompt in store.prompts()] == [("harmless", "waiting")]


# What the command starts


@pytest.fixture
def started(tmp_path: Path, monkeypatch):
    """Starts a station by its command, which ends at once; whether it would write, and what it asks."""

    def start(**options: Any) -> tuple[bool, Asking]:
        seen: list[tuple[bool, Asking]] = []
        monkeypatch.setattr(
            "fedbiscuit.station.serving.serve",
            lambda desk, *_, **__: seen.append((desk.writer is not None, desk.asking)),
        )
        station_command(folder=tmp_path / "station", **options)
        return seen[0]

    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "output_a": "x", "output_b": "y"}\n')
    (tmp_path / "selectors" / "u0").mkdir(parents=True)
    (tmp_path / "selectors" / "u0" / "adapter_model.safetensors").write_bytes(b"one")
    return start


def test_with_pairs_alone_no_model_is_named_and_with_a_model_or_nothing_it_writes(started, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    assert not started(pairs=pairs)[0]
    assert started(pairs=pairs, model="some-model")[0]
    assert started(pairs=pairs, policy=tmp_path)[0]
    assert started()[0]


def test_prompts_that_were_asked_before_are_named_with_what_lets_a_policy_answer_them(started, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    said = []
    for text, options in (
        ("one\ntwo\n", {}), ("one\ntwo\n", {}), ("one\ntwo\nthree\n", {"policy": tmp_path}),
        ("one\n", {"policy": tmp_path, "blind": True}),
    ):  # fmt: skip
        prompts.write_text(text)
        started(prompts=prompts, **options)
        said.append(capsys.readouterr().out.strip())
    assert said == [
        f"2 new prompts from {prompts}",
        f"0 new prompts from {prompts}; 2 were asked before and are not answered again",
        f"1 new prompts from {prompts}; 2 were asked before and are not answered again: forget their pairs first, or let "
        "the policy answer them with --blind",
        f"1 new prompts from {prompts}",
    ]


def test_options_that_would_do_nothing_are_refused(started, tmp_path):
    for options in (
        {"blind": True},
        {"blind": True, "policy": tmp_path},
        {"blind": True, "prompts": tmp_path / "p.txt"},
    ):
        with pytest.raises(ConfigError, match=r"--blind: .* --prompts FILE and --policy RUN"):
            started(**options)
    with pytest.raises(ConfigError, match=r"--random-share: .* add --selectors RUN"):
        started(random_share=0.5)
    assert not (tmp_path / "station").exists()


def test_the_share_of_random_pairs_is_the_one_that_is_given(started, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    monkeypatch.setattr("fedbiscuit.station.scoring.readers_of", lambda *_: lambda: lambda asked: [None] * len(asked))
    assert started(pairs=pairs, selectors=tmp_path)[1].random_share == 0.3
    assert started(pairs=pairs, selectors=tmp_path, random_share=0.0)[1].random_share == 0.0


# The blind test


def aligned(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
    return ["answer 0 to alike"] if prompt == "alike" else [f"a better answer to {prompt}"]


def test_the_blind_test_gives_this_persons_own_win_rate_and_counts_equal_texts_as_ties(store):
    station = Station(store, "ann", Asking(repeat_every=0), authors(echo, aligned))
    assert blind_result(store, "ann") is None
    station.ask(["p1", "p2", "p3", "p4", "alike"], blind=True)
    settled(station.writer)
    assert blind_result(store, "ann") is None
    picked = {"p1": "aligned", "p2": "aligned", "p3": "raw", "p4": "tie"}
    places = set()
    while (shown := station.present(blind=True)) is not None:
        wanted = picked[shown.pair.prompt]
        places.add(shown.first == shown.pair.output_a)
        station.judge(shown.token, None if wanted == "tie" else int(("better" in shown.first) != (wanted == "aligned")))
    result = blind_result(store, "ann")
    assert (result["name"], result["wins"], result["losses"], result["ties"]) == ("policy one", 2, 1, 2)
    assert result["alike"] == 1
    assert result["win_rate"] == pytest.approx((2 + 2 / 2) / 5)
    assert 0 <= result["interval"][0] < result["win_rate"] < result["interval"][1] <= 1
    assert blind_result(store, "bo") is None
    assert station.present() is None  # nothing of it is a training pair
    station.close()


def test_the_same_prompts_test_another_policy_and_the_result_is_of_the_last_one(store):
    first = Station(store, "ann", authors=authors(echo, aligned))
    first.ask(["p1"], blind=True)
    settled(first.writer)
    first.judge(first.present(blind=True).token, None)
    first.close()
    other = Author("policy two", lambda prompt, count, progress: ["the best answer"])
    second = Station(store, "ann", authors=lambda: Authors(other, (Author("model tiny", echo), other)))
    assert second.ask(["p1"], blind=True) == 1
    settled(second.writer)
    shown = second.present(blind=True)
    second.judge(shown.token, 0 if shown.first == "the best answer" else 1)
    assert blind_result(store, "ann")["name"] == "policy two"
    assert (blind_result(store, "ann")["wins"], blind_result(store, "ann")["ties"]) == (1, 0)
    second.close()


def test_a_second_policy_is_measured_on_all_its_prompts_also_where_it_writes_what_is_there_already(store):
    """Of four: two texts are the raw model's again, one is as policy one wrote it, one is new."""

    def start(name: str, says: dict[str, str]) -> Station:
        other = Author(name, lambda prompt, count, progress: [says[prompt]])
        station = Station(
            store, "ann", Asking(repeat_every=0), lambda: Authors(other, (Author("model tiny", echo), other))
        )
        station.ask([f"p{number}" for number in range(4)], blind=True)
        settled(station.writer)
        return station

    raw = {f"p{number}": f"answer 0 to p{number}" for number in range(4)}
    first = start("policy one", {**raw, "p2": "better", "p3": "worse"})
    while (shown := first.present(blind=True)) is not None:
        first.judge(shown.token, int(shown.first == raw[shown.pair.prompt]))
    assert blind_result(store, "ann")["wins"] == 2
    first.close()
    second = start("policy two", {**raw, "p2": "better", "p3": "new"})
    assert len(store.pairs()) == 8
    assert blind_result(store, "ann") is None
    while (shown := second.present(blind=True)) is not None:
        second.judge(shown.token, int(shown.first == raw[shown.pair.prompt]))
    second.close()
    result = blind_result(store, "ann")
    assert (result["name"], result["wins"], result["losses"], result["ties"], result["alike"]) == (
        "policy two",
        2,
        0,
        2,
        2,
    )
    assert result["win_rate"] == 0.75
    start("policy two", {}).close()  # it need not write again
    assert store.prompts("failed") == []
    start("policy three", raw).close()  # nothing to ask, and that is its result
    result = blind_result(store, "ann")
    assert (result["name"], result["win_rate"], result["alike"]) == ("policy three", 0.5, 4)


def test_where_all_agree_the_interval_of_the_blind_test_still_says_how_little_ten_are(store):
    store.add_pairs([Pair.of(f"p{n}", "raw", "better", "model tiny", "policy one", blind=True) for n in range(10)])
    for pair in store.pairs():
        store.judge(store.show("ann", pair.id, 0, False).token, 1)
    result = blind_result(store, "ann")
    assert (result["win_rate"], result["wins"]) == (1.0, 10)
    assert result["interval"] == [pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0)]


def test_the_same_policy_does_not_write_again_for_the_prompts_of_the_blind_test(store):
    wrote: list[str] = []

    def better(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        wrote.append(prompt)
        return [f"better number {len(wrote)}"]

    for prompts in (["p1"], ["p1", "p2"]):  # the second time is a restart with one prompt more
        station = Station(store, "ann", authors=authors(echo, better))
        station.ask(prompts, blind=True)
        settled(station.writer)
        station.close()
    assert wrote == ["p1", "p2"]
    assert len(store.pairs()) == 2
    assert store.count_prompts("written", True) == 2


def test_a_blind_test_without_a_policy_says_what_is_missing(store):
    store.add_prompts(["p"], blind=True)
    writer = Writer(store, "ann", authors())
    settled(writer)
    assert "start the station with --policy RUN" in store.prompts("failed")[0].error
    writer.close()


def test_a_folder_without_a_policy_is_refused_when_it_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="no aligned policy here"):
        authors_of("", tmp_path)()


# Selectors that disagree


def test_pairs_are_scored_in_the_background_and_the_disputed_one_comes_first(store):
    says = {"clear": [0.9, 0.9], "disputed": [0.1, 0.9], "too long": None}
    store.add_pairs([Pair.of(prompt, "x", "y") for prompt in says])
    readers = lambda: lambda pairs: [says[pair.prompt] for pair in pairs]  # noqa: E731
    station = Station(store, "ann", Asking(0, "digest", 0.0), readers=readers)
    assert station._scorer.settle(60)
    assert station.present().pair.prompt == "disputed"
    assert len(store.disagreements("digest")) == 3
    station.close()
    scorer = Scorer(store, "digest", lambda: pytest.fail("all is known"))
    scorer.nudge()
    assert scorer.settle(60)
    scorer.close()


def test_selectors_that_cannot_be_loaded_are_said_and_the_person_goes_on(store):
    def load():
        raise ConfigError("runs/x: its base model is not found here")

    store.add_pairs([Pair.of("p", "x", "y")])
    station = Station(store, "ann", Asking(0, "digest", 0.0), readers=load)
    assert station._scorer.settle(60)
    assert "base model" in station.problem()
    assert station.present().pair.prompt == "p"
    station.close()


def test_other_selectors_have_another_digest_and_none_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no trained selectors here"):
        digest_of_selectors(tmp_path)
    for u, content in enumerate((b"one", b"two")):
        (tmp_path / "selectors" / f"u{u}").mkdir(parents=True)
        (tmp_path / "selectors" / f"u{u}" / "adapter_model.safetensors").write_bytes(content)
    before = digest_of_selectors(tmp_path)
    (tmp_path / "selectors" / "u1" / "adapter_model.safetensors").write_bytes(b"other")
    assert digest_of_selectors(tmp_path) != before
