"""A run whose base is held in 4 bits, from training to exports."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import fedbiscuit
from fedbiscuit import Selector, cli, pipeline
from fedbiscuit.config import load_config, parse_config
from fedbiscuit.models.base import resolve_model
from fedbiscuit.models.lm import load_lm
from fedbiscuit.rundir import RunDir, base_of
from fedbiscuit.types import ConfigError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="SKIPPED: bitsandbytes is not installed, so no run with model.quantize is tested (make test installs it)",
)

PAIRS = [("Which?", "12x", "7y"), ("Why not?", "a longer answer", "short")]

SETTINGS = """
name: {name}
runs_dir: {runs}
model: {{base: {base}, quantize: nf4, gradient_checkpointing: true, device: cpu, dtype: float32, lora: {{r: 4, dropout: 0.0}}}}
data: {{source: demo, template: choice, demo: {{num_clients: 4, comparisons_per_client: 6, validation_per_client: 2, test_per_client: 2}}}}
selectors: {{num_adapters: 2, rounds: {rounds}, cohort_size: 2, warmup_rounds: 1, regroup_every: 2, local: {{steps: 2, batch_size: 2, lr: 0.02}}}}
generation: {{num_prompts: 4, num_completions: 2, max_new_tokens: 6, temperature: 1.0, batch_size: 2}}
alignment: {{steps: 2, batch_size: 2, lr: 0.02}}
evaluation: {{num_prompts: 4, bootstrap: 20}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    runs = tmp_path_factory.mktemp("quantized")
    return pipeline.run_all(parse_config(SETTINGS.format(name="q", runs=runs, base=tiny_model, rounds=5)))


def test_all_stages_run_and_everything_that_is_kept_says_that_the_base_was_in_4_bits(run, tiny_model):
    digest = f"nf4:{resolve_model(str(tiny_model))[1]}"
    assert json.loads((run / "manifest.json").read_text())["model"] == digest
    for folder in ("selectors/u0", "selectors/u1", "policy"):
        assert base_of(run / folder) == digest
    assert (run / "evaluation.json").is_file()


def test_a_run_that_is_stopped_and_goes_on_ends_in_the_same_bytes(run, tmp_path, tiny_model):
    for rounds in (3, 5):
        cfg = parse_config(SETTINGS.format(name="r", runs=tmp_path, base=tiny_model, rounds=rounds))
        pipeline.train_selectors(cfg, resume=rounds > 3)
    for u in (0, 1):
        path = f"selectors/u{u}/adapter_model.safetensors"
        assert (run / path).read_bytes() == (tmp_path / "r" / path).read_bytes()


def test_a_run_does_not_go_on_with_the_base_in_another_form(run):
    text = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"model\.quantize"):
        pipeline.align(parse_config(text, ["model.quantize=none"]))


def test_an_exported_selector_packs_the_base_again_and_a_merged_one_needs_no_bitsandbytes(run, tiny_model, tmp_path):
    adapter = fedbiscuit.export_run(run, tmp_path / "adapter", selector=1)
    merged = fedbiscuit.export_run(run, tmp_path / "merged", selector=1, merge=True)
    selector = Selector.from_pretrained(adapter, base=str(tiny_model), device="cpu")
    assert selector.reader.lm.digest.startswith("nf4:")
    said = selector.choose(PAIRS)
    assert Selector.from_pretrained(run, device="cpu", only=1).choose(PAIRS) == pytest.approx(said, abs=1e-6)
    assert Selector.from_pretrained(merged, device="cpu").choose(PAIRS) == pytest.approx(said, abs=1e-4)
    assert "held in 4 bits (nf4, as in QLoRA); on the base in full" in (adapter / "README.md").read_text()
    assert "these are the weights that the adapter was added to" in (merged / "README.md").read_text()


def test_a_merged_policy_has_the_logits_of_the_policy_that_was_evaluated(run, tmp_path):
    from transformers import AutoModelForCausalLM

    merged = fedbiscuit.export_run(run, tmp_path / "policy", policy=True, merge=True)
    lm = load_lm(load_config(run / "config.yaml").model)
    lm.put_adapter(RunDir.view(run).load_adapter("policy", base=lm.digest))
    ids = list(lm.encode("Which one is better?"))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(lm.logits(lm.hidden(lm.pack([ids]))), theirs, rtol=1e-4, atol=1e-4)


def test_without_bitsandbytes_a_run_stops_before_it_makes_anything(tmp_path, tiny_model, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else there(name, *rest)
    )
    config = tmp_path / "q.yaml"
    text = SETTINGS.format(name="q", runs=tmp_path / "runs", base=tiny_model, rounds=5)
    config.write_text(text.replace("quantize: nf4, ", "") + f"policy_model: {{base: {tiny_model}, quantize: nf4}}\n")
    assert cli.main(["train", str(config)]) == 3
    assert 'pip install "bitsandbytes' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
