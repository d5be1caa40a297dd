"""Semantic probing as numbers with a null (finding IV).

Draws of a measure are the last dimension of an array: the `value` itself, what it is when prompts
are `resampled`, and what it is under the `null`. Changes by silencing are [draw, sample, layer],
the medium's own neurons first, then random ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike
from sklearn.metrics import pairwise_distances

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings.states import States, hidden_states
from minerlib.inference import Estimate
from minerlib.model import MLLM


def media(states: States) -> list[str]:
    """The kinds of the states that are neither special nor text."""
    return [k for k in states.tokens["kind"].unique() if k not in ("special", "text")]


# --- draws, and what is said of them -------------------------------------------------------------


def labelled(values: Any, n_boot: int, n_null: int, **coords: Any) -> xr.DataArray:
    """Values [*coords, 1 + n_boot + n_null] with their names."""
    coords["draw"] = ["value"] + ["resampled"] * n_boot + ["null"] * n_null
    return xr.DataArray(values, coords, tuple(coords))


def parts(found: xr.DataArray) -> Iterator[np.ndarray]:
    """The value, the resampled and the null's draws of [..., draw], each [..., n]."""
    return (found.values[..., found["draw"] == what] for what in ("value", "resampled", "null"))


def by_layer(found: xr.DataArray) -> pd.DataFrame:
    """Draws [..., layer, draw] as a table: the dimensions, value, low, high, null and its ends."""
    flat = found.stack(row=found.dims[:-1]).transpose("row", "draw")
    value, drawn, null = parts(flat)
    null = null if null.size else value * np.nan
    rows = [inference.table_row("", *of) for of in zip(value[:, 0], drawn, null, strict=True)]
    table = pd.DataFrame(rows).drop(columns=["measure", "p"])
    return flat.indexes["row"].to_frame(index=False).join(table.dropna(axis=1, how="all"))


def mean_draws(found: xr.DataArray) -> Iterator[np.ndarray]:
    """The `parts` of the mean over layers from 1 on, and over all else."""
    inner = found.sel(layer=slice(1, None))
    return parts(inner.mean(inner.dims[:-1]))


def headline(found: xr.DataArray) -> tuple[Estimate, np.ndarray]:
    """`mean_draws` less those of the null, as an effect; and draws of it where there is none."""
    (value,), drawn, null = mean_draws(found)
    return inference.from_draws(value - null.mean(), drawn - null.mean()), null - null.mean()


def beyond_random(moved: Mapping[str, xr.DataArray]) -> tuple[Estimate, np.ndarray]:
    """How much more own neurons change than random ones; and draws of it where there is no more.

    Prompt by prompt the own change less the mean of the draws', with the spread of the draws; all
    averaged over layers from 1 on, and kinds.
    """
    inner = {k: x.sel(layer=slice(1, None)).mean("layer").values for k, x in moved.items()}
    null = np.mean([x[1:].mean(1) for x in inner.values()], axis=0)
    beyond = {kind: x[0] - x[1:].mean(0) for kind, x in inner.items()}
    extra = float(null.var(ddof=1)) / len(null)
    found = inference.estimate(beyond, ends=None, extra=extra, draws=len(null))
    return found, null - null.mean()


def over_prompts(x: xr.DataArray) -> pd.DataFrame:
    """The mean over samples of x [sample, layer]: columns layer, value, low, high."""
    value, low, high = inference.interval(x.values)
    return pd.DataFrame({"layer": x["layer"], "value": value, "low": low, "high": high})


def beside_random(own: pd.DataFrame, each: ArrayLike) -> pd.DataFrame:
    """A table of own neurons by layer, then the mean and range of random ones [draw, layer]."""
    x = np.asarray(each)
    random = own.assign(value=x.mean(0), low=x.min(0), high=x.max(0), silenced="random")
    return pd.concat([own.assign(silenced="own"), random], ignore_index=True)


