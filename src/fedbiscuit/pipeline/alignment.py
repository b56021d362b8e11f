"""DPO on the selectors' labels: ``policy/``."""

from __future__ import annotations

import logging
import time

from fedbiscuit.models.cards import policy_card
from fedbiscuit.models.training import descend, load_optimizer, make_optimizer, optimizer_tensors
from fedbiscuit.pipeline.devices import helpers_for
from fedbiscuit.pipeline.dpo import Part, Whole
from fedbiscuit.pipeline.session import Session

__all__ = ["align_policy"]

log = logging.getLogger("fedbiscuit")


def align_policy(session: Session) -> None:
    """DPO on the labels, over ``session.devices`` devices where a step has so many pairs."""
    part = Part.of(session.cfg, session.run, session.policy_lm)
    session.settle()
    count = min(session.devices, part.per_step)
    found = session.run.load_state("policy")
    if found is not None and found[0] >= session.cfg.alignment.steps:
        count = 1  # all is done
    elif count < session.devices:
        log.warning(
            "alignment: a step has %d pairs, so it uses %d of %d devices; raise alignment.batch_size or grad_accum",
            part.per_step,
            count,
            session.devices,
        )
    device = (session.cfg.policy_model or session.cfg.model).device
    with helpers_for(session, "dpo", device, count) as helpers:
        _align(session, Whole(part, helpers))


def _align(session: Session, dpo: Whole) -> None:
    """Steps, from the last saved one to the end; the reference's log-probabilities are computed once and kept."""
    run, lm, settings, seed = session.run, session.policy_lm, session.cfg.alignment, session.cfg.seed
    how, num_pairs = settings.as_local(), len(dpo.here.pairs)
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
        session.progress("reference", 1, 1, f"{num_pairs} pairs")
        reference = dpo.reference()
    run.keep_lines("alignment.jsonl", first_step)

    def save(step: int) -> None:
        tensors = {
            "policy": lm.adapter(),
            "optimizer": optimizer_tensors(optimizer),
            "reference": {"log_probs": reference},
        }
        run.save_state("policy", step, tensors, {})

    started = time.monotonic()
    steps = descend(lambda step: dpo.gradient(step, reference), how, optimizer, first_step)
    for step, report in enumerate(steps, first_step + 1):
        row = {"step": step, **report}
        run.append_lines("alignment.jsonl", [row])
        session.tracking.forward("alignment", row)
        if settings.keep_every and step % settings.keep_every == 0:
            _save_policy(session, f"checkpoints/step-{step:06d}/policy", step, num_pairs)
        if step % settings.save_every == 0 or step == how.steps:
            save(step)
            seconds = time.monotonic() - started
            run.append_lines("timings.jsonl", [{"stage": "alignment", "step": step, "seconds": seconds}])
            started = time.monotonic()
        session.progress("alignment", step, how.steps, f"loss {report['loss']:.3f}, margin {report['margin']:+.3f}")
    _save_policy(session, "policy", how.steps, num_pairs)


def _save_policy(session: Session, folder: str, step: int, num_pairs: int) -> None:
    lm = session.policy_lm
    session.run.save_adapter(
        folder, lm.adapter(), lm.adapter_config(), policy_card(lm.public_name, step, num_pairs), base=lm.digest
    )
