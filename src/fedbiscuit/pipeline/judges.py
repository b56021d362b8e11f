"""Who says which of two policies answers better: selectors of this run and of others, reward models, a known truth."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbiscuit.config import Config, LabelSettings, load_config
from fedbiscuit.data.encoding import extra_fields, load_template
from fedbiscuit.data.sources import load
from fedbiscuit.evaluation.winrate import points_of, win_rate
from fedbiscuit.models.rewards import RewardModel, check_reward_model, load_reward_model
from fedbiscuit.models.selector import Selector, choice_probability, letter_margins, vote
from fedbiscuit.pipeline.session import Session, silent
from fedbiscuit.rundir import RunDir
from fedbiscuit.types import Comparison, ConfigError, Weights

__all__ = [
    "Gold",
    "Judge",
    "check_judges",
    "judges_of",
    "labeler",
    "labeling_selector",
    "labeling_session",
    "said",
    "verdicts",
]


@dataclass(frozen=True, slots=True)
class Judge:
    """Selectors that vote on pairs of answers. independent: nobody whose choices they learned trained this run's selectors.

    labeled: the policy was trained to please them.
    """

    name: str
    selector: Selector
    adapters: tuple[Weights, ...]
    labels: LabelSettings
    independent: bool
    labeled: bool = False


@dataclass(frozen=True, slots=True)
class Gold:
    """A reward model from elsewhere, which prefers the answer with the higher score."""

    name: str
    model: RewardModel
    independent: bool = True


def check_judges(session: Session) -> None:
    """Stop where ``evaluation.judges`` names what cannot judge, before anything is computed."""
    names = Counter(Path(path).resolve().name for path in session.cfg.evaluation.judges)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(
            f"evaluation.judges: {names[twice[0]]} folders are called {twice[0]!r}, so their rows could not be told apart; "
            "rename one"
        )
    for path in session.cfg.evaluation.judges:
        if _is_model(path):
            check_reward_model(path)
        else:
            _settings(session, path, "evaluation.judges")


def labeling_selector(session: Session) -> Selector:
    """What reads the policy's answers to label them: the selector of this run, or of the one that ``labels.selectors`` names."""
    other = session.cfg.labels.selectors
    return _selector(session, _settings(session, other, "labels.selectors")) if other else session.selector


def labeler(session: Session) -> Judge:
    """Who labels the policy's answers, with the adapters that vote."""
    labels = session.cfg.labels
    if not labels.selectors:
        return Judge("the selectors' vote", session.selector, session.selectors(), labels, False, True)
    selector = labeling_selector(session)
    run = RunDir.view(labels.selectors)
    names = sorted((path.name for path in (run.path / "selectors").glob("u*")), key=lambda name: int(name[1:]))
    adapters = tuple(run.load_adapter(f"selectors/{name}", base=selector.lm.digest) for name in names)
    return Judge(
        f"the vote of the selectors of {run.path.name}, which labeled", selector, adapters, labels, False, True
    )


def labeling_session(session: Session) -> Session:
    """The run that trained who labels: this one, or the one that ``labels.selectors`` names."""
    other = session.cfg.labels.selectors
    return _other_session(session, other, "labels.selectors") if other else session


def judges_of(session: Session) -> list[Judge | Gold]:
    """Who labeled, and whom ``evaluation.judges`` names: selectors of runs, reward models."""
    cfg = session.cfg
    own = [labeler(session)] if cfg.selectors.local.objective == "choice" else []
    return [*own, *(_judge_from(session, path) for path in cfg.evaluation.judges)]


def verdicts(
    session: Session,
    judges: Sequence[Judge | Gold],
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
) -> list[dict[str, Any]]:
    """Each judge's verdict on the first answers against the second, and in the demo world that of the truth.

    ``points`` has it by prompt, under a digest: runs are compared prompt by prompt.
    """
    cfg = session.cfg
    keys = [hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16] for prompt in prompts]

    def verdict(name: str, probabilities: Sequence[float]) -> dict[str, Any]:
        row = win_rate(name, probabilities, (cfg.seed, "win rate"), cfg.evaluation.bootstrap)
        return row | {"points": dict(zip(keys, map(points_of, probabilities), strict=True))}

    rows = []
    for judge in judges:
        probabilities = said(session, judge, prompts, first, second)
        rows.append(
            verdict(judge.name, probabilities)
            | {"independent": judge.independent, "labeled": isinstance(judge, Judge) and judge.labeled}
        )
    truth = session.dataset.truth
    if truth is not None:
        probabilities = [truth.majority_prefers(*one) for one in zip(prompts, first, second, strict=True)]
        name = "known truth of the majority"
        rows.append(verdict(name, probabilities) | {"independent": True})
    return rows


