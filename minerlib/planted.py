"""Planted neurons: a ground truth for methods that look for modality-specific neurons.

In a copy of a model a direction is added to the residual stream at the tokens of one modality, and
a planted neuron that fires at these tokens alone takes it away. So the neuron is modality-specific
and needed by construction, and the intact model computes what it did before. How *loud* it is, its
activation s, is free: its column of the down projection holds the direction over s. Decoys fire as
loudly and do nothing (`idle`), or are needed at every token (`everywhere`).
"""

import copy
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
import xarray as xr
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from minerlib.aggregation import aggregate
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.model import MLLM
from minerlib.scoring import METRICS, score
from minerlib.selection import STRATEGIES, first, matched_random, weighted
from minerlib.separation import separate
from minerlib.tasks.evaluation import evaluate, prepare

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


class NotPlantable(ValueError):
    """In this model no neurons can be planted."""


def plant(
    mllm: MLLM, sites: pd.DataFrame, loud: Sequence[float], strength: float, seed: int
) -> MLLM:
    """A copy of the model with neurons planted at the sites, of activation `loud` each.

    strength is the length of the added direction over that of the normed state that enters the MLP.
    Tokens that are generated count as what they are: text or special. NotPlantable for a model of
    16 bits, in which what is added and taken away leaves more than it should, for an MLP that is
    not gated with projections of its own, and for a loudness that is not above 0.
    """
    if mllm.model.dtype not in (torch.float32, torch.float64):
        raise NotPlantable(
            f"{mllm.name} is {mllm.model.dtype}: neurons are planted in float32 only"
        )
    if not (np.asarray(loud) > 0).all():
        raise NotPlantable(f"loudness {np.min(loud):.3g}: a planted neuron must fire")
    if not hasattr(mllm.family.mlp(mllm.layers[0]), "up_proj"):
        raise NotPlantable(f"{mllm.name}: neurons are planted in an MLP with an up_proj of its own")
    model = copy.deepcopy(mllm.model)
    model.config._commit_hash = None  # it is no longer what the hub has
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


def as_loud(activation: xr.DataArray, sites: pd.DataFrame, share: float) -> np.ndarray:
    """How loud each site fires, [site]: a quantile of its layer's neurons' greatest activations.

    activation is `loudness` of activations; they are taken at the tokens of the site's modality.
    """
    at = {k: xr.DataArray(sites[k], dims="site") for k in ("modality", "layer")}
    return np.quantile(activation.sel(at).sel(statistic="max").values, share, axis=-1)


