"""Evaluation on numbers worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedbiscuit.data.encoding import encode_answers
from fedbiscuit.evaluation.metrics import Judged, bootstrap_interval, calibration, longer_answer, summarize
from fedbiscuit.evaluation.selectors import ClientMargins, fit_temperature, judge_by_group, judge_by_vote, score_clients
from fedbiscuit.evaluation.winrate import win_rate
from fedbiscuit.types import Comparison


def judged(probability, choice):
    n = len(choice)
    return Judged(np.array(probability), np.array(choice), np.zeros(n), np.zeros((n, 2)))


def test_accuracy_is_a_mean_over_clients_and_one_over_comparisons_and_undecided_counts_half():
    clients = {"ann": judged([0.9, 0.2, 0.5, 0.6], [0, 1, 0, 1]), "bo": judged([0.4], [1])}
    row = summarize("x", clients, (0,), 10)
    assert row["accuracy"] == pytest.approx((2.5 / 4 + 1) / 2)
    assert row["accuracy_comparisons"] == pytest.approx(3.5 / 5)
    assert row["worst_decile"] == pytest.approx(2.5 / 4)


def test_calibration_compares_confidence_with_how_often_it_is_right():
    bins = calibration({"ann": judged([0.92, 0.08, 0.93, 0.55], [0, 1, 1, 0])})
    assert [b["count"] for b in bins] == [1, 3]
    assert bins[1]["p"] == pytest.approx((0.92 + 0.92 + 0.93) / 3)
    assert bins[1]["accuracy"] == pytest.approx(2 / 3)


def test_the_longer_answer_wins_by_characters_and_ties_are_half():
    rows = [Comparison("q", "two words", "one", 0), Comparison("q", "a", "b c", 0), Comparison("q", "a", "b", 1)]
    assert longer_answer(rows).accuracy == pytest.approx(0.5)


def test_win_rate_counts_ties_half_and_its_interval_holds_it():
    row = win_rate("judge", [0.9, 0.5, 0.1, 0.8], (0,), 200)
    assert (row["wins"], row["ties"], row["losses"], row["win_rate"]) == (2, 1, 1, 0.625)
    assert row["interval"][0] <= 0.625 <= row["interval"][1]


def test_the_bootstrap_interval_is_about_two_standard_errors_and_a_function_of_its_key():
    values = list(np.linspace(0, 1, 100))
    low, high = bootstrap_interval(values, ("k",), 4000)
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 10, rel=0.1)
    assert bootstrap_interval(values, ("k",), 50) == bootstrap_interval(values, ("k",), 50)


def test_each_order_alone_is_judged_beside_their_average():
    # shown as (A, B): says A, A, B; as (B, A): says the first, B; the second, A; the second, A
    margins = torch.tensor([[[1.0, 3.0], [2.0, -1.0], [-1.0, -2.0]]])
    scores = {"ann": ClientMargins(margins, np.array([1, 0, 0]))}
    one = judge_by_group(scores, {"ann": 0})["ann"]
    assert one.in_order.tolist() == [[0, 1], [1, 1], [0, 1]]
    assert one.flipped.tolist() == [1, 0, 1]
    assert one.correct.tolist() == [1, 1, 1]
    row = summarize("x", {"ann": one}, (0,), 10)
    assert row["accuracy_in_order"] == pytest.approx([1 / 3, 1.0])
    assert (row["accuracy"], row["flip_rate"]) == (1.0, pytest.approx(2 / 3))


def test_the_longer_answer_agrees_alike_in_both_orders():
    one = longer_answer([Comparison("q", "long one", "x", 0), Comparison("q", "long one", "x", 1)])
    assert one.in_order.tolist() == [[1, 1], [0, 0]]


def margins_of(margin, choice):
    """One client and selector whose averaged margin is the given one."""
    margin = torch.tensor(margin)
    return {"ann": ClientMargins(torch.stack([margin, -margin], dim=-1)[None], np.array(choice))}


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_fitted_temperature_is_the_best_of_many_and_grows_with_the_margins(scale):
    generator = torch.Generator().manual_seed(0)
    margin = torch.randn(200, generator=generator) * scale
    choice = (torch.rand(200, generator=generator) > torch.sigmoid(margin / scale / 1.7)).long()
    scores = margins_of(margin.tolist(), choice.numpy())
    found = fit_temperature(scores, {"ann": 0})

    def loss(temperature):
        return judge_by_group(scores, {"ann": 0}, temperature)["ann"].loss.mean()

    assert loss(found) <= min(loss(t) for t in np.geomspace(0.05, 20, 400)) + 1e-9
    same = fit_temperature(margins_of((margin * 2).tolist(), choice.numpy()), {"ann": 0})
    assert same == pytest.approx(2 * found, rel=1e-3)


def test_a_temperature_stays_within_its_bounds_and_needs_comparisons():
    assert fit_temperature(margins_of([1.0, 2.0], [0, 0]), {"ann": 0}) == pytest.approx(0.05)
    assert fit_temperature(margins_of([1.0, 2.0], [1, 1]), {"ann": 0}) == pytest.approx(20)
    assert fit_temperature({}, {}) is None


def test_a_row_at_a_temperature_has_its_loss_and_calibration_beside():
    scores = margins_of([3.0, 3.0, 3.0, 3.0], [0, 0, 0, 1])
    raw, cooled = (judge_by_group(scores, {"ann": 0}, t) for t in (1.0, 3.0 / np.log(3.0)))
    row = summarize("x", raw, (0,), 10, cooled)
    assert row["calibration_error"] == pytest.approx(1 / (1 + np.exp(-3)) - 0.75)
    assert row["calibration_error_at_temperature"] == pytest.approx(0.0, abs=1e-9)
    assert row["loss_at_temperature"] < row["loss"]


def test_mistake_06_every_client_is_evaluated_with_the_selector_of_its_own_group():
    for_a, for_b = [[5.0, -5.0]], [[-5.0, 5.0]]
    margins = torch.tensor([for_a, for_b])
    scores = {"ann": ClientMargins(margins, np.array([0])), "bo": ClientMargins(margins, np.array([1]))}
    right = judge_by_group(scores, {"ann": 0, "bo": 1})
    wrong = judge_by_group(scores, {"ann": 1, "bo": 0})
    assert [right[c].accuracy for c in ("ann", "bo")] == [1.0, 1.0]
    assert [wrong[c].accuracy for c in ("ann", "bo")] == [0.0, 0.0]
    assert sum(one.accuracy for one in judge_by_vote(scores, "mean").values()) == 1.0  # opposite people, one verdict


class LongerIsBetter:
    """A reward model that scores an answer by its length."""

    kind = "reward"
    lm = SimpleNamespace(model=SimpleNamespace(eval=lambda: None))

    def encode(self, held):
        return [encode_answers(one, lambda text: list(map(ord, text)), 4000) for one in held], []

    def logits_of_each(self, adapters, batch, keep):
        scores = torch.tensor([[len(item.ab), len(item.ba)] for item in batch], dtype=torch.float32)
        for _ in adapters:
            yield torch.stack([scores, scores.flip(1)], dim=1)


@pytest.mark.parametrize("only", [None, {"ann": 0, "bo": 0, "cy": 0}])
def test_comparisons_that_share_an_answer_are_scored_each_by_itself_by_a_reward_model_too(only):
    held = {
        "ann": [Comparison("q", "middle", "a", 0), Comparison("q", "middle", "the longest", 1)],
        "bo": [Comparison("q", "middle", "x", 0), Comparison("q", "x", "middle", 1)],
        "cy": [Comparison("q", "the longest", "middle", 0)],
    }
    scores = score_clients(LongerIsBetter(), [{}], held, only)
    judged_each = judge_by_group(scores, dict.fromkeys(held, 0))
    assert {client: one.accuracy for client, one in judged_each.items()} == dict.fromkeys(held, 1.0)
    assert scores["ann"].margins[0, :, 0].tolist() == [5.0, -5.0]


def test_scoring_one_adapter_a_client_gives_the_same_margins_as_scoring_all(load_tiny):
    from fedbiscuit.data.encoding import load_template
    from fedbiscuit.models.selector import Selector

    lm = load_tiny()
    selector = Selector.of(lm, load_template("choice"), (" A", " B"), 200)
    generator = torch.Generator().manual_seed(0)
    base = lm.new_adapter(0)
    adapters = [
        {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.3 for n, w in base.items()}
        for _ in range(2)
    ]
    shared = Comparison("same", "x", "y", 0)
    held = {"ann": [shared, Comparison("q", "yes", "no", 1)], "bo": [shared.swapped()], "cy": []}
    every = score_clients(selector, adapters, held)
    own = score_clients(selector, adapters, held, only={"ann": 1, "bo": 0, "cy": 0})
    assert set(every) == {"ann", "bo"}
    torch.testing.assert_close(own["ann"].margins[0], every["ann"].margins[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(own["bo"].margins[0], every["bo"].margins[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(every["bo"].margins[:, 0], every["ann"].margins[:, 0].flip(-1), atol=1e-5, rtol=0)
    assert judge_by_group(every, {"ann": 0, "bo": 0})["bo"].choice.tolist() == [1]
