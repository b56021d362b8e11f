"""A whole run with a two-layer model: what it leaves, that it resumes bit for bit, and what must never leave a client."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedbiscuit
from fedbiscuit import pipeline, report
from fedbiscuit.config import Config, parse_config
from fedbiscuit.evaluation.metrics import Judged
from fedbiscuit.pipeline import comparing
from fedbiscuit.station.looking import what_was_learned
from fedbiscuit.types import ConfigError, IntegrityError, rng_for

NOT_COMPARED = {"timings.jsonl", "run.lock", "report.html", "manifest.json", "config.yaml"}
"""Files with a clock, a lock or the run's own name in them."""


def write_world(path: Path, num_clients: int = 6, per_split: tuple[int, int, int] = (8, 4, 4)) -> Path:
    """Clients of two tastes: even ones like the answer that ends in 'x', odd ones the other."""
    rows = []
    for k in range(num_clients):
        rng = rng_for("world", k)
        for split, count in zip(("train", "val", "test"), per_split, strict=True):
            for i in range(count):
                good, bad = (f"{rng.randint(0, 99)}{letter}" for letter in ("xy" if k % 2 == 0 else "yx"))
                place = rng.randint(0, 1)
                a, b = (bad, good) if place else (good, bad)
                row = {"prompt": f"{split} question {k} {i}?", "output_a": a, "output_b": b, "choice": place}
                rows.append({**row, "client": f"person-{k}", "split": split, "meta": {"group": k % 2}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp_path: Path, model: Path, *overrides: str, name: str = "one") -> Config:
    world = tmp_path / "world.jsonl"
    if not world.exists():
        write_world(world)
    text = f"""
name: {name}
runs_dir: {tmp_path / "runs"}
model: {{base: {model}, device: cpu, threads: 1, lora: {{r: 4, dropout: 0.1, layers_to_transform: [1]}}}}
data: {{path: {world}, template: choice, max_tokens: 200}}
selectors:
  num_adapters: 2
  rounds: 6
  cohort_size: 4
  warmup_rounds: 1
  regroup_every: 2
  eval_every: 2
  keep_every: 3
  local: {{steps: 2, batch_size: 2, lr: 0.01}}
generation: {{num_prompts: 6, num_completions: 3, max_new_tokens: 6, temperature: 1.0, batch_size: 2}}
alignment: {{steps: 5, batch_size: 2, lr: 0.01, save_every: 2}}
evaluation: {{num_prompts: 4, bootstrap: 50, compare_global: true}}
"""
    return parse_config(text, overrides, "test.yaml")


def log_prob_of(model: Path, adapter: Path):
    """(log-probability, tokens) of an answer to a prompt by PEFT's own model, with its end token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()

    @torch.no_grad()
    def log_prob(prompt: str, answer: str, adapter: bool = True) -> tuple[float, int]:
        words = [{"role": "user", "content": prompt}]
        start = (
            tokenizer.apply_chat_template(words, add_generation_prompt=True)["input_ids"]
            if tokenizer.chat_template
            else tokenizer(prompt).input_ids
        )
        ids = [*start, *tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with contextlib.nullcontext() if adapter else policy.disable_adapter():
            logits = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logits[i - 1, ids[i]]) for i in range(len(start), len(ids))), len(ids) - len(start)

    return log_prob


def digests(run: Path) -> dict[str, str]:
    """sha256 of all files of a run that a clock does not change."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED
    }


