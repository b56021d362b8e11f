"""How well selectors agree with people: accuracy, flips, calibration, by client and over all (docs/algorithm.md section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedbiscuit.types import ClientId, Comparison, rng_for

__all__ = [
    "FEWEST",
    "IMPLICIT",
    "UNTRAINED",
    "Judged",
    "bootstrap_interval",
    "calibration",
    "longer_answer",
    "summarize",
]

IMPLICIT = "the policy's implicit reward"
UNTRAINED = "the base model, untrained"
"""Rows of the table of agreement, by these names wherever they are looked for."""

NUM_BINS = 10
FEWEST = 5
"""Clients below which no interval is given: resampling two or three people says nothing about others."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a rule says of one client's n comparisons.

    probability: (n,) that the client prefers A. choice: (n,) 0 where it does. loss: (n,) nats. in_order: (n, 2) 1 where the
    rule agrees with the client when it is shown (A, B) alone, and (B, A) alone.
    """

    probability: np.ndarray
    choice: np.ndarray
    loss: np.ndarray
    in_order: np.ndarray

    @property
    def flipped(self) -> np.ndarray:
        """(n,) 1 where the two orders alone disagree."""
        return np.asarray(self.in_order[:, 0] != self.in_order[:, 1], dtype=float)

    @property
    def correct(self) -> np.ndarray:
        """(n,) 1 where the rule agrees with the client; one half where it cannot say."""
        said = np.where(self.probability == 0.5, 0.5, (self.probability > 0.5).astype(float))
        return np.where(self.choice == 0, said, 1 - said)

    @property
    def accuracy(self) -> float:
        """The mean of ``correct``."""
        return float(self.correct.mean())


def summarize(
    name: str,
    judged: Mapping[ClientId, Judged],
    key: tuple[object, ...],
    resamples: int = 1000,
    cooled: Mapping[ClientId, Judged] | None = None,
) -> dict[str, Any]:
    """One row of the table: means over clients and over comparisons, and the worst decile of clients.

    ``interval`` is the 95% bootstrap interval of the mean over clients, None for fewer than five of them.
    ``accuracy_in_order``: the means over clients for (A, B) alone and for (B, A) alone. Calibration error: expected, 10
    bins. ``cooled`` is the same at a fitted temperature; its loss and calibration error stand beside.
    """
    by_client = [one.accuracy for _, one in sorted(judged.items()) if len(one.choice)]
    every = [one for _, one in sorted(judged.items()) if len(one.choice)]
    worst = sorted(by_client)[: max(1, math.ceil(len(by_client) / 10))]
    loss = np.concatenate([one.loss for one in every])
    return {
        "name": name,
        "accuracy": float(np.mean(by_client)),
        "interval": bootstrap_interval(by_client, key, resamples) if len(by_client) >= FEWEST else None,
        "accuracy_comparisons": float(np.concatenate([one.correct for one in every]).mean()),
        "worst_decile": float(np.mean(worst)),
        "loss": float(loss.mean()) if np.isfinite(loss).all() else None,
        "accuracy_in_order": [float(np.mean([one.in_order[:, i].mean() for one in every])) for i in (0, 1)],
        "flip_rate": float(np.concatenate([one.flipped for one in every]).mean()),
        "calibration_error": _expected_error(calibration(judged)),
        **(_at_temperature(cooled) if cooled else {}),
    }


def _at_temperature(cooled: Mapping[ClientId, Judged]) -> dict[str, float]:
    loss = np.concatenate([one.loss for _, one in sorted(cooled.items())])
    return {
        "loss_at_temperature": float(loss.mean()),
        "calibration_error_at_temperature": _expected_error(calibration(cooled)),
    }


def calibration(judged: Mapping[ClientId, Judged]) -> list[dict[str, float]]:
    """By bins of confidence: mean probability of the answer given (``p``), how often it is right, how many comparisons."""
    every = list(judged.values())
    probability = np.concatenate([one.probability for one in every])
    confidence = np.maximum(probability, 1 - probability)
    correct = np.concatenate([one.correct for one in every])
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    return [
        {
            "p": float(confidence[bins == b].mean()),
            "accuracy": float(correct[bins == b].mean()),
            "count": int((bins == b).sum()),
        }
        for b in range(NUM_BINS)
        if (bins == b).any()
    ]


def longer_answer(comparisons: Sequence[Comparison]) -> Judged:
    """The rule "the answer with more characters is better", as in `data check`; equal lengths count one half."""
    lengths = np.array([[len(c.output_a), len(c.output_b)] for c in comparisons]).reshape(-1, 2)
    probability = 0.5 + 0.5 * np.sign(lengths[:, 0] - lengths[:, 1])
    choice = np.array([c.choice for c in comparisons], dtype=int)
    right = 0.5 + (0.5 - choice) * np.sign(lengths[:, 0] - lengths[:, 1])
    return Judged(probability, choice, np.full(len(comparisons), np.nan), np.stack([right, right], axis=1))


def bootstrap_interval(values: Sequence[float], key: tuple[object, ...], resamples: int = 1000) -> list[float]:
    """The 95% percentile interval of the mean of ``values``, resampled as a function of the key."""
    rng = np.random.default_rng(rng_for(*key, "bootstrap").getrandbits(64))
    data = np.asarray(values, dtype=float)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(axis=1)
    return [float(np.quantile(means, q)) for q in (0.025, 0.975)]


def _expected_error(bins: Sequence[Mapping[str, float]]) -> float:
    total = sum(b["count"] for b in bins)
    return float(sum(b["count"] * abs(b["p"] - b["accuracy"]) for b in bins) / total)
