"""The demo world: what is in it, who prefers what, and how far the simple rules get."""

from __future__ import annotations

import re
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
from fedbiscuit.data.taste import SAME, TASTES, USELESS, Truth, length, quality, warmth, words
from fedbiscuit.types import Comparison

SPLITS = ("train", "validation", "test")
PROMPT = "How do I keep rice from sticking to the pot?"
PLAIN = "Rinse the rice well and use a little more water."
WARM = "Happy to help! Rinse the rice well and use a little more water."
LONG = PLAIN + " Leave the lid on for ten minutes after switching off the stove, then loosen it with a fork."
MEDIUM = PLAIN + " Leave the lid on for ten minutes afterwards."
"""Plain, longer than WARM by so much that half of the clients mind its length less than they like its tone."""
WARM_LONG = f"Happy to help! {LONG} You've got this! I hope that you enjoy it!"


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return demo_world(DemoSettings(), seed=0)


@pytest.fixture(scope="module", params=[0, 1, 2])
def large_world(request: pytest.FixtureRequest) -> DemoWorld:
    """Many test comparisons, for shares that would be noisy in a small world; they are those of synthetic.py's table."""
    return demo_world(DemoSettings(validation_per_client=6, test_per_client=240), seed=request.param)


def rows_of(world: DemoWorld, split: str, group: int | None = None) -> list[Comparison]:
    members = [client for client, g in world.truth.group_of.items() if group in (None, g)]
    return [row for client in members for row in getattr(world.clients[client], split)]


def accuracy(rows: Iterable[Comparison], prefers_a: Callable[[Comparison], float]) -> float:
    """Share of choices that a rule gives; 0.5 of a comparison where it does not decide."""
    return float(np.mean([prefers_a(row) if row.choice == 0 else 1 - prefers_a(row) for row in rows]))


def greater(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)


def shorter(row: Comparison) -> float:
    return greater(len(words(row.output_b)), len(words(row.output_a)))


def longer(row: Comparison) -> float:
    return 1 - shorter(row)


def marks(text: str) -> list[str]:
    """The punctuation marks of a text."""
    return re.findall(r"[^\w\s]", text)


def best_single(parts: Callable[[str], list[str]], rows: list[Comparison]) -> tuple[str, float]:
    """The word or mark whose presence (or absence) tells most about the choice; in both or in none counts half."""
    gains: Counter[str] = Counter()
    for row in rows:
        chosen, rejected = set(parts(row.chosen)), set(parts(row.rejected))
        gains.update(chosen - rejected)
        gains.subtract(rejected - chosen)
    part = max(gains, key=lambda p: abs(gains[p]))
    return part, 0.5 + abs(gains[part]) / (2 * len(rows))


def best_rule_for_all(rows: list[Comparison]) -> float:
    """Accuracy of the rule that takes one side for all clients, for each way in which the two answers can differ.

    Where tone alone differs the sides are warm and plain, else brief and thorough.
    """
    wins: defaultdict[tuple[str, bool], Counter[bool]] = defaultdict(Counter)
    for row in rows:
        longer_won = length(row.chosen) > length(row.rejected)
        warmer_won = warmth(row.chosen) > warmth(row.rejected)
        side = warmer_won if row.meta["differ"] == "tone" else longer_won
        wins[row.meta["differ"], longer_won == warmer_won and row.meta["differ"] == "both"][side] += 1
    return sum(max(sides.values()) for sides in wins.values()) / len(rows)


def bag_of_words_accuracy(train: list[Comparison], test: list[Comparison]) -> float:
    counts = CountVectorizer(token_pattern=r"(?u)\b\w+\b").fit([t for c in train for t in (c.output_a, c.output_b)])

    def differences(rows: list[Comparison]) -> np.ndarray:
        a, b = (counts.transform(side) for side in ([c.output_a for c in rows], [c.output_b for c in rows]))
        return np.asarray((a - b).toarray())

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


