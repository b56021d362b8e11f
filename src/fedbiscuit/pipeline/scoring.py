"""Margins on people's comparisons: of a run's selectors, or of the policy that clients trained in their place; its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedbiscuit.backends.client import policy_pair
from fedbiscuit.evaluation.selectors import ClientMargins, score_by_policy, score_clients
from fedbiscuit.models.policy import implicit_margins, pair_sft_loss
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ClientData, ClientId, Comparison, Grouping, Weights

__all__ = ["held_out", "imitation_loss", "scores_of"]


def held_out(
    clients: Mapping[ClientId, ClientData], part: Literal["validation", "test"], limit: int
) -> dict[ClientId, tuple[Comparison, ...]]:
    """Every client's comparisons of that part, at most ``limit`` (0: all); single good answers are nothing to choose from."""
    held = {
        client: tuple(one for one in getattr(data, part) if one.output_b)[: limit or None]
        for client, data in clients.items()
    }
    return {client: comparisons for client, comparisons in held.items() if comparisons}


def scores_of(
    session: Session,
    adapters: Sequence[Weights],
    comparisons: Mapping[ClientId, Sequence[Comparison]],
    only: Grouping | None = None,
    keep: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[ClientId, ClientMargins]:
    """As ``score_clients``; of a policy the one adapter's, by the reward that it implies."""
    cfg = session.cfg
    if session.trains:
        return score_clients(session.selector, adapters, comparisons, only, cfg.evaluation.batch_size, keep, progress)
    lm = session.lm
    lm.put_adapter(adapters[0])

    def margins(batch: Sequence[Comparison]) -> Tensor:
        pairs = [policy_pair(one.prompt, one.output_a, one.output_b, session.desk) for one in batch]
        return implicit_margins(lm, pairs, cfg.selectors.local.dpo_beta, session.selector.trunks)

    return score_by_policy(margins, comparisons, cfg.evaluation.batch_size, progress)


@torch.no_grad()
def imitation_loss(session: Session, adapter: Weights, comparisons: Sequence[Comparison]) -> float:
    """Mean negative log-likelihood a response token of the good answers, in nats: what objective ``sft`` lowers."""
    lm, size = session.lm, session.cfg.evaluation.batch_size
    lm.put_adapter(adapter)
    lm.model.eval()
    pairs = [policy_pair(one.prompt, one.chosen, one.rejected, session.desk) for one in comparisons]
    nats = tokens = 0.0
    for batch in (pairs[start : start + size] for start in range(0, len(pairs), size)):
        written = sum(len(pair.chosen) for pair in batch)
        nats, tokens = nats + float(pair_sft_loss(lm, batch, session.selector.trunks)) * written, tokens + written
    return nats / tokens
