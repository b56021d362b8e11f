"""DPO on the selectors' labels: ``policy/``."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fedbiscuit.models.cards import policy_card
from fedbiscuit.models.policy import Pair, pair_dpo_loss, reference_log_probs
from fedbiscuit.models.training import load_optimizer, make_optimizer, optimizer_tensors, stream, train
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ConfigError

__all__ = ["align_policy"]


def align_policy(session: Session) -> None:
    """DPO on the labels, from the last saved step; the reference's log-probabilities are computed once and kept."""
    run, cfg, lm = session.run, session.cfg, session.policy_lm
    rows = run.read_lines("preferences.jsonl")
    if not rows:
        raise ConfigError(f"{run.path}: no preferences.jsonl to align on; run `fedbiscuit label {run.path}` first")
    how, settings, seed = cfg.alignment.as_local(), cfg.alignment, cfg.seed
    prompts = {
        prompt: lm.chat_prompt(prompt, cfg.generation.system, cfg.generation.chat)
        for prompt in {r["prompt"] for r in rows}
    }
    pairs = [
        Pair(
            prompts[row["prompt"]], tuple(row["chosen_token_ids"]), tuple(row["rejected_token_ids"]), row["probability"]
        )
        for row in rows
    ]
    found = run.load_state("policy")
    lm.put_adapter(found[1]["policy"] if found else lm.new_adapter(seed, "policy"))
    optimizer = make_optimizer(list(lm.trainable().values()), how)
    first_step = 0
    if found:
        first_step = found[0]
        reference = found[1]["reference"]["log_probs"]
        load_optimizer(optimizer, found[1]["optimizer"])
    else:
        run.discard("checkpoints", "step-*")  # of an earlier start, maybe with other settings
        session.progress("reference", 1, 1, f"{len(pairs)} pairs")
        reference = reference_log_probs(lm, pairs, settings.batch_size)
    run.keep_lines("alignment.jsonl", first_step)
    per_step = how.batch_size * how.grad_accum

    def batches(step: int) -> list[list[int]]:
        taken = stream(range(len(pairs)), step * per_step, per_step, (seed, "dpo order"))
        return [taken[i : i + how.batch_size] for i in range(0, per_step, how.batch_size)]

    def loss(batch: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
        chosen: list[Pair] = [pairs[i] for i in batch]
        return pair_dpo_loss(lm, chosen, reference[list(batch)], settings.beta, settings.soft_labels)

    def save(step: int) -> None:
        tensors = {
            "policy": lm.adapter(),
            "optimizer": optimizer_tensors(optimizer),
            "reference": {"log_probs": reference},
        }
        run.save_state("policy", step, tensors, {})

    started = time.monotonic()
    for step, report in enumerate(
        train(lm, batches, loss, how, (seed, "dpo dropout"), optimizer, first_step), first_step + 1
    ):
        row = {"step": step, **report}
        run.append_lines("alignment.jsonl", [row])
        session.tracking.forward("alignment", row)
        if settings.keep_every and step % settings.keep_every == 0:
            _save_policy(session, f"checkpoints/step-{step:06d}/policy", step, len(rows))
        if step % settings.save_every == 0 or step == how.steps:
            save(step)
            seconds = time.monotonic() - started
            run.append_lines("timings.jsonl", [{"stage": "alignment", "step": step, "seconds": seconds}])
            started = time.monotonic()
        session.progress("alignment", step, how.steps, f"loss {report['loss']:.3f}, margin {report['margin']:+.3f}")
    _save_policy(session, "policy", how.steps, len(rows))


def _save_policy(session: Session, folder: str, step: int, num_pairs: int) -> None:
    lm = session.policy_lm
    session.run.save_adapter(
        folder, lm.adapter(), lm.adapter_config(), policy_card(lm.public_name, step, num_pairs), base=lm.digest
    )
