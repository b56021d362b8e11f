"""The length-controlled win rate, on cases that can be worked out by hand and against another optimizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedbiscuit.evaluation.lengths import RIDGE, fit, length_controlled, longer_by

Pair = tuple[float, int, int]
"""(points, characters of ours, characters of theirs)."""


def controlled(pairs: list[Pair], resamples: int = 50):
    points, ours, theirs = zip(*pairs, strict=True)
    return length_controlled(points, ["x" * n for n in ours], ["x" * n for n in theirs], ("k",), resamples)


def test_where_length_has_no_effect_it_is_the_win_rate_with_ties_as_half():
    both = [(1.0, 30, 20), (1.0, 20, 30)]
    pairs = [*both, *both, (0.0, 30, 20), (0.0, 20, 30), (0.5, 30, 20), (0.5, 20, 30)]
    found = controlled(pairs)
    assert found is not None
    assert found["win_rate"] == pytest.approx((4 + 2 / 2) / 8, abs=1e-12)
    assert found["slope"] == pytest.approx(0, abs=1e-9)
    assert found["characters"] == {"policy": 25.0, "against": 25.0}
    assert found["interval"][0] < found["win_rate"] < found["interval"][1]


def test_where_length_alone_decides_it_is_one_half_though_the_longer_policy_wins_more():
    """Every longer answer wins, by the same amount; that is separable, and stays finite."""
    found = controlled([(1.0, 30, 20), (0.0, 20, 30)] * 4)
    assert found is not None
    assert found["win_rate"] == pytest.approx(0.5)
    assert 5 < found["slope"] < 50


def test_two_lengths_by_hand():
    """Two parameters meet two shares: intercept + slope t = logit(3/4), intercept - slope t = logit(1/4), whatever t is."""
    longer, shorter = [(1.0, 30, 20)] * 6 + [(0.0, 30, 20)] * 2, [(1.0, 20, 30)] + [(0.0, 20, 30)] * 3
    found = controlled([*longer, *shorter])
    assert found is not None
    assert found["win_rate"] == pytest.approx(0.5, abs=2e-3)  # of 7 wins in 12; the ridge moves it by less than that
    found = controlled([*longer, (1.0, 20, 30), *shorter[1:], (1.0, 20, 30), (1.0, 20, 30)])  # logit(1/2)
    assert found is not None
    assert found["win_rate"] == pytest.approx(1 / (1 + math.exp(-math.log(3) / 2)), abs=2e-3)


def test_wins_alone_and_losses_alone_are_certain():
    for points in (1.0, 0.0):
        found = controlled([(points, 30, 20), (points, 10, 20)])
        assert found is not None
        assert (found["win_rate"], found["slope"], found["interval"]) == (points, 0.0, [points, points])


def test_ours_longer_by_the_same_everywhere_cannot_be_told_from_the_policy():
    assert controlled([(1.0, 30, 20), (0.0, 50, 40), (1.0, 11, 1)]) is None
    assert controlled([(1.0, 30, 20)]) is None
    equal = controlled([(1.0, 20, 20), (0.5, 7, 7)])
    assert equal is not None
    assert equal["win_rate"] == pytest.approx(0.75)


def test_the_length_difference_is_standardised_as_in_alpaca_eval():
    found = longer_by(["abc", "", "ab"], ["a", "abcd", "ab"])
    assert found == pytest.approx(np.tanh(np.array([2, -4, 0]) / np.std([2, -4, 0], ddof=1)))  # pandas divides by n - 1


def test_a_full_step_too_far_is_taken_back():
    """Thousands of like verdicts against a few: plain Newton steps swing ever wider here."""
    points = np.array([1, 0, 1, 0, 0, 1, 0.0])
    longer = np.array([0.97, 0.79, 0.89, -1, -1, 1, -1])
    counts = np.array([[1, 5, 1, 1000, 5, 1000, 1.0]])
    win_rate, slope = fit(points, longer, counts)
    wrong = counts[0] * (1 / (1 + np.exp(-math.log(win_rate[0] / (1 - win_rate[0])) - slope[0] * longer)) - points)
    assert wrong.sum() == pytest.approx(0, abs=1e-8)
    assert wrong @ longer + RIDGE * slope[0] == pytest.approx(0, abs=1e-8)


PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 60), st.integers(0, 60)), min_size=2)


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_swapping_both_policies_turns_it_round(pairs):
    found = controlled(pairs, 1)
    swapped = controlled([(1 - points, theirs, ours) for points, ours, theirs in pairs], 1)
    assert (found is None) == (swapped is None)
    if found is not None and swapped is not None:
        assert found["win_rate"] == pytest.approx(1 - swapped["win_rate"], abs=1e-6)
        assert found["slope"] == pytest.approx(swapped["slope"], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.integers(0, 2**32))
def test_another_optimizer_finds_the_same_maximum(pairs, seed):
    points = np.array([p for p, *_ in pairs])
    longer = longer_by(["x" * a for _, a, _ in pairs], ["x" * b for *_, b in pairs])
    if longer is None:
        return
    counts = np.random.default_rng(seed).integers(0, 3, (3, len(pairs))).astype(float)
    counts[counts.sum(1) == 0] = 1
    win_rates, slopes = fit(points, longer, counts)
    for weights, win_rate, slope in zip(counts, win_rates, slopes, strict=True):
        if not 0 < weights @ points < weights.sum():
            assert win_rate == (weights @ points > 0)
            continue

        def loss(at, weights=weights):
            z = at[0] + at[1] * longer
            return (weights * (np.logaddexp(0, z) - points * z)).sum() + RIDGE * at[1] ** 2 / 2

        best = minimize(loss, [0.1, 0.1], method="BFGS", options={"gtol": 1e-10})
        ours = loss([math.log(win_rate / (1 - win_rate)), slope])
        assert ours <= best.fun + 1e-9
