"""What the loader of a data set has made of it, in lines to look at before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedbiscuit.data.check import describe
from fedbiscuit.data.jsonlines import shown
from fedbiscuit.data.sources import Dataset

__all__ = ["describe_dataset"]


def describe_dataset(dataset: Dataset, count_tokens: Callable[[str], int] | None = None) -> str:
    """Clients and parts, lengths, what was left out, how many prompts there are, and the first choice."""
    kept = [
        ((f"client {client}, {part}", number), replace(comparison, client=client, split=part))
        for client, data in sorted(dataset.clients.items())
        for part in ("train", "validation", "test")
        for number, comparison in enumerate(getattr(data, part), 1)
    ]
    told = [f"left out: {reason}: {count:,}" for reason, count in dataset.left_out.items() if count]
    warnings = [message for message in dataset.warnings if not message.startswith("left out: ")]
    report = describe(kept, dataset.digests, errors=[], warnings=warnings, count_tokens=count_tokens)
    prompts, held_out = len(dataset.prompts), len(dataset.held_out_prompts)
    lines = [
        report.render(),
        "",
        *told,
        f"prompts: {prompts:,} to align a policy on, {held_out:,} held out to evaluate it",
    ]
    if kept:
        first = kept[0][1]
        better, worse = (first.output_b, first.output_a) if first.choice == 1 else (first.output_a, first.output_b)
        texts = {"prompt": first.prompt, "preferred" if worse else "answer": better, "other": worse}
        lines += ["", f"the first comparison, of {first.client}:" if worse else f"the first answer, of {first.client}:"]
        lines += [f"  {name:<10} {shown(text, 90)}" for name, text in texts.items() if text]
    return "\n".join(lines)
