"""What ``fedbiscuit data check`` tells about a data set: faults first, then the numbers that decide what to expect."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from fedbiscuit.data.jsonlines import shown
from fedbiscuit.types import Comparison

__all__ = ["CheckReport", "Quantiles", "describe", "longer_wins"]

FEW_COMPARISONS = 2
MANY_COMPARISONS = 8
MAX_CLIENT_ROWS = 40
NO_CLIENT = "(no client)"
SPLITS = ("train", "validation", "test")

_MARKERS = re.compile(
    r"^[ \t]*(?:(?:Response|Summary|Reply|Answer|Output) [AB]:"
    r"|(?:The )?(?:better|best|preferred|more helpful)(?: (?:response|summary|reply|answer|output|one))?(?: is)?:)"
    r"|<\|[A-Za-z0-9_ ]{1,40}\|>|</?s>|<(?:eos|bos|pad|unk)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>",
    re.MULTILINE | re.IGNORECASE,
)
# Controls but for tab and line ends, soft hyphen, zero-width, directional and other invisible characters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Minimum, median, 95% and maximum of a length."""

    low: int
    middle: float
    high: int
    top: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All of ``data check``. ``ok`` is false when there are errors, and then the files cannot be used as they are."""

    files: dict[str, str]
    num_comparisons: int
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    clients: dict[str, dict[str, int]] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    share_b: float | None = None
    unit: str = "words"
    lengths: dict[str, Quantiles] = field(default_factory=dict)
    longer_wins: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the files can be used."""
        return not self.errors

    def render(self) -> str:
        """Plain lines for a terminal; texts and names from the data are escaped."""
        lines = [f"{_clean(path)}: sha256 {digest[:16]}..." for path, digest in self.files.items()]
        lines += [f"error: {_clean(message)}" for message in self.errors]
        lines += [f"warning: {_clean(message)}" for message in self.warnings]
        lines.append(_total(self))
        if self.num_comparisons:
            lines += ["", *_numbers(self), "", *_client_table(self)]
        return "\n".join(lines)


def describe(
    kept: Sequence[tuple[tuple[str, int], Comparison]],
    files: dict[str, str],
    *,
    errors: list[str],
    warnings: list[str],
    count_tokens: Callable[[str], int] | None = None,
) -> CheckReport:
    """The report on located comparisons, given the errors and warnings that reading them gave."""
    if not kept:
        return CheckReport(files, 0, errors, warnings)
    comparisons = [comparison for _, comparison in kept]
    choices = [comparison for comparison in comparisons if comparison.output_b]  # the others are single good answers
    clients = _counts(comparisons)
    held_out = [comparison for comparison in choices if comparison.split == "test"]
    return CheckReport(
        files,
        len(comparisons),
        errors,
        [*warnings, *_small_clients(clients), *_degenerate(choices), *_odd_texts(kept)],
        clients,
        dict(Counter(comparison.split or "no split" for comparison in comparisons)),
        sum(comparison.choice == 1 for comparison in choices) / len(choices) if choices else None,
        "tokens" if count_tokens else "words",
        _lengths(comparisons, count_tokens or (lambda text: len(text.split()))),
        ({"all": longer_wins(choices)} if choices else {}) | ({"test": longer_wins(held_out)} if held_out else {}),
    )


def longer_wins(comparisons: Sequence[Comparison]) -> float:
    """Accuracy of "the answer with more characters is preferred"; ties count half. Of no comparisons: 0.5."""
    points = [_longer_is_right(comparison) for comparison in comparisons]
    return sum(points) / len(points) if points else 0.5


def _longer_is_right(comparison: Comparison) -> float:
    chosen, rejected = len(comparison.chosen), len(comparison.rejected)
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _counts(comparisons: Sequence[Comparison]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for comparison in comparisons:
        client = NO_CLIENT if comparison.client is None else comparison.client
        row = counts.setdefault(client, dict.fromkeys(SPLITS, 0))
        row[comparison.split or "train"] += 1
    return dict(sorted(counts.items()))


def _lengths(comparisons: Sequence[Comparison], count: Callable[[str], int]) -> dict[str, Quantiles]:
    known: dict[str, int] = {}

    def length(text: str) -> int:
        if text not in known:
            known[text] = count(text)
        return known[text]

    prompts = [length(comparison.prompt) for comparison in comparisons]
    answers = [
        [length(text) for text in (comparison.output_a, comparison.output_b) if text] for comparison in comparisons
    ]
    whole = "prompt and both" if any(len(both) > 1 for both in answers) else "prompt and answer"
    return {
        "prompt": _quantiles(prompts),
        "one answer": _quantiles([number for both in answers for number in both]),
        whole: _quantiles([prompt + sum(both) for prompt, both in zip(prompts, answers, strict=True)]),
    }


def _quantiles(numbers: Sequence[int]) -> Quantiles:
    ranked = sorted(numbers)
    return Quantiles(ranked[0], median(ranked), ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))], ranked[-1])


