"""Intervals, nulls and verdicts: exact answers, coverage, level, and each rule at its boundary."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml
from conftest import ROOT
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
    for few in (0, 1):  # one sample is like any resampling of it
        with pytest.raises(ValueError, match=f"samples={few}, less than 2"):
            inference.resamples(few, 10)


@pytest.mark.parametrize("ones, n", [(12, 40), (35, 50), (3, 7)])
def test_resampled_shares_are_binomial(ones, n):
    """Resampled shares are binomial, so the ends are known exactly, in every column."""
    values = np.arange(n) < ones
    exact = scipy.stats.binom(n, ones / n).ppf([0.025, 0.975]) / n
    mean, low, high = inference.interval(np.column_stack([values, ~values]), n=20_000)
    assert (low[0], high[0]) == pytest.approx(exact) == (1 - high[1], 1 - low[1])
    assert mean == pytest.approx([ones / n, 1 - ones / n])


def test_resampling_agrees_with_scipy():
    values = RNG(0).normal(0.4, 1, (200, 1)).clip(0, 1)
    mean, *ends = inference.interval(values, n=10_000)
    theirs = scipy.stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    assert np.ravel(ends) == pytest.approx([*theirs], abs=0.002)
    assert mean == pytest.approx(values.mean())
    again, other = (inference.interval(values, n=10_000, seed=seed)[1] for seed in (0, 1))
    assert ends[0] == again != other


def test_resampled_intervals_cover_the_truth():
    """Of 2,000 true means 93 to 97 % lie inside."""
    _, low, high = inference.interval(RNG(8).normal(3, 2, (80, 2000)), n=500)
    assert 0.93 < ((low <= 3) & (high >= 3)).mean() < 0.97


def test_intervals_and_missing_values():
    values = RNG(0).standard_normal((50, 2, 2))
    values[20:, 0, 0] = np.nan
    values[:, 1, 1] = np.nan
    mean, low, high = inference.interval(values)
    assert mean.shape == low.shape == high.shape == (2, 2)
    assert mean[0, 0] == pytest.approx(values[:20, 0, 0].mean())
    _, *ends = inference.interval(values[:20, 0, 0])
    assert (low[0, 0], high[0, 0]) == pytest.approx(ends, abs=0.1)
    assert mean[0, 1] == pytest.approx(values[:, 0, 1].mean())
    assert np.isnan([mean[1, 1], low[1, 1], high[1, 1]]).all()
    values[1:, 0, 1] = np.nan  # one sample says nothing of others
    for mean, *ends in (inference.interval(values), inference.interval(values[:1])):
        assert mean[0, 1] == values[0, 0, 1] and np.isnan([end[0, 1] for end in ends]).all()
    with pytest.raises(ValueError, match="nothing to average"):
        inference.interval(np.zeros((0, 3)))


def test_two_values_of_one_sample_are_refused():
    told = pd.DataFrame({"sample": [0, 1, 1], "layer": 0, "set": "text", "v": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="two values of {'sample': 1, 'layer': 0, 'set': 'text'}"):
        inference.mean_over_samples(told, "v")
    assert inference.mean_over_samples(told[:2], "v")["v"].tolist() == [1.5]


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


# --- means of bounded scores ---------------------------------------------------------------------


def ends_of(middle, error, df) -> list[float]:
    """low, high, low90, high90 of a t interval, by hand."""
    sizes = scipy.stats.t(df).ppf([0.975, 0.95]) * error
    return [middle + sign * size for size in sizes for sign in (-1, 1)]


@pytest.mark.parametrize("ones, n", [(20, 40), (35, 40), (3, 24), (93, 96)])
def test_a_share_is_counted_with_two_more_of_each(ones, n):
    """Agresti and Coull: two successes and two failures more, here with t and n - 1."""
    values = (np.arange(n) < ones).astype(float)
    more = [*values, 0, 0, 1, 1]
    middle, error = np.mean(more), scipy.stats.sem(more)
    found = inference.estimate(values)
    assert found.mean == ones / n and found.error == pytest.approx(error)
    assert middle == (ones + 2) / (n + 4)
    assert error == pytest.approx((middle * (1 - middle) / (n + 3)) ** 0.5)
    assert found[1:5] == pytest.approx(np.clip(ends_of(middle, error, n - 1), 0, 1))


def test_without_added_rows_it_is_students_interval():
    """And Welch's, halved, of two benchmarks' mean: a plus b is a less minus b."""
    rng, wide = RNG(1), (-1e9, 1e9)
    a, b = rng.normal(0.4, 1, 30), rng.normal(0.7, 3, 12)
    plain = inference.estimate(a, ends=wide, added=0)
    assert inference.estimate(a, ends=None) == pytest.approx(plain)
    both = inference.estimate({"a": a, "b": b}, ends=wide, added=0)
    assert both.mean == pytest.approx((a.mean() + b.mean()) / 2)
    assert both.error == pytest.approx(np.hypot(scipy.stats.sem(a), scipy.stats.sem(b)) / 2)
    student, welch = scipy.stats.ttest_1samp(a, 0), scipy.stats.ttest_ind(a, -b, equal_var=False)
    for level, low, high in ((0.95, "low", "high"), (0.9, "low90", "high90")):
        for found, test, by in ((plain, student, 1), (both, welch, 2)):
            ends = np.array([*test.confidence_interval(level)]) / by
            assert (getattr(found, low), getattr(found, high)) == pytest.approx(ends)


def test_rows_about_one_medium_count_together():
    """The clusters' linearised variance by hand; the added rows are clusters of their own."""
    rng = RNG(2)
    media = rng.integers(0, 9, 40)
    values = (rng.random(40) < 0.2 + 0.07 * media).astype(float)
    more, of = np.array([*values, 0, 0, 1, 1]), np.array([*media, 11, 12, 13, 14])
    totals = [(more[of == c] - more.mean()).sum() for c in np.unique(of)]
    count = len(totals)
    error = (count / (count - 1) * np.sum(np.square(totals))) ** 0.5 / len(more)
    found = inference.estimate(values, media)
    assert found.mean == values.mean() and found.error == pytest.approx(error)
    assert found[1:5] == pytest.approx(ends_of(more.mean(), error, count - 4 - 1))
    named = np.array([f"m{m}" for m in media])
    for same in (
        inference.estimate({"a": values}, {"a": named}),
        inference.estimate(values, named),
    ):
        assert same == pytest.approx(found)
    assert inference.estimate(values, np.arange(40)) == inference.estimate(values)
    assert found.error > 1.2 * inference.estimate(values).error


