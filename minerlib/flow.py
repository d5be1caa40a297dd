"""Where attention goes and what reaches the last token (paper hypothesis 1 and finding III).

The model's own attention makes its output. What is measured is recomputed in float32 from the
queries and keys that `MLLM.tap` shows, under the mask the model used, in chunks of queries, and
reduced to token sets at once: no [head, token, token] tensor exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from minerlib.geometry import interval
from minerlib.model import MLLM
from minerlib.separation import separate

_BLOCK = 2**19  # attention logits at a time: about what stays in a cache
_GPU_BLOCK = 2**26


def batches(mllm: MLLM, bench, batch_size: int, progress: bool | None, label: str) -> Iterator:
    """(first row, samples, model inputs) of one batch after another, in the benchmark's order."""
    if len(bench) == 0:
        raise ValueError(f"benchmark {bench.name!r} has no rows; raise its limit")
    if progress is None:
        progress = os.environ.get("MINER_PROGRESS", "1") != "0"
    starts = range(0, len(bench), batch_size)
    for i in tqdm(starts, desc=f"{label} {bench.name}", disable=not progress, leave=False):
        samples = bench[i : i + batch_size]
        yield i, samples, mllm.encode(samples)


def visible(mask: torch.Tensor | None, real: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees, bool [batch, query, key], from the mask the model's kernel got.

    mask is bool (True is seen) or additive [batch, 1 or head, query, key]; None or two dimensions
    mean causal attention over the real tokens, bool [batch, token].
    """
    batch, n = real.shape
    if mask is None or mask.ndim == 2:
        seen = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
    elif mask.dtype == torch.bool:
        seen = mask[:, 0]
    else:
        seen = mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return seen.expand(batch, n, n) & real[:, None]


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scaling: float | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """One prompt's head-averaged attention, a chunk of queries after another, float32.

    query [head, token, dim], key [kv head, token, dim], seen bool [query, key]; scaling defaults
    to 1/sqrt(dim). Yields (queries, [chunk, key]).
    """
    heads, n, dim = query.shape
    keys = key.float().transpose(-1, -2).contiguous()
    query = query.reshape(len(key), -1, n, dim)
    scale = dim**-0.5 if scaling is None else scaling
    chunk = max(1, (_GPU_BLOCK if query.is_cuda else _BLOCK) // (heads * n))
    for i in range(0, n, chunk):
        rows = slice(i, min(i + chunk, n))
        q = query[:, :, rows].float().reshape(len(key), -1, dim) * scale
        logits = (q @ keys).view(heads, -1, n).masked_fill_(~seen[rows], float("-inf"))
        yield rows, logits.softmax(-1).mean(0)


def mass_between(
    query: torch.Tensor,
    key: torch.Tensor,
    seen: torch.Tensor,
    sets: torch.Tensor,
    scaling: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One prompt's mean attention mass from each set's tokens to each set, and its uniform null.

    sets float [set, token]; the rest as in `attention_rows`. Both are [query set, key set], rows
    summing to 1 if the sets partition the prompt; NaN where a set is empty. The null is what the
    same tokens would give if each attended uniformly over the tokens it sees, itself included.
    """
    parts = [p @ sets.T for _, p in attention_rows(query, key, seen, scaling)]
    even = seen.float()
    even = (even @ sets.T) / even.sum(-1, keepdim=True).clamp(min=1)
    count = sets.sum(-1, keepdim=True)
    here = (count > 0) & (count > 0).T
    return tuple(
        torch.where(here, (sets @ rows) / count.clamp(min=1), torch.nan)
        for rows in (torch.cat(parts), even)
    )


@torch.inference_mode()
def _masses(mllm: MLLM, bench, batch_size, progress) -> tuple[np.ndarray, np.ndarray]:
    """Attention mass and its null per sample, each [sample, layer, query set, key set]."""
    kinds = mllm.kinds
    shape = (len(bench), mllm.n_layers, len(kinds), len(kinds))
    found = np.full((2, *shape), np.nan, np.float32)
    for first, _, batch in batches(mllm, bench, batch_size, progress, "attention"):
        base = separate(mllm, batch)
        real = base["prompt"]
        sets = torch.stack([base[k] for k in kinds], 1).float()
        starts = (real.shape[1] - real.sum(1)).tolist()  # padding is on the left

        def attend(layer, query, key, mask, scaling, at=first, real=real, sets=sets, starts=starts):
            device = query.device
            seen = visible(mask, real.to(device))
            for b, s in enumerate(starts):
                result = mass_between(
                    query[b, :, s:],
                    key[b, :, s:],
                    seen[b, s:, s:],
                    sets[b, :, s:].to(device),
                    scaling,
                )
                found[:, at + b, layer] = torch.stack(result).cpu().numpy()

        with mllm.tap(attention=attend):
            mllm.forward(batch)
    return found[0], found[1]


def attention_between(
    mllm: MLLM, bench, *, batch_size: int = 8, progress: bool | None = None
) -> pd.DataFrame:
    """Mean attention mass from each base set's tokens to each base set, by layer.

    Attention is the model's own (causal, masked), averaged over heads; a sample's value is the
    mean over the query set's tokens, and samples weigh equally.

    Returns
    -------
    Columns layer, query, key, share, low, high (95 % bootstrap interval over samples), uniform
    (the mean share if every token attended uniformly over the tokens it sees), n (samples that
    hold both sets).
    """
    kinds = list(mllm.kinds)
    mass, null = _masses(mllm, bench, batch_size, progress)
    share, low, high = interval(mass)
    uniform = interval(null, n=1)[0]
    held = (~np.isnan(mass)).sum(0)
    rows = [
        (layer, q, k, *(float(x[layer, i, j]) for x in (share, low, high, uniform)), n)
        for layer in range(mllm.n_layers)
        for i, q in enumerate(kinds)
        for j, k in enumerate(kinds)
        if (n := int(held[layer, i, j]))
    ]
    columns = ["layer", "query", "key", "share", "low", "high", "uniform", "n"]
    return pd.DataFrame(rows, columns=columns)


def attention_within(
    mllm: MLLM, bench, *, batch_size: int = 8, progress: bool | None = None
) -> pd.DataFrame:
    """Share of attention that stays within a token's own base set, by layer (hypothesis 1).

    Returns
    -------
    Columns layer, set, share, low, high (95 % bootstrap interval over samples), uniform (the
    share if every token attended uniformly over the tokens it sees, itself included), n.
    """
    table = attention_between(mllm, bench, batch_size=batch_size, progress=progress)
    own = table[table["query"] == table["key"]].drop(columns="key")
    return own.rename(columns={"query": "set"}).reset_index(drop=True)
