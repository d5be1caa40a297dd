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
    chosen: np.ndarray = np.asarray(neurons.values.any(0))
    if not chosen.any():
        raise ValueError("no neurons are selected, so none can have a partner")
    log = np.log(loud.sel(modality=neurons.modality.values).values + 1e-9)
    space = (log - log.mean(-1, keepdims=True)) / log.std(-1, keepdims=True)
    rng, free, pairs = np.random.default_rng(seed), ~chosen, []
    if outside is not None:
        free &= ~outside.values.any(0)
    for layer, k in rng.permutation(np.argwhere(chosen)):
        m = int(neurons.values[:, layer, k].argmax())
        at = space[:, m, layer]
        near = np.flatnonzero((np.abs(at - at[:, [k]]) <= caliper).all(0) & free[layer])
        partner = int(rng.choice(near)) if near.size else -1
        free[layer, partner] &= partner < 0
        drawn = at[:, partner] if near.size else np.full(len(at), np.nan)
        values = {f"{s} of {w}": x for s, *two in zip(STATISTICS, at[:, k], drawn, strict=True)
                  for w, x in zip(("selected", "drawn"), two, strict=True)}  # fmt: skip
        name = str(neurons.modality.values[m])
        pairs.append({"modality": name, "layer": layer, "neuron": k, "partner": partner} | values)
    table = pd.DataFrame(pairs)
    there = table[table["partner"] >= 0]
    mask = np.zeros_like(neurons.values[:1])
    mask[0, there["layer"], there["partner"]] = True
    attrs = {"strategy": "as loud", "seed": seed}
    return labelled(mask, ["random"], neurons.layer, attrs), table


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
