"""Reading comparisons: both shapes, what is counted, what is said, and the numbers of `data check`."""

import gzip
import hashlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.data.check import longer_wins
from fedbiscuit.data.comparisons import check_files, iter_comparisons, read_comparisons
from fedbiscuit.data.records import comparison_of, pair_of
from fedbiscuit.types import Comparison, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def record(**changes):
    base = {"prompt": "Tea?", "output_a": "Yes.", "output_b": "No.", "choice": 1, "client": "ann", "split": "train"}
    return {key: value for key, value in (base | changes).items() if value != "DROP"}


def write(path, *records):
    path.write_text("".join(json.dumps(item) + "\n" for item in records), "utf-8")
    return path


def test_a_record_with_all_keys_becomes_a_comparison(tmp_path):
    path = write(tmp_path / "a.jsonl", record(id="x1", domain="tea", meta={"group": 1}, split="val"))
    assert list(iter_comparisons(path)) == [
        Comparison("Tea?", "Yes.", "No.", 1, "ann", "tea", "x1", "validation", {"group": 1})
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("train", "train"),
        ("val", "validation"),
        ("valid", "validation"),
        ("validation", "validation"),
        ("test", "test"),
    ],
)
def test_split_names_have_one_meaning(written, meant):
    assert comparison_of(record(split=written)).split == meant


def test_optional_keys_may_be_missing_or_null():
    bare = comparison_of(record(client="DROP", split="DROP"))
    assert bare == comparison_of(record(client=None, split=None, id=None, domain=None, meta=None))
    assert (bare.client, bare.split, bare.id, bare.meta) == (None, None, None, {})


def ranked(i, chosen="good", rejected="bad"):
    return {"prompt": f"p{i}", "chosen": f"{chosen} {i}", "rejected": f"{rejected} {i}", "client": "ann"}


def test_chosen_and_rejected_keep_their_meaning_and_stand_as_a_about_half_the_time():
    comparisons = [comparison_of(ranked(i)) for i in range(400)]
    assert all(comparison.chosen == f"good {i}" for i, comparison in enumerate(comparisons))
    assert 160 < sum(comparison.choice == 0 for comparison in comparisons) < 240


def test_the_position_of_a_pair_does_not_tell_which_answer_was_chosen():
    for i in range(50):
        one, other = comparison_of(ranked(i)), comparison_of(ranked(i, "bad", "good"))
        assert (one.output_a, one.output_b) == (other.output_a, other.output_b)
        assert one.choice != other.choice


def chat(*texts):
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_chat_messages_give_the_same_comparison_as_texts():
    plain = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
    answers = {
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    whole = {"chosen": chat("Tea?", "Yes."), "rejected": chat("Tea?", "No.")}
    expected = comparison_of(plain)
    assert comparison_of({"prompt": chat("Tea?"), **answers}) == expected
    assert comparison_of({"prompt": "Tea?", **whole}) == expected
    assert comparison_of(whole) == expected


def test_chat_messages_of_several_turns_become_a_transcript():
    turns = chat("Tea?", "Which?", "Green.")
    comparison = comparison_of({"prompt": turns, "chosen": "Fine.", "rejected": "No."})
    assert comparison.prompt == "User: Tea?\n\nAssistant: Which?\n\nUser: Green."


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chosen": chat("a", "b"), "rejected": chat("c", "d")}, "must agree"),
        ({"prompt": "other", "chosen": chat("a", "b"), "rejected": chat("a", "d")}, "must agree"),
        ({"prompt": "a", "chosen": chat("a"), "rejected": "d"}, "from 'assistant'"),
        ({"prompt": "a", "chosen": [], "rejected": "d"}, "chosen: no messages"),
        ({"prompt": "a", "chosen": [{"role": "bot", "content": "x"}], "rejected": "d"}, r"chosen\[0\].role"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": ["x"]}], "rejected": "d"}, r"chosen\[0\].content"),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "choice": 0}, "cannot stand beside"),
        ({"chosen": "x", "rejected": "y"}, "prompt: expected text, got nothing"),
    ],
)
def test_chat_messages_that_do_not_fit_are_refused(bad, message):
    with pytest.raises(DataError, match=message):
        comparison_of(bad)


def test_a_compressed_file_gives_the_same_rows_and_the_digest_is_of_the_file_on_disk(tmp_path):
    plain = write(tmp_path / "a.jsonl", record(), record(prompt="Milk?"))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(iter_comparisons(plain)) == list(iter_comparisons(packed))
    _, report = read_comparisons([plain, packed])
    assert report.files == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (plain, packed)}
    assert report.num_read == 4


def test_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record()) + "\n" + "{broken\n", "utf-8")
    rows = iter_comparisons(path)
    assert next(rows).prompt == "Tea?"
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 2: not JSON"):
        next(rows)


def test_duplicate_ids_are_refused_with_both_lines_even_across_files(tmp_path):
    one = write(tmp_path / "a.jsonl", record(id="x"), record(id="x", prompt="Milk?"))
    with pytest.raises(DataError, match=r"a\.jsonl:2: id: 'x' is also the id of line 1;"):
        read_comparisons(one)
    first, second = write(tmp_path / "b.jsonl", record(id="x")), write(tmp_path / "c.jsonl", record(id="x", prompt="M"))
    with pytest.raises(DataError, match=r"c\.jsonl:1: id: 'x' is also the id of .*b\.jsonl:1;"):
        read_comparisons([first, second])


