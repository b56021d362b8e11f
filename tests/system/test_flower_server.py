"""The server's side of real clients: its folder, its certificates, who may join, and its processes on loopback."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.ports import free_port

from fedbiscuit.deployment import registration, serving
from fedbiscuit.deployment.programs import program
from fedbiscuit.deployment.registration import register, sites_of
from fedbiscuit.deployment.server import Deploy, connection_of, init, is_healthy, load
from fedbiscuit.types import ConfigError, EnvironmentFault, IntegrityError

needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed: pip install 'fedbiscuit[flower]'"
)
PATIENCE = 300.0
"""Seconds: more than what the programs themselves give one another (``serving.START_SECONDS``)."""
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt install nginx-light")


def until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.1)


def runs(pid: int) -> bool:
    """Whether a process is there and no mere entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "fedbiscuit", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)


def key_pair(folder: Path, name: str) -> Path:
    """A site's private key NAME and public key NAME.pub, whose path is returned."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, public = ec.generate_private_key(ec.SECP384R1()), folder / f"{name}.pub"
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    (folder / name).write_bytes(key.private_bytes(*form))
    ssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(*ssh))
    return public


# The folder


def shakes_hands(deploy: Path, ca: Path, name: str) -> bool:
    """Whether a site that trusts ``ca`` accepts the server under ``name``, by the strictest rules that ssl has."""
    server, site = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(ca))
    server.load_cert_chain(deploy / "server.crt", deploy / "server.key")
    site.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [site.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


@needs_flower
def test_sites_accept_the_server_under_its_names_and_no_other_and_only_with_its_own_authority(tmp_path: Path) -> None:
    init(tmp_path / "deploy", ["Fed.example.org", "10.0.0.7", "::1"])
    init(tmp_path / "other", ["fed.example.org"])
    own, other = tmp_path / "deploy" / "ca.crt", tmp_path / "other" / "ca.crt"
    for name in ("fed.example.org", "10.0.0.7", "::1", "localhost", "127.0.0.1"):
        assert shakes_hands(tmp_path / "deploy", own, name)
    assert not shakes_hands(tmp_path / "deploy", own, "evil.example.org")
    assert not shakes_hands(tmp_path / "deploy", other, "fed.example.org")


@needs_flower
def test_the_authority_signs_servers_only_and_both_certificates_last_ten_years(tmp_path: Path) -> None:
    from cryptography import x509

    init(tmp_path / "deploy")
    ca, own = (
        x509.load_pem_x509_certificate((tmp_path / "deploy" / f"{n}.crt").read_bytes()) for n in ("ca", "server")
    )
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert own.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
    assert [(one.not_valid_after_utc - one.not_valid_before_utc).days for one in (ca, own)] == [3650, 3650]
    assert ca.subject == own.issuer
    assert own.public_key().curve.name == "secp256r1"


@needs_flower
def test_the_folder_and_its_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        init(tmp_path / "deploy")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / "deploy" / name).stat().st_mode) for name in (".", "ca.key", "server.key")}
    assert modes == {".": 0o700, "ca.key": 0o600, "server.key": 0o600}


@needs_flower
def test_init_says_which_file_goes_where(tmp_path: Path) -> None:
    done = command("server", "init", tmp_path / "deploy", "--host", "fed.example.org", "--port", "8123")
    assert (done.returncode, done.stderr) == (0, "")
    assert "fed.example.org, port 443" in done.stdout
    assert f"give every site {tmp_path / 'deploy' / 'ca.crt'}" in done.stdout
    assert f"server start {tmp_path / 'deploy'}" in done.stdout
    assert load(tmp_path / "deploy") == Deploy(
        tmp_path / "deploy", ("fed.example.org", "localhost", "127.0.0.1"), 8123, False
    )


def test_an_insecure_folder_has_no_keys_no_proxy_and_a_warning(tmp_path: Path) -> None:
    done = command("server", "init", tmp_path / "deploy", "--insecure")
    assert "warning: insecure: no TLS and no keys" in done.stdout
    assert sorted(path.name for path in (tmp_path / "deploy").iterdir()) == ["deploy.json", "flwr", "sites.json"]
    assert json.loads((tmp_path / "deploy" / "deploy.json").read_text())["ca"] is None
    with pytest.raises(ConfigError, match="made with --insecure"):
        register(load(tmp_path / "deploy"), tmp_path / "a.pub", ["alice"])


def test_init_never_touches_what_is_there(tmp_path: Path) -> None:
    init(tmp_path / "deploy", insecure=True)
    before = {path: path.read_bytes() for path in (tmp_path / "deploy").rglob("*") if path.is_file()}
    done = command("server", "init", tmp_path / "deploy", "--insecure", "--port", "9000")
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "deploy").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hosts": ["https://fed.example.org"]}, "--host https://fed.example.org"),
        ({"hosts": ["fed.example.org; include /etc/passwd"]}, "not a host name"),
        ({"hosts": [""]}, "not a host name"),
        ({"port": 0}, "--port 0"),
        ({"port": 70000}, "--port 70000"),
        ({"hosts": ["fed.example.org"], "insecure": True}, "--host with --insecure"),
    ],
)
def test_init_refuses_with_the_option_and_leaves_nothing(tmp_path: Path, given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        init(tmp_path / "deploy", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_nginx_would_misread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a path with '\$'"):
        init(tmp_path / "de$ploy", insecure=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"version": 2}', "version 2"),
        ('{"version": 1, "host": "a", "port": 1, "insecure": true}', "host must be a list"),
        ('{"version": 1, "host": ["a"], "port": "1", "insecure": true}', "port must be"),
        ('{"version": 1, "host": ["a"], "port": 1, "insecure": 0}', "insecure must be"),
    ],
)
def test_a_deploy_json_that_is_wrong_names_its_key(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "deploy.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(tmp_path)


def test_a_folder_that_is_none_names_the_command_that_makes_one(tmp_path: Path) -> None:
    done = command("server", "start", tmp_path)
    assert done.returncode == 2
    assert "no deploy.json in it; make it: fedbiscuit server init" in done.stderr


def test_connection_of_a_moved_folder_is_right_again_and_calls_nobody(tmp_path: Path, monkeypatch) -> None:
    for key in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.org:3128")
    deploy = init(tmp_path / "deploy", port=8200, insecure=True)
    says = json.loads((deploy.folder / "deploy.json").read_text()) | {"insecure": False}
    (deploy.folder / "deploy.json").write_text(json.dumps(says))
    deploy.folder.rename(tmp_path / "moved")
    env, name = connection_of(tmp_path / "moved")
    assert f'root-certificates = "{tmp_path}/moved/ca.crt"' in (Path(env["FLWR_HOME"]) / "config.toml").read_text()
    assert (name, env["FLWR_TELEMETRY_ENABLED"], env["FLWR_DISABLE_UPDATE_CHECK"]) == ("fedbiscuit", "0", "1")
    assert env["NO_PROXY"].split(",") == ["localhost", "127.0.0.1"]
    printed = subprocess.run(
        [sys.executable, "-m", "fedbiscuit.deployment.server", str(tmp_path / "moved")], capture_output=True, text=True
    )
    assert printed.stderr == ""
    assert json.loads(printed.stdout)["env"]["FLWR_HOME"] == env["FLWR_HOME"]


def test_without_flower_the_error_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match=re.escape("pip install 'fedbiscuit[flower]'")):
        program("flower-superlink")


# Who may join


class Registry:
    """What SuperLink keeps: public keys and their node ids; ``flwr`` always returns 0."""

    def __init__(self) -> None:
        self.nodes: dict[str, int] = {}

    def ask(self, deploy: Deploy, *words: str) -> dict[str, object]:
        if words[:2] == ("supernode", "list"):
            rows = [{"node-id": str(node), "status": "registered"} for node in self.nodes.values()]
            return {"success": True, "nodes": rows}
        key = Path(words[2]).read_text()
        if key in self.nodes:
            return {"success": False, "error-message": "Public key already in use."}
        self.nodes[key] = 100 + len(self.nodes)
        return {"success": True, "node-id": self.nodes[key]}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    kept = Registry()
    monkeypatch.setattr(registration, "ask", kept.ask)
    monkeypatch.setattr(registration, "is_healthy", lambda deploy: True)
    return kept


@pytest.fixture
def deploy(tmp_path: Path) -> Deploy:
    return init(tmp_path / "deploy")


def owners(deploy: Deploy) -> dict[str, tuple[str, list[str]]]:
    return {node: (site["key"], site["clients"]) for node, site in sites_of(deploy).items()}


@needs_flower
def test_a_key_owns_its_clients_until_it_is_registered_again(
    deploy: Deploy, tmp_path: Path, registry: Registry
) -> None:
    a, b = key_pair(tmp_path, "site-a"), key_pair(tmp_path, "site-b")
    assert register(deploy, a, ["bob,alice"]) == ("100", ["alice", "bob"])
    with pytest.raises(ConfigError, match="bob belongs to the key site-a, not to site-b"):
        register(deploy, b, ["bob", "carol"])
    assert registry.nodes.keys() == {a.read_text()}, "a refused key must not join"
    assert register(deploy, a, ["alice"]) == ("100", ["alice"])
    register(deploy, b, ["bob", "carol"])
    assert owners(deploy) == {"100": ("site-a", ["alice"]), "101": ("site-b", ["bob", "carol"])}


@needs_flower
def test_another_key_of_the_same_name_is_refused(deploy: Deploy, tmp_path: Path, registry: Registry) -> None:
    register(deploy, key_pair(tmp_path, "site"), ["alice"])
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match="another key has the name site"):
        register(deploy, key_pair(tmp_path / "sub", "site"), ["bob"])


@needs_flower
def test_a_crash_between_superlink_and_sites_json_is_mended_by_the_same_command(
    deploy: Deploy, tmp_path: Path, registry: Registry
) -> None:
    a, b = key_pair(tmp_path, "site-a"), key_pair(tmp_path, "site-b")
    register(deploy, b, ["bob"])
    registry.ask(deploy, "supernode", "register", str(a))
    assert register(deploy, a, ["alice"]) == ("101", ["alice"])
    registry.nodes |= {"stray": 300, "other": 301}
    (deploy.folder / "sites.json").write_text(json.dumps({"101": sites_of(deploy)["101"]}))
    with pytest.raises(EnvironmentFault, match="one of 100, 300, 301"):
        register(deploy, b, ["bob"])


@needs_flower
def test_a_lost_database_gives_a_key_another_node_and_no_second_line(
    deploy: Deploy, tmp_path: Path, registry: Registry
) -> None:
    a, b = key_pair(tmp_path, "site-a"), key_pair(tmp_path, "site-b")
    register(deploy, a, ["alice"])
    register(deploy, b, ["bob"])
    registry.nodes.clear()
    register(deploy, b, ["bob"])  # takes the number that site-a had
    register(deploy, a, ["alice"])
    assert owners(deploy) == {"100": ("site-b", ["bob"]), "101": ("site-a", ["alice"])}


@needs_flower
@pytest.mark.parametrize("clients", [[""], ["alice,,bob"], ["alice", "alice"], ["a\nb"]])
def test_names_that_are_none_are_refused(deploy: Deploy, tmp_path: Path, registry: Registry, clients: list) -> None:
    with pytest.raises(ConfigError, match="--clients"):
        register(deploy, key_pair(tmp_path, "site"), clients)


@needs_flower
def test_files_that_are_no_public_keys_are_refused(deploy: Deploy, tmp_path: Path, registry: Registry) -> None:
    key_pair(tmp_path, "site")
    with pytest.raises(ConfigError, match="a private key, which stays at its site"):
        register(deploy, tmp_path / "site", ["alice"])
    (tmp_path / "site.pub").write_text("ssh-ed25519 AAAA")
    with pytest.raises(ConfigError, match="not a public key"):
        register(deploy, tmp_path / "site.pub", ["alice"])
    with pytest.raises(ConfigError, match="No such file"):
        register(deploy, tmp_path / "none.pub", ["alice"])


@pytest.mark.parametrize("text", ["[]", '{"a": {"key": "x", "clients": []}}', '{"1": {"key": "x"}}', '{"1"'])
def test_a_spoiled_sites_json_stops_before_anybody_joins(tmp_path: Path, text: str) -> None:
    deploy = init(tmp_path / "deploy", insecure=True)
    (deploy.folder / "sites.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"sites\.json"):
        sites_of(deploy)


# Its processes


class Server:
    """``fedbiscuit server start`` in a process of its own, and what it has printed."""

    def __init__(self, deploy: Deploy, log: Path) -> None:
        self.deploy, self.log = deploy, log
        argv = [sys.executable, "-m", "fedbiscuit", "server", "start", str(deploy.folder)]
        with log.open("w") as file:
            self.process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def started(self) -> Server:
        until(lambda: "listens" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def programs(self) -> dict[int, str]:
        """The processes of Flower that have the folder in their command line, by pid."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.deploy.folder) in words and ("flower-super" in words or "flwr-serverapp" in words):
                found[int(entry.parent.name)] = words
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=120)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(init(tmp_path / "deploy", port=free_port()), tmp_path / "start.log")
    try:
        yield one.started()
    finally:
        if one.process.poll() is None:
            one.end()


