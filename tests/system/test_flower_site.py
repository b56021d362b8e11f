"""A site as its administrator sees it: init, start with a real worker and a real SuperNode, status, stop. No server is there."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedbiscuit.backends.bundle import Answer, Order, digest_of, pack_order, packed_adapter, unpack_answer
from fedbiscuit.backends.sockets import ask_at
from fedbiscuit.pipeline.site import terms_of
from fedbiscuit.types import LocalTraining, Task

pytest.importorskip("flwr", reason="NOT TESTED: a site needs flwr; pip install 'fedbiscuit[flower]'")

flow = runpy.run_path(str(Path(__file__).resolve().parent.parent / "flow" / "test_run.py"))
PATIENCE = 300.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    told = [sys.executable, "-W", "ignore", "-m", "fedbiscuit", *map(str, words)]
    return subprocess.run(told, capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT, cwd=cwd)


def wait_for(found: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, "it ended"
        time.sleep(0.1)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_init_makes_a_private_folder_with_a_key_that_flower_takes_and_never_overwrites(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    flow["write_world"](tmp_path / "world.jsonl", num_clients=2)
    made = command("client", "init", "site-a/", "--data", "world.jsonl", cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    assert "site-a/key.pub, as site-a.pub; the key beside it stays here" in made.stdout
    assert "fedbiscuit server register DEPLOY site-a.pub --clients person-0,person-1" in made.stdout
    folder = tmp_path / "site-a"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {"site-a": 0o700, "key": 0o600, "key.pub": 0o644, "site.yaml": 0o644}
    private = load_ssh_private_key((folder / "key").read_bytes(), None)
    public = load_ssh_public_key((folder / "key.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key().public_numbers() == public.public_numbers()
    assert public.curve.name == "secp384r1"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = command("client", "init", "site-a", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert (
        again.stderr
        == "error: site-a: there is something in this folder already; nothing was written. Give a new one\n"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "world.jsonl").open("a").write("{}\n")
    wrong = command(
        "client", "start", "site-a", "--data", "world.jsonl", "--server", "127.0.0.1:1", "--insecure", cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: world.jsonl:33: ")


def test_a_site_runs_outlives_its_processes_and_says_what_left(tmp_path, tiny_model):
    from fedbiscuit.models.lm import load_lm

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    cfg = flow["settings"](tmp_path, tiny_model)
    assert command("client", "init", "site", cwd=tmp_path).returncode == 0
    folder = tmp_path / "site"
    words = ("client", "start", "site", "--data", "world.jsonl", "--server", address, "--insecure")
    out, err = (tmp_path / "out").open("w"), (tmp_path / "err").open("w")
    told = [sys.executable, "-W", "ignore", "-m", "fedbiscuit", *words]
    process = subprocess.Popen(told, stdout=out, stderr=err, env=ENVIRONMENT, cwd=tmp_path)

    def said(text: str, times: int = 1) -> bool:
        return (tmp_path / "out").read_text().count(text) >= times

    def pids() -> tuple[int, int]:
        found = json.loads((folder / "running.json").read_text())
        return found["worker"], found["supernode"]

    try:
        wait_for(lambda: said("the worker is ready"), process)
        wait_for(lambda: said(f"the server {address} cannot be reached"), process)
        assert (
            (tmp_path / "err").read_text().startswith(f"warning: --insecure: anybody between this site and {address}")
        )
        worker, node = pids()
        refused = command(*words, cwd=tmp_path)
        assert refused.returncode == 3
        assert f"in use by process {process.pid} on" in refused.stderr

        listening = Path((folder / "supernode.log").parent / "worker.sock")
        if not listening.exists():  # where the path of tests is too long for a socket
            command_line = Path(f"/proc/{node}/cmdline").read_text().split("\0")
            listening = Path(command_line[command_line.index("--node-config") + 1].split('"')[1])
        assert stat.S_IMODE(listening.stat().st_mode) == 0o600
        lm = load_lm(cfg.model)
        digest, packed = packed_adapter(lm.new_adapter("test"))
        terms = terms_of(cfg, lm.digest)
        task = Task("train", "person-1", 0, local=LocalTraining(steps=2, batch_size=2, lr=0.01))
        full = pack_order(Order("one", terms, [task], [{0: digest}], {digest: packed}))
        first = ask_at(listening, full, PATIENCE)
        (reply,) = unpack_answer(first).replies
        assert reply.ok, reply.error
        assert any(bool(delta.abs().max() > 0) for delta in reply.delta.values())
        assert all(bool(torch.isfinite(delta).all()) for delta in reply.delta.values())

        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: said("the worker was ended by SIGKILL; it is started again in 1 s"), process)
        wait_for(lambda: said("the worker is ready", 2), process)
        assert pids()[1] == node
        short = pack_order(Order("one", terms, [task], [{0: digest}]))
        lacking = unpack_answer(ask_at(listening, short, PATIENCE))
        assert lacking == Answer([f"person-{k}" for k in range(6)], [], [digest], order=digest_of(short))
        assert ask_at(listening, full, PATIENCE) == first

        worker = pids()[0]
        os.kill(node, signal.SIGKILL)
        wait_for(lambda: said("the SuperNode was ended by SIGKILL"), process)
        wait_for(lambda: pids()[1] not in (0, node), process)
        assert pids()[0] == worker

        status = command("client", "status", "site", cwd=tmp_path).stdout
        assert f"for the server {address}" in status
        assert f"worker     runs (process {worker})" in status
        assert f"SuperNode  runs (process {pids()[1]})" in status
        assert "3 messages, 1 round (0 to 0)" in status
        assert "asked: 2 x train\n  sent: 2 deltas, 0 seats" in status
        assert "are all that the worker sent" in status
        bytes_out = [json.loads(line)["bytes_out"] for line in (folder / "ledger.jsonl").read_text().splitlines()]
        assert bytes_out[0] == bytes_out[2] == len(first)
        children = pids()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert said("worker and SuperNode are stopped")
        assert not any(map(runs, children))
        assert not listening.exists()
        assert not (folder / "running.json").exists()
        status = command("client", "status", "site", cwd=tmp_path).stdout
        assert status.startswith("site: does not run; start it with `fedbiscuit client start site")
    finally:
        if process.poll() is None:
            process.kill()
        out.close()
        err.close()
