"""Untrained controls: what a measure shows where nothing was learnt (arXiv 2512.18792).

Five random initialisations of the model's class, and its trained decoder with the numbers of every
weight in another order: as large as before, but saying nothing.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain

import torch

from minerlib.artifacts import computation
from minerlib.model import MLLM


def _drawn(mllm: MLLM) -> torch.nn.Module:
    """Of the same class, each tensor of the model's own precision: positions are not rounded."""
    config = copy.deepcopy(mllm.model.config)
    config._commit_hash = None  # it is no longer what the hub has
    model = type(mllm.model)(config).to(mllm.device)
    tensors = [dict(chain(m.named_parameters(), m.named_buffers())) for m in (model, mllm.model)]
    for name, tensor in tensors[0].items():
        tensor.data = tensor.data.to(tensors[1][name].dtype)
    return model


@computation(version=1)
def untrained(mllm: MLLM, seed: int) -> MLLM:
    """A model of the same class and configuration, drawn as transformers initialises it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _drawn(mllm)
    return MLLM(model, mllm.processor, f"{mllm.name}, untrained {seed}", mllm.settings)


@computation(version=1)
def permuted(mllm: MLLM, seed: int) -> MLLM:
    """The model with every weight of its decoder layers permuted within itself; the rest copied."""
    model = _drawn(mllm)
    model.load_state_dict(mllm.model.state_dict())
    other = MLLM(model, mllm.processor, f"{mllm.name}, permuted {seed}", mllm.settings)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in other.layers:
            for weight in layer.parameters():
                order = torch.randperm(weight.numel(), generator=draws).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return other


CONTROLS: dict[str, Callable[[MLLM], MLLM]] = {
    **{f"untrained {seed}": partial(untrained, seed=seed) for seed in range(5)},
    "permuted": partial(permuted, seed=0),
}
"""How each control is made of a model."""
