"""The server's processes in the foreground: SuperLink, and SuperExec, which starts the ServerApp of each run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedbiscuit.deployment.certificates import days_left
from fedbiscuit.deployment.programs import program
from fedbiscuit.deployment.registration import sites_of
from fedbiscuit.deployment.server import Deploy, connection_of, is_healthy
from fedbiscuit.types import EnvironmentFault, IntegrityError

__all__ = ["serve"]

START_SECONDS = 180
"""What SuperLink may take until it answers; its imports alone take some seconds."""
END_SECONDS = 10
"""What processes may take to end by themselves."""
WARN_DAYS = 30

Processes = dict[str, subprocess.Popen[bytes]]


def serve(deploy: Deploy, say: Callable[[str], None]) -> None:
    """Run SuperLink and SuperExec until Ctrl-C, SIGTERM or SIGHUP. ``say`` gets what a user reads.

    ``EnvironmentFault`` where Flower is missing, the port is taken, or one of them ends by itself.
    """
    commands = _commands(deploy)
    sites = sites_of(deploy)
    _check_certificate(deploy, say)
    _check_port(deploy)
    env = connection_of(deploy).env
    running: Processes = {}
    try:
        with _hang_up_stops():
            running["superlink"] = _start(deploy, "superlink", commands["superlink"], env)
            _await_health(deploy, running)
            running["superexec"] = _start(deploy, "superexec", commands["superexec"], env)
            for line in _greeting(deploy, len(sites)):
                say(line)
            while True:
                _check_alive(deploy, running)
                time.sleep(0.2)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        _end(running)
    say("stopped")


def _commands(deploy: Deploy) -> dict[str, list[str]]:
    folder, port = deploy.folder, str(deploy.port)
    link = ["--host", "127.0.0.1", "--port", port, "--database", str(folder / "superlink.db"), "--isolation", "process"]
    exec_ = ["--runtime-api-address", deploy.address, "--parent-pid", str(os.getpid())]
    if deploy.insecure:
        link, exec_ = [*link, "--insecure"], [*exec_, "--insecure"]
    else:
        link += ["--enable-supernode-auth", "--ssl-ca-certfile", str(folder / "ca.crt")]
        link += ["--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "server.key")]
        exec_ += ["--root-certificates", str(folder / "ca.crt")]
    return {
        "superlink": [program("flower-superlink"), "--disable-runtime-dependency-installation", *link],
        "superexec": [program("flower-superexec"), *exec_],
    }


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
            raise EnvironmentFault(
                f"{deploy.address}: {reason}; `ss -ltnp sport = :{deploy.port}` shows who has it: stop that one, or make a "
                "deploy folder with another --port"
            ) from None


def _log_of(deploy: Deploy, name: str) -> Path:
    return deploy.folder / f"{name}.log"


def _start(deploy: Deploy, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C reaches us alone, and what it starts can be ended with it."""
    with _log_of(deploy, name).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )


def _await_health(deploy: Deploy, running: Processes) -> None:
    until = time.monotonic() + START_SECONDS
    while not is_healthy(deploy):
        _check_alive(deploy, running)
        if time.monotonic() > until:
            log = _log_of(deploy, "superlink")
            raise EnvironmentFault(f"SuperLink does not answer after {START_SECONDS} s; its log says why: {log}")
        time.sleep(0.2)


def _check_alive(deploy: Deploy, running: Processes) -> None:
    for name, process in running.items():
        if (code := process.poll()) is not None:
            log = _log_of(deploy, name)
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise EnvironmentFault(f"{name} has ended {how}; its log says why: {log}{_last_line(log)}")


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        return f"; its last line: {log.read_text(encoding='utf-8', errors='replace').split(chr(10))[-2].strip()[:200]}"
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


def _end(running: Processes) -> None:
    """End them and all that they have started, at last by force."""
    groups = [process.pid for process in running.values()]
    try:
        for process in reversed(running.values()):
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until and any(_group_lives(running)):
            time.sleep(0.1)
    finally:
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        for process in running.values():
            process.wait()


def _group_lives(running: Processes) -> Iterator[bool]:
    for process in running.values():
        process.poll()
        try:
            os.killpg(process.pid, 0)
            yield True
        except ProcessLookupError:
            yield False
