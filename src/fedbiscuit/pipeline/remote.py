"""The selector phase with real clients: what Flower's ServerApp does (``flower_app.py``), for a job that the command wrote."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedbiscuit.config import load_config
from fedbiscuit.pipeline import train_selectors
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.site import terms_of
from fedbiscuit.rundir import atomic_write, dump_json
from fedbiscuit.types import FedbiscuitError

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["train_remotely"]

log = logging.getLogger("fedbiscuit")


def train_remotely(grid: Grid, job: Path) -> None:
    """Train the selectors of the job's config over the nodes of ``grid``.

    The job is JSON: config, a file with all settings; ended, where to say how it has ended; resume; folder, where its
    paths are seen from; timeout, seconds for one exchange; names, the clients that each node may have, and sites, what
    each is called; only_named, whether a node that is not among them has none.
    """
    from fedbiscuit.backends.flower import FlowerBackend

    asked = json.loads(job.read_text(encoding="utf-8"))
    os.chdir(asked["folder"])  # paths in a config are seen from where the command was given
    names = {int(node): clients for node, clients in asked["names"].items()}
    sites = {int(node): site for node, site in asked["sites"].items()}

    def connect(session: Session) -> FlowerBackend:
        terms = terms_of(session.cfg, session.lm.digest)
        bound = names if asked["only_named"] else None
        least = session.cfg.selectors.min_replies
        return FlowerBackend(grid, session.cfg.name, terms, asked["timeout"], bound, log.warning, sites, least)

    error: BaseException | None = None
    try:
        train_selectors(load_config(asked["config"]), resume=asked["resume"], connect=connect)
    except BaseException as caught:
        error = caught
        raise
    finally:
        said = str(error) if isinstance(error, FedbiscuitError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, FedbiscuitError) else FedbiscuitError.exit_code
        how = {"error": said if error else "", "exit_code": code if error else 0}
        atomic_write(Path(asked["ended"]), dump_json(how) + "\n")
