"""What neurons write into the residual stream, and random neurons that write as much.

A neuron writes its down-projection input times its column of the down projection. A selection by
activation takes loud neurons; whether it finds more than loudness shows only beside others as loud.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
import xarray as xr

from minerlib.activity import activity, means
from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.selection import labelled

STATISTICS = ("mean", "max")


@computation(version=1)
def loudness(
    mllm: MLLM, benches: Iterable, *, what: str = "written", batch_size: int = 8
) -> xr.DataArray:
    """How much each neuron writes: |down-projection input| x norm of its column.

    Mean and maximum over all tokens of a set in the benchmarks' prompts: DataArray [statistic,
    modality, layer, neuron] float32, 0 where a set does not occur. Of its activations, as they are,
    where `what` is "activation".
    """
    unit, taken = "activation", {"total": "mean", "highest": "max"}
    if what == "written":
        unit, taken = "written", {"absolute": "mean", "loudest": "max"}
    found = means(activity(mllm, benches, units=[unit], batch_size=batch_size)).sel(unit=unit)
    found = found.sel(statistic=[*taken]).assign_coords(statistic=[*taken.values()])
    found = found.drop_vars(["unit", "tokens"])
    found.loc["max"] = found.loc["max"].clip(0)
    return (found * column_norms(mllm) if what == "written" else found).rename("loudness")


def column_norms(mllm: MLLM) -> xr.DataArray:
    """The length of each neuron's column of the down projection, float32 [layer, neuron]."""
    weights = (mllm.family.down_projection(layer).weight for layer in mllm.layers)
    norms = torch.stack([weight.float().norm(dim=0).cpu() for weight in weights])
    return xr.DataArray(norms.numpy(), {"layer": range(mllm.n_layers)}, ("layer", "neuron"))


@computation(version=1)
def as_loud(
    neurons: xr.DataArray,
    loud: xr.DataArray,
    seed: int,
    caliper: float = 0.25,
    outside: xr.DataArray | None = None,
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Random neurons that write as much as the selected ones, and who stands for whom.

    Each selected neuron is paired with one of its own layer that is not selected (nor in `outside`,
    bool [modality, layer, neuron]), drawn from those
    whose log mean and log maximum over the tokens of the (first) modality it is selected for both
    lie within `caliper` of the layer's standard deviations (Rosenbaum and Rubin 1985); no neuron is
    drawn twice. Returns bool [modality "random", layer, neuron], and pairs: modality, layer,
    neuron, partner (-1: none is as loud), and each statistic of the selected and of the drawn one,
    in standard deviations.
    """
    near, space = _near(neurons, loud, caliper, outside)
    pairs = []
    for layer, k, partner in _paired(near, neurons[0].shape, seed):
        m = int(neurons.values[:, layer, k].argmax())
        at = space[:, m, layer]
        drawn = at[:, partner] if partner >= 0 else np.full(len(at), np.nan)
        values = {f"{s} of {w}": x for s, *two in zip(STATISTICS, at[:, k], drawn, strict=True)
                  for w, x in zip(("selected", "drawn"), two, strict=True)}  # fmt: skip
        name = str(neurons.modality.values[m])
        pairs.append({"modality": name, "layer": layer, "neuron": k, "partner": partner} | values)
    table = pd.DataFrame(pairs)
    there = table[table["partner"] >= 0]
    return _drawn(neurons, there["layer"], there["partner"], seed), table


def all_as_loud(
    neurons: xr.DataArray,
    loud: xr.DataArray,
    n: int,
    seed: int = 0,
    caliper: float = 0.25,
    outside: xr.DataArray | None = None,
) -> list[xr.DataArray]:
    """n draws of `as_loud` in which every neuron has a partner, of the first seeds that give such.

    Where partners are few most seeds do not; ValueError where fewer than n of 1000 n do.
    """
    near, _ = _near(neurons, loud, caliper, outside)
    found = []
    for i in range(seed, seed + 1000 * n):
        pairs = np.array(_paired(near, neurons[0].shape, i, whole=True))
        if len(pairs):
            found.append(_drawn(neurons, pairs[:, 0], pairs[:, 2], i))
        if len(found) == n:
            return found
    raise ValueError(f"n={n}: of {1000 * n} seeds {len(found)} draw a partner for every neuron")


Near = dict[tuple[int, int], np.ndarray]


def _near(
    neurons: xr.DataArray, loud: xr.DataArray, caliper: float, outside: xr.DataArray | None
) -> tuple[Near, np.ndarray]:
    """By layer and selected neuron those that are as loud, and the space [statistic, modality,
    layer, neuron] in which they are."""
    chosen: np.ndarray = np.asarray(neurons.values.any(0))
    if not chosen.any():
        raise ValueError("no neurons are selected, so none can have a partner")
    log = np.log(loud.sel(modality=neurons.modality.values).values + 1e-9)
    space = (log - log.mean(-1, keepdims=True)) / log.std(-1, keepdims=True)
    free = ~chosen if outside is None else ~chosen & ~outside.values.any(0)
    near = {}
    for layer, k in np.argwhere(chosen).tolist():
        at = space[:, int(neurons.values[:, layer, k].argmax()), layer]
        close = (np.abs(at - at[:, [k]]) <= caliper).all(0)
        near[layer, k] = np.flatnonzero(close & free[layer])
    return near, space


def _paired(
    near: Near, shape: tuple[int, ...], seed: int, whole: bool = False
) -> list[tuple[int, int, int]]:
    """Layer, neuron and partner (-1: none is left) of each, in the order in which they are drawn;
    of none where the whole is asked for and one has no partner."""
    rng, taken, found = np.random.default_rng(seed), np.zeros(shape, bool), []
    for layer, k in rng.permutation([*near]).tolist():
        left = near[layer, k][~taken[layer, near[layer, k]]]
        if whole and not left.size:
            return []
        partner = int(rng.choice(left)) if left.size else -1
        taken[layer, partner] |= partner >= 0
        found.append((layer, k, partner))
    return found


def _drawn(neurons: xr.DataArray, layers, partners, seed: int) -> xr.DataArray:
    """The partners as neurons, bool [modality "random", layer, neuron]."""
    mask = np.zeros_like(neurons.values[:1])
    mask[0, layers, partners] = True
    return labelled(mask, ["random"], neurons.layer, {"strategy": "as loud", "seed": seed})


def with_partner(neurons: xr.DataArray, pairs: pd.DataFrame, there: bool = True) -> xr.DataArray:
    """The selected neurons that have a partner in `pairs` of `as_loud`, or else those without."""
    of = pairs[(pairs["partner"] >= 0) == there]
    mask = np.zeros(neurons.shape[1:], bool)
    mask[of["layer"], of["neuron"]] = True
    return neurons & mask


def balance(pairs: pd.DataFrame) -> pd.DataFrame:
    """By modality: neurons, those with a partner, and the mean difference of each statistic.

    Differences are in standard deviations; below 0.1 counts as balanced.
    """
    table = pairs.assign(
        **{s: pairs[f"{s} of selected"] - pairs[f"{s} of drawn"] for s in STATISTICS}
    )
    table["with partner"] = pairs["partner"] >= 0
    how = {"neurons": ("partner", "size"), "with partner": ("with partner", "sum")}
    return table.groupby("modality", sort=False).agg(**how, **{s: (s, "mean") for s in STATISTICS})
