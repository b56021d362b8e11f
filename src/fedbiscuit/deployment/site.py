"""A site's folder: its key, what it takes part in, and its ledger.

```
site-a/          0700
  key key.pub    the key pair that names this site to the server; key.pub goes there, key nowhere
  site.yaml      what it takes part in
  ledger.jsonl   a line for every order: what was asked, what left
  learned.jsonl  how the selectors that came agree with each client's held-out comparisons; it stays here
  running.json   the processes of `fedbiscuit client start` (``site_processes.py``), and worker.log, supernode.log of them
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedbiscuit.config import Section, load_settings
from fedbiscuit.data.check import NO_CLIENT, CheckReport
from fedbiscuit.data.comparisons import check_files
from fedbiscuit.deployment.clock import clock_line, seconds_ahead
from fedbiscuit.rundir.disk import Steps, disk_faults, human_bytes, sync_folder, write_all
from fedbiscuit.rundir.ledger import ALL_THAT_WAS_SENT, LEDGER, NOTHING_SENT, read_ledger, summaries
from fedbiscuit.rundir.lock import is_held, process_lives
from fedbiscuit.types import ConfigError, DataError, EnvironmentFault

__all__ = ["INSTALL", "KEY", "LOCK", "RUNNING", "SETTINGS", "SiteSettings", "check_data", "init_site"]
__all__ += ["running_of", "settings_of", "status_lines"]

INSTALL = "pip install 'fedbiscuit[flower]'"
KEY, SETTINGS, RUNNING, LOCK = "key", "site.yaml", "running.json", "start.lock"
STEPS = Steps(
    "make room, then give the command again", "give yourself the right to write there, or give another folder"
)

Kind = Literal["train", "evaluate", "seat"]
Digest = Annotated[str, Field(pattern=r"^(nf4:)?[0-9a-f]{64}$")]


class SiteSettings(Section):
    """site.yaml."""

    kinds: tuple[Kind, ...] = ("train", "evaluate", "seat")
    models: dict[str, str] = Field(default_factory=dict)
    allow_models: tuple[Digest, ...] = ()
    rounds: Annotated[int, Field(ge=0, le=10**9)] = 0
    comparisons: Annotated[int, Field(ge=1, le=10**9)] = 1
    task_comparisons: Annotated[int, Field(ge=0, le=10**9)] = 0
    held_out: Annotated[int, Field(ge=0, le=10**9)] = 20
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    threads: Annotated[int, Field(ge=0, le=10**9)] = 0
    timeout: Annotated[float, Field(gt=0.0, le=1e6)] = 3600.0


TEMPLATE = """\
# What this site takes part in. Only this file decides it; the server cannot. It is read by `fedbiscuit client start`.

# Tasks that this site does: train an adapter, score adapters (the scores stay here), pick a seat among them.
kinds: [train, evaluate, seat]

# Folders of base models on this machine, by the name that the server's settings give them (model.base), such as
# models: {HuggingFaceTB/SmolLM2-135M-Instruct: /srv/models/smollm2}
models: {}

# Digests of the base models that may be used, from the manifest.json of a run or from `fedbiscuit client status`, which shows
# those that were refused; []: any that it has.
allow_models: []

# So many rounds of a run are answered, from its first, as the server numbers them; 0: all.
rounds: 0

# A client with fewer comparisons to train on is not named to the server.
comparisons: 1

# So many comparisons one training may read (steps x batch_size x grad_accum of the server's settings); 0: any number. A training
# that has begun is finished even where nobody waits for it any more, so this bounds how far the site can lag behind.
task_comparisons: 0

# How each selector that comes to be trained agrees with so many held-out comparisons of its client (split test, then val) is seen
# once the answer has left. The result is in learned.jsonl here, and is not sent; 0: none.
held_out: 20

# Where the model runs, one site's folder a device: auto, cpu, mps, cuda or cuda:NUMBER; CPU threads, 0: as torch decides.
device: auto
threads: 0

