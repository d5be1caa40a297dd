"""Stage 4, selection: which neurons are modality-specific (paper section 3.4)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from minerlib.artifacts import computation
from minerlib.scoring import METRICS
from minerlib.separation import SPLITS

PAPER_WEIGHTS = {"prob": 0.0, "mean": 0.25, "max": 0.25, "attn_k": 0.5, "attn_q": 0.0}
"""The paper's default weighting of the five metrics."""

RATIOS = (0.001, 0.005, 0.01, 0.015, 0.02, 0.05, 0.1)
"""The shares of neurons that the paper compares."""

Weights = Mapping[str, float] | Sequence[float] | str  # a str names one of `weightings`


def weightings() -> dict[str, dict[str, float]]:
    """The weightings of the importance metrics that the paper compares, and each metric alone."""
    return {
        "default": PAPER_WEIGHTS,
        **{metric: {metric: 1.0} for metric in METRICS},
        "mean+max": {"mean": 0.5, "max": 0.5},
        "attn_k+attn_q": {"attn_k": 0.5, "attn_q": 0.5},
        "mean+max+attn_q": {"mean": 0.25, "max": 0.25, "attn_q": 0.5},
        "all": dict.fromkeys(PAPER_WEIGHTS, 0.2),
    }


def _top(values: np.ndarray, k: int, *over: int) -> np.ndarray:
    """The k highest along the axes `over` taken together; ties go to the lower index."""
    last = range(-len(over), 0)
    moved = np.moveaxis(values, over, last)
    flat = moved.reshape(*moved.shape[: -len(over)], -1)
    mask = np.zeros(flat.shape, bool)
    if k:
        border = np.partition(flat, -k)[..., [-k]]
        mask, tied = flat > border, flat == border
        mask |= tied & (tied.cumsum(-1) <= k - mask.sum(-1, keepdims=True))
    return np.moveaxis(mask.reshape(moved.shape), last, over)


