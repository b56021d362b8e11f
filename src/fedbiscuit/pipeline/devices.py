"""Where the clients of a run are answered: in this process, or spread over several devices of this machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping

from fedbiscuit.backends.devices import Helper, SeveralDevices
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.models.lm import device_names
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import Backend, ClientData, ClientId

__all__ = ["backend_for"]


@contextlib.contextmanager
def backend_for(session: Session, clients: Mapping[ClientId, ClientData]) -> Iterator[Backend]:
    """The backend of a run in one process, over ``session.devices`` devices where there is more than one client."""
    here = InProcessBackend(session.desk, clients)
    count = min(session.devices, len(clients))
    if count < 2:
        yield here
        return
    names = device_names(session.cfg.model.device, count)
    command = [sys.executable, "-m", "fedbiscuit.pipeline.helper", str(session.run.path)]
    with contextlib.ExitStack() as stack:
        helpers = []
        for name in names[1:]:
            helpers.append(Helper([*command, name], name))
            stack.callback(helpers[-1].close)
        yield SeveralDevices(here, helpers)
