"""Train a policy online in TRL with a federated selector as the judge.

The policy writes a group of answers to each prompt; the selector reads every pair of them in both orders; an answer's
reward is its mean probability of winning. GRPO needs no more than that.

    pip install "fedbiscuit[trl]"
    fedbiscuit export runs/demo --selector all --to exported
    python examples/trl_online.py --policy HuggingFaceTB/SmolLM2-135M-Instruct --selector exported --prompts prompts.txt

TRL 1.16 has no interface for pairwise judges any more, so the comparison of a group is a reward function. The same function
serves OnlineDPOTrainer(reward_funcs=reward, ...) of trl.experimental.online_dpo, where a group is two answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import fedbiscuit
from fedbiscuit import Selector


def reward_of(selector: Selector) -> Any:
    """A reward function as TRL calls it: prompts and completions of one or more groups, a number for each completion.

    Where the selector's template shows more, such as TL;DR's titles, the dataset has columns of these names.
    """

    def wins_against_its_group(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        fields = [{name: columns[name][i] for name in selector.fields} for i in range(len(prompts))]
        return selector.win_rates(prompts, completions, fields=fields)

    return wins_against_its_group


def main() -> None:
    words = argparse.ArgumentParser(description="GRPO with a federated selector as the judge")
    words.add_argument("--policy", required=True, help="the model to train: a folder, a Hub name, or package:NAME/FILE")
    words.add_argument(
        "--selector", required=True, help="what `fedbiscuit export` wrote, the folder of a run, or a Hub name"
    )
    words.add_argument("--base", help="the selector's base model, where it is not found under its own name")
    words.add_argument("--prompts", type=Path, required=True, help="a text file with a prompt on each line")
    words.add_argument("--out", default="online", help="where the trained adapter goes")
    words.add_argument("--steps", type=int, default=100)
    words.add_argument("--group", type=int, default=4, help="answers to a prompt, which are compared with each other")
    words.add_argument("--tokens", type=int, default=80, help="longest answer, in tokens")
    words.add_argument("--lr", type=float, default=1e-5)
    words.add_argument("--cpu", action="store_true", help="do not use a GPU")
    given = words.parse_args()

    prompts = [line.strip() for line in given.prompts.read_text("utf-8").splitlines() if line.strip()]
    selector = Selector.from_pretrained(given.selector, base=given.base, device="cpu" if given.cpu else "auto")
    settings = GRPOConfig(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=given.group,
        num_generations=given.group,
        max_completion_length=given.tokens,
        learning_rate=given.lr,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=given.cpu,
        bf16=not given.cpu,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=fedbiscuit.resolve_model(given.policy)[0],
        reward_funcs=reward_of(selector),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(given.out)
    for row in trainer.state.log_history:
        if "reward" in row:
            print(f"step {row['step']}: mean reward {row['reward']:.4f}, spread in a group {row['reward_std']:.4f}")


if __name__ == "__main__":
    main()
