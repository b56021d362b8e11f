"""The original's YAML files, run: selectors from one file, labels and the aligned policy from the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbiscuit.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SELECTOR, RLHF = str(EXAMPLES / "original_selector.yaml"), str(EXAMPLES / "original_rlhf.yaml")

SMALL = (
    "use_gpu False train.is_enable_half False dataloader.batch_size 2 train.local_update_steps 1 llm.grad_accum_step 1"
).split()


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> Path:
    """A folder of OpenAI's files, in their own format: six workers, and posts that nobody compared."""
    folder = tmp_path_factory.mktemp("summaries")

    def row(i: int, worker: int, split: str) -> dict:
        info = {"id": f"t3_{i}", "post": f"post {i} of w{worker}", "title": f"title {i}", "subreddit": "tea"}
        texts = [{"text": f" first {i}"}, {"text": f" second {i}"}]
        return {"info": info, "summaries": texts, "choice": i % 2, "worker": f"w{worker}", "split": split}

    splits = ["train"] * 6 + ["valid1"] * 2 + ["valid2"] * 2
    lines(folder / "batch3.json", [row(i, w, split) for w in range(6) for i, split in enumerate(splits)])
    posts = [
        {"subreddit": "cats", "title": f"t {i}", "post": f"nobody compared {i}", "summary": "s"} for i in range(20)
    ]
    lines(folder / "train.jsonl", posts)
    return folder


def test_selectors_of_one_file_label_for_the_policy_of_the_other_which_is_evaluated_judged_and_compared(
    summaries, tiny_model, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.chdir(tmp_path)
    here = ["data.root", str(summaries), "model.type", f"{tiny_model}@huggingface_llm", *SMALL]
    few = "federate.client_num 6 federate.sample_client_num 3 federate.total_round_num 7 llm.adapter.warmup.round 1"
    groups = "llm.adapter.grouping.round 2 federate.save_freq 3 eval.freq 3"
    assert main(["train", SELECTOR, *here, *few.split(), *groups.split()]) == 0
    assert sorted(path.name for path in Path("runs/summaries_u3/selectors").glob("u*")) == ["u0", "u1", "u2"]
    assert sorted(path.name for path in Path("runs/summaries_u3/checkpoints").iterdir()) == [
        "round-000003",
        "round-000006",
    ]

    few = "federate.total_round_num 2 llm.max_new_token 6 federate.save_freq -1 generation.temperature 1.0".split()
    Path("compared").mkdir()
    Path("compared/batch3.json").write_bytes((summaries / "batch3.json").read_bytes())
    assert main(["align", RLHF, "data.root", "compared", *here[2:], *few, "--selector", SELECTOR]) == 2
    assert "put train.jsonl, valid.jsonl and test.jsonl of tldr_3_filtered into" in capsys.readouterr().err
    assert not Path("runs/policy_summaries_u3").exists()
    assert main(["align", RLHF, *here, *few, "evaluation.num_prompts=2", "--selector", SELECTOR]) == 0
    run = Path("runs/policy_summaries_u3")
    rows = [json.loads(line) for line in (run / "preferences.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["prompt"].startswith("nobody compared") for row in rows)
    assert (run / "policy" / "adapter_model.safetensors").exists()
    assert not (run / "selectors").exists()

    again = ["train", SELECTOR, *here, "seed=1", "name=summaries_u3-other"]
    assert (
        main(
            [
                *again,
                *"federate.client_num 6 federate.sample_client_num 3 federate.total_round_num 4".split(),
                "llm.adapter.warmup.round",
                "1",
            ]
        )
        == 0
    )
    Path("runs/summaries_u3/selectors/u0").rename("u0-before")
    Path("runs/summaries_u3-other/selectors/u0").rename("runs/summaries_u3/selectors/u0")
    assert main(["align", str(run)]) == 5
    assert "labels.json: selectors.u0: selectors that labeled of this run" in capsys.readouterr().err
    Path("runs/summaries_u3/selectors/u0").rename("u0-other")
    Path("u0-before").rename("runs/summaries_u3/selectors/u0")
    assert main(["evaluate", str(run)]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["selectors"] is None
    assert [row["name"] for row in found["policy"]["judges"]] == [
        "the vote of the selectors of summaries_u3, which labeled"
    ]
    assert "original_rlhf.yaml: settings of the original FedBiscuit, translated" in caplog.text

    old = [RLHF, *here, *few, "evaluation.num_prompts=2"]
    capsys.readouterr()
    assert main(["config", *old, "--selector", SELECTOR]) == 0
    assert "name: policy_summaries_u3" in capsys.readouterr().out
    assert main(["evaluate", *old, "--selector", SELECTOR]) == 0
    assert json.loads((run / "evaluation.json").read_text()) == found
    plain = ["--protocol", "plain", "--model", str(tiny_model), "judge.max_tokens=4"]
    assert main(["judge", *old, "--selector", SELECTOR, *plain]) == 0
    (judged,) = json.loads((run / "evaluations/judge-plain.json").read_text())["judges"]
    assert (judged["policy"], judged["prompts"]) == ("aligned policy", 2)
    capsys.readouterr()
    assert main(["judge", *old, f"name={run.name}", *plain]) == 2
    assert "label in this run; add `--selector runs/summaries_u3`" in capsys.readouterr().err
    assert main(["compare", str(run)]) == 0
    told = capsys.readouterr().out
    assert "the vote of the selectors of summaries_u3, which labeled" in told
    assert "judged by a language model" in told


def test_a_run_that_takes_other_selectors_trains_none_and_says_which_are_missing(
    tiny_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\nthree\n")
    Path("mine.yaml").write_text(f"model: {{base: {tiny_model}}}\ndata: {{prompts: prompts.txt}}\n")
    assert main(["train", "mine.yaml", "labels.selectors=runs/other"]) == 2
    assert "takes the selectors of runs/other and trains none" in capsys.readouterr().err
    assert main(["align", "mine.yaml", "--selector", "mine.yaml"]) == 2
    assert "labels.selectors: runs/run has no trained selectors" in capsys.readouterr().err
    assert main(["align", RLHF]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_policy_tuned_on_summaries_is_merged_and_becomes_the_base_of_the_next_run(
    summaries, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    here = ["data.root", str(summaries), *SMALL]
    tune = (
        "data.type reddit-tldr-finetuning@llm trainer.type llmtrainer data.splitter iid federate.client_num 1".split()
    )
    one = "llm.adapter.count 1 federate.total_round_num 2 federate.sample_client_num 1 federate.save_to sft.ckpt eval.freq 0".split()
    assert main(["train", SELECTOR, "model.type", str(tiny_model), *here, *tune, *one]) == 0
    assert main(["export", "runs/sft", "--policy", "--merge", "--to", "tuned"]) == 0
    few = "federate.client_num 6 federate.sample_client_num 3 federate.total_round_num 4 llm.adapter.warmup.round 1"
    assert main(["train", SELECTOR, "model.type", "tuned@huggingface_llm", *here, *few.split()]) == 0
    assert "base: tuned" in Path("runs/summaries_u3/config.yaml").read_text()
