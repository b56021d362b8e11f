"""Selectors put to held-out comparisons of every client: by the selector of its own group, and by the vote of all."""

from __future__ import annotations

import math
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

__all__ = ["ClientMargins", "fit_temperature", "judge_by_group", "judge_by_vote", "score_by_policy", "score_clients"]

Sides = tuple[tuple[int, ...], tuple[int, ...]]


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
    wanted: dict[tuple[int, ...], dict[Sides, EncodedComparison]] = {}
    for client, held in encoded.items():
        wanted.setdefault(readers[client], {}).update({_sides(item): item for item in held})
    found: dict[tuple[int, ...], dict[Sides, Tensor]] = {}
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
            torch.stack([found[readers[client]][_sides(item)] for item in held], dim=1),
            np.array([item.choice for item in held]),
        )
        for client, held in encoded.items()
    }


def _sides(item: EncodedComparison) -> Sides:
    """What makes two encoded comparisons the same: both sides, since a reward model's first one has answer A alone."""
    return item.ab, item.ba


def score_by_policy(
    margins: Callable[[Sequence[Comparison]], Tensor],
    comparisons: Mapping[ClientId, Sequence[Comparison]],
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[ClientId, ClientMargins]:
    """The same of a policy that clients trained themselves: ``margins`` gives (n,) logits that A is better.

    It reads one answer at a time, so both orders agree by construction.
    """
    found, read = {}, 0
    for client, held in sorted(comparisons.items()):
        parts = []
        for start in range(0, len(held), batch_size):
            parts.append(margins(held[start : start + batch_size]))
            read += len(parts[-1])
            progress(read)
        if held:
            ab = torch.cat(parts)
            found[client] = ClientMargins(torch.stack([ab, -ab], dim=-1)[None], np.array([c.choice for c in held]))
    return found


def judge_by_group(
    scores: Mapping[ClientId, ClientMargins], grouping: Grouping, temperature: float = 1.0
) -> dict[ClientId, Judged]:
    """Each client by the selector of its own group; where only that one was scored, by that."""
    return {client: _judged(_own(one, grouping[client]), one.choice, temperature) for client, one in scores.items()}


def judge_by_vote(
    scores: Mapping[ClientId, ClientMargins], rule: str, temperature: float = 1.0
) -> dict[ClientId, Judged]:
    """Each client by the vote of all selectors. Loss and flips are those of the mean margin."""
    judged = {}
    for client, one in scores.items():
        base = _judged(one.margins.mean(dim=0), one.choice, temperature)
        probability = vote(choice_probability(one.margins, temperature), rule).probability.numpy()
        judged[client] = Judged(probability, base.choice, base.loss, base.in_order)
    return judged


def fit_temperature(scores: Mapping[ClientId, ClientMargins], grouping: Grouping) -> float | None:
    """The temperature, 0.05 to 20, at which the own group's selectors have the least loss; None without comparisons.

    Temperature scaling (Guo et al. 2017, section 4.2). The loss is convex in 1 / temperature, so a search by thirds finds it.
    """
    if not scores:
        return None
    margins = torch.cat([_own(one, grouping[client]) for client, one in sorted(scores.items())]).double()
    choice = torch.cat([torch.from_numpy(one.choice) for _, one in sorted(scores.items())])

    def loss(log_temperature: float) -> float:
        return float(margin_nats(margins / math.exp(log_temperature), choice).mean())

    low, high = -math.log(20.0), math.log(20.0)
    for _ in range(60):
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    return math.exp((low + high) / 2)


def _own(one: ClientMargins, group: int) -> Tensor:
    """(n, 2) margins of the selector of a client's group."""
    return one.margins[group if len(one.margins) > 1 else 0]


def _judged(margins: Tensor, choice: np.ndarray, temperature: float) -> Judged:
    """(n, 2) margins of one selector against the choices; loss in nats of the choice."""
    loss = margin_nats(margins / temperature, torch.from_numpy(choice)).numpy()
    says_a = np.stack([(margins[:, 0] > 0).numpy(), (margins[:, 1] <= 0).numpy()], axis=1)
    in_order = (says_a == (choice == 0)[:, None]).astype(float)
    return Judged(choice_probability(margins, temperature).numpy(), choice, loss, in_order)
