"""Settings: what is read, what is refused, and what comes out again."""

from __future__ import annotations

import contextlib
import json
import runpy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.config import Config, dump_config, json_schema, load_config, parse_config, settings_table
from fedbiscuit.schema import settings_of
from fedbiscuit.strict_yaml import parse_yaml, scalar_text
from fedbiscuit.types import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def problem_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, "f.yaml")
    return str(caught.value)


# reading


def test_an_empty_text_has_all_defaults():
    assert parse_config("") == parse_config("# nothing\n") == parse_config("{}") == Config()


def test_a_section_whose_keys_are_all_commented_out_has_its_defaults():
    assert parse_config("model:\n  # base: x\nselectors:\n  local:\n  rounds: 7\n").selectors.rounds == 7


def test_a_file_and_a_text_give_the_same_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\nselectors: {rounds: 4}\n")
    assert load_config(tmp_path / "a.yaml") == parse_config("seed: 3\nselectors: {rounds: 4}\n")


def test_a_single_path_may_stand_without_brackets():
    assert parse_config("data: {path: a.jsonl}").data.path == ("a.jsonl",)
    assert parse_config("", ["data.path=[a.jsonl, b.jsonl]"]).data.path == ("a.jsonl", "b.jsonl")


def test_all_problems_are_told_at_once():
    assert problem_of("seed: -1\nname: A\n").count("\n") == 1


# overrides


def test_overrides_are_taken_as_key_equals_value_and_as_key_value_in_any_mix():
    cfg = parse_config("seed: 1", ["seed=2", "selectors.local.lr", "1e-5", "labels.vote=min", "data.prompts="])
    assert (cfg.seed, cfg.selectors.local.lr, cfg.labels.vote, cfg.data.prompts) == (2, 1e-5, "min", "")


def test_an_override_may_set_groups_and_make_a_section():
    cfg = parse_config("", ["selectors.groups={ann: 0}", "selectors.grouping=fixed", "policy_model.lora.r=4"])
    assert cfg.selectors.groups == {"ann": 0}
    assert cfg.policy_model is not None
    assert cfg.policy_model.lora.r == 4


def test_a_negative_override_reaches_the_range_error():
    assert problem_of("", "seed", "-1") == (
        "command line: seed: -1 is not permitted; it must be a whole number from 0 to 9223372036854775807"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed"], "command line: seed: no value; write seed=VALUE"),
        (["seed=1", "seed", "2"], "command line: seed: given twice; remove one"),
        (["=1"], "'' is not the name of a setting"),
        (["-x", "1"], "'-x' is not the name of a setting"),
        (["labels={vote: min}"], "command line: labels: this is a section"),
        (["seed.x=1"], "command line: seed.x: seed is a setting, not a section"),
        (["seed=[1"], "command line: seed: '[1': not valid YAML"),
        (["rounds=5"], "command line: rounds: unknown key; did you mean selectors.rounds?"),
        (["vote", "min"], "did you mean labels.vote?"),
    ],
)
def test_a_wrong_override_says_what_to_write(words, told):
    assert told in problem_of("seed: 1", *words)


def test_the_place_of_a_wrong_value_is_the_last_that_set_it():
    assert problem_of("selectors:\n  rounds: -1\n").startswith("f.yaml:2: selectors.rounds: -1 is not permitted")
    assert problem_of("selectors:\n  rounds: -1\n", "selectors.rounds=-2").startswith(
        "command line: selectors.rounds: -2"
    )


# settings that do not fit together


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {choice_tokens: [' A', ' A']}", "data.choice_tokens: the two choices must differ"),
        ("data: {partition: {by: iid}}", "data.partition.num_clients: partition.by iid needs"),
        ("selectors: {local: {betas: [0.9, 1.0]}}", "selectors.local.betas: [0.9, 1.0] is not permitted"),
        ("alignment: {betas: [1.0, 0.9]}", "alignment.betas"),
        ("selectors: {num_adapters: 2, population: local}", "selectors.num_adapters: population local"),
        ("selectors: {num_adapters: 2, local: {objective: dpo}}", "selectors.num_adapters: objective dpo"),
        ("selectors: {num_adapters: 2, rounds: 20}", "selectors.rounds: 20 rounds end within the warm-up"),
        ("selectors: {groups: {ann: 0}}", "selectors.groups: grouping prices makes its own"),
        ("selectors: {num_adapters: 2, grouping: fixed, groups: {a.b: 2}}", "selectors.groups.a.b: 2 is not permitted"),
        ("selectors: {min_replies: 6}", "selectors.min_replies: 6 replies cannot come from a cohort of 5"),
        (
            "selectors: {num_adapters: 2, warmup_cohort_size: 1, min_replies: 2}",
            "selectors.min_replies: 2 replies cannot come from a cohort of 1",
        ),
        (
            "selectors: {num_adapters: 2, cohort_size: 0, warmup_cohort_size: 4, aggregator: krum}",
            "selectors.warmup_cohort_size: 4 clients are too few for krum",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text, told):
    problem = problem_of(text)
    assert problem.startswith("f.yaml:1: ")
    assert told in problem


