"""``fedbiscuit client start``: a worker and a SuperNode side by side, each started again when it has died.

The worker has the data and the model; the SuperNode is Flower's, and knows of the worker only its unix socket. Both are
processes of their own, so that one outlives the other; neither outlives this one (on Linux, however this one ends).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedbiscuit.deployment.clock import clock_line, is_refused, seconds_ahead
from fedbiscuit.deployment.processes import Child
from fedbiscuit.deployment.programs import flower_env, program
from fedbiscuit.deployment.site import KEY, LOCK, RUNNING, SiteSettings, settings_of
from fedbiscuit.rundir import atomic_write, dump_json
from fedbiscuit.rundir.lock import FolderLock
from fedbiscuit.types import ConfigError, EnvironmentFault, FederationError

__all__ = ["Server", "run_site", "server_of", "supernode_words"]

LOOK_EVERY = 0.3
END_WITHIN = {"SuperNode": 8.0, "worker": 30.0}
"""Seconds from SIGTERM to SIGKILL; a worker has its own grace for the task that it is at."""
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
            words += [file.resolve() for file in files]
            worker = Child("worker", words, folder / "worker.log", END_WITHIN["worker"])
            words = supernode_words(supernode, folder, server, path, how)
            env = flower_env(folder / "flwr")
            node = Child("SuperNode", words, folder / "supernode.log", END_WITHIN["SuperNode"], env)
            try:
                _Site(folder, server, path, worker, node, say, how.timeout).keep()
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
class _Site:
    """The loop: look at both processes, read the SuperNode's log, start what has died."""

    folder: Path
    server: Server
    socket: Path
    worker: Child
    node: Child
    say: Said
    patience: float
    """Seconds until a worker must listen."""
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
                    "ca": None if self.server.ca is None else str(self.server.ca.resolve()),
                    "started": self.began,
                    "worker": pids[0],
                    "supernode": pids[1],
                }
                atomic_write(self.folder / RUNNING, dump_json(running))
            time.sleep(LOOK_EVERY)

    def look(self) -> None:
        """One look at everything."""
        self._hear_node()
        self.worker.new_lines()
        for child in (self.worker, self.node):
            if died := child.has_died():
                if child is self.node and self.refusal:
                    raise FederationError(self.refusal)
                self.say(died)
                if child is self.node:
                    self._compare_clocks()
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
        elif now - self.worker.started > self.patience:
            self.worker.end()
            raise EnvironmentFault(
                f"the worker did not get ready in {self.patience:g} seconds (timeout in site.yaml); {self.worker.log} says why"
            )

    def _compare_clocks(self) -> None:
        """A SuperNode whose signature has a time that the server refuses ends, and says nothing of it."""
        ahead = seconds_ahead(self.server.address, self.server.ca)
        if is_refused(ahead) and "clock" not in self.said:
            self.said.add("clock")
            self.say(f"this machine's clock is {clock_line(ahead)}")

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
