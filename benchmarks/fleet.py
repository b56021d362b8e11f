"""What it costs to carry a round over Flower: clients that train nothing behind real SuperNodes, and the same loop in process.

    python benchmarks/fleet.py [--clients 10 100 1000] [--sites 3] [--rounds 3]

SuperLink with its database, SuperExec, TLS and keys are those of ``fedbiscuit server``; each site has Flower's SuperNode and the
worker of ``fedbiscuit client`` with a stand-in for training that answers with full-size deltas. All on this machine, Linux only.
It stops when the machine has less than two gigabytes left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from measure import table  # noqa: E402

LEAST_FREE = 2 * 2**30
IDLE = 30
"""Seconds in which the processes are watched while nothing is asked: SuperNodes ask for messages every three seconds."""
SERVER = "import sys\n\nsys.path.insert(0, {here!r})\nimport fleet_server\n\nserver = fleet_server.server\n"
KINDS = {
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "ClientApp",
    "flower-supernode": "SuperNode",
    "flower-superexec": "SuperExec",
    "fleet.py": "worker",
}
Sample = tuple[float, dict[str, list[int]], dict[str, float]]
"""When; bytes of each process, and CPU seconds so far, by kind."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="the first of them is left out of the medians")
    parser.add_argument("--timeout", type=float, default=1200.0)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all that was started ends, as with Ctrl-C
    from fleet_server import StandIn, names, rounds

    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    here: dict[int, list[dict[str, Any]]] = {}
    for size in asked.clients:
        print(f"{size} clients in process", flush=True)
        rounds(StandIn(names(size, 1, 0)), asked.rounds, here.setdefault(size, []).append)
    with tempfile.TemporaryDirectory() as folder:
        rows, samples = over_flower(Path(folder), asked)
    print(f"load at the end: {os.getloadavg()[0]:.1f}\n")
    there = {size: [row for row in rows if row["clients"] == size] for size in asked.clients}
    print(table(*seconds_of(there, here)), table(*parts_of(there)), table(*processes_of(there, samples)), sep="\n\n")


def over_flower(folder: Path, asked: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Sample]]:
    """Rows of the rounds, and what the processes took meanwhile."""
    from fleet_server import names
    from quickstart_flower import await_line, background, fedbiscuit, free_port

    from fedbiscuit.deployment.server import load
    from fedbiscuit.deployment.site import settings_of
    from fedbiscuit.deployment.site_processes import Server, supernode_words

    deploy, port, rows = folder / "deploy", free_port(), folder / "rows.jsonl"
    with contextlib.ExitStack() as running:
        fedbiscuit("server", "init", deploy, "--port", port)
        server = running.enter_context(background(folder / "server.log", "server", "start", deploy))
        await_line("SuperLink listens", *server)
        nodes = []
        for k in range(asked.sites):
            site, socket = folder / f"site-{k}", folder / f"{k}.sock"
            fedbiscuit("client", "init", site)
            key = folder / f"site-{k}.pub"
            key.write_bytes((site / "key.pub").read_bytes())
            mine = ",".join(names(max(asked.clients), asked.sites, k))
            fedbiscuit_quietly("server", "register", deploy, key, "--clients", mine)
            worker = [sys.executable, __file__, "worker", socket, site / "ledger.jsonl", asked.sites, k]
            running.enter_context(started(folder / f"worker-{k}.log", worker))
            words = supernode_words(
                beside("flower-supernode"),
                site,
                Server(f"localhost:{port}", deploy / "ca.crt"),
                socket,
                settings_of(site),
            )
            nodes.append(running.enter_context(started(folder / f"node-{k}.log", words, flower_home(site))))
        for node in nodes:
            await_line("SuperNode ID", *node)
        watch = Watch()
        running.callback(watch.stop.set)
        watch.start()
        time.sleep(IDLE)
        (first, _, before), (last, _, after) = watch.samples[0], watch.samples[-1]
        kinds = ("SuperLink", "SuperNode", "SuperExec")
        per_second = {kind: (after[kind] - before.get(kind, 0.0)) / (last - first) for kind in kinds}
        told = ", ".join(f"{kind} {1000 * used:.0f} ms" for kind, used in per_second.items())
        print(f"CPU a second while nothing is asked, {asked.sites} sites: {told}", flush=True)
        number = submit(load(deploy), folder, rows, asked)
        wanted, seen = asked.rounds * len(asked.clients), 0
        last = time.monotonic()
        while seen < wanted:
            time.sleep(1)
            found = rows.read_text().splitlines() if rows.exists() else []
            for line in found[seen:]:
                row, last = json.loads(line), time.monotonic()
                print(
                    f"{row['clients']} clients: {row['seconds']:.1f} s, {row['replies']} replies {row['refused']}",
                    flush=True,
                )
            seen = len(found)
            if watch.too_little or time.monotonic() - last > asked.timeout or server[0].poll() is not None:
                print(
                    "stopped: "
                    + ("too little memory is left" if watch.too_little else f"no round comes, see run {number}")
                )
                show_logs(folder, load(deploy), number)
                break
        watch.stop.set()
        watch.join()
        print(f"database of SuperLink: {sum(p.stat().st_size for p in deploy.glob('superlink.db*')) / 2**20:.0f} MiB")
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [], watch.samples


