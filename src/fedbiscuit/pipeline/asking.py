"""How a judge is asked: a model on this machine, or a server. (number of the text, reply) as replies come in."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from typing import Any

from fedbiscuit.config import JudgeSettings, ModelSettings
from fedbiscuit.evaluation.endpoint import Endpoint, Pace, ask_all, is_local
from fedbiscuit.evaluation.judge import Reply
from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.lm import LM
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ConfigError

__all__ = ["Replies", "ask_here", "ask_server", "judge_lm", "key_of", "say_what_leaves"]

log = logging.getLogger("fedbiscuit")

Replies = Generator[tuple[int, Reply], None, None]


def say_what_leaves(session: Session, prompts: Sequence[str]) -> None:
    """Once, before anything does."""
    settings = session.cfg.judge
    theirs = {
        c.prompt for data in session.dataset.clients.values() for c in (*data.train, *data.validation, *data.test)
    }
    shared = sum(prompt in theirs for prompt in prompts)
    of_clients = f" ({shared} of them stand in clients' comparisons too)" if shared else ""
    place = "on this machine" if is_local(settings.endpoint) else "outside this machine"
    plain = not is_local(settings.endpoint) and settings.endpoint.startswith("http:")
    log.warning(
        "judge: %d prompts%s and the policy's answers to them are sent to %s, %s; no client's comparison or choice is%s",
        len(prompts),
        of_clients,
        settings.endpoint,
        place,
        ". The connection is not encrypted" if plain else "",
    )


def ask_server(session: Session, texts: Sequence[str]) -> Replies:
    """By the server that the settings name."""
    settings = session.cfg.judge
    options: dict[str, Any] = {settings.length_field: settings.max_tokens}
    if settings.temperature is not None:
        options["temperature"] = settings.temperature
    endpoint = Endpoint(
        settings.endpoint,
        settings.model,
        key_of(settings),
        options,
        Pace(settings.requests_per_minute),
        settings.retries,
        settings.timeout,
    )
    return ask_all(endpoint, texts, settings.concurrency)


def key_of(settings: JudgeSettings) -> str:
    """The server's key, from the environment; never in a message."""
    if not settings.api_key_env:
        return ""
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"judge.api_key_env: the environment variable {settings.api_key_env} is not set; put the key into it, or leave "
            "the setting empty for a server without one"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"judge.api_key_env: the environment variable {settings.api_key_env} holds characters that no key has, such as "
            "a line break; put the key alone into it"
        )
    return key


def ask_here(session: Session, texts: Sequence[str]) -> Replies:
    """By a model on this machine, ``batch_size`` texts at a time."""
    settings, lm = session.cfg.judge, judge_lm(session)
    how = Sampling(settings.max_tokens, settings.temperature or 0.0)
    ids = [lm.chat_prompt(text) for text in texts]
    room = None if lm.context is None else lm.context - settings.max_tokens
    fitting = [i for i, tokens in enumerate(ids) if room is None or len(tokens) <= room]
    for i in sorted({*range(len(ids))} - {*fitting}):
        told = (
            f"{len(ids[i])} tokens and a reply of {settings.max_tokens}, but {lm.public_name} reads {lm.context} in all"
        )
        yield i, Reply(refused=told)
    for start in range(0, len(fitting), settings.batch_size):
        batch = fitting[start : start + settings.batch_size]
        with lm.adapter_off():
            written = generate(lm, [ids[i] for i in batch], 1, how, (session.cfg.seed, "judge"))
        for i, (one,) in zip(batch, written, strict=True):
            yield i, Reply(one.text, one.finished, "", 1, len(ids[i]), len(one.tokens))


def judge_lm(session: Session) -> LM:
    """The judge's LM: one that this run has loaded already, or another, on the same device."""
    cfg = session.cfg
    for settings in (cfg.model, cfg.policy_model or cfg.model):
        if settings.base == cfg.judge.model:
            return session.lm_of(settings)
    how = cfg.model.model_dump(include={"dtype", "quantize", "device", "threads"})
    return session.lm_of(ModelSettings(base=cfg.judge.model, **how))
