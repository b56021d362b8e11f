"""Files of the original FedBiscuit: each key means here what it meant there, or says that it has no effect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedbiscuit.config import dump_config, load_translated, parse_config
from fedbiscuit.data.sources import read_prompts
from fedbiscuit.original import DATA, KEYS
from fedbiscuit.pipeline import align, run_all, train_selectors
from fedbiscuit.strict_yaml import read_yaml
from fedbiscuit.types import ConfigError, DataError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SELECTOR, RLHF = EXAMPLES / "original_selector.yaml", EXAMPLES / "original_rlhf.yaml"
SHARED = Path(__file__).resolve().parents[3] / "shared"
DOCS = Path(__file__).resolve().parents[2] / "docs"

MINIMAL = "data: {type: reddit-tldr-comparison-choice@llm, splitter: meta}\nmodel: {type: m@huggingface_llm}\nllm: {adapter: {use: True}}\n"


def old(text: str = "", *overrides: str):
    return parse_config(MINIMAL + text, overrides, "old.yaml")


def test_a_selector_file_becomes_the_settings_that_it_meant():
    cfg, _ = load_translated(SELECTOR)
    chosen = cfg.selectors
    assert cfg.name == "summaries_u3"
    assert (cfg.data.source, cfg.data.path, cfg.data.template, cfg.data.max_tokens) == (
        "tldr",
        ("data/",),
        "tldr",
        1024,
    )
    assert (cfg.data.partition.by, cfg.data.partition.num_clients) == ("annotator", 53)
    assert cfg.data.choice_tokens == (" A", " B")
    assert (cfg.model.base, cfg.model.dtype, cfg.model.device) == ("google/gemma-2b", "bfloat16", "auto")
    lora = cfg.model.lora
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (8, 16.0, 0.05, ("q_proj", "v_proj"))
    assert (chosen.num_adapters, chosen.rounds, chosen.cohort_size) == (3, 500, 5)
    assert (chosen.warmup_rounds, chosen.regroup_every, chosen.grouping) == (50, 50, "greedy")
    assert (chosen.weights, chosen.scale, chosen.patience) == ("equal", "population", 0)
    assert (chosen.eval_every, chosen.keep_every) == (50, 50)
    local = chosen.local
    assert (local.objective, local.steps, local.batch_size, local.grad_accum) == ("choice", 30, 8, 2)
    assert (local.optimizer, local.lr, local.betas) == ("adamw", 1e-5, (0.9, 0.95))
    assert (local.weight_decay, local.max_grad_norm) == (0.01, 0.0)


def test_an_alignment_file_counts_its_rounds_in_steps():
    cfg, notes = load_translated(RLHF)
    assert (cfg.alignment.steps, cfg.alignment.keep_every) == (150 * 30, 50 * 30)
    assert (cfg.alignment.batch_size, cfg.alignment.grad_accum) == (4, 8)
    assert (cfg.alignment.optimizer, cfg.alignment.lr, cfg.alignment.beta) == ("rmsprop", 1e-6, 0.1)
    assert (cfg.generation.max_new_tokens, cfg.generation.num_completions) == (80, 2)
    assert cfg.model.base == "mlabonne/Gemmalpaca-2B"
    assert "federate.client_num: no effect in files that align" in notes


def test_a_placeholder_in_a_name_is_reported_or_filled_and_elsewhere_an_error():
    cfg, notes = load_translated(RLHF)
    assert cfg.name == "policy"
    assert any("federate.save_to: <choice_ckpt> is a placeholder" in note for note in notes)
    cfg, notes = load_translated(RLHF, fill="summaries_u3")
    assert cfg.name == "policy_summaries_u3"
    assert not any("placeholder" in note for note in notes)
    with pytest.raises(ConfigError, match=r"old\.yaml:2: model\.type: '<base>@huggingface_llm' has a placeholder"):
        parse_config(MINIMAL.replace("m@", "<base>@"), name="old.yaml")


def test_every_key_without_effect_is_told_once():
    _, notes = load_translated(SELECTOR)
    idle = [
        "federate.mode", "federate.share_local_model", "federate.online_aggr", "data.splits", "llm.chat.max_len",
        "train.batch_or_epoch", "criterion.type", "eval.metrics", "eval.best_res_update_round_wise_key", "eval.count_flops", "expname",
    ]  # fmt: skip
    assert [note.split(":")[0] for note in notes if "no effect" in note] == idle


@pytest.mark.parametrize(
    ("kind", "key", "told"),
    [
        ("reddit-tldr-best", "llm: {reward_coeff: 0.5, ", "llm.reward_coeff: no effect here: it is the beta of DPO"),
        ("reddit-tldr-best", "trainer: {choices: [C, D]}\nllm: {", "trainer.choices: no effect here: only selectors answer by a letter"),
        ("shp-safe", "llm: {", "data.root: no effect here: data.prompts says where the prompts are"),
    ],
)  # fmt: skip
def test_a_key_that_is_idle_in_this_kind_of_file_is_told_and_changes_nothing(tmp_path, kind, key, told):
    path = tmp_path / "old.yaml"
    text = MINIMAL.replace("reddit-tldr-comparison-choice", kind).replace("data: {", "data: {root: mine, ")
    path.write_text(text.replace("llm: {", key))
    cfg, notes = load_translated(path)
    assert told in notes
    path.write_text(text)
    assert load_translated(path)[0] == cfg
    assert (cfg.selectors.local.dpo_beta, cfg.data.choice_tokens) == (0.1, (" A", " B"))


TRAINERS = {"choice": "llmrewardchoicetrainer", "dpo": "llmdporewardtrainer", "sft": "llmtrainer"}
OTHERS = {
    "federate.save_to": "checkpoints/other.ckpt", "expname": "e1/other", "data.root": "elsewhere", "data.splits": "[0.8, 0.1, 0.1]",
    "data.splitter": "lda", "llm.adapter.args": "[{r: 5}]", "llm.adapter.count": 4, "train.optimizer.type": "SGD",
    "train.optimizer.betas": "(0.8, 0.7)", "criterion.type": "MAELoss", "trainer.choices": "[C, D]", "eval.metrics": "[acc]",
    "eval.best_res_update_round_wise_key": "test_loss", "model.type": "b@huggingface_llm", "federate.total_round_num": 700, "llm.tok_len": 700,
}  # fmt: skip
"""Another value of an old key than the examples have; keys that permit one value only are not here."""


@pytest.mark.parametrize(("kind", "job"), [(kind, job) for kind, (job, _) in DATA.items()])
@pytest.mark.parametrize("off", ["use_gpu", "llm.adapter.warmup.use", ""])
def test_every_old_key_has_an_effect_or_says_that_it_has_none(kind, job, off):
    fixed = [f"data.type={kind}@llm", "data.splitter=iid", *([f"{off}=False"] if off else [])]
    fixed += [f"trainer.type={TRAINERS[job]}"] if job in TRAINERS else []
    fixed += ["llm.adapter.count=1"] if job in ("sft", "dpo") else []
    words = {word.partition("=")[0]: word for word in fixed}
    path = RLHF if job == "align" else SELECTOR
    before = load_translated(path, fixed)[0]
    silent = []
    for key, known in KEYS.items():
        other = OTHERS.get(key) if known.kind in (str, list) else {bool: "True", int: 7, float: 0.3}[known.kind]
        other = "False" if known.kind is bool and old_value(path, key) is True else OTHERS.get(key, other)
        if other is None or key in ("data.type", "llm.adapter.use", "llm.adapter.grouping.use", "federate.online_aggr"):
            continue
        if key in words and key != "data.splitter":
            continue
        after, notes = load_translated(
            path, [*(word for word in fixed if not word.startswith(f"{key}=")), f"{key}={other}"]
        )
        told = any(note.startswith(f"{key}:") and "no effect" in note for note in notes)
        silent += [] if (after != before) != told else [(key, told)]
    assert silent == []


def old_value(path: Path, key: str):
    found = read_yaml(path).value
    for part in key.split("."):
        found = found.get(part, {}) if isinstance(found, dict) else {}
    return found


def test_an_old_file_that_aligns_trains_no_selectors_of_its_own(tmp_path):
    cfg, _ = load_translated(RLHF, [f"runs_dir={tmp_path}"])
    for stage in (train_selectors, run_all):
        with pytest.raises(
            ConfigError, match=r"selectors\.rounds: 0 rounds train no selectors; take those of another run"
        ):
            stage(cfg)
    with pytest.raises(
        ConfigError, match="there is no run here; name the run whose selectors label by adding `--selector"
    ):
        align(cfg)
    assert list(tmp_path.iterdir()) == []


def test_annotators_of_a_set_that_names_none_are_refused_by_the_old_key():
    text = MINIMAL.replace("reddit-tldr-comparison-choice", "shp-comparison")
    with pytest.raises(
        ConfigError, match=r"old\.yaml:1: data\.splitter: meta is by annotator, and shp-comparison names none"
    ):
        parse_config(text, name="old.yaml")


def test_several_selectors_label_by_majority_as_there():
    cfg, notes = load_translated(RLHF)
    assert cfg.labels.vote == "majority"
    assert any(note.startswith("labels.vote: 'majority'") for note in notes)


def test_a_file_that_trains_selectors_aligns_as_the_original_where_it_is_run_to_the_end():
    cfg, notes = load_translated(SELECTOR)
    assert (cfg.labels.vote, cfg.alignment.max_grad_norm, cfg.generation.chat) == ("majority", 0.0, False)
    assert cfg.generation.system.startswith("Summarize")
    for key in ("labels.vote", "alignment.max_grad_norm", "generation.chat", "generation.system"):
        assert any(note.startswith(f"{key}: ") for note in notes)


def test_what_a_translation_prints_is_a_config_of_ours():
    for path in (SELECTOR, RLHF):
        cfg, notes = load_translated(path)
        assert parse_config("".join(f"# {note}\n" for note in notes) + dump_config(cfg)) == cfg


def test_where_an_old_file_is_silent_the_originals_defaults_hold():
    chosen = old().selectors
    assert (chosen.rounds, chosen.cohort_size, chosen.patience, chosen.eval_every) == (50, 0, 5, 1)
    assert (chosen.weights, chosen.keep_every) == ("examples", 0)
    assert (chosen.local.optimizer, chosen.local.lr, chosen.local.batch_size, chosen.local.steps) == ("sgd", 0.1, 64, 1)
    assert (old().data.max_tokens, old().model.dtype, old().model.device) == (128, "float32", "cpu")


def test_one_adapter_is_plain_averaging_over_the_cohort():
    chosen = old().selectors
    assert (chosen.num_adapters, chosen.scale, chosen.grouping) == (1, "cohort", "prices")


@pytest.mark.parametrize(("kind", "expected"), DATA.items())
def test_each_kind_of_data_says_what_is_trained(kind, expected):
    cfg = parse_config(
        MINIMAL.replace("reddit-tldr-comparison-choice", kind), ["data.splitter=iid", "federate.client_num=4"]
    )
    job, source = expected
    assert cfg.data.source == source
    assert cfg.selectors.local.objective == (job if job in ("sft", "dpo") else "choice")


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [("shp-rlhf", "mine/shp@validation+test"), ("shp-safe", "hub:PKU-Alignment/PKU-SafeRLHF-prompt")],
)
def test_alignments_on_shp_read_prompts_alone_from_where_the_original_took_them(kind, prompts):
    text = MINIMAL.replace("reddit-tldr-comparison-choice", kind).replace("data: {", "data: {root: mine/shp, ")
    cfg = parse_config(text)
    assert (cfg.data.source, cfg.data.path, cfg.data.prompts) == ("jsonl", (), prompts)
    assert (cfg.data.template, cfg.generation.system) == ("shp", "")
    assert parse_config(text, ["data.prompts=other"]).data.prompts == "other"


def test_posts_of_tldr_in_the_folder_of_shp_do_not_become_its_prompts(tmp_path):
    (tmp_path / "shp").mkdir()
    (tmp_path / "shp" / "validation.json").write_text('{"history": "a question"}\n')
    (tmp_path / "shp" / "test.json").write_text('{"history": "another question"}\n')
    text = MINIMAL.replace("reddit-tldr-comparison-choice", "shp-rlhf").replace(
        "data: {", f"data: {{root: {tmp_path}, "
    )
    settings = parse_config(text).data
    assert sorted(read_prompts(settings)[0]) == ["a question", "another question"]
    (tmp_path / "tldr_3_filtered").mkdir()
    (tmp_path / "tldr_3_filtered" / "test.jsonl").write_text('{"post": "a post", "title": "t", "summary": "s"}\n')
    with pytest.raises(DataError, match=r"tldr_3_filtered/test\.jsonl:1: no column 'history' \(data\.prompt_column\)"):
        read_prompts(settings)
    assert parse_config(text, ["data.prompts=other", "data.prompt_column="]).data.prompt_column == ""


def test_fine_tuning_on_summaries_of_people_is_federated_sft():
    text = MINIMAL.replace("reddit-tldr-comparison-choice", "reddit-tldr-finetuning")
    cfg = parse_config(text, ["data.splitter=iid", "federate.client_num=4"])
    assert (cfg.data.source, cfg.data.template, cfg.selectors.local.objective) == ("tldr_sft", "tldr", "sft")
    assert cfg.generation.system.startswith("Summarize")


def test_long_training_comparisons_are_left_out_for_shp_only():
    limits = {}
    for kind, (job, _) in DATA.items():
        text = MINIMAL.replace("reddit-tldr-comparison-choice", kind) + "federate: {client_num: 4}"
        limits[kind] = parse_config(text, ["data.splitter=iid"]).data.max_train_tokens
        assert limits[kind] == (512 if kind.startswith("shp") and job != "align" else 0)


@pytest.mark.parametrize(("word", "by"), [("meta", "annotator"), ("lda", "dirichlet"), ("iid", "iid")])
def test_each_splitter_is_one_of_ours(word, by):
    cfg = old("federate: {client_num: 4}", "data.splitter", word)
    assert (cfg.data.partition.by, cfg.data.partition.num_clients, cfg.data.partition.alpha) == (by, 4, 0.3)


def test_old_and_new_keys_stand_side_by_side_on_the_command_line():
    cfg, _ = load_translated(
        SELECTOR, ["llm.adapter.count", "5", "federate.total_round_num=700", "seed=3", "name", "mine"]
    )
    assert (cfg.selectors.num_adapters, cfg.selectors.rounds, cfg.seed, cfg.name) == (5, 700, 3, "mine")


def test_warmup_and_grouping_can_be_switched_as_there():
    assert load_translated(SELECTOR, ["llm.adapter.warmup.use", "False"])[0].selectors.warmup_rounds == 0
    with pytest.raises(ConfigError, match=r"llm\.adapter\.grouping\.use: several adapters need groups"):
        load_translated(SELECTOR, ["llm.adapter.grouping.use", "False"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("federate: {total_rounds: 3}", r"old\.yaml:4: federate\.total_rounds: not a key .* nearest is federate\.total_round_num"),
        ("llm: {lr: 3}", r"nearest is train\.optimizer\.lr"),
        ("seed: 3\nuse_gpu: True", r"old\.yaml:4: seed: not a key of the original"),
        ("federate: {total_round_num: 1.5}", r"federate\.total_round_num: 1\.5 is not permitted; it must be a whole number"),
        ("federate: {total_round_num: True}", "must be a whole number"),
        ("use_gpu: 1", "use_gpu: 1 is not permitted; it must be True or False"),
        ("federate: {mode: distributed}", "it must be standalone"),
        ("federate: {online_aggr: True}", "sums are always streamed"),
        ("train: {batch_or_epoch: epoch}", "work out how many steps"),
        ("train: {optimizer: {type: Adam}}", "did you mean AdamW"),
        ("train: {optimizer: {betas: '(0.9)'}}", "expected two numbers"),
        ("train: {optimizer: {momentum: 0.9}}", r"train\.optimizer\.momentum: not a key"),
        ("trainer: {type: llmtrainer}", "does not fit data.type reddit-tldr-comparison-choice, which is for llmrewardchoicetrainer"),
        ("trainer: {choices: [A]}", "expected two letters"),
        ("federate: {total_round_num: 0}", r"old\.yaml:4: federate\.total_round_num: 0 is not permitted; it must be at least 1"),
        ("train: {local_update_steps: -1}", r"old\.yaml:4: train\.local_update_steps: -1 is not permitted; it must be at least 1"),
        ("train: {optimizr: {type: SGD}}", r"train\.optimizr\.type: not .* nearest is train\.optimizer\.type"),
        ("llm.grouping.round: 3", r"llm\.grouping\.round: not .* nearest is llm\.adapter\.grouping\.round"),
        ("llm.adapter.groupings.use: True", r"nearest is llm\.adapter\.grouping\.use"),
        ("optimizer: {type: SGD}", r"optimizer\.type: not .* nearest is train\.optimizer\.type"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_old_file_is_named_with_its_line_and_old_key(text, message):
    if text.startswith("llm"):
        text = text.replace("llm: ", "llm.").replace("{lr: 3}", "lr: 3")
    with pytest.raises(ConfigError, match=message):
        old(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "[{adapter_method: ia3}]",
            r"'ia3' is not permitted; it must be lora\. Supported are LoRA, rsLoRA.*FFA-LoRA.*QLoRA",
        ),
        ("[{use_dora: True}]", "use_dora is not a setting of the adapter that we know; there are .*use_rslora"),
        ("[{r: 4, alpha: 3}]", "alpha is not a setting of the adapter"),
        ("[]", "expected a list of one adapter"),
    ],
)
def test_only_lora_can_be_the_adapter(arguments, message):
    with pytest.raises(ConfigError, match=message):
        old("", f"llm.adapter.args={arguments}")


def test_rank_stabilized_lora_is_taken_over():
    assert not old("").model.lora.use_rslora
    assert old("", "llm.adapter.args=[{use_rslora: True}]").model.lora.use_rslora


def test_a_whole_model_or_a_pickled_checkpoint_is_refused():
    with pytest.raises(ConfigError, match="without it the whole model is trained"):
        old("", "llm.adapter.use=False")
    with pytest.raises(ConfigError, match="pickles, which we do not open"):
        old("", "model.load_from_local_pretrained_model_path=sft.ckpt")


@pytest.mark.parametrize("missing", ["type: reddit-tldr-comparison-choice@llm, ", "type: m@huggingface_llm"])
def test_what_an_old_file_must_have(missing):
    with pytest.raises(ConfigError, match=r"(data|model)\.type: missing"):
        parse_config(MINIMAL.replace(missing, ""))


def test_every_key_of_the_table_is_in_the_docs():
    page = (DOCS / "coming-from-the-original.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in page] == []


def written_out(cell: str) -> list[str]:
    """``a.b / .c / d`` -> a.b, a.c, a.d; ``a.b_one / _two`` with two words at the end -> a.b_two."""
    first, *others = cell.split(" / ")
    section = first.rpartition(".")[0]
    stem = "_".join(first.split("_")[:-2])
    return [first, *(stem + one if one[0] == "_" else f"{section}.{one.lstrip('.')}" for one in others)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="SKIPPED: needs ../shared, which is not part of this project")
def test_the_published_keys_and_files_are_all_known():
    text = (SHARED / "ORIGINAL_KEYS.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([a-z_.]+(?: / [a-z_.]+)*) \|", text, re.MULTILINE)
    published = {key for cell in cells if cell not in ("key", "original") for key in written_out(cell)}
    assert {"use_gpu", "llm.adapter.grouping.round", "train.optimizer.betas", "expname"} <= published
    assert published - KEYS.keys() == set()
    for path in sorted((SHARED / "original_configs").glob("*.yaml")):
        load_translated(path)
