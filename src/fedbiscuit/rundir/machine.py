"""What the bits of a result depend on besides settings and data: versions, processor, threads, commit."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import fedbiscuit

__all__ = ["machine_differences", "machine_manifest"]

PACKAGES = ("fedbiscuit", "torch", "transformers", "peft", "safetensors", "numpy", "bitsandbytes")
DECISIVE = (
    "python",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "machine",
    "cpu_capability",
    "threads",
    "gpu",
    "git_commit",
)
"""Another value of these can give other last bits (docs/faults.md row 90) or other results."""


def machine_manifest(*, device: str | None = None) -> dict[str, Any]:
    """Versions, processor, threads and commit, for ``manifest.json``; no path, user or host name.

    ``device`` as torch names it (``cuda:0``): then the GPU's name is in it. Imports torch, not transformers or peft.
    """
    import torch

    gpu = None
    if device is not None and device.startswith("cuda") and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(device)
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_capability": str(torch.backends.cpu.get_cpu_capability()),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "git_commit": git_commit(),
    }


def machine_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences about what may change the last bits of a resumed run; none: bit for bit the same is promised."""
    return [
        f"{key} was {before[key]}, is {now.get(key)}: the last bits may differ from those of an uninterrupted run"
        for key in DECISIVE
        if key in before and before[key] != now.get(key)
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout that holds this package, or else of the current folder; None where there is none."""
    package = Path(fedbiscuit.__file__).parent
    installed = "site-packages" in package.parts or "dist-packages" in package.parts
    for start in [Path.cwd()] if installed else [package, Path.cwd()]:
        for folder in (start, *start.parents):
            with contextlib.suppress(OSError, ValueError):
                if (folder / ".git").exists():
                    return _head_of(folder / ".git")
    return None


def _head_of(git: Path) -> str | None:
    """HEAD's commit from the files of a repository, a worktree included."""
    if git.is_file():
        git = (git.parent / git.read_text().removeprefix("gitdir:").strip()).resolve()
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return _commit(head)
    ref = head.removeprefix("ref:").strip()
    common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
    for place in (git / ref, common / ref):
        if place.is_file():
            return _commit(place.read_text().strip())
    packed = common / "packed-refs"
    for line in packed.read_text().splitlines() if packed.exists() else []:
        if line.endswith(f" {ref}"):
            return _commit(line.split()[0])
    return None


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None
