"""A federation over sites: the bits of the one in process, and nothing of a comparison in what leaves a site."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zlib

import pytest
from tests.flow.test_run import digests, lines, settings, without_traffic, write_world
from tests.flower_grid import DictGrid

import fedbiscuit
from fedbiscuit import pipeline
from fedbiscuit.backends.bundle import Answer, pack_answer, unpack_order
from fedbiscuit.backends.worker import Rules, Worker
from fedbiscuit.config import dump_config
from fedbiscuit.models.lm import load_lm
from fedbiscuit.pipeline.remote import train_remotely
from fedbiscuit.pipeline.site import Site, asked_as, terms_of
from fedbiscuit.rundir.ledger import read_learned
from fedbiscuit.station.looking import what_the_site_saw
from fedbiscuit.types import ConfigError, DataError, FederationError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="SKIPPED: flwr is not installed, so real clients are not tested (pip install 'fedbiscuit[flower]')",
)

CHANGES = ("evaluation.compare_global=false", "selectors.grouping_comparisons=6")


@pytest.fixture
def sites(tmp_path):
    """Three sites with two people each, as the answers of their workers; everything that left them stands in ``left``."""
    rows = [json.loads(line) for line in write_world(tmp_path / "world.jsonl").read_text().splitlines()]
    nodes, left = {}, []
    for k in range(3):
        held = [row for row in rows if int(row["client"].split("-")[1]) % 3 == k]
        path = tmp_path / f"site-{k}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in held))
        worker = Worker(Site((str(path),), "cpu", 1).open_run, Rules(), tmp_path / f"ledger-{k}.jsonl")

        def answer(data: bytes, worker: Worker = worker) -> bytes:
            left.append(worker.answer(data))
            return left[-1]

        nodes[k + 1] = answer
    return nodes, left, rows


def over(grid, timeout=60.0):
    """How a session reaches the sites of a grid."""
    from fedbiscuit.backends.flower import FlowerBackend

    return lambda *how: FlowerBackend(grid, *asked_as(*how), timeout)


def test_a_federation_over_three_sites_has_the_bits_of_the_one_in_process_and_no_text_leaves(
    tmp_path, tiny_model, sites
):
    nodes, left, rows = sites
    here = pipeline.train_selectors(settings(tmp_path, tiny_model, *CHANGES, name="here"))
    cfg = settings(tmp_path, tiny_model, *CHANGES, name="there")
    grid = DictGrid(nodes)
    there = pipeline.train_selectors(cfg, connect=over(grid))
    assert {"metrics.jsonl", "selectors/groups.json", "selectors/u0/adapter_model.safetensors"} <= digests(here).keys()
    assert without_traffic(here) == without_traffic(there)
    ours, theirs = lines(here / "metrics.jsonl"), lines(there / "metrics.jsonl")
    assert all(mine["bytes_up"] < its["bytes_up"] for mine, its in zip(ours, theirs, strict=True))  # headers
    assert sum(row["bytes_down"] for row in theirs) == sum(len(data) for _, data in grid.seen)
    assert sum(row["bytes_up"] for row in theirs) == sum(len(one) for one in left)
    sent = b"".join(left)
    assert len(sent) > 100_000
    for row in rows:
        for text in (row["prompt"], row["output_a"] + " ", f'"{row["output_a"]}"', f'"{row["output_b"]}"'):
            assert text.encode() not in sent
            assert zlib.compress(text.encode())[2:-4] not in sent
    assert b"person-0" in sent  # the names of clients do leave
    ledger = [json.loads(line) for line in (tmp_path / "ledger-0.jsonl").read_text().splitlines()]
    assert sum(row["bytes_out"] for row in ledger) == sum(len(one) for one in left) - sum(
        row["bytes_out"]
        for k in (1, 2)
        for row in map(json.loads, (tmp_path / f"ledger-{k}.jsonl").read_text().splitlines())
    )


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_smaller_messages_give_the_same_bits_over_sites_as_in_process_and_need_fewer_bytes(
    tmp_path, tiny_model, sites, kind
):
    changes = (*CHANGES, f"selectors.comm_dtype={kind}")
    here = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, name="here"))
    cfg = settings(tmp_path, tiny_model, *changes, name="there")
    there = pipeline.train_selectors(cfg, connect=over(DictGrid(sites[0])))
    assert without_traffic(here) == without_traffic(there)
    whole = settings(tmp_path, tiny_model, *CHANGES, "selectors.rounds=3", name="whole")
    first = lines(pipeline.train_selectors(whole) / "metrics.jsonl")[0]
    mine = lines(here / "metrics.jsonl")[0]
    least, most = {"bfloat16": (0.5, 0.5), "int8": (0.25, 0.3)}[kind]
    for key in ("bytes_up", "bytes_down"):
        assert least * first[key] <= mine[key] <= most * first[key]


def test_a_server_without_any_comparison_trains_over_its_sites_and_goes_on_with_the_policy(tmp_path, tiny_model, sites):
    nodes, _, _ = sites
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"question {i}?\n" for i in range(8)))
    changes = (*CHANGES, "data.path=[]", f"data.prompts={prompts}", "selectors.keep_every=0")
    cfg = settings(tmp_path, tiny_model, *changes)
    run = pipeline.train_selectors(cfg, connect=over(DictGrid(nodes)))
    assert json.loads((run / "selectors/groups.json").read_text())["adapter_of"].keys() == {
        f"person-{k}" for k in range(6)
    }
    card = (fedbiscuit.export_run(run, tmp_path / "export", selector="all") / "README.md").read_text()
    assert "held by 6 clients on machines of their own" in card
    assert "whoever ran the server was sent none of their comparisons" in card
    assert "simulated" not in card
    kept = (run / "selectors/u1/adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "selectors")  # as a crash right behind the last round would leave it
    pipeline.run_all(cfg, resume=True)
    assert (run / "selectors/u1/adapter_model.safetensors").read_bytes() == kept
    more = settings(tmp_path, tiny_model, *changes, "selectors.rounds=9", name="more")
    with pytest.raises(DataError, match=r"data\.path: empty; name the files"):
        pipeline.train_selectors(more)
    found = json.loads((run / "evaluation.json").read_text())
    assert found["selectors"] is None
    assert found["policy"]["judges"][0]["name"] == "the selectors' vote"


def test_a_site_that_leaves_for_ever_is_named_and_the_others_go_on(tmp_path, tiny_model, sites):
    nodes, _, _ = sites
    calls = []

    def leaves(data: bytes) -> bytes | None:
        calls.append(data)
        return None if len(calls) > 6 else nodes_before(data)

    nodes_before, nodes[3] = nodes[3], leaves
    cfg = settings(tmp_path, tiny_model, *CHANGES, "selectors.cohort_size=2", name="there")
    run = pipeline.train_selectors(cfg, connect=over(DictGrid(nodes), 1.0))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["metrics"]["num_replies"] > 0 for row in rows)


def test_a_site_that_comes_late_takes_part_from_then_on_and_the_cohort_is_whoever_is_there(tmp_path, tiny_model, sites):
    nodes, _, _ = sites
    late, calls = nodes.pop(3), []
    grid = DictGrid(nodes)

    def comes(data: bytes, answer=nodes[1]) -> bytes:
        calls.append(data)
        if len(calls) == 4:  # hello and training of two rounds
            grid.nodes[3] = late
        return answer(data)

    grid.nodes[1] = comes
    cfg = settings(tmp_path, tiny_model, *CHANGES, "selectors.cohort_size=6", name="late")
    run = pipeline.train_selectors(cfg, connect=over(grid))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [len(row["cohort"]) for row in rows] == [4, 4, 6, 6, 6, 6]
    assert {"person-2", "person-5"} <= rows[2]["grouping"].keys()


@pytest.mark.parametrize("fails_at", ["who is there", "training"])
def test_fault_81_a_round_with_too_few_changes_nothing_and_the_run_goes_on_from_there_with_the_same_bits(
    tmp_path, tiny_model, sites, fails_at, monkeypatch
):
    from fedbiscuit.backends import flower

    monkeypatch.setattr(flower, "LOOK_EVERY", 1e9)  # nobody else will come
    nodes, _, _ = sites
    whole = pipeline.train_selectors(settings(tmp_path, tiny_model, *CHANGES, name="whole"))
    cfg = settings(tmp_path, tiny_model, *CHANGES, "selectors.min_replies=4", name="stopped")
    broken = {2: nodes[2], 3: nodes[3]}

    def fails(data: bytes, answer) -> bytes:
        order = unpack_order(data)
        if not order.tasks if fails_at == "who is there" else any(task.round == 3 for task in order.tasks):
            rounds = tmp_path / "runs" / "stopped" / "metrics.jsonl"
            if rounds.exists() and len(rounds.read_text().splitlines()) == 3:
                return pack_answer(Answer(error="out of order"))
        return answer(data)

    for node, answer in broken.items():
        nodes[node] = lambda data, answer=answer: fails(data, answer)
    who = "node 2" if fails_at == "who is there" else "person-1"
    with pytest.raises(FederationError, match=rf"(min_replies is|fewer than) 4.*{who}: out of order"):
        pipeline.train_selectors(cfg, connect=over(DictGrid(nodes)))
    run = tmp_path / "runs" / "stopped"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    pipeline.train_selectors(cfg, resume=True, connect=over(DictGrid({**nodes, **broken})))
    assert without_traffic(run) == without_traffic(whole)


def test_a_job_says_how_it_has_ended_and_with_which_exit_code(tmp_path, tiny_model, sites, monkeypatch):
    nodes, _, _ = sites
    cfg = settings(tmp_path, tiny_model, *CHANGES, "selectors.rounds=3", name="job")
    (tmp_path / "job.yaml").write_text(dump_config(cfg))
    job = {
        "config": str(tmp_path / "job.yaml"),
        "ended": str(tmp_path / "ended"),
        "waiting": str(tmp_path / "waiting"),
        "folder": str(tmp_path),
        "resume": False,
    }
    job |= {
        "timeout": 60.0,
        "registered": str(tmp_path / "sites.json"),
    }
    sites_file = {
        "1": {"key": "site-a", "clients": ["person-0", "person-3"]},
        "9": {"key": "site-e", "clients": ["eve"]},
    }
    (tmp_path / "sites.json").write_text(json.dumps(sites_file))
    (tmp_path / "job").write_text(json.dumps(job))
    monkeypatch.chdir(tmp_path)
    train_remotely(DictGrid(nodes), tmp_path / "job", 7)
    assert json.loads((tmp_path / "ended").read_text()) == {"error": "", "exit_code": 0, "run": "7"}
    row = lines(tmp_path / "runs" / "job" / "metrics.jsonl")[0]
    assert row["cohort"] == ["person-0", "person-3"]
    assert row["away"]["site-e"] == "it is not connected"
    assert "registered for no site, or for another" in row["away"].values()
    with pytest.raises(ConfigError):
        train_remotely(DictGrid(nodes), tmp_path / "job", 7)
    ended = json.loads((tmp_path / "ended").read_text())
    assert ended["exit_code"] == 2
    assert "--resume" in ended["error"]


def test_whose_data_the_server_has_but_who_never_came_is_left_out_of_its_measurements_and_said(
    tmp_path, tiny_model, sites, caplog
):
    nodes, _, _ = sites
    del nodes[3]  # person-2 and person-5
    changes = (*CHANGES, "selectors.eval_every=1", "selectors.cohort_size=0")
    cfg = settings(tmp_path, tiny_model, *changes, name="there")
    run = pipeline.train_selectors(cfg, connect=over(DictGrid(nodes)))
    pipeline.evaluate(cfg)
    last = lines(run / "metrics.jsonl")[-1]["metrics"]["validation"]
    judged = json.loads((run / "evaluation.json").read_text())
    there = {"person-0", "person-1", "person-3", "person-4"}
    assert last["clients"].keys() == judged["selectors"]["clients"].keys() == there
    assert judged["left_out"]["clients that were there in no round"] == 2
    assert "2 clients, such as person-2, were there in no round" in caplog.text


def test_a_server_that_measures_with_few_of_its_clients_goes_on_to_the_policy_when_they_are_trained(
    tmp_path, tiny_model, sites
):
    nodes, _, rows = sites
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows if row["client"] in ("person-0", "person-1")))
    changes = (*CHANGES, f"data.path={few}", "selectors.cohort_size=4", "selectors.rounds=3")
    cfg = settings(tmp_path, tiny_model, *changes, name="there")
    run = pipeline.train_selectors(cfg, connect=over(DictGrid(nodes)))
    pipeline.run_all(cfg, resume=True)
    assert (run / "policy").is_dir()


def a_site_that_looks_back(folder):
    """Answers for everybody in ``world.jsonl``, and writes what it sees beside it."""
    site = Site((str(folder / "world.jsonl"),), "cpu", 1, held_out=20)
    worker = Worker(site.open_run, Rules(), folder / "ledger.jsonl")

    def answer(data: bytes) -> bytes:
        answered = worker.answer(data)
        worker.look_back()
        return answered

    return answer


def test_a_site_sees_for_itself_how_each_selector_that_comes_agrees_with_its_people_and_nothing_else_changes(
    tmp_path, tiny_model
):
    write_world(tmp_path / "world.jsonl", per_split=(8, 4, 0))
    changes = ("evaluation.compare_global=false", "selectors.num_adapters=1", "selectors.warmup_rounds=0")
    changes += ("selectors.eval_every=1", "selectors.comm_dtype=bfloat16")
    here = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, name="here"))
    cfg = settings(tmp_path, tiny_model, *changes, name="there")
    there = pipeline.train_selectors(cfg, connect=over(DictGrid({1: a_site_that_looks_back(tmp_path)})))
    assert without_traffic(here) == without_traffic(there)
    known = {row["round"] + 1: row["metrics"]["validation"]["clients"] for row in lines(here / "metrics.jsonl")}
    seen = list(read_learned(tmp_path / "learned.jsonl"))
    assert {(row["run"], row["adapter"], row["num_adapters"], row["comparisons"]) for row in seen} == {
        ("there", 0, 1, 4)
    }
    cohorts = [(row["round"], client) for row in lines(here / "metrics.jsonl") for client in row["cohort"]]
    assert sorted((row["round"], row["client"]) for row in seen) == sorted(cohorts)
    later = [row for row in seen if row["round"] > 0]
    assert len({row["accuracy"] for row in later}) > 1
    assert all(row["accuracy"] == pytest.approx(known[row["round"]][row["client"]], abs=1e-6) for row in later)


def test_the_one_selector_for_all_has_the_bits_of_the_one_in_process_and_is_nobodys_group_at_a_site(
    tmp_path, tiny_model
):
    write_world(tmp_path / "world.jsonl", per_split=(8, 4, 4))
    changes = ("evaluation.compare_global=true", "selectors.grouping_comparisons=6")
    here = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, name="here"))
    cfg = settings(tmp_path, tiny_model, *changes, name="there")
    there = pipeline.train_selectors(cfg, connect=over(DictGrid({1: a_site_that_looks_back(tmp_path)})))
    for file in ("metrics.jsonl", "global_metrics.jsonl"):
        rows = [[{**row, "bytes_up": 0, "bytes_down": 0} for row in lines(run / file)] for run in (here, there)]
        assert rows[0] == rows[1]
    seen = list(read_learned(tmp_path / "learned.jsonl"))
    assert {(row["run"], row["num_adapters"]) for row in seen} == {("there", 2), ("there/global", 1)}
    client = next(row["client"] for row in seen if row["run"] == "there" and row["round"] >= row["num_warmup_rounds"])
    [*_, last] = [row for row in seen if (row["run"], row["client"]) == ("there", client)]
    shown = what_the_site_saw(tmp_path, client)
    assert (shown.run, shown.num_groups, shown.group, shown.final) == ("there", 2, last["adapter"], last["accuracy"])


def test_what_a_site_sees_says_how_long_the_warm_up_is(tmp_path, tiny_model):
    write_world(tmp_path / "world.jsonl", per_split=(8, 4, 0))
    cfg = settings(tmp_path, tiny_model, "selectors.num_adapters=3", "selectors.warmup_rounds=2", "selectors.rounds=7")
    lm = load_lm(cfg.model)
    part = Site((str(tmp_path / "world.jsonl"),), "cpu", 1, held_out=20).open_run(terms_of(cfg, lm.digest))
    assert part.look is not None
    seen = part.look("person-0", lm.new_adapter(cfg.seed, "adapter", 0))
    assert (seen["num_adapters"], seen["num_warmup_rounds"], seen["comparisons"]) == (3, 6, 4)
