"""Where tokens lie in representation space: convergence, semantic probing, semantic telomeres.

`hidden_states` collects a subsample of tokens at every layer; `convergence`, `probing` and
`telomeres` turn it into tables with one row per layer and measure: the value, its 95 % interval
by resampling samples, and its null by shuffling the kinds' labels within each sample. The
measures themselves are the pure functions on arrays in between. None depends on a projection;
`project` is for looking.

Layer 0 is the embeddings, layer i the output of the i-th decoder layer (before the final norm).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom, rankdata
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import GroupKFold
from tqdm.auto import tqdm

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
        column = torch.from_numpy(table.pop("column").to_numpy())
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
    drawn = [rng.choice(np.flatnonzero(kind == k), quota[k], replace=False) for k in np.unique(kind)]
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


# --- resampling ----------------------------------------------------------------------------------


def interval(values: np.ndarray, n: int = 2000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Mean over samples with its 95 % percentile bootstrap interval.

    values [sample, ...]; NaN where a sample has no value. Returns mean, low, high, each [...];
    NaN where no sample has a value.
    """
    values = np.asarray(values, float)
    flat = values.reshape(len(values), -1)
    means = _weighted(flat, resamples(len(flat), n, seed))
    low, high = np.full((2, flat.shape[1]), np.nan)
    there = ~np.isnan(flat).all(0)
    low[there], high[there] = np.nanquantile(means[:, there], [0.025, 0.975], axis=0)
    mean = _weighted(flat, np.ones((1, len(flat))))[0]
    return tuple(x.reshape(values.shape[1:]) for x in (mean, low, high))


def resamples(n_samples: int, n: int, seed: int = 0) -> np.ndarray:
    """How often each sample occurs in each of n bootstrap resamplings, float [n, sample]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_samples, np.full(n_samples, 1 / n_samples), n).astype(float)


def _weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of values [sample, ...] under weights [n, sample], leaving NaN out: [n, ...]."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(there, values, 0)) / (weights @ there)


def shuffles(labels: np.ndarray, groups: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """The labels [token], and n shuffles of them within each group, [n + 1, token]."""
    rank = np.unique(groups, return_inverse=True)[1]
    slots = np.argsort(rank, kind="stable")
    drawn = np.argsort(rank + np.random.default_rng(seed).random((n, len(rank))), axis=1)
    out = np.tile(labels, (n + 1, 1))
    out[1:, slots] = labels[drawn]
    return out


def summarise(table: pd.DataFrame, value: str, by: Sequence[str] = ("layer", "set")) -> pd.DataFrame:
    """Mean over samples with its 95 % interval of a table with one row per sample and `by`.

    Returns columns *by, value (under its own name), low, high, n. For a paired change between
    two conditions pass `paired(before, after, value, by)`.
    """
    by = list(by)
    wide = table.pivot_table(value, "sample", by, sort=False)
    columns = wide.columns.to_frame(index=False)
    mean, low, high = interval(wide.to_numpy())
    n = wide.notna().sum().to_numpy()
    return columns.assign(**{value: mean, "low": low, "high": high, "n": n})


def paired(
    before: pd.DataFrame, after: pd.DataFrame, value: str, by: Sequence[str] = ("layer", "set")
) -> pd.DataFrame:
    """after - before of the same samples: one row per sample and `by`, for `summarise`."""
    key = ["sample", *by]
    both = before[[*key, value]].merge(after[[*key, value]], on=key, validate="one_to_one")
    if not len(both) == len(before) == len(after):
        raise ValueError(
            f"only {len(both)} rows are in both tables ({len(before)} and {len(after)}): measure "
            "both conditions on the same samples"
        )
    return both[key].assign(**{value: both[f"{value}_y"] - both[f"{value}_x"]})


# --- pure measures -------------------------------------------------------------------------------
# Two clouds of n points; `second` bool [r, n] says which points are of the second cloud, once per
# labelling r (the observed one and its shuffles).


def centroid_distance(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distance of two clouds' centroids over their spread, [r]; 0 is one place.

    x [n, hidden]; first and second are the clouds' weights [r, n], 0 outside the cloud. The
    spread is the root mean square distance of the points from their own centroid.
    """
    centres, variances = [], []
    x = x - x.mean(0)
    for w in (first, second):
        w = w / w.sum(1, keepdims=True)
        centres.append(w @ x)
        variances.append(w @ (x**2).sum(1) - (centres[-1] ** 2).sum(1))
    spread = np.sqrt(np.maximum(sum(variances) / 2, 1e-12))
    return np.linalg.norm(centres[0] - centres[1], axis=1) / spread


