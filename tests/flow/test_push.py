"""Pushing to the Hub and loading from it, against a server on this machine that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from fedbiscuit import cli
from fedbiscuit.config import LoraSettings, ModelSettings
from fedbiscuit.data.encoding import load_template
from fedbiscuit.models import selector as reading
from fedbiscuit.models.lm import load_lm
from fedbiscuit.models.selector_file import SelectorFile, write_selector_file
from fedbiscuit.rundir import write_adapter_files

TOKEN, COMMIT = "hf_test", "c" * 40
CARD = "---\nlibrary_name: peft\n---\n# A selector\n"


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that an upload of a folder and a download of a repository use."""

    protocol_version = "HTTP/1.1"
    private: dict[str, bool]
    stored: dict[str, bytes]
    large: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(raw)
            name = f"{asked['organization']}/{asked['name']}"
            self.private[name] = asked.get("private", asked.get("visibility") == "private")
            return self.answer({"url": f"{self.here}/{name}", "name": name})
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(raw)["content"].split("---\n")[1])
            if "base_model" in front and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", front["base_model"]):
                return self.answer({"errors": [{"message": "base_model is not a model id"}], "warnings": []}, 400)
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = {
                f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in json.loads(raw)["files"]
            }
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes.items()
            ]
            return self.answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.here}/lfs/{one['oid']}"}}}
                for one in json.loads(raw)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            for line in map(json.loads, raw.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.stored[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.stored[value["path"]] = self.large[value["oid"]]
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            return self.answer({"commitUrl": f"{self.here}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(raw).hexdigest() == self.path.removeprefix("/lfs/")
        self.large[self.path.removeprefix("/lfs/")] = raw
        self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            raw = self.stored.get(path.split("/resolve/")[1].partition("/")[2])
            return (
                self.answer({"error": "no such file"}, 404)
                if raw is None
                else self.send(raw, "application/octet-stream")
            )
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                for name, raw in self.stored.items()
            ]
            return self.answer(entries)
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.stored]
            return self.answer({"id": "ann/kitchen", "sha": COMMIT, "siblings": siblings, "tags": [], "private": True})
        return self.answer({"error": "not found"}, 404)

    @property
    def here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, value: object, code: int = 200) -> None:
        self.send(json.dumps(value).encode(), "application/json", code)

    def send(self, raw: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha1(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    handler = type("ThisHub", (Hub,), {"private": {}, "stored": {}, "large": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model):
    """A selector folder as ``fedbiscuit export`` writes it, with an adapter that is not trained but not nothing either."""
    lm = load_lm(ModelSettings(base=str(tiny_model), device="cpu", lora=LoraSettings(r=2, dropout=0.0)))
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(w.shape, generator=generator) * 0.1 for n, w in lm.new_adapter("push").items()}
    folder = tmp_path_factory.mktemp("exported")
    write_adapter_files(folder, weights, lm.adapter_config(), CARD, lm.digest)
    template = load_template("choice")
    write_selector_file(
        folder, SelectorFile(template.text, (" A", " B"), 200, 1.0, "mean", lm.public_name, lm.digest, (".",))
    )
    assert reading.Selector.of(lm, template, (" A", " B"), 200).letters
    return folder


def environment(tmp_path: Path, endpoint: str, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the server here has git-lfs and no xet
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        **more,
    }


def push(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedbiscuit", "push", str(folder), "--to-hub", "ann/kitchen", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_pushed_selector_arrives_whole_and_private_and_judges_from_there(hub, exported, tiny_model, tmp_path):
    env = environment(tmp_path, address(hub))
    done = push(exported, env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{address(hub)}/ann/kitchen is uploaded\n"
    handler = hub.RequestHandlerClass
    assert handler.private == {"ann/kitchen": True}
    assert handler.stored == {path.name: path.read_bytes() for path in exported.iterdir()}
    program = (
        "import sys; from fedbiscuit import Selector\n"
        "print(Selector.from_pretrained(sys.argv[1], base=sys.argv[2], device='cpu').choose([('p', 'one', 'two')])[0])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program, name, str(tiny_model)], env=env, capture_output=True, text=True, timeout=300
        )
        for name in ("ann/kitchen", str(exported))
    ]
    assert said[0].returncode == 0, said[0].stderr
    assert said[0].stdout == said[1].stdout
    assert float(said[0].stdout) != 0.5


def test_public_is_asked_for_by_name_and_a_card_that_the_hub_refuses_is_an_error(hub, exported, tmp_path):
    env = environment(tmp_path, address(hub))
    folder = shutil.copytree(exported, tmp_path / "copy")
    assert push(folder, env, "--public").returncode == 0
    assert hub.RequestHandlerClass.private == {"ann/kitchen": False}
    (folder / "README.md").write_text("---\nbase_model: /home/ann/model\n---\n")
    done = push(folder, env)
    assert done.returncode == 2
    assert "nothing was uploaded: Invalid metadata in README.md" in done.stderr


def test_without_a_token_the_way_to_log_in_is_told(hub, exported, tmp_path):
    done = push(exported, environment(tmp_path, address(hub), HF_TOKEN="hf_wrong"))
    assert done.returncode == 3
    assert (
        "ann/kitchen: nothing was uploaded: the Hub does not let you (401); log in with `hf auth login`" in done.stderr
    )
    assert not hub.RequestHandlerClass.stored


def test_without_a_network_that_is_said_plainly(exported, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    done = push(exported, environment(tmp_path, endpoint))
    assert done.returncode == 3
    assert done.stderr.startswith(
        f"error: ann/kitchen: nothing was uploaded: {endpoint} cannot be reached from this machine;"
    )
    assert len(done.stderr.splitlines()) == 1
    done = push(exported, environment(tmp_path, endpoint, HF_HUB_OFFLINE="1"))
    assert done.returncode == 3
    assert "HF_HUB_OFFLINE is set, which forbids the network; unset it" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to-hub", "kitchen"], "not a name on the Hub; write it as OWNER/NAME"),
        (["--to-hub", "ann/kitchen", "--selector", "0"], "not a run, so nothing can be chosen from it"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(exported, words, message, capsys):
    assert cli.main(["push", str(exported), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_export_is_not_pushed(tmp_path, capsys):
    (tmp_path / "diary.txt").write_text("private")
    assert cli.main(["push", str(tmp_path), "--to-hub", "ann/kitchen"]) == 2
    assert "neither a run nor an exported folder" in capsys.readouterr().err
