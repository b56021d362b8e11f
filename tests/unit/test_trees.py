"""Prefix trees: packing loses nothing, and the model computes what it would for the separate sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.models.trees import pack, tree_attention

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=8)


@given(sequences, st.integers(1, 4))
def test_every_sequence_can_be_read_back_from_the_row(batch, min_shared):
    forest = pack(batch, min_shared=min_shared)
    for sequence, path in zip(batch, forest.paths, strict=True):
        assert forest.tokens[path].tolist() == sequence
        assert forest.positions[path].tolist() == list(range(len(sequence)))


@given(sequences, st.integers(1, 4))
def test_a_token_sees_exactly_its_own_sequence_up_to_itself(batch, min_shared):
    forest = pack(batch, min_shared=min_shared)
    place = torch.arange(len(forest.tokens))
    visible = (place[None] <= place[:, None]) & (place[:, None] < forest.reach[None])
    for path in forest.paths:
        for i, token in enumerate(path):
            assert visible[token].nonzero()[:, 0].tolist() == path[: i + 1].tolist()


@given(sequences, st.integers(1, 4))
def test_the_calls_cover_each_token_once_and_their_masks_say_the_same(batch, min_shared):
    forest = pack(batch, min_shared=min_shared)
    place = torch.arange(len(forest.tokens))
    visible = (place[None] <= place[:, None]) & (place[:, None] < forest.reach[None])
    covered = []
    for call, mask in zip(forest.calls, forest.masks(None, torch.float32), strict=True):
        keys = torch.cat([place[a:b] for a, b in (*call.spans, (call.start, call.stop))])
        expected = visible[call.start : call.stop][:, keys]
        shown = mask == 0 if mask is not None else torch.ones_like(expected).tril()
        assert torch.equal(shown, expected)
        assert int(visible[call.start : call.stop].sum()) == int(expected.sum())
        covered += range(call.start, call.stop)
    assert covered == place.tolist()


@given(sequences, st.integers(1, 4), st.integers(1, 30))
def test_side_by_side_each_token_sees_the_same(batch, min_shared, limit):
    forest = pack(batch, min_shared=min_shared, side_by_side=limit)
    if forest.side_by_side is None:
        assert max(call.num_keys for call in forest.calls) > limit
        return
    rows, size = forest.side_by_side, forest.side_by_side.queries.shape[1]
    (mask,) = forest.masks(None, torch.float32)
    place = torch.arange(len(forest.tokens))
    visible = (place[None] <= place[:, None]) & (place[:, None] < forest.reach[None])
    assert torch.equal(rows.queries.flatten()[rows.order], place)
    for token in place.tolist():
        row, column = divmod(int(rows.order[token]), size)
        seen = (mask[row, 0, column] == 0) & rows.real_keys[row]
        assert torch.equal(seen, mask[row, 0, column] == 0)
        assert rows.keys[row, seen].tolist() == visible[token].nonzero()[:, 0].tolist()
    assert bool((mask == 0).any(-1).all())


def test_trees_longer_than_the_limit_are_computed_call_by_call():
    assert pack([[1] * 9, [2] * 5], side_by_side=8).side_by_side is None
    assert pack([[1] * 9, [2] * 5], side_by_side=9).side_by_side is not None


def test_branches_of_a_large_tree_stand_side_by_side_each_with_its_prompt():
    prompt = list(range(20))
    forest = pack([[*prompt, n, n + 1, n + 2] for n in range(100, 130)], side_by_side=30)
    assert len(forest.tokens) == 20 + 30 * 3
    assert forest.side_by_side is not None
    assert forest.side_by_side.keys.shape == (31, 24)


def test_two_orders_of_a_comparison_share_their_prompt():
    prompt = list(range(20))
    forest = pack([[*prompt, 1, 2, 3], [*prompt, 3, 2, 1]])
    assert len(forest.tokens) == 26


def test_a_short_common_start_is_not_worth_a_node():
    assert len(pack([[1, 2, 3], [1, 2, 4]]).tokens) == 6
    assert len(pack([[1, 2, 3], [1, 2, 4]], min_shared=2).tokens) == 4


def test_equal_sequences_and_prefixes_of_others_are_computed_once():
    long = list(range(30))
    forest = pack([long, long, long[:15]])
    assert len(forest.tokens) == 30
    assert forest.last.tolist() == [29, 29, 14]


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="no empty"):
        pack([[1], []])


def plain_last_logits(lm, batch):
    """The oracle: each sequence alone through the model's own full forward pass."""
    with lm.padded() as model:
        return torch.stack([model(torch.tensor([s])).logits[0, -1] for s in batch])


trees = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("side_by_side", [0, 60, 1000])
def test_a_packed_row_gives_the_logits_of_the_separate_sequences(load_tiny, family, side_by_side):
    lm = load_tiny(family)
    lm.side_by_side = side_by_side
    give_adapter_a_life(lm)

    @given(st.lists(st.integers(0, 255), min_size=1, max_size=40), trees)
    @settings(max_examples=10, deadline=None)
    def check(stem, branches):
        batch = [
            stem,
            *([*stem, *branch] for branch in branches),
            *([*stem, *branches[0], *branch] for branch in branches),
        ]
        with torch.no_grad():
            forest = lm.pack(batch)
            ours = lm.logits(lm.hidden_at(forest, forest.last))
            torch.testing.assert_close(ours, plain_last_logits(lm, batch), atol=1e-5, rtol=1e-5)

    check()


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("side_by_side", "rows"), [(0, 0), (195, 5), (1000, 2)]
)  # 195: the stem, its three branches, [5, 6]
def test_gradients_in_training_mode_equal_those_of_the_separate_sequences(
    load_tiny, family, checkpointing, side_by_side, rows
):
    lm = load_tiny(family, gradient_checkpointing=checkpointing)
    lm.side_by_side = side_by_side
    give_adapter_a_life(lm)
    lm.model.train()
    stem = list(range(60))
    batch = [[*stem, 7, 8, 9], [*stem, 9, 8], [*stem, 7, 8, 9, *range(100, 230)], [5, 6], [5, 6]]  # one twice

    def gradients(logits):
        lm.model.zero_grad()
        torch.logsumexp(logits, -1).sum().backward()
        return {name: p.grad.clone() for name, p in lm.trainable().items()}

    forest = lm.pack(batch)
    assert (len(forest.side_by_side.queries) if forest.side_by_side else 0) == rows
    ours = gradients(lm.logits(lm.hidden_at(forest, forest.last)))
    with lm.padded() as model:  # the backward pass too: checkpointing runs the forward pass again in it
        theirs = gradients(torch.stack([model(torch.tensor([s])).logits[0, -1] for s in batch]))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4)
        assert gradient.abs().max() > 0


def give_adapter_a_life(lm):
    """B starts at zero: put something there, so that the adapter is part of what is compared."""
    weights = lm.new_adapter("test")
    generator = torch.Generator().manual_seed(1)
    lm.put_adapter(
        {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.1 for n, w in weights.items()}
    )


@pytest.mark.parametrize("side_by_side", [0, 1024])
def test_on_a_cpu_bfloat16_is_attended_to_in_float32(side_by_side):
    forest = pack(
        [[*range(20), *range(30, 45)], [*range(20), *range(50, 70)], range(80, 90)], side_by_side=side_by_side
    )
    states = torch.randn(3, 1, 4, len(forest.tokens), 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide, _ = tree_attention(torch.nn.Module(), *states.float(), None, forest=forest)
    narrow, _ = tree_attention(torch.nn.Module(), *states, None, forest=forest)
    assert torch.equal(narrow, wide.bfloat16())
