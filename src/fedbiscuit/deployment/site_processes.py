"""``fedbiscuit client start``: a worker and a SuperNode side by side, each started again when it has died.

The worker has the data and the model; the SuperNode is Flower's, and knows of the worker only its unix socket. Both are
processes of their own, so that one outlives the other; neither outlives this one (on Linux, however this one ends).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedbiscuit.deployment.programs import flower_env, program
from fedbiscuit.deployment.site import KEY, LOCK, RUNNING, SiteSettings, settings_of
from fedbiscuit.rundir import atomic_write, dump_json
from fedbiscuit.rundir.lock import FolderLock
from fedbiscuit.types import ConfigError, EnvironmentFault, FederationError

__all__ = ["Server", "run_site", "server_of", "supernode_words"]

LOOK_EVERY = 0.3
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY = 60.0
"""Seconds after which a process that dies counts as one that worked: its next start waits ``FIRST_PAUSE`` again."""
WORKER_READY = 120.0
END_WITHIN = {"SuperNode": 8.0, "worker": 30.0}
"""Seconds from SIGTERM to SIGKILL; a worker has its own grace for the task that it is at."""
LARGE_LOG = 10_000_000
PLAIN_SOCKET = re.compile(r"[A-Za-z0-9_./+@=,:-]{1,100}")
"""A path that a unix socket can have and that needs no quotes in Flower's --node-config."""
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")

Said = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server is, HOST:PORT, and the certificate that it is known by; None: nobody proves who he is."""

    address: str
    ca: Path | None


def server_of(address: str, ca: Path | None, insecure: bool) -> Server:
    """The server of a command line; ``ConfigError`` says what is wrong with it."""
    found = ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"--server: {address!r:.100} is not HOST:PORT, such as server.example.org:8443")
    if (ca is None) != insecure:
        raise ConfigError(
            "--ca: give the server's certificate (ca.crt, from its administrator; where it has a public one, the bundle of this "
            "machine, such as /etc/ssl/certs/ca-certificates.crt), or --insecure on a network where all are trusted; not both"
        )
    if ca is not None and not ca.is_file():
        raise ConfigError(
            f"--ca: there is no file {ca}; ask the server's administrator for ca.crt of its deploy folder"
        )
    return Server(address, ca)


def run_site(folder: Path, files: Sequence[Path], server: Server, say: Said) -> None:
    """Keep both processes up until Ctrl-C or SIGTERM (``KeyboardInterrupt``). ``FederationError`` where the server refuses."""
    how = settings_of(folder)
    supernode = program("flower-supernode")
    lock = FolderLock.take(folder / LOCK, "take another site's folder")
    try:
        with _socket_path(folder) as path:
            words = [sys.executable, "-m", "fedbiscuit.deployment.site_worker", folder.resolve(), path]
            worker = Child("worker", [*words, *(file.resolve() for file in files)], folder / "worker.log")
            node = Child("SuperNode", supernode_words(supernode, folder, server, path, how), folder / "supernode.log")
            node.environment = flower_env(folder / "flwr")
            try:
                _Site(folder, server, path, worker, node, say).keep()
            finally:
                node.end()
                worker.end()
                (folder / RUNNING).unlink(missing_ok=True)
    finally:
        lock.release()


def supernode_words(supernode: str, folder: Path, server: Server, path: Path, how: SiteSettings) -> list[object]:
    """The command line of a SuperNode whose messages go to the worker at ``path``. Without TLS Flower takes no key."""
    words: list[object] = [supernode, "--superlink", server.address, "--port", _free_port()]
    if server.ca is None:
        words += ["--insecure"]
    else:
        words += ["--root-certificates", server.ca.resolve(), "--auth-supernode-private-key", (folder / KEY).resolve()]
    return [*words, "--node-config", f'worker="{path}" timeout={float(how.timeout)}']


@dataclass
class Child:
    """A process that is started again after a pause that grows while it dies at once."""

    name: str
    words: Sequence[object]
    log: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    process: subprocess.Popen[bytes] | None = None
    pause: float = FIRST_PAUSE
    started: float = 0.0
    not_before: float = 0.0
    read: int = 0
    """Bytes of the log that were looked at."""

    @property
    def pid(self) -> int:
        """0 where it does not run."""
        return self.process.pid if self.process is not None else 0

    def start(self) -> None:
        """Start it, with its output behind what is in the log."""
        if self.log.exists() and self.log.stat().st_size > LARGE_LOG:
            self.log.replace(self.log.with_name(f"{self.log.name}.1"))
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self.read = os.fstat(descriptor).st_size
            self.process = subprocess.Popen(
                [str(word) for word in self.words], env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=descriptor, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent,
            )  # fmt: skip
        finally:
            os.close(descriptor)
        self.started = time.monotonic()

    def has_died(self) -> str:
        """How it ended, once, when it has; the time of the next start is set."""
        if self.process is None or self.process.poll() is None:
            return ""
        code, now = self.process.returncode, time.monotonic()
        self._kill_group()
        self.process = None
        if now - self.started > STEADY:
            self.pause = FIRST_PAUSE
        self.not_before, wait = now + self.pause, self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the {self.name} {how}; it is started again in {wait:g} s ({self.log} says more)"

    def new_lines(self) -> list[str]:
        """What its log says since the last look, whole lines."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(self.read)
            data = file.read(LARGE_LOG)
            end = data.rfind(b"\n") + 1
            self.read += end
            return data[:end].decode("utf-8", "replace").splitlines()
        return []

    def end(self) -> None:
        """SIGTERM, and after its time SIGKILL, to it and to what it has started."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WITHIN[self.name])
        self._kill_group()
        self.process.wait()
        self.process = None

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


@dataclass
class _Site:
    """The loop: look at both processes, read the SuperNode's log, start what has died."""

    folder: Path
    server: Server
    socket: Path
    worker: Child
    node: Child
    say: Said
    began: float = field(default_factory=time.time)
    ready: bool = False
    connected: bool = False
    refusal: str = ""
    """Why the server will not have this site however often it is tried."""
    said: set[str] = field(default_factory=set)

    def keep(self) -> None:
        """Until an exception: Ctrl-C, or a server that refuses this site."""
        pids = (-1, -1)
        while True:
            self.look()
            if (self.worker.pid, self.node.pid) != pids:
                pids = self.worker.pid, self.node.pid
                running = {
                    "server": self.server.address,
                    "started": self.began,
                    "worker": pids[0],
                    "supernode": pids[1],
                }
                atomic_write(self.folder / RUNNING, dump_json(running))
            time.sleep(LOOK_EVERY)

    def look(self) -> None:
        """One look at everything."""
        self._hear_node()
        for child in (self.worker, self.node):
            if died := child.has_died():
                if child is self.node and self.refusal:
                    raise FederationError(self.refusal)
                self.say(died)
                self.ready &= child is not self.worker
                self.connected &= child is not self.node
        now = time.monotonic()
        if self.worker.process is None and now >= self.worker.not_before:
            self.worker.start()
        if not self.ready and self.worker.process is not None:
            self._greet_worker(now)
        if self.node.process is None and now >= self.node.not_before and (self.ready or self.node.started):
            self.node.words = [*self.node.words[:4], _free_port(), *self.node.words[5:]]
            self.node.start()

    def _greet_worker(self, now: float) -> None:
        """Whether the worker listens. The first SuperNode waits for it; later ones have a worker that comes back."""
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as knock:
            self.ready = knock.connect_ex(str(self.socket)) == 0
        if self.ready:
            self.say(f"the worker is ready (process {self.worker.pid})")
        elif now - self.worker.started > WORKER_READY:
            self.worker.end()
            raise EnvironmentFault(
                f"the worker did not get ready in {WORKER_READY:g} seconds; {self.worker.log} says why"
            )

    def _hear_node(self) -> None:
        """Say what the SuperNode's log means."""
        for line in self.node.new_lines():
            if "SuperNode ID:" in line and not self.connected:
                self.connected, self.refusal = True, ""
                self.said.clear()
                self.say(f"connected to {self.server.address}; this site is node {line.rpartition(':')[2].strip()}")
            for sign, told, is_final in SIGNS:
                if sign in line and sign not in self.said:
                    self.said.add(sign)
                    told = told.format(server=self.server.address, key=self.folder / f"{KEY}.pub", ca=self.server.ca)
                    if is_final:
                        self.refusal = told
                    else:
                        self.say(told)


