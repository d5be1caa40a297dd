"""Random models with sharp attention that transformers itself can return: a referee."""

from __future__ import annotations

import copy
from functools import cache

import torch
from conftest import random_mllm

from minerlib.model import MLLM


@cache
def eager(name: str) -> MLLM:
    mllm = random_mllm(name, seed=1, attn_implementation="eager")
    for layer in mllm.layers:
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.v_proj.weight.data *= 5
    return mllm


@cache
def sdpa(name: str) -> MLLM:
    """The same weights under the attention kernel that models load with."""
    mllm = random_mllm(name, seed=1)
    mllm.model.load_state_dict(eager(name).model.state_dict())
    return mllm


def uniform(name: str) -> MLLM:
    """A model whose queries are 0: every token attends uniformly over the tokens it sees."""
    mllm = MLLM(copy.deepcopy(sdpa(name).model), sdpa(name).processor, sdpa(name).name)
    for layer in mllm.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.q_proj.bias)
    return mllm


def attentions(mllm: MLLM, batch) -> list[torch.Tensor]:
    """Attention [batch, head, query, key] of each layer, as transformers computes it."""
    return mllm.model(**batch, use_cache=False, output_attentions=True).attentions
