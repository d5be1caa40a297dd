"""The rules under simulation: intervals cover, verdicts keep their level and find what is there."""

from __future__ import annotations

import numpy as np
import pytest

from minerlib import inference, simulated

N = 200
ERROR = 3 * np.sqrt(0.05 * 0.95 / N)  # of the simulation itself


@pytest.fixture(scope="module")
def covered():
    return simulated.coverage([0.5, 0.9, 0.98], [24, 96], n=N)


def test_intervals_hold_the_truth(covered):
    assert (covered["covered"] >= 0.93 - ERROR).all()
    assert covered["covered"].mean() >= 0.93


def test_and_are_not_needlessly_wide(covered):
    assert (covered[covered["rows"] == 96]["covered"] <= 0.99 + ERROR / 2).all()
    wide = covered.pivot(index=["mean", "of"], columns="rows", values="half")
    assert (wide[24] / wide[96]).between(1.6, 2.6).all()  # about the root of four


def test_headlines_are_within_five_points(covered):
    """At 96 rows of four benchmarks; less where scores are near one."""
    average = covered[(covered["rows"] == 96) & (covered["of"] == "average")].set_index("mean")
    assert average.loc[0.5, "half"] < 0.065 and average.loc[0.9, "half"] < 0.05


@pytest.fixture(scope="module")
def told():
    smallest = inference.claim("I").smallest
    effects = [0, smallest, 2 * smallest]
    return {rows: simulated.outcomes(effects, rows, smallest, n=N) for rows in (24, 96)}


@pytest.mark.parametrize("rows", [24, 96])
def test_definite_verdicts_at_the_smallest_effect_are_rare(told, rows):
    line = told[rows].iloc[1]
    assert line["holds"] <= 0.05 + ERROR and line["does not hold"] <= 0.05 + ERROR


@pytest.mark.parametrize("rows", [24, 96])
def test_planted_effects_of_twice_the_smallest_are_found(told, rows):
    line = told[rows].iloc[2]
    assert line["holds"] >= 0.8 and line["does not hold"] == 0


def test_no_effect_is_said_to_be_none(told):
    assert (told[96].iloc[0][["holds", "does not hold"]].tolist()) == [0, 1]


def test_answers_about_one_medium_are_alike():
    rng = np.random.default_rng(0)
    about = np.repeat(np.arange(4000), 2)
    x = simulated.answers(rng, about, 0.7).reshape(-1, 2)
    assert x.mean() == pytest.approx(0.7, abs=0.02)
    assert np.corrcoef(x.T)[0, 1] == pytest.approx(simulated.CORRELATION, abs=0.05)
    sizes = np.bincount(simulated.media(rng, 999))
    assert sizes[:-1].min() == 1 and sizes.max() == 3 and sizes.sum() == 999
