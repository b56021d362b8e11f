"""Each evaluation of its own through the command line, on one finished run of the two-layer model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fedbiscuit import pipeline
from fedbiscuit.cli import main
from fedbiscuit.config import parse_config
from fedbiscuit.models.rewards import load_reward_model
from fedbiscuit.pipeline.answers import answers_of, moved
from fedbiscuit.pipeline.judges import Gold, labeler, said
from fedbiscuit.pipeline.session import open_run, silent
from fedbiscuit.report.tasks import TABLES
from fedbiscuit.types import rng_for


def write_world(path: Path, num_clients: int = 6) -> Path:
    """Even clients like the answer that ends in 'x', odd ones the other."""
    rows = []
    for k in range(num_clients):
        rng = rng_for("world", k)
        for split, count in (("train", 8), ("val", 3), ("test", 4)):
            for i in range(count):
                good, bad = (f"{rng.randint(0, 99)}{letter}" for letter in ("xy" if k % 2 == 0 else "yx"))
                place = rng.randint(0, 1)
                a, b = (bad, good) if place else (good, bad)
                row = {"prompt": f"{split} question {k} {i}?", "output_a": a, "output_b": b, "choice": place}
                rows.append({**row, "client": f"person-{k}", "split": split})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(tmp_path: Path, model: Path, name: str, *changes: str):
    world = tmp_path / "world.jsonl"
    if not world.exists():
        write_world(world)
    text = f"""
name: {name}
runs_dir: {tmp_path / "runs"}
model: {{base: {model}, device: cpu, threads: 1, lora: {{r: 4, dropout: 0.0}}}}
data: {{path: {world}, template: choice, max_tokens: 300}}
selectors:
  num_adapters: 2
  rounds: 4
  cohort_size: 4
  warmup_rounds: 1
  regroup_every: 2
  eval_every: 0
  keep_every: 2
  local: {{steps: 2, batch_size: 2, lr: 0.01}}
