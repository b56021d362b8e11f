"""The page, top to bottom: what came out, tables, figures, examples, what was left out, and how to do it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedbiscuit.report.canvas import Drawing
from fedbiscuit.report.charts import accuracy_by_client, alignment_by_step, calibration_curve, win_rates
from fedbiscuit.report.judgements import judgement_notes, judgement_table
from fedbiscuit.report.markup import Cell, count, duration, escaped, interval, number, percent, shortened, table
from fedbiscuit.report.plots import accuracy_by_round, bytes_by_round, flips_by_round, groups_over_time
from fedbiscuit.report.reading import RunView
from fedbiscuit.report.signs import signs_of_hacking
from fedbiscuit.report.style import stylesheet
from fedbiscuit.report.tasks import notes_of, tables_of
from fedbiscuit.report.words import kind_of_run, stage_now, summary, tiles

__all__ = ["render"]

MAX_TEXT = 1500
MAX_CLIENTS = 50

FIGURES: tuple[Callable[[RunView], Drawing | None], ...] = (
    accuracy_by_round,
    accuracy_by_client,
    groups_over_time,
    flips_by_round,
    calibration_curve,
    win_rates,
    signs_of_hacking,
    alignment_by_step,
    bytes_by_round,
)
"""In the order of the page; a figure without data is left out."""


def render(run: RunView, refresh: int = 0) -> str:
    """The whole page. A function of what is in the folder: no clock, no path, nothing random.

    ``refresh``: seconds after which a browser loads the page again, for a run that goes on; 0: never.
    """
    sections = "\n".join(part for section in SECTIONS if (part := section(run)))
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{again}'
        f"<title>{escaped(run.cfg.name)} · fedbiscuit report</title>\n<style>{stylesheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _head(run: RunView) -> str:
    first, *cautions = summary(run)
    items = "".join(f"<li><b>{escaped(value)}</b><span>{escaped(what)}</span></li>" for value, what in tiles(run))
    return (
        f'<header>\n<p class="kind">fedbiscuit report · {escaped(kind_of_run(run))}</p>\n'
        f"<h1>{escaped(run.cfg.name)}</h1>\n"
        f'<p class="lead">{escaped(first)}</p>\n'
        + "".join(f"<p>{escaped(caution)}</p>\n" for caution in cautions)
        + (f'<ul class="tiles">{items}</ul>\n' if items else "")
        + "</header>"
    )


def _selectors(run: RunView) -> str:
    rows = run.selectors.get("rows") or []
    if not rows:
        return ""
    header = ("<", "accuracy", "worst tenth of clients", "flips", "calibration error", "loss")
    cells = [
        (
            Cell(row["name"]),
            Cell(percent(row["accuracy"]), interval(row.get("interval"))),
            Cell(percent(row.get("worst_decile"))),
            Cell(percent(row.get("flip_rate"))),
            Cell(number(row.get("calibration_error"))),
            Cell(number(row.get("loss"))),
        )
        for row in rows
    ]
    temperature, cooled = run.selectors.get("temperature"), rows[0].get("calibration_error_at_temperature")
    cooler = (
        ""
        if temperature is None or cooled is None
        else (
            f" At a temperature of {temperature:.2f}, fitted on validation comparisons, the first row’s calibration error is "
            f"{cooled:.3f}."
        )
    )
    match = run.selectors.get("adjusted_rand_index")
    found = "" if match is None else f" Groups against the true ones: adjusted Rand index {match:.2f} (1 is perfect)."
    who = "selectors" if run.cfg.selectors.local.objective == "choice" else "policy’s rewards"
    return (
        f"<section>\n<h2>Do the {who} agree with people?</h2>\n"
        + table(f"{who[:1].upper()}{who[1:]} on test comparisons", header, cells, main=0)
        + '<p class="note">On test comparisons that nobody trained on. Accuracy: mean over clients of how often the '
        "client’s choice is met, with its 95% interval. Flips: how often swapping the two answers changes the verdict. "
        f"Calibration error: how far stated certainty is from how often it is right. Loss in nats.{cooler}{found}</p>\n"
        "</section>"
    )


def _policy(run: RunView) -> str:
    judges = run.policy.get("judges") or []
    if not judges:
        return ""
    rows = [
        (
            Cell(judge["name"]),
            Cell(percent(judge["win_rate"]), interval(judge.get("interval"))),
            Cell("–".join(str(judge[key]) for key in ("wins", "ties", "losses")) if "wins" in judge else "–"),
        )
        for judge in judges
    ]
    length = run.policy.get("length") or {}
    words = (
        f" Answers have {length['raw']:.1f} words on average raw, {length['aligned']:.1f} aligned."
        if {"raw", "aligned"} <= set(length)
        else ""
    )
    if "kl" in run.policy:
        words += (
            f" It finds its own answers likelier than the raw policy does, by {run.policy['kl']:.1f} nats an answer."
        )
    pairs = (run.labels or {}).get("pairs")
    words += f" It was aligned on {count(pairs, 'pair')} of answers that the selectors labeled." if pairs else ""
    return (
        "<section>\n<h2>Is the aligned policy better than the raw one?</h2>\n"
        + table("Aligned against raw policy", ("<judged by", "win rate", "wins–ties–losses"), rows)
        + '<p class="note">On prompts that the policy was not trained on; each pair of answers judged in both orders, ties count '
        f"half, with 95% intervals.{words}</p>\n</section>"
    )


def _tasks(run: RunView) -> str:
    made = [(tables_of(result), notes_of(result)) for result in run.tasks.values()]
    made += [([judgement_table(run.judged)], judgement_notes())] if run.judged else []
    parts = []
    for tables, notes in made:
        for title, header, rows in tables:
            cells = [tuple(map(Cell, row)) for row in rows]
            parts.append(f"<h3>{escaped(title)}</h3>\n" + table(title, header, cells))
        parts += [f'<p class="note">{escaped(note)}</p>\n' for note in notes]
    return f"<section>\n<h2>Further evaluations</h2>\n{''.join(parts)}</section>" if parts else ""


def _figures(run: RunView) -> str:
    drawings = [drawing for make in FIGURES if (drawing := make(run)) is not None]
    if not drawings:
        return ""
    figures = "\n".join(
        f'<figure id="{d.name}">\n<h3>{escaped(d.title)}</h3>\n{d.svg}<figcaption>{escaped(d.caption)}</figcaption>\n'
        "</figure>"
        for d in drawings
    )
    return f'<section>\n<h2>How it went</h2>\n<div class="figures">\n{figures}\n</div>\n</section>'


def _examples(run: RunView) -> str:
    examples = run.policy.get("examples") or []
    if not examples:
        return ""
    cards = "\n".join(_example(example) for example in examples)
    return (
        "<section>\n<h2>Examples</h2>\n"
        '<p class="note">The first held-out prompts, not chosen by hand.</p>\n'
        f"{cards}\n</section>"
    )


def _example(example: Mapping[str, Any]) -> str:
    answers = "".join(
        f'<div class="{key}"><h4>{name}</h4><p class="text" dir="auto">{_long(example[key])}</p></div>'
        for key, name in (("raw", "raw policy"), ("aligned", "aligned policy"))
    )
    prompt = f'<h3 class="prompt text" dir="auto">{_long(example["prompt"])}</h3>'
    return f'<article class="card">{prompt}<div class="pair">{answers}</div></article>'


def _long(text: object) -> str:
    return escaped(shortened(str(text).strip(), MAX_TEXT)) or "<em>(empty)</em>"


def _left_out(run: RunView) -> str:
    if not (run.left_out or run.refused or run.kept_seats or run.away):
        done = bool(run.evaluation) and bool(run.rounds)
        return (
            "<section>\n<h2>Left out and refused</h2>\n<p>Nothing was left out, and no client’s reply was refused.</p>\n"
            "</section>"
            if done
            else ""
        )
    parts = []
    if run.left_out:
        amounts = [(Cell(reason), Cell(f"{cases:,}")) for reason, cases in run.left_out.items()]
        parts.append(table("What was left out", ("<left out", "how many"), amounts))
    parts += _by_name("Refused replies", ("<client", "replies refused", "<last reason"), run.refused)
    parts += _by_name("Clients that chose no new seat", ("<client", "regroupings", "<last reason"), run.kept_seats)
    parts += _by_name("Sites that took no part", ("<site", "rounds", "<last reason"), run.away)
    return f"<section>\n<h2>Left out and refused</h2>\n{''.join(parts)}</section>"


def _by_name(title: str, header: tuple[str, str, str], found: Mapping[str, tuple[int, str]]) -> list[str]:
    """A table of who, how often and why; none where there is nobody."""
    rows = [
        (Cell(name, kind="code"), Cell(f"{times:,}"), Cell(shortened(reason, 300), kind="left code"))
        for name, (times, reason) in list(found.items())[:MAX_CLIENTS]
    ]
    more = f'<p class="note">and {len(found) - MAX_CLIENTS} more; see metrics.jsonl</p>\n'
    return [table(title, header, rows), *([more] if len(found) > MAX_CLIENTS else [])] if found else []


UNITS = {
    "selectors": ("training the selectors", "round"),
    "global": ("training the global selector to compare with", "round"),
    "generation": ("the policy writes completions", "prompt"),
    "labels": ("the selectors choose", "pair"),
    "alignment": ("aligning the policy", "step"),
    "evaluation": ("evaluation", ""),
}


def _timings(run: RunView) -> str:
    if not run.timings:
        return ""
    seconds: dict[str, float] = {}
    steps: dict[str, int] = {}
    for row in run.timings:
        stage = str(row["stage"])
        seconds[stage] = seconds.get(stage, 0.0) + row["seconds"]
        steps[stage] = max(steps.get(stage, 0), row["step"])
    rows = []
    for stage, spent in seconds.items():
        what, unit = UNITS.get(stage, (stage, "step"))
        done = count(steps[stage], unit) if unit else ""
        each = f"{duration(spent / steps[stage])} a {unit}" if unit and steps[stage] else ""
        rows.append((Cell(what), Cell(duration(spent)), Cell(done), Cell(each)))
    rows.append((Cell("together"), Cell(duration(sum(seconds.values()))), Cell(""), Cell("")))
    return (
        "<section>\n<h2>Where the time went</h2>\n"
        + table("Time by stage", ("<stage", "time", "work done", "each"), rows, main=len(rows) - 1)
        + "</section>"
    )


def _settings(run: RunView) -> str:
    rows = [
        (Cell(name, kind="code"), Cell(value, kind="left code"))
        for name, value in _leaves(run.manifest)
        if value not in ("", "None")
    ]
    versions = table("Versions", ("<what", "<value"), rows) if rows else ""
    return (
        "<section>\n<h2>To do it again</h2>\n"
        f"<details><summary>All settings of this run (config.yaml)</summary><pre>{escaped(run.config_text)}</pre></details>\n"
        + (f"<details><summary>Versions, machine and data</summary>{versions}</details>\n" if versions else "")
        + "</section>"
    )


def _leaves(values: Mapping[str, Any], place: str = "") -> list[tuple[str, str]]:
    """``{"data": {"a.jsonl": "12ab"}}`` as ``[("data: a.jsonl", "12ab")]``."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{place}: {key}" if place else str(key)
        found += _leaves(value, name) if isinstance(value, Mapping) else [(name, str(value))]
    return found


def _foot(run: RunView) -> str:
    stage = stage_now(run)
    more = "" if stage is None else " The run is not finished: this page shows what there was when it was made."
    return (
        "<footer>Made by fedbiscuit from the files of this run folder; the numbers behind every figure are in its "
        f".jsonl and .json files.{more}</footer>"
    )


SECTIONS: tuple[Callable[[RunView], str], ...] = (
    _head,
    _selectors,
    _policy,
    _tasks,
    _figures,
    _examples,
    _left_out,
    _timings,
    _settings,
    _foot,
)
