"""Whose neurons are needed for what, on answers whose truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from minerlib.findings.specificity import crossing, interaction, interactions

BENCHMARKS = ("sees", "hears", "reads")
CHANCES = {"sees": 0.0, "hears": 0.2, "reads": 0.25}
N = 200


def answers(right: dict[str, float], seed: int = 0) -> pd.DataFrame:
    """Scores of 0 and 1, as many right as said, two rows about each medium."""
    rng = np.random.default_rng(seed)
    parts = []
    for name in BENCHMARKS:
        score = (np.arange(N) < right[name] * N).astype(float)
        rng.shuffle(score)
        table = {
            "benchmark": name,
            "row": range(N),
            "score": score,
            "prompt": "?",
            "chance": CHANCES[name],
        }
        parts.append(pd.DataFrame(table | {"references": "x", "medium": np.arange(N) // 2}))
    return pd.concat(parts, ignore_index=True)


BEFORE = answers({"sees": 0.9, "hears": 0.8, "reads": 0.65})
NEITHER = answers({"sees": 0.45, "hears": 0.5, "reads": 0.45}, 1)


def test_shares_of_what_is_above_chance():
    table = crossing(BEFORE, {"a": BEFORE, "b": NEITHER}).set_index(["silenced", "benchmark"])
    assert (table.loc["a", "lost"] == 0).all()
    assert table.loc["b", "lost"].to_dict() == pytest.approx(
        {"sees": 0.45 / 0.9, "hears": 0.3 / 0.6, "reads": 0.2 / 0.4}
    )
    assert ((table["low"] < table["lost"]) & (table["lost"] < table["high"])).all()
    assert (table["high"] - table["low"]).max() < 0.5


def test_the_interaction_by_hand():
    own = answers({"sees": 0.0, "hears": 0.8, "reads": 0.65}, 2)  # takes all of `sees` alone
    other = answers({"sees": 0.9, "hears": 0.2, "reads": 0.25}, 3)  # takes all of the others
    assert interaction(BEFORE, own, other, ["sees"]).mean == pytest.approx(2)
    assert interaction(BEFORE, other, own, ["sees"]).mean == pytest.approx(-2)
    assert interaction(BEFORE, other, own, ["hears", "reads"]).mean == pytest.approx(2)
    found = interaction(BEFORE, NEITHER, own, ["sees"])
    assert found.mean == pytest.approx((0.5 - 1) - (0.5 - 0))
    same = interaction(BEFORE, NEITHER, NEITHER, ["sees"])
    assert same.mean == 0 and same.low < 0 < same.high


def test_what_costs_everything_alike_has_none():
    """A set that costs twice as much everywhere is important, and not specific."""
    more = answers({"sees": 0.0, "hears": 0.2, "reads": 0.25}, 4)
    found = interaction(BEFORE, more, NEITHER, ["sees"])
    assert found.mean == pytest.approx(0, abs=1e-12) and found.low > -0.3 and found.high < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("score", "guess"), [(0.9, 0.0), (0.65, 0.25)])
def test_intervals_hold_the_truth_in_nineteen_of_twenty(score, guess):
    """Rows about one medium go together; a's neurons cost 0.3 more on one benchmark alone."""
    rng, held = np.random.default_rng(0), []
    for _ in range(150):
        tables = []
        for drop in ({}, {"sees": 0.35}, {"sees": 0.05}):
            right = [np.repeat(rng.random(60), 2) < score - drop.get(k, 0) for k in BENCHMARKS]
            about = {"benchmark": np.repeat(BENCHMARKS, 120), "row": np.tile(range(120), 3)}
            about |= {"medium": np.tile(range(120), 3) // 2, "chance": guess}
            tables.append(pd.DataFrame(about | {"score": np.concatenate(right).astype(float)}))
        found = interaction(*tables, ["sees"])
        held.append(found.low <= 0.3 / (score - guess) <= found.high)
    assert 0.91 <= np.mean(held) <= 0.995


def test_in_nats_of_pairs():
    told = pd.DataFrame(
        {
            "neurons": np.repeat(range(4), 3),
            "benchmark": BENCHMARKS * 4,
            "logprob": [-5, -1, -1, -2, -3, -2, -1, -1, -1, -1, -1, -1.0],
        }
    )
    assert interactions(told, ["sees"]).tolist() == [3 - (-2 + -1) / 2, 0]
    with pytest.raises(ValueError, match="3 sets of neurons are no pairs"):
        interactions(told[told["neurons"] < 3], ["sees"])


def test_what_cannot_be_asked_is_named():
    flat = answers({"sees": 0.9, "hears": 0.2, "reads": 0.65})
    with pytest.raises(ValueError, match="hears: the score as it is is not surely above chance"):
        crossing(flat, {"a": NEITHER})
    for where in (["smells"], ["sees", "haers"], list(BENCHMARKS), []):
        with pytest.raises(ValueError, match="must be some of the benchmarks"):
            interaction(BEFORE, NEITHER, NEITHER, where)