def test_a_row_that_is_there_thrice_says_nothing_more():
    values = RNG(3).random(20)
    once = inference.estimate(values, added=0)
    thrice = inference.estimate(np.repeat(values, 3), np.repeat(np.arange(20), 3), added=0)
    assert thrice == pytest.approx(once)


def test_benchmarks_weigh_alike_and_share_what_is_added():
    """Means of means, variances by hand, one row more at either end of each of two benchmarks."""
    rows = {"a": np.repeat([1.0, 0], [60, 30]), "b": np.repeat([1.0, 0], [9, 3])}
    more = {k: [*v, 0, 1] for k, v in rows.items()}
    parts = np.array([scipy.stats.sem(v) ** 2 for v in more.values()]) / 4
    error, middle = parts.sum() ** 0.5, np.mean([np.mean(v) for v in more.values()])
    df = parts.sum() ** 2 / (parts**2 / [89, 11]).sum()  # Satterthwaite
    found = inference.estimate(rows)
    assert found.mean == pytest.approx((60 / 90 + 9 / 12) / 2)
    assert found.error == pytest.approx(error) and 11 < df < 89
    assert found[1:5] == pytest.approx(ends_of(middle, error, df))
    swapped = inference.estimate({"b": rows["b"], "a": rows["a"]}, {"a": None, "b": None})
    assert swapped == pytest.approx(found)
    assert inference.estimate({"a": rows["a"], "b": rows["a"]}).error == pytest.approx(
        inference.estimate(rows["a"]).error / 2**0.5, rel=0.01
    )


def test_a_further_variance_is_known_exactly():
    """It is added, and has no degrees of freedom that would be missing."""
    values = RNG(4).random(20)
    plain, more = (inference.estimate(values, extra=extra) for extra in (0, 0.003))
    assert more.mean == plain.mean and more.error**2 == pytest.approx(plain.error**2 + 0.003)
    df = 19 * more.error**4 / plain.error**4
    middle = (values.sum() + 2) / 24
    assert more[1:5] == pytest.approx(ends_of(middle, more.error, df))


