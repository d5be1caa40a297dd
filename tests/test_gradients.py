"""Gradients at activations beside captum's, and what integrated gradients must add up to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerGradientXActivation
from conftest import Rows, samples_for

from minerlib.answering import logprobs
from minerlib.critical import attribution
from minerlib.deactivation import deactivate
from minerlib.gradients import ALPHAS, gradients, slopes
from minerlib.separation import separate


@pytest.fixture
def asked(exact_mllm):
    """One prompt with a medium, its batch and its reference."""
    seen = [s for s in samples_for(exact_mllm) if s.image is not None or s.audio is not None]
    sample = replace(seen[0], references=(answer := "a dog runs",))  # of several tokens
    return sample, exact_mllm.encode([sample]), [answer]


def by_set(mllm, batch, values: torch.Tensor) -> torch.Tensor:
    """Values [token, ...] summed over the prompt tokens of each set, [set, ...]."""
    masks = separate(mllm, batch).values()
    return torch.stack([values[: mask.shape[1]][mask[0]].sum(0) for mask in masks])


def test_attribution_and_can_are_what_captum_gives(exact_mllm, asked):
    sample, batch, answers = asked
    found = gradients(exact_mllm, [Rows([sample])], steps=1)

    def told(ids):
        return logprobs(exact_mllm, batch, answers)

    exact_mllm.model.requires_grad_(True)  # captum follows weights
    try:
        for layer, module in enumerate(exact_mllm.activations):
            own = LayerGradientXActivation(told, module).attribute(batch["input_ids"])[0].detach()
            a = LayerActivation(told, module).attribute(batch["input_ids"])[0].detach()
            here = found.sel(layer=layer)
            expected = by_set(exact_mllm, batch, own.abs())
            np.testing.assert_allclose(here.sel(by="attribution"), expected, rtol=1e-3, atol=1e-9)
            for alpha in ALPHAS:
                size = a.abs() * (own / a).nan_to_num(0).abs() ** alpha
                expected = by_set(exact_mllm, batch, size)
                np.testing.assert_allclose(here.sel(by=f"can {alpha:g}"), expected, rtol=1e-3)
    finally:
        exact_mllm.model.requires_grad_(False)


def test_integrated_gradients_are_captums(exact_mllm, asked):
    """Of a gate at every token of every neuron, from 0 to 1, all at once."""
    sample, batch, answers = asked
    shapes = [x.shape[1:] for x in slopes(exact_mllm, batch, answers)[0]]

    def told(gates):  # [step, layer, token, neuron]
        out = []
        for gate in gates:
            with exact_mllm.tap(activation=lambda i, x, gate=gate: x * gate[i]):
                out.append(logprobs(exact_mllm, batch, answers))
        return torch.cat(out)

    whole = torch.ones(1, len(shapes), *shapes[0], dtype=exact_mllm.model.dtype)
    how = {"n_steps": 4, "method": "riemann_middle", "internal_batch_size": 1}
    own = IntegratedGradients(told).attribute(whole, **how)[0]
    found = gradients(exact_mllm, [Rows([sample])], steps=4).sel(by="integrated")
    for layer, values in enumerate(own):
        expected = by_set(exact_mllm, batch, values)
        np.testing.assert_allclose(found.sel(layer=layer), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_integrated_gradients_add_up_to_what_silencing_all_costs(exact_mllm, asked):
    _, batch, answers = asked
    with torch.inference_mode():
        as_it_is = logprobs(exact_mllm, batch, answers)
        everything = np.ones((1, exact_mllm.n_layers, exact_mllm.n_neurons), bool)
        with deactivate(exact_mllm, everything):
            silenced = logprobs(exact_mllm, batch, answers)
    total, steps = 0.0, 16
    for step in range(steps):
        path = slopes(exact_mllm, batch, answers, (step + 0.5) / steps)
        total += sum(float((a * g).sum()) for a, g in zip(*path, strict=True)) / steps
    assert total == pytest.approx(float(as_it_is - silenced), rel=1e-2)


def test_the_mean_over_rows_whatever_the_batches(exact_mllm):
    samples = samples_for(exact_mllm)[:3]
    whole = gradients(exact_mllm, [Rows(samples[:1]), Rows(samples[1:])], steps=2, batch_size=2)
    each = [gradients(exact_mllm, [Rows([s])], steps=2) for s in samples]
    np.testing.assert_allclose(whole, sum(each) / 3, rtol=1e-3, atol=1e-6)


def test_all_tokens_are_the_prompts_and_the_answers(exact_mllm, asked):
    """`critical.attribution` counts the answer's own tokens too."""
    sample, batch, answers = asked
    prompt = gradients(exact_mllm, [Rows([sample])], steps=1).sel(by="attribution")
    whole = attribution(exact_mllm, [Rows([sample])])
    a, g = slopes(exact_mllm, batch, answers)
    length = batch["input_ids"].shape[1]
    rest = torch.stack([(x * y).abs()[:, length:].sum((0, 1)) for x, y in zip(a, g, strict=True)])
    assert (rest > 0).any()
    np.testing.assert_allclose(whole, prompt.sel(modality="prompt") + rest.numpy(), rtol=1e-3)
