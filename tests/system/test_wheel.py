"""The wheel: it builds, holds what it needs, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The built wheel."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return next(out.glob("fedbiscuit-*.whl"))


def test_the_wheel_holds_the_demo_world_the_type_marker_and_the_licence_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fedbiscuit/data/demo_world.json" in names
    assert "fedbiscuit/py.typed" in names
    for needed in ("static/station.css", "static/htmx.min.js", "static/htmx.LICENSE.txt", "templates/compare.html"):
        assert f"fedbiscuit/station/{needed}" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]


def test_the_wheel_installs_elsewhere_and_its_command_brings_the_examples(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for words in (["config", "--example", "demo"], ["config", "demo.yaml", "--check"]):
        command = [sys.executable, str(site / "bin" / "fedbiscuit"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if "--example" in words:
            assert done.stdout == (ROOT / "configs" / "demo.yaml").read_text()
            (tmp_path / "demo.yaml").write_text(done.stdout)
    assert done.stdout == "demo.yaml: all settings are fine\n"


def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "cfg.yaml").write_text("name: outside\ndata: {source: demo}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = (
        "import fedbiscuit, sys; from fedbiscuit.data.sources import load; "
        "cfg = fedbiscuit.load_config('cfg.yaml'); print(fedbiscuit.__file__, len(load(cfg.data, 0).clients))"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    path, clients = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    assert clients == "12"
