"""The oracle of stage 2: METHOD's formulas in float64, one sample and one set after another.

Slow on purpose, and without minerlib's identities: every set gets its own copy of the tokens, and
the attention-weighted metrics are written as products of [token, token] with [token, neuron]. The
second half does the same in float32 through a model, for `make bench` to time.
"""

from __future__ import annotations

import numpy as np
import torch

from minerlib.separation import separate, stack


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(values - values.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def attention(
    query: np.ndarray, key: np.ndarray, scaling: float | None = None, causal: bool = False
) -> np.ndarray:
    """Head-averaged attention of [head, token, dim], no causal mask; heads share keys in groups."""
    heads, _, dim = query.shape
    scale = 1 / np.sqrt(dim) if scaling is None else scaling
    group = heads // len(key)
    later = np.triu(np.full((query.shape[1],) * 2, -np.inf), 1) if causal else 0
    per_head = [softmax(query[h] @ key[h // group].T * scale + later, axis=1) for h in range(heads)]
    return np.mean(per_head, axis=0)


def five_metrics(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """prob, mean, max, attn_k, attn_q of a set's activations [n, neuron], attention [n, n]."""
    by_key, by_query = softmax(s, axis=0), softmax(s, axis=1)
    return np.stack(
        [
            np.mean(x > 0, axis=0),
            np.mean(x, axis=0),
            np.max(x, axis=0),
            np.sum(by_key.T @ x, axis=0),
            np.sum(by_query @ x, axis=0),
        ]
    )


def min_max(values: np.ndarray) -> np.ndarray:
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    return (values - low) / np.where(high > low, high - low, 1)


def importance(activations, query, key, masks, scaling=None, causal=False) -> np.ndarray:
    """As `minerlib.scoring.importance`, on arrays: [batch, metric, set, neuron] float64."""
    batch, sets, _ = masks.shape
    result = np.zeros((batch, 5, sets, activations.shape[-1]))
    for b in range(batch):
        real = np.flatnonzero(masks[b].any(0))
        x = activations[b, real].astype(np.float64)
        qk = query[b][:, real].astype(np.float64), key[b][:, real].astype(np.float64)
        p = attention(*qk, scaling, causal)
        for m in range(sets):
            rows = np.flatnonzero(masks[b, m, real])
            if len(rows):
                result[b, :, m] = min_max(five_metrics(x[rows], p[np.ix_(rows, rows)]))
    return result


# --- the plain way, to be timed against ----------------------------------------------------------


def plain_importance(x, query, key, masks, scaling=None) -> torch.Tensor:
    """One prompt's scores as the formulas read, in float32: [metric, set, neuron].

    x [token, neuron], query and key [head, token, dim], masks bool [set, token].
    """
    key = key.repeat_interleave(len(query) // len(key), 0)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    p = (query.float() @ key.float().transpose(-1, -2) * scale).softmax(-1).mean(0)
    found = torch.zeros(5, len(masks), x.shape[-1])
    for m, mask in enumerate(masks):
        if not mask.any():
            continue
        own, s = x[mask].float(), p[mask][:, mask]
        values = torch.stack(
            [
                (own > 0).float().mean(0),
                own.mean(0),
                own.amax(0),
                (s.softmax(0).T @ own).sum(0),
                (s.softmax(1) @ own).sum(0),
            ]
        )
        low, high = values.aminmax(dim=-1, keepdim=True)
        found[:, m] = (values - low) / torch.where(high > low, high - low, 1)
    return found


@torch.inference_mode()
def plain_score(mllm, rows, file, new_tokens: int = 128) -> torch.Tensor:
    """Mean scores [metric, set, layer, neuron] of rows that hold the same sets, mined plainly.

    One row at a time: the prompt is answered with `new_tokens` tokens, every layer's activations,
    queries and keys of the prompt are kept until then, and the sums are rewritten to disk after
    every row. That is how the published code spends its time and memory.
    """
    total = 0
    for row in rows:
        batch, x, qk = mllm.encode([row]), {}, {}
        masks = stack(separate(mllm, batch))[0]

        def activate(layer, out, x=x):
            if layer not in x:  # the prompt comes first, then one token after another
                x[layer] = out[0].clone()

        def attend(layer, query, key, mask, scaling, qk=qk, masks=masks):
            if layer not in qk:
                qk[layer] = query[0].clone(), key[0].clone(), masks, scaling

        with mllm.tap(activation=activate, attention=attend):
            mllm.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=mllm.tokenizer.pad_token_id,
            )
        layers = [plain_importance(x[i], *qk[i]) for i in range(mllm.n_layers)]
        total = total + torch.stack(layers, 2)
        torch.save(total, file)
    return total / len(rows)