def without_traffic(run: Path) -> tuple[dict[str, str], list[dict]]:
    """The same and the rounds, but for the bytes that travelled, in which a run over a network differs from one in process."""
    files = digests(run)
    del files["metrics.jsonl"]
    return files, [{**row, "bytes_up": 0, "bytes_down": 0} for row in lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A finished run: its folder and its settings."""
    tmp_path = tmp_path_factory.mktemp("finished")
    cfg = settings(tmp_path, tiny_model)
    return pipeline.run_all(cfg), cfg


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_reward_model_is_a_run_like_any_other(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "selectors.kind=reward", name="rewards")
    folder = pipeline.run_all(cfg)
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["selectors"]["rows"][0]["flip_rate"] == 0.0
    assert (folder / "policy" / "adapter_model.safetensors").exists()
    assert "reward-model" in (folder / "selectors" / "u0" / "README.md").read_text()
    judge = fedbiscuit.Selector.from_pretrained(folder, only=0)
    first, second = judge.choose([("q?", "3x", "4y"), ("q?", "4y", "3x")])
    assert first == pytest.approx(1 - second)
    assert first != 0.5


def test_a_run_leaves_what_the_design_says(finished):
    run, _ = finished
    expected = """config.yaml manifest.json metrics.jsonl completions.jsonl preferences.jsonl evaluation.json policy
                  selectors/u0/adapter_config.json selectors/u1/adapter_model.safetensors selectors/u1/README.md
                  checkpoints/round-000003/u0 checkpoints/round-000006/u1 global/u0"""
    for name in expected.split():
        assert (run / name).exists(), name


def test_no_path_of_this_machine_stands_in_an_adapter_that_is_handed_on(finished, tiny_model):
    run, _ = finished
    for folder in ("selectors/u0", "policy"):
        for name in ("README.md", "adapter_config.json"):
            text = (run / folder / name).read_text()
            assert str(tiny_model.parent) not in text
            assert tiny_model.name in text


def test_the_log_has_a_line_a_round_with_the_phase_groups_and_bytes(finished):
    run, cfg = finished
    rows = lines(run / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(6))
    assert [row["phase"] for row in rows] == ["warmup"] * 2 + ["federated"] * 4
    assert [row["regrouped"] for row in rows] == [False, False, True, False, True, False]
    assert all(row["bytes_up"] > 0 and row["bytes_down"] > 0 for row in rows)
    assert "accuracy" in rows[1]["metrics"]["validation"]
    assert len(lines(run / "global_metrics.jsonl")) == cfg.selectors.rounds


def test_the_station_reads_in_a_run_what_was_learned_from_each_client(finished):
    run, cfg = finished
    clients = json.loads((run / "evaluation.json").read_text())["selectors"]["clients"]
    assert len(clients) >= 2
    for client, row in clients.items():
        found = what_was_learned(run, client)
        assert (found.group, found.final, found.pairs) == (row["adapter"], row["accuracy"], row["comparisons"])
        assert found.num_groups == cfg.selectors.num_adapters
        assert 0 <= found.with_global <= 1
        assert found.with_global * found.pairs == pytest.approx(round(found.with_global * found.pairs))
        assert found.rounds
        assert found.missing == ()


def test_two_selectors_agree_where_they_choose_the_same_answer():
    mine, other = (
        Judged(np.array(p), np.zeros(3), np.zeros(3), np.zeros((3, 2))) for p in ([0.9, 0.2, 0.6], [0.8, 0.7, 0.6])
    )
    assert comparing._agree(mine, other) == pytest.approx(2 / 3)


def test_adapters_load_with_peft_and_preferences_load_as_a_trl_dataset(finished, tiny_model):
    run, _ = finished
    peft = pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    for folder in ("selectors/u1", "policy"):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run / folder)
        saved = load_file(run / folder / "adapter_model.safetensors")
        loaded = peft.get_peft_model_state_dict(model)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    data = datasets.Dataset.from_list(lines(run / "preferences.jsonl"))
    args = trl.DPOConfig(output_dir=str(run.parent / "trl"), report_to=[], use_cpu=True, bf16=False, max_steps=1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()


def test_evaluation_compares_group_selectors_with_one_global_one_the_longer_answer_and_chance(finished):
    run, _ = finished
    result = json.loads((run / "evaluation.json").read_text())
    names = [row["name"] for row in result["selectors"]["rows"]]
    assert names == [
        "selector of the client's group",
        "vote of all selectors",
        "one global selector",
        "the longer answer",
        "the shorter answer",
        "chance",
    ]
    longer, shorter = (row["accuracy_in_order"] for row in result["selectors"]["rows"][3:5])
    assert shorter == pytest.approx([1 - share for share in longer])
    assert longer != shorter
    assert set(result["selectors"]["clients"]) == {f"person-{k}" for k in range(6)}
    judge = result["policy"]["judges"][0]
    assert judge["wins"] + judge["losses"] + judge["ties"] == 4
    assert judge["win_rate"] == (judge["wins"] + judge["ties"] / 2) / 4


def test_a_second_run_with_the_same_seed_is_the_same_bit_for_bit(finished, tmp_path, tiny_model):
    run, _ = finished
    (tmp_path / "world.jsonl").write_bytes((run.parents[1] / "world.jsonl").read_bytes())
    again = pipeline.run_all(settings(tmp_path, tiny_model))
    assert digests(again) == digests(run)


KILL = """
import sys
from fedbiscuit import pipeline, report
from fedbiscuit.config import load_config
pipeline.run_all(load_config(sys.argv[1], []), resume=True)
"""


@pytest.mark.parametrize(
    "where",
    [
        "state_tensors:2",
        "lines_half:5",
        "state_saved:9",
        "lines_half:23",
        "file_written:4",
        "state_manifest:15",
        "lines_written:31",
    ],
)
def test_fault_83_kill_9_and_resume_ends_in_the_same_files_bit_for_bit(finished, tmp_path, tiny_model, where):
    run, _ = finished
    (tmp_path / "world.jsonl").write_bytes((run.parents[1] / "world.jsonl").read_bytes())
    from fedbiscuit.config import dump_config

    config = tmp_path / "cfg.yaml"
    config.write_text(dump_config(settings(tmp_path, tiny_model)))
    environment = {**os.environ, "FEDBISCUIT_CRASH_AT": where, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILL, str(config)], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert digests(tmp_path / "runs" / "one") != digests(run)
    again = pipeline.run_all(settings(tmp_path, tiny_model), resume=True)
    assert digests(again) == digests(run)


def test_resuming_with_other_settings_is_refused_and_evaluation_may_change(finished):
    run, cfg = finished
    other = cfg.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="seed"):
        pipeline.run_all(other, resume=True)
    more = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update={"num_prompts": 3})})
    before = digests(run)
    pipeline.evaluate(more)
    judge = json.loads((run / "evaluation.json").read_text())["policy"]["judges"][0]
    assert judge["wins"] + judge["losses"] + judge["ties"] == 3
    pipeline.evaluate(cfg)
    assert digests(run) == before


def test_selectors_of_another_run_judge_the_policy_and_it_is_said_whose_they_are(finished, tmp_path, tiny_model):
    run, cfg = finished
    (tmp_path / "others").mkdir()
    world = (run.parents[1] / "world.jsonl").read_text()
    (tmp_path / "others" / "world.jsonl").write_text(world.replace('"person-', '"other-'))
    (tmp_path / "world.jsonl").write_text(world)
    strangers = pipeline.train_selectors(settings(tmp_path / "others", tiny_model, "seed=5", name="strangers"))
    known = pipeline.train_selectors(settings(tmp_path, tiny_model, "seed=6", "selectors.num_adapters=1", name="known"))

    def judged(*paths: Path) -> list[dict]:
        asked = {"judges": tuple(str(path) for path in paths)}
        pipeline.evaluate(cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update=asked)}))
        return json.loads((run / "evaluation.json").read_text())["policy"]["judges"]

    before = digests(run)
    own, others, ours, again = judged(strangers, known, run)
    assert [one["name"] for one in (own, others, ours)] == [
        "the selectors' vote",
        "the selectors of strangers, 6 other clients",
        "the selectors of known, 6 of its 6 clients are ours",
    ]
    assert [one["independent"] for one in (own, others, ours, again)] == [False, True, False, False]
    counts = ("wins", "losses", "ties")
    assert [again[key] for key in counts] == [own[key] for key in counts]  # the same selectors, loaded as another run's
    pipeline.evaluate(cfg)
    assert digests(run) == before


def test_a_judge_that_cannot_judge_is_named_before_anything_is_computed(finished, tmp_path):
    run, cfg = finished
    before = (run / "evaluation.json").read_bytes()
    (tmp_path / "sft" / "policy").mkdir(parents=True)
    (tmp_path / "sft" / "config.yaml").touch()
    none = "has no trained selectors"
    for path, reason in ((tmp_path, none), (tmp_path / "missing", none), (tmp_path / "sft", "trained a policy and no")):
        asked = cfg.evaluation.model_copy(update={"judges": (str(path),)})
        with pytest.raises(ConfigError, match=f"evaluation.judges: .*{reason}"):
            pipeline.evaluate(cfg.model_copy(update={"evaluation": asked}))
    assert (run / "evaluation.json").read_bytes() == before


def test_fault_30_a_data_file_that_changed_is_noticed_at_resume(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "selectors.rounds=3")
    pipeline.train_selectors(cfg)
    write_world(tmp_path / "world.jsonl", per_split=(9, 4, 4))
    with pytest.raises(IntegrityError, match="data files"):
        pipeline.train_selectors(cfg, resume=True)


def test_mistake_10_labeling_without_a_trained_selector_is_an_error(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "selectors.rounds=3")
    with pytest.raises(ConfigError, match="train its selectors first"):
        pipeline.label(cfg)
    assert not (tmp_path / "runs").exists()
    run = pipeline.train_selectors(cfg)
    shutil.rmtree(run / "selectors" / "u1")
    with pytest.raises(IntegrityError, match=r"u1.*no adapter"):
        pipeline.label(cfg)
    assert not (run / "preferences.jsonl").exists()


def test_aligning_without_labels_is_an_error_with_the_next_step(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "selectors.rounds=3")
    pipeline.train_selectors(cfg)
    with pytest.raises(ConfigError, match="fedbiscuit label"):
        pipeline.align(cfg)


def test_mistake_13_the_last_round_is_saved_whatever_save_every_says(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "selectors.rounds=5", "selectors.save_every=3")
    run = pipeline.train_selectors(cfg)
    assert sorted(p.name for p in (run / "state" / "selectors").iterdir()) == ["00000003", "00000005"]
    assert (run / "selectors" / "u1" / "adapter_model.safetensors").exists()


def test_early_stopping_ends_after_patience_evaluations_without_gain(tmp_path, tiny_model):
    overrides = ["selectors.rounds=40", "selectors.patience=2", "selectors.local.lr=1e-30", "selectors.eval_every=1"]
    run = pipeline.train_selectors(settings(tmp_path, tiny_model, *overrides))
    assert 3 <= len(lines(run / "metrics.jsonl")) < 40


def test_early_stopping_without_validation_comparisons_says_that_nothing_stops(tmp_path, tiny_model, caplog):
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "tea?", "output_a": "yes", "output_b": "no", "choice": 0, "split": "train"}
    pairs.write_text("".join(json.dumps(row | {"client": name}) + "\n" for name in ("ada", "ben")))
    few = ["data.source=jsonl", f"data.path={pairs}", "selectors.num_adapters=1", "selectors.cohort_size=0"]
    stop = ["selectors.rounds=3", "selectors.patience=1", "evaluation.compare_global=false"]
    run = pipeline.train_selectors(settings(tmp_path, tiny_model, *few, *stop))
    assert len(lines(run / "metrics.jsonl")) == 3
    assert "no validation comparisons here to judge a round by, so all 3 rounds are run" in caplog.text


def test_mistake_06_early_stopping_keeps_the_round_of_least_validation_loss_and_its_groups(tmp_path, tiny_model):
    overrides = ["selectors.rounds=12", "selectors.patience=3", "selectors.eval_every=1", "selectors.local.lr=0.3"]
    cfg = settings(tmp_path, tiny_model, *overrides, "evaluation.compare_global=false", "selectors.keep_every=1")
    run = pipeline.train_selectors(cfg)
    rows = lines(run / "metrics.jsonl")
    loss_after = {row["round"] + 1: row["metrics"]["validation"]["loss"] for row in rows if row["phase"] == "federated"}
    best = min(loss_after, key=loss_after.get)
    assert best < len(rows)  # it became worse, or this shows nothing
    for name in ("u0/adapter_model.safetensors", "u1/adapter_model.safetensors", "groups.json"):
        kept = (run / f"checkpoints/round-{best:06d}" / name).read_bytes()
        assert (run / "selectors" / name).read_bytes() == kept
    assert json.loads((run / "selectors/groups.json").read_text())["round"] == best


def test_early_stopping_of_a_policy_that_imitates_watches_the_loss_of_the_good_answers(tmp_path, tiny_model):
    """Against PEFT's own model, one whole text at a time."""
    changes = ["selectors.num_adapters=1", "selectors.warmup_rounds=0", "selectors.local.objective=sft"]
    watch = [
        "selectors.patience=1",
        "selectors.eval_every=1",
        "selectors.local.lr=0.3",
        "evaluation.compare_global=false",
    ]
    run = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, *watch, "selectors.rounds=9"))
    losses = [row["metrics"]["validation"]["loss"] for row in lines(run / "metrics.jsonl")]
    log_prob = log_prob_of(tiny_model, run / "policy")
    nats = tokens = 0.0
    for row in map(json.loads, (tmp_path / "world.jsonl").read_text().splitlines()):
        if row["split"] == "val":
            found = log_prob(row["prompt"], row["output_b"] if row["choice"] else row["output_a"])
            nats, tokens = nats - found[0], tokens + found[1]
    assert min(losses) == pytest.approx(nats / tokens, rel=1e-4)  # what is kept is the round of least loss
    assert losses[0] > min(losses)  # training lowers it, or this shows nothing


