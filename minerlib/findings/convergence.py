"""Where the modalities converge (finding II): distances of kinds' clouds, layer by layer."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from minerlib.model import MLLM

CONVERGENCE = dict(distance=True, silhouette=True, accuracy=True, mixing=False, cka=False)
"""Measures of convergence: whether smaller is more converged."""


@computation(version=1)
def convergence(
    states: States, kinds: Sequence[str] | None = None, *, k=10, n_boot=1000, n_null=200, seed=0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far apart each two kinds (default: of all) that meet lie, and where they converge.

    Measures: `distance` of the centroids over the spread; `silhouette` of the labels; `accuracy`
    of a cross-validated linear classifier; `mixing`, the share of the k nearest neighbours that
    are of the other kind, over chance; `cka`, debiased linear CKA between the kinds' means
    across samples. Null: labels shuffled within each sample, for `cka` samples paired at random.

    Returns curves: pair, layer, and the columns of `inference.table_row`; and layers: pair,
    measure, layer (see `clouds.convergence_layer`), low, high, start, closest, end (values),
    lower_half, never (shares of resamplings in which it lies in the lower half, and nowhere).
    """
    curves, layers = [], []
    pairs = [pair for pair, n in meetings(states, kinds).items() if n]
    if not pairs:
        raise ValueError(f"no sample holds two of the kinds {kinds}; choose kinds that meet")
    for a, b in tqdm(pairs, desc="pairs", leave=False):
        pair, part = f"{a}-{b}", states.of(a, b)
        r = inference.Resampling(part.tokens, b, n_boot, n_null, seed)
        drawn = defaultdict[str, list](list)  # the samples themselves first
        for layer, x in enumerate(part.hidden):
            for row, draws in _apart(x, r, k, n_null, seed):
                curves.append({"pair": pair, "layer": layer, **row})
                drawn[row["measure"]].append(np.append(row["value"], draws))
        for measure, falling in CONVERGENCE.items():
            curve = (by_draw := np.stack(drawn[measure], -1))[0]
            found = clouds.convergence_layer(by_draw, falling)
            at, (low, high) = found[1:], map(float, inference.middle95(found[1:]))
            line = {"pair": pair, "measure": measure, "layer": found[0], "low": low, "high": high}
            line |= {"lower_half": np.mean(at < (len(curve) - 1) / 2), "start": curve[0]}
            line |= {"end": curve[-1], "never": np.isnan(at).mean()}
            layers.append(line | {"closest": curve.min() if falling else curve.max()})
    return pd.DataFrame(curves), pd.DataFrame(layers)


def meetings(states: States, kinds: Sequence[str] | None = None) -> pd.Series:
    """How many samples hold both kinds, for each pair of kinds, indexed by (kind, kind)."""
    held = states.tokens.groupby("sample")["kind"].agg(set)
    kinds = list(dict.fromkeys(states.tokens["kind"])) if kinds is None else kinds
    return pd.Series({p: int(held.map(set(p).issubset).sum()) for p in combinations(kinds, 2)})


def _apart(x: np.ndarray, r: inference.Resampling, k, n_null, seed) -> Iterator[tuple]:
    """The row and the bootstrap draws of each measure of one layer and pair."""
    distance, tokens = pairwise_distances(x), r.token_draws
    apart = clouds.centroid_distance(x, ~r.second, r.second)
    draws = clouds.centroid_distance(x, tokens * ~r.own, tokens * r.own)
    yield inference.table_row("distance", apart[0], draws, apart[1:]), draws
    per_token = {
        "silhouette": clouds.silhouette(distance, r.second),
        "accuracy": clouds.classified(x, r.second, r.group),
        "mixing": clouds.mixing(clouds.neighbours(distance, k), r.second),
    }
    for measure, values in per_token.items():
        row = inference.table_row(measure, *r.means(values), greater=CONVERGENCE[measure])
        yield row, r.means(values[:1])[1]
    first, second = (r.by_sample(x.T, own).T for own in (~r.own, r.own))
    value, draws, null = clouds.cka(first, second, r.draws, n_null, seed)
    yield inference.table_row("cka", value, draws, null), draws


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
        curve, half = of[line.pair, line.measure], (line.low, line.high)
        falling = CONVERGENCE[line.measure]
        verdict, at, nearer = inference.converged(curve, half, middle, falling=falling)
        apart = "" if line.measure == "cka" else "yes" if curve.loc[at, "p"] <= 0.05 else "no"
        found.append((at, nearer, apart, curve.loc[at, "null"], verdict))
    return layers.join(pd.DataFrame(found, columns=["at", "converges", "apart", "null", "verdict"]))


