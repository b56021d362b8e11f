"""What came out of a run, in plain sentences, and no more than the numbers bear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbiscuit.report.markup import count, interval, percent, visible
from fedbiscuit.report.reading import RunView, validation_series
from fedbiscuit.rundir.disk import human_bytes

__all__ = ["GLOBAL", "best_judge", "kind_of_run", "row_named", "stage_now", "summary", "tiles"]

Row = Mapping[str, Any]

TRUTH = "known truth"
LONGER = "the longer answer"
MANY_FLIPS = 0.3
"""Share of comparisons from which on the page warns of it."""
GLOBAL = "one global selector"
NEW = "new clients"
"""How the names of rows begin that are about people who took part in no round."""


def row_named(run: RunView, name: str) -> Row | None:
    """The row of the selectors' table that has this name."""
    return next((row for row in run.selectors.get("rows", []) if row.get("name") == name), None)


def best_judge(run: RunView) -> Row | None:
    """The judge to trust most: the known truth, else selectors of other people, else the run's own."""
    judges = run.policy.get("judges", [])
    known = [judge for judge in judges if judge["name"].startswith(TRUTH)]
    return next(iter([*known, *(judge for judge in judges if judge.get("independent")), *judges]), None)


def kind_of_run(run: RunView) -> str:
    """The method, in a few words."""
    if run.cfg.labels.selectors:
        return f"a policy aligned by the selectors of {Path(run.cfg.labels.selectors).name}"
    chosen = run.cfg.selectors
    objective, several = chosen.local.objective, run.num_adapters > 1
    where = {"centralized": "on all data in one place", "local": "by each client alone", "federated": "federatedly"}
    if objective != "choice":
        what = f"the policy itself by {objective.upper()}"
    elif chosen.population == "local":
        what = "reward models" if chosen.kind == "reward" else "selectors"
    elif chosen.kind == "reward":
        what = f"{run.num_adapters} reward models" if several else "one reward model"
    else:
        what = f"{run.num_adapters} group selectors" if several else "one selector"
    told = f"{what}, trained {where[chosen.population]}"
    baseline = objective != "choice" or chosen.kind == "reward" or chosen.population != "federated"
    return f"{told} (a baseline)" if baseline else f"{'FedBiscuit' if several else 'FedBis'}: {told}"


def stage_now(run: RunView) -> str | None:
    """Where an unfinished run is; None where its evaluation is written."""
    if run.evaluation is not None:
        return None
    cfg = run.cfg
    if "selectors" not in run.folders and not cfg.labels.selectors:
        return f"training the selectors, round {len(run.rounds)} of {cfg.selectors.rounds} done"
    if (
        not cfg.labels.selectors
        and cfg.evaluation.compare_global
        and cfg.selectors.num_adapters > 1
        and "global" not in run.folders
    ):
        done = len(run.global_rounds)
        return f"training the global selector to compare with, round {done} of {cfg.selectors.rounds} done"
    if "policy" in run.folders:
        return "trained and aligned, not evaluated yet"
    if run.alignment:
        return f"aligning the policy, step {len(run.alignment)} of {cfg.alignment.steps} done"
    if run.labels is not None:
        return f"{count(run.labels.get('pairs', 0), 'pair')} labeled, the policy is not aligned yet"
    if run.num_completions:
        return f"the policy has answered {count(run.num_completions, 'prompt')}, nothing is labeled yet"
    return "the selectors are trained, nothing is labeled yet"


