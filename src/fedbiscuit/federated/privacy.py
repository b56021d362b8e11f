"""What the server lets in: the checks of a reply before any arithmetic, and the bound on what one client can move."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedbiscuit.federated.coding import decoded, scales_fault
from fedbiscuit.types import Reply, Weights, num_bytes

__all__ = ["MAX_EXAMPLES", "MAX_RELATIVE_NORM", "check_reply", "clip_factor", "clip_to_norm", "delta_norm"]

MAX_EXAMPLES = 1_000_000
"""Most comparisons that one reply may claim where the task does not say how many were asked for."""

MAX_RELATIVE_NORM = 1e3
"""A delta longer than this many times (1 + the adapter's own norm) is no training but an accident or an attack."""


def check_reply(
    reply: Reply, template: Weights, max_examples: int = MAX_EXAMPLES, comm_dtype: str = "float32"
) -> str | None:
    """Why this reply to a training task cannot be used, or None.

    ``template`` is the adapter that was handed out, as it travelled (only the tensors that are trained). Cheap checks come
    first: size, names, dtypes, shapes, finite values, norm. A delta of zeros is a good reply: that client had nothing to add.
    """
    delta = reply.delta
    if not isinstance(delta, Mapping):
        return f"delta: expected tensors by name, got {_kind(delta)}"
    return (
        _wrong_count(reply.num_examples, max_examples)
        or _not_tensors(delta)
        or _too_large(delta, template)
        or _wrong_names(delta, template)
        or _wrong_tensors(delta, template)
        or (scales_fault(delta) if comm_dtype == "int8" else None)
        or _wrong_values(decoded(delta, comm_dtype), decoded(template, comm_dtype))
    )


def delta_norm(delta: Weights) -> float:
    """The Euclidean norm over all tensors, in float64; NaN or Inf where a value is."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in delta.values()))


def clip_to_norm(delta: Weights, limit: float) -> Weights:
    """The delta, shortened where its norm is above ``limit``: never longer than that, also after rounding."""
    norm = delta_norm(delta)
    return {
        name: (tensor.detach().to(torch.float64) * clip_factor(norm, limit, tensor.dtype)).to(tensor.dtype)
        for name, tensor in delta.items()
    }


def clip_factor(norm: float, limit: float, dtype: torch.dtype) -> float:
    """What to multiply a delta by so that its norm is at most ``limit``.

    Where it must be shortened, by one rounding step more, so that rounding to ``dtype`` cannot lift it above again.
    """
    return 1.0 if norm <= limit else limit / norm * (1.0 - torch.finfo(dtype).eps)


def _wrong_count(count: object, limit: int) -> str | None:
    if isinstance(count, bool) or not isinstance(count, int):
        return f"num_examples: expected a whole number, got {_kind(count)}"
    if not 0 <= count <= limit:
        return f"num_examples: {count} is outside 0..{limit}"
    return None


def _not_tensors(delta: Weights) -> str | None:
    for name, tensor in delta.items():
        if not isinstance(name, str):
            return f"delta: expected names of tensors, got {_kind(name)}"
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return f"{_short(name)}: expected a dense tensor, got {_kind(tensor)}"
    return None


def _too_large(delta: Weights, template: Weights) -> str | None:
    """A flood is not even looked at; the room beyond the adapter's own size lets the checks below name small mistakes."""
    size, limit = num_bytes(delta), 4 * num_bytes(template) + 2**20
    return f"{size} bytes of tensors where at most {limit} are taken" if size > limit else None


def _wrong_names(delta: Weights, template: Weights) -> str | None:
    if unknown := sorted(delta.keys() - template.keys()):
        return f"{_short(unknown[0])}: unknown tensor ({len(unknown)} unknown in all)"
    if missing := sorted(template.keys() - delta.keys()):
        return f"{missing[0]}: tensor is missing ({len(missing)} missing in all)"
    return None


def _wrong_tensors(delta: Weights, template: Weights) -> str | None:
    for name, expected in template.items():
        if delta[name].dtype != expected.dtype:
            return f"{name}: dtype {delta[name].dtype} where {expected.dtype} is needed"
    for name, expected in template.items():
        if delta[name].shape != expected.shape:
            return f"{name}: shape {tuple(delta[name].shape)} where {tuple(expected.shape)} is needed"
    return None


def _wrong_values(delta: Weights, template: Weights) -> str | None:
    norm, limit = delta_norm(delta), MAX_RELATIVE_NORM * (1.0 + delta_norm(template))
    if norm <= limit:  # false for NaN, too: so all values are finite
        return None
    for name, tensor in delta.items():
        bad = (~torch.isfinite(tensor)).flatten().nonzero()
        if len(bad):
            return f"{name}: {len(bad)} non-finite values, first at {int(bad[0])}"
    return f"delta has norm {norm:.3g} where at most {limit:.3g} is taken"


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _short(name: str) -> str:
    """A name that a client chose, fit for a message: escaped and not longer than a line."""
    return ascii(name)[1:-1][:100]
