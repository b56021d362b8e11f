"""Keys and values kept for writing: each next token's logits equal those of the whole sequence, whatever rows are dropped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbiscuit.models import decoding
from fedbiscuit.models.decoding import Cache

TOKENS = st.integers(0, 250)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=25), min_size=1, max_size=4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=PROMPTS, stem=st.lists(TOKENS, max_size=12), completions=st.integers(1, 3), data=st.data())
def test_next_tokens_see_what_whole_sequences_see(load_tiny, monkeypatch, family, prompts, stem, completions, data):
    """Prompts with a common stem, random tokens, rows that end at random steps; room for three tokens at a time."""
    monkeypatch.setattr(decoding, "ROOM", 3)
    lm = load_tiny(family)
    sequences = [[*stem, *prompt] for prompt in prompts for _ in range(completions)]
    with torch.no_grad():
        forest = lm.pack([[*stem, *prompt] for prompt in prompts])
        cache = Cache(forest.paths, completions, lm.device)
        lm.prefill(forest, cache)
        for _ in range(7):
            new = data.draw(st.lists(TOKENS, min_size=len(sequences), max_size=len(sequences)))
            assert cache.positions.tolist() == [len(sequence) for sequence in sequences]
            ours = lm.logits(lm.next_hidden(torch.tensor(new), cache))
            for sequence, token in zip(sequences, new, strict=True):
                sequence.append(token)
            with lm.padded() as model:
                theirs = torch.stack([model(torch.tensor([sequence])).logits[0, -1] for sequence in sequences])
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
            stay = data.draw(st.lists(st.sampled_from(range(len(sequences))), min_size=1, unique=True).map(sorted))
            if data.draw(st.booleans()):
                cache.select(torch.tensor(stay))
                sequences = [sequences[i] for i in stay]


def test_a_prompt_is_kept_once_for_all_its_completions(load_tiny):
    lm = load_tiny()
    sizes = []
    for completions in (1, 8):
        forest = lm.pack([[1, 2, 3], [4, 5]])
        cache = Cache(forest.paths, completions, lm.device)
        with torch.no_grad():
            lm.prefill(forest, cache)
        sizes.append(sum(k.numel() + v.numel() for k, v in cache._shared.values()))
    assert sizes[0] == sizes[1]
