"""The baseline FedRM: a head scores one answer at a time, and the loss is that of Bradley and Terry."""

from __future__ import annotations

import pytest
import torch

from fedbiscuit.config import ModelSettings
from fedbiscuit.data.encoding import encode_answers, load_template
from fedbiscuit.models.lm import SCORE, load_lm
from fedbiscuit.models.selector import Selector, choice_probability, letter_margins, selector_loss
from fedbiscuit.types import Comparison

COMPARISONS = [
    Comparison("what is tea?", "a drink", "a very small boat", 0),
    Comparison("what is tea?", "leaves", "a drink", 1),
    Comparison("why?", "because", "no", 0),
]


def letters(text):
    return [ord(letter) for letter in text]


def text_of(ids):
    return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def selector(tiny_model):
    lm = load_lm(ModelSettings(base=str(tiny_model), device="cpu", dtype="float32", lora={"dropout": 0.0}), scores=True)
    generator = torch.Generator().manual_seed(1)
    lively = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in lm.new_adapter(0).items()}
    lm.put_adapter(lively)
    return Selector.of(lm, load_template("choice"), (" A", " B"), 400, kind="reward")


def test_each_answer_stands_alone_below_the_whole_prompt():
    one = encode_answers(Comparison("tea?", "yes", "no", 1, id="x"), letters, 400)
    assert text_of(one.ab).endswith("Request: tea?\n\nResponse: yes\n\nHow good the response is:")
    assert text_of(one.ba).endswith("Request: tea?\n\nResponse: no\n\nHow good the response is:")
    assert (one.choice, one.id, one.cut) == (1, "x", 0)


def test_the_prompt_is_shortened_alike_for_both_answers_and_answers_never_are():
    whole = encode_answers(Comparison("p" * 50, "a" * 9, "b", 0), letters, 400)
    short = encode_answers(Comparison("p" * 50, "a" * 9, "b", 0), letters, len(whole.ab) - 20)
    assert (len(short.ab), short.cut) == (len(whole.ab) - 20, 20)
    assert "p" * 30 + "\n\nResponse: b\n" in text_of(short.ba)
    assert encode_answers(Comparison("p", "a" * 400, "b", 0), letters, 400) is None


def test_the_loss_is_minus_the_log_of_the_sigmoid_of_the_difference_of_scores(selector):
    encoded, _ = selector.encode(COMPARISONS)
    with selector.lm.padded() as model, torch.no_grad():
        scores = torch.stack(
            [
                torch.stack([hidden_of(model, ids) @ selector.lm._slots[SCORE][0] for ids in (item.ab, item.ba)])
                for item in encoded
            ]
        )
    better = torch.tensor([scores[i, c.choice] - scores[i, 1 - c.choice] for i, c in enumerate(COMPARISONS)])
    expected = -torch.nn.functional.logsigmoid(better).mean()
    torch.testing.assert_close(selector_loss(selector, encoded), expected, atol=1e-5, rtol=1e-5)


def hidden_of(model, ids):
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]


def test_both_orders_agree_and_the_probability_is_that_of_the_scores(selector):
    encoded, _ = selector.encode(COMPARISONS)
    margins = letter_margins(selector, [selector.lm.adapter()], encoded)
    torch.testing.assert_close(margins[..., 0], -margins[..., 1])
    swapped, _ = selector.encode([comparison.swapped() for comparison in COMPARISONS])
    other = choice_probability(letter_margins(selector, [selector.lm.adapter()], swapped))
    torch.testing.assert_close(choice_probability(margins) + other, torch.ones(1, 3, dtype=torch.float64))


def test_the_head_is_trained_and_sent_like_the_rest_of_the_adapter(selector):
    encoded, _ = selector.encode(COMPARISONS)
    parameters = selector.lm.trainable(freeze_a=True)
    assert SCORE in parameters
    gradients = torch.autograd.grad(selector_loss(selector, encoded), list(parameters.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    fresh = selector.lm.new_adapter(3)[SCORE]
    assert fresh.shape == (1, 32)
    assert 0.1 < float(fresh.std()) < 0.25  # 1 / sqrt(33)


def test_an_lm_without_a_head_says_so(load_tiny):
    lm = load_tiny()
    assert SCORE not in lm.adapter()
    with pytest.raises(RuntimeError, match="without a head"):
        lm.scores(torch.zeros(1, 32))
