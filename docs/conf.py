"""The documentation site: `make docs`. Links that lead nowhere, pages that none leads to and broken markup end it."""

from vitfold.version import __version__

project = "vitfold"
release = __version__
copyright = "vitfold, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"vitfold {release}"
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": False, "class-doc-from": "class"}
napoleon_google_docstring = True
napoleon_custom_sections = ["Source"]
suppress_warnings = ["misc.highlighting_failure"]
