"""Where the modalities converge (finding II): distances of kinds' clouds, layer by layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.spatial import procrustes
from sklearn.metrics import pairwise_distances
from tqdm import tqdm

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings.states import States, hidden_states
from minerlib.inference import Estimate
from minerlib.model import MLLM
from minerlib.separation import separate
from minerlib.tasks import Sample

CONVERGENCE = dict(distance=True, silhouette=True, accuracy=True, mixing=False, cka=False)
"""Measures of convergence: whether smaller is more converged."""
PLACE = "place"  # the kind of words that stand where a medium stood


# --- five measures, to look at -------------------------------------------------------------------


@computation(version=2)
def convergence(
    states: States, kinds: Sequence[str] | None = None, *, k=10, n_boot=1000, n_null=200, seed=0
) -> pd.DataFrame:
    """How far apart each two kinds (default: of all) that meet lie, layer by layer.

    Measures: `distance` of the centroids over the spread; `silhouette` of the labels; `accuracy`
    of a cross-validated linear classifier; `mixing`, the share of the k nearest neighbours that
    are of the other kind, over chance; `cka`, debiased linear CKA between the kinds' means
    across samples. Null: labels shuffled within each sample, for `cka` samples paired at random.
    Columns pair, layer, and those of `inference.table_row`.
    """
    curves = []
    pairs = [pair for pair, n in meetings(states, kinds).items() if n]
    if not pairs:
        raise ValueError(f"no sample holds two of the kinds {kinds}; choose kinds that meet")
    for a, b in tqdm(pairs, desc="pairs", leave=False):
        part = states.of(a, b)
        r = inference.Resampling(part.tokens, b, n_boot, n_null, seed)
        for layer, x in enumerate(part.hidden):
            rows = _apart(x, r, k, n_null, seed)
            curves += [{"pair": f"{a}-{b}", "layer": layer, **row} for row in rows]
    return pd.DataFrame(curves)


def meetings(states: States, kinds: Sequence[str] | None = None) -> pd.Series:
    """How many samples hold both kinds, for each pair of kinds, indexed by (kind, kind)."""
    held = states.tokens.groupby("sample")["kind"].agg(set)
    kinds = list(dict.fromkeys(states.tokens["kind"])) if kinds is None else kinds
    return pd.Series({p: int(held.map(set(p).issubset).sum()) for p in combinations(kinds, 2)})


def _apart(x: np.ndarray, r: inference.Resampling, k, n_null, seed) -> Iterator[dict]:
    """The row of each measure of one layer and pair."""
    distance, tokens = pairwise_distances(x), r.token_draws
    apart = clouds.centroid_distance(x, ~r.second, r.second)
    draws = clouds.centroid_distance(x, tokens * ~r.own, tokens * r.own)
    yield inference.table_row("distance", apart[0], draws, apart[1:])
    per_token = {
        "silhouette": clouds.silhouette(distance, r.second),
        "accuracy": clouds.classified(x, r.second, r.group),
        "mixing": clouds.mixing(clouds.neighbours(distance, k), r.second),
    }
    for measure, values in per_token.items():
        yield inference.table_row(measure, *r.means(values), greater=CONVERGENCE[measure])
    first, second = (r.by_sample(x.T, own).T for own in (~r.own, r.own))
    yield inference.table_row("cka", *clouds.cka(first, second, r.draws, n_null, seed))


def against_text(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of pairs of text and another kind, with that kind in a column `kind`."""
    kind = table["pair"].str.removeprefix("text-").str.removesuffix("-text")
    return table.assign(kind=kind)[kind != table["pair"]]


def disparity(pictures: pd.DataFrame) -> pd.DataFrame:
    """Least and most difference of a layer's t-SNE pictures, by pairs; 0 after a Procrustes fit."""
    rows = []
    for layer, panel in pictures[pictures["view"] != "PCA"].groupby("layer"):
        views = [view[["x", "y"]] for _, view in panel.groupby("view")]
        apart = [procrustes(*pair)[2] for pair in combinations(views, 2)]
        rows.append((layer, min(apart), max(apart)))
    return pd.DataFrame(rows, columns=["layer", "least", "most"])


