"""The three losses of this system, on tensors only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["choice_loss", "dpo_loss", "margin_nats", "sft_loss"]


def choice_loss(logits: Tensor, choices: Tensor) -> Tensor:
    """Two-way cross-entropy in nats, mean over comparisons.

    logits: (n, 2) of the two letters at the last position. choices: (n,) int64, 0 where A is preferred.
    """
    return F.cross_entropy(logits, choices)


def margin_nats(margins: Tensor, choices: Tensor) -> Tensor:
    """(n,) loss in nats of (n, 2) letter margins, shown as (A, B) and as (B, A): -log p of the choice.

    p is the order-invariant probability by which a selector chooses, so that a liking for a letter, which cancels there,
    is no noise here. choices: (n,) 0 where A is preferred.
    """
    margin = (margins[:, 0].double() - margins[:, 1].double()) / 2
    return F.softplus((2.0 * choices.double() - 1.0) * margin)


def dpo_loss(
    policy: Tensor, reference: Tensor, beta: float, probability: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7): the mean loss in nats, and the (n,) margins.

    policy, reference: (n, 2) log-probabilities of (chosen, rejected), summed over response tokens. margin: beta times the
    policy's log-ratio minus the reference's. probability: (n,) that chosen really is better; with it the loss is weighted in
    both directions (conservative DPO, Mitchell 2023).
    """
    margins = beta * ((policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1]))
    losses = -F.logsigmoid(margins)
    if probability is not None:
        losses = probability * losses - (1 - probability) * F.logsigmoid(-margins)
    return losses.mean(), margins


def sft_loss(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood a response token, in nats. log_probs: (n,) sums. lengths: (n,) response tokens."""
    return -log_probs.sum() / torch.clamp(lengths.sum(), min=1)
