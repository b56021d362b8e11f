"""Settings as YAML, as a JSON schema and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedbiscuit.config.settings import Config, Section
from fedbiscuit.schema import permitted, sections, settings_of
from fedbiscuit.strict_yaml import scalar_text

__all__ = ["dump_config", "json_schema", "settings_table"]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors and for checks without this package."""
    schema = Config.model_json_schema()
    schema["properties"] |= {
        "extends": {"type": "string", "description": "another config whose settings hold where this one has none"}
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fedbiscuit config"} | {
        key: value for key, value in schema.items() if key != "title"
    }


def dump_config(cfg: Config) -> str:
    """All settings as YAML, each with its meaning; ``parse_config`` reads the same settings back."""
    return "\n".join(["# every setting of this run", *_dump(cfg, 0)]) + "\n"


def _dump(section: Section, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from ([""] if depth == 0 else [])
            yield f"{indent}{key}:  # {info.description or (type(value).__doc__ or '').splitlines()[0]}"
            yield from _dump(value, depth + 1)
        elif isinstance(value, Mapping) and value:
            yield f"{indent}{key}:  # {info.description}"
            yield from (f"{indent}  {scalar_text(name)}: {scalar_text(item)}" for name, item in value.items())
        else:
            yield f"{indent}{key}: {_value_text(value)}" + (f"  # {info.description}" if info.description else "")


def _value_text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(scalar_text, value))}]"
    return "{}" if isinstance(value, Mapping) else scalar_text(value)


def settings_table() -> str:
    """Every setting as Markdown: one table a section (``docs/settings.md``)."""
    lines: list[str] = []
    for path, model in sections(Config):
        title = ".".join(path) or "top level"
        if path[:1] == ("policy_model",):
            continue
        lines += [f"## {title}", "", (model.__doc__ or "").strip(), ""]
        lines += ["| key | default | permitted | meaning |", "|---|---|---|---|"]
        for key, info in model.model_fields.items():
            here = (*path, key)
            if here in settings_of(Config):
                default = f"`{_value_text(info.get_default(call_default_factory=True))}`"
                lines.append(f"| `{key}` | {default} | {permitted(Config, here)} | {info.description or ''} |")
            else:
                section = "model" if key == "policy_model" else ".".join(here)
                default = "`null`" if key == "policy_model" else ""
                lines.append(f"| `{key}` | {default} | as `{section}` below | {info.description or ''} |")
        lines.append("")
    return "\n".join(lines)
