"""Trees against padded full-vocabulary steps: selector step, labelling of 4 completions, DPO step.

    python benchmarks/trees.py [--repeats 3] [--model REFERENCE]

One process, the two ways in turn, medians and ratios; both ways are checked to give the same numbers first. The plain way
is what the original system does: padded batches, both orders as separate rows, logits of the whole vocabulary at every
position, the reference computed again in every DPO step. Texts are random words with the lengths of TL;DR: posts of 150 to
400 tokens, summaries of 20 to 60.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedbiscuit.config import LoraSettings, ModelSettings
from fedbiscuit.data.encoding import load_template
from fedbiscuit.models.lm import LM, load_lm
from fedbiscuit.models.losses import choice_loss, dpo_loss
from fedbiscuit.models.policy import Pair, encode_pair, pair_dpo_loss, reference_log_probs
from fedbiscuit.models.selector import Selector, letter_margins, selector_loss
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


def comparisons(count: int) -> list[Comparison]:
    rng = rng_for("benchmark", "lengths")
    return [
        Comparison(
            text(rng.randint(150, 400), "post", i),
            text(rng.randint(20, 60), "a", i),
            text(rng.randint(20, 60), "b", i),
            rng.randint(0, 1),
        )
        for i in range(count)
    ]


# The plain way


def padded_logits(lm: LM, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(n, longest, vocabulary) logits of right-padded sequences, and the (n,) lengths."""
    longest = max(map(len, sequences))
    ids = torch.tensor([list(s) + [lm.end] * (longest - len(s)) for s in sequences], device=lm.device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=lm.device)
    logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits, mask.sum(-1)


def plain_choice_logits(selector: Selector, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(n, 2) logits of the letters at the last position, out of the whole tensor."""
    logits, lengths = padded_logits(selector.lm, sequences)
    last = logits[torch.arange(len(lengths)), lengths - 1]
    return last[:, list(selector.letters)].float()


def plain_selector_loss(selector: Selector, encoded: Sequence) -> Tensor:
    sequences = [ids for item in encoded for ids in (item.ab, item.ba)]
    choices = torch.tensor([c for item in encoded for c in (item.choice, 1 - item.choice)])
    return choice_loss(plain_choice_logits(selector, sequences), choices.to(selector.lm.device))


def plain_log_probs(lm: LM, pairs: Sequence[Pair]) -> Tensor:
    """(n, 2) log-probabilities by full log-softmax over padded sequences."""
    sequences = [(*p.prompt, *r) for p in pairs for r in (p.chosen, p.rejected)]
    starts = [len(p.prompt) for p in pairs for _ in range(2)]
    logits, lengths = padded_logits(lm, sequences)
    log_probs = logits.float().log_softmax(-1)
    sums = []
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        targets = torch.tensor(sequence[start:], device=lm.device)
        places = torch.arange(start - 1, int(lengths[row]) - 1, device=lm.device)
        sums.append(log_probs[row, places].gather(-1, targets[:, None]).sum())
    return torch.stack(sums).view(-1, 2)


def lively_adapter(lm: LM, u: int) -> Weights:
    """An adapter that does something: B is small and random instead of zero, so that equal results mean something."""
    generator = torch.Generator().manual_seed(u)
    fresh = lm.new_adapter("benchmark", u)
    return {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.01 for n, w in fresh.items()}


# Measuring


def backward(lm: LM, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        lm.model.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return step


def measure(name: str, plain: Callable[[], Tensor], ours: Callable[[], Tensor], repeats: int) -> None:
    """Both in turn; prints medians of wall and CPU seconds and their ratios."""
    expected, found = plain(), ours()
    difference = float((expected - found).abs().max())
    assert difference < 1e-3, f"{name}: the two ways differ by {difference}"
    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "trees": []}
    for _ in range(repeats):
        for way, call in (("plain", plain), ("trees", ours)):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            seconds[way].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in seconds.items()}
    (plain_wall, plain_cpu), (our_wall, our_cpu) = medians["plain"], medians["trees"]
    print(
        f"{name:<58} plain {plain_wall:6.2f} s  trees {our_wall:6.2f} s  "
        f"ratio {plain_wall / our_wall:4.2f} wall {plain_cpu / our_cpu:4.2f} CPU  (differ by {difference:.0e})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default=ModelSettings().base)
    parser.add_argument("--batch", type=int, default=8, help="comparisons, or pairs, a step")
    options = parser.parse_args()
    lm = load_lm(ModelSettings(base=options.model, lora=LoraSettings(dropout=0.0)))
    print(f"{options.model}, {torch.get_num_threads()} threads, {lm.model.dtype}, torch {torch.__version__}")
    selector = Selector.of(lm, load_template("pairwise"), (" A", " B"), 1024)
    lm.put_adapter(lively_adapter(lm, 0))
    lm.model.eval()

    encoded, _ = selector.encode(comparisons(options.batch))
    measure(
        f"selector step, both orders, {options.batch} comparisons",
        in_padded(lm, backward(lm, lambda: plain_selector_loss(selector, encoded))),
        backward(lm, lambda: selector_loss(selector, encoded)),
        options.repeats,
    )

    preferences = [
        encode_pair(lm, lm.chat_prompt(c.prompt), c.output_a, c.output_b)
        for c in comparisons(max(2, options.batch // 2))
    ]
    reference = reference_log_probs(lm, preferences)

    def plain_dpo() -> Tensor:
        with torch.no_grad(), lm.adapter_off():
            again = plain_log_probs(lm, preferences)
        return dpo_loss(plain_log_probs(lm, preferences), again, 0.1)[0]

    def recomputed() -> Tensor:
        return pair_dpo_loss(lm, preferences, reference_log_probs(lm, preferences), 0.1)[0]

    plain_step = in_padded(lm, backward(lm, plain_dpo))
    size = len(preferences)
    measure(f"DPO step, {size} pairs, reference recomputed", plain_step, backward(lm, recomputed), options.repeats)
    stored = backward(lm, lambda: pair_dpo_loss(lm, preferences, reference, 0.1)[0])
    measure(f"DPO step, {size} pairs, reference stored", plain_step, stored, options.repeats)

    posts = [text(275, "label post", i) for i in range(1)]
    texts = [text(40, "completion", i) for i in range(4)]
    pairs = [Comparison(post, a, b) for post in posts for i, a in enumerate(texts) for b in texts[i + 1 :]]
    to_label, _ = selector.encode(pairs)
    adapters = [lively_adapter(lm, u) for u in range(3)]

    def plain_labels() -> Tensor:
        out = []
        with torch.no_grad():
            for weights in adapters:
                lm.put_adapter(weights)
                logits = plain_choice_logits(selector, [ids for item in to_label for ids in (item.ab, item.ba)])
                out.append((logits[:, 0] - logits[:, 1]).view(-1, 2))
        return torch.stack(out)

    measure(
        "labelling all pairs of 4 completions, 3 selectors, 1 prompt",
        in_padded(lm, plain_labels),
        lambda: letter_margins(selector, adapters, to_label, batch_size=6),
        options.repeats,
    )
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def in_padded(lm: LM, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call on the model with transformers' own attention."""

    def run() -> Tensor:
        with lm.padded():
            return call()

    return run


if __name__ == "__main__":
    main()
