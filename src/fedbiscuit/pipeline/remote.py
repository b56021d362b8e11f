"""The selector phase with real clients: what Flower's ServerApp does (``flower_app.py``), for a job that the command wrote."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedbiscuit.config import FederatedSettings, load_config
from fedbiscuit.pipeline import train_selectors
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.site import asked_as
from fedbiscuit.rundir import atomic_write, dump_json, load_json
from fedbiscuit.types import FedbiscuitError

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["train_remotely"]

log = logging.getLogger("fedbiscuit")


def train_remotely(grid: Grid, job: Path, number: int) -> None:
    """Train the selectors of the job's config over the nodes of ``grid``.

    The job is JSON: config, a file with all settings; ended, where to say how it has ended, with Flower's ``number`` of this
    run, for there may have been another; resume; folder, where its paths are seen from; timeout, seconds for one exchange;
    registered, the file that says which nodes may have which clients, read whenever they are asked, or nothing; waiting, where to
    say that too few clients are there, for as long as that is so.
    """
    from fedbiscuit.backends.flower import FlowerBackend

    asked = json.loads(job.read_text(encoding="utf-8"))
    os.chdir(asked["folder"])  # paths in a config are seen from where the command was given

    def registered() -> dict[int, tuple[str, list[str]]]:
        path = Path(asked["registered"])
        sites = load_json(path, path.read_bytes())
        return {int(node): (site["key"], site["clients"]) for node, site in sites.items()}

    def wait(text: str) -> None:
        if text:
            log.warning("%s", text)
        atomic_write(Path(asked["waiting"]), text)

    def connect(session: Session, settings: FederatedSettings, name: str) -> FlowerBackend:
        run, terms = asked_as(session, settings, name)
        known = registered if asked["registered"] else None
        least = session.cfg.selectors.min_replies
        return FlowerBackend(grid, run, terms, asked["timeout"], known, log.warning, least, wait)

    error: BaseException | None = None
    try:
        train_selectors(load_config(asked["config"]), resume=asked["resume"], connect=connect)
    except BaseException as caught:
        error = caught
        raise
    finally:
        said = str(error) if isinstance(error, FedbiscuitError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, FedbiscuitError) else FedbiscuitError.exit_code
        how = {"error": said if error else "", "exit_code": code if error else 0, "run": str(number)}
        atomic_write(Path(asked["ended"]), dump_json(how) + "\n")
