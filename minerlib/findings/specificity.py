"""Are neurons needed for one modality, or for all: whose are silenced against what is asked.

At a dose that takes all, every score is 0 and nothing can be told apart: the crossing is read where
about half is lost. A modality's neurons are specific if they cost the benchmarks with it more than
another's neurons do, and the other's benchmarks less: the crossover interaction.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from minerlib import inference
from minerlib.inference import Estimate
from minerlib.tasks.evaluation import KEY, guesses, paired


def _lost(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Rows of `before` with two columns more.

    The mean of `lost` is the share of a benchmark's score above chance that is lost, a ratio,
    linearised; `most` is the largest share that one row can be.
    """
    rows = before.set_index(KEY)
    rows["down"] = rows["score"] - paired(before, after).set_index(KEY)["score_b"]
    rows = rows.reset_index()
    rows["above"] = rows["score"] - guesses(rows)
    for name, of in rows.groupby("benchmark", sort=False):
        if not inference.estimate(of["above"], of["medium"], None).low > 0:
            raise ValueError(
                f"{name}: the score as it is is not surely above chance, so no share of it can be "
                "lost; take more rows, or leave the benchmark out"
            )
    mean = rows.groupby("benchmark")[["down", "above"]].transform("mean")
    share = mean["down"] / mean["above"]
    lost = share + (rows["down"] - share * rows["above"]) / mean["above"]
    return rows.assign(lost=lost, most=1 / mean["above"])


def _each(rows: pd.DataFrame) -> dict[str, Estimate]:
    """The mean of `lost` on each benchmark."""
    found = {}
    for name, of in rows.groupby("benchmark", sort=False):
        most = of["most"].iloc[0]
        found[str(name)] = inference.estimate(of["lost"], of["medium"], (-most, most), 1.0)
    return found


def crossing(before: pd.DataFrame, silenced: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The share of each benchmark's score above chance that each set of neurons costs.

    silenced holds answers (of `evaluate`) by whose neurons. Columns silenced, benchmark, lost, low,
    high (95 %).
    """
    lines = [
        [name, benchmark, *found[:3]]
        for name, table in silenced.items()
        for benchmark, found in _each(_lost(before, table)).items()
    ]
    return pd.DataFrame(lines, columns=["silenced", "benchmark", "lost", "low", "high"])


def interaction(
    before: pd.DataFrame, own: pd.DataFrame, other: pd.DataFrame, where: Sequence[str]
) -> Estimate:
    """What a's neurons cost more than b's on a's benchmarks `where`, less the same on the others.

    Shares of the score above chance, benchmarks counting alike; own and other are the answers with
    a's and b's neurons silenced. 2: each takes all of its own and nothing else; 0: both cost all
    benchmarks alike, however much.
    """
    rows = _lost(before, own)
    rows["lost"] -= _lost(before, other)["lost"]
    found = _each(rows)
    _some_of(where, found)
    here = [estimate for name, estimate in found.items() if name in where]
    there = [estimate for name, estimate in found.items() if name not in where]
    return inference.less(_mean(here), _mean(there))


def _some_of(where: Sequence[str], held: Iterable[str]) -> None:
    if not where or not set(where) < set(held):
        raise ValueError(f"where={list(where)} must be some of the benchmarks {sorted(held)}")


def _mean(parts: Sequence[Estimate]) -> Estimate:
    """Of estimates of rows that are not the same."""
    mean = float(np.mean([part.mean for part in parts]))
    error = math.hypot(*(part.error for part in parts)) / len(parts)
    return Estimate(mean, mean, mean, mean, mean, error)  # its ends are `less`'s


def interactions(told: pd.DataFrame, where: Sequence[str]) -> np.ndarray:
    """The same in nats a token, of pairs of sets silenced in turn: a, b, a, b, ... [pair].

    told is of `Workbook.logprobs`, whose `neurons` counts the sets.
    """
    _some_of(where, told["benchmark"].unique())
    if (n := told["neurons"].nunique()) % 2:
        raise ValueError(f"{n} sets of neurons are no pairs: give a, b, a, b, ...")
    nats = told.groupby(["neurons", "benchmark"])["logprob"].mean().unstack()
    more = nats.values[1::2] - nats.values[::2]  # the lower with a's, the more a's cost
    here = nats.columns.isin(list(where))
    return more[:, here].mean(1) - more[:, ~here].mean(1)
