"""Runs side by side, on numbers worked out by hand."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from fedbiscuit.config import dump_config, parse_config
from fedbiscuit.evaluation.judge import PROTOCOLS, wording_digest
from fedbiscuit.evaluation.metrics import bootstrap_interval
from fedbiscuit.report.charts import win_rates
from fedbiscuit.report.comparison import (
    Method,
    Section,
    _methods,
    _title,
    alignment_curves,
    compare,
    mean_and_interval,
    read_sections,
)
from fedbiscuit.report.judgements import by_step
from fedbiscuit.report.reading import Labeler, RunView, read_run
from fedbiscuit.report.sidebyside import _figures, tables_of
from fedbiscuit.report.signs import signs_of_hacking
from fedbiscuit.report.words import kind_of_run, stage_now
from fedbiscuit.types import ConfigError


def run(accuracies: dict[str, float], *overrides: str, **more: float) -> RunView:
    """A run with one test comparison accuracy a client."""
    clients = {
        client: {"adapter": 0, "accuracy": accuracy, "comparisons": 10, "baseline_longer": 0.5}
        for client, accuracy in accuracies.items()
    }
    row = {"name": "own", "accuracy_comparisons": 0.5, "accuracy_in_order": [0.4, 0.6], "flip_rate": 0.25, **more}
    return RunView(parse_config("", overrides), "", evaluation={"selectors": {"rows": [row], "clients": clients}})


def judged(policy: str, points: dict[str, float], equal: float | None = 0.5, **more: object) -> dict:
    """What one language model said of one policy, prompt by prompt."""
    wins, losses = (sum(p == one for p in points.values()) for one in (1, 0))
    return {
        "protocol": "plain",
        "judge": {"model": "m"},
        "on": "held-out",
        "wording": wording_digest(PROTOCOLS["plain"].wording),
        "policy": policy,
        "step": 3,
        "against": "raw policy",
        "orders": "both",
        "prompts": len(points),
        "win_rate": {
            "win_rate": wins / len(points),
            "interval": [0.0, 1.0],
            "win_rate_ties_half": sum(points.values()) / len(points),
            "interval_ties_half": [0.0, 0.9],
            "wins": wins,
            "losses": losses,
            "ties": len(points) - wins - losses,
        },
        "length_controlled": None if equal is None else {"win_rate": equal, "interval": [0.1, 0.9], "slope": 0.0},
        "inconsistent": {"count": 1},
        "unparsable": {"prompts": 0},
        "outcomes": [{"digest": prompt, "points": p} for prompt, p in points.items()],
        **more,
    }


def test_a_difference_is_taken_client_by_client_and_seed_by_seed():
    old = Method("old", (run({"ann": 0.5, "bo": 0.6}, "seed=0"), run({"ann": 0.7, "cy": 0.1}, "seed=1")))
    new = Method("new", (run({"ann": 0.6, "bo": 0.5}, "seed=0"), run({"ann": 1.0, "bo": 0.9}, "seed=1")))
    found = compare(new, old)
    assert found is not None
    assert found.mean == pytest.approx((0.2 - 0.1) / 2)  # ann: (0.1 + 0.3) / 2, bo: -0.1; cy is in one of them only
    assert (found.better, found.worse, found.interval) == (1, 1, None)
    assert compare(Method("x", (run({"ann": 1.0}, "seed=7"),)), old) is None


def test_the_paired_interval_is_narrow_where_all_clients_gain_alike():
    base = {f"c{i}": 0.1 * i for i in range(10)}
    better = {client: accuracy + 0.05 for client, accuracy in base.items()}
    found = compare(Method("b", (run(better),)), Method("a", (run(base),)))
    assert found is not None
    assert found.interval is not None
    assert found.interval == pytest.approx([0.05, 0.05])
    _, wide = mean_and_interval(Method("a", (run(base),)).by_client())
    assert wide is not None
    assert wide[1] - wide[0] > 0.2


def test_an_interval_does_not_depend_on_how_the_rows_are_named():
    base, other = run({f"c{i}": 0.1 * i for i in range(10)}), run({f"c{i}": 0.9 - 0.07 * i for i in range(10)})
    found = [compare(Method(name, (other,)), Method("base", (base,))) for name in ("b", "b, rounds 20")]
    assert found[0] == found[1]


def test_the_title_says_how_many_comparisons_whatever_the_seed():
    two, one = run({"ann": 0.5, "bo": 0.6}, "seed=0"), run({"ann": 0.7}, "seed=1")
    assert _title([two]).endswith(": 2 clients with 20 test comparisons")
    assert _title([two, one]).endswith(": 1 to 2 clients with 10 to 20 test comparisons")


def test_seeds_are_averaged_after_clients():
    value, _ = mean_and_interval({0: {"ann": 0.0, "bo": 1.0}, 1: {"ann": 1.0}})
    assert value == pytest.approx((0.5 + 1.0) / 2)


def test_runs_of_one_kind_are_named_by_what_differs_and_seeds_are_one_row():
    biscuit = ("selectors.num_adapters=2", "selectors.warmup_rounds=1")
    rule = ("selectors.grouping=greedy", "selectors.regroup_every=7")
    runs = [run({"ann": 0.5}, f"seed={seed}", *biscuit, f"name=r{seed}") for seed in (1, 0)]
    runs += [run({"ann": 0.5}, "selectors.num_adapters=1"), run({"ann": 0.5}, *biscuit, *rule)]
    runs += [run({"ann": 0.5}, *biscuit, "selectors.grouping=fixed"), run({"ann": 0.5}, "selectors.population=local")]
    assert [(method.name, method.seeds) for method in _methods(runs)] == [
        ("FedBiscuit, U = 2, grouping prices, regroup_every 10", (0, 1)),
        ("FedBis", (0,)),
        ("FedBiscuit, U = 2, grouping greedy, regroup_every 7", (0,)),
        ("told the 2 groups", (0,)),
        ("local only", (0,)),
    ]


def test_a_method_with_another_budget_says_so_beside_methods_of_other_kinds():
    told = ("selectors.num_adapters=2", "selectors.grouping=fixed", "selectors.warmup_rounds=0", "selectors.rounds=20")
    runs = [run({"ann": 0.5}, "selectors.rounds=30"), run({"ann": 0.7}, *told)]
    assert [method.name for method in _methods(runs)] == ["FedBis, rounds 30", "told the 2 groups, rounds 20"]


def test_what_most_rows_have_in_common_and_what_has_no_influence_is_not_said():
    runs = [
        run({"ann": 0.5}, f"selectors.num_adapters={u}", "selectors.rounds=16", "selectors.warmup_rounds=1")
        for u in (1, 2, 3)
    ]
    runs += [run({"ann": 0.5}, "selectors.num_adapters=5", "selectors.rounds=20", "selectors.warmup_rounds=1")]
    pooled = ("selectors.population=centralized", "selectors.cohort_size=3", "selectors.server_momentum=0")
    runs += [run({"ann": 0.5}, "selectors.rounds=16", *pooled)]
    assert [method.name for method in _methods(runs)] == [
        "FedBis", "FedBiscuit, U = 2", "FedBiscuit, U = 3", "FedBiscuit, U = 5, rounds 20", "centralized",
    ]  # fmt: skip
    momentum = ("selectors.server_optimizer=momentum", "selectors.rounds=16")
    told = [run({"ann": 0.5}, *momentum, f"selectors.server_momentum={m}") for m in (0, 0.9)]
    assert [method.name for method in _methods(told)] == ["FedBis, server_momentum 0.0", "FedBis, server_momentum 0.9"]


def test_the_same_run_twice_is_refused():
    with pytest.raises(ConfigError, match="same seed"):
        list(_methods([run({"ann": 0.5}), run({"ann": 0.6}, "name=again", "evaluation.num_prompts=3")]))


def test_tables_have_no_empty_columns_and_every_method():
    section = Section("t", (Method("one", (run({"ann": 0.5, "bo": 0.7}),)), Method("two", (run({"ann": 0.6}),))))
    agreement, differences, *_ = tables_of(section)
    assert [row[0] for row in agreement[1]] == ["one", "two", "the longer answer", "the shorter answer"]
    assert "new clients" not in agreement[0]
    assert "adjusted Rand index" not in agreement[0]
    assert agreement[1][0][:2] == ["one", "1"]
    assert "0.600" in agreement[1][0]
    assert differences[1] == [["two", "+10.0", "1 / 0"]]


def test_policies_have_a_row_for_each_judge():
    aligned = run({"ann": 0.5})
    judges = [{"name": name, "win_rate": rate} for name, rate in (("vote", 0.75), ("truth", 0.5))]
    policy = {"judges": judges, "length": {"aligned": 12.0, "raw": 20.5}}
    evaluation = {**(aligned.evaluation or {}), "policy": policy}
    section = Section("t", (Method("one", (RunView(aligned.cfg, "", evaluation=evaluation),)),))
    (table,) = [table for table in tables_of(section) if table[0][0] == "aligned against raw policy"]
    assert table[1] == [
        ["one", "vote", "1", "0.750", "0.750", "12.0", "20.5"],
        ["one", "truth", "1", "0.500", "0.500", "12.0", "20.5"],
    ]


def test_runs_that_have_a_policy_alone_stand_beside_those_with_selectors_and_their_rates_have_an_interval():
    prompts = [f"p{i}" for i in range(6)]

    def aligned(seed: int, points: list[float], *overrides: str, selectors: bool = False) -> RunView:
        bare = run({"ann": 0.5}, f"seed={seed}", *overrides)
        row = {
            "name": "vote",
            "win_rate": mean(points),
            "points": dict(zip(prompts, points, strict=True)),
        }
        policy = {"judges": [row], "length": {"aligned": 12.0, "raw": 20.5}, "kl": 1.0}
        held = (bare.evaluation or {})["selectors"] if selectors else None
        return RunView(bare.cfg, "", evaluation={"selectors": held, "policy": policy})

    four = ("labels.selectors=runs/biscuit", "generation.num_completions=4")
    one, two = [1.0, 0.0, 1.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 0.5, 1.0, 0.0]
    runs = [aligned(0, one, *four), aligned(1, two, *four), aligned(0, one, selectors=True)]
    section = Section(_title(runs), tuple(_methods(runs)))
    assert section.title.endswith("1 clients with 10 test comparisons")
    tables = {table[0][0]: table for table in tables_of(section)}
    agreement = tables["agreement with held-out choices"]
    assert agreement[1][0][0].startswith("FedBis")
    assert len(agreement[1]) == 3  # one method, the longer and the shorter answer
    header, rows = tables["aligned against raw policy"]
    first = dict(zip(header, rows[0], strict=True))
    assert (first["seeds"], first["win rate"], first["each seed"]) == ("2", "0.667", "0.583 0.750")
    low, high = bootstrap_interval([mean(both) for both in zip(one, two, strict=True)], ("compare",))
    assert first["95% interval"] == f"{low:.3f} to {high:.3f}"
    assert [name for name, _ in _figures(section)] == ["agreement"]
    alone = Section(_title(runs[:2]), tuple(_methods(runs[:2])))
    assert alone.title.endswith(": policies")
    assert [table[0][0] for table in tables_of(alone)] == ["aligned against raw policy"]  # they trained no selectors
    assert _figures(alone) == []


def test_a_policy_is_called_by_the_selectors_that_labeled_for_it_and_seeds_of_these_are_one_row(tmp_path):
    for name, overrides, data in (
        ("bis", ("seed=0",), "a"), ("bis-1", ("seed=1",), "a"), ("other", ("seed=2",), "b"),
        ("biscuit", ("selectors.num_adapters=2",), "a"), ("rm", ("selectors.kind=reward",), "a"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump_config(parse_config("", overrides)))
        (tmp_path / name / "manifest.json").write_text(json.dumps({"data": {"pairs.jsonl": data}}))

    def by(name: str, seed: int = 0, *more: str) -> RunView:
        folder = tmp_path / f"by-{name}-{seed}"
        folder.mkdir()
        cfg = parse_config("", (f"labels.selectors={tmp_path / name}", "selectors.rounds=0", f"seed={seed}", *more))
        (folder / "config.yaml").write_text(dump_config(cfg))
        return read_run(folder)

    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "config.yaml").write_text("x: 1\n")
    methods = list(_methods([by("bis"), by("bis-1", 1), by("biscuit"), by("rm"), by("gone"), by("edited")]))
    assert [(method.name, method.seeds) for method in methods] == [
        ("FedBis", (0, 1)), ("FedBiscuit, U = 2", (0,)), ("FedRM", (0,)), ("labeled by gone", (0,)),
        ("labeled by edited", (0,)),
    ]  # fmt: skip
    names = [method.name for method in _methods([by("bis", 2), by("other", 2)])]  # trained on other data
    assert names == [f"FedBis, selectors of {tmp_path / 'bis'}", f"FedBis, selectors of {tmp_path / 'other'}"]
    own = read_run(tmp_path / "bis")
    assert next(_methods([own, by("bis", 5)])).name == "FedBis"
    assert kind_of_run(by("biscuit", 3)) == "a policy aligned by the selectors of biscuit"
    with pytest.raises(ConfigError, match=r"same seed \(6\)"):
        list(_methods([by("bis", 6), read_run(tmp_path / "by-bis-6")]))
    assert (
        stage_now(by("biscuit", 4, "evaluation.compare_global=true", "selectors.num_adapters=2"))
        == "the selectors are trained, nothing is labeled yet"
    )


def test_policies_of_one_seed_by_selectors_of_several_are_all_counted():
    runs = []
    for u, rate in enumerate((0.25, 0.75)):
        cfg = parse_config("", (f"labels.selectors=runs/bis-{u}", "selectors.rounds=0"))
        judges = [
            {"name": f"the vote of the selectors of bis-{u}, which labeled", "win_rate": rate},
            {"name": "truth", "win_rate": 1 - rate},
        ]
        policy = {"judges": judges, "length": {"aligned": 12.0, "raw": 20.5}}
        labeler = Labeler(parse_config("", (f"seed={u}",)))
        runs.append(RunView(cfg, "", evaluation={"selectors": None, "policy": policy}, labeler=labeler))
    (method,) = _methods(runs)
    assert (method.name, method.seeds) == ("FedBis", (0, 0))
    table, *_ = tables_of(Section("t", (method,)))
    assert [row[:5] for row in table[1]] == [
        ["FedBis", "the vote of the selectors that labeled", "2", "0.500", "0.250 0.750"],
        ["FedBis", "truth", "2", "0.500", "0.750 0.250"],
    ]


def test_a_policy_that_nobody_judges_is_compared_by_its_length_and_how_far_it_has_moved():
    bare = run({"ann": 0.5}, "selectors.local.objective=sft")
    policy = {"judges": [], "length": {"aligned": 12.0, "raw": 20.5}, "kl": 1.0}
    tuned = RunView(bare.cfg, "", evaluation={"selectors": None, "policy": policy})
    table, *_ = tables_of(Section("t", (Method("one", (tuned,)),)))
    assert table == (
        ["aligned against raw policy", "seeds", "words aligned", "words raw", "nats from raw"],
        [["one", "1", "12.0", "20.5", "1.0"]],
    )


def test_what_has_nothing_to_compare_is_told_what_to_do(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "config.yaml").write_text("labels: {selectors: runs/biscuit}\n")
    with pytest.raises(ConfigError, match="is not evaluated; run `fedbiscuit evaluate"):
        read_sections([folder])
    evaluated = {"selectors": None, "policy": None, "left_out": {}}
    (folder / "evaluation.json").write_text(json.dumps(evaluated))
    with pytest.raises(ConfigError, match="neither selectors nor a policy; align it"):
        read_sections([folder])
    policy = {"judges": [], "length": {"aligned": 1.0, "raw": 2.0}, "kl": 0.0}
    (folder / "evaluation.json").write_text(json.dumps({**evaluated, "policy": policy}))
    (section,) = read_sections([folder])
    assert len(section.methods) == 1


def test_policies_kept_on_the_way_are_curves_by_the_judge_to_trust_most_over_the_steps_that_all_seeds_have():
    def seen(seed: int, steps: dict[int, float]) -> RunView:
        aligned = run({"ann": 0.5}, f"seed={seed}")
        judges = [{"name": "own", "win_rate": 0.9}, {"name": "others", "win_rate": 0.6, "independent": True}]
        rows = [
            {"step": step, "name": name, "win_rate": rate, "words": 10.0 + seed, "kl": 1.0}
            for step, value in steps.items()
            for name, rate in (("own", 0.9), ("others", value))
        ]
        policy = {"judges": judges, "checkpoints": rows, "length": {"aligned": 12.0, "raw": 20.5}, "kl": 2.0}
        evaluation = {**(aligned.evaluation or {}), "policy": policy}
        return RunView(aligned.cfg, "", evaluation=evaluation)

    method = Method("one", (seen(0, {10: 0.4, 20: 0.5, 30: 0.6}), seen(1, {10: 0.5, 20: 0.7})))
    assert alignment_curves(method, "win_rate") == [(10, pytest.approx(0.45)), (20, pytest.approx(0.6))]
    assert alignment_curves(method, "words") == [(10, 10.5), (20, 10.5)]
    section = Section("t", (method,))
    assert [name for name, _ in _figures(section)] == ["agreement", "alignment"]
    (table,) = [table for table in tables_of(section) if table[0][0] == "aligned against raw policy"]
    assert [(table[0][-1], row[-1]) for row in table[1]] == [("nats from raw", "2.0")] * 2


def test_policies_that_were_aligned_otherwise_are_rows_of_their_own():
    runs = [run({"ann": 0.5}, "alignment.soft_labels=true"), run({"ann": 0.5}, "generation.num_completions=4")]
    assert [method.name for method in _methods(runs)] == [
        "FedBis, soft_labels True, num_completions 2",
        "FedBis, soft_labels False, num_completions 4",
    ]


def test_language_models_as_judges_have_a_row_each_with_means_over_seeds_and_intervals_over_prompts():
    one = {f"p{i}": float(i % 2) for i in range(6)}
    two = {**one, "p0": 0.5, "p2": 1.0}
    runs = []
    for seed, points, more in ((0, one, ()), (1, two, ("judge.model=m",))):
        bare = run({"ann": 0.5}, f"seed={seed}", *more)
        verdicts = (judged("aligned policy", points, 0.25 + seed / 2), judged("after step 2", points))
        runs.append(RunView(bare.cfg, "", evaluation=bare.evaluation, judged=verdicts))
    own = judged("raw policy", two, None, on="summarization", against="people's summaries", wording="0" * 64)
    runs[0] = RunView(runs[0].cfg, "", evaluation=runs[0].evaluation, judged=(*runs[0].judged, own))
    (method,) = _methods(runs)  # one of them was judged with other settings, which makes no other method
    (table,) = [t for t in tables_of(Section("t", (method,))) if t[0][0] == "judged by a language model"]
    rows = [dict(zip(table[0], row, strict=True)) for row in table[1]]
    assert [(row["policy"], row["judge"], row["seeds"]) for row in rows] == [
        ("aligned policy", "m, plain", "2"),
        ("raw policy, summarization", "m, plain, wording 00000000", "1"),
    ]
    first = rows[0]
    assert (first["win rate"], first["each seed"]) == ("0.583", "0.500 0.667")
    assert (first["ties as half"], first["at equal length"], first["undecided"]) == ("0.625", "0.500", "0.167")
    prompts = [mean([one[p] == 1, two[p] == 1]) for p in sorted(one)]
    low, high = bootstrap_interval(prompts, ("compare",))
    assert first["95% interval"] == f"{low:.3f} to {high:.3f}"
    assert (rows[1]["at equal length"], rows[1]["against"]) == ("", "people's summaries")


def test_a_run_that_only_a_language_model_judged_by_step_has_a_figure_and_signs_have_its_line():
    rows = [
        judged("aligned policy", {"a": 1.0, "b": 0.5}, step=4),
        judged("after step 2", {"a": 1.0, "b": 0.0}, step=2),
    ]
    bare = RunView(parse_config("", ()), "", judged=rows)
    assert by_step(rows) == [
        {
            "name": "m, plain (a language model)",
            "step": step,
            "policy": name,
            "win_rate": rate,
            "interval": [0.0, 0.9],
            "independent": True,
        }
        for name, step, rate in (("after step 2", 2, 0.5), ("aligned policy", 4, 0.75))
    ]
    drawn = win_rates(bare)
    assert drawn is not None
    assert "75% by m, plain (a language model)" in drawn.svg
    assert "DPO step" in drawn.svg
    policies = [
        {
            "name": name, "step": step, "judges": [], "kl": 0.0, "words": 2.0, "people_under_policy": None,
            "answers_under_raw": {"perplexity": 2.0},
        }
        for name, step in (("raw policy", 0), ("after step 2", 2), ("aligned policy", 4))
    ]  # fmt: skip
    with_signs = RunView(bare.cfg, "", judged=rows, tasks={"perplexity": {"unit": "step", "policies": policies}})
    signs = signs_of_hacking(with_signs)
    assert signs is not None
    assert "75% by m, plain (a language model)" in signs.svg
    without = signs_of_hacking(RunView(bare.cfg, "", tasks=with_signs.tasks))
    assert without is not None
    assert "no judges" in without.svg