@needs_flower
def test_a_server_starts_lets_a_site_join_and_ends_with_all_of_its_processes(server: Server, tmp_path: Path) -> None:
    assert f"SuperLink listens on 127.0.0.1:{server.deploy.port}" in server.log.read_text()
    assert "0 sites are registered" in server.log.read_text()
    assert len(server.programs()) == 2
    key = key_pair(tmp_path, "site-a")
    for clients in ("alice,bob", "alice,carol"):
        done = command("server", "register", server.deploy.folder, key, "--clients", clients)
        assert (done.returncode, done.stderr) == (0, "")
    (node,) = owners(server.deploy)
    assert owners(server.deploy) == {node: ("site-a", ["alice", "carol"])}
    second = command("server", "start", server.deploy.folder)
    assert second.returncode == 3
    assert f"{server.deploy.folder}: in use by process {server.process.pid} on" in second.stderr
    assert server.end() == 0
    assert server.log.read_text().endswith("stopping\nstopped\n")
    assert server.programs() == {}
    late = command("server", "register", server.deploy.folder, key, "--clients", "alice")
    assert late.returncode == 3
    assert "start it: fedbiscuit server start" in late.stderr
    again = Server(server.deploy, tmp_path / "again.log").started()
    assert "1 site is registered" in again.log.read_text()
    done = command("server", "register", server.deploy.folder, key, "--clients", "alice")
    assert f"as node {node}, for alice" in done.stdout, "a key keeps its node over a restart"
    assert again.end(signal.SIGINT) == 0
    assert again.programs() == {}


