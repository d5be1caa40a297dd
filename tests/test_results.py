"""The workbook's results for finding I, as the run before the tests left them in runs/.

Numbers are asserted with tolerances, for other machines round otherwise, and every conclusion is
derived anew from the numbers it rests on.
"""

from __future__ import annotations

import json

import printed
import pytest
from conftest import ROOT

from minerlib import inference, scorecard

pytestmark = pytest.mark.slow

# Average score as it is, and the share of it lost beyond random neurons of the same layers.
EXPECTED = {
    "tiny-qwen2-vl": {"baseline": 0.864, "effect": 0.0},
    "tiny-qwen2-audio": {"baseline": 0.980, "effect": 0.0},
}


@pytest.fixture(params=EXPECTED)
def finding(request) -> tuple[str, dict]:
    """The newest finding I of a model's run with the notebook's own parameters."""
    usual = scorecard.findings()["I"].parameters
    files = (ROOT / "runs" / request.param).glob("finding-I-*[!t].json")  # but no manifest
    found = [json.loads(f.read_text()) for f in sorted(files, key=lambda f: f.stat().st_mtime)]
    found = [value for value in found if value["parameters"] == usual]
    assert found, f"no finding I of {request.param} in runs/: run `make workbook FULL=1` first"
    return request.param, found[-1]


def test_the_numbers_are_the_committed_ones(finding):
    name, found = finding
    measured = {"baseline": found["baseline"], "effect": found["claims"][0]["effect"]}
    assert measured == pytest.approx(EXPECTED[name], abs=0.02)


def test_one_line_for_each_claim_of_the_finding(finding):
    _, found = finding
    names = [claim["name"] for claim in found["claims"]]
    assert names == [n for n in inference.claims() if n == "I" or n.startswith("I ")]


def test_verdicts_follow_from_the_numbers(finding):
    _, found = finding
    for claim in found["claims"]:
        smallest = inference.claim(claim["name"]).smallest
        assert claim["low"] <= claim["effect"] <= claim["high"] and claim["smallest"] == smallest
        p = 0.0 if claim["p"] == "<0.001" else float(claim["p"])
        word = claim["verdict"].removesuffix(" (close)")
        assert (word == "holds") == (claim["low"] > smallest and p < 0.05)
        if claim["high"] < smallest:
            assert word == "does not hold"
        if claim["low"] > smallest:
            assert word != "does not hold"


def test_the_doses_rise_from_a_handful_and_have_random_neurons_beside_them(finding):
    _, found = finding
    by = {what: [d for d in found["doses"] if d["what"] == what] for what in ("selected", "random")}
    assert [d["neurons"] for d in by["selected"]] == [d["neurons"] for d in by["random"]]
    assert [d["neurons"] for d in by["selected"]] == sorted({d["neurons"] for d in by["selected"]})


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

    claim = found["claims"][0]
    before, after = claim["measured"].split(";")[0].split(" to ")
    assert shown(before) and shown(after)
    assert shown(inference.spread(*(claim[k] for k in ("effect", "low", "high")), sign="+"))
    assert claim["verdict"].removesuffix(" (close)") in row or "(close)" in claim["verdict"]