generation: {{num_prompts: 6, num_completions: 3, max_new_tokens: 6, temperature: 1.0, batch_size: 4}}
alignment: {{steps: 4, batch_size: 2, lr: 0.01, keep_every: 2}}
evaluation: {{num_prompts: 6, bootstrap: 50, best_of: 5}}
"""
    return parse_config(text, changes, "test.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    tmp_path = tmp_path_factory.mktemp("tasks")
    return pipeline.run_all(config(tmp_path, tiny_model, "one"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result_of(run: Path, task: str) -> dict:
    return json.loads((run / "evaluations" / f"{task}.json").read_text())


def evaluate(run: Path, task: str, *words: str) -> dict:
    assert main(["evaluate", str(run), "--task", task, *words]) == 0
    return result_of(run, task)


def session_of(run: Path):
    from fedbiscuit.config import load_config

    return open_run(load_config(run / "config.yaml"), silent)


# Summarization


def test_summaries_are_scored_as_rouge_score_does_and_judged_against_the_people_s(finished, tmp_path, capsys):
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    trained = lines(finished / "preferences.jsonl")[0]["prompt"]
    posts = [
        {"post": f"The post {i}. It has a cat. It has a dog.", "summary": f"cat {i}", "title": "t"} for i in range(5)
    ]
    file = write_lines(tmp_path / "posts.jsonl", [{"post": trained, "summary": "seen"}, *posts])
    found = evaluate(finished, "summarization", f"evaluation.references={file}", "--checkpoint", "2")
    assert found["posts"] == 5
    assert found["left_out"]["posts with a reference that the policy was trained on"] == 1
    assert [one["name"] for one in found["policies"]] == [
        "raw policy",
        "after step 2",
        "the post's first three sentences",
    ]
    answers = lines(finished / "evaluations" / "summarization_answers.jsonl")
    scorer = scorers.RougeScorer(["rouge1"], use_stemmer=True)
    for one in found["policies"][:2]:
        mine = [row["answers"][one["name"]] for row in answers]
        scores = [scorer.score(row["reference"], text)["rouge1"] for row, text in zip(answers, mine, strict=True)]
        assert one["rouge"]["rouge1"]["f"] == pytest.approx(sum(s.fmeasure for s in scores) / 5)
        assert sum(one["judges"][0][key] for key in ("wins", "ties", "losses")) == 5
    assert found["policies"][2]["rouge"]["rouge1"]["recall"] == 1.0  # every word of the summary is in its post
    with session_of(finished) as session:
        prompts = [post["post"] for post in posts]
        greedy = [one[0]["text"] for one in answers_of(session, prompts, "checkpoints/step-000002/policy", greedy=True)]
        judge = labeler(session)
        references = [post["summary"] for post in posts]
        better = said(session, judge, prompts, greedy, references)
        worse = said(session, judge, prompts, references, greedy)
    assert greedy == [row["answers"]["after step 2"] for row in answers]
    assert better == pytest.approx([1 - p for p in worse])  # both orders
    assert found["policies"][1]["judges"][0]["wins"] == sum(p > 0.5 for p in better)
    shown = capsys.readouterr().out
    assert "ROUGE-Lsum" in shown
    assert "summarization.json is ready; next: " in shown


def test_summarization_without_references_says_what_to_name(finished, capsys):
    pytest.importorskip("rouge_score")
    assert main(["evaluate", str(finished), "--task", "summarization", "evaluation.references="]) == 2
    assert "error: evaluation.references: empty" in capsys.readouterr().err


def tldr_files(folder: Path) -> Path:
    """Comparisons of four workers and filtered posts, as OpenAI's files have them."""
    folder.mkdir()
    rows = []
    for i in range(60):
        split = "train" if i < 40 else "valid2"
        info = {"post": f"Post {i}.", "title": "A title", "subreddit": "pets", "id": f"t3_{i}"}
        summaries = [{"text": f"{i}x"}, {"text": f"{i}y"}]
        rows.append(
            {
                "info": info,
                "summaries": summaries,
                "choice": i % 2,
                "worker": f"w{i % 4}",
                "split": split,
                "batch": "batch3",
            }
        )
    write_lines(folder / "batch3.json", rows)
    posts = [
        {"id": f"t3_f{i}", "subreddit": "pets", "title": f"Title {i}", "post": f"Fresh {i}.", "summary": f"s {i}"}
        for i in range(50)
    ]
    (folder / "openai" / "tldr_3_filtered").mkdir(parents=True)
    write_lines(folder / "openai" / "tldr_3_filtered" / "test.jsonl", posts)
    return folder


def test_with_tl_dr_the_references_are_those_of_the_posts_that_were_held_out(tmp_path, tiny_model):
    pytest.importorskip("rouge_score")
    changes = [
        "data.source=tldr",
        f"data.path=[{tldr_files(tmp_path / 'tldr')}]",
        "data.template=tldr",
        "data.max_tokens=500",
    ]
    run = pipeline.run_all(config(tmp_path, tiny_model, "tldr", *changes))
    found = evaluate(run, "summarization")
    assert found["references"] == [str(tmp_path / "tldr" / "openai" / "tldr_3_filtered" / "test.jsonl")]
    with session_of(run) as session:
        held_out = session.held_out_prompts[:6]
        trained = set(session.prompts)
    answers = lines(run / "evaluations" / "summarization_answers.jsonl")
    assert {row["prompt"] for row in answers} == set(held_out)
    assert not {row["prompt"] for row in answers} & trained
    assert all(row["reference"] == row["prompt"].replace("Fresh", "s").rstrip(".") for row in answers)
    assert sum(found["policies"][1]["judges"][0][key] for key in ("wins", "ties", "losses")) == found["posts"]


