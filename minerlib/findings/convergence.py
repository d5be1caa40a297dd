"""Where the modalities converge (finding II): distances of kinds' clouds, layer by layer.

`convergence` measures, `verdicts` says where half of it is done, `lower_share` where neurons sit,
`distances` and `silenced` what silencing them moves; `claims` puts it into sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from scipy.spatial import procrustes
from scipy.stats import hypergeom
from sklearn.metrics import pairwise_distances
from tqdm.auto import tqdm

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings.states import States, hidden_states
from minerlib.inference import Resampling, table_row
from minerlib.model import MLLM
from minerlib.tasks import Benchmark, Sample

CONVERGENCE = {
    "distance": True,
    "silhouette": True,
    "accuracy": True,
    "mixing": False,
    "cka": False,
}
"""Measures of convergence: whether smaller is more converged."""


@computation(version=1)
def convergence(
    states: States,
    kinds: Sequence[str] | None = None,
    *,
    k: int = 10,
    n_boot: int = 1000,
    n_null: int = 200,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far apart each two kinds lie, layer by layer, and where they converge (finding II).

    kinds (default: all) are taken in pairs, and pairs that no sample holds both of left out.
    Measures: `distance` of the centroids over the spread; `silhouette` of the labels; `accuracy`
    of a cross-validated linear classifier; `mixing`, the share of the k nearest neighbours that
    are of the other kind, over chance; `cka`, debiased linear CKA between the kinds' means
    across samples. Null: labels shuffled within each sample, for `cka` samples paired at random.

    Returns
    -------
    curves: pair, layer, measure, value, low, high, null, null_low, null_high, p (chance that the
    null is as far apart; for cka, as related). layers: pair, measure, layer (see
    `clouds.convergence_layer`), low, high, lower_half (share of resamplings in which it lies in
    the lower half of the layers), start, closest, end (values), never (share of resamplings
    without any convergence).
    """
    curves, layers = [], []
    pairs = [pair for pair, n in meetings(states, kinds).items() if n]
    if not pairs:
        raise ValueError(f"no sample holds two of the kinds {kinds}; choose kinds that meet")
    for a, b in tqdm(pairs, desc="pairs", leave=False):
        pair, part = f"{a}-{b}", states.of(a, b)
        r = Resampling(part.tokens, b, n_boot, n_null, seed)
        drawn = {m: [] for m in CONVERGENCE}
        values = {m: [] for m in CONVERGENCE}
        for layer, x in enumerate(part.hidden):
            rows, draws = _apart(x, r, k, n_null, seed)
            curves += [{"pair": pair, "layer": layer, **row} for row in rows]
            for row, draw in zip(rows, draws, strict=True):
                values[row["measure"]].append(row["value"])
                drawn[row["measure"]].append(draw)
        for measure, falling in CONVERGENCE.items():
            curve = np.array(values[measure])
            at = clouds.convergence_layer(np.stack(drawn[measure], -1), falling)
            low, high = inference.middle95(at)
            layers.append(
                {
                    "pair": pair,
                    "measure": measure,
                    "layer": float(clouds.convergence_layer(curve, falling)),
                    "low": float(low),
                    "high": float(high),
                    "lower_half": float((at < (len(curve) - 1) / 2).mean()),
                    "start": curve[0],
                    "closest": curve.min() if falling else curve.max(),
                    "end": curve[-1],
                    "never": float(np.isnan(at).mean()),
                }
            )
    return pd.DataFrame(curves), pd.DataFrame(layers)


def meetings(states: States, kinds: Sequence[str] | None = None) -> pd.Series:
    """How many samples hold both kinds, for each pair of kinds, indexed by (kind, kind)."""
    held = states.tokens.groupby("sample")["kind"].agg(set)
    kinds = list(dict.fromkeys(states.tokens["kind"])) if kinds is None else kinds
    return pd.Series({p: int(held.map(set(p).issubset).sum()) for p in combinations(kinds, 2)})


def _apart(x: np.ndarray, r: Resampling, k: int, n_null: int, seed: int) -> tuple[list, list]:
    """The rows of one layer and pair, and each row's bootstrap draws."""
    distance = pairwise_distances(x)
    tokens = r.token_draws
    spread = clouds.centroid_distance(x, ~r.second, r.second)
    spread_draws = clouds.centroid_distance(x, tokens * ~r.own, tokens * r.own)
    rows, draws = [table_row("distance", spread[0], spread_draws, spread[1:])], [spread_draws]
    per_token = {
        "silhouette": (clouds.silhouette(distance, r.second), True),
        "accuracy": (clouds.classified(x, r.second, r.group), True),
        "mixing": (clouds.mixing(clouds.neighbours(distance, k), r.second), False),
    }
    for measure, (values, greater) in per_token.items():
        mean = r.by_sample(values[:1])
        rows.append(r.row(measure, values, greater=greater))
        draws.append(inference.weighted(mean.T, r.draws)[:, 0])
    views = (r.by_sample(x.T, own).T for own in (~r.own, r.own))
    value, cka_draws, null = clouds.cka(*views, r.draws, n_null, seed)
    return [*rows, table_row("cka", value, cka_draws, null)], [*draws, cka_draws]


