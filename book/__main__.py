"""Build the static site: notebooks as committed, what they guarantee, gotchas, the API, atlases.

    python -m book            # into build/book; opens from disk and from any static host

Nothing is executed. Sphinx with MyST-NB reads what stands in the repository, once its files lie in
one folder; pdoc makes the API page; atlases that lie in build/atlas come along.
"""

import html
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import pdoc

ROOT = Path(__file__).parents[1]
HERE, SOURCES, SITE = ROOT / "book", ROOT / "build/book-sources", ROOT / "build/book"
FOLDERS = ("notebooks", "figures")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")


def assemble() -> None:
    """Everything that the site is made of, in one folder."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, SOURCES / folder)
    for file in (SOURCES / "notebooks").glob("*.ipynb"):
        file.write_text(re.sub(r"\]\((\w+)\.ipynb#([^)]+)\)", _heading, file.read_text()))
    for page in PAGES:
        (SOURCES / page).parent.mkdir(parents=True, exist_ok=True)
        (SOURCES / page).write_text(linked((ROOT / page).read_text(), Path(page).parent))
    for file in HERE.glob("*.md"):
        (SOURCES / file.name).write_text(linked(file.read_text(), Path("book")))
    shutil.copy(HERE / "conf.py", SOURCES)
    atlases = sorted((ROOT / "build/atlas").glob("*/index.html"))
    names = [file.parent.name for file in atlases]
    # As HTML: they come along once the site is built, so they are no pages of it.
    lines = [f'- <a href="atlas/{name}/index.html">{name}</a>' for name in names]
    none = "None is built yet: `make atlas` builds one, and `make book` those of the grafts."
    listed = "\n".join(lines) or none
    (SOURCES / "atlas.md").write_text(
        f"# Atlas\n\nNeurons to look at, and to listen to.\n\n{listed}\n"
    )


def _heading(found: re.Match) -> str:
    """A link that a cell has printed, to a heading in a notebook, as MyST calls it."""
    slug = re.sub(r"[^\w-]", "", found[2]).lower()
    return f"]({found[1]}.html#{slug})"


def linked(text: str, folder: Path) -> str:
    """A page's links as on the site, where book/ is the top; to what is no page, plain text."""

    def keep(found: re.Match) -> str:
        mark, name, link = found.groups()
        if link.startswith(("http", "#")):
            return found[0]
        path, _, anchor = link.partition("#")
        target = os.path.normpath(folder / path)
        site = target.removeprefix("book/")
        pages = ("notebooks/0", "notebooks/1", "notebooks/2", "figures/")
        if not (target.startswith(pages) or target in PAGES or (HERE / site).is_file()):
            return f"`{name}`"
        home = "." if folder == Path("book") else folder
        return f"{mark}[{name}]({os.path.relpath(site, home)}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"(!?)\[([^\]\[]+)\]\(([^)]+)\)", keep, text)


def dead(site: Path) -> list[str]:
    """Links of the site's pages to its own files, where there is no such file."""
    found = []
    for page in sorted(set(site.rglob("*.html")) - set(site.glob("_static/**/*"))):
        links = re.findall(r'\s(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8"))
        for link in dict.fromkeys(map(html.unescape, links)):
            beyond = re.match(r"[a-z]+:|//", link)
            if not beyond and not (page.parent / unquote(link)).exists():
                found.append(f"{page.relative_to(site)}: {link}")
    return found


def main() -> int:
    from sphinx.cmd.build import main as sphinx

    assemble()
    shutil.rmtree(SITE, ignore_errors=True)
    if failed := sphinx(["-q", "-W", "--keep-going", "-j", "2", str(SOURCES), str(SITE)]):
        return failed
    pdoc.pdoc("minerlib", output_directory=SITE / "api")
    if (ROOT / "build/atlas").is_dir():
        shutil.copytree(ROOT / "build/atlas", SITE / "atlas", dirs_exist_ok=True)
    if found := dead(SITE):
        print("links that lead nowhere:", *found, sep="\n  ")
        return 1
    print(f"open {(SITE / 'index.html').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
