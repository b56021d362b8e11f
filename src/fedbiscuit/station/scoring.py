"""How much selectors disagree on the pairs that wait, so that the person is asked where an answer says most."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fedbiscuit.rundir import sha256_of
from fedbiscuit.station.background import Background
from fedbiscuit.station.nouns import Pair
from fedbiscuit.station.queue import disagreement
from fedbiscuit.station.store import Store
from fedbiscuit.types import ConfigError

__all__ = ["Scorer", "digest_of_selectors", "readers_of"]

AT_ONCE = 8
"""Pairs that are read together: so many are the wait when the station closes."""

Readers = Callable[[Sequence[Pair]], list[list[float] | None]]
"""For each pair the probability that A is better, of each selector; None for one that is too long."""


def digest_of_selectors(folder: Path) -> str:
    """What tells the selectors of a run or an export from others: what is known of pairs is known of these."""
    found = sorted(
        [*folder.glob("selectors/u*/*.safetensors"), *folder.glob("u*/*.safetensors"), *folder.glob("*.safetensors")]
    )
    if not found:
        raise ConfigError(
            f"{folder}: no trained selectors here; name a run that `fedbiscuit train` has finished, or what "
            "`fedbiscuit export --selector all` wrote"
        )
    return hashlib.sha256("".join(sha256_of(path) for path in found).encode()).hexdigest()


def readers_of(folder: Path, device: str = "auto") -> Callable[[], Readers]:
    """Loads, when called, the selectors of a run or of an export."""

    def load() -> Readers:
        from fedbiscuit.models.pretrained import Selector

        selector = Selector.from_pretrained(folder, device=device)
        return lambda pairs: selector.choose_each([(pair.prompt, pair.output_a, pair.output_b) for pair in pairs])

    return load


class Scorer:
    """A thread that reads the pairs nobody has scored yet with these selectors, the newest first.

    A pair that is too long for them counts as one on which they agree.
    """

    def __init__(self, store: Store, digest: str, load: Callable[[], Readers]) -> None:
        self._store, self._digest, self._load = store, digest, load
        self._readers: Readers | None = None
        self._thread = Background("scorer", self._score_some)
        self._thread.nudge()

    @property
    def error(self) -> str:
        """Why pairs cannot be scored, a sentence; "" if they can."""
        return self._thread.error

    def nudge(self) -> None:
        """There may be new pairs."""
        self._thread.nudge()

    def settle(self, seconds: float = 60.0) -> bool:
        """Wait until all pairs are scored; False if it takes longer."""
        return self._thread.settle(seconds)

    def close(self) -> None:
        """Stop after the pairs that are being read."""
        self._thread.close()

    def _score_some(self) -> bool:
        known = self._store.disagreements(self._digest)
        new = [id for id in reversed(self._store.pair_ids(False)) if id not in known][:AT_ONCE]
        pairs = self._store.pairs(new)
        if not pairs:
            return False
        if self._readers is None:
            self._readers = self._load()
        said = self._readers(pairs)
        scores = {pair.id: 0.0 if one is None else disagreement(one) for pair, one in zip(pairs, said, strict=True)}
        self._store.put_disagreements(self._digest, scores)
        return True
