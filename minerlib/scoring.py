"""Stage 2, importance scores: five metrics per neuron and token set (paper section 3.2).

The two attention-weighted metrics need no product of a [token, token] matrix with the
activations. Summing the rows of S X is (column sums of S) X, so each metric is a row of weights
over the tokens times X, and all rows of a layer are one thin matrix product: O(n N), not
O(n^2 N). Sums stream per layer; no activation outlives its hook.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from itertools import groupby, product
from pathlib import Path

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
_GPU_BLOCK = 2**26  # a GPU wants few large kernels instead


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
    return normalise(metrics(activations, *weights, masks, runs(masks)))


@torch.no_grad()
def attention_weights(
    query: torch.Tensor, key: torch.Tensor, masks: torch.Tensor, scaling: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token weights of attn_k and attn_q, each [batch, set, token] float32, 0 outside the set.

    With P the head-averaged attention without causal mask and S = P[set, set], a token's attn_k
    weight is its row sum of softmax(S, 0), its attn_q weight its column sum of softmax(S, 1).
    """
    masks = masks.float()
    weights_k, weights_q = torch.empty_like(masks), torch.empty_like(masks)
    for b in range(len(masks)):  # one [token, token] matrix at a time
        m = masks[b]
        # P lies in [0, 1], so its exponential needs no maximum subtracted. Columns of padding
        # never meet a weight: m is 0 there.
        e = attention(query[b], key[b], m.any(0), scaling).exp_()
        rows, columns = e @ m.T, m @ e
        weights_k[b] = m * ((m / columns.clamp(min=1e-9)) @ e.T)
        weights_q[b] = m * ((m / rows.T.clamp(min=1e-9)) @ e)
    return weights_k, weights_q


def attention(
    query: torch.Tensor, key: torch.Tensor, real: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Attention of one prompt averaged over heads, no causal mask, [token, token] float32.

    Computed in chunks of queries, so that no [head, token, token] tensor exists.
    query [head, token, dim], key [kv head, token, dim], real bool [token].
    """
    heads, n, dim = query.shape
    groups = heads // key.shape[0]
    keys = key.float().transpose(-1, -2).contiguous()
    scale = dim**-0.5 if scaling is None else scaling
    query = query.view(-1, groups, n, dim)
    p = torch.empty(n, n, device=query.device)
    chunk = min(n, max(1, (_GPU_BLOCK if query.is_cuda else 2 * _BLOCK) // (heads * n)))
    # On CPUs, memory that is used again costs half as much as fresh memory.
    scratch = p.new_empty(2, heads * chunk * n)
    padded = query.is_cuda or not real.all()  # asking a GPU would wait for it
    for i in range(0, n, chunk):
        q = query[:, :, i : i + chunk].float().reshape(key.shape[0], -1, dim) * scale
        logits, shares = scratch[:, : q[..., 0].numel() * n].view(2, *q.shape[:2], n)
        torch.bmm(q, keys, out=logits)
        if padded:
            logits.masked_fill_(~real, float("-inf"))
        torch.softmax(logits, -1, out=shares)
        torch.mean(shares.view(heads, -1, n), 0, out=p[i : i + chunk])
    return p


def runs(masks: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Runs of neighbouring tokens of one base set: (batch row, base set, start, stop)."""
    base = masks[:, _BASE].int()
    kind = torch.where(base.any(1), base.argmax(1), -1).tolist()  # one transfer per batch
    found = []
    for b, row in enumerate(kind):
        start = 0
        for k, run in groupby(row):
            stop = start + len(list(run))
            if k >= 0:
                found.append((b, k, start, stop))
            start = stop
    return found


def metrics(x, weights_k, weights_q, masks, runs_, minimum=None) -> torch.Tensor:
    """The five metrics before normalisation, [batch, metric, set, neuron] float32.

    x [batch, token, neuron]; minimum, a 0-dim tensor, is lowered in place to the smallest
    activation seen.
    """
    batch, n, neurons = x.shape
    base = masks[:, _BASE].float()
    weights = torch.cat([base, weights_k, weights_q], 1)
    sums = x.new_zeros(batch, weights.shape[1], neurons, dtype=torch.float32)
    positive = torch.zeros(batch, len(_BASE), neurons, device=x.device)
    block = max(1, (_GPU_BLOCK if x.is_cuda else _BLOCK) // neurons)
    scratch = torch.empty(min(block, n), neurons, device=x.device)
    for b, i in product(range(batch), range(0, n, block)):
        part = x[b, i : i + block].float()
        sums[b].addmm_(weights[b, :, i : i + block], part)
        above = torch.gt(part, 0, out=scratch[: len(part)])
        positive[b].addmm_(base[b, :, i : i + block], above)

    highest = torch.full_like(positive, float("-inf"))
    for b, k, start, stop in runs_:
        run = x[b, start:stop]
        torch.maximum(highest[b, k], run.amax(0), out=highest[b, k])
        if minimum is not None:
            torch.minimum(minimum, run.min(), out=minimum)

    mean = _with_unions(sums[:, : len(_BASE)], torch.sum)
    prob = _with_unions(positive, torch.sum)
    count = masks.sum(-1, keepdim=True)
    highest = _with_unions(highest, torch.amax).masked_fill_(count == 0, 0)
    attn_k, attn_q = sums[:, len(_BASE) :].chunk(2, 1)
    count = count.clamp(min=1)
    return torch.stack([prob / count, mean / count, highest, attn_k, attn_q], 1)


def _with_unions(base: torch.Tensor, combine: Callable) -> torch.Tensor:
    """[batch, base set, neuron] -> [batch, set, neuron]: unions combined from their parts."""
    parts = {name: base[:, i] for i, name in enumerate(BASE_SETS)}
    for union, names in _UNIONS.items():
        parts[union] = combine(torch.stack([parts[n] for n in names], 1), 1)
    return torch.stack([parts[name] for name in SETS], 1)


def normalise(values: torch.Tensor) -> torch.Tensor:
    """Min-max over the neurons (last axis) to [0, 1]; a constant vector gives 0."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    return (values - low) / torch.where(high > low, high - low, 1)


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
    runs_ = runs(masks)
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
        raw = metrics(x, *weights.pop(layer), masks_on(x.device), runs_, sums.minimum[layer])
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
