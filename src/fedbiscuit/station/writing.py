"""Answers are written in the background while the person judges the pairs before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedbiscuit.config import GenerationSettings, ModelSettings, load_config
from fedbiscuit.station.background import Background
from fedbiscuit.station.nouns import Pair, Prompt
from fedbiscuit.station.queue import share
from fedbiscuit.station.store import Store
from fedbiscuit.types import DataError

if TYPE_CHECKING:
    from fedbiscuit.models.lm import LM

__all__ = ["Author", "Authors", "Writer", "Writing", "authors_of", "blind_result"]

TRIES = 3
"""How often two different answers are asked for."""

Told = Callable[[float], None]
"""Is told what share of an answer is there, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes answers. write(prompt, how many, progress): their texts; ``progress(share)`` is told 0 to 1 as they grow."""

    name: str
    write: Callable[[str, int, Told], list[str]]


@dataclass(frozen=True, slots=True)
class Authors:
    """usual: writes both answers to a prompt. blind: in the blind test each of the two writes one; None: there is none."""

    usual: Author
    blind: tuple[Author, Author] | None = None


@dataclass(frozen=True, slots=True)
class Writing:
    """What the writer does. state: nothing to do, the model is being loaded, it writes, it waits until some of the pairs are
    judged, or it cannot go on (``error``; ``Writer.retry``). share: of the pair in work, 0 to 1. written, waiting, failed:
    numbers of prompts.
    """

    state: Literal["idle", "loading", "writing", "full", "failed"]
    share: float
    written: int
    waiting: int
    failed: int
    error: str = ""


class _StoppedError(Exception):
    """The station is being closed while an answer is being written."""


class Writer:
    """A thread that writes two answers to each waiting prompt, at most ``ahead`` pairs before the person.

    What waits is in the store, so nothing is lost with the process. An error is kept with its prompt and shown.
    """

    def __init__(self, store: Store, person: str, authors: Callable[[], Authors], ahead: int = 12) -> None:
        """authors: loads the models; called in the thread, when the first prompt waits."""
        self._store, self._person, self._load, self._ahead = store, person, authors, ahead
        self._authors: Authors | None = None
        self._state: Literal["idle", "loading", "writing"] = "idle"
        self._share = 0.0
        self._unloaded: tuple[Exception, frozenset[int]] | None = None  # why, and the prompts that waited then
        self._thread = Background("writer", self._write_next)
        self._thread.nudge()

    def nudge(self) -> None:
        """Something has changed: a prompt came, or a pair was judged."""
        self._thread.nudge()

    def retry(self) -> None:
        """Try again what failed."""
        self._store.retry()
        self._unloaded = None
        self._thread.error = ""
        self._thread.nudge()

    def settle(self, seconds: float = 60.0) -> bool:
        """Wait until all is written for which there is room; False if it takes longer."""
        return self._thread.settle(seconds)

    def status(self) -> Writing:
        """What the writer does now."""
        error = self._thread.error
        waiting, written, failed = (
            sum(self._store.count_prompts(state, blind) for blind in (False, True))
            for state in ("waiting", "written", "failed")
        )
        state: Literal["idle", "loading", "writing", "full", "failed"] = self._state
        if error and waiting:
            state = "failed"
        elif state == "idle" and waiting:
            state = "full" if self._next() is None else "writing"
        return Writing(state, self._share, written, waiting, failed, error)

    def close(self) -> None:
        """Stop at the next token and wait for the thread."""
        self._thread.close()

    def _next(self) -> Prompt | None:
        """The oldest prompt that waits and has room; the usual ones and the blind test have a queue each."""
        full = [self._store.count_ahead(self._person, blind) >= self._ahead for blind in (False, True)]
        return next((prompt for prompt in self._store.prompts("waiting") if not full[prompt.blind]), None)

    def _write_next(self) -> bool:
        """Write one pair; whether there may be more. What the loading of a model raises is the thread's error."""
        prompt = self._next()
        try:
            if prompt is None:
                return False
            if self._authors is None:
                self._authors = self._loaded()
            if prompt.blind and self._authors.blind is not None:
                raw, aligned = self._authors.blind
                if self._store.tested_before(prompt, raw.name, aligned.name):
                    return True
            self._state, self._share, self._thread.error = "writing", 0.0, ""  # what went wrong before is over
            self._store.answered(prompt, _pair_by(self._authors, prompt, self._progress))
        except _StoppedError:
            return False
        except DataError as error:
            if prompt is not None:
                self._store.failed(prompt, str(error))
            return True
        finally:
            self._state = "idle"
        return True

    def _loaded(self) -> Authors:
        """What could not be loaded is tried again for a new prompt, or when asked to, but not after each judgement."""
        waiting = frozenset(prompt.id for prompt in self._store.prompts("waiting"))
        if self._unloaded is not None and waiting <= self._unloaded[1]:
            raise self._unloaded[0]
        self._state, self._thread.error = "loading", ""
        try:
            authors = self._load()
        except Exception as error:
            self._unloaded = (error, waiting)
            raise
        self._unloaded = None
        return authors

    def _progress(self, share: float) -> None:
        if self._thread.stopping.is_set():
            raise _StoppedError
        self._share = share


