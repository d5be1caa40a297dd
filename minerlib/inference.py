"""Intervals, nulls, multiplicity and verdicts: one set of rules for every claim.

Scores are averaged by `estimate`, whose 95 % intervals keep their coverage near 0 and 1 and count
rows about one medium together; intervals of other measures are percentile bootstraps over samples
(Efron and Tibshirani 1993, chapter 13), from one matrix of counts for a whole table. p-values are
ranks among draws from a null (Phipson and Smyth 2010). `decide` is the rule of verdicts.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import ArrayLike
from scipy import stats

# --- intervals -----------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def resamples(n_samples: int, n: int, seed: int | tuple[int, ...] = 0) -> np.ndarray:
    """How often each sample occurs in each of n bootstrap resamplings, [n, sample]; read-only."""
    if n_samples < 2:
        raise ValueError(f"nothing to resample: samples={n_samples}, less than 2; raise the limit")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_samples, np.full(n_samples, 1 / n_samples), n).astype(float)
    counts.setflags(write=False)  # kept: the same rows are resampled under every condition
    return counts


def weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of values [sample, ...] under weights [n, sample], leaving NaN out: [n, ...]."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.tensordot(weights, np.where(there, values, 0), 1)
        return total / np.tensordot(weights, there.astype(float), 1)


def middle95(draws: ArrayLike) -> tuple[np.ndarray, ...]:
    """The ends of the middle 95 % of draws [draw, ...], leaving NaN out; NaN without any."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # nothing but NaN
        return tuple(np.nanquantile(_draws(draws), [0.025, 0.975], axis=0))


def _draws(draws: ArrayLike) -> np.ndarray:
    """The draws, of which there must be some."""
    draws = np.asarray(draws, float)
    if not draws.size:
        raise ValueError("no draws to compare with or to take quantiles of; draw some")
    return draws


