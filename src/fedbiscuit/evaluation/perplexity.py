"""Perplexity of texts under a model, with an interval over texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedbiscuit.evaluation.metrics import FEWEST
from fedbiscuit.types import rng_for

__all__ = ["perplexity"]


def perplexity(
    log_probs: Sequence[float], tokens: Sequence[int], key: tuple[object, ...], resamples: int = 1000
) -> dict[str, Any]:
    """exp(- nats / tokens) over all texts together, and its 95% bootstrap interval over texts (None for fewer than five).

    log_probs: of each text, in nats, summed over its tokens. A long text counts by its length, as is usual.
    """
    nats, lengths = np.asarray(log_probs, dtype=float), np.asarray(tokens, dtype=float)
    value = math.exp(-nats.sum() / lengths.sum())
    interval = None
    if len(nats) >= FEWEST:
        rng = np.random.default_rng(rng_for(*key, "bootstrap").getrandbits(64))
        drawn = rng.integers(0, len(nats), (resamples, len(nats)))
        means = np.exp(-nats[drawn].sum(axis=1) / lengths[drawn].sum(axis=1))
        interval = [float(np.quantile(means, q)) for q in (0.025, 0.975)]
    return {"perplexity": value, "interval": interval, "texts": len(nats)}
