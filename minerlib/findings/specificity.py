"""Are neurons needed for one modality, or for all: whose are silenced against what is asked.

At a dose that takes all, every score is 0 and nothing can be told apart: the crossing is read where
about half is lost. A modality's neurons are specific if they cost the benchmarks with it more than
another's neurons do, and the other's benchmarks less: the crossover interaction.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from minerlib import inference
from minerlib.inference import Estimate
from minerlib.tasks.evaluation import KEY, by_benchmark, chance, paired

Chances = Mapping[str, float]


def _lost(before: pd.DataFrame, after: pd.DataFrame, chances: Chances | None) -> pd.DataFrame:
    """Rows of `before` with `lost`, their part of what a benchmark has above chance, and `most`."""
    rows = before.set_index(KEY)
    rows["after"] = paired(before, after).set_index(KEY)["score_b"]
    rows = rows.reset_index()
    names = rows["benchmark"]
    guess = names.map(chance if chances is None else chances)
    above = rows["score"].groupby(names).transform("mean") - guess
    if (low := above <= 0).any():
        raise ValueError(
            f"{names[low].iloc[0]}: the score as it is is not above chance, so no share of it can "
            "be lost; leave the benchmark out"
        )
    return rows.assign(lost=(rows["score"] - rows["after"]) / above, most=1 / above)


def crossing(
    before: pd.DataFrame, silenced: Mapping[str, pd.DataFrame], chances: Chances | None = None
) -> pd.DataFrame:
    """The share of each benchmark's score above chance that each set of neurons costs.

    silenced holds answers (of `evaluate`) by whose neurons; chances each benchmark's score of blind
    guesses, by default the registry's. Columns silenced, benchmark, lost, low, high (95 %).
    """
    lines = []
    for name, table in silenced.items():
        for benchmark, rows in _lost(before, table, chances).groupby("benchmark", sort=False):
            most = rows["most"].max()
            found = inference.estimate(rows["lost"], rows["medium"], (-most, most), 1.0)
            lines.append([name, benchmark, *found[:3]])
    return pd.DataFrame(lines, columns=["silenced", "benchmark", "lost", "low", "high"])


def interaction(
    before: pd.DataFrame,
    own: pd.DataFrame,
    other: pd.DataFrame,
    where: Sequence[str],
    chances: Chances | None = None,
) -> Estimate:
    """What a's neurons cost more than b's on a's benchmarks `where`, less the same on the others.

    Shares of the score above chance, benchmarks counting alike; own and other are the answers with
    a's and b's neurons silenced. 2: each takes all of its own and nothing else; 0: both cost all
    benchmarks alike, however much.
    """
    rows = _lost(before, own, chances)
    rows["lost"] -= _lost(before, other, chances)["lost"]
    here = rows["benchmark"].isin(list(where))
    if here.all() or not here.any():
        held = sorted(rows["benchmark"].unique())
        raise ValueError(f"where={list(where)} must hold some of the benchmarks {held}, not all")
    parts = []
    for part in (rows[here], rows[~here]):
        most = part["most"].max()
        strata, media = by_benchmark(part, "lost"), by_benchmark(part, "medium")
        parts.append(inference.estimate(strata, media, (-most, most), 1.0))
    return inference.less(*parts)


def interactions(told: pd.DataFrame, where: Sequence[str]) -> np.ndarray:
    """The same in nats a token, of pairs of sets silenced in turn: a, b, a, b, ... [pair].

    told is of `Workbook.logprobs`, whose `neurons` counts the sets.
    """
    nats = told.groupby(["neurons", "benchmark"])["logprob"].mean().unstack()
    more = nats.values[1::2] - nats.values[::2]  # the lower with a's, the more a's cost
    here = nats.columns.isin(list(where))
    return more[:, here].mean(1) - more[:, ~here].mean(1)
