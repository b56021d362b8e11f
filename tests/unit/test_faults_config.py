"""Bad configs, one test a row of the table of faults; the number of the row is in the name."""

from __future__ import annotations

import os
import time

import pytest

from fedbiscuit.config import load_config, parse_config
from fedbiscuit.strict_yaml import parse_yaml
from fedbiscuit.types import ConfigError


def problem_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, (), "f.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system [id]", "!!str x", "!mine x"])
def test_fault_31_tags_are_not_allowed(text):
    assert problem_of(f"seed: 1\nname: {text}\n").startswith("f.yaml:2: name: tags are not allowed")


def test_fault_31_tags_on_keys_and_sections_are_not_allowed():
    assert "f.yaml:1: seed: tags and anchors are not allowed" in problem_of("!!str seed: 1")
    assert "f.yaml:1: model: tags are not allowed" in problem_of("model: !!map {}")


def test_fault_32_anchors_and_aliases_are_refused():
    assert problem_of("name: &x a\nruns_dir: *x\n").startswith("f.yaml:1: name: anchor &x is not allowed")
    assert problem_of("runs_dir: *x\n").startswith("f.yaml:1: runs_dir: alias *x is not allowed")
    assert "&k" in problem_of("&k {seed: 1}") or "not allowed" in problem_of("&k {seed: 1}")


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "a: " + "[" * 5000])
def test_fault_33_deep_nesting_stops_at_once(text):
    started = time.process_time()
    assert "nested too deeply; at most 16 levels" in problem_of(text)
    assert time.process_time() - started < 2.0


def test_fault_33_a_file_over_one_mebibyte_is_refused(tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match=r"big.yaml: larger than 1048576 bytes"):
        load_config(tmp_path / "big.yaml")


def test_fault_34_a_duplicate_key_names_both_lines():
    assert problem_of("selectors:\n  local:\n    lr: 1.0\n    steps: 3\n    lr: 2.0\n") == (
        "f.yaml:5: selectors.local.lr: key stands twice, in lines 3 and 5; remove one"
    )
    assert "lines 1 and 3" in problem_of("seed: 1\nname: a\n'seed': 2\n")


def test_fault_35_one_e_minus_five_is_a_number():
    assert parse_config("alignment: {lr: 1e-5}").alignment.lr == 1e-5


def test_fault_36_scalars_follow_yaml_1_2():
    text = "[no, off, 010, 12:30:45, 1.10, 0o17, 0x1F, yes, 1_000, 2024-01-02, .5, ~, null, True, '1', .inf]"
    expected = ["no", "off", 10, "12:30:45", 1.1, 15, 31, "yes", "1_000", "2024-01-02", 0.5, None, None, True, "1"]
    assert parse_yaml(text, "x").value == [*expected, float("inf")]


def test_fault_36_a_word_for_a_switch_says_what_to_write():
    assert problem_of("generation: {chat: no}").endswith("'no' is not permitted; it must be true or false; write false")
    assert problem_of("name: 2024").endswith("put it in quotes")
    assert problem_of("runs_dir: 1.10").endswith("1.1 is not permitted; it must be a text; put it in quotes")


