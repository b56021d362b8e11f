"""What Flower loads: the ServerApp, which runs a federation, and the ClientApp, which hands messages to a site's worker.

Every message starts a fresh ClientApp process, so it loads no torch: the worker (``backends/worker.py``) has the model.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

__all__ = ["client", "server"]

client = ClientApp()
server = ServerApp()

log = logging.getLogger("fedbiscuit")


@client.query()
def _answer(message: Message, context: Context) -> Message:
    """Bytes to the worker, its bytes back; where it is not there, why."""
    from fedbiscuit.backends.flower_messages import failure_of, message_bytes, record_of
    from fedbiscuit.backends.sockets import ask_at
    from fedbiscuit.types import FedbiscuitError

    config, worker = context.node_config, Path(str(context.node_config["worker"]))
    age = max(0.0, time.time() - message.metadata.created_at)  # 0 where the clocks differ the other way
    left = max(0.0, message.metadata.ttl - age)  # after that nobody waits at the server
    patience = min(float(config.get("timeout", 3600.0)), left)
    try:
        data = ask_at(worker, message_bytes(message), patience)
        return Message(record_of(data), reply_to=message)
    except FedbiscuitError as error:
        log.error("%s: %s", worker, error)  # where it is, this site's own log alone is told
        return Message(failure_of(str(error)), reply_to=message)


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    """Train the selectors of the job that the run's config names (``pipeline/remote.py``)."""
    from fedbiscuit.pipeline.remote import train_remotely

    train_remotely(grid, Path(str(context.run_config["job"])), context.run_id)