@pytest.mark.parametrize("n", [1, 2, 24, 96])
def test_where_all_rows_agree_the_interval_is_open(n):
    for values, ends in ((np.ones(n), (0, 1)), (np.zeros(n), (0, 1)), (np.zeros(n), (-1, 1))):
        found = inference.estimate(values, ends=ends)
        assert found.mean == values[0] and ends[0] <= found.low <= found.mean
        assert found.mean <= found.high <= ends[1]
        assert found.high - found.low > 1.5 / (n + 4)
    ones, zeros = inference.estimate(np.ones(n)), inference.estimate(np.zeros(n))
    assert ones.high == ones.high90 == 1 and zeros.low == zeros.low90 == 0
    assert zeros.high == pytest.approx(1 - ones.low)
    assert inference.estimate(np.ones(24)).low == pytest.approx(
        26 / 28 - 2.0687 * (26 / 28 * 2 / 28 / 27) ** 0.5, abs=1e-4
    )


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=12))
def test_an_interval_contains_its_mean_and_keeps_to_the_ends(rows):
    values, media = np.array(rows).T
    for found in (inference.estimate(values, media), inference.estimate({"a": values, "b": [1]})):
        mean, low, high, low90, high90, error = found
        assert 0 <= low <= low90 <= mean <= high90 <= high <= 1 and error > 0
    turned = inference.estimate(1 - values, media)
    found = inference.estimate(values, media)
    assert (1 - turned.low, 1 - turned.high90) == pytest.approx((found.high, found.low90))
    assert turned.error == pytest.approx(found.error)


def test_scores_are_never_left_out():
    for missing in ([1.0, np.nan], {"a": [1.0, 0.0], "b": [np.nan]}):
        assert np.isnan(inference.estimate(missing)).all()
    assert np.isnan(inference.change([1.0, 0.0], [np.nan, 0.0])).all()
    for empty in ({}, [], {"a": [1.0], "b": []}):
        with pytest.raises(ValueError, match="nothing to average: every benchmark"):
            inference.estimate(empty)


def test_a_change_is_counted_with_one_more_at_either_end():
    """Agresti and Min: rows that change by -1 and by 1."""
    before = np.repeat([1.0, 0], [50, 10])
    after = np.repeat([0.0, 1, 0, 1], [20, 30, 8, 2])
    more = [*(after - before), -1, 1]
    found = inference.change(before, after)
    assert found.mean == pytest.approx(-18 / 60)
    assert found.error == pytest.approx(scipy.stats.sem(more))
    # About the mean or what the added rows make of it, whichever reaches further.
    low, high = (ends_of(middle, scipy.stats.sem(more), 59) for middle in (-18 / 60, -18 / 62))
    assert found[1:5] == pytest.approx([low[0], high[1], low[2], high[3]])
    turned = inference.change(after, before)
    assert (-turned.low, -turned.high) == pytest.approx((found.high, found.low))
    media = np.arange(60) // 3
    clustered = inference.change({"a": before}, {"a": after}, {"a": media})
    assert clustered == inference.estimate(after - before, media, (-1, 1), 1)
    # Twenty media of three rows, and one more at either end.
    totals = [*(after - before).reshape(20, 3).sum(1), -3, 3]
    off = np.array(totals) - 3 * (-18 / 66)
    assert clustered.error**2 == pytest.approx((off**2).sum() * 22 / 21 / 66**2)
    none = inference.change(before, before)
    assert none.mean == 0 and none.high == -none.low == pytest.approx(
        scipy.stats.t(59).ppf(0.975) * (2 / 61 / 62) ** 0.5
    )


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_pairs_are_paired(pairs):
    a, b = np.array(pairs).T
    found = inference.change(a, b)
    assert found == inference.change({"x": a}, {"x": b})
    assert found.mean == pytest.approx((b - a).mean())
    assert -1 <= found.low <= found.mean <= found.high <= 1
    order = np.argsort(a)
    assert inference.change(a[order], b[order]) == pytest.approx(found)


def test_a_change_needs_pairs():
    with pytest.raises(ValueError, match="same benchmarks and rows"):
        inference.change([1.0], [1.0, 2.0])
    for b in ({"b": [1.0]}, [1.0], {"a": [1.0], "b": [1.0]}):
        with pytest.raises(ValueError, match="same benchmarks"):
            inference.change({"a": [1.0]}, b)


