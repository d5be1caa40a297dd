"""Where the modalities converge (finding II): distances of kinds' clouds, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.spatial import procrustes
from scipy.stats import hypergeom
from sklearn.metrics import pairwise_distances
from tqdm import tqdm

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings.states import States, hidden_states
from minerlib.inference import Resampling, table_row
from minerlib.model import MLLM

CONVERGENCE = dict(distance=True, silhouette=True, accuracy=True, mixing=False, cka=False)
"""Measures of convergence: whether smaller is more converged."""


@computation(version=1)
def convergence(
    states: States, kinds: Sequence[str] | None = None, *, k=10, n_boot=1000, n_null=200, seed=0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far apart each two kinds lie, layer by layer, and where they converge.

    kinds (default: all) are taken in pairs, and pairs that no sample holds both of left out.
    Measures: `distance` of the centroids over the spread; `silhouette` of the labels; `accuracy`
    of a cross-validated linear classifier; `mixing`, the share of the k nearest neighbours that
    are of the other kind, over chance; `cka`, debiased linear CKA between the kinds' means
    across samples. Null: labels shuffled within each sample, for `cka` samples paired at random.

    Returns curves: pair, layer, measure, value, low, high, null, null_low, null_high, p (chance
    that the null is as far apart; for cka, as related). layers: pair, measure, layer (see
    `clouds.convergence_layer`), low, high, start, closest, end (values), lower_half and never
    (shares of resamplings in which it lies in the lower half of the layers, and nowhere).
    """
    curves, layers = [], []
    pairs = [pair for pair, n in meetings(states, kinds).items() if n]
    if not pairs:
        raise ValueError(f"no sample holds two of the kinds {kinds}; choose kinds that meet")
    for a, b in tqdm(pairs, desc="pairs", leave=False):
        pair, part = f"{a}-{b}", states.of(a, b)
        r = Resampling(part.tokens, b, n_boot, n_null, seed)
        drawn: dict[str, list] = {m: [] for m in CONVERGENCE}  # the samples themselves first
        for layer, x in enumerate(part.hidden):
            for row, draws in _apart(x, r, k, n_null, seed):
                curves.append({"pair": pair, "layer": layer, **row})
                drawn[row["measure"]].append(np.append(row["value"], draws))
        for measure, falling in CONVERGENCE.items():
            curve = (by_draw := np.stack(drawn[measure], -1))[0]
            half, *at = clouds.convergence_layer(by_draw, falling)
            low, high = map(float, inference.middle95(np.array(at)))
            lower, never = np.mean(np.array(at) < (len(curve) - 1) / 2), np.isnan(at).mean()
            line = {"pair": pair, "measure": measure, "layer": half, "low": low, "high": high}
            line |= {"lower_half": lower, "start": curve[0], "end": curve[-1], "never": never}
            layers.append(line | {"closest": curve.min() if falling else curve.max()})
    return pd.DataFrame(curves), pd.DataFrame(layers)


def meetings(states: States, kinds: Sequence[str] | None = None) -> pd.Series:
    """How many samples hold both kinds, for each pair of kinds, indexed by (kind, kind)."""
    held = states.tokens.groupby("sample")["kind"].agg(set)
    kinds = list(dict.fromkeys(states.tokens["kind"])) if kinds is None else kinds
    return pd.Series({p: int(held.map(set(p).issubset).sum()) for p in combinations(kinds, 2)})


def _apart(x: np.ndarray, r: Resampling, k: int, n_null: int, seed: int) -> list[tuple]:
    """(row, bootstrap draws) of each measure of one layer and pair."""
    distance, tokens = pairwise_distances(x), r.token_draws
    apart = clouds.centroid_distance(x, ~r.second, r.second)
    draws = clouds.centroid_distance(x, tokens * ~r.own, tokens * r.own)
    found = [(table_row("distance", apart[0], draws, apart[1:]), draws)]
    per_token = {
        "silhouette": clouds.silhouette(distance, r.second),
        "accuracy": clouds.classified(x, r.second, r.group),
        "mixing": clouds.mixing(clouds.neighbours(distance, k), r.second),
    }
    for measure, right in per_token.items():
        draws = inference.weighted(r.by_sample(right[:1]).T, r.draws)[:, 0]
        found.append((r.row(measure, right, greater=CONVERGENCE[measure]), draws))
    first, second = (r.by_sample(x.T, own).T for own in (~r.own, r.own))
    value, draws, null = clouds.cka(first, second, r.draws, n_null, seed)
    return [*found, (table_row("cka", value, draws, null), draws)]


