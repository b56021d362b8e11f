"""Generation and the policy's log-probabilities, against the model's own plain computation."""

from __future__ import annotations

import pytest
import torch

from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.policy import (
    Pair,
    encode_pair,
    log_ratios,
    pair_log_probs,
    reference_log_probs,
    response_log_probs,
)

PROMPTS = [(1, 2, 3, 4, 5), (9, 8), (1, 2, 3, 7)]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_greedy_completions_equal_transformers_generate(load_tiny, family):
    lm = load_tiny(family)
    ours = generate(lm, PROMPTS, 2, Sampling(max_new_tokens=24, temperature=0), ("key",))
    with lm.padded() as model:
        for prompt, completions in zip(PROMPTS, ours, strict=True):
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=lm.end, pad_token_id=0
            )
            expected = out[0, len(prompt) :].tolist()
            finished = lm.end in expected
            if finished:
                expected = expected[: expected.index(lm.end) + 1]
            assert [c.tokens for c in completions] == [tuple(expected)] * 2
            assert [c.finished for c in completions] == [finished] * 2


def test_a_sampled_completion_depends_on_its_key_and_not_on_its_batch(load_tiny):
    lm = load_tiny()
    how = Sampling(max_new_tokens=12, temperature=1.0)
    together = generate(lm, PROMPTS, 3, how, ("key",))
    alone = [generate(lm, [prompt], 3, how, ("key",))[0] for prompt in PROMPTS]
    assert together == alone
    assert len({c.tokens for c in together[0]}) > 1
    assert generate(lm, PROMPTS, 3, how, ("other key",)) != together


def test_sampling_follows_the_models_distribution(load_tiny):
    lm = load_tiny()
    counts = torch.zeros(264)
    for i in range(40):
        for completion in generate(lm, [PROMPTS[0]], 50, Sampling(max_new_tokens=1, temperature=0.5), (i,))[0]:
            counts[completion.tokens[0]] += 1
    with lm.padded() as model, torch.no_grad():
        expected = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5, -1)
    assert (counts / counts.sum() - expected).abs().sum() / 2 < 0.12


def test_top_p_keeps_only_the_most_likely_tokens(load_tiny):
    lm = load_tiny()
    with lm.padded() as model, torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1], -1)
    ranked, order = probabilities.sort(descending=True)
    kept = set(order[: int((ranked.cumsum(0) < 0.3).sum()) + 1].tolist())
    drawn = generate(lm, [PROMPTS[0]], 64, Sampling(max_new_tokens=1, temperature=1.0, top_p=0.3), ("p",))[0]
    assert {c.tokens[0] for c in drawn} <= kept


def test_mistake_12_a_cut_off_response_gets_no_end_token_and_the_prompt_is_cut_by_position(load_tiny):
    lm = load_tiny()
    written = [c for i in range(30) for c in generate(lm, [PROMPTS[0]], 4, Sampling(8, temperature=2.0), (i,))[0]]
    assert {c.finished for c in written} == {True, False}
    for completion in written:
        assert completion.finished == (completion.tokens[-1] == lm.end)
        assert completion.finished or len(completion.tokens) == 8
        assert lm.end not in completion.tokens[:-1]
    pair = encode_pair(lm, (1, 2), "ab", "ba")
    assert pair.chosen == (*lm.encode("ab"), lm.end)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_log_probabilities_of_responses_equal_those_of_plain_sequences(load_tiny, family):
    lm = load_tiny(family)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    responses = [(5, 6, 7, 258), (5, 6, 100), tuple(range(40))]
    ours = response_log_probs(lm, prompts, responses)
    with lm.padded() as model:
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logits = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
            expected = sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(response))
            assert ours[i].item() == pytest.approx(expected.item(), abs=1e-3)


def test_chunked_log_probabilities_have_the_same_gradients(load_tiny, monkeypatch):
    from fedbiscuit.models import policy

    lm = load_tiny()
    pairs = [Pair((1, 2, 3), tuple(range(30)), (7, 8, 9))]

    def gradients(chunk):
        monkeypatch.setattr(policy, "CHUNK", chunk)
        lm.model.zero_grad()
        pair_log_probs(lm, pairs).sum().backward()
        return [p.grad.clone() for p in lm.trainable().values()]

    for small, whole in zip(gradients(4), gradients(1000), strict=True):
        torch.testing.assert_close(small, whole, atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_base_model_whatever_the_adapter_is(load_tiny):
    lm = load_tiny()
    pairs = [Pair((1, 2, 3), (4, 5, 258), (6, 258))]
    lm.put_adapter(lm.new_adapter(0))
    base = pair_log_probs(lm, pairs).detach()
    lm.put_adapter({n: torch.ones_like(w) * 0.1 for n, w in lm.new_adapter(0).items()})
    torch.testing.assert_close(reference_log_probs(lm, pairs), base, atol=1e-5, rtol=0)
    assert not torch.allclose(pair_log_probs(lm, pairs), base, atol=1e-2)


def test_log_ratios_are_nothing_for_a_new_adapter_and_their_mean_over_all_next_tokens_is_the_kl_divergence(load_tiny):
    lm = load_tiny()
    prompt, tokens = (1, 2, 3), range(lm.model.config.vocab_size)
    lm.put_adapter(lm.new_adapter(0))
    assert float(log_ratios(lm, [prompt] * 2, [(4, 5), (6,)]).abs().max()) < 1e-6
    lm.put_adapter(
        {
            n: torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) * 0.2
            for n, w in lm.new_adapter(0).items()
        }
    )
    with torch.no_grad():
        aligned = response_log_probs(lm, [prompt] * len(tokens), [(t,) for t in tokens]).double()
        with lm.adapter_off():
            raw = response_log_probs(lm, [prompt] * len(tokens), [(t,) for t in tokens]).double()
    kl = torch.nn.functional.kl_div(raw, aligned, reduction="sum", log_target=True)
    ratios = log_ratios(lm, [prompt] * len(tokens), [(t,) for t in tokens]).double()
    assert float(kl) > 0.01
    assert float((aligned.exp() * ratios).sum()) == pytest.approx(float(kl), rel=1e-4)


def test_mistake_14_the_optimizer_goes_on_through_a_resumed_alignment(load_tiny):
    """Ten steps at once, and four, stop, six with the saved optimizer, are the same training."""
    from fedbiscuit.models.policy import pair_dpo_loss
    from fedbiscuit.models.training import load_optimizer, make_optimizer, optimizer_tensors, train
    from fedbiscuit.types import LocalTraining

    lm = load_tiny(lora={"dropout": 0.2})
    pairs = [Pair((1, 2, 3), (4, 5, 258), (6, 258)), Pair((9, 9), (3, 258), (5, 5, 258))]
    reference = reference_log_probs(lm, pairs)

    def run(first, last, weights, state=None):
        how = LocalTraining(objective="dpo", steps=last, lr=0.01, optimizer="rmsprop")
        lm.put_adapter(weights)
        optimizer = make_optimizer(list(lm.trainable().values()), how)
        if state:
            load_optimizer(optimizer, state)
        steps = train(
            lm, lambda s: [pairs], lambda b: pair_dpo_loss(lm, b, reference, 0.1), how, ("k",), optimizer, first
        )
        reports = list(steps)
        return lm.adapter(), {k: v.clone() for k, v in optimizer_tensors(optimizer).items()}, reports

    start = lm.new_adapter(0)
    whole, _, reports = run(0, 10, start)
    half, state, first = run(0, 4, start)
    again, _, rest = run(4, 10, half, state)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert reports == first + rest
    assert reports[-1]["margin"] > reports[0]["margin"]
