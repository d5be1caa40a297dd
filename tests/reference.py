"""The oracle of stage 2: METHOD's formulas in float64, one sample and one set after another.

Slow on purpose, and without minerlib's identities: every set gets its own copy of the tokens, and
the attention-weighted metrics are written as products of [token, token] with [token, neuron].
"""

from __future__ import annotations

import numpy as np


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(values - values.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def attention(query: np.ndarray, key: np.ndarray, scaling: float | None = None) -> np.ndarray:
    """Head-averaged attention of [head, token, dim], no causal mask; heads share keys in groups."""
    heads, _, dim = query.shape
    scale = 1 / np.sqrt(dim) if scaling is None else scaling
    group = heads // len(key)
    per_head = [softmax(query[h] @ key[h // group].T * scale, axis=1) for h in range(heads)]
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


def importance(activations, query, key, masks, scaling=None) -> np.ndarray:
    """As `minerlib.scoring.importance`, on arrays: [batch, metric, set, neuron] float64."""
    batch, sets, _ = masks.shape
    result = np.zeros((batch, 5, sets, activations.shape[-1]))
    for b in range(batch):
        real = np.flatnonzero(masks[b].any(0))
        x = activations[b, real].astype(np.float64)
        p = attention(
            query[b][:, real].astype(np.float64), key[b][:, real].astype(np.float64), scaling
        )
        for m in range(sets):
            rows = np.flatnonzero(masks[b, m, real])
            if len(rows):
                result[b, :, m] = min_max(five_metrics(x[rows], p[np.ix_(rows, rows)]))
    return result