def against_text(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of pairs of text and another kind, with that kind in a column `kind`."""
    kind = table["pair"].str.removeprefix("text-").str.removesuffix("-text")
    return table.assign(kind=kind)[kind != table["pair"]]


def verdicts(curves: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Whether each pair converges in the lower half of the layers, by `inference.converged`.

    Returns layers with the columns at (where the kinds are closest), converges (whether they are
    clearly nearer there than at the embeddings), apart (whether shuffled labels are not as far
    apart even there, p <= 0.05; empty for cka), null (its value there), verdict.
    """
    middle = curves["layer"].max() / 2
    of = {name: t.set_index("layer") for name, t in curves.groupby(["pair", "measure"])}
    found = []
    for line in layers.itertuples():
        curve, falling = of[line.pair, line.measure], CONVERGENCE[line.measure]
        half = (line.low, line.high)
        verdict, at, nearer = inference.converged(curve, half, middle, falling=falling)
        apart = "" if line.measure == "cka" else "yes" if curve.loc[at, "p"] <= 0.05 else "no"
        found.append((at, bool(nearer), apart, curve.loc[at, "null"], verdict))
    return layers.join(pd.DataFrame(found, columns=["at", "converges", "apart", "null", "verdict"]))


def disparity(pictures: pd.DataFrame) -> pd.DataFrame:
    """How much pairs of a layer's t-SNE pictures of `states.project` differ: layer, least, most.

    The squared difference after the best shift, scaling and rotation: 0 is the same picture.
    """
    rows = []
    for layer, panel in pictures[pictures["view"] != "PCA"].groupby("layer"):
        views = [view[["x", "y"]] for _, view in panel.groupby("view")]
        apart = [procrustes(a, b)[2] for a, b in combinations(views, 2)]
        rows.append((layer, min(apart), max(apart)))
    return pd.DataFrame(rows, columns=["layer", "least", "most"])


def lower_share(neurons: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """How many of each modality's neurons sit in the lower half of the layers, beside chance.

    neurons {modality: bool [modality, layer, neuron]}. Chance is a draw of as many from all
    layers, hypergeometric. Returns columns modality, neurons, lower (share of them), null,
    null_low, null_high (95 % of the draws), p (that a draw has as many there).
    """
    rows = []
    for modality, array in neurons.items():
        chosen = array.any("modality").values
        half = np.arange(len(chosen)) < len(chosen) / 2
        n, low = chosen.sum(), chosen[half].sum()
        chance = hypergeom(chosen.size, chosen[half].size, n)
        ends = np.array(chance.interval(0.95)) / n
        rows.append((modality, n, low / n, half.mean(), *ends, chance.sf(low - 1)))
    columns = ["modality", "neurons", "lower", "null", "null_low", "null_high", "p"]
    return pd.DataFrame(rows, columns=columns)


@computation(version=1)
def distances(
    mllm: MLLM, samples, kinds: Sequence[str], neurons=None, *, n_boot=0, seed=0, **look: Any
) -> xr.DataArray:
    """Distance of each kind's centroid from the text's, layer by layer, with neurons silenced.

    samples and look as in `hidden_states`. Returns [kind, draw, layer + 1]: draw 0 holds the
    samples themselves, the others n_boot resamplings, the same whatever is silenced.
    """
    with nullcontext() if neurons is None else deactivate(mllm, neurons):
        states = hidden_states(mllm, samples, seed=seed, **look)
    values = []
    for kind in kinds:
        part = states.of("text", kind)
        r = Resampling(part.tokens, kind, n_boot, 0, seed)
        w = np.vstack([np.ones(len(r.own)), r.token_draws])
        values.append([clouds.centroid_distance(x, w * ~r.own, w * r.own) for x in part.hidden])
    draws = np.stack(values).transpose(0, 2, 1)
    return xr.DataArray(draws, {"kind": list(kinds)}, ("kind", "draw", "layer"))


def silenced(
    before: xr.DataArray, after: Mapping[str, xr.DataArray], null: Sequence[xr.DataArray]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How silencing moves the convergence of each kind and the text, beside random draws.

    before, after {modality} and null as `distances` returns them; of null draw 0 is used.
    Returns moved: pair, silenced, change (of the "layer" of convergence, or of the mean
    "distance"), value, low, high, least, most (of the random draws), p (two-sided), verdict; and
    steps, the change of the distance: kind, modality ("random": the draws' mean and range),
    layer, value, low, high.
    """
    moved, steps = [], []
    for kind in before["kind"].values.tolist():
        base = before.sel(kind=kind).values
        drawn, at = np.stack([t.sel(kind=kind)[0] for t in null]), clouds.convergence_layer(base)
        drawn, drawn_at = drawn - base[0], clouds.convergence_layer(drawn) - at[0]
        bands = {"random": (drawn.mean(0), drawn.min(0), drawn.max(0))}
        for modality, table in after.items():
            change = (now := table.sel(kind=kind).values) - base
            bands[modality] = (change[0], *inference.middle95(change[1:]))
            later = clouds.convergence_layer(now) - at
            both = {"layer": (later, drawn_at), "distance": (change.mean(1), drawn.mean(1))}
            for what, (x, draws) in both.items():
                draws = draws[np.isfinite(draws)] if np.isfinite(draws).any() else draws
                low, high = map(float, inference.middle95(x[1:]))
                p = inference.rank_p(x[0], draws, "two-sided")
                verdict = inference.change_against_draws(x[0], low, high, draws)
                ends = (low, high, draws.min(), draws.max())
                moved.append((f"text-{kind}", modality, what, x[0], *ends, p, verdict))
        for modality, (value, low, high) in bands.items():
            band = {"layer": range(len(value)), "value": value, "low": low, "high": high}
            steps.append(pd.DataFrame({"kind": kind, "modality": modality, **band}))
    names = ["pair", "silenced", "change", "value", "low", "high", "least", "most", "p", "verdict"]
    return pd.DataFrame(moved, columns=names), pd.concat(steps, ignore_index=True)


def claims(layers, sits: pd.DataFrame, moved: pd.DataFrame, n_layers: int) -> list[dict]:
    """The lines of `inference.claims_table`, the claim as a whole first.

    layers as `verdicts` returns them, sits as `lower_share` does, moved as `silenced` does.
    """
    spread, lines = inference.spread, []
    for line in against_text(layers).query("kind != 'special'").itertuples():
        where = f"half done in layer {spread(line.layer, line.low, line.high, digits=1)}"
        if not line.converges:
            where = "not clearly nearer" if line.at else "never nearer"
        claim = f"{line.pair} converge in the lower layers ({line.measure})"
        measured = f"{line.start:z.2f} to {line.closest:z.2f}, {where}"
        null = f"steady: layer {n_layers / 2:g}; shuffled: {line.null:z.2f}"
        lines.append((claim, measured, null, None, line.verdict))
    found = [line[-1] for line in lines]
    hold = sum(verdict.word == inference.HOLDS for verdict in found)
    measured = f"{hold} of {len(lines)} measures of text and media hold"
    claim = "different modalities mainly converge in the lower layers"
    lines.insert(0, (claim, measured, "the lines below", None, inference.majority(found)))
    for line in sits.itertuples():
        measured = f"{line.lower:.2f} of {line.neurons} in the lower half"
        null = f"random: {spread(line.null, line.null_low, line.null_high)}"
        claim = f"{line.modality} neurons sit in the lower layers"
        lines.append((claim, measured, null, line.p, inference.by_p(line.p)))
    does = {"layer": "moves the layer of convergence", "distance": "changes the distance"}
    for line in moved.itertuples():
        measured = spread(line.value, line.low, line.high, "+")
        null = f"random: {line.least:+z.2f} to {line.most:+z.2f}"
        claim = f"silencing {line.silenced} neurons {does[line.change]} of {line.pair}"
        lines.append((claim, measured, null, line.p, line.verdict))
    columns = ("claim", "measured", "null", "p", "verdict")
    return [dict(zip(columns, line, strict=True)) for line in lines]
