"""Published data sets in their own file formats: which answer is the preferred one, whose it is, which part it is in.

Every file is written here as its makers publish it, with answers that say in words what is true of them.
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from fedbiscuit.config import DataSettings, PartitionSettings, parse_config
from fedbiscuit.data.material import read_instructions, read_references
from fedbiscuit.data.sources import load
from fedbiscuit.types import ConfigError, DataError, EnvironmentFault

pyarrow = pytest.importorskip("pyarrow", reason="SKIPPED: needs pyarrow (pip install 'fedbiscuit[hub]')")
pytest.importorskip("datasets", reason="SKIPPED: needs datasets (pip install 'fedbiscuit[hub]')")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What ``datasets`` keeps of a set stays in the test's folder."""
    import datasets

    from fedbiscuit.data.hub import _load

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    _load.cache_clear()


def lines(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, lambda raw: raw)
    path.write_bytes(packed(text))
    return path


def array(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2))
    return path


def table(path: Path, *rows: dict, like: dict | None = None) -> Path:
    """A parquet file; ``like``: a row that has a value for every column, where some columns have none."""
    from pyarrow import Table, parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = Table.from_pylist([like]).schema if like else None
    parquet.write_table(Table.from_pylist(list(rows), schema=schema), path)
    return path


def read(source: str, *paths: object, clients: int = 1, **more: object):
    chosen = {"partition": PartitionSettings(by="iid", num_clients=clients)} | more
    return load(DataSettings(source=source, path=tuple(map(str, paths)), **chosen), 0)


def everything(dataset):
    return [c for share in dataset.clients.values() for c in share.train + share.validation + share.test]


def all_true(comparisons) -> bool:
    """Whether the preferred answer of each is the one that says so."""
    return all(c.chosen.startswith("good") and c.rejected.startswith("bad") for c in comparisons)


def both_letters(comparisons) -> bool:
    return {c.choice for c in comparisons} == {0, 1}


# HH-RLHF


def dialogue(i: object, kind: str, *before: str) -> str:
    return "".join(before) + f"\n\nHuman: question {i}?\n\nAssistant: {kind} answer {i}"


def hh_row(i: object, *before: str) -> dict:
    return {"chosen": dialogue(i, "good", *before), "rejected": dialogue(i, "bad", *before)}


def write_hh(folder: Path) -> None:
    for name in ("harmless-base", "helpful-base"):
        lines(folder / name / "train.jsonl.gz", *(hh_row(f"{name} {i}") for i in range(30)))
        lines(folder / name / "test.jsonl.gz", *(hh_row(f"{name} test {i}") for i in range(4)))
    lines(folder / "red-team-attempts" / "red_team_attempts.jsonl.gz", {"transcript": "no comparison"})


def test_hh_takes_the_last_answers_of_both_transcripts_and_all_before_as_the_prompt(tmp_path):
    write_hh(tmp_path)
    earlier = "\n\nHuman: hello\n\nAssistant: hi\nthere"
    lines(tmp_path / "helpful-base" / "train.jsonl.gz", hh_row(0), hh_row(1, earlier), hh_row(2))
    found = everything(read("hh", tmp_path))
    assert len(found) == 30 + 3 + 8
    assert all_true(found)
    assert both_letters(found)
    assert "question 0?" in {c.prompt for c in found}
    assert "User: hello\n\nAssistant: hi\nthere\n\nUser: question 1?" in {c.prompt for c in found}
    assert {c.split for c in found if "test" in c.prompt} == {"test"}


def test_hh_domains_are_its_folders_so_that_clients_can_be_made_of_them(tmp_path):
    write_hh(tmp_path)
    by_folder = PartitionSettings(by="dirichlet", num_clients=2, alpha=50.0)
    assert {c.domain for c in everything(read("hh", tmp_path, partition=by_folder))} == {
        "harmless-base",
        "helpful-base",
    }