def said(
    session: Session, judge: Judge | Gold, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[float]:
    """(n) probability that the first answer is better, by the vote in both orders; equal answers are a tie.

    Of a reward model, that of Bradley and Terry.
    """
    if isinstance(judge, Gold):
        return _said_by_scores(session, judge.model, prompts, first, second)
    fields = session.dataset.fields
    comparisons = [
        Comparison(p, a, b, meta={"fields": fields.get(p, {})}) for p, a, b in zip(prompts, first, second, strict=True)
    ]
    fitting, left_out = judge.selector.encode(comparisons)
    margins = letter_margins(judge.selector, judge.adapters, fitting, session.cfg.evaluation.batch_size)
    voted = iter(vote(choice_probability(margins, judge.labels.temperature), judge.labels.vote).probability.tolist())
    unread = {id(comparison) for comparison in left_out}
    _note(session, "pairs of answers to judge that do not fit max_tokens, counted as ties", len(unread))
    probabilities = [0.5 if id(comparison) in unread else next(voted) for comparison in comparisons]
    return [0.5 if a == b else p for p, a, b in zip(probabilities, first, second, strict=True)]


def _said_by_scores(
    session: Session, model: RewardModel, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[float]:
    pairs = list(zip(model.scores(prompts, first), model.scores(prompts, second), strict=True))
    read = [(a, b) for a, b in pairs if a is not None and b is not None]
    _note(session, f"pairs of answers longer than {model.name} reads, counted as ties", len(pairs) - len(read))
    return [0.5 if a is None or b is None else 1 / (1 + math.exp(min(b - a, 700.0))) for a, b in pairs]


def _note(session: Session, reason: str, count: int) -> None:
    if count:
        session.left_out[reason] = session.left_out.get(reason, 0) + count


def _is_model(path: str) -> bool:
    """Whether a folder is a model of transformers, not a run."""
    return (Path(path) / "config.json").is_file()


def _settings(session: Session, path: str, key: str) -> Config:
    """Settings of a run that can judge; ``ConfigError`` says why it cannot. ``key``: the setting that names it."""
    folder = Path(path)
    if not (folder / "selectors" / "u0").is_dir():
        if (folder / "policy").is_dir() and (folder / "config.yaml").is_file():
            raise ConfigError(f"{key}: {path} trained a policy and no selectors; name a run that trained some")
        other = ", or of a reward model of transformers" if key == "evaluation.judges" else ""
        raise ConfigError(
            f"{key}: {path} has no trained selectors; name the folder of a run that `fedbiscuit train` made{other}"
        )
    cfg = load_config(folder / "config.yaml")
    needed = extra_fields(load_template(cfg.data.template), cfg.selectors.kind)
    if session.lacks(needed):
        raise ConfigError(
            f"{key}: the template {cfg.data.template} of {path} needs {list(needed)}, which the policy's prompts do not "
            "have; name a run with another template"
        )
    return cfg


def _selector(session: Session, cfg: Config) -> Selector:
    """The selector of another run's settings."""
    data, kind = cfg.data, cfg.selectors.kind
    lm = session.lm_of(cfg.model, kind == "reward")
    return Selector.of(lm, load_template(data.template), data.choice_tokens, data.max_tokens, kind=kind)


def _other_session(session: Session, path: str, key: str) -> Session:
    """Another run, to look at, with its data, which must be what it was trained on."""
    cfg = _settings(session, path, key)
    other = Session(cfg, RunDir.view(path), load(cfg.data, cfg.seed), silent, models=session.models)
    other.run.check_same("manifest.json", {"data": other.dataset.digests}, "data files")
    return other


def _judge_from(session: Session, path: str) -> Judge | Gold:
    if _is_model(path):
        model = load_reward_model(path, session.cfg.model)
        return Gold(f"the reward model {model.name}", model)
    judging = _other_session(session, path, "evaluation.judges")
    cfg = judging.cfg
    both = judging.clients.keys() & session.clients.keys()
    if cfg.data.source == session.cfg.data.source == "demo" and cfg.seed != session.cfg.seed:
        both = set()  # the worlds of two seeds call different people by the same names
    total = len(judging.clients)
    who = f"{len(both)} of its {total} clients are ours" if both else f"{total} other clients"
    name = f"the selectors of {cfg.name}, {who}"
    return Judge(name, judging.selector, judging.selectors(), cfg.labels, not both)
