"""Replies by vLLM, an engine for GPUs that is installed by itself: a thin way to ``vllm.LLM.generate``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from fedbiscuit.config import ModelSettings
from fedbiscuit.models.base import resolve_model
from fedbiscuit.models.generation import Completion, Sampling
from fedbiscuit.types import EnvironmentFault, seed_for

__all__ = ["VllmEngine", "check_vllm"]


def check_vllm() -> None:
    """``EnvironmentFault`` with the next step where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentFault(
            "judge.engine: vllm is not installed here; `pip install vllm` on a machine with a GPU, or set "
            "judge.engine=transformers, or start `vllm serve MODEL` somewhere and name it in judge.endpoint"
        )


class VllmEngine:
    """One model in vLLM, named as in ``model.base``. context: the longest sequence in tokens."""

    def __init__(self, settings: ModelSettings):
        check_vllm()
        from vllm import LLM, SamplingParams

        self._how = SamplingParams
        self._llm = LLM(model=resolve_model(settings.base)[0], dtype=settings.dtype)
        self.context = int(self._llm.model_config.max_model_len)

    def write(self, prompts: Sequence[Sequence[int]], how: Sampling, key: tuple[object, ...]) -> list[Completion]:
        """A completion of each prompt (token ids), with a seed from the key and the prompt."""
        params = [
            self._how(
                temperature=how.temperature, top_p=how.top_p, max_tokens=how.max_new_tokens,
                seed=seed_for(*key, tuple(prompt)),
            )
            for prompt in prompts
        ]  # fmt: skip
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        written = [answer.outputs[0] for answer in self._llm.generate(asked, params, use_tqdm=False)]
        return [Completion(tuple(one.token_ids), one.text.strip(), one.finish_reason != "length") for one in written]
