"""Sphinx's settings of the book. REPOSITORY=owner/name, which hosted CI knows by itself, gives
every notebook's page a button that opens it on Binder."""

import os

project, author, copyright = "MINER workbook", "", ""
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"  # as committed
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_title = "MINER workbook"
html_theme_options = {"use_download_button": False, "show_toc_level": 2}
if repository := os.environ.get("REPOSITORY") or os.environ.get("GITHUB_REPOSITORY"):
    html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": "main",
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
        "use_repository_button": True,
    }
html_show_sourcelink = html_show_copyright = False
exclude_patterns = ["notebooks/*.py", "notebooks/*.yml"]
# Headings that documents of other origin skip, and pages that links of READMEs lead to.
suppress_warnings = ["myst.header", "misc.highlighting_failure", "toc.not_included"]