def submit(deploy: Any, folder: Path, rows: Path, asked: argparse.Namespace) -> str:
    """Hand our ServerApp to SuperLink as ``fedbiscuit train`` does; the number of the run."""
    from fedbiscuit.deployment.running import APP, PROJECT
    from fedbiscuit.deployment.server import ask

    app, job = folder / "app", folder / "job.json"
    (app / "fedbiscuit_run").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT.replace("fedbiscuit_run.app:server", "fedbiscuit_run.fleet:server"))
    (app / "fedbiscuit_run" / "__init__.py").write_text("")
    (app / "fedbiscuit_run" / "app.py").write_text(APP)
    (app / "fedbiscuit_run" / "fleet.py").write_text(SERVER.format(here=str(HERE)))
    job.write_text(
        json.dumps({"clients": asked.clients, "rounds": asked.rounds, "timeout": asked.timeout, "rows": str(rows)})
    )
    said = ask(deploy, "run", str(app), "-c", f"job={json.dumps(str(job))}")
    if not said.get("success"):
        raise SystemExit(f"Flower took no run: {said}")
    return str(said["run-id"])


def show_logs(folder: Path, deploy: Any, number: str) -> None:
    """The ends of all logs, where something went wrong."""
    from fedbiscuit.deployment.running import _log_of

    print(_log_of(deploy, number))
    for log in sorted(folder.glob("*.log")) + sorted(folder.glob("deploy/*.log")):
        print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:]))


# Processes


def worker(socket: str, ledger: str, sites: str, site: str) -> None:
    """A site's worker, whose clients train nothing; how many there are is in the terms of a run."""
    from fleet_server import StandIn, names

    from fedbiscuit.backends.worker import Rules, TakingPart, Worker, serve_at

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())

    def open_run(terms: str) -> TakingPart:
        mine = names(json.loads(terms)["clients"], int(sites), int(site))
        return TakingPart(StandIn(mine), dict.fromkeys(mine, 1), "none")  # type: ignore[arg-type]

    serve_at(Path(socket), Worker(open_run, Rules(), Path(ledger)), stop)
    os._exit(0)


