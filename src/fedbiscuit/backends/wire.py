"""Tasks and replies as bytes: one safetensors blob, whose metadata holds as JSON all that is not a tensor. No pickle.

What comes in is checked before it is used: size, header, names, kinds of values. Whether a delta fits an adapter is for the
server to check (``federated/privacy.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedbiscuit.backends.sockets import MAX_BYTES
from fedbiscuit.rundir.values import strict_json
from fedbiscuit.types import FederationError, LocalTraining, Reply, Task, Weights

__all__ = ["MAX_BYTES", "pack", "pack_reply", "pack_task", "unpack", "unpack_reply", "unpack_task"]

MAX_HEADER = 2**24
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
KEY = "fedbiscuit"
REPLY_KEYS = {"client", "adapter", "num_examples", "seat", "metrics", "ok", "error"}
TASK_KEYS = {"kind", "client", "round", "prices", "local", "consumed", "share_losses", "adapters"}


def pack_task(task: Task) -> bytes:
    """A task with all its adapters."""
    adapters = {str(u): dict(weights) for u, weights in task.adapters.items()}
    header = {
        "kind": task.kind,
        "client": task.client,
        "round": task.round,
        "prices": list(task.prices),
        "local": asdict(task.local) if task.local else None,
        "consumed": task.consumed,
        "share_losses": task.share_losses,
        "adapters": sorted(adapters),
    }
    return pack(header, {f"{u}/{name}": t for u, weights in adapters.items() for name, t in weights.items()})


def pack_reply(reply: Reply) -> bytes:
    """A reply with its delta."""
    header = {key: getattr(reply, key) for key in sorted(REPLY_KEYS)} | {"metrics": dict(reply.metrics)}
    return pack(header | {"has_delta": reply.delta is not None}, dict(reply.delta or {}))


def unpack_task(data: bytes) -> Task:
    """The task in a message; ``FederationError`` says what is wrong with it."""
    header, tensors = unpack(data, TASK_KEYS)
    kind = _one(header, "kind", lambda value: value in ("train", "evaluate", "seat"))
    adapters: dict[int, Weights] = {}
    for name, tensor in tensors.items():
        u, slash, inner = name.partition("/")
        if not slash or not inner or not u.isdecimal() or len(u) > 6:
            raise FederationError(f"message: tensor {name!r:.80} belongs to no adapter")
        adapters.setdefault(int(u), {})[inner] = tensor
    if sorted(map(str, adapters)) != header["adapters"]:
        raise FederationError("message: its adapters are not those that it names")
    prices = _one(header, "prices", lambda value: isinstance(value, list) and all(map(_is_number, value)))
    return Task(
        kind,
        _one(header, "client", _is_text),
        _one(header, "round", _is_count),
        adapters,
        tuple(map(float, prices)),
        _local(header["local"]),
        _one(header, "consumed", _is_count),
        _one(header, "share_losses", lambda value: isinstance(value, bool)),
    )


def unpack_reply(data: bytes) -> Reply:
    """The reply in a message; ``FederationError`` says what is wrong with it."""
    header, tensors = unpack(data, REPLY_KEYS | {"has_delta"})
    has_delta = _one(header, "has_delta", lambda value: isinstance(value, bool))
    if tensors and not has_delta:
        raise FederationError("message: tensors in a reply that has no delta")
    return Reply(
        client=_one(header, "client", _is_text),
        adapter=_one(header, "adapter", _is_count_or_none),
        delta=tensors if has_delta else None,
        num_examples=_one(header, "num_examples", _is_count),
        seat=_one(header, "seat", _is_count_or_none),
        metrics=_one(header, "metrics", lambda value: isinstance(value, dict)),
        ok=_one(header, "ok", lambda value: isinstance(value, bool)),
        error=_one(header, "error", lambda value: isinstance(value, str)),
    )


def pack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """JSON values and tensors as one message."""
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return save(whole, {KEY: json.dumps(header, allow_nan=False, sort_keys=True)})


def unpack(data: bytes, keys: set[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values, of these keys, and the tensors in a message; ``FederationError`` says what is wrong with it."""
    if len(data) > MAX_BYTES:
        raise FederationError(f"message: {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        size = int.from_bytes(data[:8], "little")
        if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {size} bytes in {len(data)}")
        metadata = strict_json(data[8 : 8 + size])["__metadata__"]
        header = strict_json(metadata[KEY].encode())
        tensors = load(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise FederationError(f"message: not one of ours: {error!s:.200}") from None
    if not isinstance(header, dict) or header.keys() != keys:
        raise FederationError("message: its header is not one of ours; do both sides run the same version?")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise FederationError(f"message: {name!r:.80} is {tensor.dtype}, which is not sent")
    return header, tensors


def _local(value: Any) -> LocalTraining | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != LOCAL.keys():
        raise FederationError("message: local: not the settings of a training; do both sides run the same version?")
    for key, good in LOCAL.items():
        if not good(value[key]):
            raise FederationError(f"message: local.{key}: {value[key]!r:.80} is not permitted")
    made: dict[str, Any] = value | {"betas": tuple(value["betas"])}
    return LocalTraining(**made)


def _one(header: Mapping[str, Any], key: str, good: Callable[[Any], bool]) -> Any:
    if not good(header[key]):
        raise FederationError(f"message: {key}: {header[key]!r:.80} is not permitted")
    return header[key]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_count_or_none(value: Any) -> bool:
    return value is None or _is_count(value)


LOCAL: dict[str, Callable[[Any], bool]] = {
    "objective": lambda value: value in ("choice", "sft", "dpo"),
    "steps": _is_count,
    "batch_size": _is_count,
    "grad_accum": _is_count,
    "lr": _is_number,
    "optimizer": lambda value: value in ("adamw", "sgd", "rmsprop"),
    "betas": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
    "weight_decay": _is_number,
    "max_grad_norm": _is_number,
    "dpo_beta": _is_number,
    "lr_schedule": lambda value: value in ("constant", "linear", "cosine"),
    "warmup_steps": _is_count,
}
"""What each setting of a ``LocalTraining`` may hold in a message."""
