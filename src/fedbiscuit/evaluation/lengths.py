"""Would it be preferred if its answers were as long? The length-controlled win rate of AlpacaEval (Dubois and others, 2024).

A logistic regression of the verdicts on how much longer the answer is, read off where both are equally long. Their third
term, the difficulty of each instruction, was fitted to their own leaderboard and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from fedbiscuit.types import rng_for

__all__ = ["fit", "length_controlled", "longer_by"]

RIDGE = 0.01
"""Weight of slope^2 / 2 beside the log-likelihood of all verdicts: where length alone separates wins from losses, the slope
stays finite. The intercept is free, so without an effect of length nothing is pulled anywhere.
"""
MOST_STEPS = 200


def length_controlled(
    points: Sequence[float],
    ours: Sequence[str],
    theirs: Sequence[str],
    key: tuple[object, ...],
    resamples: int = 1000,
) -> dict[str, Any] | None:
    """points: 1 where our answer is preferred, 0 where theirs is, 0.5 a tie, for each prompt.

    P(ours) = sigmoid(intercept + slope * ``longer_by``), and ``win_rate`` = sigmoid(intercept), with ties as half; its 95%
    bootstrap interval is over prompts. ``slope`` > 0: the judge prefers longer answers. None where length cannot be told
    from policy, because ours is longer by the same number of characters on every prompt.
    """
    longer = longer_by(ours, theirs)
    if longer is None:
        return None
    verdicts = np.asarray(points, dtype=float)
    size = len(verdicts)
    rng = np.random.default_rng(rng_for(*key, "length-controlled").getrandbits(64))
    drawn = rng.integers(0, size, (resamples, size))
    counts = np.stack([np.bincount(row, minlength=size) for row in drawn])
    win_rates, slopes = fit(verdicts, longer, np.concatenate([np.ones((1, size)), counts]))
    interval = [float(np.quantile(win_rates[1:], q)) for q in (0.025, 0.975)]
    characters = {name: sum(map(len, texts)) / size for name, texts in (("policy", ours), ("against", theirs))}
    return {"win_rate": float(win_rates[0]), "interval": interval, "slope": float(slopes[0]), "characters": characters}


def longer_by(ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray | None:
    """(n,) tanh(characters that ours has more / their standard deviation over prompts), in -1 to 1.

    Zeros where all lengths are equal, None where ours is longer by one and the same number other than 0.
    """
    more = np.array([len(a) - len(b) for a, b in zip(ours, theirs, strict=True)], dtype=float)
    if not more.any():
        return more
    spread = more.std(ddof=1) if len(more) > 1 else 0.0
    return np.tanh(more / spread) if spread > 0 else None


def fit(points: np.ndarray, longer: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R,) win rates at equal length and (R,) slopes: the most likely ones of R samples, with the ridge on the slope.

    points, longer: (n,). counts: (R, n), how often each prompt is in each sample. A sample of wins alone has win rate 1 and
    slope 0, one of losses alone 0 and 0. Newton's method with halved steps.
    """
    share = counts @ points / counts.sum(1)
    win_rates, slopes = share.copy(), np.zeros(len(counts))
    mixed = (share > 0) & (share < 1)
    counts, at = counts[mixed], np.zeros((int(mixed.sum()), 2))

    def loss(at: np.ndarray) -> np.ndarray:
        z = at[:, :1] + at[:, 1:] * longer
        return np.asarray((counts * (np.logaddexp(0, z) - points * z)).sum(1) + RIDGE * at[:, 1] ** 2 / 2)

    now = loss(at)
    for _ in range(MOST_STEPS if len(at) else 0):
        p = expit(at[:, :1] + at[:, 1:] * longer)
        wrong, bend = counts * (p - points), counts * p * (1 - p)
        gradient = np.stack([wrong.sum(1), wrong @ longer + RIDGE * at[:, 1]], 1)
        aa, ab, bb = bend.sum(1), bend @ longer, bend @ longer**2 + RIDGE
        inverse = np.stack([np.stack([bb, -ab], 1), np.stack([-ab, aa], 1)], 1) / (aa * bb - ab**2)[:, None, None]
        step = np.einsum("rij,rj->ri", inverse, gradient)
        if not np.abs(step).max() > 1e-10:
            break
        for _ in range(30):
            then = loss(at - step)
            worse = then > now + 1e-12 * np.abs(now)
            if not worse.any():
                break
            step[worse] /= 2
        at, now = at - step, then
    win_rates[mixed], slopes[mixed] = expit(at[:, 0]), at[:, 1]
    return win_rates, slopes