def test_a_finished_training_goes_on_with_more_rounds_as_if_it_had_been_longer_from_the_start(tmp_path, tiny_model):
    plain = ["evaluation.compare_global=false", "selectors.keep_every=0"]
    short = settings(tmp_path, tiny_model, *plain, "selectors.rounds=4", name="grown")
    pipeline.train_selectors(short)
    pipeline.evaluate(short)
    evaluated = (tmp_path / "runs/grown/evaluation.json").read_bytes()
    grown = settings(tmp_path, tiny_model, *plain, "selectors.rounds=7", name="grown")
    run = pipeline.train_selectors(grown, resume=True)
    assert not (run / "evaluation.json").exists(), "it says what the selectors of before were worth"
    assert (run / "evaluation-round-000004.json").read_bytes() == evaluated
    whole = pipeline.train_selectors(settings(tmp_path, tiny_model, *plain, "selectors.rounds=7", name="whole"))
    for u in range(2):
        file = f"selectors/u{u}/adapter_model.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    with pytest.raises(ConfigError, match=r"selectors\.rounds"):
        pipeline.train_selectors(short, resume=True)  # fewer would take back what was done
    pipeline.label(grown)
    with pytest.raises(ConfigError, match=r"selectors\.rounds"):  # labels belong to the selectors that made them
        pipeline.train_selectors(
            settings(tmp_path, tiny_model, *plain, "selectors.rounds=9", name="grown"), resume=True
        )