def test_a_run_with_the_selectors_of_another_one_is_evaluated_by_them(finished, tmp_path, tiny_model, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Ask {i}?\n" for i in range(20)))
    changes = ["data.path=[]", f"data.prompts={prompts}", f"labels.selectors={finished}", "selectors.num_adapters=1"]
    run = pipeline.align(config(tmp_path, tiny_model, "borrowed", *changes))
    rows = [row for row in lines(finished.parents[1] / "world.jsonl") if row["split"] == "test"]
    pairs = f"evaluation.pairs={write_lines(tmp_path / 'test.jsonl', rows)}"
    assert evaluate(run, "agreement", pairs)["rows"] == evaluate(finished, "agreement", pairs)["rows"]
    world = f"evaluation.pairs={finished.parents[1] / 'world.jsonl'}"
    found = evaluate(run, "agreement", world)
    assert found["left_out"]["labelled pairs: the selectors were trained on them"] == 6 * 8
    assert (found["pairs"], found["trained_elsewhere"]) == (6 * (3 + 4), False)
    found = evaluate(run, "perplexity")
    assert (found["people"], found["policies"][1]["people_under_policy"]) == (0, None)
    assert "the selectors of one, which labeled" in found["policies"][1]["judges"][0]["name"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--task", "agreement", pairs, "--checkpoints"]) == 2
    assert "ask for checkpoints of that run" in capsys.readouterr().err


# Best of n


def test_the_best_of_n_is_the_one_that_wins_a_knock_out_and_the_plain_one_took_no_part(finished, capsys):
    found = evaluate(finished, "best-of-n", "evaluation.best_of=3")
    assert (found["n"], found["prompts"]) == (3, 6)
    rows = lines(finished / "evaluations" / "best-of-n_answers.jsonl")
    with session_of(finished) as session:
        judge = labeler(session)
        for policy, folder in (("raw policy", None), ("aligned policy", "policy")):
            mine = [row for row in rows if row["policy"] == policy]
            prompts = [row["prompt"] for row in mine]
            written = answers_of(session, prompts, folder, "best of n", 4, greedy=False)
            for row, four in zip(mine, written, strict=True):
                a, b, c, plain = (one["text"] for one in four)
                first = a if said(session, judge, [row["prompt"]], [a], [b])[0] >= 0.5 else b
                best = first if said(session, judge, [row["prompt"]], [first], [c])[0] >= 0.5 else c
                assert (row["best"], row["plain"]) == (best, plain)
            vote = next(one for one in found["policies"] if one["name"] == policy)["judges"][0]
            better = said(session, judge, prompts, [r["best"] for r in mine], [r["plain"] for r in mine])
            assert (vote["wins"], vote["ties"]) == (sum(p > 0.5 for p in better), sum(p == 0.5 for p in better))
    assert "which chose" in capsys.readouterr().out


def test_best_of_n_needs_no_aligned_policy_and_asks_other_judges(finished, tmp_path, tiny_model):
    run = pipeline.train_selectors(config(tmp_path, tiny_model, "only"))
    found = evaluate(run, "best-of-n", "evaluation.best_of=2", f"evaluation.judges=[{finished}]")
    assert [one["name"] for one in found["policies"]] == ["raw policy"]
    names = [judge["name"] for judge in found["policies"][0]["judges"]]
    assert names == ["the selectors' vote, which chose", "the selectors of one, 6 of its 6 clients are ours"]


# Agreement


def test_agreement_is_by_adapter_by_client_and_in_both_orders_and_leaves_out_what_was_trained_on(finished, capsys):
    world = finished.parents[1] / "world.jsonl"
    found = evaluate(finished, "agreement", f"evaluation.pairs={world}")
    general = json.loads((finished / "evaluation.json").read_text())["selectors"]
    assert found["left_out"]["labelled pairs: the selectors were trained on them"] == 6 * 8
    assert [row["name"] for row in found["rows"]] == [
        "selector u0", "selector u1", "vote of all selectors (mean)", "the longer answer",
    ]  # fmt: skip
    tested = {client: one["vote"] for client, one in general["clients"].items()}
    parts = found["rows"][2]["client"]["parts"]
    assert set(parts) == set(tested)
    assert all(part["pairs"] == 3 + 4 for part in parts.values())  # validation and test
    shown = capsys.readouterr().out
    assert "Accuracy by client" in shown
    assert "mean over 6 clients" in shown


def test_agreement_says_where_it_is_not_known_what_the_selectors_were_trained_on(finished, tmp_path, capsys):
    kept = (finished / "manifest.json").read_text()
    pairs = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "5x", "rejected": "5y"}])
    told = "it is not known here which of the pairs they were trained on"
    try:
        (finished / "manifest.json").write_text(json.dumps(json.loads(kept) | {"real_clients": True}))
        assert evaluate(finished, "agreement", f"evaluation.pairs={pairs}")["trained_elsewhere"]
        assert told in " ".join(capsys.readouterr().out.split())
    finally:
        (finished / "manifest.json").write_text(kept)
    evaluate(finished, "agreement", f"evaluation.pairs={pairs}")
    assert told not in " ".join(capsys.readouterr().out.split())


