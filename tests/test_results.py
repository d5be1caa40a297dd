"""The published results of finding I: what they say, and that it is what the code computes.

Numbers are asserted with tolerances, for other machines round otherwise, and every conclusion is
derived anew from the numbers it rests on.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT

import minerlib as ml
from book import tables
from minerlib import inference, scorecard
from minerlib.findings import silencing
from minerlib.workbook import RESULTS

# Average score as it is, and the share of it lost beyond random neurons of the same layers.
EXPECTED = {
    "smol-qwen2-audio": {"baseline": 0.832, "effect": 1.02},
    "smol-qwen2-vl": {"baseline": 0.737, "effect": 0.83},
    "tiny-qwen2-audio": {"baseline": 0.98, "effect": 0.0},
    "tiny-qwen2-vl": {"baseline": 0.864, "effect": 0.0},
}
FILES = sorted((ROOT / RESULTS).glob("*/finding-*[!t].json"))  # but no manifest


def published(name: str) -> dict:
    """A model's finding I with the notebook's own parameters."""
    usual = scorecard.findings()["I"].parameters
    files = (ROOT / RESULTS / name).glob("finding-I-*[!t].json")  # but no manifest
    found = [json.loads(file.read_text()) for file in files]
    found = [value for value in found if value["parameters"] == usual]
    assert len(found) == 1, f"{name}: not one finding I in {RESULTS}: MINER_PUBLISH=1 FULL=1"
    return found[0]


@pytest.fixture(params=EXPECTED)
def finding(request) -> tuple[str, dict]:
    return request.param, published(request.param)


@pytest.mark.slow
def test_the_main_numbers_are_computed_again_from_nothing(tmp_path, monkeypatch):
    """Mining, selection, the score before and after, and three random draws, on some rows."""
    name, rows = "smol-qwen2-audio", 16
    found = published(name)
    monkeypatch.setenv("MINER_FRESH", "1")
    given = {k: v for k, v in found["parameters"].items() if k in ml.Workbook.model_fields}
    given["model"] = f"data/models/{name}"
    fresh = ml.Workbook(**given | {"run_dir": str(tmp_path / "fresh")})
    assert fresh.run.also == ()
    monkeypatch.delenv("MINER_FRESH")
    kept = ml.Workbook(**given | {"run_dir": str(tmp_path / "kept")})
    for scores, before in zip(fresh.mine().values(), kept.scores().values(), strict=True):
        apart = np.abs(scores.values - before.values)  # another processor moves a few further
        assert (apart > 1e-3).mean() < 1e-4 and apart.max() < 0.02
    neurons, of_old = fresh.select(), kept.select()
    assert (neurons & of_old).sum() >= 0.99 * of_old.sum()
    few = {of: bench[:rows] for of, bench in fresh.evaluation.items()}
    for which in (None, of_old, *kept.draws(of_old, 3, by_layer=True)):
        table = kept.answers(which).groupby("benchmark", sort=False).head(rows)
        again, table = fresh.answers(which, rows=few), table.reset_index(drop=True)
        assert again["row"].tolist() == table["row"].tolist()
        (now, *_), (then, *_) = (silencing.average(x).values() for x in (again, table))
        assert now == pytest.approx(then, abs=0.02)
        same = again["answer"].eq(table["answer"]).mean()
        assert same > 0.95 if which is None else same > 0.8


def test_the_numbers_are_the_committed_ones(finding):
    name, found = finding
    measured = {"baseline": found["baseline"], "effect": found["claims"][0]["effect"]}
    assert measured == pytest.approx(EXPECTED[name], abs=0.02)


def test_one_line_for_each_claim_of_the_finding(finding):
    """But of a stand-in, which knows no plain text, and which no few neurons break."""
    name, found = finding
    names = [claim["name"] for claim in found["claims"]]
    stated = [n for n in inference.claims() if n == "I" or n.startswith("I ")]
    assert names == [n for n in stated if n in names]
    assert set(stated) - set(names) <= {"I without critical", "I as damaging"}
    assert names == stated or not name.startswith("smol")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem[8:-17]}")
def test_every_published_verdict_follows_from_its_numbers_and_its_claim(file):
    for line in json.loads(file.read_text())["claims"]:
        claim, word = inference.claim(line["name"]), line["verdict"].removesuffix(" (close)")
        assert (line["claim"], line["smallest"]) == (claim.text, claim.smallest)
        if line["effect"] is None or np.isnan(line["effect"]):
            assert word == inference.UNKNOWN
            continue
        ends = [line[end] for end in ("low", "effect", "high90", "high")]
        assert ends == sorted(ends)
        p = 0.0 if line["p"] in ("<0.001", "") else float(line["p"])  # not all have draws
        holds = line["low"] > claim.smallest and p < 0.05
        fails = line["high90"] < claim.smallest
        assert word == (
            inference.HOLDS if holds else inference.FAILS if fails else inference.UNKNOWN
        )


def test_a_finding_of_a_model_is_published_once():
    """One of earlier code, with the same parameters, would stand in its place by chance."""
    values = [json.loads(file.read_text()) for file in FILES]
    told = [(v["finding"], v["model"], json.dumps(v["parameters"])) for v in values]
    assert len(told) == len({*told}) > 0


def test_the_doses_rise_from_a_handful_and_have_random_neurons_beside_them(finding):
    _, found = finding
    by = {what: [d for d in found["doses"] if d["what"] == what] for what in ("selected", "random")}
    assert [d["neurons"] for d in by["selected"]] == [d["neurons"] for d in by["random"]]
    assert [d["neurons"] for d in by["selected"]] == sorted({d["neurons"] for d in by["selected"]})


@pytest.mark.parametrize("name", tables.TABLES)
def test_pages_show_what_is_published(name):
    page, _ = tables.TABLES[name]
    assert tables.written(name) == page.read_text(), "run python -m book.tables"


def test_the_readme_has_every_published_model():
    _, table = tables.TABLES["headlines"]
    assert all(f"| {model} |" in table() for model in EXPECTED)