def test_two_thirds_of_a_clients_comparisons_differ_in_tone_alone(world: DemoWorld) -> None:
    for data in world.clients.values():
        assert Counter(row.meta["differ"] for row in data.train) == {"tone": 40, "length": 10, "both": 10}


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_the_share_of_flipped_choices_is_the_noise(noise: float) -> None:
    world = demo_world(DemoSettings(noise=noise, num_clients=4), seed=3)
    for data in world.clients.values():
        assert sum(row.meta["flipped"] for row in data.train) == round(noise * 60)
        assert sum(row.meta["flipped"] for row in data.test) == round(noise * 20)


def test_texts_are_short(world: DemoWorld) -> None:
    rows = [row for split in SPLITS for row in rows_of(world, split)]
    assert all(6 <= len(row.prompt.split()) <= 14 for row in rows)
    assert all(8 <= len(text.split()) <= 32 for row in rows for text in (row.output_a, row.output_b))


def test_prompts_for_alignment_are_many_short_and_disjoint_from_the_held_out_ones(world: DemoWorld) -> None:
    prompts, held_out = world.prompts, world.held_out_prompts
    assert len(set(prompts)) == len(prompts) >= 200
    assert len(set(held_out)) == len(held_out) >= 40
    assert not set(prompts) & set(held_out)
    assert all(6 <= len(prompt.split()) <= 15 for prompt in prompts + held_out)
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


def test_groups_disagree_exactly_where_tone_alone_differs(world: DemoWorld) -> None:
    for row in (row for split in SPLITS for row in rows_of(world, split)):
        gains = [taste.utility(row.prompt, row.output_a) - taste.utility(row.prompt, row.output_b) for taste in TASTES]
        assert (gains[0] * gains[1] < 0) == (row.meta["differ"] == "tone")


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


def test_one_group_wants_it_warm_the_other_plain_and_both_brief() -> None:
    warm, plain = TASTES
    assert warm.utility(PROMPT, WARM) > warm.utility(PROMPT, PLAIN)
    assert plain.utility(PROMPT, WARM) < plain.utility(PROMPT, PLAIN)
    for taste in TASTES:
        assert taste.utility(PROMPT, PLAIN) > taste.utility(PROMPT, LONG)
        assert taste.utility(PROMPT, WARM) > taste.utility(PROMPT, WARM_LONG)


def test_where_tone_and_length_both_differ_both_groups_take_the_brief_answer(world: DemoWorld) -> None:
    for row in (row for split in SPLITS for row in rows_of(world, split) if row.meta["differ"] == "both"):
        wanted = row.rejected if row.meta["flipped"] else row.chosen
        assert length(wanted) == min(length(row.chosen), length(row.rejected))


def test_warmth_sees_phrases_that_are_in_no_answer_and_curly_apostrophes() -> None:
    assert warmth("That\u2019s a great idea, I\u2019m so happy for you, keep going!") > 0.8
    assert warmth("You\u2019ve got this") == warmth("You've got this")
    assert warmth("It is known that rice sticks.") == 0.0


def test_length_is_one_half_at_22_words() -> None:
    assert length("word " * 22) == 0.5
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
        "Banana elephant.",
        "Water, maybe.",
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_useless_text_loses_against_the_least_liked_useful_answer(useless: str, group: int) -> None:
    taste = TASTES[group]
    useful = (PLAIN, WARM, LONG, WARM_LONG)
    assert taste.utility(PROMPT, useless) < min(taste.utility(PROMPT, text) for text in useful)


def test_no_warmth_or_brevity_makes_up_for_half_of_the_penalty_for_useless_text() -> None:
    assert all(abs(taste.warmth) + abs(taste.length) < USELESS / 2 for taste in TASTES)


@given(st.text(max_size=200), st.text(max_size=200))
def test_scores_of_any_text_are_shares_and_utilities_are_bounded(prompt: str, text: str) -> None:
    assert 0 <= warmth(text) <= 1
    assert 0 <= length(text) <= 1
    assert 0 <= quality(prompt, text) <= 1
    assert all(-5.6 <= taste.utility(prompt, text) <= 0.6 for taste in TASTES)