def against_text(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of pairs of text and another kind, with that kind in a column `kind`."""
    kind = table["pair"].str.removeprefix("text-").str.removesuffix("-text")
    return table.assign(kind=kind)[kind != table["pair"]]


def verdicts(curves: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Whether each pair converges in the lower half of the layers, by each measure.

    curves and layers as `convergence` returns them; the rule is `inference.converged`.

    Returns
    -------
    layers with the columns at (the layer at which the kinds are closest), converges (whether
    they are clearly nearer there than at the embeddings), apart (whether shuffled labels are not
    as far apart even there, p <= 0.05; empty for cka), null (its value there), verdict.
    """
    middle = curves["layer"].max() / 2
    of = {name: t.set_index("layer") for name, t in curves.groupby(["pair", "measure"])}
    found = []
    for line in layers.itertuples():
        curve, falling = of[line.pair, line.measure], CONVERGENCE[line.measure]
        half = (line.low, line.high)
        verdict, at, nearer = inference.converged(curve, half, middle, falling=falling)
        apart = "" if line.measure == "cka" else "yes" if curve.loc[at, "p"] <= 0.05 else "no"
        row = {"at": at, "converges": bool(nearer), "apart": apart, "null": curve.loc[at, "null"]}
        found.append(row | {"verdict": verdict})
    return layers.join(pd.DataFrame(found))


def disparity(pictures: pd.DataFrame) -> pd.DataFrame:
    """How much the t-SNE pictures of `states.project` differ between seeds, layer by layer.

    Procrustes: the squared difference after the best shift, scaling and rotation, 0 for the same
    picture and 1 for an unrelated one. Returns columns layer, least, most over pairs of seeds.
    """
    rows = []
    for layer, panel in pictures[pictures["view"] != "PCA"].groupby("layer"):
        views = [view[["x", "y"]].to_numpy() for _, view in panel.groupby("view")]
        apart = [procrustes(a, b)[2] for a, b in combinations(views, 2)]
        rows.append({"layer": layer, "least": min(apart), "most": max(apart)})
    return pd.DataFrame(rows)


def lower_share(neurons: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """How many of each modality's neurons sit in the lower half of the layers, beside chance.

    neurons {modality: bool [modality, layer, neuron]}. Chance is a draw of as many from all
    layers, hypergeometric, so it needs no draws.

    Returns columns modality, neurons, lower (share of them), null, null_low, null_high (95 % of
    the draws), p (that a draw has as many there).
    """
    rows = []
    for modality, chosen in neurons.items():
        chosen = chosen.any("modality").values
        half = np.arange(len(chosen)) < len(chosen) / 2
        n, low = chosen.sum(), chosen[half].sum()
        chance = hypergeom(chosen.size, chosen[half].size, n)
        ends = np.array(chance.interval(0.95)) / n
        rows.append((modality, n, low / n, half.mean(), *ends, chance.sf(low - 1)))
    columns = ["modality", "neurons", "lower", "null", "null_low", "null_high", "p"]
    return pd.DataFrame(rows, columns=columns)


@computation(version=1)
def distances(
    mllm: MLLM,
    samples: Benchmark | Sequence[Sample],
    kinds: Sequence[str],
    neurons: xr.DataArray | None = None,
    *,
    n_boot: int = 0,
    tokens_per_kind: int = 4,
    seed: int = 0,
    batch_size: int = 8,
) -> xr.DataArray:
    """Distance of each kind's centroid from the text's, layer by layer, with neurons silenced.

    Returns [kind, draw, layer + 1]: draw 0 holds the samples themselves, the others n_boot
    resamplings of them, the same whatever is silenced, so that conditions compare in pairs.
    """
    look = {"tokens_per_kind": tokens_per_kind, "seed": seed, "batch_size": batch_size}
    with nullcontext() if neurons is None else deactivate(mllm, neurons):
        states = hidden_states(mllm, samples, **look)
    values = []
    for kind in kinds:
        part = states.of("text", kind)
        r = Resampling(part.tokens, kind, n_boot, 0, seed)
        w = np.vstack([np.ones(len(r.own)), r.token_draws])
        values.append([clouds.centroid_distance(x, w * ~r.own, w * r.own) for x in part.hidden])
    values = np.stack(values).transpose(0, 2, 1)
    return xr.DataArray(values, {"kind": list(kinds)}, ("kind", "draw", "layer"))


def silenced(
    before: xr.DataArray, after: Mapping[str, xr.DataArray], null: Sequence[xr.DataArray]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How silencing moves the convergence of each kind and the text, beside random draws.

    before, after {modality} and null as `distances` returns them; of null draw 0 is used.

    Returns
    -------
    moved: pair, silenced, change ("layer": of the layer of convergence; "distance": of the mean
    distance over layers), value, low, high, least, most (of the random draws' changes), p
    (two-sided), verdict. steps: kind, modality ("random": mean and range of the random draws),
    layer, value, low, high of the change of the distance.
    """
    moved, steps = [], []
    for kind in before["kind"].values.tolist():
        base = before.sel(kind=kind).values
        drawn = np.stack([t.sel(kind=kind).values[0] for t in null]) - base[0]
        at = clouds.convergence_layer(base)
        drawn_at = clouds.convergence_layer(drawn + base[0]) - at[0]
        for modality, table in after.items():
            now = table.sel(kind=kind).values
            change = now - base
            low, high = inference.middle95(change[1:])
            steps.append(_steps(kind, modality, change[0], low, high))
            for what, x, draws in (
                ("layer", clouds.convergence_layer(now) - at, drawn_at),
                ("distance", change.mean(1), drawn.mean(1)),
            ):
                draws = draws[np.isfinite(draws)] if np.isfinite(draws).any() else draws
                low, high = (float(end) for end in inference.middle95(x[1:]))
                line = {"pair": f"text-{kind}", "silenced": modality, "change": what}
                line |= {"value": x[0], "low": low, "high": high}
                line |= {"least": draws.min(), "most": draws.max()}
                line["p"] = inference.rank_p(x[0], draws, "two-sided")
                line["verdict"] = inference.change_against_draws(x[0], low, high, draws)
                moved.append(line)
        steps.append(_steps(kind, "random", drawn.mean(0), drawn.min(0), drawn.max(0)))
    return pd.DataFrame(moved), pd.concat(steps, ignore_index=True)


def _steps(kind: str, modality: str, value, low, high) -> pd.DataFrame:
    layer = range(len(value))
    columns = {"layer": layer, "value": value, "low": low, "high": high}
    return pd.DataFrame({"kind": kind, "modality": modality, **columns})


def claims(layers: pd.DataFrame, sits: pd.DataFrame, moved: pd.DataFrame, n_layers: int) -> list:
    """The lines of finding II for `inference.claims_table`, the claim as a whole first.

    layers as `verdicts` returns them, sits as `lower_share` does, moved as `silenced` does.
    """
    spread, lines = inference.spread, []
    layers = against_text(layers)
    layers = layers[layers["kind"] != "special"]
    for line in layers.itertuples():
        where = f"half done in layer {spread(line.layer, line.low, line.high, digits=1)}"
        if not line.converges:
            where = "not clearly nearer" if line.at else "never nearer"
        lines.append(
            {
                "claim": f"{line.pair} converge in the lower layers ({line.measure})",
                "measured": f"{line.start:z.2f} to {line.closest:z.2f}, {where}",
                "null": f"steady: layer {n_layers / 2:g}; shuffled: {line.null:z.2f}",
                "verdict": line.verdict,
            }
        )
    hold = sum(line["verdict"].word == inference.HOLDS for line in lines)
    whole = {
        "claim": "different modalities mainly converge in the lower layers",
        "measured": f"{hold} of {len(lines)} measures of text and media hold",
        "null": "the lines below",
        "verdict": inference.majority([line["verdict"] for line in lines]),
    }
    for line in sits.itertuples():
        lines.append(
            {
                "claim": f"{line.modality} neurons sit in the lower layers",
                "measured": f"{line.lower:.2f} of {line.neurons} in the lower half",
                "null": f"random: {spread(line.null, line.null_low, line.null_high)}",
                "p": line.p,
                "verdict": inference.by_p(line.p),
            }
        )
    does = {"layer": "moves the layer of convergence", "distance": "changes the distance"}
    for line in moved.itertuples():
        lines.append(
            {
                "claim": f"silencing {line.silenced} neurons {does[line.change]} of {line.pair}",
                "measured": spread(line.value, line.low, line.high, "+"),
                "null": f"random: {line.least:+z.2f} to {line.most:+z.2f}",
                "p": line.p,
                "verdict": line.verdict,
            }
        )
    return [whole, *lines]
