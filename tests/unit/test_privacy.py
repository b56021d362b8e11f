"""What the server lets in: rows 63 to 77 of the faults, and the properties of clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.federated.privacy import check_reply, clip_to_norm, delta_norm
from fedbiscuit.types import Reply, Weights

A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
TEMPLATE: Weights = {A: torch.full((2, 4), 0.5), B: torch.zeros(4, 2)}


def reply(num_examples: Any = 8, **changes: Any) -> Reply:
    """A good reply, but for the tensors given: a for A and b for B, None for a tensor left out."""
    delta = {A: changes.get("a", torch.full((2, 4), 0.01)), B: changes.get("b", torch.full((4, 2), 0.01))}
    delta.update(changes.get("more", {}))
    return Reply("ann", 0, {name: tensor for name, tensor in delta.items() if tensor is not None}, num_examples)


def reason(answer: Reply) -> str:
    found = check_reply(answer, TEMPLATE)
    assert found is not None
    return found


def test_a_good_reply_has_no_reason_to_be_refused() -> None:
    assert check_reply(reply(), TEMPLATE) is None


def test_fault_63_nan_is_refused_with_its_place() -> None:
    bad = torch.full((2, 4), 0.01)
    bad[1, 2] = math.nan
    assert reason(reply(a=bad)) == f"{A}: 1 non-finite values, first at 6"


def test_fault_64_infinite_and_absurdly_large_values_are_refused() -> None:
    assert "non-finite" in reason(reply(b=torch.full((4, 2), math.inf)))
    assert "norm" in reason(reply(b=torch.full((4, 2), 1e30)))


def test_fault_64_a_norm_beyond_float32_is_refused_and_not_an_exception() -> None:
    huge = {"w": torch.full((3,), 3e38)}
    assert "delta has norm 5.2e+38" in str(check_reply(Reply("ann", 0, huge), {"w": torch.zeros(3)}))


def test_fault_65_a_delta_of_zeros_is_a_good_reply() -> None:
    assert check_reply(reply(a=torch.zeros(2, 4), b=torch.zeros(4, 2)), TEMPLATE) is None


def test_fault_66_missing_and_unknown_tensors_are_refused() -> None:
    assert reason(reply(b=None)) == f"{B}: tensor is missing (1 missing in all)"
    assert reason(reply(more={"extra": torch.zeros(1)})) == "extra: unknown tensor (1 unknown in all)"


def test_fault_67_another_shape_is_refused() -> None:
    assert "shape (8,) where (2, 4) is needed" in reason(reply(a=torch.zeros(8)))


def test_fault_68_a_shape_that_would_broadcast_is_refused() -> None:
    assert "shape (1,) where (2, 4) is needed" in reason(reply(a=torch.zeros(1)))
    assert "shape (2, 1)" in reason(reply(a=torch.zeros(2, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_fault_69_another_dtype_is_refused(dtype: torch.dtype) -> None:
    assert f"dtype {dtype} where torch.float32 is needed" in reason(reply(a=torch.zeros(2, 4, dtype=dtype)))


@pytest.mark.parametrize("count", [10**12, -39, math.nan, 3.0, "8", None, True])
def test_fault_70_a_count_that_is_no_small_whole_number_is_refused(count: Any) -> None:
    assert reason(reply(num_examples=count)).startswith("num_examples")


def test_fault_70_a_client_cannot_claim_more_comparisons_than_it_was_asked_to_use() -> None:
    assert check_reply(reply(num_examples=240), TEMPLATE, max_examples=240) is None
    assert check_reply(reply(num_examples=241), TEMPLATE, max_examples=240) == "num_examples: 241 is outside 0..240"


@pytest.mark.parametrize("value", ["cos\nsystem\n", b"\x80\x04.", [[0.0] * 4] * 2, 1.0])
def test_fault_76_anything_that_is_no_tensor_is_refused(value: Any) -> None:
    assert "expected a dense tensor" in reason(reply(a=value))


def test_fault_76_no_delta_and_a_delta_that_is_no_mapping_are_refused() -> None:
    assert reason(Reply("ann", 0, None)) == "delta: expected tensors by name, got nothing"
    assert reason(Reply("ann", 0, "pickle")) == "delta: expected tensors by name, got str"  # type: ignore[arg-type]
    assert "names of tensors" in reason(Reply("ann", 0, {3: torch.zeros(1)}))  # type: ignore[dict-item]


def test_fault_76_sparse_and_storageless_tensors_are_refused() -> None:
    assert "dense tensor" in reason(reply(a=torch.zeros(2, 4).to_sparse()))
    assert "dense tensor" in reason(reply(a=torch.zeros(2, 4, device="meta")))


def test_fault_77_a_flood_is_refused_by_its_size_before_anything_else() -> None:
    flood = {f"t{number}": torch.zeros(2**18) for number in range(10)}
    assert reason(reply(more=flood)) == "10485824 bytes of tensors where at most 1048832 are taken"


def test_the_name_of_an_unknown_tensor_is_escaped_and_short() -> None:
    found = reason(reply(more={"\x1b[31m" + "x" * 1000: torch.zeros(1)}))
    assert "\x1b" not in found
    assert len(found) < 200


# Clipping

values = st.lists(st.floats(-1.0, 1.0, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=2, max_size=40)
scales = st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30])


def as_delta(numbers: list[float], scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Weights:
    tensor = torch.tensor(numbers, dtype=torch.float64) * scale
    return {"a": tensor[: len(numbers) // 2].to(dtype), "b": tensor[len(numbers) // 2 :].to(dtype)}


@given(numbers=values, scale=scales, share=st.floats(0.01, 3.0), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=150, deadline=None)
def test_a_clipped_norm_is_never_above_the_limit_and_clipping_again_changes_nothing(
    numbers: list[float], scale: float, share: float, dtype: torch.dtype
) -> None:
    delta = as_delta(numbers, scale, dtype)
    limit = share * delta_norm(delta)
    once = clip_to_norm(delta, limit)
    assert delta_norm(once) <= limit * (1 + 1e-6)
    twice = clip_to_norm(once, limit)
    assert all(torch.equal(once[name], twice[name]) for name in delta)


@given(numbers=values, scale=scales)
@settings(max_examples=50, deadline=None)
def test_clipping_scales_with_the_delta(numbers: list[float], scale: float) -> None:
    limit = 0.3 * delta_norm(as_delta(numbers))
    plain, scaled = clip_to_norm(as_delta(numbers), limit), clip_to_norm(as_delta(numbers, scale), limit * scale)
    for name in plain:
        torch.testing.assert_close(scaled[name].double() / scale, plain[name].double(), rtol=1e-6, atol=1e-12)


def test_a_delta_within_the_limit_is_not_touched() -> None:
    delta = {"a": torch.tensor([3.0, 4.0])}
    assert torch.equal(clip_to_norm(delta, 5.0)["a"], delta["a"])


def test_clipping_shortens_and_keeps_the_direction() -> None:
    torch.testing.assert_close(clip_to_norm({"a": torch.tensor([3.0, 4.0])}, 1.0)["a"], torch.tensor([0.6, 0.8]))


def test_zero_stays_zero_at_any_limit() -> None:
    assert torch.equal(clip_to_norm({"a": torch.zeros(3)}, 0.0)["a"], torch.zeros(3))
    assert torch.equal(clip_to_norm({"a": torch.ones(3)}, 0.0)["a"], torch.zeros(3))
