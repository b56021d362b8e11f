"""How fast fedbiscuit is, against the plain way of doing the same (``plain.py``), in one process, in turn.

    python benchmarks/speed.py [PIECE ...] [--model REFERENCE] [--batch 8] [--repeats 3]

Pieces: selector, reward, scoring, labels, dpo, trl, generation, run, loop, start; all but ``run`` when none is named. Texts are
random words with the lengths of TL;DR: posts of 150 to 400 tokens, summaries of 20 to 60. Two ways of one work are first checked
to give the same numbers, but for ``reward``, which computes something else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import plain
import torch
from measure import HEADER, Call, Result, compare, table
from torch import Tensor

from fedbiscuit.config import FederatedSettings, LoraSettings, ModelSettings
from fedbiscuit.data.encoding import load_template
from fedbiscuit.federated.algorithm import fedbiscuit_round, init_state
from fedbiscuit.federated.grouping import choose_seat
from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.lm import load_lm
from fedbiscuit.models.policy import encode_pair, pair_dpo_loss, reference_log_probs
from fedbiscuit.models.selector import Selector, letter_margins, selector_loss
from fedbiscuit.types import Comparison, Reply, Task, Weights, rng_for

HERE = Path(__file__).resolve().parent


class Bench:
    """One model and how to measure with it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.lm = load_lm(ModelSettings(base=options.model, lora=LoraSettings(dropout=0.0)))
        self.selector = Selector.of(self.lm, load_template("pairwise"), (" A", " B"), 1024)
        self.adapters = [plain.lively_adapter(self.lm, u) for u in range(3)]
        self.batch: int = options.batch

    def texts(self, *key: object) -> list[Comparison]:
        """A batch of comparisons."""
        return plain.comparisons(self.batch, self.options.scale, *key)

    def compare(self, name: str, plainly: Call, ours: Call, equal: float | None = 1e-3) -> Result:
        def in_plain_model() -> object:
            with plain.plain_model(self.lm):
                return plainly()

        self.lm.put_adapter(self.adapters[0])
        self.lm.model.eval()
        return compare(name, in_plain_model, ours, self.options.repeats, equal)

    def step(self, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Forward and backward; gives the loss and the length of the gradient."""

        def run() -> Tensor:
            self.lm.model.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            norm = torch.stack([p.grad.norm() for p in self.lm.trainable().values() if p.grad is not None]).norm()
            return torch.stack([value.detach(), norm]).cpu()

        return run


def selector_step(bench: Bench) -> Iterator[Result]:
    encoded, _ = bench.selector.encode(bench.texts("selector"))
    yield bench.compare(
        f"selector step, both orders, {bench.batch} comparisons",
        bench.step(lambda: plain.selector_loss(bench.selector, encoded)),
        bench.step(lambda: selector_loss(bench.selector, encoded)),
    )


def reward(bench: Bench) -> Iterator[Result]:
    """FedRM in the place of the plain way: the step of a reward model on the same comparisons, as fast as we can."""
    lm = load_lm(ModelSettings(base=bench.options.model, lora=LoraSettings(dropout=0.0)), scores=True)
    lm.put_adapter(plain.lively_adapter(lm, 0))
    model = Selector.of(lm, load_template("pairwise"), (" A", " B"), 1024, kind="reward")
    texts = bench.texts("selector")
    (answers, _), (pairs, _) = model.encode(texts), bench.selector.encode(texts)
    bench.lm.put_adapter(bench.adapters[0])
    yield compare(
        f"reward model (FedRM) against selector, step of {bench.batch} comparisons",
        lambda: selector_loss(model, answers).backward(),  # type: ignore[no-untyped-call]
        lambda: selector_loss(bench.selector, pairs).backward(),  # type: ignore[no-untyped-call]
        bench.options.repeats,
        equal=None,
    )


def scoring(bench: Bench) -> Iterator[Result]:
    encoded, _ = bench.selector.encode(bench.texts("scoring"))
    yield bench.compare(
        f"scoring {bench.batch} comparisons under 3 adapters (grouping)",
        lambda: plain.margins(bench.selector, bench.adapters, encoded, bench.batch),
        lambda: letter_margins(bench.selector, bench.adapters, encoded, bench.batch),
    )


def labels(bench: Bench) -> Iterator[Result]:
    post, *texts = (
        c.prompt if i == 0 else c.output_a for i, c in enumerate(plain.comparisons(5, bench.options.scale, "label"))
    )
    pairs = [Comparison(post, a, b) for i, a in enumerate(texts) for b in texts[i + 1 :]]
    encoded, _ = bench.selector.encode(pairs)
    yield bench.compare(
        "labelling all pairs of 4 completions with 3 selectors, 1 prompt",
        lambda: plain.margins(bench.selector, bench.adapters, encoded, 6),
        lambda: letter_margins(bench.selector, bench.adapters, encoded, 6),
    )


def dpo(bench: Bench) -> Iterator[Result]:
    lm = bench.lm
    texts = bench.texts("dpo")
    pairs = [encode_pair(lm, lm.chat_prompt(c.prompt), c.output_a, c.output_b) for c in texts]
    lm.put_adapter(bench.adapters[0])
    reference = reference_log_probs(lm, pairs)
    plainly = bench.step(lambda: plain.dpo(lm, pairs))

    def recomputed() -> Tensor:
        return pair_dpo_loss(lm, pairs, reference_log_probs(lm, pairs), 0.1)[0]

    name = f"DPO step, {len(pairs)} pairs, reference"
    yield bench.compare(f"{name} recomputed", plainly, bench.step(recomputed))
    yield bench.compare(f"{name} stored", plainly, bench.step(lambda: pair_dpo_loss(lm, pairs, reference, 0.1)[0]))


def trl(bench: Bench) -> Iterator[Result]:
    """TRL's DPOTrainer, its training step on the same pairs, as it comes: padded, the reference recomputed."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    lm = bench.lm
    texts = bench.texts("dpo")
    rows = [{"prompt": c.prompt, "chosen": f" {c.output_a}", "rejected": f" {c.output_b}"} for c in texts]
    pairs = [encode_pair(lm, lm.start + lm.encode(r["prompt"]), r["chosen"], r["rejected"]) for r in rows]
    lm.put_adapter(bench.adapters[0])
    reference = reference_log_probs(lm, pairs)
    with tempfile.TemporaryDirectory() as folder, plain.plain_model(lm):
        args = DPOConfig(
            output_dir=folder, per_device_train_batch_size=len(rows), report_to=[], use_cpu=lm.device.type == "cpu", bf16=False,
            fp16=False, gradient_checkpointing=False, max_length=None, beta=0.1, disable_tqdm=True,
        )  # fmt: skip
        dataset = datasets.Dataset.from_list(rows)
        trainer = DPOTrainer(model=lm.model, args=args, train_dataset=dataset, processing_class=lm.tokenizer)
        inputs = next(iter(trainer.get_train_dataloader()))

    def theirs() -> Tensor:
        lm.model.zero_grad()
        loss = trainer.compute_loss(lm.model, inputs)
        loss.backward()
        return loss.detach()

    yield bench.compare(
        f"DPO step, {len(pairs)} pairs: TRL's trainer against stored reference",
        theirs,
        bench.step(lambda: pair_dpo_loss(lm, pairs, reference, 0.1)[0]),
        equal=None,
    )


def generation(bench: Bench) -> Iterator[Result]:
    lm, count, new = bench.lm, bench.options.prompts, 48
    prompts = [lm.chat_prompt(c.prompt) for c in plain.comparisons(count, bench.options.scale, "generation")]
    written = {"plain": 0, "ours": 0}

    def plainly() -> None:
        out = plain.generate(lm, prompts, 4, new)
        written["plain"] = int((out != lm.end).sum())

    def ours() -> None:
        out = generate(lm, prompts, 4, Sampling(new, 0.7), ("benchmark",))
        written["ours"] = sum(len(c.tokens) - c.finished for completions in out for c in completions)

    result = bench.compare(f"generation, {count} prompts x 4 completions, {new} tokens at most", plainly, ours, None)
    share = written["ours"] / max(1, written["plain"])
    result.name += (
        f" ({written['plain']} and {written['ours']} tokens; a token {result.ratio * share:.2f} times faster)"
    )
    yield result


def whole_run(bench: Bench) -> Iterator[Result]:
    """8 clients, 3 adapters, 3 clients a round, 512 tokens: the command line from start to end, as processes."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        with open(data, "w", encoding="utf-8") as file:
            for client in range(8):
                splits = ["train"] * bench.batch + ["validation"] * 2 + ["test"]
                held = plain.comparisons(len(splits), bench.options.scale, "run", client)
                for comparison, split in zip(held, splits, strict=True):
                    row = {key: getattr(comparison, key) for key in ("prompt", "output_a", "output_b", "choice")}
                    file.write(json.dumps({**row, "client": f"c{client}", "split": split}) + "\n")
        settings = [
            f"data.path={data}", f"model.base={bench.options.model}", "data.max_tokens=512", f"runs_dir={folder}",
            "model.lora.dropout=0", "selectors.num_adapters=3", "selectors.cohort_size=3", "selectors.warmup_rounds=1",
            "selectors.rounds=4", "selectors.regroup_every=2", "selectors.local.steps=1",
            f"selectors.local.batch_size={bench.batch}",
            "selectors.eval_every=0",
        ]  # fmt: skip
        config = Path(folder) / "config.yaml"
        config.write_text("{}\n")

        def run(command: Sequence[str], name: str) -> float:
            start = time.perf_counter()
            words = [sys.executable, *command, "train", str(config), *settings, f"name={name}"]
            subprocess.run(words, check=True, capture_output=True, env=os.environ)
            return time.perf_counter() - start

        seconds = run([str(HERE / "plain_run.py")], "plain"), run(["-m", "fedbiscuit"], "ours")
    name = f"a whole run: 8 clients, 3 adapters, 4 rounds of 3 clients with {bench.batch} comparisons, 512 tokens"
    yield Result(name, seconds, (0, 0), (0, 0), 0)


class Nobody:
    """A backend whose clients do nothing: they send one and the same delta, and score adapters by their names."""

    at_once = 16

    def __init__(self, count: int, delta: Weights):
        self.names = [f"client-{i:05d}" for i in range(count)]
        self.delta = delta
        self.losses: dict[str, list[float]] = {}

    def clients(self) -> list[str]:
        return self.names

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        return [self._answer(task) for task in tasks]

    def _answer(self, task: Task) -> Reply:
        if task.kind == "train":
            return Reply(
                task.client,
                adapter=next(iter(task.adapters)),
                delta={n: t.clone() for n, t in self.delta.items()},
                num_examples=1,
            )
        if task.kind == "evaluate":
            rng = rng_for("losses", task.client)
            self.losses[task.client] = [rng.random() for _ in task.adapters]
            return Reply(task.client)
        return Reply(task.client, seat=choose_seat(self.losses[task.client], task.prices, task.client))


def loop(options: argparse.Namespace) -> list[list[str]]:
    """The federated loop around clients that do nothing: milliseconds a client, and memory."""
    rows = []
    delta = {f"layer.{i}.lora_{side}.weight": torch.full((8, 512), 1e-3) for i in range(8) for side in "AB"}
    for count, cohort in ((1000, 100), (10_000, 100), (1000, 1000), (10_000, 10_000)):
        cfg = FederatedSettings(
            num_adapters=3,
            rounds=9,
            cohort_size=cohort,
            warmup_rounds=1,
            regroup_every=2,
            local={"steps": 1, "batch_size": 1},
        )
        state, backend = init_state([delta] * 3), Nobody(count, delta)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(7):
            start = time.perf_counter()
            state, record = fedbiscuit_round(state, backend, cfg, 0)
            times[record.regrouped].append(time.perf_counter() - start)
        per_client = min(times[False]) / cohort * 1e3, min(times[True]) / count * 1e3
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append([str(count), str(cohort), *(f"{ms:.2f}" for ms in per_client), f"{memory:.0f}"])
    return rows


def start_up(options: argparse.Namespace) -> list[list[str]]:
    """CPU and wall seconds of ``fedbiscuit --help``, and up to the end of the first training step."""
    first = (
        "from fedbiscuit.config import ModelSettings; from fedbiscuit.models.lm import load_lm\n"
        "from fedbiscuit.models.selector import Selector, selector_loss\n"
        "from fedbiscuit.data.encoding import load_template; from fedbiscuit.types import Comparison\n"
        f"lm = load_lm(ModelSettings(base={options.model!r}))\n"
        "s = Selector.of(lm, load_template('choice'), (' A', ' B'), 256)\n"
        "selector_loss(s, s.encode([Comparison('a', 'b', 'c', 0)] * 2)[0]).backward()\n"
    )
    rows = []
    for name, words in (("--help", ["-m", "fedbiscuit", "--help"]), ("first training step", ["-c", first])):
        cpu, wall = [], []
        for _ in range(max(3, options.repeats)):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            wall.append(time.perf_counter() - start)
        rows.append([name, f"{sorted(cpu)[len(cpu) // 2]:.2f}", f"{sorted(wall)[len(wall) // 2]:.2f}"])
    return rows


PIECES: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "selector": selector_step,
    "reward": reward,
    "scoring": scoring,
    "labels": labels,
    "dpo": dpo,
    "trl": trl,
    "generation": generation,
    "run": whole_run,
}
OTHERS = {
    "loop": (("clients", "cohort", "ms a client of the cohort", "regrouping, ms a client", "MiB of the process"), loop),
    "start": (("start", "CPU s", "wall s"), start_up),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", choices=[*PIECES, *OTHERS, []], default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default=ModelSettings().base)
    parser.add_argument("--batch", type=int, default=8, help="comparisons, or pairs, a step")
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths of texts")
    parser.add_argument("--prompts", type=int, default=8, help="prompts to write completions for")
    options = parser.parse_args()
    wanted = options.pieces or [*(name for name in PIECES if name != "run"), *OTHERS]
    print(f"{options.model}, {torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)
    for name in wanted:
        if name in OTHERS:
            header, measured = OTHERS[name]
            print(f"\n{table(header, measured(options))}\n", flush=True)
    if any(name in PIECES for name in wanted):
        bench, header = Bench(options), True
        for name in wanted:
            for result in PIECES[name](bench) if name in PIECES else ():
                lines = table(HEADER, [result.row()]).splitlines()
                print("\n".join(lines if header else lines[2:]), flush=True)
                header = False


if __name__ == "__main__":
    main()
