"""The saved states of one stage: ``STEP/`` folders of tensor files, ``values.json`` and a manifest of digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbiscuit.rundir.disk import check_space, crash_point, read_regular, write_synced
from fedbiscuit.rundir.folders import remove_folder, whole_folder
from fedbiscuit.rundir.tensors import read_weights, write_tensor_file
from fedbiscuit.rundir.values import dump_json, load_json, plain
from fedbiscuit.types import IntegrityError, Weights, num_bytes

__all__ = ["KEPT_STATES", "prune_states", "read_state", "states_in", "write_state"]

KEPT_STATES = 3
VALUES, MANIFEST = "values.json", "manifest.json"


def states_in(parent: Path) -> list[tuple[int, Path]]:
    """Step and folder of each saved state, the newest first."""
    if not parent.is_dir():
        return []
    found = [entry for entry in parent.iterdir() if re.fullmatch(r"[0-9]{8}", entry.name)]
    return sorted(((int(entry.name), entry) for entry in found), reverse=True)


def write_state(parent: Path, step: int, tensors: Mapping[str, Weights], values: Mapping[str, Any]) -> None:
    """Save one state, whole or not at all, and remove all but the newest ones; the stage is the name of ``parent``."""
    target = parent / f"{step:08d}"
    text = dump_json(plain(values, strict=True), indent=1).encode()
    check_space(parent, sum(map(num_bytes, tensors.values())) + len(text) + (1 << 16))
    with whole_folder(target) as folder:
        crash_point("state_begin")
        digests = {}
        for key, weights in tensors.items():
            file = f"{key}.safetensors"
            digests[file] = write_tensor_file(folder / file, weights, {}, place=target / file)
            crash_point("state_tensors")
        digests[VALUES] = write_synced(folder / VALUES, [text])
        crash_point("state_values")
        write_synced(folder / MANIFEST, [_manifest(parent.name, step, digests)])
        crash_point("state_manifest")
    crash_point("state_saved")
    prune_states(parent)
    crash_point("state_pruned")


def prune_states(parent: Path) -> None:
    """Remove all but the newest ones; a kill may have come between saving one and this."""
    for _, old in states_in(parent)[KEPT_STATES:]:
        remove_folder(old)


def read_state(folder: Path) -> tuple[dict[str, Weights], dict[str, Any]]:
    """Tensors and values of one saved state; anything that is not as it was written is an ``IntegrityError``."""
    path = folder / MANIFEST
    data = read_regular(path, 1 << 20)
    manifest = load_json(path, data)
    digests = manifest.get("sha256") if isinstance(manifest, dict) else None
    if (
        not isinstance(digests, dict)
        or VALUES not in digests
        or data != _manifest(folder.parent.name, int(folder.name), digests)
    ):
        raise IntegrityError(f"{path}: not the manifest that was written")
    if set(digests) != {entry.name for entry in folder.iterdir()} - {MANIFEST}:
        raise IntegrityError(f"{folder}: its files are not those of its manifest")
    tensors = {
        file.removesuffix(".safetensors"): read_weights(folder / file, sha256=digest)
        for file, digest in digests.items()
        if file != VALUES
    }
    text = read_regular(folder / VALUES)
    if hashlib.sha256(text).hexdigest() != digests[VALUES]:
        raise IntegrityError(f"{folder / VALUES}: not the bytes that were written (sha256 differs)")
    return tensors, load_json(folder / VALUES, text)


def _manifest(stage: str, step: int, digests: Mapping[str, str]) -> bytes:
    """Every byte of it follows from what is checked, so that no flipped one goes unseen."""
    return dump_json({"format": 1, "stage": stage, "step": step, "sha256": dict(digests)}, indent=1).encode()
