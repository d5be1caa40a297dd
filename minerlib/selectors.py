"""Other ways to tell which neurons belong to a modality, beside the paper's: its rivals.

A selector is a function of `Evidence`, gathered in one pass over the mined rows, to values
[modality, layer, neuron], higher for neurons that belong more to the modality; `ranked` makes of
them what `selection.first` takes, so that all are compared at one number of neurons and spend it
alike. Each is the idea of the work it is named after, at MINER's token sets: not its whole method.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.stats import entropy, rankdata

from minerlib.selection import PAPER_WEIGHTS, weighted
from minerlib.separation import BASE_SETS, UNIONS

LIVELY = 0.95  # the quantile of activation probabilities above which a neuron counts as active


class Evidence(NamedTuple):
    """What selectors may look at, of the mined rows."""

    scores: xr.DataArray  # the paper's, aggregated [metric, modality, layer, neuron]
    activity: xr.DataArray  # of one unit [statistic, modality, layer, neuron], of `activity`
    domains: Mapping[str, xr.DataArray]  # the same, of each benchmark alone
    media: Mapping[str, str]  # the medium of each benchmark
    gradients: xr.DataArray  # [by, modality, layer, neuron]
    norms: xr.DataArray  # of what each neuron writes [layer, neuron]
    modalities: list[str]  # whose neurons are wanted
    seed: int = 0

    def sums(self, statistic: str) -> xr.DataArray:
        """A statistic over the tokens of each modality, [modality, layer, neuron]."""
        return self.activity.sel(statistic=statistic, modality=self.modalities)

    def mean(self, statistic: str) -> xr.DataArray:
        """Its mean over them."""
        own = self.sums(statistic)
        return own / own.tokens.clip(1)

    def elsewhere(self, statistic: str) -> xr.DataArray:
        """Its mean over all other prompt tokens.

        A sum of the others': the whole less its own leaves rounding of who is loud at its own only.
        """
        parts = self.activity.sel(statistic=statistic)
        own = [UNIONS.get(m, (m,)) for m in self.modalities]
        rest = [parts.sel(modality=[k for k in BASE_SETS if k not in of]) for of in own]
        means = [of.sum("modality") / max(int(of.tokens.sum()), 1) for of in rest]
        return xr.concat(means, "modality").assign_coords(modality=self.modalities)


Selector = Callable[[Evidence], xr.DataArray]
SELECTORS: dict[str, Selector] = {}


def selector(function: Selector) -> Selector:
    """Register a selector under the function's name, underscores as blanks."""
    SELECTORS[function.__name__.replace("_", " ")] = function
    return function


def ranked(values: xr.DataArray) -> xr.DataArray:
    """Values as scores of one metric, "rank": each modality's ranks in (0, 1], ties the mean."""
    ranks = rankdata(values.values.reshape(len(values), -1), axis=1) / values[0].size
    out = values.copy(data=ranks.reshape(values.shape).astype(np.float32))
    return out.expand_dims(metric=["rank"]).drop_vars("samples", errors="ignore")


@selector
def miner(seen: Evidence) -> xr.DataArray:
    """The paper's score with its default weights."""
    own = seen.scores.sel(modality=seen.modalities)
    return own[0].drop_vars("metric").copy(data=weighted(own, PAPER_WEIGHTS))


@selector
def contrast(seen: Evidence) -> xr.DataArray:
    """The paper's score less the largest of any other modality."""
    value = miner(seen)
    return value.copy(data=less_the_largest_other(value.values))


def less_the_largest_other(value: np.ndarray) -> np.ndarray:
    """Values [modality, ...] less the largest of any other modality; NaN if there is no other."""
    if len(value) == 1:
        return np.full_like(value, np.nan)
    return value - np.stack([np.delete(value, i, 0).max(0) for i in range(len(value))])


def _low_entropy(share: xr.DataArray) -> xr.DataArray:
    """Minus the entropy over the first axis, in nats, where a share is among the `LIVELY`; below
    all these the others, by their share, so that no two tie by the places they have."""
    total = share.values.sum(0)
    known = entropy(np.where(total > 0, share.values, 1), axis=0)
    least = -np.log(len(share)) - 1  # below all entropies
    lively = share.values >= np.quantile(share.values, LIVELY)
    return share.copy(data=np.where(lively, -known, least - 1 + share.values))


@selector
def LAPE(seen: Evidence) -> xr.DataArray:
    """Activation-probability entropy over modalities, low (Tang et al. 2024, arXiv 2402.16438)."""
    return _low_entropy(seen.mean("positive"))


@selector
def MMNeuron(seen: Evidence) -> xr.DataArray:
    """The same over benchmarks, of all prompt tokens (Huo et al. 2024, arXiv 2406.11193).

    A benchmark's neurons go to its medium: kinds that are no benchmark's medium have none.
    """
    found = [
        part.sel(statistic="positive", modality="prompt") / part.sel(modality="prompt").tokens
        for part in seen.domains.values()
    ]
    domains = list(seen.domains)
    value = _low_entropy(xr.concat(found, "domain").transpose("domain", ...))
    media = [m for m in seen.modalities if m in set(seen.media[name] for name in domains)]
    of = [value[[seen.media[name] == m for name in domains]].max("domain") for m in media]
    return xr.concat(of, "modality").assign_coords(modality=media)


def _ratio(own: xr.DataArray, elsewhere: xr.DataArray) -> xr.DataArray:
    """Own over elsewhere, as MANU sets what to forget against what to keep; its score sums four."""
    return own / (elsewhere + 1e-5)


@selector
def MANU_absolute(seen: Evidence) -> xr.DataArray:
    """Mean |value| at the modality's tokens, over that elsewhere (Liu et al. 2025, 2502.15910)."""
    return _ratio(seen.mean("absolute"), seen.elsewhere("absolute"))


@selector
def MANU_frequency(seen: Evidence) -> xr.DataArray:
    """How often it is above 0, likewise."""
    return _ratio(seen.mean("positive"), seen.elsewhere("positive"))


@selector
def MANU_variance(seen: Evidence) -> xr.DataArray:
    """Its standard deviation, likewise; below a thousandth of its size it is rounding."""

    def deviation(of: Callable[[str], xr.DataArray]) -> xr.DataArray:
        square = of("square")
        return (square - of("total") ** 2).clip(min=1e-6 * square) ** 0.5

    return _ratio(deviation(seen.mean), deviation(seen.elsewhere))


@selector
def MANU_rms(seen: Evidence) -> xr.DataArray:
    """Its root mean square, likewise."""
    return _ratio(seen.mean("square") ** 0.5, seen.elsewhere("square") ** 0.5)


@selector
def loudness(seen: Evidence) -> xr.DataArray:
    """Mean |value| times the length of what is written: no question of modality is asked."""
    return seen.mean("absolute") * seen.norms


def _gradient(by: str) -> Selector:
    return lambda seen: abs(seen.gradients.sel(by=by, modality=seen.modalities)).drop_vars("by")


SELECTORS |= {
    "attribution": _gradient("attribution"),
    "CAN": _gradient("can 0.5"),
    "integrated gradients": _gradient("integrated"),
}


@selector
def weight_norm(seen: Evidence) -> xr.DataArray:
    """The length of what is written at 1, the same for every modality: no data at all."""
    return seen.norms.expand_dims(modality=seen.modalities)


@selector
def random(seen: Evidence) -> xr.DataArray:
    """Drawn."""
    like = seen.norms.expand_dims(modality=seen.modalities)
    return like.copy(data=np.random.default_rng(seed=seen.seed).random(like.shape))