def summary(run: RunView) -> list[str]:
    """One sentence on what came out; then, where it is needed, what to be careful about."""
    stage = stage_now(run)
    if stage is not None:
        return [f"This run is not finished: {stage}.{_so_far(run)}"]
    parts, cautions = [], []
    rows = run.selectors.get("rows", [])
    if rows:
        own = rows[0]
        compared_with = [row for row in rows[1:] if row["name"] != "chance" and not row["name"].startswith(NEW)]
        others = [f"{percent(row['accuracy'], 0)} for {_with_the(row)}" for row in compared_with]
        who = "The selector" if run.num_adapters == 1 else "The selector of a client’s group"
        who = "The policy’s implicit reward" if run.cfg.selectors.local.objective != "choice" else who
        who = "A client’s own selector" if run.cfg.selectors.population == "local" else who
        compared = f" (against {', '.join([*others, '50% for chance'])})"
        parts.append(
            f"{who} agrees with {percent(own['accuracy'], 0)} of {_whose(run)} choices it has not seen{compared}"
        )
        cautions += _cautions_on_selectors(run, own)
    judge = best_judge(run)
    if judge is not None:
        by = "the known truth" if judge["name"].startswith(TRUTH) else "the selectors"
        if judge.get("independent") and not judge["name"].startswith(TRUTH):
            by = visible(str(judge["name"]))
        parts.append(
            f"the aligned policy’s answer wins against the raw policy’s on {percent(judge['win_rate'], 0)} of"
            f" prompts, as judged by {by}"
        )
        bounds = judge.get("interval")
        if bounds and bounds[0] <= 0.5 <= bounds[1]:
            cautions.append(f"The win rate could be a draw: its 95% interval is {interval(bounds)}.")
        elif not (judge.get("independent") or judge["name"].startswith(TRUTH)):
            cautions.append("The policy was trained to please these same selectors, so people may judge otherwise.")
    if not parts:
        return ["The policy is trained; nothing in this run can judge it.", *cautions]
    sentence = ", and ".join(parts)
    return [f"{sentence[:1].upper()}{sentence[1:]}.", *cautions]


def _cautions_on_selectors(run: RunView, own: Row) -> list[str]:
    bounds, cautions = own.get("interval"), []
    longer, shared = row_named(run, LONGER), row_named(run, GLOBAL)
    if bounds and bounds[0] <= 0.5:
        cautions.append(f"This is not clearly better than chance: the 95% interval is {interval(bounds)}.")
    elif longer is not None and own["accuracy"] <= longer["accuracy"]:
        cautions.append("Always taking the longer answer would have done as well.")
    if shared is not None and shared is not own and own["accuracy"] <= shared["accuracy"]:
        cautions.append("Groups did not pay here: one global selector did as well.")
    flips = own.get("flip_rate")
    if flips is not None and flips > MANY_FLIPS:
        cautions.append(
            f"In {percent(flips, 0)} of cases the verdict changes with the order of the answers. Both orders are averaged, "
            "but so many flips mean that the order still counts for much."
        )
    return cautions


def _so_far(run: RunView) -> str:
    seen = validation_series(run.rounds, "accuracy")
    if not seen:
        return ""
    first, last = seen[0], seen[-1]
    rise = f", {percent(first[1], 0)} after round {first[0]}" if len(seen) > 1 else ""
    return (
        f" After round {last[0]} selectors agree with {percent(last[1], 0)} of {_whose(run)} validation choices{rise}."
    )


def _whose(run: RunView) -> str:
    """Whose choices they are: those of the demo world are made up, and the page says so."""
    return "the demo world’s simulated people’s" if run.cfg.data.source == "demo" else "people’s"


def tiles(run: RunView) -> list[tuple[str, str]]:
    """(number, what it is) of the few numbers that one wants first."""
    found = []
    rows = run.selectors.get("rows", [])
    if rows:
        found.append((percent(rows[0]["accuracy"], 0), f"agreement with people: {rows[0]['name']}"))
    elif seen := validation_series(run.rounds, "accuracy"):
        found.append((percent(seen[-1][1], 0), f"of validation choices agreed with, after round {seen[-1][0]}"))
    judge = best_judge(run)
    if judge is not None:
        found.append((percent(judge["win_rate"], 0), f"wins of the aligned policy, judged by {_with_the(judge)}"))
    match = run.selectors.get("adjusted_rand_index")
    if match is not None:
        found.append((f"{match:.2f}", "match of the groups with the true ones (1 perfect, 0 by chance)"))
    if run.total("bytes_up"):
        sent, rounds = run.total("bytes_up"), len(run.rounds)
        found.append((human_bytes(sent).replace(".0 ", " "), f"sent up by all clients in {count(rounds, 'round')}"))
    return found


def _with_the(judge: Row) -> str:
    name = str(judge["name"])
    return name if name.startswith(("the ", "one ")) else f"the {name}"
