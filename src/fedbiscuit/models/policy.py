"""The policy's own log-probabilities: what supervised fine-tuning and DPO train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedbiscuit.models.lm import LM
from fedbiscuit.models.losses import dpo_loss, sft_loss
from fedbiscuit.models.trunks import Trunks

__all__ = [
    "Pair",
    "encode_pair",
    "implicit_margins",
    "log_ratios",
    "pair_dpo_loss",
    "pair_log_probs",
    "pair_sft_loss",
    "reference_log_probs",
    "response_log_probs",
]

CHUNK = 256
"""Response tokens whose vocabulary-wide logits exist at a time."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference as token ids. probability: that chosen really is better."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    probability: float = 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def encode_pair(lm: LM, prompt: tuple[int, ...], chosen: str, rejected: str) -> Pair:
    """Token ids of a preference between two whole texts that people or others wrote: each is closed by the end token.

    What the policy wrote itself is not encoded again: its own tokens are trained on, cut off or not (mistake 12).
    """
    return Pair(prompt, (*lm.encode(chosen), lm.end), (*lm.encode(rejected), lm.end))


def response_log_probs(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    trunks: Trunks | None = None,
    together: int = 1,
) -> Tensor:
    """(n,) log-probabilities in nats, summed over response tokens; differentiable.

    Prompts and responses that share prefixes share their computation. Vocabulary-wide logits are made for response tokens
    only, ``CHUNK`` at a time, and made again in the backward pass instead of being kept. In ``trunks`` each ``together``
    neighbours are one group.
    """
    sequences = [(*prompt, *response) for prompt, response in zip(prompts, responses, strict=True)]
    forest = lm.pack(sequences)
    groups = [tuple(sequences[i : i + together]) for i in range(0, len(sequences), together)]
    trunk = trunks.of(forest, groups) if trunks else None
    places = np.concatenate([path[len(prompt) - 1 : -1] for path, prompt in zip(forest.paths, prompts, strict=True)])
    owner = torch.from_numpy(np.repeat(np.arange(len(responses)), [len(r) for r in responses])).to(lm.device)
    targets = torch.tensor([token for response in responses for token in response], device=lm.device)
    states = lm.hidden_at(forest, torch.from_numpy(places).to(lm.device), trunk)
    parts = []
    for start in range(0, len(targets), CHUNK):
        span = slice(start, start + CHUNK)
        parts.append(checkpoint(_token_log_probs, lm, states[span], targets[span], use_reentrant=False))
    sums = torch.zeros(len(responses), dtype=torch.float32, device=lm.device)
    return sums.index_add(0, owner, torch.cat(parts))


def _token_log_probs(lm: LM, states: Tensor, targets: Tensor) -> Tensor:
    logits = lm.logits(states)
    return logits.gather(-1, targets[:, None])[:, 0] - torch.logsumexp(logits, -1)


def pair_log_probs(lm: LM, pairs: Sequence[Pair], trunks: Trunks | None = None) -> Tensor:
    """(n, 2) log-probabilities of (chosen, rejected)."""
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    return response_log_probs(lm, prompts, responses, trunks, together=2).view(-1, 2)


def pair_dpo_loss(
    lm: LM, pairs: Sequence[Pair], reference: Tensor, beta: float, soft: bool = False, trunks: Trunks | None = None
) -> tuple[Tensor, dict[str, float]]:
    """DPO on a batch; reference: (n, 2) log-probabilities with the adapter off. Also what to report of it."""
    policy = pair_log_probs(lm, pairs, trunks)
    probability = torch.tensor([pair.probability for pair in pairs], device=policy.device) if soft else None
    loss, margins = dpo_loss(policy, reference.to(policy.device), beta, probability)
    report = {
        "margin": float(margins.detach().mean()),
        "accuracy": float((margins > 0).float().mean()),
        "chosen_logp": float(policy[:, 0].detach().mean()),
        "rejected_logp": float(policy[:, 1].detach().mean()),
    }
    return loss, report


def pair_sft_loss(lm: LM, pairs: Sequence[Pair], trunks: Trunks | None = None) -> Tensor:
    """Supervised fine-tuning on the preferred responses."""
    log_probs = response_log_probs(lm, [p.prompt for p in pairs], [p.chosen for p in pairs], trunks)
    return sft_loss(log_probs, torch.tensor([len(p.chosen) for p in pairs], device=log_probs.device))


@torch.no_grad()
def reference_log_probs(lm: LM, pairs: Sequence[Pair], batch_size: int = 8, trunks: Trunks | None = None) -> Tensor:
    """(n, 2) log-probabilities of (chosen, rejected) with the adapter off, on the CPU."""
    lm.model.eval()
    with lm.adapter_off():
        parts = [pair_log_probs(lm, pairs[i : i + batch_size], trunks).cpu() for i in range(0, len(pairs), batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, 2)


@torch.no_grad()
def implicit_margins(lm: LM, pairs: Sequence[Pair], beta: float, trunks: Trunks | None = None) -> Tensor:
    """(n,) by how much the policy in the slot rewards ``chosen`` more than ``rejected``, as a logit, on the CPU.

    The reward that a policy implies of itself is beta * log(policy / reference) (Rafailov et al. 2023, section 4); the
    reference is the same model without its adapter.
    """
    lm.model.eval()
    policy = pair_log_probs(lm, pairs, trunks)
    with lm.adapter_off():
        rewards = beta * (policy - pair_log_probs(lm, pairs, trunks))
    return (rewards[:, 0] - rewards[:, 1]).cpu()


@torch.no_grad()
def log_ratios(lm: LM, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """(n,) log-probability of each response with the adapter on minus that with it off, in nats."""
    lm.model.eval()
    aligned = response_log_probs(lm, prompts, responses)
    with lm.adapter_off():
        return aligned - response_log_probs(lm, prompts, responses)