def _adaptive(value: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """The top K of the sum over modalities, each given to its highest modality."""
    own = value.argmax(0) == np.arange(len(value))[:, None, None]
    return own & _top(value.sum(0), budget, 0, 1)


def _random(value: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """K neurons drawn from all without replacement, dealt out to the modalities."""
    mask = np.zeros((len(value), value[0].size), bool)
    drawn = rng.choice(mask.shape[1], budget, replace=False)
    mask[np.arange(budget) % len(value), drawn] = True
    return mask.reshape(value.shape)


STRATEGIES: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "adaptive": _adaptive,
    # The top K // M of each modality, K // L of each layer, and K // (M L) of each of both.
    "LA_MU": lambda value, budget, rng: _top(value, budget // len(value), 1, 2),
    "LU_MA": lambda value, budget, rng: _top(value, budget // value.shape[1], 0, 2),
    "uniform": lambda value, budget, rng: _top(value, budget // value[..., 0].size, 2),
    "random": _random,
}
"""How a budget K is spent: (V [modality, layer, neuron], K, draws) -> bool of V's shape, at most K
different neurons. LA / LU: layers adaptive / uniform; MA / MU: modalities adaptive / uniform."""


def strategy(function: Callable) -> Callable:
    """Register a way to spend the budget, under the function's name."""
    STRATEGIES[function.__name__] = function
    return function


@computation(version=1)
def select(
    scores: xr.DataArray,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = PAPER_WEIGHTS,
    split: str = "special_text_separate",
    seed: int = 0,
) -> xr.DataArray:
    """The selected neurons, bool [modality, layer, neuron] over the split's sets that occur.

    The budget K = int(ratio L N) is spent by one of `STRATEGIES` on the weighted score V. All but
    adaptive and random may pick one neuron for several modalities, so fewer than K neurons are
    silenced: see `unique`. Ties go to the lower layer, then the lower neuron.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; use one of {tuple(STRATEGIES)}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio!r}; it is a share of all neurons, in (0, 1]")
    modalities = _occurring(scores, split)
    value = weighted(scores.sel(modality=modalities), weights)
    budget = int(ratio * value[0].size)
    mask = STRATEGIES[strategy](value, budget, np.random.default_rng(seed))
    gave = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else f"{mask!r:.60}"
    if gave != (rule := f"bool {value.shape}"):
        raise ValueError(f"strategy {strategy!r} gave {gave}, not {rule} [modality, layer, neuron]")
    if (many := int(mask.any(0).sum())) > budget:
        rule = f"the most is its budget, int(ratio L N) = {budget}"
        raise ValueError(f"strategy {strategy!r} gave {many} different neurons; {rule}")
    attrs = {"ratio": ratio, "strategy": strategy, "split": split, "budget": budget, "seed": seed}
    return labelled(mask, modalities, scores.layer, attrs)


def first(scores: xr.DataArray, n: int, strategy: str = "LA_MU", **how) -> xr.DataArray:
    """The n different neurons that a strategy takes first as its budget grows.

    So strategies whose budgets hold different numbers of neurons are compared at one number; `how`
    as in `select`. Of the step that goes beyond n, the highest weighted scores are taken.
    ValueError where its first step already does, or where no budget reaches n.
    """
    size = scores.sizes["layer"] * scores.sizes["neuron"]
    if n < 1:
        raise ValueError(f"n={n} neurons: take at least 1")

    def at(budget: int) -> xr.DataArray:
        return select(scores, min((budget + 0.5) / size, 1), strategy, **how)

    budget = bisect_right(range(1, size + 1), n, key=lambda k: unique(at(k)))
    taken, step = at(budget), at(min(budget + 1, size))
    have, most = unique(taken), unique(step)
    if not have or most < n:
        least = f"at least {most} neurons" if not have else f"at most {have}"
        raise ValueError(f"n={n}: strategy {strategy!r} takes {least}")
    weights = how.get("weights", PAPER_WEIGHTS)
    value = weighted(scores.sel(modality=step.modality.values), weights)
    new = np.where(step.values & ~taken.values.any(0), value, -np.inf).max(0)
    best = np.zeros(new.size, bool)
    best[np.argsort(-new, axis=None, kind="stable")[: n - have]] = True
    return taken | (step & best.reshape(new.shape))


def _occurring(scores: xr.DataArray, split: str) -> list[str]:
    """The split's sets that occur in the scored prompts."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {tuple(SPLITS)}")
    held = scores.modality.values
    if "samples" in scores.coords:
        held = held[scores.samples.values > 0]
    if not (found := [name for name in SPLITS[split] if name in held]):
        raise ValueError(f"split {split!r} needs {SPLITS[split]}; the scores hold {held.tolist()}")
    return found


def weighted(scores: xr.DataArray, weights: Weights) -> np.ndarray:
    """The weighted score V, [modality, layer, neuron]; weights are non-negative and sum to 1."""
    if isinstance(weights, str):
        if weights not in (named := weightings()):
            raise ValueError(f"no weights {weights!r}; use one of {', '.join(named)}, or numbers")
        weights = named[weights]
    if not isinstance(weights, Mapping):
        if len(weights) != len(PAPER_WEIGHTS):
            raise ValueError(f"{len(weights)} weights, expected one for each of {[*PAPER_WEIGHTS]}")
        weights = dict(zip(PAPER_WEIGHTS, weights, strict=True))
    held = scores.metric.values.tolist()
    if unknown := set(weights) - set(held):
        raise ValueError(f"unknown metric {sorted(unknown)} in weights; the scores hold {held}")
    if any(w < 0 for w in weights.values()) or not abs(sum(weights.values()) - 1) <= 1e-6:
        raise ValueError(f"weights {weights} must be at least 0 and sum to 1")
    w = np.array([weights.get(metric, 0) for metric in held], np.float32)
    values = scores.transpose("metric", "modality", "layer", "neuron").values
    if not np.isfinite(values).all():
        raise ValueError("scores are not finite: mine again, with dtype='bfloat16' or 'float32'")
    return np.tensordot(w, values, 1)


def unique(neurons: xr.DataArray) -> int:
    """How many different neurons are selected, each counted once over the modalities."""
    return int(neurons.any("modality").sum())


def overlap(neurons: xr.DataArray) -> pd.DataFrame:
    """Jaccard overlap of the modalities' neurons, modality by modality (`jaccard`)."""
    sets, names = neurons.values.reshape(len(neurons), -1), neurons.modality.values
    return pd.DataFrame([jaccard(of, sets) for of in sets], names, names)


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of the neurons in either set that is in both, over the last axis; NaN of two empty
    sets."""
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    return both / np.where(either, either, np.nan)


@computation(version=1)
def matched_random(
    neurons: xr.DataArray, seed: int, by_layer: bool = False, outside: xr.DataArray | None = None
) -> xr.DataArray:
    """A random draw of as many unique neurons, bool [modality "random", layer, neuron].

    From all, or from those that are not in `outside`, bool [layer, neuron].

    by_layer keeps the number in each layer too: the stricter null, which asks whether the
    neurons matter or merely the layers that they sit in.
    """
    rng = np.random.default_rng(seed)
    union = neurons.any("modality").values
    free = np.ones_like(union) if outside is None else ~outside.values
    groups, free = (x if by_layer else x.reshape(1, -1) for x in (union, free))
    wanted, left = groups.sum(-1), free.sum(-1)
    if (wanted > left).any():
        i = int(np.argmax(wanted > left))
        where = f"layer {i} has {left[i]}" if by_layer else f"there are {left[i]}"
        raise ValueError(
            f"{wanted[i]} random neurons are wanted and {where} to draw from: select fewer, or "
            "leave out fewer (outside)"
        )
    mask = np.zeros(groups.shape, bool)
    for row, count, there in zip(mask, wanted, free, strict=True):
        row[rng.choice(np.flatnonzero(there), count, replace=False)] = True
    attrs = {"strategy": "matched_random", "by_layer": int(by_layer), "seed": seed}
    return labelled(mask.reshape(1, *union.shape), ["random"], neurons.layer, attrs)


def labelled(mask: np.ndarray, modalities: list[str], layer, attrs: dict) -> xr.DataArray:
    """A mask [modality, layer, neuron] as neurons with their names."""
    coords = {"modality": modalities, "layer": layer.values}
    return xr.DataArray(mask, coords, ("modality", "layer", "neuron"), "neurons", attrs)
