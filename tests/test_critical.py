"""Critical neurons: attribution by hand, and random neurons that cost as much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ROOT, Rows, random_neurons, samples_for

from minerlib import critical
from minerlib.deactivation import deactivate

TEXTS = (ROOT / "data/plain_text.txt").read_text().splitlines()


def test_attribution_is_what_a_small_step_of_each_activation_costs(exact_mllm):
    """Activation x gradient at one token: the slope of the log-probability in its scale."""
    sample = samples_for(exact_mllm)[0]
    bench = Rows([sample])
    found = critical.attribution(exact_mllm, [bench])
    assert found.shape == (exact_mllm.n_layers, exact_mllm.n_neurons) and found.dtype == np.float32
    layer, neuron = np.unravel_index(found.values.argmax(), found.shape)
    batch, lengths = exact_mllm.encode([sample]), set[int]()

    def logprob(token: int, factor: float) -> float:
        def scale(i, x):
            lengths.add(x.shape[1])
            x = x.clone()
            x[:, token, neuron] *= factor
            return x

        with exact_mllm.tap(activation=scale, layers=[int(layer)]):
            return exact_mllm.logprob(batch, [sample.reference])[0]

    logprob(0, 1.0)
    (length,), step = lengths, 0.03  # of the prompt and the reference
    slopes = [logprob(t, 1 + step) - logprob(t, 1 - step) for t in range(length)]
    expected = np.abs(slopes).sum() / (2 * step)  # of logits in 32 bits
    assert float(found[layer, neuron]) == pytest.approx(expected, rel=0.03)


def test_attribution_is_the_mean_over_rows_whatever_the_batches(exact_mllm):
    samples = samples_for(exact_mllm)[:3]
    whole = critical.attribution(exact_mllm, [Rows(samples)], batch_size=2)
    each = [critical.attribution(exact_mllm, [Rows([sample])]) for sample in samples]
    np.testing.assert_allclose(whole, sum(each) / 3, rtol=1e-3, atol=1e-7)
    several = critical.attribution(exact_mllm, [Rows(samples[:1]), Rows(samples[1:])])
    np.testing.assert_allclose(several, whole, rtol=1e-3, atol=1e-7)
    nobody = xr.zeros_like(whole, bool)
    first, second = critical.candidates(whole, 2, nobody)
    least = nobody.copy(data=whole.values == whole.values.min())
    given, best_of_others = critical.candidates(whole, 2, least)  # what is taken stands first
    assert (given[0] == least).all() and (best_of_others == first).all()
    assert first.dims == ("modality", "layer", "neuron") and first.sum() == second.sum() == 1
    (best,), (next_best,) = (whole.values[x.values[0]] for x in (first, second))
    assert best == whole.values.max() >= next_best
    both = critical.together([first, second])
    assert both.dims == first.dims and both.sum() == 2 and not (first & ~both).any()


def test_plain_text_by_hand(exact_mllm):
    texts = TEXTS[:3]
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([exact_mllm.tokenizer.encode(text)])
        with torch.inference_mode():
            told = exact_mllm.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total += float(told.gather(-1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    assert critical.plain(exact_mllm, texts, batch_size=2) == pytest.approx(
        total / tokens, rel=1e-6
    )
    with deactivate(exact_mllm, random_neurons(exact_mllm, 0.9)):
        assert critical.plain(exact_mllm, texts) != pytest.approx(total / tokens, rel=1e-4)


def test_as_many_random_neurons_as_cost_the_target():
    values = np.arange(200).reshape(4, 50) < 20
    outside = xr.DataArray(values, {"layer": range(4)}, ("layer", "neuron"))
    calls = []

    def cost(neurons):
        calls.append(int(neurons.sum()))
        assert not (neurons.values[0] & outside.values).any()
        return neurons.sum().item() / 100

    found = critical.as_damaging(cost, 0.9, outside, seed=0, start=8)
    assert abs(int(found.sum()) - 90) <= 4 and calls[:4] == [8, 16, 32, 64] and len(calls) < 9
    assert found.sizes == {"modality": 1, "layer": 4, "neuron": 50}
    exact = critical.as_damaging(cost, 0.37, outside, seed=0, start=8, tolerance=0)
    other = critical.as_damaging(cost, 0.37, outside, seed=1, start=8, tolerance=0)
    assert exact.sum() == other.sum() == 37 and not exact.equals(other)
    for size, n in [(0.45, 49), (0.55, 50)]:  # one neuron more is 0.4 more: the nearer side
        jump = critical.as_damaging(lambda x, n=n: 0.4 + 0.2 * (x.sum() > 49), size, outside, 0)
        assert abs(0.4 + 0.2 * (n > 49) - size) < 0.06 and (jump.sum() > 49) == (n > 49)


@pytest.mark.parametrize(
    ("cost", "target", "message"),
    [
        (lambda x: 0.01 * float(x.sum()), 3.0, "all 200 other neurons cost 2.000, less than 3.000"),
        (lambda x: float(x.sum() >= 50), 0.5, "neurons cost .*, the nearest to 0.500"),
        (lambda x: 1.0, 0.0, "the target is 0.000: there is no cost"),
        (lambda x: 1.0, -0.1, "the target is -0.100"),
        (lambda x: 1.0, float("nan"), "the target is nan"),
    ],
)
def test_what_random_neurons_cannot_cost_is_said(cost, target, message):
    nothing = xr.DataArray(np.zeros((4, 50), bool), {"layer": range(4)}, ("layer", "neuron"))
    with pytest.raises(ValueError, match=message):
        critical.as_damaging(cost, target, nothing, seed=0)


def test_plain_text_is_used_nowhere_else():
    assert len(set(TEXTS)) == len(TEXTS) == 48 and all(20 < len(text) < 120 for text in TEXTS)
