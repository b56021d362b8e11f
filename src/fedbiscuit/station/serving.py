"""The station as a process: a port on this machine, the address with its token, and the server that waits there."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable

from fedbiscuit.station.safety import hosts_of
from fedbiscuit.station.station import Station
from fedbiscuit.types import ConfigError, EnvironmentFault

__all__ = ["serve"]

TRIES = 20
"""So many ports after a wanted one are tried when it is in use."""


def serve(
    station: Station,
    address: str = "127.0.0.1",
    port: int = 0,
    *,
    other_address: bool = False,
    open_browser: bool = True,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM. port 0: any that is free.

    An address that other machines reach is refused without ``other_address``, and what it means is said with it.
    """
    import uvicorn

    from fedbiscuit.station.app import create_app

    ip = _checked(address, other_address)
    listening = _listen(ip, port)
    taken = listening.getsockname()[1]
    if port and taken != port:
        say(f"Port {port} is in use; this station has {taken}.")
    if not ip.is_loopback:
        say(
            f"Warning: {ip} is an address for other machines too. Whoever reaches it and has the token reads and judges as "
            f"{station.person}; the connection is not encrypted, so whoever listens on the way has the token. Use it in a "
            "network that you trust, or leave the address out and go through an SSH tunnel."
        )
    token, once = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    hosts = hosts_of(str(ip), taken)
    # Ports share cookies: a name of its own for each station, so that two do not log each other out. It hides nothing: a server
    # at another port of this address is sent this cookie too when the person goes there.
    app = create_app(station, token, hosts, cookie=f"fedbiscuit_station_{taken}", once=once)
    say(f"The station is at http://{hosts[0]}/?token={token}")
    say("Open this address in a browser of this machine. Ctrl-C ends the station; everything is kept.")
    if open_browser:
        # The command line of a browser can be seen by others on the machine, so this token opens one door and is void. Who is
        # quicker than the browser gets in in its place; the person then sees a refusal, and docs/station.md says what to do.
        threading.Thread(target=webbrowser.open, args=(f"http://{hosts[0]}/?token={once}",), daemon=True).start()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # the first address has the token in it
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()


def _checked(address: str, other_address: bool) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        ip = ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
    except ValueError:
        raise ConfigError(f"address {address[:80]!r}: write it in numbers, such as 127.0.0.1") from None
    if ip.is_unspecified:
        raise ConfigError(f"address {ip}: means every address of this machine; name the one that you mean")
    if not ip.is_loopback and not other_address:
        raise ConfigError(
            f"address {ip}: other machines may reach it, and the connection is not encrypted; the station is for this machine "
            "(127.0.0.1). If you do mean it, say so with --other-address"
        )
    return ip


def _listen(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> socket.socket:
    """A socket that listens there, or at one of the next ports."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    for tried in range(port, min(port + TRIES, 65535) + 1) if port else [0]:
        try:
            return socket.create_server((str(ip), tried), family=family, backlog=64)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise EnvironmentFault(f"{ip}:{tried}: cannot listen there: {error.strerror or error}") from error
    raise EnvironmentFault(f"{ip}: the ports {port} to {port + TRIES} are all in use; name another with --port")
