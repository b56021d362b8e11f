"""The round (docs/algorithm.md section 3): regroup now and then, sample a cohort, let it train, average, step.

Everything is a function of values: ``fedbiscuit_round(state, backend, cfg, seed) -> (next state, record)``. A state
that went in is never changed, nor are its tensors.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from fedbiscuit.config import FederatedSettings, least_replies
from fedbiscuit.federated.aggregation import Pool, clip_limit, server_step
from fedbiscuit.federated.coding import coded, decoded
from fedbiscuit.federated.exchange import Exchange, Lent
from fedbiscuit.federated.grouping import group_sizes, seat_clients, seat_newcomers
from fedbiscuit.federated.privacy import check_reply, delta_norm
from fedbiscuit.types import (
    Backend,
    ClientId,
    ConfigError,
    FederationError,
    Grouping,
    LocalTraining,
    Reply,
    RoundRecord,
    ServerState,
    Task,
    Weights,
    rng_for,
)

__all__ = [
    "assign",
    "fedbiscuit_round",
    "init_state",
    "local_training",
    "num_warmup_rounds",
    "phase_of",
    "regroup_is_due",
    "sample_cohort",
    "sample_evenly",
    "trained_part",
]


def init_state(adapters: Sequence[Weights]) -> ServerState:
    """The state before round 0, with copies of these U adapters."""
    if not adapters or not all(adapters):
        raise ConfigError("a federation needs at least one adapter with at least one tensor; check lora.target_modules")
    return ServerState(round=0, adapters=tuple(Lent(dict(enumerate(adapters)))[u] for u in range(len(adapters))))


def fedbiscuit_round(
    state: ServerState, backend: Backend, cfg: FederatedSettings, seed: int
) -> tuple[ServerState, RoundRecord]:
    """One round. Raises FederationError, with the state as it was, if no cohort sends ``min_replies`` good replies."""
    started = time.perf_counter()
    exchange = Exchange(backend)
    regrouped = regroup_is_due(state.round, cfg)
    grouping = _regroup(exchange, state, cfg, seed) if regrouped else dict(state.grouping)
    if phase_of(state.round, cfg) == "federated":
        grouping = seat_newcomers(grouping, exchange.clients, cfg.num_adapters)
    adapter_of, pools = _train_a_cohort(exchange, state, grouping, cfg, seed)
    following, metrics = _next_state(state, grouping, pools, len(exchange.clients), cfg)
    return following, RoundRecord(
        round=state.round,
        phase=phase_of(state.round, cfg),
        cohort=tuple(adapter_of),
        adapter_of=adapter_of,
        grouping=grouping,
        regrouped=regrouped,
        metrics=metrics,
        refused=exchange.refused,
        kept_seats=exchange.kept_seats,
        seconds=time.perf_counter() - started,
        bytes_up=exchange.bytes_up,
        bytes_down=exchange.bytes_down,
        quarantined=exchange.quarantined,
        away=exchange.away,
    )


# The schedule: functions of the round's number


def num_warmup_rounds(cfg: FederatedSettings) -> int:
    """Rounds before the first grouping: W for each of U adapters, none for a single one."""
    return cfg.num_adapters * cfg.warmup_rounds if cfg.num_adapters > 1 else 0


def phase_of(round: int, cfg: FederatedSettings) -> Literal["warmup", "federated"]:
    """Warm-up trains one adapter after the other with everybody; then each group trains its own."""
    return "warmup" if round < num_warmup_rounds(cfg) else "federated"


def regroup_is_due(round: int, cfg: FederatedSettings) -> bool:
    """True in the first round after the warm-up and every ``regroup_every`` rounds from there, if there are groups."""
    since_warmup = round - num_warmup_rounds(cfg)
    return cfg.num_adapters > 1 and since_warmup >= 0 and since_warmup % cfg.regroup_every == 0


def sample_cohort(clients: Sequence[ClientId], size: int, rng: random.Random) -> list[ClientId]:
    """``size`` clients without replacement, sorted by name; 0 takes all."""
    if size > len(clients):
        raise FederationError(
            f"a cohort of {size} cannot be drawn from {len(clients)} clients; use a cohort_size of at most"
            f" {len(clients)}, or 0 for all"
        )
    return sorted(rng.sample(sorted(clients), size or len(clients)))


def sample_evenly(grouping: Grouping, size: int, rng: random.Random) -> list[ClientId]:
    """``size`` clients without replacement, as many of each group as of any other, sorted by name; 0 takes all.

    Which groups give one more, where it does not come out even, is drawn too. A group that is used up gives no more.
    """
    if size > len(grouping):
        raise FederationError(f"a cohort of {size} cannot be drawn from {len(grouping)} clients; use a smaller one")
    order = rng.sample(sorted(grouping), len(grouping))
    groups = [[client for client in order if grouping[client] == u] for u in sorted(set(grouping.values()))]
    rng.shuffle(groups)
    in_turn = [client for turn in itertools.zip_longest(*groups) for client in turn if client is not None]
    return sorted(in_turn[: size or len(in_turn)])


def assign(cohort: Sequence[ClientId], round: int, grouping: Grouping, cfg: FederatedSettings) -> dict[ClientId, int]:
    """Who trains which adapter: in the warm-up all the same one, then each the one of its group."""
    if phase_of(round, cfg) == "warmup":
        return dict.fromkeys(cohort, round // cfg.warmup_rounds)
    return {client: grouping[client] for client in cohort}


def local_training(round: int, cfg: FederatedSettings) -> LocalTraining:
    """How clients train in a round: ``cfg.local``, with a learning rate that falls in the last rounds (``lr_decay``)."""
    local, falling = cfg.local.as_local(), cfg.lr_decay * cfg.rounds
    return local if cfg.rounds - round >= falling else replace(local, lr=local.lr * (cfg.rounds - round) / falling)


# The steps of a round


def _regroup(exchange: Exchange, state: ServerState, cfg: FederatedSettings, seed: int) -> Grouping:
    size = min(cfg.grouping_cohort, len(exchange.clients))  # some may be away
    asked = sample_cohort(exchange.clients, size, rng_for(seed, state.round, "grouping cohort"))
    return seat_clients(exchange, asked, state, cfg, seed)


def _train_a_cohort(
    exchange: Exchange, state: ServerState, grouping: Grouping, cfg: FederatedSettings, seed: int
) -> tuple[dict[ClientId, int], dict[int, Pool]]:
    """The first cohort of which enough clients sent a good reply: its adapters, and these replies by adapter."""
    for attempt in range(cfg.max_attempts):
        cohort = _cohort(exchange, state.round, grouping, cfg, rng_for(seed, state.round, attempt, "cohort"))
        if cfg.min_replies > len(cohort):
            raise FederationError(
                f"min_replies is {cfg.min_replies}, but a cohort has only {len(cohort)} clients{exchange.missing()}; mend these "
                "clients, or lower min_replies, and resume"
            )
        adapter_of = assign(cohort, state.round, grouping, cfg)
        pools = _train(exchange, state, adapter_of, cfg)
        if sum(map(len, pools.values())) >= cfg.min_replies:
            return adapter_of, pools
    raise FederationError(
        f"round {state.round}: fewer than {cfg.min_replies} good replies from each of {cfg.max_attempts} cohorts,"
        f" so nothing was changed{exchange.missing()}; mend these clients, or lower min_replies, and resume"
    )


def _cohort(
    exchange: Exchange, round: int, grouping: Grouping, cfg: FederatedSettings, rng: random.Random
) -> list[ClientId]:
    """Who trains in a round: in the warm-up a cohort of its own size, later perhaps as many of each group.

    Where fewer clients than that are there, all of them; ``min_replies`` says how few are too few.
    """
    is_warmup = phase_of(round, cfg) == "warmup"
    size = min((is_warmup and cfg.warmup_cohort_size) or cfg.cohort_size, len(exchange.clients))
    if not is_warmup and cfg.cohort_sampling == "stratified":
        return sample_evenly({client: grouping[client] for client in exchange.clients}, size, rng)
    return sample_cohort(exchange.clients, size, rng)


def _train(
    exchange: Exchange, state: ServerState, adapter_of: Mapping[ClientId, int], cfg: FederatedSettings
) -> dict[int, Pool]:
    local = local_training(state.round, cfg)
    trained = sorted(set(adapter_of.values()))
    lent = {u: Lent({u: state.adapters[u]}, cfg.comm_dtype) for u in trained}
    expected = {u: coded(trained_part(state.adapters[u], cfg), cfg.comm_dtype) for u in trained}
    tasks = [
        Task("train", client, state.round, lent[u], local=local, consumed=state.consumed.get(client, 0))
        for client, u in adapter_of.items()
    ]

    def check(task: Task, reply: Reply) -> str | None:
        u = adapter_of[task.client]
        if reply.adapter != u:
            return f"it trained adapter {ascii(reply.adapter)[:40]} where {u} was asked for"
        return check_reply(reply, expected[u], local.comparisons_per_round, cfg.comm_dtype)

    pools: dict[int, Pool] = {}
    for reply in exchange.stream(tasks, check):
        delta = decoded(reply.delta or {}, cfg.comm_dtype)
        pools.setdefault(adapter_of[reply.client], Pool(cfg)).add(replace(reply, delta=delta))
    return dict(sorted(pools.items()))


def trained_part(weights: Weights, cfg: FederatedSettings) -> Weights:
    """The tensors of an adapter that clients train and send: all, or with ``freeze_a`` all but the A matrices."""
    if cfg.lora_aggregation == "average":
        return weights
    return {name: tensor for name, tensor in weights.items() if not name.endswith("lora_A.weight")}


def _next_state(
    state: ServerState,
    grouping: Grouping,
    pools: Mapping[int, Pool],
    num_clients: int,
    cfg: FederatedSettings,
) -> tuple[ServerState, dict[str, Any]]:
    """The server after these replies. Adapters that nobody trained do not move, nor does their optimizer."""
    norms = {client: norm for pool in pools.values() for client, norm in pool.norms.items()}
    clip_norm, clip_norms = clip_limit(norms.values(), state.clip_norms)
    adapters, moments, lengths = list(state.adapters), dict(state.server_optimizer_state), {}
    for u, pool in pools.items():
        if len(pool) < least_replies(cfg):  # a small group waits for a round in which its rule can work
            continue
        delta = pool.delta(num_clients if phase_of(state.round, cfg) == "federated" else len(pool), clip_norm)
        adapters[u], moments = server_step(u, adapters[u], delta, moments, cfg)
        lengths[u] = delta_norm(delta)
    used = cfg.local.as_local().comparisons_per_round
    following = ServerState(
        round=state.round + 1,
        adapters=tuple(adapters),
        grouping=grouping,
        consumed={**state.consumed, **{client: state.consumed.get(client, 0) + used for client in norms}},
        server_optimizer_state=moments,
        clip_norms=clip_norms,
    )
    clips = cfg.aggregator == "norm_clipped_mean"
    metrics = {
        "num_replies": len(norms),
        "delta_norm": lengths,
        "too_few": sorted(pools.keys() - lengths.keys()),
        "clipped": sum(norm > clip_norm for norm in norms.values()) if clips else 0,
        "group_sizes": group_sizes(grouping, cfg.num_adapters),
    }
    return following, metrics
