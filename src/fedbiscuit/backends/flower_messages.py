"""Bytes in Flower's messages. Apart from ``flower.py`` because it is loaded for every message at a site, without torch."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedbiscuit.types import FederationError

__all__ = ["failure_of", "message_bytes", "record_of"]


def record_of(data: bytes) -> RecordDict:
    """Bytes as the content of a message: one array, because many small ones are slow."""
    return RecordDict({"data": ArrayRecord({"bytes": Array(np.frombuffer(data, np.uint8))})})


def message_bytes(message: Message) -> bytes:
    """The bytes of a message; ``FederationError`` says what its sender had to say instead."""
    if message.has_error():
        error = message.error
        raise FederationError(f"Flower could not deliver: {error.reason or 'no reason'} (code {error.code})")
    record = message.content.get("data")
    if isinstance(record, ConfigRecord):
        raise FederationError(str(record.get("error", "no reason"))[:500])
    if not isinstance(record, ArrayRecord) or "bytes" not in record:
        raise FederationError("message: not one of ours; do both sides run the same version?")
    return record["bytes"].numpy().astype(np.uint8, copy=False).tobytes()


def failure_of(why: str) -> RecordDict:
    """The content of a message that says why there are no bytes."""
    return RecordDict({"data": ConfigRecord({"error": why})})
