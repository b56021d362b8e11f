"""Where the work of a run is done: in this process, or spread over several devices of this machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping

from fedbiscuit.backends.devices import Helper, SeveralDevices
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.config import FederatedSettings
from fedbiscuit.models.base import device_names
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import Backend, ClientData, ClientId

__all__ = ["backend_for", "helpers_for"]


@contextlib.contextmanager
def backend_for(
    session: Session, clients: Mapping[ClientId, ClientData], settings: FederatedSettings, name: str
) -> Iterator[Backend]:
    """Where clients are asked to train the adapters ``name``.

    On other machines, or here, over ``session.devices`` devices if there is more than one client.
    """
    if session.connect is not None:
        yield session.connect(session, settings, name)
        return
    here = InProcessBackend(session.desk, clients)
    with helpers_for(session, "clients", session.cfg.model.device, min(session.devices, len(clients))) as helpers:
        yield SeveralDevices(here, helpers) if helpers else here


@contextlib.contextmanager
def helpers_for(session: Session, work: str, device: str, count: int) -> Iterator[list[Helper]]:
    """Beside this process, which works on ``device``, one for each device more, ``count`` in all; they end with the context."""
    names = device_names(device, count) if count > 1 else []
    command = [sys.executable, "-W", "ignore", "-m", "fedbiscuit.pipeline.helper", str(session.run.path), work]
    with contextlib.ExitStack() as stack:
        helpers = []
        for name in names[1:]:
            helpers.append(Helper([*command, name], name))
            stack.callback(helpers[-1].close)
        yield helpers