class JoiningSite:
    """``fedbiscuit client start`` in a process of its own, and what it has printed."""

    def __init__(self, folder: Path, data: Path, *words: object) -> None:
        self.log = folder.with_suffix(".log")
        argv = [sys.executable, "-m", "fedbiscuit", "client", "start", folder, "--data", data, *words]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                list(map(str, argv)), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def ended(self) -> int:
        """Its exit code, when it has given up by itself."""
        until(lambda: self.process.poll() is not None)
        return self.process.returncode


@needs_flower
def test_fault_78_sites_that_may_not_join_say_why_and_what_to_do(server: Server, tmp_path: Path) -> None:
    deploy, data = server.deploy, tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "p", "output_a": "a", "output_b": "b", "choice": 0, "client": "ann"}) + "\n")
    other = init(tmp_path / "other", port=free_port())
    plain = init(tmp_path / "plain", port=free_port(), insecure=True)
    without_tls = Server(plain, tmp_path / "plain.log")
    at, trust, sites = f"localhost:{deploy.port}", deploy.folder / "ca.crt", []
    try:
        without_tls.started()
        for name, *words in (
            ("stranger", "--server", at, "--ca", trust),
            ("misled", "--server", at, "--ca", other.folder / "ca.crt"),
            ("keyless", "--server", at, "--insecure"),
            ("secure", "--server", f"localhost:{plain.port}", "--ca", trust),
        ):
            assert command("client", "init", tmp_path / name).returncode == 0
            sites.append(JoiningSite(tmp_path / name, data, *words))
        stranger, misled, keyless, secure = sites
        assert misled.ended() == 4, misled.log.read_text()
        assert f"the server {at} is not who --ca {other.folder / 'ca.crt'} says" in misled.log.read_text()
        assert secure.ended() == 4, secure.log.read_text()
        assert f"the server localhost:{plain.port} speaks without TLS there" in secure.log.read_text()
        until(lambda: stranger.says("does not know the key of this site; send "))
        assert stranger.says(f"send {tmp_path / 'stranger' / 'key.pub'} to its administrator")
        assert stranger.process.poll() is None, "it is tried again until it is registered"
        until(lambda: keyless.says("the server") or keyless.process.poll() is not None)
        assert keyless.says("has it TLS where --ca is given and none where it is not"), keyless.log.read_text()
    finally:
        for one in sites:
            if one.process.poll() is None:
                one.process.terminate()
        for one in sites:
            one.process.wait(timeout=120)
        without_tls.end()


