"""``fedbiscuit.Selector``: trained selectors, ready to judge pairs of answers.

``models/selector.py`` has a class of the same name without weights: how comparisons are put to an LM, which training shares
between all adapters. This one adds the adapters, the temperature and the vote, so that nothing is left to be given.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from fedbiscuit.config import LoraSettings, ModelSettings, load_config
from fedbiscuit.data.encoding import EncodedComparison, parse_template
from fedbiscuit.data.records import text_of
from fedbiscuit.models import selector as reading
from fedbiscuit.models.base import digest_of, quantize_of, resolve_model
from fedbiscuit.models.hub import download
from fedbiscuit.models.lm import LM, load_lm
from fedbiscuit.models.selector import VOTES, choice_probability, letter_margins
from fedbiscuit.models.selector_file import SELECTOR_FILE, SelectorFile, read_selector_file, selector_file_of
from fedbiscuit.rundir import RunDir, base_of, read_adapter, read_adapter_config
from fedbiscuit.types import Comparison, ConfigError, DataError, IntegrityError, Weights

__all__ = ["Selector", "load_policy"]

log = logging.getLogger("fedbiscuit")

Fields = Mapping[str, str]
"""What a template shows beside the prompt and the answers: a title, a subreddit."""
Pair = tuple[str, str, str] | tuple[str, str, str, Fields] | Comparison
"""(prompt, first answer, second answer), with ``Selector.fields`` as a fourth where there are any; or a comparison, which has
them in ``meta.fields``.
"""
Text = str | Sequence[Mapping[str, Any]]
"""A plain text, or chat messages [{role, content}, ...]."""


@dataclass(frozen=True, slots=True)
class Selector:
    """One trained selector, or several that vote.

    >>> selector = Selector.from_pretrained("exported")  # doctest: +SKIP
    >>> selector.choose([("How long do eggs boil?", "Ten minutes.", "Yes.")])  # doctest: +SKIP
    [0.83]
    """

    reader: reading.Selector
    adapters: tuple[Weights, ...]
    temperature: float
    vote: str

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        base: str | None = None,
        only: int | None = None,
        temperature: float | None = None,
        vote: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> Selector:
        """Load what ``fedbiscuit export`` wrote, the folder of a run, or a Hub name.

        base: the base model, as ``model.base`` takes it, where it is not found under the name that the export has; another
        model than the one trained on is an error. only: the number of one selector of several; without it they vote.
        temperature, vote: others than those of the export.
        """
        if temperature is not None and not temperature > 0:
            raise ConfigError(f"temperature: {temperature} is not permitted; use a number above 0")
        if vote is not None and vote not in VOTES:
            raise ConfigError(f"vote: {vote!r} is not permitted; choose from {', '.join(VOTES)}")
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = download(str(source))
        content, places = _found_in(folder)
        base = _run_base(folder) if base is None and not (folder / SELECTOR_FILE).is_file() else base
        if only is not None:
            if not 0 <= only < len(places):
                raise ConfigError(f"{folder}: only={only}, but there are {len(places)} selectors, counted from 0")
            places = places[only : only + 1]
        settings = _model_settings(folder, content, places, base, device, dtype)
        lm = load_lm(settings, content.kind == "reward")
        adapters = tuple(read_adapter(place, base=content.base_sha256) for place in places) or (lm.adapter(),)
        template = parse_template(content.template, SELECTOR_FILE)
        reader = reading.Selector.of(lm, template, content.choice_tokens, content.max_tokens, kind=content.kind)
        rule = (vote or content.vote) if len(adapters) > 1 else "mean"  # a majority of one would say 0 or 1 only
        return cls(reader, adapters, temperature or content.temperature, rule)

    @property
    def fields(self) -> tuple[str, ...]:
        """What its template shows beside the prompt and the answers; mostly nothing, with TL;DR's a subreddit and a title."""
        return self.reader.extra

    def choose(self, pairs: Sequence[Pair], batch_size: int = 16, too_long: float | None = None) -> list[float]:
        """For each pair the probability that its first answer is better; both orders are read and averaged.

        So p for (a, b) is 1 - p for (b, a), and 0.5 for equal answers. A long prompt is shortened from its end. too_long: what
        to return where the two answers alone do not fit; None: that is a ``DataError``. batch_size: pairs at a time.
        """
        order, each = self._read(pairs, batch_size)
        said = reading.vote(each, self.vote).probability.tolist() if order else []
        found = dict(zip(order, said, strict=True))
        unread = [i for i in range(len(pairs)) if i not in found]
        if unread and too_long is None:
            raise DataError(
                f"pair {unread[0]}: its two answers do not fit the {self.reader.max_tokens} tokens that this selector reads; "
                "shorten them, or say what to return for such a pair with too_long=0.5"
            )
        if unread:
            log.warning("%d of %d pairs are too long to be read and count as %s", len(unread), len(pairs), too_long)
        return [found[i] if i in found else float(too_long or 0.0) for i in range(len(pairs))]

    def choose_each(self, pairs: Sequence[Pair], batch_size: int = 16) -> list[list[float] | None]:
        """The same of each selector by itself, for each pair; None for a pair that is too long to be read."""
        order, each = self._read(pairs, batch_size)
        found = dict(zip(order, each.T.tolist(), strict=True))
        return [found.get(i) for i in range(len(pairs))]

    def _read(self, pairs: Sequence[Pair], batch_size: int) -> tuple[list[int], Tensor]:
        """Which pairs can be read, and (U, n) probabilities of theirs."""
        comparisons = [_comparison(i, pair, self.fields) for i, pair in enumerate(pairs)]
        encoded: dict[int, EncodedComparison] = {}
        for i, comparison in enumerate(comparisons):
            fitting, _ = self.reader.encode([comparison])
            if fitting:
                encoded[i] = fitting[0]
        self.reader.lm.forget_texts()
        order = sorted(encoded, key=lambda i: comparisons[i].prompt)  # neighbours share their prompt
        margins = letter_margins(self.reader, self.adapters, [encoded[i] for i in order], batch_size)
        return order, choice_probability(margins, self.temperature)

    def win_rates(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        batch_size: int = 16,
        fields: Sequence[Fields] | None = None,
    ) -> list[float]:
        """For each completion its mean probability of winning against the others of the same prompt: 0 to 1, a reward.

        Every pair of a prompt's completions is read. One that is alone has 0.5. An empty completion loses against any
        that says something, and a pair that is too long to be read is a tie. Texts may be chat messages. fields: those of
        each prompt, where the selector has some.
        """
        asked = [_prompt_text(prompt) for prompt in prompts]
        texts = [_completion_text(completion) for completion in completions]
        shown = [{}] * len(asked) if fields is None else fields
        if not len(asked) == len(texts) == len(shown):
            raise DataError(
                f"{len(asked)} prompts, {len(texts)} completions, {len(shown)} fields: give a prompt for each completion"
            )
        groups: dict[Any, list[int]] = {}
        for i, prompt in enumerate(asked):
            groups.setdefault((prompt, tuple(sorted(shown[i].items()))), []).append(i)
        speaks = [bool(text.strip()) for text in texts]
        duels = [duel for group in groups.values() for duel in combinations(group, 2)]
        read = [(i, j) for i, j in duels if speaks[i] and speaks[j]]
        pairs = [(asked[i], texts[i], texts[j], shown[i]) for i, j in read]
        said = self.choose(pairs, batch_size, too_long=0.5)
        won = dict(zip(read, said, strict=True))
        points: list[list[float]] = [[] for _ in texts]
        for i, j in duels:
            p = won.get((i, j), (1 + speaks[i] - speaks[j]) / 2)
            points[i].append(p)
            points[j].append(1 - p)
        return [sum(mine) / len(mine) if mine else 0.5 for mine in points]


