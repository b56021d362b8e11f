"""A federation as its users start it: server, three sites with keys, a run; real processes of Flower, over TLS, on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.flow.test_run import settings, without_traffic, write_world
from tests.ports import free_port
from tests.recording import Recorder, bodies, holds

from fedbiscuit import pipeline
from fedbiscuit.config import dump_config
from fedbiscuit.data.comparisons import COMPARISONS
from fedbiscuit.station.looking import what_the_site_saw
from fedbiscuit.station.nouns import Pair
from fedbiscuit.station.queue import Asking
from fedbiscuit.station.station import Station
from fedbiscuit.station.store import Store

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="SKIPPED: flwr is not installed, so no federation over Flower is run (pip install 'fedbiscuit[flower]')",
)

CHANGES = ("evaluation.compare_global=false", "selectors.rounds=3", "selectors.price_steps=2")
COMMAND = [sys.executable, "-W", "ignore", "-m", "fedbiscuit"]


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


def judged_at_a_station(folder: Path, person: str) -> list[dict]:
    """The comparisons that a person has made at the preference station."""
    with Store.open(folder, seed=3) as store:
        store.add_pairs([Pair.of(f"what of {i}?", f"{i} it is x", f"{i} it is y") for i in range(12)])
        station = Station(store, person, Asking(repeat_every=4))
        while (shown := station.present()) is not None:
            station.judge(shown.token, int(shown.second.endswith("x")), 1.0)
        station.close()
    return [json.loads(line) for line in (folder / COMPARISONS).read_text().splitlines()]


def test_three_sites_with_keys_give_the_bits_of_one_process_and_no_text_is_in_the_bytes_that_they_send(
    tmp_path, tiny_model
):
    station, others = tmp_path / "station", tmp_path / "others.jsonl"
    rows = [json.loads(line) for line in write_world(tmp_path / "world.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["client"] != "person-0"]
    for row in rows:  # answers that are found nowhere by chance
        row |= {key: f"{row[key]}, as {row['client']} would say" for key in ("output_a", "output_b")}
    others.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = judged_at_a_station(station, "person-0")
    changes = (*CHANGES, f"data.path=[{station}, {others}]")
    here = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, name="here"))
    config = tmp_path / "there.yaml"
    config.write_text(dump_config(settings(tmp_path, tiny_model, *changes, name="there")))
    deploy, port = tmp_path / "deploy", free_port()
    fedbiscuit("server", "init", deploy, "--port", port)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(tmp_path / "server.log", "server", "start", deploy, until=f"127.0.0.1:{port}"))
        recorder = Recorder(port, deploy / "ca.crt", deploy / "server.crt", deploy / "server.key")
        published = stack.enter_context(recorder.listening())
        for k in range(3):
            site, data = tmp_path / f"site-{k}", tmp_path / f"site-{k}.jsonl"
            held = [row for row in rows if int(row["client"].split("-")[1]) % 3 == k]
            data.write_text("".join(json.dumps(row) + "\n" for row in held))
            fedbiscuit("client", "init", site)
            key = tmp_path / f"site-{k}.pub"
            key.write_bytes((site / "key.pub").read_bytes())
            fedbiscuit("server", "register", deploy, key, "--clients", f"person-{k},person-{k + 3}")
            theirs = [station, data] if k == 0 else [data]
            words = ("--data", *theirs, "--server", f"localhost:{published}", "--ca", deploy / "ca.crt")
            stack.enter_context(running(tmp_path / f"site-{k}.log", "client", "start", site, *words, until="connected"))
        told = fedbiscuit("train", config, "--backend", "flower", "--deploy", deploy, "--timeout", 300)
        assert "selectors 3/3" in told
        status = fedbiscuit("client", "status", tmp_path / "site-0")
    there = tmp_path / "runs" / "there"
    assert without_traffic(here) == without_traffic(there)
    assert "there" in status
    check_that_no_text_left(recorder.sent, [*rows, *judged], there)
    seen = what_the_site_saw(tmp_path / "site-0", "person-0")
    assert seen is not None
    assert seen.run == "there"
    assert seen.num_groups == 2
    asked = [row["round"] for row in metrics(there) if row["phase"] == "federated" and "person-0" in row["cohort"]]
    assert [one.round for one in seen.rounds] == asked


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_that_no_text_left(sent: list[bytearray], rows: list[dict], run: Path) -> None:
    """Neither plain nor compressed; and what is looked through is all that the sites sent: every reply is in it."""
    texts = {row[key] for row in rows for key in ("prompt", "output_a", "output_b")}
    told = b"\n".join(body for connection in sent for body in bodies(bytes(connection)))
    assert sum(row["bytes_up"] for row in metrics(run)) <= len(told) <= sum(map(len, sent))
    assert holds(told, {"person-0", "person-5"}) == {"person-0", "person-5"}
    assert holds(told, texts) == set()
    assert holds(b"".join(sent), texts) == set(), "in a header"
