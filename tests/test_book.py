"""The book has every notebook and page, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import ROOT

INDEX = (ROOT / "book/index.md").read_text()
LISTED = [line for block in re.findall(r"```\{toctree\}\n(.*?)```", INDEX, re.S)
          for line in block.splitlines() if line and not line.startswith(":")]  # fmt: skip


def slugs(text: str) -> list[str]:
    """A page's headings as links to them have them."""
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]


def test_every_notebook_is_in_the_book_once_and_in_order():
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    listed = [name.split("/")[1] for name in LISTED if name.startswith("notebooks/")]
    assert sorted(listed) == notebooks and len(set(LISTED)) == len(LISTED)
    numbered = [name for name in listed if name[:2] not in ("00", "20")]
    assert numbered == sorted(numbered)


def test_every_other_page_is_there():
    own = {path.stem for path in (ROOT / "book").glob("*.md")} - {"index"}
    others = {name for name in LISTED if not name.startswith("notebooks/")}
    files = {name for name in others if name.endswith(".md")}
    assert others - files == own | {"atlas"}
    assert all((ROOT / name).is_file() for name in files)


def test_a_gotcha_has_its_parts():
    text = (ROOT / "book/gotchas.md").read_text()
    for part in text.split("\n## ")[1:]:
        assert re.findall(r"\*\*(\w+)\.\*\*", part)[0] == "Symptom", part
        assert {"Cause", "Wrong", "Right"} <= set(re.findall(r"^- \*\*(\w+)\.\*\*", part, re.M)), (
            part
        )


def test_links_lead_to_the_sites_pages_and_to_what_is_none_are_text():
    from book.__main__ import linked

    text = "[a](notebooks/05_x.ipynb) [b](minerlib/claims.yml) [c](https://x.y) ![d](figures/e.png)"
    assert linked(text, Path(".")) == text.replace("[b](minerlib/claims.yml)", "`b`")
    assert linked("[a](book/speed.md) [b](CONTRIBUTING.md#a)", Path(".")) == (
        "[a](speed.md) [b](CONTRIBUTING.md#a)"
    )
    assert linked("![a](../figures/e.png) [b](gotchas.md) [c](../README.md)", Path("book")) == (
        "![a](figures/e.png) [b](gotchas.md) [c](README.md)"
    )
    assert linked("[a](../README.md) [b](../book/speed.md)", Path("data")) == (
        "[a](../README.md) [b](../speed.md)"
    )


def test_what_the_scorecard_prints_leads_to_headings_of_the_site(tmp_path, monkeypatch):
    from book import __main__ as book

    monkeypatch.setattr(book, "SOURCES", tmp_path / "sources")
    book.assemble()
    card = (tmp_path / "sources/notebooks/20_scorecard.ipynb").read_text()
    links = re.findall(r"\]\((\w+)\.html#([^)]+)\)", card)
    assert len(links) > 5 and ".ipynb#" not in card
    for name, anchor in links:
        cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        assert anchor in slugs(text), f"{name}: {anchor}"


def test_a_sites_dead_links_are_found(tmp_path):
    from book.__main__ import dead

    (tmp_path / "a b.html").write_text('<a href="c/d.html#top">d</a> <a href="https://x.y/z">z</a>')
    (tmp_path / "c").mkdir()
    (tmp_path / "c/d.html").write_text(
        '<a href="../a%20b.html?q=1">a</a> <a href="#h">h</a> <img src="data:x"> <img src="e.png">'
    )
    assert dead(tmp_path) == ["c/d.html: e.png"]


def test_links_of_the_pages_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if path.startswith("http"):
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            assert not anchor or anchor in slugs(target.read_text()), (
                f"{page.relative_to(ROOT)}: {link}"
            )
