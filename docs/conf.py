"""How Sphinx builds the pages: ``make docs``."""

import builtins
import inspect
import runpy
from pathlib import Path

import skinvert

HERE = Path(__file__).parent

project, author = "skinvert", "The skinvert developers"
copyright = author
version = release = skinvert.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**/GALLERY_HEADER.rst"]

myst_enable_extensions = ["dollarmath", "deflist", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {"methods_table": runpy.run_path(str(HERE / "methods_table.py"))["table_of_methods"]()}

autosummary_generate = True
autodoc_typehints = "none"  # The docstrings say them, with shapes.
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # The template lists them.

html_theme = "pydata_sphinx_theme"
html_title = "skinvert"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_\w+\.py$",
    "download_all_examples": False,
    "show_signature": False,
    "reference_url": {},
}
# Examples put their pictures beside themselves; sphinx-gallery gives them no `__file__` of their own.
builtins.__file__ = str(HERE.parent / "examples" / "example.py")


def skips(_app, _what, _name, obj, skip, _options):
    """Leave out what a class has of other libraries' bases: their docstrings refer to pages of their own."""
    function = obj.fget if isinstance(obj, property) else obj
    if callable(function) or inspect.isdatadescriptor(function):
        return skip or not (inspect.getmodule(function) or builtins).__name__.startswith("skinvert")
    return None


def setup(app):
    """Connect what autodoc asks."""
    app.connect("autodoc-skip-member", skips)
