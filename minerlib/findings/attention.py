"""Where attention goes: between token sets (paper hypothesis 1) and to attention sinks.

Recomputed in float32 from the queries and keys that `MLLM.tap` shows, under the mask the model
used, and reduced to token sets prompt by prompt: no [head, token, token] tensor exists.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad

from minerlib.artifacts import computation
from minerlib.inference import decide, estimate, interval
from minerlib.model import MLLM
from minerlib.scoring import attention, needs_windows, visible
from minerlib.separation import separate, separate_new
from minerlib.tasks.evaluation import by_benchmark


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
    needs_windows(mllm)
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
        masses: dict[int, Tensor] = {}  # by layer, [mass or null, batch, set, set]

        def attend(
            layer, query, key, mask, scaling, real=real, sets=sets, starts=starts, to=masses
        ):
            seen, members = visible(mask, real.to(query.device)), sets.to(query.device)
            rows = ((query[b, :, s:], key[b, :, s:], seen[b, s:, s:], members[b, :, s:])
                    for b, s in enumerate(starts))  # fmt: skip
            to[layer] = torch.stack([torch.stack(mass_between(*row, scaling)) for row in rows], 1)

        with mllm.tap(attention=attend):
            mllm.forward(batch)
        rows = slice(first, first + len(real))
        found[:, rows, [*masses]] = np.moveaxis(together([*masses.values()]), 0, 2)
    return found[0], found[1], counts


def together(parts: Sequence[Tensor]) -> np.ndarray:
    """Tensors of one shape, wherever they lie, stacked on the host: waited for once, not each."""
    return torch.stack([part.to(parts[0].device) for part in parts]).cpu().numpy()


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


@computation(version=2)
def attention_within(mllm: MLLM, bench, *, batch_size: int = 8) -> pd.DataFrame:
    """Each prompt's share of attention from a base set to itself, by layer (hypothesis 1).

    Columns sample, layer, set, share, and uniform, the null of `mass_between`.
    """
    mass, null, _ = _masses(mllm, bench, batch_size)
    own = range(len(mllm.kinds))
    axes = {"sample": range(len(mass)), "layer": range(mllm.n_layers), "set": mllm.kinds}
    index = pd.MultiIndex.from_product(axes.values(), names=axes)
    columns = {"share": mass[:, :, own, own].ravel(), "uniform": null[:, :, own, own].ravel()}
    return pd.DataFrame(columns, index).dropna().reset_index()


@computation(version=1)
@contextmanager
def cut_off(mllm: MLLM, kinds: Sequence[str], layers: Sequence[int]) -> Iterator[MLLM]:
    """In these layers no token may attend to those of these kinds but they themselves.

    What they say can then reach the answer only through other layers. Kinds as `separate` names
    them; the softmax renormalises what is left. ValueError where the kernel takes no dense mask.
    """
    needs_dense_masks(mllm)
    if unknown := set(kinds) - set(mllm.kinds):
        raise ValueError(f"kinds {sorted(unknown)}: {mllm.name} has {', '.join(mllm.kinds)}")
    there: dict[str, Tensor] = {}

    def locate(module, args, batch):
        sets, ids, mask = separate_new(mllm, batch)
        own = torch.stack([sets[kind] for kind in kinds]).any(0)
        if ids.shape[1] == mask.shape[1]:  # the prompt; what is generated after it is no medium
            there["keys"] = own
        there["keys"] = pad(there["keys"], (0, mask.shape[1] - there["keys"].shape[1]))
        there["queries"], there["real"] = own, mask.bool()

    def block(layer, query, key, mask, scaling):
        keys, queries, real = (there[x].to(query.device) for x in ("keys", "queries", "real"))
        bias = dense_bias(mask, visible(mask, real, query.shape[2]), query.dtype).clone()
        cut = keys[:, None] & ~queries[..., None]
        return bias.masked_fill_(cut[:, None], torch.finfo(bias.dtype).min)

    handle = mllm.model.register_forward_pre_hook(locate, with_kwargs=True)
    try:
        with mllm.tap(attention=block, layers=list(layers)):
            yield mllm
    finally:
        handle.remove()


def dense_bias(mask: Tensor | None, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as additive, [batch, 1 or head, query, key]; no row is all -inf, so none is NaN."""
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask.expand(len(seen), *mask.shape[1:])
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, lowest)[:, None]


def needs_dense_masks(mllm: MLLM) -> None:
    """ValueError where the attention's kernel takes no mask of single entries."""
    kind = mllm.text_config._attn_implementation
    if "flash" in kind or "flex" in kind:
        way_out = "this changes single entries of one; load it with attn_implementation='sdpa'"
        raise ValueError(f"{mllm.name} runs {kind}, whose kernel takes no dense mask: {way_out}")


def hypothesis_1(within: pd.DataFrame, smallest: float = 0.1) -> pd.DataFrame:
    """Whether each set holds on to more attention than it would if all were uniform.

    within has the rows of `attention_within` of each benchmark, and columns benchmark and medium
    (what a prompt is about). Indexed by set: share, uniform and their difference, excess, averaged
    over layers, prompts and then benchmarks; low, high (`inference.estimate` over prompts, those
    about one medium together); and `hypothesis 1`, the word of `inference.decide`.
    """
    prompt, values = ["set", "benchmark", "sample", "medium"], ["share", "uniform"]
    rows = within.groupby(prompt, sort=False)[values].mean().reset_index()
    rows["excess"], lines = rows["share"] - rows["uniform"], {}
    for name, of in rows.groupby("set", sort=False):
        media, means = by_benchmark(of, "medium"), of.groupby("benchmark")[values].mean().mean()
        found = estimate(by_benchmark(of, "excess"), media, None)
        interval = {"excess": found.mean, "low": found.low, "high": found.high}
        lines[name] = {**means, **interval, "hypothesis 1": str(decide(found, smallest))}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("set")


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
