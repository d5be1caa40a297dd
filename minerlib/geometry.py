"""Where tokens lie in representation space, and where the modalities converge (finding II).

`hidden_states` collects a subsample of tokens at every layer; `convergence`, and `probing` and
`telomeres` in `semantics`, turn it into tables with one row per layer and measure: the value, its
95 % interval by resampling samples, and its null by shuffling the kinds' labels within each
sample. The measures themselves are pure functions on arrays, in `clouds`. None depends on a
projection; `project` is for looking.

Layer 0 is the embeddings, layer i the output of the i-th decoder layer (before the final norm).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances
from tqdm.auto import tqdm

from minerlib import clouds
from minerlib.model import MLLM
from minerlib.separation import separate

# --- collecting ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """Hidden states float32 [layer + 1, token, hidden] and what each token is.

    tokens has one row per token: sample, kind, position (in the prompt, from 0), place (within
    its own run of neighbours of that kind), run (that run's length), count (tokens of that kind
    in the prompt), length (of the prompt), id, text.
    """

    hidden: np.ndarray
    tokens: pd.DataFrame

    def of(self, *kinds: str) -> States:
        """The tokens of these kinds, from the samples that hold all of them."""
        held = self.tokens.groupby("sample")["kind"].agg(set)
        samples = held.index[[set(kinds) <= k for k in held]]
        keep = (self.tokens["kind"].isin(kinds) & self.tokens["sample"].isin(samples)).to_numpy()
        if not keep.any():
            raise ValueError(f"no sample holds tokens of all of {kinds}; choose kinds that meet")
        return States(self.hidden[:, keep], self.tokens[keep].reset_index(drop=True))


@contextmanager
def residual_stream(mllm: MLLM, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call see(layer, h [batch, token, hidden]) with the embeddings (0) and each layer's output."""

    def embeddings(module, args, kwargs):
        see(0, args[0] if args else kwargs["hidden_states"])

    hook = mllm.layers[0].register_forward_pre_hook(embeddings, with_kwargs=True)
    try:
        with mllm.tap(hidden=lambda layer, h: see(layer + 1, h)):
            yield
    finally:
        hook.remove()


def batches(mllm: MLLM, bench, batch_size: int, progress: bool | None, label: str) -> Iterator:
    """(first row, model inputs) of one batch of a benchmark or list of samples after another."""
    name = getattr(bench, "name", "samples")
    if len(bench) == 0:
        raise ValueError(f"{name!r} has no rows; raise its limit")
    if progress is None:
        progress = os.environ.get("MINER_PROGRESS", "1") != "0"
    starts = range(0, len(bench), batch_size)
    for i in tqdm(starts, desc=f"{label} {name}", disable=not progress, leave=False):
        yield i, mllm.encode(bench[i : i + batch_size])


@torch.inference_mode()
def hidden_states(
    mllm: MLLM,
    bench,
    *,
    tokens_per_kind: int | None = 8,
    equal: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool | None = None,
) -> States:
    """Hidden states of a seeded draw of tokens per kind and sample, at every layer.

    bench is a benchmark or a list of samples. Each sample gives at most tokens_per_kind of each
    kind it holds (None: no limit), and if `equal` the same number of each, so that neither a
    common kind nor a long prompt outweighs the rest. Only these are kept, 4 bytes x (layers + 1)
    x hidden size each. The draw does not depend on batch_size.
    """
    hidden, tables = [], []
    for first, batch in batches(mllm, bench, batch_size, progress, "hidden states"):
        sets, ids = separate(mllm, batch), batch["input_ids"].cpu().numpy()
        base = np.stack([sets[k].cpu().numpy() for k in mllm.kinds], 1)
        parts = [
            _draw(base[b], ids[b], mllm.kinds, tokens_per_kind, equal, (seed, first + b))
            for b in range(len(ids))
        ]
        row = torch.from_numpy(np.repeat(np.arange(len(parts)), [len(p) for p in parts]))
        table = pd.concat(parts, ignore_index=True)
        column = torch.from_numpy(table.pop("column").to_numpy(copy=True))
        kept = [None] * (mllm.n_layers + 1)

        def keep(layer, h, kept=kept, row=row, column=column):
            kept[layer] = h[row.to(h.device), column.to(h.device)].float().cpu().numpy()

        with residual_stream(mllm, keep):
            mllm.forward(batch)
        hidden.append(np.stack(kept))
        tables.append(table)
    tokens = pd.concat(tables, ignore_index=True)
    texts = {i: mllm.tokenizer.decode([i]) for i in tokens["id"].unique().tolist()}
    return States(np.concatenate(hidden, 1), tokens.assign(text=tokens["id"].map(texts)))


def _draw(base, ids, kinds, limit, equal, seed) -> pd.DataFrame:
    """The drawn tokens of one prompt; base bool [kind, token], ids [token], left-padded."""
    real = np.flatnonzero(base.any(0))
    kind = base[:, real].argmax(0)
    change = np.flatnonzero(np.diff(kind, prepend=-1))
    run = np.diff(change, append=len(kind))
    counts = np.bincount(kind, minlength=len(kinds))
    quota = np.minimum(counts, len(kind) if limit is None else limit)
    if equal:
        quota[counts > 0] = quota[counts > 0].min()
    rng = np.random.default_rng(seed)
    drawn = [
        rng.choice(np.flatnonzero(kind == k), quota[k], replace=False) for k in np.unique(kind)
    ]
    at = np.sort(np.concatenate(drawn))
    return pd.DataFrame(
        {
            "sample": seed[1],
            "kind": np.array(kinds)[kind[at]],
            "position": at,
            "place": (np.arange(len(kind)) - np.repeat(change, run))[at],
            "run": np.repeat(run, run)[at],
            "count": counts[kind[at]],
            "length": len(kind),
            "id": ids[real[at]],
            "column": real[at],
        }
    )


