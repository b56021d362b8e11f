"""What my selector learned, and what left this machine: read from files that are there, nothing made up where they are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbiscuit.config import load_config
from fedbiscuit.rundir import RunDir
from fedbiscuit.rundir.disk import human_bytes
from fedbiscuit.rundir.ledger import ALL_THAT_WAS_SENT, LEARNED, LEDGER, NOTHING_SENT, read_learned, read_ledger
from fedbiscuit.types import ConfigError

__all__ = ["Learned", "Left", "LeftRow", "RoundAccuracy", "what_left", "what_the_site_saw", "what_was_learned"]


@dataclass(frozen=True, slots=True)
class RoundAccuracy:
    """After so many rounds, the accuracy, 0 to 1, of the selector of the person's group on held-out judgements of this person,
    from which nothing was learned.
    """

    round: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run says of one client. ``missing``: sentences about what it does not say, and how to get it.

    group: the number of its group, from 0; num_groups: how many there are. final, pairs: accuracy at the end on test
    judgements, and on how many. with_global: how often (0 to 1) my selector and the global one choose the same on them.
    """

    run: str
    client: str
    rounds: tuple[RoundAccuracy, ...]
    group: int | None
    num_groups: int | None
    final: float | None
    pairs: int | None
    with_global: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeftRow:
    """What was asked and what left in one round of one run, of all clients of the site. asked: how many tasks of each kind.

    round: its number, from 0 as a server counts them; of messages that belong to none, such as "who is here?", a dash.
    """

    run: str
    round: str
    asked: dict[str, int]
    deltas: int
    seats: int
    bytes_out: int
    bytes_in: int


@dataclass(frozen=True, slots=True)
class Left:
    """The ledger of a site, by run and round, and a sentence that says what it means."""

    rows: tuple[LeftRow, ...]
    bytes_out: int
    bytes_in: int
    sentence: str


