"""Tensors as they travel: rounded once, the same bits for whoever looks, and nothing that is not finite gets lost."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.federated.coding import SCALES, coded, decoded
from fedbiscuit.federated.privacy import check_reply
from fedbiscuit.types import FederationError, Reply, num_bytes

KINDS = ("float32", "bfloat16", "int8")
values = st.floats(-(2.0**126), 2.0**126, width=32)
matrices = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
)
adapters = st.dictionaries(
    st.sampled_from("abc"), st.one_of(matrices, st.lists(values, min_size=1, max_size=6)), min_size=1
)


def rounded(weights, kind):
    return decoded(coded(weights, kind), kind)


def bits(weights):
    return {name: tensor.view(torch.int32).tolist() for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(rows=adapters)
@settings(max_examples=150, deadline=None)
def test_what_is_rounded_is_not_rounded_again(kind, rows):
    weights = {name: torch.tensor(found) for name, found in rows.items()}
    once = rounded(weights, kind)
    assert bits(rounded(once, kind)) == bits(once)
    assert once.keys() == weights.keys()
    assert all(once[name].dtype == torch.float32 and once[name].shape == weights[name].shape for name in once)


@given(rows=adapters)
@settings(max_examples=150, deadline=None)
def test_int8_is_off_by_at_most_half_a_step_of_the_largest_value_in_its_direction(rows):
    for name, found in rows.items():
        whole = torch.tensor(found)
        tensor = whole if whole.dim() == 2 else whole[None]
        kept = min((0, 1), key=lambda axis: tensor.shape[axis])
        largest = tensor.abs().amax(1 - kept, keepdim=True).double()
        off = (rounded({name: whole}, "int8")[name].double() - whole.double()).abs().reshape(tensor.shape)
        assert bool((off <= largest / 127 * 0.5001 + 1e-28).all())


def test_a_scale_comes_out_of_its_largest_value_again_for_every_float():
    largest = torch.arange(2**23, 2**24, dtype=torch.int32).to(torch.float32)  # all mantissas; exponents change nothing
    scale = largest / 127
    assert torch.equal(scale * 127 / 127, scale)
    some = scale[:: 2**7 - 1]
    for steps in range(1, 128):
        assert bool((torch.round(some * steps / some) == steps).all())


def test_int8_on_numbers_that_can_be_checked_by_hand():
    weights = {"b": torch.tensor([[1.27, -0.004, 0.6], [0.0, 0.0, 0.0]]), "a": torch.tensor([-254.0, 3.0, 5.0])}
    found = coded(weights, "int8")
    assert found["a"].tolist() == [-127, 2, 2]  # 1.5 and 2.5 steps: half to even
    assert found["b"].tolist() == [[127, 0, 60], [0, 0, 0]]
    assert found[SCALES].tolist() == pytest.approx([2.0, 0.01, 0.0])  # a has one, b one a row, in this order
    assert decoded(found, "int8")["a"].tolist() == [-254.0, 4.0, 4.0]
    assert decoded(found, "int8")["b"][1].tolist() == [0.0, 0.0, 0.0]


def test_each_direction_of_the_rank_has_its_own_scale_whichever_side_it_stands_on():
    small_and_large = torch.tensor([[1e-6] * 5, [1e3] * 5])
    for tensor in (small_and_large, small_and_large.T.contiguous()):
        found = coded({"w": tensor}, "int8")
        assert found[SCALES].shape == (2,)
        assert torch.allclose(decoded(found, "int8")["w"], tensor, rtol=1e-4)


def test_float32_travels_as_it_is_and_the_others_in_a_half_and_about_a_quarter():
    weights = {"a": torch.randn(8, 64), "b": torch.randn(64, 8)}
    assert bits(rounded(weights, "float32")) == bits(weights)
    whole = num_bytes(weights)
    assert num_bytes(coded(weights, "bfloat16")) == whole / 2
    assert num_bytes(coded(weights, "int8")) == whole / 4 + 16 * 4
    assert torch.equal(rounded(weights, "bfloat16")["a"], weights["a"].to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fault_63_64_a_value_that_is_not_finite_is_still_seen_after_it_has_travelled(kind, bad):
    zeros = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    delta = {"a": torch.tensor([[0.1, 0.2, 0.3], [1.0, bad, 2.0]]), "b": torch.ones(4)}
    told = check_reply(Reply("ann", 0, coded(delta, kind), 1), coded(zeros, kind), comm_dtype=kind)
    assert told == (
        f"{SCALES}: 1 negative or non-finite values, first at 1"
        if kind == "int8"
        else "a: 1 non-finite values, first at 4"
    )


def test_numbers_too_small_for_a_scale_become_zeros_and_not_other_numbers():
    for tiny in (2e-45, 1e-43, 1e-36):
        assert rounded({"a": torch.tensor([tiny, -tiny])}, "int8")["a"].abs().tolist() == [0.0, 0.0]
    assert rounded({"a": torch.tensor([1e-25, -1e-25])}, "int8")["a"].tolist() == pytest.approx([1e-25, -1e-25])


GOOD = coded({"a": torch.tensor([[0.5, 1.0, 2.0], [1.0, 2.0, 3.0]])}, "int8")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({SCALES: torch.tensor([0.1, -0.1])}, "scales: 1 negative or non-finite values, first at 1"),
        ({SCALES: torch.tensor([math.inf, 0.1])}, "scales: 1 negative or non-finite values, first at 0"),
        ({SCALES: torch.tensor([math.nan, -1.0])}, "scales: 2 negative or non-finite values, first at 0"),
        ({SCALES: torch.tensor([0.1])}, r"scales: shape \(1,\) where \(2,\) is needed"),
        ({SCALES: torch.tensor([0.1, 0.1], dtype=torch.float64)}, "scales: dtype torch.float64"),
        ({SCALES: None}, "scales: tensor is missing"),
        ({"a": torch.ones(2, 3)}, "a: dtype torch.float32 where torch.int8 is needed"),
        ({"a": torch.ones(3, 2, dtype=torch.int8)}, "a: shape"),
        ({SCALES: torch.tensor([3e38, 0.1])}, "a: 3 non-finite values, first at 0"),
        ({SCALES: torch.tensor([1e9, 0.1])}, "delta has norm"),
    ],
)
def test_fault_63_to_69_int8_that_is_malformed_is_refused_with_its_place(changes, told):
    delta = {name: tensor for name, tensor in {**GOOD, **changes}.items() if tensor is not None}
    big = {"a": torch.full((2, 3), 127, dtype=torch.int8)} if SCALES in changes and "a" not in changes else {}
    assert check_reply(Reply("ann", 0, dict(GOOD), 1), GOOD, comm_dtype="int8") is None
    found = check_reply(Reply("ann", 0, {**delta, **big}, 1), GOOD, comm_dtype="int8")
    assert found is not None
    assert re.search(told, found)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("float32", {"a": torch.ones(2, dtype=torch.float64)}),
        ("bfloat16", {"a": torch.ones(2)}),
        ("int8", {"a": torch.ones(2)}),
        ("int8", {SCALES: torch.ones(3)}),
        ("int8", {SCALES: torch.tensor([-1.0])}),
        ("int8", {SCALES: torch.ones(1, dtype=torch.float64)}),
        ("int8", {SCALES: None}),
    ],
)
def test_a_client_refuses_an_adapter_that_is_not_coded_as_the_run_says(kind, changes):
    good = coded({"a": torch.ones(2)}, kind)
    decoded(good, kind)
    with pytest.raises(FederationError, match=r"needed|negative"):
        decoded({name: t for name, t in {**good, **changes}.items() if t is not None}, kind)
