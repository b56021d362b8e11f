"""Published data sets in whole runs: fine-tuning on people's summaries, selectors on one set that label answers to another."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from fedbiscuit import pipeline
from fedbiscuit.cli import main
from fedbiscuit.config import Config, load_config

SMALL = """
name: small
model: {base: BASE, dtype: float32, device: cpu, threads: 1, lora: {r: 2}}
data: {source: SOURCE, path: FOLDER, partition: {by: iid, num_clients: 3}, template: choice}
selectors: {rounds: 2, cohort_size: 2, eval_every: 2, local: {objective: OBJECTIVE, steps: 2, batch_size: 2}}
generation: {num_prompts: 4, max_new_tokens: 6, temperature: 1.0}
alignment: {steps: 2, batch_size: 2}
evaluation: {num_prompts: 3, bootstrap: 20}
"""


def lines(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def settings(tmp_path, tiny_model):
    """``settings(source, folder, objective, overrides...)``: a small run."""

    def make(source: str, folder: Path, objective: str = "choice", *overrides: str) -> Config:
        words = {"BASE": tiny_model, "SOURCE": source, "FOLDER": folder, "OBJECTIVE": objective}
        text = SMALL
        for word, value in words.items():
            text = text.replace(word, str(value))
        (tmp_path / "small.yaml").write_text(text)
        return load_config(tmp_path / "small.yaml", [f"runs_dir={tmp_path / 'runs'}", *overrides])

    return make


@pytest.fixture
def posts(tmp_path) -> Path:
    """tldr_3_filtered, and comparisons of some of its posts."""
    rows = [{"subreddit": "tea", "title": f"t {i}", "post": f"post {i}", "summary": f"short {i}"} for i in range(40)]
    lines(tmp_path / "tldr" / "train.jsonl", *rows)
    return tmp_path / "tldr"


def test_a_policy_is_fine_tuned_on_summaries_and_evaluated_on_posts_that_it_never_saw(settings, posts):
    cfg = settings("tldr_sft", posts, "sft")
    run = pipeline.run_all(cfg)
    assert (run / "policy" / "adapter_model.safetensors").is_file()
    result = json.loads((run / "evaluation.json").read_text())
    assert result["selectors"] is None
    assert result["policy"]["kl"] != 0.0
    numbers = [int(example["prompt"].removeprefix("post ")) for example in result["policy"]["examples"]]
    assert len(numbers) == 3
    assert min(numbers) >= 24  # of 40 posts the first 60% are trained on
    pytest.importorskip("rouge_score")
    pipeline.evaluate_task(cfg, "summarization")
    found = json.loads((run / "evaluations" / "summarization.json").read_text())
    assert found["references"] == [str(posts / "train.jsonl")]
    assert found["posts"] == 3
    assert [json.loads(row)["round"] for row in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_early_stopping_has_something_to_watch_where_there_are_single_good_answers(settings, posts, capsys):
    stop = ["selectors.patience=1", "selectors.eval_every=1", "selectors.local.lr=1e-30", "selectors.rounds=20"]
    cfg = settings("tldr_sft", posts, "sft", *stop)
    assert main(["train", str(Path(cfg.runs_dir).parent / "small.yaml"), f"runs_dir={cfg.runs_dir}", *stop]) == 0
    rows = (Path(cfg.runs_dir) / "small" / "metrics.jsonl").read_text().splitlines()
    assert [set(json.loads(row)["metrics"]["validation"]) for row in rows] == [{"loss"}] * 2
    assert ", loss " in "".join(capsys.readouterr())


def test_the_original_fine_tuning_file_runs_as_it_is(posts, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(
        f"data: {{root: {posts}, type: reddit-tldr-finetuning@llm, splitter: iid}}\n"
        f"model: {{type: {tiny_model}@huggingface_llm}}\n"
        "federate: {client_num: 3, sample_client_num: 2, total_round_num: 2, save_to: checkpoints/sft.ckpt}\n"
        "llm: {tok_len: 1024, adapter: {use: True, args: [{adapter_method: lora, r: 2}]}}\n"
        "train: {local_update_steps: 1, optimizer: {type: AdamW, lr: 1.0e-4}}\n"
        "dataloader: {batch_size: 2}\ntrainer: {type: llmtrainer}\n"
    )
    assert main(["train", "old.yaml"]) == 0
    assert Path("runs/sft/policy/adapter_model.safetensors").is_file()


def test_selectors_cannot_choose_where_there_is_one_answer(settings, posts, tmp_path, capsys):
    settings("tldr_sft", posts)
    assert main(["train", str(tmp_path / "small.yaml"), f"runs_dir={tmp_path / 'runs'}"]) == 2
    told = capsys.readouterr().err
    assert "selectors.local.objective: choice needs two answers to a prompt" in told
    assert "set it to sft" in told


def dialogue(i: int, kind: str, words: int = 1) -> str:
    return f"\n\nHuman: question {i}?\n\nAssistant: {'very ' * words}{kind} {i}"


def test_selectors_of_dialogues_label_answers_to_prompts_about_safety(settings, tmp_path, caplog):
    hh, safe = tmp_path / "hh", tmp_path / "PKU-SafeRLHF"
    for split, count in (("train", 30), ("test", 9)):
        rows = [{"chosen": dialogue(i, f"{split} good"), "rejected": dialogue(i, "bad")} for i in range(count)]
        lines(hh / "harmless-base" / f"{split}.jsonl.gz", *rows)
    lines(hh / "helpful-base" / "train.jsonl.gz", {"chosen": dialogue(90, "good", 40), "rejected": dialogue(90, "bad")})
    lines(safe / "data" / "Alpaca-7B" / "train.jsonl", *({"prompt": f"is {i} safe?"} for i in range(20)))
    cfg = settings("hh", hh, "choice", f"data.prompts={safe}", "data.max_train_tokens=100")
    with caplog.at_level(logging.WARNING):
        run = pipeline.run_all(cfg)
    pairs = [json.loads(row) for row in (run / "preferences.jsonl").read_text().splitlines()]
    assert pairs
    assert all(pair["prompt"].endswith("safe?") for pair in pairs)
    held = json.loads((run / "left_out.json").read_text())
    assert held["left_out"]["training comparisons longer than max_train_tokens"] == 1
    result = json.loads((run / "evaluation.json").read_text())
    assert sum(client["comparisons"] for client in result["selectors"]["clients"].values()) == 9
    files = json.loads((run / "manifest.json").read_text())["data"]
    assert sorted(Path(path).parent.name for path in files) == [
        "Alpaca-7B",
        "harmless-base",
        "harmless-base",
        "helpful-base",
    ]


@pytest.mark.parametrize("objective", ["choice", "sft", "dpo"])
def test_long_prompts_are_shortened_and_counted_whoever_is_trained(settings, tmp_path, objective):
    rows = [
        {"prompt": "why " * (200 if i < 7 else 1), "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)
    ]
    lines(tmp_path / "pairs.jsonl", *rows)
    run = pipeline.train_selectors(settings("trl", tmp_path / "pairs.jsonl", objective, "data.max_tokens=400"))
    assert json.loads((run / "left_out.json").read_text())["shortened_prompts"] == 7


def test_the_original_files_of_shp_train_selectors_and_align_on_questions_that_nobody_trained_on(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        rows = [
            {"post_id": f"{i}", "domain": f"askculinary_{split}", "history": f"{split} question {i}", "labels": i % 2}
            | {"human_ref_A": f"this {i}", "human_ref_B": "that " * (600 if i == 39 else 1)}
            for i in range(count)
        ]
        lines(tmp_path / "shp" / "askculinary" / f"{split}.json", *rows)
    common = (
        f"model: {{type: {tiny_model}@huggingface_llm}}\n"
        "llm: {tok_len: 1024, max_new_token: 6, adapter: {use: True, args: [{adapter_method: lora, r: 2}]}}\n"
        "train: {local_update_steps: 1, optimizer: {type: AdamW, lr: 1.0e-4}}\ndataloader: {batch_size: 2}\n"
    )
    kinds = {"selector": ("shp-comparison", 2), "rlhf": ("shp-rlhf", 1)}
    for name, (kind, clients) in kinds.items():
        federate = f"federate: {{client_num: {clients}, total_round_num: 2, save_to: {name}.ckpt}}\n"
        Path(f"{name}.yaml").write_text(f"data: {{root: shp, type: {kind}@llm, splitter: lda}}\n{common}{federate}")
    assert main(["train", "selector.yaml", "data.partition.alpha=50.0"]) == 0
    held = json.loads(Path("runs/selector/left_out.json").read_text())
    assert held["left_out"] == {"training comparisons longer than max_train_tokens": 1}
    assert main(["align", "rlhf.yaml", "generation.temperature=1.0", "--selector", "selector.yaml"]) == 0
    pairs = [json.loads(row) for row in Path("runs/rlhf/preferences.jsonl").read_text().splitlines()]
    assert pairs
    assert {pair["prompt"].split()[0] for pair in pairs} == {"validation", "test"}
    assert Path("runs/rlhf/policy/adapter_model.safetensors").is_file()
