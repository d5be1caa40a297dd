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
from typing import Literal

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
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
