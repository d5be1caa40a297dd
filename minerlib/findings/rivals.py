"""MINER beside other selectors: what each of them looks at, and the neurons that it names."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import spearmanr

from minerlib import planted
from minerlib.activity import SUMMED, UNITS, activity
from minerlib.aggregation import aggregate
from minerlib.artifacts import computation, entries
from minerlib.atlas import Neuron
from minerlib.atlas import named as named_as
from minerlib.findings import specificity, stability
from minerlib.gradients import gradients
from minerlib.model import MLLM
from minerlib.scoring import score
from minerlib.selection import first, jaccard, select
from minerlib.selectors import SELECTORS, Evidence, Selector, ranked
from minerlib.tasks import Benchmark
from minerlib.written import column_norms

Sets = dict[str, dict[str, xr.DataArray]]
"""By selector and modality, bool [1, layer, neuron]."""


def evidence(
    mllm: MLLM,
    rows: Mapping[str, Benchmark],
    modalities: Sequence[str],
    *,
    steps: int = 4,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Evidence]:
    """All that selectors look at, of these rows of each benchmark, by `activity.UNITS`.

    Three passes over the rows, one of them with gradients, of `steps` for integrated ones.
    """
    rest: dict[str, Any] = {
        "scores": aggregate(score(mllm, bench, batch_size=batch_size) for bench in rows.values()),
        "media": {name: bench.spec.modality for name, bench in rows.items()},
        "gradients": gradients(mllm, rows.values(), steps=steps, batch_size=min(batch_size, 8)),
        "norms": column_norms(mllm),
        "modalities": list(modalities),
        "seed": seed,
    }
    found = {name: activity(mllm, [bench], batch_size=batch_size) for name, bench in rows.items()}
    out = {}
    for unit in UNITS:
        domains = {name: part.sel(unit=unit) for name, part in found.items()}
        sums = [part.sel(statistic=SUMMED) for part in domains.values()]
        tokens = sum(part.tokens.values for part in sums)
        whole = sums[0].copy(data=sum(part.values for part in sums))
        whole = whole.assign_coords(tokens=("modality", tokens))
        out[unit] = Evidence(activity=whole, domains=domains, **rest)
    return out


MADE_OF = (score, aggregate, activity, gradients, select)
"""The computations that `ranks` and `recovered` rest on: their versions count in keys."""


def compared() -> list:
    """The selectors' names, and a user's own as they are: part of the key of what they name."""
    return entries(SELECTORS)


CLAIMED = ("miner", "LAPE", "attribution", "loudness")
"""The selectors that Q7's claims are about."""


def asked(names: Sequence[str] | str | None) -> list[str]:
    """The selectors that are compared: those `CLAIMED` and those named, as a list or with commas;
    None: all. ValueError for a name that none has."""
    if names is None:
        return list(SELECTORS)
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in SELECTORS]:
        use = f"use some of {', '.join(SELECTORS)}, or None for all"
        raise ValueError(f"selectors={names}: no {unknown[0]!r}; {use}")
    return [name for name in SELECTORS if name in (*CLAIMED, *names)]


def values(seen: Mapping[str, Evidence]) -> dict[str, xr.DataArray]:
    """What every selector makes of the evidence, [modality, layer, neuron]: by its name, of
    activations; with ", written" behind it, of down-projection inputs where that is another."""
    found = {name: selector(seen["activation"]) for name, selector in SELECTORS.items()}
    for name, selector in SELECTORS.items():
        of = selector(seen["written"])
        if not np.array_equal(of.values, found[name].values, equal_nan=True):
            found[f"{name}, written"] = of
    for name, of in found.items():
        for modality, unknown in zip(of.modality.values, np.isnan(of.values), strict=True):
            if unknown.any() and not unknown.all():
                where = f"{unknown.sum()} of {unknown.size} neurons for {str(modality)!r}"
                raise ValueError(f"selector {name!r} is NaN at {where}: give numbers, or none")
    return found


@computation(version=1)
def ranks(
    mllm: MLLM, rows: Mapping[str, Benchmark], modalities: Sequence[str], **how: Any
) -> xr.DataArray:
    """The rank that every selector gives every neuron, in (0, 1], 1 the first: float32 [selector,
    modality, layer, neuron]; NaN where it has none for a modality. how as for `evidence`."""
    found = values(evidence(mllm, rows, modalities, **how))
    shape = len(found), len(modalities), mllm.n_layers, mllm.n_neurons
    out = np.full(shape, np.nan, np.float32)
    for i, value in enumerate(found.values()):
        for modality, of in zip(value.modality.values, ranked(value).values[0], strict=True):
            out[i, list(modalities).index(modality)] = of
    coords = {"selector": list(found), "modality": list(modalities), "layer": range(shape[2])}
    return xr.DataArray(out, coords, ("selector", "modality", "layer", "neuron"), "ranks")


@computation(version=1)
def places(found: xr.DataArray, neurons: Sequence[Neuron]) -> dict[str, dict[str, int]]:
    """By each neuron's name its place among all by every selector of `ranks`, for every modality
    that it ranks them for: 1 the first."""
    of_all = ((1 - found) * found[0, 0].size).round() + 1
    return {
        named_as(neuron): {
            f"{name}, {m}": int(place)
            for name, by_modality in zip(found.selector.values, of_all.values, strict=True)
            for m, of in zip(found.modality.values, by_modality, strict=True)
            if not np.isnan(place := of[neuron])
        }
        for neuron in neurons
    }


