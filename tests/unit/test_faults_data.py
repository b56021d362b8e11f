"""Bad preference data: one test a row of the catalogue of faults, section A, with the row's number in the name."""

import gzip
import json
import os
import time
import tracemalloc

import pytest

from fedbiscuit.config import PartitionSettings
from fedbiscuit.data.check import NO_CLIENT
from fedbiscuit.data.comparisons import check_files, iter_comparisons, read_comparisons
from fedbiscuit.data.jsonlines import BLOCK_BYTES, MAX_LINE_BYTES, iter_lines
from fedbiscuit.data.partition import divide
from fedbiscuit.types import DataError


def record(**changes):
    base = {"prompt": "Tea?", "output_a": "Yes.", "output_b": "No.", "choice": 1, "client": "ann"}
    return {key: value for key, value in (base | changes).items() if value != "DROP"}


def line(**changes):
    return json.dumps(record(**changes)).encode()


GOOD = line()


@pytest.fixture
def written(tmp_path):
    def write(content, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path, *parts, **options):
    """The message, which must start with the place, hold these parts and be what `data check` says of that line too."""
    with pytest.raises(DataError) as caught:
        read_comparisons(path, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    if not options:
        assert message in check_files(path).errors
    return message


def rows(path):
    return [(c.prompt, c.output_a, c.output_b, c.choice) for c in iter_comparisons(path)]


def test_fault_01_invalid_utf8_names_line_byte_and_value(written):
    path = written(GOOD + b'\n{"prompt": "\xff"}\n')
    assert refused(path).startswith(f"{path}:2: byte 13: not UTF-8 (0xff)")


def test_fault_02_a_byte_order_mark_is_accepted_on_line_1_only(written):
    assert rows(written(b"\xef\xbb\xbf" + GOOD)) == rows(written(GOOD, "plain.jsonl"))
    refused(written(GOOD + b"\n\xef\xbb\xbf" + GOOD), "train.jsonl:2: column 1: not JSON")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_fault_03_utf16_is_named_with_how_to_convert_it(written, encoding):
    refused(written(GOOD.decode().encode(encoding)), "UTF-16", "iconv -f UTF-16 -t UTF-8")


def test_fault_04_nul_in_a_text_names_line_and_key(written):
    refused(written(line(output_a="a\x00b")), "train.jsonl:1: output_a: NUL character at position 2")


def test_fault_05_a_lone_surrogate_names_line_and_key(written):
    refused(written(line(output_b="x\ud800")), "train.jsonl:1: output_b: half of a character ('\\ud800') at position 2")
    refused(written(line(meta={"deep": ["\udfff"]})), "meta.deep[0]: half of a character")


def test_fault_06_u2028_inside_a_text_does_not_end_a_line(written):
    text = "one\u2028two\u2029three\x85four\x1efive"
    path = written(json.dumps(record(output_a=text), ensure_ascii=False).encode().replace(b"\x1e", b"\\u001e"))
    assert [row[1] for row in rows(path)] == [text]


def test_fault_07_crlf_cr_and_lf_files_with_or_without_a_last_end_give_the_same_rows(written):
    lines = [line(prompt=f"p{i}", output_a="two\nlines\r") for i in range(5)]
    expected = rows(written(b"\n".join(lines)))
    assert len(expected) == 5
    for end in (b"\n", b"\r\n", b"\r", b"\n\n"):
        assert rows(written(end.join(lines))) == expected
        assert rows(written(end.join(lines) + end)) == expected


@pytest.mark.parametrize("shift", [-2, -1, 0, 1])
@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_fault_07_line_ends_across_block_borders_keep_their_number(written, end, shift):
    first = b"x" * (BLOCK_BYTES + shift)
    assert list(iter_lines(written(end.join([first, b"", b"y", b"z"])))) == [(1, first), (2, b""), (3, b"y"), (4, b"z")]


def test_fault_08_a_line_that_is_too_long_costs_no_memory_and_the_next_line_is_read(written):
    long = b'{"prompt": "' + b"x" * (40 << 20) + b'"}'
    path = written(GOOD + b"\n" + long + b"\n" + line(choice=7))
    refused(path, f"train.jsonl:2: line longer than {MAX_LINE_BYTES} bytes")
    tracemalloc.start()
    errors = check_files(path).errors
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [error.split(": ")[0] for error in errors] == [f"{path}:2", f"{path}:3"]
    assert peak < 8 << 20


def test_fault_08_a_compressed_bomb_is_bounded_too(written):
    path = written(gzip.compress(b"[" * (64 << 20)), "train.jsonl.gz")
    tracemalloc.start()
    refused(path, f"train.jsonl.gz:1: line longer than {MAX_LINE_BYTES} bytes")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_fault_08_a_line_of_just_the_limit_is_read(written):
    spare = MAX_LINE_BYTES - len(line(output_a=""))
    assert len(rows(written(line(output_a="x" * spare)))) == 1
    refused(written(line(output_a="x" * (spare + 1))), "line longer than")


def test_fault_08_damaged_and_misnamed_compressed_files_are_named(written):
    whole = gzip.compress(b"\n".join([line(prompt=f"p{i}") for i in range(50)]))
    refused(written(whole[:-20], "a.jsonl.gz"), "the compressed file ends early")
    refused(written(whole[:-8] + b"\0" * 8, "b.jsonl.gz"), "the compressed file is damaged")
    refused(written(GOOD, "c.jsonl.gz"), "named .gz but not a gzip file")
    assert len(rows(written(whole, "really_gzip.jsonl"))) == 50


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_fault_09_deep_nesting_is_refused_without_a_crash(written, opening):
    refused(written(b'{"meta": ' + opening * 100_000), "train.jsonl:1: nested too deeply")
    refused(written(b'{"meta": {"x": ' + b"[" * 70 + b"]" * 70 + b"}}"), "nested too deeply")


def test_fault_09_many_brackets_in_a_text_are_not_nesting(written):
    text = '[[{{"\\[' * 5000
    assert rows(written(line(output_a=text)))[0][1] == text


def test_fault_09_counting_brackets_takes_linear_time(written):
    path = written(b'{"a": ' + b"[" * 65 + b'"' + b'\\"' * 400_000 + b"\\")
    start = time.process_time()
    refused(path, "train.jsonl:1: ")
    assert time.process_time() - start < 5


def test_fault_10_a_huge_integer_names_the_line(written):
    refused(written(b'{"prompt": ' + b"9" * 5000 + b"}"), "train.jsonl:1: a number has too many digits")
    refused(written(line(choice=10**400)), "train.jsonl:1: choice: expected the integer 0", "got a huge number")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_fault_11_numbers_that_are_not_finite_name_line_and_key(written, value):
    text = '{"prompt": "p", "output_a": "a", "output_b": "b", "choice": 0, "meta": {"score": [1, %s]}}' % value  # noqa: UP031
    refused(written(text.encode()), "train.jsonl:1: meta.score[1]: ", "not a finite number")
    refused(written(text.replace('"choice": 0', f'"choice": {value}').encode()), "train.jsonl:1: choice: ")


def test_fault_12_a_duplicate_key_is_refused(written):
    refused(written(GOOD[:-1] + b', "choice": 0}'), "train.jsonl:1: 'choice': duplicate key")
    refused(written(line(meta={"x": 1}).replace(b'"x": 1', b'"x": 1, "x": 2')), "'x': duplicate key")


def test_fault_13_text_after_the_record_names_the_line(written):
    refused(written(GOOD + b"\n" + GOOD + b" ok"), "train.jsonl:2: column", "more text after the record")
    refused(written(json.dumps(record(), indent=1).encode()), "train.jsonl:1: ", "the record goes on in the next line")
    refused(written(json.dumps([record()]).encode()), "train.jsonl:1: a JSON array, not one JSON object a line")
    refused(written(b"[1, 2]"), "train.jsonl:1: expected one JSON object a line", "a list")


@pytest.mark.parametrize("key", ["prompt", "output_a", "output_b", "choice"])
def test_fault_14_a_missing_key_is_named(written, key):
    refused(written(line(**{key: "DROP"})), f"train.jsonl:1: {key}: expected", "the key is missing")


def test_fault_15_an_unknown_key_comes_with_the_nearest_one(written):
    refused(written(line(cleint="ann")), "train.jsonl:1: 'cleint': unknown key; did you mean 'client'?")
    refused(written(line(zzz=1)), "'zzz': unknown key; put what you want to keep under `meta`")


@pytest.mark.parametrize(
    ("key", "value", "got"),
    [
        ("prompt", 3, "3"),
        ("output_a", {"text": "x"}, "an object"),
        ("output_b", None, "null"),
        ("client", 17, "17"),
        ("id", 4.5, "4.5"),
        ("domain", True, "true"),
        ("meta", [], "a list"),
        ("split", "dev", "'dev'"),
    ],
)
def test_fault_16_a_wrong_type_names_line_key_and_value(written, key, value, got):
    refused(written(line(**{key: value})), f"train.jsonl:1: {key}: expected", f"got {got}")


@pytest.mark.parametrize("key", ["prompt", "output_a", "output_b"])
def test_fault_17_blank_texts_stop_or_are_counted(written, key):
    path = written(GOOD + b"\n" + line(**{key: " \n\t"}))
    refused(path, f"train.jsonl:2: {key}: empty", "drop_empty")
    comparisons, report = read_comparisons(path, drop_empty=True)
    assert (len(comparisons), report.left_out) == (1, {"empty text": 1})


def test_fault_17_dropping_empty_texts_does_not_hide_other_faults_of_the_line(written):
    refused(written(line(output_a="", choice="C")), "choice: expected", drop_empty=True)


@pytest.mark.parametrize("value", ["C", "a", "0", True, False, None, 2, -1, 0.0, [0]])
def test_fault_18_a_choice_must_be_the_integer_0_or_1(written, value):
    refused(written(line(choice=value)), "train.jsonl:1: choice: expected the integer 0 (A is preferred) or 1 (B is")


def test_fault_18_the_letter_comes_with_its_number(written):
    refused(written(line(choice="a")), "got 'a'; write 0 for A")
    refused(written(line(choice="B")), "got 'B'; write 1 for B")


def test_fault_19_identical_answers_are_left_out_counted_and_refused_when_strict(written):
    path = written(b"\n".join([GOOD, line(output_b="Yes. "), line(prompt="Rum?", output_b="Yes.")]))
    comparisons, report = read_comparisons(path)
    assert (len(comparisons), report.num_read, report.left_out) == (1, 1, {"identical answers": 2})
    expected = f"{path}:2: output_b: the same text as output_a; 2 such comparisons are left out"
    assert any(message.startswith(expected) for message in report.warnings)
    assert any(message.startswith(expected) for message in check_files(path).warnings)
    refused(path, "train.jsonl:2: output_b: the same text", strict=True)


def test_fault_20_one_client_choosing_both_ways_is_said_with_both_lines(written):
    twin = line(output_a="No.", output_b="Yes.", choice=1)
    path = written(b"\n".join([GOOD, line(prompt="Rum?"), twin, line(choice=0)]))
    comparisons, report = read_comparisons(path)
    assert len(comparisons) == 4
    assert f"{path}:3: choice: contradicts line 1: one client chose both ways" in report.warnings[0]
    assert "2 such comparisons" in report.warnings[0]
    refused(path, "train.jsonl:3: choice: contradicts line 1", strict=True)


def test_fault_20_two_clients_may_disagree(written):
    assert read_comparisons(written(GOOD + b"\n" + line(client="bo", choice=0)))[1].warnings == []


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_fault_21_a_pair_in_train_and_held_out_of_one_client_is_refused_with_both_lines(written, held_out):
    twin = line(split=held_out, output_a="No.", output_b="Yes.", choice=0)
    path = written(b"\n".join([line(split="train"), line(prompt="Rum?", split="train"), twin]))
    refused(path, "train.jsonl:3: split: this pair is in ", "but in train in line 1", "client 'ann'")


def test_fault_21_a_pair_in_train_of_one_client_and_test_of_another_is_only_said(written):
    path = written(b"\n".join([line(split="train"), line(client="bo", split="test")]))
    comparisons, report = read_comparisons(path)
    assert len(comparisons) == 2
    assert report.warnings[0].startswith("1 pairs of answers are in train of one client and in validation or test of")


def test_fault_22_only_regular_files_with_something_in_them_are_read(written, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "link", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "a folder; name the files in it"),
        (tmp_path / "none.jsonl", "no such file"),
        ("a\x00b", "cannot be opened"),
        (written(b"", "empty.jsonl"), "the file is empty"),
        (written(b"\n \n", "blank.jsonl"), "the file is empty"),
        (written(gzip.compress(b""), "empty.jsonl.gz"), "the file is empty"),
    ):
        refused(path, why)