def interval(values: np.ndarray, n: int = 2000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Mean over samples with its 95 % interval: mean, low, high, each [...].

    values [sample, ...]; NaN where a sample has no value, in the mean where none has, and in the
    ends where fewer than two have.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("nothing to average: no samples; raise the limit")
    known = (~np.isnan(values)).sum(0) > 1
    ends = np.full((2, *values.shape[1:]), np.nan)
    if known.any():
        draws = weighted(values, resamples(len(values), n, seed))
        ends = np.where(known, middle95(draws), np.nan)
    return weighted(values, np.ones((1, len(values))))[0], *ends


class Estimate(NamedTuple):
    """A mean over rows, the ends of its 95 % and 90 % intervals, and its standard error."""

    mean: float
    low: float
    high: float
    low90: float
    high90: float
    error: float


Scores = ArrayLike | Mapping[str, ArrayLike]


def _strata(values: Scores) -> dict[str, np.ndarray]:
    """Values by benchmark, of which every one must have rows."""
    named = values if isinstance(values, Mapping) else {"": values}
    strata = {name: np.asarray(group, float) for name, group in named.items()}
    if not strata or not all(group.size for group in strata.values()):
        raise ValueError("nothing to average: every benchmark needs at least one row")
    return strata


def estimate(
    values: Scores,
    media: Mapping[str, ArrayLike] | ArrayLike | None = None,
    ends: tuple[float, float] | None = (0.0, 1.0),
    added: float = 2.0,
    extra: float = 0.0,
    draws: float = math.inf,
) -> Estimate:
    """The mean of values with a t interval that keeps its coverage near bounds.

    values : [row], or {benchmark: [row]} for the mean of the benchmarks' means.
    media : what each row is about, likewise; rows about one medium vary together (none: no two).
    ends : the least and the greatest value there can be. `added` rows at either end, shared among
        the benchmarks, move the interval inwards and keep it open where all rows agree: 2 for
        scores (Agresti and Coull 1998), 1 for paired differences (Agresti and Min 2005), of which
        verdicts are made: there it is a whole medium's rows, and the interval reaches as far from
        the mean itself too. None: unbounded, and nothing is added.
    extra : further variance of the mean, such as that of the draws it is compared with, of which
        there are so many `draws`.

    The error is the clusters' (Taylor linearisation of a ratio; Cochran 1977, 6.8 and 9A); its
    degrees of freedom are Satterthwaite's. NaN if a value is, the error and the ends where a
    benchmark has one medium and nothing is added.
    """
    strata = _strata(values)
    about = media if isinstance(media, Mapping) else dict.fromkeys(strata, media)
    added = 0.0 if ends is None else added / len(strata)
    least, most = ends or (0.0, 0.0)
    middles, variances, freedom = [], [], []
    for name, group in strata.items():
        of = about[name]
        of = np.arange(group.size) if of is None else np.asarray(of)
        cluster = np.unique(of, return_inverse=True)[1]
        sizes = np.bincount(cluster)
        of_each = group.size / len(sizes) if least < 0 else 1.0
        n = group.size + 2 * added * of_each
        middle = (group.sum() + added * of_each * (least + most)) / n
        off = np.bincount(cluster, group) - sizes * middle
        ends_off = of_each**2 * ((least - middle) ** 2 + (most - middle) ** 2)
        squares = (off**2).sum() + added * ends_off
        count = len(sizes) + 2 * added
        middles.append(middle)
        variances.append(squares * count / (count - 1) / n**2 if count > 1 else np.nan)
        freedom.append(max(len(sizes) - 1, 1))
    mean = np.mean([group.mean() for group in strata.values()])
    parts = np.array(variances) / len(strata) ** 2
    variance = parts.sum() + extra
    spread_of = (parts**2 / freedom).sum() + extra**2 / (draws - 1)
    df = variance**2 / spread_of if spread_of else np.inf  # all alike: what is left is certain
    error, middle = np.sqrt(variance), float(np.mean(middles))
    about_low, about_high = sorted((middle, mean)) if least < 0 else (middle, middle)
    least, most = (-np.inf, np.inf) if ends is None else (min(least, mean), max(most, mean))
    found = []
    for quantile in stats.t.ppf([0.975, 0.95], df):
        low, high = about_low - quantile * error, about_high + quantile * error
        found += [np.clip(low, least, mean), np.clip(high, mean, most)]
    return Estimate(*map(float, (mean, *found, error)))


def from_draws(value: float, draws: ArrayLike) -> Estimate:
    """The estimate of any statistic: percentiles of its values under resamplings of the prompts."""
    draws = _draws(draws)
    ends = np.nanquantile(draws, [0.025, 0.975, 0.05, 0.95])
    return Estimate(*map(float, (value, *ends, np.nanstd(draws))))


def moved(change: np.ndarray) -> tuple[Estimate, np.ndarray]:
    """How much further own neurons move a curve than random ones; and draws where it is no more.

    change [kind, set, layer, draw]: what each set of neurons changes, its own first, then random
    ones; draw 0 of the prompts themselves, then of their resamplings, the same for all sets. In
    magnitude, averaged over layers and kinds; less the mean of the random sets.

    Noise adds to a magnitude, and to a resampling's once more: of noise alone the factor is the
    root of 2, and so all that a resampling has more, over root 2 less 1, is taken off (the
    bootstrap's estimate of bias; Efron and Tibshirani 1993, chapter 10). Where something moves that
    is too much. So an interval's lower end takes it off the own magnitude alone, its upper end off
    the random ones' alone.
    """
    own, *random = np.abs(change).mean((0, 2))  # [draw] each
    both = own, np.mean(random, axis=0)
    noise = [(size[1:].mean() - size[0]) / (math.sqrt(2) - 1) for size in both]
    added, taken = (np.clip(x, 0, size[0]) for x, size in zip(noise, both, strict=True))
    value, *draws = both[0] - both[1]
    found = from_draws(value, draws - (np.mean(draws) - value))
    off = taken - added, -added, taken, -added, taken, 0.0  # of an estimate's parts
    effect = Estimate(*(float(x + y) for x, y in zip(found, off, strict=True)))
    null = np.array(random)[:, 0]
    return effect, null - null.mean()


def change(a: Scores, b: Scores, media=None) -> Estimate:
    """The mean of b - a over the same rows, scores in [0, 1]; arguments as in `estimate`."""
    first, second = _strata(a), _strata(b)
    if [(k, v.size) for k, v in first.items()] != [(k, v.size) for k, v in second.items()]:
        raise ValueError("paired values must come from the same benchmarks and rows")
    changes = {k: second[k] - first[k] for k in first}
    return estimate(changes, media, (-1.0, 1.0), 1.0)


def share(
    lost: Scores, above: Scores, media=None, extra: float = 0.0, draws: float = math.inf
) -> Estimate:
    """What is `lost` of what was `above`, benchmarks counting alike: a ratio, linearised by row.

    Losses of rows lie in [-1, 1]; a row may lose more than the average holds. media, draws as in
    `estimate`; extra is further variance of the mean loss. NaN where nothing is above.
    """
    first, second = _strata(lost), _strata(above)
    down, size = (np.mean([group.mean() for group in of.values()]) for of in (first, second))
    if size <= 0:
        return Estimate(*[math.nan] * 6)
    level = down / size
    shares = {k: level + (first[k] - level * second[k]) / size for k in first}
    return estimate(shares, media, (-1 / size, 1 / size), 1.0, extra / size**2, draws)


def mean_over_samples(table: pd.DataFrame, value: str, by=("layer", "set")) -> pd.DataFrame:
    """Mean over samples for each `by`, with its 95 % interval: columns *by, value, low, high, n.

    ValueError if a sample has two values under one `by`.
    """
    if (twice := table.duplicated(["sample", *by])).any():
        first = table.loc[twice, ["sample", *by]].iloc[0].to_dict()
        raise ValueError(f"two values of {first}; add what tells them apart to by={list(by)}")
    wide = table.pivot_table(value, "sample", list(by), sort=False)
    columns = wide.columns.to_frame(index=False)
    found = dict(zip((value, "low", "high"), interval(wide.to_numpy()), strict=True))
    return columns.assign(**found, n=wide.notna().sum().to_numpy())


def matched(a: pd.DataFrame, b: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The rows of two tables side by side; what both have beside the key is called _a and _b."""
    both = a.merge(b, on=list(key), suffixes=("_a", "_b"), validate="one_to_one")
    if not len(both) == len(a) == len(b):
        what = f"only {len(both)} rows are in both tables (of {len(a)} and {len(b)})"
        raise ValueError(f"{what}: measure both conditions on the same samples")
    return both


def paired(
    before: pd.DataFrame, after: pd.DataFrame, value: str, by: Sequence[str] = ("layer", "set")
) -> pd.DataFrame:
    """after - before of the same samples: one row per sample and `by`."""
    key = ["sample", *by]
    both = matched(before[[*key, value]], after[[*key, value]], key)
    return both[key].assign(**{value: both[f"{value}_b"] - both[f"{value}_a"]})


# --- nulls ---------------------------------------------------------------------------------------


def shuffles(labels: np.ndarray, groups: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """The labels [token], and n shuffles of them within each group, [n + 1, token]."""
    rank = np.unique(groups, return_inverse=True)[1]
    slots = np.argsort(rank, kind="stable")
    drawn = np.argsort(rank + np.random.default_rng(seed).random((n, len(rank))), axis=1)
    out = np.tile(labels, (n + 1, 1))
    out[1:, slots] = labels[drawn]
    return out


def less(a: Estimate, b: Estimate) -> Estimate:
    """The difference a - b of two estimates from rows that are not the same."""
    return around(a.mean - b.mean, math.hypot(a.error, b.error))


def summed(parts: Sequence[Estimate]) -> Estimate:
    """The sum of estimates from rows that are not the same, by the normal distribution."""
    return around(sum(part.mean for part in parts), math.hypot(*(part.error for part in parts)))


def around(mean: float, error: float, df: float = math.inf) -> Estimate:
    """The estimate of a mean with this standard error, by t with so many degrees of freedom."""
    wide, narrow = stats.t.ppf([0.975, 0.95], df) * error
    return Estimate(mean, mean - wide, mean + wide, mean - narrow, mean + narrow, error)


def reported(mean: float, low: float, high: float) -> Estimate:
    """An estimate of which its mean and 95 % interval are told, by the normal distribution."""
    return around(mean, (high - low) / 2 / stats.norm.ppf(0.975))


def exchanged(second: np.ndarray, groups: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """The labels bool [token], and n times with the two kinds exchanged in a random half of groups.

    Tokens of one prompt are not exchangeable, but under the null that kinds mean nothing a prompt's
    two kinds are: [n + 1, token].
    """
    group = np.unique(groups, return_inverse=True)[1]
    flips = np.random.default_rng(seed).random((n, group.max() + 1)) < 0.5
    return np.vstack([second, second ^ flips[:, group]])


def rank_p(value: float, draws: ArrayLike, tail: str) -> float:
    """Permutation p: (1 + draws at least as extreme) / (1 + draws), never 0.

    tail is "less", "greater", or "two-sided", which compares magnitudes. NaN if any number is.
    """
    turn = {"less": np.negative, "greater": np.positive, "two-sided": np.abs}
    if tail not in turn:
        raise ValueError(f"tail={tail!r}: use one of {', '.join(turn)}")
    value, null = turn[tail](value), turn[tail](_draws(draws))
    p = (1 + (null >= value - 1e-12).sum()) / (1 + null.size)
    return float("nan") if np.isnan([value, *null]).any() else float(p)


class Resampling:
    """Samples of a token table as bootstrap draws, per-sample means and shuffled labels."""

    def __init__(self, tokens: pd.DataFrame, second: str, n_boot: int, n_null: int, seed: int):
        self.group = np.unique(tokens["sample"], return_inverse=True)[1]
        self.size = self.group.max() + 1
        self.draws = resamples(int(self.size), n_boot, seed)
        self.second = shuffles((tokens["kind"] == second).to_numpy(), self.group, n_null, seed)
        self.own = self.second[0]
        self.token_draws = self.draws[:, self.group]  # how often each token occurs in each draw
        self._one_hot = np.eye(self.size)[self.group]

    def by_sample(self, values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Means over each sample's tokens, [..., token] -> [..., sample]; NaN without any."""
        where = np.ones_like(values) if where is None else np.broadcast_to(where, values.shape)
        with np.errstate(invalid="ignore"):
            return (values * where) @ self._one_hot / (where @ self._one_hot)

    def means(self, values: np.ndarray, where: np.ndarray | None = None) -> tuple:
        """Means of `by_sample` of values [1 + n_null, token]: the value, its draws, its null."""
        mean = self.by_sample(values, where)
        value, *null = np.nanmean(mean, axis=1)
        return value, weighted(mean[0], self.draws), np.array(null)


def table_row(measure: str, value, draws, null, *, greater: bool = True) -> dict:
    """A row of a table: an interval from draws, a null, and p in the claim's direction."""
    low, high = middle95(draws)
    null_low, null_high = middle95(null)
    row = {"measure": measure, "value": float(value), "low": low, "high": high}
    row |= {"null": float(np.mean(null)), "null_low": null_low, "null_high": null_high}
    return row | {"p": rank_p(value, null, "greater" if greater else "less")}


# --- claims and verdicts --------------------------------------------------------------------------

WORDS = HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
LEVEL = 0.05
TOLERANCE = 0.02
"""How far a number may move on another processor: absolute up to 1, a share of larger numbers."""


class Claim(NamedTuple):
    """A claim of the paper as it is tested: its words, headline measure, smallest effect of
    interest with the reason for it, and what it is against; stated before it was measured."""

    text: str
    measure: str
    smallest: float
    why: str
    against: str
    minor: bool = False  # in the scorecard's table, but not in its picture


@cache
def claims() -> dict[str, Claim]:
    """What is tested, by name: "I" is finding I's headline, "I any layer" another of its lines."""
    stated = yaml.safe_load(Path(__file__).with_name("claims.yml").read_text())
    return {name: Claim(**what) for name, what in stated.items()}


def claim(name: str) -> Claim:
    """The claim of this name; ValueError lists them."""
    if name not in (known := claims()):
        raise ValueError(f"no claim {name!r} in claims.yml; there are {', '.join(known)}")
    return known[name]


def judge(
    name: str, effect: Estimate, null: str | ArrayLike, p: float | None = None, rows: int = 0
) -> dict:
    """The line of a claim by `decide`.

    null holds draws of the effect where there is none, whose rank is p, or says in words what the
    effect is against. Beside the columns of a `claims_table`: name, effect, low, high (its 95 %
    interval), high90 (the upper end of its 90 % interval), smallest, power (how often twice the
    smallest would be seen with this error), and settles, the `rows` that would tell (none given:
    NaN).
    """
    of = claim(name)
    if not isinstance(null, str):
        p, null = rank_p(effect.mean, null, "greater"), range_of(null)
    own = {"name": name, "effect": effect.mean, "low": effect.low, "high": effect.high}
    own |= {"high90": effect.high90, "smallest": of.smallest}
    own |= {"power": power(effect.error, of.smallest) if effect.error else 1.0}
    own |= {"settles": settles(effect, of.smallest, rows or math.nan)}
    measured = spread(*effect[:3], sign="+")
    return line(of.text, measured, null, decide(effect, of.smallest, p), p) | own


def discoveries(lines: Sequence[dict]) -> list[dict]:
    """A finding's lines, with false discovery rates as the p of all but the first, the headline.

    Benjamini and Hochberg 1995; what *holds* by its own p and not by its rate cannot be told.
    """
    tested = [x for x in lines[1:] if x["p"] is not None and not math.isnan(x["p"])]
    rates = stats.false_discovery_control([x["p"] for x in tested]) if tested else []
    at = {id(x): float(q) for x, q in zip(tested, rates, strict=True)}
    out = []
    for x in lines:
        q, verdict = at.get(id(x), x["p"]), x["verdict"]
        if id(x) in at and verdict.word == HOLDS:
            below = _more(LEVEL, q, LEVEL / 10)
            held = Verdict(HOLDS, min(verdict.margin, below))
            verdict = held if below > 0 else Verdict(UNKNOWN, -below)
        out.append(x | {"p": q, "verdict": verdict})
    return out


class Verdict(NamedTuple):
    """A word, and by how many tolerances its numbers must move until it may be another."""

    word: str
    margin: float  # below 1 another processor's last digits could decide otherwise

    def __str__(self) -> str:
        return self.word + (" (close)" if self.margin < 1 else "")


def _more(a: float, b: float, tolerance: float = TOLERANCE) -> float:
    """By how many tolerances a > b: negative if it is not, -inf with NaN, and never 0.

    So `and` is the minimum, `not` the minus sign (Zadeh 1965).
    """
    if math.isnan(a) or math.isnan(b):
        return -math.inf
    away = max(abs(a - b) / (tolerance * max(1.0, abs(a), abs(b))), math.ulp(0))
    return away if a > b else -away


def decide(effect: Estimate, smallest: float, p: float | None = None) -> Verdict:
    """The rule for every claim that an effect is greater than the smallest one of interest.

    *Holds* if its 95 % interval lies beyond it and p, where there is one, is below 0.05. *Does not
    hold* if its 90 % interval ends before it (Schuirmann 1987: equivalence at 5 %). Else it *cannot
    be told*: `settles` says what would.
    """
    holds, fails = _more(effect.low, smallest), _more(smallest, effect.high90)
    if p is not None:
        holds = min(holds, _more(LEVEL, p, LEVEL / 10))
    word = HOLDS if holds > 0 else FAILS if fails > 0 else UNKNOWN
    return Verdict(word, {HOLDS: holds, FAILS: fails, UNKNOWN: min(-holds, -fails)}[word])


POWER = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
"""Standard errors between an effect and a bound from which on 80 % of intervals are clear of it."""


def power(error: float, smallest: float, effect: float | None = None) -> float:
    """How often a claim *holds* whose effect (default: twice the smallest) has this error.

    By the normal distribution: with fewer than some hundred rows a little too hopeful.
    """
    beyond = (2 * smallest if effect is None else effect) - smallest
    return float(stats.norm.cdf(beyond / error - stats.norm.ppf(0.975)))


def settles(effect: Estimate, smallest: float, rows: float) -> float:
    """The rows, in place of so many, that would tell an effect of this size from the smallest."""
    away = abs(effect.mean - smallest)
    need = rows * (POWER * effect.error / away) ** 2 if away else math.inf
    return float(np.ceil(need))


def spread(mean: float, low: float, high: float, *, sign: str = "", digits: int = 2) -> str:
    """A mean with its interval as text, "0.98 [0.96, 0.99]"; sign="+" shows it, -0.00 never."""
    return "{} [{}, {}]".format(*(f"{x:{sign}z.{digits}f}" for x in (mean, low, high)))


def range_of(draws: ArrayLike) -> str:
    """A null as text: its mean and the middle 95 % of its draws."""
    low, high = map(float, middle95(draws))
    return spread(float(np.mean(_draws(draws))), low, high, sign="+")


def line(claim: str, measured: str, null: str, verdict: Verdict, p: float | None = None) -> dict:
    """A line of a `claims_table`."""
    return {"claim": claim, "measured": measured, "null": null, "p": p, "verdict": verdict}


MEASURED = ["name", "effect", "low", "high", "smallest", "power", "settles"]


def claims_table(finding: str, lines: Iterable[Mapping]) -> pd.DataFrame:
    """A finding's closing table: finding, claim, measured, null, p, verdict, all text.

    Each line (`judge` or `line` makes one) holds claim, measured, null, verdict (a `Verdict` or its
    text), and p if it has one. What `judge` measured follows in the columns `MEASURED`, then high90
    and, where a line has it, the range of the same in the `untrained` controls as text.
    """

    def text(p: float | None) -> str:
        return "" if p is None or np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"

    columns = ["finding", "claim", "measured", "null", "p", "verdict"]
    for i, x in enumerate(lines := list(lines)):
        lack = [name for name in ("claim", "measured", "null", "verdict") if name not in x]
        if lack or str(x["verdict"]).removesuffix(" (close)") not in WORDS:
            fault = f"no {lack[0]!r}" if lack else f"verdict {x['verdict']!r}"
            words = f"a verdict is one of {', '.join(WORDS)}, with or without ' (close)'"
            raise ValueError(f"finding {finding}, line {i} ({x.get('claim')!r}): {fault}; {words}")
    rows = [
        (finding, x["claim"], x["measured"], x["null"], text(x.get("p")), str(x["verdict"]))
        for x in lines
    ]
    table = pd.DataFrame(rows, columns=columns)
    numbers = pd.DataFrame(lines).reindex(columns=[*MEASURED, "high90", "untrained"])
    return table.join(numbers) if any("name" in x for x in lines) else table
