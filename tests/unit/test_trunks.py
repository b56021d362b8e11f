"""Trunks change nothing but the time: same logits, same gradients, whatever was kept."""

from __future__ import annotations

import pytest
import torch

from fedbiscuit.data.encoding import load_template
from fedbiscuit.models.policy import encode_pair, implicit_margins, pair_dpo_loss, pair_sft_loss, reference_log_probs
from fedbiscuit.models.selector import Selector, letter_margins, selector_loss
from fedbiscuit.types import Comparison

COMPARISONS = [Comparison(f"a question {i % 2}", f"yes {i}", "no, not at all", i % 2) for i in range(6)]


@pytest.fixture(params=[("llama", False), ("gemma3", False), ("llama", True)], ids=["llama", "gemma3", "checkpointing"])
def lm(request, load_tiny):
    family, checkpointing = request.param
    model = load_tiny(family, lora={"layers_to_transform": (1,)}, gradient_checkpointing=checkpointing)
    weights = model.new_adapter("trunks")
    generator = torch.Generator().manual_seed(0)
    model.put_adapter(
        {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.3 for n, w in weights.items()}
    )
    return model


def selector(lm, trunk_bytes):
    return Selector.of(lm, load_template("choice"), (" A", " B"), 200, trunk_bytes)


def loss_and_gradients(of, encoded):
    return with_gradients(of.lm, lambda: selector_loss(of, encoded))


def with_gradients(lm, loss_of):
    lm.model.train()
    lm.model.zero_grad()
    loss = loss_of()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in lm.trainable().values())]


def test_loss_and_gradients_equal_those_without_trunks(lm):
    plain, kept = selector(lm, 0), selector(lm, 10**9)
    encoded, _ = plain.encode(COMPARISONS)
    assert plain.trunks is None
    for _ in range(2):  # computed, then taken from what was kept
        for ours, theirs in zip(loss_and_gradients(kept, encoded), loss_and_gradients(plain, encoded), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert kept.trunks.num_computed == len(COMPARISONS)


def test_what_is_kept_and_with_whom_a_comparison_is_read_change_no_bit_of_its_states(lm):
    encoded, _ = selector(lm, 0).encode(COMPARISONS)
    roomy, tight = selector(lm, 10**9), selector(lm, 1)
    for batch in (encoded[:3], encoded[2:], encoded):
        assert all(map(torch.equal, loss_and_gradients(roomy, batch), loss_and_gradients(tight, batch)))
    assert roomy.trunks.num_computed == 6
    assert tight.trunks.num_computed == 3 + 3 + 6  # the one that was read last is always kept
    assert tight.trunks.num_bytes <= max(item.states.nbytes for item in roomy.trunks._kept.values())


def test_scoring_keeps_trunks_only_when_comparisons_will_be_read_again(lm):
    keeper = selector(lm, 10**9)
    encoded, _ = keeper.encode(COMPARISONS)
    adapters = [lm.adapter(), lm.new_adapter("other")]
    once = letter_margins(keeper, adapters, encoded)
    assert keeper.trunks.num_computed == 0
    again = letter_margins(keeper, adapters, encoded, keep=True)
    assert keeper.trunks.num_computed == 6
    torch.testing.assert_close(once, again, atol=1e-5, rtol=0)


def test_what_a_policy_learns_equals_what_it_learns_without_trunks(lm):
    kept = selector(lm, 10**9).trunks
    pairs = [encode_pair(lm, lm.encode(one.prompt), one.chosen, one.rejected) for one in COMPARISONS]
    reference = reference_log_probs(lm, pairs)
    torch.testing.assert_close(reference_log_probs(lm, pairs, trunks=kept), reference, atol=1e-4, rtol=1e-5)
    losses = [
        lambda trunks: pair_dpo_loss(lm, pairs, reference, 0.1, trunks=trunks)[0],
        lambda trunks: pair_sft_loss(lm, pairs, trunks),
    ]
    for loss in losses:
        ours, theirs = (with_gradients(lm, lambda trunks=trunks: loss(trunks)) for trunks in (kept, None))  # noqa: B023
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    margins = implicit_margins(lm, pairs, 0.1)
    torch.testing.assert_close(implicit_margins(lm, pairs, 0.1, kept), margins, atol=1e-4, rtol=1e-5)
    assert kept.num_computed == 6 + 4, "each pair once, and four different good answers with their prompt"


def test_a_model_with_adapters_in_all_layers_keeps_nothing(load_tiny):
    assert selector(load_tiny(), 10**9).trunks is None
