"""Hand on the neurons of the shipped models, as notebooks 02 to 04 find them: data/neurons/NAME.

    python -m data.make.neurons        # all whose scores are published

Each is a folder of `minerlib.save_neurons`, with the card that says whose they are, on which rows
they were found and how, and what silencing them did.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import minerlib as ml
from minerlib.scorecard import Scorecard
from minerlib.workbook import RESULTS, ROOT

ROWS = 96  # per benchmark, as the committed notebooks mine


def effect(table: pd.DataFrame, label: str) -> str:
    """The first line of finding I of a model, in a scorecard's table; empty where it is not."""
    told = table[(table["finding"] == "I") & (table["of"] == label)]["measured"]
    return told.iloc[0] if len(told) else ""


def main() -> None:
    published = Scorecard(runs="no runs").table
    for folder in sorted((ROOT / RESULTS).iterdir()):
        if not any(folder.glob("scores-*.nc")):
            continue
        wb = ml.Workbook(model=f"data/models/{folder.name}", limit=ROWS)
        place = Path("data/neurons", folder.name)
        wb.save_neurons(wb.select(wb.total()), place, effect=effect(published, folder.name))
        print(place)


if __name__ == "__main__":
    main()
