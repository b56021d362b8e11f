"""A site's worker: ``python -m fedbiscuit.deployment.site_worker FOLDER SOCKET FILE...``, from ``site_processes.py``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fedbiscuit.backends.worker import Rules, Worker, serve_at
from fedbiscuit.deployment.site import settings_of
from fedbiscuit.pipeline.site import Site
from fedbiscuit.rundir.ledger import LEDGER

__all__ = ["serve"]


def serve(folder: Path, socket: Path, files: Sequence[str]) -> bool:
    """Answer at the socket until SIGTERM; whether nothing was left undone."""
    os.nice(5)  # carrying a message goes first: Flower starts the process for it anew where it is not up in 30 seconds
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    how = settings_of(folder)
    site = Site(tuple(files), how.device, how.threads, dict(how.models), how.held_out)
    rules = Rules(how.kinds, how.allow_models, how.rounds, how.comparisons, how.task_comparisons)
    return serve_at(socket, Worker(site.open_run, rules, folder / LEDGER), stop)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", level=logging.INFO)
    done = serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if done else 1)  # a task in the middle is not waited for any longer