APP = """
[project]
name = "sleeper"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedbiscuit"
[tool.flwr.app.components]
serverapp = "sleeper.app:server"
clientapp = "sleeper.app:client"
"""
SLEEPER = """
import os, pathlib, time
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client = ClientApp()
server = ServerApp()
@server.main()
def main(grid, context):
    pathlib.Path("PATH").write_text(str(os.getpid()))
    time.sleep(600)
"""


@needs_flower
def test_a_run_under_way_ends_with_its_server_also_with_an_insecure_one(tmp_path: Path) -> None:
    deploy = init(tmp_path / "deploy", port=free_port(), insecure=True)
    (tmp_path / "app" / "sleeper").mkdir(parents=True)
    (tmp_path / "app" / "pyproject.toml").write_text(APP)
    (tmp_path / "app" / "sleeper" / "__init__.py").write_text("")
    (tmp_path / "app" / "sleeper" / "app.py").write_text(SLEEPER.replace("PATH", str(tmp_path / "pid")))
    server = Server(deploy, tmp_path / "start.log").started()
    try:
        assert "warning: insecure" in server.log.read_text()
        env, name = connection_of(deploy)
        argv = [program("flwr"), "run", str(tmp_path / "app"), name, "--format", "json"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=PATIENCE)
        assert json.loads(done.stdout)["success"], done.stdout + done.stderr
        until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "")
        app = int((tmp_path / "pid").read_text())
        assert runs(app)
    finally:
        code = server.end()
    assert code == 0
    assert not runs(app)
    assert server.programs() == {}


