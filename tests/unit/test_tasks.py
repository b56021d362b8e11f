"""The pure parts of the evaluations of their own, on numbers worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fedbiscuit.data.material import labelled_pair, read_instructions, read_references
from fedbiscuit.evaluation.agreement import agreement, parts_of
from fedbiscuit.evaluation.knockout import knock_out
from fedbiscuit.evaluation.metrics import Judged
from fedbiscuit.evaluation.perplexity import perplexity
from fedbiscuit.evaluation.rouge import KINDS, lead, rouge, rouge_scorer, sentences
from fedbiscuit.report.tasks import TABLES, notes_of, tables_of
from fedbiscuit.types import DataError

# Knock-out


def strongest(strengths):
    return lambda matches: [0.9 if strengths[f][a] > strengths[f][b] else 0.1 for f, a, b in matches]


def test_the_strongest_wins_a_knock_out_wherever_it_stands():
    for size in range(1, 9):
        fields = [[0] * place + [1] + [0] * (size - place - 1) for place in range(size)]
        assert knock_out([size] * size, strongest(fields)) == list(range(size))


def test_neighbours_meet_the_odd_one_waits_and_no_pair_meets_twice():
    asked = []

    def prefer(matches):
        asked.append(list(matches))
        return [1.0 if a == 1 else 0.0 for _, a, _ in matches]

    assert knock_out([5], prefer) == [1]
    assert asked == [[(0, 0, 1), (0, 2, 3)], [(0, 1, 3)], [(0, 1, 4)]]


def test_a_tie_goes_to_the_lower_number_and_all_fields_are_asked_at_once():
    turns = []

    def prefer(matches):
        turns.append(len(matches))
        return [0.5] * len(matches)

    assert knock_out([4, 1, 2], prefer) == [0, 0, 0]
    assert turns == [3, 1]


# ROUGE

PAIRS = [
    ("the cat sat on the mat", "the cats were sitting on a mat"),
    ("nothing in common", "wholly different words"),
    ("A dog ran. It barked!", "It barked. Dogs run"),
]


def test_rouge_is_the_mean_of_what_rouge_score_says_of_each_pair():
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    references, summaries = zip(*PAIRS, strict=True)
    found = rouge(rouge_scorer(), summaries, references, ("k",), 50)
    theirs = scorers.RougeScorer(list(KINDS), use_stemmer=True)
    for kind in KINDS:
        split = (lambda t: "\n".join(sentences(t))) if kind == "rougeLsum" else (lambda t: t)
        scores = [theirs.score(split(reference), split(summary))[kind] for reference, summary in PAIRS]
        assert found[kind]["f"] == pytest.approx(np.mean([s.fmeasure for s in scores]))
        assert found[kind]["recall"] == pytest.approx(np.mean([s.recall for s in scores]))
        assert found[kind]["precision"] == pytest.approx(np.mean([s.precision for s in scores]))


def test_rouge_of_one_pair_worked_out_by_hand_with_stems_and_sentences():
    pytest.importorskip("rouge_score")
    found = rouge(rouge_scorer(), ["It barked. Dogs run"], ["Dog runs. It barked!"], ("k",), 10)
    assert {kind: found[kind]["f"] for kind in KINDS} == {
        "rouge1": 1.0,  # the same four stems
        "rouge2": pytest.approx(2 / 3),  # "it bark" and "dog run" of three pairs each
        "rougeL": pytest.approx(0.5),  # two of four in the same order
        "rougeLsum": 1.0,  # sentence by sentence nothing is out of order
    }


def test_sentences_end_at_marks_and_lines_and_the_lead_is_the_first_of_them():
    text = 'He said "no!" Then he left... at 3.15 pm.\nGood?  Yes'
    assert sentences(text) == ['He said "no!', "Then he left...", "at 3.15 pm.", "Good?", "Yes"]
    assert lead("One. Two! Three? Four.") == "One. Two! Three?"
    assert sentences("  ") == []


# Perplexity


def test_perplexity_of_a_fair_die_is_six_and_long_texts_weigh_more():
    assert perplexity([-3 * math.log(6), -5 * math.log(6)], [3, 5], ("k",))["perplexity"] == pytest.approx(6)
    assert perplexity([-3 * math.log(2), -1 * math.log(32)], [3, 1], ("k",))["perplexity"] == pytest.approx(4)


def test_the_interval_of_a_perplexity_holds_it_and_few_texts_have_none():
    nats, tokens = [-float(i) for i in range(1, 21)], [5] * 20
    found = perplexity(nats, tokens, ("k",), 200)
    low, high = found["interval"]
    assert low < found["perplexity"] < high
    assert perplexity(nats[:4], tokens[:4], ("k",))["interval"] is None
    assert perplexity(nats, tokens, ("k",), 200) == found


# Agreement


def test_agreement_by_part_has_its_own_accuracy_and_both_orders():
    probability = np.array([0.9, 0.2, 0.5, 0.8])
    choice = np.array([0, 0, 1, 1])
    in_order = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    judged = Judged(probability, choice, np.zeros(4), in_order)
    by = {"subset": parts_of(["b", "a", None, "b"]), "client": parts_of([None] * 4)}
    row = agreement("x", judged, by, ("k",), 20)
    assert (row["accuracy"], row["flip_rate"], row["accuracy_in_order"]) == (0.375, 0.75, [0.5, 0.75])
    assert "client" not in row
    parts = row["subset"]["parts"]
    assert list(parts) == ["a", "b"]
    assert (parts["a"]["accuracy"], parts["a"]["flip_rate"], parts["a"]["pairs"]) == (0.0, 1.0, 1)
    assert (parts["b"]["accuracy"], parts["b"]["accuracy_in_order"]) == (0.5, [0.5, 1.0])
    assert row["subset"]["mean"] == {"accuracy": 0.25, "interval": None}


def test_five_pairs_have_an_interval_and_five_parts_have_one_of_their_mean():
    judged = Judged(np.array([0.9, 0.9, 0.1, 0.9, 0.9]), np.zeros(5, int), np.zeros(5), np.ones((5, 2)))
    row = agreement("x", judged, {"client": parts_of(list("abcde"))}, ("k",), 100)
    assert row["interval"][0] < 0.8 <= row["interval"][1]
    assert row["client"]["mean"]["interval"] is not None
    assert row["client"]["parts"]["a"]["interval"] is None


# Files


def test_a_record_of_reward_bench_is_a_comparison_with_its_subset_as_domain():
    record = {
        "id": 30, "prompt": "p", "chosen": "good", "rejected": "bad", "subset": "math-prm",
        "chosen_model": "m", "rejected_model": "n",
    }  # fmt: skip
    pair = labelled_pair(record)
    assert (pair.chosen, pair.rejected, pair.domain, pair.meta["id"]) == ("good", "bad", "math-prm", 30)
    ours = labelled_pair({"prompt": "p", "output_a": "a", "output_b": "b", "choice": 1, "client": "ann", "domain": "d"})
    assert (ours.chosen, ours.client, ours.domain) == ("b", "ann", "d")
    with pytest.raises(DataError, match="rejected: expected text"):
        labelled_pair({"prompt": "p", "chosen": "a", "subset": "s"})
    with pytest.raises(DataError, match="unknown key"):
        labelled_pair({"prompt": "p", "chosen": "a", "rejected": "b", "clinet": "ann"})


def test_references_are_read_in_both_shapes_and_a_broken_line_is_named(tmp_path):
    rows = [
        {"id": "t3", "post": "long post", "title": "T", "subreddit": "r", "summary": " short "},
        {"prompt": "q", "reference": "ref"},
        {"post": "long post", "title": "T", "subreddit": "r", "summary": "other"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_references(str(file))
    assert (first.prompt, first.summary, first.fields) == ("long post", "other", {"title": "T", "subreddit": "r"})
    assert (second.prompt, second.summary, second.fields) == ("q", "ref", {})
    file.write_text('{"prompt": "q", "reference": "ref"}\n{"prompt": "q"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: summary: expected text"):
        read_references(str(file))


def test_instructions_come_from_an_array_from_lines_or_from_text(tmp_path):
    (tmp_path / "alpaca_eval.json").write_text('[{"instruction": "Do.", "dataset": "koala"}, {"instruction": "Go."}]')
    (tmp_path / "b.jsonl").write_text('{"prompt": "Do."}\n{"instruction": "Do."}\n')
    (tmp_path / "c.txt").write_text("Do.\n\nGo.\n")
    read = {name: [(one.text, one.dataset) for one in read_instructions(str(tmp_path / name))] for name in
            ("alpaca_eval.json", "b.jsonl", "c.txt")}  # fmt: skip
    assert read == {
        "alpaca_eval.json": [("Do.", "koala"), ("Go.", "alpaca_eval")],
        "b.jsonl": [("Do.", "b")],
        "c.txt": [("Do.", "c"), ("Go.", "c")],
    }
    for text, told in (('{"a": 1}', ":1: prompt: expected"), ("[1]", ":1: expected objects"), ("[", ":1: not JSON")):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(DataError, match=told):
            read_instructions(str(tmp_path / "d.json"))
    with pytest.raises(DataError, match="no such file or folder"):
        read_instructions(str(tmp_path / "missing.txt"))


# Tables


def test_every_task_has_its_tables_and_the_command_line_names_every_task():
    from fedbiscuit.cli.stages import evaluate
    from fedbiscuit.pipeline.tasks import TASKS

    assert set(TASKS) == set(TABLES)
    shown = str(evaluate.__annotations__["task"])
    assert all(name in shown for name in TASKS)


def test_a_result_of_an_unknown_task_has_no_tables():
    assert (tables_of({"task": "new"}), notes_of({})) == ([], [])