def test_hh_files_in_the_folder_where_one_works_have_no_domain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(Path("train.jsonl.gz"), *(hh_row(i) for i in range(5)))
    assert {c.domain for c in everything(read("hh", "train.jsonl.gz"))} == {None}


def test_hh_counts_what_is_no_comparison_of_two_answers(tmp_path):
    other = hh_row("other")["rejected"]
    rows = [
        *(hh_row(i) for i in range(5)),
        hh_row(5) | {"rejected": other},
        hh_row(6) | {"chosen": "\n\nHuman: question 6?"},
        {"chosen": "\n\nAssistant: good", "rejected": "\n\nAssistant: bad"},
    ]
    dataset = read("hh", lines(tmp_path / "harmless-base" / "train.jsonl", *rows))
    assert len(everything(dataset)) == 5
    assert dataset.left_out == {
        "comparisons whose two answers are to different prompts": 1,
        "transcripts that do not end with an answer": 1,
        "transcripts without a question": 1,
    }
    assert any("different prompts: 1" in message for message in dataset.warnings)


def test_hh_with_an_empty_answer_stops_with_its_line_unless_such_are_dropped(tmp_path):
    path = lines(
        tmp_path / "train.jsonl.gz", *(hh_row(i) for i in range(4)), hh_row(4) | {"chosen": dialogue(4, "")[:-9]}
    )
    with pytest.raises(DataError, match=r"train\.jsonl\.gz:5: chosen: empty"):
        read("hh", path)
    assert read("hh", path, drop_empty=True).left_out == {"empty text": 1}


def test_a_pair_of_a_public_set_that_is_in_train_and_test_is_kept_for_the_test_only(tmp_path):
    write_hh(tmp_path)
    lines(tmp_path / "helpful-base" / "test.jsonl.gz", hh_row("harmless-base 0"), hh_row("new"))
    dataset = read("hh", tmp_path)
    in_test = {c.prompt for share in dataset.clients.values() for c in share.test}
    in_train = {c.prompt for share in dataset.clients.values() for c in share.train}
    assert "question harmless-base 0?" in in_test
    assert in_test.isdisjoint(in_train)


# UltraFeedback


