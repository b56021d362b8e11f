"""A run handed to a SuperLink: ``fedbiscuit train CONFIG --backend flower --deploy FOLDER`` waits here and shows how it goes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbiscuit.config import Config, dump_config
from fedbiscuit.deployment.programs import program
from fedbiscuit.deployment.registration import sites_of
from fedbiscuit.deployment.server import Deploy, ask, connection_of, is_healthy, load
from fedbiscuit.rundir import atomic_write, run_path
from fedbiscuit.rundir.folder import LOCK
from fedbiscuit.rundir.lock import FolderLock, is_held
from fedbiscuit.types import ConfigError, EnvironmentFault, FedbiscuitError, FederationError, IntegrityError

__all__ = ["train_by_flower"]

POLL = 0.3
"""Seconds between two looks at how the run goes, which are cheap."""
ASK_EVERY = 10.0
"""Seconds between two questions to SuperLink, which are not: each starts a program of Flower."""

UNDER_WAY = ("pending", "starting", "running")
"""What SuperLink calls a run that has not ended."""
GOES_ON = (EnvironmentFault.exit_code, FederationError.exit_code)
"""Exit codes of what may be gone when the run is begun again; the others need another config, or another file."""

SECONDS = 60
"""What Flower may take to tell a run's log."""

NAMED = 5
"""Clients that a line of the terminal names; metrics.jsonl has all."""
CLASSES: dict[int, type[FedbiscuitError]] = {
    one.exit_code: one for one in (ConfigError, EnvironmentFault, FederationError, IntegrityError)
}
"""What a ServerApp's error is here, by its exit code."""

log = logging.getLogger("fedbiscuit")

APP_NAME = "fedbiscuit-run"
PROJECT = f"""[project]
name = "{APP_NAME}"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedbiscuit"

[tool.flwr.app.components]
serverapp = "fedbiscuit_run.app:server"
clientapp = "fedbiscuit_run.app:client"

[tool.flwr.app.config]
job = ""
"""
APP = "from fedbiscuit import flower_app\n\nclient = flower_app.client\nserver = flower_app.server\n"
"""What is sent through Flower: two small files that import the program that is installed on both sides."""


@dataclass(frozen=True, slots=True)
class _Job:
    """The files of a run at the server: its settings, what the ServerApp is told, Flower's number of it, whether it waits for
    clients, and how it has ended.
    """

    name: str
    config: Path
    asked: Path
    number: Path
    ended: Path
    waiting: Path

    @classmethod
    def of(cls, folder: Path, name: str) -> _Job:
        return cls(name, *(folder / f"{name}.{end}" for end in ("yaml", "json", "number", "ended.json", "waiting")))

    def now(self) -> str:
        """Flower's number of the run that was begun last and has not said how it has ended, or nothing."""
        number = self.number.read_text(encoding="utf-8").strip() if self.number.exists() else ""
        return "" if self.ending(number) else number

    def ending(self, number: str) -> dict[str, Any]:
        """How the run of this number has ended, or nothing; what another one has left does not count."""
        said = json.loads(self.ended.read_text(encoding="utf-8")) if self.ended.exists() else {}
        return said if said.get("run") == number else {}


def train_by_flower(cfg: Config, deploy: Path, resume: bool, timeout: float, progress: Any) -> Path:
    """Train the selectors of a run with the clients that are connected to the server of ``deploy``; the run folder.

    A run whose command was killed goes on at the server, and is followed here with ``resume``. ``FederationError`` where Flower's
    run fails, with the end of its log, or where the server does not answer for ``timeout`` seconds.
    """
    server = load(deploy)
    folder = server.folder / "jobs"
    folder.mkdir(exist_ok=True)
    job = _Job.of(folder, cfg.name)
    lock = FolderLock.take(folder / LOCK, "give the command again when that one has begun its run")
    try:
        _find_lost(server, folder)
        number = _under_way(server, job, cfg, resume)
        if number:
            log.warning("run %s is under way; it is followed, with the --timeout that it was started with", cfg.name)
        else:
            _is_alone(server, folder, job)
            with _stopped_with_us(server, job):
                number = _submit(server, job, cfg, resume, timeout)
    finally:
        lock.release()
    with _stopped_with_us(server, job):
        _follow(server, job, number, cfg, timeout, progress)
    return run_path(cfg.runs_dir, cfg.name)


def _find_lost(server: Deploy, folder: Path) -> None:
    """Note Flower's number of a run whose command ended before it could: it is under way, and no job has its number.

    Only one can be lost: nobody begins another before he has looked. The lock of ``folder`` must be held.
    """
    jobs = [_Job.of(folder, path.name.removesuffix(".yaml")) for path in folder.glob("*.yaml")]
    unnumbered = [job for job in jobs if job.asked.exists() and not job.number.exists()]
    if not unnumbered:
        return
    known = {job.number.read_text(encoding="utf-8").strip() for job in jobs if job.number.exists()}
    runs = [run for run in _flwr(server, "list")["runs"] if run["fab-name"] == APP_NAME and run["run-id"] not in known]
    lost = [run for run in runs if run["status"].startswith(UNDER_WAY)]
    *others, last = sorted(unnumbered, key=lambda job: job.asked.stat().st_mtime)
    if lost:
        begun = last.asked.stat().st_mtime
        atomic_write(last.number, max(lost, key=lambda run: run["pending-at"])["run-id"])
        os.utime(last.number, (begun, begun))
    for job in others if lost else unnumbered:
        job.asked.unlink()


