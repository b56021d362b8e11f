"""The commands. Each reads its settings and calls one function of pipeline, report or data.

Nothing heavy is imported before a command needs it: ``--help``, ``config`` and ``data check`` load no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, validators

import fedbiscuit
from fedbiscuit.types import ConfigError, EnvironmentFault, FedbiscuitError

if TYPE_CHECKING:
    from fedbiscuit.config import Config
    from fedbiscuit.station.exchange import Imported
    from fedbiscuit.station.store import Store
    from fedbiscuit.terminal import ProgressLines

__all__ = ["app", "main"]

INTERRUPTED = 130

log = logging.getLogger("fedbiscuit")

app = App(
    name="fedbiscuit",
    version=lambda: fedbiscuit.__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    help=(
        "Federated preference alignment: people's private comparisons in, an aligned language model out.\n\n"
        "First steps: `fedbiscuit config --example demo > demo.yaml`, `fedbiscuit run demo.yaml`, then open the report.\n\n"
        "Every command takes --help, and --debug for the traceback of an error."
    ),
)
data_app = App(name="data", help="Look at data files before they are used.", help_format="plaintext", sort_key=9)
app.command(data_app)
server_app = App(
    name="server",
    help="Serve real clients over Flower: set up, start, let sites join.",
    help_format="plaintext",
    sort_key=10,
)
app.command(server_app)
client_app = App(
    name="client", help="A site of a federation on several machines.", help_format="plaintext", sort_key=10
)
app.command(client_app)
station_app = App(
    name="station",
    help=(
        "Compare answers on a page of your own machine: prompts in, comparisons out, and no text leaves.\n\n"
        "Examples: fedbiscuit station --prompts prompts.txt\n\n"
        "          fedbiscuit station --pairs pairs.jsonl\n\n"
        "Then: fedbiscuit data check ~/.fedbiscuit/station/comparisons.jsonl"
    ),
    help_format="plaintext",
    sort_key=10,
)
app.command(station_app)

Source = Annotated[Path, Parameter(help="a config file, or the folder of a run, which is continued")]
Overrides = Annotated[str, Parameter(help="settings on top of the config: key=value or key value, such as seed=1")]
Selector = Annotated[
    Path | None,
    Parameter(
        show_default=False,
        help="whose selectors label: the folder of a run, or the config that trained it (labels.selectors)",
    ),
]
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

SiteFolder = Annotated[Path, Parameter(help="the folder of a site")]
SiteData = Annotated[
    list[Path] | None,
    Parameter(
        name="--data", consume_multiple=True, show_default=False, help="files of comparisons (.jsonl or .jsonl.gz)"
    ),
]
RunFolder = Annotated[Path, Parameter(help="the folder of a run")]
WhichSelector = Annotated[
    str | None, Parameter(show_default=False, help="the number of a selector, from 0, or all: they vote")
]
Policy = Annotated[bool, Parameter(negative="", show_default=False, help="the aligned policy")]
Merge = Annotated[
    bool, Parameter(negative="", show_default=False, help="a plain model with the adapter in its weights")
]
BaseName = Annotated[
    str, Parameter(show_default=False, help="the name under which others find the base model, such as one on the Hub")
]

StationFolder = Annotated[
    Path, Parameter(show_default=False, help="where the station keeps all, by default ~/.fedbiscuit/station")
]
STATION = Path("~/.fedbiscuit/station")


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
    cfg, is_folder = _settings(config, overrides)
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
    cfg, is_folder = _settings(config, overrides)
    from fedbiscuit.terminal import ProgressLines

    with ProgressLines() as progress:
        if _trained_remotely(cfg, clients, resume or is_folder, progress):
            run_dir = _run_dir(cfg)
        else:
            from fedbiscuit import pipeline

            run_dir = pipeline.train_selectors(cfg, resume=resume or is_folder, progress=progress, devices=gpus)
    if cfg.selectors.local.objective == "choice":
        _say_next(run_dir, "label", "selectors")
    else:
        _say_next(run_dir, "evaluate", "policy")


@app.command(sort_key=3)
def label(config: Source, /, *overrides: Overrides, selector: Selector = None) -> None:
    """Let the policy write answers and the selectors choose between them (after train).

    Example: fedbiscuit label runs/demo
    """
    cfg, _ = _settings(config, overrides, selector)
    from fedbiscuit import pipeline
    from fedbiscuit.terminal import ProgressLines

    with ProgressLines() as progress:
        run_dir = pipeline.label(cfg, progress=progress)
    _say_next(run_dir, "align", "preferences.jsonl")


@app.command(sort_key=4)
def align(config: Source, /, *overrides: Overrides, selector: Selector = None, gpus: Gpus = 1) -> None:
    """Fine-tune the policy on the selectors' choices by DPO (after label).

    With the selectors of another run it needs no training before, and labels by itself.

    Examples: fedbiscuit align runs/demo
              fedbiscuit align RLHF.yaml --selector SELECTOR.yaml
    """
    cfg, _ = _settings(config, overrides, selector)
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
    cfg, _ = _settings(config, overrides, selector)
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
    cfg, _ = _settings(config, [*overrides, *_judge_overrides(protocol, pairwise, model, endpoint)])
    from fedbiscuit import pipeline
    from fedbiscuit.terminal import ProgressLines, print_judgements

    with ProgressLines() as progress:
        path = pipeline.judge(cfg, progress, on, checkpoints, checkpoint)
    found = json.loads(path.read_text(encoding="utf-8"))
    last = found["judges"][-1]
    alike = [one for one in found["judges"] if all(one.get(key) == last[key] for key in ("judge", "on", "way"))]
    print_judgements(found["protocol"], sorted(alike, key=lambda one: one["step"]))
    print(f"\n{path} is ready; all replies: {path.with_suffix('.jsonl')}")


@app.command(sort_key=6)
def report(
    config: Source,
    /,
    *,
    watch: Annotated[
        int,
        Parameter(
            show_default=False,
            help="while the run goes on, look every so many seconds whether its files have changed, and write the page again",
        ),
    ] = 0,
) -> None:
    """Write report.html, one self-contained page with plots, from what is in a run folder.

    Examples: fedbiscuit report runs/demo
              fedbiscuit report runs/demo --watch 5
    """
    from fedbiscuit import report as pages

    cfg, _ = _settings(config, ())
    if not 0 <= watch <= 86400:
        raise ConfigError(f"--watch: {watch} is not permitted; it must be a whole number of seconds from 1 to 86400")
    if watch == 0:
        print(pages.write_report(_run_dir(cfg)))
        return
    told: list[Path] = []

    def written(path: Path) -> None:
        if not told:
            print(
                f"{path}: open it in a browser; it is written again while the run goes on (Ctrl-C ends that)",
                flush=True,
            )
        told.append(path)

    print(f"{pages.watch_report(_run_dir(cfg), watch, written)}: the run has ended, and this page shows all of it")


@app.command(sort_key=7)
def compare(
    *runs: Annotated[Path, Parameter(help="folders of evaluated runs", required=True)],
    out: Annotated[
        Path | None, Parameter(help="write Markdown there, with figures beside it", show_default=False)
    ] = None,
) -> None:
    """Put runs side by side: agreement with people, differences client by client, calibration, cost.

    Runs that differ by their seed alone are one row; the first row is what the others are compared with.

    Example: fedbiscuit compare runs/fedbis-seed* runs/fedbiscuit-seed* --out comparison.md
    """
    from fedbiscuit.report import comparison_tables, write_comparison
    from fedbiscuit.terminal import print_comparison

    if out is None:
        print_comparison(comparison_tables(runs))
    else:
        print("\n".join(map(str, write_comparison(runs, out))))


@app.command(name="export", sort_key=7.5)
def export(
    run: RunFolder,
    /,
    *,
    to: Annotated[Path, Parameter(help="a new folder to write")],
    selector: WhichSelector = None,
    policy: Policy = False,
    merge: Merge = False,
    base: BaseName = "",
) -> None:
    """Write a selector or the policy of a run into a folder that others can load, with a model card.

    Examples: fedbiscuit export runs/demo --selector 0 --to exported
              fedbiscuit export runs/demo --policy --merge --to model
    """
    from fedbiscuit import pipeline

    made = pipeline.export_run(run, to, selector=selector, policy=policy, merge=merge, base=base)
    print(f"{made} is ready; read its card, {made / 'README.md'}, before you hand it on")


@app.command(sort_key=7.6)
def push(
    source: Annotated[Path, Parameter(help="a folder that export wrote, or the folder of a run")],
    /,
    *,
    to_hub: Annotated[str, Parameter(help="OWNER/NAME on the Hub")],
    selector: WhichSelector = None,
    policy: Policy = False,
    merge: Merge = False,
    base: BaseName = "",
    public: Annotated[
        bool, Parameter(negative="", show_default=False, help="let everybody see it; otherwise it is made private")
    ] = False,
) -> None:
    """Upload what export writes to the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN.

    Examples: fedbiscuit push exported --to-hub ann/kitchen-selector
              fedbiscuit push runs/demo --policy --to-hub ann/kitchen-policy
    """
    from fedbiscuit import pipeline

    print(
        pipeline.push(source, to_hub, selector=selector, policy=policy, merge=merge, base=base, public=public),
        "is uploaded",
    )


@app.command(name="config", sort_key=8)
def show_config(
    config: Annotated[Path | None, Parameter(help="a config file, or the folder of a run")] = None,
    /,
    *overrides: Overrides,
    check: Annotated[
        bool, Parameter(negative="", show_default=False, help="only check the settings, print none")
    ] = False,
    schema: Annotated[
        bool, Parameter(negative="", show_default=False, help="print the JSON schema of a config, for editors")
    ] = False,
    example: Annotated[
        str,
        Parameter(show_default=False, help="print a commented config that comes with fedbiscuit, such as your_data"),
    ] = "",
) -> None:
    """Print all settings of a config, with their meaning, or check them.

    Examples: fedbiscuit config configs/demo.yaml seed=1
              fedbiscuit config --example your_data > my.yaml
              fedbiscuit config my.yaml --check
              fedbiscuit config --schema > schema.json
    """
    from fedbiscuit.config import dump_config, json_schema, load_translated

    if schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    elif example:
        print(_example(example), end="")
    elif config is None:
        raise ConfigError("config: give a config file, --example NAME or --schema")
    else:
        from fedbiscuit.data.encoding import load_template

        cfg, notes = (_settings(config, overrides)[0], ()) if config.is_dir() else load_translated(config, overrides)
        load_template(cfg.data.template)
        told = "".join(f"# {note}\n" for note in notes)
        missing = [path for path in cfg.data.path if cfg.data.source == "jsonl" and not Path(path).exists()]
        absent = "".join(f"note: data.path: {path} is not there yet\n" for path in missing)
        print(f"{told}{config}: all settings are fine\n{absent}" if check else f"{told}{dump_config(cfg)}", end="")


@data_app.command
def check(
    *files: Annotated[
        Path, Parameter(help="files of comparisons (.jsonl or .jsonl.gz), or configs that name some", required=True)
    ],
    model: Annotated[
        str, Parameter(help="count lengths in tokens of this model, named as in model.base", show_default=False)
    ] = "",
) -> int:
    """Count clients, splits, labels and lengths in data files, and name every broken line.

    Example: fedbiscuit data check train.jsonl test.jsonl
    """
    from fedbiscuit.data.comparisons import check_files
    from fedbiscuit.terminal import clean

    named = [one for file in files for one in _comparisons_of(file)]
    found = check_files(named, count_tokens=_token_counter(model) if model else None)
    print(clean(found.render()))
    return 0 if found.ok else 2


def _comparisons_of(file: Path) -> list[Path]:
    """A file of comparisons itself; for a config the files that it names."""
    if file.suffix not in (".yaml", ".yml"):
        return [file]
    cfg, _ = _settings(file, ())
    if cfg.data.source != "jsonl":
        raise ConfigError(
            f"{file}: data.source is {cfg.data.source}, and only files of comparisons of your own can be checked"
        )
    return [Path(path) for path in cfg.data.path]


DeployFolder = Annotated[Path, Parameter(help="the server's deploy folder")]


@server_app.command(name="init", sort_key=1)
def server_init(
    deploy: DeployFolder,
    /,
    *,
    host: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=True,
            show_default=False,
            help="the names or IP addresses by which sites reach this server; localhost and 127.0.0.1 are always there",
        ),
    ] = (),
    port: Annotated[int, Parameter(help="where SuperLink listens, on 127.0.0.1 alone")] = 8000,
    insecure: Annotated[
        bool, Parameter(negative="", show_default=False, help="no TLS and no keys: to try it on one laptop")
    ] = False,
) -> None:
    """Make the server's folder: certificates, settings, and a proxy configuration that publishes what sites need.

    Example: fedbiscuit server init deploy/ --host fed.example.org
    """
    from fedbiscuit.deployment.server import init, next_steps

    for line in next_steps(init(deploy, host, port, insecure), deploy, _program()):
        print(line)


@server_app.command(name="start", sort_key=2)
def server_start(deploy: DeployFolder, /) -> None:
    """Run the server here, until Ctrl-C or SIGTERM.

    Example: fedbiscuit server start deploy/
    """
    from fedbiscuit.deployment.server import load
    from fedbiscuit.deployment.serving import serve

    serve(load(deploy), lambda line: print(line, flush=True))


@server_app.command(name="register", sort_key=3)
def server_register(
    deploy: DeployFolder,
    key: Annotated[Path, Parameter(help="the public key that a site has sent, such as site-a.pub")],
    /,
    *,
    clients: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, help="whom the site answers for, as in alice,bob")
    ],
) -> None:
    """Let a site join: its key, and the names of its clients. The server must run. Once more replaces the names.

    Example: fedbiscuit server register deploy/ site-a.pub --clients alice,bob
    """
    from fedbiscuit.deployment.registration import register
    from fedbiscuit.deployment.server import load

    node, names = register(load(deploy), key, clients)
    print(f"{key.stem} may join as node {node}, for {', '.join(names)}")


@client_app.command(name="init", sort_key=1)
def client_init(folder: Annotated[Path, Parameter(help="a new folder")], /, *, data: SiteData = None) -> None:
    """Make the folder of a site: a key pair, and site.yaml, which says what the site takes part in.

    Examples: fedbiscuit client init site-a/
              fedbiscuit client init site-a/ --data comparisons.jsonl
    """
    from fedbiscuit.deployment import site
    from fedbiscuit.terminal import clean

    names = sorted(site.check_data(data).clients) if data else []
    public = site.init_site(folder)
    given = clean(shlex.quote(",".join(names))) if names else "NAMES"
    where = "" if names else "; `fedbiscuit data check FILE` lists NAMES, the clients in your files"
    copy = f"{folder.resolve().name}.pub"
    print(
        f"{folder} is ready. Read {folder / site.SETTINGS}, and send to the server's administrator:\n"
        f"  {public}, as {copy}; the key beside it stays here\n"
        f"  the names of your clients, for `fedbiscuit server register DEPLOY {copy} --clients {given}`{where}\n"
        f"then: {_program()} client start {shlex.quote(str(folder))} --data FILE --server HOST:PORT --ca ca.crt"
    )


@client_app.command(name="start", sort_key=2)
def client_start(
    folder: SiteFolder,
    /,
    *,
    data: SiteData = None,
    server: Annotated[str, Parameter(help="HOST:PORT of the server")],
    ca: Annotated[
        Path | None,
        Parameter(show_default=False, help="the certificate that the server is known by, from its administrator"),
    ] = None,
    insecure: Annotated[
        bool, Parameter(negative="", show_default=False, help="without TLS and keys: for trials on one machine")
    ] = False,
) -> None:
    """Take part: a worker with your data and the model, and Flower's SuperNode, until Ctrl-C.

    Examples: fedbiscuit client start site-a/ --data comparisons.jsonl --server server.example.org:8443 --ca ca.crt
    """
    from fedbiscuit.deployment import site, site_processes
    from fedbiscuit.terminal import clean

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {clean(text)}", flush=True)

    if not data:
        raise ConfigError(
            "--data: name the files with the comparisons of this site's clients, such as --data mine.jsonl"
        )
    where = site_processes.server_of(server, ca, insecure)
    site.settings_of(folder)
    found = site.check_data(data)
    for warning in found.warnings:
        log.warning("%s", clean(warning))
    if insecure:
        log.warning(
            "--insecure: anybody between this site and %s can read and change what is sent, and nobody proves who he is",
            server,
        )
    say(
        f"{found.num_comparisons:,} comparisons of {len(found.clients):,} clients; they stay here. Ctrl-C ends this site"
    )
    try:
        site_processes.run_site(folder, data, where, say)
    except KeyboardInterrupt:
        say("worker and SuperNode are stopped")


@client_app.command(name="status", sort_key=3)
def client_status(folder: SiteFolder, /) -> None:
    """Whether a site runs, what it was asked, and what it sent.

    Example: fedbiscuit client status site-a/
    """
    from fedbiscuit.deployment import site
    from fedbiscuit.terminal import clean

    for line in site.status_lines(folder):
        print(clean(line))


@station_app.default
def station(
    *,
    prompts: Annotated[
        Path | None, Parameter(show_default=False, help="prompts for the model to answer: .txt, one a line, or .jsonl")
    ] = None,
    pairs: Annotated[
        Path | None,
        Parameter(
            show_default=False, help="pairs that exist: .jsonl with prompt, output_a, output_b; alone, no model runs"
        ),
    ] = None,
    model: Annotated[
        str,
        Parameter(show_default=False, help="who writes the answers, named as in model.base; else the default model"),
    ] = "",
    policy: Annotated[
        Path | None,
        Parameter(
            show_default=False,
            help="the aligned policy of a run, or an exported one, writes instead; --blind sets it against the raw model",
        ),
    ] = None,
    blind: Annotated[
        bool,
        Parameter(negative="", show_default=False, help="the prompts of --prompts are for the blind test of --policy"),
    ] = False,
    selectors: Annotated[
        Path | None,
        Parameter(show_default=False, help="a run or an export: ask first where its selectors disagree"),
    ] = None,
    random_share: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gte=0, lte=1),
            show_default=False,
            help="with --selectors: how many pairs come at random, 0.3 if not given",
        ),
    ] = None,
    run: Annotated[
        Path | None, Parameter(show_default=False, help="the run to show on the page: what was learned from you")
    ] = None,
    site: Annotated[
        Path | None, Parameter(show_default=False, help="the site's folder, to show what left this machine")
    ] = None,
    folder: StationFolder = STATION,
    person: Annotated[str, Parameter(help="who compares: the client's name in the comparisons")] = "me",
    repeat_every: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=0), help="after so many pairs one comes again, turned round; 0: none"
        ),
    ] = 10,
    max_new_tokens: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=1),
            show_default=False,
            help="longest answer; else as in the policy's run, or 80",
        ),
    ] = None,
    device: Annotated[str, Parameter(help="where the model runs: auto, cpu, mps, cuda or cuda:NUMBER")] = "auto",
    host: Annotated[str, Parameter(help="the address of the page, in numbers")] = "127.0.0.1",
    other_address: Annotated[
        bool, Parameter(negative="", show_default=False, help="permit a --host that other machines can reach")
    ] = False,
    port: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65535), help="0: any that is free")] = 0,
    browser: Annotated[bool, Parameter(help="open the page in the browser")] = True,
) -> None:
    """Compare answers on a page of your own machine, until Ctrl-C."""
    import importlib.util

    from fedbiscuit.terminal import clean

    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "python_multipart")):
        raise EnvironmentFault("the station's page needs an extra: pip install 'fedbiscuit[station]'")
    from fedbiscuit.station.queue import Asking
    from fedbiscuit.station.scoring import digest_of_selectors, readers_of
    from fedbiscuit.station.serving import serve
    from fedbiscuit.station.station import Station
    from fedbiscuit.station.store import Store
    from fedbiscuit.station.writing import authors_of

    if blind and (prompts is None or policy is None):
        raise ConfigError(
            "--blind: is for prompts that a policy answers too; give it with --prompts FILE and --policy RUN"
        )
    if random_share is not None and selectors is None:
        raise ConfigError(
            "--random-share: without selectors all pairs come at random; add --selectors RUN, or leave it out"
        )
    asking = Asking(repeat_every)
    if selectors is not None:
        share = asking.random_share if random_share is None else random_share
        asking = Asking(repeat_every, digest_of_selectors(selectors), share)
    writes = pairs is None or bool(model) or any(given is not None for given in (prompts, policy, max_new_tokens))
    authors = authors_of(model, policy, max_new_tokens, device) if writes else None
    readers = readers_of(selectors, device) if selectors else None
    with Store.open(folder) as store:
        desk = Station(store, person, asking, authors, readers, run, site)
        try:
            if pairs is not None:
                print(_imported(desk.import_file(pairs), pairs))
            if prompts is not None:
                print(f"{desk.import_prompts(prompts, blind)} new prompts from {clean(str(prompts))}")
            serve(desk, host, port, other_address=other_address, open_browser=browser, say=_say)
        finally:
            desk.close()


@station_app.command(name="export")
def station_export(
    file: Annotated[Path, Parameter(help="the file to write")],
    /,
    *,
    form: Annotated[
        Literal["comparisons", "trl", "history"],
        Parameter(help="comparisons: to train on; trl: prompt, chosen, rejected; history: all, to import elsewhere"),
    ] = "comparisons",
    person: Annotated[str | None, Parameter(show_default=False, help="of this person alone")] = None,
    folder: StationFolder = STATION,
) -> None:
    """Write comparisons as JSON lines.

    Example: fedbiscuit station export mine.jsonl --form trl
    """
    from fedbiscuit.station.exchange import export

    with _store(folder) as store:
        print(f"{export(store, file, form, person)} lines are in {file}, which only you may read")


@station_app.command(name="import")
def station_import(
    file: Annotated[Path, Parameter(help="pairs, comparisons (their texts, not their choices) or an exported history")],
    /,
    *,
    folder: StationFolder = STATION,
) -> None:
    """Take pairs or an exported history into the store.

    Example: fedbiscuit station import history.jsonl
    """
    from fedbiscuit.station.exchange import import_file, refresh
    from fedbiscuit.station.store import Store

    with Store.open(folder) as store:
        found = import_file(store, file)
        refresh(store)
    print(_imported(found, file))


@station_app.command(name="forget")
def station_forget(
    *,
    pair: Annotated[str, Parameter(show_default=False, help="a pair, by the id that an export gives it")] = "",
    person: Annotated[str, Parameter(show_default=False, help="all that one person was shown and said")] = "",
    everything: Annotated[bool, Parameter(negative="", show_default=False, help="prompts, pairs and answers")] = False,
    folder: StationFolder = STATION,
) -> None:
    """Delete, from the store's file and its free pages too. Exported files are yours to delete.

    Example: fedbiscuit station forget --everything
    """
    from fedbiscuit.station.exchange import forgetting

    if (bool(pair), bool(person), everything).count(True) != 1:
        raise ConfigError("station forget: say what: --pair ID, --person NAME or --everything")
    with _store(folder) as store, forgetting(store):
        if pair:
            store.forget_pair(store.whole_id(pair))
        elif person:
            if person not in store.people():
                raise ConfigError(f"--person: nobody called {person!r:.80} here; there are {', '.join(store.people())}")
            store.forget_person(person)
        else:
            store.forget_all()
    print("deleted")


@station_app.command(name="status")
def station_status(*, folder: StationFolder = STATION) -> None:
    """What is in the store, who has judged how much, and how consistently."""
    from fedbiscuit.station.status import status_lines
    from fedbiscuit.terminal import clean

    with _store(folder) as store:
        for line in status_lines(store, _program()):
            print(clean(line))


def _store(folder: Path) -> Store:
    """A store that is there; ``ConfigError`` where there is none."""
    from fedbiscuit.station.database import DATABASE
    from fedbiscuit.station.store import Store

    if not (folder.expanduser() / DATABASE).is_file():
        raise ConfigError(f"{folder}: no store of a station here; `{_program()} station` makes one, or give --folder")
    return Store.open(folder)


def _imported(found: Imported, file: Path) -> str:
    lines = f", {found.judgements} lines of history" if found.judgements else ""
    known = f"; {found.known} lines were known" if found.known else ""
    return f"{found.pairs} new pairs{lines} from {file}{known}"


def _say(text: str) -> None:
    print(text, flush=True)


def _settings(source: Path, overrides: Sequence[str], selector: Path | None = None) -> tuple[Config, bool]:
    """The settings of a config file or of a run folder, and whether it was a folder.

    ``selector``: the run whose selectors label, by its folder or its config.
    """
    from fedbiscuit.config import load_config, load_translated
    from fedbiscuit.strict_yaml import scalar_text

    fill = ""
    if selector is not None:
        trained = selector if selector.is_dir() else _run_dir(load_config(selector))
        overrides, fill = [*overrides, f"labels.selectors={scalar_text(str(trained))}"], trained.name
    if not source.is_dir():
        cfg, notes = load_translated(source, overrides, fill)
        if notes:
            what = "settings of the original FedBiscuit, translated"
            log.warning("%s: %s; `%s config %s` shows what they become", source, what, _program(), source)
        return cfg, False
    if not (source / "config.yaml").is_file():
        raise ConfigError(f"{source}: no config.yaml in this folder; give a config file or the folder of a run")
    cfg = load_config(source / "config.yaml", overrides)
    folder = source.resolve()
    if _run_dir(cfg).resolve() != folder:  # moved, renamed, or seen from another working folder
        cfg = cfg.model_copy(update={"runs_dir": str(folder.parent), "name": folder.name})
    return cfg, True


def _judge_overrides(protocol: str, pairwise: bool, model: str, endpoint: str) -> list[str]:
    """The options of ``judge`` as settings. A model without an endpoint is loaded here, whatever a run used before."""
    if pairwise and protocol in ("", "auto-j"):
        protocol = "auto-j-pairwise"
    given = {"protocol": protocol, "model": model, "endpoint": endpoint}
    words = [f"judge.{key}={value}" for key, value in given.items() if value]
    return [*words, "judge.endpoint="] if model and not endpoint else words


def _run_dir(cfg: Config) -> Path:
    return Path(cfg.runs_dir) / cfg.name


def _example(name: str) -> str:
    """A config that is shipped: in the wheel beside this file, in a checkout at its root."""
    here = Path(__file__).resolve().parent
    folder = next((f for f in (here / "configs", here.parents[1] / "configs") if f.is_dir()), here)
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in found:
        raise ConfigError(f"config: no example {name!r}; there are {', '.join(found)}")
    return found[name].read_text(encoding="utf-8")


def _evaluation(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8")))


def _token_counter(model: str) -> Any:
    from fedbiscuit.models.lm import load_tokenizer

    tokenizer = load_tokenizer(model)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _program() -> str:
    """What the user has to type to start this program again."""
    name = Path(sys.argv[0])
    if name.name != "fedbiscuit":
        return "python -m fedbiscuit"
    found = shutil.which("fedbiscuit")
    if found and Path(found).resolve() == name.resolve():
        return "fedbiscuit"
    with contextlib.suppress(ValueError):
        return str(name.absolute().relative_to(Path.cwd()))
    return str(name)


def _say_next(run_dir: Path, command: str, made: str) -> None:
    print(f"{run_dir / made} is ready; next: {_program()} {command} {shlex.quote(str(run_dir))}")


def _next_commands(config: Path, overrides: Sequence[str], cfg: Config, is_folder: bool) -> list[tuple[str, str]]:
    """Three things to try after a run."""
    kept, rest = [], list(overrides)
    while rest:
        words = [rest.pop(0)] if "=" in rest[0] else [rest.pop(0), rest.pop(0)]
        kept += [] if words[0].partition("=")[0] in ("name", "seed") else words
    again = shlex.join([str(_run_dir(cfg) / "config.yaml" if is_folder else config), *kept])
    return [
        (f"{_program()} run {again} name={cfg.name[:57]}-seed1 seed=1", "the same with other random draws"),
        (f"{_program()} data check FILE.jsonl", "look at comparisons of your own"),
        (f"{_program()} config --example your_data > my.yaml", "settings for them, to read and change"),
    ]


# The way in and the ways out


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 user, 3 machine, 4 clients, 5 files, 130 interrupted, else 1).

    Under ``accelerate launch`` or ``torchrun`` the number of processes is that of ``--gpus``.
    """
    from fedbiscuit.terminal import print_error

    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("FEDBISCUIT_DEBUG"))
    words = [word for word in words if word != "--debug"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, which accelerate launch is for several processes
        rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
        if count != os.environ["LOCAL_WORLD_SIZE"]:
            print_error("started on several machines at once, which one run cannot use; start it on one of them")
            return 3
        if rank != "0":
            print(f"process {rank} of {count} ends: the first one spreads the work by itself", file=sys.stderr)
            return 0
        if words[:1] in (["run"], ["train"], ["align"]) and not any(
            word.partition("=")[0] == "--gpus" for word in words
        ):
            words += ["--gpus", count]
    try:
        with _signals(), _quiet_libraries():
            returned = app(
                words, exit_on_error=False, print_error=False, help_on_error=False, result_action="return_value"
            )
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                signal.signal(number, signal.SIG_IGN)
        print(f"stopped{_how_to_resume(words)}", file=sys.stderr)
        return INTERRUPTED
    except CycloptsError as error:
        print_error(f"{_first_paragraph(error)} (see {_program()} {_command_of(words)}--help)")
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        if isinstance(error, FedbiscuitError):
            print_error(str(error))
            return error.exit_code
        print_error(_unexpected(error, debug))
        return 3 if isinstance(error, OSError) or _is_lack_of_memory(error) else 1


def _is_lack_of_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or of torch on a CPU; found by their words, since torch is not imported for it."""
    return isinstance(error, MemoryError) or any(
        w in str(error).lower() for w in ("out of memory", "can't allocate memory")
    )


def _unexpected(error: Exception, debug: bool) -> str:
    told = " ".join(str(error).split())[:500]
    if _is_lack_of_memory(error):
        less = "smaller batch sizes or max_tokens, model.gradient_checkpointing: true and model.quantize: nf4 need less"
        return f"out of memory ({told}); {less} (docs/your-data.md)"
    kind = "" if isinstance(error, OSError) else "this should not happen: "
    return f"{kind}{type(error).__name__}: {told}" + ("" if debug else " (--debug shows where)")


def _first_paragraph(error: CycloptsError) -> str:
    return " ".join(str(error).split("\n\n")[0].split())


def _command_of(words: Sequence[str]) -> str:
    """The command in a command line, with a space behind it, or nothing."""
    found, level = "", app
    for word in words:
        if word.startswith("-") or word not in set(level):
            break
        found, level = f"{found}{word} ", level[word]
    return found


def _how_to_resume(words: Sequence[str]) -> str:
    if not words or words[0] not in ("run", "train", "label", "align", "evaluate", "judge"):
        return ""
    again = [word for word in words if word != "--resume"]
    if words[0] in ("run", "train"):  # the later stages always go on
        again.append("--resume")
    return f"; to go on: {_program()} {shlex.join(again)}"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops like Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Warnings as one plain line each, and no bars or reports to the outside from the libraries below."""
    for name, value in (
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield
