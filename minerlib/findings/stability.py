"""Whether the neurons that are found depend on the rows that they are found on.

A benchmark's scores are means over its rows. So the rows are mined in blocks, once, and scores of
any union of blocks are the blocks' means, weighted by their rows (`pooled`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image

from minerlib.aggregation import aggregate
from minerlib.artifacts import computation
from minerlib.findings.convergence import behind
from minerlib.inference import Estimate, around
from minerlib.selection import matched_random
from minerlib.tasks.spec import Sample

BLOCKS = 8
Mined = Mapping[str, Sequence[xr.DataArray]]  # of each benchmark, the scores of every block
Choose = Callable[[xr.DataArray], Mapping[str, xr.DataArray]]
"""From scores to each modality's neurons, bool [1, layer, neuron]."""


def cuts(rows: int) -> list[int]:
    """Where blocks of rows end: `BLOCKS` equal ones, the first of them cut at 1, 2, 5, 10, ...

    ValueError with fewer rows than blocks.
    """
    if rows < BLOCKS:
        raise ValueError(f"limit={rows}: stability is measured on at least {BLOCKS} rows")
    ends = [round(rows * i / BLOCKS) for i in range(1, BLOCKS + 1)]
    first = [n for k in range(6) for n in (10**k, 2 * 10**k, 5 * 10**k) if n < ends[0]]
    return first + ends


def pooled(blocks: Sequence[xr.DataArray]) -> xr.DataArray:
    """The scores of all rows of these blocks of one benchmark, as `score` would give them."""
    n = np.stack([block.samples.values for block in blocks])  # [block, modality]
    weights = n / n.sum(0).clip(1)
    values = sum(w[:, None, None] * b.values for w, b in zip(weights, blocks, strict=True))
    out = blocks[0].copy(data=np.asarray(values, np.float32))
    rows = [block.attrs["rows"] for block in blocks]
    means = [block.activation_mean.values for block in blocks]
    low = np.min([block.activation_min.values for block in blocks], axis=0)
    return out.assign_coords(
        samples=("modality", n.sum(0)),
        activation_mean=(("layer", "neuron"), np.average(means, axis=0, weights=rows)),
        activation_min=("layer", low),
    ).assign_attrs(rows=sum(rows))


def of_rows(mined: Mined, blocks: Sequence[int]) -> xr.DataArray:
    """Stage 3 on the numbered blocks of every benchmark."""
    return aggregate([pooled([of[i] for i in blocks]) for of in mined.values()])


