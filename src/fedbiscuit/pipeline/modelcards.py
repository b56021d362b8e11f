"""The README of an exported folder, a model card as the Hub reads it: counts and settings, never a name or a text.

Everything in it comes from the files of a run; a number that the run does not have is said to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fedbiscuit
from fedbiscuit.config import Config

__all__ = ["Facts", "policy_card", "selector_card"]

FEWEST_CLIENTS = 5
"""Means over fewer clients are not told: they are nearly a single person's number."""

LOAD = """```python
from fedbiscuit import Selector

selector = Selector.from_pretrained("THIS_FOLDER")
selector.choose([("prompt", "answer one", "answer two"%s)])   # probability that the first is better
```"""
POLICIES = {
    "choice": (
        "dpo",
        "It was fine-tuned by DPO on pairs of its own answers, which federated preference selectors labeled",
    ),
    "sft": ("federated-sft", "Clients fine-tuned it federatedly on the answers that they preferred"),
    "dpo": ("federated-dpo", "Clients trained it federatedly by DPO on their own comparisons"),
}
"""Local objective to the tag of the policy and how it was made."""
USES = {"train": "train on", "validation": "validate on", "test": "test on"}
LEAVES = {
    "prices": "in rounds that form groups, the number of the selector that suits it best at the announced prices",
    "fixed": "",
}
LOSSES = "in rounds that form groups, its mean loss under each selector, a number that depends on its choices"


@dataclass(frozen=True, slots=True)
class Facts:
    """What cards tell of a run.

    quantize: how the base was held in training. base: its name that may be handed on. known_as: its name on the Hub, or
    nothing. rounds: how many were run. num_bytes: sent by clients and by the server, all rounds together. num_pairs: that
    the policy was trained on. data: ``left_out.json``. evaluation: ``evaluation.json``, empty where there is none. real_clients:
    how many took part from machines of their own.
    """

    cfg: Config
    quantize: str
    base: str
    known_as: str
    merged: bool
    rounds: int
    num_selectors: int
    num_bytes: tuple[int, int]
    num_pairs: int
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    real_clients: int = 0


def selector_card(facts: Facts, numbers: Sequence[int], temperature: float, fields: Sequence[str]) -> str:
    """The card of the selectors with these numbers; several are in folders ``u0``, ``u1``, ... of the export.

    ``fields``: what their template shows beside the prompt and the answers.
    """
    data, several = facts.cfg.data, len(numbers) > 1
    which = f"{len(numbers)} selectors that vote" if several else f"selector {numbers[0]} of {facts.num_selectors}"
    what = "Each is a LoRA adapter" if several else "It is a LoRA adapter"
    if facts.merged:
        what = "It is a plain language model, a LoRA adapter merged into its base"
    letters = " or ".join(f"`{token!r}`" for token in data.choice_tokens)
    load = LOAD % (f", {json.dumps(dict.fromkeys(fields, '...'))}" if fields else "")
    sections = {
        f"# Preference selector: {which}": "Reads a prompt and two answers and says how likely it is that people prefer the "
        f"first. {what}, trained by fedbiscuit {fedbiscuit.__version__}.",
        "## Use": f"{load}\n\nIt answers with {letters} as the next token after a template. The template is in `selector.json`, "
        f"with the longest input ({data.max_tokens} tokens) and the temperature ({temperature:.3g}). Every pair is read in both "
        f"orders and the two are averaged: one order alone is biased. {_plain_loading(facts, several)}",
        "## Data": _data(facts),
        "## Method": _federated(facts),
        "## Numbers": _selector_numbers(facts, numbers),
    }
    return _card(facts, "preference-selector", sections)


def policy_card(facts: Facts) -> str:
    """The card of an aligned policy, or of one that the clients trained themselves."""
    cfg, objective = facts.cfg, facts.cfg.selectors.local.objective
    tag, made = POLICIES[objective]
    what = "A plain language model, a LoRA adapter merged into its base" if facts.merged else "A LoRA adapter"
    asked = "the chat template of its tokenizer" if cfg.generation.chat else "the plain prompt"
    system = f" and the system message {cfg.generation.system!r}" if cfg.generation.system else ""
    method = _federated(facts) + (f"\n\n{_alignment(facts)}" if objective == "choice" else "")
    sections = {
        "# Aligned policy": f"{what}, made by fedbiscuit {fedbiscuit.__version__}. {made}.",
        "## Use": f"It was trained with {asked}{system}. {_plain_loading(facts, False)}",
        "## Data": _data(facts),
        "## Method": method,
        "## Numbers": _policy_numbers(facts),
    }
    return _card(facts, tag, sections)