SIGNS = (
    (
        "[code: 2004]",
        "the server {server} does not know the key of this site; send {key} to its administrator, who registers it with "
        "`fedbiscuit server register`. It is tried again until then",
        False,
    ),
    (
        "[code: 2001]",
        "the server {server} takes only sites with a registered key, and without TLS no key is shown; leave --insecure out and "
        "give --ca ca.crt, from the server's administrator",
        True,
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server {server} is not who --ca {ca} says, or its certificate names another host: ask its administrator for "
        "ca.crt of its deploy folder and for the name to give to --server",
        True,
    ),
    (
        "WRONG_VERSION_NUMBER",
        "the server {server} speaks without TLS there; check the port, or whether it was started with --insecure",
        True,
    ),
    (
        "Connection attempt failed, retrying",
        "the server {server} cannot be reached; is it started, the port open, and has it TLS where --ca is given and none where "
        "it is not? It is tried again",
        False,
    ),
)
"""What a SuperNode's log says, what that means and what to do, and whether trying again is of no use."""


@contextlib.contextmanager
def _socket_path(folder: Path) -> Iterator[Path]:
    """In the site's folder, or where that makes no path for a socket, in a private folder that goes again."""
    path = folder.resolve() / "worker.sock"
    if PLAIN_SOCKET.fullmatch(os.fspath(path)):
        yield path
        return
    base = next(
        (base for base in (tempfile.gettempdir(), "/tmp") if PLAIN_SOCKET.fullmatch(f"{base}/fedbiscuit-12345678/w")),
        None,
    )
    if base is None:
        raise EnvironmentFault(
            f"{path}: too long for a socket, and so is the folder of temporary files; set TMPDIR=/tmp"
        )
    with tempfile.TemporaryDirectory(prefix="fedbiscuit-", dir=base) as short:  # mode 0700
        yield Path(short) / "w"


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _end_with_parent() -> None:
    """In the child: SIGTERM when the process that started it ends, however it does. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
