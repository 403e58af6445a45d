"""Sphinx configuration: `make docs` builds the site into build/site, without a network."""

import importlib.metadata

project = "hiplora"
author = "The hiplora developers"
release = importlib.metadata.version("hiplora")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"
smartquotes = False  # they turn --option into –option
exclude_patterns = ["results/**/tables/*.md"]
html_theme = "furo"
html_title = "hiplora"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["phone.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
nitpicky = False
suppress_warnings = [
    "myst.xref_missing",  # links to files outside docs/, which exist in the repository
    "toc.not_included",  # decisions, which decisions/README lists
]
