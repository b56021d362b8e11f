"""`fedbiscuit judge` from the command line: by a two-layer model here and by a real HTTP server, stopped and gone on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from fedbiscuit import pipeline
from fedbiscuit.cli import main
from fedbiscuit.config import ModelSettings, parse_config
from fedbiscuit.evaluation.lengths import length_controlled
from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.lm import load_lm

KEY = "sk-very-secret-0123"
NUM_PROMPTS = 5


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, tiny_model) -> Path:
    """A run with an aligned policy and no evaluation, by a two-layer model in the demo world."""
    text = f"""
name: one
runs_dir: {tmp_path_factory.mktemp("aligned") / "runs"}
model: {{base: {tiny_model}, device: cpu, threads: 1, lora: {{r: 2, dropout: 0.0}}}}
data:
  source: demo
  template: choice
  demo: {{num_clients: 4, comparisons_per_client: 6, validation_per_client: 2, test_per_client: 2}}
selectors:
  rounds: 1
  cohort_size: 2
  local: {{steps: 1, batch_size: 2}}
generation: {{num_prompts: 4, max_new_tokens: 8, temperature: 1.0, batch_size: 2}}
alignment: {{steps: 3, batch_size: 2, lr: 0.05, keep_every: 1}}
evaluation: {{num_prompts: {NUM_PROMPTS}, bootstrap: 50, best_of: 3}}
"""
    cfg = parse_config(text, name="test.yaml")
    pipeline.train_selectors(cfg)
    pipeline.label(cfg)
    return pipeline.align(cfg)


@pytest.fixture
def run(aligned, tmp_path) -> Path:
    """A copy of it for one test."""
    shutil.copytree(aligned, tmp_path / "one")
    return tmp_path / "one"


def result(run: Path, protocol: str = "auto-j-pairwise") -> dict:
    return json.loads((run / f"evaluations/judge-{protocol}.json").read_text())["judges"][-1]


def replies(run: Path, protocol: str = "auto-j-pairwise") -> list[dict]:
    return [json.loads(line) for line in (run / f"evaluations/judge-{protocol}.jsonl").read_text().splitlines()]


def shown(text: str) -> tuple[str, str]:
    """The two answers in a question of ours, as they are shown."""
    found = re.search(r"<answer_a>\n(.*)\n</answer_a>.*<answer_b>\n(.*)\n</answer_b>", text, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def at(server, *more: str) -> list[str]:
    return ["--endpoint", server.url, "--model", "m", *more]


def answers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations/answers.jsonl").read_text().splitlines()]


# A model on this machine


def test_a_local_model_judges_in_both_orders_and_nothing_is_lost(run, tiny_model, capsys):
    words = ["judge", str(run), "--protocol", "auto-j", "--pairwise", "--model", str(tiny_model), "judge.max_tokens=12"]
    assert main(words) == 0
    out = capsys.readouterr()
    found = result(run)
    assert found["prompts"] == NUM_PROMPTS
    rows = replies(run)
    assert len(rows) == 2 * (NUM_PROMPTS - found["identical"]) >= 2
    assert {tuple(reversed(row["answers"])) for row in rows} == {tuple(row["answers"]) for row in rows}
    assert found["unparsable"]["replies"] == len(rows)  # two random layers decide nothing, and it is said
    assert found["unparsable"]["cut_off"] == sum(not row["finished"] for row in rows)
    assert found["win_rate"]["ties"] == NUM_PROMPTS
    assert f"Replies without a decision: {len(rows)} of {len(rows)}" in out.out
    assert "decided on less than half of the prompts" in out.out
    assert f"{tiny_model.name}, protocol auto-j-pairwise, {NUM_PROMPTS} prompts" in out.out
    assert str(run / "evaluations/judge-auto-j-pairwise.json") in out.out
    assert str(tiny_model.parent) not in (run / "evaluations/judge-auto-j-pairwise.jsonl").read_text()
    assert "sent to" not in out.err
    before = (run / "evaluations/judge-auto-j-pairwise.jsonl").read_bytes()
    assert main(words) == 0
    assert (run / "evaluations/judge-auto-j-pairwise.jsonl").read_bytes() == before
    assert result(run)["replies_from_before"] == len(rows)


def test_a_question_too_long_for_a_local_judge_is_said(run, tiny_model, capsys):
    assert main(["judge", str(run), "--protocol", "plain", "--model", str(tiny_model), "judge.max_tokens=2040"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "took none of the first 3 questions" in told
    assert "and a reply of 2040, but" in told


def test_what_is_missing_is_said_before_anything_is_written(run, tmp_path, chat_server, capsys, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    before = (run / "config.yaml").read_bytes()
    assert main(["judge", str(run)]) == 2
    assert "judge.model: empty; name who judges" in capsys.readouterr().err
    assert main(["judge", str(run), *at(chat_server), "judge.api_key_env=JUDGE_KEY"]) == 2
    assert "the environment variable JUDGE_KEY is not set" in capsys.readouterr().err
    monkeypatch.setenv("JUDGE_KEY", f"{KEY} \n {KEY}")
    assert main(["judge", str(run), *at(chat_server), "judge.api_key_env=JUDGE_KEY"]) == 2
    told = capsys.readouterr().err
    assert "holds characters that no key has" in told
    assert KEY not in told
    assert main(["judge", str(run), *at(chat_server), "--protocol", "autoj"]) == 2
    assert "auto-j, auto-j-pairwise or plain" in capsys.readouterr().err
    assert not (run / "evaluations").exists()
    assert (run / "config.yaml").read_bytes() == before
    shutil.rmtree(run / "policy")
    assert main(["judge", str(run), *at(chat_server)]) == 2
    assert "there is no aligned policy yet; run `fedbiscuit align" in capsys.readouterr().err
    assert chat_server.requests == []


# A server


def test_a_judge_of_one_mind_gives_the_win_rate_that_can_be_counted_by_hand(run, chat_server, capsys, caplog):
    """It prefers the longer answer wherever that stands, so both orders agree."""

    def longer(text: str) -> str:
        a, b = shown(text)
        return f"Score: 1\n{a}\n" + ("[[tie]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]")

    chat_server.reply = longer
    assert main(["judge", str(run), *at(chat_server)]) == 0
    held = answers(run)
    raw = {row["prompt"]: row["text"] for row in held if row["policy"] == "raw"}
    ours = {row["prompt"]: row["text"] for row in held if row["policy"] == "policy"}
    assert len(raw) == len(ours) == NUM_PROMPTS
    wins = sum(len(ours[p]) > len(raw[p]) for p in raw)
    losses = sum(len(ours[p]) < len(raw[p]) for p in raw)
    assert wins + losses > 0
    row = result(run)["win_rate"]
    assert (row["wins"], row["losses"], row["ties"]) == (wins, losses, NUM_PROMPTS - wins - losses)
    assert row["win_rate"] == wins / NUM_PROMPTS
    assert result(run)["inconsistent"]["count"] == result(run)["unparsable"]["prompts"] == 0
    assert f"the policy's answers to them are sent to {chat_server.url}, on this machine" in caplog.text
    told = capsys.readouterr().out
    assert f"{wins}-{NUM_PROMPTS - wins - losses}-{losses}" in told
    assert "decided on less than half" not in told
    assert {request["body"]["max_tokens"] for request in chat_server.requests} == {512}


def test_a_judge_that_always_takes_the_first_answer_has_ties_only_and_it_is_said(run, chat_server, capsys):
    assert main(["judge", str(run), *at(chat_server)]) == 0
    found = result(run)
    changed = NUM_PROMPTS - found["identical"]
    assert found["inconsistent"] == {"count": changed, "share": changed / NUM_PROMPTS}
    assert found["win_rate"]["ties"] == NUM_PROMPTS
    told = f"counted as ties: {changed} of {NUM_PROMPTS} ({100 * changed / NUM_PROMPTS:.1f}%)"
    assert told in capsys.readouterr().out
    assert main(["judge", str(run), *at(chat_server), "judge.orders=one"]) == 0  # half of the questions, all known
    once = result(run)
    assert len(chat_server.requests) == 2 * changed
    assert once["win_rate"]["wins"] + once["win_rate"]["losses"] == changed


def test_replies_without_a_decision_are_kept_whole_and_stay_in_the_denominator(run, chat_server, capsys):
    long = "I cannot say.\n" * 500
    first = []

    def reply(text: str) -> str:
        first.append(text)
        return long if len(first) <= 2 else "[[A]]" if shown(text)[0] > shown(text)[1] else "[[B]]"

    chat_server.reply = reply
    assert main(["judge", str(run), *at(chat_server), "judge.concurrency=1"]) == 0
    found = result(run)
    assert (found["unparsable"]["prompts"], found["unparsable"]["replies"]) == (1, 2)
    assert sum(found["win_rate"][key] for key in ("wins", "losses", "ties")) == NUM_PROMPTS
    assert [row["text"] for row in replies(run)][:2] == [long, long]
    assert "I cannot say. I cannot say." in capsys.readouterr().out


def test_ratings_are_asked_once_an_answer_and_compared(run, chat_server, capsys):
    chat_server.reply = lambda text: f"Rating: [[{1 + len(text) % 9}]]"
    assert main(["judge", str(run), *at(chat_server), "--protocol", "auto-j"]) == 0
    found = result(run, "auto-j")
    assert found["orders"] is None
    rated = [one["said"] for one in found["outcomes"]]
    assert found["ratings"]["policy"]["mean"] == pytest.approx(sum(a for a, _ in rated) / NUM_PROMPTS)
    assert found["ratings"]["against"]["mean"] == pytest.approx(sum(r for _, r in rated) / NUM_PROMPTS)
    assert found["win_rate"]["wins"] == sum(a > r for a, r in rated)
    assert len(chat_server.requests) == len({(row["prompt"], row["text"]) for row in answers(run)})
    assert "Mean rating, aligned policy: " in capsys.readouterr().out


def test_a_second_judge_sees_the_same_answers_and_both_results_stay(run, chat_server):
    assert main(["judge", str(run), *at(chat_server)]) == 0
    before = (run / "evaluations/answers.jsonl").read_bytes()
    first = [request["body"]["messages"] for request in chat_server.requests]
    assert main(["judge", str(run), "--endpoint", chat_server.url, "--model", "n"]) == 0
    assert (run / "evaluations/answers.jsonl").read_bytes() == before
    second = [request["body"]["messages"] for request in chat_server.requests[len(first) :]]
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, second))
    held = json.loads((run / "evaluations/judge-auto-j-pairwise.json").read_text())["judges"]
    assert [one["judge"]["model"] for one in held] == ["m", "n"]
    assert main(["evaluate", str(run)]) == 0  # the selectors vote on what the judges have read
    examples = json.loads((run / "evaluation.json").read_text())["policy"]["examples"]
    assert {(e["prompt"], e["raw"]) for e in examples} <= {(r["prompt"], r["text"]) for r in answers(run)}
    assert (run / "evaluations/answers.jsonl").read_bytes() == before


def test_another_wording_is_another_question(run, chat_server, tmp_path):
    wording = tmp_path / "mine.txt"
    wording.write_text("{prompt} <answer_a>\n{output_a}\n</answer_a> <answer_b>\n{output_b}\n</answer_b> {}")
    assert main(["judge", str(run), *at(chat_server)]) == 0
    count = len(chat_server.requests)
    assert main(["judge", str(run), *at(chat_server), f"judge.template={wording}"]) == 0
    assert len(chat_server.requests) == 2 * count
    assert chat_server.requests[-1]["body"]["messages"][0]["content"].endswith("</answer_b> {}")


# Policies that were kept, and what tasks have left


def longer(text: str) -> str:
    """A judge of one mind: the longer answer, wherever it stands."""
    a, b = shown(text)
    return "[[tie]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]"


def counted(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """What ``longer`` has to say of (ours, theirs)."""
    wins, losses = sum(len(a) > len(b) for a, b in pairs), sum(len(a) < len(b) for a, b in pairs)
    return {"wins": wins, "losses": losses, "ties": len(pairs) - wins - losses}


def counts(one: dict) -> dict[str, int]:
    return {key: one["win_rate"][key] for key in ("wins", "losses", "ties")}


def results(run: Path, on: str, protocol: str = "auto-j-pairwise") -> list[dict]:
    held = json.loads((run / f"evaluations/judge-{protocol}.json").read_text())["judges"]
    return [one for one in held if one["on"] == on]


def texts_of(run: Path, folder: str) -> list[str]:
    """The held-out answers of one policy in the order of the raw ones."""
    held = answers(run)
    order = [row["prompt"] for row in held if row["policy"] == "raw"]
    mine = {row["prompt"]: row["text"] for row in held if row["policy"] == folder}
    return [mine[prompt] for prompt in order]


def test_kept_policies_are_judged_each_against_the_raw_one_and_nothing_is_paid_twice(run, chat_server, capsys):
    chat_server.reply = longer
    assert main(["judge", str(run), *at(chat_server)]) == 0
    paid = len(chat_server.requests)
    (alone,) = results(run, "held-out")
    capsys.readouterr()
    assert main(["judge", str(run), "--checkpoints"]) == 0
    out = capsys.readouterr().out
    found = results(run, "held-out")
    assert [(one["policy"], one["step"]) for one in found] == [
        ("after step 1", 1), ("after step 2", 2), ("aligned policy", 3),
    ]  # fmt: skip
    raw = texts_of(run, "raw")
    folders = ["checkpoints/step-000001/policy", "checkpoints/step-000002/policy", "policy"]
    asked = set()
    for one, folder in zip(found, folders, strict=True):
        ours = texts_of(run, folder)
        assert counts(one) == counted(list(zip(ours, raw, strict=True)))
        characters = {"policy": sum(map(len, ours)) / NUM_PROMPTS, "against": sum(map(len, raw)) / NUM_PROMPTS}
        assert one["length_controlled"] is None or one["length_controlled"]["characters"] == characters
        asked |= {key for outcome in one["outcomes"] for key in outcome["keys"]}
    assert found[2] == alone | {"replies_from_before": paid}
    assert len(chat_server.requests) == len(asked) > paid
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for one in found:
        row = one["win_rate"]
        start = f"{one['policy']} {100 * row['win_rate']:.1f}% "
        (line,) = [line for line in lines if line.startswith(start)]
        assert f" {row['wins']}-{row['ties']}-{row['losses']} " in line
    assert any(line.startswith("against raw policy win rate 95% interval") for line in lines)
    for words in (["--checkpoints"], ["--checkpoint", "2"], []):
        assert main(["judge", str(run), *words]) == 0
        assert len(chat_server.requests) == len(asked)
    assert {one["policy"] for one in results(run, "held-out")} == {"after step 1", "after step 2", "aligned policy"}
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Judged by language models" in page
    assert '<figure id="wins">' in page  # no selectors have judged here


def test_a_stop_on_the_way_keeps_what_was_said_of_every_checkpoint(run, chat_server):
    chat_server.script = [None] * 3 + [500] * 50
    words = ["judge", str(run), *at(chat_server), "--checkpoints", "judge.concurrency=1", "judge.retries=0"]
    assert main(words) == 3
    assert len(replies(run)) == 3
    chat_server.script = []
    assert main(words) == 0
    keys = [row["key"] for row in replies(run)]
    assert len(keys) == len(set(keys)) == len(chat_server.requests) - 1
    assert sum(one["replies_from_before"] for one in results(run, "held-out")) >= 3


def test_ratings_of_raw_answers_serve_all_checkpoints(run, chat_server):
    chat_server.reply = lambda text: f"Rating: [[{1 + len(text) % 9}]]"
    assert main(["judge", str(run), *at(chat_server), "--protocol", "auto-j", "--checkpoints"]) == 0
    assert len(chat_server.requests) == len({(row["prompt"], row["text"]) for row in answers(run)})


def test_other_held_out_answers_end_the_row_of_checkpoints_that_were_judged_with_the_old_ones(run, chat_server):
    chat_server.reply = longer
    assert main(["judge", str(run), *at(chat_server), "--checkpoints"]) == 0
    assert main(["judge", str(run), "evaluation.num_prompts=3"]) == 0
    assert [one["policy"] for one in results(run, "held-out")] == ["aligned policy"]


def test_summaries_are_judged_against_those_that_people_wrote(run, tmp_path, chat_server, caplog):
    pytest.importorskip("rouge_score")
    posts = [{"prompt": f"The post {i}?", "reference": "cat " * (i % 3)} for i in range(1, 5)]
    file = tmp_path / "posts.jsonl"
    file.write_text("".join(json.dumps(post) + "\n" for post in posts if post["reference"].strip()))
    assert main(["evaluate", str(run), "--task", "summarization", f"evaluation.references={file}"]) == 0
    chat_server.reply = longer
    assert main(["judge", str(run), *at(chat_server), "--on", "summarization"]) == 0
    rows = [json.loads(line) for line in (run / "evaluations/summarization_answers.jsonl").read_text().splitlines()]
    found = results(run, "summarization")
    assert [(one["policy"], one["against"]) for one in found] == [
        ("raw policy", "people's summaries"), ("aligned policy", "people's summaries"),
    ]  # fmt: skip
    for one in found:
        assert counts(one) == counted([(row["answers"][one["policy"]], row["reference"]) for row in rows])
    assert "the policy's answers to them, and people's summaries, are sent to" in caplog.text
    sent = {text for request in chat_server.requests for text in shown(request["body"]["messages"][0]["content"])}
    assert {row["reference"] for row in rows} <= sent


def test_the_best_of_n_is_judged_against_the_plain_answer(run, chat_server):
    assert main(["evaluate", str(run), "--task", "best-of-n"]) == 0
    chat_server.reply = longer
    assert main(["judge", str(run), *at(chat_server), "--on", "best-of-n"]) == 0
    rows = [json.loads(line) for line in (run / "evaluations/best-of-n_answers.jsonl").read_text().splitlines()]
    found = results(run, "best-of-n")
    assert [one["policy"] for one in found] == ["best of 3, raw policy", "best of 3, aligned policy"]
    for one in found:
        pairs = [(row["best"], row["plain"]) for row in rows if one["policy"].endswith(row["policy"])]
        assert counts(one) == counted(pairs)


def test_answers_for_alpaca_eval_are_judged_with_a_win_rate_at_equal_length(run, tmp_path, chat_server, capsys):
    asked = tmp_path / "asked.txt"
    asked.write_text("".join(f"Do {i}.\n" for i in range(8)))
    words = [f"evaluation.instructions={asked}", "--checkpoint", "2"]
    assert main(["evaluate", str(run), "--task", "alpaca-eval", *words]) == 0
    chat_server.reply = longer
    capsys.readouterr()
    assert main(["judge", str(run), *at(chat_server), "--on", "alpaca-eval"]) == 0
    (one,) = results(run, "alpaca-eval")
    folder = run / "evaluations/alpaca-eval"
    ours, raw = (
        [row["output"] for row in json.loads((folder / name / "alpaca_eval.json").read_text())]
        for name in ("step-000002", "raw")
    )
    assert (one["policy"], one["step"], one["prompts"]) == ("after step 2", 2, 8)
    assert counts(one) == counted(list(zip(ours, raw, strict=True)))
    equal = one["length_controlled"]
    assert equal["win_rate"] == length_controlled(
        [outcome["points"] for outcome in one["outcomes"]], ours, raw, ("any",), 2
    )["win_rate"]  # fmt: skip
    assert equal["slope"] > 1  # this judge looks at nothing but length
    assert f"{100 * equal['win_rate']:.1f}% (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--on", "sumarization"], "did you mean summarization?"),
        (["--on", "best-of-n", "--checkpoints"], "`fedbiscuit evaluate RUN --task best-of-n` instead"),
        (["--on", "alpaca-eval"], "there are no answers of alpaca-eval; run `fedbiscuit evaluate"),
        (["--checkpoint", "1", "--checkpoints"], "give one of the two"),
        (["--checkpoint", "7"], "no policy was kept after step 7; kept: 1, 2, 3"),
    ],
)
def test_what_cannot_be_judged_is_said_with_the_way_out(run, chat_server, words, told, capsys):
    assert main(["judge", str(run), *at(chat_server), *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert chat_server.requests == []


# vLLM


def test_without_vllm_the_command_to_install_it_is_shown_before_anything_is_done(run, tiny_model, capsys):
    before = (run / "config.yaml").read_bytes()
    assert main(["judge", str(run), "--model", str(tiny_model), "judge.engine=vllm"]) == 3
    told = capsys.readouterr().err
    assert "`pip install vllm` on a machine with a GPU" in told
    assert "judge.endpoint" in told
    assert (run / "config.yaml").read_bytes() == before


class FakeLLM:
    """The part of ``vllm.LLM`` 0.33 that is used, with its signatures; the replies are those of our own generation."""

    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, model: str, *, dtype: str = "auto", seed: int = 0):
        self.lm = load_lm(ModelSettings(base=model, device="cpu", dtype=dtype))
        self.model_config = SimpleNamespace(max_model_len=600)
        self.calls: list[list[int]] = []
        self.params: list[dict] = []
        FakeLLM.made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert use_tqdm is False
        self.params += [vars(one) for one in sampling_params]
        written = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert list(prompt) == ["prompt_token_ids"]
            how = Sampling(params.max_tokens, params.temperature, params.top_p)
            with self.lm.adapter_off():
                ((one,),) = generate(self.lm, [prompt["prompt_token_ids"]], 1, how, ("any",))
            reason = "stop" if one.finished else "length"
            written.append(SimpleNamespace(text=one.text, token_ids=list(one.tokens), finish_reason=reason))
        self.calls.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
        return [SimpleNamespace(outputs=[one]) for one in written]


class FakeParams:
    def __init__(self, temperature=1.0, top_p=1.0, max_tokens=16, seed=None):
        vars(self).update(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)


def test_vllm_gets_the_same_tokens_as_our_own_engine_in_one_batch(run, tiny_model, monkeypatch, capsys):
    words = ["judge", str(run), "--protocol", "plain", "--model", str(tiny_model), "judge.max_tokens=4"]
    assert main(words) == 0
    ours = replies(run, "plain")
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = FakeLLM, FakeParams
    fake.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    assert main([*words, "judge.engine=vllm"]) == 0
    theirs = replies(run, "plain")[len(ours) :]
    assert [row["judge"].get("engine") for row in theirs] == ["vllm"] * len(ours)
    by_answers = {tuple(row["answers"]): row for row in ours}
    (engine,) = FakeLLM.made
    read = [row for row in theirs if not row["refused"]]
    for row in read:
        same = by_answers[tuple(row["answers"])]
        assert {key: row[key] for key in ("text", "finished", "tokens_in", "tokens_out")} == {
            key: same[key] for key in ("text", "finished", "tokens_in", "tokens_out")
        }
    assert engine.calls == [[row["tokens_in"] for row in read]]  # one batch, without what it cannot read
    assert all(
        row["tokens_in"] > 596 for row in ours if tuple(row["answers"]) not in {tuple(r["answers"]) for r in read}
    )
    assert {(p["temperature"], p["max_tokens"], p["top_p"]) for p in engine.params} == {(0.0, 4, 1.0)}
    assert len({p["seed"] for p in engine.params}) == len(engine.params)
    assert main([*words, "judge.engine=vllm"]) == 0  # all replies are there
    assert result(run, "plain")["replies_from_before"] == len(read)


# Trouble


def test_a_wrong_key_is_an_error_with_the_next_step_and_the_key_is_nowhere(run, chat_server, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    chat_server.script = [(401, {}, json.dumps({"error": {"message": f"wrong key {KEY}"}}))] * 20
    assert main(["judge", str(run), *at(chat_server), "judge.api_key_env=JUDGE_KEY"]) == 2
    told = capsys.readouterr()
    assert f"{chat_server.url}: status 401 (wrong key [the key]): the key is missing or not accepted" in told.err
    chat_server.script = []
    chat_server.reply = lambda text: f"[[A]] {chat_server.requests[-1]['headers']['Authorization']}"
    assert main(["judge", str(run), *at(chat_server), "judge.api_key_env=JUDGE_KEY"]) == 0
    assert chat_server.requests[-1]["headers"]["Authorization"] == f"Bearer {KEY}"
    told = capsys.readouterr()
    assert KEY not in told.out + told.err
    assert all(KEY.encode() not in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_what_was_judged_before_a_failure_is_kept_and_not_paid_again(run, chat_server, capsys):
    chat_server.script = [None, None, None, *[500] * 50]
    words = ["judge", str(run), *at(chat_server), "judge.concurrency=1", "judge.retries=0"]
    assert main(words) == 3
    told = capsys.readouterr().err
    assert f"{chat_server.url}: status 500 (no, 500), 1 times" in told
    assert re.search(
        r"error: 3 of \d+ replies are kept in .*evaluations/judge-auto-j-pairwise.jsonl; the same command", told
    )
    assert len(replies(run)) == 3
    assert not (run / "evaluations/judge-auto-j-pairwise.json").exists()
    chat_server.script = []
    done = len(chat_server.requests)
    assert main(words) == 0
    found = result(run)
    assert len(chat_server.requests) - done == found["unparsable"]["asked"] - 3
    assert found["replies_from_before"] == 3


def test_a_busy_server_is_asked_again_and_the_result_is_whole(run, chat_server):
    chat_server.script = [(429, {"Retry-After": "0.1"}, "{}"), 500, None, (200, {}, "{not json"), None]
    assert main(["judge", str(run), *at(chat_server), "judge.concurrency=1"]) == 0
    assert [row["attempts"] for row in replies(run)][:3] == [3, 2, 1]
    assert len(chat_server.requests) == result(run)["unparsable"]["asked"] + 3


def test_nobody_there_is_exit_code_3_with_the_url(run, chat_server, capsys):
    chat_server.close()
    assert main(["judge", str(run), *at(chat_server)]) == 3
    told = capsys.readouterr().err
    assert f"error: {chat_server.url}: no connection (" in told
    assert "start the server, or check judge.endpoint" in told
    assert "error: 0 of " in told


def test_a_refused_question_is_a_tie_that_is_said_and_asked_again_next_time(run, chat_server, capsys):
    chat_server.script = [None, None, (400, {}, '{"error": "too long"}')]
    assert main(["judge", str(run), *at(chat_server), "judge.concurrency=1"]) == 0
    found = result(run)
    assert (found["unparsable"]["refused"], found["unparsable"]["prompts"]) == (1, 1)
    assert "questions that were refused: 1" in capsys.readouterr().out
    done = len(chat_server.requests)
    assert main(["judge", str(run), *at(chat_server), "judge.concurrency=1"]) == 0
    assert len(chat_server.requests) == done + 1
    assert result(run)["unparsable"]["refused"] == 0


def test_a_server_that_refuses_all_is_an_error(run, chat_server, capsys):
    chat_server.script = [(400, {}, '{"error": {"message": "unknown field max_tokens"}}')] * 50
    assert main(["judge", str(run), *at(chat_server), "judge.concurrency=1"]) == 2
    assert "took none of the first 3 questions: status 400 (unknown field max_tokens)" in capsys.readouterr().err
    assert len(chat_server.requests) == 3


def test_a_killed_process_goes_on_without_paying_twice(run, chat_server):
    """SIGKILL in the middle of a line: the reply whose line was cut is asked again, no other."""
    words = ["judge", str(run), *at(chat_server), "judge.concurrency=1"]
    env = {**os.environ, "FEDBISCUIT_CRASH_AT": "lines_half:10"}  # six batches of answers, then the fourth reply
    killed = subprocess.run([sys.executable, "-m", "fedbiscuit", *words], env=env, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = len(chat_server.requests)
    assert len((run / "evaluations/judge-auto-j-pairwise.jsonl").read_bytes().split(b"\n")) - 1 == 3
    assert done == 4
    assert main(words) == 0
    found = result(run)
    assert len(chat_server.requests) - done == found["unparsable"]["asked"] - 3
    assert found["replies_from_before"] == 3
    keys = [row["key"] for row in replies(run)]
    assert len(keys) == len(set(keys)) == found["unparsable"]["asked"]


def test_a_local_model_after_a_server_sends_nothing(run, chat_server, tiny_model):
    assert main(["judge", str(run), *at(chat_server)]) == 0
    done = len(chat_server.requests)
    assert main(["judge", str(run), "--model", str(tiny_model), "judge.max_tokens=4"]) == 0
    assert len(chat_server.requests) == done
    assert "endpoint" not in result(run)["judge"]