@pytest.mark.parametrize("is_ours", [False, True])
def test_fault_91_a_port_in_use_is_named_with_what_to_do(tmp_path: Path, monkeypatch, is_ours: bool) -> None:
    """Also where it is a SuperLink of this folder that has it, left by a `server start` that was killed."""
    monkeypatch.setattr(serving, "is_healthy", lambda deploy: is_ours)
    monkeypatch.setattr(serving, "program", str)
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        deploy = init(tmp_path / "deploy", port=port, insecure=True)
        with pytest.raises(EnvironmentFault) as caught:
            serving.serve(deploy, print)
    whose = " by a SuperLink of this folder, left by a `server start` that was killed" if is_ours else ""
    assert str(caught.value) == (
        f"127.0.0.1:{port}: Address already in use{whose}; `ss -ltnp sport = :{port}` shows who has it: stop that one, or make a "
        "deploy folder with another --port"
    )


@needs_flower
def test_a_superlink_that_cannot_start_is_told_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    deploy = init(tmp_path / "deploy", port=free_port())
    (deploy.folder / "server.key").write_text("none")
    done = command("server", "start", deploy.folder)
    assert done.returncode == 3
    assert "SuperLink cannot start" in done.stderr
    assert "its last line: " in done.stderr


# What is published


def test_the_proxy_publishes_two_places_and_hands_on_the_path_that_it_has_checked() -> None:
    from fedbiscuit.deployment.server import _nginx

    text = _nginx(Deploy(Path("/srv/deploy"), ("fed.example.org", "::1"), 8000, False))
    places = dict(re.findall(r"location (.+?) \{(.*?)\n    \}", text, re.DOTALL))
    assert places.keys() == {"/v1/fleet/", "= /health", "/"}
    assert "proxy_pass https://127.0.0.1:8000/v1/fleet/;" in places["/v1/fleet/"]
    assert "proxy_pass https://127.0.0.1:8000/health;" in places["= /health"]
    assert places["/"].strip() == "return 404;"
    assert "listen 443 ssl;\n    listen [::]:443 ssl;\n    server_name fed.example.org [::1];" in text


