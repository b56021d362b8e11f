"""The server's processes in the foreground: SuperLink, and SuperExec, which starts the ServerApp of each run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedbiscuit.deployment.certificates import days_left
from fedbiscuit.deployment.processes import Child
from fedbiscuit.deployment.programs import program
from fedbiscuit.deployment.registration import sites_of
from fedbiscuit.deployment.server import Deploy, connection_of, is_healthy
from fedbiscuit.rundir.lock import FolderLock
from fedbiscuit.types import EnvironmentFault, IntegrityError

__all__ = ["serve"]

START_SECONDS = 180
"""What SuperLink may take until it answers; its imports alone take some seconds."""
END_SECONDS = 10
"""What processes may take to end by themselves."""
WARN_DAYS = 30
LOOK_EVERY = 0.2
LOCK = "start.lock"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def serve(deploy: Deploy, say: Callable[[str], None]) -> None:
    """Run SuperLink and SuperExec until Ctrl-C, SIGTERM or SIGHUP; one that dies is started again. ``say`` gets lines to read.

    ``EnvironmentFault`` where Flower is missing, the folder or the port is taken, or SuperLink cannot be started at all.
    """
    link, executor = _processes(deploy)
    sites = sites_of(deploy)
    _check_certificate(deploy, say)
    with contextlib.ExitStack() as ended:
        ended.callback(FolderLock.take(deploy.folder / LOCK, "make another deploy folder with another --port").release)
        _check_port(deploy)
        ended.callback(link.end)
        ended.callback(executor.end)
        try:
            with _hang_up_stops():
                link.start()
                _await_health(deploy, link)
                executor.start()
                for line in _greeting(deploy, len(sites)):
                    say(line)
                while True:
                    _look(deploy, link, executor, say)
                    time.sleep(LOOK_EVERY)
        except KeyboardInterrupt:
            say("stopping")
    say("stopped")


def _look(deploy: Deploy, link: Child, executor: Child, say: Callable[[str], None]) -> None:
    """Start what has died. Its database has all that SuperLink knew, so runs and sites wait for it and go on."""
    for child in (link, executor):
        child.new_lines()
        if died := child.has_died():
            say(f"{died}{_last_line(child.log)}")
        if child.process is None and time.monotonic() >= child.not_before:
            child.start()
            say(f"the {child.name} is started again (process {child.pid})")


def _processes(deploy: Deploy) -> tuple[Child, Child]:
    """SuperLink and SuperExec, not started yet."""
    folder, port = deploy.folder, str(deploy.port)
    link = ["--host", "127.0.0.1", "--port", port, "--database", str(folder / "superlink.db"), "--isolation", "process"]
    exec_ = ["--runtime-api-address", deploy.address, "--parent-pid", str(os.getpid())]
    if deploy.insecure:
        link, exec_ = [*link, "--insecure"], [*exec_, "--insecure"]
    else:
        link += ["--enable-supernode-auth", "--ssl-ca-certfile", str(folder / "ca.crt")]
        link += ["--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "server.key")]
        exec_ += ["--root-certificates", str(folder / "ca.crt")]
    link = [program("flower-superlink"), "--disable-runtime-dependency-installation", *link]
    exec_ = [program("flower-superexec"), *exec_]
    env = connection_of(deploy).env
    return (
        Child("SuperLink", link, folder / "superlink.log", END_SECONDS, env),
        Child("SuperExec", exec_, folder / "superexec.log", END_SECONDS, env),
    )


def _check_certificate(deploy: Deploy, say: Callable[[str], None]) -> None:
    if deploy.insecure:
        return
    for name in ("ca.crt", "server.crt", "server.key"):
        if not (deploy.folder / name).is_file():
            raise IntegrityError(f"{deploy.folder / name}: missing; restore it, or make another deploy folder")
    days = days_left(deploy.folder / "server.crt")
    way_out = "make another deploy folder and give its ca.crt to all sites"
    if days < 0:
        raise EnvironmentFault(
            f"{deploy.folder / 'server.crt'}: ended {-days} days ago, so no site trusts it; {way_out}"
        )
    if days < WARN_DAYS:
        say(f"warning: {deploy.folder / 'server.crt'} ends in {days} days; {way_out}")


def _check_port(deploy: Deploy) -> None:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", deploy.port))
        except OSError as error:
            reason = error.strerror or str(error)
            if is_healthy(deploy):
                reason += " by a SuperLink of this folder, left by a `server start` that was killed"
            raise EnvironmentFault(
                f"{deploy.address}: {reason}; `ss -ltnp sport = :{deploy.port}` shows who has it: stop that one, or make a "
                "deploy folder with another --port"
            ) from None


def _await_health(deploy: Deploy, link: Child) -> None:
    until = time.monotonic() + START_SECONDS
    while not is_healthy(deploy):
        if link.has_died():
            raise EnvironmentFault(f"SuperLink cannot start; its log says why: {link.log}{_last_line(link.log)}")
        if time.monotonic() > until:
            raise EnvironmentFault(f"SuperLink does not answer after {START_SECONDS} s; its log says why: {link.log}")
        time.sleep(LOOK_EVERY)


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        line = COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace").split("\n")[-2])
        return f"; its last line: {line.strip()[:200]}"
    return ""


def _greeting(deploy: Deploy, num_sites: int) -> Iterator[str]:
    yield f"SuperLink listens on {deploy.address}; logs: {deploy.folder}/*.log; Ctrl-C stops it"
    if deploy.insecure:
        yield "warning: insecure: no TLS and no keys; whoever can reach this port joins and reads along; for one laptop only"
    else:
        sites = "1 site is" if num_sites == 1 else f"{num_sites} sites are"
        yield f"{sites} registered; the way in for them: nginx with {deploy.folder / 'nginx.conf'}"
        yield "on this machine every account can give it orders: let in nobody whom you would not trust with that"


@contextlib.contextmanager
def _hang_up_stops() -> Iterator[None]:
    """A terminal that closes stops like Ctrl-C, unless it is to be ignored, as under nohup."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGHUP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
