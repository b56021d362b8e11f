"""Who may join a server: which key owns which clients (``sites.json`` of the deploy folder)."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbiscuit.deployment.server import NAME, Deploy, ask, is_healthy
from fedbiscuit.rundir import atomic_write, dump_json, load_json
from fedbiscuit.types import ConfigError, EnvironmentFault, IntegrityError

__all__ = ["register", "sites_of"]


def sites_of(deploy: Deploy) -> dict[str, dict[str, Any]]:
    """The registered keys by node id: each with the name of its key, its clients and the key itself."""
    path = deploy.folder / "sites.json"
    try:
        sites = load_json(path, path.read_bytes())
    except OSError as error:
        raise IntegrityError(
            f"{path}: {error.strerror}; restore it, or write {{}} to it and register the sites again"
        ) from None
    good = isinstance(sites, dict) and all(
        node.isdecimal()
        and isinstance(site, dict)
        and isinstance(site.get("key"), str)
        and isinstance(site.get("clients"), list)
        for node, site in sites.items()
    )
    if not good:
        raise IntegrityError(f"{path}: not a table of node ids with key and clients; restore it from a copy")
    return dict(sites)


def register(deploy: Deploy, key: Path, clients: Sequence[str]) -> tuple[str, list[str]]:
    """Let a key join, with the names of the clients that it answers for; a key that is registered gets these in place of its own.

    Returns the node id and the names, sorted. A client or the name of a key that another key has is a ``ConfigError``.
    """
    if deploy.insecure:
        raise ConfigError(
            f"{deploy.folder}: made with --insecure, where any site on this machine may join; keys need a folder without it"
        )
    names = _client_names(clients)
    public = _public_key(key)
    with _alone(deploy.folder / "sites.lock"):
        sites = sites_of(deploy)
        others = {node: site for node, site in sites.items() if site.get("public") != public}
        for site in others.values():
            if site["key"] == key.stem:
                raise ConfigError(
                    f"{key}: another key has the name {key.stem}; rename the file, the name is for people"
                )
            if taken := sorted(set(names) & set(site["clients"])):
                raise ConfigError(
                    f"--clients: {taken[0]} belongs to the key {site['key']}, not to {key.stem}; register {site['key']} again "
                    "without it, or give another name"
                )
        node = _join(deploy, key, sites, public)
        sites = {**others, node: {"key": key.stem, "clients": names, "public": public}}
        atomic_write(deploy.folder / "sites.json", dump_json(sites, indent=1) + "\n")
    return node, names


def _join(deploy: Deploy, key: Path, sites: Mapping[str, Mapping[str, Any]], public: str) -> str:
    """The node id that SuperLink gives a key, or has given it."""
    if not is_healthy(deploy):
        raise EnvironmentFault(
            f"no SuperLink answers at {deploy.address}; start it: fedbiscuit server start {deploy.folder}"
        )
    said = ask(deploy, "supernode", "register", str(key.absolute()))
    if said.get("success") is True:
        return str(said["node-id"])
    if "already in use" not in _error_of(said):
        raise _refused_by(deploy, "registered nothing", said)
    if mine := [node for node, site in sites.items() if site.get("public") == public]:
        return mine[0]
    listed = ask(deploy, "supernode", "list")  # a crash came between SuperLink's answer and ours
    if listed.get("success") is not True:
        raise _refused_by(deploy, "listed no keys", listed)
    strays = [str(one["node-id"]) for one in listed["nodes"] if one["status"] != "unregistered"]
    strays = [node for node in strays if node not in sites]
    if len(strays) != 1:
        raise EnvironmentFault(
            f"{key}: SuperLink knows this key under a node id that is not in sites.json (one of {', '.join(strays) or 'none'}); "
            f"with FLWR_HOME={deploy.folder / 'flwr'}: flwr supernode unregister NODE_ID {NAME}, then register again"
        )
    return strays[0]


def _refused_by(deploy: Deploy, what: str, said: Mapping[str, Any]) -> EnvironmentFault:
    return EnvironmentFault(
        f"SuperLink at {deploy.address} {what}: {_error_of(said)}; its log: {deploy.folder / 'superlink.log'}"
    )


def _error_of(said: Mapping[str, Any]) -> str:
    return " ".join(str(said.get("error-message", said)).split())[:400]


def _client_names(clients: Sequence[str]) -> list[str]:
    names = [name.strip() for text in clients for name in text.split(",")]
    if bad := [name for name in names if not name or not name.isprintable()]:
        raise ConfigError(
            f"--clients: {bad[0]!r} is not a name; give the clients of this site as in --clients alice,bob"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--clients: {twice[0]} occurs twice")
    if not names:
        raise ConfigError("--clients: give the clients of this site, as in --clients alice,bob")
    return sorted(names)


def _public_key(path: Path) -> str:
    """The key in a file of OpenSSH's form, without its comment; SuperLink takes EC keys on NIST's curves."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the .pub file that the site has sent") from None
    if b"PRIVATE KEY" in data:
        raise ConfigError(
            f"{path}: a private key, which stays at its site; ask for the .pub file, and for a new key pair"
        )
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise EnvironmentFault("keys need Flower's packages: pip install 'fedbiscuit[flower]'") from None
    try:
        key = serialization.load_ssh_public_key(data)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("not on an elliptic curve")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: not a public key for this ({error}); `fedbiscuit client init` at the site makes one"
        ) from None
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return str(key.public_bytes(*form), "ascii")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One at a time; the others wait."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
