"""Real clients on one machine: a server and three sites, with TLS and keys, train selectors over Flower. Then the same config in
one process, and both results side by side: they must be equal.

    python examples/quickstart_flower.py [--config configs/demo.yaml] [--folder runs/demo_flower] [key=value ...]

A line with $ is what a company types (docs/real-clients.md). All that was started is ended again, also by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbiscuit import load_config
from fedbiscuit.config import Config, dump_config
from fedbiscuit.data.sources import load
from fedbiscuit.types import FedbiscuitError

PROGRAM = (sys.executable, "-m", "fedbiscuit")
SITES = ("site-a", "site-b", "site-c")
SMALLER = ("selectors.rounds=3", "selectors.eval_every=3", "evaluation.compare_global=false", "model.threads=1")
"""Settings on top of the config: rounds for some minutes; one thread, as at each site, since bits depend on it."""
START_SECONDS = 600
"""A process may take so long until it is ready, on a machine that does other things too."""
END_SECONDS = 90


def main(words: Sequence[str]) -> int:
    """Exit code 0 where both runs have the same adapters, groups and metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_flower"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args(words)
    folder: Path = asked.folder
    if folder.exists():
        print(f"{folder} exists; to start afresh: rm -r {shlex.quote(str(folder))}", file=sys.stderr)
        return 2
    given = {word.partition("=")[0] for word in asked.overrides}
    smaller = [word for word in SMALLER if word.partition("=")[0] not in given]
    cfg = load_config(asked.config, [*smaller, *asked.overrides, f"runs_dir={folder}"])
    folder.mkdir(parents=True)
    print(f"all files and logs: {folder}", flush=True)
    clock = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    config = folder / "config.yaml"
    config.write_text(dump_config(cfg))
    federation(cfg, folder, config)
    taken = [time.monotonic() - clock]
    fedbiscuit("train", config, "name=in-process")
    taken.append(time.monotonic() - clock - taken[0])
    same = side_by_side(folder / "over-flower", folder / "in-process")
    print(f"over Flower {taken[0]:.0f} s with all that is started, in one process {taken[1]:.0f} s")
    return 0 if same else 1


def federation(cfg: Config, folder: Path, config: Path) -> None:
    """Server, three sites, and the run whose clients are theirs."""
    deploy, port = folder / "deploy", free_port()
    clients = write_comparisons(cfg, folder)
    with contextlib.ExitStack() as running:
        fedbiscuit("server", "init", deploy, "--port", port)
        await_line(
            "SuperLink listens", *running.enter_context(background(folder / "server.log", "server", "start", deploy))
        )
        sites = []
        for site in SITES:
            fedbiscuit("client", "init", folder / site)
            settings = folder / site / "site.yaml"  # three sites on one machine: a thread for each
            settings.write_text(settings.read_text().replace("\nthreads: 0\n", "\nthreads: 1\n"))
            key = folder / f"{site}.pub"  # what the site sends to the server's administrator
            key.write_bytes((folder / site / "key.pub").read_bytes())
            fedbiscuit("server", "register", deploy, key, "--clients", ",".join(clients[site]))
            data = ("--data", folder / f"{site}.jsonl")
            where = ("--server", f"localhost:{port}", "--ca", deploy / "ca.crt")
            log = folder / f"{site}.log"
            sites.append(running.enter_context(background(log, "client", "start", folder / site, *data, *where)))
        for site in sites:
            await_line("connected to", *site)
        over = ("--backend", "flower", "--deploy", deploy, "--timeout", 1800)
        fedbiscuit("train", config, "name=over-flower", *over)
        fedbiscuit("client", "status", folder / SITES[0])


def write_comparisons(cfg: Config, folder: Path) -> dict[str, list[str]]:
    """A file with the comparisons of its own clients for each site, as a company has them; who these clients are."""
    held = load(cfg.data, cfg.seed).clients
    clients = {site: sorted(held)[k :: len(SITES)] for k, site in enumerate(SITES)}
    for site, names in clients.items():
        with (folder / f"{site}.jsonl").open("w", encoding="utf-8") as file:
            for name in names:
                for one in (*held[name].train, *held[name].validation, *held[name].test):
                    row = {"prompt": one.prompt, "output_a": one.output_a, "output_b": one.output_b}
                    row |= {"choice": one.choice, "client": name, "split": one.split}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return clients


# Two results


def side_by_side(there: Path, here: Path) -> bool:
    """Print what came out of both runs; whether it is the same: every adapter, the groups, every line of the metrics."""
    files = sorted(str(path.relative_to(here)) for path in here.glob("selectors/*/adapter_model.safetensors"))
    files += ["selectors/groups.json"]
    rows = [
        (name, *(hashlib.sha256((run / name).read_bytes()).hexdigest()[:16] for run in (there, here))) for name in files
    ]
    both = [metrics_of(there), metrics_of(here)]
    for one, other in zip(*both, strict=True):
        found, expected = one["metrics"], other["metrics"]
        name = f"round {one['round'] + 1} ({one['phase']})"
        rows.append((f"{name}, replies", found["num_replies"], expected["num_replies"]))
        for u in sorted(expected["delta_norm"]):
            rows.append((f"{name}, length of the step of {u}", found["delta_norm"].get(u), expected["delta_norm"][u]))
        for key in ("accuracy", "loss") if "validation" in expected else ():
            rows.append((f"{name}, validation {key}", found["validation"][key], expected["validation"][key]))
    print(f"\n{'':40} {'over Flower':>20} {'in one process':>20}")
    for name, first, second in rows:
        print(f"{name:40} {first!s:>20.16} {second!s:>20.16}{'' if first == second else '   DIFFERENT'}")
    same = both[0] == both[1] and all(first == second for _, first, second in rows)
    print(
        "adapters, groups and all metrics are the same, bit for bit"
        if same
        else f"NOT the same; compare {there} and {here}"
    )
    return same


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """A line for each round, without the bytes that were carried: in one process nothing is."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("bytes")} for line in lines]


# Processes


def fedbiscuit(*words: object) -> None:
    """A command, to its end; ``SystemExit`` where it fails."""
    with _started(words, None) as process:
        if code := process.wait():
            raise SystemExit(f"that failed with exit code {code}")


@contextlib.contextmanager
def background(log: Path, *words: object) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command that runs on until it is ended here; with the file that has what it says."""
    with _started(words, log) as process:
        yield process, log


def await_line(text: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the log says so; ``SystemExit`` where the process ends before."""
    until = time.monotonic() + START_SECONDS
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"it did not get ready; {log} says:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
    print("  " + next(line for line in log.read_text().splitlines() if text in line), flush=True)


@contextlib.contextmanager
def _started(words: Sequence[object], log: Path | None) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that Ctrl-C comes to us alone and we end things in their order."""
    told = [str(word) for word in words]
    print(f"\n$ fedbiscuit {shlex.join(told)}{'' if log is None else f' > {log} &'}", flush=True)
    with contextlib.ExitStack() as opened:
        out = None if log is None else opened.enter_context(log.open("wb"))
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [*PROGRAM, *told],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out and subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            yield process
        finally:
            with _undisturbed():
                if process.poll() is None:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(END_SECONDS)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without a second Ctrl-C, which would leave processes behind."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FedbiscuitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
