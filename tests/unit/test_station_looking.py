"""What my selector learned and what left this machine: from the files that are there, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedbiscuit.rundir.ledger import ALL_THAT_WAS_SENT, NOTHING_SENT
from fedbiscuit.station.looking import RoundAccuracy, what_left, what_the_site_saw, what_was_learned
from fedbiscuit.types import ConfigError, IntegrityError


def row(round: int, clients: dict[str, float] | None = None, grouping: dict[str, int] | None = None) -> dict[str, Any]:
    metrics = {"validation": {"accuracy": 0.5, "clients": clients}} if clients else {}
    return {"round": round, "cohort": ["ann"], "metrics": metrics, **({"grouping": grouping} if grouping else {})}


@pytest.fixture
def run(tmp_path: Path):
    """Makes the folder of a run with these rounds, of three groups."""

    def make(*rows: dict[str, Any], adapters: int = 3, evaluation: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"name: mine\nselectors: {{num_adapters: {adapters}, rounds: 40}}\n")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        if evaluation is not None:
            (folder / "evaluation.json").write_text(json.dumps({"selectors": {"clients": evaluation}}))
        return folder

    return make


def test_a_whole_run_says_accuracy_by_round_group_and_agreement_with_the_global_selector(run):
    mine = {"adapter": 2, "accuracy": 0.75, "comparisons": 8, "same_as_global": 0.625}
    folder = run(
        row(0), row(1, {"ann": 0.5, "bo": 1.0}), row(3, {"ann": 0.6}, {"ann": 1, "bo": 0}), evaluation={"ann": mine}
    )
    found = what_was_learned(folder, "ann")
    assert found.rounds == (RoundAccuracy(2, 0.5), RoundAccuracy(4, 0.6))
    assert (found.group, found.num_groups, found.final, found.pairs, found.with_global) == (2, 3, 0.75, 8, 0.625)
    assert found.missing == ()


def test_what_a_server_of_real_clients_cannot_know_is_said_and_not_made_up(run):
    found = what_was_learned(run(row(0), row(1, None, {"ann": 1})), "ann")
    assert (found.rounds, found.group, found.final, found.with_global) == ((), 1, None, None)
    assert "a server of real clients never sees their choices" in found.missing[0]
    assert "fedbiscuit evaluate" in found.missing[1]


def test_before_the_first_round_and_of_a_stranger_there_is_one_sentence(run):
    folder = run()
    assert what_was_learned(folder, "ann").missing == ("No round of mine is done yet.",)
    (folder / "metrics.jsonl").write_text(json.dumps(row(0)) + "\n")
    [sentence] = what_was_learned(folder, "zoe").missing
    assert "knows nobody called zoe" in sentence


def test_the_warm_up_has_no_group_and_no_curve_in_a_run_either(run):
    warm = [{**row(round, {"ann": 0.9}), "phase": "warmup"} for round in (0, 1)]
    folder = run(*warm)
    found = what_was_learned(folder, "ann")
    assert (found.rounds, found.group) == ((), None)
    assert "There are no groups yet" in found.missing[0]
    later = {**row(2, {"ann": 0.6}, {"ann": 1}), "phase": "federated"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    assert what_was_learned(folder, "ann").rounds == (RoundAccuracy(3, 0.6),)


def test_with_one_selector_for_all_the_group_is_0(run):
    assert what_was_learned(run(row(0), adapters=1), "ann").group == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="name the folder of a run"):
        what_was_learned(tmp_path, "ann")


# What left


def note(run: str, rounds: list[int], out: int, **more: Any) -> str:
    base = {"time": 1.0, "run": run, "rounds": rounds, "asked": {}, "bytes_in": 10, "bytes_out": out}
    return json.dumps(base | more) + "\n"


def test_what_left_is_summed_up_by_round_and_nothing_is_left_out_of_the_total(tmp_path):
    lines = [
        note("", [], 5),
        note("r", [0], 1000, asked={"train": 2}, deltas=2),
        note("r", [1], 500, asked={"train": 1}, deltas=1),
        note("r", [1], 20, asked={"evaluate": 2, "seat": 2}, seats=2),
        '{"time": 1, "torn',
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(lines))
    found = what_left(tmp_path)
    assert [(one.run, one.round, one.asked, one.deltas, one.seats, one.bytes_out) for one in found.rows] == [
        ("–", "–", {}, 0, 0, 5),
        ("r", "0", {"train": 2}, 2, 0, 1000),
        ("r", "1", {"train": 1, "evaluate": 2, "seat": 2}, 1, 2, 520),
    ]
    assert (found.bytes_out, found.bytes_in) == (1525, 40)
    assert found.sentence.startswith(
        "3 changes of an adapter and 2 numbers of a group left this machine, 1.5 kB in all."
    )
    assert ALL_THAT_WAS_SENT in found.sentence


def test_without_a_site_or_a_message_nothing_left_and_it_says_so(tmp_path):
    assert what_left(tmp_path).sentence == NOTHING_SENT
    assert (what_left(None).rows, "sends nothing by itself" in what_left(None).sentence) == ((), True)
    with pytest.raises(ConfigError, match="client init"):
        what_left(tmp_path / "nowhere")


def test_what_a_worker_saw_at_this_machine_is_shown_for_the_last_run(tmp_path):
    kept = {"adapter": 0, "num_adapters": 2, "comparisons": 4}
    rows = [
        {"run": "old", "round": 7, "client": "ann", "accuracy": 0.1, **kept},
        {"run": "new", "round": 0, "client": "ann", "accuracy": 0.5, **kept},
        {"run": "new", "round": 2, "client": "bo", "accuracy": 0.2, **kept},
        {"run": "new", "round": 2, "client": "ann", "accuracy": 0.75, **kept, "adapter": 1},
        {"run": "new", "round": 2, "client": "ann", "accuracy": 0.75, **kept, "adapter": 1},
    ]
    (tmp_path / "learned.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + '{"run": "to')
    found = what_the_site_saw(tmp_path, "ann")
    assert found is not None
    assert found.rounds == (RoundAccuracy(0, 0.5), RoundAccuracy(2, 0.75))
    assert (found.run, found.group, found.num_groups, found.final, found.pairs) == ("new", 1, 2, 0.75, 4)
    assert "the server has never seen these choices" in found.missing[0]
    assert what_the_site_saw(tmp_path, "zoe") is None
    assert what_the_site_saw(tmp_path / "none", "ann") is None
    (tmp_path / "learned.jsonl").write_text('{"client": "ann"}\n')
    with pytest.raises(IntegrityError, match=r"learned\.jsonl:1: not a line of a learned\.jsonl"):
        what_the_site_saw(tmp_path, "ann")


def test_what_came_in_the_warm_up_is_no_selector_of_a_group(tmp_path):
    """There everybody trains the same adapter, one after the other: two of them here, in four rounds."""
    kept = {"run": "r", "client": "ann", "num_adapters": 2, "num_warmup_rounds": 4, "comparisons": 4}
    rows = [{"round": n, "adapter": n // 2, "accuracy": n / 10, **kept} for n in range(4)]
    path = tmp_path / "learned.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = what_the_site_saw(tmp_path, "ann")
    assert found is not None
    assert (found.rounds, found.group, found.num_groups, found.final, found.pairs) == ((), None, 2, None, None)
    assert "There are no groups yet: they are formed after the warm-up (4 rounds)" in found.missing[0]
    rows += [{"round": n, "adapter": 1, "accuracy": n / 10, **kept} for n in (4, 6)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = what_the_site_saw(tmp_path, "ann")
    assert found is not None
    assert found.rounds == (RoundAccuracy(4, 0.4), RoundAccuracy(6, 0.6))
    assert (found.group, found.final, found.pairs) == (1, 0.6, 4)
    assert "no groups yet" not in found.missing[0]