def asked(deploy: Deploy, port: int, method: str, path: str) -> int:
    """The status of a request, its path sent as it is."""
    trust = ssl.create_default_context(cafile=str(deploy.folder / "ca.crt"))
    with closing(http.client.HTTPSConnection("127.0.0.1", port, timeout=120, context=trust)) as connection:
        connection.request(
            method, path, headers={"Content-Type": "application/protobuf", "Accept": "application/protobuf"}
        )
        return connection.getresponse().status


@pytest.fixture
def published(server: Server, tmp_path: Path) -> Iterator[int]:
    """The port of a real nginx with the shipped configuration; only the port that it listens on is another one."""
    port, home = free_port(), tmp_path / "nginx"
    home.mkdir()
    text = (server.deploy.folder / "nginx.conf").read_text()
    assert "listen 443 ssl;" in text
    (home / "site.conf").write_text(text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"))
    temporary = "".join(
        f"{kind}_temp_path {home}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    (home / "all.conf").write_text(
        f"{user}daemon off;\npid {home}/pid;\nerror_log {home}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; {temporary} include {home}/site.conf; }}\n"
    )
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-c", str(home / "all.conf"), "-e", str(home / "error.log")])
    try:
        until(lambda: process.poll() is not None or is_healthy(Deploy(server.deploy.folder, (), port, False)))
        yield port
    finally:
        process.terminate()
        process.wait(timeout=120)


@needs_flower
@needs_nginx
def test_through_the_proxy_a_site_joins_and_nobody_gives_orders(server: Server, published: int, tmp_path: Path) -> None:
    deploy = server.deploy
    assert asked(deploy, deploy.port, "POST", "/v1/control/list-runs") == 200, "SuperLink itself asks nobody who he is"
    for path in (
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "//v1//control/list-runs",
        "/docs",
        "/openapi.json",
    ):
        assert asked(deploy, published, "POST", path) in (400, 404), path
    assert asked(deploy, published, "GET", "/v1/fleet/pull-messages") == 403
    assert asked(deploy, published, "GET", "/health") == 200
    assert asked(deploy, published, "POST", "/v1/fleet/pull-messages") == 401, "no key"

    key = key_pair(tmp_path, "site-a")
    node, _ = register(deploy, key, ["alice"])
    env = connection_of(deploy).env
    site = [program("flower-supernode"), "--superlink", f"127.0.0.1:{published}", "--port", str(free_port())]
    site += [
        "--root-certificates",
        str(deploy.folder / "ca.crt"),
        "--auth-supernode-private-key",
        str(key.with_suffix("")),
    ]
    with (tmp_path / "site.log").open("w") as log:
        process = subprocess.Popen(site, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def is_online() -> bool:
        assert process.poll() is None, (tmp_path / "site.log").read_text()
        listed = registration.ask(deploy, "supernode", "list")
        return [(row["node-id"], row["status"]) for row in listed["nodes"]] == [(node, "online")]

    try:
        until(is_online)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