def test_what_was_kept_along_the_way_is_evaluated_on_demand(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "alignment.keep_every=2", "selectors.keep_every=1")
    run = pipeline.run_all(cfg)
    assert json.loads((run / "evaluation.json").read_text())["policy"]["checkpoints"] == []
    pipeline.evaluate(cfg, checkpoints=True)
    result = json.loads((run / "evaluation.json").read_text())
    rounds = result["selectors"]["checkpoints"]
    assert [row["round"] for row in rounds] == [3, 4, 5, 6]  # there are no groups in the warm-up
    last = result["selectors"]["rows"][0]
    assert (rounds[-1]["accuracy"], rounds[-1]["interval"]) == (last["accuracy"], last["interval"])
    assert [row["step"] for row in result["policy"]["checkpoints"]] == [2, 4]
    assert all(0 <= row["win_rate"] <= 1 and row["words"] > 0 for row in result["policy"]["checkpoints"])


def test_checkpoints_are_those_of_the_groups_and_not_of_the_global_selector(finished):
    run, _ = finished
    assert sorted(p.name for p in (run / "checkpoints/round-000006").iterdir()) == ["groups.json", "u0", "u1"]
    kept, final = (
        (run / f"{folder}/u0/adapter_model.safetensors").read_bytes()
        for folder in ("checkpoints/round-000006", "selectors")
    )
    assert kept == final


