"""What dies in a round, and what comes of it: server, three sites and runs as real processes, over TLS, on loopback.

One server and its sites serve all tests. A gate (``tests/faulty_site.py``) holds a site in the middle of a round; who has answered
is taken from ``metrics.jsonl``, and an uninterrupted run in this process with the same answers must end in the same adapters.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.flow.test_run import digests, settings, write_world
from tests.ports import free_port
from tests.system.test_flower import COMMAND, fedbiscuit, pytestmark

from fedbiscuit import pipeline
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.config import Config, dump_config
from fedbiscuit.rundir import atomic_write
from fedbiscuit.types import Reply, Task

__all__ = ["pytestmark"]

FAULTY = Path(__file__).resolve().parent.parent / "faulty_site.py"
PATIENCE = 900.0
SHORT = 30.0
"""Seconds of --timeout where somebody does not answer. Where that is too short for all, the run stops, and is resumed with more."""
CHANGES = ("selectors.num_adapters=1", "selectors.cohort_size=0", "selectors.eval_every=0", "selectors.keep_every=0")
CHANGES += ("evaluation.compare_global=false",)


class Process:
    """A command in the background, and what it says."""

    def __init__(self, log: Path, *words: object) -> None:
        self.log, self.said_before = log, log.stat().st_size if log.exists() else 0
        with log.open("a") as out:
            self.popen = subprocess.Popen(
                [str(word) for word in words], stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_bytes()[self.said_before :].decode()

    def until(self, text: str) -> None:
        until(lambda: text in self.said(), lambda: self.popen.poll() is None, self.said)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(300)


def until(holds: Callable[[], bool], lives: Callable[[], bool], said: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert lives() or holds(), said()
        assert time.monotonic() < end, said()
        time.sleep(0.1)


class Town:
    """A server and three sites with two clients each."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.deploy, self.port = folder, model, folder / "deploy", free_port()
        self.processes: list[Process] = []
        fedbiscuit("server", "init", self.deploy, "--port", self.port)
        self.start_server()
        rows = [json.loads(line) for line in write_world(folder / "world.jsonl").read_text().splitlines()]
        for k in range(3):
            held = [row for row in rows if int(row["client"].split("-")[1]) % 3 == k]
            (folder / f"site-{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
            (folder / f"gate-{k}").mkdir()
            fedbiscuit("client", "init", folder / f"site-{k}")
            key = folder / f"site-{k}.pub"
            key.write_bytes((folder / f"site-{k}" / "key.pub").read_bytes())
            fedbiscuit("server", "register", self.deploy, key, "--clients", f"person-{k},person-{k + 3}")
        self.sites = [self.start_site(k) for k in range(3)]
        for site in self.sites:
            site.until("connected to")

    def start(self, log: str, *words: object) -> Process:
        self.processes.append(Process(self.folder / log, *words))
        return self.processes[-1]

    def start_server(self) -> None:
        self.server = self.start("server.log", *COMMAND, "server", "start", self.deploy)
        self.server.until("SuperLink listens")

    def start_site(self, k: int) -> Process:
        at = self.folder / f"site-{k}"
        words = (at, self.folder / f"site-{k}.jsonl", f"localhost:{self.port}", self.deploy / "ca.crt")
        return self.start(f"site-{k}.log", sys.executable, "-W", "ignore", FAULTY, *words, self.folder / f"gate-{k}")

    def train(self, cfg: Config, *words: object) -> Process:
        config = self.folder / f"{cfg.name}.yaml"
        config.write_text(dump_config(cfg))
        return self.start(
            f"{cfg.name}.log", *COMMAND, "train", config, "--backend", "flower", "--deploy", self.deploy, *words
        )

    def until_rounds(self, count: int, run: Process, cfg: Config, timeout: float = SHORT) -> Process:
        """Until so many rounds are done; a run in which nobody was quick enough is resumed with twice the time."""
        while True:
            lives = run.popen
            until(lambda: len(self.rounds(cfg.name)) >= count or lives.poll() is not None, lambda: True, run.said)  # noqa: B023
            if len(self.rounds(cfg.name)) >= count and (count < cfg.selectors.rounds or run.popen.wait(PATIENCE) == 0):
                return run
            assert run.popen.wait(PATIENCE) == 4, run.said()
            timeout *= 2
            run = self.train(cfg, "--resume", "--timeout", timeout)

    def settings(self, name: str, *changes: str) -> Config:
        return settings(self.folder, self.model, *CHANGES, *changes, name=name)

    def hold(self, k: int, number: int) -> None:
        """From the round of this number on."""
        (self.folder / f"gate-{k}" / "held").unlink(missing_ok=True)
        atomic_write(self.folder / f"gate-{k}" / "hold", str(number))

    def let_go(self, k: int) -> None:
        (self.folder / f"gate-{k}" / "hold").unlink()

    def until_held(self, k: int, run: Process) -> None:
        until((self.folder / f"gate-{k}" / "held").exists, lambda: run.popen.poll() is None, run.said)

    def pid_of(self, k: int, what: str) -> int:
        return int(json.loads((self.folder / f"site-{k}" / "running.json").read_text())[what])

    def pids(self, program: str) -> list[int]:
        """Flower's processes of this server, whose command line has its folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().decode(errors="replace")
            except OSError:  # it has ended in between
                continue
            if program in words and str(self.deploy) in words:
                found.append(int(entry.parent.name))
        return found

    def rounds(self, name: str) -> list[Mapping[str, Any]]:
        path = self.folder / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Replay:
    """The clients of one process, of whom in each round those answer that have answered in another run."""

    at_once, away = 0, {}

    def __init__(self, here: InProcessBackend, rows: Sequence[Mapping[str, Any]]) -> None:
        self._here, self._rows, self._round = here, rows, -1

    def clients(self) -> list[str]:
        self._round += 1
        return list(self._rows[self._round]["cohort"])

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        refused = self._rows[self._round]["refused"]
        return [
            Reply(task.client, ok=False, error=refused[task.client])
            if task.client in refused
            else self._here.run([task])[0]
            for task in tasks
        ]


def adapters(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(run).items() if name.endswith(".safetensors")}


def check_replay(town: Town, cfg: Config) -> None:
    """An uninterrupted run with the same answers has the same adapters, bit for bit."""
    rows = town.rounds(cfg.name)
    assert [row["round"] for row in rows] == list(range(cfg.selectors.rounds))
    for row in rows:
        assert row["metrics"]["num_replies"] == len(row["cohort"]) - len(row["refused"]) > 0
    again = cfg.model_copy(update={"name": f"{cfg.name}-replay"})
    replay = pipeline.train_selectors(
        again, connect=lambda session, *what: Replay(InProcessBackend(session.desk, session.clients), rows)
    )
    there = adapters(town.folder / "runs" / cfg.name)
    assert "selectors/u0/adapter_model.safetensors" in there
    assert there == adapters(replay)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Town]:
    made = Town.__new__(Town)
    try:
        made.__init__(tmp_path_factory.mktemp("town"), tiny_model)  # type: ignore[misc]
        yield made
    finally:
        for process in reversed(made.processes):
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in reversed(made.processes):
            try:
                process.popen.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.popen.pid, signal.SIGKILL)


@pytest.mark.quality  # minutes, and on a busy machine Flower itself loses messages: `make quality`
def test_fault_82_a_worker_a_supernode_superlink_and_the_command_are_killed_in_the_middle_of_rounds(town: Town) -> None:
    cfg = town.settings("killed", "selectors.rounds=2")
    town.hold(0, 0)
    town.hold(1, 0)
    town.hold(2, 1)
    run = town.train(cfg, "--timeout", PATIENCE)
    town.until_held(0, run)
    town.until_held(1, run)

    os.kill(town.pid_of(0, "worker"), signal.SIGKILL)
    town.let_go(0)
    town.sites[0].until("the worker was ended by SIGKILL; it is started again")
    node = town.pid_of(1, "supernode")
    os.kill(node, signal.SIGKILL)
    town.sites[1].until("the SuperNode was ended by SIGKILL; it is started again")
    (link,) = town.pids("flower-superlink")
    os.kill(link, signal.SIGKILL)
    town.server.until("the SuperLink is started again")
    town.let_go(1)

    run = town.until_rounds(1, run, cfg)
    town.until_held(2, run)
    assert len(town.rounds("killed")) == 1
    run.until("nothing from person-0, person-3: this site's worker")
    run.end(signal.SIGKILL)
    again = town.train(cfg, "--resume", "--timeout", PATIENCE)
    again.until("run killed is under way; it is followed")
    assert len(town.rounds("killed")) == 1
    town.let_go(2)
    assert again.popen.wait(PATIENCE) == 0, again.said()

    first, second = town.rounds("killed")
    away = "ended while it answered; its own log says why"
    assert [client for client, why in first["refused"].items() if why.endswith(away)] == ["person-0", "person-3"]
    assert str(town.folder) not in json.dumps(first), "a path of the site's machine is not the server's business"
    lost = {client: why for client, why in first["refused"].items() if not why.endswith(away)}
    assert lost == {} or (lost.keys() == {"person-1", "person-4"} and "Node Unavailable" in lost["person-1"]), (
        "the SuperNode came back and was asked again; on a busy machine that may be later than Flower waits"
    )
    asked = [json.loads(line) for line in (town.folder / "site-1" / "ledger.jsonl").read_text().splitlines()]
    trained = [row for row in asked if row["run"] == "killed" and row["rounds"] == [0] and "train" in row["asked"]]
    assert len(trained) >= 2 or lost, "the SuperNode that came back was asked again"
    assert second["refused"] == {}
    assert {f"person-{k}" for k in range(6)} - set(second["cohort"]) <= lost.keys(), "a worker that was killed is back"
    check_replay(town, cfg)


@pytest.mark.quality  # minutes, and on a busy machine Flower itself loses messages: `make quality`
def test_fault_83_and_80_the_whole_server_dies_and_sites_straggle_lie_come_late_and_leave(town: Town) -> None:
    cfg = town.settings("power", "selectors.rounds=4")
    town.sites[2].end()
    town.hold(0, 1)
    run = town.train(cfg, "--timeout", PATIENCE)
    town.until_held(0, run)
    town.sites[2] = town.start_site(2)
    run.end(signal.SIGKILL)
    town.server.end(signal.SIGKILL)
    until(
        lambda: not town.pids("flower-superlink") + town.pids("flower-superexec"),
        lambda: True,
        lambda: "Flower's processes outlive the server",
    )
    (first,) = town.rounds("power")
    assert first["away"] == {"site-2": "it is not connected"}
    assert first["refused"] == {}

    town.start_server()
    town.sites[2].until("connected to")
    run = town.train(cfg, "--resume", "--timeout", SHORT)
    run = town.until_rounds(2, run, cfg)
    (town.folder / "gate-0" / "wrong.json").write_text(json.dumps({"*": "old"}))
    (town.folder / "gate-1" / "wrong.json").write_text(json.dumps({"person-1": "nan", "person-4": "shape"}))
    (town.folder / "gate-2" / "wrong.json").write_text(json.dumps({"person-2": "twice", "person-5": "differing"}))
    town.let_go(0)
    run = town.until_rounds(3, run, cfg)
    for k in range(3):
        (town.folder / f"gate-{k}" / "wrong.json").unlink()
    town.sites[1].end()
    town.until_rounds(4, run, cfg)

    _, straggles, lies, leaves = town.rounds("power")
    late = straggles.get("away", {}).get("site-0") or straggles["refused"]["person-0"]
    assert late.startswith("no answer within ")
    assert "person-2" in straggles["cohort"], "a site that comes late takes part from then on"
    assert {"person-1", "person-4", "person-5"} <= lies["refused"].keys()
    assert "non-finite" in lies["refused"]["person-1"]
    assert "shape" in lies["refused"]["person-4"]
    assert lies["refused"]["person-5"] == "2 replies that differ"
    assert "person-2" in set(lies["cohort"]) - lies["refused"].keys(), "the same reply twice counts once"
    assert "person-0" not in set(lies["cohort"]) - lies["refused"].keys(), "an old answer does not count"
    assert "site-1" in leaves.get("away", {}) or {"person-1", "person-4"} <= leaves["refused"].keys()
    said = (town.folder / "power.log").read_text()
    for told in ("site-2 took no part: it is not connected", late, "nothing from person-5: 2 replies that differ"):
        assert told in said
    check_replay(town, cfg)
