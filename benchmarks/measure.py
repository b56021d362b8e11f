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
    (expected, plain_flops), (found, our_flops) = flops_of(plain), flops_of(ours)
    if equal is not None:
        difference = float((expected.cpu() - found.cpu()).abs().max())
        assert difference < equal, f"{name}: the two ways differ by {difference}"
    seconds: tuple[list[float], list[float]] = ([], [])
    peaks: tuple[list[float], list[float]] = ([], [])
    rates = []
    for _ in range(repeats):
        rates.append(product_rate())
        for way, call in enumerate((plain, ours)):
            before = start_of_peak()
            start = time.perf_counter()
            call()
            wait()
            seconds[way].append(time.perf_counter() - start)
            peaks[way].append(peak_since(before))
    return Result(name, _medians(seconds), (plain_flops, our_flops), _medians(peaks), statistics.median(rates))


def _medians(columns: tuple[list[float], list[float]]) -> tuple[float, float]:
    return statistics.median(columns[0]), statistics.median(columns[1])


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
        wait()
        best = max(best, 4 * 2 * size * 576 * 1536 / (time.perf_counter() - start))
    return best


def flops_of(call: Call) -> tuple[Any, float]:
    """What a call gives, and its multiplications and additions in matrix products and attention (causal counted as whole)."""
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
        result = call()
    return result, float(counter.get_total_flops())


def start_of_peak() -> int | None:
    """Bytes held now, from where the peak is counted; None where this machine does not tell."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def peak_since(before: int | None) -> float:
    """Bytes that were held at most since then beyond what was held before."""
    if before is None:
        return 0.0
    return float((torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")) - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
