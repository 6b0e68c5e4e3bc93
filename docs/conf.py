"""Configuration of Sphinx, for ``make docs``.

The source directory is the root of the repository, so that README.md and the pages of other folders
belong to the site and every link between them works both here and on GitHub. The equations become
MathML, which browsers show without JavaScript, so that the site loads nothing from elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fusedrnn

project = "fusedrnn"
author = copyright = "fusedrnn contributors"
version = release = fusedrnn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*", "bench/README.md", "tests/support/emulator/README.md"]
exclude_patterns = [".*", "build"]  # not searched
nitpicky = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings give the shapes, which types cannot express
napoleon_attr_annotations = False
napoleon_custom_sections = [
    ("Inputs", "params_style"),
    ("Outputs", "params_style"),
    ("Raises in the constructor", "params_style"),
    ("Raises in a call", "params_style"),
]

html_theme = "furo"
html_title = f"fusedrnn {version}"
html_math_renderer = "mathml"
html_show_sphinx = False

# Appended here, because GitHub would show it if it were part of README.md.
CONTENTS = """
```{toctree}
:hidden:
:glob:

docs/features
docs/migration
docs/recipes
docs/api
docs/performance
docs/design
docs/cuda
docs/*
bench/README
tests/support/emulator/README
CONTRIBUTING
CHANGELOG
SECURITY
```
"""


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += CONTENTS


def visit_math(translator: Any, node: nodes.Element) -> None:
    if isinstance(node, nodes.math_block):
        equation = latex2mathml.tex2mathml(node.astext(), as_block=True)
        equation = f'<div style="overflow-x: auto; margin: 1em 0">{equation}</div>'
    else:
        equation = latex2mathml.tex2mathml(node.astext())
    translator.body.append(equation)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
