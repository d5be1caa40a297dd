"""Where attention goes: between token sets (paper hypothesis 1) and to attention sinks.

Recomputed in float32 from the queries and keys that `MLLM.tap` shows, under the mask the model
used, and reduced to token sets prompt by prompt: no [head, token, token] tensor exists.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from minerlib.artifacts import computation
from minerlib.inference import by_share, interval
from minerlib.model import MLLM
from minerlib.scoring import attention
from minerlib.separation import separate


def visible(mask: Tensor | None, real: Tensor, queries: int | None = None) -> Tensor:
    """Which keys the last `queries` tokens (default all) see, bool [batch, query, key].

    mask, as the model's kernel got it, is bool (True is seen) or additive [batch, 1 or head, query,
    key]; None or two dimensions mean causal attention over the real tokens, bool [batch, token].
    """
    batch, n = real.shape
    queries = queries or n
    if mask is None or mask.ndim == 2:
        seen = real.new_ones(queries, n).tril(n - queries)
    elif mask.dtype == torch.bool:
        seen = mask[:, 0]
    else:
        seen = mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return seen.expand(batch, queries, n) & real[:, None]


def mass_between(
    query: Tensor, key: Tensor, seen: Tensor, sets: Tensor, scaling: float | None = None
) -> tuple[Tensor, Tensor]:
    """One prompt's mean attention mass from each set's tokens to each set, and its uniform null.

    query [head, token, dim], key [kv head, token, dim], seen bool [query, key], sets float
    [set, token]. Both are [query set, key set], NaN where a set is empty; the null is that of
    tokens that attend uniformly over those they see, themselves included.
    """
    count = sets.sum(-1, keepdim=True)
    here = (count > 0) & (count > 0).T

    def between(p: Tensor) -> Tensor:
        return torch.where(here, sets @ p @ sets.T / count.clamp(min=1), torch.nan)

    mass = attention(query[None], key[None], seen[None], scaling)[0]
    return between(mass), between(seen / seen.sum(-1, keepdim=True).clamp(min=1))


@torch.inference_mode()
def _masses(mllm: MLLM, bench, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mass and its null [sample, layer, set, set], and how many tokens a set has [sample, set]."""
    n_sets = len(mllm.kinds) + 2  # and the prompt's first token, and the special ones without it
    found = np.full((2, len(bench), mllm.n_layers, n_sets, n_sets), np.nan, np.float32)
    counts = np.zeros((len(bench), n_sets))
    for first, batch in mllm.batches(bench, batch_size, "attention"):
        base = separate(mllm, batch)
        real = base["prompt"]
        opening = real & (real.cumsum(1) == 1)
        extra = opening, base["special"] & ~opening
        sets = torch.stack([*(base[k] for k in mllm.kinds), *extra], 1).float()
        starts = (real.shape[1] - real.sum(1)).tolist()  # padding is on the left
        counts[first : first + len(real)] = sets.sum(-1).cpu().numpy()

        def attend(layer, query, key, mask, scaling, at=first, real=real, sets=sets, starts=starts):
            seen, members = visible(mask, real.to(query.device)), sets.to(query.device)
            for b, s in enumerate(starts):
                inputs = query[b, :, s:], key[b, :, s:], seen[b, s:, s:], members[b, :, s:]
                found[:, at + b, layer] = torch.stack(mass_between(*inputs, scaling)).cpu().numpy()

        with mllm.tap(attention=attend):
            mllm.forward(batch)
    return found[0], found[1], counts


def _table(value: str, values: np.ndarray, uniform=None, **axes) -> pd.DataFrame:
    """Means over samples of values [sample, layer, *axes], a row per entry that any sample has."""
    n = (~np.isnan(values)).sum(0)
    columns = dict(zip((value, "low", "high"), interval(values), strict=True))
    if uniform is not None:
        columns["uniform"] = np.nansum(uniform, axis=0) / n.clip(1)
    axes = {"layer": range(values.shape[1]), **axes}
    index = pd.MultiIndex.from_product(axes.values(), names=axes)
    table = pd.DataFrame({k: x.ravel() for k, x in columns.items()}, index).assign(n=n.ravel())
    return table[table["n"] > 0].reset_index()


@computation(version=1)
def attention_between(mllm: MLLM, bench, *, batch_size: int = 8) -> pd.DataFrame:
    """Mean attention mass from each base set's tokens to each base set, by layer.

    The model's own (causal, masked), averaged over heads, the query set's tokens and then samples.
    Columns layer, query, key, share, low, high (95 % bootstrap interval over samples), uniform
    (the null of `mass_between`), n (samples with both).
    """
    kinds = list(mllm.kinds)
    mass, null, _ = _masses(mllm, bench, batch_size)
    own = np.s_[:, :, : len(kinds), : len(kinds)]
    return _table("share", mass[own], null[own], query=kinds, key=kinds)


@computation(version=1)
def attention_within(mllm: MLLM, bench, *, batch_size: int = 8) -> pd.DataFrame:
    """The rows of `attention_between` from a set to itself, in a column `set` (hypothesis 1)."""
    own = attention_between(mllm, bench, batch_size=batch_size).query("query == key")
    return own.drop(columns="key").rename(columns={"query": "set"}).reset_index(drop=True)


def hypothesis_1(within: pd.DataFrame) -> pd.DataFrame:
    """Whether each set holds on to itself, from `attention_within` of one benchmark or several.

    Indexed by set: mean share and uniform, the shares of layers and benchmarks whose interval lies
    `above` and `below` the uniform null, and the verdict, `hypothesis 1` (`inference.by_share`).
    """
    above, below = within["low"] > within["uniform"], within["high"] < within["uniform"]
    groups = within.assign(above=above, below=below).groupby("set", sort=False)
    table = groups[["share", "uniform", "above", "below"]].mean()
    verdicts = map(by_share, table["above"], groups.size())
    return table.assign(**{"hypothesis 1": [*map(str, verdicts)]})


@computation(version=1)
def attention_sinks(mllm: MLLM, bench, *, batch_size: int = 8) -> pd.DataFrame:
    """Attention that each base set collects, relative to uniform attention, by layer.

    Sums over all of the prompt's queries; Xiao et al. (2023) call tokens far above 1 sinks. A
    prompt's first token, the usual sink and often special, has a row of its own, `first`, and
    `later special` is without it. Columns layer, set, collected, low, high (95 % interval), n.
    """
    mass, null, counts = _masses(mllm, bench, batch_size)
    kinds = len(mllm.kinds)  # they partition the queries; the others would count some twice
    queries = counts[:, None, :kinds, None]
    got, even = (np.nansum(queries * x[:, :, :kinds], axis=2) for x in (mass, null))
    ratio = np.divide(got, even, out=np.full_like(got, np.nan), where=even > 0)
    return _table("collected", ratio, set=[*mllm.kinds, "first", "later special"])
