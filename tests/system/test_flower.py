"""A federation as its users start it: server, three sites with keys, a run; real processes of Flower, over TLS, on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.flow.test_run import settings, without_traffic, write_world

from fedbiscuit import pipeline
from fedbiscuit.config import dump_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="SKIPPED: flwr is not installed, so no federation over Flower is run (pip install 'fedbiscuit[flower]')",
)

CHANGES = ("evaluation.compare_global=false", "selectors.rounds=4")
COMMAND = [sys.executable, "-W", "ignore", "-m", "fedbiscuit"]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fedbiscuit(*words: object) -> str:
    """A command that must succeed."""
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def running(log: Path, *words: object, until: str) -> Iterator[None]:
    """A command in the background from the line of its output that says ``until``; ended by SIGTERM."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)], stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while until not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def test_three_sites_with_keys_give_the_bits_of_one_process(tmp_path, tiny_model):
    rows = [json.loads(line) for line in write_world(tmp_path / "world.jsonl").read_text().splitlines()]
    here = pipeline.train_selectors(settings(tmp_path, tiny_model, *CHANGES, name="here"))
    config = tmp_path / "there.yaml"
    config.write_text(dump_config(settings(tmp_path, tiny_model, *CHANGES, name="there")))
    deploy, port = tmp_path / "deploy", free_port()
    fedbiscuit("server", "init", deploy, "--port", port)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(tmp_path / "server.log", "server", "start", deploy, until=f"127.0.0.1:{port}"))
        for k in range(3):
            site, data = tmp_path / f"site-{k}", tmp_path / f"site-{k}.jsonl"
            held = [row for row in rows if int(row["client"].split("-")[1]) % 3 == k]
            data.write_text("".join(json.dumps(row) + "\n" for row in held))
            fedbiscuit("client", "init", site)
            with (site / "site.yaml").open("a") as file:
                file.write("\n")
            key = tmp_path / f"site-{k}.pub"
            key.write_bytes((site / "key.pub").read_bytes())
            fedbiscuit("server", "register", deploy, key, "--clients", f"person-{k},person-{k + 3}")
            words = (
                "client",
                "start",
                site,
                "--data",
                data,
                "--server",
                f"localhost:{port}",
                "--ca",
                deploy / "ca.crt",
            )
            stack.enter_context(running(tmp_path / f"site-{k}.log", *words, until="connected"))
        told = fedbiscuit("train", config, "--backend", "flower", "--deploy", deploy, "--timeout", 300)
        assert "selectors 4/4" in told
        status = fedbiscuit("client", "status", tmp_path / "site-0")
    there = tmp_path / "runs" / "there"
    assert without_traffic(here) == without_traffic(there)
    assert "there" in status
