"""Planted neurons: a ground truth for methods that look for modality-specific neurons.

In a copy of a model a direction is added to the residual stream at the tokens of one modality, and
a planted neuron that fires at these tokens alone takes it away. So the neuron is modality-specific
and needed by construction, and the intact model computes what it did before. How *loud* it is, its
activation s, is free: its column of the down projection holds the direction over s. Decoys fire as
loudly and do nothing (`idle`), or are needed at every token (`everywhere`).
"""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
import xarray as xr
from sklearn.metrics import roc_auc_score

from minerlib.model import MLLM
from minerlib.separation import separate

ROLES = ("needed", "idle", "everywhere")


def sites(
    written: xr.DataArray, modalities: Iterable[str], layers: Sequence[int], each: int, seed: int
) -> pd.DataFrame:
    """Where neurons are planted: columns modality, role, layer, neuron.

    `each` of every role for each modality, in these layers by turns, in the place of the neurons
    that write least (of `loudness`); who goes where is drawn.
    """
    rows = [(m, role) for m in modalities for role in ROLES for _ in range(each)]
    place = np.resize(list(layers), len(rows))
    quiet = written.sel(statistic="max", modality="prompt").values.argsort(-1)
    table = pd.DataFrame(rows, columns=["modality", "role"])
    table = table.iloc[np.random.default_rng(seed).permutation(len(rows))].assign(layer=place)
    order = table.groupby("layer").cumcount()
    return table.assign(neuron=quiet[place, order]).reset_index(drop=True)


def plant(
    mllm: MLLM, sites: pd.DataFrame, loud: Sequence[float], strength: float, seed: int
) -> MLLM:
    """A copy of the model with neurons planted at the sites, of activation `loud` each.

    strength is the length of the added direction over that of the hidden state that it is added to.
    Tokens that are generated count as what they are: text or special.
    """
    model = copy.deepcopy(mllm.model)
    other = MLLM(model, mllm.processor, f"{mllm.name}, planted", mllm.settings)
    kinds: dict[str, torch.Tensor] = {}

    def see(module, args, kwargs):
        ids = kwargs["input_ids"]
        kinds.update(separate(other, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))

    model.register_forward_pre_hook(see, with_kwargs=True)
    rng = torch.Generator().manual_seed(seed)
    for layer, of in sites.assign(loud=loud).groupby("layer"):
        down = other.family.down_projection(other.layers[layer])
        size, device = down.weight.shape[0], down.weight.device
        exact = torch.promote_types(down.weight.dtype, torch.float32)
        way = torch.randn(len(of), size, generator=rng).to(device, exact)
        way *= strength / way.norm(dim=1, keepdim=True)
        way[torch.tensor((of["role"] == "idle").to_numpy(), device=device)] = 0
        _plant_layer(other, int(layer), of, way, kinds)
    return other


def _plant_layer(mllm: MLLM, layer: int, of: pd.DataFrame, way: torch.Tensor, kinds: dict) -> None:
    """Hooks that fire the planted neurons, let them write alone, and add what they take away."""
    block = mllm.layers[layer]
    mlp, act = mllm.family.mlp(block), mllm.activations[layer]
    down, up = mlp.down_proj, mlp.up_proj
    index = torch.tensor(of["neuron"].to_numpy(), device=way.device)
    s = torch.tensor(of["loud"].to_numpy(), device=way.device, dtype=way.dtype)
    sets = [
        "prompt" if r == "everywhere" else m
        for m, r in zip(of["modality"], of["role"], strict=True)
    ]
    length: dict[str, torch.Tensor] = {}

    def fires() -> torch.Tensor:  # bool [batch, token, planted]
        return torch.stack([kinds[name] for name in sets], -1).to(way.device)

    def enter(module, args):
        length["of"] = args[0].to(way).norm(dim=-1, keepdim=True)

    def fire(module, args, out):
        out = out.clone()
        out[..., index] = (fires() * s).to(out)
        return out

    def alone(module, args, out):
        out = out.clone()
        out[..., index] = length["of"].to(out)  # they write in proportion to what they write on
        return out

    def add(module, args, out):
        return out + (length["of"] * (fires().to(way) @ way)).to(out)

    with torch.no_grad():
        down.weight[:, index] = -(way / s[:, None]).T.to(down.weight)
    mlp.register_forward_pre_hook(enter)
    act.register_forward_hook(fire)
    up.register_forward_hook(alone)
    mlp.register_forward_hook(add)


def mask(sites: pd.DataFrame, shape: tuple[int, int]) -> np.ndarray:
    """The sites as bool [layer, neuron]."""
    found = np.zeros(shape, bool)
    found[sites["layer"], sites["neuron"]] = True
    return found


def found(scores: np.ndarray, sites: pd.DataFrame, modality: str) -> dict[str, float]:
    """How well scores [layer, neuron] of a modality find what is needed for it.

    recall: share of the needed neurons among as many of highest score; auc: how often one scores
    higher than a neuron that is not needed there; percentile: their mean rank, 1 the highest.
    """
    own = sites[(sites["modality"] == modality) & (sites["role"] == "needed")]
    needed = mask(own, scores.shape).ravel()
    order = np.argsort(-scores, axis=None, kind="stable")
    rank = np.empty(needed.size)
    rank[order] = np.arange(needed.size)
    return {
        "recall": float(needed[order[: needed.sum()]].mean()),
        "auc": float(roc_auc_score(needed, scores.ravel())),
        "percentile": float(1 - rank[needed].mean() / needed.size),
    }
