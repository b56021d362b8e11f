"""The heart: rounds, groups and averages as plain functions on dicts of tensors. See the README of this folder."""

from fedbiscuit.federated.aggregation import AGGREGATORS, SERVER_OPTIMIZERS
from fedbiscuit.federated.algorithm import (
    assign,
    fedbiscuit_round,
    init_state,
    phase_of,
    regroup_is_due,
    sample_cohort,
    trained_part,
)
from fedbiscuit.federated.grouping import LOSS_RULES, adjusted_rand_index, choose_seat, group_sizes
from fedbiscuit.federated.privacy import check_reply, clip_to_norm, delta_norm

__all__ = [
    "AGGREGATORS",
    "LOSS_RULES",
    "SERVER_OPTIMIZERS",
    "adjusted_rand_index",
    "assign",
    "check_reply",
    "choose_seat",
    "clip_to_norm",
    "delta_norm",
    "fedbiscuit_round",
    "group_sizes",
    "init_state",
    "phase_of",
    "regroup_is_due",
    "sample_cohort",
    "trained_part",
]
