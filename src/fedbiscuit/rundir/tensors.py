"""Adapter files: safetensors, written so that they can be trusted and read as if they could not.

The writer is our own because the library's order of metadata is not fixed (the same adapter would have two digests)
and because it takes non-contiguous arrays for contiguous ones; the reader is our own because the library accepts a name
twice, NaN, and a flipped byte. Format: https://github.com/huggingface/safetensors#format. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbiscuit.rundir.disk import (
    check_space,
    disk_faults,
    read_regular,
    sha256_of,
    sync_folder,
    write_synced,
)
from fedbiscuit.types import IntegrityError, Weights

if TYPE_CHECKING:
    import torch

__all__ = [
    "Expected",
    "expected_of",
    "read_metadata",
    "read_weights",
    "write_tensor_file",
    "write_weights",
]

Expected = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensor name to shape and dtype, as ``{"...lora_A.weight": ((8, 576), "float32")}``."""

MAX_FILE = 8 << 30
MAX_HEADER = 1 << 20
SEAL = "fedbiscuit.sha256"
"""Metadata key: sha256 over the header's content and the data, so that a file is its own witness wherever it goes."""

DTYPES = {
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U8": ("uint8", 1),
}
CODES = {name: (code, size) for code, (name, size) in DTYPES.items()}
RESTORE = "take it from a backup or have it written again"


def expected_of(weights: Weights) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor: what ``read_weights`` compares with."""
    return {key: (tuple(tensor.shape), _dtype_name(tensor)) for key, tensor in weights.items()}


# Writing


def write_weights(path: str | Path, weights: Weights, metadata: Mapping[str, str]) -> str:
    """Write one adapter atomically, read it back, and return the hex sha256 of the file.

    A tensor that is not finite, empty or of an unknown dtype is an ``IntegrityError`` and nothing is written. Equal
    weights and metadata give equal bytes.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        digest = write_tensor_file(temporary, weights, metadata, place=path)
        with disk_faults(path):
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest


def write_tensor_file(path: Path, weights: Weights, metadata: Mapping[str, str], place: Path | None = None) -> str:
    """As ``write_weights`` but straight to ``path``: for a temporary folder. ``place`` is what messages name."""
    place = place or path
    data: list[memoryview] = []
    entries: dict[str, Any] = {}
    offset = 0
    for key, tensor in sorted(weights.items(), key=lambda item: (-item[1].element_size(), item[0])):
        code = _check_for_writing(place, key, tensor)
        raw = _bytes_of(tensor)
        entries[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, offset + raw.nbytes]}
        offset += raw.nbytes
        data.append(raw)
    notes = {"format": "pt", **metadata}
    notes[SEAL] = _seal(entries, notes, data)
    header = json.dumps({"__metadata__": notes, **entries}, separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise IntegrityError(
            f"{place}: {len(weights)} tensors with a header of {len(header)} bytes; at most {MAX_HEADER}"
        )
    needed = 8 + len(header) + offset
    check_space(path.parent, needed)
    with disk_faults(place, needed):
        digest = write_synced(path, [len(header).to_bytes(8, "little"), header, *data])
    if sha256_of(path) != digest:
        raise IntegrityError(f"{place}: the disk gives back other bytes than were written; check the disk")
    return digest


def _check_for_writing(place: Path, key: str, tensor: torch.Tensor) -> str:
    """The dtype's code in the file, or an ``IntegrityError``."""
    if not key or key == "__metadata__":
        raise IntegrityError(f"{place}: a tensor cannot be named {key!r}")
    name = _dtype_name(tensor)
    if name not in CODES:
        raise IntegrityError(f"{place}: {key}: dtype {name} is not written; one of {', '.join(CODES)}")
    if tensor.numel() == 0:
        raise IntegrityError(f"{place}: {key}: shape {tuple(tensor.shape)} has no numbers; nothing was written")
    if problem := _not_finite(tensor):
        raise IntegrityError(
            f"{place}: {key}: {problem}; nothing was written and the last saved state is intact. "
            "Training has diverged: resume with a smaller learning rate or clip gradients (max_grad_norm)"
        )
    return CODES[name][0]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The numbers in order, little-endian, whatever the tensor's strides and device."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw)


def _seal(entries: Mapping[str, Any], notes: Mapping[str, str], data: list[memoryview]) -> str:
    content = [entries, {key: value for key, value in notes.items() if key != SEAL}]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for raw in data:
        digest.update(raw)
    return digest.hexdigest()


# Reading


def read_weights(
    path: str | Path, expect: Expected | None = None, *, sha256: str | None = None, sealed: bool = False
) -> Weights:
    """One adapter file, trusted in nothing; tensors on the CPU that share no memory.

    ``expect`` is the exact set of names with shape and dtype, ``sha256`` the digest of the whole file; with ``sealed``
    the digest inside the file must be there (it is checked whenever it is). Every fault is an ``IntegrityError`` that
    names file, tensor and what to do (docs/faults.md rows 49 to 59).
    """
    path = Path(path)
    data = _read_file(path)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise IntegrityError(f"{path}: not the bytes that were written (sha256 differs); {RESTORE}")
    entries, notes, start = _parse_header(path, data)
    body = memoryview(data)[start:]
    _check_layout(path, entries, len(body))
    if expect is not None:
        _check_expected(path, entries, expect)
    if SEAL in notes or sealed:
        ordered = sorted(entries.values(), key=lambda entry: entry["data_offsets"])
        seal = _seal(entries, notes, [body[slice(*entry["data_offsets"])] for entry in ordered])
        if seal != notes.get(SEAL):
            why = "bytes were changed after writing" if SEAL in notes else f"it lacks the digest {SEAL!r}"
            raise IntegrityError(f"{path}: {why}; {RESTORE}")
    return {key: _tensor(path, key, entry, body) for key, entry in entries.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The notes in a tensor file's header, such as the base model; as strict as ``read_weights`` about the header."""
    path = Path(path)
    return _parse_header(path, _read_file(path))[1]


def _read_file(path: Path) -> bytearray:
    if path.suffix != ".safetensors":
        raise IntegrityError(
            f"{path}: only .safetensors is read; .bin, .pt and .npz can hold code or bombs: convert it first"
        )
    return read_regular(path, MAX_FILE)


def _parse_header(path: Path, data: bytearray) -> tuple[dict[str, Any], dict[str, str], int]:
    """Tensor entries, metadata, and where the data begin; every entry has a known dtype, a shape and offsets."""
    if len(data) < 8:
        raise IntegrityError(f"{path}: {len(data)} bytes, cut off or empty; {RESTORE}")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER and data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise IntegrityError(f"{path}: a pickle or zip archive under the name of a safetensors file; it is not opened")
    if length > MAX_HEADER:
        raise IntegrityError(f"{path}: its header claims {length} bytes, at most {MAX_HEADER} are allowed; {RESTORE}")
    if 8 + length > len(data):
        raise IntegrityError(f"{path}: cut off inside the header ({len(data)} of {8 + length} bytes); {RESTORE}")
    header = _strict_json(path, bytes(data[8 : 8 + length]))
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise IntegrityError(f"{path}: __metadata__: not a table of texts; {RESTORE}")
    for key, entry in header.items():
        _check_entry(path, key, entry)
    return header, notes, 8 + length


def _strict_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise IntegrityError(f"{path}: {key}: this name occurs twice; {RESTORE}")
            table[key] = value
        return table

    def no_constant(name: str) -> None:
        raise ValueError(name)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_twice, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: the header cannot be read; {RESTORE}") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: the header is not a table; {RESTORE}")
    return value


def _check_entry(path: Path, key: str, entry: object) -> None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise IntegrityError(f"{path}: {key}: its entry must have dtype, shape and data_offsets; {RESTORE}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in list(DTYPES):
        raise IntegrityError(f"{path}: {key}: dtype {entry['dtype']!r} is not read; one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 8 or not _naturals(offsets) or len(offsets) != 2:
        raise IntegrityError(
            f"{path}: {key}: shape {shape!r:.100}, data_offsets {offsets!r:.100} make no sense; {RESTORE}"
        )
    if 0 in shape:
        raise IntegrityError(f"{path}: {key}: shape {tuple(shape)} has no numbers; {RESTORE}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[entry["dtype"]][1]:
        raise IntegrityError(
            f"{path}: {key}: shape {tuple(shape)} does not fit bytes {offsets[0]} to {offsets[1]}; {RESTORE}"
        )


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, entries: Mapping[str, Any], size: int) -> None:
    """The tensors follow each other without gap or overlap and end with the file."""
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            word = "overlaps" if entry["data_offsets"][0] < end else "leaves a gap after"
            raise IntegrityError(f"{path}: {key}: {word} the tensor before it; {RESTORE}")
        end = entry["data_offsets"][1]
    if end != size:
        why = f"cut off: {size} of {end} bytes of data" if size < end else f"{size - end} bytes too many at its end"
        raise IntegrityError(f"{path}: {why}; {RESTORE}")


def _check_expected(path: Path, entries: Mapping[str, Any], expect: Expected) -> None:
    """The exact names, shapes and dtypes; else an adapter of another model, rank or target."""
    step = "it is of another base model, rank or target_modules: use the adapter that belongs to this config"
    for key in sorted(set(expect) - set(entries))[:1]:
        count = len(set(expect) - set(entries))
        raise IntegrityError(f"{path}: {key}: missing ({count} of {len(expect)} tensors are); {step}")
    for key in sorted(set(entries) - set(expect))[:1]:
        count = len(set(entries) - set(expect))
        raise IntegrityError(f"{path}: {key}: not expected ({count} such tensors); {step}")
    for key, entry in sorted(entries.items()):
        shape, dtype = expect[key]
        if tuple(entry["shape"]) != tuple(shape):
            raise IntegrityError(f"{path}: {key}: shape {tuple(entry['shape'])}, expected {tuple(shape)}; {step}")
        if DTYPES[entry["dtype"]][0] != dtype.removeprefix("torch."):
            raise IntegrityError(f"{path}: {key}: dtype {DTYPES[entry['dtype']][0]}, expected {dtype}; {step}")


def _tensor(path: Path, key: str, entry: Mapping[str, Any], body: memoryview) -> torch.Tensor:
    import torch

    raw = torch.frombuffer(body[slice(*entry["data_offsets"])], dtype=torch.uint8).clone()
    tensor = raw.view(getattr(torch, DTYPES[entry["dtype"]][0])).reshape(entry["shape"])
    if problem := _not_finite(tensor):
        raise IntegrityError(f"{path}: {key}: {problem}; {RESTORE}")
    return tensor


def _not_finite(tensor: torch.Tensor) -> str:
    """``3 values are NaN or infinite, the first at (0, 2)``, or nothing."""
    import torch

    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return ""
    first = tuple(int(index) for index in bad.nonzero()[0])
    count = int(bad.sum())
    return f"{count} value{'s are' if count > 1 else ' is'} NaN or infinite, the first at {first}"


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