def roles(sites: pd.DataFrame, modality: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The neurons of each role for a modality, as many of each, bool [layer, neuron]."""
    own = sites[sites["modality"] == modality]
    return {role: mask(part, shape) for role, part in own.groupby("role")}


def found(scores: np.ndarray, sites: pd.DataFrame, modality: str) -> dict[str, float]:
    """How well scores [layer, neuron] of a modality find what is needed for it.

    auc: how often a needed neuron scores higher than a planted one of another role, which fires
    alike; percentile: their mean rank among all, 1 the highest. And the shares of each role among
    as many neurons as are needed, of highest score: recall (the needed), idle, everywhere. Scores
    that differ by less than some 1e-4 of their size tie: planted neurons are alike, but for
    rounding.
    """
    parts, exponents = np.frexp(scores)
    scores = np.ldexp(np.round(parts * 2**14), exponents)
    of = {role: neurons.ravel() for role, neurons in roles(sites, modality, scores.shape).items()}
    needed = of.pop("needed")
    order = np.argsort(-scores, axis=None, kind="stable")
    rank = np.empty(needed.size)
    rank[order] = np.arange(needed.size)
    taken = order[: needed.sum()]
    planted = np.any([needed, *of.values()], 0)
    return {
        "auc": float(roc_auc_score(needed[planted], scores.ravel()[planted])),
        "percentile": float(1 - rank[needed].mean() / needed.size),
        "recall": float(needed[taken].mean()),
        **{role: float(neurons[taken].mean()) for role, neurons in of.items()},
    }


@computation(version=2)
def necessity(
    mllm: MLLM,
    benches: Iterable,
    sites: pd.DataFrame,
    loud: Sequence[float],
    *,
    strength: float,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Mean scores as the model is, planted and intact, and with each role's neurons silenced.

    Columns silenced ("as it is", "intact" or a role), modality ("" of the first two), benchmark,
    score, logprob (of the references, in nats a token).
    """
    other = plant(mllm, sites, loud, strength, seed)
    ready = [prepare(other, bench) for bench in benches]
    shape, rows = (other.n_layers, other.n_neurons), list[tuple]()
    parts = sites.groupby(["role", "modality"], sort=False)
    conditions = [(mllm, "as it is", "", sites[:0]), (other, "intact", "", sites[:0])]
    conditions += [(other, *names, part) for names, part in parts]
    for of, role, modality, part in tqdm(conditions, "roles", leave=False):
        with deactivate(of, mask(part, shape)[None]):
            told = partial(evaluate, of, max_new_tokens=max_new_tokens, measure="logprob")
            tables = [told(x) for x in ready]
        for t in tables:
            means = t["score"].mean(), t["logprob"].mean()
            rows.append((role, modality, t["benchmark"].iloc[0], *means))
    return pd.DataFrame(rows, columns=["silenced", "modality", "benchmark", "score", "logprob"])


@computation(version=1)
def control(
    mllm: MLLM,
    benches: Iterable,
    sites: pd.DataFrame,
    loud: Sequence[float],
    *,
    strength: float,
    draws: int,
    answer_draws: int,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Answers of the planted model of which finding I's rule must say *holds*: a positive control.

    Intact (neurons -1), with all needed neurons silenced (0), and with as many random ones of the
    same layers, none of them planted (from 1 on). Columns of `evaluate`, and neurons; the score is
    NaN beyond the first answer_draws draws.
    """
    other = plant(mllm, sites, loud, strength, seed)
    ready = [prepare(other, bench) for bench in benches]
    axes, shape = ("layer", "neuron"), (other.n_layers, other.n_neurons)
    taken, needed = (
        xr.DataArray(mask(of, shape), {"layer": range(shape[0])}, axes)
        for of in (sites, sites[sites["role"] == "needed"])
    )
    own = needed.expand_dims(modality=["needed"])
    sets = [own & False, own]
    sets += [matched_random(own, seed + i, by_layer=True, outside=taken) for i in range(draws)]
    tables = []
    for i, neurons in enumerate(tqdm(sets, "positive control", leave=False), -1):
        measure = "logprob" if i <= answer_draws else "logprob only"
        with deactivate(other, neurons):
            told = partial(evaluate, other, max_new_tokens=max_new_tokens, measure=measure)
            tables += [told(of).assign(neurons=i) for of in ready]
    return pd.concat(tables, ignore_index=True)


@computation(version=2)
def recovered(
    mllm: MLLM,
    mined: Iterable,
    held: Iterable,
    sites: pd.DataFrame,
    loud: Sequence[float],
    *,
    strength: float,
    seed: int = 0,
    batch_size: int = 8,
) -> pd.DataFrame:
    """What every metric and strategy finds of planted neurons, and what silencing that costs.

    Planted as by `plant`, mined on the benchmarks `mined`. Rows: the modality and `by`, which is
    "planted", what is needed itself; a metric alone, which takes as many neurons of the modality as
    are needed; or a strategy with the paper's weights, which takes as many of all modalities
    together (left out if it takes more at once). Columns of `found` (of strategies: recall, and
    idle and everywhere as shares of what it takes); and by benchmark of `held` the nats a token of
    the references that silencing them costs.
    """
    other = plant(mllm, sites, loud, strength, seed)
    total = aggregate(score(other, bench, batch_size=batch_size) for bench in mined)
    ready = [prepare(other, bench, batch_size) for bench in held]

    def nats(neurons: np.ndarray) -> pd.Series:
        with deactivate(other, neurons):
            told = pd.concat([evaluate(other, rows, measure="logprob only") for rows in ready])
        return told.groupby("benchmark", sort=False)["logprob"].mean()

    shape = other.n_layers, other.n_neurons
    intact = nats(np.zeros((1, *shape), bool))
    needed = sites[sites["role"] == "needed"]
    each = needed.groupby("modality", sort=False).size()
    rows, taken = list[dict](), list[np.ndarray]()
    for modality, n in each.items():
        own = mask(needed[needed["modality"] == modality], shape)
        rows.append({"by": "planted", "modality": modality, "recall": 1.0})
        taken.append(own[None])
        for metric in METRICS:
            alone, weights = total.sel(modality=[modality]), {metric: 1.0}
            values = weighted(alone, weights)[0]
            rows.append({"by": metric, "modality": modality, **found(values, sites, modality)})
            taken.append(first(alone, int(n), weights=weights).values)
    for name in (name for name in STRATEGIES if name != "random"):
        try:
            chosen = first(total.sel(modality=[*each.index]), int(each.sum()), name)
        except ValueError:  # its first step takes more
            continue
        for modality in each.index:
            own = chosen.sel(modality=[modality]).values
            parts = roles(sites, modality, shape)
            recall = own[0][parts.pop("needed")].mean()
            shares = {role: own[0][of].sum() / max(own.sum(), 1) for role, of in parts.items()}
            rows.append({"by": name, "modality": modality, "recall": recall, **shares})
            taken.append(own)
    lost = [intact - nats(of) for of in tqdm(taken, "what is found, silenced", leave=False)]
    return pd.DataFrame(rows).join(pd.DataFrame(lost).reset_index(drop=True))
