"""Every shipped config runs from end to end: on files in its source's own format, with a two-layer model and few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbiscuit import pipeline
from fedbiscuit.config import load_config

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    "model.dtype=float32",
    "model.device=cpu",
    "model.threads=1",
    "model.lora.r=2",
    "model.lora.target_modules=all-linear",
    "model.lora.layers_to_transform=[]",
    "policy_model=null",
    "selectors.warmup_rounds=1",
    "selectors.cohort_size=2",
    "selectors.eval_every=2",
    "selectors.keep_every=0",
    "selectors.local.steps=1",
    "selectors.local.batch_size=2",
    "selectors.local.grad_accum=1",
    "generation.num_prompts=4",
    "generation.num_completions=2",
    "generation.max_new_tokens=6",
    "generation.temperature=1.0",
    "alignment.steps=2",
    "alignment.batch_size=2",
    "alignment.grad_accum=1",
    "alignment.keep_every=0",
    "evaluation.num_prompts=3",
]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def people(folder: Path) -> list[str]:
    """Comparisons in our own format."""
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    rows = [
        {
            "prompt": f"{split} {i}?",
            "output_a": f"yes {i}",
            "output_b": "no",
            "choice": i % 2,
            "client": c,
            "split": split,
        }
        for c in ("ann", "bo", "cy", "di")
        for i, split in enumerate(splits)
    ]
    write(folder / "people.jsonl", rows)
    return [f"data.path={folder / 'people.jsonl'}", "data.prompts="]


def summaries(folder: Path) -> list[str]:
    """Rows as in OpenAI's summarize-from-feedback."""
    splits = ["train"] * 6 + ["valid1"] * 2 + ["valid2"] * 2
    rows = [
        {
            "info": {"id": f"{w}{i}", "post": f"{w} post {i}", "title": f"title {i}", "subreddit": "tea"},
            "summaries": [{"text": f"long {i}"}, {"text": "short"}],
            "choice": i % 2,
            "worker": w,
            "batch": "batch3",
            "split": split,
        }
        for w in ("w1", "w2", "w3", "w4")
        for i, split in enumerate(splits)
    ]
    write(folder / "batch3.json", rows)
    return [f"data.path={folder}", "data.partition.num_clients=4"]


def forum(folder: Path) -> list[str]:
    """Rows as in the Stanford Human Preferences."""
    for split, count in (("train", 60), ("validation", 12), ("test", 12)):
        rows = [
            {
                "post_id": f"{split}{i}",
                "domain": f"askculinary_{split}",
                "history": f"{split} question {i}",
                "human_ref_A": f"this {i}",
                "human_ref_B": "that",
                "labels": i % 2,
            }
            for i in range(count)
        ]
        write(folder / "askculinary" / f"{split}.json", rows)
    of_config = [f"data.path={folder}", f"data.prompts={folder}@validation+test"]
    return [*of_config, "data.partition.num_clients=4", "data.partition.alpha=50.0"]


DATA = {"your_data": people, "two_camps": people, "convarg": people, "tldr": summaries, "shp": forum}


@pytest.mark.parametrize("name", sorted(DATA))
def test_a_shipped_config_runs_on_its_kind_of_files(name, tmp_path, tiny_model):
    config = ROOT / "configs" / f"{name}.yaml"
    overrides = [*SMALL, *DATA[name](tmp_path / "data"), f"model.base={tiny_model}", f"runs_dir={tmp_path}"]
    num_adapters = load_config(config).selectors.num_adapters
    run = pipeline.run_all(load_config(config, [*overrides, f"selectors.rounds={num_adapters + 1}"]))
    result = json.loads((run / "evaluation.json").read_text())
    assert result["selectors"]["rows"][0]["name"] == "selector of the client's group"
    assert [judge["name"] for judge in result["policy"]["judges"]] == ["the selectors' vote"]
    assert (run / f"selectors/u{num_adapters - 1}/adapter_model.safetensors").is_file()
