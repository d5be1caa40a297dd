"""Untrained controls: of the model's own precision, learnt or not."""

import pandas as pd
import torch
from conftest import random_mllm

from minerlib import planted
from minerlib.controls import permuted, untrained


def test_a_control_keeps_the_precision_of_every_tensor():
    """In 16 bits rotary frequencies, which no checkpoint holds, are still of 32."""
    mllm = random_mllm("tiny-qwen2-vl", dtype=torch.bfloat16)
    mllm.model.model.language_model.rotary_emb.inv_freq = (
        mllm.model.model.language_model.rotary_emb.inv_freq.float() / 3
    )
    theirs = dict(mllm.model.named_buffers())
    for made in (untrained(mllm, 0), permuted(mllm, 0)):
        assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
        for name, buffer in made.model.named_buffers():
            assert buffer.dtype == theirs[name].dtype, name
        frequencies = made.model.model.language_model.rotary_emb.inv_freq
        assert not torch.equal(frequencies, frequencies.bfloat16().float())


def test_a_control_of_a_model_of_the_hub_is_another_model():
    """Whose commit says nothing of it: else it would find the trained model's numbers."""
    mllm = random_mllm("tiny-qwen2-vl")
    mllm.model.config._commit_hash = "0123abc"
    made = [untrained(mllm, 0), untrained(mllm, 1), permuted(mllm, 0)]
    where = pd.DataFrame({"modality": ["text"], "role": ["needed"], "layer": [0], "neuron": [3]})
    made.append(planted.plant(mllm, where, [1.0], 3.0, seed=0))
    found = {str(sorted(of.fingerprint.items())) for of in (mllm, *made)}
    assert len(found) == 5 and mllm.fingerprint["commit"] == "0123abc"


def test_permuted_weights_are_the_same_numbers():
    mllm = random_mllm("tiny-qwen2-vl")
    made = permuted(mllm, 0)
    weight, other = (m.layers[1].mlp.up_proj.weight for m in (mllm, made))
    assert not torch.equal(weight, other)
    assert torch.equal(weight.flatten().sort()[0], other.flatten().sort()[0])
    tower = mllm.model.model.visual.state_dict()
    assert all(torch.equal(w, tower[n]) for n, w in made.model.model.visual.state_dict().items())
