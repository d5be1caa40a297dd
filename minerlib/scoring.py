"""Stage 2, importance scores: five metrics per neuron and token set (paper section 3.2).

The attention-weighted ones need no product of a [token, token] matrix S with the activations X:
summing the rows of S X is (column sums of S) X, so each metric is a row of weights over the tokens
times X, and all of a layer are one thin matrix product, O(n N) instead of O(n^2 N). Sums stream
per layer; no activation outlives its hook.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from minerlib import memory, processes
from minerlib.answering import answered
from minerlib.artifacts import Checkpoint, computation, key
from minerlib.model import MLLM, RowError, starts
from minerlib.separation import BASE_SETS, SETS, UNIONS, separate, stack


class Layer(NamedTuple):
    """What a metric may look at: one layer's neurons over a batch of prompts."""

    activations: Tensor  # [batch, token, neuron], in the model's precision
    masks: Tensor  # bool [batch, set, token]
    tokens: Tensor  # in each set, at least 1, [batch, set, 1]
    # Sums over a set's tokens, [batch, set, neuron] float32: how many are positive, their sum, the
    # highest (0 in an empty set), and the two attention-weighted sums.
    positive: Tensor
    total: Tensor
    highest: Tensor
    attn_k: Tensor
    attn_q: Tensor


METRICS: dict[str, Callable[[Layer], Tensor]] = {
    "prob": lambda layer: layer.positive / layer.tokens,
    "mean": lambda layer: layer.total / layer.tokens,
    "max": lambda layer: layer.highest,
    "attn_k": lambda layer: layer.attn_k,
    "attn_q": lambda layer: layer.attn_q,
}
"""The importance metrics, each a function of a `Layer` that returns [batch, set, neuron], in the
order of the scores' `metric` coordinate: the paper's five, and whatever is registered besides."""

_BASE = [SETS.index(name) for name in BASE_SETS]
_MEAN, _PROMPT = list(METRICS).index("mean"), SETS.index("prompt")
_BLOCK = 2**19  # elements of scratch memory: what stays in a core's cache between two passes
_GPU_BLOCK = 2**25  # a GPU wants few large kernels instead


