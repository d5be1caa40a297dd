"""Where tokens lie in representation space, at every layer.

The findings' rooms turn these states into tables with one row per layer and measure: the value,
its 95 % interval by resampling samples, and its null by shuffling the kinds' labels within each
sample, or by exchanging the two kinds in whole samples. No measure depends on a projection;
`project` is for looking.

Layer 0 is the embeddings, layer i the output of the i-th decoder layer (before the final norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.separation import separate
from minerlib.tasks.rows import Benchmark


@dataclass(frozen=True)
class States:
    """Hidden states float32 [layer + 1, token, hidden] and what each token is.

    tokens has one row per token: sample, kind, position (in the prompt, from 0), place (within
    its own run of neighbours of that kind), run (that run's length), length (of the prompt), id,
    text.
    """

    hidden: np.ndarray
    tokens: pd.DataFrame

    def of(self, *kinds: str) -> States:
        """The tokens of these kinds, from the samples that hold all of them."""
        held = self.tokens.groupby("sample")["kind"].agg(set)
        samples = held.index[[set(kinds) <= k for k in held]]
        keep = self.tokens["kind"].isin(kinds) & self.tokens["sample"].isin(samples)
        if not keep.any():
            raise ValueError(f"no sample holds tokens of all of {kinds}; choose kinds that meet")
        return self.where(keep)

    def where(self, keep: np.ndarray | pd.Series) -> States:
        """The tokens under a bool mask [token]."""
        keep = np.asarray(keep, bool)
        return States(self.hidden[:, keep], self.tokens[keep].reset_index(drop=True))


def one_per_medium(bench: Benchmark) -> Benchmark:
    """The first prompt about each medium: a medium's tokens are the same in all of its prompts."""
    return bench[sorted(np.unique(bench.media, return_index=True)[1].tolist())]


@computation(version=1)
@torch.inference_mode()
def hidden_states(
    mllm: MLLM,
    bench,
    *,
    tokens_per_kind: int | None = 8,
    equal=True,
    seed=0,
    batch_size=8,
    normed: bool = False,
) -> States:
    """Hidden states of a seeded draw of tokens per kind and sample, at every layer.

    bench is a benchmark or a list of samples. Each sample gives at most tokens_per_kind of each
    kind it holds (None: no limit), and if `equal` the same number of each, so that neither a
    common kind nor a long prompt outweighs the rest. Only these are kept, 4 bytes x (layers + 1)
    x hidden size each. The draw does not depend on batch_size. With `normed` each state is as the
    next layer's input norm (the last: the final norm) hands it on: massive activations dominate
    the residual stream's distances and reach no layer as such.
    """
    hidden, tables = [], []
    norms = [mllm.family.input_norm(layer) for layer in mllm.layers] + [mllm.family.final_norm()]
    for first, batch in mllm.batches(bench, batch_size, "hidden states"):
        sets, ids = separate(mllm, batch), batch["input_ids"].cpu().numpy()
        base = np.stack([sets[k].cpu().numpy() for k in mllm.kinds], 1)
        how = mllm.kinds, tokens_per_kind, equal
        parts = [_draw(base[b], ids[b], *how, (seed, first + b)) for b in range(len(ids))]
        table = pd.concat(parts)
        at = tuple(np.array([table["sample"] - first, table.pop("column")]))
        tables.append(table)
        kept: list[np.ndarray] = []

        def keep(layer, h, at=at, kept=kept):
            h = norms[layer](h[at]) if normed and norms[layer] else h[at]
            kept.append(h.float().cpu().numpy())

        with mllm.tap(hidden=keep):
            mllm.forward(batch)
        hidden.append(np.stack(kept))
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
    held = (np.flatnonzero(kind == k) for k in range(len(kinds)))
    drawn = [rng.choice(at, n, replace=False) for at, n in zip(held, quota, strict=True) if n]
    at = np.sort(np.concatenate(drawn))
    table = {"sample": seed[1], "kind": np.array(kinds)[kind[at]], "position": at}
    table["place"] = (np.arange(len(kind)) - np.repeat(change, run))[at]
    table |= {"run": np.repeat(run, run)[at], "length": len(kind)}
    return pd.DataFrame(table | {"id": ids[real[at]], "column": real[at]})


@computation(version=1)
def project(
    states: States, layers: Sequence[int], *, seeds=(0, 1, 2), n_tokens: int = 300, draw: int = 0
) -> pd.DataFrame:
    """Two-dimensional pictures of the same tokens: t-SNE once per seed, and PCA.

    The n_tokens shown are drawn once, with seed `draw`, and are the same in every picture; t-SNE
    starts at random, so that what differs between its seeds is visibly layout and not fact.
    Columns token (its index), sample, kind, view ("t-SNE, seed 0", ..., "PCA"), layer, x, y.
    """
    order = np.random.default_rng(draw).permutation(len(states.tokens))
    shown = np.sort(order[:n_tokens])
    start = {"perplexity": min(30, (len(shown) - 1) / 3), "init": "random"}
    views = {f"t-SNE, seed {seed}": TSNE(random_state=seed, **start) for seed in seeds}
    views["PCA"] = PCA(2, svd_solver="full")
    tokens, panels = states.tokens.loc[shown, ["sample", "kind"]].reset_index(names="token"), []
    for layer, (view, method) in product(layers, views.items()):
        x, y = method.fit_transform(states.hidden[layer, shown]).T
        panels.append(tokens.assign(view=view, layer=layer, x=x, y=y))
    return pd.concat(panels, ignore_index=True)
