"""Are neurons needed for one modality, or for all: whose are silenced against what is asked.

At a dose that takes all, every score is 0 and nothing can be told apart: the crossing is read where
about half is lost. A modality's neurons are specific if they cost the benchmarks with it more than
another's neurons do, and the other's benchmarks less: the crossover interaction.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from minerlib import inference
from minerlib.critical import together
from minerlib.inference import Estimate
from minerlib.selection import Weights, jaccard, weighted
from minerlib.selectors import less_the_largest_other
from minerlib.tasks.evaluation import KEY, guesses, paired
from minerlib.written import as_loud, with_partner


def _lost(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Rows of `before` with two columns more.

    The mean of `lost` is the share of a benchmark's score above chance that is lost, a ratio,
    linearised; `most` is the largest share that one row can be.
    """
    rows = before.set_index(KEY)
    rows["down"] = rows["score"] - paired(before, after).set_index(KEY)["score_b"]
    rows = rows.reset_index()
    rows["above"] = rows["score"] - guesses(rows)
    if lost_in_chance := sorted(set(rows["benchmark"]) - set(answerable(before))):
        raise ValueError(
            f"{lost_in_chance[0]}: the score as it is is not surely above chance, so no share of "
            "it can be lost; take more rows, or leave the benchmark out"
        )
    mean = rows.groupby("benchmark")[["down", "above"]].transform("mean")
    share = mean["down"] / mean["above"]
    lost = share + (rows["down"] - share * rows["above"]) / mean["above"]
    return rows.assign(lost=lost, most=1 / mean["above"])


def answerable(before: pd.DataFrame) -> list[str]:
    """The benchmarks on which the model is surely above chance, so that a share can be lost."""
    return [
        str(name)
        for name, of in before.assign(above=before["score"] - guesses(before)).groupby(
            "benchmark", sort=False
        )
        if inference.estimate(of["above"], of["medium"], None).low > 0
    ]


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


def holding(modality: str, media: Mapping[str, str]) -> list[str]:
    """The benchmarks that a modality is asked about."""
    return [name for name, of in media.items() if of == modality]


def contrasts(modalities: Sequence[str], media: Mapping[str, str]) -> pd.DataFrame:
    """How much each set's loss on each benchmark counts in the crossover interaction.

    Of two modalities a and b: a's less b's, on a's benchmarks (their mean) less on b's; the mean
    over the pairs of modalities that have a set and a benchmark. [modality, benchmark].
    """
    has = [m for m in modalities if m in media.values()]
    if len(has) < 2:
        raise ValueError(
            f"benchmarks hold {sorted(set(media.values()))}, sets of neurons are of "
            f"{list(modalities)}: two modalities need both"
        )
    weights = pd.DataFrame(0.0, list(modalities), list(media))
    pairs = list(combinations(has, 2))
    for pair in pairs:
        for a, b in (pair, pair[::-1]):
            own = holding(a, media)
            weights.loc[a, own] += 1 / len(own) / len(pairs)
            weights.loc[b, own] -= 1 / len(own) / len(pairs)
    return weights


def interaction(
    before: pd.DataFrame, silenced: Mapping[str, pd.DataFrame], media: Mapping[str, str]
) -> Estimate:
    """The crossover interaction in shares of the score above chance, each benchmark's of its own.

    silenced holds the answers with each modality's neurons silenced, media each benchmark's
    modality. 2: each takes all of its own and nothing else; 0: all cost all benchmarks alike,
    however much.
    """
    return _summed(before, silenced, contrasts([*silenced], media))


def _summed(before, silenced: Mapping[Any, pd.DataFrame], weights: pd.DataFrame) -> Estimate:
    """What the losses, each weighted, come to."""
    losses = {name: _lost(before, table) for name, table in silenced.items()}
    rows = next(iter(losses.values()))
    rows = rows[rows["benchmark"].isin(weights.columns[(weights != 0).any()])]
    total = sum(
        of.loc[rows.index, "lost"] * rows["benchmark"].map(weights.loc[name])
        for name, of in losses.items()
    )
    reach = weights.clip(lower=0).sum()  # of a benchmark's losses, each between 0 and `most`
    rows = rows.assign(lost=total, most=rows["most"] * rows["benchmark"].map(reach))
    return inference.summed([*_each(rows).values()])


def more_specific(
    before: pd.DataFrame,
    one: Mapping[str, pd.DataFrame],
    other: Mapping[str, pd.DataFrame],
    media: Mapping[str, str],
) -> Estimate:
    """The crossover interaction of some sets less that of others, on the same rows."""
    sets = {("one", m): table for m, table in one.items()}
    sets |= {("other", m): table for m, table in other.items()}
    signed = {"one": contrasts([*one], media), "other": -contrasts([*other], media)}
    return _summed(before, sets, pd.concat(signed))