def silhouette(distance: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Silhouette of each point under each labelling, [r, n], in -1..1; 0 is mixed (Rousseeuw)."""
    labels = second.astype(distance.dtype)
    n, to = labels.sum(1, keepdims=True), labels @ distance
    rest = distance.sum(0) - to
    own = np.where(second, to / (n - 1).clip(1), rest / (second.shape[1] - n - 1).clip(1))
    other = np.where(second, rest / (second.shape[1] - n), to / n)
    return (other - own) / np.maximum(np.maximum(own, other), 1e-12)


def neighbours(distance: np.ndarray, k: int) -> np.ndarray:
    """Indices of each point's k nearest others, [n, k], nearest first."""
    distance = distance.copy()
    np.fill_diagonal(distance, np.inf)
    k = min(k, len(distance) - 1)
    near = np.argpartition(distance, k - 1, axis=1)[:, :k]
    order = np.take_along_axis(distance, near, 1).argsort(axis=1, kind="stable")
    return np.take_along_axis(near, order, 1)


def mixing(near: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of each point's neighbours [n, k] in the other cloud over chance: 0 apart, 1 mixed."""
    share = np.stack([(row[near] != row[:, None]).mean(1) for row in second])
    n, size = second.shape[1], second.sum(1, keepdims=True)
    return share / (np.where(second, n - size, size) / (n - 1))


def classified(x: np.ndarray, second: np.ndarray, groups: np.ndarray, folds: int = 5) -> np.ndarray:
    """Whether a linear classifier of the cloud is right about each held-out point, bool [r, n].

    Least squares with a ridge of a thousandth of the mean variance, on folds that no group
    straddles. One factorisation serves all labellings.
    """
    x, target = x.astype(float), np.where(second, 1.0, -1.0).T
    right = np.zeros(second.shape, bool)
    folds = min(folds, len(np.unique(groups)))
    for train, test in GroupKFold(folds).split(x, groups=groups):
        penalty = 1e-3 * len(train) * x[train].var(0).mean() + 1e-12
        model = Ridge(penalty, solver="cholesky").fit(x[train], target[train])
        right[:, test] = ((model.predict(x[test]).reshape(len(test), -1) > 0) == second.T[test]).T
    return right


def cka(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None, shuffled: int = 0, seed=0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Debiased linear CKA of two views [sample, hidden] of the same samples; 0 is unrelated.

    Returns the value, its bootstrap values under weights [r, sample] and its null under
    `shuffled` random pairings. The Gram matrices are centred so that their diagonal is 0
    (the unbiased HSIC of Song et al. 2012), which also keeps a sample that is drawn twice from
    being compared with itself.
    """
    k, m = _centred_gram(a), _centred_gram(b)
    weights = np.ones((1, len(k))) if weights is None else np.vstack([np.ones(len(k)), weights])
    km, kk, mm = (((weights @ p) * weights).sum(1) for p in (k * m, k * k, m * m))
    values = km / np.sqrt(np.maximum(kk * mm, 1e-24))
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(len(k)) for _ in range(shuffled))
    null = np.array([(k * m[np.ix_(o, o)]).sum() for o in orders]) / np.sqrt(kk[0] * mm[0] + 1e-24)
    return values[0], values[1:], null


def _centred_gram(x: np.ndarray) -> np.ndarray:
    n = len(x)
    if n < 4:
        raise ValueError(f"{n} samples hold both kinds; CKA needs at least 4: raise the limit")
    x = x - x.mean(0)
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    row = gram.sum(0) / (n - 2)
    gram += gram.sum() / ((n - 1) * (n - 2)) - row - row[:, None]
    np.fill_diagonal(gram, 0)
    return gram


def convergence_layer(curve: np.ndarray, falling: bool = True) -> np.ndarray:
    """The layer by which half of all convergence is done, interpolated between layers.

    curve [..., layer + 1], embeddings first; falling means that smaller is more converged. The
    whole is the furthest the curve ever gets from its start in the converging direction, so a
    later divergence does not count; NaN where it never converges.
    """
    gain = (curve[..., :1] - curve) * (1 if falling else -1)
    gain = np.maximum.accumulate(gain, axis=-1)
    half = gain[..., -1:] / 2
    after = (gain >= half).argmax(-1)[..., None]
    before = (after - 1).clip(0)
    low, high = (np.take_along_axis(gain, i, -1) for i in (before, after))
    with np.errstate(invalid="ignore", divide="ignore"):
        at = before + (half - low) / (high - low)
    return np.where(half > 0, at, np.nan)[..., 0]
