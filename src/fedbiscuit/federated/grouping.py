"""Who trains with whom: balanced groups of clients of like taste (docs/algorithm.md section 4; the paper, section 4.2).

``prices`` needs no loss from anybody. The rules in the dict at the foot see every client's losses, and belong in
research in one process.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedbiscuit.config import FederatedSettings
from fedbiscuit.federated.exchange import Exchange, Lent
from fedbiscuit.types import ClientId, ConfigError, FederationError, Grouping, Reply, ServerState, Task, rng_for

__all__ = [
    "LOSS_RULES",
    "Losses",
    "adjusted_rand_index",
    "choose_seat",
    "greedy",
    "group_sizes",
    "nearest",
    "optimal",
    "prices",
    "seat_clients",
    "seat_newcomers",
]

Losses = Mapping[ClientId, Sequence[float]]
"""Client to its mean validation loss under each of the U adapters, in nats."""

FIRST_STEP = 0.05
"""Nats by which the most crowded adapter's price rises first; grows and shrinks from there."""
GROW, SHRINK = 1.2, 0.5
GOOD_ENOUGH = 0.002
"""Nats a client by which balanced groups may at most be worse than the best ones to stop early."""
TOLERANCE = 0.1
"""Share by which balanced groups may differ from equal ones."""
TIE_BREAK = 0.02
"""Share of a client's own spread of losses that its name, not its taste, decides."""


# The regrouping of one round


def seat_clients(
    exchange: Exchange, asked: Sequence[ClientId], state: ServerState, cfg: FederatedSettings, seed: int
) -> Grouping:
    """The grouping after the clients ``asked`` have taken new seats; all others keep theirs.

    A client that fails, or has nothing to validate on, keeps its seat too, and the exchange remembers why.
    """
    if cfg.grouping == "fixed":
        seats = _given_groups(cfg)
    elif cfg.grouping == "prices":
        seats = _seats_by_prices(exchange, asked, state, cfg)
    else:
        losses = _ask_losses(exchange, asked, state, cfg)
        order = sorted(losses)
        rng_for(seed, state.round, "grouping order").shuffle(order)
        seats = LOSS_RULES[cfg.grouping](losses, order) if losses else {}
    return {**state.grouping, **seats}


def seat_newcomers(grouping: Grouping, clients: Sequence[ClientId], num_adapters: int) -> Grouping:
    """The same grouping with every client in it: who has no seat gets one in the smallest group (the first such)."""
    seats = dict(grouping)
    sizes = group_sizes(seats, num_adapters)
    for client in clients:
        if client not in seats:
            seats[client] = sizes.index(min(sizes))
            sizes[seats[client]] += 1
    return seats


def group_sizes(grouping: Grouping, num_adapters: int) -> list[int]:
    """How many clients each adapter has."""
    counts = Counter(grouping.values())
    return [counts[u] for u in range(num_adapters)]


def _seats_by_prices(
    exchange: Exchange, asked: Sequence[ClientId], state: ServerState, cfg: FederatedSettings
) -> Grouping:
    num_adapters = len(state.adapters)
    tasks = _scoring_tasks(asked, state, cfg)
    scorers = list(exchange.ask(tasks, lambda task, reply: None))
    seats: Grouping = {}

    def ask(prices: tuple[float, ...]) -> Grouping:
        """Who misses an exchange is held at its last answer."""
        tasks = [Task("seat", client, state.round, prices=prices) for client in scorers]
        replies = exchange.ask(tasks, lambda task, reply: _seat_fault(reply.seat, num_adapters))
        seats.update({client: reply.seat for client, reply in replies.items() if reply.seat is not None})
        return dict(seats)

    return prices(ask, num_adapters, cfg.price_steps)


def _scoring_tasks(
    asked: Sequence[ClientId], state: ServerState, cfg: FederatedSettings, share_losses: bool = False
) -> list[Task]:
    lent = Lent(dict(enumerate(state.adapters)), cfg.comm_dtype)
    local, used = cfg.local.as_local(), state.consumed
    return [
        Task("evaluate", c, state.round, lent, local=local, consumed=used.get(c, 0), share_losses=share_losses)
        for c in asked
    ]


def _seat_fault(seat: object, num_adapters: int) -> str | None:
    if isinstance(seat, bool) or not isinstance(seat, int) or not 0 <= seat < num_adapters:
        return f"seat: expected an adapter in 0..{num_adapters - 1}, got {ascii(seat)[:40]}"
    return None


