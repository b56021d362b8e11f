"""The search that says that no text left a site finds texts that are there."""

from __future__ import annotations

import base64
import gzip
import json
import zlib

import pytest
from tests.recording import bodies, holds

TEXT = "Was hätte sie sonst sagen sollen, fragte er 42 Mal?"
NOISE = bytes(range(256)) * 40


@pytest.mark.parametrize(
    "packed",
    [
        TEXT.encode(),
        TEXT.encode("utf-16-le"),
        json.dumps({"prompt": TEXT}).encode(),
        base64.b64encode(b"x" + TEXT.encode() + b"yz"),
        base64.b64encode(b"xy" + TEXT.encode() + b"z"),
        base64.b64encode(TEXT.encode()),
        zlib.compress(TEXT.encode()),
        zlib.compress(TEXT.encode() * 30, 1),
        gzip.compress(json.dumps(TEXT).encode()),
    ],
)
def test_a_text_is_found_in_every_form(packed: bytes) -> None:
    assert holds(NOISE + packed + NOISE, {TEXT, "another one"}) == {TEXT}
    assert holds(NOISE, {TEXT}) == set()


def test_a_text_that_chunks_cut_is_found_and_each_request_has_its_body() -> None:
    packed = gzip.compress(TEXT.encode())
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (packed[:9], packed[9:]))
    sent = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    sent += b"POST /b HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc" + b"GET /c HTTP/1.1\r\nHost: x\r\n\r\n"
    assert holds(sent, {TEXT}) == set()
    assert list(bodies(sent)) == [packed, b"abc", b""]
    assert holds(b"".join(bodies(sent)), {TEXT}) == {TEXT}