def test_agreement_with_held_out_comparisons_is_that_of_the_general_evaluation(finished, tmp_path):
    rows = [row for row in lines(finished.parents[1] / "world.jsonl") if row["split"] == "test"]
    file = write_lines(tmp_path / "test.jsonl", rows)
    found = evaluate(finished, "agreement", f"evaluation.pairs={file}")
    general = json.loads((finished / "evaluation.json").read_text())["selectors"]
    voted = next(row for row in general["rows"] if row["name"] == "vote of all selectors")
    mine = found["rows"][2]
    assert mine["accuracy"] == pytest.approx(voted["accuracy_comparisons"])
    assert mine["client"]["mean"]["accuracy"] == pytest.approx(voted["accuracy"])
    assert mine["flip_rate"] == pytest.approx(voted["flip_rate"])
    assert mine["accuracy_in_order"] == pytest.approx(voted["accuracy_in_order"])
    for client, one in general["clients"].items():
        assert found["rows"][one["adapter"]]["client"]["parts"][client]["accuracy"] == pytest.approx(one["accuracy"])


def test_reward_bench_s_records_are_read_and_counted_by_subset(finished, tmp_path):
    rows = [
        {
            "prompt": f"p {i}",
            "chosen": "5x",
            "rejected": "a longer 5y",
            "subset": f"s{i % 2}",
            "id": i,
            "chosen_model": "m",
        }
        for i in range(6)
    ]
    found = evaluate(finished, "agreement", f"evaluation.pairs={write_lines(tmp_path / 'bench.jsonl', rows)}")
    assert found["pairs"] == 6
    longer = found["rows"][-1]
    assert (longer["name"], longer["accuracy"]) == ("the longer answer", 0.0)
    assert {name: part["pairs"] for name, part in longer["subset"]["parts"].items()} == {"s0": 3, "s1": 3}


def test_agreement_along_the_way_and_of_one_round(finished, tmp_path, capsys):
    rows = [row for row in lines(finished.parents[1] / "world.jsonl") if row["split"] == "test"]
    pairs = f"evaluation.pairs={write_lines(tmp_path / 'test.jsonl', rows)}"
    along = evaluate(finished, "agreement", pairs, "--checkpoints")["rows"]
    assert [(row["round"], row["name"]) for row in along[:3]] == [
        (2, "selector u0, after round 2"), (2, "selector u1, after round 2"), (2, "vote of all selectors (mean), after round 2"),
    ]  # fmt: skip
    one = evaluate(finished, "agreement", pairs, "--checkpoint", "2")["rows"]
    assert one[:3] == along[:3]
    assert [row["round"] for row in one] == [2, 2, 2, None]
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--task", "agreement", pairs, "--checkpoint", "3"]) == 2
    assert "no selectors were kept after round 3; kept: 2, 4" in capsys.readouterr().err


# AlpacaEval


