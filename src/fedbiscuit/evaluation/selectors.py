"""Selectors put to held-out comparisons of every client: by the selector of its own group, and by the vote of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedbiscuit.data.encoding import EncodedComparison
from fedbiscuit.evaluation.metrics import Judged
from fedbiscuit.models.losses import margin_nats
from fedbiscuit.models.selector import Selector, choice_probability, letter_margins, vote
from fedbiscuit.types import ClientId, Comparison, Grouping, Weights

__all__ = ["ClientMargins", "judge_by_group", "judge_by_vote", "score_clients"]


@dataclass(frozen=True, slots=True)
class ClientMargins:
    """(U, n, 2) letter margins of U adapters on one client's n comparisons in both orders, and its (n,) choices."""

    margins: Tensor
    choice: np.ndarray


def score_clients(
    selector: Selector,
    adapters: Sequence[Weights],
    comparisons: Mapping[ClientId, Sequence[Comparison]],
    only: Grouping | None = None,
    batch_size: int = 16,
    keep: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[ClientId, ClientMargins]:
    """Margins of all adapters on every client's comparisons; with ``only``, of the adapter of its own group alone.

    Clients without comparisons are not in the result. The same comparison at several clients is computed once.
    """
    encoded = {client: selector.encode(held)[0] for client, held in sorted(comparisons.items())}
    encoded = {client: held for client, held in encoded.items() if held}
    readers = {client: tuple(range(len(adapters))) if only is None else (only[client],) for client in encoded}
    wanted: dict[tuple[int, ...], dict[tuple[int, ...], EncodedComparison]] = {}
    for client, held in encoded.items():
        wanted.setdefault(readers[client], {}).update({item.ab: item for item in held})
    found: dict[tuple[int, ...], dict[tuple[int, ...], Tensor]] = {}
    read = 0
    for group, items in sorted(wanted.items()):
        keys = sorted(items)  # neighbours share their prompt
        chosen = [adapters[u] for u in group]
        margins = letter_margins(selector, chosen, [items[key] for key in keys], batch_size, keep)
        found[group] = dict(zip(keys, margins.transpose(0, 1), strict=True))
        read += len(keys)
        progress(read)
    return {
        client: ClientMargins(
            torch.stack([found[readers[client]][item.ab] for item in held], dim=1),
            np.array([item.choice for item in held]),
        )
        for client, held in encoded.items()
    }


def judge_by_group(scores: Mapping[ClientId, ClientMargins], grouping: Grouping) -> dict[ClientId, Judged]:
    """Each client by the selector of its own group; where only that one was scored, by that."""
    return {
        client: _judged(one.margins[grouping[client] if len(one.margins) > 1 else 0], one.choice)
        for client, one in scores.items()
    }


def judge_by_vote(
    scores: Mapping[ClientId, ClientMargins], rule: str, temperature: float = 1.0
) -> dict[ClientId, Judged]:
    """Each client by the vote of all selectors. Loss and flips are those of the mean margin."""
    judged = {}
    for client, one in scores.items():
        base = _judged(one.margins.mean(dim=0), one.choice)
        probability = vote(choice_probability(one.margins, temperature), rule).probability.numpy()
        judged[client] = Judged(probability, base.choice, base.loss, base.flipped)
    return judged


def _judged(margins: Tensor, choice: np.ndarray) -> Judged:
    """(n, 2) margins of one selector against the choices; loss in nats of the choice."""
    loss = margin_nats(margins, torch.from_numpy(choice)).numpy()
    flipped = (margins[:, 0] > 0) == (margins[:, 1] > 0)
    return Judged(choice_probability(margins).numpy(), choice, loss, flipped.double().numpy())
