"""Reward models of others as judges, with scores that can be computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedbiscuit.config import ModelSettings
from fedbiscuit.models.rewards import check_reward_model, load_reward_model
from fedbiscuit.types import ConfigError

HERE = ModelSettings(base="any", device="cpu", threads=1)


def by_hand(folder: Path, text: str) -> float:
    """The score of the last token, by the formula."""
    last = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids[-1]
    return math.sqrt(2) * math.cos(last / 300)


def test_a_score_is_that_of_prompt_and_answer_one_after_the_other(tmp_path, make_reward_model):
    folder = make_reward_model(tmp_path / "gold")
    model = load_reward_model(str(folder), HERE)
    assert model.name == "gold"
    scores = model.scores(["p?", "p?", "p?"], ["a", "z", "bz"])
    assert scores == pytest.approx([by_hand(folder, text) for text in ("a", "z", "bz")], abs=1e-4)
    assert scores[0] > scores[1] == scores[2]
    assert len(model.encode("p?", "bz")) == 4


@pytest.mark.parametrize("chat", [True, False])
def test_scores_are_those_of_transformers_on_the_text_alone(tmp_path, make_reward_model, chat):
    folder = make_reward_model(tmp_path / "gold", chat, layers=2)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "user: why?<eos>assistant: so it is<eos>" if chat else "why?so it is"
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        expected = float(plain(input_ids=ids).logits[0, 0])
    found = load_reward_model(str(folder), HERE).scores(["why?", "why?"], ["so it is", "no"])
    assert found[0] == pytest.approx(expected, abs=1e-6)
    assert found[1] != pytest.approx(expected, abs=1e-6)


def test_a_bert_is_told_which_token_belongs_to_which_text(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "why", "so", "it", "is"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=1, **shape)).eval()
    model.bert.embeddings.token_type_embeddings.weight.data *= 50
    model.classifier.weight.data *= 1e4
    model.save_pretrained(tmp_path / "bert")
    with torch.no_grad():
        expected = float(model(**tokenizer("why", "so it is", return_tensors="pt")).logits[0, 0])
        untold = float(model(tokenizer("why", "so it is", return_tensors="pt").input_ids).logits[0, 0])
    assert abs(expected - untold) > 0.01
    found = load_reward_model(str(tmp_path / "bert"), HERE).scores(["why"], ["so it is"])
    assert found == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("chat", [True, False])
def test_a_special_token_in_an_answer_is_plain_text(tmp_path, make_reward_model, chat):
    model = load_reward_model(str(make_reward_model(tmp_path / "gold", chat)), HERE)
    end = AutoTokenizer.from_pretrained(tmp_path / "gold").eos_token_id
    assert model.encode("p", "no<eos>").count(end) == model.encode("p", "no").count(end) == 2 * chat


def test_what_is_longer_than_the_model_reads_has_no_score(tmp_path, make_reward_model):
    model = load_reward_model(str(make_reward_model(tmp_path / "gold", context=6)), HERE)
    assert model.scores(["abc", "abc"], ["def", "defg"])[1] is None
    assert model.scores(["abc"], ["def"]) != [None]


def test_what_is_no_reward_model_is_refused_with_the_reason(tmp_path, make_reward_model, tiny_model):
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM, which gives no score; name a sequence classifier"):
        check_reward_model(str(tiny_model))
    two = make_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(ConfigError, match="a classifier with 2 labels; a reward model has one"):
        check_reward_model(str(two))
    config = json.loads((tiny_model / "config.json").read_text())
    lacking = make_reward_model(tmp_path / "lacking")
    for file in tiny_model.glob("*.safetensors"):
        (lacking / file.name).write_bytes(file.read_bytes())
    kinds = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "x"}}
    (lacking / "config.json").write_text(json.dumps(config | kinds | {"label2id": {"x": 0}}))
    with pytest.raises(ConfigError, match=r"1 tensors are missing or have another shape, first score.weight"):
        load_reward_model(str(lacking), HERE)
    foreign = kinds | {"auto_map": {"AutoConfig": "x.C"}, "model_type": "foreign"}
    (lacking / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(ConfigError, match=r"config.json cannot be used"):
        check_reward_model(str(lacking))
