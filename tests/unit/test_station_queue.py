"""Which pair comes next: the same on every reload, turned round by lot, with repeats, and where selectors disagree."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.station.nouns import Event, Pair
from fedbiscuit.station.queue import (
    APART,
    Asking,
    consistency,
    disagreement,
    next_showing,
    present,
    progress,
)
from fedbiscuit.station.store import Store

PAIRS = [f"pair{i}" for i in range(100)]


def event(
    pair: str, choice: int | None = 0, showing: int = 0, swapped: bool = False, kind: str = "judged", **more
) -> Event:
    return Event(0, kind, f"{pair}/{showing}", "ann", pair, showing, swapped, choice, 4.0, "", "t", **more)  # type: ignore[arg-type]


def answered(pairs, how: Asking, steps: int = 10**6, person: str = "ann", known=None) -> list[Event]:
    """All that a person is shown who always picks the first answer."""
    events: list[Event] = []
    while len(events) < steps and (found := next_showing(pairs, events, 7, person, how, known or {})) is not None:
        events.append(event(found.pair, int(found.swapped), found.showing, found.swapped))
    return events


def test_the_next_pair_depends_on_seed_person_and_what_was_answered_and_on_nothing_else():
    how = Asking(repeat_every=0)
    first = next_showing(PAIRS, [], 7, "ann", how, {})
    assert first == next_showing(PAIRS[::-1], [], 7, "ann", how, {})
    orders = {tuple(e.pair for e in answered(PAIRS, how, 20, person)) for person in ("ann", "bo", "cy")}
    assert len(orders) == 3
    assert first != next_showing(PAIRS, [], 8, "ann", how, {})


def test_each_pair_is_asked_once_and_half_of_them_are_turned_round():
    events = answered([f"pair{i}" for i in range(400)], Asking(repeat_every=0))
    assert len({e.pair for e in events}) == len(events) == 400
    assert 160 < sum(e.swapped for e in events) < 240


def test_whether_a_pair_is_turned_round_differs_from_person_to_person():
    turned = [{e.pair: e.swapped for e in answered(PAIRS, Asking(repeat_every=0), person=p)} for p in ("ann", "bo")]
    assert 20 < sum(turned[0][pair] != turned[1][pair] for pair in PAIRS) < 80


def test_after_every_ten_pairs_one_of_them_comes_again_in_the_other_order_and_not_at_once():
    events = answered(PAIRS, Asking(repeat_every=10))
    first = {e.pair: i for i, e in enumerate(events) if e.showing == 0}
    again = [(i, e) for i, e in enumerate(events) if e.showing == 1]
    assert [i for i, _ in again] == [10 + 11 * n for n in range(10)]
    assert len({e.pair for _, e in again}) == 10
    for i, e in again:
        assert e.swapped is not events[first[e.pair]].swapped
        assert i - first[e.pair] > APART
        assert i - first[e.pair] <= 11 + 10


def test_with_two_pairs_a_repeat_waits_for_the_other_and_then_comes_at_once():
    assert [(e.pair, e.showing) for e in answered(["x", "y"], Asking(repeat_every=1))][2:] in (
        [("x", 1), ("y", 1)],
        [("y", 1), ("x", 1)],
    )


def test_no_repeats_where_none_are_wanted_and_none_of_what_was_skipped_or_undone():
    assert all(e.showing == 0 for e in answered(PAIRS, Asking(repeat_every=0)))
    skipped = [event(pair, None, kind="skipped") for pair in PAIRS[:10]]
    undone = [event(pair, undone=True) for pair in PAIRS[:10]]
    for events in (skipped, undone):
        found = next_showing(PAIRS[:10], events, 7, "ann", Asking(repeat_every=5), {})
        assert found is None if events is skipped else (found is not None and found.showing == 0)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 30),
    every=st.integers(0, 6),
    picks=st.lists(st.sampled_from(["a", "tie", "skip", "undo"]), max_size=90),
)
def test_whatever_is_clicked_every_pair_is_asked_once_and_repeats_never_exceed_their_share(count, every, picks):
    pairs, how, events = PAIRS[:count], Asking(repeat_every=every), []
    for pick in [*picks, *["a"] * (2 * count + 2)]:
        if pick == "undo" and events:
            events[-1] = replace(events[-1], undone=True)
            continue
        found = next_showing(pairs, events, 3, "ann", how, {})
        if found is None:
            break
        kind = "skipped" if pick == "skip" else "judged"
        events.append(event(found.pair, 0 if pick == "a" else None, found.showing, found.swapped, kind))
    standing = [e for e in events if not e.undone]
    assert next_showing(pairs, events, 3, "ann", how, {}) is None
    assert all(times == 1 for times in Counter((e.pair, e.showing) for e in standing).values())
    assert {e.pair for e in standing} == set(pairs)
    judged = sum(e.kind == "judged" and e.showing == 0 for e in standing)
    assert sum(e.showing for e in standing) == (judged // every if every else 0)


# Where selectors disagree


def test_the_most_disputed_pair_is_asked_first_and_a_share_is_drawn_by_lot():
    known = {pair: i / 100 for i, pair in enumerate(PAIRS)}
    always = answered(PAIRS, Asking(0, "digest", 0.0), known=known)
    assert [e.pair for e in always] == PAIRS[::-1]
    by_lot = answered(PAIRS, Asking(0, "digest", 1.0), known=known)
    assert [e.pair for e in by_lot] == [e.pair for e in answered(PAIRS, Asking(0))]
    mixed, rest, disputed = answered(PAIRS, Asking(0, "digest", 0.3), 50, known=known), list(PAIRS), 0
    for e in mixed:
        disputed += e.pair == rest[-1]
        rest.remove(e.pair)
    assert 25 < disputed < 45  # seven tenths of 50 are 35


def test_pairs_that_nobody_has_scored_yet_come_after_the_disputed_ones_and_are_not_lost():
    events = answered(PAIRS[:10], Asking(0, "digest", 0.0), known={"pair3": 0.1, "pair8": 0.5})
    assert [e.pair for e in events[:2]] == ["pair8", "pair3"]
    assert len(events) == 10


def test_disagreement_is_what_an_answer_tells_about_who_is_right():
    assert disagreement([1.0, 1.0, 1.0]) == disagreement([0.5, 0.5]) == 0
    assert disagreement([0.0, 1.0]) == pytest.approx(math.log(2))
    assert disagreement([0.1, 0.9]) > disagreement([0.3, 0.7]) > disagreement([0.9, 0.8]) > 0
    assert disagreement([0.5]) == pytest.approx(math.log(2))  # one selector: how unsure it is
    assert disagreement([0.99]) < disagreement([0.6])


# With a store


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "station", seed=1) as found:
        found.add_pairs([Pair.of(f"prompt {i}", f"one {i}", f"two {i}") for i in range(12)])
        yield found


def test_a_reload_a_second_tab_and_a_restart_show_the_same_pair_under_the_same_token(store):
    how = Asking()
    shown = present(store, "ann", how)
    store.add_pairs([Pair.of(f"later {i}", "x", "y") for i in range(50)])
    assert present(store, "ann", how) == shown
    with Store.open(store.folder) as again:
        assert present(again, "ann", how) == shown


def test_after_an_undo_comes_what_was_undone_and_then_what_was_open(store):
    how = Asking(repeat_every=0)
    first = present(store, "ann", how)
    store.judge(first.token, 0)
    second = present(store, "ann", how)
    back = store.undo("ann", progress(store, "ann", how).last)
    assert present(store, "ann", how) == back
    assert back.pair == first.pair
    store.judge(back.token, 1)
    assert present(store, "ann", how) == second


def test_progress_counts_and_says_about_how_long_it_will_take(store):
    how = Asking(repeat_every=5)
    assert (progress(store, "ann", how).left, progress(store, "ann", how).minutes_left) == (14, None)
    for number, seconds in enumerate((10.0, 30.0, 600.0, 20.0, None, 30.0)):
        token = present(store, "ann", how).token
        store.skip(token) if number == 4 else store.judge(token, None if number == 1 else 0, seconds)
    found = progress(store, "ann", how)
    assert (found.judged, found.ties, found.skipped, found.repeats) == (5, 1, 1, 0)
    assert found.left == 6 + 2  # 11 judged pairs in the end make two repeats
    assert found.total == 14
    assert found.minutes_left == pytest.approx(8 * 30 / 60)  # the median: one coffee is no measure
    assert progress(store, "bo", how).left == 14


def test_the_blind_test_is_a_queue_of_its_own(store):
    store.add_pairs(
        [Pair.of("p", "raw", "aligned", "model", "policy", blind=True), Pair.of("q", "same", "same", blind=True)]
    )
    usual, blind = Asking(), Asking(blind=True)
    shown = present(store, "ann", blind)
    assert shown.pair.prompt == "p"
    assert present(store, "ann", usual).pair.blind is False
    store.judge(shown.token, 0)
    assert present(store, "ann", blind) is None
    assert progress(store, "ann", blind).judged == 1
    assert progress(store, "ann", usual).judged == 0


def test_consistency_counts_who_changed_his_mind_and_who_liked_a_place():
    twice = [
        (event("same", 0), event("same", 0, 1, True)),
        (event("left", 0), event("left", 1, 1, True)),  # both times the one that stood first
        (event("right", 1), event("right", 0, 1, True)),
        (event("tie", None), event("tie", 0, 1, True)),
    ]
    events = [e for both in twice for e in both] + [
        event("undone", 1, undone=True),
        event("skip", None, kind="skipped"),
    ]
    found = consistency(events)
    assert (found.repeats, found.same, found.both_first, found.both_second) == (3, 1, 1, 1)
    assert (found.choices, found.first, found.ties) == (7, 3, 1)


def test_a_repeat_that_is_open_is_not_asked_once_its_first_judgement_is_taken_back(tmp_path):
    """What was then said of it would stand in no export."""
    how = Asking(repeat_every=1)
    with Store.open(tmp_path / "station", seed=1) as store:
        store.add_pairs([Pair.of("p", "x", "y")])
        first = present(store, "ann", how)
        store.judge(first.token, 0)
        assert present(store, "ann", how).showing == 1
        again = store.undo("ann", first.token)
        store.skip(again.token)
        assert present(store, "ann", how) is None
        back = store.undo("ann", again.token)
        store.judge(back.token, 0)
        repeat = present(store, "ann", how)  # now it is one again
        assert (repeat.pair.id, repeat.showing) == (first.pair.id, 1)
        store.judge(repeat.token, 0)
        assert present(store, "ann", how) is None
