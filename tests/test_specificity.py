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
        table = {"benchmark": name, "row": range(N), "score": score, "prompt": "?"}
        parts.append(pd.DataFrame(table | {"references": "x", "medium": np.arange(N) // 2}))
    return pd.concat(parts, ignore_index=True)


BEFORE = answers({"sees": 0.9, "hears": 0.8, "reads": 0.65})
NEITHER = answers({"sees": 0.45, "hears": 0.5, "reads": 0.45}, 1)


def test_shares_of_what_is_above_chance():
    table = crossing(BEFORE, {"a": BEFORE, "b": NEITHER}, CHANCES).set_index(
        ["silenced", "benchmark"]
    )
    assert (table.loc["a", "lost"] == 0).all()
    assert table.loc["b", "lost"].to_dict() == pytest.approx(
        {"sees": 0.45 / 0.9, "hears": 0.3 / 0.6, "reads": 0.2 / 0.4}
    )
    assert ((table["low"] < table["lost"]) & (table["lost"] < table["high"])).all()
    assert (table["high"] - table["low"]).max() < 0.5


def test_the_interaction_by_hand():
    own = answers({"sees": 0.0, "hears": 0.8, "reads": 0.65}, 2)  # takes all of `sees` alone
    other = answers({"sees": 0.9, "hears": 0.2, "reads": 0.25}, 3)  # takes all of the others
    assert interaction(BEFORE, own, other, ["sees"], CHANCES).mean == pytest.approx(2)
    assert interaction(BEFORE, other, own, ["sees"], CHANCES).mean == pytest.approx(-2)
    assert interaction(BEFORE, other, own, ["hears", "reads"], CHANCES).mean == pytest.approx(2)
    found = interaction(BEFORE, NEITHER, own, ["sees"], CHANCES)
    assert found.mean == pytest.approx((0.5 - 1) - (0.5 - 0))
    same = interaction(BEFORE, NEITHER, NEITHER, ["sees"], CHANCES)
    assert same.mean == 0 and same.low < 0 < same.high


def test_what_costs_everything_alike_has_none():
    """A set that costs twice as much everywhere is important, and not specific."""
    more = answers({"sees": 0.0, "hears": 0.2, "reads": 0.25}, 4)
    found = interaction(BEFORE, more, NEITHER, ["sees"], CHANCES)
    assert found.mean == pytest.approx(0, abs=1e-12) and found.low > -0.3 and found.high < 0.3


@pytest.mark.slow
def test_intervals_hold_the_truth_in_nineteen_of_twenty():
    """Of rows about one medium that go together; the truth is 0.3 more on one benchmark alone."""
    rng, held, n = np.random.default_rng(0), [], 150
    for _ in range(n):
        tables = []
        for drop in ({"sees": 0.0, "hears": 0, "reads": 0}, {"sees": 0.5}, {"sees": 0.2}):
            score = {k: np.repeat(rng.random(30), 2) < 0.9 - drop.get(k, 0) for k in BENCHMARKS}
            parts = {"score": np.concatenate([*score.values()]).astype(float)}
            about = {"benchmark": np.repeat(BENCHMARKS, 60), "row": np.tile(range(60), 3)}
            tables.append(pd.DataFrame(about | parts | {"medium": np.tile(range(60), 3) // 2}))
        found = interaction(*tables, ["sees"], dict.fromkeys(BENCHMARKS, 0.0))
        held.append(found.low <= 0.3 / 0.9 <= found.high)
    assert 0.91 <= np.mean(held) <= 0.99


def test_in_nats_of_pairs():
    told = pd.DataFrame(
        {
            "neurons": np.repeat(range(4), 3),
            "benchmark": BENCHMARKS * 4,
            "logprob": [-5, -1, -1, -2, -3, -2, -1, -1, -1, -1, -1, -1.0],
        }
    )
    assert interactions(told, ["sees"]).tolist() == [3 - (-2 + -1) / 2, 0]


def test_what_cannot_be_asked_is_named():
    flat = answers({"sees": 0.9, "hears": 0.2, "reads": 0.65})
    with pytest.raises(ValueError, match="hears: the score as it is is not above chance"):
        crossing(flat, {"a": NEITHER}, CHANCES)
    for where in (["smells"], list(BENCHMARKS)):
        with pytest.raises(ValueError, match="must hold some of the benchmarks"):
            interaction(BEFORE, NEITHER, NEITHER, where, CHANCES)
