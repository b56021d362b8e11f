"""Write the files that are made from the code: docs/settings.md and configs/schema.json (``make docs``)."""

from __future__ import annotations

import json
from pathlib import Path

from fedbiscuit.config import json_schema, settings_table

ROOT = Path(__file__).resolve().parent.parent

SETTINGS_INTRODUCTION = """\
# Settings

Made by `make docs` from `src/fedbiscuit/config/settings.py`; do not edit. `fedbiscuit config CONFIG` prints the same for one
config, with its values, and `configs/schema.json` is the JSON schema for editors.

A key is named by its path: `rounds` in the section `selectors` is `selectors.rounds`, also on the command line
(`fedbiscuit run CONFIG selectors.rounds=20`). Files are YAML with the scalars of YAML 1.2: `1e-5` is a number, `no` is
a text; tags, anchors and aliases are not allowed, and an unknown key is an error.
"""


def generated() -> dict[str, str]:
    """Path inside the project -> text."""
    return {
        "docs/settings.md": f"{SETTINGS_INTRODUCTION}\n{settings_table().rstrip()}\n",
        "configs/schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
    }


if __name__ == "__main__":
    for name, text in generated().items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"wrote {name}")