def elsewhere(own: Mapping[str, xr.DataArray], others: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """How far each modality's neurons are those of other models' sets, bool [modality, layer,
    neuron]: columns model, theirs, modality, shared, chance.

    shared is the part of the smaller set that lies in the larger, chance what that is of sets drawn
    at random. Models of another shape are left out.
    """
    lines = []
    for model, sets in others.items():
        for (m, of), theirs in product(own.items(), sets.modality.values.tolist()):
            a, b = of.values.any(0), sets.sel(modality=theirs).values
            if a.shape == b.shape and (smaller := min(a.sum(), b.sum())):
                shared, chance = (a & b).sum() / smaller, max(a.mean(), b.mean())
                lines.append([model, theirs, m, shared, chance])
    return pd.DataFrame(lines, columns=["model", "theirs", "modality", "shared", "chance"])


def shared(a: Mapping[str, xr.DataArray], b: Mapping[str, xr.DataArray]) -> dict[str, float]:
    """The share of each modality's neurons in `a` that `b` has for it too."""
    return {
        m: float((a[m].values & b[m].values).sum() / max(a[m].values.sum(), 1)) for m in a if m in b
    }


@computation(version=1)
def growing(mined: Mined, ends: Sequence[int], choose: Choose) -> pd.DataFrame:
    """What is found on the first rows and on all: columns rows, modality, shared (with all)."""
    whole = choose(of_rows(mined, range(len(ends))))
    lines = []
    for i, rows in enumerate(ends):
        some = shared(choose(of_rows(mined, range(i + 1))), whole)
        lines += [{"rows": rows, "modality": m, "shared": share} for m, share in some.items()]
    return pd.DataFrame(lines)


def enough(grown: pd.DataFrame, share: float = 0.95) -> int:
    """The fewest rows from which on every modality shares as much with all rows."""
    least = grown.groupby("rows")["shared"].min()
    short = least.index[least < share]
    return int(least.index[least.index > (short.max() if len(short) else 0)].min())


@computation(version=1)
def halves(mined: Mined, ends: Sequence[int], choose: Choose) -> pd.DataFrame:
    """What is found on each half of the rows, for every way to halve them by their `BLOCKS`.

    Columns way (-1: all rows), modality, other (share of the half's neurons that the other half
    has too), whole (that all rows have), alone (that no other modality has), benchmarks (share
    that two benchmarks have in common, each mined alone; NaN where one alone holds the modality);
    and `other within` and `whole within`, the same of the half alone, halved again in every way:
    two complementary halves share alike, so that only these tell how much the rows matter.
    """
    first = len(ends) - BLOCKS + 1
    groups = [range(first), *([i] for i in range(first, len(ends)))]

    def pools_of(way: Sequence[int]) -> list[xr.DataArray]:
        blocks = [k for i in way for k in groups[i]]
        return [pooled([of[i] for i in blocks]) for of in mined.values()]

    def found(way: Sequence[int]) -> tuple[Mapping[str, xr.DataArray], dict, dict]:
        pools = pools_of(way)
        apart = [choose(aggregate([pool])) for pool in pools] if len(pools) > 1 else []
        pairs = pd.DataFrame([shared(a, b) for a, b in combinations(apart, 2)])
        chosen = choose(aggregate(pools))
        return chosen, alone(chosen), pairs.mean().to_dict()

    whole, *own = found(range(BLOCKS))
    ways = combinations(range(BLOCKS), BLOCKS // 2)
    half = {way: found(way) for way in ways}
    quarter = combinations(range(BLOCKS), BLOCKS // 4)
    pairs_of = {pair: choose(aggregate(pools_of(pair))) for pair in quarter}

    def within(way: Sequence[int], one: Mapping[str, xr.DataArray]) -> list[pd.Series]:
        """What two quarters share, and what a quarter shares with its half, by modality."""
        quarters = [q for q in pairs_of if set(q) <= set(way)]
        rest = [tuple(i for i in way if i not in q) for q in quarters]
        pairs = [shared(pairs_of[q], pairs_of[r]) for q, r in zip(quarters, rest, strict=True)]
        return [
            pd.DataFrame(x).mean() for x in (pairs, [shared(pairs_of[q], one) for q in quarters])
        ]

    lines = [{"way": -1, "modality": m, "alone": own[0][m], "benchmarks": own[1].get(m)}
             for m in whole]  # fmt: skip
    for number, (way, (one, single, pairs)) in enumerate(half.items()):
        other = shared(one, half[tuple(i for i in range(BLOCKS) if i not in way)][0])
        apart, of_half = within(way, one)
        of_whole = shared(one, whole)
        lines += [
            {"way": number, "modality": m, "other": other[m], "whole": of_whole[m],
             "alone": single[m], "benchmarks": pairs.get(m),
             "other within": apart.get(m), "whole within": of_half.get(m)}
            for m in one if m in other
        ]  # fmt: skip
    return pd.DataFrame(lines).astype({"benchmarks": float})


def alone(chosen: Mapping[str, xr.DataArray]) -> dict[str, float]:
    """The share of each modality's neurons that are no other modality's."""
    taken = sum(of.values.astype(int) for of in chosen.values())
    return {
        m: float((of.values & (taken == 1)).sum() / of.values.sum()) for m, of in chosen.items()
    }


def replicated(value: float, replicates: Sequence[float]) -> Estimate:
    """A statistic of all rows, its error from its values on half of them.

    Balanced half-samples (McCarthy 1969): the mean square of their differences from `value`
    estimates its variance; t with one degree of freedom fewer than there are blocks.
    """
    error = math.sqrt(np.mean((np.asarray(replicates) - value) ** 2))
    return around(value, error, BLOCKS - 1)


def spread_of(value: float, replicates: Sequence[float]) -> Estimate:
    """The same where replicates are of fewer rows and so of another mean: the error is their
    spread around it, which is rather too large."""
    values = np.asarray(replicates, float)
    return replicated(value, value + values - values.mean())


def by_chance(chosen: Mapping[str, xr.DataArray], draws: int, seed: int = 0) -> np.ndarray:
    """The mean share of two random sets of each modality's size in each layer, [draw]."""
    found = []
    for i in range(draws):
        sets = [matched_random(of, seed + i, by_layer=True).values for of in chosen.values()]
        found.append([
            (of.values & drawn).sum() / of.values.sum()
            for of, drawn in zip(chosen.values(), sets, strict=True)
        ])  # fmt: skip
    return np.mean(found, axis=1)


# --- the same rows, asked otherwise --------------------------------------------------------------


@computation(version=1)
def reworded(sample: Sample) -> Sample:
    """Another wording: a sentence in front that asks for nothing else."""
    return replace(sample, prompt=f"Here is a question for you.\n{sample.prompt}")


@computation(version=1)
def medium_behind(sample: Sample) -> Sample:
    """The medium behind the question instead of in front."""
    return behind([sample])[0]


@computation(version=1)
def noise(sample: Sample) -> Sample:
    """Noise in the medium's place, as large or long (and a sound as loud), drawn by the row."""
    rng = np.random.default_rng(sample.row)
    made: dict[str, Any] = {}
    if sample.image is not None:
        pixels = rng.integers(0, 256, np.asarray(sample.image).shape, dtype=np.uint8)
        made["image"] = Image.fromarray(pixels)
    if sample.video is not None:
        made["video"] = rng.integers(0, 256, sample.video.shape, dtype=np.uint8)
    if sample.audio is not None:
        wave = rng.standard_normal(len(sample.audio)) * sample.audio.std()
        made["audio"] = wave.astype(np.float32)
    return replace(sample, **made)


CHANGES = {"other words": reworded, "medium behind": medium_behind, "noise for the medium": noise}
