"""The server's deploy folder, and how Flower's commands reach the server that lives in it.

```
deploy/                 0700
  deploy.json           version, host (the names in the certificate), port, insecure, ca
  ca.crt ca.key         ca.crt goes to every site
  server.crt server.key
  sites.json            {node id: {"key": name, "clients": [...], "public": the key}}
  nginx.conf            what is published: the API of SuperNodes, and nothing else
  flwr/config.toml      FLWR_HOME of the commands that talk to this server
  superlink.db *.log    after the start
```

SuperLink answers control and fleet on one port, and its control API asks nobody who he is: it listens on 127.0.0.1, and only a
proxy reaches it from outside. ``python -m fedbiscuit.deployment.server deploy/`` prints what
``connection_of`` changes in the environment, as JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import shlex
import ssl
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedbiscuit.deployment.certificates import write_certificates
from fedbiscuit.deployment.processes import end_with_parent
from fedbiscuit.deployment.programs import flower_env, program
from fedbiscuit.rundir import atomic_write, dump_json, load_json, new_folder
from fedbiscuit.types import ConfigError, EnvironmentFault

__all__ = [
    "Connection",
    "Deploy",
    "ask",
    "connection_of",
    "init",
    "is_healthy",
    "load",
    "next_steps",
]

VERSION = 1
NAME = "fedbiscuit"
LOOPBACK = ("localhost", "127.0.0.1")
HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*"
)
UNFIT = re.compile(r"[\x00-\x1f\x7f\"\\$]")
"""Characters of a path that nginx's configuration cannot hold."""
SECONDS = 120
"""What a command of Flower may take."""


@dataclass(frozen=True, slots=True)
class Deploy:
    """A deploy folder, as an absolute path, and what its deploy.json says."""

    folder: Path
    hosts: tuple[str, ...]
    port: int
    insecure: bool

    @property
    def address(self) -> str:
        """Where SuperLink listens."""
        return f"127.0.0.1:{self.port}"


class Connection(NamedTuple):
    """How a command of Flower reaches this server: its whole environment, and the connection's name in its config.toml."""

    env: dict[str, str]
    name: str


# The folder


def init(folder: Path, hosts: Sequence[str] = (), port: int = 8000, insecure: bool = False) -> Deploy:
    """Make a deploy folder. Nothing is replaced: where there is something already, it is a ``ConfigError``."""
    path = Path(os.path.abspath(folder))
    names = tuple(dict.fromkeys([*(_host(name) for name in hosts), *LOOPBACK]))
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: no such port; give one from 1024 to 65535")
    if insecure and hosts:
        raise ConfigError(
            "--host with --insecure: without TLS the server is for this machine alone; leave one of them out"
        )
    if found := UNFIT.search(str(path)):
        raise ConfigError(
            f"{path}: the proxy's configuration cannot name a path with {found[0]!r}; choose another folder"
        )
    deploy = Deploy(path, names, port, insecure)
    says = {
        "version": VERSION,
        "host": list(names),
        "port": port,
        "insecure": insecure,
        "ca": None if insecure else "ca.crt",
    }
    with new_folder(path) as new:
        new.chmod(0o700)
        if not insecure:
            write_certificates(new, names)
            atomic_write(new / "nginx.conf", _nginx(deploy))
        atomic_write(new / "deploy.json", dump_json(says, indent=1) + "\n")
        atomic_write(new / "sites.json", "{}\n")
        (new / "flwr").mkdir()
        atomic_write(new / "flwr" / "config.toml", _flower_config(deploy))
    return deploy