def test_fault_23_clients_with_0_1_or_2_comparisons_are_said_and_never_get_invented_data(written):
    content = [line(client="none", split="test"), line(client="one", split="train")]
    content += [line(client="two", prompt=prompt, split="train") for prompt in "ab"]
    path = written(b"\n".join(content))
    said = " | ".join(check_files(path).warnings)
    assert "clients with nothing to train on: 1, first 'none'" in said
    assert "only 1 or 2 comparisons: 2, first 'one'" in said
    division = divide(read_comparisons(path)[0], PartitionSettings(), 0, 0.05)
    assert division.left_out["clients with nothing to train on"] == 1
    sizes = {name: (len(share.train), len(share.validation)) for name, share in division.clients.items()}
    assert sizes == {
        "one": (1, 0),
        "two": (1, 1),
    }
    assert any("too few comparisons for a validation part: 1, first 'one'" in message for message in division.warnings)


def test_fault_24_labels_that_are_all_equal_are_said(written):
    path = written(b"\n".join(line(prompt=f"p{i}") for i in range(3)))
    assert any(message.startswith("choice: all are 1") for message in check_files(path).warnings)
    other = [line(prompt=f"p{i}", client="bo", choice=i % 2) for i in range(4)]
    mixed = written(b"\n".join([*(line(prompt=f"p{i}") for i in range(8)), *other]))
    assert any("always the same letter: 1, first 'ann'" in message for message in check_files(mixed).warnings)