def messages(prompt: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def ultra(i: int, scores: tuple[float, float] = (8.0, 5.5)) -> dict:
    prompt, good, bad = f"prompt {i}", messages(f"prompt {i}", f"good {i}"), messages(f"prompt {i}", f"bad {i}")
    texts = {"prompt": prompt, "prompt_id": f"id{i}", "chosen": good, "rejected": bad, "messages": good}
    return texts | {"score_chosen": scores[0], "score_rejected": scores[1]}


def write_ultra(folder: Path) -> None:
    for name, start in (("train_prefs", 0), ("test_prefs", 100), ("train_sft", 200), ("test_gen", 300)):
        rows = (ultra(i) for i in range(start, start + 20))
        table(folder / "data" / f"{name}-00000-of-00001.parquet", *rows, ultra(start + 20, (7.0, 7.0)))


def test_ultrafeedback_is_read_from_its_tables_of_preferences_and_ties_are_counted(tmp_path):
    write_ultra(tmp_path)
    dataset = read("ultrafeedback", tmp_path)
    found = everything(dataset)
    assert len(found) == 40
    assert all_true(found)
    assert both_letters(found)
    assert {c.prompt for share in dataset.clients.values() for c in share.test} == {
        f"prompt {i}" for i in range(100, 120)
    }
    assert dataset.left_out == {"comparisons of two answers with the same score": 2}
    assert sorted(Path(path).name[:5] for path in dataset.digests) == ["test_", "train"]


def test_a_row_of_a_table_with_a_broken_character_is_counted_and_one_of_a_file_stops(tmp_path):
    write_ultra(tmp_path)
    table(
        tmp_path / "data" / "train_prefs-00000-of-00001.parquet",
        *(ultra(i) for i in range(9)),
        ultra(9) | {"prompt": "a\0b"},
    )
    assert read("ultrafeedback", tmp_path).left_out["records with characters that are none"] == 1


def test_a_table_that_is_none_says_so(tmp_path):
    (tmp_path / "train_prefs-00000-of-00001.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"train_prefs.*not a parquet file that can be read"):
        read("ultrafeedback", tmp_path)


# AlpacaFarm


def farm(i: int, preference: int, about: str = "") -> dict:
    outputs = ("good", "bad") if preference == 1 else ("bad", "good")
    texts = {"instruction": f"do {i}", "input": about, "output_1": f"{outputs[0]} {i}", "output_2": f"{outputs[1]} {i}"}
    return texts | {"preference": preference, "raw_preference": preference}


def test_alpacafarm_preference_is_the_number_of_the_preferred_output(tmp_path):
    array(tmp_path / "alpaca_human_preference.json", *(farm(i, 1 + i % 2) for i in range(20)), farm(20, 1, "this text"))
    array(tmp_path / "alpaca_gpt4_preference.json", {"not": "read"})
    found = everything(read("alpacafarm", tmp_path, clients=2))
    assert len(found) == 21
    assert all_true(found)
    assert {c.choice for c in found if c.prompt in ("do 0", "do 2")} == {0}
    assert {c.choice for c in found if c.prompt in ("do 1", "do 3")} == {1}
    assert "do 20\n\nthis text" in {c.prompt for c in found}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([farm(0, 1), farm(1, 1) | {"preference": 0}], indent=1), r"\.json:10: preference: expected 1 or 2"),
        ("[" + json.dumps(farm(0, 1)) + ',\n {"a": 1, "a": 2}]', r"\.json:2: 'a': duplicate key"),
        ("[\n{\"instruction\": \"x\",,}]", r"\.json:2: not JSON"),
        ("[\n3]", r"\.json:2: expected objects in the array, got 3"),
        ("[", r"\.json:1: not JSON"),
    ],
)  # fmt: skip
def test_a_broken_array_is_refused_with_the_line_of_its_record(tmp_path, content, message):
    (tmp_path / "alpaca_human_preference.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read("alpacafarm", tmp_path)


# TRL's format


TRL = {
    "plain": lambda i: {"prompt": f"The sky {i} is", "chosen": f"good {i}", "rejected": f"bad {i}"},
    "plain, prompt implied": lambda i: {"chosen": f"The sky {i} is good", "rejected": f"The sky {i} is bad"},
    "messages": lambda i: {
        "prompt": messages(f"The sky {i} is", "")[:1],
        "chosen": messages("", f"good {i}")[1:],
        "rejected": messages("", f"bad {i}")[1:],
    },
    "messages, prompt implied": lambda i: {
        "chosen": messages(f"The sky {i} is", f"good {i}"),
        "rejected": messages(f"The sky {i} is", f"bad {i}"),
    },
}


@pytest.mark.parametrize("kind", TRL)
@pytest.mark.parametrize("write", [lines, array, table])
def test_every_shape_of_a_preference_in_trls_format_is_the_same_comparison(tmp_path, kind, write):
    name = {"lines": "train.jsonl", "array": "train.json", "table": "train-00000-of-00001.parquet"}[write.__name__]
    found = everything(read("trl", write(tmp_path / name, *(TRL[kind](i) | {"margin": 0.5} for i in range(30)))))
    assert {c.prompt for c in found} == {f"The sky {i} is" for i in range(30)}
    assert all_true(found)
    assert both_letters(found)


def test_a_map_of_columns_finds_answers_choices_and_people_under_any_name(tmp_path):
    rows = [{"asked": f"q {i}", "win": f"good {i}", "lose": f"bad {i}", "by": 7 + i % 2, "id": 1} for i in range(30)]
    columns = {"prompt": "asked", "chosen": "win", "rejected": "lose", "client": "by"}
    path = lines(tmp_path / "a.jsonl", *rows)
    dataset = read("trl", path, columns=columns, partition=PartitionSettings())
    assert sorted(dataset.clients) == ["7", "8"]
    assert all_true(everything(dataset))
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: no columns chosen and rejected; there are asked, win, lose, by, id; say"
    ):
        read("trl", path)
    with pytest.raises(DataError, match=r"no column 'who' \(data\.columns\.client\); there are asked, win"):
        read("trl", path, columns=columns | {"client": "who"})


