"""Write the tables that follow from other files: `make notebooks` ends with it.

The headlines of what is published go into README.md, the presets into book/your-model.md.
"""

import re
from pathlib import Path

import pandas as pd

from minerlib import presets
from minerlib.scorecard import Scorecard

ROOT = Path(__file__).parents[1]


def markdown(table: pd.DataFrame) -> str:
    rows = [[*table], ["---"] * len(table.T), *table.astype(str).to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES = {
    "headlines": (ROOT / "README.md", lambda: Scorecard(runs="no runs").headlines()),
    "presets": (ROOT / "book/your-model.md", lambda: markdown(presets.table())),
}


def written(name: str) -> str:
    """The whole page with the table of that name as it should stand there."""
    page, table = TABLES[name]
    block = re.compile(rf"(?<=<!-- {name} -->\n)(?:.*?\n)?(?=<!-- /{name} -->)", re.DOTALL)
    text, found = block.subn(lambda _: f"{table()}\n", page.read_text())
    if found != 1:
        raise ValueError(f"{page.name} has {found} places for the table {name!r}, not one")
    return text


if __name__ == "__main__":
    for name, (page, _) in TABLES.items():
        page.write_text(written(name))
