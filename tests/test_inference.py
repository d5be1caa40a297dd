"""Intervals, nulls and verdicts: exact answers, coverage, level, and each rule at its boundary."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from minerlib import inference
from minerlib.inference import FAILS, HOLDS, UNKNOWN, Verdict

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("steady")

RNG = np.random.default_rng
shares = st.floats(-1, 1)


# --- intervals -----------------------------------------------------------------------------------


def test_middle95_by_hand():
    low, high = inference.middle95(np.column_stack([np.arange(1001), -np.arange(1001)]))
    assert low.tolist() == [25, -975] and high.tolist() == [975, -25]
    assert inference.middle95([np.nan, *range(201)]) == (5, 195)
    assert np.isnan(inference.middle95([np.nan, np.nan])).all()
    with pytest.raises(ValueError, match="no draws"):
        inference.middle95([])


def test_resamples_are_drawn_with_replacement():
    counts = inference.resamples(5, 4000)
    assert counts.shape == (4000, 5) and (counts.sum(1) == 5).all()
    assert counts.mean(0) == pytest.approx(1, abs=0.05)
    assert counts.var(0) == pytest.approx(1 - 1 / 5, abs=0.06)  # multinomial
    assert not np.array_equal(counts, inference.resamples(5, 4000, 1))
    with pytest.raises(ValueError, match="read-only"):
        counts[0, 0] = 7
    with pytest.raises(ValueError, match="nothing to resample"):
        inference.resamples(0, 10)


@pytest.mark.parametrize("ones, n", [(12, 40), (35, 50), (3, 7)])
def test_intervals_of_shares_are_binomial(ones, n):
    """Resampled shares are binomial, so the ends are known exactly, in every column and API."""
    values = np.arange(n) < ones
    exact = scipy.stats.binom(n, ones / n).ppf([0.025, 0.975]) / n
    mean, low, high = inference.interval(np.column_stack([values, ~values]), n=20_000)
    assert (low[0], high[0]) == pytest.approx(exact) == (1 - high[1], 1 - low[1])
    assert mean == pytest.approx([ones / n, 1 - ones / n])
    assert inference.bootstrap(values, n=20_000) == pytest.approx((ones / n, *exact))


def test_bootstrap_agrees_with_scipy():
    values = RNG(0).normal(0.4, 1, 200).clip(0, 1)
    ours = inference.bootstrap(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    assert ours.mean == values.mean()
    assert ours == inference.bootstrap(values) != inference.bootstrap(values, seed=1)


def test_intervals_cover_the_truth():
    """Of 2,000 true means 93 to 97 % lie inside."""
    _, low, high = inference.interval(RNG(8).normal(3, 2, (80, 2000)), n=500)
    assert 0.93 < ((low <= 3) & (high >= 3)).mean() < 0.97
    inside = 0
    for i in range(150):  # two benchmarks of different size and spread, means 0.2 and 0.6
        rng = RNG(i)
        rows = {"a": rng.normal(0.2, 1, 60), "b": rng.normal(0.6, 0.5, 90)}
        _, low, high = inference.bootstrap(rows, n=400, seed=i)
        inside += low <= 0.4 <= high
    assert 0.92 < inside / 150 < 0.98


def test_benchmarks_weigh_alike_and_are_resampled_apart():
    assert inference.bootstrap({"a": [1.0] * 90, "b": [0.0] * 10}) == (0.5, 0.5, 0.5)
    values = RNG(2).normal(size=100)
    one, two = inference.bootstrap(values), inference.bootstrap({"a": values, "b": values})
    width = (two.high - two.low) / (one.high - one.low)
    assert width == pytest.approx(0.5**0.5, abs=0.03)
    many = inference.bootstrap(RNG(3).normal(size=4000), n=600)  # more than fits one matrix
    assert many.high - many.low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.1)
    for empty in ({}, [], {"a": [1.0], "b": []}):
        with pytest.raises(ValueError, match="nothing to resample"):
            inference.bootstrap(empty)


def test_intervals_and_missing_values():
    values = RNG(0).standard_normal((50, 2, 2))
    values[20:, 0, 0] = np.nan
    values[:, 1, 1] = np.nan
    mean, low, high = inference.interval(values)
    assert mean.shape == low.shape == high.shape == (2, 2)
    assert mean[0, 0] == pytest.approx(values[:20, 0, 0].mean())
    expected = inference.bootstrap(values[:20, 0, 0])
    assert (low[0, 0], high[0, 0]) == pytest.approx(expected[1:], abs=0.1)
    assert mean[0, 1] == pytest.approx(values[:, 0, 1].mean())
    assert np.isnan([mean[1, 1], low[1, 1], high[1, 1]]).all()
    assert np.isnan(inference.bootstrap([1.0, np.nan])).all()  # a score is never left out
    with pytest.raises(ValueError, match="nothing to resample"):
        inference.interval(np.zeros((0, 3)))


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=12))
def test_a_paired_interval_is_the_interval_of_differences(pairs):
    a, b = np.array(pairs).T
    found = inference.paired_bootstrap(a, b, n=100)
    assert found == inference.bootstrap(b - a, n=100)
    assert found == inference.paired_bootstrap({"x": a}, {"x": b}, n=100)
    assert (b - a).min() - 1e-12 <= found.low <= found.high <= (b - a).max() + 1e-12


def test_paired_intervals_need_pairs():
    rng = RNG(0)
    a = rng.random(200)
    change = inference.paired_bootstrap(a, a - 0.1)
    assert change == pytest.approx((-0.1,) * 3)
    noisy = inference.paired_bootstrap(a, rng.random(200))
    assert noisy.high - noisy.low > 0.05
    with pytest.raises(ValueError, match="same benchmarks and rows"):
        inference.paired_bootstrap([1.0], [1.0, 2.0])
    for b in ({"b": [1.0]}, [1.0]):
        with pytest.raises(ValueError, match="same benchmarks"):
            inference.paired_bootstrap({"a": [1.0]}, b)


def test_means_over_samples_of_paired_conditions():
    before = pd.DataFrame(
        {"sample": [0, 0, 1, 1], "layer": [0, 1] * 2, "set": "text", "v": [1.0] * 4}
    )
    after = before.assign(v=[2.0, 1, 4, 1])
    change = inference.paired(before, after.sample(frac=1, random_state=0), "v")
    table = inference.mean_over_samples(change, "v")
    assert table["v"].tolist() == [2, 0] and table["n"].tolist() == [2, 2]
    assert table["layer"].tolist() == [0, 1]
    assert (table.loc[0, "low"], table.loc[0, "high"]) == (1, 3)
    with pytest.raises(ValueError, match="same samples"):
        inference.paired(before, after.iloc[:2], "v")
    with pytest.raises(ValueError, match="same samples"):
        inference.paired(before.iloc[:2], after, "v")


# --- nulls ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=20))
def test_shuffles_keep_each_groups_labels(tokens):
    labels, groups = np.array(tokens).T
    shuffled = inference.shuffles(labels, groups, 5)
    assert shuffled.shape == (6, len(labels)) and (shuffled[0] == labels).all()
    for group in np.unique(groups):
        kept = np.sort(shuffled[:, groups == group])
        assert (kept == np.sort(labels[groups == group])).all()


def test_shuffles_shuffle():
    labels, groups = np.array([1, 0, 0, 1, 1, 0, 0]), np.array([5, 5, 2, 2, 5, 2, 9])
    shuffled = inference.shuffles(labels, groups, 600)
    for group in (5, 2):  # each token is equally likely to carry each label
        share = shuffled[1:, groups == group].mean(0)
        assert share == pytest.approx(labels[groups == group].mean(), abs=0.06)
    assert len(np.unique(shuffled, axis=0)) == 9  # 3 orders in each of two groups
    assert (inference.shuffles(labels, groups, 600) == shuffled).all()
    assert (inference.shuffles(labels, groups, 600, seed=1) != shuffled).any()


def test_rank_p_by_hand():
    draws = [-3, 1, 2, 2, 4]
    for value, tail, p in [
        (2, "greater", 4 / 6),  # a draw as large counts
        (2, "less", 5 / 6),
        (5, "greater", 1 / 6),
        (-4, "less", 1 / 6),
        (-2.5, "two-sided", 3 / 6),
        (3, "two-sided", 3 / 6),
        (0, "two-sided", 1),
        (2 + 1e-13, "greater", 4 / 6),  # as large but for rounding
        (2 - 1e-13, "less", 5 / 6),
        (2 + 1e-9, "greater", 2 / 6),
    ]:
        assert inference.rank_p(value, draws, tail) == pytest.approx(p), (value, tail)
    assert np.isnan(inference.rank_p(np.nan, draws, "less"))
    assert np.isnan(inference.rank_p(1, [1, np.nan], "greater"))
    with pytest.raises(ValueError, match="no draws"):
        inference.rank_p(1, [], "greater")
    with pytest.raises(ValueError, match="'up'.*two-sided"):
        inference.rank_p(1, draws, "up")


@given(st.lists(shares, min_size=1, max_size=30), shares, shares)
def test_rank_p_is_monotone(draws, a, b):
    a, b = sorted((a, b))
    for tail, sign in (("greater", 1), ("less", -1)):
        p = [inference.rank_p(v, draws, tail) for v in (a, b)]
        assert sign * p[0] >= sign * p[1] and 1 / (len(draws) + 1) <= min(p) and max(p) <= 1
    two = [inference.rank_p(v, draws, "two-sided") for v in (a, -a, b)]
    assert two[0] == two[1] and (two[0] >= two[2]) == (abs(a) <= abs(b) or two[0] == two[2])


@pytest.mark.parametrize("tail", ["less", "greater", "two-sided"])
def test_p_is_uniform_under_the_null(tail):
    rng = RNG(4)
    p = [inference.rank_p(x[0], x[1:], tail) for x in rng.normal(size=(2000, 100))]
    assert np.mean(np.array(p) <= 0.05) < 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5
    spread = p - rng.random(2000) / 100  # each step of 1/100 filled evenly
    assert scipy.stats.kstest(spread, "uniform").pvalue > 0.01


def test_table_rows():
    draws, null = np.arange(1001), np.arange(201)
    row = inference.table_row("x", 190, draws, null)
    assert (row["low"], row["high"], row["null_low"], row["null_high"]) == (25, 975, 5, 195)
    assert (row["measure"], row["value"], row["null"]) == ("x", 190, 100)
    for greater, p in ((True, 12 / 202), (False, 192 / 202)):
        assert inference.table_row("x", 190, draws, null, greater=greater)["p"] == pytest.approx(p)


def test_resampling_is_by_sample():
    tokens = pd.DataFrame({"sample": [7, 7, 3, 3, 3], "kind": ["a", "b", "a", "b", "b"]})
    r = inference.Resampling(tokens, "b", 50, 20, 0)
    assert r.size == 2 and r.own.tolist() == [False, True, False, True, True]
    assert r.draws.shape == (50, 2) and r.token_draws.shape == (50, 5)
    assert (r.token_draws[:, 0] == r.token_draws[:, 1]).all()  # tokens go with their sample
    values = np.array([[1.0, 3, 10, 20, 60]])
    assert r.by_sample(values).tolist() == [[30, 2]]
    assert r.by_sample(values, r.own).tolist() == [[40, 3]]
    assert np.isnan(r.by_sample(values, np.array([1, 1, 0, 0, 0], bool))).tolist() == [
        [True, False]
    ]
    row = inference.table_row("x", *r.means(r.second * values, r.second))
    assert row["value"] == (40 + 3) / 2 and (row["low"], row["high"]) == (3, 40)
    assert row["p"] == inference.rank_p(
        21.5, np.nanmean(r.by_sample(r.second * values, r.second), 1)[1:], "greater"
    )


# --- verdicts ------------------------------------------------------------------------------------


def test_a_verdict_says_when_it_is_close():
    assert str(Verdict(HOLDS, 1.0)) == "holds" and str(Verdict(FAILS, np.inf)) == "does not hold"
    assert str(Verdict(UNKNOWN, 0.99)) == "cannot be told (close)"


@pytest.mark.parametrize(
    "low, high, bound, greater, word, margin",
    [
        (0.3, 0.5, 0.2, True, HOLDS, 5),
        (0.2, 0.5, 0.2, True, UNKNOWN, 0),  # on the bound is not beyond it
        (0.1, 0.2, 0.2, True, FAILS, 0),
        (0.1, 0.24, 0.2, True, UNKNOWN, 2),
        (0.1, 0.16, 0.2, True, FAILS, 2),
        (0.1, 0.19, 0.2, False, HOLDS, 0.5),
        (0.1, 0.2, 0.2, False, UNKNOWN, 0),
        (0.2, 0.3, 0.2, False, FAILS, 0),
        (0.3, 0.4, 0.2, False, FAILS, 5),
        (1010, 1030, 1000, True, HOLDS, 10 / 20.2),  # 2 % of a number above 1
        (-1030, -1010, -1000, True, FAILS, 10 / 20.2),
        (np.nan, np.nan, 0, True, UNKNOWN, np.inf),
    ],
)
def test_beyond_a_bound(low, high, bound, greater, word, margin):
    verdict = inference.beyond(low, high, bound, greater=greater)
    assert verdict.word == word and verdict.margin == pytest.approx(margin)


@pytest.mark.parametrize(
    "value, low, high, word, margin",
    [
        (0.5, 0.3, 0.7, HOLDS, 5),
        (-0.5, -0.7, -0.3, HOLDS, 5),
        (0.5, 0.2, 0.7, UNKNOWN, 0),  # the interval touches the draws' range
        (-0.5, -0.7, -0.2, UNKNOWN, 0),
        (0.5, 0.1, 0.7, UNKNOWN, 5),
        (0.1, 0.0, 0.3, FAILS, 5),
        (-0.19, -0.3, 0.0, FAILS, 0.5),
        (0.2, 0.0, 0.3, FAILS, 0),  # a draw changed as much
        (-0.2, -0.3, 0.0, FAILS, 0),
        (0.1, -0.3, 0.3, UNKNOWN, 5),  # the interval spans all draws
        (0.1, -0.2, 0.3, FAILS, 0),
        (0.1, -0.3, 0.2, FAILS, 0),
        (np.nan, 0.3, 0.7, UNKNOWN, np.inf),
        (0.5, np.nan, 0.7, UNKNOWN, np.inf),
    ],
)
def test_a_change_against_draws(value, low, high, word, margin):
    draws = [0.2, -0.1, np.nan, -0.2]
    verdict = inference.change_against_draws(value, low, high, draws)
    assert verdict.word == word and verdict.margin == pytest.approx(margin)
    looser = inference.change_against_draws(value, low, high, draws, n=8, tolerance=0.04)
    assert looser == (word, pytest.approx(margin / 2))
    few = inference.change_against_draws(value, low, high, draws, n=7)
    assert few.word == UNKNOWN and str(few) == UNKNOWN
    none = inference.change_against_draws(value, low, high, [np.nan])
    assert none.word == UNKNOWN
    with pytest.raises(ValueError, match="no draws"):
        inference.change_against_draws(value, low, high, [])


def test_a_claim_by_p():
    assert inference.by_p(0.05) == (HOLDS, pytest.approx(0))
    assert inference.by_p(0.04) == (HOLDS, pytest.approx(2))
    assert inference.by_p(0.051) == (FAILS, pytest.approx(0.2))
    assert inference.by_p(0.01, level=0.005).word == FAILS
    assert inference.by_p(np.nan).word == UNKNOWN


def layers(low, high, null_high=0.5, p=0.001) -> pd.DataFrame:
    low, high, null_high = np.array(low), np.array(high), np.array(null_high)
    table = pd.DataFrame({"layer": np.arange(1, len(low) + 1), "low": low, "high": high, "p": p})
    return table.assign(value=(low + high) / 2, null_low=null_high - 0.2, null_high=null_high)


def test_over_layers_takes_half_of_them():
    for low, high, word, yes in [
        ([0.6, 0.7, 0.4, 0.2], [0.9, 0.9, 0.6, 0.3], HOLDS, 2),
        ([0.6, 0.5, 0.4, 0.2], [0.9, 0.9, 0.6, 0.3], UNKNOWN, 1),  # low on the bound says nothing
        ([0.6, 0.1, 0.4, 0.2], [0.9, 0.5, 0.5, 0.3], FAILS, 1),  # high on the bound says no
        ([0.6, 0.1, 0.4, 0.2], [0.9, 0.5, 0.51, 0.3], UNKNOWN, 1),
        ([0.6, 0.1, 0.7], [0.9, 0.2, 0.8], HOLDS, 2),
        ([0.6, 0.1, 0.4], [0.9, 0.2, 0.8], UNKNOWN, 1),
        ([0.6, 0.1, 0.2], [0.9, 0.2, 0.3], FAILS, 1),  # half of three is two
        ([np.nan] * 2, [np.nan] * 2, UNKNOWN, 0),
    ]:
        table = layers(low, high)
        found = inference.over_layers(table)
        assert (found.verdict.word, found.yes.sum()) == (word, yes)
        fixed = inference.over_layers(table.rename(columns={"value": "v"}), 0.5, value="v")
        assert fixed.verdict == found.verdict
        turned = layers(1 - np.array(high), 1 - np.array(low), 0.7)
        down = inference.over_layers(turned, greater=False)  # null_low is 0.5
        assert down.verdict == pytest.approx(found.verdict, nan_ok=True) or (
            down.verdict.word == word
        )
        assert (down.yes == found.yes).all()


def test_over_layers_counts_and_picks():
    table = layers([0.6, 0.7, 0.55, 0.2], [0.9, 0.8, 1.0, 0.3], [0.5, 0.5, 0.2, 0.1])
    found = inference.over_layers(table, need=3)
    assert found.yes.tolist() == [True, True, True, True]
    assert found.line["layer"] == 3  # furthest beyond its own bound, not the largest value
    found = inference.over_layers(table, np.array([0.5, 0.75, 0.5, 0.5]), need=2)
    assert found.yes.tolist() == [True, False, True, False]
    assert inference.over_layers(table, 0.5, need=4).verdict.word == FAILS
    assert inference.over_layers(table, 0.5, need=3).verdict == (HOLDS, pytest.approx(2.5))
    for need in (0, 5):
        with pytest.raises(ValueError, match=f"need={need} of 4"):
            inference.over_layers(table, need=need)
    with pytest.raises(ValueError, match="of 0 layers"):
        inference.over_layers(table.iloc[:0])


def test_a_claim_over_layers():
    found = inference.over_layers(layers([0.6, 0.1], [0.8, 0.3]).assign(null=0.4))
    line = found.claim("far out")
    assert line == {
        "claim": "far out",
        "measured": "0.70 [0.60, 0.80] at layer 1; yes at 1 of 2",
        "null": "0.40 [0.30, 0.50]",
        "p": 0.001,
        "verdict": found.verdict,
    }
    bounded = inference.over_layers(layers([3], [5]).drop(columns="p"), 2, value="high")
    line = bounded.claim("a sink", "sink from 2", "high")
    assert line["measured"].startswith("5.00 [3.00, 5.00]") and line["null"] == "sink from 2"
    assert line["p"] is None


def test_over_layers_corrected_for_their_number():
    low, high = [0.6, 0.7, 0.8, 0.9], [0.8, 0.9, 1.0, 1.0]
    for p, yes in [([0.0125] * 4, 4), ([0.013, 0.0125, 0.05, 1], 1), ([0.013] * 4, 0)]:
        found = inference.over_layers(layers(low, high, p=p), need=1, corrected=True)
        assert found.yes.sum() == yes
        assert found.verdict.word == (HOLDS if yes else UNKNOWN)
    assert inference.over_layers(layers(low, high, p=0.5), need=1).yes.all()
    found = inference.over_layers(layers(low, high, p=[0.01, 0.002, 0.002, 0.01]), corrected=True)
    assert found.line["layer"] == 3  # smallest p first, then furthest beyond
    for p, margin in [(0.05, 0), (0.048, 0.4), (0.001, 5)]:  # tolerances of a tenth of 0.05
        found = inference.over_layers(layers([0.6], [0.8], p=[p]), need=1, corrected=True)
        assert found.verdict == (HOLDS, pytest.approx(margin))


def test_given_a_premise():
    assert inference.given(Verdict(HOLDS, 0.5), Verdict(FAILS, 3)) == (FAILS, 0.5)
    assert inference.given(Verdict(HOLDS, 3), Verdict(UNKNOWN, 0.5)) == (UNKNOWN, 0.5)
    assert inference.given(Verdict(FAILS, 2), Verdict(HOLDS, 0.5)) == (FAILS, 2)


def curve(values, half_width=0.1) -> pd.DataFrame:
    values = np.array(values, float)
    return pd.DataFrame({"value": values, "low": values - half_width, "high": values + half_width})


@pytest.mark.parametrize(
    "values, half, word, layer, nearer",
    [
        ([1, 0.5, 0.2, 0.6], (0.5, 1.4), HOLDS, 2, True),
        ([1, 0.5, 0.2, 0.6], (0.5, 1.5), UNKNOWN, 2, True),  # up to the middle is not below it
        ([1, 0.5, 0.2, 0.6], (1.5, 2.5), FAILS, 2, True),  # from the middle on
        ([1, 0.5, 0.2, 0.6], (1.4, 2.5), UNKNOWN, 2, True),
        ([1, 0.5, 0.2, 0.6], (np.nan, np.nan), UNKNOWN, 2, True),
        ([1, 1.1, 1.2, 1.3], (0.5, 1.4), FAILS, 0, False),  # nearest at the embeddings
        ([1, 1, 1.2, 1.3], (0.5, 1.4), FAILS, 0, False),
        ([1, 0.9, 1.2, 1.3], (0.5, 1.4), UNKNOWN, 1, False),  # nearer, but not clearly
        ([1, 0.75, 1.2, 1.3], (0.5, 1.4), HOLDS, 1, True),
    ],
)
def test_convergence_in_the_lower_layers(values, half, word, layer, nearer):
    for sign in (1, -1):
        found = inference.converged(curve(sign * np.array(values)), half, 1.5, falling=sign > 0)
        assert (found[0].word, *found[1:]) == (word, layer, nearer)


def test_convergence_margins():
    def margin(values, half, middle=1.0):
        return inference.converged(curve(values), half, middle, falling=True)[0].margin

    assert margin([1, 0.5], (0.1, 0.96)) == pytest.approx(2)  # of a half point at the middle
    assert margin([1, 0.79], (0.1, 0.5)) == pytest.approx(0.5)  # of intervals that nearly touch
    assert margin([0.5, 0.51], (0.1, 0.5)) == pytest.approx(0.5)  # of which layer is closest
    assert margin([1, 0.5], (1.0, 1.5)) == pytest.approx(0)
    assert margin([1, 0.5], (0.5, 2.0)) == pytest.approx(25)  # of two ends about the middle
    tied = curve([1, 0.5, 0.5]).assign(high=[1.1, 0.6, 1.0])
    assert inference.converged(tied, (0, 0.5), 1, falling=True)[0].word == HOLDS  # by the first
    touching = pd.DataFrame({"value": [0.75, 0.25], "low": [0.5, 0.0], "high": [1.0, 0.5]})
    assert not inference.converged(touching, (0, 0.5), 1, falling=True)[2]


def test_a_majority_is_more_than_half():
    def whole(*words):
        return inference.majority([Verdict(word, i + 1.0) for i, word in enumerate(words)])

    assert whole(HOLDS, HOLDS, FAILS) == (HOLDS, 1)
    assert whole(HOLDS, FAILS) == (UNKNOWN, 1)
    assert whole(HOLDS, HOLDS, FAILS, UNKNOWN) == (UNKNOWN, 2)  # both that hold could fail
    assert whole(FAILS, FAILS, FAILS) == (FAILS, 2)  # two must change
    assert whole(UNKNOWN, UNKNOWN, HOLDS).word == UNKNOWN
    assert inference.majority([Verdict(FAILS, 0.3)]) == (FAILS, 0.3)
    with pytest.raises(ValueError, match="no verdicts"):
        inference.majority([])


def over(x):
    """A table by layer from numbers: values, intervals and bounds."""
    low, high = np.sort(x[: len(x) // 2].reshape(-1, 2), 1).T
    value, null = x[len(x) // 2 :].reshape(2, -1)
    return pd.DataFrame(
        {"value": value, "low": low, "high": high, "p": 0.001, "null_low": null, "null_high": null}
    )


def each(x):
    return [inference.beyond(*ends, 0) for ends in over(x)[["low", "high"]].values]


RULES = {
    "above": lambda x: inference.beyond(*np.sort(x[:2]), x[2]),
    "below": lambda x: inference.beyond(*np.sort(x[:2]), x[2], greater=False),
    "a point": lambda x: inference.beyond(x[0], x[0], x[1:].min(), greater=False),
    "change": lambda x: inference.change_against_draws(x[0], *np.sort(x[1:3]), x[3:]),
    "one layer": lambda x: inference.over_layers(over(x), need=1, corrected=True).verdict,
    "half": lambda x: inference.over_layers(over(x)).verdict,
    "a bound": lambda x: inference.over_layers(over(x), x[-1], greater=False).verdict,
    "falling": lambda x: inference.converged(over(x), x[2:4], x[-1], falling=True)[0],
    "rising": lambda x: inference.converged(over(x), x[2:4], x[-1], falling=False)[0],
    "majority": lambda x: inference.majority(each(x)),
    "given": lambda x: inference.given(each(x)[0], each(x)[-1]),
}


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), n=st.sampled_from([4, 8, 12, 20]))
def test_no_move_within_the_margin_changes_a_verdict(rule, seed, n):
    """Two numbers that move by less than half of the margin each cannot cross each other."""
    rng = RNG(seed)
    x = rng.uniform(-0.3, 0.3, n).round(rng.integers(1, 4))
    verdict = RULES[rule](x)
    move = min(verdict.margin, 10) * inference.TOLERANCE * 0.49
    move = 0 if move < 1e-9 else move  # on a boundary
    for _ in range(5):
        assert RULES[rule](x + move * rng.choice([-1, 1], n)).word == verdict.word


# --- tables --------------------------------------------------------------------------------------


def test_spread_as_text():
    assert inference.spread(0.98123, 0.955, 0.991) == "0.98 [0.95, 0.99]"
    assert inference.spread(-0.001, -0.04, 0.0, sign="+", digits=1) == "+0.0 [+0.0, +0.0]"
    assert inference.spread(np.float32(2), 1, 3, digits=0) == "2 [1, 3]"


def test_claims_tables():
    line = {"claim": "c", "measured": "m", "null": "n", "verdict": Verdict(HOLDS, 0.5)}
    more = [line, line | {"p": 0.0004}, line | {"p": 0.001}, line | {"p": 0.05, "verdict": FAILS}]
    table = inference.claims_table("II", more)
    assert list(table) == ["finding", "claim", "measured", "null", "p", "verdict"]
    assert table["p"].tolist() == ["", "<0.001", "0.001", "0.050"]
    assert table["verdict"].tolist() == ["holds (close)"] * 3 + ["does not hold"]
    assert (table["finding"] == "II").all() and table.loc[
        0, ["claim", "measured", "null"]
    ].tolist() == ["c", "m", "n"]
    assert list(inference.claims_table("I", [])) == list(table)
    shares = [line | {"verdict": inference.by_share(0.7, 10)}]
    assert inference.claims_table("I", shares)["verdict"].tolist() == [inference.PART]
    for wrong, fault in [(line | {"verdict": "yes"}, "verdict 'yes'"),
                         (line | {"verdict": None}, "verdict None"),
                         ({k: line[k] for k in line if k != "verdict"}, "no 'verdict'"),
                         ({k: line[k] for k in line if k != "null"}, "no 'null'")]:  # fmt: skip
        message = rf"finding II, line 1 \('c'\): {fault}; .* one of holds, does not hold, cannot"
        with pytest.raises(ValueError, match=message):
            inference.claims_table("II", [line, wrong])
