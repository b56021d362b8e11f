"""``fedbiscuit client start`` with a worker that can be held in the middle of a round, or told to answer wrongly.

``python faulty_site.py FOLDER DATA HOST:PORT CA GATE``. While there is a file GATE/hold, an order of the round that it names, or of
a later one, is not begun, and GATE/held says that one has come. GATE/wrong.json says which clients answer how; "*" is the whole
message.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from fedbiscuit.backends.bundle import pack_answer, unpack_answer, unpack_order
from fedbiscuit.backends.worker import Worker
from fedbiscuit.deployment import processes, site_processes, site_worker
from fedbiscuit.types import Reply


def _nan(reply: Reply) -> list[Reply]:
    delta = {name: torch.full_like(tensor, torch.nan) for name, tensor in (reply.delta or {}).items()}
    return [replace(reply, delta=delta)]


def _shape(reply: Reply) -> list[Reply]:
    return [replace(reply, delta={name: tensor[:1, :1] for name, tensor in (reply.delta or {}).items()})]


def _differing(reply: Reply) -> list[Reply]:
    return [reply, replace(reply, delta={name: 2 * tensor for name, tensor in (reply.delta or {}).items()})]


WRONG = {"nan": _nan, "shape": _shape, "twice": lambda reply: [reply, reply], "differing": _differing}


def _serve(gate: Path, folder: Path, socket: Path, files: list[str]) -> None:
    """A worker behind the gate."""
    answer, last = Worker.answer, b""

    def gated(worker: Worker, data: bytes, *rest: object) -> bytes:
        nonlocal last
        tasks = unpack_order(data).tasks
        while tasks and _is_held(gate, tasks[0].round):
            (gate / "held").touch()
            time.sleep(0.05)
        before, last = last, answer(worker, data, *rest)  # type: ignore[arg-type]
        wrong = json.loads((gate / "wrong.json").read_text()) if tasks and (gate / "wrong.json").exists() else {}
        if wrong.get("*") == "old":
            return before
        found = unpack_answer(last)
        replies = [one for reply in found.replies for one in WRONG.get(wrong.get(reply.client, ""), _right)(reply)]
        return pack_answer(replace(found, replies=replies))

    Worker.answer = gated  # type: ignore[method-assign]
    site_worker.serve(folder, socket, files)


def _is_held(gate: Path, number: int) -> bool:
    try:
        return number >= int((gate / "hold").read_text())
    except FileNotFoundError:
        return False


def _right(reply: Reply) -> list[Reply]:
    return [reply]


def _start(folder: Path, data: Path, server: site_processes.Server, gate: Path) -> None:
    """``client start``, but for the program of the worker."""

    def child(name: str, words: list[object], *rest: object) -> processes.Child:
        if name == "worker":
            words = [sys.executable, "-W", "ignore", __file__, "worker", gate.resolve(), *words[3:]]
        return processes.Child(name, words, *rest)  # type: ignore[arg-type]

    site_processes.Child = child  # type: ignore[assignment,misc]
    site_processes.run_site(folder, [data], server, lambda text: print(text, flush=True))


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        _serve(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
    else:
        at, data_file, address, ca, gate_folder = sys.argv[1:]
        _start(Path(at), Path(data_file), site_processes.Server(address, Path(ca)), Path(gate_folder))
