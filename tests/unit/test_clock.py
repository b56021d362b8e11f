"""Whether a site's clock is that of the server, told by the server's own answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from fedbiscuit.deployment.clock import clock_line, seconds_ahead


class Handler(BaseHTTPRequestHandler):
    behind: ClassVar[float] = 0.0

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() - self.behind, usegmt=True)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("behind", [0, 40, -400])
def test_fault_78_a_servers_clock_is_compared_with_this_ones(address, monkeypatch, behind):
    monkeypatch.setattr(Handler, "behind", behind)
    found = seconds_ahead(address, None)
    assert found is not None
    assert abs(found - behind) <= 5, "a busy machine takes its time to answer"


def test_fault_78_a_server_that_is_not_there_has_no_clock():
    assert seconds_ahead("127.0.0.1:1", None) is None


def test_fault_78_what_flower_refuses_is_said_with_what_to_do():
    assert clock_line(1) == "as the server's"
    assert clock_line(None) == "cannot be compared with the server's: it does not answer"
    assert clock_line(4) == "4 s ahead of the server's"
    assert clock_line(-200) == "200 s behind the server's"
    for refused in (7, -301):
        told = clock_line(refused)
        assert "so the server refuses this site (it may be 5 s ahead or 300 s behind)" in told
        assert "timedatectl set-ntp true" in told