def as_many(states: States, kinds: Sequence[str], n: int, seed: int = 0) -> States:
    """Of each sample as many tokens of every kind, at most n, drawn; samples that lack one go."""
    states = states.of(*kinds)
    tokens = states.tokens.assign(order=np.random.default_rng(seed).random(len(states.tokens)))
    place = tokens.groupby(["sample", "kind"])["order"].rank()
    held = tokens.groupby(["sample", "kind"])["order"].size().groupby("sample").min()
    return states.where(place <= tokens["sample"].map(held).clip(upper=n))


# --- reaching towards the text -------------------------------------------------------------------


def _log_reach(distance, second: np.ndarray, nearest: int, near=None) -> np.ndarray:
    """Log of each token's distance to the other cloud over that to its own, [r, n].

    A thousandth of the mean distance is the least: the tokens of a common opening are copies.
    """
    least = distance.mean() / 1000
    other, own = clouds.reach(distance, second, nearest, near)
    return np.log(np.maximum(other, least) / np.maximum(own, least))


def _place(tokens: pd.DataFrame) -> pd.Series:
    """Where tokens sit in their run: 0 its start, 1 its end."""
    return tokens["place"] / (tokens["run"] - 1).clip(lower=1)


@computation(version=2)
def probing(
    states: States, *, nearest=5, k=10, tip_share=0.1, n_boot=1000, n_null=200, seed=0
) -> xr.DataArray:
    """How a medium's tokens reach towards the text's (finding IV), [kind, measure, layer, draw].

    Measures: `reach`, mean log of a token's distance to its nearest text tokens over that to the
    nearest of its own kind; `probes`, share of its tokens whose k neighbours hold more text than
    chance allows (`clouds.crowded`); `elongation` of its cloud towards the text centroid;
    `tip_end`, how near the tip_share of tokens with the smallest reach is to the ends of its run of
    tokens, 0 the middle and 1 an end. Nulls: text and medium exchanged in a random half of the
    prompts; of elongation directions with the clouds' own covariance, of tip_end the tip shuffled.
    """
    kinds, values = media(states), list[np.ndarray]()
    for i, kind in enumerate(kinds, seed):
        part = states.of("text", kind)
        r = inference.Resampling(part.tokens, kind, n_boot, 0, i)
        second = inference.exchanged(r.own, r.group, n_null, i)
        end = (2 * _place(part.tokens) - 1).abs().to_numpy()[r.own]
        among = max(k, int(8 * nearest / min(r.own.mean(), 1 - r.own.mean())))
        w = np.vstack([np.ones(len(r.own)), r.token_draws])
        w_cloud, w_text = w[:, r.own], w[:, ~r.own]
        layers = []
        for x in part.hidden:
            distance = pairwise_distances(x)
            near = clouds.neighbours(distance, among)
            reach = _log_reach(distance, second[:1], nearest)
            reach = np.concatenate([reach, _log_reach(distance, second[1:], nearest, near)])
            crowded = clouds.crowded(near[:, :k], second)
            cloud, text = x[r.own], x[~r.own]
            towards = w_text @ text / w_text.sum(1, keepdims=True)
            towards -= w_cloud @ cloud / w_cloud.sum(1, keepdims=True)
            residue = np.concatenate([cloud - cloud.mean(0), text - text.mean(0)])
            random = clouds.elongation(cloud, clouds.directions_like(residue, n_null, i))
            tip = reach[0, r.own] <= np.quantile(reach[0, r.own], tip_share)
            tips = inference.shuffles(tip, r.group[r.own], n_null, i)[1:]
            with np.errstate(invalid="ignore"):
                ends = w_cloud * tip @ end / (w_cloud * tip).sum(1)
            found = [r.means(reach, second), r.means(crowded, second)]
            found += [(clouds.elongation(cloud, towards, w_cloud), random)]
            found += [(ends, tips @ end / tip.sum())]
            layers.append([np.hstack(of) for of in found])
        values.append(np.swapaxes(np.array(layers), 0, 1))
    axes = {"kind": kinds, "measure": ["reach", "probes", "elongation", "tip_end"]}
    return labelled(values, n_boot, n_null, **axes, layer=range(len(states.hidden)))