def load_policy(source: str | Path, *, base: str | None = None, device: str = "auto", dtype: str = "auto") -> LM:
    """The LM of an aligned policy with its adapter in the slot: of a run, of what ``fedbiscuit export --policy`` wrote, or of
    a Hub name. ``base`` as for ``Selector.from_pretrained``.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = download(str(source))
    place, named = folder, base
    if (folder / "config.yaml").is_file():
        cfg = load_config(folder / "config.yaml")
        place, named = folder / "policy", base or (cfg.policy_model or cfg.model).base
    if not (place / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder}: no aligned policy here; name a run that `fedbiscuit align` has finished, or what "
            "`fedbiscuit export --policy` wrote"
        )
    sha256 = base_of(place)
    told = read_adapter_config(place).get("base_model_name_or_path", "")
    lm = load_lm(_on_base(folder, told, sha256, named, {"device": device, "dtype": dtype, "lora": _lora_of(place)}))
    lm.put_adapter(read_adapter(place, base=sha256))
    return lm


def _found_in(folder: Path) -> tuple[SelectorFile, list[Path]]:
    """What an export or a run says of its selectors, and the folders of their adapters."""
    if (folder / SELECTOR_FILE).is_file():
        content = read_selector_file(folder)
    elif (folder / "config.yaml").is_file():
        content = selector_file_of(RunDir.view(folder), load_config(folder / "config.yaml"))
    else:
        raise ConfigError(
            f"{folder}: neither {SELECTOR_FILE} nor a run in this folder; name what `fedbiscuit export` wrote, or a run"
        )
    return content, [folder / name for name in content.adapters]


def _run_base(folder: Path) -> str:
    return load_config(folder / "config.yaml").model.base


def _model_settings(
    folder: Path, content: SelectorFile, places: Sequence[Path], base: str | None, device: str, dtype: str
) -> ModelSettings:
    """What to load: the base model, checked to be the one that was trained on, and the shape of its adapters."""
    table: dict[str, Any] = {"device": device, "dtype": dtype}
    if not content.adapters:
        if base is not None:
            raise ConfigError(f"{folder}: a merged model has its base in it; leave base out")
        return ModelSettings.model_validate({**table, "base": str(folder), "lora": LoraSettings(r=1, dropout=0.0)})
    configs = [_lora_of(place) for place in places]
    if any(config != configs[0] for config in configs):
        raise IntegrityError(
            f"{folder}: its adapters differ in their LoRA settings; load them one by one with only=0, 1, ..."
        )
    return _on_base(folder, content.base, content.base_sha256, base, table | {"lora": configs[0]})


def _on_base(folder: Path, named: str, sha256: str, base: str | None, table: Mapping[str, Any]) -> ModelSettings:
    """Settings with the base model of an adapter, found under the name that it gives or under ``base``, and checked."""
    quantize = quantize_of(sha256)
    try:
        digest = digest_of(resolve_model(base or named)[1], quantize)
    except ConfigError as error:
        if base is not None:
            raise
        raise ConfigError(
            f"{folder}: its base model, {named} (sha256 {sha256:.16}...), is not found here; give it with "
            f"base=FOLDER ({error})"
        ) from error
    if digest != sha256:
        raise IntegrityError(
            f"{folder}: trained on {named} with sha256 {sha256:.16}..., but {base or named} has "
            f"{digest:.16}...; give the model that it was trained on with base=..., or ask for a merged export"
        )
    return ModelSettings.model_validate({**table, "base": base or named, "quantize": quantize})


def _lora_of(place: Path) -> LoraSettings:
    """The LoRA settings in an ``adapter_config.json``; dropout is for training only."""
    config = read_adapter_config(place)
    if not isinstance(config["target_modules"], list):
        raise IntegrityError(f"{place}: target_modules: {config['target_modules']!r:.80} must be a list of names")
    return LoraSettings(
        r=config["r"],
        alpha=float(config.get("lora_alpha", 8)),
        dropout=0.0,
        target_modules=tuple(sorted(config["target_modules"])),
        layers_to_transform=tuple(config.get("layers_to_transform", ())),
        use_rslora=config.get("use_rslora", False),
    )


def _comparison(i: int, pair: Pair, wanted: Sequence[str]) -> Comparison:
    if not isinstance(pair, Comparison):
        parts = list(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else []
        texts: list[Any] = parts[:3]
        extra: Any = parts[3] if len(parts) == 4 else {}
        values = [*texts, *extra.values()] if isinstance(extra, Mapping) else [None]
        if len(parts) not in (3, 4) or not all(isinstance(text, str) for text in values):
            fourth = ", and as a fourth the texts that `fields` names" if wanted else ""
            raise DataError(f"pair {i}: {pair!r:.80}: give three texts, (prompt, first answer, second answer){fourth}")
        pair = Comparison(texts[0], texts[1], texts[2], meta={"fields": extra})
    missing = [name for name in wanted if name not in pair.meta.get("fields", {})]
    if missing:
        told = ", ".join(f'"{name}": "..."' for name in wanted)
        raise DataError(
            f"pair {i}: this selector's template shows {' and '.join(missing)}; give it as the fourth of the pair, {{{told}}} "
            "(in win_rates as fields, one a prompt)"
        )
    return pair


def _prompt_text(prompt: Text) -> str:
    """Several chat messages become the transcript that selectors were trained on."""
    return prompt if isinstance(prompt, str) else text_of({"prompt": list(prompt)}, "prompt")


def _completion_text(completion: Text) -> str:
    return completion if isinstance(completion, str) else "\n\n".join(str(one["content"]) for one in completion)
