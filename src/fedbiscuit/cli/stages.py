"""The stages of a run, each alone or all in a row: run, train, label, align, evaluate, judge."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from fedbiscuit.cli.shared import Overrides, Selector, Source, app, program, run_dir_of, settings_and_kind, settings_of
from fedbiscuit.types import ConfigError

if TYPE_CHECKING:
    from fedbiscuit.config import Config
    from fedbiscuit.terminal import ProgressLines

__all__ = ["Clients", "align", "evaluate", "judge", "label", "run", "train"]

Gpus = Annotated[
    int,
    Parameter(
        validator=validators.Number(gte=1, lte=64),
        help="spread the clients of a round, and the pairs of a DPO step, over so many GPUs, or processes where there is none",
    ),
]
Resume = Annotated[
    bool, Parameter(negative="", show_default=False, help="go on where an earlier run into the same folder stopped")
]


@Parameter(name="*")
@dataclass(frozen=True)
class Clients:
    """Where the clients are."""

    backend: Annotated[
        Literal["here", "flower"],
        Parameter(help="here: all clients in this process; flower: on other machines, over Flower"),
    ] = "here"
    deploy: Annotated[
        Path | None, Parameter(show_default=False, help="with --backend flower: the folder of `fedbiscuit server init`")
    ] = None
    timeout: Annotated[
        float,
        Parameter(validator=validators.Number(gt=0), help="with --backend flower: seconds that one exchange may take"),
    ] = 600.0


HERE = Clients()


@app.command(sort_key=1)
def run(
    config: Source,
    /,
    *overrides: Overrides,
    resume: Resume = False,
    gpus: Gpus = 1,
    clients: Clients = HERE,
) -> None:
    """Do everything: train selectors, label, align the policy, evaluate, and write the report.

    Example: fedbiscuit run configs/demo.yaml seed=1 selectors.rounds=20
    """
    cfg, is_folder = settings_of(config, overrides)
    from fedbiscuit.report import write_report
    from fedbiscuit.terminal import ProgressLines, print_evaluation, print_next

    with ProgressLines() as progress:
        remotely = _trained_remotely(cfg, clients, resume or is_folder, progress)
        from fedbiscuit import pipeline  # slow to load, and a run over Flower does not wait for it

        run_dir = pipeline.run_all(cfg, resume=resume or is_folder or remotely, progress=progress, devices=gpus)
    report_path = write_report(run_dir)
    print_evaluation(_evaluation(run_dir))
    print_next(str(report_path), _next_commands(config, overrides, cfg, is_folder))


def _trained_remotely(cfg: Config, clients: Clients, resume: bool, progress: ProgressLines) -> bool:
    """Train the selectors over Flower where that is asked for."""
    if clients.backend != "flower":
        if clients.deploy is not None:
            raise ConfigError(f"--deploy {clients.deploy}: only with --backend flower; add it, or leave the folder out")
        return False
    if clients.deploy is None:
        raise ConfigError(
            "--backend flower: name the server's folder with --deploy (`fedbiscuit server init` makes it)"
        )
    from fedbiscuit.deployment.running import train_by_flower

    train_by_flower(cfg, clients.deploy, resume, clients.timeout, progress)
    return True


@app.command(sort_key=2)
def train(
    config: Source,
    /,
    *overrides: Overrides,
    resume: Resume = False,
    gpus: Gpus = 1,
    clients: Clients = HERE,
) -> None:
    """Train the selectors federatedly (the first stage of run).

    Example: fedbiscuit train configs/two_camps.yaml selectors.num_adapters=2
    """
    cfg, kind = settings_and_kind(config, overrides)
    from fedbiscuit.terminal import ProgressLines

    is_folder = kind == "folder"
    if clients.backend == "flower" and gpus > 1:
        raise ConfigError(
            f"--gpus {gpus}: with --backend flower the clients train on their own machines; leave it out (each site.yaml names a "
            "device)"
        )
    with ProgressLines() as progress:
        if _trained_remotely(cfg, clients, resume or is_folder, progress):
            run_dir = run_dir_of(cfg)
        else:
            from fedbiscuit import pipeline

            run_dir = pipeline.train_selectors(cfg, resume=resume or is_folder, progress=progress, devices=gpus)
    if cfg.selectors.local.objective != "choice":
        _say_next(run_dir, "evaluate", "policy")
    elif kind == "old":  # how to align stands in another file
        folder = shlex.quote(str(run_dir))
        print(f"{run_dir / 'selectors'} is ready; next: {program()} align RLHF.yaml --selector {folder}")
    else:
        _say_next(run_dir, "label", "selectors")


@app.command(sort_key=3)
def label(config: Source, /, *overrides: Overrides, selector: Selector = None) -> None:
    """Let the policy write answers and the selectors choose between them (after train).

    Example: fedbiscuit label runs/demo
    """
    cfg, _ = settings_of(config, overrides, selector)
    from fedbiscuit import pipeline
    from fedbiscuit.terminal import ProgressLines

    with ProgressLines() as progress:
        run_dir = pipeline.label(cfg, progress=progress)
    left_out = json.loads((run_dir / "labels.json").read_text(encoding="utf-8"))["left_out"]
    print("".join(f"  Left out, pairs of completions: {reason}: {n}\n" for reason, n in left_out.items() if n), end="")
    _say_next(run_dir, "align", "preferences.jsonl")


@app.command(sort_key=4)
def align(config: Source, /, *overrides: Overrides, selector: Selector = None, gpus: Gpus = 1) -> None:
    """Fine-tune the policy on the selectors' choices by DPO (after label).

    With the selectors of another run it needs no training before, and labels by itself.

    Examples: fedbiscuit align runs/demo
              fedbiscuit align RLHF.yaml --selector SELECTOR.yaml
    """
    cfg, _ = settings_of(config, overrides, selector)
    from fedbiscuit import pipeline
    from fedbiscuit.terminal import ProgressLines

    with ProgressLines() as progress:
        run_dir = pipeline.align(cfg, progress=progress, devices=gpus)
    _say_next(run_dir, "evaluate", "policy")


@app.command(sort_key=5)
def evaluate(
    config: Source,
    /,
    *overrides: Overrides,
    selector: Selector = None,
    checkpoints: Annotated[
        bool, Parameter(negative="", show_default=False, help="also every checkpoint that keep_every has kept")
    ] = False,
    task: Annotated[
        str,
        Parameter(
            show_default=False,
            help="an evaluation of its own: summarization, best-of-n, agreement, alpaca-eval or perplexity",
        ),
    ] = "",
    checkpoint: Annotated[
        int | None, Parameter(show_default=False, help="with --task: what was kept after this step or round, alone")
    ] = None,
) -> None:
    """Measure selectors and policy on people's choices and prompts that they were not trained on.

    Examples: fedbiscuit evaluate runs/demo
              fedbiscuit evaluate runs/demo --task best-of-n evaluation.best_of=8
              fedbiscuit evaluate runs/demo --task perplexity --checkpoints
    """
    if checkpoint is not None and not task:
        raise ConfigError(
            "--checkpoint: only with --task NAME; without a task, --checkpoints measures all that were kept"
        )
    cfg, _ = settings_of(config, overrides, selector)
    from fedbiscuit import pipeline
    from fedbiscuit.terminal import ProgressLines, print_evaluation

    if task:
        from fedbiscuit.report import task_tables
        from fedbiscuit.terminal import print_task

        with ProgressLines() as progress:
            run_dir = pipeline.evaluate_task(cfg, task, progress, checkpoints, checkpoint)
        print_task(*task_tables(run_dir, task))
        print()
        _say_next(run_dir, "report", f"evaluations/{task}.json")
        return
    with ProgressLines() as progress:
        run_dir = pipeline.evaluate(cfg, progress=progress, checkpoints=checkpoints)
    print_evaluation(_evaluation(run_dir))
    print()
    _say_next(run_dir, "report", "evaluation.json")


@app.command(sort_key=6)
def judge(
    config: Source,
    /,
    *overrides: Overrides,
    selector: Selector = None,
    protocol: Annotated[
        str,
        Parameter(
            show_default=False, help="auto-j (ratings, or with --pairwise the better one) or plain (A, B or tie)"
        ),
    ] = "",
    pairwise: Annotated[
        bool, Parameter(negative="", show_default=False, help="both answers side by side, in both orders")
    ] = False,
    model: Annotated[
        str, Parameter(show_default=False, help="who judges: a model to load here, or the server's name for it")
    ] = "",
    endpoint: Annotated[
        str,
        Parameter(show_default=False, help="a server with OpenAI's chat protocol, such as http://127.0.0.1:8000/v1"),
    ] = "",
    on: Annotated[
        str,
        Parameter(
            help="what is judged: answers to held-out prompts, or what a task of evaluate has left: summarization (against "
            "people's summaries), best-of-n or alpaca-eval"
        ),
    ] = "held-out",
    checkpoints: Annotated[
        bool, Parameter(negative="", show_default=False, help="also every policy that keep_every has kept")
    ] = False,
    checkpoint: Annotated[
        int | None, Parameter(show_default=False, help="the policy that was kept after this step or round, alone")
    ] = None,
) -> None:
    """Let a language model judge the aligned policy's answers against the raw one's (after align).

    Replies are kept as they come in: the same command goes on where it stopped. More settings: judge.retries and others.

    Examples: fedbiscuit judge runs/demo --protocol auto-j --pairwise --model models/my-judge
              fedbiscuit judge runs/demo --protocol plain --endpoint http://127.0.0.1:8000/v1 --model NAME
              fedbiscuit judge runs/demo --checkpoints
              fedbiscuit judge runs/demo --on alpaca-eval
    """
    cfg, _ = settings_of(config, [*overrides, *_judge_overrides(protocol, pairwise, model, endpoint)], selector)
    from fedbiscuit import pipeline
    from fedbiscuit.terminal import ProgressLines, print_judgements

    with ProgressLines() as progress:
        path = pipeline.judge(cfg, progress, on, checkpoints, checkpoint)
    found = json.loads(path.read_text(encoding="utf-8"))
    last = found["judges"][-1]
    alike = [one for one in found["judges"] if all(one.get(key) == last[key] for key in ("judge", "on", "way"))]
    print_judgements(found["protocol"], sorted(alike, key=lambda one: one["step"]))
    print(f"\n{path} is ready; all replies: {path.with_suffix('.jsonl')}")


def _judge_overrides(protocol: str, pairwise: bool, model: str, endpoint: str) -> list[str]:
    """The options of ``judge`` as settings. A model without an endpoint is loaded here, whatever a run used before."""
    if pairwise and protocol in ("", "auto-j"):
        protocol = "auto-j-pairwise"
    given = {"protocol": protocol, "model": model, "endpoint": endpoint}
    words = [f"judge.{key}={value}" for key, value in given.items() if value]
    return [*words, "judge.endpoint="] if model and not endpoint else words


def _evaluation(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8")))


def _say_next(run_dir: Path, command: str, made: str) -> None:
    print(f"{run_dir / made} is ready; next: {program()} {command} {shlex.quote(str(run_dir))}")


def _next_commands(config: Path, overrides: Sequence[str], cfg: Config, is_folder: bool) -> list[tuple[str, str]]:
    """Three things to try after a run."""
    kept, rest = [], list(overrides)
    while rest:
        words = [rest.pop(0)] if "=" in rest[0] else [rest.pop(0), rest.pop(0)]
        kept += [] if words[0].partition("=")[0] in ("name", "seed") else words
    again = shlex.join([str(run_dir_of(cfg) / "config.yaml" if is_folder else config), *kept])
    return [
        (f"{program()} run {again} name={cfg.name[:57]}-seed1 seed=1", "the same with other random draws"),
        (f"{program()} data check FILE.jsonl", "look at comparisons of your own"),
        (f"{program()} config --example your_data > my.yaml", "settings for them, to read and change"),
    ]
