"""The Triton kernels give what plain torch gives; without an accelerator, in its interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from minerlib import scoring
from minerlib.separation import SETS

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch, heads, kv_heads, n, dim, neurons, dtype):
    torch.manual_seed(0)
    query = torch.randn(batch, n, heads, dim).transpose(1, 2).to(dtype)
    key = torch.randn(batch, n, kv_heads, dim).transpose(1, 2).to(dtype)
    real = torch.arange(n) >= torch.tensor([[n - 4], [1]])[:batch]  # one prompt is nearly padding
    x = torch.randn(batch, n, neurons).to(dtype)
    return [tensor.to(DEVICE) for tensor in (query, key, real, x)]


# The interpreter cannot multiply in bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
SHAPES = [(2, 4, 2, 70, 24, 100), (1, 6, 3, 130, 16, 65), (2, 2, 2, 5, 8, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_the_mean_over_heads(shape, dtype):
    from minerlib import kernels

    query, key, real, _ = inputs(*shape, dtype)
    expected = scoring.attention(query.cpu(), key.cpu(), real.cpu(), 0.3)
    found = kernels.attention(query, key, real, 0.3).cpu()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_over_the_tokens_makes_all_sums(shape, dtype):
    from minerlib import kernels

    *_, x = inputs(*shape, dtype)
    batch, n, _ = x.shape
    weights = torch.rand(batch, 21, n, device=DEVICE)
    members = torch.rand(batch, 7, n, device=DEVICE) > 0.5
    kinds = torch.randint(-1, 4, (batch, n), device=DEVICE)  # nothing is of the fifth kind
    sums, positive, highest = kernels.over_tokens(x, weights, members, kinds, 5)
    torch.testing.assert_close(sums, weights @ x.float(), atol=5e-5, rtol=0)
    assert positive.equal(members.float() @ (x > 0).float())
    for kind in range(5):
        of = torch.where((kinds == kind)[..., None], x.float(), -math.inf).amax(1)
        assert highest[:, kind].equal(of)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the kernels are what runs")
def test_stage_2_is_the_same_with_them(monkeypatch):
    query, key, real, x = inputs(2, 4, 2, 40, 16, 30, torch.float32)
    masks = torch.zeros(2, len(SETS), 40, dtype=torch.bool)
    parts = {"special": slice(0, 9), "image": slice(9, 30), "text": slice(30, 40)}
    for name, part in parts.items():
        masks[:, SETS.index(name), part] = real[:, part]
    masks[:, SETS.index("special_text")] = masks[:, :2].any(1)
    masks[:, SETS.index("prompt")] = real
    plain = [scoring.importance(x, query, key, masks, scaling) for scaling in (None, 0.7)]
    monkeypatch.setattr(scoring, "fused", lambda x: True)
    for scaling, expected in zip((None, 0.7), plain, strict=True):
        found = scoring.importance(x, query, key, masks, scaling)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
