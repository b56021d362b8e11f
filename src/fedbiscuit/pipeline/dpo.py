"""DPO on one device or several: each computes its part of a step's gradient, and this process adds the parts up.

What travels is small: the adapter and numbers of pairs there, a gradient back (``backends/wire.py``). Helpers keep nothing
from message to message; the optimizer, its state and all files are with the process of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbiscuit.backends.devices import Helper, together
from fedbiscuit.backends.wire import pack, unpack
from fedbiscuit.config import AlignmentSettings, Config
from fedbiscuit.models.lm import LM
from fedbiscuit.models.policy import Pair, pair_dpo_loss, reference_log_probs
from fedbiscuit.models.training import add_gradient, shares, stream
from fedbiscuit.rundir import RunDir
from fedbiscuit.types import ConfigError, Weights

__all__ = ["Part", "Whole"]

Batches = Sequence[tuple[int, Sequence[int]]]
"""Micro-batches with their numbers in the step; each names its pairs by their places among the labels."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one process works with: the LM to align, on its device, and all labels."""

    lm: LM
    settings: AlignmentSettings
    seed: int
    pairs: Sequence[Pair]

    @classmethod
    def of(cls, cfg: Config, run: RunDir, lm: LM) -> Part:
        """With the labels of a run."""
        rows = run.read_lines("preferences.jsonl")
        if not rows:
            raise ConfigError(f"{run.path}: no preferences.jsonl to align on; run `fedbiscuit label {run.path}` first")
        how = cfg.generation
        prompts = {p: lm.chat_prompt(p, how.system, how.chat) for p in {row["prompt"] for row in rows}}
        pairs = [
            Pair(
                prompts[row["prompt"]],
                tuple(row["chosen_token_ids"]),
                tuple(row["rejected_token_ids"]),
                row["probability"],
            )
            for row in rows
        ]
        return cls(lm, cfg.alignment, cfg.seed, pairs)

    @property
    def per_step(self) -> int:
        """Pairs an optimizer step."""
        return self.settings.batch_size * self.settings.grad_accum

    def reference(self, batches: Batches) -> Tensor:
        """(n, 2) log-probabilities of (chosen, rejected) with the adapter off, on the CPU."""
        parts = [reference_log_probs(self.lm, [self.pairs[i] for i in batch], len(batch)) for _, batch in batches]
        return torch.cat([torch.empty(0, 2), *parts])

    def gradient(self, step: int, batches: Batches, reference: Tensor) -> dict[str, float]:
        """Leave in the adapter's parameters what these bring to the gradient of a step; the same of its report.

        reference: (pairs, 2), of which the rows of these batches are read.
        """

        def loss(batch: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
            chosen = [self.pairs[i] for i in batch]
            return pair_dpo_loss(self.lm, chosen, reference[list(batch)], self.settings.beta, self.settings.soft_labels)

        return add_gradient(self.lm, batches, self.per_step, loss, (self.seed, "dpo dropout", step))

    def answer(self, message: bytes) -> bytes:
        """``reference`` where the message names no step, else ``gradient`` at the adapter in it."""
        asked, tensors = unpack(message, {"step", "batches"})
        if asked["step"] is None:
            return pack({"report": {}}, {"reference": self.reference(asked["batches"])})
        reference = torch.empty(len(self.pairs), 2)
        reference[_places(asked["batches"])] = tensors.pop("reference")
        self.lm.put_adapter(tensors)
        parameters = self.lm.trainable()
        for parameter in parameters.values():
            parameter.grad = None
        report = self.gradient(asked["step"], asked["batches"], reference)
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return pack({"report": {name: str(number) for name, number in report.items()}}, gradients)  # JSON has no NaN


@dataclass(frozen=True, slots=True)
class Whole:
    """The same over this process and helpers, all pairs and whole steps."""

    here: Part
    helpers: Sequence[Helper]

    def reference(self) -> Tensor:
        """(pairs, 2)"""
        size, num_pairs = self.here.settings.batch_size, len(self.here.pairs)
        split = shares(list(range(num_pairs)), size, 1 + len(self.helpers))
        found = torch.empty(num_pairs, 2)

        def part(place: int) -> None:
            if place == 0:
                found[_places(split[0])] = self.here.reference(split[0])
            else:
                found[_places(split[place])] = self._ask(place, None, split[place], {})[1]["reference"]

        together(part, self.helpers)
        return found

    def gradient(self, step: int, reference: Tensor) -> dict[str, float]:
        """Leave the gradient of a step's mean loss in the adapter's parameters; the means to report."""
        here, per_step = self.here, self.here.per_step
        taken = stream(range(len(here.pairs)), step * per_step, per_step, (here.seed, "dpo order"))
        split = shares(taken, here.settings.batch_size, 1 + len(self.helpers))
        adapter = here.lm.adapter() if self.helpers else {}

        def part(place: int) -> tuple[dict[str, float], Weights]:
            if place == 0:
                return here.gradient(step, split[0], reference), {}
            return self._ask(place, step, split[place], {**adapter, "reference": reference[_places(split[place])]})

        parts, parameters = together(part, self.helpers), here.lm.trainable()
        for _, gradients in parts:
            for name, gradient in gradients.items():
                p, more = parameters[name], gradient.to(here.lm.device)
                p.grad = more if p.grad is None else p.grad + more
        return {name: sum(report.get(name, 0.0) for report, _ in parts) for name in parts[0][0]}

    def _ask(
        self, place: int, step: int | None, batches: Batches, tensors: Weights
    ) -> tuple[dict[str, float], Weights]:
        message = pack({"step": step, "batches": batches}, tensors)
        values, found = unpack(self.helpers[place - 1].ask(message), {"report"})
        return {name: float(text) for name, text in values["report"].items()}, found


def _places(batches: Batches) -> list[int]:
    return [i for _, batch in batches for i in batch]
