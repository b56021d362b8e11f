"""The preference station: its page, and what is done to its store without one (export, import, forget, status)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from fedbiscuit.cli.shared import program, station_app
from fedbiscuit.types import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from fedbiscuit.station.exchange import Imported
    from fedbiscuit.station.store import Store

__all__ = ["station", "station_export", "station_forget", "station_import", "station_status"]

StationFolder = Annotated[
    Path, Parameter(show_default=False, help="where the station keeps all, by default ~/.fedbiscuit/station")
]
STATION = Path("~/.fedbiscuit/station")


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
                new, known = desk.import_prompts(prompts, blind)
                said = f"{new} new prompts from {clean(str(prompts))}"
                if known and not blind:
                    said += f"; {known} were asked before and are not answered again"
                    said += ": forget their pairs first, or let the policy answer them with --blind" if policy else ""
                print(said)
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
        for line in status_lines(store, program()):
            print(clean(line))


def _store(folder: Path) -> Store:
    """A store that is there; ``ConfigError`` where there is none."""
    from fedbiscuit.station.database import DATABASE
    from fedbiscuit.station.store import Store

    if not (folder.expanduser() / DATABASE).is_file():
        raise ConfigError(f"{folder}: no store of a station here; `{program()} station` makes one, or give --folder")
    return Store.open(folder)


def _imported(found: Imported, file: Path) -> str:
    lines = f", {found.judgements} lines of history" if found.judgements else ""
    known = f"; {found.known} lines were known" if found.known else ""
    return f"{found.pairs} new pairs{lines} from {file}{known}"


def _say(text: str) -> None:
    print(text, flush=True)
