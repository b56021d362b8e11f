"""Why a binary selector: FedBis and FedRM on the same comparisons and settings. Accuracy, seconds and memory side by side.

    python benchmarks/fedrm.py [key=value ...] [--config CONFIG] [--seeds 3]

CONFIG may have several adapters; here it trains one. Both kinds are trained and evaluated by the command line, in turn, each in a
process of its own: seconds are CPU time of ``train``, memory is the most that its process held. Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from measure import table  # noqa: E402

KINDS = {"choice": "FedBis: a selector reads both answers", "reward": "FedRM: a reward model reads one"}
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Trained:
    """One run: over clients the mean accuracy and its interval (None with few of them), the loss in nats; what training took."""

    accuracy: float
    interval: Sequence[float] | None
    loss: float
    seconds: float
    memory: int


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--config", type=Path, default=HERE.parent / "configs" / "demo.yaml")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs of each kind")
    asked = parser.parse_args()
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    found: dict[str, list[Trained]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.seeds):
            for kind in KINDS if seed % 2 == 0 else reversed(KINDS):
                found[kind].append(_trained(asked.config, Path(folder), kind, seed, asked.changes))
    rows = [
        [
            name,
            ", ".join(f"{one.accuracy:.3f}" for one in found[kind]),
            ", ".join(" to ".join(f"{end:.2f}" for end in one.interval or ()) for one in found[kind]),
            ", ".join(f"{one.loss:.3f}" for one in found[kind]),
            ", ".join(f"{one.seconds:.0f} s" for one in found[kind]),
            ", ".join(f"{one.memory / 2**20:.0f} MiB" for one in found[kind]),
        ]
        for kind, name in KINDS.items()
    ]
    print(table(["kind", "accuracy, each seed", "95% interval", "loss", "CPU time of training", "memory"], rows))
    for what in ("seconds", "memory"):
        ratio = statistics.median(
            getattr(one, what) / getattr(other, what) for one, other in zip(*found.values(), strict=True)
        )
        print(f"{what}: FedBis takes {ratio:.2f} times what FedRM takes")


def _trained(config: Path, folder: Path, kind: str, seed: int, changes: Sequence[str]) -> Trained:
    name = f"{kind}-{seed}"
    own = [f"name={name}", f"runs_dir={folder}", f"seed={seed}", "selectors.num_adapters=1", f"selectors.kind={kind}"]
    fedbiscuit = [sys.executable, "-m", "fedbiscuit"]
    usage = _done([*fedbiscuit, "train", str(config), *own, *changes])
    _done([*fedbiscuit, "evaluate", str(folder / name)])
    row = json.loads((folder / name / "evaluation.json").read_text(encoding="utf-8"))["selectors"]["rows"][0]
    seconds, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * MAXRSS_BYTES
    print(f"{name}: accuracy {row['accuracy']:.3f}, {seconds:.0f} s", flush=True)
    return Trained(row["accuracy"], row["interval"], row["loss"], seconds, memory)


def _done(command: Sequence[str]) -> resource.struct_rusage:
    """Run it, without the lines that it shows on its way; what it used. An error ends the benchmark with its words."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as shown:
        process = subprocess.Popen(command, stdout=shown, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            shown.seek(0)
            raise SystemExit(f"{' '.join(command)}: ended with {code}\n{shown.read()[-3000:]}")
    return usage


if __name__ == "__main__":
    main()