def _ask_losses(exchange: Exchange, asked: Sequence[ClientId], state: ServerState, cfg: FederatedSettings) -> Losses:
    num_adapters = len(state.adapters)
    tasks = _scoring_tasks(asked, state, cfg, share_losses=True)
    replies = exchange.ask(tasks, lambda task, reply: _losses_fault(reply, num_adapters))
    return {client: reply.metrics["losses"] for client, reply in replies.items()}


def _losses_fault(reply: Reply, num_adapters: int) -> str | None:
    losses = reply.metrics.get("losses")
    if not isinstance(losses, list | tuple) or len(losses) != num_adapters:
        return f"losses: expected {num_adapters} numbers, got {ascii(losses)[:40]}"
    if any(isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss) for loss in losses):
        return f"losses: expected finite numbers, got {ascii(losses)[:40]}"
    return None


def _given_groups(cfg: FederatedSettings) -> Grouping:
    for client, u in cfg.groups.items():
        if u >= cfg.num_adapters:
            raise ConfigError(
                f"selectors.groups.{client}: adapter {u} does not exist; num_adapters is {cfg.num_adapters},"
                f" so use 0..{cfg.num_adapters - 1}"
            )
    return dict(cfg.groups)


# Prices: the clients keep their losses


def choose_seat(losses: Sequence[float], prices: Sequence[float], client: ClientId) -> int:
    """What a client answers to prices: the adapter of least loss plus price. Runs at the client.

    Clients of exactly the same taste would all jump at once and could never be split: so each adds to its losses a
    little that depends on its name only, at most ``TIE_BREAK`` of its own spread.
    """
    if not all(map(math.isfinite, losses)):
        raise FederationError(
            f"client {client!r} cannot be seated: its validation loss is not finite; look at its data"
        )
    spread = (max(losses) - min(losses)) or 1.0
    rng = rng_for("seat", client)
    costs = [loss + TIE_BREAK * spread * rng.random() + price for loss, price in zip(losses, prices, strict=True)]
    return costs.index(min(costs))


def prices(ask: Callable[[tuple[float, ...]], Grouping], num_adapters: int, num_exchanges: int = 10) -> Grouping:
    """Balanced groups from counts alone: crowded adapters become dearer, empty ones cheaper, until nobody crowds.

    ``ask`` announces U prices and returns the seats that the clients choose. Whatever the prices, clients who each take
    their cheapest seat have the least total loss among all groupings of these sizes, so only the sizes must be found.
    The scale of the losses is unknown: the step of an adapter halves when it changes between crowded and empty and
    grows while it does not. Ends when the groups are balanced and surely good (``_regret``), mostly after 5 to 15
    exchanges; else, after three times ``num_exchanges``, the best seating seen is evened out.
    """
    price, step, last = [0.0] * num_adapters, [FIRST_STEP] * num_adapters, [0.0] * num_adapters
    seen: list[_Seating] = []
    while len(seen) < 3 * num_exchanges:
        seen.append(_Seating(ask(tuple(price)), tuple(price)))
        if _is_good(seen[-1]):
            return seen[-1].seats
        crowding = _crowding(seen[-1])
        for u in range(num_adapters):
            turn = crowding[u] * last[u]
            step[u] *= SHRINK if turn < 0 else GROW if turn > 0 else 1.0
            price[u] += step[u] * crowding[u]
        last = crowding
    return _evened_out(min(seen, key=lambda seating: (_unevenness(seating), _regret(seating))), seen)


@dataclass(frozen=True)
class _Seating:
    """Where the clients sat at these prices."""

    seats: Grouping
    prices: tuple[float, ...]

    @property
    def sizes(self) -> list[int]:
        return group_sizes(self.seats, len(self.prices))

    @property
    def excess(self) -> list[int]:
        """Clients above the equal size. What an even split leaves over goes to the dearest, most wanted groups."""
        least, over = divmod(len(self.seats), len(self.prices))
        sizes = self.sizes
        dearest = sorted(range(len(sizes)), key=lambda u: (-self.prices[u], -sizes[u]))[:over]
        return [size - least - (u in dearest) for u, size in enumerate(sizes)]


def _is_good(seating: _Seating) -> bool:
    return _unevenness(seating) == 0 and _regret(seating) <= GOOD_ENOUGH


def _unevenness(seating: _Seating) -> int:
    """How many clients too many or too few the groups have in all, beyond the tolerance; an empty group has too few."""
    share = len(seating.seats) / len(seating.prices)
    least = max(int(math.floor(share) * (1 - TOLERANCE)), min(math.floor(share), 1))
    most = int(math.ceil(share) * (1 + TOLERANCE))
    return sum(max(size - most, least - size, 0) for size in seating.sizes)


