"""``fedbiscuit`` with the plain way of scoring and training comparisons put in: ``python benchmarks/plain_run.py train ...``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import plain
import torch
from torch import Tensor

import fedbiscuit.models.lm
from fedbiscuit.cli import main
from fedbiscuit.data.encoding import EncodedComparison
from fedbiscuit.models.selector import Selector
from fedbiscuit.types import Weights


def logits(self: Selector, encoded: Sequence[EncodedComparison]) -> Tensor:
    with self.lm.padded():
        return plain.choice_logits(self, encoded).view(-1, 2, 2)


def logits_of_each(
    self: Selector, adapters: Sequence[Weights], encoded: Sequence[EncodedComparison], keep: bool
) -> Iterator[Tensor]:
    for weights in adapters:
        self.lm.put_adapter(weights)
        yield logits(self, encoded)


if __name__ == "__main__":
    fedbiscuit.models.lm.fuse_lora = lambda model: 0  # type: ignore[assignment]
    Selector.logits = logits  # type: ignore[method-assign]
    Selector.logits_of_each = logits_of_each  # type: ignore[method-assign]
    torch.manual_seed(0)
    sys.exit(main())