def tips(states: States, kind: str, *, nearest: int = 5, tip_share: float = 0.1) -> pd.DataFrame:
    """The tokens of a kind at every layer, from the nearest to the text: who the tip is, and where.

    The token table with columns layer, token (its index in `states.hidden`), reach (its log), place
    (as a share of its run), tip (of the tip_share of least reach).
    """
    part = states.of("text", kind)
    own = (part.tokens["kind"] == kind).to_numpy()
    of, met = states.tokens, part.tokens["sample"].unique()
    index = np.flatnonzero((of["kind"] == kind) & of["sample"].isin(met))
    tip = np.arange(len(index)) < np.ceil(tip_share * len(index))
    tables = []
    for layer, x in enumerate(part.hidden):
        reach = _log_reach(pairwise_distances(x), own[None], nearest)[0, own]
        table = part.tokens[own].assign(layer=layer, token=index, place=_place, reach=reach)
        tables.append(table.sort_values("reach", kind="stable").assign(tip=tip))
    return pd.concat(tables, ignore_index=True)


def tip_places(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the tip of `tips` in each fifth of the medium, by layer, and of `all tokens`."""
    names, tip = ["first", "2nd", "3rd", "4th", "last"], table["tip"]
    fifth = pd.cut(table["place"], np.linspace(0, 1, 6), labels=names, include_lowest=True)
    shares = pd.crosstab(table["layer"][tip], fifth[tip], normalize="index", dropna=False)
    shares.loc["all tokens"] = fifth.value_counts(normalize=True)
    return shares


def crowded_pictures(states: States, panels: pd.DataFrame, k: int = 10) -> pd.DataFrame:
    """Share of probes by kind and layer, were each picture of `project` (columns) `full space`."""
    lines = []
    for (layer, view), part in panels.groupby(["layer", "view"], sort=False):
        for kind in media(states):
            pair = part[part["kind"].isin([kind, "text"])]
            second = (pair["kind"] == kind).to_numpy()
            spaces = {"full space": states.hidden[layer, pair["token"]], view: pair[["x", "y"]]}
            for space, x in spaces.items():
                near = clouds.neighbours(pairwise_distances(x), k)
                probes = clouds.crowded(near, second[None])[0, second].mean()
                lines.append({"kind": kind, "layer": layer, "space": space, "probes": probes})
    return pd.DataFrame(lines).pivot_table("probes", ["kind", "layer"], "space", sort=False)


@computation(version=2)
def log_reach(states: States, *, nearest: int = 5) -> xr.DataArray:
    """Each prompt's mean `reach`, [kind, sample, layer]; NaN where it does not hold the kind."""
    table = pd.concat([tips(states, kind, nearest=nearest) for kind in media(states)])
    return table.groupby(["kind", "sample", "layer"])["reach"].mean().to_xarray()


@computation(version=2)
def silenced_reach(mllm: MLLM, bench, neurons: xr.DataArray, **drawn) -> xr.DataArray:
    """`log_reach` of the tokens that `hidden_states` draws, with these neurons silenced."""
    with deactivate(mllm, neurons):
        return log_reach(hidden_states(mllm, bench, **drawn))


def approach(reach: xr.DataArray, untrained: ArrayLike) -> Estimate:
    """What `log_reach` falls by from layer 1 to the last, averaged over the media, more than it
    does in untrained controls [control]."""
    untrained = np.asarray(untrained, float)
    nearer = reach.sel(layer=1) - reach.isel(layer=-1) - untrained.mean()
    of = {str(k["kind"].values): k.dropna("sample") for k in nearer}
    extra = untrained.var(ddof=1) / len(untrained)
    return inference.estimate(of, ends=None, extra=extra, draws=len(untrained))
