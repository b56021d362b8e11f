"""The evaluations of their own as tables of texts, for the terminal and for the page. One function a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedbiscuit.report.markup import count, interval, number, percent

__all__ = ["TABLES", "notes_of", "tables_of"]

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, header, rows. A column whose name begins with ``<`` is text."""
MAX_PARTS = 50


def tables_of(result: Mapping[str, Any]) -> list[Table]:
    """The tables of one ``evaluations/NAME.json``; none of a task that is not known here."""
    made = TABLES.get(str(result.get("task")))
    return [] if made is None else list(made[0](result))


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """What to know about the tables, a sentence or two each."""
    made = TABLES.get(str(result.get("task")))
    if made is None:
        return []
    left_out = [f"Left out: {reason}: {cases:,}" for reason, cases in (result.get("left_out") or {}).items() if cases]
    return [*made[1](result), *left_out]


def _summarization(result: Mapping[str, Any]) -> Iterable[Table]:
    kinds = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
    rows = [
        (one["name"], *(_with_bounds(one["rouge"][kind]) for kind in kinds), number(one["words"], 1))
        for one in result["policies"]
    ]
    header = ("<", *kinds.values(), "words")
    yield "Summaries against those that people wrote: F1, with 95% intervals over posts", header, rows
    yield from _judged("How often the summary is preferred to the one that a person wrote", result)


def _summarization_notes(result: Mapping[str, Any]) -> list[str]:
    return [
        f"{count(result['posts'], 'post')} that the policy was not trained on, greedy summaries. People's summaries have "
        f"{result['reference_words']:.1f} words on average."
    ]


def _best_of_n(result: Mapping[str, Any]) -> Iterable[Table]:
    yield from _judged(f"How often the best of {result['n']} answers is preferred to a plain one", result)
    rows = [(one["name"], *(number(one["words"][key], 1) for key in ("best", "plain"))) for one in result["policies"]]
    yield "Words an answer", ("<", "the best", "the plain one"), rows


def _best_of_n_notes(result: Mapping[str, Any]) -> list[str]:
    return [
        f"{count(result['prompts'], 'prompt')}; the selectors' vote chose by knock-out, and the plain answer is one more, "
        "which took no part. The verdict of who chose says little; that of the others counts."
    ]


def _agreement(result: Mapping[str, Any]) -> Iterable[Table]:
    rows = [
        (
            one["name"],
            percent(one["accuracy"]),
            interval(one["interval"]),
            *(percent(share) for share in one["accuracy_in_order"]),
            percent(one["flip_rate"]),
        )
        for one in result["rows"]
    ]
    header = ("<", "accuracy", "95% interval", "in order A, B", "in order B, A", "flips with order")
    yield f"Agreement with {count(result['pairs'], 'labelled pair')}", header, rows
    last = [one for one in result["rows"] if one["round"] is None]
    rules = last if len(last) > 1 else result["rows"]
    for way in ("subset", "client"):
        if way not in rules[0]:
            continue
        parts = rules[0][way]["parts"]
        rows = [
            (part, f"{found['pairs']:,}", *(percent(rule[way]["parts"][part]["accuracy"]) for rule in rules))
            for part, found in list(parts.items())[:MAX_PARTS]
        ]
        means = (
            f"{percent(rule[way]['mean']['accuracy'])} {_bracketed(interval(rule[way]['mean']['interval']))}".strip()
            for rule in rules
        )
        rows.append((f"mean over {count(len(parts), way)}", f"{result['pairs']:,}", *means))
        yield f"Accuracy by {way}", ("<", "pairs", *(rule["name"] for rule in rules)), rows


def _agreement_notes(result: Mapping[str, Any]) -> list[str]:
    many = [
        f"The table shows {MAX_PARTS} of {len(result['rows'][0][way]['parts'])} {way}s; the file has all."
        for way in ("subset", "client")
        if len(result["rows"][0].get(way, {}).get("parts", ())) > MAX_PARTS
    ]
    if result.get("trained_elsewhere"):
        many.append(
            "Clients on machines of their own trained these selectors, so it is not known here which of the pairs they were "
            "trained on."
        )
    return ["Accuracy takes both orders together; the two columns after it show each order alone.", *many]


def _alpaca_eval(result: Mapping[str, Any]) -> Iterable[Table]:
    rows = [
        (one["name"], one["file"], number(one["words"], 1), percent(one["unfinished"]), f"{one['empty']:,}")
        for one in result["policies"]
    ]
    title = f"Answers to {count(result['instructions'], 'instruction')}, for alpaca_eval"
    yield title, ("<", "<file", "words", "cut off", "empty"), rows


def _alpaca_eval_notes(result: Mapping[str, Any]) -> list[str]:
    notes = ["Cut off: answers that reached generation.max_new_tokens."]
    if result.get("system"):
        notes.append(
            f"Before each instruction stood generation.system, as in training and labeling: {result['system']!r}"
        )
    return notes


def _perplexity(result: Mapping[str, Any]) -> Iterable[Table]:
    rows = [
        (
            one["name"],
            _perplexity_text(one["answers_under_raw"]),
            _perplexity_text(one["people_under_policy"]),
            number(one["kl"], 2),
            number(one["words"], 1),
            percent(one["unfinished"]),
        )
        for one in result["policies"]
    ]
    header = (
        "<",
        "its answers, under the raw policy",
        "people's answers, under it",
        "nats from raw",
        "words",
        "cut off",
    )
    yield "Signs of reward hacking: perplexities with 95% intervals, distance and length", header, rows
    yield from _judged("How often its answer is preferred to the raw one", result)


def _perplexity_notes(result: Mapping[str, Any]) -> list[str]:
    return [
        f"{count(result['prompts'], 'held-out prompt')}, {count(result['people'], 'preferred answer')} of people. A policy "
        "that pleases the selectors more and more, but not the judges that are independent of them, is exploiting them; its "
        "answers then often grow longer, or odd to the raw policy."
    ]


def _judged(title: str, result: Mapping[str, Any]) -> Iterable[Table]:
    rows = [
        (
            one["name"],
            judge["name"],
            percent(judge["win_rate"]),
            interval(judge["interval"]),
            "-".join(str(judge[key]) for key in ("wins", "ties", "losses")),
        )
        for one in result["policies"]
        for judge in one["judges"]
    ]
    if rows:
        yield title, ("<", "<judged by", "win rate", "95% interval", "wins-ties-losses"), rows


def _with_bounds(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['f']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _perplexity_text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return number(None)
    bounds = found["interval"]
    return f"{found['perplexity']:.2f}" + (f" ({bounds[0]:.2f}–{bounds[1]:.2f})" if bounds else "")


def _bracketed(text: str) -> str:
    return f"({text})" if text else ""


TABLES: dict[str, tuple[Callable[[Mapping[str, Any]], Iterable[Table]], Callable[[Mapping[str, Any]], list[str]]]] = {
    "summarization": (_summarization, _summarization_notes),
    "best-of-n": (_best_of_n, _best_of_n_notes),
    "agreement": (_agreement, _agreement_notes),
    "alpaca-eval": (_alpaca_eval, _alpaca_eval_notes),
    "perplexity": (_perplexity, _perplexity_notes),
}
"""By task: its tables, and the notes to them."""
