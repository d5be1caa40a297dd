"""Stage 2's two sums on an accelerator, each in one pass, as Triton kernels.

In plain torch they are passes over [head, token, token] and over float32 copies of the activations,
which on an accelerator cost more than the model's own forward pass. `scoring` uses these where
Triton runs; what it computes without them is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
HALF: dict[str, int] = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}
SINGLE: dict[str, int] = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4}
TOKENS: dict[str, int] = {"TOKENS": 64, "NEURONS": 64, "num_warps": 4}


@triton.jit
def _tile(x, rows, n, dim, stride, D: tl.constexpr):
    """Rows of a matrix [n, dim], zeros beyond its ends."""
    d = tl.arange(0, D)
    inside = (rows[:, None] < n) & (d[None, :] < dim)
    return tl.load(x + rows[:, None] * stride + d[None, :], mask=inside, other=0)


@triton.jit
def _normalisers(
    query, key, real, out, heads, groups, n, dim, scale, qb, qh, qn, kb, kh, kn,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of some rows of one head: log2 of the sum over keys of 2 ** logit, [batch, head, token]."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = _tile(query + b * qb + h * qh, i, n, dim, qn, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k = _tile(key + b * kb + (h // groups) * kh, j, n, dim, kn, D)
        seen = tl.load(real + b * n + j, mask=j < n, other=0) != 0
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        at = tl.where(new == float("-inf"), 0.0, new)  # padding comes first
        total = total * tl.exp2(top - at) + tl.sum(tl.exp2(logits - at[:, None]), 1)
        top = new
    tl.store(out + (b * heads + h) * n + i, top + tl.log2(total), mask=i < n)


@triton.jit
def _mean_over_heads(
    query, key, real, normalisers, out, heads, groups, n, dim, scale, qb, qh, qn, kb, kh, kn,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the attention averaged over heads, [batch, query, key]."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = tl.load(real + b * n + j, mask=j < n, other=0) != 0
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for h in range(heads):
        q = _tile(query + b * qb + h * qh, i, n, dim, qn, D)
        k = _tile(key + b * kb + (h // groups) * kh, j, n, dim, kn, D)
        under = tl.load(normalisers + (b * heads + h) * n + i, mask=i < n, other=0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        total += tl.exp2(tl.where(seen[None, :], logits - under[:, None], float("-inf")))
    place = out + b * n * n + i[:, None].to(tl.int64) * n + j[None, :]
    tl.store(place, total / heads, mask=(i[:, None] < n) & (j[None, :] < n))


@triton.jit
def _over_tokens(
    x, weights, members, kinds, sums, positive, highest, n, neurons, xb, xn,
    W: tl.constexpr, WP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr, NEURONS: tl.constexpr,
):  # fmt: skip
    """Of some neurons of one prompt: weighted sums, counts above 0, highest by kind."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    w, s, k = tl.arange(0, WP), tl.arange(0, SP), tl.arange(0, KP)
    total = tl.zeros([WP, NEURONS], tl.float32)
    above = tl.zeros([SP, NEURONS], tl.float32)
    top = tl.full([KP, NEURONS], float("-inf"), tl.float32)
    for start in range(0, n, TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = (t[:, None] < n) & (c[None, :] < neurons)
        a = tl.load(x + b * xb + t[:, None].to(tl.int64) * xn + c[None, :], mask=inside, other=0)
        a = a.to(tl.float32)
        here = (w[:, None] < W) & (t[None, :] < n)
        weight = tl.load(weights + (b * W + w[:, None]) * n + t[None, :], mask=here, other=0)
        total += tl.dot(weight, a, input_precision="tf32x3")
        here = (s[:, None] < S) & (t[None, :] < n)
        member = tl.load(members + (b * S + s[:, None]) * n + t[None, :], mask=here, other=0)
        above += tl.dot(member.to(tl.float16), (a > 0).to(tl.float16))  # of 0 and 1: exact
        kind = tl.load(kinds + b * n + t, mask=t < n, other=-1)
        for one in tl.static_range(K):
            best = tl.max(tl.where(kind[:, None] == one, a, float("-inf")), 0)
            best = tl.where(k[:, None] == one, best[None, :], float("-inf"))
            top = tl.maximum(top, best)
    live = c[None, :] < neurons
    tl.store(
        sums + (b * W + w[:, None]) * neurons + c[None, :], total, mask=live & (w[:, None] < W)
    )
    place = (b * S + s[:, None]) * neurons + c[None, :]
    tl.store(positive + place, above, mask=live & (s[:, None] < S))
    place = (b * K + k[:, None]) * neurons + c[None, :]
    tl.store(highest + place, top, mask=live & (k[:, None] < K))


def attention(query: Tensor, key: Tensor, real: Tensor, scale: float) -> Tensor:
    """As `scoring.attention`, real bool [batch, token]."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    (batch, heads, n, dim), groups = query.shape, query.shape[1] // key.shape[1]
    real = real.to(torch.uint8).contiguous()
    under = torch.empty(batch, heads, n, device=query.device)
    out = torch.empty(batch, n, n, device=query.device)
    sizes = (heads, groups, n, dim, scale * LOG2E, *query.stride()[:3], *key.stride()[:3])
    # Of float32, larger tiles of a head of 128 would not fit in shared memory.
    how = dict(HALF if query.element_size() == 2 else SINGLE)
    how["D"] = max(16, triton.next_power_of_2(dim))
    rows = triton.cdiv(n, how["ROWS"])
    columns = triton.cdiv(n, how["COLUMNS"])
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _normalisers[rows, batch * heads](query, key, real, under, *sizes, **how)
        _mean_over_heads[rows, columns, batch](query, key, real, under, out, *sizes, **how)
    return out


def over_tokens(
    x: Tensor, weights: Tensor, members: Tensor, kinds: Tensor, n_kinds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens of x [batch, token, neuron], float32, in one pass.

    Weighted by weights float32 [batch, weight, token]; how many of members [batch, set, token] are
    above 0; the highest of each kind, int [batch, token], -inf where there is none.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, n, neurons), w, s = x.shape, weights.shape[1], members.shape[1]
    made = [torch.empty(batch, rows, neurons, device=x.device) for rows in (w, s, n_kinds)]
    how = {"W": w, "S": s, "K": n_kinds, **TOKENS}
    how |= {f"{k}P": max(16, triton.next_power_of_2(how[k])) for k in "WS"}
    how["KP"] = triton.next_power_of_2(n_kinds)
    given = (weights.contiguous(), members.to(torch.uint8).contiguous(), kinds.int().contiguous())
    grid = triton.cdiv(neurons, how["NEURONS"]), batch
    with torch.cuda.device_of(x):
        _over_tokens[grid](x, *given, *made, n, neurons, *x.stride()[:2], **how)
    return made[0], made[1], made[2]