# out again


def test_dumped_settings_read_back_the_same_and_are_yaml_for_everybody():
    cfg = parse_config(
        "name: a-b\npolicy_model: {base: /m/x}\n"
        "selectors: {num_adapters: 2, grouping: fixed, groups: {'no': 0, ü x: 1}}\n"
        "data: {choice_tokens: [' A', \"\\u2028'\"], prompts: 'on'}\nalignment: {lr: 1e-5}\n"
    )
    assert parse_config(dump_config(cfg)) == cfg
    assert yaml.safe_load(dump_config(cfg)) == json.loads(cfg.model_dump_json())


def test_a_dump_names_every_setting_and_what_it_means():
    dumped = parse_yaml(dump_config(parse_config("policy_model: {base: x}")), "dump").lines
    assert set(settings_of(Config)) <= set(dumped)
    assert "# the run folder is runs_dir/name" in dump_config(Config())


@given(
    st.one_of(
        st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t"), max_size=20),
        st.floats(allow_nan=False, allow_infinity=False),
        st.integers(-(10**20), 10**20),
        st.booleans(),
        st.none(),
    )
)
@settings(max_examples=200, deadline=None)
def test_every_scalar_that_is_written_reads_back_the_same_here_and_in_yaml_1_1(value):
    for read in (parse_yaml(f"k: {scalar_text(value)}", "x").value, yaml.safe_load(f"k: {scalar_text(value)}")):
        assert read == {"k": value}
        assert type(read["k"]) is type(value)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_config_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_config(text), Config)


def test_the_json_schema_refuses_unknown_keys_and_knows_the_ranges():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["LoraSettings"]["properties"]["r"]["minimum"] == 1


def test_generated_files_are_up_to_date():
    for name, text in runpy.run_path(str(ROOT / "scripts" / "generate_docs.py"))["generated"]().items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name} is out of date: make docs"


def test_the_settings_table_has_every_key():
    table = settings_table()
    assert all(f"| `{path[-1]}` |" in table for path in settings_of(Config))


def test_every_shipped_config_is_valid():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(path)


def test_a_config_that_extends_another_has_its_settings_under_its_own(tmp_path):
    (tmp_path / "under.yaml").write_text("seed: 3\nselectors:\n  rounds: 7\n  local: {steps: 2, lr: 0.5}\n")
    (tmp_path / "sub").mkdir()
    own = tmp_path / "sub" / "own.yaml"
    own.write_text(
        "extends: ../under.yaml\nselectors: {local: {lr: 0.25}}\nmodel:\n  lora: {layers_to_transform: [1]}\n"
    )
    cfg = load_config(own)
    local = cfg.selectors.local
    assert (cfg.seed, cfg.selectors.rounds, local.steps, local.lr) == (3, 7, 2, 0.25)
    assert cfg.model.lora.layers_to_transform == (1,)
    assert parse_config(dump_config(cfg)) == cfg  # what a run keeps extends nothing
    (tmp_path / "empty.yaml").write_text("extends: under.yaml\nselectors:\n  # rounds: 3\n  local:\n")
    assert load_config(tmp_path / "empty.yaml").selectors == load_config(tmp_path / "under.yaml").selectors
    above = tmp_path / "above.yaml"
    above.write_text("extends: sub/own.yaml\nmodel: {lora: {layers_to_transform: []}}\n")
    assert load_config(above, ["seed=9"]).model.lora.layers_to_transform == ()
    assert load_config(above, ["seed=9"]).seed == 9


