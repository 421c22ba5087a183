"""Builds docs/ as a site: `make docs`. The pages are Markdown that GitHub shows, too."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "transllm-jax"
release = re.search(r'__version__ = "(.+)"', (ROOT / "transllm_jax" / "__init__.py").read_text())[1]
extensions = ["myst_parser"]
# Links to headings, with the names that GitHub gives them.
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"transllm-jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
