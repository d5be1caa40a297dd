"""Sphinx's settings of the book."""

project, author, copyright = "MINER workbook", "", ""
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"  # as committed
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_title = "MINER workbook"
html_theme_options = {"use_download_button": False, "show_toc_level": 2}
html_show_sourcelink = html_show_copyright = False
exclude_patterns = ["notebooks/*.py", "notebooks/*.yml"]
# Headings that documents of other origin skip, and pages that links of READMEs lead to.
suppress_warnings = ["myst.header", "misc.highlighting_failure", "toc.not_included"]