def what_was_learned(run: Path, client: str) -> Learned:
    """From the folder of a run; ``ConfigError`` where it is none."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no config.yaml in this folder; name the folder of a run")
    cfg, folder = load_config(run / "config.yaml"), RunDir.view(run)
    rows = folder.read_lines("metrics.jsonl")
    rounds = tuple(
        RoundAccuracy(row["round"] + 1, found[client])
        for row in rows
        if row.get("phase") != "warmup"  # in which everybody trains the same selectors
        and client in (found := (row["metrics"].get("validation") or {}).get("clients", {}))
    )
    evaluation = (folder.read_json("evaluation.json") or {}).get("selectors") or {}
    mine: Mapping[str, Any] = (evaluation.get("clients") or {}).get(client, {})
    num_groups = cfg.selectors.num_adapters if cfg.selectors.population == "federated" else None
    group = mine.get("adapter", _last_group(rows, client))
    if group is None and num_groups == 1 and (rounds or any(client in row["cohort"] for row in rows)):
        group = 0
    return Learned(
        run=run.name,
        client=client,
        rounds=rounds,
        group=group,
        num_groups=num_groups,
        final=mine.get("accuracy"),
        pairs=mine.get("comparisons"),
        with_global=mine.get("same_as_global"),
        missing=tuple(_missing(run, client, rows, bool(rounds), group, mine, num_groups)),
    )


def what_the_site_saw(site: Path, client: str) -> Learned | None:
    """From the ``learned.jsonl`` of a site, in which its worker writes how each selector that came for a client agrees with it.

    Of the run that came last, after its warm-up, in which everybody trains the same selectors; None where none came for this
    client. What was trained beside the groups (RUN/global) is nobody's group.
    """
    rows = [row for row in read_learned(site / LEARNED) if row["client"] == client and "/" not in row["run"]]
    if not rows:
        return None
    last = rows[-1]
    warmup = last.get("num_warmup_rounds", 0)  # workers of before did not say
    mine = [row for row in rows if row["run"] == last["run"] and row["round"] >= warmup]
    by_round = {row["round"]: row for row in mine}
    final = by_round[max(by_round)] if by_round else None
    return Learned(
        run=last["run"],
        client=client,
        rounds=tuple(RoundAccuracy(number, row["accuracy"]) for number, row in sorted(by_round.items())),
        group=final["adapter"] if final else None,
        num_groups=last["num_adapters"],
        final=final["accuracy"] if final else None,
        pairs=final["comparisons"] if final else None,
        with_global=None,
        missing=(
            "Seen on this machine by its worker each time that the selector of your group came to be trained; the server has "
            "never seen these choices. How often it chooses as a global selector does, only a run that trains one can tell."
            if final
            else f"There are no groups yet: they are formed after the warm-up ({warmup} rounds), in which everybody trains the "
            "same selectors.",
        ),
    )


def _last_group(rows: Sequence[Mapping[str, Any]], client: str) -> int | None:
    """The group that the server last gave to this client."""
    given = [row["grouping"][client] for row in rows if client in row.get("grouping", {})]
    return given[-1] if given else None


def _missing(
    run: Path,
    client: str,
    rows: Sequence[Mapping[str, Any]],
    has_rounds: bool,
    group: int | None,
    mine: Mapping[str, Any],
    num_groups: int | None,
) -> list[str]:
    if not rows:
        return [f"No round of {run.name} is done yet."]
    warming_up = all(row.get("phase") == "warmup" for row in rows)
    if not has_rounds and not mine and group is None and not warming_up:
        return [
            f"{run.name} knows nobody called {client}: either these comparisons were not in it, or under another name."
        ]
    said = []
    if not has_rounds and not warming_up:
        said.append(
            "The run has no accuracy by round for this client: a server of real clients never sees their choices (`--site` shows "
            "what the worker here saw), and a run in one process shows it where selectors.eval_every is set."
        )
    if group is None:
        said.append("There are no groups yet: they are formed after the warm-up.")
    if not mine:
        said.append(f"There is no evaluation on held-out choices yet; `fedbiscuit evaluate {run}` makes one.")
    elif "same_as_global" not in mine and (num_groups or 1) > 1:
        said.append("No global selector was trained beside the groups; evaluation.compare_global=true trains one.")
    return said


def what_left(site: Path | None) -> Left:
    """From the folder of a site (``fedbiscuit client init``); None: no site, so nothing left through fedbiscuit."""
    if site is None:
        return Left((), 0, 0, "This station takes part in no federation that it knows of, and sends nothing by itself.")
    if not site.is_dir():
        raise ConfigError(f"{site}: there is no such folder; name the one that `fedbiscuit client init` made")
    sums: dict[tuple[str, str], Counter[str]] = {}
    asked: dict[tuple[str, str], Counter[str]] = {}
    for row in read_ledger(site / LEDGER):
        place = (row["run"] or "–", ", ".join(map(str, row["rounds"])) or "–")
        counted = {key: row.get(key, 0) for key in ("deltas", "seats", "bytes_out", "bytes_in")}
        sums.setdefault(place, Counter()).update(counted)
        asked.setdefault(place, Counter()).update(row["asked"])
    rows = tuple(
        LeftRow(
            *place, dict(asked[place]), sums[place]["deltas"], sums[place]["seats"], one["bytes_out"], one["bytes_in"]
        )
        for place, one in sums.items()
    )
    total: Counter[str] = sum(sums.values(), Counter())
    return Left(rows, total["bytes_out"], total["bytes_in"], _sentence(total) if rows else NOTHING_SENT)


def _sentence(total: Mapping[str, int]) -> str:
    deltas, seats = total["deltas"], total["seats"]
    return (
        f"{deltas} change{'s' if deltas != 1 else ''} of an adapter and {seats} number{'s' if seats != 1 else ''} of a group "
        f"left this machine, {human_bytes(total['bytes_out'])} in all. {ALL_THAT_WAS_SENT} No prompt, no answer and no choice "
        "is in them; what can be read from a change of an adapter is a question of its own, see "
        "docs/concepts.md."
    )
