"""The one training loop: selectors, supervised fine-tuning and DPO all run through ``train``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from fedbiscuit.models.lm import LM
from fedbiscuit.types import FedbiscuitError, LocalTraining, Weights, seed_for

__all__ = [
    "add_gradient",
    "descend",
    "load_optimizer",
    "lr_factor",
    "make_optimizer",
    "optimizer_tensors",
    "shares",
    "stream",
    "train",
]

T = TypeVar("T")


def train(
    lm: LM,
    batches: Callable[[int], Sequence[Sequence[T]]],
    loss: Callable[[Sequence[T]], tuple[Tensor, dict[str, float]]],
    how: LocalTraining,
    key: tuple[object, ...],
    optimizer: torch.optim.Optimizer,
    first_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Train the adapter in the slot; yields the metrics of each optimizer step, as means over its items.

    ``batches(step)`` gives the micro-batches of a step, ``loss`` the mean loss of one and what to report.
    """

    def gradient(step: int) -> dict[str, float]:
        taken = batches(step)
        return add_gradient(lm, list(enumerate(taken)), sum(map(len, taken)), loss, (*key, step))

    return descend(gradient, how, optimizer, first_step)


def descend(
    gradient: Callable[[int], dict[str, float]],
    how: LocalTraining,
    optimizer: torch.optim.Optimizer,
    first_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Optimizer steps; yields the report of each. ``gradient(step)`` leaves the gradient in the parameters and reports."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)  # a client that failed half-way leaves its gradients in the shared slot
    for step in range(first_step, how.steps):
        report = gradient(step)
        for group in optimizer.param_groups:
            group["lr"] = how.lr * lr_factor(step, how)
        norm = torch.nn.utils.clip_grad_norm_(parameters, how.max_grad_norm or float("inf"))
        if not torch.isfinite(norm):
            raise FedbiscuitError(f"step {step}: the gradient is not finite; lower the learning rate (lr {how.lr:g})")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield report


def add_gradient(
    lm: LM,
    batches: Sequence[tuple[int, Sequence[T]]],
    total: int,
    loss: Callable[[Sequence[T]], tuple[Tensor, dict[str, float]]],
    key: tuple[object, ...],
) -> dict[str, float]:
    """Add to the gradient what these micro-batches bring to the mean over a step of ``total`` items; the same of the report.

    Each comes with its number in the step. Dropout is a function of (key, number): a training that is resumed equals one that
    never stopped, and which process computes a micro-batch does not matter.
    """
    report: dict[str, float] = {"loss": 0.0}
    lm.model.train()
    for number, batch in batches:
        torch.manual_seed(seed_for(*key, number))
        value, extra = loss(batch)
        parts = total / len(batch)
        (value / parts).backward()  # type: ignore[no-untyped-call]
        for name, found in {"loss": float(value.detach()), **extra}.items():
            report[name] = report.get(name, 0.0) + found / parts
    lm.model.eval()
    return report


def shares(items: Sequence[T], size: int, devices: int) -> list[list[tuple[int, Sequence[T]]]]:
    """For each device its numbered micro-batches: whole ones, of ``size`` items, or where they are too few an even part."""
    cuts = [*range(0, len(items), size), len(items)]
    if len(cuts) <= devices:
        cuts = [-(-len(items) * k // devices) for k in range(devices + 1)]  # rounded up: the first has some always
    numbered = [(number, items[start:end]) for number, (start, end) in enumerate(pairwise(cuts))]
    return [[(number, batch) for number, batch in numbered[k::devices] if batch] for k in range(devices)]


def lr_factor(step: int, how: LocalTraining) -> float:
    """What the learning rate is multiplied by at a step, counted from 0: a function of the step, so nothing is saved.

    The values of ``transformers.get_scheduler`` of the same name (constant: ``constant_with_warmup``), whose first step of a
    warm-up has a learning rate of 0.
    """
    if step < how.warmup_steps:
        return step / how.warmup_steps
    return SCHEDULES[how.lr_schedule]((step - how.warmup_steps) / max(1, how.steps - how.warmup_steps))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}
"""Share of the steps after the warm-up that are done, from 0 to below 1, to factor."""


def make_optimizer(parameters: Sequence[torch.nn.Parameter], how: LocalTraining) -> torch.optim.Optimizer:
    """A fresh optimizer over the given parameters."""
    if how.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=how.lr, betas=how.betas, weight_decay=how.weight_decay)
    if how.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=how.lr, weight_decay=how.weight_decay)
    return torch.optim.SGD(parameters, lr=how.lr, weight_decay=how.weight_decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Weights:
    """The optimizer's state as flat named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Weights) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def stream(items: Sequence[T], start: int, count: int, key: tuple[object, ...]) -> list[T]:
    """``count`` items from place ``start`` of an endless stream that runs through ``items`` in a new order each epoch.

    A function of its arguments alone: where a client stopped is a number, not a state.
    """
    out: list[T] = []
    while len(out) < count:
        epoch, place = divmod(start + len(out), len(items))
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed_for(*key, epoch))).tolist()
        out += [items[i] for i in order[place : place + count - len(out)]]
    return out