def disparity(pictures: pd.DataFrame) -> pd.DataFrame:
    """Least and most difference of a layer's t-SNE pictures, by pairs; 0 after a Procrustes fit."""
    rows = []
    for layer, panel in pictures[pictures["view"] != "PCA"].groupby("layer"):
        views = [view[["x", "y"]] for _, view in panel.groupby("view")]
        apart = [procrustes(*pair)[2] for pair in combinations(views, 2)]
        rows.append((layer, min(apart), max(apart)))
    return pd.DataFrame(rows, columns=["layer", "least", "most"])


def lower_share(neurons: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """How many of each modality's neurons sit in the lower half of the layers, beside chance.

    Chance: as many drawn from all layers (hypergeometric). Columns modality, neurons, lower (share
    of them), null, null_low, null_high (95 % of the draws), p (that a draw has as many there).
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
    """Distance of each kind's centroid from the text's with neurons silenced, [kind, draw, layer].

    samples and look as in `hidden_states`; the first draw is the samples themselves, then come
    n_boot resamplings, the same whatever is silenced.
    """
    with nullcontext() if neurons is None else deactivate(mllm, neurons):
        states = hidden_states(mllm, samples, seed=seed, **look)
    values = []
    for kind in kinds:
        part = states.of("text", kind)
        r = inference.Resampling(part.tokens, kind, n_boot, 0, seed)
        w = np.vstack([np.ones(len(r.own)), r.token_draws])
        values.append([clouds.centroid_distance(x, w * ~r.own, w * r.own) for x in part.hidden])
    found = xr.DataArray(values, {"kind": list(kinds)}, ("kind", "layer", "draw"))
    return found.transpose("kind", "draw", "layer")


def silenced(
    before: xr.DataArray, after: Mapping[str, xr.DataArray], null: Sequence[xr.DataArray]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How silencing moves the convergence of each kind and the text, beside random draws.

    before, after {modality} and null as `distances` returns them; of null draw 0 is used. Returns
    moved: pair, silenced, change (of the "layer" of convergence, or of the mean "distance"),
    value, low, high, least, most (of the random draws), p (two-sided), verdict; and steps of the
    distance: kind, modality ("random": the draws' mean and range), layer, value, low, high.
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
    """The closing table's lines, the whole first, from `verdicts`, `lower_share` and `silenced`."""
    spread, line, lines = inference.spread, inference.line, []
    for at in against_text(layers).query("kind != 'special'").itertuples():
        where = f"half done in layer {spread(at.layer, at.low, at.high, digits=1)}"
        if not at.converges:
            where = "not clearly nearer" if at.at else "never nearer"
        claim = f"{at.pair} converge in the lower layers ({at.measure})"
        measured = f"{at.start:z.2f} to {at.closest:z.2f}, {where}"
        null = f"steady: layer {n_layers / 2:g}; shuffled: {at.null:z.2f}"
        lines.append(line(claim, measured, null, at.verdict))
    claim = "different modalities mainly converge in the lower layers"
    lines.insert(0, inference.whole(claim, lines, "measures of text and media"))
    for at in sits.itertuples():
        claim = f"{at.modality} neurons sit in the lower layers"
        measured = f"{at.lower:.2f} of {at.neurons} in the lower half"
        null = f"random: {spread(at.null, at.null_low, at.null_high)}"
        lines.append(line(claim, measured, null, inference.by_p(at.p), at.p))
    does = {"layer": "moves the layer of convergence", "distance": "changes the distance"}
    for at in moved.itertuples():
        claim = f"silencing {at.silenced} neurons {does[at.change]} of {at.pair}"
        measured = spread(at.value, at.low, at.high, sign="+")
        null = f"random: {at.least:+z.2f} to {at.most:+z.2f}"
        lines.append(line(claim, measured, null, at.verdict, at.p))
    return lines
