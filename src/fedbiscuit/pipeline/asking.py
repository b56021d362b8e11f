"""How a judge is asked: a model on this machine, or a server. (number of the text, reply) as replies come in."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from typing import Any

from fedbiscuit.config import JudgeSettings, ModelSettings
from fedbiscuit.evaluation.endpoint import Endpoint, Pace, ask_all, is_local
from fedbiscuit.evaluation.judge import Reply
from fedbiscuit.models.base import load_tokenizer, public_name, resolve_model
from fedbiscuit.models.chat import prompt_ids
from fedbiscuit.models.generation import Completion, Sampling, generate
from fedbiscuit.models.lm import LM
from fedbiscuit.models.vllm_engine import VllmEngine
from fedbiscuit.pipeline.contests import PEOPLE, Contest
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ConfigError

__all__ = ["Replies", "ask_here", "ask_server", "judge_identity", "key_of", "say_what_leaves"]

log = logging.getLogger("fedbiscuit")

Replies = Generator[tuple[int, Reply], None, None]

VLLM_BATCH = 256
"""Questions that vLLM gets at a time, at least: it makes its own batches of them. So many replies can be lost by a kill."""


def say_what_leaves(session: Session, contests: Sequence[Contest]) -> None:
    """Once, before anything does."""
    settings = session.cfg.judge
    prompts = {prompt for contest in contests for prompt in contest.prompts}
    theirs = {
        c.prompt for data in session.dataset.clients.values() for c in (*data.train, *data.validation, *data.test)
    }
    shared = len(prompts & theirs)
    of_clients = f" ({shared} of them stand in clients' comparisons too)" if shared else ""
    beside = f", and {PEOPLE}," if any(one.against == PEOPLE for one in contests) else ""
    place = "on this machine" if is_local(settings.endpoint) else "outside this machine"
    plain = not is_local(settings.endpoint) and settings.endpoint.startswith("http:")
    log.warning(
        "judge: %d prompts%s and the policy's answers to them%s are sent to %s, %s; no client's comparison or choice is%s",
        len(prompts),
        of_clients,
        beside,
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
    """By a model on this machine, ``batch_size`` texts at a time; those that are too long for it come last."""
    settings, key = session.cfg.judge, (session.cfg.seed, "judge")
    how = Sampling(settings.max_tokens, settings.temperature or 0.0)
    if settings.engine == "vllm":
        tokenizer = load_tokenizer(settings.model)
        for lm in session.models.values():
            lm.leave_device()
        engine = VllmEngine(_judge_settings(session))
        ids = [prompt_ids(tokenizer, settings.model, text) for text in texts]
        context: int | None = engine.context
        size = max(VLLM_BATCH, settings.batch_size)
    else:
        lm = _judge_lm(session)
        ids, context, size = [lm.chat_prompt(text) for text in texts], lm.context, settings.batch_size

    def write(prompts: Sequence[Sequence[int]]) -> list[Completion]:
        if settings.engine == "vllm":
            return engine.write(prompts, how, key)
        with lm.adapter_off():
            return [one for (one,) in generate(lm, prompts, 1, how, key)]

    room = None if context is None else context - settings.max_tokens
    fitting = [i for i, tokens in enumerate(ids) if room is None or len(tokens) <= room]
    for start in range(0, len(fitting), size):
        batch = fitting[start : start + size]
        for i, one in zip(batch, write([ids[i] for i in batch]), strict=True):
            yield i, Reply(one.text, one.finished, "", 1, len(ids[i]), len(one.tokens))
    for i in sorted({*range(len(ids))} - {*fitting}):
        name = public_name(settings.model)
        yield (
            i,
            Reply(
                refused=f"{len(ids[i])} tokens and a reply of {settings.max_tokens}, but {name} reads {context} in all"
            ),
        )


def judge_identity(session: Session) -> dict[str, Any]:
    """Who judges and how it writes: with the question all that a reply depends on."""
    settings = session.cfg.judge
    how: dict[str, Any] = {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
    if settings.endpoint:
        return {"model": settings.model, "endpoint": settings.endpoint.rstrip("/"), **how}
    if settings.engine == "vllm":
        how["engine"] = settings.engine
        return {"model": public_name(settings.model), "digest": resolve_model(settings.model)[1], **how}
    try:
        lm = _judge_lm(session)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.base:", "judge.model:", 1)) from None
    return {"model": lm.public_name, "digest": lm.digest, **how}


def _judge_lm(session: Session) -> LM:
    """The judge's LM: one that this run has loaded already, or another, on the same device."""
    cfg = session.cfg
    for settings in (cfg.model, cfg.policy_model or cfg.model):
        if settings.base == cfg.judge.model:
            return session.lm_of(settings)
    return session.lm_of(_judge_settings(session))


def _judge_settings(session: Session) -> ModelSettings:
    how = session.cfg.model.model_dump(include={"dtype", "quantize", "device", "threads"})
    return ModelSettings(base=session.cfg.judge.model, **how)
