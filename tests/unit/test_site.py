"""A site's folder and its two processes: settings, data, ledger summed up, what a SuperNode's log means, restarts."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fedbiscuit.deployment import processes, site, site_processes
from fedbiscuit.deployment.processes import Child
from fedbiscuit.deployment.site import SiteSettings, check_data, settings_of, status_lines
from fedbiscuit.deployment.site_processes import Server, server_of, supernode_words
from fedbiscuit.rundir.ledger import read_ledger, summaries
from fedbiscuit.types import ConfigError, DataError, IntegrityError

ROW = {"prompt": "p", "output_a": "a", "output_b": "b", "choice": 0, "client": "ann"}


def make_site(folder: Path, text: str = site.TEMPLATE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "key").write_text("")
    (folder / "key").chmod(0o600)
    (folder / "site.yaml").write_text(text)
    return folder


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Settings and data


def test_the_file_that_init_writes_says_the_defaults(tmp_path):
    assert settings_of(make_site(tmp_path / "s")) == SiteSettings()


def test_the_file_says_what_the_site_takes_part_in(tmp_path):
    text = f"kinds: [train]\nmodels: {{org/base: /srv/base}}\nallow_models: [{'a' * 64}]\nrounds: 3\ntimeout: 60\n"
    assert settings_of(make_site(tmp_path / "s", text)) == SiteSettings(
        kinds=("train",), models={"org/base": "/srv/base"}, allow_models=("a" * 64,), rounds=3, timeout=60.0
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rounds: 1\nround: 2", r"site.yaml:2: round: unknown key; did you mean rounds\?"),
        (
            "kinds: [trian]",
            "site.yaml:1: kinds.0: 'trian' is not permitted; it must be train, evaluate or seat; did you mean",
        ),
        ("\nrounds: -1", "site.yaml:2: rounds: -1 is not permitted; it must be a whole number from 0"),
        ("comparisons: 0", "site.yaml:1: comparisons: 0 is not permitted"),
        ("rounds: 1\nrounds: 2", "site.yaml:2: rounds: key stands twice"),
        (
            "allow_models: [abc]",
            "site.yaml:1: allow_models.0: 'abc' is not permitted; it must be the digest of a model, 64 of 0-9 a-f",
        ),
        ("models: &x {}", "anchor &x is not allowed"),
        ("device: gpu", "site.yaml:1: device: 'gpu' is not permitted; it must be auto, cpu, mps, cuda"),
        ("timeout: 0", "site.yaml:1: timeout: 0 is not permitted"),
        ("- train", "site.yaml:1: expected settings"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        settings_of(make_site(tmp_path / "s", text))


def test_a_folder_without_a_key_and_a_key_that_lies_open_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no site's folder, it has no key; make one with `fedbiscuit client init"):
        settings_of(tmp_path)
    (make_site(tmp_path / "s") / "key").chmod(0o644)
    with pytest.raises(ConfigError, match="others on this machine may read it; close it with `chmod 600"):
        settings_of(tmp_path / "s")


def test_data_that_is_wrong_is_refused_with_file_and_line(tmp_path):
    path = lines(tmp_path / "mine.jsonl", ROW, ROW | {"choice": 7}, ROW | {"prompt": ""})
    with pytest.raises(DataError) as raised:
        check_data([path])
    assert [told.split(": ")[0] for told in str(raised.value).splitlines()] == [f"{path}:2", f"{path}:3"]
    nobody = {key: value for key, value in ROW.items() if key != "client"}
    with pytest.raises(DataError, match="1 of 2 comparisons do not say whose they are; add `client`"):
        check_data([lines(tmp_path / "mine.jsonl", ROW, nobody | {"prompt": "q"})])
    assert check_data([lines(tmp_path / "mine.jsonl", ROW)]).clients.keys() == {"ann"}


# The ledger, summed up


def row(at: float, run: str = "demo", **more: object) -> dict[str, object]:
    plain = {"time": at, "run": run, "rounds": [], "asked": {}, "names": 2, "deltas": 0, "seats": 0}
    return plain | {"bytes_in": 100, "bytes_out": 10} | more


def test_the_ledger_is_summed_up_by_run(tmp_path):
    path = lines(
        tmp_path / "ledger.jsonl",
        row(10),
        row(11, rounds=[0], asked={"train": 2}, deltas=1, not_done={"out of memory": ["bo"]}),
        row(12, run="next", error="no"),
        row(15, rounds=[0, 3], asked={"train": 1, "seat": 2}, deltas=1, seats=2, not_done={"out of memory": ["ann"]}),
    )
    found = summaries(read_ledger(path))
    assert list(found) == ["demo", "next"]
    demo, after = found["demo"], found["next"]
    assert (demo.first, demo.last, demo.orders, demo.rounds) == (10, 15, 3, {0, 3})
    assert demo.asked == {"train": 3, "seat": 2}
    assert demo.sent == {"deltas": 2, "seats": 2, "bytes_in": 300, "bytes_out": 30}
    assert (demo.not_done, demo.errors, after.errors) == ({"out of memory": 2}, {}, {"no": 1})


def test_a_torn_line_is_passed_over_and_a_strange_one_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert list(read_ledger(path)) == []
    path.write_text('{"time": 1\n' + json.dumps(row(2)) + "\n")
    assert [one["time"] for one in read_ledger(path)] == [2]
    path.write_text('{"time": 1}\n')
    with pytest.raises(IntegrityError, match=r"ledger\.jsonl:1: not a line of a ledger"):
        list(read_ledger(path))


def test_status_says_what_was_asked_what_left_and_that_it_is_all(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    folder = make_site(tmp_path / "s")
    assert list(status_lines(folder))[-1] == "No message has come yet, and nothing was sent."
    told = {"no such client at this site": ["eve", "mal"]}
    more = {"rounds": [1, 2], "asked": {"train": 2, "seat": 1}, "deltas": 2, "seats": 1, "not_done": told}
    lines(folder / "ledger.jsonl", row(0), row(60, **more, bytes_out=2_000_000), row(60, run="", error="cut off"))
    assert list(status_lines(folder))[1:] == [
        "",
        "run demo",
        "  from 1970-01-01 00:00:00+00:00 to 1970-01-01 00:01:00+00:00: 2 messages, 2 rounds (1 to 2)",
        "  asked: 1 x seat, 2 x train",
        "  sent: 2 deltas, 1 seat; 2.0 MB out, 200 bytes in",
        "  not done: 2 x no such client at this site",
        "",
        "messages that belong to no run",
        "  from 1970-01-01 00:01:00+00:00 to 1970-01-01 00:01:00+00:00: 1 message, no rounds",
        "  asked: only who is here",
        "  sent: 0 deltas, 0 seats; 10 bytes out, 100 bytes in",
        "  refused: 1 x cut off",
        "",
        "These answers, with the names of clients and how many comparisons they trained on, are all that the worker sent.",
    ]


# The command line of a SuperNode


@pytest.mark.parametrize(
    ("address", "ca", "insecure", "told"),
    [
        ("server", None, True, "--server: 'server' is not HOST:PORT"),
        ("http://server:80", None, True, "is not HOST:PORT"),
        ("server:0", None, True, "is not HOST:PORT"),
        ("server:65536", None, True, "is not HOST:PORT"),
        ("-x:1 y:2", None, True, "is not HOST:PORT"),
        ("server:80", None, False, "--ca: give the server's certificate"),
        ("server:80", "here", True, "not both"),
        ("server:80", "gone", False, "there is no file"),
    ],
)
def test_a_server_that_cannot_be_is_refused(tmp_path, address, ca, insecure, told):
    (tmp_path / "here").write_text("")
    with pytest.raises(ConfigError, match=told):
        server_of(address, ca and tmp_path / ca, insecure)


def test_servers_that_can_be(tmp_path):
    (tmp_path / "ca").write_text("")
    assert server_of("a.example.org:8443", tmp_path / "ca", False) == Server("a.example.org:8443", tmp_path / "ca")
    assert server_of("[::1]:80", None, True) == Server("[::1]:80", None)


def test_the_key_is_shown_over_tls_alone(tmp_path):
    how = SiteSettings(timeout=5)
    plain = supernode_words("p", tmp_path, Server("h:1", None), Path("/w.sock"), how)
    assert plain[:4] == ["p", "--superlink", "h:1", "--port"]
    assert plain[5:] == ["--insecure", "--node-config", 'worker="/w.sock" timeout=5.0']
    secure = supernode_words("p", tmp_path, Server("h:1", tmp_path / "ca"), Path("/w.sock"), how)
    assert secure[5:9] == ["--root-certificates", tmp_path / "ca", "--auth-supernode-private-key", tmp_path / "key"]


def test_the_socket_is_in_the_folder_or_where_that_is_no_path_for_one_in_a_private_one(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as short, site_processes._socket_path(Path(short)) as path:
        assert path == Path(short).resolve() / "worker.sock"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    for name in ("x" * 100, 'a"b', "two words"):
        with site_processes._socket_path(tmp_path / name) as path:
            assert len(os.fsencode(path)) < 100
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert not path.parent.exists()


# What the log of a SuperNode means. The lines are Flower 1.42's.

LOGS = {
    2004: "ERROR :     Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n[code: 2004] Failed to activate SuperNode.\n",
    2001: "[code: 2001] SuperNode authentication is enabled. All SuperNodes must be registered via the CLI.\n",
    "ca": "ERROR :     SSL/TLS handshake error detected.\n[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate (_ssl.c:1006)\n",
    "plain": "ERROR :     SSL/TLS handshake error detected.\n[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)\n",
    "gone": "WARNING :   Connection attempt failed, retrying in 2.47 seconds\n",
    "there": "INFO :      SuperNode ID: 18274173456842496426\n",
}


class Hearing:
    def __init__(self, folder: Path) -> None:
        self.heard: list[str] = []
        self.log = folder / "supernode.log"
        worker, node = (Child(name, [], folder / f"{name.lower()}.log", 8.0) for name in ("worker", "SuperNode"))
        self.site = site_processes._Site(
            folder, Server("h:1", Path("ca.crt")), folder / "w", worker, node, self.heard.append, 60.0
        )

    def hears(self, text: str) -> list[str]:
        with self.log.open("a") as file:
            file.write(text)
        del self.heard[:]
        self.site._hear_node()
        return list(self.heard)


def test_fault_78_a_key_that_is_not_registered_is_said_once_with_what_to_send_and_tried_again(tmp_path):
    hearing = Hearing(tmp_path)
    (told,) = hearing.hears(LOGS[2004])
    assert told.startswith(
        f"the server h:1 does not know the key of this site; send {tmp_path}/key.pub to its administrator"
    )
    assert hearing.hears(LOGS[2004]) == []
    assert hearing.site.refusal == ""
    assert hearing.hears(LOGS["there"]) == ["connected to h:1; this site is node 18274173456842496426"]
    assert len(hearing.hears(LOGS[2004])) == 1


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (2001, "takes only sites with a registered key, and without TLS no key is shown; leave --insecure out"),
        ("ca", "the server h:1 is not who --ca ca.crt says"),
        ("plain", "the server h:1 speaks without TLS there; check the port"),
    ],
)
def test_what_trying_again_cannot_mend_ends_it(tmp_path, log, told):
    hearing = Hearing(tmp_path)
    assert hearing.hears(LOGS[log]) == []
    assert told in hearing.site.refusal


def test_a_server_that_cannot_be_reached_is_said_and_half_a_line_is_not_read(tmp_path):
    hearing = Hearing(tmp_path)
    assert hearing.hears(LOGS["gone"][:20]) == []
    (told,) = hearing.hears(LOGS["gone"][20:])
    assert told.startswith("the server h:1 cannot be reached; is it started, the port open")


def test_fault_78_a_supernode_that_ends_without_a_word_is_one_whose_clock_may_be_wrong(tmp_path, monkeypatch):
    hearing = Hearing(tmp_path)
    monkeypatch.setattr(site_processes, "seconds_ahead", lambda address, ca: 61)
    hearing.site.node.words = ["true"]
    for _ in range(2):
        hearing.site.node.start()
        hearing.site.node.not_before = hearing.site.worker.not_before = time.monotonic() + 60
        wait_for(lambda: hearing.site.look() or hearing.site.node.process is None)
    told = [text for text in hearing.heard if "clock" in text]
    assert len(told) == 1
    assert told[0].startswith("this machine's clock is 61 s ahead of the server's, so the server refuses this site")


# Processes


def wait_for(found) -> object:
    end = time.monotonic() + 120
    while not (got := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return got


def opened(fifo: Path) -> int | None:
    """A FIFO that somebody reads, to write to; None where nobody does, or does no more."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_the_pause_before_a_restart_grows_and_is_short_again_after_steady_work(tmp_path, monkeypatch):
    child = Child("worker", [sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "w.log", 30.0)
    for pause in (1, 2, 4):
        child.start()
        told = wait_for(child.has_died)
        assert (
            told == f"the worker ended with exit code 7; it is started again in {pause} s ({tmp_path}/w.log says more)"
        )
        assert child.has_died() == ""
    child.pause = 60.0
    child.start()
    assert "in 60 s" in wait_for(child.has_died)
    assert child.pause == 60.0
    child.start()
    child.started -= processes.STEADY + 1
    assert "in 1 s" in wait_for(child.has_died)


def test_a_signal_is_named_and_what_it_had_started_ends_too(tmp_path):
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    child = Child("SuperNode", [sys.executable, "-c", code], tmp_path / "n.log", 8.0)
    child.start()
    inner = int(wait_for(child.new_lines)[0])
    os.kill(child.pid, signal.SIGKILL)
    assert wait_for(child.has_died).startswith("the SuperNode was ended by SIGKILL")
    wait_for(lambda: not _runs(inner))
    assert stat.S_IMODE((tmp_path / "n.log").stat().st_mode) == 0o600


def test_a_process_that_does_not_hear_is_ended_after_its_time_with_what_it_has_started(tmp_path):
    child = Child("worker", ["sh", "-c", 'trap "" TERM; sleep 60 & echo $!; wait'], tmp_path / "w.log", 0.3)
    child.start()
    inner, pid = int(wait_for(child.new_lines)[0]), child.pid
    child.end()
    assert not _runs(pid)
    wait_for(lambda: not _runs(inner))
    assert child.pid == 0


def test_fault_92_a_log_that_has_become_large_is_put_aside_while_the_process_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LARGE_LOG", 20)
    child = Child(
        "worker", ["sh", "-c", "echo 123456789ab; echo 123456789cd; read go < go; echo new"], tmp_path / "w.log", 30.0
    )
    os.mkfifo(tmp_path / "go")
    monkeypatch.chdir(tmp_path)
    child.start()
    assert [*wait_for(child.new_lines), *wait_for(child.new_lines)] == ["123456789ab", "123456789cd"]
    go = wait_for(lambda: opened(tmp_path / "go"))
    os.write(go, b"on\n")
    os.close(go)
    assert wait_for(child.new_lines) == ["new"]
    wait_for(child.has_died)
    assert (tmp_path / "w.log.1").read_text() + (tmp_path / "w.log").read_text() == "123456789ab\n123456789cd\nnew\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_no_process_outlives_the_one_that_started_it(tmp_path):
    code = (
        "import os, pathlib, signal\nfrom fedbiscuit.deployment.processes import Child\n"
        f"child = Child('worker', ['sleep', '60'], pathlib.Path({str(tmp_path / 'w.log')!r}), 1.0)\n"
        "child.start(); print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout)
    wait_for(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
