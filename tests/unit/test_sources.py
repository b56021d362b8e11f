"""Data sets by name: what they read, which answer they take for the preferred one, which prompts they give."""

import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.config import DataSettings, DemoSettings, PartitionSettings, parse_config
from fedbiscuit.data.formats import FORMATS
from fedbiscuit.data.sources import SOURCES, Dataset, load, split_prompts
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ConfigError, DataError


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in records), "utf-8")
    return str(path)


def from_jsonl(*paths, **more):
    return load(DataSettings(source="jsonl", path=paths, **more), 0)


def comparison(i, **more):
    return {"prompt": f"p{i}", "output_a": "yes", "output_b": "no", "choice": i % 2, "client": "ann"} | more


def everything(dataset):
    return [c for share in dataset.clients.values() for c in share.train + share.validation + share.test]


# jsonl


def test_own_files_become_clients_prompts_and_digests(tmp_path):
    path = write(
        tmp_path / "a.jsonl", *(comparison(i) for i in range(20)), comparison(3, prompt="same", output_b="yes")
    )
    dataset = from_jsonl(path)
    assert list(dataset.clients) == ["ann"]
    assert len(everything(dataset)) == 20
    assert dataset.left_out == {"identical answers": 1}
    assert any("2 of 20 are held out for the test" in message for message in dataset.warnings)
    with open(path, "rb") as file:
        assert dataset.digests == {path: hashlib.file_digest(file, "sha256").hexdigest()}
    assert sorted(dataset.prompts + dataset.held_out_prompts) == sorted(f"p{i}" for i in range(20))
    assert dataset.truth is None


def test_no_path_an_unknown_source_and_a_folder_are_named():
    with pytest.raises(ConfigError, match=r"data\.path: empty; name the files"):
        load(DataSettings(source="jsonl"), 0)
    with pytest.raises(ConfigError, match=r"data\.source: 'jsonnl' .* did you mean jsonl"):
        parse_config("data: {source: jsonnl}")
    with pytest.raises(DataError, match="a folder; name the files in it"):
        load(DataSettings(source="jsonl", path=(".",)), 0)


def test_the_same_settings_and_seed_give_the_same_data(tmp_path):
    path = write(tmp_path / "a.jsonl", *(comparison(i) for i in range(40)))
    assert from_jsonl(path) == from_jsonl(path)
    other = load(DataSettings(source="jsonl", path=(path,)), 1)
    assert other.clients != from_jsonl(path).clients


# Prompts


@given(st.sets(st.text(min_size=1), min_size=2, max_size=60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_prompts_are_split_without_loss_and_both_sides_have_one(prompts, seed):
    train, held_out = split_prompts(sorted(prompts), seed)
    assert train
    assert held_out
    assert set(train) | set(held_out) == prompts
    assert len(train) + len(held_out) == len(prompts)


def test_about_a_fifth_of_the_prompts_is_held_out_and_stays_so_when_others_come():
    some, more = ([f"prompt {i}" for i in range(count)] for count in (1000, 1500))
    held_out, later = (split_prompts(prompts, 0)[1] for prompts in (some, more))
    assert 160 < len(held_out) < 240
    assert set(held_out) <= set(later)
    assert not set(later) & set(split_prompts(some, 0)[0])


def test_a_single_prompt_is_on_both_sides_and_that_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", *(comparison(i, prompt="p", output_a=f"yes {i}") for i in range(9)))
    dataset = from_jsonl(path)
    assert dataset.prompts == dataset.held_out_prompts == ("p",)
    assert sum("only one prompt" in message for message in dataset.warnings) == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    assert not any("only one prompt" in message for message in from_jsonl(path, prompts=str(prompts)).warnings)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_come_from_a_file_when_one_is_given(tmp_path, name):
    path, file = write(tmp_path / "a.jsonl", *(comparison(i) for i in range(9))), tmp_path / name
    lines = ["one", "", "t\u2028wo", "three", "one"]
    if name.endswith("l"):
        lines = [json.dumps({"prompt": text, "source": "any"}) for text in lines if text]
    file.write_bytes("\r\n".join(lines).encode())
    dataset = from_jsonl(path, prompts=str(file))
    assert sorted(dataset.prompts + dataset.held_out_prompts) == ["one", "three", "t\u2028wo"]
    assert set(dataset.digests) == {path, str(file)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"one\n\xff\n", "p.txt:2: byte 1: not UTF-8"),
        ("p.txt", b"\n\n", "p.txt: no prompt in it"),
        ("p.txt", b"a\x00b\n", "p.txt:1"),
        ("p.jsonl", b'{"prompt": "x"}\n{"text": "x"}\n', "p.jsonl:2: prompt: expected text, got nothing"),
        ("p.jsonl", b'{"prompt": " "}\n', "p.jsonl:1: prompt: empty"),
    ],
)
def test_broken_files_of_prompts_are_refused_with_their_line(tmp_path, name, content, message):
    path = write(tmp_path / "a.jsonl", *(comparison(i) for i in range(9)))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        from_jsonl(path, prompts=str(tmp_path / name))


