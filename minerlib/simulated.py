"""How far the rules of `inference` can be trusted: coverage, level and power on simulated answers.

Answers are right or wrong; those about one medium (one to three) share a chance of being right that
varies around the benchmark's (beta-binomial, correlation 0.3).
"""

from collections.abc import Iterable
from itertools import product

import numpy as np
import pandas as pd

from minerlib import inference
from minerlib.inference import FAILS, HOLDS, UNKNOWN

CORRELATION = 0.3
Answers = dict[str, np.ndarray]


def media(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Which medium each row is about, one to three rows each, int [row]."""
    sizes = rng.integers(1, 4, rows)
    return np.repeat(np.arange(rows), sizes)[:rows]


def answers(rng: np.random.Generator, about: np.ndarray, mean: float) -> np.ndarray:
    """Right (1) or wrong (0), [row], of this mean; rows about one medium correlate."""
    if mean in (0, 1):
        return np.full(len(about), float(mean))
    spread = (1 - CORRELATION) / CORRELATION
    chances = rng.beta(mean * spread, (1 - mean) * spread, about.max() + 1)
    return (rng.random(len(about)) < chances[about]).astype(float)


def coverage(
    means: Iterable[float], rows: Iterable[int], benchmarks: int = 4, n: int = 300, seed: int = 0
) -> pd.DataFrame:
    """How often the 95 % intervals hold the truth: columns mean, rows, of, covered, half (width).

    Of the average score over benchmarks, and of its paired change where a third of the right
    answers turn wrong.
    """
    rng, lines = np.random.default_rng(seed), []
    for mean, size in product(means, rows):
        hits = {"average": [], "change": []}  # type: dict[str, list]
        for _ in range(n):
            about = {str(b): media(rng, size) for b in range(benchmarks)}
            before = {b: answers(rng, m, mean) for b, m in about.items()}
            after = {b: x * (1 - answers(rng, about[b], 1 / 3)) for b, x in before.items()}
            truth = {"average": mean, "change": -mean / 3}
            found = {"average": inference.estimate(before, about)}
            found["change"] = inference.change(before, after, about)
            for what, e in found.items():
                hits[what].append((e.low <= truth[what] <= e.high, (e.high - e.low) / 2))
        for what, of in hits.items():
            covered, half = np.mean(of, axis=0)
            lines.append((mean, size, what, covered, half))
    return pd.DataFrame(lines, columns=["mean", "rows", "of", "covered", "half"])


def outcomes(
    effects: Iterable[float],
    rows: int,
    smallest: float = 0.25,
    mean: float = 0.8,
    benchmarks: int = 4,
    draws: int = 99,
    n: int = 300,
    seed: int = 0,
) -> pd.DataFrame:
    """The verdicts on silencing that costs a share of the score: by effect, the share of each word.

    Random draws cost nothing; an effect's log-probability lies as many of their standard deviations
    below them as the effect is hundredths.
    """
    rng, lines = np.random.default_rng(seed), []
    for effect in effects:
        words = []
        for _ in range(n):
            about = {str(b): media(rng, rows) for b in range(benchmarks)}
            before = {b: answers(rng, m, mean) for b, m in about.items()}
            lost = {b: x * answers(rng, about[b], effect) for b, x in before.items()}
            found = inference.share(lost, before, about)
            nats = rng.standard_normal(draws + 1)
            p = inference.rank_p(nats[0] - 100 * effect, nats[1:], "less")
            words.append(inference.decide(found, smallest, p).word)
        lines.append((effect, *(words.count(w) / n for w in (HOLDS, FAILS, UNKNOWN))))
    return pd.DataFrame(lines, columns=["effect", HOLDS, FAILS, UNKNOWN])