@pytest.mark.parametrize(
    "overrides",
    [
        ["selectors.num_adapters=1", "selectors.population=centralized", "selectors.cohort_size=1"],
        ["selectors.num_adapters=1", "selectors.population=local"],
        ["selectors.num_adapters=1", "selectors.lora_aggregation=freeze_a", "selectors.server_optimizer=adam"],
        ["selectors.num_adapters=1", "selectors.local.objective=sft", "alignment.steps=1"],
        ["selectors.num_adapters=1", "selectors.local.objective=dpo"],
        ["selectors.grouping=optimal", "selectors.aggregator=norm_clipped_mean", "selectors.scale=population"],
        ["selectors.grouping=greedy", "selectors.aggregator=median", "selectors.weights=examples"],
        ["selectors.grouping=nearest", "selectors.server_optimizer=momentum"],
    ],
)
def test_baselines_and_options_are_settings_of_the_same_loop(tmp_path, tiny_model, overrides):
    base = ["evaluation.compare_global=false", "selectors.rounds=3", "selectors.keep_every=0"]
    cfg = settings(tmp_path, tiny_model, *base, *overrides)
    run = pipeline.run_all(cfg)
    result = json.loads((run / "evaluation.json").read_text())
    assert 0 <= result["selectors"]["rows"][0]["accuracy"] <= 1
    if cfg.selectors.local.objective != "choice":
        assert (run / "policy" / "adapter_model.safetensors").exists()
        assert result["policy"]["judges"] == []