# --- the claim: how much of it is done in the lower half ------------------------------------------


@computation(version=2)
def distances(
    states: States, kinds: Sequence[str], *, n_boot: int = 0, n_null: int = 0, seed: int = 0
) -> xr.DataArray:
    """Distance of each kind's centroid from the text's over the spread, [kind, draw, layer].

    Draw 0 is the samples themselves; then come n_boot resamplings of them, the same whatever the
    states are, and n_null with the two kinds exchanged in random halves of the samples.
    """
    values = []
    for kind in kinds:
        part = states.of("text", kind)
        r = inference.Resampling(part.tokens, kind, n_boot, 0, seed)
        second = np.vstack([r.own, np.tile(r.own, (n_boot, 1))])
        second = np.vstack([second, inference.exchanged(r.own, r.group, n_null, seed)[1:]])
        w = np.vstack([np.ones(len(r.own)), r.token_draws, np.ones((n_null, len(r.own)))])
        values.append([clouds.centroid_distance(x, w * ~second, w * second) for x in part.hidden])
    found = xr.DataArray(values, {"kind": list(kinds)}, ("kind", "layer", "draw"))
    return found.transpose("kind", "draw", "layer")


@computation(version=1)
def silenced_distances(mllm: MLLM, samples, kinds, neurons=None, **look: Any) -> xr.DataArray:
    """`distances` with neurons silenced; look holds arguments of it and of `hidden_states`."""
    how = {name: look.pop(name) for name in ("n_boot", "n_null") if name in look}
    with nullcontext() if neurons is None else deactivate(mllm, neurons):
        states = hidden_states(mllm, samples, **look)
    return distances(states, kinds, seed=look.get("seed", 0), **how)


def lower_less_upper(found: xr.DataArray, n_boot: int) -> tuple[Estimate, np.ndarray]:
    """What `distances` fall by in the lower half of the layers less in the upper, over the first.

    From layer 1 on, where all kinds have passed the same layer; averaged over the kinds. Returns
    the effect from the first n_boot draws, and its null from the others.
    """
    d = found.values[:, :, 1:]  # [kind, draw, layer]
    first = d[..., 0].copy()
    first[:, n_boot + 1 :] = first[:, :1]  # exchanged kinds start at no distance
    value = (_lower_less_upper(d) / first).mean(0)
    return inference.from_draws(value[0], value[1 : n_boot + 1]), value[n_boot + 1 :]


def _lower_less_upper(d: np.ndarray) -> np.ndarray:
    middle = (d.shape[-1] - 1) / 2
    half = (d[..., math.floor(middle)] + d[..., math.ceil(middle)]) / 2
    return d[..., 0] - 2 * half + d[..., -1]


def untrained_halves(controls: pd.DataFrame, kinds: Sequence[str]) -> pd.Series:
    """The effect of `lower_less_upper` in each control whose `convergence` the table holds."""
    table = against_text(controls[(controls["measure"] == "distance") & (controls["layer"] > 0)])
    table = table[table["kind"].isin(kinds)]
    d = table.pivot(index=["control", "kind"], columns="layer", values="value")
    share = pd.Series(_lower_less_upper(d.to_numpy()) / d[1].to_numpy(), d.index)
    return share.groupby("control").mean()


