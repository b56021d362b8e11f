"""What a person's page reads beside the store, made by hand: the folder of a run, and that of a site with its ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def made_run(folder: Path, person: str = "me") -> Path:
    """Three groups; accuracies 0.5 after the second round and 0.6 after the fourth; in the end 6 of 8, and 5 as the global one."""
    folder.mkdir()
    (folder / "config.yaml").write_text("name: mine\nselectors: {num_adapters: 3, rounds: 40}\n")
    rows: list[dict[str, Any]] = [
        {"round": number, "cohort": [person], "metrics": {"validation": {"accuracy": 0.5, "clients": {person: share}}}}
        for number, share in ((1, 0.5), (3, 0.6))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = {"adapter": 2, "accuracy": 0.75, "comparisons": 8, "same_as_global": 0.625}
    (folder / "evaluation.json").write_text(json.dumps({"selectors": {"clients": {person: mine}}}))
    return folder


def made_site(folder: Path) -> Path:
    """Three messages: one of no round, two changes of an adapter in round 0, and two seats in round 1."""
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"run": "", "rounds": [], "asked": {}, "bytes_out": 5},
        {"run": "autumn", "rounds": [0], "asked": {"train": 2}, "deltas": 2, "bytes_out": 1000},
        {"run": "autumn", "rounds": [1], "asked": {"evaluate": 1, "seat": 2}, "seats": 2, "bytes_out": 20},
    ]
    (folder / "ledger.jsonl").write_text(
        "".join(json.dumps({"time": 1.0, "bytes_in": 10} | row) + "\n" for row in rows)
    )
    return folder
