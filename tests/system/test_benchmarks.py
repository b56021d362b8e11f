"""The benchmarks run, check that both ways give the same, and print their table; what they measure is not looked at here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", ["tiny_model", "tiny_gemma"])
def test_every_piece_of_the_speed_benchmark_runs_on_a_tiny_model(family, request):
    model = request.getfixturevalue(family)
    words = "selector reward scoring labels dpo trl generation --batch 2 --repeats 1 --prompts 2 --scale 0.1"
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "speed.py", *words.split(), "--model", str(model)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    rows = [line for line in found.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row.split()[1] for row in rows] == [
        "work",
        "selector",
        "reward",
        "scoring",
        "labelling",
        "DPO",
        "DPO",
        "DPO",
        "generation,",
    ]
    assert len({row.count("|") for row in rows}) == 1


def test_the_benchmark_of_reward_models_trains_and_evaluates_both_kinds(tiny_model):
    changes = {
        "model.base": tiny_model, "model.lora.layers_to_transform": "[]", "data.max_tokens": 500, "data.demo.num_clients": 3,
        "data.demo.comparisons_per_client": 12, "data.demo.validation_per_client": 2, "data.demo.test_per_client": 4,
        "selectors.rounds": 1, "selectors.cohort_size": 2, "selectors.local.steps": 1, "evaluation.bootstrap": 20,
    }  # fmt: skip
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "fedrm.py", *(f"{key}={value}" for key, value in changes.items())],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr + found.stdout
    rows = [line.split(" | ") for line in found.stdout.splitlines() if line.startswith("| Fed")]
    assert [row[0].split(":")[0] for row in rows] == ["| FedBis", "| FedRM"]
    assert all(0 <= float(row[1]) <= 1 and int(row[5].split()[0]) > 50 for row in rows)
    assert "seconds: FedBis takes " in found.stdout
