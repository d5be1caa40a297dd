"""Statistics of neurons' values by hand, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Rows

from minerlib.activity import STATISTICS, UNITS, activity, means, sampled
from minerlib.separation import SETS, separate


def by_hand(mllm, samples) -> tuple[np.ndarray, np.ndarray]:
    """From the values of each token, [unit, statistic, set, layer, neuron], and tokens [set]."""
    seen = {(unit, layer, s): [] for unit in UNITS for layer in range(mllm.n_layers) for s in SETS}
    counts = dict.fromkeys(SETS, 0)
    for sample in samples:
        batch = mllm.encode([sample])
        sets = separate(mllm, batch)
        for name, mask in sets.items():
            counts[name] += int(mask.sum())

        def keep(layer, x, unit, sets=sets):
            for name, mask in sets.items():
                seen[unit, layer, name].append(x[mask].double())

        with (
            torch.inference_mode(),
            mllm.tap(
                activation=lambda i, x, keep=keep: keep(i, x, "activation"),
                written=lambda i, x, keep=keep: keep(i, x, "written"),
            ),
        ):
            mllm.forward(batch)
    out = np.zeros((len(UNITS), len(STATISTICS), len(SETS), mllm.n_layers, mllm.n_neurons))
    for (unit, layer, name), parts in seen.items():
        if len(x := torch.cat(parts)):
            of = (x > 0).sum(0), x.sum(0), x.abs().sum(0), (x**2).sum(0), x.amax(0), x.abs().amax(0)
            out[UNITS.index(unit), :, SETS.index(name), layer] = np.stack([v.numpy() for v in of])
    return out, np.array([*counts.values()])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_statistic_by_hand(mllm, samples, batch_size):
    found = activity(mllm, [Rows(samples[:2]), Rows(samples[2:])], batch_size=batch_size)
    expected, tokens = by_hand(mllm, samples)
    assert found.dims == ("unit", "statistic", "modality", "layer", "neuron")
    assert found.modality.values.tolist() == list(SETS) and found.unit.values.tolist() == [*UNITS]
    assert found.tokens.values.tolist() == tokens.tolist() and (tokens == 0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    each = means(found)
    share = each.sel(statistic="positive", modality="text", unit="activation")
    assert 0 <= share.min() < share.max() <= 1
    np.testing.assert_allclose(
        each.sel(statistic="square"),
        expected[:, 3] / np.maximum(tokens, 1)[:, None, None],
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_array_equal(each.sel(statistic="highest"), found.sel(statistic="highest"))


def test_one_definition_alone(mllm, samples):
    whole, alone = activity(mllm, [samples]), activity(mllm, [samples], units=["written"])
    np.testing.assert_allclose(alone.sel(unit="written"), whole.sel(unit="written"), rtol=1e-6)
    assert alone.sizes["unit"] == 1


# --- sampled tokens ------------------------------------------------------------------------------


def tokens_of(mllm, samples) -> dict[str, np.ndarray]:
    """Every token's activations by kind, [token, layer, neuron]."""
    found = {kind: [] for kind in mllm.kinds}
    for sample in samples:
        batch, seen = mllm.encode([sample]), []
        with torch.inference_mode(), mllm.tap(activation=lambda i, x, s=seen: s.append(x[0])):
            mllm.forward(batch)
        for kind, mask in separate(mllm, batch).items():
            if kind in found:
                found[kind].append(torch.stack(seen, 1)[mask[0]].numpy())
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def test_sampled_tokens_are_tokens_of_their_kind(mllm, samples):
    whole = tokens_of(mllm, samples)
    found = sampled(mllm, [Rows(samples[:2]), Rows(samples[2:])], each=6, seed=3, batch_size=2)
    for kind, tokens in whole.items():
        own = found[found.kind == kind].values
        assert len(own) == min(6, len(tokens))
        away = np.abs(own[:, None] - tokens[None]).max((-1, -2))
        assert (away.min(1) < 1e-4).all()
        if kind not in ("text", "special"):  # prompts begin alike
            assert len(set(away.argmin(1))) == len(own)


def test_the_sample_does_not_hang_on_batches(mllm, samples):
    one = sampled(mllm, [Rows(samples)], each=4, batch_size=1)
    np.testing.assert_allclose(one, sampled(mllm, [Rows(samples)], each=4), atol=1e-4)
    assert np.abs(one - sampled(mllm, [Rows(samples)], each=4, seed=1)).max() > 1e-3


def test_every_token_is_drawn_as_often(mllm, samples):
    tokens = tokens_of(mllm, samples[:1])["text"]
    drawn = np.zeros(len(tokens))
    for seed in range(60):
        own = sampled(mllm, [Rows(samples[:1])], each=2, seed=seed)
        own = own[own.kind == "text"].values
        np.add.at(drawn, np.abs(own[:, None] - tokens[None]).max((-1, -2)).argmin(1), 1)
    assert drawn.sum() == 120 and drawn.max() < 120 / len(tokens) * 3