# TL;DR


def summaries(i, choice=0, worker="w1", split="train", post=None):
    info = {"id": f"t3_{i}", "post": post or f"post {i}", "title": f"title {i}", "subreddit": "tea"}
    return {
        "info": info,
        "summaries": [{"text": f" first {i}", "policy": "ref"}, {"text": f" second {i}", "policy": "sup"}],
        "choice": choice,
        "worker": worker,
        "batch": "batch3",
        "split": split,
        "extra": {"confidence": 4},
    }


def tldr(folder, **more):
    return load(DataSettings(source="tldr", path=(str(folder),), **more), 0)


def test_tldr_reads_posts_workers_splits_and_choices(tmp_path):
    write(tmp_path / "batch3.json", *(summaries(i, choice=i % 2) for i in range(4)))
    write(
        tmp_path / "batch22.json",
        summaries(8, split="valid1"),
        summaries(9, 1, split="valid2"),
        summaries(7, worker="w2"),
    )
    write(tmp_path / "batch21.json", summaries(30))
    write(tmp_path / "batch0_cnndm.json", {"not": "read"})
    dataset = tldr(tmp_path)
    assert {name: len(share.train) for name, share in dataset.clients.items()} == {"w1": 4, "w2": 1}
    share = dataset.clients["w1"]
    assert [c.chosen for c in share.train] == ["first 0", "second 1", "first 2", "second 3"]
    assert (share.validation[0].prompt, share.test[0].chosen) == ("post 8", "second 9")
    assert share.train[0].meta["fields"] == {"post": "post 0", "title": "title 0", "subreddit": "tea"}
    assert share.train[0].domain == "tea"
    assert any("batches not there: 4, 5," in message for message in dataset.warnings)
    assert len(dataset.digests) == 2


def test_mistake_02_tldr_choice_0_means_that_the_first_summary_is_preferred(tmp_path):
    write(tmp_path / "batch3.json", *(summaries(i, choice=0) for i in range(3)))
    assert all(c.chosen.startswith("first") and c.choice == 0 for c in everything(tldr(tmp_path)))


def test_tldr_prompts_are_the_last_posts_that_are_in_no_comparison_when_they_are_there(tmp_path):
    write(tmp_path / "batch3.json", *(summaries(i) for i in range(10)))
    dataset = tldr(tmp_path)
    assert sorted(dataset.prompts + dataset.held_out_prompts) == sorted(f"post {i}" for i in range(10))
    rows = [{"id": str(i), "subreddit": "tea", "title": "t", "post": f"post {i}", "summary": "s"} for i in range(5, 20)]
    write(tmp_path / "tldr_3_filtered" / "train.jsonl", *rows)
    dataset = tldr(tmp_path)
    assert sorted(dataset.prompts + dataset.held_out_prompts) == [f"post {i}" for i in range(16, 20)]
    assert not dataset.no_others
    assert any("valid.jsonl, test.jsonl of tldr_3_filtered not there" in message for message in dataset.warnings)
    for name in ("valid", "test"):
        write(tmp_path / "tldr_3_filtered" / f"{name}.jsonl", *rows[-1:])
    assert not any("tldr_3_filtered" in message for message in tldr(tmp_path).warnings)
    before = tldr(tmp_path).prompts
    write(tmp_path / "shp" / "askcooking" / "train.json", {"history": "another set's"})  # one folder for all
    assert tldr(tmp_path).prompts == before


def test_tldr_without_other_posts_says_that_the_prompts_are_the_compared_ones_unless_prompts_are_named(tmp_path):
    write(tmp_path / "tldr" / "batch3.json", *(summaries(i) for i in range(10)))
    dataset = tldr(tmp_path / "tldr")
    assert dataset.no_others in dataset.warnings
    assert "train.jsonl, valid.jsonl and test.jsonl of tldr_3_filtered" in dataset.no_others
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    dataset = tldr(tmp_path / "tldr", prompts=str(tmp_path / "prompts.txt"))
    assert not dataset.no_others
    assert not any("tldr_3_filtered" in message for message in dataset.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": {"article": "x"}}, r"batch3\.json:2: info\.post: expected text"),
        ({"summaries": [{"text": "one"}]}, "summaries: expected two objects"),
        ({"choice": "0"}, "choice: expected the integer 0 or 1, got '0'"),
        ({"split": "dev"}, "split: expected train, valid1 or valid2, got 'dev'"),
        ({"worker": " "}, "worker: empty"),
    ],
)
def test_broken_tldr_records_are_refused_with_file_and_line(tmp_path, change, message):
    write(tmp_path / "batch3.json", summaries(0), summaries(1) | change)
    with pytest.raises(DataError, match=message):
        tldr(tmp_path)


def test_a_worker_with_the_same_pair_in_train_and_valid_keeps_it_only_for_testing(tmp_path):
    write(tmp_path / "batch3.json", *(summaries(i) for i in range(4)), summaries(0, split="valid2"))
    dataset = tldr(tmp_path)
    assert [c.prompt for c in dataset.clients["w1"].test] == ["post 0"]
    assert dataset.left_out["training comparisons whose pair is also held out at the same client"] == 1