# --- tables --------------------------------------------------------------------------------------


class Resampling:
    """Samples of a token table as bootstrap draws, per-sample means and shuffled labels."""

    def __init__(self, tokens: pd.DataFrame, second: str, n_boot: int, n_null: int, seed: int):
        self.group = np.unique(tokens["sample"], return_inverse=True)[1]
        self.size = self.group.max() + 1
        self.draws = clouds.resamples(self.size, n_boot, seed)
        self.second = clouds.shuffles(
            (tokens["kind"] == second).to_numpy(), self.group, n_null, seed
        )
        self.own = self.second[0]

    @property
    def token_draws(self) -> np.ndarray:
        """How often each token occurs in each bootstrap draw, [n_boot, token]."""
        return self.draws[:, self.group]

    def by_sample(self, values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Means over each sample's tokens, [..., token] -> [..., sample]; NaN without any."""
        to = np.zeros((len(self.group), self.size))
        to[np.arange(len(self.group)), self.group] = 1
        where = np.ones(1) if where is None else where
        with np.errstate(invalid="ignore"):
            return (values * where) @ to / ((where + np.zeros_like(values)) @ to)

    def row(self, measure: str, values: np.ndarray, where=None, greater=True) -> dict:
        """A row from per-token values [1 + n_null, token], counted where bool of that shape."""
        mean = self.by_sample(values, where)
        draws = clouds.weighted(mean[0][:, None], self.draws)[:, 0]
        mean = np.nanmean(mean, axis=1)
        return table_row(measure, mean[0], draws, mean[1:], greater)


def table_row(measure: str, value, draws, null, greater: bool | None = True) -> dict:
    """One line of a table; p is one-sided in the claim's direction, or two-sided (greater=None)."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    null_low, null_high = np.quantile(null, [0.025, 0.975])
    side = (null, value) if greater else (-null, -value)
    if greater is None:
        side = np.abs(null), abs(value)
    p = (1 + (side[0] >= side[1] - 1e-12).sum()) / (1 + len(null))
    return {
        "measure": measure,
        "value": float(value),
        "low": low,
        "high": high,
        "null": float(np.mean(null)),
        "null_low": null_low,
        "null_high": null_high,
        "p": p,
    }


CONVERGENCE = {
    "distance": True,
    "silhouette": True,
    "accuracy": True,
    "mixing": False,
    "cka": False,
}
"""Measures of convergence: whether smaller is more converged."""


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
    kinds = list(dict.fromkeys(states.tokens["kind"])) if kinds is None else kinds
    for a, b in combinations(kinds, 2):
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
            none = np.isnan(at)
            low, high = np.nanquantile(at, [0.025, 0.975]) if not none.all() else (np.nan, np.nan)
            layers.append(
                {
                    "pair": pair,
                    "measure": measure,
                    "layer": float(clouds.convergence_layer(curve, falling)),
                    "low": low,
                    "high": high,
                    "lower_half": float((at < (len(curve) - 1) / 2).mean()),
                    "start": curve[0],
                    "closest": curve.min() if falling else curve.max(),
                    "end": curve[-1],
                    "never": float(none.mean()),
                }
            )
    return pd.DataFrame(curves), pd.DataFrame(layers)


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
        draws.append(clouds.weighted(mean.T, r.draws)[:, 0])
    views = (r.by_sample(x.T, own).T for own in (~r.own, r.own))
    value, cka_draws, null = clouds.cka(*views, r.draws, n_null, seed)
    return [*rows, table_row("cka", value, cka_draws, null)], [*draws, cka_draws]


def project(
    states: States,
    layers: Sequence[int],
    method: Literal["tsne", "pca"] = "tsne",
    *,
    seeds: Sequence[int] = (0, 1, 2),
    n_tokens: int = 400,
    draw: int = 0,
    perplexity: float = 30,
) -> pd.DataFrame:
    """Two-dimensional pictures of the same tokens at several layers, t-SNE once per seed.

    The n_tokens shown are drawn once, with seed `draw`, and are the same in every panel; t-SNE
    starts at random, so that what differs between its seeds is visibly layout and not fact. PCA
    has no seed: it comes once, as seed 0.

    Returns
    -------
    Columns method, layer, seed, token (index into `states.tokens`), sample, kind, x, y.
    """
    if method not in ("tsne", "pca"):
        raise ValueError(f"unknown projection {method!r}; use tsne or pca")
    n = len(states.tokens)
    shown = np.sort(np.random.default_rng(draw).permutation(n)[:n_tokens])
    panels = []
    for layer in layers:
        x = states.hidden[layer, shown]
        for seed in seeds if method == "tsne" else (0,):
            if method == "tsne":
                wide = min(perplexity, (len(x) - 1) / 3)
                xy = TSNE(perplexity=wide, init="random", random_state=seed).fit_transform(x)
            else:
                xy = PCA(2, svd_solver="full").fit_transform(x)
            panel = states.tokens.loc[shown, ["sample", "kind"]].assign(x=xy[:, 0], y=xy[:, 1])
            panel.insert(0, "token", shown)
            panels.append(panel.assign(method=method, layer=layer, seed=seed))
    table = pd.concat(panels, ignore_index=True)
    return table[["method", "layer", "seed", "token", "sample", "kind", "x", "y"]]