def costlier(
    before: pd.DataFrame, one: Mapping[str, pd.DataFrame], other: Mapping[str, pd.DataFrame]
) -> Estimate:
    """Share of the score above chance that some sets cost more than others: each benchmark's share
    of its own, averaged over the sets and the benchmarks (`silencing.beyond_draws` takes the
    average's share)."""
    share = 1 / before["benchmark"].nunique()
    sets, weights = {}, {}
    for sign, of in ((1, one), (-1, other)):
        for m, table in of.items():
            sets[sign, m] = table
            weights[sign, m] = dict.fromkeys(before["benchmark"].unique(), sign * share / len(of))
    return _summed(before, sets, pd.DataFrame.from_dict(weights, orient="index"))


def interactions(told: pd.DataFrame, modalities: Sequence[str], media: Mapping[str, str]):
    """`interaction` in nats a token [round], of sets silenced in turn, one a modality, over again.

    told is of `Workbook.logprobs`, whose `neurons` counts the sets.
    """
    if (n := told["neurons"].nunique()) % (k := len(modalities)):
        raise ValueError(f"{n} sets of neurons are no rounds of {k}: give one for each modality")
    weights = contrasts(modalities, media)
    nats = told.groupby(["neurons", "benchmark"])["logprob"].mean().unstack()
    nats = nats[weights.columns].values.reshape(-1, *weights.shape)
    return -np.einsum("rmb,mb->r", nats, weights.values)


def without(sets: Mapping[str, xr.DataArray], others: xr.DataArray) -> dict[str, xr.DataArray]:
    """Each set without these neurons, bool [layer, neuron]."""
    return {m: of & ~others for m, of in sets.items()}


def in_two(sets: Mapping[str, xr.DataArray]) -> xr.DataArray:
    """The neurons that are in more than one of the sets, bool [layer, neuron]."""
    found = xr.concat([of.any("modality") for of in sets.values()], "set")
    return found.sum("set") > 1


def by_layer(sets: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """Jaccard overlap of each two sets in each layer: columns pair, layer, overlap."""
    lines = []
    for a, b in combinations(sets, 2):
        one, two = (sets[m].any("modality").values for m in (a, b))
        share = enumerate(jaccard(one, two))
        lines += [{"pair": f"{a}, {b}", "layer": i, "overlap": x} for i, x in share]
    return pd.DataFrame(lines)


def at_own_tokens(
    before: pd.DataFrame,
    own: Mapping[str, pd.DataFrame],
    elsewhere: Mapping[str, pd.DataFrame],
    media: Mapping[str, str],
) -> Estimate:
    """Share of the score above chance on a medium's benchmarks that its neurons cost at its own
    tokens alone, less at all others alone; averaged over the media."""
    kinds = [m for m in own if m in media.values()]
    weights = pd.DataFrame(0.0, kinds, list(media))
    for m in kinds:
        names = holding(m, media)
        weights.loc[m, names] = 1 / len(names) / len(kinds)
    sets = {("own", m): own[m] for m in kinds} | {("elsewhere", m): elsewhere[m] for m in kinds}
    return _summed(before, sets, pd.concat({"own": weights, "elsewhere": -weights}))


def by_contrast(scores: xr.DataArray, weights: Weights) -> xr.DataArray:
    """Scores of the same shape whose every metric is the weighted score less the largest of any
    other modality: weighted in any way they rank neurons by contrast."""
    value = less_the_largest_other(weighted(scores, weights))
    told = xr.DataArray(value, dims=("modality", "layer", "neuron"))
    return scores.copy(data=told.broadcast_like(scores).transpose(*scores.dims).values)


def rounds(
    sets: Mapping[str, xr.DataArray],
    loud: xr.DataArray,
    n: int,
    seed: int = 0,
    outside: Sequence[xr.DataArray] = (),
) -> tuple[list[xr.DataArray], pd.DataFrame]:
    """Each set's neurons that have partners as loud (`written.as_loud`), then n times partners of
    these, set by set; and who stands for whom in the first matching, for `written.balance`.

    Partners are in none of the sets, nor in those `outside`, bool [modality, layer, neuron]. They
    are matched in another order every time, and so a round may find fewer of them.
    """
    taken = together([*sets.values(), *outside])
    pairs = {m: as_loud(of, loud, seed, outside=taken)[1] for m, of in sets.items()}
    own = {m: with_partner(of, pairs[m]) for m, of in sets.items()}
    if none := [m for m, of in own.items() if not of.any()]:
        raise ValueError(f"none of the neurons of {none} has a partner that writes as much")
    drawn = [as_loud(of, loud, seed + i, outside=taken)[0] for i in range(n) for of in own.values()]
    return [*own.values(), *drawn], pd.concat(pairs.values(), ignore_index=True)


def pairwise(
    before: pd.DataFrame, silenced: Mapping[str, pd.DataFrame], media: Mapping[str, str]
) -> pd.DataFrame:
    """`interaction` of each two modalities that have benchmarks: columns pair, interaction, low,
    high."""
    lines = []
    for pair in combinations([m for m in silenced if m in media.values()], 2):
        two = {name: m for name, m in media.items() if m in pair}
        found = interaction(before, {m: silenced[m] for m in pair}, two)
        lines.append([", ".join(pair), *found[:3]])
    return pd.DataFrame(lines, columns=["pair", "interaction", "low", "high"])
