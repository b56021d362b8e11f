"""What a site sends: a relay that ends TLS as the server would, hands on what it reads, and keeps it; and a search in such bytes.

HTTP may cut a message into chunks, and a program may compress, escape or encode a text before it sends it; ``bodies`` and ``holds``
look through all of these, and ``tests/unit/test_recording.py`` shows it with texts that are there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import ssl
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Recorder", "bodies", "holds"]

MOST = 1 << 26
"""Bytes that one compressed part may become."""


class Recorder:
    """A relay on loopback between sites and their server; ``sent`` has the bytes of each connection, without TLS."""

    def __init__(self, server: int, authority: Path, certificate: Path, key: Path) -> None:
        self.sent: list[bytearray] = []
        self._server, self._upwards = server, ssl.create_default_context(cafile=str(authority))
        self._downwards = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._downwards.load_cert_chain(certificate, key)

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """The port to which sites go."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            opening = asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=self._downwards)
            listening = asyncio.run_coroutine_threadsafe(opening, loop).result(60)
            yield int(listening.sockets[0].getsockname()[1])
            loop.call_soon_threadsafe(listening.close)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(60)

    async def _relay(self, site: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        kept = bytearray()
        self.sent.append(kept)
        with contextlib.suppress(OSError):
            server, to_server = await asyncio.open_connection(
                "127.0.0.1", self._server, ssl=self._upwards, server_hostname="localhost"
            )
            await asyncio.gather(_copy(site, to_server, kept), _copy(server, to_site, bytearray()))
        to_site.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            kept += data
            sink.write(data)
            await sink.drain()
    sink.close()


def bodies(sent: bytes) -> Iterator[bytes]:
    """The bodies of the HTTP/1.1 requests of a connection, with chunks put together; the last may be cut where it ended."""
    stream = io.BytesIO(sent)
    while request := stream.readline():
        assert request.endswith(b" HTTP/1.1\r\n"), request[:80]
        told = http.client.parse_headers(stream)
        if "chunked" in told.get("Transfer-Encoding", ""):
            parts = []
            while size := int(stream.readline().split(b";")[0] or b"0", 16):
                parts.append(stream.read(size))
                stream.readline()
            stream.readline()
            yield b"".join(parts)
        else:
            yield stream.read(int(told.get("Content-Length", 0)))


def _forms(text: str) -> set[bytes]:
    """How a text may stand in bytes: UTF-8, UTF-16, inside JSON, and in base64 at each of its three offsets."""
    plain = text.encode()
    found = {plain, text.encode("utf-16-le"), json.dumps(text)[1:-1].encode()}
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + plain)
        found.add(encoded[-(-offset * 8 // 6) : len(encoded) - 4])
    return found


def _layers(data: bytes) -> Iterator[bytes]:
    """The bytes themselves, and whatever in them is a stream of zlib or gzip."""
    yield data
    view = memoryview(data)
    for at in range(len(data) - 1):
        first, second = data[at], data[at + 1]
        is_zlib = first & 0x0F == 8 and first >> 4 <= 7 and (first << 8 | second) % 31 == 0
        if is_zlib or (first, second) == (0x1F, 0x8B):
            with contextlib.suppress(zlib.error):
                opened = zlib.decompressobj(wbits=47).decompress(view[at:], MOST)
                if len(opened) > 8:
                    yield opened


def holds(data: bytes, texts: set[str]) -> set[str]:
    """Those of the texts that are in the bytes, in any form and under one layer of compression."""
    found: set[str] = set()
    for layer in _layers(data):
        found |= {text for text in texts - found if any(form in layer for form in _forms(text))}
    return found
