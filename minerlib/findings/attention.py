"""Where attention goes: between token sets (paper hypothesis 1) and to attention sinks.

The model's own attention makes its output. What is measured is recomputed in float32 from the
queries and keys that `MLLM.tap` shows, under the mask the model used, in chunks of queries, and
reduced to token sets at once: no [head, token, token] tensor exists. What reaches the last prompt
token is in `last_token`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from minerlib.findings.states import batches
from minerlib.inference import interval
from minerlib.model import MLLM
from minerlib.separation import separate

_BLOCK = 2**19  # attention logits at a time: about what stays in a cache
_GPU_BLOCK = 2**26


def visible(
    mask: torch.Tensor | None, real: torch.Tensor, queries: int | None = None
) -> torch.Tensor:
    """Which keys each query sees, bool [batch, query, key], from the mask the model's kernel got.

    mask is bool (True is seen) or additive [batch, 1 or head, query, key]; None or two dimensions
    mean causal attention over the real tokens, bool [batch, token]. The queries are the last
    `queries` tokens (default all).
    """
    batch, n = real.shape
    queries = queries or n
    if mask is None or mask.ndim == 2:
        seen = torch.ones(queries, n, dtype=torch.bool, device=real.device).tril(n - queries)
    elif mask.dtype == torch.bool:
        seen = mask[:, 0]
    else:
        seen = mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return seen.expand(batch, queries, n) & real[:, None]


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
def _masses(mllm: MLLM, bench, batch_size, progress) -> tuple[np.ndarray, ...]:
    """Attention mass and its null per sample, and the tokens of each set.

    The first two are [sample, layer, set, set], the last [sample, set]; the sets are the model's
    kinds, then the prompt's first token by itself, and the special tokens without it.
    """
    n_sets = len(mllm.kinds) + 2
    found = np.full((2, len(bench), mllm.n_layers, n_sets, n_sets), np.nan, np.float32)
    counts = np.zeros((len(bench), n_sets))
    for first, batch in batches(mllm, bench, batch_size, progress, "attention"):
        base = separate(mllm, batch)
        real = base["prompt"]
        opening = real & (real.cumsum(1) == 1)
        extra = opening, base["special"] & ~opening
        sets = torch.stack([*(base[k] for k in mllm.kinds), *extra], 1).float()
        starts = (real.shape[1] - real.sum(1)).tolist()  # padding is on the left
        counts[first : first + len(real)] = sets.sum(-1).cpu().numpy()

        def attend(layer, query, key, mask, scaling, at=first, real=real, sets=sets, starts=starts):
            seen = visible(mask, real.to(query.device))
            members = sets.to(query.device)
            for b, s in enumerate(starts):
                inputs = query[b, :, s:], key[b, :, s:], seen[b, s:, s:], members[b, :, s:]
                result = mass_between(*inputs, scaling)
                found[:, at + b, layer] = torch.stack(result).cpu().numpy()

        with mllm.tap(attention=attend):
            mllm.forward(batch)
    return found[0], found[1], counts


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
    mass, null, _ = _masses(mllm, bench, batch_size, progress)
    share, low, high = interval(mass)
    held = (~np.isnan(mass)).sum(0)
    uniform = np.nansum(null, axis=0) / held.clip(1)
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


def attention_sinks(
    mllm: MLLM, bench, *, batch_size: int = 8, progress: bool | None = None
) -> pd.DataFrame:
    """Attention that each base set collects, relative to uniform attention, by layer.

    Sums over all of the prompt's queries: 1 is what the set's tokens would collect if every token
    attended uniformly over the tokens it sees (Xiao et al. 2023 call tokens far above it sinks).
    Since a prompt's first token is the usual sink and often special, it has a row of its own,
    `first`, and `later special` is special without it.

    Returns
    -------
    Columns layer, set, collected, low, high (95 % bootstrap interval over samples), n.
    """
    mass, null, counts = _masses(mllm, bench, batch_size, progress)
    kinds = len(mllm.kinds)  # they partition the queries; the others would count some twice
    queries = counts[:, None, :kinds, None]
    got, even = (np.nansum(queries * x[:, :, :kinds], axis=2) for x in (mass, null))
    names = [*mllm.kinds, "first", "later special"]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(even > 0, got / even, np.nan)
    value, low, high = interval(ratio)
    n = (~np.isnan(ratio)).sum(0)
    rows = [
        (layer, name, value[layer, j], low[layer, j], high[layer, j], int(n[layer, j]))
        for layer in range(mllm.n_layers)
        for j, name in enumerate(names)
        if n[layer, j]
    ]
    return pd.DataFrame(rows, columns=["layer", "set", "collected", "low", "high", "n"])
