"""Finding and loading models: every wrong reference is named, and text never becomes a special token."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedbiscuit.config import LoraSettings, ModelSettings
from fedbiscuit.models.base import resolve_model
from fedbiscuit.models.lm import load_lm
from fedbiscuit.types import ConfigError, IntegrityError


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("./no/such/folder", "not found"),
        ("no-such-file.gguf", "no such file"),
        ("package:no_such_package/x.gguf", "no installed package"),
        ("package:json/../../etc/passwd", "has no file"),
    ],
)
def test_fault_47_a_model_that_is_not_there_is_named_with_the_ways_to_give_one(base, message):
    with pytest.raises(ConfigError, match=message):
        resolve_model(base)


def test_fault_47_a_lora_target_that_the_model_does_not_have_is_named_with_those_it_has(tiny_model):
    with pytest.raises(ConfigError, match=r"query_key_value.*q_proj"):
        load_lm(ModelSettings(base=str(tiny_model), lora=LoraSettings(target_modules=("query_key_value",))))
    with pytest.raises(ConfigError, match=r"layers 0\.\.1"):
        load_lm(ModelSettings(base=str(tiny_model), lora=LoraSettings(layers_to_transform=(2,))))


def test_fault_47_a_folder_that_is_no_causal_lm_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(ConfigError, match="causal LM"):
        load_lm(ModelSettings(base=str(tmp_path)))


def test_mistake_10_a_base_model_that_lacks_weights_is_refused_and_not_filled_with_random_ones(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = [name for name in weights if "layers.1.mlp" in name]
    save_file({n: w for n, w in weights.items() if n not in lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{len(lost)} tensors are missing.*layers\.1\.mlp"):
        load_lm(ModelSettings(base=str(folder), device="cpu"))


def test_fault_57_a_base_model_in_pickles_is_not_opened(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load_lm(ModelSettings(base=str(folder), device="cpu"))


def test_fault_49_a_truncated_base_model_is_named_with_a_next_step(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for size in (0, 100, 5000):
        (folder / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:size])
        with pytest.raises(ConfigError, match=r"model\.base: .*model: cannot be loaded.*; check the files"):
            load_lm(ModelSettings(base=str(folder), device="cpu"))


def test_a_tokenizer_without_an_end_token_is_refused_before_anything_is_trained(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    with pytest.raises(ConfigError, match="eos_token"):
        load_lm(ModelSettings(base=str(folder), device="cpu"))


def test_a_chat_template_that_refuses_the_system_message_says_what_to_set(load_tiny):
    lm = load_tiny()
    before = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    )
    try:
        with pytest.raises(ConfigError, match=r"no system role.*generation\.system"):
            lm.chat_prompt("hello", system="be kind")
    finally:
        lm.tokenizer.chat_template = before


def test_a_base_model_that_drops_in_training_has_no_trunk(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    upper = LoraSettings(dropout=0.5, layers_to_transform=(1,))
    assert not load_lm(ModelSettings(base=str(folder), device="cpu", lora=upper)).has_trunk
    assert load_lm(ModelSettings(base=str(tiny_model), device="cpu", lora=upper)).has_trunk


def test_fault_62_a_truncated_gguf_file_or_tokenizer_is_an_error_that_names_it(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDBISCUIT_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    with pytest.raises(ConfigError, match=r"broken\.gguf"):
        resolve_model(str(broken))
    assert not list((tmp_path / "cache").rglob("config.json"))
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(ConfigError, match=r"model\.base: .*/model: cannot be loaded"):
        load_lm(ModelSettings(base=str(folder)))


def test_fault_62_a_chat_template_runs_in_a_sandbox(load_tiny):
    lm = load_tiny()
    template = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    try:
        with pytest.raises(Exception, match=r"unsafe|undefined|__class__"):
            lm.chat_prompt("hello")
    finally:
        lm.tokenizer.chat_template = template


def test_fault_27_special_tokens_written_in_a_prompt_stay_plain_text(load_tiny):
    lm = load_tiny()
    assert lm.end not in lm.encode("a <eos> b")
    ids = lm.chat_prompt("a <eos> b")
    assert ids.count(lm.end) == 1  # the template's own
    assert lm.decode(ids) == "user: a <eos> bbot:"


def test_layers_to_transform_puts_adapters_in_those_layers_only(load_tiny):
    lm = load_tiny(lora={"layers_to_transform": (1,)})
    assert lm.adapter()
    assert all(".layers.1." in name for name in lm.adapter())


def test_mistake_09_a_model_is_known_by_the_digest_of_its_files_and_not_by_its_name(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    before = resolve_model(str(folder))[1]
    assert before == resolve_model(str(tiny_model))[1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert resolve_model(str(folder))[1] != before


def test_an_adapter_of_another_shape_does_not_go_into_the_slot(load_tiny):
    lm, other = load_tiny(lora={"r": 4}), load_tiny(lora={"r": 2})
    with pytest.raises(IntegrityError, match="shape"):
        lm.put_adapter(other.adapter())
    with pytest.raises(IntegrityError, match="tensors differ"):
        lm.put_adapter({})


def test_new_adapters_are_a_function_of_their_key_and_start_as_the_base_model(load_tiny):
    lm = load_tiny()
    one, again, other = lm.new_adapter(0, "u", 0), lm.new_adapter(0, "u", 0), lm.new_adapter(0, "u", 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    lm.put_adapter(one)
    forest = lm.pack([[1, 2, 3]])
    with torch.no_grad():
        with_adapter = lm.hidden(forest)
        with lm.adapter_off():
            assert torch.equal(with_adapter, lm.hidden(forest))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_below_all_adapters_are_computed_once_for_all_of_them(load_tiny, family):
    lm = load_tiny(family, lora={"layers_to_transform": (1,)})
    forest = lm.pack([[1, 2, 3, 4], [1, 2, 3, 5, 6], *([*range(20, 40), i] for i in range(3))])
    calls = []
    below, above = lm.model.get_base_model().base_model.layers
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, layer in (("below", below), ("above", above))
    ]
    with torch.no_grad():
        plain = lm.hidden(forest)
        calls.clear()
        trunk = lm.trunk(forest)
        assert calls == ["below"]
        again = [lm.hidden(forest, trunk) for _ in range(2)]
        assert calls == ["below", "above", "above"]
        assert torch.equal(lm.hidden(forest), plain)  # nothing stays skipped
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(plain, hidden) for hidden in again)
    assert load_tiny(family).trunk(forest) is None  # the lowest layer has an adapter: nothing to share


def test_an_architecture_in_which_the_trunk_changes_the_result_shares_none(load_tiny):
    lm = load_tiny(lora={"layers_to_transform": (1,)})
    body = lm.model.get_base_model().base_model
    forward = body.forward

    def scaling(*args, inputs_embeds=None, **kwargs):
        return forward(*args, inputs_embeds=None if inputs_embeds is None else 2 * inputs_embeds, **kwargs)

    body.forward = scaling
    forest = lm.pack([[1, 2, 3]])
    assert lm.trunk(forest) is not None
    lm.check_trunk(forest)
    assert lm.trunk(forest) is None


def test_bfloat16_computes_close_to_float32(load_tiny):
    half, full = load_tiny(dtype="bfloat16"), load_tiny(dtype="float32")
    forest = half.pack([list(range(30)), [*range(20), 7]])
    with torch.no_grad():
        a, b = half.logits(half.hidden(forest)[forest.last]), full.logits(full.hidden(forest)[forest.last])
    assert (a - b).abs().max() < 0.05 * b.abs().max()
