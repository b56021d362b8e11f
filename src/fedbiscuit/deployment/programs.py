"""Flower's own programs: where they are, and what they are told by their environment."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fedbiscuit.types import EnvironmentFault

__all__ = ["flower_env", "program"]


def program(name: str) -> str:
    """The path of a program that comes with flwr, beside this Python or on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise EnvironmentFault(f"{name} is not installed; real clients need `pip install 'fedbiscuit[flower]'`")
    return found


def flower_env(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: their settings in ``home``, no telemetry unless the user has turned it on, and
    nothing that is meant for this machine goes through a company's proxy.
    """
    off = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kept = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    direct = ",".join(filter(None, [kept, "localhost", "127.0.0.1"]))
    ours = {"FLWR_HOME": str(home.resolve()), "PATH": path, "NO_PROXY": direct, "no_proxy": direct}
    return {**off, **os.environ, **ours}