@contextlib.contextmanager
def started(
    log: Path, words: list[Any], environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process and its log; ended with all that it has started."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        yield process, log
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fedbiscuit_quietly(*words: Any) -> None:
    """A command whose line is too long to be shown."""
    done = subprocess.run(
        [sys.executable, "-m", "fedbiscuit", *map(str, words)], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def beside(name: str) -> str:
    from fedbiscuit.deployment.programs import program

    return program(name)


def flower_home(site: Path) -> dict[str, str]:
    from fedbiscuit.deployment.programs import flower_env

    return flower_env(site / "flwr")


class Watch(threading.Thread):
    """Looks at all processes below this one, twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.stop = threading.Event()
        self.too_little = False

    def run(self) -> None:
        """Until ``stop``, or until the machine has too little memory."""
        while not self.stop.wait(0.5):
            memory: dict[str, list[int]] = {}
            cpu: dict[str, float] = {}
            for pid in below(os.getpid()):
                with contextlib.suppress(OSError, IndexError, ValueError, StopIteration):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                    kind = next((kind for sign, kind in KINDS.items() if sign in line.split("--")[0]), "other")
                    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
                    cpu[kind] = cpu.get(kind, 0.0) + sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
                    memory.setdefault(kind, []).append(proportional_bytes(pid))
            self.samples.append((time.time(), memory, cpu))
            free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
            self.too_little |= int(free.split()[1]) * 1024 < LEAST_FREE


def proportional_bytes(pid: int) -> int:
    """What a process holds, of shared pages its share (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def below(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, left = [], list(parents.get(pid, []))
    while left:
        found.append(left.pop())
        left += parents.get(found[-1], [])
    return found


# Tables


Rows = dict[int, list[dict[str, Any]]]
PARTS = ("who is there", "packing", "pushing", "waiting", "pulling", "unpacking")


def median_of(rows: list[dict[str, Any]], key: str) -> float:
    """Over the rounds but the first, which starts things."""
    return statistics.median(row[key] for row in rows[1:] or rows)


def seconds_of(there: Rows, here: Rows) -> tuple[list[str], list[list[str]]]:
    """Seconds a round, and what travels."""
    header = ["clients", "replies", "over Flower s", "in process s", "times", "MB down", "MB up"]
    rows = []
    for size, found in there.items():
        if found:
            far, near = median_of(found, "seconds"), median_of(here[size], "seconds")
            moved = [median_of(found, key) / 1e6 for key in ("bytes_down", "bytes_up")]
            row = [str(size), str(found[-1]["replies"]), f"{far:.1f}", f"{near:.2f}", f"{far / near:.0f}"]
            rows.append([*row, *(f"{one:.1f}" for one in moved)])
    return header, rows


def parts_of(there: Rows) -> tuple[list[str], list[list[str]]]:
    """Where the seconds of a round go, as the server sees it. Who is there: a message of nothing to each node and back."""
    header = ["clients", *PARTS, "checking, averaging"]
    rows = []
    for size, found in there.items():
        if found:
            part = {
                name: statistics.median(row["parts"].get(name, 0.0) for row in found[1:] or found) for name in PARTS
            }
            inside = [name for name in PARTS if name != "who is there"]
            rest = median_of(found, "seconds") - sum(part[name] for name in inside)
            rows.append([str(size), *(f"{part[name]:.2f}" for name in PARTS), f"{rest:.2f}"])
    return header, rows


def processes_of(there: Rows, samples: list[Sample]) -> tuple[list[str], list[list[str]]]:
    """For each kind of process: the largest one in MiB, and CPU seconds a round of all of them."""
    kinds = [*dict.fromkeys(KINDS.values())]
    header = ["clients", *(f"{kind} MiB" for kind in kinds), "CPU s a round", *(f"{kind} CPU s" for kind in kinds)]
    rows = []
    for size, found in there.items():
        if not found:
            continue
        inside = [one for one in samples if found[0]["began"] <= one[0] <= found[-1]["ended"]]
        most = {kind: max((max(one[1][kind]) for one in inside if kind in one[1]), default=0) for kind in kinds}
        cpu = {}
        for kind in kinds:
            cpu[kind] = (inside[-1][2].get(kind, 0.0) - inside[0][2].get(kind, 0.0)) / len(found) if inside else 0.0
        cells = [f"{most[kind] / 2**20:.0f}" for kind in kinds]
        rows.append([str(size), *cells, f"{sum(cpu.values()):.1f}", *(f"{cpu[kind]:.1f}" for kind in kinds)])
    return header, rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