def test_alpaca_eval_gets_a_list_of_answers_from_the_raw_and_the_aligned_policy(finished, tmp_path):
    asked = [{"instruction": f"Do {i}.", "dataset": "koala", "output": "x", "generator": "y"} for i in range(3)]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(asked))
    found = evaluate(finished, "alpaca-eval", f"evaluation.instructions={tmp_path / 'alpaca_eval.json'}")
    assert [one["file"] for one in found["policies"]] == [
        "evaluations/alpaca-eval/raw/alpaca_eval.json",
        "evaluations/alpaca-eval/aligned/alpaca_eval.json",
    ]
    raw, aligned = (json.loads((finished / one["file"]).read_text()) for one in found["policies"])
    for outputs, name in ((raw, "one-raw"), (aligned, "one-aligned")):
        assert [list(one) for one in outputs] == [["instruction", "output", "generator", "dataset"]] * 3
        assert all(isinstance(one["output"], str) for one in outputs)
        assert {(one["generator"], one["dataset"]) for one in outputs} == {(name, "koala")}
        assert [one["instruction"] for one in outputs] == ["Do 0.", "Do 1.", "Do 2."]
    assert [one["output"] for one in raw] != [one["output"] for one in aligned]
    assert found["system"] == ""
    assert len(TABLES["alpaca-eval"][1](found)) == 1
    assert "'Be brief.'" in TABLES["alpaca-eval"][1]({**found, "system": "Be brief."})[1]


def test_the_package_alpaca_eval_reads_both_files_and_counts_as_by_hand(finished, tmp_path, monkeypatch):
    alpaca = pytest.importorskip("alpaca_eval", reason="pip install alpaca-eval==0.6.6 'setuptools<81'")
    completions = pytest.importorskip("alpaca_eval.decoders.test")
    (tmp_path / "asked.json").write_text(
        json.dumps([{"instruction": f"Do {i}.", "dataset": "koala"} for i in range(5)])
    )
    found = evaluate(finished, "alpaca-eval", f"evaluation.instructions={tmp_path / 'asked.json'}")
    raw, aligned = (finished / one["file"] for one in found["policies"])

    def by_alphabet(prompts, **_):
        pairs = [prompt.split("<|>")[1:] for prompt in prompts]
        said = ["tie" if one == two else "first" if one > two else "second" for one, two in pairs]
        zeros = [0.0] * len(said)
        return {"completions": said, "completions_all": said, "price_per_example": zeros, "time_per_example": zeros}

    monkeypatch.setattr(completions, "test_completions", by_alphabet)
    judge = tmp_path / "alphabet"
    judge.mkdir()
    (judge / "prompt.txt").write_text("{instruction}<|>{output_1}<|>{output_2}")
    reading = {"outputs_to_match": {1: "^first$", 2: "^second$", 1.5: "^tie$"}}
    how = {"prompt_template": str(judge / "prompt.txt"), "fn_completions": "test_completions", "batch_size": 1,
           "fn_completion_parser": "regex_parser", "completion_parser_kwargs": reading}  # fmt: skip
    (judge / "configs.yaml").write_text(yaml.safe_dump({"alphabet": how}))
    board, _ = alpaca.evaluate(
        model_outputs=str(aligned), reference_outputs=str(raw), annotators_config=judge, precomputed_leaderboard=None,
        fn_metric="get_winrate", sort_by="win_rate", output_path=None, caching_path=None, is_return_instead_of_print=True,
    )  # fmt: skip
    texts = [[one["output"] for one in json.loads(path.read_text())] for path in (raw, aligned)]
    wins = [1.0 if two > one else 0.5 if two == one else 0.0 for one, two in zip(*texts, strict=True)]
    assert 0.0 in wins
    assert 1.0 in wins
    assert board["win_rate"].to_dict() == {"one-aligned": pytest.approx(100 * sum(wins) / len(wins))}
    assert board["n_total"].to_dict() == {"one-aligned": 5}


# Perplexity


