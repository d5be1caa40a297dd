"""Tables that follow from other files, and the pages they stand in: `make notebooks` ends with it.

    python -m book.tables

The headlines of what is published go into README.md, the presets into book/your-model.md; `make
bench` writes its own in the same way.
"""

import re
from pathlib import Path

import pandas as pd

from minerlib import presets
from minerlib.scorecard import Scorecard

ROOT = Path(__file__).parents[1]


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, without its index."""
    rows = [[*table], ["---"] * len(table.T), *table.astype(str).to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def placed(page: Path, name: str, table: str) -> str:
    """A whole page with a table where it marks the place of that name; ValueError without one."""
    block = re.compile(rf"(?<=<!-- {name} -->\n)(?:.*?\n)?(?=<!-- /{name} -->)", re.DOTALL)
    text, found = block.subn(lambda _: f"{table}\n", page.read_text())
    if found != 1:
        raise ValueError(f"{page.name} has {found} places for the table {name!r}, not one")
    return text


TABLES = {
    "headlines": (ROOT / "README.md", lambda: Scorecard(runs="no runs").headlines()),
    "presets": (ROOT / "book/your-model.md", lambda: markdown(presets.table())),
}


def written(name: str) -> str:
    """The whole page with the table of that name as it should stand there."""
    page, table = TABLES[name]
    return placed(page, name, table())


if __name__ == "__main__":
    for name, (page, _) in TABLES.items():
        page.write_text(written(name))
