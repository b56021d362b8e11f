"""DPO in parts: whoever computes which part, the gradients add up to those of one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import product

import pytest
import torch

from fedbiscuit.backends.devices import together
from fedbiscuit.config import AlignmentSettings
from fedbiscuit.models.policy import Pair
from fedbiscuit.models.training import descend, make_optimizer, shares
from fedbiscuit.pipeline import dpo
from fedbiscuit.pipeline.dpo import Part, Whole
from fedbiscuit.types import EnvironmentFault, FedbiscuitError

PAIRS = [
    Pair((1, 2, 3, k), tuple(range(9, 12 + k)), (6, 5 * k + 1, 258), probability)
    for k, probability in enumerate((0.9, 0.6, 0.75, 1.0, 0.55))
]


class Beside:
    """A helper, as far as ``Whole`` looks, in this process: its messages are the real ones."""

    def __init__(self, part: Part):
        self.part = part
        self.asked = 0

    def ask(self, message: bytes) -> bytes:
        self.asked += 1
        return self.part.answer(message)


def aligned(load_tiny, devices: int, dropout: float = 0.0, **settings: object):
    """Weights, reports and reference after three steps, and the helpers."""
    how = AlignmentSettings.model_validate({"steps": 3, "lr": 0.5, "optimizer": "sgd", "beta": 1.0, **settings})
    parts = [Part(load_tiny(lora={"dropout": dropout}), how, 7, PAIRS) for _ in range(devices)]
    helpers = [Beside(part) for part in parts[1:]]
    whole, lm = Whole(parts[0], helpers), parts[0].lm
    lm.put_adapter(lm.new_adapter(0))
    reference = whole.reference()
    optimizer = make_optimizer(list(lm.trainable().values()), how.as_local())
    reports = list(descend(lambda step: whole.gradient(step, reference), how.as_local(), optimizer))
    return lm.adapter(), reports, reference, helpers


@pytest.fixture
def in_turn(monkeypatch):
    """One part after another: two that draw dropout masks in one process would draw from one generator."""
    monkeypatch.setattr(dpo, "together", lambda work, helpers: [work(k) for k in range(1 + len(helpers))])


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        (2, {"batch_size": 4}),
        (2, {"batch_size": 3}),  # two pairs and one
        (3, {"batch_size": 1, "grad_accum": 2}),  # one process has none
        (2, {"batch_size": 2, "grad_accum": 3}),  # two micro-batches and one
        (3, {"batch_size": 4, "grad_accum": 2, "optimizer": "adamw", "lr": 1e-3}),  # through the end of an epoch
        (2, {"batch_size": 3, "max_grad_norm": 0.01}),
        (2, {"batch_size": 3, "max_grad_norm": 0.0, "soft_labels": True}),
        (2, {"batch_size": 2, "grad_accum": 2, "dropout": 0.3}),
        (3, {"batch_size": 1, "grad_accum": 5, "dropout": 0.3, "optimizer": "rmsprop", "lr": 1e-4}),
    ],
)
def test_the_policy_and_what_is_reported_do_not_depend_on_the_number_of_devices(load_tiny, in_turn, devices, settings):
    one, reports, reference, _ = aligned(load_tiny, 1, **settings)
    many, theirs, other, helpers = aligned(load_tiny, devices, **settings)
    torch.testing.assert_close(other, reference, rtol=0, atol=1e-5)
    for name, weights in one.items():
        torch.testing.assert_close(many[name], weights, rtol=0, atol=1e-5)
    assert max(float(weights.abs().max()) for name, weights in many.items() if "lora_B" in name) > 1e-4
    for first, second in zip(reports, theirs, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"accuracy"}:  # at first all margins are 0, but for the last bit
            assert second[key] == pytest.approx(first[key], abs=1e-5), key
    assert [helper.asked for helper in helpers] == [1 + 3] * (devices - 1)


@pytest.mark.parametrize("devices", range(1, 7))
def test_every_item_has_one_place_and_whole_micro_batches_stay_whole(devices):
    for size, count in product(range(1, 5), range(1, 13)):
        split = shares(list(range(count)), size, devices)
        assert len(split) == devices
        numbered = sorted((number, batch) for share in split for number, batch in share)
        assert [i for _, batch in numbered for i in batch] == list(range(count))
        assert all(0 < len(batch) <= size for _, batch in numbered)
        whole = [(k, list(range(i, min(i + size, count)))) for k, i in enumerate(range(0, count, size))]
        sizes = [sum(len(batch) for _, batch in share) for share in split]
        assert numbered == whole if len(whole) >= devices else max(sizes) - min(sizes) <= 1
        assert sizes[0] > 0


def test_a_gradient_that_is_not_finite_there_stops_the_training_here(load_tiny, in_turn, monkeypatch):
    answer = Part.gradient

    def broken(self, step, batches, reference):
        return answer(self, step, batches, reference * float("nan") if step == 1 else reference)

    monkeypatch.setattr(Part, "gradient", broken)
    with pytest.raises(FedbiscuitError, match="step 1: the gradient is not finite"):
        aligned(load_tiny, 2, batch_size=2)


# Waiting for each other


class Sleeper:
    """A helper that answers when it is ended."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.stop = self.ended.set

    def work(self) -> None:
        assert self.ended.wait(60)
        raise EnvironmentFault("ended")


def test_ctrl_c_does_not_wait_for_other_devices():
    helpers = [Sleeper(), Sleeper()]
    started = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):  # while this process has nothing more to do but wait
        together(lambda place: helpers[place - 1].work() if place else None, helpers)
    assert time.monotonic() - started < 30
    assert all(helper.ended.is_set() for helper in helpers)


def test_the_first_fault_is_raised_and_ends_the_other_devices():
    helpers = [Sleeper(), Sleeper()]

    def work(place):
        if place == 2:
            raise EnvironmentFault("the process for cuda:2 has ended")
        return helpers[0].work() if place else None

    with pytest.raises(EnvironmentFault, match="cuda:2"):
        together(work, helpers)
    assert all(helper.ended.is_set() for helper in helpers)


def test_what_each_gives_comes_back_in_order():
    assert together(lambda place: 10 * place, [Sleeper(), Sleeper()]) == [0, 10, 20]
