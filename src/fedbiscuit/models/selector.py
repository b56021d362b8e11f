"""Selectors: the frozen LM with an adapter, asked "A or B?".

A comparison is always read in both orders, so that the answer does not depend on which response stands first. The two
orders, and all comparisons of one prompt, share what they can (``models/trees.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedbiscuit.data.encoding import EncodedComparison, Template, encode_answers, encode_comparison, extra_fields
from fedbiscuit.models.lm import LM
from fedbiscuit.models.losses import choice_loss
from fedbiscuit.models.trees import Forest
from fedbiscuit.models.trunks import Trunks
from fedbiscuit.types import Comparison, ConfigError, Weights

__all__ = ["VOTES", "Selector", "Vote", "choice_probability", "letter_margins", "selector_loss", "vote"]


@dataclass(frozen=True, slots=True)
class Selector:
    """How comparisons are put to an LM: the template, the two letters, the longest input in tokens.

    With the kind ``reward`` it is the baseline FedRM instead: the LM reads one answer at a time, a head scores it, and the
    two letters' logits are the scores of the answers that they stand for. So the loss is that of Bradley and Terry, and
    whatever reads margins reads these too; both orders agree by construction.
    """

    lm: LM
    template: Template
    letters: tuple[int, int]
    max_tokens: int
    trunks: Trunks | None = None
    """What is kept of comparisons that are read again and again; None: nothing."""
    kind: Literal["choice", "reward"] = "choice"

    @property
    def extra(self) -> tuple[str, ...]:
        """What it reads beside prompt and answers, such as a title."""
        return extra_fields(self.template, self.kind)

    @classmethod
    def of(
        cls,
        lm: LM,
        template: Template,
        choice_tokens: tuple[str, str],
        max_tokens: int,
        trunk_bytes: int = 0,
        kind: Literal["choice", "reward"] = "choice",
    ) -> Selector:
        """Check that both letters are one token each and differ; ``ConfigError`` says what they are."""
        ids = [tuple(lm.tokenizer(token, add_special_tokens=False).input_ids) for token in choice_tokens]
        for token, found in zip(choice_tokens, ids, strict=True):
            if len(found) != 1:
                raise ConfigError(
                    f"data.choice_tokens: {token!r} is {len(found)} tokens {list(found)} for {lm.name}; use one token, e.g. ' A'"
                )
        if ids[0] == ids[1]:
            raise ConfigError(f"data.choice_tokens: both are token {ids[0][0]} for {lm.name}; they must differ")
        if lm.context is not None and max_tokens > lm.context:
            raise ConfigError(
                f"data.max_tokens: {max_tokens}, but {lm.name} reads at most {lm.context} tokens; lower it"
            )
        trunks = Trunks(lm, trunk_bytes) if trunk_bytes and lm.has_trunk else None
        return cls(lm, template, (ids[0][0], ids[1][0]), max_tokens, trunks, kind)

    def encode(self, comparisons: Sequence[Comparison]) -> tuple[list[EncodedComparison], list[Comparison]]:
        """Token ids in both orders, and the comparisons whose two answers do not fit."""
        fitting, left_out = [], []
        for comparison in comparisons:
            encoded = self._encoded(comparison)
            if encoded is None:
                left_out.append(comparison)
            else:
                fitting.append(encoded)
        return fitting, left_out

    def _encoded(self, comparison: Comparison) -> EncodedComparison | None:
        if self.kind == "reward":
            return encode_answers(comparison, self.lm.encode, self.max_tokens, self.lm.start)
        return encode_comparison(comparison, self.template, self.lm.encode, self.max_tokens, self.lm.start)

    def logits(self, encoded: Sequence[EncodedComparison]) -> Tensor:
        """(n, 2 orders, 2 letters) logits with the adapter in the slot; differentiable."""
        forest = self._pack(encoded)
        return self._letters(forest, self._trunk(forest, encoded))

    def logits_of_each(
        self, adapters: Sequence[Weights], encoded: Sequence[EncodedComparison], keep: bool
    ) -> Iterator[Tensor]:
        """The same under each adapter in turn; what lies below all adapters is computed once, and with ``keep`` kept."""
        forest = self._pack(encoded)
        trunk = self._trunk(forest, encoded) if keep else None
        if trunk is None and len(adapters) > 1:
            trunk = self.lm.trunk(forest)
        for weights in adapters:
            self.lm.put_adapter(weights)
            yield self._letters(forest, trunk)

    def _pack(self, encoded: Sequence[EncodedComparison]) -> Forest:
        return self.lm.pack([ids for item in encoded for ids in (item.ab, item.ba)])

    def _trunk(self, forest: Forest, encoded: Sequence[EncodedComparison]) -> Tensor | None:
        return self.trunks.of(forest, [(item.ab, item.ba) for item in encoded]) if self.trunks else None

    def _letters(self, forest: Forest, trunk: Tensor | None) -> Tensor:
        places, order = torch.unique(forest.last, return_inverse=True)  # equal sequences: equal logits, to the last bit
        hidden = self.lm.hidden_at(forest, places, trunk)
        if self.kind == "reward":
            scores = self.lm.scores(hidden)[order].view(-1, 2)
            return torch.stack([scores, scores.flip(1)], dim=1)
        rows = torch.tensor(self.letters, device=self.lm.device)
        return self.lm.logits(hidden, rows)[order].view(-1, 2, 2)


def selector_loss(selector: Selector, encoded: Sequence[EncodedComparison]) -> Tensor:
    """Mean two-way cross-entropy over both orders of labeled comparisons (docs/algorithm.md section 1)."""
    choices = torch.tensor([[item.choice, 1 - item.choice] for item in encoded if item.choice is not None])
    if len(choices) != len(encoded):
        raise ValueError("every comparison needs a choice to train on")
    return choice_loss(selector.logits(encoded).flatten(0, 1), choices.flatten().to(selector.lm.device))


def letter_margins(
    selector: Selector,
    adapters: Sequence[Weights],
    encoded: Sequence[EncodedComparison],
    batch_size: int = 16,
    keep: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """(U, n, 2) margins logit("A") - logit("B"): of each adapter on each comparison, shown as (A, B) and as (B, A).

    Dropout is off. Neighbours are packed together, so pass comparisons of one prompt next to each other. ``keep``: these
    comparisons will be read again, keep what the adapters do not change. ``progress`` is told how many all have read.
    """
    selector.lm.model.eval()
    out = torch.empty(len(adapters), len(encoded), 2)
    with torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            for u, logits in enumerate(selector.logits_of_each(adapters, batch, keep)):
                out[u, start : start + batch_size] = (logits[..., 0] - logits[..., 1]).cpu()
            progress(min(start + batch_size, len(encoded)))
    return out


def choice_probability(margins: Tensor, temperature: float = 1.0, orders: str = "both") -> Tensor:
    """(...) probability that A is better, from (..., 2) letter margins.

    Averaging the two orders makes it order-invariant: p(A over B) = 1 - p(B over A). ``orders="one"`` uses (A, B) only.
    """
    margin = (margins[..., 0] - margins[..., 1]) / 2 if orders == "both" else margins[..., 0]
    return torch.sigmoid(margin.double() / temperature)


@dataclass(frozen=True, slots=True)
class Vote:
    """What U selectors say of n comparisons: (n,) probability that A is better, (n,) disagreement between them.

    Disagreement is the standard deviation of the selectors' probabilities: 0 where all say the same.
    """

    probability: Tensor
    disagreement: Tensor


def vote(probabilities: Tensor, rule: str) -> Vote:
    """Combine (U, n) probabilities of U selectors by a rule of ``VOTES``."""
    return Vote(VOTES[rule](probabilities), probabilities.std(dim=0, correction=0))


def _mean(probabilities: Tensor) -> Tensor:
    return probabilities.mean(dim=0)


def _majority(probabilities: Tensor) -> Tensor:
    """The share of selectors for A; a tie goes to the sign of the mean margin, by the least bit (mistake 15)."""
    share = ((probabilities > 0.5).double() + 0.5 * (probabilities == 0.5)).mean(dim=0)
    lean = torch.logit(probabilities, eps=1e-12).mean(dim=0)
    lean = torch.where(lean.abs() < 1e-9, 0.0, lean.sign())
    return torch.where((share - 0.5).abs() < 1e-9, 0.5 + 1e-6 * lean, share)


def _min(probabilities: Tensor) -> Tensor:
    """The least favourable selector: A counts as better only as far as the most sceptical one says, and B likewise."""
    for_a, for_b = probabilities.min(dim=0).values, (1 - probabilities).min(dim=0).values
    return for_a / (for_a + for_b)


VOTES: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "majority": _majority, "min": _min}
