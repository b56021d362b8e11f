"""Does the method still work? Slow runs with the real SmolLM2 (`make quality`, about an hour and a half on two cores)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbiscuit import pipeline
from fedbiscuit.config import load_config
from fedbiscuit.terminal import print_evaluation

ROOT = Path(__file__).resolve().parents[2]
TWO_CAMPS = ROOT.parent / "shared" / "data" / "polis_two_camps" / "pairs.jsonl"
pytestmark = [pytest.mark.quality, pytest.mark.real]


def rows_of(run: Path) -> tuple[dict, dict]:
    result = json.loads((run / "evaluation.json").read_text())
    return result, {row["name"]: row["accuracy"] for row in result["selectors"]["rows"]}


def test_in_the_demo_world_groups_are_found_and_the_majority_likes_the_aligned_policy(tmp_path):
    run = pipeline.run_all(load_config(ROOT / "configs" / "demo.yaml", [f"runs_dir={tmp_path}"]))
    result, accuracy = rows_of(run)
    assert result["selectors"]["adjusted_rand_index"] == 1.0
    assert accuracy["selector of the client's group"] > accuracy["one global selector"] + 0.1
    truth = next(judge for judge in result["policy"]["judges"] if "truth" in judge["name"])
    assert truth["win_rate"] >= 0.65


def two_camps(tmp_path, data, *overrides):
    """What `fedbiscuit train` and `evaluate` of configs/two_camps.yaml find; the table is printed."""
    cfg = load_config(ROOT / "configs" / "two_camps.yaml", [f"runs_dir={tmp_path}", f"data.path={data}", *overrides])
    pipeline.train_selectors(cfg)
    result, _ = rows_of(pipeline.evaluate(cfg))
    print_evaluation(result)
    return result["selectors"]["rows"][0]["accuracy"], result["selectors"]["adjusted_rand_index"]


@pytest.fixture
def people():
    if not TWO_CAMPS.exists():
        pytest.skip("NOT TESTED: the comparisons of polis_two_camps are not beside this checkout")
    return TWO_CAMPS


def test_a_selector_learns_what_one_camp_of_real_people_prefers(tmp_path, people):
    camp = tmp_path / "camp.jsonl"
    camp.write_text("".join(line for line in people.open() if '"group": "bg-g0"' in line))
    centralized = ["selectors.num_adapters=1", "selectors.population=centralized", "selectors.rounds=1"]
    local = ["selectors.local.steps=80", "selectors.local.batch_size=8", "selectors.local.lr=1e-3"]
    accuracy, _ = two_camps(
        tmp_path, camp, *centralized, *local, "model.lora.layers_to_transform=[]", "data.partition.new_clients=0"
    )
    assert accuracy > 0.65


def test_two_camps_of_real_people_find_each_other_and_are_served_better_than_by_one_selector(tmp_path, people):
    groups, rand_index = two_camps(tmp_path, people, "name=groups")
    one, _ = two_camps(tmp_path, people, "name=fedbis", "selectors.num_adapters=1")
    assert rand_index > 0.3
    assert groups > one + 0.05
