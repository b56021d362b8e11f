"""What is made of a run: report, compare, export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedbiscuit.cli.shared import Source, app, run_dir_of, settings_of
from fedbiscuit.types import ConfigError

__all__ = ["compare", "export", "push", "report"]

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

    cfg, _ = settings_of(config, ())
    if not 0 <= watch <= 86400:
        raise ConfigError(f"--watch: {watch} is not permitted; it must be a whole number of seconds from 1 to 86400")
    if watch == 0:
        print(pages.write_report(run_dir_of(cfg)))
        return
    told: list[Path] = []

    def written(path: Path) -> None:
        if not told:
            print(
                f"{path}: open it in a browser; it is written again while the run goes on (Ctrl-C ends that)",
                flush=True,
            )
        told.append(path)

    print(f"{pages.watch_report(run_dir_of(cfg), watch, written)}: the run has ended, and this page shows all of it")


@app.command(sort_key=7)
def compare(
    *runs: Annotated[Path, Parameter(help="folders of evaluated runs", required=True)],
    out: Annotated[
        Path | None, Parameter(help="write Markdown there, with figures beside it", show_default=False)
    ] = None,
) -> None:
    """Put runs side by side: agreement with people, differences client by client, calibration, policies, cost.

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
