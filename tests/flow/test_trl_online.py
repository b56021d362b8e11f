"""The example with TRL runs as it stands: two steps of GRPO in which a selector is the judge."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedbiscuit.config import LoraSettings, ModelSettings
from fedbiscuit.data.encoding import load_template
from fedbiscuit.models.lm import load_lm
from fedbiscuit.models.selector_file import SelectorFile, write_selector_file
from fedbiscuit.rundir import write_adapter_files

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trl_online.py"


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="NOT TESTED: trl is not installed; pip install trl")
def test_two_steps_of_grpo_with_a_selector_as_the_judge_change_the_policy(tiny_model, tmp_path):
    lm = load_lm(ModelSettings(base=str(tiny_model), device="cpu", lora=LoraSettings(r=2, dropout=0.0)))
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(w.shape, generator=generator) * 0.3 for n, w in lm.new_adapter("trl").items()}
    exported = tmp_path / "exported"
    exported.mkdir()
    write_adapter_files(exported, weights, lm.adapter_config(), "card", lm.digest)
    template = load_template("choice").text
    write_selector_file(
        exported, SelectorFile(template, (" A", " B"), 400, 1.0, "mean", lm.public_name, lm.digest, (".",))
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a fugue?\nHow do I keep basil alive?\n")
    out = tmp_path / "online"
    words = [
        "--policy", str(tiny_model), "--selector", str(exported), "--base", str(tiny_model), "--prompts", str(prompts),
        "--out", str(out), "--steps", "2", "--group", "3", "--tokens", "8", "--lr", "0.01", "--cpu",
    ]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(EXAMPLE), *words], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step (\d): mean reward ([\d.]+), spread in a group ([\d.]+)$", done.stdout, re.MULTILINE)
    assert [step for step, _, _ in found] == ["1", "2"]
    for _, mean, spread in found:  # each win is a loss of another one, so a group has a mean of one half
        assert float(mean) == pytest.approx(0.5, abs=2e-3)
        assert float(spread) > 0.001
    trained = load_file(out / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
