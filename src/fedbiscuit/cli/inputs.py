"""What goes into a run, looked at before: config, data check. Neither loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import fedbiscuit
from fedbiscuit.cli.shared import Overrides, Selector, app, data_app, settings_of, with_selector
from fedbiscuit.types import ConfigError

__all__ = ["check", "show_config"]


@app.command(name="config", sort_key=8)
def show_config(
    config: Annotated[Path | None, Parameter(help="a config file, or the folder of a run")] = None,
    /,
    *overrides: Overrides,
    selector: Selector = None,
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

        notes: tuple[str, ...] = ()
        if config.is_dir():
            cfg, _ = settings_of(config, overrides, selector)
        else:
            cfg, notes = load_translated(config, *with_selector(overrides, selector))
        load_template(cfg.data.template)
        told = "".join(f"# {note}\n" for note in notes)
        missing = [path for path in cfg.data.path if cfg.data.source == "jsonl" and not Path(path).exists()]
        absent = "".join(f"note: data.path: {path} is not there yet\n" for path in missing)
        print(f"{told}{config}: all settings are fine\n{absent}" if check else f"{told}{dump_config(cfg)}", end="")


@data_app.command
def check(
    *files: Annotated[Path, Parameter(help="files of comparisons (.jsonl or .jsonl.gz), or configs", required=True)],
    model: Annotated[
        str, Parameter(help="count lengths in tokens of this model, named as in model.base", show_default=False)
    ] = "",
) -> int:
    """Count clients, splits, labels and lengths in data files, and name every broken line.

    Of a config with a published set, what its loader makes of it, with the first choice to look at.

    Example: fedbiscuit data check train.jsonl test.jsonl
    """
    from fedbiscuit.data.comparisons import check_files
    from fedbiscuit.data.looking import describe_dataset
    from fedbiscuit.data.sources import load
    from fedbiscuit.terminal import clean

    count_tokens = _token_counter(model) if model else None
    named: list[Path] = []
    loaded = 0
    for file in files:
        cfg = settings_of(file, ())[0] if file.suffix in (".yaml", ".yml") else None
        if cfg is None:
            named.append(file)
        elif cfg.data.source == "jsonl" and cfg.data.path:
            named += [Path(path) for path in cfg.data.path]
        else:
            print(clean(describe_dataset(load(cfg.data, cfg.seed), count_tokens)))
            loaded += 1
    if loaded and not named:
        return 0
    found = check_files(named, count_tokens=count_tokens)
    print(clean(found.render()))
    return 0 if found.ok else 2


def _example(name: str) -> str:
    """A config that is shipped: in the wheel inside the package, in a checkout at its root."""
    here = Path(fedbiscuit.__file__).resolve().parent
    folder = next((f for f in (here / "configs", here.parents[1] / "configs") if f.is_dir()), here)
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in found:
        raise ConfigError(f"config: no example {name!r}; there are {', '.join(found)}")
    return found[name].read_text(encoding="utf-8")


def _token_counter(model: str) -> Any:
    from fedbiscuit.models.base import load_tokenizer

    tokenizer = load_tokenizer(model)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