# Parts


def _card(facts: Facts, tag: str, sections: Mapping[str, str]) -> str:
    every = {**sections, "## Privacy": _privacy(facts), "## Base model and licence": _base(facts)}
    return "\n\n".join([_head(facts, tag), *(f"{title}\n\n{text}" for title, text in every.items())]) + "\n"


def _head(facts: Facts, tag: str) -> str:
    """YAML front matter. The Hub refuses a base model that is not a name on it, so only such a name stands there."""
    lines = ["---", f"library_name: {'transformers' if facts.merged else 'peft'}"]
    if facts.known_as:
        lines += [f"base_model: {facts.known_as}", f"base_model_relation: {'finetune' if facts.merged else 'adapter'}"]
    lines += ["pipeline_tag: text-generation"] if tag != "preference-selector" else []
    lines += ["tags:", *(f"- {one}" for one in ("fedbiscuit", "federated-learning", "lora", tag)), "---"]
    return "\n".join(lines)


def _plain_loading(facts: Facts, several: bool) -> str:
    if facts.merged:
        return "As a plain model it loads with `AutoModelForCausalLM.from_pretrained`."
    where = ', subfolder="u0"' if several else ""
    return f'In PEFT it loads with `PeftModel.from_pretrained(base, "THIS_FOLDER"{where})`.'


def _data(facts: Facts) -> str:
    if facts.cfg.labels.selectors:
        return "The selectors that labeled were trained in another run; their card says on what."
    who = "simulated people of the built-in demo world" if facts.cfg.data.source == "demo" else "people"
    if facts.real_clients:
        return (
            f"Comparisons of {who}, held by {facts.real_clients} clients on machines of their own. "
            "None of them is in this folder."
        )
    counts: Mapping[str, int] = facts.data.get("comparisons") or {}
    held = ", ".join(f"{count} to {USES[part]}" for part, count in counts.items() if part in USES)
    clients, new = facts.data.get("clients", "an unrecorded number of"), facts.data.get("new_clients")
    apart = f" {new} more clients took no part and were only tested on." if new else ""
    return (
        f"Comparisons of {who}, held by {clients} clients: {held or 'how many was not recorded'}.{apart} "
        "None of them is in this folder."
    )


def _federated(facts: Facts) -> str:
    chosen, lora = facts.cfg.selectors, facts.cfg.model.lora
    local = chosen.local
    if facts.cfg.labels.selectors:
        return "No selectors were trained in this run; those that labeled are of another one."
    rows = {
        "adapters trained (U)": facts.num_selectors,
        "rounds": facts.rounds,
        "clients a round": chosen.cohort_size or "all",
        "population": chosen.population,
        "grouping": f"{chosen.grouping}, every {chosen.regroup_every} rounds after {chosen.warmup_rounds} warm-up rounds each"
        if facts.num_selectors > 1 and chosen.population == "federated"
        else "none",
        "aggregation": f"{chosen.aggregator}, server {chosen.server_optimizer}, {chosen.lora_aggregation} of LoRA",
        "local training": f"{local.objective}, {local.steps} steps of {local.batch_size * local.grad_accum} comparisons, "
        f"{local.optimizer}, learning rate {local.lr:g}",
        "LoRA": f"rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, "
        + (f"layers {_ranges(lora.layers_to_transform)}" if lora.layers_to_transform else "all layers"),
        "seed": facts.cfg.seed,
    }
    return _table(("setting", "value"), rows.items())


def _alignment(facts: Facts) -> str:
    how, wrote, labels = facts.cfg.alignment, facts.cfg.generation, facts.cfg.labels
    rows = {
        "answers written": f"{wrote.num_completions} a prompt, temperature {wrote.temperature:g}, "
        f"at most {wrote.max_new_tokens} tokens",
        "labels": f"{facts.num_pairs} pairs, vote {labels.vote}, both orders"
        if labels.orders == "both"
        else f"{facts.num_pairs} pairs",
        "DPO": f"{how.steps} steps of {how.batch_size * how.grad_accum} pairs, beta {how.beta:g}, {how.optimizer}, "
        f"learning rate {how.lr:g}",
    }
    return _table(("alignment", "value"), rows.items())


