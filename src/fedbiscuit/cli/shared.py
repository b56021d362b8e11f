"""What the commands share: the programs they are commands of, the settings they read, the name to start it by."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

import fedbiscuit
from fedbiscuit.types import ConfigError

if TYPE_CHECKING:
    from fedbiscuit.config import Config

__all__ = [
    "Overrides",
    "Selector",
    "Source",
    "app",
    "client_app",
    "data_app",
    "program",
    "run_dir_of",
    "server_app",
    "settings_and_kind",
    "settings_of",
    "station_app",
    "with_selector",
]

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


def settings_of(source: Path, overrides: Sequence[str], selector: Path | None = None) -> tuple[Config, bool]:
    """The settings of a config file or of a run folder, and whether it was a folder.

    ``selector``: the run whose selectors label, by its folder or its config.
    """
    cfg, kind = settings_and_kind(source, overrides, selector)
    return cfg, kind == "folder"


def settings_and_kind(
    source: Path, overrides: Sequence[str], selector: Path | None = None
) -> tuple[Config, Literal["config", "old", "folder"]]:
    """The same, and whether they were read from a config of ours, an old one, or the folder of a run."""
    from fedbiscuit.config import load_config, load_translated

    overrides, fill = with_selector(overrides, selector)
    if not source.is_dir():
        cfg, notes = load_translated(source, overrides, fill)
        if notes:
            what = "settings of the original FedBiscuit, translated"
            log.warning("%s: %s; `%s config %s` shows what they become", source, what, program(), source)
        return cfg, "old" if notes else "config"
    if not (source / "config.yaml").is_file():
        raise ConfigError(f"{source}: no config.yaml in this folder; give a config file or the folder of a run")
    cfg = load_config(source / "config.yaml", overrides)
    folder = source.resolve()
    if run_dir_of(cfg).resolve() != folder:  # moved, renamed, or seen from another working folder
        cfg = cfg.model_copy(update={"runs_dir": str(folder.parent), "name": folder.name})
    return cfg, "folder"


def with_selector(overrides: Sequence[str], selector: Path | None) -> tuple[Sequence[str], str]:
    """The overrides and the run whose selectors label, and its name: it fills placeholders in an old file's names."""
    if selector is None:
        return overrides, ""
    from fedbiscuit.config import load_config
    from fedbiscuit.strict_yaml import scalar_text

    trained = selector if selector.is_dir() else run_dir_of(load_config(selector))
    return [*overrides, f"labels.selectors={scalar_text(str(trained))}"], trained.name


def run_dir_of(cfg: Config) -> Path:
    """The folder of a run, there or not."""
    return Path(cfg.runs_dir) / cfg.name


def program() -> str:
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