def test_columns_that_nobody_reads_are_refused_before_anything_is_read():
    with pytest.raises(
        ConfigError, match=r"data\.columns\.choosen: not a column that we read; there are prompt, chosen"
    ):
        parse_config("data: {source: trl, columns: {choosen: win}}")
    with pytest.raises(ConfigError, match=r"data\.columns: source hh has its own columns"):
        parse_config("data: {source: hh, columns: {chosen: win}}")


def test_an_implied_prompt_ends_at_a_word_even_where_the_answers_begin_alike(tmp_path):
    rows = [{"chosen": f"{i}: is the sky\nblue or red", "rejected": f"{i}: is the sky\nblack"} for i in range(5)]
    found = everything(read("trl", lines(tmp_path / "a.jsonl", *rows)))
    assert {(c.prompt, c.chosen, c.rejected) for c in found} == {
        (f"{i}: is the sky", "blue or red", "black") for i in range(5)
    }


def test_comparisons_without_a_common_prompt_are_counted(tmp_path):
    rows = [TRL["plain, prompt implied"](i) for i in range(5)]
    path = lines(tmp_path / "a.jsonl", *rows, {"chosen": "good", "rejected": "bad"})
    assert read("trl", path).left_out == {"comparisons without a prompt that both answers begin with": 1}


def test_a_completion_is_a_single_good_answer(tmp_path):
    rows = [{"prompt": f"p {i}", "completion": f"good {i}"} for i in range(10)]
    rows += [{"prompt": messages("p 10", "")[:1], "completion": messages("", "good 10")[1:]}]
    found = everything(read("trl", lines(tmp_path / "a.jsonl", *rows)))
    assert {c.prompt: c.chosen for c in found} == {f"p {i}": f"good {i}" for i in range(11)}
    assert {c.rejected for c in found} == {""}


# TL;DR


def summary(i: int, worker: str, batch: str = "batch3", split: str = "train") -> dict:
    texts = [{"text": " good"}, {"text": " bad"}] if i % 3 else [{"text": " bad"}, {"text": " good"}]
    info = {"id": f"t{i}", "post": f"post {i}", "title": f"title {i}", "subreddit": "tea", "article": None}
    choice = 0 if i % 3 else 1
    return {"info": info, "summaries": texts, "choice": choice, "worker": worker, "batch": batch, "split": split}


def news(i: int) -> dict:
    info = {"id": f"n{i}", "post": None, "title": "t", "subreddit": None, "article": "news"}
    return summary(i, "w9", "cnndm0", "valid2") | {"info": info}


def test_tldr_of_the_hub_keeps_the_papers_batches_each_worker_his_choices(tmp_path):
    folder = tmp_path / "summarize_from_feedback"
    train = [*(summary(i, f"w{i % 2}") for i in range(20)), summary(90, "w1", "batch21")]
    rest = [*(summary(i, "w0", "batch22", "valid2") for i in (50, 51)), news(1), news(2)]
    full = news(0) | {"info": dict.fromkeys(("id", "post", "title", "subreddit", "article"), "x")}
    table(folder / "train-00000-of-00001.parquet", *train, like=full)
    table(folder / "validation-00000-of-00001.parquet", *rest, like=full)
    dataset = read("tldr", f"hub:{folder}", partition=PartitionSettings())
    assert list(dataset.clients) == ["w0", "w1"]
    for name, rest in (("w0", 0), ("w1", 1)):
        share = dataset.clients[name]
        assert {c.prompt for c in share.train + share.validation} == {f"post {i}" for i in range(20) if i % 2 == rest}
    assert {c.prompt for c in dataset.clients["w0"].test} == {"post 50", "post 51"}
    assert all_true(everything(dataset))
    assert both_letters(everything(dataset))
    assert dataset.left_out == {"comparisons of batches that the paper does not use": 3}
    assert set(dataset.digests) == {f"hub:{folder}@train", f"hub:{folder}@validation"}