# SHP


def comments(i, labels=1, domain="askculinary_train", post=None):
    return {
        "post_id": f"id{i}",
        "domain": domain,
        "history": post or f"question {i}",
        "human_ref_A": f"A {i}",
        "human_ref_B": f"B {i}",
        "labels": labels,
        "score_A": 12,
        "score_B": 3,
    }


def shp(folder, num_clients=2, **more):
    chosen = PartitionSettings(by="dirichlet", num_clients=num_clients, alpha=50.0)
    return load(DataSettings(source="shp", path=(str(folder),), partition=chosen, **more), 0)


def fill(folder):
    for domain in ("askculinary", "askcarguys"):
        for split, count in (("train", 30), ("validation", 4), ("test", 6)):
            rows = [comments(f"{domain} {split} {i}", i % 2, f"{domain}_{split}") for i in range(count)]
            write(folder / domain / f"{split}.json", *rows)


def test_mistake_02_shp_labels_1_means_that_a_is_preferred(tmp_path):
    write(tmp_path / "train.json", *(comments(i, labels=int(i < 15)) for i in range(30)))
    dataset = shp(tmp_path, 1)
    assert len(everything(dataset)) == 30
    for c in everything(dataset):
        number = int(c.prompt.split()[1])
        assert c.chosen == (f"A {number}" if number < 15 else f"B {number}")
        assert c.choice == (0 if number < 15 else 1)


def test_shp_reads_every_subreddit_with_its_splits(tmp_path):
    fill(tmp_path)
    dataset = shp(tmp_path)
    assert len(everything(dataset)) == 80
    assert {c.domain for c in everything(dataset)} == {"askculinary", "askcarguys"}
    assert len(dataset.digests) == 6
    for share in dataset.clients.values():
        for name in ("train", "validation", "test"):
            assert {c.split for c in getattr(share, name)} == {name}
            assert all(f" {name} " in c.prompt for c in getattr(share, name))


def test_shp_by_annotator_says_what_to_set(tmp_path):
    fill(tmp_path)
    with pytest.raises(DataError, match=r"do not say whose they are.*data\.partition\.by to iid or dirichlet"):
        load(DataSettings(source="shp", path=(str(tmp_path),)), 0)


def test_shp_labels_that_are_neither_0_nor_1_are_refused(tmp_path):
    write(tmp_path / "train.json", comments(0), comments(1, labels=True))
    with pytest.raises(DataError, match=r"train\.json:2: labels: expected the integer 0 or 1, got true"):
        shp(tmp_path, 1)


@pytest.mark.parametrize(("source", "file"), [("tldr", "batch3.json"), ("shp", "train.json")])
def test_missing_originals_are_named_with_what_to_put_where(tmp_path, source, file):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=file):
            load(DataSettings(source=source, path=(str(path),)), 0)
    with pytest.raises(ConfigError, match=f"empty; {source} wants a folder with .*{file}.*or a set on the Hub"):
        load(DataSettings(source=source), 0)


# The demo world


def test_the_demo_refuses_settings_that_it_would_ignore():
    with pytest.raises(ConfigError, match="reads no files"):
        load(DataSettings(source="demo", path=("a.jsonl",)), 0)
    with pytest.raises(ConfigError, match=r"set data\.demo\.num_clients instead"):
        load(DataSettings(source="demo", partition=PartitionSettings(num_clients=3)), 0)


def test_the_demo_world_is_loaded_with_its_truth_and_its_prompts(tmp_path):
    demo = DemoSettings(num_clients=4, comparisons_per_client=6, validation_per_client=2, test_per_client=2)
    dataset = load(DataSettings(source="demo", demo=demo), 0)
    assert set(dataset.truth.group_of) == set(dataset.clients)
    assert dataset.prompts
    assert dataset.held_out_prompts
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    own = load(DataSettings(source="demo", demo=demo, prompts=str(tmp_path / "p.txt")), 0)
    assert sorted(own.prompts + own.held_out_prompts) == ["one", "two"]
    assert own.clients == dataset.clients


def test_the_sources_are_the_ones_that_the_settings_name():
    permitted = DataSettings.model_json_schema()["properties"]["source"]["enum"]
    assert sorted(SOURCES) == sorted(permitted)
    assert set(FORMATS) < set(SOURCES)


def test_reading_data_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'pyarrow', 'matplotlib', 'numpy', 'scipy'}"
    code = f"import sys, fedbiscuit.data.sources as s, fedbiscuit.data.check; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_prompts_of_another_set_lack_what_a_template_shows_of_the_compared_posts():
    posts = {"a post": {"title": "t", "subreddit": "s"}}
    for prompts, lacks in ((("a post",), False), (("a post", "a question"), True), ((), True)):
        session = SimpleNamespace(dataset=Dataset({}, prompts, (), fields=posts))
        assert Session.lacks(session, ("subreddit", "title")) is lacks
        assert Session.lacks(session, ()) is False
