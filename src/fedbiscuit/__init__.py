"""fedbiscuit: federated preference alignment. Private comparisons in, an aligned language model out.

The public names below are loaded when they are first used, so that ``import fedbiscuit`` takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedbiscuit.config import Config, dump_config, json_schema, load_config, parse_config
    from fedbiscuit.data.comparisons import check_files, iter_comparisons, read_comparisons
    from fedbiscuit.models.base import resolve_model
    from fedbiscuit.models.pretrained import Selector
    from fedbiscuit.pipeline import align, evaluate, export_run, label, run_all, train_selectors
    from fedbiscuit.report import write_report
    from fedbiscuit.types import (
        ClientData,
        Comparison,
        ConfigError,
        DataError,
        EnvironmentFault,
        FedbiscuitError,
        FederationError,
        IntegrityError,
    )

__all__ = [
    "ClientData",
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "EnvironmentFault",
    "FedbiscuitError",
    "FederationError",
    "IntegrityError",
    "Selector",
    "__version__",
    "align",
    "check_files",
    "dump_config",
    "evaluate",
    "export_run",
    "iter_comparisons",
    "json_schema",
    "label",
    "load_config",
    "parse_config",
    "read_comparisons",
    "resolve_model",
    "run_all",
    "train_selectors",
    "write_report",
]

_HOME = {
    "fedbiscuit.config": ("Config", "dump_config", "json_schema", "load_config", "parse_config"),
    "fedbiscuit.data.comparisons": ("check_files", "iter_comparisons", "read_comparisons"),
    "fedbiscuit.models.base": ("resolve_model",),
    "fedbiscuit.models.pretrained": ("Selector",),
    "fedbiscuit.pipeline": ("align", "evaluate", "export_run", "label", "run_all", "train_selectors"),
    "fedbiscuit.report": ("write_report",),
    "fedbiscuit.types": (
        "ClientData",
        "Comparison",
        "ConfigError",
        "DataError",
        "EnvironmentFault",
        "FedbiscuitError",
        "FederationError",
        "IntegrityError",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that has it."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fedbiscuit")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+unknown"
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'fedbiscuit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