def post(i: int) -> dict:
    return {"id": str(i), "subreddit": "tea", "title": f"title {i}", "post": f"post {i}", "summary": f" good {i}"}


def test_tldr_summaries_are_the_first_posts_that_nobody_compared_and_the_others_are_prompts(tmp_path):
    lines(tmp_path / "batch3.json", *(summary(i, "w0") for i in range(6)))
    lines(tmp_path / "tldr_3_filtered" / "train.jsonl", *(post(i) for i in range(20)))
    lines(tmp_path / "tldr_3_filtered" / "valid.jsonl", *(post(i) for i in range(20, 26)))
    dataset = read("tldr_sft", tmp_path, clients=3)
    found = everything(dataset)
    assert len(dataset.clients) == 3
    assert {c.prompt: (c.chosen, c.rejected) for c in found} == {f"post {i}": (f"good {i}", "") for i in range(6, 18)}
    assert sorted(dataset.prompts + dataset.held_out_prompts) == [f"post {i}" for i in range(18, 26)]
    assert dataset.fields["post 25"] == {"post": "post 25", "title": "title 25", "subreddit": "tea"}
    assert len(dataset.digests) == 3


@pytest.mark.parametrize("source", ["tldr", "tldr_sft"])
def test_posts_whose_only_comparison_is_left_out_are_still_posts_that_people_compared(tmp_path, source):
    same, empty = summary(2, "w0"), summary(3, "w0")
    same["summaries"] = [{"text": "same"}, {"text": " same "}]
    empty["summaries"][0] = {"text": ""}
    lines(tmp_path / "batch3.json", summary(0, "w0"), summary(1, "w0"), same, empty)
    lines(tmp_path / "train.jsonl", *(post(i) for i in range(14)))
    dataset = read(source, tmp_path, drop_empty=True)
    prompts = {*dataset.prompts, *dataset.held_out_prompts}
    assert prompts == {f"post {i}" for i in range(10, 14)}  # of ten that nobody compared the last 40%
    assert {c.prompt for c in everything(dataset)} == {
        f"post {i}" for i in ((0, 1) if source == "tldr" else range(4, 10))
    }


def test_posts_of_tldr_stand_in_a_folder_beside_comparisons_from_the_hub(tmp_path):
    hub, folder = tmp_path / "summarize_from_feedback", tmp_path / "mine" / "filtered"
    full = news(0) | {"info": dict.fromkeys(("id", "post", "title", "subreddit", "article"), "x")}
    table(hub / "train-00000-of-00001.parquet", *(summary(i, f"w{i % 2}") for i in range(20)), like=full)
    lines(folder / "train.jsonl", *(post(i) for i in range(40)))
    for places in ((f"hub:{hub}", folder), (tmp_path / "mine", f"hub:{hub}")):
        dataset = read("tldr", *places, partition=PartitionSettings())
        assert {c.prompt for c in everything(dataset)} == {f"post {i}" for i in range(20)}
        assert sorted(dataset.prompts + dataset.held_out_prompts) == [f"post {i}" for i in range(32, 40)]
        assert dataset.no_others == ""
        assert not any("batches not there" in message for message in dataset.warnings)
        tuned = read("tldr_sft", *places)
        assert {c.prompt: c.chosen for c in everything(tuned)} == {f"post {i}": f"good {i}" for i in range(20, 32)}
        assert (tuned.prompts, tuned.held_out_prompts) == (dataset.prompts, dataset.held_out_prompts)
    assert (
        "put train.jsonl, valid.jsonl and test.jsonl of tldr_3_filtered into a folder, and name it in data.path too"
        in (read("tldr", f"hub:{hub}", partition=PartitionSettings()).no_others)
    )
    with pytest.raises(
        ConfigError, match=r"data\.path: tldr_sft wants a folder with .* as \[hub:OWNER/NAME/comparisons, FOLDER\]"
    ):
        read("tldr_sft", f"hub:{hub}")


