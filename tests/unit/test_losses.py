"""Losses against numbers worked out by hand, and DPO against TRL's own."""

from __future__ import annotations

import math

import pytest
import torch

from fedbiscuit.models.losses import choice_loss, dpo_loss, margin_nats, sft_loss
from fedbiscuit.models.selector import choice_probability


def test_choice_loss_is_the_mean_of_minus_log_p_of_the_chosen_letter():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert choice_loss(logits, torch.tensor([0, 1])).item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_dpo_loss_of_equal_policies_is_log_two_and_a_margin_lowers_it():
    reference = torch.tensor([[-10.0, -12.0]])
    assert dpo_loss(reference, reference, 0.1)[0].item() == pytest.approx(math.log(2))
    loss, margin = dpo_loss(torch.tensor([[-5.0, -17.0]]), reference, 0.1)
    assert margin.item() == pytest.approx(1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_soft_labels_weigh_both_directions_by_the_probability():
    reference, policy = torch.zeros(1, 2), torch.tensor([[10.0, 0.0]])
    loss, _ = dpo_loss(policy, reference, 0.1, torch.tensor([0.75]))
    assert loss.item() == pytest.approx(0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1)))


def test_sft_loss_is_nats_a_token():
    assert sft_loss(torch.tensor([-6.0, -4.0]), torch.tensor([3, 2])).item() == pytest.approx(2.0)


def test_dpo_loss_and_log_probabilities_equal_trls_on_the_same_tensors(load_tiny, tmp_path):
    """TRL's own trainer, its own collator and forward pass, on a model and adapter with the same weights."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from fedbiscuit.models.policy import Pair, pair_dpo_loss, reference_log_probs

    lm = load_tiny()
    generator = torch.Generator().manual_seed(3)
    weights = {
        n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.2 for n, w in lm.new_adapter(1).items()
    }
    pairs = [Pair((1, 2, 3, 4), (5, 6, 7, 258), (9, 258)), Pair((8, 8), (3, 258), (4, 4, 4, 258))]
    rows = [
        {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs
    ]
    with lm.padded() as model:  # TRL's reference is the adapter as it finds it: B is still zero, so the base model
        args = trl.DPOConfig(
            output_dir=str(tmp_path), beta=0.1, report_to=[], use_cpu=True, bf16=False, max_length=None
        )
        data = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = trl.DPOTrainer(model=model, args=args, train_dataset=data, processing_class=lm.tokenizer)
        lm.put_adapter(weights)
        model.eval()
        theirs = trainer.compute_loss(model, trainer.data_collator(rows))
    ours, report = pair_dpo_loss(lm, pairs, reference_log_probs(lm, pairs), 0.1)
    assert theirs.item() != pytest.approx(math.log(2), abs=1e-5)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    logged = trainer._metrics["train" if model.training else "eval"]
    assert report["chosen_logp"] == pytest.approx(logged["logps/chosen"][-1], abs=1e-3)
    assert report["rejected_logp"] == pytest.approx(logged["logps/rejected"][-1], abs=1e-3)


def test_margin_nats_are_those_of_the_probability_by_which_a_selector_chooses():
    margins, choices = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0, 1])
    p_of_a = choice_probability(margins)
    assert margin_nats(margins, choices).tolist() == pytest.approx([-math.log(p_of_a[0]), -math.log(1 - p_of_a[1])])
    liking = torch.tensor([[5.0, 5.0]])  # of the letter A, whatever it stands for
    assert torch.allclose(margin_nats(margins + liking, choices), margin_nats(margins, choices))
