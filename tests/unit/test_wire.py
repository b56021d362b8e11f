"""Messages: what goes in comes out bit for bit, and nothing else is let in."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedbiscuit.backends.wire import pack_reply, pack_task, unpack_reply, unpack_task
from fedbiscuit.types import FederationError, LocalTraining, Reply, Task

DELTA = {
    "a.lora_A.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "empty": torch.zeros(0),
}
TASK = Task(
    "train", "änn/..", 7, {0: DELTA, 2: {"x": torch.ones(1)}}, (0.5, -1.0), LocalTraining(lr=3e-4, optimizer="sgd"), 12
)


def same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8))


def test_a_task_comes_out_as_it_went_in():
    found = unpack_task(pack_task(TASK))
    assert found.adapters.keys() == {0, 2}
    for u, weights in TASK.adapters.items():
        same(weights, found.adapters[u])
    for key in ("kind", "client", "round", "prices", "local", "consumed", "share_losses"):
        assert getattr(found, key) == getattr(TASK, key)


@pytest.mark.parametrize(
    "reply",
    [
        Reply("ann", 1, DELTA, 40),
        Reply("ann", seat=3),
        Reply("ann", metrics={"losses": [0.5, 1.25]}),
        Reply("ann", ok=False, error="out of memory"),
        Reply("ann", 0, {}, 1),
    ],
)
def test_a_reply_comes_out_as_it_went_in(reply):
    found = unpack_reply(pack_reply(reply))
    for key in ("client", "adapter", "num_examples", "seat", "metrics", "ok", "error"):
        assert getattr(found, key) == getattr(reply, key)
    assert (found.delta is None) == (reply.delta is None)
    same(found.delta or {}, reply.delta or {})


def test_a_view_or_a_tensor_that_needs_gradients_is_sent_as_its_values():
    wide = torch.arange(12.0).reshape(3, 4).requires_grad_()
    found = unpack_reply(pack_reply(Reply("ann", 0, {"x": wide[:, 1:3], "y": wide[:, 1:3]}, 1)))
    assert torch.equal(found.delta["x"], wide.detach()[:, 1:3])
    assert not found.delta["x"].requires_grad


def message(**changes):
    data = pack_task(TASK)
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedbiscuit"]) | changes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "eval"}, "kind: 'eval' is not permitted"),
        ({"client": ""}, "client: '' is not permitted"),
        ({"client": 3}, "client: 3"),
        ({"round": -1}, "round: -1"),
        ({"round": True}, "round: True"),
        ({"prices": [1, None]}, "prices"),
        ({"consumed": 1.5}, "consumed: 1.5"),
        ({"share_losses": 1}, "share_losses: 1"),
        ({"local": {"steps": 3}}, "local: not the settings"),
        ({"more": 1}, "its header is not one of ours"),
        ({"adapters": ["0"]}, "its adapters are not those that it names"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_ours_is_refused(changes, told):
    tensors = {f"{u}/{name}": t for u, weights in TASK.adapters.items() for name, t in weights.items()}
    unpack_task(save(tensors, {"fedbiscuit": json.dumps(message())}))
    with pytest.raises(FederationError, match=told):
        unpack_task(save(tensors, {"fedbiscuit": json.dumps(message(**changes))}))


def test_settings_of_another_kind_are_refused():
    for key, value in (
        ("steps", "3"),
        ("lr", None),
        ("lr", True),
        ("betas", [0.9]),
        ("optimizer", "adam"),
        ("objective", 3),
        ("betas", [0.9, "x"]),
        ("steps", 2.0),
    ):
        bad = message()
        bad["local"] = {**bad["local"], key: value}
        with pytest.raises(FederationError, match=rf"local\.{key}"):
            unpack_task(save({"0/a": torch.ones(1), "2/x": torch.ones(1)}, {"fedbiscuit": json.dumps(bad)}))


@pytest.mark.parametrize(
    "tensors", [{"x": torch.ones(1)}, {"/x": torch.ones(1)}, {"-1/x": torch.ones(1)}, {"0/": torch.ones(1)}]
)
def test_a_tensor_of_no_adapter_is_refused(tensors):
    with pytest.raises(FederationError, match="belongs to no adapter"):
        unpack_task(save(tensors, {"fedbiscuit": json.dumps(message())}))


def test_dtypes_that_are_never_sent_are_refused():
    with pytest.raises(FederationError, match="float64, which is not sent"):
        unpack_reply(pack_reply(Reply("ann", 0, {"x": torch.ones(1, dtype=torch.float64)}, 1)))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 10**6), flip=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_broken_bytes_are_refused_and_nothing_else_happens(data, cut, flip, bits):
    whole = bytearray(pack_task(TASK))
    torn = bytes(whole[: cut % len(whole)])
    whole[flip % len(whole)] ^= bits
    for broken in (data, torn):
        with pytest.raises(FederationError):
            unpack_task(broken)
        with pytest.raises(FederationError):
            unpack_reply(broken)
    with contextlib.suppress(FederationError):  # a flipped bit in a tensor's values is for checksums, not for us
        unpack_task(bytes(whole))
