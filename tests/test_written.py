"""What neurons write, and random neurons that write as much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import Rows, footprints

from minerlib.separation import SETS, separate
from minerlib.written import (
    STATISTICS,
    all_as_loud,
    as_loud,
    balance,
    loudness,
    with_partner,
)


def test_of_activations_as_they_are_whatever_their_sign(mllm, samples):
    found = loudness(mllm, [Rows(samples)], what="activation").sel(modality="prompt")
    parts: list[list] = [[] for _ in range(mllm.n_layers)]
    for sample in samples:
        with mllm.tap(activation=lambda i, x: parts[i].append(x[0])), torch.inference_mode():
            mllm.forward(mllm.encode([sample]))
    values = np.stack([torch.cat(part).numpy() for part in parts])
    np.testing.assert_allclose(found.sel(statistic="mean"), values.mean(1), rtol=1e-3, atol=1e-5)
    highest = values.max(1).clip(0)
    np.testing.assert_allclose(found.sel(statistic="max"), highest, rtol=1e-4, atol=1e-5)
    assert (values.mean(1) < 0).any()


def test_loudness_by_hand(mllm, samples):
    """Against the down projection's inputs, token by token, one prompt at a time."""
    before = footprints(mllm)
    found = loudness(mllm, [Rows(samples[:3]), Rows(samples[3:])], batch_size=2)
    assert found.dims == ("statistic", "modality", "layer", "neuron")
    layer, seen, sets = 1, [], []
    down = mllm.family.down_projection(mllm.layers[layer])
    keep = down.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].float()))
    with torch.inference_mode():
        for sample in samples:
            batch = mllm.encode([sample])
            mllm.forward(batch)
            sets.append({k: v[0] for k, v in separate(mllm, batch).items()})
    keep.remove()
    norm = down.weight.float().norm(dim=0)
    for modality in SETS:
        of = [x[s[modality]] for x, s in zip(seen, sets, strict=True)]
        size = (torch.cat(of).abs() * norm).numpy()
        own = found.sel(modality=modality, layer=layer)
        mean, top = (size.mean(0), size.max(0)) if len(size) else (0, 0)
        np.testing.assert_allclose(own.sel(statistic="mean"), mean, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(own.sel(statistic="max"), top, rtol=1e-3, atol=1e-6)
    assert footprints(mllm) == before


def made(seed: int = 0, layers: int = 4, neurons: int = 200):
    """Loudness over five orders, and a selection of quiet and of the loudest neurons."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.standard_normal((len(STATISTICS), 2, layers, neurons)))
    coords = {"statistic": list(STATISTICS), "modality": ["text", "image"]}
    loud = xr.DataArray(values, coords, ("statistic", "modality", "layer", "neuron"))
    mask = np.zeros((2, layers, neurons), bool)
    mask[0, :, :8] = mask[1, :, 4:12] = True
    dims = ("modality", "layer", "neuron")
    return xr.DataArray(mask, {"modality": ["text", "image"], "layer": range(layers)}, dims), loud


def test_partners_are_of_the_layer_unselected_different_and_as_loud():
    neurons, loud = made()
    drawn, pairs = as_loud(neurons, loud, seed=3, caliper=0.3)
    union = neurons.any("modality").values
    there = pairs[pairs["partner"] >= 0]
    assert 0 < len(there) < len(pairs) == union.sum()
    assert not (drawn.values[0] & union).any()
    assert drawn.values[0].sum() == len(there) == len(there[["layer", "partner"]].drop_duplicates())
    assert drawn.values[0].sum(1).tolist() == there.groupby("layer").size().tolist()
    log = np.log(loud.values + 1e-9)
    space = (log - log.mean(-1, keepdims=True)) / log.std(-1, keepdims=True)
    for line in there.itertuples():
        modality = ["text", "image"].index(line.modality)
        assert neurons.values[modality, line.layer, line.neuron]
        assert modality == 0 or not neurons.values[0, line.layer, line.neuron]  # the first one
        a, b = (space[:, modality, line.layer, k] for k in (line.neuron, line.partner))
        assert (np.abs(a - b) <= 0.3).all()
    again, _ = as_loud(neurons, loud, seed=3, caliper=0.3)
    other, _ = as_loud(neurons, loud, seed=4, caliper=0.3)
    assert again.equals(drawn) and not other.equals(drawn)


def test_the_loudest_have_no_partner():
    neurons, loud = made()
    loud[:, :, :, 0] = 1e9
    _, pairs = as_loud(neurons, loud, seed=0)
    assert (pairs[pairs["neuron"] == 0]["partner"] == -1).all()
    alone = with_partner(neurons, pairs, there=False)
    paired = with_partner(neurons, pairs)
    assert alone.values[0, :, 0].all() and not (alone & paired).any()
    assert ((alone | paired) == neurons).all()


def test_balance():
    neurons, loud = made()
    _, pairs = as_loud(neurons, loud, seed=1, caliper=0.2)
    table = balance(pairs)
    assert table.loc["text", "neurons"] == 32 and table.loc["image", "neurons"] == 16
    there = pairs[pairs["partner"] >= 0]
    assert table["with partner"].sum() == len(there)
    text = there[there["modality"] == "text"]
    expected = (text["mean of selected"] - text["mean of drawn"]).mean()
    assert table.loc["text", "mean"] == pytest.approx(expected)
    assert table[list(STATISTICS)].abs().max().max() < 0.1


def test_partners_are_not_from_outside():
    neurons, loud = made()
    outside = neurons.copy(data=np.zeros(neurons.shape, bool))
    outside.values[0, :, 12:100] = True
    drawn, pairs = as_loud(neurons, loud, seed=3, outside=outside)
    assert (pairs["partner"] >= 0).any() and not (drawn.values[0] & outside.values[0]).any()


def test_draws_in_which_all_have_partners_are_those_of_the_first_seeds_that_give_such():
    neurons, loud = made(neurons=40)
    n = int(neurons.any("modality").sum())
    tried = [as_loud(neurons, loud, seed=i, caliper=1.2)[0] for i in range(2, 20)]
    whole = [draw for draw in tried if draw.sum() == n]
    assert 0 < len(whole) < len(tried)
    found = all_as_loud(neurons, loud, 2, seed=2, caliper=1.2)
    assert all(a.identical(b) for a, b in zip(found, whole[:2], strict=True))
    with pytest.raises(ValueError, match="n=1: of 1000 seeds 0 draw a partner for every neuron"):
        all_as_loud(neurons, loud, 1, caliper=0.05)
