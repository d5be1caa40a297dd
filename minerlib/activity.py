"""What neurons do at each set of tokens, in one streamed pass: what selections are made of.

Two definitions of a neuron's value are in use: its activation, act_fn(gate), which the paper and
activation-probability methods take, and what it hands to the down projection, act_fn(gate) x up.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import xarray as xr

from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.separation import BASE_SETS, SETS, UNIONS, separate, stack

UNITS = ("activation", "written")

_SUMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "positive": lambda x: (x > 0).float(),
    "total": lambda x: x,
    "absolute": torch.abs,
    "square": torch.square,
}
_MAXIMA = {"highest": lambda x: x, "loudest": torch.abs}
SUMMED, STATISTICS = [*_SUMS], (*_SUMS, *_MAXIMA)
"""Over a set's tokens: how many values are above 0, their sum, the sums of |x| and x^2, the highest
value and the highest |x|."""


@computation(version=1)
@torch.inference_mode()
def activity(
    mllm: MLLM, benches: Iterable, *, units: Iterable[str] = UNITS, batch_size: int = 8
) -> xr.DataArray:
    """Statistics of every neuron's values at the prompt tokens of each set.

    DataArray float32 [unit, statistic, modality, layer, neuron] over all prompts of the benchmarks,
    0 where a set does not occur, with the coordinate `tokens` [modality]: means are sums over it.
    """
    units = list(units)
    shape = len(units), len(SETS), mllm.n_layers, mllm.n_neurons
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in _SUMS}
    tops = {name: torch.full(shape, -torch.inf) for name in _MAXIMA}
    tokens = torch.zeros(len(SETS), dtype=torch.long)
    parts = (mllm.batches(bench, batch_size, "activity") for bench in benches)
    for _, batch in chain.from_iterable(parts):
        members = stack(separate(mllm, batch)).transpose(0, 1).flatten(1)  # [set, batch x token]

        def see(layer, x, unit, members=members):
            of = members.to(x.device)
            x = x.float().flatten(0, 1).masked_fill(~of.any(0)[:, None], 0)  # padding may be NaN
            for name, value in _SUMS.items():
                sums[name][unit, :, layer] += (of.float() @ value(x)).cpu()
            for i in (i for i, own in enumerate(of) if SETS[i] in BASE_SETS and own.any()):
                for name, value in _MAXIMA.items():
                    top = tops[name][unit, i, layer]
                    torch.maximum(top, value(x[of[i]]).amax(0).cpu(), out=top)

        taps: dict[str, Any] = {unit: partial(see, unit=i) for i, unit in enumerate(units)}
        with mllm.tap(**taps):
            mllm.forward(batch)
        tokens += members.sum(1).cpu()
    for top in tops.values():
        for union, names in UNIONS.items():
            top[:, SETS.index(union)] = top[:, [SETS.index(k) for k in names]].amax(1)
        top[:, tokens == 0] = 0
    values = torch.stack([x.float() for x in (*sums.values(), *tops.values())], 1)
    if not values.isfinite().all():
        layers = (~values.isfinite()).any(-1).any(0).any(0).any(0).nonzero()[:, 0].tolist()
        why = f"values of layers {layers} are not finite in {mllm.model.dtype}"
        raise ValueError(f"{mllm.name}: {why}; try dtype='bfloat16' or 'float32'")
    coords: dict[str, Any] = {"unit": units, "statistic": list(STATISTICS), "modality": list(SETS)}
    coords |= {"layer": range(shape[2]), "tokens": ("modality", tokens.numpy())}
    dims = ("unit", "statistic", "modality", "layer", "neuron")
    return xr.DataArray(values.numpy(), coords, dims, "activity")


@computation(version=1)
@torch.inference_mode()
def sampled(
    mllm: MLLM, benches: Iterable, *, each: int = 64, seed: int = 0, batch_size: int = 8
) -> xr.DataArray:
    """Activations at `each` tokens of every kind, drawn from the prompts: float32 [token, layer,
    neuron], with the coordinate `kind` [token]. A kind that has fewer tokens gives what it has."""
    keys: dict[str, list[float]] = {kind: [] for kind in mllm.kinds}
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in mllm.kinds}
    rows = 0
    parts = (mllm.batches(bench, batch_size, "sampled") for bench in benches)
    for _, batch in chain.from_iterable(parts):
        sets = separate(mllm, batch)
        # The lowest of random numbers, one for each token, are a draw without replacement.
        drawn = {kind: np.concatenate([np.random.default_rng((seed, rows + i)).random(n)
                                       for i, n in enumerate(sets[kind].sum(1).tolist())])
                 for kind in mllm.kinds}  # fmt: skip
        rows += len(batch["input_ids"])
        new = {kind: np.argsort(of)[:each] for kind, of in drawn.items() if len(of)}
        seen: list[torch.Tensor] = []
        at = {k: [i.cpu() for i in sets[k].nonzero()[of.tolist()].T] for k, of in new.items()}
        index = [torch.cat(i) for i in zip(*at.values(), strict=True)]

        def keep(layer, x, index=index, seen=seen):
            seen.append(x[tuple(i.to(x.device) for i in index)].float().cpu())

        with mllm.tap(activation=keep):
            mllm.forward(batch)
        values = torch.stack(seen, 1).numpy()
        ends = np.cumsum([len(of) for of in new.values()])[:-1]
        for (kind, of), part in zip(new.items(), np.split(values, ends), strict=True):
            keys[kind] += drawn[kind][of].tolist()
            kept[kind] += list(part)
            lowest = np.argsort(keys[kind], kind="stable")[:each]
            keys[kind] = [keys[kind][i] for i in lowest]
            kept[kind] = [kept[kind][i].copy() for i in lowest]  # not a view of a whole batch
    kinds = [kind for kind, of in kept.items() for _ in of]
    coords = {"kind": ("token", kinds), "layer": range(mllm.n_layers)}
    values = np.stack([x for of in kept.values() for x in of])
    return xr.DataArray(values, coords, ("token", "layer", "neuron"), "sampled")


def means(found: xr.DataArray) -> xr.DataArray:
    """The sums' means over a set's tokens; the highest values as they are."""
    summed = found.statistic.isin(list(_SUMS))
    return xr.where(summed, found / found.tokens.clip(1), found).transpose(*found.dims)