def test_tldr_summaries_without_the_comparisons_say_that_none_are_left_out(tmp_path):
    lines(tmp_path / "train.jsonl", post(20) | {"summary": " "}, *(post(i) for i in range(19)))
    dataset = read("tldr_sft", tmp_path)
    assert len(everything(dataset)) == 11
    assert dataset.left_out == {"posts with an empty summary": 1}
    assert any("posts that people compared are not left out" in message for message in dataset.warnings)


# The Hub


def test_what_evaluations_read_comes_from_a_set_on_the_hub_or_a_folder_too(tmp_path):
    lines(tmp_path / "alpaca" / "eval.jsonl", {"instruction": "Do.", "dataset": "koala"}, {"instruction": "Go."})
    lines(tmp_path / "posts" / "test.jsonl", post(1), {"prompt": "q", "reference": "r"})
    for place in (tmp_path / "alpaca", f"hub:{tmp_path / 'alpaca'}"):
        assert [(one.text, one.dataset or "alpaca") for one in read_instructions(str(place))] == [
            ("Do.", "koala"),
            ("Go.", "alpaca"),
        ]
    for place in (tmp_path / "posts", tmp_path / "posts" / "test.jsonl"):
        assert [(one.prompt, one.summary) for one in read_references(str(place))] == [("post 1", "good 1"), ("q", "r")]
    with pytest.raises(
        DataError,
        match=r"hub:no/such-set.*or put records with `post` and `summary`.* name it in evaluation\.references",
    ):
        read_references("hub:no/such-set")
    with pytest.raises(DataError, match=r"hub:no/such-set.*name it in evaluation\.instructions"):
        read_instructions("hub:no/such-set")
    with pytest.raises(DataError, match=r"no such file or folder; put there records with `instruction`"):
        read_instructions(str(tmp_path / "none.json"))


