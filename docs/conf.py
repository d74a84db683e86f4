"""The documentation site: Sphinx over the Markdown of this folder; `make docs` builds it.

Sphinx rather than mkdocs: a page that no table of contents names, a link without a target or an unknown heading is a
warning, and warnings are errors. The pages stay what a code host shows of them.
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

project = "pytest-qsa"
version = release = version_of("pytest-qsa")
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nitpicky = True
html_theme = "furo"
html_title = f"pytest-qsa {version}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


def _write_math(translator: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers draw without a script; skip the node's own text."""
    formula = latex2mathml.tex2mathml(node.astext(), as_block=node.tagname == "math_block")
    translator.body.append(formula)
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Draw formulas without fetching anything."""
    app.add_html_math_renderer("mathml", (_write_math, None), (_write_math, None))
