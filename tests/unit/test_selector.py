"""Choosing does not depend on the order, and every vote says what it should on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbiscuit.config import LabelSettings
from fedbiscuit.data.encoding import load_template
from fedbiscuit.models.labeling import label_completions
from fedbiscuit.models.selector import Selector, choice_probability, letter_margins, selector_loss, vote
from fedbiscuit.types import Comparison, ConfigError

margin = st.floats(-30, 30)


@pytest.fixture(scope="module")
def selector(load_tiny):
    lm = load_tiny(lora={"dropout": 0.5})
    return Selector.of(lm, load_template("choice"), (" A", " B"), 200)


def lively(selector, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = selector.lm.new_adapter("selector test")
    return {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.3 for n, w in weights.items()}


@given(margin, margin)
def test_p_of_a_over_b_is_one_minus_p_of_b_over_a(ab, ba):
    p, q = choice_probability(torch.tensor([[ab, ba], [ba, ab]])).tolist()
    assert p == pytest.approx(1 - q, abs=1e-12)


def test_swapping_the_responses_swaps_the_real_models_probability_too(selector):
    one = Comparison("q", "first answer", "second", 0)
    encoded, _ = selector.encode([one, one.swapped()])
    p, q = choice_probability(letter_margins(selector, [lively(selector)], encoded)[0]).tolist()
    assert p == pytest.approx(1 - q, abs=1e-6)
    assert p != pytest.approx(0.5, abs=1e-4)


def test_one_order_is_there_for_comparison_only_and_is_not_invariant():
    margins = torch.tensor([[2.0, 2.0]])
    assert choice_probability(margins).item() == 0.5
    assert choice_probability(margins, orders="one").item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())


def test_mistake_08_dropout_is_off_while_choosing_with_any_number_of_selectors(selector):
    encoded, _ = selector.encode([Comparison("q", "yes", "no", 0)])
    selector.lm.model.train()
    first = letter_margins(selector, [lively(selector)], encoded)
    selector.lm.model.train()
    assert torch.equal(first, letter_margins(selector, [lively(selector)], encoded))
    both = letter_margins(selector, [lively(selector), lively(selector, 1)], encoded)
    assert torch.equal(first[0], both[0])


def test_margins_of_a_batch_equal_those_of_single_comparisons(selector):
    encoded, _ = selector.encode([Comparison(f"q{i % 2}", f"yes {i}", "no", 0) for i in range(5)])
    adapters = [lively(selector), lively(selector, 1)]
    together = letter_margins(selector, adapters, encoded, batch_size=5)
    alone = torch.cat([letter_margins(selector, adapters, [item], batch_size=1) for item in encoded], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_margins_of_adapters_that_share_a_trunk_equal_those_of_each_alone(load_tiny):
    lm = load_tiny(lora={"layers_to_transform": (1,)})
    selector = Selector.of(lm, load_template("choice"), (" A", " B"), 200)
    encoded, _ = selector.encode([Comparison(f"q{i % 2}", f"yes {i}", "no", 0) for i in range(5)])
    adapters = [lively(selector), lively(selector, 1)]
    seen = []
    together = letter_margins(selector, adapters, encoded, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]
    for u, adapter in enumerate(adapters):
        assert torch.equal(together[u], letter_margins(selector, [adapter], encoded, batch_size=2)[0])
    assert not torch.equal(together[0], together[1])


def test_the_loss_is_the_mean_over_both_orders_of_minus_log_p_of_the_chosen_letter(selector):
    encoded, _ = selector.encode([Comparison("q", "yes", "no", 1)])
    selector.lm.put_adapter(lively(selector))
    selector.lm.model.eval()
    with torch.no_grad():
        (ab, ba), loss = selector.logits(encoded)[0], selector_loss(selector, encoded)
    expected = -(torch.log_softmax(ab, 0)[1] + torch.log_softmax(ba, 0)[0]) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "probabilities", "expected"),
    [
        ("mean", [0.9, 0.4], 0.65),
        ("majority", [0.9, 0.4, 0.3], 1 / 3),
        ("majority", [0.6, 0.7, 0.1], 2 / 3),
        ("min", [0.9, 0.6], 0.6 / (0.6 + 0.1)),
    ],
)
def test_votes_on_numbers_worked_out_by_hand(rule, probabilities, expected):
    column = torch.tensor(probabilities, dtype=torch.float64)[:, None]
    assert vote(column, rule).probability.item() == pytest.approx(expected)


def test_mistake_15_a_tie_of_an_even_number_of_selectors_goes_to_the_mean_margin_and_not_to_a():
    for_b, for_a = ([0.6, 0.1], [0.4, 0.9])
    said = vote(torch.tensor([for_b, for_a, [0.6, 0.4]], dtype=torch.float64).T, "majority").probability
    assert said[0] < 0.5 < said[1]
    assert said[2] == 0.5


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5), st.sampled_from(["mean", "majority", "min"]))
def test_every_vote_is_order_invariant(probabilities, rule):
    p = torch.tensor(probabilities, dtype=torch.float64)[:, None]
    assert vote(p, rule).probability.item() == pytest.approx(1 - vote(1 - p, rule).probability.item(), abs=1e-9)


def test_disagreement_is_zero_where_all_say_the_same():
    said = vote(torch.tensor([[0.7, 0.9], [0.7, 0.1]], dtype=torch.float64), "mean")
    assert said.disagreement.tolist() == pytest.approx([0.0, 0.4])


def test_fault_45_letters_of_several_tokens_or_equal_ones_are_named_with_their_tokens(load_tiny):
    lm, template = load_tiny(), load_template("choice")
    with pytest.raises(ConfigError, match=r"'Yes' is 3 tokens"):
        Selector.of(lm, template, (" A", "Yes"), 200)
    with pytest.raises(ConfigError, match="they must differ"):
        Selector.of(lm, template, (" A", " A"), 200)


def test_fault_25_answers_that_do_not_fit_are_handed_back_by_name(load_tiny):
    selector = Selector.of(load_tiny(), load_template("choice"), (" A", " B"), 60)
    fitting, left_out = selector.encode(
        [Comparison("q", "y" * 80, "no", 0, id="long"), Comparison("q", "yes", "no", 0)]
    )
    assert [c.id for c in left_out] == ["long"]
    assert len(fitting) == 1


def written(*texts, finished=True):
    return {"prompt": "q", "completions": [{"text": t, "token_ids": [1, 2], "finished": finished} for t in texts]}


def test_mistake_01_pairs_whose_winner_is_a_and_pairs_whose_winner_is_b_are_both_kept(selector):
    rows, left_out = label_completions(
        selector, [lively(selector)], [written("one", "two", "three", "four")], LabelSettings()
    )
    assert len(rows) == 6
    texts = ["one", "two", "three", "four"]
    a_wins = sum(texts.index(row["chosen"]) < texts.index(row["rejected"]) for row in rows)
    assert 0 < a_wins < 6
    assert all(row["probability"] > 0.5 for row in rows)
    assert sum(left_out.values()) == 0


def test_the_label_is_what_the_selector_says_of_chosen_over_rejected(selector):
    adapter = lively(selector)
    rows, _ = label_completions(selector, [adapter], [written("one", "two", "three")], LabelSettings())
    encoded, _ = selector.encode([Comparison("q", row["chosen"], row["rejected"]) for row in rows])
    p = choice_probability(letter_margins(selector, [adapter], encoded)[0])
    assert p.tolist() == pytest.approx([row["probability"] for row in rows], abs=1e-5)


def test_equal_empty_and_close_pairs_are_left_out_and_counted(selector):
    entries = [written("same", "same"), written("", "text"), written("a", "b")]
    rows, left_out = label_completions(selector, [lively(selector)], entries, LabelSettings(min_margin=0.49))
    assert rows == []
    assert (left_out["equal completions"], left_out["empty completion"], left_out["too close to call"]) == (1, 1, 1)


def test_extremes_takes_the_best_against_the_worst_of_each_prompt(selector):
    entries = [written("one", "two", "three", "four"), written("five", "six", "seven")]
    every, _ = label_completions(selector, [lively(selector)], entries, LabelSettings())
    rows, _ = label_completions(selector, [lively(selector)], entries, LabelSettings(pairs="extremes"))
    assert len(rows) == 2

    def points(text):
        """The mean probability that a completion is better than each of the others of its prompt."""
        mine = [r for r in every if text in (r["chosen"], r["rejected"])]
        return sum(r["probability"] if r["chosen"] == text else 1 - r["probability"] for r in mine) / len(mine)

    for row, entry in zip(rows, entries, strict=True):
        ranked = sorted((c["text"] for c in entry["completions"]), key=points)
        assert {row["chosen"], row["rejected"]} == {ranked[0], ranked[-1]}
