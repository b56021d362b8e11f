"""``python -m fedbiscuit.pipeline.helper RUN WORK DEVICE SOCKET``: one more process of a run, with its model on another device.

It opens the run for reading and answers messages until the socket is closed (``backends/devices.py``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from fedbiscuit.backends.devices import serve
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.backends.wire import pack_reply, unpack_task
from fedbiscuit.config import Config, load_config
from fedbiscuit.data.sources import load
from fedbiscuit.models.lm import load_lm
from fedbiscuit.pipeline.dpo import Part
from fedbiscuit.pipeline.session import Session, silent
from fedbiscuit.rundir import RunDir

__all__ = ["help_run"]

Answer = Callable[[bytes], bytes]


def help_run(folder: str, work: str, device: str, number: int) -> None:
    """Answer the messages about the run in ``folder`` on ``device``; ``number`` is the socket's."""
    logging.getLogger("fedbiscuit").setLevel(logging.ERROR)  # the process that asks has said it already
    cfg = load_config(Path(folder) / "config.yaml")
    models = {"model": cfg.model, "policy_model": cfg.policy_model}
    there = {key: model.model_copy(update={"device": device}) for key, model in models.items() if model}
    serve(number, WORK[work](cfg.model_copy(update=there), RunDir.view(folder)))


def _clients(cfg: Config, run: RunDir) -> Answer:
    """The tasks of clients."""
    session = Session(cfg, run, load(cfg.data, cfg.seed), silent)
    backend = InProcessBackend(session.desk, session.clients)
    return lambda message: pack_reply(backend.run([unpack_task(message)])[0])


def _dpo(cfg: Config, run: RunDir) -> Answer:
    """Parts of the alignment."""
    return Part.of(cfg, run, load_lm(cfg.policy_model or cfg.model)).answer


WORK: dict[str, Callable[[Config, RunDir], Answer]] = {"clients": _clients, "dpo": _dpo}
"""What a helper is asked for, to how it answers."""


if __name__ == "__main__":
    help_run(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