def test_a_file_named_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", record())
    with pytest.raises(DataError, match="named twice"):
        read_comparisons([path, str(path)])


def test_a_repeated_judgement_is_kept_and_said(tmp_path):
    twin = record(output_a="No.", output_b="Yes.", choice=0)
    comparisons, report = read_comparisons(write(tmp_path / "a.jsonl", record(), twin))
    assert len(comparisons) == 2
    assert report.left_out == {}
    assert "a.jsonl:2: repeats line 1" in report.warnings[0]


def test_some_records_without_a_split_are_said_and_count_as_train(tmp_path):
    path = write(tmp_path / "a.jsonl", record(split="test"), record(prompt="Milk?", split="DROP"))
    assert any("a.jsonl:2: split: missing" in message for message in read_comparisons(path)[1].warnings)
    leak = write(tmp_path / "b.jsonl", record(split="test"), record(split="DROP"))
    with pytest.raises(DataError, match="this pair is in train, but in test in line 1"):
        read_comparisons(leak)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(texts, texts, texts, st.sampled_from([0, 1])), min_size=1, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_texts_survive_a_round_trip_through_a_file(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    keys = ("prompt", "output_a", "output_b", "choice")
    lines = [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("\n".join(lines).encode())
    assert [(c.prompt, c.output_a, c.output_b, c.choice) for c in iter_comparisons(path)] == rows


@given(texts, texts, texts)
@settings(max_examples=60, deadline=None)
def test_both_orders_of_a_pair_have_one_key(prompt, a, b):
    comparison = Comparison(prompt, a, b, 0)
    assert pair_of(comparison) == pair_of(comparison.swapped())


# data check


def test_check_counts_clients_splits_letters_and_lengths(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        record(output_b="No, never.", choice=1),  # the longer one is preferred
        record(prompt="Milk please?", output_b="Yes!", choice=0, split="test"),  # a tie
        record(prompt="Rum?", client="bo", choice=1, split="val"),  # the shorter one
        record(prompt="Gin?", client="bo", choice=1),
    )
    report = check_files(path)
    assert report.ok
    assert report.clients == {
        "ann": {"train": 1, "validation": 0, "test": 1},
        "bo": {"train": 1, "validation": 1, "test": 0},
    }
    assert report.splits == {"train": 2, "test": 1, "validation": 1}
    assert report.share_b == 0.75
    assert report.longer_wins == {"all": 1.5 / 4, "test": 0.5}
    assert (report.lengths["prompt"].low, report.lengths["prompt"].top) == (1, 2)
    assert report.unit == "words"
    text = report.render()
    assert "4 comparisons of 2 clients" in text
    assert "B in 75.0%" in text


def test_check_counts_tokens_when_it_is_told_how(tmp_path):
    report = check_files(write(tmp_path / "a.jsonl", record()), count_tokens=len)
    assert report.unit == "tokens"
    assert report.lengths["prompt and both"].top == len("Tea?Yes.No.")


def test_check_names_every_broken_line_of_every_file(tmp_path):
    one = tmp_path / "a.jsonl"
    one.write_text(f"{{\n{json.dumps(record())}\n{json.dumps(record(choice='C'))}\n", "utf-8")
    two = write(tmp_path / "b.jsonl", record(prompt=3), record(prompt="Milk?", id="x"), record(prompt="Rum?", id="x"))
    report = check_files([one, two, tmp_path / "none.jsonl"])
    assert [message.split(": ")[0].replace(str(tmp_path), "") for message in report.errors] == [
        "/a.jsonl:1",
        "/a.jsonl:3",
        "/b.jsonl:1",
        "/none.jsonl",
        "/b.jsonl:3",
    ]
    assert not report.ok
    assert report.num_comparisons == 3
    assert report.render().count("error: ") == 5


def test_the_longer_answer_baseline_gives_half_to_ties():
    assert longer_wins([Comparison("p", "aa", "bb", 0)]) == 0.5
    assert longer_wins([Comparison("p", "aaa", "bb", 0), Comparison("p", "aaa", "bb", 1)]) == 0.5
    assert longer_wins([Comparison("p", "aaa", "bb", 0)]) == 1.0
    assert longer_wins([]) == 0.5


# Real people's data, where the checkout has it


@pytest.fixture(params=["alpaca_eval_judges", "hh_human", "pandalm", "polis_civic", "polis_two_camps", "ukp_convarg"])
def real_file(request):
    found = sorted((SHARED / request.param).glob("pairs.jsonl*"))
    if not found:
        pytest.skip(f"NO REAL DATA: ../shared/data/{request.param} is not beside this checkout")
    return found[0]


COUNTS = {
    "alpaca_eval_judges": (6516, 20),
    "hh_human": (3979, 20),
    "pandalm": (2515, 3),
    "polis_civic": (11912, 124),
    "polis_two_camps": (2583, 40),
    "ukp_convarg": (15592, 68),
}


def test_real_sets_are_read_whole_and_fast(real_file):
    start = time.process_time()
    comparisons, report = read_comparisons(real_file)
    assert time.process_time() - start < 10
    assert (len(comparisons), len({c.client for c in comparisons})) == COUNTS[real_file.parent.name]
    assert report.left_out == {}
    assert check_files(real_file).ok