def test_perplexities_and_distance_are_what_the_model_says_token_by_token(finished):
    found = evaluate(finished, "perplexity", "--checkpoints")
    raw, middle, aligned = found["policies"]
    assert [one["name"] for one in (raw, middle, aligned)] == ["raw policy", "after step 2", "aligned policy"]
    assert (raw["kl"], raw["judges"]) == (0.0, [])
    assert found["people"] == 6
    assert raw["people_under_policy"]["perplexity"] != aligned["people_under_policy"]["perplexity"]
    with session_of(finished) as session, torch.no_grad():
        lm, how = session.policy_lm, session.cfg.generation
        prompts = session.held_out_prompts[:6]
        written = [one[0] for one in answers_of(session, prompts, "policy")]
        assert aligned["kl"] == pytest.approx(sum(moved(session, prompts, written)) / 6, abs=1e-5)
        nats, tokens = 0.0, 0
        with lm.adapter_off(), lm.padded() as plain:
            for prompt, one in zip(prompts, written, strict=True):
                ids = lm.chat_prompt(prompt, how.system, how.chat)
                whole = torch.tensor([[*ids, *one["token_ids"]]])
                log_probs = torch.log_softmax(plain(whole).logits[0].float(), -1)
                for place, token in enumerate(one["token_ids"], len(ids) - 1):
                    nats, tokens = nats - float(log_probs[place, token]), tokens + 1
    assert aligned["answers_under_raw"]["perplexity"] == pytest.approx(
        float(torch.tensor(nats / tokens).exp()), rel=1e-3
    )
    assert main(["evaluate", str(finished), "--checkpoints"]) == 0
    general = json.loads((finished / "evaluation.json").read_text())["policy"]
    assert aligned["judges"][0] == general["judges"][0]
    along = general["checkpoints"][0]
    assert along == {
        "step": 2,
        "words": middle["words"],
        "kl": pytest.approx(middle["kl"], abs=1e-5),
        **middle["judges"][0],
    }
    assert aligned["words"] == general["length"]["aligned"]


def test_the_report_shows_what_was_evaluated(finished):
    evaluate(finished, "perplexity", "--checkpoints")
    assert main(["report", str(finished)]) == 0
    page = (finished / "report.html").read_text()
    assert "Further evaluations" in page
    assert "Signs of reward hacking" in page
    assert '<figure id="signs">' in page


# Judges from elsewhere


def test_a_reward_model_and_the_scores_of_a_fedrm_run_judge_beside_the_selectors(
    finished, tmp_path, tiny_model, make_reward_model, capsys
):
    """The model's score falls with the number of an answer's last byte, so its verdicts can be read off the answers."""
    gold = make_reward_model(tmp_path / "gold")
    (tmp_path / "world.jsonl").write_bytes((finished.parents[1] / "world.jsonl").read_bytes())
    rewards = pipeline.train_selectors(config(tmp_path, tiny_model, "fedrm", "selectors.kind=reward"))
    found = evaluate(finished, "perplexity", "--checkpoints", f"evaluation.judges=[{gold},{rewards}]")
    assert "the reward model gold" in capsys.readouterr().out
    with session_of(finished) as session:
        prompts = session.held_out_prompts[:6]
        raw, middle, last = (
            [one[0]["text"] for one in answers_of(session, prompts, folder)]
            for folder in (None, "checkpoints/step-000002/policy", "policy")
        )
        encode = session.policy_lm.encode
        scores = [
            [-encode(prompt + text)[-1] for prompt, text in zip(prompts, texts, strict=True)]
            for texts in (raw, middle, last)
        ]
    assert scores[0] != scores[1] != scores[2]
    for policy, theirs in zip(found["policies"][1:], scores[1:], strict=True):
        own, judged, fedrm = policy["judges"]
        assert (own["independent"], judged["name"], judged["independent"]) == (False, "the reward model gold", True)
        assert fedrm["name"] == "the selectors of fedrm, 6 of its 6 clients are ours"
        assert judged["wins"] == sum(a > b for a, b in zip(theirs, scores[0], strict=True))
        assert judged["losses"] == sum(a < b for a, b in zip(theirs, scores[0], strict=True))
        assert sum(fedrm[key] for key in ("wins", "losses", "ties")) == 6
    assert main(["evaluate", str(finished)]) == 0
    judges = json.loads((finished / "evaluation.json").read_text())["policy"]["judges"]
    assert judges[1] == found["policies"][2]["judges"][1]
    capsys.readouterr()
    assert main(["evaluate", str(finished), f"evaluation.judges=[{tiny_model}]"]) == 2
    assert "which gives no score; name a sequence classifier" in capsys.readouterr().err
    assert main(["evaluate", str(finished), f"evaluation.judges=[{tmp_path}]"]) == 2
    assert "or of a reward model of transformers" in capsys.readouterr().err
    assert main(["evaluate", str(finished), "evaluation.judges=[]"]) == 0


