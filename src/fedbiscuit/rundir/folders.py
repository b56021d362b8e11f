"""Folders that appear whole or not at all, and what to do with the halves that a kill leaves."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedbiscuit.rundir.disk import crash_point, disk_fault, sync_folder

__all__ = ["OLD", "TEMPORARY", "remove_folder", "rename_folder", "tidy", "whole_folder"]

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