def behind(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the medium behind the question."""
    return [replace(sample, behind=True) for sample in samples]


@computation(version=1)
def in_words(
    mllm: MLLM, samples: Sequence[Sample], states: States, kinds: Sequence[str], **look: Any
) -> States:
    """States with words in the media's place: as many tokens of other samples' answers.

    states are those of the samples with media; look as for `hidden_states`. The words' tokens are
    of the kind `PLACE`, those of the question of `text`.
    """
    lengths = {}
    for i in states.tokens["sample"][states.tokens["kind"].isin(kinds)].unique().tolist():
        sets = separate(mllm, mllm.encode([samples[i]]))
        lengths[i] = sum(int(sets[kind].sum()) for kind in kinds)
    answers = [" ".join(dict.fromkeys(sample.references)) for sample in samples]
    told, spans = [], []
    for sample, length in lengths.items():
        text = ", ".join(answers[sample + 1 :] + answers[:sample])
        ids = mllm.tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        plain = replace(samples[sample], image=None, video=None, audio=None)
        both = replace(plain, prompt=f"{mllm.tokenizer.decode(ids)}\n{plain.prompt}")
        a, b = (mllm.encode([x])["input_ids"][0].tolist() for x in (plain, both))
        start = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        told.append(both)
        spans.append((start, start + len(ids)))
    found = hidden_states(mllm, told, **look)
    start, stop = np.array(spans)[found.tokens["sample"]].T
    placed = found.tokens["position"].between(start, stop - 1) & (found.tokens["kind"] == "text")
    return States(found.hidden, found.tokens.assign(kind=found.tokens["kind"].mask(placed, PLACE)))


# --- neurons -------------------------------------------------------------------------------------


def lower_share(neurons: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """How many of each modality's neurons sit in the lower half of the layers, beside chance.

    Columns modality, neurons, lower (share of them), chance (the lower half's share of all).
    """
    rows = []
    for modality, array in neurons.items():
        chosen = array.any("modality").values
        half = np.arange(len(chosen)) < len(chosen) / 2
        rows.append((modality, chosen.sum(), chosen[half].sum() / chosen.sum(), half.mean()))
    return pd.DataFrame(rows, columns=["modality", "neurons", "lower", "chance"])


def low(sits: pd.DataFrame, size: int, n: int = 9999, seed: int = 0) -> tuple[Estimate, np.ndarray]:
    """What the mean of `lower_share` is beyond chance, and n draws of as many of all `size`.

    The chosen sets are what they are: the effect has no interval.
    """
    inside = round(size * sits["chance"][0])
    counts = sits["neurons"].to_numpy()
    rng = np.random.default_rng(seed)
    draws = rng.hypergeometric(inside, size - inside, counts, (n, len(counts))) / counts
    beyond = float((sits["lower"] - sits["chance"]).mean())
    return Estimate(beyond, beyond, beyond, beyond, beyond, 0.0), draws.mean(1) - sits[
        "chance"
    ].mean()


def moved(apart: Mapping[str, xr.DataArray]) -> tuple[Estimate, np.ndarray, pd.DataFrame]:
    """How far silencing each medium's own neurons moves it, more than as many random ones.

    apart {kind: [neurons, kind, draw, layer]} are `distances` of that kind as the model is, with
    its own neurons silenced, then random ones, of the same resamplings. The change of the distance
    from layer 1 on over the first, as in `inference.moved`: its effect and null. And the steps:
    kind, what ("own", "random"), layer, value, low, high (of the random sets: their range).
    """
    share, steps = [], []
    for kind, tables in apart.items():
        base, *silenced = tables.sel(kind=kind).values  # [draw, layer] each
        change = np.stack(silenced) - base
        share.append((change / base[:, 1:2])[:, :, 1:].swapaxes(1, 2))
        own, random = change[0], change[1:, 0]
        for what, x, ends in (
            ("own", own[0], inference.middle95(own[1:])),
            ("random", random.mean(0), (random.min(0), random.max(0))),
        ):
            band = {"layer": range(len(x)), "value": x, "low": ends[0], "high": ends[1]}
            steps.append(pd.DataFrame({"kind": kind, "what": what, **band}))
    return *inference.moved(np.array(share)), pd.concat(steps, ignore_index=True)
