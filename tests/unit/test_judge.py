"""Judges: what a wording shows, what is read of a reply however it comes, and what two orders make of it."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbiscuit.config import JudgeSettings
from fedbiscuit.evaluation.judge import (
    PROTOCOLS,
    fill,
    load_wording,
    outcome_of_pair,
    outcome_of_ratings,
    question_key,
    read_choice,
    read_decision,
    read_rating,
)
from fedbiscuit.evaluation.winrate import strict_win_rate
from fedbiscuit.types import ConfigError


def test_the_settings_permit_the_protocols_that_there_are():
    assert set(get_args(JudgeSettings.model_fields["protocol"].annotation)) == set(PROTOCOLS)


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("A is shorter.\n[[A]]", 1.0),
        ("Fine.\n\n**[[B]]**", 0.0),
        ("[[ tie ]]", 0.5),
        ("[[TIE]]", 0.5),
        ("[[C]]", 0.5),
        ("[[Answer B]].", 0.0),
        ("I would say [[A]] at first sight.\nBut no:\n[[B]]\nThanks.", 0.0),  # the last line with a mark decides
        ("The answer quotes `[[B]]`, which is no decision of mine.\n[[A]]", 1.0),
        ("[[A]] or [[B]]", None),
        ("[[A]] and again [[A]]", 1.0),
        ("[[A]]\n[[A]] or [[B]]", None),
        ("[[A/B]]", None),
        ("[[AB]]", None),
        ("[[X]]", None),
        ("[A]", None),
        ("A", None),
        ("", None),
        ("So, the final decision is Response 1.", 1.0),
        ("1. critique\n2. Conclude: the final decision is Response 2. I hope so.", 0.0),
        ("So, the final decision is Tie.", 0.5),
        ("the final decision is Response 1 ... so, the final decision is Response 2", 0.0),
        ("the final decision is Response 12", None),
        ("So, the final decision is Response 1 / Response 2 / Tie", None),
        ("the final decision is A good one", None),
        ("[[B]] because the final decision is Response 1", 0.0),
    ],
)
def test_a_decision_is_read_from_its_mark_or_from_auto_js_words(reply, points):
    assert read_decision(reply) == points


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("A", 1.0),
        (" b.\n", 0.0),
        ("Tie", 0.5),
        ("It is a tie", None),
        ("A tie.", 0.5),
        ("**B**", 0.0),
        ("Answer: A", 1.0),
        ("The better answer is B.", 0.0),
        ("Answer B is better.", 0.0),
        ("B\n\nBecause it is shorter.", 0.0),
        ("They differ in tone.\nA", 1.0),
        ("A\nthinking again\nB", None),
        ("A good answer is short.", None),
        ("A, B", None),
        ("[[A]]", 1.0),
        ("A\n[[B]]", 0.0),
        ("A\n[[?]]", None),
        ("neither", None),
        ("", None),
    ],
)
def test_a_bare_letter_is_read_where_a_line_has_nothing_else(reply, points):
    assert read_choice(reply) == points


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good.\nRating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("**Rating: [[10]]**", 10.0),
        ("Rating: [[8/10]]", 8.0),
        ("Fine.\nRating: 6\n\n", 6.0),
        ("rating: 6 / 10.", 6.0),
        ("With [[2]] points for tone.\nRating: [[9]]", 9.0),
        ("[[3]] to [[4]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[-3]]", None),
        ("[[1e1]]", None),
        ("[[٧]]", None),
        ("[[seven]]", None),
        ("I would give it a rating: 6 or so", None),
        ("Rating: 100", None),
        ("7", None),
        ("", None),
    ],
)
def test_a_rating_is_a_number_from_1_to_10_in_brackets(reply, rating):
    assert read_rating(reply) == rating


PIECES = st.sampled_from(["[[", "]]", "A", "B", "tie", "\n", " ", "Rating:", "7", "10", "final decision is", "**", "٣"])


@given(st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join)))
def test_no_reply_makes_a_reader_fail_and_what_it_reads_is_in_range(reply):
    for name, protocol in PROTOCOLS.items():
        said = protocol.read(reply)
        assert said is None or (said in (0.0, 0.5, 1.0) if protocol.pairwise else 1 <= said <= 10), name


@pytest.mark.parametrize("text", ["[" * 200_000, " " * 200_000, "[[ " * 60_000, "rating " * 40_000, "*" * 200_000])
def test_a_reply_that_is_long_and_odd_is_read_at_once(text):
    for protocol in PROTOCOLS.values():
        assert protocol.read(text + "x") is None


@pytest.mark.parametrize(
    ("said", "points", "why"),
    [
        ((1.0, 1.0), 1.0, "decided"),
        ((0.0, 0.0), 0.0, "decided"),
        ((0.5, 0.5), 0.5, "decided"),
        ((1.0, 0.0), 0.5, "inconsistent"),
        ((1.0, 0.5), 0.5, "inconsistent"),
        ((None, 1.0), 0.5, "unparsable"),
        ((None, None), 0.5, "unparsable"),
        ((1.0,), 1.0, "decided"),
    ],
)
def test_two_orders_that_disagree_are_a_tie_and_so_is_a_reply_that_does_not_say(said, points, why):
    found = outcome_of_pair(said)
    assert (found.points, found.why, found.said) == (points, why, said)


def test_the_higher_rating_wins():
    assert [outcome_of_ratings(*one).points for one in ((8, 7), (7, 8), (7, 7))] == [1.0, 0.0, 0.5]
    assert outcome_of_ratings(8, None).why == "unparsable"


def test_the_win_rate_has_ties_in_its_denominator():
    row = strict_win_rate([1.0, 1.0, 0.5, 0.5, 0.0], ("x",), 200)
    assert (row["win_rate"], row["win_rate_ties_half"]) == (0.4, 0.6)
    assert (row["wins"], row["ties"], row["losses"]) == (2, 2, 1)
    assert 0.0 <= row["interval"][0] <= 0.4 <= row["interval"][1] <= 1.0
    assert row == strict_win_rate([1.0, 1.0, 0.5, 0.5, 0.0], ("x",), 200)
    assert strict_win_rate([0.5] * 9, ("x",), 50)["interval"] == [0.0, 0.0]


# Wordings


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_our_wordings_show_each_field_once_and_their_own_example_is_read(name):
    protocol = PROTOCOLS[name]
    shown = fill(protocol.wording, {field: f"<{field}>" for field in protocol.fields})
    assert all(shown.count(f"<{field}>") == 1 for field in protocol.fields)
    assert "{" not in shown
    assert load_wording(protocol, "") == protocol.wording


def test_braces_in_peoples_texts_mean_nothing_to_a_judge():
    texts = {"prompt": "{output_b} {x}", "output_a": "{prompt}", "output_b": "\\1 {0}"}
    assert fill("{prompt}|{output_a}|{output_b}", texts) == "{output_b} {x}|{prompt}|\\1 {0}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{prompt} {output_a}", r"\{output_b\} is missing"),
        ("{prompt} {output_a} {output_b} {output_c}", r"\{output_c\} is not a field"),
        ("{prompt} {output_a} {output_b} \xff", "byte 31: not UTF-8"),
        ("x" * 70_000, "70000 bytes; at most 65536"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(text, told, tmp_path):
    file = tmp_path / "wording.txt"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=told):
        load_wording(PROTOCOLS["plain"], str(file))
    with pytest.raises(ConfigError, match="is not a file"):
        load_wording(PROTOCOLS["plain"], str(tmp_path / "none.txt"))


def test_a_template_may_hold_other_braces(tmp_path):
    file = tmp_path / "wording.txt"
    file.write_text('Say {"decision": "[[A]]"} {}. {prompt} {output_a} {output_b}')
    shown = fill(load_wording(PROTOCOLS["plain"], str(file)), {"prompt": "p", "output_a": "a", "output_b": "b"})
    assert shown == 'Say {"decision": "[[A]]"} {}. p a b'


def test_a_question_is_known_by_all_that_its_reply_depends_on():
    def key(protocol="plain", wording="w", model="m", prompt="p", answers=("a", "b"), **how):
        return question_key(protocol, wording, {"model": model, **how}, prompt, answers)

    others = [
        key("auto-j"), key(wording="v"), key(model="n"), key(prompt="q"), key(answers=("b", "a")), key(answers=("a",)),
        key(endpoint="e"), key(max_tokens=1), key(prompt="pa", answers=("", "b")),
    ]  # fmt: skip
    assert len({key(), *others}) == 10
    assert key() == key()
