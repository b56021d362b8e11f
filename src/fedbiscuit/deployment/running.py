"""A run handed to a SuperLink: ``fedbiscuit train CONFIG --backend flower --deploy FOLDER`` waits here and shows how it goes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedbiscuit.config import Config, dump_config
from fedbiscuit.deployment.programs import program
from fedbiscuit.deployment.registration import sites_of
from fedbiscuit.deployment.server import Deploy, ask, connection_of, load
from fedbiscuit.rundir import run_path
from fedbiscuit.types import FederationError

__all__ = ["train_by_flower"]

POLL = 2.0
"""Seconds between two looks at how the run goes."""

PROJECT = """[project]
name = "fedbiscuit-run"
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


def train_by_flower(cfg: Config, deploy: Path, resume: bool, timeout: float, progress: Any) -> Path:
    """Train the selectors of a run with the clients that are connected to the server of ``deploy``; the run folder.

    ``FederationError`` where Flower's run fails, with the end of its log.
    """
    server = load(deploy)
    jobs = server.folder / "jobs"
    jobs.mkdir(exist_ok=True)
    config, job = jobs / f"{cfg.name}.yaml", jobs / f"{cfg.name}.json"
    config.write_text(dump_config(cfg), encoding="utf-8")
    asked = {
        "config": str(config),
        "folder": os.getcwd(),
        "resume": resume,
        "timeout": timeout,
        "names": {node: site["clients"] for node, site in sites_of(server).items()},
        "only_named": not server.insecure,
    }
    job.write_text(json.dumps(asked), encoding="utf-8")
    with _submitted(server, job) as number:
        _follow(server, number, cfg, progress)
    return run_path(cfg.runs_dir, cfg.name)


@contextmanager
def _submitted(deploy: Deploy, job: Path) -> Iterator[str]:
    """Flower's run of this job, by its number; stopped where whoever waits for it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder)
        (app / "fedbiscuit_run").mkdir()
        (app / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        (app / "fedbiscuit_run" / "__init__.py").write_text("", encoding="utf-8")
        (app / "fedbiscuit_run" / "app.py").write_text(APP, encoding="utf-8")
        told = _flwr(deploy, "run", str(app), "-c", f"job={json.dumps(str(job))}")
    number = str(told["run-id"])
    try:
        yield number
    except BaseException:
        with suppress(FederationError, subprocess.SubprocessError, OSError):
            _flwr(deploy, "stop", number)
        raise


def _follow(deploy: Deploy, number: str, cfg: Config, progress: Any) -> None:
    """Show each round that is done, until the run has ended."""
    metrics = run_path(cfg.runs_dir, cfg.name) / "metrics.jsonl"
    shown = len(_rounds(metrics))
    while True:
        status = str(_flwr(deploy, "list", "--run-id", number)["runs"][0]["status"])
        rounds = _rounds(metrics)
        for row in rounds[shown:]:
            progress("selectors", row["round"] + 1, cfg.selectors.rounds, _note(row))
        shown = max(shown, len(rounds))
        if status.startswith("finished"):
            break
        time.sleep(POLL)
    if status != "finished:completed":
        raise FederationError(
            f"the run ended as {status!r}; its own words:\n{_log_of(deploy, number)}\ngo on with --resume"
        )


def _rounds(metrics: Path) -> list[Mapping[str, Any]]:
    """The rounds that are done; a line that is half written is not one yet."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return [json.loads(line) for line in lines]


def _note(row: Mapping[str, Any]) -> str:
    refused = [f"{client}: {why}" for client, why in sorted(row["refused"].items())]
    return ", ".join([row["phase"], *(["new groups"] if row["regrouped"] else []), *refused[:3]])


def _log_of(deploy: Deploy, number: str) -> str:
    env, name = connection_of(deploy)
    words = [program("flwr"), "log", number, name, "--show"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    return "\n".join(done.stdout.strip().splitlines()[-12:])


def _flwr(deploy: Deploy, *words: str) -> dict[str, Any]:
    """What a command of Flower says; ``FederationError`` where it has not succeeded."""
    told = ask(deploy, *words)
    if not told.get("success"):
        raise FederationError(
            f"flwr {words[0]}: {str(told.get('error-message', 'no reason')).strip()}; is the server up? "
            f"(`fedbiscuit server start {deploy.folder}`)"
        )
    return told
