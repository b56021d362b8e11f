"""Bytes in Flower's messages. Apart from ``flower.py`` because it is loaded for every message at a site, without torch."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedbiscuit.backends.sockets import MAX_BYTES
from fedbiscuit.types import FederationError

__all__ = ["failure_of", "message_bytes", "record_of"]

BYTES = "fedbiscuit.bytes"
"""How the array in a message is written: its data as they are. numpy's way has a header that can announce any size, and
opens archives.
"""


def record_of(data: bytes) -> RecordDict:
    """Bytes as the content of a message: one array, because many small ones are slow."""
    return RecordDict({"data": ArrayRecord({"bytes": Array("uint8", (len(data),), BYTES, data)})})


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
    array = record["bytes"]
    if array.stype != BYTES:
        raise FederationError("message: not one of ours; do both sides run the same version?")
    if len(array.data) > MAX_BYTES:
        raise FederationError(f"message: {len(array.data)} bytes; at most {MAX_BYTES} are read")
    return array.data


def failure_of(why: str) -> RecordDict:
    """The content of a message that says why there are no bytes."""
    return RecordDict({"data": ConfigRecord({"error": why})})