@lru_cache
def _runs_triton(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def fused(x: Tensor) -> bool:
    """Whether `kernels` take this tensor: activations, or queries whose tiles fit on any card."""
    narrow = x.ndim < 4 or x.shape[-1] <= 128
    return narrow and x.is_cuda and x.dtype != torch.float64 and _runs_triton(x.device)


def own_metrics() -> list[str]:
    """The registered metrics that are not the paper's: part of the key of scores."""
    return [name for name, metric in METRICS.items() if metric.__module__ != __name__]


def importance(
    activations: Tensor, query: Tensor, key: Tensor, masks: Tensor, scaling: float | None = None
) -> Tensor:
    """Importance scores of one layer's neurons, normalised to [0, 1] (paper section 3.2).

    activations [batch, token, neuron]; rotated query [batch, head, token, dim] and key [batch,
    kv head, token, dim]; masks bool [batch, set, token], sets as in SETS, tokens in none are
    padding. scaling defaults to 1/sqrt(dim). Returns [batch, metric, set, neuron] float32, metrics
    as in METRICS; a set without tokens and a metric equal for all neurons give 0.
    """
    if masks.shape[1] != len(SETS):
        raise ValueError(f"masks has {masks.shape[1]} sets, expected the {len(SETS)} of {SETS}")
    weights = attention_weights(query, key, masks, scaling)
    return normalise(metrics(activations, *weights, masks, layout(masks)))


@torch.no_grad()
def attention_weights(
    query: Tensor,
    key: Tensor,
    masks: Tensor,
    scaling: float | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token weights of attn_k and attn_q, each [batch, set, token] float32, 0 outside the set.

    With P the head-averaged attention without causal mask and S = P[set, set], a token's attn_k
    weight is its row sum of softmax(S, 0), its attn_q weight its column sum of softmax(S, 1).
    With seen bool [batch, query, key], of `visible`, P is as the model attends: the paper's is not.
    """
    heads, n = query.shape[1:3]
    masks = masks.float()
    weights_k, weights_q = torch.empty_like(masks), torch.empty_like(masks)
    # One [token, token] matrix at a time; short prompts several, which together are as small.
    each = n * n * (1 if fused(query) else heads)
    for rows in _parts(len(masks), _block(query) // each):
        m = masks[rows]
        # P lies in [0, 1], so its exponential needs no maximum subtracted. Columns of padding
        # never meet a weight: m is 0 there.
        real = m.any(1)
        if seen is not None:  # a token of padding sees itself, so that no row is empty
            real = seen[rows] | torch.eye(n, dtype=torch.bool, device=m.device)
        e = attention(query[rows], key[rows], real, scaling).exp_()
        of_rows, of_columns = e @ m.mT, m @ e
        weights_k[rows] = m * ((m / of_columns.clamp(min=1e-9)) @ e.mT)
        weights_q[rows] = m * ((m / of_rows.mT.clamp(min=1e-9)) @ e)
    return weights_k, weights_q


def attention(query: Tensor, key: Tensor, real: Tensor, scaling: float | None = None) -> Tensor:
    """Attention averaged over heads, no causal mask, [batch, token, token] float32.

    query [batch, head, token, dim], key [batch, kv head, token, dim]; real bool [batch, token], or
    [batch, query, key] where tokens see different ones. No [head, token, token] tensor exists.
    """
    (batch, heads, n, dim), kv_heads = query.shape, key.shape[1]
    groups = heads // kv_heads
    scale = dim**-0.5 if scaling is None else scaling
    if fused(query) and real.ndim == 2:
        from minerlib import kernels  # Triton is not everywhere

        return kernels.attention(query, key, real, scale)
    query, keys = query.view(batch, kv_heads, groups, n, dim), key.float().mT
    p = torch.zeros(batch, n, n, device=query.device)
    # Long runs of queries of few heads make the fastest products.
    chunk = min(n, max(1, 2 * _block(query) // (batch * groups * n)))
    at_once = min(kv_heads, max(1, 2 * _block(query) // (batch * groups * chunk * n)))
    # On CPUs, memory that is used again costs half as much as fresh memory.
    scratch = p.new_empty(2, batch * at_once * groups * chunk * n)
    padding = torch.where(real, 0, -math.inf).view(batch, -1, n).expand(batch, n, n)
    padded = query.is_cuda or not real.all()  # asking a GPU would wait for it
    for i, some in product(range(0, n, chunk), _parts(kv_heads, at_once)):
        q = query[:, some, :, i : i + chunk].float() * scale
        k = keys[:, some].reshape(-1, dim, n)
        shape = *q.shape[:4], n
        logits, shares = scratch[:, : math.prod(shape)].view(2, len(k), -1, n)
        torch.bmm(q.reshape(len(k), -1, dim), k, out=logits)
        if padded:
            logits.view(batch, -1, q.shape[3], n).add_(padding[:, None, i : i + chunk])
        torch.softmax(logits, -1, out=shares)
        for head in shares.view(shape).flatten(1, 2).unbind(1):
            p[:, i : i + chunk] += head
    return p.div_(heads)


def needs_windows(mllm: MLLM) -> None:
    """ValueError where a kernel keeps it to itself how far back a layer sees (`visible`)."""
    config = mllm.text_config
    if "flash" in (kind := config._attn_implementation) and getattr(config, "sliding_window", None):
        raise ValueError(
            f"{mllm.name} runs {kind}, which does not say that some layers see the last "
            f"{config.sliding_window} tokens only: load it with attn_implementation='sdpa'"
        )


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


def _block(x: Tensor) -> int:
    return _GPU_BLOCK if x.is_cuda else _BLOCK


def _parts(n: int, size: int) -> list[slice]:
    """Slices of about `size` elements, at least one, that cover range(n)."""
    size = max(1, size)
    return [slice(i, i + size) for i in range(0, n, size)]


def layout(masks: Tensor) -> np.ndarray:
    """The base set of every token, int [batch, token] on the CPU; padding is -1."""
    return _base(masks).cpu().numpy()  # one transfer per batch


def _base(masks: Tensor) -> Tensor:
    base = torch.stack([masks[:, i] for i in _BASE], 1).int()
    return torch.where(base.any(1), base.argmax(1), -1)


def metrics(x, weights_k, weights_q, masks, kinds) -> Tensor:
    """The metrics before normalisation, [batch, metric, set, neuron] float32.

    x [batch, token, neuron]; the weights are those of `attention_weights`, kinds is `layout`.
    """
    batch, n, neurons = x.shape
    weights = torch.cat([masks.float(), weights_k, weights_q], 1)
    highest = torch.full((batch, len(SETS), neurons), -math.inf, device=x.device)
    if fused(x):
        from minerlib import kernels

        sums, positive, tops = kernels.over_tokens(x, weights, masks, _base(masks), len(_BASE))
        for i, top in zip(_BASE, tops.unbind(1), strict=True):
            highest[:, i] = top
    else:
        sums, positive = _over_tokens(x, weights, masks, kinds, highest)
    for union, names in UNIONS.items():
        for name in names:
            top = highest[:, SETS.index(union)]
            torch.maximum(top, highest[:, SETS.index(name)], out=top)
    count = masks.sum(-1, keepdim=True)
    highest.masked_fill_(count == 0, 0)
    total, *attn = sums.chunk(3, 1)
    layer = Layer(x, masks, count.clamp(min=1), positive, total, highest, *attn)
    found = {name: metric(layer) for name, metric in METRICS.items()}
    for name, values in found.items():
        if values.shape != highest.shape:
            shapes = f"{tuple(values.shape)}, not [batch, set, neuron] {tuple(highest.shape)}"
            raise ValueError(f"importance metric {name!r} gave {shapes}")
    return torch.stack([*found.values()], 1)


def _over_tokens(x, weights, masks, kinds, highest) -> tuple[Tensor, Tensor]:
    """Weighted sums over the tokens and how many are above 0; puts in the highest of each kind."""
    (batch, n, neurons), members = x.shape, masks.float()
    outside = torch.where(masks, 0, -math.inf)
    sums = x.new_zeros(batch, weights.shape[1], neurons, dtype=torch.float32)
    positive = torch.zeros(batch, len(SETS), neurons, device=x.device)
    # All passes over a block of activations are made while a CPU's cache holds it.
    size = max(1, min(batch, _block(x) // (32 * neurons)))
    block = min(n, max(1, _block(x) // (size * neurons)))
    scratch = torch.empty(size, block, neurons, device=x.device)
    for rows, columns in product(_parts(batch, size), _parts(n, block)):
        part = x[rows, columns].float()
        other = scratch[: len(part), : part.shape[1]]
        sums[rows].baddbmm_(weights[rows, :, columns], part)
        positive[rows].baddbmm_(members[rows, :, columns], torch.gt(part, 0, out=other))
        here = np.unique(kinds[rows, columns]).tolist()
        for k in (k for k in here if k >= 0):
            own = part
            if len(here) > 1:
                own = torch.add(part, outside[rows, _BASE[k], columns, None], out=other)
            top = highest[rows, _BASE[k]]
            torch.maximum(top, own.amax(1), out=top)
    return sums, positive


def normalise(values: Tensor) -> Tensor:
    """Min-max over the neurons (last axis) to [0, 1]; a constant vector gives 0."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low).div_(torch.where(high > low, high - low, 1))


class Sums:
    """Running sums of one benchmark's scores; lists are per layer, on that layer's device."""

    def __init__(self, n_layers: int):
        self.scores = [torch.zeros(())] * n_layers  # [metric, set, neuron]
        self.mean = [torch.zeros(())] * n_layers  # [neuron], raw activations over prompt tokens
        self.minimum = [torch.tensor(math.inf)] * n_layers
        self.samples = torch.zeros(len(SETS), dtype=torch.long)  # that hold each set
        self.rows, self.done = 0, 0  # scored; scored or skipped
        self.skipped: list[str] = []


@computation(version=1)
def score(
    mllm: MLLM,
    bench,
    *,
    batch_size: int = 8,
    checkpoint=None,
    every: float = 60.0,
    on_error: str = "raise",
    causal: bool = False,
    generated: int = 0,
) -> xr.DataArray:
    """Stage 2 for a benchmark: scores averaged over its samples (paper sections 3.2 and 3.3).

    Returns a DataArray [metric, modality, layer, neuron] float32 in [0, 1], with coordinates
    `samples` (how many samples hold the set; its mean is over those) and, for silencing with a
    constant, `activation_mean` [layer, neuron] and `activation_min` [layer] over prompt tokens.

    Only the prompt's forward pass is scored (prefill), as the paper does; with `generated` the
    model's own answer of at most so many tokens too, as text and as prompt; with `causal` attention
    is weighted as the model attends. With `checkpoint`, a path, the sums are written beside it
    every `every` seconds and a rerun of the same rows continues from them.
    RowError for a row that cannot be used or gives what is not finite; on_error="skip" leaves it
    out, warns and names it in attrs["skipped"].
    """
    if causal:
        needs_windows(mllm)
    sums, saved, how = Sums(mllm.n_layers), None, {"causal": causal, "generated": generated}
    batches = [range(len(bench))[i : i + batch_size] for i in starts(bench, batch_size)]
    own = batches
    if processes.size() > 1:
        lengths = memory.lengths(bench, on_error)
        own = [batches[i] for i in processes.dealt([lengths[rows].sum() for rows in batches])]
    if checkpoint is not None:
        made_by = [score, *(METRICS[name] for name in own_metrics())]
        made = key(mllm, made_by, data=bench.fingerprint, on_error=on_error, **how)
        if not isinstance(saved := checkpoint, Checkpoint):
            saved = Checkpoint(checkpoint, {**made, "batch_size": batch_size}, every)
        vars(sums).update(saved.load() or {})
    left = [rows for rows in own if rows.start >= sums.done]

    def add() -> dict:
        for rows in tqdm(left, desc=f"score {bench.name}", leave=False):
            _add(mllm, bench, rows, sums, on_error, **how)
            sums.done = rows.stop
            if saved is not None and sums.rows:
                saved.save(vars(sums))
        return vars(sums)

    if processes.size() == 1:
        add()
    else:
        sums = _together(processes.joined(lambda: send_to_device(add(), torch.device("cpu"))))
    if sums.skipped:
        warnings.warn("; ".join(["rows skipped", *sums.skipped]), stacklevel=2)
    if not sums.rows:
        raise ValueError(f"benchmark {bench.name!r}: every row was skipped: {sums.skipped[0]}")
    if saved is not None:
        saved.done(vars(sums))
    return _to_array(sums, bench.name)


def _together(parts: list[dict]) -> Sums:
    """The sums of several processes as one."""
    sums = Sums(len(parts[0]["scores"]))
    for part in parts:
        for name in ("scores", "mean") if part["rows"] else ():
            old, new = getattr(sums, name), part[name]
            setattr(sums, name, [a + b.cpu() for a, b in zip(old, new, strict=True)])
        lowest = zip(sums.minimum, part["minimum"], strict=True)
        sums.minimum = [torch.minimum(a, b.cpu()) for a, b in lowest]
        sums.samples, sums.rows = sums.samples + part["samples"], sums.rows + part["rows"]
        sums.skipped += part["skipped"]
    return sums


def _add(mllm: MLLM, bench, positions, sums: Sums, on_error: str, **how: Any) -> None:
    """Add these rows; where one of them fails and may be skipped, the others one by one."""
    positions, samples, batch, skipped = mllm.gather(bench, positions, on_error)
    sums.skipped += skipped
    again: list[list[int]] = []
    try:
        if samples:
            rows = [(s.benchmark or bench.name, s.row) for s in samples]
            add_batch(mllm, batch, sums, rows, **how)
    except (RowError, torch.OutOfMemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        fault = memory.too_large(samples[0]) if full else error
        if full and len(positions) > 1:
            again = memory.halves(positions)
        elif on_error == "raise":
            raise fault from error.__cause__
        elif len(positions) == 1:
            sums.skipped.append(str(fault))
        else:
            again = [[i] for i in positions]
    for part in again:
        _add(mllm, bench, part, sums, on_error, **how)


@torch.inference_mode()
def add_batch(
    mllm: MLLM,
    batch,
    sums: Sums,
    rows: Sequence[tuple[str, int]] = (),
    causal: bool = False,
    generated: int = 0,
) -> None:
    """Run the prompts, whose (benchmark, row) are `rows`, and add their normalised scores.

    RowError for the first whose activations are not finite, which leaves the sums as they were.
    """
    if generated:
        batch = answered(mllm, batch, generated)
    masks = stack(separate(mllm, batch))
    kinds = layout(masks)
    weights, found, finite = {}, {}, {}
    masks_on = lru_cache(masks.to)

    def attend(layer, query, key, mask, scaling):
        on = masks_on(query.device)
        seen = visible(mask, on.any(1)) if causal else None
        weights[layer] = attention_weights(query, key, on, scaling, seen)

    def activate(layer, x):
        if layer in weights:  # if its attention was not tapped, `tap` says so
            raw = metrics(x, *weights.pop(layer), masks_on(x.device), kinds)
            low = x.amin(-1).where(masks_on(x.device)[:, _PROMPT], math.inf).min()
            found[layer] = normalise(raw).sum(0), raw[:, _MEAN, _PROMPT].sum(0), low
            finite[layer] = raw.isfinite().flatten(2).all(2)  # [row, metric]

    with mllm.tap(activation=activate, attention=attend):
        mllm.forward(batch)
    broken = ~torch.stack([finite[layer].cpu() for layer in range(mllm.n_layers)])
    for layer, i in broken.any(-1).nonzero().tolist():
        bad = [name for name, is_bad in zip(METRICS, broken[layer, i], strict=True) if is_bad]
        why = f"activations or scores of {mllm.name} in {mllm.model.dtype} are not finite; try "
        why += "dtype='bfloat16' or 'float32'"
        if set(bad) <= set(own_metrics()):  # of the same activations the paper's are finite
            why = f"importance metric {', '.join(map(repr, bad))} gives numbers that are not finite"
        benchmark, row = rows[i] if rows else ("batch", i)
        raise RowError(benchmark, row, f"layer {layer}", why)
    # All new ones before the first is kept: where memory runs out the sums are as they were.
    before = zip(sums.scores, sums.mean, sums.minimum, strict=True)
    after = [_sum(*of, *found[layer]) for layer, of in enumerate(before)]
    sums.scores, sums.mean, sums.minimum = map(list, zip(*after, strict=True))
    sums.samples += masks.any(-1).sum(0).cpu()
    sums.rows += len(masks)


def _sum(scores, mean, minimum, more, also, low) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's sums with those of one more batch; of a checkpoint they are on the CPU."""
    new = scores.to(more.device) + more, mean.to(also.device) + also
    return *new, torch.minimum(minimum.to(low), low)


def _to_array(sums: Sums, name: str) -> xr.DataArray:
    scores = torch.stack([part.cpu() for part in sums.scores], 2)
    mean, minimum = (torch.stack([p.cpu() for p in part]) for part in (sums.mean, sums.minimum))
    attrs = {"benchmark": name, "rows": sums.rows}
    return xr.DataArray(
        (scores / sums.samples.clamp(min=1)[:, None, None]).numpy(),
        dims=("metric", "modality", "layer", "neuron"),
        coords={
            "metric": list(METRICS),
            "modality": list(SETS),
            "layer": range(len(mean)),
            "samples": ("modality", sums.samples.numpy()),
            "activation_mean": (("layer", "neuron"), (mean / sums.rows).numpy()),
            "activation_min": ("layer", minimum.float().numpy()),
        },
        name="importance",
        attrs=attrs | ({"skipped": sums.skipped} if sums.skipped else {}),
    )