def load(folder: Path) -> Deploy:
    """An existing deploy folder, its deploy.json checked."""
    path = Path(os.path.abspath(folder))
    try:
        says = load_json(path / "deploy.json", (path / "deploy.json").read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no deploy.json in it; make it: fedbiscuit server init {folder}") from None
    except OSError as error:
        raise EnvironmentFault(
            f"{path / 'deploy.json'}: {error.strerror}; start as the user who made the folder"
        ) from None
    if not isinstance(says, dict) or says.get("version") != VERSION:
        version = says.get("version") if isinstance(says, dict) else says
        raise ConfigError(f"{path / 'deploy.json'}: version {version!r}; this program reads {VERSION}")
    hosts, port, insecure = says.get("host"), says.get("port"), says.get("insecure")
    if not (isinstance(hosts, list) and hosts and all(isinstance(host, str) for host in hosts)):
        raise ConfigError(f"{path / 'deploy.json'}: host must be a list of names, not {hosts!r}")
    if type(port) is not int or not 1 <= port <= 65535:
        raise ConfigError(f"{path / 'deploy.json'}: port must be a number from 1 to 65535, not {port!r}")
    if type(insecure) is not bool:
        raise ConfigError(f"{path / 'deploy.json'}: insecure must be true or false, not {insecure!r}")
    return Deploy(path, tuple(hosts), port, insecure)


def next_steps(deploy: Deploy, typed: Path, command: str) -> list[str]:
    """What to do after ``init``, and which file goes where; ``typed`` is the folder as the user has named it."""
    start = f"start it: {command} server start {shlex.quote(str(typed))}"
    if deploy.insecure:
        warning = "insecure: no TLS and no keys, any process on this machine may join; do not publish this port"
        return [f"{typed} is ready", f"warning: {warning}", f"next, {start}"]
    if deploy.hosts == LOOPBACK:
        reach = "no --host was given: only this machine can be a site; make another folder for sites elsewhere"
    else:
        reach = f"sites will reach it as {' or '.join(host for host in deploy.hosts if host not in LOOPBACK)}, port 443"
    link = (
        f"link {deploy.folder / 'nginx.conf'} into nginx (on Debian: /etc/nginx/conf.d/fedbiscuit.conf) and reload it"
    )
    return [
        f"{typed} is ready; {reach}",
        f"1. {start}",
        f"2. publish what sites need, and nothing else: {link}",
        f"3. give every site {typed / 'ca.crt'}; nothing else here may leave this machine, the .key files least of all",
        "4. each site makes a key pair (fedbiscuit client init) and sends you its .pub file; let it join:",
        f"   {command} server register {shlex.quote(str(typed))} SITE.pub --clients NAME,NAME",
    ]


def _host(name: str) -> str:
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    if not HOST.fullmatch(name):
        raise ConfigError(
            f"--host {name}: not a host name or an IP address; give it without port or scheme, as in fed.example.org"
        )
    return name.lower()


def _flower_config(deploy: Deploy) -> str:
    trust = "insecure = true" if deploy.insecure else f"root-certificates = {json.dumps(str(deploy.folder / 'ca.crt'))}"
    address = json.dumps(deploy.address)
    return f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = {address}\n{trust}\n'


def _nginx(deploy: Deploy) -> str:
    """What sites may reach. ``proxy_pass`` with a path hands on the path that nginx has matched, not the one that was sent."""
    names = " ".join(f"[{host}]" if ":" in host else host for host in deploy.hosts)
    six = "    listen [::]:443 ssl;\n" if "[" in names else ""
    return NGINX.format(names=names, six=six, folder=deploy.folder, address=deploy.address)


NGINX = """\
# For nginx, inside its http block, such as a link in /etc/nginx/conf.d. It publishes what SuperNodes need and nothing else:
# the control API, on the same port of SuperLink, takes orders from whoever reaches it.
# After a move of this folder change the paths here.
server {{
    listen 443 ssl;
{six}    server_name {names};
    ssl_certificate "{folder}/server.crt";
    ssl_certificate_key "{folder}/server.key";
    ssl_protocols TLSv1.2 TLSv1.3;

    client_max_body_size 2g;
    proxy_http_version 1.1;
    proxy_request_buffering off;
    proxy_read_timeout 300s;
    proxy_send_timeout 300s;
    proxy_ssl_verify on;
    proxy_ssl_name localhost;
    proxy_ssl_trusted_certificate "{folder}/ca.crt";

    location /v1/fleet/ {{
        limit_except POST {{ deny all; }}
        proxy_pass https://{address}/v1/fleet/;
    }}
    location = /health {{
        limit_except GET {{ deny all; }}
        proxy_pass https://{address}/health;
    }}
    location / {{
        return 404;
    }}
}}
"""


# Flower's commands


def is_healthy(deploy: Deploy) -> bool:
    """Whether SuperLink answers at its address, with the certificate of this folder."""
    try:
        connection = _http(deploy)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def _http(deploy: Deploy) -> http.client.HTTPConnection:
    if deploy.insecure:
        return http.client.HTTPConnection("127.0.0.1", deploy.port, timeout=5)
    trust = ssl.create_default_context(cafile=str(deploy.folder / "ca.crt"))
    return http.client.HTTPSConnection("127.0.0.1", deploy.port, timeout=5, context=trust)


def connection_of(deploy: Path | Deploy) -> Connection:
    """For those who run ``flwr ... NAME`` against this server. A folder that was moved gets its config.toml again."""
    deploy = deploy if isinstance(deploy, Deploy) else load(deploy)
    config = deploy.folder / "flwr" / "config.toml"
    if not config.is_file() or config.read_text(encoding="utf-8") != _flower_config(deploy):
        config.parent.mkdir(exist_ok=True)
        atomic_write(config, _flower_config(deploy))
    return Connection(flower_env(deploy.folder / "flwr"), NAME)


def ask(deploy: Deploy, *words: str) -> dict[str, Any]:
    """The answer of a ``flwr`` command; its exit code says nothing, so only the JSON counts."""
    env, name = connection_of(deploy)
    command = [program("flwr"), *words, name, "--format", "json"]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )  # fmt: skip
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"success": False, "error-message": f"no answer within {SECONDS} s"}
    except ValueError:
        return {
            "success": False,
            "error-message": (done.stderr or done.stdout)[-400:] or f"exit code {done.returncode}",
        }
    return said if isinstance(said, dict) else {"success": False, "error-message": str(said)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fedbiscuit.deployment.server DEPLOY_FOLDER")
    reached = connection_of(Path(sys.argv[1]))
    changed = {key: value for key, value in reached.env.items() if os.environ.get(key) != value}
    print(json.dumps({"env": changed, "name": reached.name}, indent=1))
