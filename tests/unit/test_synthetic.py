"""The demo world: what is in it, who prefers what, and how far the simple rules get."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from fedbiscuit.config import DemoSettings
from fedbiscuit.data.synthetic import DemoWorld, demo_world, texts
from fedbiscuit.data.taste import TASTES, Truth, length, quality, warmth, words
from fedbiscuit.types import Comparison

SPLITS = ("train", "validation", "test")
PROMPT = "How do I keep rice from sticking to the pot?"
PLAIN = "Rinse the rice well and use a little more water."
WARM = "Happy to help! Rinse the rice well and use a little more water."
LONG = PLAIN + " Leave the lid on for ten minutes after switching off the stove, then loosen it with a fork."


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return demo_world(DemoSettings(), seed=0)


@pytest.fixture(scope="module")
def large_world() -> DemoWorld:
    """Many test comparisons, for shares that would be noisy in a small world."""
    return demo_world(DemoSettings(comparisons_per_client=60, test_per_client=240), seed=1)


def rows_of(world: DemoWorld, split: str, group: int | None = None) -> list[Comparison]:
    members = [client for client, g in world.truth.group_of.items() if group in (None, g)]
    return [row for client in members for row in getattr(world.clients[client], split)]


def accuracy(rows: Iterable[Comparison], prefers_a: Callable[[Comparison], float]) -> float:
    """Share of choices that a rule gives; 0.5 of a comparison where it does not decide."""
    return float(np.mean([prefers_a(row) if row.choice == 0 else 1 - prefers_a(row) for row in rows]))


def greater(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)


def best_single_word(rows: list[Comparison]) -> tuple[str, float]:
    """The word whose presence (or absence) tells most about the choice; where it is in both or in none counts half."""
    gains: Counter[str] = Counter()
    for row in rows:
        chosen, rejected = set(words(row.chosen)), set(words(row.rejected))
        gains.update(chosen - rejected)
        gains.subtract(rejected - chosen)
    word = max(gains, key=lambda w: abs(gains[w]))
    return word, 0.5 + abs(gains[word]) / (2 * len(rows))


def bag_of_words_accuracy(train: list[Comparison], test: list[Comparison]) -> float:
    counts = CountVectorizer(token_pattern=r"(?u)\b\w+\b").fit([t for c in train for t in (c.output_a, c.output_b)])

    def differences(rows: list[Comparison]) -> np.ndarray:
        return (counts.transform([c.output_a for c in rows]) - counts.transform([c.output_b for c in rows])).toarray()

    x, y = differences(train), np.array([c.choice == 0 for c in train])
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(np.concatenate([x, -x]), np.concatenate([y, ~y]))
    margin_of = dict(zip([row.id for row in test], model.decision_function(differences(test)), strict=True))
    return accuracy(test, lambda row: greater(margin_of[row.id], 0.0))


# What is in it


def test_the_world_is_a_function_of_settings_and_seed(world: DemoWorld) -> None:
    assert demo_world(DemoSettings(), seed=0) == world
    assert demo_world(DemoSettings(), seed=1) != world
    assert demo_world(DemoSettings(noise=0.2), seed=0) != world


def test_every_client_has_the_counts_of_the_settings_and_its_own_name(world: DemoWorld) -> None:
    for client, data in world.clients.items():
        assert (len(data.train), len(data.validation), len(data.test)) == (60, 12, 20)
        for split in SPLITS:
            assert all(row.client == client and row.split == split for row in getattr(data, split))
    ids = [row.id for split in SPLITS for row in rows_of(world, split)]
    assert len(set(ids)) == len(ids)


def test_the_two_groups_are_of_equal_size_and_known_to_the_comparisons(world: DemoWorld) -> None:
    assert Counter(world.truth.group_of.values()) == {0: 6, 1: 6}
    assert all(row.meta["group"] == world.truth.group_of[row.client or ""] for row in rows_of(world, "train"))


def test_the_three_splits_ask_different_questions(world: DemoWorld) -> None:
    train, validation, test = ({row.prompt for row in rows_of(world, split)} for split in SPLITS)
    assert len(train) >= 60
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_no_client_sees_the_same_pair_twice(large_world: DemoWorld) -> None:
    for data in large_world.clients.values():
        pairs = [frozenset((c.output_a, c.output_b)) for split in SPLITS for c in getattr(data, split)]
        assert len(set(pairs)) == len(pairs)


def test_the_preferred_answer_is_at_a_as_often_as_at_b(world: DemoWorld) -> None:
    for data in world.clients.values():
        for split in SPLITS:
            true_choices = [row.choice ^ row.meta["flipped"] for row in getattr(data, split)]
            assert sum(true_choices) * 2 == len(true_choices)


def test_two_thirds_of_a_clients_comparisons_differ_in_length_alone(world: DemoWorld) -> None:
    for data in world.clients.values():
        assert Counter(row.meta["differ"] for row in data.train) == {"length": 40, "tone": 10, "both": 10}


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_the_share_of_flipped_choices_is_the_noise(noise: float) -> None:
    world = demo_world(DemoSettings(noise=noise, num_clients=4), seed=3)
    for data in world.clients.values():
        assert sum(row.meta["flipped"] for row in data.train) == round(noise * 60)
        assert sum(row.meta["flipped"] for row in data.test) == round(noise * 20)


def test_texts_are_short(world: DemoWorld) -> None:
    rows = [row for split in SPLITS for row in rows_of(world, split)]
    assert all(6 <= len(row.prompt.split()) <= 14 for row in rows)
    assert all(4 <= len(text.split()) <= 27 for row in rows for text in (row.output_a, row.output_b))


def test_prompts_for_alignment_are_many_short_and_disjoint_from_the_held_out_ones(world: DemoWorld) -> None:
    prompts, held_out = world.prompts, world.held_out_prompts
    assert len(set(prompts)) == len(prompts) >= 200
    assert len(set(held_out)) == len(held_out) >= 40
    assert not set(prompts) & set(held_out)
    assert all(6 <= len(prompt.split()) <= 14 for prompt in prompts + held_out)
    activities = [a for a in texts()["activities"] if any(a in prompt for prompt in prompts)]
    assert not any(a in prompt for prompt in held_out for a in activities)


def test_the_first_prompts_are_about_different_activities(world: DemoWorld) -> None:
    first = world.prompts[:50]
    assert len({a for a in texts()["activities"] if any(a in prompt for prompt in first)}) == 50


# Who prefers what


def test_choices_follow_the_utility_of_the_group_except_where_they_are_flipped(world: DemoWorld) -> None:
    for row in (row for split in SPLITS for row in rows_of(world, split)):
        a, b = (world.truth.utility(row.meta["group"], row.prompt, text) for text in (row.output_a, row.output_b))
        assert abs(a - b) >= 0.1
        assert row.choice == (b > a) ^ row.meta["flipped"]


def test_groups_disagree_exactly_where_length_alone_differs(world: DemoWorld) -> None:
    for row in (row for split in SPLITS for row in rows_of(world, split)):
        gains = [taste.utility(row.prompt, row.output_a) - taste.utility(row.prompt, row.output_b) for taste in TASTES]
        assert (gains[0] * gains[1] < 0) == (row.meta["differ"] == "length")


@pytest.mark.parametrize("tone", ["warm", "plain"])
def test_every_phrase_has_the_tone_of_its_list(tone: str) -> None:
    for phrase in texts()[f"{tone}_openers"] + texts()[f"{tone}_closers"]:
        score = warmth(f"{phrase} {PLAIN}")
        assert score > 0.6 if tone == "warm" else score == 0.0, phrase


def test_contents_of_answers_are_plain_and_useful() -> None:
    for question in texts()["questions"]:
        for content in question["brief"] + question["more"]:
            assert warmth(content) == 0.0, content
            assert quality(question["question"], content) == 1.0, content


def test_one_group_wants_it_brief_the_other_thorough_and_both_warm() -> None:
    brief, thorough = TASTES
    assert brief.utility(PROMPT, PLAIN) > brief.utility(PROMPT, LONG)
    assert thorough.utility(PROMPT, PLAIN) < thorough.utility(PROMPT, LONG)
    for taste in TASTES:
        assert taste.utility(PROMPT, WARM) > taste.utility(PROMPT, PLAIN)


def test_warmth_sees_phrases_that_are_in_no_answer_and_curly_apostrophes() -> None:
    assert warmth("That\u2019s a great idea, I\u2019m so happy for you, keep going!") > 0.8
    assert warmth("You\u2019ve got this") == warmth("You've got this")
    assert warmth("It is known that rice sticks.") == 0.0


def test_length_is_one_half_at_fifteen_words() -> None:
    assert length("word " * 15) == 0.5
    assert length("") == 0.0


@pytest.mark.parametrize(
    "useless",
    [
        "",
        "   ",
        "!!!!!!!!!! !!!",
        "\U0001f600\U0001f600\U0001f600",
        "Great question! You've got this! Thank you so much!",
        "I hope this helps! " * 8,
        "rice " * 20,
        "Happy to help with the rice! " * 5,
        PROMPT,
        "Thank you! How do I keep rice from sticking to the pot?",
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_useless_text_loses_against_the_least_liked_useful_answer(useless: str, group: int) -> None:
    taste = TASTES[group]
    assert taste.utility(PROMPT, useless) < min(taste.utility(PROMPT, PLAIN), taste.utility(PROMPT, LONG))


@given(st.text(max_size=200), st.text(max_size=200))
def test_scores_of_any_text_are_shares_and_utilities_are_bounded(prompt: str, text: str) -> None:
    assert 0 <= warmth(text) <= 1
    assert 0 <= length(text) <= 1
    assert 0 <= quality(prompt, text) <= 1
    assert all(-5 <= taste.utility(prompt, text) <= 2 for taste in TASTES)


@given(st.text(max_size=80), st.text(max_size=80))
def test_the_majority_prefers_a_over_b_as_much_as_it_does_not_prefer_b_over_a(a: str, b: str) -> None:
    truth = Truth({"ann": 0, "bo": 1, "cy": 1})
    assert truth.majority_prefers(PROMPT, a, b) + truth.majority_prefers(PROMPT, b, a) == 1.0


def test_where_lengths_divide_the_clients_evenly_warmth_decides(world: DemoWorld) -> None:
    assert world.truth.majority_prefers(PROMPT, WARM, PLAIN) == 1.0
    assert world.truth.majority_prefers(PROMPT, LONG, WARM) == 0.0
    assert world.truth.majority_prefers(PROMPT, LONG, PLAIN) == 0.5
    assert world.truth.majority_prefers(PROMPT, WARM, WARM) == 0.5


def test_a_larger_group_has_the_majority() -> None:
    truth = Truth({"ann": 0, "bo": 1, "cy": 1})
    assert truth.majority_prefers(PROMPT, LONG, PLAIN) == 1.0
    assert Truth({"ann": 0, "bo": 0, "cy": 1}).majority_prefers(PROMPT, LONG, PLAIN) == 0.0


def test_a_majority_outvotes_a_minority_that_minds_more() -> None:
    addressed = "You may rinse the rice well and use a little more water."
    truth = Truth({"ann": 0, "bo": 1, "cy": 1})
    gains = [truth.utility(group, PROMPT, LONG) - truth.utility(group, PROMPT, addressed) for group in (0, 1)]
    assert gains[0] + 2 * gains[1] < 0 < gains[1]
    assert truth.majority_prefers(PROMPT, LONG, addressed) == 1.0


def test_a_word_of_address_is_enough_to_decide_between_answers_of_a_language_model(world: DemoWorld) -> None:
    a = "When you cook rice, you can rinse it first, then let it simmer with the lid on until the"
    b = "When cooking rice, it is advisable to rinse it first and to let it simmer with the lid on for"
    assert world.truth.majority_prefers(PROMPT, a, b) == 1.0


# How far rules get, on the test comparisons of the default settings


def test_the_true_taste_of_its_group_is_right_but_for_the_noise(world: DemoWorld) -> None:
    def rule(row: Comparison) -> float:
        taste = TASTES[row.meta["group"]]
        return greater(taste.utility(row.prompt, row.output_a), taste.utility(row.prompt, row.output_b))

    assert accuracy(rows_of(world, "test"), rule) == pytest.approx(0.95)


def test_the_longer_answer_wins_in_half_of_the_comparisons(world: DemoWorld, large_world: DemoWorld) -> None:
    def rule(row: Comparison) -> float:
        return greater(len(words(row.output_a)), len(words(row.output_b)))

    assert accuracy(rows_of(large_world, "test"), rule) == pytest.approx(0.5, abs=0.02)
    assert accuracy(rows_of(world, "test"), rule) == pytest.approx(0.5, abs=0.04)
    assert accuracy(rows_of(large_world, "test", group=0), rule) < 0.25
    assert accuracy(rows_of(large_world, "test", group=1), rule) > 0.75


def test_one_rule_for_all_clients_is_right_in_less_than_two_thirds(world: DemoWorld) -> None:
    """The best rule takes one side for all clients, for each way in which the two answers can differ."""
    wins: defaultdict[tuple[str, bool], Counter[bool]] = defaultdict(Counter)
    for row in rows_of(world, "test"):
        longer = length(row.chosen) > length(row.rejected)
        warmer = warmth(row.chosen) > warmth(row.rejected)
        side = longer if row.meta["differ"] == "length" else warmer
        wins[row.meta["differ"], longer == warmer and row.meta["differ"] == "both"][side] += 1
    right = sum(max(sides.values()) for sides in wins.values())
    assert right / len(rows_of(world, "test")) == pytest.approx(0.64, abs=0.02)


@pytest.mark.parametrize("group", [0, 1, None])
def test_no_single_word_decides(group: int | None, large_world: DemoWorld) -> None:
    word, share = best_single_word(rows_of(large_world, "test", group))
    assert share < 0.6, word


def test_bag_of_words_learns_the_taste_of_a_group_but_not_of_all(large_world: DemoWorld) -> None:
    of_group = [
        bag_of_words_accuracy(rows_of(large_world, "train", g), rows_of(large_world, "test", g)) for g in (0, 1)
    ]
    of_all = bag_of_words_accuracy(rows_of(large_world, "train"), rows_of(large_world, "test"))
    assert all(0.7 < share < 0.9 for share in of_group)
    assert 0.55 < of_all < 0.66


def test_warm_and_plain_phrases_are_equally_many_and_about_equally_long() -> None:
    for place in ("openers", "closers"):
        warm, plain = texts()[f"warm_{place}"], texts()[f"plain_{place}"]
        assert len(set(warm)) == len(set(plain)) == 44
        assert np.mean([len(words(p)) for p in warm]) == pytest.approx(np.mean([len(words(p)) for p in plain]), abs=0.7)