@pytest.mark.parametrize("text", ["{post}", "%s %(x)s", "$x ${y}", "{0.__class__}", "{prompt!r:>9}", "{{}}"])
def test_fault_26_text_that_looks_like_a_format_is_copied_verbatim(written, text):
    row = rows(written(line(prompt=text, output_a=text + "1", output_b=text + "2")))[0]
    assert row[:3] == (text, text + "1", text + "2")


@pytest.mark.parametrize(
    "text",
    ["Fine.\nResponse B: no", "Summary A: x", "Better response: A", "The better response is: A", "The better summary is: A",
     "a <|im_start|>user", "</s>", "x<eos>", "<end_of_turn>", "[INST] x"],
)  # fmt: skip
def test_fault_27_text_that_collides_with_templates_or_special_tokens_is_said(written, text):
    path = written(GOOD + b"\n" + line(prompt="Rum?", output_a=text))
    assert rows(path)[1][1] == text
    said = [message for message in check_files(path).warnings if "looks like part of a template" in message]
    assert len(said) == 1
    assert f"{path}:2: output_a: " in said[0]


def test_fault_27_ordinary_text_is_not_suspected(written):
    path = written(line(output_a="The better of both: response A. <b>bold</b> a < b > c", prompt="Is a <s better?"))
    assert not [message for message in check_files(path).warnings if "looks like" in message]


