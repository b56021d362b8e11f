"""What language models said as judges (``evaluations/judge-PROTOCOL.json``), as tables and as points by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedbiscuit.config import JudgeSettings
from fedbiscuit.evaluation.judge import HELD_OUT, PROTOCOLS, wording_digest
from fedbiscuit.report.markup import interval, percent

__all__ = ["LAST", "by_step", "judge_name", "judgement_notes", "judgement_table"]

Row = Mapping[str, Any]
LAST = "aligned policy"
"""The policy that every run has in the end; the others were kept along the way."""


def judge_name(found: Row) -> str:
    """Who judged and how, as one text: the same for all seeds that were judged alike."""
    judge = found["judge"]
    usual = JudgeSettings()
    digest = str(judge.get("digest", "")).rpartition(":")[2][:8]
    where = f" at {judge['endpoint']}" if judge.get("endpoint") else f" {digest}"
    parts = [f"{judge['model']}{where}".strip(), found["protocol"]]
    parts += [
        f"{key} {judge[key]}"
        for key in ("max_tokens", "temperature", "engine")
        if judge.get(key, getattr(usual, key)) != getattr(usual, key)
    ]
    parts += ["in one order"] if found["orders"] == "one" else []
    own = found["wording"] != wording_digest(PROTOCOLS[found["protocol"]].wording)
    parts += [f"wording {found['wording'][:8]}"] if own else []
    return ", ".join(parts)


def by_step(judged: Sequence[Row]) -> list[dict[str, Any]]:
    """Policies against the raw one on held-out prompts, as rows like those of other judges: ties count half."""
    rows = [
        {
            "name": f"{judge_name(one)} (a language model)",
            "step": one["step"],
            "policy": one["policy"],
            "win_rate": one["win_rate"]["win_rate_ties_half"],
            "interval": one["win_rate"].get("interval_ties_half"),
            "independent": True,
        }
        for one in judged
        if one["on"] == HELD_OUT
    ]
    return sorted(rows, key=lambda row: (row["name"], row["step"]))


def judgement_table(judged: Sequence[Row]) -> tuple[str, Sequence[str], Sequence[Sequence[str]]]:
    """Title, header and a row for each judge and policy."""
    header = (
        "<", "<against", "<judged by", "win rate", "95% interval", "ties as half", "at equal length", "95% interval",
        "wins-ties-losses", "undecided",
    )  # fmt: skip
    rows = []
    for one in judged:
        won, equal = one["win_rate"], one["length_controlled"]
        undecided = one["inconsistent"]["count"] + one["unparsable"]["prompts"]
        rows.append(
            (
                one["policy"] if one["on"] == HELD_OUT else f"{one['policy']}, {one['on']}",
                one["against"],
                judge_name(one),
                percent(won["win_rate"]),
                interval(won["interval"]),
                percent(won["win_rate_ties_half"]),
                percent(equal["win_rate"]) if equal else "",
                interval(equal["interval"]) if equal else "",
                "-".join(str(won[key]) for key in ("wins", "ties", "losses")),
                f"{undecided} of {one['prompts']}",
            )
        )
    return "Judged by language models", header, rows


def judgement_notes() -> list[str]:
    """How to read the table."""
    return [
        "Win rate: wins of all prompts, so ties lower it. At equal length: where both answers have as many characters, by a "
        "logistic regression, with ties as half. Undecided: the judge changed its mind with the order, or said nothing that "
        "could be read; these count as ties."
    ]
