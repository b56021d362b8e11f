"""How fast fedbiscuit is on one GPU, with a model of a real size: random weights, for there is nothing to learn here.

    python benchmarks/gpu.py [--shape gemma-2b] [--tokenizer FOLDER] [--repeats 5]

bfloat16, comparisons of about 1,024 tokens, 8 a batch in both orders. "of peak" is of this card's own rate in a product of two
8192 x 8192 matrices, measured in the same run. The two ways are first compared in float32, on a model of two layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import measure
import peft
import plain
import speed
import torch
import transformers
from torch import Tensor

from fedbiscuit.data.encoding import EncodedComparison, load_template
from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.lm import LM
from fedbiscuit.models.lora import fuse_lora
from fedbiscuit.models.policy import encode_pair, pair_dpo_loss, reference_log_probs
from fedbiscuit.models.selector import Selector, letter_margins, selector_loss
from fedbiscuit.models.trees import ATTENTION, SIDE_BY_SIDE
from fedbiscuit.types import Comparison

SHAPES: dict[str, dict[str, Any]] = {
    "gemma-2b": {
        "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_lm(shape: str, tokenizer: str, dtype: torch.dtype, **changes: Any) -> LM:
    """A model of that shape with LoRA of rank 8 on all linear layers."""
    config = transformers.GemmaConfig(**SHAPES[shape] | changes)
    with torch.device(DEVICE):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    model.requires_grad_(False)
    wrapped: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    wrapped.to(DEVICE).eval()
    fuse_lora(wrapped)
    return LM(wrapped, transformers.AutoTokenizer.from_pretrained(tokenizer), shape, "random")


def peak_rate(size: int = 8192) -> float:
    """bfloat16 operations a second in a large matrix product: the median of ten."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        measure.wait()
        start = time.perf_counter()
        a @ b
        measure.wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[3:])[5]


class Bench(speed.Bench):
    """As in ``speed.py``, with a random model."""

    def __init__(self, lm: LM, options: argparse.Namespace):
        self.options, self.lm, self.batch = options, lm, options.batch
        self.selector = Selector.of(lm, load_template("pairwise"), (" A", " B"), options.tokens)
        self.adapters = [plain.lively_adapter(lm, u) for u in range(3)]

    def texts(self, *key: object) -> list[Comparison]:
        """Comparisons that fill ``--tokens`` nearly or quite."""
        return plain.comparisons(self.batch, self.options.tokens / 400, *key)

    def measured(self, name: str, plainly: measure.Call, ours: measure.Call) -> measure.Result:
        """Both ways round to bfloat16 at every operation, so how far they differ is printed; float32 is tested before."""
        plainly_there = self.in_plain_model(plainly)
        expected, found = plainly_there(), ours()
        if isinstance(expected, Tensor) and isinstance(found, Tensor):
            expected, found = expected.cpu(), found.cpu()
            print(
                f"  {name}: largest difference {float((expected - found).abs().max()):.1e} of {float(expected.abs().max()):.1e}"
            )
        return measure.compare(name, plainly_there, ours, self.options.repeats, None)

    def in_plain_model(self, call: measure.Call) -> measure.Call:
        def run() -> object:
            with plain.plain_model(self.lm):
                return call()

        return run


