"""Prefix trees: sequences that share prefixes, packed in one row, each shared token computed once.

Preference learning is full of shared prefixes: both orders of a comparison share the prompt, all pairs of one prompt share
it, chosen and rejected share it. ``pack`` finds what a set of token sequences shares and lays the resulting forest out
depth first in a single row. Position numbers restart at every branch, and a token attends to itself, to what stands before
it in its own node, and to all ancestors. So the model computes exactly what it would for the separate sequences, at the
cost of the distinct tokens.

With the depth-first layout all of attention is one vector: token ``j`` is visible to token ``i`` if and only if
``j <= i < reach[j]``, where ``reach[j]`` is the end of the subtree of the node of ``j``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedbiscuit.models.decoding import Cache

__all__ = ["ATTENTION", "SIDE_BY_SIDE", "Forest", "pack", "tree_attention"]

ATTENTION = "fedbiscuit_tree"
"""The name under which ``tree_attention`` is registered with transformers."""

MIN_SHARED = 8
"""A common prefix shorter than this is computed twice: a node of its own costs more than a few tokens."""

MAX_DENSE = 192
"""A subtree of at most so many tokens is one attention call with a mask; a larger one is a call per node."""

SIDE_BY_SIDE = 1024
"""On a GPU, where a call costs more than padding does: subtrees of at most so many tokens, with their ancestors, are computed
side by side in one call."""


Spans = tuple[tuple[int, int], ...]
"""(start, stop) places in the row, in order."""


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens ``start..stop`` of the row; its subtree ends at ``reach``."""

    start: int
    stop: int
    reach: int
    ancestors: Spans
    """The nodes above it, from the root down."""


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call: queries ``start..stop`` see ``spans`` and then themselves."""

    start: int
    stop: int
    spans: Spans
    is_chain: bool
    """Whether they see each other causally and nothing else, as in a node at the root."""

    @property
    def num_keys(self) -> int:
        """How many places are seen."""
        return sum(b - a for a, b in (*self.spans, (self.start, self.stop)))


@dataclass(frozen=True, slots=True)
class SideBySide:
    """B calls as one padded batch: (B, Q) places in the row of the queries, (B, K) of the keys, and which are not padding.

    order: (T,) where among the B Q queries each token of the row is.
    """

    queries: Tensor
    keys: Tensor
    real_queries: Tensor
    real_keys: Tensor
    order: Tensor


@dataclass
class Forest:
    """Packed sequences. ``T`` tokens in the row, ``n`` sequences.

    tokens, positions, reach: (T,) int64. ``paths[i]`` holds the places in the row of the tokens of sequence ``i``, in
    order; ``last`` (n,) the place of each sequence's last token. Attention is computed call by call, or with
    ``side_by_side`` in one.
    """

    tokens: Tensor
    positions: Tensor
    reach: Tensor
    last: Tensor
    paths: list[np.ndarray]
    calls: list[Call]
    side_by_side: SideBySide | None = None
    _masks: dict[tuple[Any, ...], list[Tensor | None]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """An additive (queries, keys) mask for each call, or None where plain causal attention is meant.

        ``window``: tokens further back than this many positions are hidden (sliding-window layers).
        """
        key = (window, dtype)
        if key not in self._masks:
            if self.side_by_side:
                self._masks[key] = [self._wide_mask(self.side_by_side, window, dtype)]
            else:
                self._masks[key] = [self._mask(call, window, dtype) for call in self.calls]
        return self._masks[key]

    def _wide_mask(self, batch: SideBySide, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, Q, K). Nobody sees padding; padding sees everything, so that no softmax is empty."""
        sees, seen = batch.queries[:, :, None], batch.keys[:, None, :]
        visible = (seen <= sees) & (sees < self.reach[batch.keys][:, None, :]) & batch.real_keys[:, None, :]
        if window is not None:
            visible &= self.positions[batch.queries][:, :, None] - self.positions[batch.keys][:, None, :] < window
        visible |= ~batch.real_queries[:, :, None]
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, -torch.inf)[:, None]

    def _mask(self, call: Call, window: int | None, dtype: torch.dtype) -> Tensor | None:
        device = self.tokens.device
        queries = torch.arange(call.start, call.stop, device=device)
        keys = torch.cat([torch.arange(a, b, device=device) for a, b in (*call.spans, (call.start, call.stop))])
        visible = (keys[None] <= queries[:, None]) & (queries[:, None] < self.reach[keys][None])
        if window is not None:
            visible &= self.positions[queries][:, None] - self.positions[keys][None] < window
        if call.is_chain and (window is None or call.stop - call.start <= window):
            return None
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


