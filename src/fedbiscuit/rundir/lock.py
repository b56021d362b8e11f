"""The lock of a run folder: one writer at a time, and a message that says who."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedbiscuit.rundir.disk import disk_fault, write_all
from fedbiscuit.types import ConfigError, EnvironmentFault

__all__ = ["FolderLock", "is_held", "process_lives"]


class FolderLock:
    """An flock on a file that says who holds it. The kernel lets it go when the process ends, however it ends."""

    def __init__(self, path: Path, descriptor: int, left_by: str) -> None:
        self.path = path
        self.left_by = left_by
        """A sentence about the process that ended without closing, or nothing."""
        self._descriptor: int | None = descriptor
        _open_locks.add(self)

    @classmethod
    def take(cls, path: Path, instead: str = "give this run another name") -> FolderLock:
        """Lock, or an ``EnvironmentFault`` that names the process that has it, and what may be done ``instead`` of ending it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ConfigError(f"{path}: a symbolic link instead of a lock file; remove it") from error
            raise disk_fault(error, path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = _holder(descriptor)
            os.ftruncate(descriptor, 0)
            write_all(descriptor, json.dumps(_myself()).encode() + b"\n")
        except BlockingIOError as error:
            message = _in_use(path.parent, _holder(descriptor), instead)
            os.close(descriptor)
            raise EnvironmentFault(message) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise EnvironmentFault(
                    f"{path}: this file system has no locks, so two runs could spoil each other; "
                    "set runs_dir to a folder on a local disk"
                ) from error
            raise disk_fault(error, path) from error
        return cls(path, descriptor, _left(holder) if holder else "")

    def release(self) -> None:
        """Empty the file and let it go. The file itself stays: removing a locked file would let two in."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, and must not outlive it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_held(path: Path) -> bool:
    """Whether a process has this lock, from what the file says: trying would be in the way of a run that begins.

    A process on another machine cannot be asked and counts as one that goes on.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        holder = _holder(descriptor)
    finally:
        os.close(descriptor)
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    if holder.get("boot") != _boot_id():
        return False
    return process_lives(pid)


def process_lives(pid: int) -> bool:
    """Whether a process of this number is there, of whomever."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _myself() -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "boot": _boot_id(), "host": socket.gethostname(), "started": started}


def _holder(descriptor: int) -> dict[str, Any]:
    """What the file says; empty where it says nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(os.pread(descriptor, 4096, 0))
        return value if isinstance(value, dict) else {}
    return {}


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, started {holder.get('started', '?')}"


def _in_use(folder: Path, holder: dict[str, Any], instead: str) -> str:
    if holder.get("pid") == os.getpid() and holder.get("boot") == _boot_id():
        return f"{folder}: open already in this process ({holder['pid']}); close that RunDir first"
    step = f"wait for it, stop it (kill {holder.get('pid', 'PID')}), or {instead}"
    return f"{folder}: in use by {_who(holder) if holder else 'another process'}; {step}"


def _left(holder: dict[str, Any]) -> str:
    restarted = holder.get("host") == socket.gethostname() and holder.get("boot") != _boot_id()
    return f"{_who(holder)}, ended without closing" + (" when the machine was restarted" if restarted else "")


_open_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_open_locks):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
