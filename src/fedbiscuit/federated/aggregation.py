"""The deltas of one adapter become one delta, and one delta becomes a step of the server (docs/algorithm.md section 5).

Deltas come in the order of the clients' names: then no result depends on who answered first, to the last bit. The mean is
a running sum, so many clients need no more memory than one; the rules that look at all deltas together lay them out as the
rows of one matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median as median_of

import torch
from torch import Tensor

from fedbiscuit.config import FederatedSettings
from fedbiscuit.federated.privacy import clip_factor, delta_norm
from fedbiscuit.types import ClientId, FederationError, Reply, Weights

__all__ = [
    "AGGREGATORS",
    "CLIP_WINDOW",
    "SERVER_OPTIMIZERS",
    "Pool",
    "Rule",
    "clip_limit",
    "server_step",
    "shares",
]

CLIP_WINDOW = 20
"""Rounds whose median norms cap the next one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What an aggregator may need besides the deltas: norms are Euclidean, over all tensors of a delta."""

    clip_norm: float = float("inf")
    trim: float = 0.2
    byzantine: int = 1


Aggregator = Callable[[Tensor, Tensor, Rule], Tensor]
"""(clients, values) deltas, (clients,) weights that sum to 1, and the rule's settings -> (values,) delta."""


class Pool:
    """The replies for one adapter, on their way to one delta; to be added in the order of the clients' names."""

    def __init__(self, cfg: FederatedSettings) -> None:
        self._cfg = cfg
        self.norms: dict[ClientId, float] = {}
        self._replies: list[Reply] = []
        self._sum = _RunningMean(cfg.weights)

    def __len__(self) -> int:
        return len(self.norms)

    def add(self, reply: Reply) -> None:
        """Take one more reply, whose delta was checked."""
        delta = reply.delta or {}
        self.norms[reply.client] = delta_norm(delta)
        if self._cfg.aggregator == "mean":
            self._sum.add(delta, reply.num_examples)
        else:
            self._replies.append(reply)

    def delta(self, num_clients: int, clip_norm: float = float("inf")) -> Weights:
        """One delta from all.

        ``num_clients`` counts all clients, also those not in this round: ``scale: population`` divides by it, so absent
        clients count as no change. In the warm-up only those who are there count.
        """
        cfg = self._cfg
        scale = len(self) / num_clients if cfg.scale == "population" else 1.0
        if cfg.aggregator == "mean":
            return self._sum.mean(scale)
        deltas = [reply.delta or {} for reply in self._replies]
        stack = _stacked(deltas)
        weights = stack.new_tensor(shares([reply.num_examples for reply in self._replies], cfg.weights))
        total = AGGREGATORS[cfg.aggregator](stack, weights, Rule(clip_norm, cfg.trim, cfg.byzantine))
        return _unstacked(total * scale, deltas[0])


class _RunningMean:
    """The weighted mean (FedAvg), summed up in float64 as deltas come.

    Clients that all claim no examples weigh the same; next to one that has some they weigh nothing.
    """

    def __init__(self, weights: str) -> None:
        self._equal = weights == "equal"
        self._like: Weights = {}
        self._sums: dict[str, Tensor] = {}
        self._total = 0
        self._nobody_has_examples = True

    def add(self, delta: Weights, num_examples: int) -> None:
        weight = 1 if self._equal else num_examples
        if self._nobody_has_examples and (weight > 0 or not self._sums):
            self._like, self._total = delta, 0
            self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in delta.items()}
            self._nobody_has_examples = weight == 0
        weight = 1 if self._nobody_has_examples else weight
        self._total += weight
        for name, total in self._sums.items():
            total.add_(delta[name].detach().to(total), alpha=weight)

    def mean(self, scale: float) -> Weights:
        """The mean so far times ``scale``, in the dtypes of the deltas."""
        factor = scale / self._total
        return {name: (total * factor).to(self._like[name].dtype) for name, total in self._sums.items()}


def shares(num_examples: Sequence[int], weights: str) -> list[float]:
    """What each client weighs, summing to 1; clients that all claim no examples weigh the same."""
    total = sum(num_examples)
    if weights == "equal" or total == 0:
        return [1.0 / len(num_examples)] * len(num_examples)
    return [count / total for count in num_examples]


def clip_limit(norms: Iterable[float], recent: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """The norm to clip a round's deltas to, and the medians to remember.

    The limit is the median norm of the round, and at most the median of the last rounds' medians: so a majority of bad
    replies in one round cannot raise it at once.
    """
    median_norm = median_of(norms)
    limit = min(median_norm, median_of(recent)) if recent else median_norm
    return limit, (*recent, median_norm)[-CLIP_WINDOW:]


def _stacked(deltas: Sequence[Weights]) -> Tensor:
    """(clients, values): one row a delta, tensors in the order of their names, in float32 at least."""
    names = sorted(deltas[0])
    first = [deltas[0][name] for name in names]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in first), torch.float32)
    stack = first[0].new_empty(len(deltas), sum(tensor.numel() for tensor in first), dtype=dtype)
    for row, delta in zip(stack, deltas, strict=True):
        torch.cat([delta[name].detach().reshape(-1).to(row.device) for name in names], out=row)
    return stack


