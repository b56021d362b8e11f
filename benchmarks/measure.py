"""How long, how much memory, how many operations: two ways of the same work in turn, in one process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Call = Callable[[], Any]


@dataclass
class Result:
    """Medians of two ways. seconds: wall. flops: of one call. peak: bytes that a call needs beyond what is held before."""

    name: str
    seconds: tuple[float, float]
    flops: tuple[float, float]
    peak: tuple[float, float]
    rate: float

    @property
    def ratio(self) -> float:
        return self.seconds[0] / self.seconds[1]

    def row(self) -> list[str]:
        """For the table: what is not known stays empty."""
        share = [f / s / self.rate if f and self.rate else 0.0 for f, s in zip(self.flops, self.seconds, strict=True)]
        return [
            self.name,
            *(f"{s:.2f}" if s >= 0.1 else f"{1e3 * s:.1f} ms" for s in self.seconds),
            f"{self.ratio:.2f}",
            *(f"{f / 1e9:.0f}" if f else "" for f in self.flops),
            *(f"{s:.0%}" if s else "" for s in share),
            *(f"{p / 2**20:.0f}" if p else "" for p in self.peak),
            f"{self.peak[0] / self.peak[1]:.2f}" if all(self.peak) else "",
        ]


HEADER = (
    "work", "plain s", "ours s", "times faster", "plain GFLOP", "ours GFLOP", "plain of peak", "ours of peak", "plain MiB",
    "ours MiB", "times less",
)  # fmt: skip


def compare(name: str, plain: Call, ours: Call, repeats: int, equal: float | None = 1e-3) -> Result:
    """Both ways in turn. ``equal``: by how much their results may differ; None where they are random."""
    expected, found = plain(), ours()
    if equal is not None:
        difference = float((expected - found).abs().max())
        assert difference < equal, f"{name}: the two ways differ by {difference}"
    flops = flops_of(plain), flops_of(ours)
    peak = peak_of(plain), peak_of(ours)
    seconds: tuple[list[float], list[float]] = ([], [])
    rates = []
    for _ in range(repeats):
        rates.append(product_rate())
        for way, call in enumerate((plain, ours)):
            start = time.perf_counter()
            call()
            _wait()
            seconds[way].append(time.perf_counter() - start)
    medians = statistics.median(seconds[0]), statistics.median(seconds[1])
    return Result(name, medians, flops, peak, statistics.median(rates))


def product_rate() -> float:
    """Operations a second of a matrix product with the sizes of a small model's layer, in the type that is used."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (4096, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(*s, device=device, dtype=dtype) for s in ((size, 576), (576, 1536)))
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        _wait()
        best = max(best, 4 * 2 * size * 576 * 1536 / (time.perf_counter() - start))
    return best


def flops_of(call: Call) -> float:
    """Multiplications and additions of matrix products and attention (causal attention counted as whole)."""
    ops = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:  # type: ignore[arg-type]
        call()
    return float(counter.get_total_flops())


def peak_of(call: Call) -> float:
    """Bytes that a call needs at most beyond what is held before it; 0 where this machine does not tell."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0.0
    before = _status("VmRSS")
    call()
    return float(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
