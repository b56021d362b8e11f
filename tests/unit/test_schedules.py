"""The learning rate over the steps: as transformers has it, and a function of the step alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from fedbiscuit.config import parse_config
from fedbiscuit.models.training import load_optimizer, lr_factor, make_optimizer, optimizer_tensors, train
from fedbiscuit.types import ConfigError, LocalTraining


@pytest.mark.parametrize("warmup", [0, 1, 3, 9])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_every_step_has_the_learning_rate_of_transformers(name, warmup):
    how = LocalTraining(steps=10, lr=0.5, lr_schedule=name, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=how.lr)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=10,
    )
    for step in range(how.steps):
        assert how.lr * lr_factor(step, how) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


class OneNumber:
    """An LM of one number, as far as ``train`` looks."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)


def trained(
    how: LocalTraining, first_step: int = 0, lm: OneNumber | None = None, tensors=None, until: int | None = None
):
    lm = lm or OneNumber()
    optimizer = make_optimizer([lm.model.weight], how)
    if tensors:
        load_optimizer(optimizer, tensors)
    seen = [lm.model.weight.item()]
    loss = lambda batch: (lm.model.weight.sum(), {})  # noqa: E731 the gradient is 1 everywhere
    for step, _ in enumerate(train(lm, lambda step: [[0]], loss, how, (0,), optimizer, first_step), first_step + 1):
        seen.append(lm.model.weight.item())
        if step == until:
            break
    return lm, optimizer, seen


def test_sgd_with_a_gradient_of_one_moves_by_the_learning_rate_of_each_step():
    how = LocalTraining(steps=5, lr=1.0, optimizer="sgd", max_grad_norm=0.0, lr_schedule="linear", warmup_steps=2)
    _, _, seen = trained(how)
    moves = [before - after for before, after in pairwise(seen)]
    assert moves == pytest.approx([0, 1 / 2, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_training_that_is_resumed_at_any_step_equals_one_that_never_stopped(name, stop):
    how = LocalTraining(steps=6, lr=0.1, optimizer="adamw", lr_schedule=name, warmup_steps=2)
    whole = trained(how)[2]
    lm, optimizer, before = trained(how, until=stop)
    after = trained(how, stop, lm, optimizer_tensors(optimizer))[2]
    assert before + after[1:] == whole


def test_the_settings_reach_the_training_and_a_warm_up_of_all_steps_is_refused():
    how = parse_config("alignment: {steps: 9, lr_schedule: cosine, warmup_steps: 8}").alignment.as_local()
    assert (how.lr_schedule, how.warmup_steps, how.objective) == ("cosine", 8, "dpo")
    with pytest.raises(ConfigError, match=r"alignment\.warmup_steps: 9 of 9 steps are all warm-up"):
        parse_config("alignment: {steps: 9, warmup_steps: 9}")
