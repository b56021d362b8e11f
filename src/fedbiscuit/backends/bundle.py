"""One message to a site and one back: many tasks, many replies, and every adapter once.

A site keeps the adapters that it has seen, by a digest of their bytes, so one that has not changed is not sent again. A
message is a row of parts: a header as JSON, then blobs of ``wire.py``. All of it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedbiscuit.backends.wire import MAX_BYTES, pack, pack_reply, pack_task, unpack, unpack_reply, unpack_task
from fedbiscuit.rundir.values import strict_json
from fedbiscuit.types import FederationError, Reply, Task, Weights

__all__ = [
    "Answer",
    "Order",
    "digest_of",
    "pack_answer",
    "pack_order",
    "packed_adapter",
    "unpack_answer",
    "unpack_order",
]

MAX_PARTS = 100_000
MAX_HEADER = 2**24
MAX_NAME = 200
MAX_TERMS = 2**20
MAX_CLIENT = 1000
DIGEST = re.compile("[0-9a-f]{64}")
ORDER = {"run", "terms", "adapters", "wanted"}
ANSWER = {"clients", "lacks", "error", "order"}


@dataclass(frozen=True, slots=True)
class Order:
    """Server to site. terms: the settings of the run, as YAML. tasks: without their adapters, which ``wanted`` names for each
    by adapter number and digest; ``adapters`` are those that travel with it, by digest. No tasks: who is there?
    """

    run: str
    terms: str
    tasks: Sequence[Task] = ()
    wanted: Sequence[Mapping[int, str]] = ()
    adapters: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """Site to server. clients: who can be asked there. lacks: digests of adapters to send again, in which case nothing was
    done. error: why the site takes no part in this run; empty where it does. order: digest of the order that is answered, so
    that an old answer is not taken for a new one. A reply that could not be read has no client; its place says whose it is.
    """

    clients: Sequence[str] = ()
    replies: Sequence[Reply] = ()
    lacks: Sequence[str] = ()
    error: str = ""
    order: str = ""


def digest_of(data: bytes) -> str:
    """What a part of a message is called: an adapter, or the order that an answer answers."""
    return hashlib.sha256(data).hexdigest()


def packed_adapter(weights: Weights) -> tuple[str, bytes]:
    """An adapter as it travels, and its digest."""
    data = pack({}, weights)
    return digest_of(data), data


def opened_adapter(digest: str, data: bytes) -> Weights:
    """The adapter in a part of a message; ``FederationError`` where it is not the one that was named."""
    if digest_of(data) != digest:
        raise FederationError(f"message: an adapter is not the one that it is called ({digest[:12]})")
    return unpack(data, set())[1]


def pack_order(order: Order) -> bytes:
    """An order as bytes."""
    header = {
        "run": order.run,
        "terms": order.terms,
        "adapters": sorted(order.adapters),
        "wanted": [{str(u): digest for u, digest in wanted.items()} for wanted in order.wanted],
    }
    tasks = [pack_task(replace(task, adapters={})) for task in order.tasks]
    return _joined([_json(header), *(order.adapters[digest] for digest in sorted(order.adapters)), *tasks])


def unpack_order(data: bytes) -> Order:
    """The order in a message; ``FederationError`` says what is wrong with it."""
    header, parts = _opened(data, ORDER)
    wanted = [_numbers(one) for one in _list(header, "wanted")]
    digests = [_digest(one, "adapters") for one in _list(header, "adapters")]
    if len(parts) != len(digests) + len(wanted) or len(set(digests)) < len(digests):
        raise FederationError(f"message: {len(parts)} parts for {len(digests)} adapters and {len(wanted)} tasks")
    if extra := set(digests) - {digest for one in wanted for digest in one.values()}:
        raise FederationError(f"message: no task wants adapter {min(extra)[:12]}")
    tasks = [unpack_task(part) for part in parts[len(digests) :]]
    if any(task.adapters for task in tasks):
        raise FederationError("message: a task brings adapters of its own")
    adapters = dict(zip(digests, parts, strict=False))
    run, terms = _text(header["run"], "run", MAX_NAME), _text(header["terms"], "terms", MAX_TERMS)
    return Order(run, terms, tasks, wanted, adapters)


def pack_answer(answer: Answer) -> bytes:
    """An answer as bytes."""
    header = {
        "clients": list(answer.clients),
        "lacks": list(answer.lacks),
        "error": answer.error,
        "order": answer.order,
    }
    return _joined([_json(header), *map(pack_reply, answer.replies)])


def unpack_answer(data: bytes) -> Answer:
    """The answer in a message; ``FederationError`` says what is wrong with it."""
    header, parts = _opened(data, ANSWER)
    clients = [_text(one, "clients", MAX_CLIENT) for one in _list(header, "clients")]
    lacks = [_digest(one, "lacks") for one in _list(header, "lacks")]
    error, order = _text(header["error"], "error"), _text(header["order"], "order", MAX_NAME)
    return Answer(clients, [_reply(part) for part in parts], lacks, error, order)


def _reply(part: bytes) -> Reply:
    """One reply of many: where it cannot be read, only this one is lost."""
    try:
        return unpack_reply(part)
    except FederationError as error:
        return Reply("", ok=False, error=str(error), unreadable=True)


def _joined(parts: Sequence[bytes]) -> bytes:
    """Each part behind its length in eight bytes."""
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(8, "little"), part))


def _opened(data: bytes, keys: set[str]) -> tuple[dict[str, Any], list[bytes]]:
    if len(data) > MAX_BYTES:
        raise FederationError(f"message: {len(data)} bytes; at most {MAX_BYTES} are read")
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        if at + 8 + size > len(data) or len(parts) > MAX_PARTS:
            raise FederationError("message: cut off, or not one of ours")
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    if parts and len(parts[0]) > MAX_HEADER:
        raise FederationError(f"message: a header of {len(parts[0])} bytes; at most {MAX_HEADER} are read")
    try:
        header = strict_json(parts[0])
    except (IndexError, ValueError, RecursionError):
        raise FederationError("message: not one of ours") from None
    if not isinstance(header, dict) or header.keys() != keys:
        raise FederationError("message: its header is not one of ours; do both sides run the same version?")
    return header, parts[1:]


def _json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, allow_nan=False, sort_keys=True).encode()


def _list(header: Mapping[str, Any], key: str) -> list[Any]:
    found = header[key]
    if not isinstance(found, list):
        raise FederationError(f"message: {key}: {found!r:.80} is not a list")
    return found


def _text(value: Any, key: str, longest: int = MAX_TERMS) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise FederationError(f"message: {key}: {value!r:.80} is not a text of at most {longest} characters")
    return value


def _digest(value: Any, key: str) -> str:
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise FederationError(f"message: {key}: {value!r:.80} is not a digest")
    return value


def _numbers(value: Any) -> dict[int, str]:
    if not isinstance(value, dict) or not all(key.isdecimal() and len(key) <= 6 for key in value):
        raise FederationError(f"message: wanted: {value!r:.80} does not name adapters")
    return {int(key): _digest(digest, "wanted") for key, digest in value.items()}
