"""``python -m fedbiscuit.pipeline.helper RUN DEVICE SOCKET``: one more process of a run, with its model on another device.

It opens the run for reading and answers tasks until the socket is closed (``backends/devices.py``).
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from fedbiscuit.backends.devices import serve
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.config import load_config
from fedbiscuit.data.sources import load
from fedbiscuit.pipeline.session import Session, silent
from fedbiscuit.rundir import RunDir

__all__ = ["help_run"]


def help_run(folder: str, device: str, number: int) -> None:
    """Answer the tasks of the run in ``folder`` on ``device``; ``number`` is the socket's."""
    logging.getLogger("fedbiscuit").setLevel(logging.ERROR)  # the process that asks has said it already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; we end with our socket
    cfg = load_config(Path(folder) / "config.yaml")
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"device": device})})
    session = Session(cfg, RunDir.view(folder), load(cfg.data, cfg.seed), silent)
    serve(number, InProcessBackend(session.desk, session.clients))


if __name__ == "__main__":
    help_run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
