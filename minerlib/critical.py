"""Critical neurons, the few without which nothing works, and random ones that do as much damage.

A handful of units can break any language model (arXiv 2512.00918, 2510.10238). If a selection holds
them, its damage says nothing of modalities: so they are looked for by themselves, taken out of the
selection, and the selection is set beside random neurons that cost as much on plain text.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch.nn.utils.rnn import pad_sequence

from minerlib.artifacts import computation
from minerlib.gradients import slopes
from minerlib.model import MLLM
from minerlib.selection import labelled


@computation(version=1)
def attribution(mllm: MLLM, benches: Iterable, *, batch_size: int = 8) -> xr.DataArray:
    """|activation x gradient| of every neuron, summed over the tokens: float32 [layer, neuron].

    Of the mean log-probability of each row's commonest reference; the mean over rows.
    """
    total = torch.zeros(mllm.n_layers, mllm.n_neurons, dtype=torch.float64)
    rows = 0
    for bench in benches:
        for first, batch in mllm.batches(bench, batch_size, "attribution"):
            answers = [bench[i].reference for i in range(first, first + len(batch["input_ids"]))]
            for layer, (a, g) in enumerate(zip(*slopes(mllm, batch, answers), strict=True)):
                total[layer] += (a * g).abs().sum((0, 1)).double().cpu()
            rows += len(answers)
    axes = {"layer": range(mllm.n_layers)}
    return xr.DataArray((total / rows).float().numpy(), axes, ("layer", "neuron"), "attribution")


def candidates(attributed: xr.DataArray, n: int, taken: xr.DataArray) -> list[xr.DataArray]:
    """n neurons, each by itself, bool [modality, layer, neuron]: those that are `taken`, bool
    [layer, neuron], and of the others those of greatest `attribution`."""
    value = np.where(taken.values, np.inf, attributed.values)
    order = np.argsort(-value, axis=None, kind="stable")[:n]
    return [as_neurons(attributed, [i]) for i in order]


def together(neurons: Iterable[xr.DataArray]) -> xr.DataArray:
    """Several sets of neurons as one."""
    first, *others = neurons
    values = np.any([first.values, *(x.values for x in others)], axis=0)
    return first.copy(data=values)


def as_neurons(like: xr.DataArray, index: ArrayLike) -> xr.DataArray:
    """Neurons of these flat indices of `like` [layer, neuron], as one modality."""
    chosen = np.zeros(like.size, bool)
    chosen[np.asarray(index, int)] = True
    return labelled(chosen.reshape(1, *like.shape), ["critical"], like.layer, {})


@computation(version=1)
@torch.inference_mode()
def plain(mllm: MLLM, texts: Sequence[str], batch_size: int = 16) -> float:
    """Mean log-probability of plain texts, in nats a token, read without a chat template."""
    total, tokens = 0.0, 0
    for first in range(0, len(texts), batch_size):
        part = [torch.tensor(mllm.tokenizer.encode(x)) for x in texts[first : first + batch_size]]
        real = pad_sequence([torch.ones_like(ids) for ids in part], batch_first=True)
        batch = {"input_ids": pad_sequence(part, batch_first=True), "attention_mask": real}
        batch = {name: x.to(mllm.model.device) for name, x in batch.items()}
        told = mllm.forward(batch, real.shape[1]).logits[:, :-1].float().log_softmax(-1).cpu()
        told = told.gather(-1, batch["input_ids"][:, 1:, None].cpu())[..., 0]
        total += float((told * real[:, 1:]).sum())
        tokens += int(real[:, 1:].sum())
    return total / tokens


@computation(version=1)
def as_damaging(
    cost: Callable[[xr.DataArray], float],
    target: float,
    outside: xr.DataArray,
    seed: int,
    start: int = 64,
    tolerance: float = 0.05,
) -> xr.DataArray:
    """Random neurons, grown until they cost as much as the target, within a share of it.

    In random order, from those that are not in `outside`, bool [layer, neuron]; their number is
    doubled from `start` on, then halved between. ValueError where nothing costs, all of them cost
    less, or one neuron more costs too much and one less too little, by more than a fifth.
    """
    if not target > 0:
        raise ValueError(
            f"the target is {target:.3f}: there is no cost that random neurons can match"
        )
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~outside.values))
    low, n, high = 0, min(start, len(order)), len(order) + 1
    costs = {0: 0.0}
    while high - low > 1:
        costs[n] = cost(as_neurons(outside, order[:n]))
        if abs(costs[n] - target) <= tolerance * target:
            break
        if costs[n] < target and n == len(order):
            raise ValueError(f"all {n} other neurons cost {costs[n]:.3f}, less than {target:.3f}")
        low, high = (n, high) if costs[n] < target else (low, n)
        n = min(2 * n, len(order)) if high > len(order) else (low + high) // 2
    nearest = min(costs, key=lambda n: abs(costs[n] - target))
    if abs(costs[nearest] - target) > max(tolerance, 0.2) * target:
        raise ValueError(
            f"{nearest} neurons cost {costs[nearest]:.3f}, the nearest to {target:.3f}"
        )
    return as_neurons(outside, order[:nearest])
