"""Files that survive a crash: write beside, fsync, rename, fsync the folder; and say plainly what the disk refuses.

The lowest floor of the run folder; knows nothing about runs, models or tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import signal
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fedbiscuit.types import EnvironmentFault, IntegrityError

__all__ = [
    "Steps",
    "atomic_write",
    "check_space",
    "crash_point",
    "disk_fault",
    "disk_faults",
    "human_bytes",
    "read_regular",
    "sha256_of",
    "sync_folder",
    "uninterrupted",
    "write_synced",
]

logger = logging.getLogger("fedbiscuit")

CHUNK = 1 << 20
NO_WRITE = {errno.EACCES: "may not be written by you", errno.EPERM: "may not be written", errno.EROFS: "is read-only"}
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f)",
}


# Crash tests


_passes: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """For crash tests: kill this process with SIGKILL at the n-th pass when FEDBISCUIT_CRASH_AT is ``name:n``.

    Without the variable it does nothing. ``name`` alone means the first pass.
    """
    wanted = os.environ.get("FEDBISCUIT_CRASH_AT")
    if not wanted:
        return
    at, _, count = wanted.partition(":")
    if at == name:
        _passes[name] += 1
        if _passes[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


# What the disk says


def human_bytes(count: int) -> str:
    """``1234567`` as ``1.2 MB``."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk of ``path``, or of its nearest folder that exists; None where that cannot be known."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


@dataclass(frozen=True, slots=True)
class Steps:
    """What to do where the disk is full (``room``), and where one may not write (``right``)."""

    room: str
    right: str


OF_A_RUN = Steps(
    "make room, then start the same command with --resume; what was saved before is intact",
    "give yourself the right to write there, or set runs_dir to another folder",
)


def disk_fault(error: OSError, path: Path, needed: int | None = None, steps: Steps = OF_A_RUN) -> EnvironmentFault:
    """The message for what the operating system refused, with the next step; ``needed`` in bytes."""
    if error.errno in FULL:
        free = free_bytes(path)
        sizes = [f"{human_bytes(needed)} needed"] if needed is not None else []
        sizes += [f"{human_bytes(free)} free"] if free is not None else []
        why = FULL[error.errno] + (f" ({', '.join(sizes)})" if sizes else "")
        step = steps.room
    elif error.errno in NO_WRITE:
        why = f"this place {NO_WRITE[error.errno]}"
        step = steps.right
    else:
        why, step = (error.strerror or str(error)), "check the path and the disk"
    return EnvironmentFault(f"{path}: {why}; {step}")


@contextlib.contextmanager
def disk_faults(path: Path, needed: int | None = None, steps: Steps = OF_A_RUN) -> Iterator[None]:
    """Turn each OSError of the block into an ``EnvironmentFault`` about ``path``."""
    try:
        yield
    except OSError as error:
        raise disk_fault(error, path, needed, steps) from error


def check_space(path: Path, needed: int) -> None:
    """Stop before work is lost: ``EnvironmentFault`` where the disk of ``path`` has fewer than ``needed`` bytes."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise disk_fault(OSError(errno.ENOSPC, ""), path, needed)


# Reading


def read_regular(path: Path, limit: int | None = None) -> bytearray:
    """The bytes of a regular file; a pipe, a device or more than ``limit`` bytes is an ``IntegrityError``."""
    with open(_open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise IntegrityError(
                f"{path}: {size} bytes, at most {limit} are expected; this is not the file it should be"
            )
        data = bytearray(size)
        view, filled = memoryview(data), 0
        try:
            while filled < size and (count := file.readinto(view[filled:])):
                filled += count
        except OSError as error:
            raise IntegrityError(f"{path}: the disk cannot read it back ({error.strerror}); check the disk") from error
        view.release()
        del data[filled:]
        return data


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a regular file, read in chunks."""
    digest = hashlib.sha256()
    with open(_open_regular(Path(path)), "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _open_regular(path: Path) -> int:
    """A descriptor; O_NONBLOCK so that a pipe cannot hang us."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: there is no such file; check the path") from error
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}; check the path and its rights") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path}: not a regular file (a folder, pipe or device); give a file")
    return descriptor


# Writing


def write_synced(path: Path, chunks: Iterable[bytes | memoryview], mode: int = 0o666) -> str:
    """Write a new file in pieces, fsync it; the hex sha256 of what was written. OSError is the caller's."""
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        for chunk in chunks:
            digest.update(chunk)
            write_all(descriptor, chunk)
            crash_point("file_half")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All bytes, however many calls the system wants."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def sync_folder(path: Path) -> None:
    """Make renames in this folder last; file systems that cannot are left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, data: bytes | str, mode: int = 0o666, steps: Steps = OF_A_RUN) -> str:
    """Replace a file so that a crash leaves the old or the new one, never a mixture; returns the hex sha256.

    mode: who may read it, less what the umask takes away. steps: for the message.
    On any failure the old file stays, the temporary one is removed, and the message is an ``EnvironmentFault``.
    """
    path, payload = Path(path), data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with disk_faults(path, len(payload), steps):
        try:
            digest = write_synced(temporary, [payload], mode)
            crash_point("file_written")
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        crash_point("file_renamed")
        sync_folder(path.parent)
    return digest


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the block is done; a second one stops at once.

    Masking signals is not enough: threads of torch would take them. In other threads than the first it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)
        if len(held) > 1:
            raise KeyboardInterrupt
        logger.info("stopping as soon as this is written; press again to stop at once")

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if len(held) == 1:
            signal.raise_signal(held[0])