def pieces(bench: Bench) -> Iterator[tuple[measure.Result, float]]:
    """Results, and how many tokens the work has where nothing is shared."""
    lm = bench.lm
    lm.put_adapter(bench.adapters[0])
    encoded, _ = bench.selector.encode(bench.texts("selector"))
    whole = float(sum(len(e.ab) + len(e.ba) for e in encoded))
    yield (
        bench.measured(
            f"selector step, {bench.batch} comparisons x 2 orders",
            bench.step(lambda: plain.selector_loss(bench.selector, encoded)),
            bench.step(lambda: selector_loss(bench.selector, encoded)),
        ),
        whole,
    )
    post, *texts = (
        c.prompt if i == 0 else c.output_a
        for i, c in enumerate(plain.comparisons(5, bench.options.tokens / 500, "label"))
    )
    pairs = [Comparison(post, a, b) for i, a in enumerate(texts) for b in texts[i + 1 :]]
    labelled, _ = bench.selector.encode(pairs)
    yield (
        bench.measured(
            "labelling all pairs of 4 completions with 3 selectors",
            lambda: plain.margins(bench.selector, bench.adapters, labelled, 6),
            lambda: letter_margins(bench.selector, bench.adapters, labelled, 6),
        ),
        3.0 * sum(len(e.ab) + len(e.ba) for e in labelled),
    )
    dpo = [
        encode_pair(lm, lm.start + lm.encode(c.prompt), c.output_a, c.output_b)
        for c in bench.texts("dpo")[: bench.batch // 2]
    ]
    lm.put_adapter(bench.adapters[0])
    reference = reference_log_probs(lm, dpo)
    yield (
        bench.measured(
            f"DPO step, {len(dpo)} pairs, reference stored",
            bench.step(lambda: plain.dpo(lm, dpo)),
            bench.step(lambda: pair_dpo_loss(lm, dpo, reference, 0.1)[0]),
        ),
        float(sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in dpo)),
    )
    prompts = [lm.start + lm.encode(c.prompt) for c in plain.comparisons(32, 1.0, "generation")]
    yield (
        bench.measured(
            "generation, 32 prompts x 4 completions, 48 tokens",
            lambda: plain.generate(lm, prompts, 4, 48),
            lambda: generate(lm, prompts, 4, Sampling(48, 0.7), ("benchmark",)),
        ),
        32 * 4 * 48.0,
    )


def check_in_float32(options: argparse.Namespace) -> None:
    """The loss and the gradient of a selector step, both ways, with the longest trees that one call takes and without."""
    lm = random_lm(options.shape, options.tokenizer, torch.float32, num_hidden_layers=2)
    bench = Bench(lm, options)
    lm.put_adapter(bench.adapters[0])
    encoded, _ = bench.selector.encode(plain.comparisons(4, 1.0, "check"))
    ours = bench.step(lambda: selector_loss(bench.selector, encoded))
    expected: Any = bench.in_plain_model(bench.step(lambda: plain.selector_loss(bench.selector, encoded)))()
    for limit in (0, 4096):
        lm.side_by_side = limit
        error = float(((ours() - expected) / expected).abs().max())
        print(f"float32, two layers, trees side by side up to {limit} tokens: differs by {error:.1e}", flush=True)
        assert error < 1e-3


def limits(bench: Bench, encoded: list[EncodedComparison]) -> None:
    """A selector step with a call per node, and with all trees in one padded call."""
    step = bench.step(lambda: selector_loss(bench.selector, encoded))
    for limit in (0, 4096):
        bench.lm.side_by_side = limit
        seconds = best_of(step)
        print(f"  selector step, trees side by side up to {limit}: {1e3 * seconds:.1f} ms", flush=True)


def best_of(call: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        measure.wait()
        start = time.perf_counter()
        call()
        measure.wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gemma-2b")
    parser.add_argument("--tokenizer", default=".", help="a folder with a tokenizer")
    parser.add_argument("--tokens", type=int, default=1024, help="of a comparison")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    rate = peak_rate() if DEVICE == "cuda" else measure.product_rate()
    print(f"{card}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s in bfloat16\n", flush=True)
    check_in_float32(options)
    bench = Bench(random_lm(options.shape, options.tokenizer, torch.bfloat16), options)
    for scale in (0.4, options.tokens / 400):
        encoded, _ = bench.selector.encode(plain.comparisons(bench.batch, scale, "limits"))
        tokens = len(bench.lm.pack([ids for e in encoded for ids in (e.ab, e.ba)]).tokens)
        print(f"{tokens} packed tokens of {sum(len(e.ab) + len(e.ba) for e in encoded)}:")
        limits(bench, encoded)
    bench.lm.side_by_side = SIDE_BY_SIDE
    header = (*measure.HEADER, "plain tokens/s", "ours tokens/s")
    print(f"\n{measure.table(header, [])}", flush=True)
    for result, tokens in pieces(bench):
        result.rate = rate
        cells = [*result.row(), *(f"{tokens / s:,.0f}" for s in result.seconds)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
