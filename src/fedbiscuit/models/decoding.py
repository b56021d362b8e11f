"""Keys and values while the policy writes: a prompt's once for all its completions, and each completion's own.

Several completions of one prompt share the prompt as sequences in a prefix tree do (``trees.py``), so the prompt is computed
once, its keys and values are kept once, and each new token attends to them and to what its own completion has so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cache"]

ROOM = 32
"""New tokens for which room is made at a time."""


class Cache:
    """For P prompts with S completions each, R = P S rows at first; rows that are finished are dropped.

    prompts: the places in the packed row of the tokens of each prompt, for ``keep``.
    """

    def __init__(self, prompts: Sequence[np.ndarray], num_completions: int, device: torch.device):
        longest = max(len(places) for places in prompts)
        padded = [np.pad(places, (0, longest - len(places))) for places in prompts]
        self._places = torch.from_numpy(np.stack(padded)).to(device)
        self._lengths = torch.tensor([len(places) for places in prompts], device=device)
        self._prompt_of = torch.arange(len(prompts), device=device).repeat_interleave(num_completions)
        self._slot_of = torch.arange(num_completions, device=device).repeat(len(prompts))
        self._num_slots = num_completions
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor] = {}
        self._written = 0

    @property
    def positions(self) -> Tensor:
        """(R,) the position of each row's next token."""
        return self._lengths[self._prompt_of] + self._written

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take a layer's keys and values of the prompts, (1, heads, T, size) over the packed row."""
        self._shared[layer] = tuple(t[0][:, self._places].transpose(0, 1).contiguous() for t in (key, value))  # type: ignore[assignment]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """One new token a row: query (R, heads, 1, size), key and value (R, kv heads, 1, size) -> (R, 1, heads, size)."""
        rows, heads, _, size = query.shape
        kv = key.shape[1]
        keys, values = self._append(layer, key, value)
        shared_keys, shared_values = self._shared[layer]
        query = (query * (size**-0.5 if scaling is None else scaling)).view(rows, kv, heads // kv, size)
        to_shared = self._gathered(self._spread(query) @ shared_keys.transpose(-1, -2))
        scores = torch.cat([to_shared, query @ keys.transpose(-1, -2)], dim=-1).float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores + self._mask(window)[:, None, None], dim=-1).to(value.dtype)
        longest = shared_keys.shape[2]
        out = weights[..., longest:] @ values
        out += self._gathered(self._spread(weights[..., :longest]) @ shared_values)
        return out.view(rows, 1, heads, -1)

    def advance(self) -> None:
        """The new token of each row has passed all layers."""
        self._written += 1
        self._masks.clear()

    def select(self, rows: Tensor) -> None:
        """Keep these rows only, and the prompts that they belong to."""
        prompts, self._prompt_of = self._prompt_of[rows].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        self._slot_of = self._slot_of[rows]
        self._own = {layer: (k[rows], v[rows]) for layer, (k, v) in self._own.items()}
        if len(prompts) < len(self._lengths):
            self._lengths = self._lengths[prompts]
            longest = int(self._lengths.max())
            self._shared = {
                layer: (k[prompts, :, :longest], v[prompts, :, :longest]) for layer, (k, v) in self._shared.items()
            }
        self._masks.clear()

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values that the rows have of their own, with the new ones."""
        if self._written % ROOM == 0:
            room = [t.new_empty(*t.shape[:2], ROOM, t.shape[-1]) for t in (key, value)]
            held = self._own.get(layer)
            more = room if held is None else [torch.cat(pair, dim=2) for pair in zip(held, room, strict=True)]
            self._own[layer] = (more[0], more[1])
        keys, values = self._own[layer]
        keys[:, :, self._written], values[:, :, self._written] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, : self._written + 1], values[:, :, : self._written + 1]

    def _spread(self, states: Tensor) -> Tensor:
        """(R, kv, groups, n) of rows -> (P, kv, S groups, n) of prompts, zeros where a row is gone."""
        _, kv, groups, width = states.shape
        out = states.new_zeros(len(self._lengths), self._num_slots, kv, groups, width)
        out[self._prompt_of, self._slot_of] = states
        return out.transpose(1, 2).reshape(len(self._lengths), kv, -1, width)

    def _gathered(self, states: Tensor) -> Tensor:
        """The way back: (P, kv, S groups, n) -> (R, kv, groups, n)."""
        prompts, kv, _, width = states.shape
        by_slot = states.view(prompts, kv, self._num_slots, -1, width).transpose(1, 2)
        return by_slot[self._prompt_of, self._slot_of]

    def _mask(self, window: int | None) -> Tensor:
        """(R, longest prompt + own tokens) additive, float32: what a row's new token does not see."""
        if window not in self._masks:
            shared = self._shared_positions()
            lengths = self._lengths[self._prompt_of][:, None]
            own = lengths + torch.arange(self._written + 1, device=lengths.device)
            positions = torch.cat([shared.expand(len(lengths), -1), own], dim=1)
            hidden = torch.cat([shared >= lengths, torch.zeros_like(own, dtype=torch.bool)], dim=1)
            if window is not None:
                hidden |= self.positions[:, None] - positions >= window
            self._masks[window] = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return self._masks[window]

    def _shared_positions(self) -> Tensor:
        longest: Any = next(iter(self._shared.values()))[0].shape[2]
        return torch.arange(longest, device=self._lengths.device)[None]
