"""One run = one folder: locked while it is written, every file whole or absent, the last complete state always wins.

``folder.py`` is the run folder. Below it: ``states.py`` (what resume needs), ``adapters.py`` (PEFT folders),
``tensors.py`` (one adapter file), ``values.py`` (JSON), ``lock.py``, ``machine.py``, ``folders.py`` and ``disk.py``
(writes that survive a crash). Nothing here imports torch before it is needed.
"""

from fedbiscuit.rundir.adapters import base_of, read_adapter, read_adapter_config, write_adapter_files
from fedbiscuit.rundir.disk import (
    atomic_write,
    check_space,
    crash_point,
    read_regular,
    sha256_of,
    uninterrupted,
    write_synced,
)
from fedbiscuit.rundir.folder import CRASH_POINTS, RunDir, run_path
from fedbiscuit.rundir.folders import new_folder
from fedbiscuit.rundir.machine import machine_differences, machine_manifest
from fedbiscuit.rundir.tensors import expected_of, read_metadata, read_weights, write_weights
from fedbiscuit.rundir.values import dump_json, load_json

__all__ = [
    "CRASH_POINTS",
    "RunDir",
    "atomic_write",
    "base_of",
    "check_space",
    "crash_point",
    "dump_json",
    "expected_of",
    "load_json",
    "machine_differences",
    "machine_manifest",
    "new_folder",
    "read_adapter",
    "read_adapter_config",
    "read_metadata",
    "read_regular",
    "read_weights",
    "run_path",
    "sha256_of",
    "uninterrupted",
    "write_adapter_files",
    "write_synced",
    "write_weights",
]