def _unstacked(row: Tensor, like: Weights) -> Weights:
    """The inverse for one row: tensors with the names, shapes and dtypes of ``like``."""
    names = sorted(like)
    parts = torch.split(row, [like[name].numel() for name in names])
    return {name: part.view_as(like[name]).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}


# Aggregators


def norm_clipped_mean(stack: Tensor, weights: Tensor, rule: Rule) -> Tensor:
    """The weighted mean of deltas shortened to ``rule.clip_norm``: nobody pulls farther than the others."""
    norms = [float(torch.linalg.vector_norm(row, dtype=torch.float64)) for row in stack]
    factors = [clip_factor(norm, rule.clip_norm, stack.dtype) for norm in norms]
    return torch.mv(stack.T, weights * weights.new_tensor(factors))


def median(stack: Tensor, weights: Tensor, rule: Rule) -> Tensor:
    """The median of each value; weights do not count."""
    ordered = stack.sort(dim=0).values
    return (ordered[(len(stack) - 1) // 2] + ordered[len(stack) // 2]) / 2


def trimmed_mean(stack: Tensor, weights: Tensor, rule: Rule) -> Tensor:
    """The mean of each value without the ``trim`` share at both ends (Yin et al., 2018); weights do not count."""
    num_cut = int(rule.trim * len(stack) + 1e-9)
    if num_cut == 0:
        raise FederationError(
            f"trimmed_mean: trim {rule.trim} of {len(stack)} replies cuts none; use larger groups (at least"
            f" {_least_to_trim(rule.trim)} replies an adapter), a larger trim, or aggregator norm_clipped_mean"
        )
    return stack.sort(dim=0).values[num_cut : len(stack) - num_cut].mean(dim=0)


def _least_to_trim(trim: float) -> int:
    return next(count for count in range(1, 10**9) if int(trim * count + 1e-9))


def krum(stack: Tensor, weights: Tensor, rule: Rule) -> Tensor:
    """The one delta nearest to its n - f - 2 nearest others (Blanchard et al., 2017); of equals the first by name."""
    num_near = len(stack) - rule.byzantine - 2
    if len(stack) < 2 * rule.byzantine + 3:
        raise FederationError(
            f"krum: {len(stack)} replies for one adapter cannot outvote {rule.byzantine} bad ones; it takes"
            f" {2 * rule.byzantine + 3}: use larger groups, a smaller `byzantine`, or aggregator norm_clipped_mean"
        )
    distances = torch.stack([torch.linalg.vector_norm(stack - row, dim=1, dtype=torch.float64) for row in stack])
    nearest = distances.square().sort(dim=1).values[:, 1 : num_near + 1]
    return stack[int(nearest.sum(dim=1).argmin())]


AGGREGATORS: dict[str, Aggregator] = {  # and "mean", which needs no matrix
    "norm_clipped_mean": norm_clipped_mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
}


# Server optimizers: the aggregated delta is a gradient that points downhill (Reddi et al., 2021)


def server_step(
    u: int, weights: Weights, delta: Weights, moments: Mapping[str, Tensor], cfg: FederatedSettings
) -> tuple[Weights, dict[str, Tensor]]:
    """Adapter ``u`` after one step, as new tensors, and the optimizer's moments, keyed ``"u.kind.name"``.

    Tensors without a delta stay as they are; the moments of other adapters pass through.
    """
    moved, kept = dict(weights), dict(moments)
    for name, change in delta.items():
        before = {kind: moments[f"{u}.{kind}.{name}"] for kind in MOMENTS if f"{u}.{kind}.{name}" in moments}
        step, after = SERVER_OPTIMIZERS[cfg.server_optimizer](change.to(weights[name].device), before, cfg)
        moved[name] = (weights[name].detach() + step).to(weights[name].dtype)
        kept.update({f"{u}.{kind}.{name}": moment for kind, moment in after.items()})
    return moved, kept


ServerOptimizer = Callable[[Tensor, Mapping[str, Tensor], FederatedSettings], tuple[Tensor, dict[str, Tensor]]]
"""(delta, moments so far) -> (step to add, moments)."""

MOMENTS = ("momentum", "variance")


def sgd(delta: Tensor, moments: Mapping[str, Tensor], cfg: FederatedSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The delta itself, times ``server_lr``; with 1 this is plain averaging."""
    return cfg.server_lr * delta, {}


def momentum(delta: Tensor, moments: Mapping[str, Tensor], cfg: FederatedSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """FedAvgM (Hsu et al., 2019): m = momentum * m + delta; step lr * m."""
    m = cfg.server_momentum * moments.get("momentum", torch.zeros_like(delta)) + delta
    return cfg.server_lr * m, {"momentum": m}


def adam(delta: Tensor, moments: Mapping[str, Tensor], cfg: FederatedSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """FedAdam (Reddi et al., 2021, algorithm 2): step lr * m / (sqrt(v) + eps).

    As there, moments are not corrected for their start, and v starts at eps squared.
    """
    beta1, beta2 = cfg.server_betas
    m = beta1 * moments.get("momentum", torch.zeros_like(delta)) + (1 - beta1) * delta
    v = beta2 * moments.get("variance", torch.full_like(delta, cfg.server_eps**2)) + (1 - beta2) * delta.square()
    return cfg.server_lr * m / (v.sqrt() + cfg.server_eps), {"momentum": m, "variance": v}


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {"sgd": sgd, "momentum": momentum, "adam": adam}