def _small_clients(clients: Mapping[str, Mapping[str, int]]) -> list[str]:
    messages = []
    nothing = [client for client, row in clients.items() if row["train"] == 0]
    if nothing:
        messages.append(
            f"clients with nothing to train on: {len(nothing)}, first {shown(nothing[0])}; they will be left out"
        )
    few = [client for client, row in clients.items() if row["train"] and sum(row.values()) <= FEW_COMPARISONS]
    if few:
        messages.append(
            f"clients with only 1 or {FEW_COMPARISONS} comparisons: {len(few)}, first {shown(few[0])}; too few to hold "
            "out both validation and test comparisons, so they may take no part in grouping or evaluation"
        )
    return messages


def _degenerate(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    letters: dict[str, set[int | None]] = {}
    counts = Counter(comparison.client or NO_CLIENT for comparison in comparisons)
    for comparison in comparisons:
        letters.setdefault(comparison.client or NO_CLIENT, set()).add(comparison.choice)
    if len(set().union(*letters.values())) == 1 and len(comparisons) > 1:
        return [f"choice: all are {comparisons[0].choice}; was the preferred answer always written in the same place?"]
    one_letter = [client for client, seen in letters.items() if len(seen) == 1 and counts[client] >= MANY_COMPARISONS]
    if not one_letter:
        return []
    return [
        f"choice: clients with {MANY_COMPARISONS} or more comparisons and always the same letter: {len(one_letter)}, "
        f"first {shown(one_letter[0])}"
    ]


def _odd_texts(kept: Sequence[tuple[tuple[str, int], Comparison]]) -> list[str]:
    """Texts that look like part of a template or of a chat format, and texts with characters that nobody sees."""
    found: dict[str, list[str]] = {"marker": [], "hidden": []}
    for (path, line), comparison in kept:
        for key in ("prompt", "output_a", "output_b"):
            text = getattr(comparison, key)
            for kind, pattern in (("marker", _MARKERS), ("hidden", _HIDDEN)):
                match = pattern.search(text)
                if match:
                    start = max(0, match.start() - 10)
                    found[kind].append(f"{path}:{line}: {key}: {shown(text[start : match.end() + 10])}")
    messages = []
    if found["marker"]:
        messages.append(
            f"{found['marker'][0]} looks like part of a template or a token; {len(found['marker'])} such texts, "
            "this is the first. They are copied as plain text, but may steer a selector"
        )
    if found["hidden"]:
        messages.append(
            f"{found['hidden'][0]} has control or invisible characters; {len(found['hidden'])} such texts, "
            "this is the first"
        )
    return messages


# Rendering


def _clean(message: str) -> str:
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", message).replace("\n", "\\n")


def _total(report: CheckReport) -> str:
    what = f"{report.num_comparisons:,} comparisons of {len(report.clients):,} clients"
    if report.ok:
        return f"{what}; errors: 0, warnings: {len(report.warnings)}"
    return f"{what} could be read; errors: {len(report.errors):,}, warnings: {len(report.warnings)}"


def _numbers(report: CheckReport) -> list[str]:
    splits = ", ".join(f"{report.splits[name]:,} {name}" for name in (*SPLITS, "no split") if name in report.splits)
    if set(report.splits) == {"no split"}:
        splits += " (a test and a validation part will be held out of each client)"
    wins = ", ".join(f"{100 * share:.1f}% of {name}" for name, share in report.longer_wins.items())
    lines = [f"splits            {splits}"]
    if report.share_b is None:
        lines.append("choice            none: single good answers, to imitate (selectors.local.objective: sft)")
    else:
        lines += [
            f"choice            B in {100 * report.share_b:.1f}%",
            f"longer answer     preferred in {wins} (in characters, ties half): what a selector has to beat",
        ]
    lines += [
        "",
        f"lengths in {report.unit:<8} {'min':>7} {'median':>7} {'95%':>7} {'max':>7}",
    ]
    for name, q in report.lengths.items():
        lines.append(f"{name:<19} {q.low:>7,} {q.middle:>7,.0f} {q.high:>7,} {q.top:>7,}")
    return lines


def _client_table(report: CheckReport) -> list[str]:
    rows = sorted(report.clients.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    names = {client: shown(client, 30)[1:-1] for client, _ in rows}
    width = max(len("client"), *(len(name) for name in names.values()))
    lines = [f"{'client':<{width}} " + " ".join(f"{split:>10}" for split in SPLITS)]
    for client, row in rows[:MAX_CLIENT_ROWS]:
        lines.append(f"{names[client]:<{width}} " + " ".join(f"{row[split]:>10,}" for split in SPLITS))
    if len(rows) > MAX_CLIENT_ROWS:
        totals = sorted(sum(row.values()) for _, row in rows[MAX_CLIENT_ROWS:])
        lines.append(f"... and {len(rows) - MAX_CLIENT_ROWS:,} more with {totals[0]:,} to {totals[-1]:,} comparisons")
    return lines
