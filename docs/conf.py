"""How Sphinx builds these pages: ``make docs``. Nothing here needs a network."""

import os
import re
from importlib.util import find_spec

# The examples are small; threads that wait for each other would make them slower. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import skaipo

project = "skaipo"
author = "the skaipo developers"
copyright = author
release = version = skaipo.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "auto_examples/*.ipynb", "auto_examples/*.py"]
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]  # sphinx-gallery's own settings hold functions

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# The public names are those of each module's __all__, wherever they are defined.
autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_member_order = "bysource"
# The templates list the members.
numpydoc_show_class_members = False
numpydoc_show_inherited_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    # What needs a library that is not there is shown, and not run.
    "filename_pattern": r"[\\/]plot_" + ("" if find_spec("deepinv") else "(?!deepinv)"),
    "backreferences_dir": "gen_modules/backreferences",
    "doc_module": ("skaipo",),
    "plot_gallery": os.environ.get("EXAMPLES") != "0",
    "download_all_examples": False,
    "show_memory": False,
    # What is printed is shown, not what the last line of a block happens to return.
    "capture_repr": (),
    "show_signature": False,
    "remove_config_comments": True,
}

html_theme = "pydata_sphinx_theme"
html_title = f"skaipo {version}"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "skaipo"},
    "navigation_with_keys": False,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
}


def _origin(obj):
    """The module in which a function, property or descriptor was written."""
    if isinstance(obj, property):
        obj = obj.fget
    return getattr(obj, "__module__", None) or ""


def _skip_inherited(app, what, name, obj, skip, options):
    """Leave out what classes inherit from scikit-learn and torch, which document it."""
    return True if _origin(obj).startswith(("sklearn.", "torch.")) else None


def _mend(app, what, name, obj, options, lines):
    """Shapes such as (n, *event_shape) are no emphasis, and constants have no docstring."""
    if what == "data":
        lines.clear()
    lines[:] = [re.sub(r"(, )\*(\w+\))(?!`)", r"\1\\*\2", line) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _mend, priority=400)  # before numpydoc
    app.connect("autodoc-skip-member", _skip_inherited)
