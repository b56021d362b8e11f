"""The one training loop: selectors, supervised fine-tuning and DPO all run through ``train``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fedbiscuit.models.lm import LM
from fedbiscuit.types import FedbiscuitError, LocalTraining, Weights, seed_for

__all__ = ["load_optimizer", "lr_factor", "make_optimizer", "optimizer_tensors", "stream", "train"]

T = TypeVar("T")


def train(
    lm: LM,
    batches: Callable[[int], Sequence[T]],
    loss: Callable[[T], tuple[Tensor, dict[str, float]]],
    how: LocalTraining,
    key: tuple[object, ...],
    optimizer: torch.optim.Optimizer,
    first_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Train the adapter in the slot; yields the metrics of each optimizer step, as means over its micro-batches.

    ``batches(step)`` gives the micro-batches of a step, ``loss`` the mean loss of one and what to report. Dropout is a
    function of (key, step), so a training that is resumed at ``first_step`` equals one that never stopped.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)  # a client that failed half-way leaves its gradients in the shared slot
    for step in range(first_step, how.steps):
        lm.model.train()
        torch.manual_seed(seed_for(*key, step))
        micro_batches = batches(step)
        report: dict[str, float] = {"loss": 0.0}
        for batch in micro_batches:
            value, extra = loss(batch)
            (value / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
            for name, number in {"loss": float(value.detach()), **extra}.items():
                report[name] = report.get(name, 0.0) + number / len(micro_batches)
        for group in optimizer.param_groups:
            group["lr"] = how.lr * lr_factor(step, how)
        norm = torch.nn.utils.clip_grad_norm_(parameters, how.max_grad_norm or float("inf"))
        if not torch.isfinite(norm):
            raise FedbiscuitError(f"step {step}: the gradient is not finite; lower the learning rate (lr {how.lr:g})")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lm.model.eval()
        yield report


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
