"""The README of an adapter folder: what it is, what it was made from, how to load it."""

from __future__ import annotations

__all__ = ["baseline_card", "policy_card", "reward_card", "selector_card"]

HEAD = """---
base_model: {base}
library_name: peft
tags: [fedbiscuit, {tag}]
---
"""

LOAD = """```python
base = AutoModelForCausalLM.from_pretrained(fedbiscuit.resolve_model("{base}")[0])
model = PeftModel.from_pretrained(base, "{folder}")
```
"""


def selector_card(base: str, u: int, num_adapters: int, rounds: int, template: str, letters: tuple[str, str]) -> str:
    """The card of selector ``u``."""
    return HEAD.format(base=base, tag="preference-selector") + (
        f"# Preference selector {u} of {num_adapters}\n\n"
        f"A LoRA adapter of `{base}`, trained federatedly over {rounds} rounds by fedbiscuit. It reads a prompt and two "
        f"responses in the template `{template}` and answers with {letters[0]!r} or {letters[1]!r} as the next token. "
        "Read every pair in both orders and average: one order alone is biased.\n\n"
        + LOAD.format(base=base, folder=f"selectors/u{u}")
    )


def reward_card(base: str, u: int, num_adapters: int, rounds: int) -> str:
    """The card of reward model ``u``, the baseline."""
    return HEAD.format(base=base, tag="reward-model") + (
        f"# Reward model {u} of {num_adapters}\n\n"
        f"A LoRA adapter of `{base}` with a head (`score.weight`), trained federatedly over {rounds} rounds by fedbiscuit. It "
        "reads a prompt and one response and gives it a score; the difference of two scores is the log odds that the first "
        "response is preferred. A baseline to compare preference selectors with. PEFT loads the LoRA part only.\n"
    )


def policy_card(base: str, steps: int, num_pairs: int) -> str:
    """The card of an aligned policy."""
    return HEAD.format(base=base, tag="dpo") + (
        "# Aligned policy\n\n"
        f"A LoRA adapter of `{base}`, fine-tuned by fedbiscuit with {steps} steps of DPO on {num_pairs} pairs of its own "
        "completions, which federated preference selectors had labeled.\n\n" + LOAD.format(base=base, folder="policy")
    )


def baseline_card(base: str, objective: str, rounds: int) -> str:
    """The card of a policy that clients trained themselves: federated fine-tuning (sft) or federated DPO (dpo)."""
    how = {"sft": "fine-tuning on the answers that they preferred", "dpo": "DPO on their own comparisons"}[objective]
    return HEAD.format(base=base, tag=f"federated-{objective}") + (
        "# Federatedly trained policy\n\n"
        f"A LoRA adapter of `{base}`, trained by fedbiscuit over {rounds} rounds in which clients did {how}. A baseline: no "
        "selector had a part in it.\n\n" + LOAD.format(base=base, folder="policy")
    )
