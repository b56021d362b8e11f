"""The examples in examples/deploy: their commands are commands of this program, and systemd takes the units."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fedbiscuit.cli import app

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "deploy"
UNITS = ("fedbiscuit-server.service", "fedbiscuit-site.service")
PROGRAM = "/opt/fedbiscuit/bin/fedbiscuit"


@pytest.mark.parametrize("name", [*UNITS, "Containerfile"])
def test_every_command_of_an_example_is_one_of_this_program(name):
    text = (FOLDER / name).read_text("utf-8")
    commands = re.findall(
        r"(?:ExecStart=\S*/|^#   |podman run .*? )fedbiscuit ((?:client|server|run) .*?)(?:  .*)?$", text, re.MULTILINE
    )
    assert len(commands) == 2
    for command in commands:
        app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)


def test_the_copied_paths_of_the_containerfile_are_there():
    text = (FOLDER / "Containerfile").read_text("utf-8")
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"pyproject.toml", "src", "configs"} <= set(copied)
    assert all((FOLDER.parents[1] / path).exists() for path in copied)


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="SKIPPED: systemd-analyze is not here: apt install systemd"
)
@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_unit(name, tmp_path):
    text = (FOLDER / name).read_text("utf-8")
    assert text.count(PROGRAM) == 1
    (tmp_path / name).write_text(text.replace(PROGRAM, shutil.which("true")))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