def _pair_by(authors: Authors, prompt: Prompt, progress: Told) -> Pair:
    """Two answers to a prompt, which differ unless it is the blind test."""
    if prompt.blind:
        if authors.blind is None:
            raise DataError("the blind test needs an aligned policy; start the station with --policy RUN")
        raw, aligned = authors.blind
        [first] = raw.write(prompt.text, 1, lambda share: progress(share / 2))
        [second] = aligned.write(prompt.text, 1, lambda share: progress((1 + share) / 2))
        if not first.strip() or not second.strip():
            raise DataError(f"{raw.name if not first.strip() else aligned.name} wrote nothing to this prompt")
        return Pair.of(prompt.text, first, second, raw.name, aligned.name, blind=True)
    name = authors.usual.name
    for tries in range(1, TRIES + 1):
        written = authors.usual.write(prompt.text, 2 * tries, progress)
        different = list(dict.fromkeys(text.strip() for text in written if text.strip()))
        if len(different) > 1:
            return Pair.of(prompt.text, different[0], different[1], name, name)
    raise DataError(f"{name} wrote {'the same' if different else 'nothing'} {2 * TRIES} times; ask in other words")


def authors_of(
    model: str, policy: Path | None = None, max_new_tokens: int | None = None, device: str = "auto"
) -> Callable[[], Authors]:
    """Loads, when called, a model (as ``model.base`` names it; "": the default), and the aligned policy of a run or export.

    With a policy, it is the policy that writes both answers, and the blind test sets it against the same model without it.
    How to write is as in the policy's run, or the default; max_new_tokens: other than there.
    """

    def load() -> Authors:
        how = GenerationSettings()
        if policy is None:
            from fedbiscuit.models.lm import load_lm

            lm = load_lm(ModelSettings.model_validate({"device": device} | ({"base": model} if model else {})))
        else:
            from fedbiscuit.models.pretrained import load_policy

            lm = load_policy(policy, base=model or None, device=device)
            if (policy / "config.yaml").is_file():
                how = load_config(policy / "config.yaml").generation
        if max_new_tokens is not None:
            how = how.model_copy(update={"max_new_tokens": max_new_tokens})
        raw = _author(f"model {lm.public_name}", lm, how, aligned=False)
        if policy is None:
            return Authors(raw)
        aligned = _author(f"policy {policy.resolve().name} {_digest(policy)}", lm, how, aligned=True)
        return Authors(aligned, (raw, aligned))

    return load


def _digest(policy: Path) -> str:
    """What tells two policies of one name apart."""
    from fedbiscuit.rundir import sha256_of

    inside = policy / "policy" / "adapter_model.safetensors"
    return sha256_of(inside if inside.is_file() else policy / "adapter_model.safetensors")[:12]


def _author(name: str, lm: LM, how: GenerationSettings, aligned: bool) -> Author:
    """Raw and aligned policy draw the same random numbers, so that they differ by the adapter alone."""
    from fedbiscuit.models.generation import Sampling, generate

    sampling = Sampling(how.max_new_tokens, how.temperature, how.top_p)

    def write(prompt: str, count: int, progress: Told) -> list[str]:
        ids = lm.chat_prompt(prompt, how.system, how.chat)
        lm.forget_texts()
        if lm.context is not None and len(ids) + how.max_new_tokens > lm.context:
            raise DataError(
                f"this prompt has {len(ids)} tokens, and {lm.name} reads {lm.context} with its answer; shorten it"
            )
        with contextlib.nullcontext() if aligned else lm.adapter_off():
            [answers] = generate(
                lm, [ids], count, sampling, ("station",), lambda tokens: progress(tokens / how.max_new_tokens)
            )
        return [answer.text for answer in answers]

    return Author(name, write)


def blind_result(store: Store, person: str) -> dict[str, Any] | None:
    """This person's own verdict on the policy that was tested last: ``name``, its ``win_rate`` with its 95% ``interval``
    (Wilson's), ``wins``, ``losses``, ``ties``; ``alike``: how many of the ties were the same text, which nobody was asked about.

    None before the first judgement of it, if there is anything to judge.
    """
    tested = [pair for pair in store.pairs() if pair.blind]
    if not tested:
        return None
    authors = (tested[-1].source_a, tested[-1].source_b)
    mine = {pair.id: pair for pair in tested if (pair.source_a, pair.source_b) == authors}
    said = {
        event.pair: 0.5 if event.choice is None else float(event.choice)
        for event in store.history(person)
        if event.kind == "judged" and not event.undone and event.showing == 0 and event.pair in mine
    }
    alike = sum(pair.output_a == pair.output_b for pair in mine.values())
    if not said and alike < len(mine):
        return None
    points = [*said.values(), *[0.5] * alike]
    found = share(sum(points), len(points))
    assert found is not None
    return {
        "name": authors[1],
        "win_rate": found[0],
        "interval": list(found[1:]),
        "wins": points.count(1.0),
        "losses": points.count(0.0),
        "ties": points.count(0.5),
        "alike": alike,
    }
