"""One run = one folder: locked while it is written, every file whole or absent, the last complete state always wins.

``folder.py`` is the run folder. Below it: ``states.py`` (what resume needs), ``adapters.py`` (PEFT folders),
``tensors.py`` (one adapter file), ``values.py`` (JSON), ``lock.py``, ``machine.py``, ``folders.py`` and ``disk.py``
(writes that survive a crash). Nothing here imports torch before it is needed.
"""

from fedbiscuit.rundir.disk import atomic_write, check_space, crash_point, sha256_of, uninterrupted
from fedbiscuit.rundir.folder import CRASH_POINTS, RunDir, run_path
from fedbiscuit.rundir.machine import machine_differences, machine_manifest
from fedbiscuit.rundir.tensors import expected_of, read_metadata, read_weights, write_weights

__all__ = [
    "CRASH_POINTS",
    "RunDir",
    "atomic_write",
    "check_space",
    "crash_point",
    "expected_of",
    "machine_differences",
    "machine_manifest",
    "read_metadata",
    "read_weights",
    "run_path",
    "sha256_of",
    "uninterrupted",
    "write_weights",
]