def _regret(seating: _Seating) -> float:
    """Upper bound, in nats a client, of what groups of equal sizes could save: the duality of the assignment."""
    unused = -sum(price * excess for price, excess in zip(seating.prices, seating.excess, strict=True))
    return unused / max(len(seating.seats), 1)


def _crowding(seating: _Seating) -> list[float]:
    """How far each group is from its equal size; the farthest is 1 or -1."""
    farthest = max(map(abs, seating.excess)) or 1
    return [excess / farthest for excess in seating.excess]


def _evened_out(best: _Seating, seen: Sequence[_Seating]) -> Grouping:
    """The same seats with clients moved until all groups have their equal size.

    Who sat elsewhere at one of the last prices is nearly indifferent, and moves there first.
    """
    seats, excess = dict(best.seats), best.excess
    while max(excess) > 0:
        full, free = excess.index(max(excess)), excess.index(min(excess))
        there = [client for client in sorted(seats) if seats[client] == full]
        mover = max(there, key=lambda client: _last_time(client, free, seen))
        seats[mover] = free
        excess[full] -= 1
        excess[free] += 1
    return seats


def _last_time(client: ClientId, u: int, seen: Sequence[_Seating]) -> int:
    """The last exchange at which this client chose adapter ``u``; -1 if it never did."""
    return max((when for when, seating in enumerate(seen) if seating.seats.get(client) == u), default=-1)


# Rules that need the losses. ``order`` is the order in which clients come; it decides between equals.


def optimal(losses: Losses, order: Sequence[ClientId]) -> Grouping:
    """The least total loss among all groupings whose sizes differ by at most one."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    costs = np.array([losses[client] for client in order], dtype=np.float64)
    num_clients, num_adapters = costs.shape
    most = math.ceil(num_clients / num_adapters)
    seats = np.repeat(costs, most, axis=1)
    # As many chairs stay empty as there are seats too many. An empty chair costs nothing as the last seat of an adapter
    # and too much as any other: so no adapter has two.
    chairs = np.full((seats.shape[1] - num_clients, seats.shape[1]), 1.0 + 2.0 * np.abs(costs).sum())
    chairs[:, most - 1 :: most] = 0.0
    _, columns = linear_sum_assignment(np.vstack([seats, chairs]))
    return {client: column // most for client, column in zip(order, columns.tolist(), strict=False)}


def greedy(losses: Losses, order: Sequence[ClientId]) -> Grouping:
    """The original's rule: the most wanted adapter closes with the first ``cap`` of its candidates, again and again.

    In each pass cap = ceil(unplaced / open adapters) and every unplaced client stands at the open adapter it ranks
    highest. Equal losses rank the lower number first; equally wanted adapters close the lower number first.
    """
    num_adapters = len(losses[order[0]])
    open_adapters = set(range(num_adapters))
    seats: Grouping = {}
    while open_adapters and len(seats) < len(order):
        floating = [client for client in order if client not in seats]
        cap = math.ceil(len(floating) / len(open_adapters))
        wanted = {client: min(sorted(open_adapters), key=lambda u: losses[client][u]) for client in floating}
        counts = Counter(wanted.values())
        closing = max(sorted(open_adapters), key=lambda u: counts[u])
        seats.update(dict.fromkeys([client for client in floating if wanted[client] == closing][:cap], closing))
        open_adapters.remove(closing)
    return seats


def nearest(losses: Losses, order: Sequence[ClientId]) -> Grouping:
    """Each client its best adapter, however crowded (IFCA)."""
    return {client: min(range(len(losses[client])), key=lambda u: losses[client][u]) for client in order}


# How alike two groupings are


def adjusted_rand_index(a: Grouping, b: Grouping) -> float:
    """How alike two groupings are over the clients in both: 1 the same groups, about 0 by chance.

    Hubert and Arabie, 1985. Adapter numbers do not matter. 1.0 where there is nothing to disagree about,
    such as fewer than two clients.
    """
    clients = a.keys() & b.keys()
    both = _num_pairs(Counter((a[client], b[client]) for client in clients))
    in_a = _num_pairs(Counter(a[client] for client in clients))
    in_b = _num_pairs(Counter(b[client] for client in clients))
    by_chance = in_a * in_b / max(math.comb(len(clients), 2), 1)
    most = (in_a + in_b) / 2
    return 1.0 if most == by_chance else (both - by_chance) / (most - by_chance)


def _num_pairs(groups: Mapping[object, int]) -> int:
    return sum(math.comb(size, 2) for size in groups.values())


LOSS_RULES: dict[str, Callable[[Losses, Sequence[ClientId]], Grouping]] = {
    "optimal": optimal,
    "greedy": greedy,
    "nearest": nearest,
}