def _under_way(server: Deploy, job: _Job, cfg: Config, resume: bool) -> str:
    """Flower's number of the run of this name that goes on, or nothing. One that is left over is stopped."""
    number = job.now()
    if not number:
        return ""
    if not _goes_on(server, job, number):  # its process is gone, whatever SuperLink believes
        with suppress(FederationError):
            _flwr(server, "stop", number)
        return ""
    place, here = Path(json.loads(job.asked.read_text(encoding="utf-8"))["run"]), _place_of(cfg)
    if place != here:
        raise ConfigError(
            f"run {cfg.name} is under way on this server, in {place} and not in {here}; give the command in the folder that "
            "it was begun in, or another name"
        )
    if not resume:
        raise EnvironmentFault(f"run {cfg.name} is under way; follow it with --resume (Ctrl-C then stops it)")
    if job.config.read_text(encoding="utf-8") != dump_config(cfg):
        raise ConfigError(
            f"run {cfg.name} is under way with other settings ({job.config}); follow it with those, or stop it by Ctrl-C first"
        )
    return number


def _is_alone(server: Deploy, folder: Path, job: _Job) -> None:
    """``EnvironmentFault`` where another run goes on: a site's worker has one open at a time, and would load for each in turn."""
    for path in sorted(folder.glob("*.number")):
        other = _Job.of(folder, path.name.removesuffix(".number"))
        number = "" if other.name == job.name else other.now()
        if number and _goes_on(server, other, number):
            raise EnvironmentFault(
                f"run {other.name} is under way on this server, and its sites take part in one at a time; wait for it, or "
                "follow it with --resume and stop it by Ctrl-C"
            )


def _goes_on(server: Deploy, job: _Job, number: str) -> bool:
    """Whether its ServerApp works, or has not begun yet: from ``flwr run`` until it locks its run folder it loads torch."""
    asked = json.loads(job.asked.read_text(encoding="utf-8"))
    lock = Path(asked["run"]) / LOCK
    if is_held(lock):
        return True
    has_begun = lock.exists() and lock.stat().st_mtime >= job.asked.stat().st_mtime
    is_young = time.time() - job.number.stat().st_mtime < asked["timeout"]
    return not has_begun and is_young and _status(server, number).startswith(UNDER_WAY)


def _place_of(cfg: Config) -> Path:
    return Path(os.path.abspath(run_path(cfg.runs_dir, cfg.name)))