def test_fault_28_control_and_invisible_characters_are_shown_escaped(written):
    path = written(line(output_a="see \u202egpj.exe", output_b="a\u200bb", client="an\x1b[31mn"))
    text = check_files(path).render()
    assert "'see \\u202e" in text
    assert "2 such texts" in text
    assert "an\\u001b[31mn" in text
    assert not set("\u202e\u200b\x1b") & set(text)
    broken = check_files(written(line(choice="\x1b[2J\u202e"))).render()
    assert not set("\u202e\x1b") & set(broken)
    assert "a\\u001b.jsonl" in check_files(written(GOOD, "a\x1b.jsonl")).render()


def test_fault_29_client_ids_are_only_keys(written, tmp_path):
    names = ["../../x", "/etc/passwd", "CON", "\U0001f36a", "a b\n", "..", "x" * 200, "a/b"]
    path = written(b"\n".join(line(client=name, prompt=f"p{i}") for name in names for i in range(4)))
    before = sorted(tmp_path.rglob("*"))
    division = divide(read_comparisons(path)[0], PartitionSettings(), 0, 0.05)
    assert sorted(division.clients) == sorted(names)
    check_files(path).render()
    assert sorted(tmp_path.rglob("*")) == before
    refused(written(line(client="")), "train.jsonl:1: client: empty")
    refused(written(line(client=" ")), "train.jsonl:1: client: empty")
    refused(written(line(client="x" * 201)), "train.jsonl:1: client: 201 characters", "at most 200")


def test_fault_29_comparisons_without_a_client_are_shown_as_such(written):
    assert list(check_files(written(line(client="DROP"))).clients) == [NO_CLIENT]


def test_fault_30_a_changed_file_has_another_digest(written):
    path = written(GOOD)
    before = read_comparisons(path)[1].files
    assert read_comparisons(path)[1].files == before
    written(GOOD + b" ")
    assert read_comparisons(path)[1].files != before


def test_an_array_or_a_table_instead_of_json_lines_is_one_error_that_says_how_to_convert_it(tmp_path):
    array, table = tmp_path / "a.json", tmp_path / "t.csv"
    array.write_text(json.dumps([{"prompt": "q", "chosen": "y", "rejected": "n"}] * 4, indent=1))
    table.write_text("prompt,chosen,rejected\nq,y,n\nq,y,m\n")
    for path, way in ((array, "jq -c"), (table, "pandas")):
        report = check_files([path])
        assert len(report.errors) == 1
        assert way in report.errors[0]