@pytest.mark.parametrize(
    ("under", "own", "told"),
    [
        ("selectors:\n  rounds: -3", "extends: under.yaml", r"under\.yaml:2: selectors\.rounds"),
        ("selectors:\n  rounds: -3", "extends: under.yaml\nselectors: {rounds: -1}", r"own\.yaml:2: selectors\.rounds"),
        ("seed: 1", "\nextends: 7", r"own\.yaml:2: extends: 7 is not the path"),
        ("seed: 1", "extends: no.yaml", r"own\.yaml:1: extends: there is no file .*no\.yaml"),
        ("extends: own.yaml", "extends: under.yaml", r"under\.yaml:1: extends: own\.yaml is this file, or extends it"),
        ("seed: 1", "extends: own.yaml", r"own\.yaml:1: extends: own\.yaml is this file"),
        ("federate: {total_round_num: 3}", "extends: under.yaml", r"own\.yaml:1: extends: .*keys of the original"),
        ("- 1", "extends: under.yaml", r"under\.yaml:1: expected settings"),
    ],
)
def test_what_is_wrong_with_a_config_that_is_extended_is_told_where_it_stands(tmp_path, under, own, told):
    (tmp_path / "under.yaml").write_text(under)
    (tmp_path / "own.yaml").write_text(own)
    with pytest.raises(ConfigError, match=told):
        load_config(tmp_path / "own.yaml")


BASELINES = sorted((ROOT / "configs" / "baselines").glob("*.yaml"))


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_is_its_set_with_the_changes_that_its_name_tells(path):
    cfg = load_config(path)
    family, _, method = path.stem.partition("-")
    under = load_config(path.parents[1] / f"{family}.yaml")
    assert cfg.name == path.stem
    if not cfg.labels.selectors:
        assert cfg.data == under.data
    chosen = cfg.selectors
    expected = {
        "fedbis": chosen.num_adapters == 1 and cfg.evaluation.compare_raw,
        "fedbiscuit-u3": chosen.num_adapters == 3,
        "fedbiscuit-u5": chosen.num_adapters == 5,
        "fedrm": chosen.kind == "reward",
        "centralized": chosen.population == "centralized",
        "local": chosen.population == "local",
        "feddpo": chosen.local.objective == "dpo" and cfg.policy_model is None,
        "fedavg-sft": chosen.local.objective == "sft" and cfg.policy_model is None,
        "told": chosen.grouping == "fixed",
        "four-completions": cfg.generation.num_completions == 4 and cfg.labels.selectors == f"runs/{family}",
        "safe-prompts": cfg.data.prompts == "data/safe_rlhf" and cfg.labels.selectors == "runs/shp",
    }
    assert expected[method]
    assert f"`{method}`" in (ROOT / "docs" / "baselines.md").read_text()


def test_what_is_one_setting_is_replaced_as_a_whole_and_a_null_takes_a_section_away_that_may_be_missing(tmp_path):
    told = "selectors: {num_adapters: 2, grouping: fixed, groups: {ann: 0, bo: 1}, rounds: 30}\n"
    (tmp_path / "under.yaml").write_text(told + "policy_model: {base: elsewhere}\n")
    own = tmp_path / "own.yaml"
    own.write_text("extends: under.yaml\nselectors: {groups: {cy: 0, di: 1}}\n")
    assert load_config(own).selectors.groups == {"cy": 0, "di": 1}
    assert load_config(own).policy_model is not None
    own.write_text("extends: under.yaml\npolicy_model: null\n")
    assert load_config(own).policy_model is None


def test_the_page_of_baselines_tells_how_many_comparisons_each_row_sees():
    from fedbiscuit.federated.algorithm import num_warmup_rounds

    people = {"tldr": 53, "convarg": 58, "two_camps": 34}
    page = (ROOT / "docs" / "baselines.md").read_text()
    for path in [*BASELINES, *(ROOT / "configs" / f"{family}.yaml" for family in (*people, "shp"))]:
        cfg = load_config(path)
        chosen, family = cfg.selectors, path.stem.partition("-")[0]
        if cfg.labels.selectors:
            continue
        cohort = {"centralized": 1, "local": people.get(family)}.get(chosen.population, chosen.cohort_size)
        warmup = min(num_warmup_rounds(chosen), chosen.rounds)
        visits = warmup * (chosen.warmup_cohort_size or cohort) + (chosen.rounds - warmup) * cohort
        seen = visits * chosen.local.as_local().comparisons_per_round
        row = next(line for line in page.splitlines() if line.startswith(f"| `{family}-` |"))
        assert f"{seen:,}" in row, (path.stem, seen)
