"""`pytest --nbval -p tests.nbval_numbers`: tables are compared as plain text, not as HTML too, and
numbers, which tests/nbval_sanitize.cfg hides from nbval, by `printed`'s tolerances."""

import sys
from pathlib import Path

from nbval.plugin import IPyNbCell

sys.path.insert(0, str(Path(__file__).parent))
import printed  # noqa: E402

exactly = IPyNbCell.compare_outputs


def compare_outputs(cell, fresh, committed, skip_compare=None) -> bool:
    same = exactly(cell, fresh, committed, skip_compare)
    if same and "chaotic" not in cell.cell.metadata.get("tags", []):
        cell.comparison_traceback += (wrong := printed.changes(committed, fresh))
        return not wrong
    return same


def pytest_configure(config):
    IPyNbCell.compare_outputs = compare_outputs


def pytest_collectstart(collector):
    if collector.nodeid.endswith(".ipynb"):
        collector.skip_compare += ("text/html",)
