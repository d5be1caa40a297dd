"""Intervals, nulls, multiplicity and verdicts: one set of rules for every claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

# --- resampling ----------------------------------------------------------------------------------


def interval(values: np.ndarray, n: int = 2000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Mean over samples with its 95 % percentile bootstrap interval.

    values [sample, ...]; NaN where a sample has no value. Returns mean, low, high, each [...];
    NaN where no sample has a value.
    """
    values = np.asarray(values, float)
    flat = values.reshape(len(values), -1)
    means = weighted(flat, resamples(len(flat), n, seed))
    low, high = np.full((2, flat.shape[1]), np.nan)
    there = ~np.isnan(flat).all(0)
    low[there], high[there] = np.nanquantile(means[:, there], [0.025, 0.975], axis=0)
    mean = weighted(flat, np.ones((1, len(flat))))[0]
    return tuple(x.reshape(values.shape[1:]) for x in (mean, low, high))


def resamples(n_samples: int, n: int, seed: int = 0) -> np.ndarray:
    """How often each sample occurs in each of n bootstrap resamplings, float [n, sample]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_samples, np.full(n_samples, 1 / n_samples), n).astype(float)


def weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of values [sample, ...] under weights [n, sample], leaving NaN out: [n, ...]."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(there, values, 0)) / (weights @ there)


def shuffles(labels: np.ndarray, groups: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """The labels [token], and n shuffles of them within each group, [n + 1, token]."""
    rank = np.unique(groups, return_inverse=True)[1]
    slots = np.argsort(rank, kind="stable")
    drawn = np.argsort(rank + np.random.default_rng(seed).random((n, len(rank))), axis=1)
    out = np.tile(labels, (n + 1, 1))
    out[1:, slots] = labels[drawn]
    return out


def summarise(
    table: pd.DataFrame, value: str, by: Sequence[str] = ("layer", "set")
) -> pd.DataFrame:
    """Mean over samples with its 95 % interval of a table with one row per sample and `by`.

    Returns columns *by, value (under its own name), low, high, n. For a paired change between
    two conditions pass `paired(before, after, value, by)`.
    """
    by = list(by)
    wide = table.pivot_table(value, "sample", by, sort=False)
    columns = wide.columns.to_frame(index=False)
    mean, low, high = interval(wide.to_numpy())
    n = wide.notna().sum().to_numpy()
    return columns.assign(**{value: mean, "low": low, "high": high, "n": n})


def paired(
    before: pd.DataFrame, after: pd.DataFrame, value: str, by: Sequence[str] = ("layer", "set")
) -> pd.DataFrame:
    """after - before of the same samples: one row per sample and `by`, for `summarise`."""
    key = ["sample", *by]
    both = before[[*key, value]].merge(after[[*key, value]], on=key, validate="one_to_one")
    if not len(both) == len(before) == len(after):
        raise ValueError(
            f"only {len(both)} rows are in both tables ({len(before)} and {len(after)}): measure "
            "both conditions on the same samples"
        )
    return both[key].assign(**{value: both[f"{value}_y"] - both[f"{value}_x"]})


class Resampling:
    """Samples of a token table as bootstrap draws, per-sample means and shuffled labels."""

    def __init__(self, tokens: pd.DataFrame, second: str, n_boot: int, n_null: int, seed: int):
        self.group = np.unique(tokens["sample"], return_inverse=True)[1]
        self.size = self.group.max() + 1
        self.draws = resamples(self.size, n_boot, seed)
        self.second = shuffles((tokens["kind"] == second).to_numpy(), self.group, n_null, seed)
        self.own = self.second[0]

    @property
    def token_draws(self) -> np.ndarray:
        """How often each token occurs in each bootstrap draw, [n_boot, token]."""
        return self.draws[:, self.group]

    def by_sample(self, values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Means over each sample's tokens, [..., token] -> [..., sample]; NaN without any."""
        to = np.zeros((len(self.group), self.size))
        to[np.arange(len(self.group)), self.group] = 1
        where = np.ones(1) if where is None else where
        with np.errstate(invalid="ignore"):
            return (values * where) @ to / ((where + np.zeros_like(values)) @ to)

    def row(self, measure: str, values: np.ndarray, where=None, greater=True) -> dict:
        """A row from per-token values [1 + n_null, token], counted where bool of that shape."""
        mean = self.by_sample(values, where)
        draws = weighted(mean[0][:, None], self.draws)[:, 0]
        mean = np.nanmean(mean, axis=1)
        return table_row(measure, mean[0], draws, mean[1:], greater)


def table_row(measure: str, value, draws, null, greater: bool | None = True) -> dict:
    """One line of a table; p is one-sided in the claim's direction, or two-sided (greater=None)."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    null_low, null_high = np.quantile(null, [0.025, 0.975])
    side = (null, value) if greater else (-null, -value)
    if greater is None:
        side = np.abs(null), abs(value)
    p = (1 + (side[0] >= side[1] - 1e-12).sum()) / (1 + len(null))
    return {
        "measure": measure,
        "value": float(value),
        "low": low,
        "high": high,
        "null": float(np.mean(null)),
        "null_low": null_low,
        "null_high": null_high,
        "p": p,
    }


# --- intervals -----------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean with the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float] | Mapping[str, Sequence[float]], n: int = 10_000, seed: int = 0
) -> Interval:
    """The mean with its 95 % percentile interval over `n` resamplings of the rows.

    A mapping {benchmark: values} gives the mean of the benchmarks' means, with rows resampled
    within each benchmark.
    """
    groups = list(values.values()) if isinstance(values, Mapping) else [values]
    groups = [np.asarray(group, dtype=float) for group in groups]
    if not groups or any(group.size == 0 for group in groups):
        raise ValueError("nothing to resample: every benchmark needs at least one row")
    rng = np.random.default_rng(seed)
    means = np.zeros(n)
    for group in groups:
        step = max(1, 2_000_000 // group.size)  # keeps the drawn indices below some 16 MB
        for start in range(0, n, step):
            part = means[start : start + step]
            part += group[rng.integers(group.size, size=(part.size, group.size))].mean(axis=1)
    low, high = np.quantile(means / len(groups), [0.025, 0.975])
    return Interval(float(np.mean([group.mean() for group in groups])), float(low), float(high))


def paired_bootstrap(
    a: Sequence[float] | Mapping[str, Sequence[float]],
    b: Sequence[float] | Mapping[str, Sequence[float]],
    n: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of b - a over the same rows, with its 95 % interval; mappings as in `bootstrap`."""
    if isinstance(a, Mapping) != isinstance(b, Mapping) or (
        isinstance(a, Mapping) and a.keys() != b.keys()
    ):
        raise ValueError("paired values must come from the same benchmarks")
    if not isinstance(a, Mapping):
        a, b = {"": a}, {"": b}
    if uneven := [k for k in a if len(a[k]) != len(b[k])]:
        raise ValueError(f"paired values must have the same rows; they differ in {uneven}")
    return bootstrap({k: np.subtract(b[k], a[k], dtype=float) for k in a}, n, seed)
