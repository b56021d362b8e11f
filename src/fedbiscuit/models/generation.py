"""The policy writes: several completions a prompt, from one prefill, each a function of its own key.

Prompts are packed (``trees.py``) and their keys and values kept once for all completions (``decoding.py``); a row that has
ended costs nothing more.

A completion depends on (seed, prompt, number of the completion) and on the logits; not on which other prompts share its
batch, but for the last bits of floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbiscuit.models.decoding import Cache
from fedbiscuit.models.lm import LM
from fedbiscuit.types import seed_for

__all__ = ["Completion", "Sampling", "generate"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. temperature 0 is greedy."""

    max_new_tokens: int = 80
    temperature: float = 0.7
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What was written: its text, its tokens with the end token if it wrote one, and whether it did."""

    tokens: tuple[int, ...]
    text: str
    finished: bool


@torch.no_grad()
def generate(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    num_completions: int,
    how: Sampling,
    key: tuple[object, ...],
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[list[Completion]]:
    """``num_completions`` completions for each prompt (token ids), sampled with the adapter as it is now.

    progress: is told how many tokens the longest one has; what it raises ends the writing.

    Prompts are cut off by position: the completion is what stands behind the prompt's last place (mistake 12).
    """
    rows = len(prompts) * num_completions
    draws = [
        torch.Generator().manual_seed(seed_for(*key, tuple(p), i)) for p in prompts for i in range(num_completions)
    ]
    ends = {lm.end, *_end_tokens(lm)}
    tokens: list[list[int]] = [[] for _ in range(rows)]
    finished = [False] * rows
    lm.model.eval()
    forest = lm.pack(prompts)
    cache = Cache(forest.paths, num_completions, lm.device)
    logits = lm.logits(lm.prefill(forest, cache)).repeat_interleave(num_completions, 0)
    live = list(range(rows))
    for step in range(how.max_new_tokens):
        uniform = torch.stack([torch.rand((), generator=draws[row]) for row in live])
        chosen = _sample(logits, how, uniform.to(lm.device))
        for row, token in zip(live, chosen.tolist(), strict=True):
            tokens[row].append(token)
            finished[row] = token in ends
        progress(step + 1)
        stay = [i for i, row in enumerate(live) if not finished[row]]
        if not stay or step + 1 == how.max_new_tokens:
            break
        if len(stay) < len(live):
            keep = torch.tensor(stay, device=lm.device)
            cache.select(keep)
            chosen = chosen[keep]
            live = [live[i] for i in stay]
        logits = lm.logits(lm.next_hidden(chosen, cache))
    done = [Completion(tuple(t), lm.decode(t).strip(), end) for t, end in zip(tokens, finished, strict=True)]
    return [done[i : i + num_completions] for i in range(0, rows, num_completions)]


def _sample(logits: Tensor, how: Sampling, uniform: Tensor) -> Tensor:
    """(n,) tokens from (n, vocabulary) logits by inverting the cumulative distribution at (n,) uniform draws."""
    if how.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / how.temperature, -1)
    if how.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= how.top_p
        probabilities = probabilities.scatter(-1, order, ranked.masked_fill(outside, 0.0))
    cumulative = probabilities.double().cumsum(-1)
    place = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True)
    return place.clamp(max=logits.shape[-1] - 1)[:, 0]


def _end_tokens(lm: LM) -> set[int]:
    """The further end tokens that the model's own generation settings name (Gemma's end of turn)."""
    named = lm.model.generation_config.eos_token_id
    return set(named) if isinstance(named, list) else {named} if named is not None else set()