@given(st.text(max_size=80), st.text(max_size=80))
def test_the_majority_prefers_a_over_b_as_much_as_it_does_not_prefer_b_over_a(a: str, b: str) -> None:
    truth = Truth({"ann": 0, "bo": 1, "cy": 1})
    assert truth.majority_prefers(PROMPT, a, b) + truth.majority_prefers(PROMPT, b, a) == 1.0


def test_where_tones_divide_the_clients_evenly_brevity_decides(world: DemoWorld) -> None:
    truth = world.truth
    assert truth.utility(0, PROMPT, WARM) > truth.utility(0, PROMPT, PLAIN)
    assert truth.utility(1, PROMPT, WARM) < truth.utility(1, PROMPT, PLAIN)
    assert truth.majority_prefers(PROMPT, WARM, PLAIN) == 0.0
    assert truth.majority_prefers(PROMPT, WARM, MEDIUM) == 1.0
    assert truth.majority_prefers(PROMPT, LONG, WARM) == 0.0
    assert truth.majority_prefers(PROMPT, LONG, PLAIN) == 0.0
    assert truth.majority_prefers(PROMPT, WARM, WARM) == 0.5


def test_where_tones_divide_the_clients_evenly_and_lengths_are_equal_it_is_a_tie(world: DemoWorld) -> None:
    plain = "In my kitchen: rinse the rice well and use a little more water."
    assert len(words(plain)) == len(words(WARM))
    assert warmth(plain) < warmth(WARM)
    assert world.truth.majority_prefers(PROMPT, WARM, plain) == 0.5


def test_the_majority_of_the_demo_world_prefers_the_shorter_of_two_useful_answers(world: DemoWorld) -> None:
    for row in rows_of(world, "test"):
        saved = length(row.output_b) - length(row.output_a)
        if abs(saved) > SAME:
            preferred = world.truth.majority_prefers(row.prompt, row.output_a, row.output_b)
            assert preferred == float(saved > 0)


def test_a_larger_group_has_the_majority() -> None:
    assert Truth({"ann": 0, "bo": 1, "cy": 1}).majority_prefers(PROMPT, WARM, MEDIUM) == 0.0
    assert Truth({"ann": 0, "bo": 0, "cy": 1}).majority_prefers(PROMPT, WARM, MEDIUM) == 1.0


def test_a_majority_outvotes_a_minority_that_minds_more() -> None:
    truth = Truth({"ann": 0, "bo": 1, "cy": 1})
    gains = [truth.utility(group, PROMPT, MEDIUM) - truth.utility(group, PROMPT, WARM) for group in (0, 1)]
    assert gains[0] + 2 * gains[1] < 0 < gains[1]
    assert truth.majority_prefers(PROMPT, MEDIUM, WARM) == 1.0


def test_one_word_is_enough_to_decide_between_answers_of_a_language_model(world: DemoWorld) -> None:
    a = "When cooking rice, it is advisable to rinse it first and to let it simmer with the lid"
    b = "When you cook rice, you can rinse it first, then let it simmer with the lid on until done"
    assert len(words(b)) == len(words(a)) + 1
    assert world.truth.majority_prefers(PROMPT, a, b) == 1.0


# How far rules get


@pytest.mark.parametrize(
    ("noise", "test", "expected"), [(0.05, 20, 0.95), (0.05, 18, 17 / 18), (0.05, 12, 11 / 12), (0.0, 20, 1.0)]
)
def test_the_true_taste_of_its_group_is_right_but_for_the_noise(noise: float, test: int, expected: float) -> None:
    world = demo_world(DemoSettings(comparisons_per_client=1, test_per_client=test, noise=noise), seed=0)

    def rule(row: Comparison) -> float:
        taste = TASTES[row.meta["group"]]
        return greater(taste.utility(row.prompt, row.output_a), taste.utility(row.prompt, row.output_b))

    assert accuracy(rows_of(world, "test"), rule) == pytest.approx(expected)


