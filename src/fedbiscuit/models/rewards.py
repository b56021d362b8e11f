"""Reward models of others: a transformers folder with one score for a prompt and an answer, to judge with."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError

from fedbiscuit.config import ModelSettings
from fedbiscuit.models.base import check_complete, device_and_type
from fedbiscuit.models.chat import chat_ids, plain_ids
from fedbiscuit.types import ConfigError, first_line

__all__ = ["RewardModel", "check_reward_model", "load_reward_model"]

FAULTS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


class RewardModel:
    """A sequence classifier with one label. Holds the device's memory; ``name`` is that of its folder."""

    def __init__(self, name: str, tokenizer: Any, model: Any):
        self.name = name
        self._tokenizer = tokenizer
        self._model = model
        self._scores: dict[tuple[str, str], float | None] = {}

    def encode(self, prompt: str, answer: str) -> tuple[int, ...]:
        """Token ids: a user's turn and an answer by the chat template, else both joined as the tokenizer joins two texts.

        Special tokens written in the texts stay plain text.
        """
        return tuple(self._inputs(prompt, answer)["input_ids"])

    def _inputs(self, prompt: str, answer: str) -> dict[str, Sequence[int]]:
        """What the model is given, by name: BERT and its kind are told which token belongs to which text."""
        if not self._tokenizer.chat_template:
            return dict(self._tokenizer(prompt, answer, split_special_tokens=True))
        turns = [("user", prompt), ("assistant", answer)]
        try:
            ids = chat_ids(self._tokenizer, turns, functools.partial(plain_ids, self._tokenizer), asks=False)
        except (TemplateError, TypeError) as error:
            raise ConfigError(
                f"evaluation.judges: the chat template of {self.name} does not take a prompt and an answer: {first_line(error)}"
            ) from error
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """The score of each answer, float32; None where both texts are longer than the model reads.

        One text at a time, so that no padding changes a score; each is read once.
        """
        return [self._score(*pair) for pair in zip(prompts, answers, strict=True)]

    def _score(self, prompt: str, answer: str) -> float | None:
        if (prompt, answer) not in self._scores:
            inputs = self._inputs(prompt, answer)
            limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
            fits = not isinstance(limit, int) or limit <= 0 or len(inputs["input_ids"]) <= limit
            self._scores[prompt, answer] = self._read(inputs) if fits else None
        return self._scores[prompt, answer]

    @torch.no_grad()
    def _read(self, inputs: Mapping[str, Sequence[int]]) -> float:
        one = {name: torch.tensor([list(values)], device=self._model.device) for name, values in inputs.items()}
        return float(self._model(**one).logits[0, 0].float())


def check_reward_model(folder: str) -> None:
    """Stop where a folder is no reward model, before it is loaded."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except FAULTS as error:
        raise ConfigError(f"evaluation.judges: {folder}: config.json cannot be used: {first_line(error)}") from error
    kinds = config.architectures or []
    if not any("ForSequenceClassification" in kind for kind in kinds):
        raise ConfigError(
            f"evaluation.judges: {folder}: a model of the kind {', '.join(kinds) or 'unknown'}, which gives no score; name a "
            "sequence classifier with one label, or let a language model judge with `fedbiscuit judge`"
        )
    if config.num_labels != 1:
        raise ConfigError(
            f"evaluation.judges: {folder}: a classifier with {config.num_labels} labels; a reward model has one (num_labels=1)"
        )


def load_reward_model(folder: str, settings: ModelSettings) -> RewardModel:
    """Load it, on the device and in the numbers of ``settings``. Code of the folder is not run, pickles are not read."""
    check_reward_model(folder)
    device, dtype = device_and_type(settings)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except FAULTS as error:
        raise ConfigError(f"evaluation.judges: {folder}: cannot be loaded: {first_line(error)}") from error
    model, found = loaded
    check_complete(f"evaluation.judges: {folder}", found)
    return RewardModel(Path(folder).resolve().name, tokenizer, model.to(device).eval())