@computation(version=1)
def named(found: xr.DataArray, n: int) -> xr.DataArray:
    """The n neurons that every selector of `ranks` names first for each modality: bool [selector,
    modality, layer, neuron], False throughout where it has none."""
    mask = np.zeros(found.shape, bool)
    for i, j in np.argwhere(~found.isnull().any(("layer", "neuron")).values):
        own = found[i, [j]].expand_dims(metric=["rank"]).drop_vars("selector")
        mask[i, j] = first(own, n, weights={"rank": 1.0}).values[0]
    out = found.copy(data=mask).rename("neurons")
    out.encoding = {"dtype": "int8", "zlib": True}
    return out


def sets(found: xr.DataArray) -> Sets:
    """`named` by selector and modality, without what a selector has none for."""
    found = found.astype(bool)  # once it was in a file
    return {
        name: {str(m): of.sel(modality=[m]).drop_vars("selector") for m in of.modality.values
               if of.sel(modality=m).any()}
        for name, of in zip(found.selector.values.tolist(), found, strict=True)
    }  # fmt: skip


@computation(version=3)
def recovered(
    mllm: MLLM,
    rows: Mapping[str, Benchmark],
    sites: pd.DataFrame,
    loud: Sequence[float],
    *,
    strength: float,
    seed: int = 0,
    **how: Any,
) -> pd.DataFrame:
    """What every selector finds of planted neurons (`planted.plant`): columns of `planted.found`,
    selector, modality. how as for `evidence`."""
    other = planted.plant(mllm, sites, loud, strength, seed)
    modalities = sites["modality"].unique().tolist()
    lines = [
        {"selector": name, "modality": m, **planted.found(value.sel(modality=m).values, sites, m)}
        for name, value in values(evidence(other, rows, modalities, seed=seed, **how)).items()
        for m in modalities
        if m in value.modality.values
    ]
    return pd.DataFrame(lines)


JOBS = {"scores": "scoring (stage 2)", "gradients": "gradients of rivals"}
JOBS |= dict.fromkeys(("activity", "domains"), "activity of rivals")


def price(seen: Evidence, passes: Mapping[str, float]) -> pd.Series:
    """What every selector takes, in forward passes: the sum of the jobs whose result it looks at.

    passes are those of each job of `costs.steps`. Selectors by gradients share one job.
    """

    def of(selector: Selector) -> float:
        looked = set[str]()

        class Watched(Evidence):
            def __getattribute__(self, name: str) -> Any:
                looked.add(name)
                return super().__getattribute__(name)

        selector(Watched(*seen))
        return sum(passes[job] for job in {JOBS[name] for name in looked & set(JOBS)})

    return pd.Series({name: of(selector) for name, selector in SELECTORS.items()})


def sample(found: xr.DataArray, n: int, seed: int = 0) -> np.ndarray:
    """Flat indices [n] of neurons to silence one at a time: half of those that some selector names
    in `named`, half of all others."""
    taken = found.values.astype(bool).any((0, 1)).ravel()
    rng, half = np.random.default_rng(seed), min(n // 2, int(taken.sum()))
    parts = (np.flatnonzero(taken), half), (np.flatnonzero(~taken), n - half)
    return np.concatenate([rng.choice(of, size, replace=False) for of, size in parts])


@computation(version=1)
def agreement(
    found: xr.DataArray, index: np.ndarray, costs: pd.DataFrame, media: Mapping[str, str]
) -> pd.DataFrame:
    """Spearman's correlation of every selector's `ranks` with what each neuron costs by itself.

    index are flat ones; costs has a column of nats a token for each benchmark, a row for each
    neuron. Columns selector, modality, own (on the benchmarks with the modality), everything.
    """
    lines = []
    for name, of in zip(found.selector.values, found, strict=True):
        for m in of.modality.values:
            value = of.sel(modality=m).values.ravel()[index]
            own = specificity.holding(str(m), media)
            if own and not np.isnan(value).any():
                both = [_correlation(value, costs[k].mean(axis=1)) for k in (own, [*media])]
                lines.append([str(name), str(m), *both])
    return pd.DataFrame(lines, columns=["selector", "modality", "own", "everything"])


def _correlation(a: np.ndarray, b: pd.Series) -> float:
    """Spearman's, NaN where either does not vary."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else np.nan


def overlap(found: Sets) -> pd.DataFrame:
    """Jaccard overlap of each two selectors' neurons, the mean over modalities that both have."""
    return pd.DataFrame({a: {b: _jaccard(found[a], found[b]) for b in found} for a in found})


def _jaccard(a: Mapping[str, xr.DataArray], b: Mapping[str, xr.DataArray]) -> float:
    both = [(a[m].values, b[m].values) for m in a if m in b]
    return float(np.mean([jaccard(x.ravel(), y.ravel()) for x, y in both]))


def repeated(one: Sets, other: Sets) -> pd.Series:
    """The share of each selector's neurons in `one` that it names in `other` too, likewise."""
    return pd.Series({
        name: np.mean([*stability.shared(one[name], other[name]).values()]) for name in one
    })  # fmt: skip


def losses(
    before: pd.DataFrame, silenced: Mapping[str, pd.DataFrame], media: Mapping[str, str]
) -> dict[str, float]:
    """Share of the score above chance that the sets of a selector cost: on all benchmarks (cost),
    on those with the set's modality (own), on the others; and their crossover interaction with its
    95 % interval (low, high)."""
    table = specificity.crossing(before, silenced)
    table["about"] = table["benchmark"].map(media)
    lost = table.groupby(["silenced", "about"])["lost"].mean()  # modalities count alike
    own = lost.index.get_level_values(0) == lost.index.get_level_values(1)
    cost = {"cost": lost.mean(), "own": lost[own].mean(), "others": lost[~own].mean()}
    found = specificity.interaction(before, silenced, media)
    return cost | {"interaction": found.mean, "low": found.low, "high": found.high}
