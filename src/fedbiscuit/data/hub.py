"""Data sets of the Hugging Face Hub: ``hub:OWNER/NAME``, ``hub:OWNER/NAME/CONFIG``, ``...@SPLIT``.

The package ``datasets`` reads them, from the network or from its cache. It is imported here only, and only when used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fedbiscuit.types import ConfigError, DataError, EnvironmentFault

__all__ = ["HUB", "hub_rows", "hub_splits"]

HUB = "hub:"
CONVERTED = "refs/convert/parquet"
"""Where the Hub keeps the tables that it made of sets which are programs; such a program is never run here."""

log = logging.getLogger("fedbiscuit")


def hub_splits(place: str, otherwise: str) -> list[str]:
    """The names of the splits of ``hub:...``, in the order of the set. ``otherwise``: what to do where it cannot be had."""
    return list(_loaded(place, otherwise))


def hub_rows(place: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one split, in their order."""
    yield from _loaded(place, "")[split]


def _loaded(place: str, otherwise: str) -> Mapping[str, Any]:
    """Every split of a set by its name. Raises ``EnvironmentFault`` without the package, ``DataError`` without the set."""
    name, config = _name_and_config(place)
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(
            f"{place}: reading it needs the package datasets; install it: pip install 'fedbiscuit[hub]'; {otherwise}"
        ) from None
    known = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        return _load(name, config)
    except known as error:
        told = str(error.__cause__ or error).strip().splitlines()
        raise DataError(
            f"{place}: cannot be loaded: {told[0] if told else type(error).__name__}; check the name and the network; "
            f"{otherwise}"
        ) from error


@cache
def _load(name: str, config: str) -> Mapping[str, Any]:
    """CONFIG is a configuration of the set or, where it has none of that name, a folder in it (as in hh-rlhf)."""
    import datasets

    try:
        if config and config not in datasets.get_dataset_config_names(name):
            return dict(datasets.load_dataset(name, data_dir=config))
        return dict(datasets.load_dataset(name, config or None))
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        log.info("%s is a program, which is not run; reading the tables that the Hub made of it", name)
        return dict(datasets.load_dataset(name, data_dir=config or None, revision=CONVERTED))


def _name_and_config(place: str) -> tuple[str, str]:
    """``hub:OWNER/NAME/CONFIG`` -> (OWNER/NAME, CONFIG); a folder with a copy of a set is a name too."""
    text = place.removeprefix(HUB)
    parts = text.split("/")
    if not Path(text).is_dir() and (len(parts) < 2 or not all(parts)):
        raise ConfigError(f"{place}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG, as the Hub shows it")
    return (text, "") if Path(text).is_dir() else ("/".join(parts[:2]), "/".join(parts[2:]))
