"""One run = one folder: locked while it is written, every file whole or absent, the last complete state always wins.

with RunDir.open("runs/demo", resume=True) as run:
    found = run.load_state("selectors")            # None, or (step, tensors, values)
    run.append_lines("metrics.jsonl", [row])
    run.save_state("selectors", step, {"u0": weights}, {"grouping": grouping})
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedbiscuit.rundir.adapters import read_adapter, write_adapter
from fedbiscuit.rundir.disk import (
    atomic_write,
    crash_point,
    disk_fault,
    disk_faults,
    read_regular,
    sync_folder,
    uninterrupted,
    write_all,
)
from fedbiscuit.rundir.folders import TEMPORARY, remove_folder, rename_folder, tidy
from fedbiscuit.rundir.lock import FolderLock, is_held
from fedbiscuit.rundir.states import prune_states, read_state, states_in, write_state
from fedbiscuit.rundir.tensors import Expected
from fedbiscuit.rundir.values import dump_json, first_difference, leaves_of, load_json, plain
from fedbiscuit.strict_yaml import parse_yaml, read_yaml
from fedbiscuit.types import ConfigError, IntegrityError, Weights

__all__ = ["CRASH_POINTS", "RunDir", "run_path"]

logger = logging.getLogger("fedbiscuit")

LOCK = "run.lock"
BAD = "bad-"
RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

CRASH_POINTS = (
    "state_begin",
    "file_half",
    "state_tensors",
    "state_values",
    "state_manifest",
    "folder_written",
    "folder_moved_away",
    "folder_renamed",
    "state_saved",
    "state_pruned",
    "file_written",
    "file_renamed",
    "lines_half",
    "lines_written",
)
"""Where this room can be killed in crash tests; see ``crash_point``."""


def run_path(runs_dir: str | Path, name: str) -> Path:
    """The folder of a run, or a ``ConfigError``: a name cannot lead out of ``runs_dir``."""
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"name: {name!r:.80} is not a name for a run; use 1 to 64 of a-z 0-9 . _ -, the first a letter or digit"
        )
    return Path(runs_dir) / name


class RunDir:
    """The folder of one run. A context manager: while it is open, no other process can open it."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        self.path = path
        self.notices: list[str] = []
        """What was repaired or stepped back from, in sentences; each was logged too."""
        self._lock = lock

    # Opening and closing

    @classmethod
    def open(cls, path: str | Path, *, resume: bool) -> RunDir:
        """A new folder, or with ``resume`` one that is there already (or not yet: then it is a start).

        A used folder without ``resume``, a symbolic link or something that is no run folder is a ``ConfigError``; a
        folder in use by another process or one that cannot be written is an ``EnvironmentFault``.
        """
        path = Path(path)
        used = _used(path)
        if used and not resume:
            raise ConfigError(
                f"{path}: holds a run already; add --resume to go on with it, or give this run another name"
            )
        if used and not (path / LOCK).exists() and not (path / "config.yaml").exists():
            raise ConfigError(f"{path}: not the folder of a run ({used[0]} is in it); give this run another name")
        with disk_faults(path):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
        lock = FolderLock.take(path / LOCK)
        try:
            if not resume and _used(path):
                raise ConfigError(f"{path}: another process has just used it; give this run another name")
            run = cls(path, lock)
            if lock.left_by:
                run._say(f"{path}: {lock.left_by}; going on from the last complete state", logging.INFO)
            if resume and not used:
                run._say(f"{path}: nothing to resume, this is a start", logging.INFO)
            with disk_faults(path):
                tidy(path)
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def view(cls, path: str | Path) -> RunDir:
        """For reading only, also while another process writes: takes no lock and repairs nothing."""
        if not _used(Path(path)):
            raise ConfigError(f"{path}: there is no run here; check the name, or start one with `fedbiscuit run`")
        return cls(Path(path), None)

    def in_use(self) -> bool:
        """Whether a process has this folder open to write, this one included."""
        return is_held(self.path / LOCK)

    def close(self) -> None:
        """Let the folder go; twice is no harm."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Files

    def write_text(self, name: str, text: str) -> None:
        """Replace a file atomically."""
        atomic_write(self._target(name), text)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file atomically; NaN and infinity become null, since JSON has neither."""
        atomic_write(self._target(name), dump_json(plain(value), indent=2) + "\n")

    def read_json(self, name: str) -> Any | None:
        """The value, or None where there is no such file."""
        path = self._inside(name)
        return load_json(path, read_regular(path)) if path.exists() else None

    def append_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add one JSON line a row: one write, then fsync. When the disk refuses, the file is as it was before."""
        path = self._target(name)
        data = "".join(dump_json(plain(row)) + "\n" for row in rows).encode()
        with disk_faults(path, len(data)):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o666)
            try:
                size = self._without_torn_line(path, descriptor)
                try:
                    middle = len(data) // 2 if os.environ.get("FEDBISCUIT_CRASH_AT") else len(data)
                    write_all(descriptor, data[:middle])
                    crash_point("lines_half")
                    write_all(descriptor, data[middle:])
                    os.fsync(descriptor)
                    if size == 0:
                        sync_folder(path.parent)
                except BaseException:
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
        crash_point("lines_written")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """All whole lines, [] where there is no file; a last line that a kill cut off is left out and said."""
        path = self._inside(name)
        rows = []
        for number, line in enumerate(self._whole_lines(path), start=1):
            row = load_json(path, line, number)
            if not isinstance(row, dict):
                raise IntegrityError(f"{path}:{number}: not a table; delete the line if you can do without it")
            rows.append(row)
        return rows

    def keep_lines(self, name: str, count: int) -> None:
        """Keep the first ``count`` lines, atomically; fewer lines than that is an ``IntegrityError``."""
        path = self._target(name)
        lines = self._whole_lines(path)
        if len(lines) < count:
            raise IntegrityError(
                f"{path}: {len(lines)} lines, the saved state has seen {count}; restore the file, or start a new run"
            )
        kept = b"".join(line + b"\n" for line in lines[:count])
        if path.exists() and path.stat().st_size != len(kept):
            atomic_write(path, kept)

    def check_same(self, name: str, new: Mapping[str, Any] | str, what: str) -> None:
        """Stop when file ``name`` of this run says otherwise than ``new``, naming the first key that differs.

        Text (``config.yaml`` as it would be written now) is compared as YAML and gives a ``ConfigError``; a table is
        compared with the same keys of a JSON file (digests in ``manifest.json``) and gives an ``IntegrityError``. No
        such file: nothing to compare.
        """
        path = self._inside(name)
        if not path.exists():
            return
        if isinstance(new, str):
            before, after = leaves_of(read_yaml(path).value), leaves_of(parse_yaml(new, "new").value)
        else:
            saved = self.read_json(name)
            saved = saved if isinstance(saved, dict) else {}
            before, after = leaves_of({key: saved[key] for key in new if key in saved}), leaves_of(plain(new))
        difference = first_difference(before, after)
        if difference is None:
            return
        key, was, now = difference
        text = f"{path}: {key}: {what} of this run: {was}, now: {now}; "
        if isinstance(new, str):
            raise ConfigError(text + "resume with the same settings, or give the new run another name")
        raise IntegrityError(text + "put back what it was, or start a new run under another name")

    # States

    def save_state(self, stage: str, step: int, tensors: Mapping[str, Weights], values: Mapping[str, Any]) -> None:
        """Save all that resuming at ``step`` needs: one folder that appears whole or not at all; keeps the last three.

        ``values`` must survive JSON: text keys, finite numbers. Ctrl-C waits until it is done. On any failure the
        states before it are intact and no temporary file stays.
        """
        if not 0 <= step < 10**8:
            raise ValueError(f"step {step} is not in 0..99999999")
        names = {_checked(key): weights for key, weights in tensors.items()}
        with uninterrupted():
            write_state(self._target(f"state/{stage}/x").parent, step, names, values)

    def load_state(self, stage: str) -> tuple[int, dict[str, Weights], dict[str, Any]] | None:
        """The newest complete state of a stage as (step, tensors, values), or None where none was ever saved.

        Every file is compared with its sha256. A state that fails is stepped back from, loudly (a warning, and
        ``notices``), and set aside as ``bad-STEP``. When all fail: ``IntegrityError``.
        """
        parent = self._inside(f"state/{_checked(stage)}")
        failures: list[tuple[Path, str]] = []
        for step, folder in states_in(parent):
            try:
                tensors, values = read_state(folder)
            except IntegrityError as error:
                failures.append((folder, str(error)))
                continue
            for bad, reason in failures:
                self._say(f"STEPPING BACK from {stage} {int(bad.name)} to {step}: {reason}", logging.WARNING)
                if self._lock is not None:
                    rename_folder(bad, bad.with_name(BAD + bad.name))
            if self._lock is not None:
                prune_states(parent)
            return step, tensors, values
        if failures:
            raise IntegrityError(
                f"{parent}: none of the {len(failures)} saved states can be read (the newest: {failures[0][1]}); "
                "restore the folder from a backup, or start a new run under another name"
            )
        return None

    def saved_step(self, stage: str) -> int:
        """The step of the newest saved state of a stage, 0 where there is none. Only looks at names: it may be broken."""
        return next((step for step, _ in states_in(self._inside(f"state/{_checked(stage)}"))), 0)

    # Adapters

    def save_adapter(
        self, name: str, weights: Weights, adapter_config: Mapping[str, Any], card: str, *, base: str | None = None
    ) -> None:
        """Write a PEFT folder (``selectors/u0``, ``policy``) that appears whole or not at all.

        Of ``adapter_config`` only the fields of a plain LoRA are written. ``base`` is the digest of the base model.
        """
        target = self._target(name)
        with uninterrupted():
            write_adapter(target, weights, adapter_config, card, base)

    def load_adapter(self, name: str, expect: Expected | None = None, *, base: str | None = None) -> Weights:
        """The weights of an adapter that this run has saved, checked against both digests, ``expect`` and ``base``.

        A missing one is an ``IntegrityError``: nobody goes on with random weights.
        """
        return read_adapter(self._inside(name), expect, base)

    def discard(self, name: str, pattern: str) -> None:
        """Remove the folders in folder ``name`` whose names match, each at once."""
        for folder in sorted(self._inside(name).glob(pattern)):
            remove_folder(folder)

    def set_aside(self, name: str, new: str) -> None:
        """Give a file another name, where it is there: what it says holds no more, and is not thrown away."""
        if self._inside(name).is_file():
            with disk_faults(self.path):
                self._target(name).replace(self._target(new))
                sync_folder(self.path)

    # How

    def _say(self, text: str, level: int) -> None:
        self.notices.append(text)
        logger.log(level, "%s", text)

    def _inside(self, name: str) -> Path:
        """The path of ``name`` in this folder; no part of it may be a symbolic link or lead out."""
        path = self.path
        for part in name.split("/"):
            path = path / _checked(part)
            if path.is_symlink():
                raise ConfigError(
                    f"{path}: a symbolic link inside a run folder is not followed; put the file itself there"
                )
        return path

    def _target(self, name: str) -> Path:
        """As ``_inside``, to be written: its folder is made."""
        if self._lock is None:
            raise RuntimeError(f"{self.path} is closed or open for reading only")
        path = self._inside(name)
        if not path.parent.is_dir():
            with disk_faults(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                for folder in path.relative_to(self.path).parents:
                    sync_folder((self.path / folder).parent)
        return path

    def _whole_lines(self, path: Path) -> list[bytes]:
        """The lines that end with a newline, without it."""
        *lines, torn = bytes(read_regular(path)).split(b"\n") if path.exists() else [b""]
        if torn:
            being_written = self._lock is None and self.in_use()
            why = "is being written" if being_written else "was cut off by a kill"
            self._say(
                f"{path}: its last line {why} and is left out", logging.INFO if being_written else logging.WARNING
            )
        return lines

    def _without_torn_line(self, path: Path, descriptor: int) -> int:
        """Cut off a torn last line of an open file; its size in bytes then."""
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return size
        size = bytes(read_regular(path)).rfind(b"\n") + 1
        os.ftruncate(descriptor, size)
        self._say(f"{path}: its last line was cut off by a kill and is removed", logging.WARNING)
        return size


def _checked(part: str) -> str:
    """One part of a path inside a run folder, or a ``ConfigError``."""
    if not FILE_NAME.fullmatch(part):
        raise ConfigError(
            f"{part!r:.80} cannot be a file name in a run folder; use letters, digits, . _ - (not . first)"
        )
    return part


def _used(path: Path) -> list[str]:
    """What lies in a folder besides our lock and what a kill left; [] also where there is no folder yet."""
    try:
        if path.is_symlink():
            raise ConfigError(
                f"{path}: a symbolic link is not taken as a run folder; name the folder that it points to"
            )
        return sorted(entry for entry in os.listdir(path) if entry != LOCK and not entry.startswith(TEMPORARY))
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise ConfigError(
            f"{path}: there is a file of this name or on the way to it; give this run another name"
        ) from error
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
            raise ConfigError(
                f"{str(path)!r:.120}: not a usable path; give this run another name or runs_dir"
            ) from error
        raise disk_fault(error, path) from error
