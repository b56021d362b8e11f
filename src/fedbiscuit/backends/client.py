"""What a client does, anywhere: a task and its own data in, a Reply out. Its comparisons stay here.

A client's scores of the adapters stay in its ``Memory``; from them it answers with a seat, never with a loss, unless the
server asks for losses and the run is one that shares them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedbiscuit.federated.coding import coded, decoded
from fedbiscuit.federated.grouping import choose_seat
from fedbiscuit.models.losses import margin_nats
from fedbiscuit.models.policy import Pair, encode_pair, pair_dpo_loss, pair_sft_loss, reference_log_probs
from fedbiscuit.models.selector import Selector, letter_margins, selector_loss
from fedbiscuit.models.training import make_optimizer, stream, train
from fedbiscuit.types import ClientData, Comparison, FederationError, IntegrityError, LocalTraining, Reply, Task

__all__ = ["Desk", "Memory", "answer", "policy_pair"]


MAX_SEATS = 60
"""Prices that a client answers in one round. Each answer bounds the differences of its losses a little further."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What every client of one machine works with: the LM with its template, and the run's settings for clients."""

    selector: Selector
    seed: int
    freeze_a: bool = False
    chat: bool = True
    system: str = ""
    batch_size: int = 16
    grouping_comparisons: int = 0
    """Score adapters on so many comparisons, training ones where there are fewer to validate on; 0: all to validate on."""
    comm_dtype: str = "float32"
    """What type tensors have while they travel."""


@dataclass(slots=True)
class Memory:
    """What one client keeps to itself between tasks: its losses under the adapters it scored last, in which round, and how many
    prices it still answers.
    """

    losses: list[float] = field(default_factory=list)
    round: int = -1
    seats_left: int = 0


def answer(task: Task, data: ClientData, desk: Desk, memory: Memory) -> Reply:
    """Do one task. Raises what goes wrong; the backend turns that into ``Reply(ok=False)``."""
    try:
        return _answer(task, data, desk, memory)
    except IntegrityError as error:  # no file is read here: what came from the server does not fit
        raise FederationError(str(error)) from error


def _answer(task: Task, data: ClientData, desk: Desk, memory: Memory) -> Reply:
    if task.kind == "train":
        return _train(task, data, desk)
    if task.kind == "evaluate":
        memory.losses = _losses(task, data, desk)
        if memory.round != task.round:  # to score once more in a round buys no more answers
            memory.round, memory.seats_left = task.round, MAX_SEATS
        return Reply(task.client, metrics={"losses": list(memory.losses)} if task.share_losses else {})
    if len(memory.losses) != len(task.prices):
        raise FederationError(f"asked for a seat among {len(task.prices)}, but scored {len(memory.losses)} adapters")
    if memory.round != task.round:
        raise FederationError(f"asked for a seat in round {task.round}, but scored adapters in round {memory.round}")
    if memory.seats_left == 0:
        raise FederationError(f"asked for a seat more than {MAX_SEATS} times; enough prices would tell its losses")
    memory.seats_left -= 1
    return Reply(task.client, seat=choose_seat(memory.losses, task.prices, task.client))


def _train(task: Task, data: ClientData, desk: Desk) -> Reply:
    """Local steps from the server's adapter as it was received; the reply is end minus that start."""
    if task.local is None or len(task.adapters) != 1:
        raise FederationError("a train task needs its local settings and exactly one adapter")
    (u, received), how, lm = *task.adapters.items(), task.local, desk.selector.lm
    start = decoded(received, desk.comm_dtype)
    lm.put_adapter(start)
    parameters = lm.trainable(desk.freeze_a)
    size, per_step = how.batch_size, how.batch_size * how.grad_accum

    def batches(step: int) -> list[list[Comparison]]:
        taken = stream(data.train, task.consumed + step * per_step, per_step, _order(task, desk))
        return [taken[i : i + size] for i in range(0, per_step, size)]

    def loss(batch: Sequence[Comparison]) -> tuple[Tensor, dict[str, float]]:
        return _objective(batch, desk, how), {}

    optimizer = make_optimizer(list(parameters.values()), how)
    for _ in train(lm, batches, loss, how, (desk.seed, task.round, task.client, "dropout"), optimizer):
        pass
    end = lm.adapter()
    delta = coded({name: end[name] - start[name] for name in parameters}, desk.comm_dtype)
    return Reply(task.client, adapter=u, delta=delta, num_examples=min(how.comparisons_per_round, len(data.train)))


def _order(task: Task, desk: Desk) -> tuple[object, ...]:
    """The key of the order in which a client goes through its comparisons."""
    return (desk.seed, task.client, "order")


def _objective(batch: Sequence[Comparison], desk: Desk, how: LocalTraining) -> Tensor:
    """The mean local loss of a batch: the selector's, or a baseline's that trains the policy itself."""
    if how.objective == "choice":
        encoded, left_out = desk.selector.encode(batch)
        if left_out:
            raise FederationError(
                f"{len(left_out)} comparisons are longer than max_tokens; leave them out before training"
            )
        return selector_loss(desk.selector, encoded)
    lm, trunks = desk.selector.lm, desk.selector.trunks
    pairs = [policy_pair(one.prompt, one.chosen, one.rejected, desk) for one in batch]
    if how.objective == "sft":
        return pair_sft_loss(lm, pairs, trunks)
    reference = reference_log_probs(lm, pairs, trunks=trunks)
    lm.model.train()
    return pair_dpo_loss(lm, pairs, reference, how.dpo_beta, trunks=trunks)[0]


def policy_pair(prompt: str, first: str, second: str, desk: Desk) -> Pair:
    """Two answers of people's comparisons as the policy would have to write them.

    A prompt with which they are longer than ``max_tokens`` is shortened from its end, as a selector's is; they never are.
    """
    lm = desk.selector.lm

    def encoded(characters: int) -> Pair:
        return encode_pair(lm, lm.chat_prompt(prompt[:characters], desk.system, desk.chat), first, second)

    whole, room = encoded(len(prompt)), desk.selector.max_tokens
    if whole.longest <= room:
        return whole
    return encoded(max(0, bisect_right(range(len(prompt)), room, key=lambda n: encoded(n).longest) - 1))


def _losses(task: Task, data: ClientData, desk: Desk) -> list[float]:
    """Mean loss in nats under each adapter of the task, in the order of their numbers.

    On the client's validation comparisons, or with ``grouping_comparisons`` on so many: some of these, or where they are
    too few also those that come next in its stream: of an epoch that is not over, it has not trained on these.
    """
    scored, wanted, order = list(data.validation), desk.grouping_comparisons, _order(task, desk)
    if 0 < wanted < len(scored):
        scored = stream(scored, 0, wanted, order)
    scored += stream(data.train, task.consumed, min(max(0, wanted - len(scored)), len(data.train)), order)
    if not scored:
        raise FederationError("no validation comparisons to score adapters on")
    encoded, _ = desk.selector.encode(scored)
    adapters = [decoded(task.adapters[u], desk.comm_dtype) for u in sorted(task.adapters)]
    margins = letter_margins(desk.selector, adapters, encoded, desk.batch_size, keep=True)
    choices = torch.tensor([item.choice for item in encoded])
    return [float(margin_nats(margin, choices).mean()) for margin in margins]
