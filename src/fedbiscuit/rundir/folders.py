"""Folders that appear whole or not at all, and what to do with the halves that a kill leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedbiscuit.rundir.disk import crash_point, disk_fault, sync_folder
from fedbiscuit.types import ConfigError, EnvironmentFault

__all__ = ["OLD", "TEMPORARY", "new_folder", "remove_folder", "rename_folder", "tidy", "whole_folder"]

TEMPORARY, OLD = ".tmp-", ".old-"


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write to, which becomes ``target`` at the end of the block, whatever was there before.

    When the block fails, ``target`` is as it was and the temporary folder is gone; OSError becomes
    ``EnvironmentFault``. The files in it must have been fsynced.
    """
    temporary, old = target.with_name(TEMPORARY + target.name), target.with_name(OLD + target.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        crash_point("folder_written")
        if target.exists():
            os.rename(target, old)
            crash_point("folder_moved_away")
        os.rename(temporary, target)
        crash_point("folder_renamed")
        sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        if isinstance(error, OSError):
            raise disk_fault(error, target) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write to, which becomes ``target`` at the end of the block; for a place that a user chose.

    Nothing is replaced: a file there, or a folder with something in it, is a ``ConfigError``, also when it comes while the
    block runs. When the block fails nothing stays. The files in it must have been fsynced.
    """
    _check_free(target)
    temporary = target.with_name(TEMPORARY + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            sync_folder(folder)
        crash_point("folder_written")
        os.rename(temporary, target)  # takes the place of an empty folder, and of nothing else
        sync_folder(target.parent)
    except (OSError, EnvironmentFault) as error:
        refused = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(refused, OSError):
            raise
        if refused.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            _check_free(target)
        why = (refused.strerror or str(refused)).lower()
        raise EnvironmentFault(f"{target}: {why}; nothing was written; make room, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"{target}: there is a file of this name; name a new folder")
    if target.is_dir() and (held := sorted(entry.name for entry in target.iterdir())):
        raise ConfigError(f"{target}: not empty ({held[0]} is in it); name a new folder, or empty this one first")


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill leaves nothing that looks whole; what cannot be removed stays."""
    doomed = folder.with_name(TEMPORARY + folder.name)
    rename_folder(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rename_folder(folder: Path, new: Path) -> None:
    """Rename, in place of what has the new name; where that is not allowed the folder stays."""
    with contextlib.suppress(OSError):
        shutil.rmtree(new, ignore_errors=True)
        os.rename(folder, new)


def tidy(folder: Path) -> None:
    """Undo what a kill left half-way, in all folders below: temporary things go, what was being replaced comes back."""
    for entry in sorted(folder.iterdir()):
        place = entry.with_name(entry.name.removeprefix(OLD))
        if entry.name.startswith(OLD) and not place.exists():
            os.rename(entry, place)
        elif entry.name.startswith((TEMPORARY, OLD)):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        elif entry.is_dir() and not entry.is_symlink():
            tidy(entry)
