"""The ServerApp of ``fleet.py``: rounds over Flower's Grid with a clock on each part, and what both sides need to know."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedbiscuit.backends.flower as carried
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.config import FederatedSettings
from fedbiscuit.federated.algorithm import fedbiscuit_round, init_state
from fedbiscuit.types import ClientData, Comparison, Reply, Task, Weights

server = ServerApp()
clock: Counter[str] = Counter()


def adapter() -> Weights:
    """SmolLM2-135M, rank 8 in the four projections of attention in all 30 layers: 240 tensors, 3.7 MB in float32."""
    shapes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    made: Weights = {}
    for layer in range(30):
        for name, (width, out) in shapes.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            made[f"{place}.lora_A.weight"] = torch.randn(8, width) * 1e-3
            made[f"{place}.lora_B.weight"] = torch.zeros(out, 8)
    return made


def names(clients: int, sites: int, site: int) -> list[str]:
    """Who is at a site, numbered from 0."""
    return [f"client-{i:06d}" for i in range(site, clients, sites)]


class StandIn(InProcessBackend):
    """Clients that train nothing. Their deltas differ, because Flower carries equal ones only once."""

    def __init__(self, clients: Sequence[str]) -> None:
        one = ClientData((Comparison("prompt", "a", "b", 0),))
        super().__init__(None, dict.fromkeys(clients, one))  # type: ignore[arg-type]
        self._delta = {name: torch.randn_like(tensor) * 1e-4 for name, tensor in adapter().items()}

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """A delta of full size each."""
        replies = []
        for task in tasks:
            dict(task.adapters)  # looked at, as by one who trains
            scale = 1.0 + int(task.client.rpartition("-")[2]) * 1e-6
            delta = {name: tensor * scale for name, tensor in self._delta.items()}
            replies.append(Reply(task.client, adapter=0, delta=delta, num_examples=1))
        return replies


def rounds(backend: Any, count: int, told: Callable[[dict[str, Any]], None]) -> None:
    """Whole rounds of FedBis in which every client takes part; ``told`` gets a row of each."""
    cfg = FederatedSettings(num_adapters=1, rounds=count, cohort_size=0, max_attempts=1)
    state = init_state([adapter()])
    for _ in range(count):
        clock.clear()
        began = time.time()
        before = [getattr(backend, key, 0) for key in ("bytes_down", "bytes_up")]
        state, record = fedbiscuit_round(state, backend, cfg, 0)
        after = [getattr(backend, key, 0) for key in ("bytes_down", "bytes_up")]
        told(
            {
                "began": began,
                "ended": time.time(),
                "seconds": record.seconds,
                "replies": record.metrics["num_replies"],
                "refused": dict(list(record.refused.items())[:1]),
                "parts": dict(clock),
                "bytes_down": after[0] - before[0],
                "bytes_up": after[1] - before[1],
            }
        )


def _timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*words: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*words, **more)
        finally:
            clock[name] += time.perf_counter() - began

    return call


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    asked = json.loads(Path(str(context.run_config["job"])).read_text())
    for name, what in (("pack_order", "packing"), ("record_of", "packing"), ("packed_adapter", "packing")):
        setattr(carried, name, _timed(what, getattr(carried, name)))
    for name in ("message_bytes", "unpack_answer"):
        setattr(carried, name, _timed("unpacking", getattr(carried, name)))
    slow = SimpleNamespace(monotonic=time.monotonic, sleep=_timed("waiting", time.sleep))
    carried.time = slow  # type: ignore[assignment]
    way = SimpleNamespace(
        get_node_ids=_timed("asking for nodes", grid.get_node_ids),
        get_nodes=_timed("asking for nodes", grid.get_nodes),
        push_messages=_timed("pushing", grid.push_messages),
        pull_messages=_timed("pulling", lambda ids: list(grid.pull_messages(ids))),
    )

    class Timed(carried.FlowerBackend):
        def clients(self) -> list[str]:
            began = time.perf_counter()
            found = super().clients()
            clock["who is there"] = time.perf_counter() - began
            return found

    for size in asked["clients"]:
        backend = Timed(way, f"fleet-{size}", json.dumps({"clients": size}), asked["timeout"])  # type: ignore[arg-type]
        with Path(asked["rows"]).open("a") as file:

            def told(row: dict[str, Any], size: int = size, file: Any = file) -> None:
                print(json.dumps(row | {"clients": size}), file=file, flush=True)

            rounds(backend, asked["rounds"], told)