def test_a_policy_that_clients_trained_is_judged_by_the_reward_that_it_implies(tmp_path, tiny_model):
    """Against PEFT's own model, one whole text at a time: log-probabilities with the adapter minus those without it."""
    changes = ["selectors.num_adapters=1", "selectors.local.objective=dpo", "data.partition.new_clients=0.2"]
    cfg = settings(tmp_path, tiny_model, "evaluation.compare_global=false", "selectors.rounds=3", *changes)
    run = pipeline.run_all(cfg)
    found = json.loads((run / "evaluation.json").read_text())["selectors"]
    log_prob = log_prob_of(tiny_model, run / "policy")

    def reward(prompt: str, answer: str) -> float:
        return log_prob(prompt, answer)[0] - log_prob(prompt, answer, adapter=False)[0]

    right: dict[str, list[float]] = {}
    for row in map(json.loads, (tmp_path / "world.jsonl").read_text().splitlines()):
        if row["split"] == "test":
            margin = reward(row["prompt"], row["output_a"]) - reward(row["prompt"], row["output_b"])
            assert abs(margin) > 1e-5
            right.setdefault(row["client"], []).append(float((margin > 0) == (row["choice"] == 0)))
    shares = {client: sum(held) / len(held) for client, held in right.items()}
    assert {client: one["accuracy"] for client, one in found["clients"].items()} == {
        c: shares[c] for c in found["clients"]
    }
    assert found["rows"][0]["name"] == "the policy's implicit reward"
    assert found["rows"][0]["flip_rate"] == 0.0
    new = found["new_clients"]["new clients, the policy's implicit reward"]
    assert new == {client: shares[client] for client in shares if client not in found["clients"]}
    _, header, (first, *_) = report.comparison_tables([run])[0]
    assert first[header.index("new clients")] == f"{sum(new.values()) / len(new):.3f}"


