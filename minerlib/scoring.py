"""Stage 2, importance scores: five metrics per neuron and token set (paper section 3.2).

The two attention-weighted metrics need no product of a [token, token] matrix with the
activations. Summing the rows of S X is (column sums of S) X, so each metric is a row of weights
over the tokens times X, and all rows of a layer are one thin matrix product: O(n N), not
O(n^2 N). Sums stream per layer; no activation outlives its hook.
"""

from __future__ import annotations

import hashlib
import math
import os
from itertools import product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import xarray as xr
from tqdm.auto import tqdm

from minerlib.model import MLLM
from minerlib.separation import BASE_SETS, SETS, separate, stack

METRICS = ("prob", "mean", "max", "attn_k", "attn_q")
"""The five importance metrics, in the order of the scores' `metric` coordinate."""

_BASE = [SETS.index(name) for name in BASE_SETS]
_MEAN, _PROMPT = METRICS.index("mean"), SETS.index("prompt")
_UNIONS = {"special_text": ("special", "text"), "prompt": BASE_SETS}
_BLOCK = 2**19  # elements of scratch memory: what stays in a core's cache between two passes
_GPU_BLOCK = 2**25  # a GPU wants few large kernels instead


def importance(
    activations: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    masks: torch.Tensor,
    scaling: float | None = None,
) -> torch.Tensor:
    """Importance scores of one layer's neurons, normalised to [0, 1] (paper section 3.2).

    activations [batch, token, neuron]; rotated query [batch, head, token, dim] and key
    [batch, kv head, token, dim]; masks bool [batch, set, token] with the sets in the order of
    SETS. Tokens in no set are padding, neither query nor key. scaling defaults to 1/sqrt(dim).
    Returns [batch, metric, set, neuron] float32 in the orders of METRICS and SETS; a set without
    tokens, or a metric that is the same for all neurons, gives 0.
    """
    if masks.shape[1] != len(SETS):
        raise ValueError(f"masks has {masks.shape[1]} sets, expected the {len(SETS)} of {SETS}")
    weights = attention_weights(query, key, masks, scaling)
    return normalise(metrics(activations, *weights, masks, layout(masks)))


