"""Trunks: what the layers below all adapters make of a comparison, kept so that it is computed once in a run.

A comparison is a group of sequences here: its two orders where a selector reads it, or where a policy would have to write its
answers, the prompt with each.

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

from fedbiscuit.models.lm import LM
from fedbiscuit.models.trees import Forest

__all__ = ["Group", "Trunks"]

Group = tuple[tuple[int, ...], ...]
"""Sequences of token ids that are computed together."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """(t, d) states of the distinct tokens of a group, and where each sequence's tokens are among them."""

    states: Tensor
    paths: list[np.ndarray]


class Trunks:
    """The states of groups below the lowest adapted layer; the least recently used go when ``max_bytes`` is full.

    Each group is computed by itself, so its states do not depend on which others it is read with, or on what was
    kept: a resumed run, which begins with nothing kept, computes the same bits.
    """

    def __init__(self, lm: LM, max_bytes: int):
        self._lm = lm
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Group, _Kept] = OrderedDict()
        self.num_bytes = 0
        self.num_computed = 0

    def of(self, forest: Forest, groups: Sequence[Group]) -> Tensor:
        """(T, d) states for a forest of these groups' sequences, in turn."""
        kept = [self._get(group) for group in groups]
        states = torch.empty(
            len(forest.tokens), kept[0].states.shape[1], dtype=kept[0].states.dtype, device=self._lm.device
        )
        found = ((one.states, path) for one in kept for path in one.paths)
        for (group, path), here in zip(found, forest.paths, strict=True):
            places = torch.from_numpy(here).to(states.device)
            states[places] = group[torch.from_numpy(path).to(states.device)]
        return states

    def _get(self, group: Group) -> _Kept:
        if group not in self._kept:
            forest = self._lm.pack(group)
            states = self._lm.trunk(forest)
            assert states is not None
            self._kept[group] = _Kept(states, forest.paths)
            self.num_bytes += states.nbytes
            self.num_computed += 1
        self._kept.move_to_end(group)
        found = self._kept[group]
        while self.num_bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.states.nbytes
        return found
