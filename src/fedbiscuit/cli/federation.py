"""Real clients: server init, start and register; client init, start and status."""

from __future__ import annotations

import logging
import shlex
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedbiscuit.cli.shared import client_app, program, server_app
from fedbiscuit.types import ConfigError

__all__ = ["client_init", "client_start", "client_status", "server_init", "server_register", "server_start"]

log = logging.getLogger("fedbiscuit")

DeployFolder = Annotated[Path, Parameter(help="the server's deploy folder")]
SiteFolder = Annotated[Path, Parameter(help="the folder of a site")]
SiteData = Annotated[
    list[Path] | None,
    Parameter(
        name="--data", consume_multiple=True, show_default=False, help="files of comparisons (.jsonl or .jsonl.gz)"
    ),
]


@server_app.command(name="init", sort_key=1)
def server_init(
    deploy: DeployFolder,
    /,
    *,
    host: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=True,
            show_default=False,
            help="the names or IP addresses by which sites reach this server; localhost and 127.0.0.1 are always there",
        ),
    ] = (),
    port: Annotated[int, Parameter(help="where SuperLink listens, on 127.0.0.1 alone")] = 8000,
    insecure: Annotated[
        bool, Parameter(negative="", show_default=False, help="no TLS and no keys: to try it on one laptop")
    ] = False,
) -> None:
    """Make the server's folder: certificates, settings, and a proxy configuration that publishes what sites need.

    Example: fedbiscuit server init deploy/ --host fed.example.org
    """
    from fedbiscuit.deployment.server import init, next_steps

    for line in next_steps(init(deploy, host, port, insecure), deploy, program()):
        print(line)


@server_app.command(name="start", sort_key=2)
def server_start(deploy: DeployFolder, /) -> None:
    """Run the server here, until Ctrl-C or SIGTERM.

    Example: fedbiscuit server start deploy/
    """
    from fedbiscuit.deployment.server import load
    from fedbiscuit.deployment.serving import serve

    serve(load(deploy), lambda line: print(line, flush=True))


@server_app.command(name="register", sort_key=3)
def server_register(
    deploy: DeployFolder,
    key: Annotated[Path, Parameter(help="the public key that a site has sent, such as site-a.pub")],
    /,
    *,
    clients: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, help="whom the site answers for, as in alice,bob")
    ],
) -> None:
    """Let a site join: its key, and the names of its clients. The server must run. Once more replaces the names.

    Example: fedbiscuit server register deploy/ site-a.pub --clients alice,bob
    """
    from fedbiscuit.deployment.registration import register
    from fedbiscuit.deployment.server import load

    node, names = register(load(deploy), key, clients)
    print(f"{key.stem} may join as node {node}, for {', '.join(names)}")


@client_app.command(name="init", sort_key=1)
def client_init(folder: Annotated[Path, Parameter(help="a new folder")], /, *, data: SiteData = None) -> None:
    """Make the folder of a site: a key pair, and site.yaml, which says what the site takes part in.

    Examples: fedbiscuit client init site-a/
              fedbiscuit client init site-a/ --data comparisons.jsonl
    """
    from fedbiscuit.deployment import site
    from fedbiscuit.terminal import clean

    names = sorted(site.check_data(data).clients) if data else []
    public = site.init_site(folder)
    given = clean(shlex.quote(",".join(names))) if names else "NAMES"
    where = "" if names else "; `fedbiscuit data check FILE` lists NAMES, the clients in your files"
    copy = f"{folder.resolve().name}.pub"
    print(
        f"{folder} is ready. Read {folder / site.SETTINGS}, and send to the server's administrator:\n"
        f"  {public}, as {copy}; the key beside it stays here\n"
        f"  the names of your clients, for `fedbiscuit server register DEPLOY {copy} --clients {given}`{where}\n"
        f"then: {program()} client start {shlex.quote(str(folder))} --data FILE --server HOST:PORT --ca ca.crt"
    )


@client_app.command(name="start", sort_key=2)
def client_start(
    folder: SiteFolder,
    /,
    *,
    data: SiteData = None,
    server: Annotated[str, Parameter(help="HOST:PORT of the server")],
    ca: Annotated[
        Path | None,
        Parameter(show_default=False, help="the certificate that the server is known by, from its administrator"),
    ] = None,
    insecure: Annotated[
        bool, Parameter(negative="", show_default=False, help="without TLS and keys: for trials on one machine")
    ] = False,
) -> None:
    """Take part: a worker with your data and the model, and Flower's SuperNode, until Ctrl-C.

    Examples: fedbiscuit client start site-a/ --data comparisons.jsonl --server server.example.org:8443 --ca ca.crt
    """
    from fedbiscuit.deployment import site, site_processes
    from fedbiscuit.terminal import clean

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {clean(text)}", flush=True)

    if not data:
        raise ConfigError(
            "--data: name the files with the comparisons of this site's clients, such as --data mine.jsonl"
        )
    where = site_processes.server_of(server, ca, insecure)
    site.settings_of(folder)
    found = site.check_data(data)
    for warning in found.warnings:
        log.warning("%s", clean(warning))
    if insecure:
        log.warning(
            "--insecure: anybody between this site and %s can read and change what is sent, and nobody proves who he is",
            server,
        )
    say(
        f"{found.num_comparisons:,} comparisons of {len(found.clients):,} clients; they stay here. Ctrl-C ends this site"
    )
    try:
        site_processes.run_site(folder, data, where, say)
    except KeyboardInterrupt:
        say("worker and SuperNode are stopped")


@client_app.command(name="status", sort_key=3)
def client_status(folder: SiteFolder, /) -> None:
    """Whether a site runs, what it was asked, and what it sent.

    Example: fedbiscuit client status site-a/
    """
    from fedbiscuit.deployment import site
    from fedbiscuit.terminal import clean

    for line in site.status_lines(folder):
        print(clean(line))