def test_verdicts_of_a_reward_model_by_hand(finished, tmp_path, make_reward_model):
    gold = make_reward_model(tmp_path / "gold", context=8)
    with session_of(finished) as session:
        model = load_reward_model(str(gold), session.cfg.model)
        judge = Gold("gold", model)
        first, second = ["xa", "xb", "xa", "x"], ["xb", "xa", "xa", "longer than eight"]
        found = said(session, judge, ["p"] * 4, first, second)
        a, b = model.scores(["p", "p"], ["xa", "xb"])
        assert found == pytest.approx([1 / (1 + math.exp(b - a)), 1 / (1 + math.exp(a - b)), 0.5, 0.5])
        assert found[0] > 0.5 > found[1]
        assert session.left_out["pairs of answers longer than gold reads, counted as ties"] == 1


# What cannot be done


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task", "perplexty"], "no task 'perplexty'; did you mean perplexity?"),
        (["--task", "perplexity", "--checkpoint", "2", "--checkpoints"], "give one of the two"),
        (["--checkpoint", "2"], "only with --task"),
        (["--task", "perplexity", "--checkpoint", "3"], "no policy was kept after step 3; kept: 2, 4"),
        (["--task", "agreement", "evaluation.pairs=[]"], "evaluation.pairs: empty"),
        (["--task", "alpaca-eval", "evaluation.instructions="], "evaluation.instructions: empty"),
    ],
)
def test_what_cannot_be_asked_is_said_with_the_way_out(finished, words, told, capsys):
    assert main(["evaluate", str(finished), *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_stage_that_is_missing_is_named_with_its_command(tmp_path, tiny_model, finished, capsys, caplog):
    (tmp_path / "world.jsonl").write_bytes((finished.parents[1] / "world.jsonl").read_bytes())
    run = pipeline.train_selectors(config(tmp_path, tiny_model, "early", "selectors.keep_every=0"))
    for task in ("perplexity", "alpaca-eval", "summarization"):
        if task == "summarization":
            pytest.importorskip("rouge_score")
        file = write_lines(tmp_path / "any.jsonl", [{"prompt": "a", "reference": "b"}])
        words = [f"evaluation.instructions={file}", f"evaluation.references={file}"]
        assert main(["evaluate", str(run), "--task", task, *words]) == 2
        assert f"run `fedbiscuit align {run}` first" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--checkpoints"]) == 0
    assert "nothing was kept along the way, so only the last is looked at" in caplog.text
    capsys.readouterr()
    shutil.rmtree(run / "selectors")
    assert main(["evaluate", str(run), "--task", "agreement", f"evaluation.pairs={tmp_path / 'world.jsonl'}"]) == 2
    assert f"run `fedbiscuit train {run}` first" in capsys.readouterr().err


def test_without_rouge_score_the_command_to_install_it_is_shown(finished, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert main(["evaluate", str(finished), "--task", "summarization"]) == 3
    assert "pip install 'fedbiscuit[eval]'" in capsys.readouterr().err
