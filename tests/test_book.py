"""The book has every notebook and page, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import ROOT

INDEX = (ROOT / "book/index.md").read_text()
LISTED = [line for block in re.findall(r"```\{toctree\}\n(.*?)```", INDEX, re.S)
          for line in block.splitlines() if line and not line.startswith(":")]  # fmt: skip


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


def test_links_of_the_pages_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if path.startswith("http"):
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            heads = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else []
            known = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert not anchor or anchor in known, f"{page.relative_to(ROOT)}: {link}"