@torch.no_grad()
def attention_weights(
    query: torch.Tensor, key: torch.Tensor, masks: torch.Tensor, scaling: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token weights of attn_k and attn_q, each [batch, set, token] float32, 0 outside the set.

    With P the head-averaged attention without causal mask and S = P[set, set], a token's attn_k
    weight is its row sum of softmax(S, 0), its attn_q weight its column sum of softmax(S, 1).
    """
    heads, n = query.shape[1:3]
    masks = masks.float()
    weights_k, weights_q = torch.empty_like(masks), torch.empty_like(masks)
    # One [token, token] matrix at a time; short prompts several, which together are as small.
    for rows in _parts(len(masks), _block(query) // (heads * n * n)):
        m = masks[rows]
        # P lies in [0, 1], so its exponential needs no maximum subtracted. Columns of padding
        # never meet a weight: m is 0 there.
        e = attention(query[rows], key[rows], m.any(1), scaling).exp_()
        of_rows, of_columns = e @ m.mT, m @ e
        weights_k[rows] = m * ((m / of_columns.clamp(min=1e-9)) @ e.mT)
        weights_q[rows] = m * ((m / of_rows.mT.clamp(min=1e-9)) @ e)
    return weights_k, weights_q


def attention(
    query: torch.Tensor, key: torch.Tensor, real: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Attention averaged over heads, no causal mask, [batch, token, token] float32.

    Computed for a few heads and queries at a time, so that no [head, token, token] tensor exists.
    query [batch, head, token, dim], key [batch, kv head, token, dim], real bool [batch, token].
    """
    batch, heads, n, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    query, keys = query.view(batch, kv_heads, groups, n, dim), key.float().mT
    scale = dim**-0.5 if scaling is None else scaling
    p = torch.zeros(batch, n, n, device=query.device)
    # Long runs of queries of few heads make the fastest products.
    chunk = min(n, max(1, 2 * _block(query) // (batch * groups * n)))
    at_once = min(kv_heads, max(1, 2 * _block(query) // (batch * groups * chunk * n)))
    # On CPUs, memory that is used again costs half as much as fresh memory.
    scratch = p.new_empty(2, batch * at_once * groups * chunk * n)
    padding = torch.where(real, 0, float("-inf"))[:, None]
    padded = query.is_cuda or not real.all()  # asking a GPU would wait for it
    for i, some in product(range(0, n, chunk), _parts(kv_heads, at_once)):
        q = query[:, some, :, i : i + chunk].float() * scale
        k = keys[:, some].reshape(-1, dim, n)
        shape = *q.shape[:4], n
        logits, shares = scratch[:, : math.prod(shape)].view(2, len(k), -1, n)
        torch.bmm(q.reshape(len(k), -1, dim), k, out=logits)
        if padded:
            logits.view(batch, -1, n).add_(padding)
        torch.softmax(logits, -1, out=shares)
        for head in shares.view(shape).flatten(1, 2).unbind(1):
            p[:, i : i + chunk] += head
    return p.div_(heads)


def _block(x: torch.Tensor) -> int:
    return _GPU_BLOCK if x.is_cuda else _BLOCK


def _parts(n: int, size: int) -> list[slice]:
    """Slices of at least one element that cover range(n)."""
    size = max(1, size)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def layout(masks: torch.Tensor) -> np.ndarray:
    """The base set of every token, int [batch, token] on the CPU; padding is -1."""
    base = masks[:, _BASE].int()
    return torch.where(base.any(1), base.argmax(1), -1).cpu().numpy()  # one transfer per batch


def metrics(x, weights_k, weights_q, masks, kinds, minimum=None) -> torch.Tensor:
    """The five metrics before normalisation, [batch, metric, set, neuron] float32.

    x [batch, token, neuron]; kinds is the masks' `layout`; minimum, a 0-dim tensor, is lowered in
    place to the smallest activation seen.
    """
    batch, n, neurons = x.shape
    members, outside = masks.float(), torch.where(masks, 0, float("-inf"))
    weights = torch.cat([members, weights_k, weights_q], 1)
    sums = x.new_zeros(batch, weights.shape[1], neurons, dtype=torch.float32)
    positive = torch.zeros(batch, len(SETS), neurons, device=x.device)
    highest = torch.full_like(positive, float("-inf"))
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
        for k in here:
            if k < 0:
                continue
            own = part
            if len(here) > 1:
                own = torch.add(part, outside[rows, _BASE[k], columns, None], out=other)
            top = highest[rows, _BASE[k]]
            torch.maximum(top, own.amax(1), out=top)

    if minimum is not None:
        low = torch.where(masks[:, _PROMPT], x.amin(-1), minimum).min()
        torch.minimum(minimum, low, out=minimum)

    for union, names in _UNIONS.items():
        highest[:, SETS.index(union)] = highest[:, [SETS.index(k) for k in names]].amax(1)
    count = masks.sum(-1, keepdim=True)
    highest.masked_fill_(count == 0, 0)
    total, attn_k, attn_q = sums.chunk(3, 1)
    count = count.clamp(min=1)
    return torch.stack([positive.div_(count), total.div_(count), highest, attn_k, attn_q], 1)


def normalise(values: torch.Tensor) -> torch.Tensor:
    """Min-max over the neurons (last axis) to [0, 1]; a constant vector gives 0."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low).div_(torch.where(high > low, high - low, 1))


class Sums:
    """Running sums of one benchmark's scores; per layer, on that layer's device."""

    def __init__(self, n_layers: int):
        self.scores: list = [0] * n_layers  # [metric, set, neuron]
        self.mean: list = [0] * n_layers  # [neuron], raw activations over prompt tokens
        self.minimum: list = [None] * n_layers
        self.samples = torch.zeros(len(SETS), dtype=torch.long)
        self.rows = 0

    def save(self, path: Path, key: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.stack([t.cpu() for t in getattr(self, name)]) for name in self.lists}
        part = path.with_name(path.name + ".part")
        metadata = {"key": key, "rows": str(self.rows)}
        safetensors.torch.save_file({**tensors, "samples": self.samples}, part, metadata)
        part.replace(path)

    def load(self, path: Path, key: str, devices: list) -> None:
        with safetensors.safe_open(path, "pt") as file:
            if file.metadata()["key"] != key:
                raise ValueError(f"checkpoint {path} is of another model or benchmark; delete it")
            for name in self.lists:
                tensors = file.get_tensor(name)
                setattr(self, name, [t.to(d) for t, d in zip(tensors, devices, strict=True)])
            self.samples = file.get_tensor("samples")
            self.rows = int(file.metadata()["rows"])

    lists = ("scores", "mean", "minimum")


def score(
    mllm: MLLM,
    bench,
    *,
    batch_size: int = 8,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
) -> xr.DataArray:
    """Stage 2 for a benchmark: scores averaged over its samples (paper sections 3.2 and 3.3).

    Returns a DataArray [metric, modality, layer, neuron] float32 in [0, 1], with coordinates
    `samples` (how many samples hold the set; its mean is over those) and, for silencing with a
    constant, `activation_mean` [layer, neuron] and `activation_min` [layer] over prompt tokens.

    Only the prompt's forward pass is scored (prefill). With `checkpoint`, the sums are written
    there every `checkpoint_every` batches and a rerun continues from them.
    """
    if len(bench) == 0:
        raise ValueError(f"benchmark {bench.name!r} has no rows to score; raise its limit")
    sums = Sums(mllm.n_layers)
    key = hashlib.sha256(f"{mllm.fingerprint}{bench.fingerprint}".encode()).hexdigest()
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and checkpoint.exists():
        sums.load(checkpoint, key, [next(layer.parameters()).device for layer in mllm.layers])
    if progress is None:
        progress = os.environ.get("MINER_PROGRESS", "1") != "0"
    starts = range(sums.rows, len(bench), batch_size)
    for done, i in enumerate(tqdm(starts, desc=f"score {bench.name}", disable=not progress), 1):
        rows = bench[i : i + batch_size]
        add_batch(mllm, mllm.encode(rows), sums)
        sums.rows += len(rows)
        if checkpoint is not None and done % checkpoint_every == 0:
            sums.save(checkpoint, key)
    result = _to_array(sums, mllm.n_layers, bench.name)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return result


@torch.inference_mode()
def add_batch(mllm: MLLM, batch, sums: Sums) -> None:
    """Run the prompts once and add their normalised scores to the sums."""
    masks = stack(separate(mllm, batch))
    kinds = layout(masks)
    weights, on_device, fired = {}, {}, set()

    def masks_on(device):
        if device not in on_device:
            on_device[device] = masks.to(device)
        return on_device[device]

    def attend(layer, query, key, mask, scaling):
        weights[layer] = attention_weights(query, key, masks_on(query.device), scaling)

    def activate(layer, x):
        if sums.minimum[layer] is None:
            sums.minimum[layer] = torch.full((), float("inf"), device=x.device, dtype=x.dtype)
        if layer not in weights:
            raise RuntimeError(
                f"{mllm.name}: layer {layer}'s attention did not go through transformers' "
                "attention interface, so its queries and keys are unknown"
            )
        raw = metrics(x, *weights.pop(layer), masks_on(x.device), kinds, sums.minimum[layer])
        sums.scores[layer] = sums.scores[layer] + normalise(raw).sum(0)
        sums.mean[layer] = sums.mean[layer] + raw[:, _MEAN, _PROMPT].sum(0)
        fired.add(layer)

    with mllm.tap(activation=activate, attention=attend):
        mllm.forward(batch)
    if len(fired) < mllm.n_layers:
        raise RuntimeError(
            f"{mllm.name}: the activation modules of layers "
            f"{sorted(set(range(mllm.n_layers)) - fired)} never ran; a fused MLP kernel may skip "
            "them: load the model without it"
        )
    sums.samples += masks.any(-1).sum(0).cpu()


def _to_array(sums: Sums, n_layers: int, name: str) -> xr.DataArray:
    samples = sums.samples.clamp(min=1)
    scores = torch.stack([s.cpu() for s in sums.scores], 2) / samples[None, :, None, None]
    mean = torch.stack([m.cpu() for m in sums.mean]) / sums.rows
    minimum = torch.stack([m.cpu() for m in sums.minimum]).float()
    return xr.DataArray(
        scores.numpy(),
        dims=("metric", "modality", "layer", "neuron"),
        coords={
            "metric": list(METRICS),
            "modality": list(SETS),
            "layer": range(n_layers),
            "samples": ("modality", sums.samples.numpy()),
            "activation_mean": (("layer", "neuron"), mean.numpy()),
            "activation_min": ("layer", minimum.numpy()),
        },
        name="importance",
        attrs={"benchmark": name, "rows": sums.rows},
    )
