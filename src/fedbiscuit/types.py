"""The nouns: what flows between the rooms of fedbiscuit.

Everything here is a plain value. Nothing in this file imports torch at run time, so that the command line stays quick.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Backend",
    "ClientData",
    "ClientId",
    "Comparison",
    "ConfigError",
    "DataError",
    "EnvironmentFault",
    "FedbiscuitError",
    "FederationError",
    "Grouping",
    "IntegrityError",
    "LocalTraining",
    "Metered",
    "Reply",
    "RoundRecord",
    "ServerState",
    "Task",
    "Weights",
    "first_line",
    "num_bytes",
    "rng_for",
    "seed_for",
]

ClientId = str
Weights = dict[str, "Tensor"]
"""One adapter: tensor name, as in a PEFT adapter file, to tensor."""
Grouping = dict[ClientId, int]
"""Client to the number ``u`` of its adapter."""


# Errors: each class is one exit code of the command line. Messages name the place, the value and the next step.


class FedbiscuitError(Exception):
    """Something that the user can act on; the message is all that the command line prints."""

    exit_code = 1


class ConfigError(FedbiscuitError):
    """A setting, a template or a command is wrong."""

    exit_code = 2


class DataError(FedbiscuitError):
    """A data file is wrong; the message starts with ``FILE:LINE:`` where there is a line."""

    exit_code = 2


class EnvironmentFault(FedbiscuitError):
    """The machine cannot do it: a full disk, a missing package, a folder in use."""

    exit_code = 3


class FederationError(FedbiscuitError):
    """The clients did not answer as they must."""

    exit_code = 4


class IntegrityError(FedbiscuitError):
    """A file is not what was written: truncated, altered, or of another model."""

    exit_code = 5


def first_line(error: BaseException) -> str:
    """What stands behind a message of ours when another library has failed: the first of its lines, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# Data


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt, two responses, maybe a choice (0: A is preferred, 1: B is preferred), and who chose.

    A single good response, for supervised fine-tuning, stands as A, preferred, and B is empty.
    """

    prompt: str
    output_a: str
    output_b: str
    choice: Literal[0, 1] | None = None
    client: ClientId | None = None
    domain: str | None = None
    id: str | None = None
    split: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def swapped(self) -> Comparison:
        """The same comparison with the two responses in the other order."""
        choice: Literal[0, 1] | None = None if self.choice is None else (0 if self.choice else 1)
        return Comparison(
            self.prompt, self.output_b, self.output_a, choice, self.client, self.domain, self.id, self.split, self.meta
        )

    @property
    def chosen(self) -> str:
        """The preferred response."""
        return (self.output_a, self.output_b)[self._known_choice()]

    @property
    def rejected(self) -> str:
        """The other response."""
        return (self.output_b, self.output_a)[self._known_choice()]

    def _known_choice(self) -> int:
        if self.choice is None:
            raise DataError(f"comparison {self.id!r} has no choice; only labeled comparisons have a preferred response")
        return self.choice


@dataclass(frozen=True, slots=True)
class ClientData:
    """What one client holds: its own comparisons, all three splits from the same person."""

    train: tuple[Comparison, ...]
    validation: tuple[Comparison, ...] = ()
    test: tuple[Comparison, ...] = ()


# What travels


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """How a client trains: ``steps`` optimizer steps of ``grad_accum`` micro-batches of ``batch_size`` comparisons."""

    objective: Literal["choice", "sft", "dpo"] = "choice"
    steps: int = 30
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 1e-5
    optimizer: Literal["adamw", "sgd", "rmsprop"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dpo_beta: float = 0.1
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of ``lr`` over the steps, after the warm-up: linear and cosine end at 0."""
    warmup_steps: int = 0
    """First steps over which the learning rate rises evenly from 0."""

    @property
    def comparisons_per_round(self) -> int:
        """How many comparisons one round of local training reads from a client's stream."""
        return self.steps * self.batch_size * self.grad_accum


@dataclass(frozen=True, slots=True)
class Task:
    """Server to client: train an adapter, score all adapters and keep the scores, or pick a seat at these prices."""

    kind: Literal["train", "evaluate", "seat"]
    client: ClientId
    round: int
    adapters: Mapping[int, Weights] = field(default_factory=dict)
    prices: tuple[float, ...] = ()
    local: LocalTraining | None = None
    consumed: int = 0
    """train, evaluate: how many comparisons of its stream this client has used in earlier rounds."""
    share_losses: bool = False
    """evaluate: ask for the losses themselves. Research in one process only; a real client may refuse."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Client to server. This, and nothing else, leaves a client.

    ``delta`` is end minus start of the adapter that was trained, as it travels (``comm_dtype``). ``metrics`` is empty unless
    the task asked for losses. ``unreadable`` does not travel: whoever received it could make nothing of it.
    """

    client: ClientId
    adapter: int | None = None
    delta: Weights | None = None
    num_examples: int = 0
    seat: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    ok: bool = True
    error: str = ""
    unreadable: bool = False


class Backend(Protocol):
    """Carries tasks to clients and brings replies back, in any order, failures included.

    at_once: how many tasks to hand over at a time, 0 for all. What comes back together is in memory together.
    away: who took no part when the clients were last asked for, and why; whole sites, where there are any.
    """

    at_once: int
    away: Mapping[str, str]

    def clients(self) -> list[ClientId]:
        """The clients that can be asked now."""

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """One reply a task; a client that fails gives ``Reply(ok=False, error=...)``."""


@runtime_checkable
class Metered(Protocol):
    """A backend that counts the bytes which really travel, headers included; both only grow."""

    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that the server carries from round to round: saving it is resuming."""

    round: int
    adapters: tuple[Weights, ...]
    grouping: Grouping = field(default_factory=dict)
    consumed: Mapping[ClientId, int] = field(default_factory=dict)
    server_optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)
    clip_norms: tuple[float, ...] = ()
    """The median delta norms of the last rounds, for the running cap of ``norm_clipped_mean``."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What happened in one round: a line of ``metrics.jsonl``.

    refused: who was asked to train and has not, and why. bytes_up, bytes_down: what travelled; with all clients in one process,
    the tensors as they would. quarantined: who sent something that is not let in, and what was wrong with it.
    """

    round: int
    phase: Literal["warmup", "federated"]
    cohort: tuple[ClientId, ...]
    adapter_of: Mapping[ClientId, int]
    grouping: Grouping
    regrouped: bool
    metrics: Mapping[str, Any]
    refused: Mapping[ClientId, str]
    seconds: float
    bytes_up: int
    bytes_down: int
    quarantined: Mapping[ClientId, str] = field(default_factory=dict)
    away: Mapping[str, str] = field(default_factory=dict)
    """Sites that took no part, and why."""
    kept_seats: Mapping[ClientId, str] = field(default_factory=dict)
    """Who was asked for a seat in a regrouping and has chosen none, and why."""


# Randomness: every draw is a stateless function of what it is for, so nothing random is ever saved.


def seed_for(*key: object) -> int:
    """A 63-bit seed that depends on all parts of the key and on nothing else.

    >>> seed_for(0, 3, "ann", "dropout") == seed_for(0, 3, "ann", "dropout")
    True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def rng_for(*key: object) -> random.Random:
    """A generator for one purpose: ``rng_for(seed, round, client, purpose)``."""
    return random.Random(seed_for(*key))


def num_bytes(weights: Mapping[str, Tensor]) -> int:
    """Bytes of tensor data, without headers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