@pytest.mark.parametrize("text", ["model:\n\tbase: x\n", "seed: 1\n\tname: a\n", "model:\n  dtype: auto\n\tbase: x\n"])
def test_fault_37_a_tab_in_the_indentation_is_named(text):
    line = next(number for number, row in enumerate(text.split("\n"), 1) if "\t" in row)
    assert problem_of(text) == f"f.yaml:{line}: a tab where YAML wants spaces; use spaces"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nselectors:\n  raound: 3\n", "f.yaml:3: selectors.raound: unknown key; did you mean rounds?"),
        ("lr: 1", "f.yaml:1: lr: unknown key; did you mean selectors.local.lr or alignment.lr?"),
        ("selectors: {vote: min}", "f.yaml:1: selectors.vote: unknown key; did you mean labels.vote?"),
        ("base: x", "f.yaml:1: base: unknown key; did you mean model.base?"),
        ("policy_model: {bse: x}", "f.yaml:1: policy_model.bse: unknown key; did you mean base?"),
        ("zzz: 1", "f.yaml:1: zzz: unknown key; known here: name, runs_dir, seed, model,"),
        ("<<: {seed: 1}", "f.yaml:1: <<: unknown key"),
    ],
)
def test_fault_38_an_unknown_key_gets_the_nearest_valid_one(text, told):
    assert problem_of(text).startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: -1", "seed: -1 is not permitted; it must be a whole number from 0 to 9223372036854775807"),
        ("seed: 9223372036854775808", "it must be a whole number from 0 to 9223372036854775807"),
        ("seed: " + "9" * 5000, "seed: a number of 5000 characters; at most 100"),
        ("seed: true", "seed: true is not permitted"),
        ("seed:", "seed: no value; it must be a whole number"),
        ("alignment: {lr: .nan}", "alignment.lr: nan is not permitted; it must be a number above 0"),
        (
            "alignment: {lr: 1e400}",
            "alignment.lr: inf is not permitted; it must be a number above 0 and at most 1000000",
        ),
        ("alignment: {lr: fast}", "alignment.lr: 'fast' is not permitted; it must be a number above 0"),
        ("alignment: {beta: 0}", "alignment.beta: 0 is not permitted; it must be a number above 0"),
        ("alignment: {batch_size: 0}", "alignment.batch_size: 0 is not permitted; it must be a whole number from 1"),
        ("selectors: {rounds: 10.0}", "selectors.rounds: 10.0 is not permitted; it must be a whole number"),
        ("selectors: {num_adapters: 0}", "selectors.num_adapters: 0 is not permitted"),
        ("labels: {min_margin: 0.5}", "it must be a number from 0 and below 0.5"),
        ("labels: {vote: meen}", "it must be mean, majority or min; did you mean mean?"),
        (
            "model: {device: gpu}",
            "model.device: 'gpu' is not permitted; it must be auto, cpu, mps, cuda or cuda:NUMBER",
        ),
        ("model: {lora: {target_modules: 3}}", "it must be all-linear or a list, each item a text"),
        ("data: {path: [a, 1]}", "data.path.1: 1 is not permitted; it must be a text; put it in quotes"),
        ("selectors: {groups: {ann: x}}", "selectors.groups.ann: 'x' is not permitted; it must be a whole number"),
        ("model: 3", "model: 3 is not permitted; it must be a section"),
        ("- seed", "expected settings such as `seed: 0`, got ['seed']"),
    ],
)
def test_fault_39_a_wrong_value_gets_its_line_and_what_is_permitted(text, told):
    problem = problem_of(text)
    assert problem.startswith("f.yaml:1: ")
    assert told in problem


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".", "..", "", "a" * 300, "a/b", "A", '"a\\0b"', '"a\\n"'])
def test_fault_46_a_run_name_stays_inside_the_folder_of_runs(name):
    assert problem_of(f"name: {name}").startswith("f.yaml:1: name: ")


@pytest.mark.parametrize("text", ['name: "\\0"', 'runs_dir: "\\ud800"', "name: \x07", 'runs_dir: "\\e[2J"'])
def test_fault_04_and_05_control_characters_and_lone_surrogates_are_refused_in_configs_too(text):
    assert "is not allowed; remove it" in problem_of(text)


def test_fault_01_to_03_encodings_of_a_config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\r\nname: b\r\n")
    assert load_config(path).seed == 3
    path.write_bytes(b"seed: 3\nname: \xff\n")
    with pytest.raises(ConfigError, match=r"a.yaml:2: not UTF-8 \(byte 0xff\)"):
        load_config(path)
    path.write_bytes("seed: 3".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a.yaml:1: this is UTF-16"):
        load_config(path)


def test_fault_22_a_folder_a_fifo_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, told in (
        (tmp_path, "not a regular"),
        (tmp_path / "fifo", "not a regular"),
        (tmp_path / "x", "no such file"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("a\0b")


def test_a_second_document_and_broken_yaml_are_named_with_their_line():
    assert problem_of("seed: 1\n---\nseed: 2\n").startswith("f.yaml:2: a second document starts here")
    assert problem_of("seed: 1\nname: [a,\n").startswith("f.yaml:3: not valid YAML")
    assert "a key must be a plain text" in problem_of("? [a]\n: b")
