"""Trunks: what the layers below all adapters make of a comparison, kept so that it is computed once in a run.

With adapters in the upper layers only (``lora.layers_to_transform``) the lower layers are frozen, so a comparison that is
trained on in several rounds, or scored under several adapters, passes through them once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedbiscuit.data.encoding import EncodedComparison
from fedbiscuit.models.lm import LM
from fedbiscuit.models.trees import Forest

__all__ = ["Trunks"]


@dataclass(frozen=True, slots=True)
class _Kept:
    """(t, d) states of the distinct tokens of a comparison, and where each order's tokens are among them."""

    states: Tensor
    paths: tuple[np.ndarray, np.ndarray]


class Trunks:
    """The states of comparisons below the lowest adapted layer; the least recently used go when ``max_bytes`` is full.

    Each comparison is computed by itself, so its states do not depend on which others it is read with, or on what was
    kept: a resumed run, which begins with nothing kept, computes the same bits.
    """

    def __init__(self, lm: LM, max_bytes: int):
        self._lm = lm
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], _Kept] = OrderedDict()
        self.num_bytes = 0
        self.num_computed = 0

    def of(self, forest: Forest, encoded: Sequence[EncodedComparison]) -> Tensor:
        """(T, d) states for a forest of the orders (A, B) and (B, A) of these comparisons, in turn."""
        kept = [self._get(item) for item in encoded]
        states = torch.empty(
            len(forest.tokens), kept[0].states.shape[1], dtype=kept[0].states.dtype, device=self._lm.device
        )
        for number, one in enumerate(kept):
            for order, path in enumerate(one.paths):
                places = torch.from_numpy(forest.paths[2 * number + order])
                states[places.to(states.device)] = one.states[torch.from_numpy(path).to(states.device)]
        return states

    def _get(self, item: EncodedComparison) -> _Kept:
        key = (item.ab, item.ba)
        if key not in self._kept:
            forest = self._lm.pack(key)
            states = self._lm.trunk(forest)
            assert states is not None
            self._kept[key] = _Kept(states, (forest.paths[0], forest.paths[1]))
            self.num_bytes += states.nbytes
            self.num_computed += 1
        self._kept.move_to_end(key)
        found = self._kept[key]
        while self.num_bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.states.nbytes
        return found