def test_the_base_model_can_stand_beside_as_it_is(tmp_path, tiny_model):
    """What it says is the letters of a model without an adapter."""
    from fedbiscuit.models.lm import load_lm
    from fedbiscuit.models.selector import letter_margins

    cfg = settings(tmp_path, tiny_model, "evaluation.compare_global=false", "evaluation.compare_raw=true")
    run = pipeline.train_selectors(cfg)
    pipeline.evaluate(cfg)
    found = json.loads((run / "evaluation.json").read_text())["selectors"]
    row = next(row for row in found["rows"] if row["name"] == "the base model, untrained")
    with pipeline.open_run(cfg, pipeline.silent) as session:
        untouched = load_lm(cfg.model)
        selector = dataclasses.replace(session.selector, lm=untouched, trunks=None)
        test = session.clients["person-0"].test
        with untouched.adapter_off():
            margins = letter_margins(selector, [untouched.adapter()], selector.encode(test)[0])[0]
    said_a = (margins[:, 0] - margins[:, 1]) > 0
    right = [float(bool(a) == (one.choice == 0)) for a, one in zip(said_a, test, strict=True)]
    assert found["clients"]["person-0"]["baseline_raw"] == sum(right) / len(right)
    assert row["accuracy"] == pytest.approx(sum(one["baseline_raw"] for one in found["clients"].values()) / 6)
    with pytest.raises(ConfigError, match=r"evaluation\.compare_raw"):
        settings(tmp_path, tiny_model, "evaluation.compare_raw=true", "selectors.kind=reward")


def test_a_template_that_cannot_label_is_refused_before_anything_is_trained(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "data.template=tldr")
    with pytest.raises(ConfigError, match="subreddit"):
        pipeline.run_all(cfg)
    assert not (tmp_path / "runs" / "one" / "metrics.jsonl").exists()


def test_fixed_groups_must_name_every_client(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "selectors.grouping=fixed", "selectors.groups={person-0: 0, persn-1: 1}")
    with pytest.raises(ConfigError, match="must name each client once"):
        pipeline.train_selectors(cfg)


def test_early_stopping_waits_for_the_end_of_the_warm_up():
    from fedbiscuit.pipeline.rounds import _gave_up

    def row(phase, loss):
        return {"phase": phase, "metrics": {"validation": {"loss": loss}}}

    warmup = [row("warmup", loss) for loss in (0.5, 0.9, 0.9, 0.9)]
    assert not _gave_up(warmup, 2)
    assert not _gave_up([*warmup, row("federated", 0.8), row("federated", 0.7)], 2)
    assert _gave_up([*warmup, *(row("federated", loss) for loss in (0.6, 0.7, 0.65))], 2)


def test_new_clients_take_part_in_nothing_and_are_served_all_the_same(tmp_path, tiny_model):
    write_world(tmp_path / "world.jsonl", num_clients=8)
    changes = ("data.partition.new_clients=0.25", "evaluation.compare_global=false", "selectors.grouping_comparisons=6")
    cfg = settings(tmp_path, tiny_model, *changes)
    run = pipeline.train_selectors(cfg)
    pipeline.evaluate(cfg)
    found = json.loads((run / "evaluation.json").read_text())["selectors"]
    taking_part = set(found["clients"])
    new = set(found["new_clients"]["new clients, the best fitting selector"])
    assert len(taking_part) == 6
    assert len(new) == 2
    assert not new & taking_part
    rows = lines(run / "metrics.jsonl")
    assert all(set(row["cohort"]) | set(row.get("grouping", {})) <= taking_part for row in rows)
    assert set(json.loads((run / "selectors/groups.json").read_text())["adapter_of"]) == taking_part
    names = [row["name"] for row in found["rows"]]
    assert names[-4:] == [
        "new clients, the best fitting selector", "new clients, vote of all selectors", "new clients, the longer answer",
        "chance",
    ]  # fmt: skip
    assert found["temperature"] > 0
    assert found["rows"][0]["loss_at_temperature"] > 0
    assert json.loads((run / "left_out.json").read_text())["new_clients"] == 2


