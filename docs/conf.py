"""The pages of this folder as HTML: ``make docs``."""

project = "fedbiscuit"
author = "The fedbiscuit authors"
copyright = "the fedbiscuit authors, Apache-2.0"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "fedbiscuit"
html_show_sphinx = False
