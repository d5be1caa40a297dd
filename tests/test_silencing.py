"""Finding I's tables, with a made model whose answers follow from which neurons are silenced."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from minerlib.findings import silencing
from minerlib.inference import FAILS, HOLDS
from minerlib.selection import unique

LAYERS, NEURONS, ROWS = 4, 50, 20
CRITICAL = np.zeros((LAYERS, NEURONS), bool)
CRITICAL[1, :10] = True  # what the answers need


def neurons(mask, modality: str = "text") -> xr.DataArray:
    dims = ("modality", "layer", "neuron")
    return xr.DataArray(mask[None], {"modality": [modality], "layer": range(LAYERS)}, dims)


def answers(silenced=None, mode="zero", constants=None) -> pd.DataFrame:
    """A picture row fails for each critical neuron silenced; text rows are always right."""
    lost = 0 if silenced is None else int((silenced.any("modality").values & CRITICAL).sum())
    lost = {"zero": lost, "mean": lost // 2, "min": 2 * lost}[mode]
    table = pd.DataFrame({"benchmark": np.repeat(["pictures", "questions"], ROWS), "score": 1.0})
    table["row"] = np.tile(np.arange(ROWS), 2)
    table.loc[: lost - 1, "score"] = 0.0
    return table.assign(answer="", references=[("x",)] * len(table))


HARMLESS = np.zeros_like(CRITICAL)
HARMLESS[3, :10] = True
PICKED = {"harmless": neurons(HARMLESS), "critical": neurons(CRITICAL), "random": neurons(HARMLESS)}


@pytest.fixture(scope="module")
def found():
    return silencing.strategies(answers, PICKED, "harmless", draws=12, seed=3)


def test_the_average_is_over_benchmarks():
    assert silencing.average(answers(PICKED["critical"]))["mean"] == 0.75
    one = answers(PICKED["critical"]).query("benchmark == 'pictures'")
    assert silencing.average(one)["mean"] == 0.5


def test_conditions_count_each_neuron_once():
    twice = xr.concat([neurons(CRITICAL, "a"), neurons(CRITICAL, "b")], "modality")
    (line,) = silencing.conditions(answers, {"twice": twice}, "name").to_dict("records")
    assert (line["name"], line["neurons"], line["share"], line["mean"]) == ("twice", 10, 0.05, 0.75)
    assert line["low"] < 0.75 < line["high"]


def test_strategies_beside_their_nulls(found):
    table, null, best = found
    assert best == "critical"
    assert table["condition"].tolist() == [
        "as it is",
        "harmless",
        "critical",
        "random, as many as critical",
        "random, as many as critical, same layers",
        "random, as many as harmless",
        "random, as many as harmless, same layers",
        "random, whole budget",
    ]
    at = table.set_index("condition")
    assert at.loc["as it is", "mean"] == 1 and at.loc["critical", "mean"] == 0.75
    assert at["neurons"].drop("as it is").eq(10).all() and at["share"].iloc[1:].eq(0.05).all()
    for name, kind in (("critical", "any layer"), ("critical", "same layers")):
        draws = null[(null["strategy"] == name) & (null["null"] == kind)]["mean"]
        where = "" if kind == "any layer" else ", same layers"
        line = at.loc[f"random, as many as {name}{where}"]
        assert len(draws) == 12 and line["mean"] == pytest.approx(draws.mean())
        assert [line["low"], line["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_draws_are_matched_seeded_and_kept_in_their_layers():
    seen = []

    def spy(silenced):
        seen.append(silenced)
        return answers(silenced)

    silencing.random_draws(spy, PICKED["critical"], draws=3, seed=5)
    assert [unique(s) for s in seen] == [10] * 6
    assert all((s.values[0].sum(1) == CRITICAL.sum(1)).all() for s in seen[3:])
    assert [s.attrs["seed"] for s in seen] == [5, 6, 7] * 2
    assert not np.array_equal(seen[0], seen[1])
    # In the critical layer a draw hits a fifth of the critical ones on average, elsewhere fewer.
    table = silencing.random_draws(answers, PICKED["critical"], draws=30)
    means = table.groupby("null")["mean"].mean()
    assert means["same layers"] == pytest.approx(1 - 2 / 40, abs=0.02)
    assert means["same layers"] < means["any layer"]


def test_the_null_is_no_default_strategy():
    with pytest.raises(ValueError, match="strategy='random'.*use one of .*critical"):
        silencing.strategies(answers, PICKED, "random")


def test_claims_follow_from_the_draws(found):
    table, null, _ = found
    changes = pd.DataFrame(
        [
            {"strategy": s, "benchmark": b, "difference": d, "low": d - 0.1, "high": d + 0.1}
            for s, d in (("critical", -0.25), ("harmless", 0.0))
            for b in ("pictures", "average")
        ]
    )
    claims = silencing.claims(table, changes, null)
    assert claims["strategy"].tolist() == ["critical"] * 2 + ["harmless"] * 2
    assert [v.startswith(HOLDS) for v in claims["verdict"]] == [True, True, False, False]
    assert claims["verdict"].iloc[-1].startswith(FAILS)
    line = claims.iloc[0]
    assert line["before"] == "1.00 [1.00, 1.00]" and line["after"].startswith("0.75 [")
    assert line["change"] == "-0.25 [-0.35, -0.15]" and line["neurons"] == 10
    assert line["measured"] == f"{line['before']} to {line['after']}, change {line['change']}"
    assert line["null"] == line["random draws"] and float(line["p"]) == pytest.approx(
        1 / 13, abs=0.01
    )
    assert float(claims["p"].iloc[-1]) == 1
    assert list(claims.columns[:6]) == ["finding", "claim", "measured", "null", "p", "verdict"]
    assert not claims["claim"].str.contains(r"\d").any()  # so that models' lines meet


def test_doses_and_the_breaking_point():
    def upto(n):
        mask = np.zeros_like(CRITICAL)
        mask[1, :n] = True
        return neurons(mask)

    picked = {0.01: upto(2), 0.02: upto(4), 0.05: upto(10)}
    doses = silencing.doses(answers, picked, seed=1)
    own = doses[doses["what"] == "selected"].set_index("ratio")["mean"]
    assert own.to_dict() == pytest.approx({0.01: 0.95, 0.02: 0.9, 0.05: 0.75})
    same = doses.pivot(index="ratio", columns="what", values="neurons")
    assert (same["selected"] == same["random"]).all()
    points = silencing.breaking_points(doses, 1.0, lost=0.1)
    assert points["selected"] == 0.02 and np.isnan(points["random"])
    assert silencing.breaking_points(doses, 1.0)["selected"] == 0.05
    assert min(silencing.REVIEWERS_RATIOS) == 0.005 and max(silencing.REVIEWERS_RATIOS) == 0.05


def test_each_constant():
    table = silencing.constants(answers, PICKED["critical"], xr.DataArray(0))
    assert dict(zip(table["constant"], table["mean"], strict=True)) == pytest.approx(
        {"zero": 0.75, "mean": 0.875, "min": 0.5}
    )


def test_specificity_crosses_modalities_and_benchmarks():
    alone = {"image": neurons(CRITICAL, "image"), "text": neurons(HARMLESS, "text")}
    table = silencing.specificity(answers, alone)
    own = table[table["what"] == "selected"]
    matrix = own.pivot(index="silenced", columns="benchmark", values="difference")
    assert matrix.loc["image"].to_dict() == {"pictures": -0.5, "questions": 0}
    assert (matrix.loc["text"] == 0).all() and "average" not in matrix
    assert len(table) == 8 and (table["low"] <= table["difference"]).all()
    media = {"pictures": "image", "questions": "text"}
    (line,) = silencing.by_medium(table, media).to_dict("records")
    assert line == {"silenced": "image", "with": 0.5, "without": 0, "specific": 0.5}
    everywhere = silencing.by_medium(table, dict.fromkeys(media, "image"))
    assert everywhere["with"].tolist() == [0.25] and everywhere["without"].isna().all()
    assert silencing.by_medium(table, dict.fromkeys(media, "text")).empty


def test_where_no_strategy_is_clearly_worse_the_default_counts_as_the_most_damaging():
    """Else one answer, which another processor may round to the other side, would name it."""

    def nearly(which=None):
        table = answers(None)
        worse = which is not None and which.values[0].sum() and (which.values == CRITICAL).all()
        table.loc[:0, "score"] = 0.9 if worse else 1.0
        return table

    table, null, best = silencing.strategies(nearly, PICKED, "harmless", draws=2)
    means = table.set_index("condition")["mean"]
    assert 0 < means["harmless"] - means["critical"] <= silencing.inference.TOLERANCE
    assert best == "harmless" and set(null["strategy"]) == {"harmless"}