def test_the_longer_answer_wins_in_a_third_of_the_comparisons_only(world: DemoWorld, large_world: DemoWorld) -> None:
    assert 0.33 < accuracy(rows_of(large_world, "test"), longer) < 0.37
    assert accuracy(rows_of(world, "test"), longer) < 0.4
    for group in (0, 1):
        assert 0.31 < accuracy(rows_of(large_world, "test", group), longer) < 0.40


def test_the_shorter_answer_wins_as_often_as_the_best_rule_for_all(world: DemoWorld, large_world: DemoWorld) -> None:
    """Brevity is what both groups want, and no help where tone alone differs."""
    rows = rows_of(large_world, "test")
    assert accuracy(rows, shorter) == pytest.approx(best_rule_for_all(rows), abs=0.015)
    assert accuracy(rows_of(world, "test"), shorter) < 0.67
    agreed = [row for row in rows if row.meta["differ"] != "tone"]
    assert accuracy(agreed, shorter) == pytest.approx(0.95, abs=0.01)
    assert accuracy([row for row in rows if row.meta["differ"] == "tone"], shorter) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("test", "expected"), [(18, 2 / 3), (20, 0.65)])
def test_without_noise_the_best_rule_for_all_is_right_where_groups_agree_and_in_half_of_the_rest(
    test: int, expected: float
) -> None:
    world = demo_world(DemoSettings(comparisons_per_client=1, test_per_client=test, noise=0.0), seed=0)
    assert best_rule_for_all(rows_of(world, "test")) == pytest.approx(expected)


def test_one_rule_for_all_clients_is_right_in_less_than_two_thirds(world: DemoWorld, large_world: DemoWorld) -> None:
    assert best_rule_for_all(rows_of(large_world, "test")) == pytest.approx(0.65, abs=0.01)
    assert best_rule_for_all(rows_of(world, "test")) == pytest.approx(0.64, abs=0.02)


@pytest.mark.parametrize(("group", "most"), [(0, 0.65), (1, 0.65), (None, 0.57)])
def test_no_single_word_decides(group: int | None, most: float, large_world: DemoWorld) -> None:
    word, share = best_single(words, rows_of(large_world, "test", group))
    assert share < most, word


@pytest.mark.parametrize(("group", "mark", "most"), [(0, "!", 0.68), (1, ":", 0.72), (None, ",", 0.59)])
def test_punctuation_tells_more_than_any_word_but_does_not_decide(
    group: int | None, mark: str, most: float, large_world: DemoWorld
) -> None:
    """Warm phrases exclaim and plain openers end in a colon: more than a word gives, far from the taste's 0.95."""
    rows = rows_of(large_world, "test", group)
    best, share = best_single(marks, rows)
    assert best == mark
    assert best_single(words, rows)[1] < share < most


def test_bag_of_words_learns_the_taste_of_a_group_but_not_of_all(large_world: DemoWorld) -> None:
    of_group = [
        bag_of_words_accuracy(rows_of(large_world, "train", g), rows_of(large_world, "test", g)) for g in (0, 1)
    ]
    of_all = bag_of_words_accuracy(rows_of(large_world, "train"), rows_of(large_world, "test"))
    assert all(0.84 < share < 0.88 for share in of_group)
    assert 0.6 < of_all < 0.66


def test_warm_and_plain_phrases_are_equally_many_and_about_equally_long() -> None:
    for place in ("openers", "closers"):
        warm, plain = texts()[f"warm_{place}"], texts()[f"plain_{place}"]
        assert len(set(warm)) == len(set(plain)) == 44
        assert np.mean([len(words(p)) for p in warm]) == pytest.approx(np.mean([len(words(p)) for p in plain]), abs=0.7)