# Seconds that one message of the server may take.
timeout: 3600
"""


# Init


def init_site(folder: Path) -> Path:
    """A new folder with a key pair and ``site.yaml``; the public key's path. What is there already is never overwritten."""
    private, public = _new_key(folder.resolve().name)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: there is something in this folder already; nothing was written. Give a new one")
    with disk_faults(folder, steps=STEPS):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        _write_new(folder / KEY, private, 0o600)
        _write_new(folder / f"{KEY}.pub", public, 0o644)
        _write_new(folder / SETTINGS, TEMPLATE.encode(), 0o644)
        sync_folder(folder)
    return folder / f"{KEY}.pub"


def _new_key(comment: str) -> tuple[bytes, bytes]:
    """An EC P-384 pair in OpenSSH's format, the one that Flower's SuperNode reads: private, public with a comment."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise EnvironmentFault(f"keys need the extra for real clients: {INSTALL}") from None
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in comment)
    return private, public + b" " + plain.encode() + b"\n"


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a site has


def settings_of(folder: Path) -> SiteSettings:
    """What ``site.yaml`` says; ``ConfigError`` with its line, or where this is no site's folder or its key lies open."""
    key = folder / KEY
    if not key.is_file():
        raise ConfigError(f"{folder}: no site's folder, it has no key; make one with `fedbiscuit client init {folder}`")
    if key.stat().st_mode & 0o077:
        raise ConfigError(f"{key}: others on this machine may read it; close it with `chmod 600 {key}`")
    return load_settings(SiteSettings, folder / SETTINGS)


def check_data(files: Sequence[Path]) -> CheckReport:
    """Read all comparisons; a ``DataError`` has a line with file and line for each that is wrong."""
    found = check_files(files)
    if not found.ok:
        raise DataError("\n".join(found.errors))
    if not found.num_comparisons:
        raise DataError(f"{files[0]}: no comparisons; look at it with `fedbiscuit data check`")
    if NO_CLIENT in found.clients:
        count = sum(found.clients[NO_CLIENT].values())
        raise DataError(
            f"client: {count} of {found.num_comparisons} comparisons do not say whose they are; add `client`"
        )
    return found


# Status


def running_of(folder: Path) -> dict[str, Any]:
    """What ``client start`` has written down about its processes, empty where it does not run."""
    if not is_held(folder / LOCK):
        return {}
    with suppress(OSError, ValueError):
        found = json.loads((folder / RUNNING).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def status_lines(folder: Path) -> Iterator[str]:
    """Whether its processes run, and what was asked and what left, run by run."""
    if not (folder / KEY).is_file():
        raise ConfigError(f"{folder}: no site's folder, it has no key; make one with `fedbiscuit client init {folder}`")
    running = running_of(folder)
    if running:
        yield f"{folder}: started {_clock(running['started'])} for the server {running['server']}"
        yield f"  worker     {_process(running['worker'])}"
        yield f"  SuperNode  {_process(running['supernode'])}"
        ca = running.get("ca")
        yield f"  clock      {clock_line(seconds_ahead(running['server'], Path(ca) if ca else None))}"
    else:
        yield f"{folder}: does not run; start it with `fedbiscuit client start {folder} --data FILE --server HOST:PORT ...`"
    found = summaries(read_ledger(folder / LEDGER))
    for run, one in found.items():
        yield ""
        yield f"run {run}" if run else "messages that belong to no run"
        yield f"  from {_clock(one.first)} to {_clock(one.last)}: {_counted(one.orders, 'message')}, {_rounds(one.rounds)}"
        yield f"  asked: {', '.join(f'{count} x {kind}' for kind, count in sorted(one.asked.items())) or 'only who is here'}"
        yield (
            f"  sent: {_counted(one.sent['deltas'], 'delta')}, {_counted(one.sent['seats'], 'seat')}; "
            f"{human_bytes(one.sent['bytes_out'])} out, {human_bytes(one.sent['bytes_in'])} in"
        )
        for why, count in sorted(one.not_done.items()):
            yield f"  not done: {count} x {why}"
        for why, count in sorted(one.errors.items()):
            yield f"  refused: {count} x {why}"
    yield ""
    yield ALL_THAT_WAS_SENT if found else NOTHING_SENT


def _process(pid: int) -> str:
    if pid and process_lives(pid):
        return f"runs (process {pid})"
    return "does not run; it is being started again"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _rounds(rounds: set[int]) -> str:
    if not rounds:
        return "no rounds"
    return f"{_counted(len(rounds), 'round')} ({min(rounds)} to {max(rounds)})"