def _submit(server: Deploy, job: _Job, cfg: Config, resume: bool, timeout: float) -> str:
    """Flower's number of a new run that does this job."""
    sites_of(server)  # a table that cannot be read is said here, not minutes later in a log
    for left in (job.number, job.ended, job.waiting):
        left.unlink(missing_ok=True)
    job.config.write_text(dump_config(cfg), encoding="utf-8")
    asked = {
        "config": str(job.config),
        "ended": str(job.ended),
        "waiting": str(job.waiting),
        "folder": os.getcwd(),
        "run": str(_place_of(cfg)),
        "resume": resume,
        "timeout": timeout,
        "registered": "" if server.insecure else str(server.folder / "sites.json"),
    }
    job.asked.write_text(json.dumps(asked), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder)
        (app / "fedbiscuit_run").mkdir()
        (app / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        (app / "fedbiscuit_run" / "__init__.py").write_text("", encoding="utf-8")
        (app / "fedbiscuit_run" / "app.py").write_text(APP, encoding="utf-8")
        told = _flwr(server, "run", str(app), "-c", f"job={json.dumps(str(job.asked))}")
    number = str(told["run-id"])
    atomic_write(job.number, number)
    return number


@contextmanager
def _stopped_with_us(server: Deploy, job: _Job) -> Iterator[None]:
    """Flower's run is stopped where whoever begins it or waits for it leaves, by Ctrl-C too."""
    try:
        yield
    except BaseException:
        if is_healthy(server):
            with suppress(FederationError, subprocess.SubprocessError, OSError):
                if not job.number.exists():  # so the lock is held: it is being begun
                    _find_lost(server, job.number.parent)
                if number := job.now():
                    _flwr(server, "stop", number)
        raise


def _follow(server: Deploy, job: _Job, number: str, cfg: Config, timeout: float, progress: Any) -> None:
    """Show each round that is done, until the run has ended; an error of the ServerApp is raised here."""
    metrics = run_path(cfg.runs_dir, cfg.name) / "metrics.jsonl"
    place, status, is_silent = _rounds(metrics, 0)[1], "", False
    begun = heard = asked = time.monotonic()
    trained = "selectors" if cfg.selectors.local.objective == "choice" else "policy"
    waits = ""
    while True:
        waits, waited = job.waiting.read_text(encoding="utf-8") if job.waiting.exists() else "", waits
        if waits not in ("", waited):
            log.warning("%s", waits)
        said = job.ending(number)
        has_ended = bool(said) or status.startswith("finished")
        rows, place = _rounds(metrics, place)
        for row in rows:
            for line in _missing(row):
                log.warning("round %d: %s", row["round"], line)
            progress(trained, row["round"] + 1, cfg.selectors.rounds, _note(row))
        if has_ended:
            break
        if time.monotonic() - asked >= ASK_EVERY:
            answered = _status(server, number)
            asked = time.monotonic()
            status, heard = (answered, asked) if answered else (status, heard)
            if not answered and not is_silent:
                log.warning("the server at %s does not answer; waiting for it up to %g s", server.address, timeout)
            is_silent = not answered
        if time.monotonic() - heard > timeout + ASK_EVERY:
            raise FederationError(
                f"the server at {server.address} has not answered for {timeout:g} s (--timeout); start it "
                f"(`fedbiscuit server start {server.folder}`) and go on with --resume"
            )
        if status.startswith("pending") and time.monotonic() - begun > timeout:
            raise FederationError(
                f"the server has not begun with this run in {timeout:g} s (--timeout); {server.folder / 'superexec.log'} may say "
                "why; go on with --resume"
            )
        time.sleep(POLL)
    said = said or job.ending(number)
    if not said:
        raise FederationError(
            f"the run ended as {status!r}; its own words:\n{_log_of(server, number)}\ngo on with --resume"
        )
    if said["error"]:
        step = "" if said["exit_code"] not in GOES_ON or "--resume" in said["error"] else "\ngo on with --resume"
        raise CLASSES.get(said["exit_code"], FederationError)(f"{said['error']}{step}")


def _status(server: Deploy, number: str) -> str:
    """What SuperLink says of a run; nothing where it does not answer."""
    if is_healthy(server):
        with suppress(FederationError, LookupError):
            return str(_flwr(server, "list", "--run-id", number)["runs"][0]["status"])
    return ""


def _rounds(metrics: Path, place: int) -> tuple[list[Mapping[str, Any]], int]:
    """The rounds that were done since, and the place behind them; a line that is half written is not one yet.

    A run that is resumed may cut its file: what then stands at the old place is read from the next line on.
    """
    if not metrics.exists():
        return [], 0
    with metrics.open("rb") as file:
        place = min(place, file.seek(0, os.SEEK_END))
        file.seek(max(0, place - 1))
        data = file.read()
    start = data.find(b"\n") + 1 if place else 0
    end = data.rfind(b"\n") + 1
    rows = [json.loads(line) for line in data[start:end].splitlines()]
    return rows, max(0, place - 1) + end if end else place


def _note(row: Mapping[str, Any]) -> str:
    refused = [f"{len(row['refused'])} refused"] if row["refused"] else []
    return ", ".join([row["phase"], *(["new groups"] if row["regrouped"] else []), *refused])


def _missing(row: Mapping[str, Any]) -> Iterator[str]:
    """Who took no part in a round, reason by reason."""
    for site, why in sorted(row.get("away", {}).items()):
        yield f"{site} took no part: {why}"
    for who, why in _by_reason(row["refused"]):
        yield f"nothing from {who}: {why}"
    for who, why in _by_reason(row.get("kept_seats", {})):
        yield f"no new seat for {who}: {why}"


def _by_reason(reasons: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The clients of each reason, the first few by name, and the reason."""
    clients: dict[str, list[str]] = {}
    for client, why in sorted(reasons.items()):
        clients.setdefault(why, []).append(client)
    for why, found in sorted(clients.items()):
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        yield f"{', '.join(found[:NAMED])}{more}", why


def _log_of(deploy: Deploy, number: str) -> str:
    env, name = connection_of(deploy)
    words = [program("flwr"), "log", number, name, "--show"]
    said = ""
    with suppress(subprocess.TimeoutExpired):
        said = subprocess.run(words, env=env, capture_output=True, text=True, timeout=SECONDS).stdout.strip()
    files = f"{deploy.folder / 'superexec.log'} and {deploy.folder / 'superlink.log'}"
    return "\n".join(said.splitlines()[-12:]) or f"(Flower tells none; see {files})"


def _flwr(deploy: Deploy, *words: str) -> dict[str, Any]:
    """What a command of Flower says; ``FederationError`` where it has not succeeded."""
    told = ask(deploy, *words)
    if not told.get("success"):
        raise FederationError(
            f"flwr {words[0]}: {str(told.get('error-message', 'no reason')).strip()}; is the server up? "
            f"(`fedbiscuit server start {deploy.folder}`)"
        )
    return told
