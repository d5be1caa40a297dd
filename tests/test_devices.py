"""Wherever a model's parts lie the numbers are the same, and no hook waits for an accelerator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Rows, random_neurons

import minerlib as ml
from minerlib import scoring
from minerlib.model import MLLM
from minerlib.separation import SETS

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
PLACES = [
    ("cpu", "disk"),
    pytest.param(("cuda", "cuda"), marks=cuda),
    pytest.param(("cpu", "cuda"), marks=cuda),  # weights wait on the processor
    pytest.param(("cuda", "disk"), marks=cuda),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=PLACES, ids="-".join)
def other(request, mllm, tmp_path) -> MLLM:
    """The same model, loaded with one half of the decoder's layers here and the other there."""
    mllm.model.save_pretrained(tmp_path / "model")
    mllm.processor.save_pretrained(tmp_path / "model")
    lower, upper = (0 if place == "cuda" else place for place in request.param)
    places = {}
    for name, module in mllm.model.named_modules():
        if name.endswith(tuple(f".layers.{i}" for i in range(mllm.n_layers // 2, mllm.n_layers))):
            places[name] = upper if "language_model" in name else lower
        elif not any(name.startswith(f"{n}.") for n in places) and not [*module.children()]:
            places[name] = lower
    return ml.load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")


def test_scores_are_the_same(mllm, other, samples):
    there = ml.score(other, Rows(samples), batch_size=2)
    here = ml.score(mllm, Rows(samples), batch_size=2)
    np.testing.assert_allclose(there.values, here.values, atol=2e-4)
    np.testing.assert_allclose(there.activation_mean, here.activation_mean, atol=1e-5)


def test_answers_and_probabilities_are_the_same_when_silenced(mllm, other, samples):
    neurons, found = random_neurons(mllm), []
    for one in (mllm, other):
        batch = one.encode(samples)
        with ml.deactivate(one, neurons):
            found.append((one.logprob(batch, ["yes"] * len(samples)), one.generate(batch, 4)))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    assert found[0][1] == found[1][1]


@cuda
def test_no_measure_waits_for_the_device():
    """Whatever a hook asks of the device would stop all layers behind it."""
    g = torch.Generator("cuda").manual_seed(0)
    x, q, k = (torch.randn(size, device="cuda", generator=g)
               for size in ((2, 40, 64), (2, 4, 40, 8), (2, 2, 40, 8)))  # fmt: skip
    masks = torch.zeros(2, len(SETS), 40, dtype=torch.bool, device="cuda")
    masks[:, [SETS.index("text"), SETS.index("prompt")], 5:] = True
    kinds = scoring.layout(masks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = scoring.attention_weights(q, k, masks, None)
        scoring.normalise(scoring.metrics(x, *weights, masks, kinds))
    finally:
        torch.cuda.set_sync_debug_mode("default")
