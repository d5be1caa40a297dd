"""The workbook's results for both stand-ins: what `make test` has just computed into runs/.

Numbers are asserted with tolerances, for other machines round otherwise, and every conclusion is
derived anew from the numbers it rests on.
"""

from __future__ import annotations

import json

import printed
import pytest
from conftest import ROOT

from minerlib import scorecard, selection
from minerlib.inference import TOLERANCE

pytestmark = pytest.mark.slow

# Average score before and after silencing 2 % with the default strategy, as committed.
EXPECTED = {
    "tiny-qwen2-vl": {"baseline": 0.864, "LA_MU": 0.868},
    "tiny-qwen2-audio": {"baseline": 0.980, "LA_MU": 0.980},
}


STRATEGIES = {name for name in selection.STRATEGIES if name != "random"}


@pytest.fixture(params=EXPECTED)
def finding(request) -> tuple[str, dict]:
    """The newest finding I of a stand-in's run with the notebook's own parameters."""
    usual = scorecard.findings()["I"].parameters
    files = (ROOT / "runs" / request.param).glob("finding-I-*[!t].json")  # but no manifest
    found = [json.loads(f.read_text()) for f in sorted(files, key=lambda f: f.stat().st_mtime)]
    found = [value for value in found if value["parameters"] == usual]
    assert found, f"no finding I of {request.param} in runs/: run `make workbook` first"
    return request.param, found[-1]


def conditions(found: dict) -> dict[str, dict]:
    return {row["condition"]: row for row in found["strategies"]}


def test_the_numbers_are_the_committed_ones(finding):
    name, found = finding
    measured = {"baseline": found["baseline"], "LA_MU": conditions(found)["LA_MU"]["mean"]}
    assert measured == pytest.approx(EXPECTED[name], abs=0.02)


def test_every_strategy_and_its_null_is_there(finding):
    _, found = finding
    rows = conditions(found)
    assert STRATEGIES | {"as it is", "random, whole budget"} <= set(rows)
    for name in {found["best"], "LA_MU"}:
        for null in (f"random, as many as {name}", f"random, as many as {name}, same layers"):
            assert rows[null]["neurons"] == rows[name]["neurons"]
    assert rows["random, whole budget"]["neurons"] == rows["adaptive"]["neurons"] == 81


def test_the_best_strategy_is_the_most_damaging(finding):
    _, found = finding
    rows = conditions(found)
    means = {name: rows[name]["mean"] for name in STRATEGIES}
    assert means[found["best"]] <= min(means.values()) + TOLERANCE
    assert found["best"] == "LA_MU" or means["LA_MU"] > means[found["best"]] + TOLERANCE


def test_verdicts_follow_from_the_numbers(finding):
    _, found = finding
    rows = conditions(found)
    for claim in found["claims"]:
        lowest = float(claim["random draws"].split("[")[1].split(",")[0])
        highest = rows[claim["strategy"]]["high"]
        # Printed to two decimals, so a verdict at the border is left to the notebook.
        if abs(highest - lowest) > 0.01:
            verdict = claim["verdict"].removesuffix(" (close)")
            assert verdict == ("holds" if highest < lowest else "does not hold")


def test_a_large_enough_dose_hurts(finding):
    """The check that silencing works at all: a result of no effect must not be a dead hook."""
    _, found = finding
    whole = [dose for dose in found["doses"] if dose["ratio"] == 1 and dose["what"] != "random"]
    assert len(whole) == 1 and whole[0]["mean"] < 0.9 * found["baseline"]


def test_the_readme_shows_these_numbers(finding):
    """Up to another processor's rounding."""
    name, found = finding
    (row,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("| Qwen2-") and f"| {name} |" in line
    ]

    cells = [list(printed.parts(cell)) for cell in row.split("|")]

    def shown(text: str) -> bool:
        wanted = list(printed.parts(text))
        fitting = (zip(cell, wanted, strict=True) for cell in cells if len(cell) == len(wanted))
        return any(all(printed.agree(k, a, b) for (k, a), (_, b) in pairs) for pairs in fitting)

    for claim in found["claims"]:
        assert shown(claim["before"]) and shown(f"{claim['after']} ({claim['neurons']})")
        assert shown(claim["random draws"])
        assert claim["verdict"].removesuffix(" (close)") in row or "(close)" in claim["verdict"]