def test_an_estimate_from_draws():
    draws = np.append(np.arange(1001.0), np.nan)
    found = inference.from_draws(400, draws)
    assert found[:5] == (400, 25, 975, 50, 950)
    assert found.error == pytest.approx(np.arange(1001).std())
    with pytest.raises(ValueError, match="no draws"):
        inference.from_draws(1, [])


def test_the_difference_of_two_estimates():
    a, b = inference.estimate(RNG(5).random(200)), inference.estimate(RNG(6).random(300) / 2)
    found = inference.less(a, b)
    assert found.mean == a.mean - b.mean
    assert found.error == pytest.approx((a.error**2 + b.error**2) ** 0.5)
    sizes = np.array([-1.959964, 1.959964, -1.644854, 1.644854]) * found.error
    assert found[1:5] == pytest.approx(found.mean + sizes, abs=1e-6)
    assert inference.less(b, a).mean == -found.mean
    assert inference.reported(*found[:3]) == pytest.approx(found, abs=1e-12)


# --- coverage ------------------------------------------------------------------------------------

MEANS, COUNTS, RUNS = (0.5, 0.9, 0.98), (24, 96), 400
WIDEST = 0.99  # where there are rows enough, an interval must not cover by being wide


def sampling(share: float, n: int = RUNS) -> float:
    """Three standard errors of a simulated share."""
    return 3 * (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("n", COUNTS)
def test_coverage_of_one_benchmark_is_known_exactly(mean, n):
    """Right answers are binomial, so nothing has to be simulated."""
    found = [inference.estimate((np.arange(n) < right).astype(float)) for right in range(n + 1)]
    chance = scipy.stats.binom(n, mean).pmf(np.arange(n + 1))
    covered = sum(p for p, x in zip(chance, found, strict=True) if x.low <= mean <= x.high)
    within = sum(p for p, x in zip(chance, found, strict=True) if x.low90 <= mean <= x.high90)
    assert 0.93 < covered < 0.99 and 0.86 < within < covered


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("n", COUNTS)
def test_coverage_of_an_average(mean, n):
    """Three benchmarks of different means, one of them with graded scores."""
    rng, inside = RNG(n), 0
    means = mean + np.array([-0.04, 0, 0.02]) * (mean < 0.98)
    for _ in range(RUNS):
        rows = {str(i): (rng.random(n) < m).astype(float) for i, m in enumerate(means[:2])}
        rows["2"] = rng.beta(8 * means[2], 8 * (1 - means[2]), n)
        found = inference.estimate(rows)
        inside += found.low <= means.mean() <= found.high
    assert inside / RUNS >= 0.93 - sampling(0.93)
    if mean > 0.5 and n == 96:
        assert inside / RUNS <= WIDEST + sampling(WIDEST)


def answered(rng, mean: float, lost: float, n: int, size: int = 3, strata: int = 2) -> tuple:
    """Answers before and after a loss, `size` rows to a medium, half of the media alike in both."""
    before, after, media = {}, {}, {}
    for name in map(str, range(strata)):
        media[name] = np.arange(n) // size
        alike = rng.random(n)[media[name]] < 0.5
        right, gone = (
            np.where(alike, rng.random(n)[media[name]], rng.random(n)) < share
            for share in (mean, lost)
        )
        before[name], after[name] = right * 1.0, (right & ~gone) * 1.0
    return before, after, media


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("n", COUNTS)
def test_coverage_of_a_change_in_clusters(mean, n):
    rng, inside = RNG(n), np.zeros(2)
    for _ in range(RUNS):
        before, after, media = answered(rng, mean, 0.3, n)
        for i, of in enumerate((media, None)):
            found = inference.change(before, after, of)
            inside[i] += found.low <= -0.3 * mean <= found.high
    covered, unclustered = inside / RUNS
    assert covered >= 0.93 - sampling(0.93) and unclustered < covered - 0.02
    if mean > 0.5 and n == 96:
        assert covered <= WIDEST + sampling(WIDEST)


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


def test_kinds_are_exchanged_prompt_by_prompt():
    second, groups = np.array([1, 0, 0, 1, 1, 0], bool), np.array([5, 5, 2, 2, 2, 9])
    found = inference.exchanged(second, groups, 800)
    assert found.shape == (801, 6) and found.dtype == bool and (found[0] == second).all()
    flipped = found[1:] ^ second
    for group in (2, 5, 9):  # whole prompts, each in half of the draws
        assert (np.ptp(flipped[:, groups == group].astype(int), axis=1) == 0).all()
    assert flipped.mean(0) == pytest.approx(0.5, abs=0.06)
    assert len(np.unique(flipped, axis=0)) == 8  # each prompt for itself
    assert (inference.exchanged(second, groups, 800) == found).all()
    assert (inference.exchanged(second, groups, 800, seed=1) != found).any()


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


def effect(low: float, high90: float, mean: float = np.nan, error: float = np.nan):
    """What a verdict looks at."""
    return inference.Estimate(mean, low, np.nan, np.nan, high90, error)


@pytest.mark.parametrize(
    "low, high90, p, word, margin",
    [
        (0.3, 0.5, None, HOLDS, 2.5),
        (0.25, 0.5, None, UNKNOWN, 0),  # on the smallest effect is not beyond it
        (0.2, 0.5, None, UNKNOWN, 2.5),
        (0.2, 0.25, None, UNKNOWN, 0),  # up to it is not before it
        (0.2, 0.27, None, UNKNOWN, 1),
        (0.1, 0.24, None, FAILS, 0.5),
        (-0.3, -0.25, None, FAILS, 25),  # a gain is no loss
        (0.3, 0.5, 0.01, HOLDS, 2.5),
        (0.3, 0.5, 0.049, HOLDS, 0.2),  # tolerances of a tenth of 0.05
        (0.3, 0.5, 0.05, UNKNOWN, 0),  # not below
        (0.3, 0.5, 1 / 20, UNKNOWN, 0),  # of 19 draws none as low
        (0.3, 0.5, 1 / 21, HOLDS, (0.05 - 1 / 21) / 0.005),
        (0.3, 0.5, 0.2, UNKNOWN, 12.5),
        (0.1, 0.24, 0.001, FAILS, 0.5),  # p plays no part in what is too small
        (0.1, 0.24, 0.9, FAILS, 0.5),
        (np.nan, np.nan, None, UNKNOWN, np.inf),
        (np.nan, np.nan, 0.01, UNKNOWN, np.inf),
        (0.3, 0.5, np.nan, UNKNOWN, 12.5),
    ],
)
def test_the_rule_of_every_claim(low, high90, p, word, margin):
    verdict = inference.decide(effect(low, high90), 0.25, p)
    assert verdict.word == word and verdict.margin == pytest.approx(margin)


def test_power_by_hand():
    phi, z = scipy.stats.norm.cdf, scipy.stats.norm.ppf
    assert pytest.approx(z(0.975) + z(0.8)) == inference.POWER
    assert inference.power(0.1, 0.25) == pytest.approx(phi(2.5 - z(0.975)))
    assert inference.power(0.1, 0.25, 0.4) == pytest.approx(phi(1.5 - z(0.975)))
    assert inference.power(0.07, 0.25, 0.25) == pytest.approx(0.025)
    assert inference.power(0.25 / inference.POWER, 0.25) == pytest.approx(0.8)


def test_the_rows_that_settle_a_claim_by_hand():
    rows = 96 * ((1.959964 + 0.841621) * 0.1 / 0.25) ** 2  # 120.6
    for mean in (0.5, 0.0):  # as far above the smallest effect as below
        found = inference.settles(effect(0, 0, mean, 0.1), 0.25, 96)
        assert found == np.ceil(rows) == 121
        few, enough = (0.1 * (96 / n) ** 0.5 for n in (found - 1, found))
        assert inference.power(few, 0.25, 0.5) < 0.8 <= inference.power(enough, 0.25, 0.5)
    assert inference.settles(effect(0, 0, 0.25, 0.1), 0.25, 96) == np.inf
    assert inference.settles(effect(0, 0, 0.5, 0.05), 0.25, 96) == np.ceil(rows / 4)


def verdicts(lost: float, smallest: float, n: int, runs: int, seed: int) -> tuple:
    """Shares of two benchmarks' simulated losses that hold and that do not, and their errors."""
    rng, words, errors = RNG(seed), [], []
    for _ in range(runs):
        gone = {name: (rng.random(n) < lost).astype(float) for name in "ab"}
        found = inference.change(dict.fromkeys(gone, np.zeros(n)), gone)
        words.append(inference.decide(found, smallest).word)
        errors.append(found.error)
    return words.count(HOLDS) / runs, words.count(FAILS) / runs, errors


def test_the_level_of_both_definite_verdicts():
    """At exactly the smallest effect either is wrong, at most once in twenty."""
    holds, fails, _ = verdicts(0.25, 0.25, 48, 1000, 0)
    assert max(holds, fails) <= 0.05 + sampling(0.05, 1000)
    assert min(holds, fails) > 0.002  # and they can happen


def test_a_planted_effect_is_found():
    """Twice the smallest, with an error at which the power is at least 80 %."""
    holds, fails, errors = verdicts(0.3, 0.15, 48, 600, 2)
    power = [inference.power(error, 0.15) for error in errors]
    assert 0.8 < np.mean(power) < 0.95 and fails == 0
    assert holds >= 0.8 and holds == pytest.approx(np.mean(power), abs=0.05)
    none, fails, _ = verdicts(0.02, 0.25, 48, 100, 3)
    assert none == 0 and fails > 0.95  # almost nothing is lost


def test_claims_are_stated_whole():
    stated = yaml.safe_load((ROOT / "minerlib/claims.yml").read_text())
    for name, parts in stated.items():
        claim = inference.claim(name)
        assert claim._asdict() == {"minor": False} | parts and inference.claim(name) is claim
        assert 0 < claim.smallest <= 1, name
        assert all(getattr(claim, part).strip() for part in ("text", "measure", "why", "against"))
    assert inference.claim("I").smallest == 0.25
    with pytest.raises(ValueError, match="no claim 'XX' in claims.yml; there are I"):
        inference.claim("XX")


def test_the_line_of_a_claim():
    of, found = inference.claim("II"), inference.Estimate(0.4, 0.3, 0.5, 0.32, 0.48, 0.05)
    draws = np.linspace(-0.1, 0.1, 99)
    line = inference.judge("II", found, draws, rows=96)
    kept = ["name", "effect", "low", "high", "high90", "smallest", "power", "settles"]
    assert (line["high90"], line["power"]) == (0.48, inference.power(0.05, 0.1))
    assert list(line) == ["claim", "measured", "null", "p", "verdict", *kept]
    assert (line["claim"], line["name"], line["smallest"]) == (of.text, "II", 0.1)
    assert line["measured"] == "+0.40 [+0.30, +0.50]" and line["p"] == 1 / 100
    assert line["null"] == inference.range_of(draws) == "+0.00 [-0.10, +0.10]"
    assert (line["effect"], line["low"], line["high"]) == (0.4, 0.3, 0.5)
    assert line["verdict"] == inference.decide(found, 0.1, 0.01) == (HOLDS, pytest.approx(8))
    assert line["settles"] == inference.settles(found, 0.1, 96) == 21
    told = inference.judge("II", found, "no change", 0.2)
    assert (told["null"], told["p"], told["verdict"].word) == ("no change", 0.2, UNKNOWN)
    assert np.isnan(told["settles"]) and inference.judge("II", found, "no change")["p"] is None
    assert inference.judge("II", found, np.linspace(-1, 1, 99))["verdict"].word == UNKNOWN
    table = inference.claims_table("II", [line, inference.line("c", "m", "n", line["verdict"])])
    assert [*table][6:] == [*inference.MEASURED, "high90", "untrained"] and table[
        "effect"
    ].tolist()[0] == 0.4
    assert np.isnan(table["effect"][1]) and table["name"].tolist()[0] == "II"


def test_discoveries_by_hand():
    """Benjamini and Hochberg: of m ordered p the i-th times m / i, and not above a later one."""
    p = [0.04, 0.01, None, 0.04, 0.03, 0.9]  # the headline, then five lines, one without p
    lines = [inference.line(str(i), "", "", Verdict(HOLDS, 3), x) for i, x in enumerate(p)]
    lines[5]["verdict"] = Verdict(FAILS, 2)
    found = inference.discoveries(lines)
    rates = [0.04, 0.01 * 4, None, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.9]
    assert [x["p"] for x in found] == [x and pytest.approx(x) for x in rates]
    words = [x["verdict"].word for x in found]
    assert words == [HOLDS, HOLDS, HOLDS, UNKNOWN, UNKNOWN, FAILS]
    margins = [3, 2, 3, 2 / 3, 2 / 3, 2]  # the rate's distance from 0.05, in steps of 0.005
    assert [x["verdict"].margin for x in found] == pytest.approx(margins)
    assert [x["claim"] for x in found] == list("012345") and lines[3]["verdict"].word == HOLDS
    alone = inference.discoveries(lines[:1])
    assert alone == lines[:1] and inference.discoveries(lines[::2][:2]) == lines[::2][:2]
    assert np.isnan(inference.discoveries([lines[0], lines[1] | {"p": np.nan}])[1]["p"])


RULES = {
    "interval": lambda x: inference.decide(effect(x[:2].min(), x[:2].max()), x[2]),
    # a p moves by a quarter of what other numbers do
    "and p": lambda x: inference.decide(effect(x[:2].min(), x[:2].max()), x[2], abs(x[3]) / 4),
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
    for wrong, fault in [(line | {"verdict": "yes"}, "verdict 'yes'"),
                         (line | {"verdict": None}, "verdict None"),
                         ({k: line[k] for k in line if k != "verdict"}, "no 'verdict'"),
                         ({k: line[k] for k in line if k != "null"}, "no 'null'")]:  # fmt: skip
        message = rf"finding II, line 1 \('c'\): {fault}; .* one of holds, does not hold, cannot"
        with pytest.raises(ValueError, match=message):
            inference.claims_table("II", [line, wrong])


@pytest.mark.parametrize("size", [0.1, 0.3])
def test_a_magnitude_without_what_noise_adds(size):
    """Noise of 0.1 on own and random changes, which are none: no verdict comes too often."""
    found, plain = [], []
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(0, 0.5, (9, 24, 6))
        noise[0] += size
        weights = np.vstack([np.ones((1, 24)), inference.resamples(24, 100, seed)])
        change = np.stack([inference.weighted(x, weights).T for x in noise])[None]
        found.append(inference.moved(change)[0])
        plain.append(np.abs(change[0, 0, :, 0]).mean() - np.abs(change[0, 1:, :, 0]).mean())
    assert abs(np.mean([e.mean for e in found]) - size) < abs(np.mean(plain) - size)
    assert np.mean([e.low > size for e in found]) <= 0.05
    assert np.mean([e.high90 < size for e in found]) <= 0.15
    assert all(e.low <= e.low90 <= e.high90 <= e.high for e in found)


def test_what_moves_a_curve_further_than_random_sets():
    """[kind, set, layer, draw]: magnitudes over layers, kinds averaged, less the random sets'."""
    own, one, other = [[2, 2], [-1, -1]], [[0.5, 0.5], [0.5, 0.5]], [[1, 1], [-1, -1]]
    none = np.zeros((3, 2, 2))
    effect, null = inference.moved(np.stack([np.array([own, one, other], float), none]))
    assert effect == pytest.approx([(1.5 - 0.75) / 2] * 5 + [0])
    assert null == pytest.approx([-0.125, 0.125])


def test_unbounded_values_that_are_all_alike_and_a_single_medium():
    with warnings.catch_warnings(action="error"):
        same = inference.estimate({"a": [0.3] * 4, "b": [0.1] * 4}, ends=None)
        one = inference.estimate({"a": [0.1, 0.2], "b": [0.1]}, ends=None)
    assert same == pytest.approx([0.2] * 5 + [0], abs=1e-9)
    assert one.mean == pytest.approx(0.125) and np.isnan(one[1:]).all()
    assert inference.decide(one, 0.1).word == inference.UNKNOWN


def test_a_variance_from_a_few_draws_is_uncertain():
    """Satterthwaite's degrees of freedom count it as their number less one."""
    values = np.linspace(0, 1, 50)
    sure, few = (inference.estimate(values, extra=0.01, draws=n) for n in (np.inf, 3))
    assert few.error == sure.error and few.mean == sure.mean
    own = sure.error**2 - 0.01
    df = sure.error**4 / (own**2 / 49 + 0.01**2 / 2)
    half = scipy.stats.t.ppf(0.975, df) * few.error
    middle = 0.5
    assert (few.low, few.high) == pytest.approx((max(0, middle - half), min(1, middle + half)))
    assert few.high - few.low > sure.high - sure.low