def pack(
    sequences: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    min_shared: int = MIN_SHARED,
    side_by_side: int = 0,
) -> Forest:
    """Lay sequences out as a forest of shared prefixes. Equal sequences share everything; none may be empty.

    ``side_by_side``: where no subtree with its ancestors has more tokens than this, attention is one padded call.
    """
    if not sequences or any(len(sequence) == 0 for sequence in sequences):
        raise ValueError("pack needs at least one sequence, and no empty ones")
    distinct = sorted({tuple(sequence) for sequence in sequences})
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in distinct]
    shared = [_common_prefix(a, b) for a, b in itertools.pairwise(arrays)]
    nodes: list[Node] = []
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    paths: dict[tuple[int, ...], np.ndarray] = {}

    def branch(first: int, stop: int, depth: int, start: int, ancestors: Spans) -> int:
        """Lay ``distinct[first:stop]``, computed up to ``depth``, from place ``start``; the place behind the last one."""
        while first < stop:
            close = first + 1
            while close < stop and shared[close - 1] >= depth + min_shared:
                close += 1
            start = grow(first, close, depth, start, ancestors)
            first = close
        return start

    def grow(first: int, stop: int, depth: int, start: int, ancestors: Spans) -> int:
        """One node with all that ``distinct[first:stop]`` share after ``depth``, then its branches."""
        end = min(shared[first : stop - 1], default=len(arrays[first]))
        here = start + end - depth
        tokens.append(arrays[first][depth:end])
        positions.append(np.arange(depth, end))
        index = len(nodes)
        nodes.append(Node(start, here, here, ancestors))
        lineage = (*ancestors, (start, here))
        if len(arrays[first]) == end:
            paths[distinct[first]] = np.concatenate([np.arange(a, b) for a, b in lineage])
            first += 1
        reach = branch(first, stop, end, here, lineage)
        nodes[index] = Node(start, here, reach, ancestors)
        return reach

    branch(0, len(distinct), 0, 0, ())
    calls, batch = _calls(nodes, MAX_DENSE), None
    wide = _calls(nodes, side_by_side) if side_by_side else []
    if wide and max(call.num_keys for call in wide) <= side_by_side:
        calls, batch = wide, _side_by_side(wide, device)
    ordered = [paths[tuple(sequence)] for sequence in sequences]
    reach = np.concatenate([np.full(node.stop - node.start, node.reach) for node in nodes])
    return Forest(
        tokens=torch.from_numpy(np.concatenate(tokens)).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        reach=torch.from_numpy(reach).to(device),
        last=torch.tensor([int(path[-1]) for path in ordered], device=device),
        paths=ordered,
        calls=calls,
        side_by_side=batch,
    )


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Forest | None = None,
    cache: Cache | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed row: query (1, heads, T, size) -> (1, T, heads, size).

    Has the signature of transformers' attention functions; ``forest`` comes through the keyword arguments of the model. So
    does ``cache``: with a forest it takes the keys and values of the row, without one it holds what a next token sees. On a CPU
    bfloat16 is attended to in float32.
    """
    layer: Any = getattr(module, "layer_idx", None)
    if cache is not None and forest is not None:
        cache.keep(layer, key, value)
    if cache is not None and forest is None:
        return cache.attend(layer, query, key, value, scaling, sliding_window, softcap), None
    if forest is None:
        raise RuntimeError(
            f"{ATTENTION} works on packed rows: pass forest=pack(...), or switch to 'sdpa' for padded batches"
        )
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu":  # its kernels are slow on short branches in bfloat16
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (query.device.type != "cpu" or softcap is not None):  # a CPU's kernel shares keys by itself
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    masks = forest.masks(sliding_window, query.dtype)
    dropout = dropout if module.training else 0.0
    if forest.side_by_side:
        batch = forest.side_by_side
        rows = query[0][:, batch.queries], key[0][:, batch.keys], value[0][:, batch.keys]
        q, k, v = (t.transpose(0, 1) for t in rows)
        out = _attend(q, k, v, masks[0], scaling, dropout, softcap).transpose(1, 2)
        return out.reshape(-1, *out.shape[2:])[batch.order][None].to(dtype), None
    spans = [(*call.spans, (call.start, call.stop)) for call in forest.calls]
    queries = torch.split(query, [call.stop - call.start for call in forest.calls], dim=2)  # they follow each other
    keys, values = _Gather.apply(key, spans), _Gather.apply(value, spans)  # type: ignore[no-untyped-call]
    outputs = [
        _attend(q, k, v, mask, scaling, dropout, softcap)
        for q, k, v, mask in zip(queries, keys, values, masks, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Plain attention with an additive mask; None means causal. Without ``softcap`` heads may share keys."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5) / softcap) * softcap
    if mask is None:
        size = query.shape[2]
        mask = torch.full((size, size), -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    weights = torch.softmax((scores + mask).float(), dim=-1).to(value.dtype)
    return F.dropout(weights, dropout) @ value


class _Gather(torch.autograd.Function):
    """What each call sees of (1, heads, T, size) states: the places of its spans, a view where they follow each other.

    The gradients come back into one tensor, span by span: plain slices would each bring a tensor as long as the row, mostly
    zeros, to be added up.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, calls: Sequence[Spans]) -> tuple[Tensor, ...]:
        ctx.calls, ctx.shape, ctx.stride = calls, states.shape, states.stride()
        return tuple(
            states[:, :, spans[0][0] : spans[-1][1]]
            if all(a[1] == b[0] for a, b in itertools.pairwise(spans))
            else torch.cat([states[:, :, a:b] for a, b in spans], dim=2)
            for spans in calls
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_empty_strided(ctx.shape, ctx.stride).zero_()
        for spans, gradient in zip(ctx.calls, gradients, strict=True):
            here = 0
            for a, b in spans:
                total[:, :, a:b] += gradient[:, :, here : here + b - a]
                here += b - a
        return total, None


def _calls(nodes: Sequence[Node], max_dense: int) -> list[Call]:
    """A subtree of at most ``max_dense`` tokens is one masked call; else its root is one call and its branches follow."""
    calls: list[Call] = []
    covered = 0
    for node in nodes:
        if node.start < covered:
            continue
        stop = node.reach if node.reach - node.start <= max_dense else node.stop
        calls.append(Call(node.start, stop, node.ancestors, stop == node.stop and not node.ancestors))
        covered = stop
    return calls


def _side_by_side(calls: Sequence[Call], device: torch.device | str) -> SideBySide:
    """The padding stands for places all over the row: gradients that come back to one place would be added one by one."""
    num_places = calls[-1].stop
    queries = [np.arange(call.start, call.stop) for call in calls]
    keys = [np.concatenate([np.arange(a, b) for a, b in (*c.spans, (c.start, c.stop))]) for c in calls]

    def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        size = -(-max(map(len, rows)) // 8) * 8  # what the kernels for masks want
        real = np.arange(size)[None] < np.array([[len(row)] for row in rows])
        places = np.arange(real.size).reshape(real.shape) % num_places
        places[real] = np.concatenate(rows)
        return places, real

    (q, real_q), (k, real_k) = padded(queries), padded(keys)
    return SideBySide(*(torch.from_numpy(t).to(device) for t in (q, k, real_q, real_k, np.flatnonzero(real_q))))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading items two arrays share."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size
