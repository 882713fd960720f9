"""The documentation site: `make docs`."""

import magpo

project = "magpo"
author = "the magpo authors"
release = version = magpo.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

html_theme = "sphinx_book_theme"
html_title = "magpo"
html_static_path = ["_static"]
html_css_files = ["equations.css"]
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_output_stderr = "remove"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600

default_role = "code"  # `name` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "description"
