"""The plain way of each piece of work, as the original system and most code do it: the baseline of ``speed.py``.

Padded batches, both orders of a comparison as rows of their own, logits of the whole vocabulary at every position, one
adapter after the other, the reference computed again in every DPO step, PEFT's own layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.lora import Linear
from torch import Tensor

from fedbiscuit.data.encoding import EncodedComparison
from fedbiscuit.models.lm import LM
from fedbiscuit.models.losses import choice_loss, dpo_loss
from fedbiscuit.models.policy import Pair
from fedbiscuit.models.selector import Selector
from fedbiscuit.types import Comparison, Weights, rng_for

WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line
"""


def text(tokens: int, *key: object) -> str:
    """About ``tokens`` tokens of common words."""
    rng = rng_for("benchmark", *key)
    return " ".join(rng.choice(WORDS.split()) for _ in range(tokens))


def comparisons(count: int, scale: float, *key: object) -> list[Comparison]:
    """Random words with the lengths of TL;DR, times ``scale``: posts of 150 to 400 tokens, summaries of 20 to 60."""
    rng = rng_for("benchmark", "lengths", *key)

    def words(least: int, most: int, *part: object) -> str:
        return text(max(1, round(scale * rng.randint(least, most))), *part)

    return [
        Comparison(
            words(150, 400, "post", *key, i),
            words(20, 60, "a", *key, i),
            words(20, 60, "b", *key, i),
            rng.randint(0, 1),
        )
        for i in range(count)
    ]


def lively_adapter(lm: LM, u: int) -> Weights:
    """An adapter that does something: B is small and random instead of zero, so that equal results mean something."""
    generator = torch.Generator().manual_seed(u)
    fresh = lm.new_adapter("benchmark", u)
    return {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.01 for n, w in fresh.items()}


@contextlib.contextmanager
def plain_model(lm: LM) -> Iterator[None]:
    """The model with transformers' own attention and PEFT's own layers."""
    fused = {module: module.__dict__.pop("forward") for module in lm.model.modules() if type(module) is Linear}
    try:
        with lm.padded():
            yield
    finally:
        for module, forward in fused.items():
            module.forward = forward


def padded_logits(lm: LM, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(n, longest, vocabulary) logits of right-padded sequences, and the (n,) lengths."""
    longest = max(map(len, sequences))
    ids = torch.tensor([list(s) + [lm.end] * (longest - len(s)) for s in sequences], device=lm.device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=lm.device)
    logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits, mask.sum(-1)


def choice_logits(selector: Selector, encoded: Sequence[EncodedComparison]) -> Tensor:
    """(2 n, 2) logits of the letters at the last position, out of the whole tensor."""
    logits, lengths = padded_logits(selector.lm, [ids for item in encoded for ids in (item.ab, item.ba)])
    last = logits[torch.arange(len(lengths)), lengths - 1]
    return last[:, list(selector.letters)].float()


def selector_loss(selector: Selector, encoded: Sequence[EncodedComparison]) -> Tensor:
    """The loss of both orders."""
    choices = torch.tensor([c for item in encoded for c in (item.choice, 1 - (item.choice or 0))])
    return choice_loss(choice_logits(selector, encoded), choices.to(selector.lm.device))


@torch.no_grad()
def margins(selector: Selector, adapters: Sequence[Weights], encoded: Sequence[EncodedComparison], size: int) -> Tensor:
    """(U, n, 2) letter margins: one adapter after the other, batch by batch."""
    out = []
    for weights in adapters:
        selector.lm.put_adapter(weights)
        for start in range(0, len(encoded), size):
            logits = choice_logits(selector, encoded[start : start + size])
            out.append((logits[:, 0] - logits[:, 1]).view(-1, 2))
    return torch.cat(out).view(len(adapters), len(encoded), 2)


def log_probs(lm: LM, pairs: Sequence[Pair]) -> Tensor:
    """(n, 2) log-probabilities by full log-softmax over padded sequences."""
    sequences = [(*p.prompt, *r) for p in pairs for r in (p.chosen, p.rejected)]
    starts = [len(p.prompt) for p in pairs for _ in range(2)]
    logits, lengths = padded_logits(lm, sequences)
    every = logits.float().log_softmax(-1)
    sums = []
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        targets = torch.tensor(sequence[start:], device=lm.device)
        places = torch.arange(start - 1, int(lengths[row]) - 1, device=lm.device)
        sums.append(every[row, places].gather(-1, targets[:, None]).sum())
    return torch.stack(sums).view(-1, 2)


def dpo(lm: LM, pairs: Sequence[Pair]) -> Tensor:
    """The loss, with the reference computed again."""
    with torch.no_grad(), lm.adapter_off():
        reference = log_probs(lm, pairs)
    return dpo_loss(log_probs(lm, pairs), reference, 0.1)[0]


@torch.no_grad()
def generate(lm: LM, prompts: Sequence[Sequence[int]], num_completions: int, new_tokens: int) -> Tensor:
    """transformers' ``generate`` on a left-padded batch; (prompts x completions, new tokens)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[lm.end] * (longest - len(p)) + list(p) for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    out = lm.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
        num_return_sequences=num_completions, max_new_tokens=new_tokens, eos_token_id=lm.end, pad_token_id=lm.end,
    )  # fmt: skip
    return out[:, longest:]
