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

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["train_remotely"]

log = logging.getLogger("fedbiscuit")


def train_remotely(grid: Grid, job: Path) -> None:
    """Train the selectors of the job's config over the nodes of ``grid``.

    The job is JSON: config, a file with all settings; resume; folder, where its
    paths are seen from; timeout, seconds for one exchange; names, the clients that each
    node may have; only_named, whether a node that is not among them has none.
    """
    from fedbiscuit.backends.flower import FlowerBackend

    asked = json.loads(job.read_text(encoding="utf-8"))
    os.chdir(asked["folder"])  # paths in a config are seen from where the command was given
    names = {int(node): clients for node, clients in asked["names"].items()}

    def connect(session: Session) -> FlowerBackend:
        terms = terms_of(session.cfg, session.lm.digest)
        bound = names if asked["only_named"] else None
        return FlowerBackend(grid, session.cfg.name, terms, asked["timeout"], bound, log.warning)

    train_selectors(load_config(asked["config"]), resume=asked["resume"], connect=connect)