def test_comparisons_that_do_not_fit_are_left_out_and_told_once(tmp_path, tiny_model, caplog):
    rows = [json.loads(line) for line in write_world(tmp_path / "world.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        if row["split"] == "train" and i % 3 == 0:
            row["output_a"] += " and so on" * 200
    (tmp_path / "world.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pipeline.open_session(settings(tmp_path, tiny_model), False, pipeline.silent) as session:
        held = sum(len(data.train) for data in session.clients.values())
    assert held == 48 - 16
    assert session.left_out["comparisons whose two answers do not fit max_tokens"] == 16
    told = [message for message in caplog.messages if "do not fit" in message]
    assert len(told) == 1
    assert told[0].startswith("comparisons left out because their two answers do not fit data.max_tokens=200: 16 (")


def test_groups_that_the_data_names_can_be_told(tmp_path, tiny_model):
    changes = ("selectors.grouping=fixed", "selectors.warmup_rounds=0", "evaluation.compare_global=false")
    run = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes))
    pipeline.evaluate(settings(tmp_path, tiny_model, *changes))
    assert json.loads((run / "evaluation.json").read_text())["selectors"]["adjusted_rand_index"] == 1.0
    with pytest.raises(ConfigError, match="the data names 2 groups; set it to 2"):
        pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, "selectors.num_adapters=3", name="three"))


def test_runs_side_by_side_are_tables_and_figures_and_the_same_bytes_each_time(tmp_path, tiny_model, capsys):
    from fedbiscuit.cli import main

    folders = []
    for name, changes in (
        ("bis-0", ("selectors.num_adapters=1",)),
        ("bis-1", ("selectors.num_adapters=1", "seed=1")),
        ("biscuit-0", ("evaluation.compare_global=false",)),
    ):
        cfg = settings(tmp_path, tiny_model, *changes, name=name)
        folders.append(str(pipeline.train_selectors(cfg)))
        if name == "bis-1":
            capsys.readouterr()
            assert main(["compare", *folders]) == 2
            assert "bis-0: is not evaluated; run `fedbiscuit evaluate" in capsys.readouterr().err.replace("\n", " ")
    for folder in folders:
        assert main(["evaluate", folder]) == 0
    capsys.readouterr()
    assert main(["compare", *folders]) == 0
    shown = capsys.readouterr().out
    assert "6 clients with 24 test comparisons" in shown
    assert "FedBiscuit, U = 2, vote" in shown
    out = tmp_path / "docs" / "comparison.md"
    out.parent.mkdir()
    assert main(["compare", *folders, "--out", str(out)]) == 0
    text = out.read_text()
    held = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    assert set(held) == {"comparison.md", "comparison-0-agreement.svg", "comparison-0-rounds.svg"}
    assert "| FedBis | 2 |" in text
    assert "](comparison-0-rounds.svg)" in text
    assert b"var(--" not in held["comparison-0-agreement.svg"]
    assert main(["compare", *folders, "--out", str(out)]) == 0
    assert held == {path.name: path.read_bytes() for path in out.parent.iterdir()}


def test_a_command_that_fails_leaves_the_settings_of_the_run_alone_and_tells_what_comes_first(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, "evaluation.compare_global=false")
    run = pipeline.train_selectors(cfg)
    before = (run / "config.yaml").read_bytes()
    (run / "selectors").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ConfigError, match=r"one: not trained yet, 6 of 6 rounds are done; run `fedbiscuit train .*` first"
    ):
        pipeline.label(settings(tmp_path, tiny_model, "evaluation.compare_global=false", "generation.num_prompts=2"))
    (tmp_path / "elsewhere").rename(run / "selectors")
    wrong = settings(tmp_path, tiny_model, "evaluation.compare_global=false", "judge.model=nosuch")
    with pytest.raises(ConfigError, match=r"there is no aligned policy|judge.model: nosuch"):
        pipeline.judge(wrong)
    assert (run / "config.yaml").read_bytes() == before
    pipeline.evaluate_task(
        settings(
            tmp_path, tiny_model, "evaluation.compare_global=false", "evaluation.num_prompts=2", "evaluation.best_of=3"
        ),
        "best-of-n",
    )
    saved = parse_config((run / "config.yaml").read_text()).evaluation
    assert (saved.num_prompts, saved.best_of) == (4, 3)  # how much was looked at is not the run's evaluation
