"""The documentation as a site: `make docs` builds it into build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import attnax

project = "Attnax"
author = "the authors of Attnax"
version = release = attnax.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "offline",
    "command_help",
    "api",
    "bars",
    "pages",
]
exclude_patterns = ["_ext", "**.ipynb_checkpoints"]

# Pages are Markdown that GitHub shows too; their links name files and headings.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "html_image"]
myst_heading_anchors = 4

# A notebook is shown with its stored outputs, which `make notebooks` makes.
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # they would load from a content delivery network

nitpicky = True
highlight_language = "none"  # of blocks that do not say theirs
default_role = "literal"  # docstrings write code as Markdown does, between single backticks
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 76
python_trailing_comma_in_multi_line_signatures = False
autodoc_class_signature = "mixed"
autodoc_default_options = {"member-order": "bysource"}
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"Attnax {release}"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["attnax.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