def test_a_set_with_configurations_is_read_by_name_and_only_that_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "someone" / "some_set"
    lines(folder / "files" / "easy.jsonl", *(TRL["plain"](i) for i in range(30)))
    lines(folder / "files" / "hard.jsonl", *(TRL["plain"](i) for i in range(100, 110)))
    configs = "".join(f"- config_name: {name}\n  data_files: files/{name}.jsonl\n" for name in ("easy", "hard"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A set\n")
    found = everything(read("trl", "hub:someone/some_set/hard"))
    assert {c.prompt for c in found} == {f"The sky {i} is" for i in range(100, 110)}


def test_a_set_without_such_a_configuration_is_read_from_its_folder_of_that_name(tmp_path, monkeypatch):
    from fedbiscuit.data.hub import _load

    monkeypatch.chdir(tmp_path)
    write_hh(tmp_path / "someone" / "hh")
    found = _load("someone/hh", "helpful-base")
    assert {name: len(rows) for name, rows in found.items()} == {"train": 30, "test": 4}
    assert found["train"][0] == hh_row("helpful-base 0")
    assert {c.domain for c in everything(read("hh", "hub:someone/hh/helpful-base"))} == {"helpful-base"}


def test_splits_of_a_set_become_ours_and_one_can_be_chosen(tmp_path):
    write_ultra(tmp_path / "ultra")
    readme = "".join(
        f"  - split: {n}\n    path: data/{n}-*\n" for n in ("train_prefs", "test_prefs", "train_sft", "test_gen")
    )
    (tmp_path / "ultra" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{readme}---\n"
    )
    dataset = read("ultrafeedback", f"hub:{tmp_path / 'ultra'}")
    assert len(everything(dataset)) == 40
    assert {c.prompt for share in dataset.clients.values() for c in share.test} == {
        f"prompt {i}" for i in range(100, 120)
    }
    assert len(everything(read("ultrafeedback", f"hub:{tmp_path / 'ultra'}@train_prefs"))) == 20
    with pytest.raises(DataError, match=r"no part 'dev'; there are test_prefs, train_prefs"):
        read("ultrafeedback", f"hub:{tmp_path / 'ultra'}@dev")


def test_the_rows_of_a_set_have_a_digest_that_tells_them_apart(tmp_path):
    digests = []
    for i, count in enumerate((20, 20, 21)):
        lines(tmp_path / f"set{i}" / "train.jsonl", *(TRL["plain"](k) for k in range(count)))
        digests += read("trl", f"hub:{tmp_path / f'set{i}'}").digests.values()
    assert digests[0] == digests[1] != digests[2]


def test_a_set_that_cannot_be_had_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"hub:Anthropic/no-such-set.*cannot be loaded: .*check the name and the network; or put .*harmless-base/train\.jsonl\.gz.* into a folder and name it in data\.path"):  # fmt: skip
        read("hh", "hub:Anthropic/no-such-set/harmless-base")
    with pytest.raises(ConfigError, match=r"hub:name: expected hub:OWNER/NAME"):
        read("hh", "hub:name")
    with pytest.raises(ConfigError, match=r"jsonl reads files; for hub:\.\.\. set data\.source to trl"):
        read("jsonl", "hub:a/b")


def test_without_the_packages_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_ultra(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentFault, match=r"needs the package datasets; install it: pip install 'fedbiscuit\[hub\]'; or put .*train_prefs"):  # fmt: skip
        read("ultrafeedback", "hub:HuggingFaceH4/ultrafeedback_binarized")
    with pytest.raises(EnvironmentFault, match=r"_prefs.*parquet needs the package pyarrow; install it: pip install"):
        read("ultrafeedback", tmp_path)


def test_a_set_that_is_a_program_is_read_from_the_tables_that_the_hub_made_of_it(tmp_path, monkeypatch):
    import datasets

    lines(tmp_path / "made" / "train.jsonl", *(farm(i, 1 + i % 2) for i in range(20)))
    real, asked = datasets.load_dataset, []

    def hub(name, config=None, data_dir=None, revision=None):
        asked.append((name, config, data_dir, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found alpaca_farm.py")
        return real(str(tmp_path / "made"))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: hub(name))
    found = everything(read("alpacafarm", "hub:tatsu-lab/alpaca_farm/alpaca_human_preference"))
    assert len(found) == 20
    assert all_true(found)
    assert asked[-1] == ("tatsu-lab/alpaca_farm", None, "alpaca_human_preference", "refs/convert/parquet")


# Prompts


def prompts_of(place: object, **more: object) -> list[str]:
    dataset = load(DataSettings(source="jsonl", prompts=str(place), **more), 0)
    return sorted({*dataset.prompts, *dataset.held_out_prompts})


def safe(i: int) -> dict:
    return {"prompt": f"ask {i}", "response_0": "x", "response_1": "y", "better_response_id": 0, "safer_response_id": 1}


@pytest.mark.parametrize("names", [("data/Alpaca-7B", "data/Alpaca2-7B", "jsonl"), ("round0", "round1", "jsonl.xz")])
def test_prompts_of_saferlhf_are_those_of_all_its_training_files(tmp_path, names):
    *folders, ending = names
    for i, folder in enumerate(folders):
        lines(tmp_path / folder / f"train.{ending}", *(safe(i) for i in (i, i, i + 10)))
        lines(tmp_path / folder / f"test.{ending}", safe(99))
    assert prompts_of(tmp_path) == ["ask 0", "ask 1", "ask 10", "ask 11"]
    assert prompts_of(f"{tmp_path}@test") == ["ask 99"]


def test_prompts_are_found_in_the_records_of_every_set_that_we_know(tmp_path):
    kinds = {
        "ask 1": lines(tmp_path / "a.jsonl", safe(1)),
        "do 1\n\nit": array(
            tmp_path / "alpaca_eval.json", {"instruction": "do 1", "input": "it", "output": "x", "generator": "g"}
        ),
        "do 2": array(
            tmp_path / "alpaca.json", {"dataset": "helpful", "instruction": "do 2", "output": "", "generator": "g"}
        ),
        "why?": lines(tmp_path / "shp.json", {"history": "why?", "human_ref_A": "a", "labels": 1}),
        "post 1": lines(tmp_path / "posts.jsonl", post(1)),
        "question 1?": lines(tmp_path / "hh.jsonl.gz", hh_row(1)),
        "prompt 7": table(tmp_path / "u.parquet", {"chosen": messages("prompt 7", "good"), "rejected": "bad"}),
        "hi": table(tmp_path / "p.parquet", {"prompt": [{"role": "user", "content": "hi", "name": None}]}),
    }
    for text, path in kinds.items():
        assert prompts_of(path) == [text]
    other = lines(tmp_path / "b.jsonl", {"q": "one", "n": 1}, {"q": "two", "n": 2})
    assert prompts_of(other, prompt_column="q") == ["one", "two"]
    with pytest.raises(DataError, match=r"b\.jsonl:1: no column 'k' \(data\.prompt_column\); there are q, n"):
        prompts_of(other, prompt_column="k")
    with pytest.raises(DataError, match=r"b\.jsonl:1: prompt: expected text, got nothing"):
        prompts_of(other)


def test_prompts_come_from_the_hub_too_and_the_training_part_is_the_default(tmp_path):
    lines(tmp_path / "set" / "train.jsonl", safe(1), safe(2))
    lines(tmp_path / "set" / "test.jsonl", safe(3))
    assert prompts_of(f"hub:{tmp_path / 'set'}") == ["ask 1", "ask 2"]
    assert prompts_of(f"hub:{tmp_path / 'set'}@train+test") == ["ask 1", "ask 2", "ask 3"]


def test_empty_prompts_stop_with_their_line_unless_such_are_dropped(tmp_path):
    path = lines(tmp_path / "a.jsonl", safe(1), safe(2) | {"prompt": " "}, safe(3))
    with pytest.raises(DataError, match=r"a\.jsonl:2: prompt: empty"):
        prompts_of(path)
    dataset = load(DataSettings(source="jsonl", prompts=str(path), drop_empty=True), 0)
    assert dataset.left_out == {"prompts that are empty": 1}


def forum(i: int, split: str) -> dict:
    a, b = ("good", "bad") if i % 2 else ("bad", "good")
    answers = {"human_ref_A": f"{a} {i}", "human_ref_B": f"{b} {i}", "labels": i % 2}
    return {"post_id": f"{i}", "domain": f"askculinary_{split}", "history": f"{split} question {i}"} | answers


def test_questions_of_shp_that_nobody_trains_on_can_be_the_prompts(tmp_path):
    for split, count in (("train", 30), ("validation", 4), ("test", 5)):
        lines(tmp_path / "askculinary" / f"{split}.json", *(forum(i, split) for i in range(count)))
    dataset = read("shp", tmp_path, prompts=f"{tmp_path}@validation+test")
    assert all_true(everything(dataset))
    assert both_letters(everything(dataset))
    prompts = {*dataset.prompts, *dataset.held_out_prompts}
    assert prompts == {f"validation question {i}" for i in range(4)} | {f"test question {i}" for i in range(5)}
    trained = {c.prompt for share in dataset.clients.values() for c in share.train}
    assert len(trained) == 30
    assert trained.isdisjoint(prompts)
    assert not any("in training comparisons too" in message for message in dataset.warnings)
    overlapping = read("shp", tmp_path, prompts=str(tmp_path))
    assert any("30 of the prompts" in message for message in overlapping.warnings)