def _selector_numbers(facts: Facts, numbers: Sequence[int]) -> str:
    found = facts.evaluation.get("selectors")
    if not found:
        return "This run was not evaluated."
    rows = [
        (
            row["name"],
            f"{row['accuracy']:.3f}",
            _interval(row),
            *(_number(row.get(key)) for key in ("worst_decile", "flip_rate", "calibration_error_at_temperature")),
        )
        for row in found["rows"]
    ]
    heads = ("who chooses", "agreement", "95% interval", "worst tenth of clients", "flip rate", "calibration error")
    text = _table(heads, rows) + (
        "\n\nAgreement with choices that nobody was trained on, a mean over clients. Flip rate: how often the two orders alone "
        "disagree. Calibration error at the temperature that fits validation comparisons."
    )
    if len(numbers) == 1 and facts.num_selectors > 1:
        mine = [one["accuracy"] for one in found["clients"].values() if one["adapter"] == numbers[0]]
        if len(mine) >= FEWEST_CLIENTS:
            text += f" This selector's own group: {sum(mine) / len(mine):.3f} over {len(mine)} clients."
        else:
            text += f" This selector's own group has fewer than {FEWEST_CLIENTS} clients; its number is not told."
    return text


def _policy_numbers(facts: Facts) -> str:
    found = facts.evaluation.get("policy")
    if not found:
        return "This run's policy was not evaluated."
    rows = [
        (row["name"], f"{row['win_rate']:.3f}", _interval(row), f"{row['wins']} / {row['losses']} / {row['ties']}",
         "yes" if row.get("independent") else "no")
        for row in found["judges"]
    ]  # fmt: skip
    words = found["length"]
    return (
        _table(("judge", "win rate", "95% interval", "wins / losses / ties", "independent"), rows)
        + "\n\nAgainst the base model on prompts that were not trained on. A judge that is not independent learned from "
        f"the same people. Words an answer: {words['raw']:.1f} before, {words['aligned']:.1f} after."
    )


def _privacy(facts: Facts) -> str:
    chosen = facts.cfg.selectors
    if facts.cfg.labels.selectors:
        return (
            "This run trained on no comparison of anybody; its policy was trained on what selectors of another run said "
            "of its own answers. What left the clients who trained these, and what is not guaranteed, their card says."
        )
    if chosen.population == "centralized":
        left = "The comparisons of all clients were pooled in one place. This is a baseline without any privacy."
    else:
        seats = (
            LEAVES.get(chosen.grouping, LOSSES) if facts.num_selectors > 1 and chosen.population == "federated" else ""
        )
        sent, received = facts.num_bytes
        where = (
            "The clients trained on machines of their own, and whoever ran the server was sent none of their comparisons."
            if facts.real_clients
            else "The clients were simulated in one process, so whoever ran it held all comparisons."
        )
        left = (
            "What left a client in a round that it took part in: the change of its adapter's weights and how many comparisons "
            "were used"
            + (f"; {seats}" if seats else "")
            + ". No prompt, no answer and no single choice was sent. In all, clients "
            f"sent {sent / 1e6:.1f} MB and were sent {received / 1e6:.1f} MB. {where}"
        )
    return left + (
        "\n\nWhat is not guaranteed: this run used no differential privacy and no secure sums. The server saw each client's "
        "change, from which something about its choices can be learned. The weights in this folder are computed from people's "
        "choices too: somebody who has them and a comparison may be able to tell whether it was trained on. Share "
        "them as the people whose choices these are would want."
    )


def _base(facts: Facts) -> str:
    name = f"`{facts.base}`"
    if facts.known_as and facts.known_as != facts.base:
        name += f", which others find as `{facts.known_as}`"
    elif not facts.known_as:
        name += ", the name of a folder of those who trained it"
    if facts.base.endswith(".gguf"):
        name += (
            ". The weights that it was trained on are a quantized file; with the original ones numbers differ a little"
        )
    if facts.quantize != "none":
        name += f". In training its linear layers were held in 4 bits ({facts.quantize}, as in QLoRA)" + (
            ", and these are the weights that the adapter was added to"
            if facts.merged
            else "; on the base in full precision numbers differ a little"
        )
    return (
        f"Base model: {name}. Its licence applies to what is derived from it, and so to this folder; read it before you "
        "share or use this. No licence was chosen for the adapter itself: whoever publishes this folder should add a line "
        "`license:` at the top."
    )


def _ranges(layers: Sequence[int]) -> str:
    ordered = sorted(layers)
    whole = ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]} to {ordered[-1]}" if whole and len(ordered) > 1 else ", ".join(map(str, ordered))


def _interval(row: Mapping[str, Any]) -> str:
    return "{:.3f} to {:.3f}".format(*row["interval"]) if row.get("interval") else ""


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def _table(heads: Sequence[str], rows: Any) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
