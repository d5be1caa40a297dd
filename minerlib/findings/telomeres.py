"""Semantic telomeres as numbers with a null (finding IV), and their rivals.

Axis end: how far out a token lies on the text cloud's principal axis, as percentiles of the text
tokens folded about the median: 0 the middle, 1 an end; text itself averages 0.5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr
from sklearn.metrics import pairwise_distances

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings.attention import attention_sinks
from minerlib.findings.probing import by_layer, labelled, mean_draws
from minerlib.findings.states import States, hidden_states
from minerlib.inference import Estimate
from minerlib.model import MLLM
from minerlib.tasks.spec import Sample

MASSIVE = 1000  # largest over median coordinate from which an activation is (Sun et al. 2024)


class _Prompts(inference.Resampling):
    """Prompts with text and special tokens: first themselves, then resampled."""

    def __init__(self, states: States, n_boot: int, seed: int):
        self.part = states.of("text", "special")
        super().__init__(self.part.tokens, "special", n_boot, 0, seed)
        self.weights = np.vstack([np.ones((1, self.group.size)), self.token_draws])

    def axis_ends(self) -> Iterator[np.ndarray]:
        """Of each token, by layer [1 + n_boot, token]; the axis and the text are resampled too."""
        for x in self.part.hidden:
            along = clouds.principal_axis(x[~self.own], self.weights[:, ~self.own]) @ x.T
            pairs = zip(along, self.weights[:, None], strict=True)
            yield np.concatenate([clouds.extremity(z, self.own[None], w) for z, w in pairs])

    def shares(self, tokens: np.ndarray) -> np.ndarray:
        """What each token is of the mean of prompts' means over `tokens`, [1 + n_boot, token].

        Averaged over n choices of tokens, bool [n, token]; NaN where nothing is chosen.
        """
        held = tokens @ np.eye(self.size)[self.group]
        prompts = self.by_sample(self.weights) @ (held > 0).T
        each = np.divide(1, prompts, out=np.zeros_like(prompts), where=prompts > 0)
        with np.errstate(invalid="ignore"):
            each = each / (prompts > 0).sum(1, keepdims=True)
        return self.weights * (each @ (tokens / np.maximum(held, 1)[:, self.group]))


@computation(version=2)
def telomeres(
    states: States, *, k: int = 10, share: float = 0.1, n_boot=500, n_null=200, seed: int = 0
) -> xr.DataArray:
    """Whether special tokens sit at the ends of the text and hold on to it (finding IV).

    Measures: `axis_end`, whose null takes as many different tokens as the special ones, drawn from
    those of text in at least `share` of the prompts, since any token that recurs has some fixed
    place; `beyond_words`, the same less its null's mean (NaN where too few recur); `axis_order`,
    absolute rank correlation of the axis with the text's order (null: places shuffled within each
    prompt); `attachment`, share of the k nearest tokens of text and media that are text, over
    chance (null: these labels shuffled; only where there are media).
    Returns [measure, layer, draw] as in `probing`; attributes special, recurring: different tokens.
    """
    r = _Prompts(states, n_boot, seed)
    text, ids, kinds = ~r.own, r.part.tokens["id"], states.tokens["kind"]
    along = r.part.tokens["position"] / (r.part.tokens["length"] - 1)
    places = inference.shuffles(clouds.standard_ranks(along[text]), r.group[text], n_null, seed)
    prompts = r.part.tokens[text].groupby("id")["sample"].nunique()
    recurring, n = prompts.index[prompts / r.size >= share], ids[r.own].nunique()
    words, rng = np.zeros((n_null, len(ids)), bool), np.random.default_rng(seed)
    if len(recurring) >= n:
        words = np.stack([ids.isin(rng.choice(recurring, n, replace=False)) & text for _ in words])
    special, word = r.shares(r.own[None]), r.shares(words)
    used, ends = states.tokens["sample"].isin(r.part.tokens["sample"]), kinds == "special"
    ends, anchors = used & ends, used & ~ends
    is_text = (kinds[anchors] == "text").to_numpy()
    labels = inference.shuffles(is_text, states.tokens["sample"][anchors].to_numpy(), n_null, seed)
    layers = []
    for i, (x, out) in enumerate(zip(r.part.hidden, r.axis_ends(), strict=True)):
        far = (special * out).sum(1)
        each = r.by_sample(np.broadcast_to(out[0], words.shape), words)
        each = inference.weighted(each.T, np.ones((1, r.size)))[0]
        beyond = far - (word * out).sum(1)
        found = [np.append(far, each), np.append(beyond, each - each.mean())]
        values = np.zeros((n_null + 1, len(x)))
        values[:, text] = places * clouds.standard_ranks(x[text] @ clouds.principal_axis(x[text]))
        found.append(np.abs(np.hstack(r.means(values, text))))
        if not is_text.all():
            to = pairwise_distances(*(states.hidden[i, side] for side in (ends, anchors)))
            near = np.argpartition(to, min(k, to.shape[1]) - 1, axis=1)[:, :k]
            values[:, r.own] = np.stack([row[near].mean(1) for row in labels]) / is_text.mean()
            found.append(np.hstack(r.means(values, r.own)))
        layers.append(found)
    names = ["axis_end", "beyond_words", "axis_order", "attachment"][: len(found)]
    values, layer = np.swapaxes(np.array(layers), 0, 1), range(len(layers))
    drawn = labelled(values, n_boot, n_null, measure=names, layer=layer)
    return drawn.assign_attrs(special=n, recurring=len(recurring))


@computation(version=1)
def mean_ends(states: States, *, n_boot: int = 500, seed: int = 0) -> xr.DataArray:
    """The `axis_end` of `telomeres` without its null, [layer, draw]."""
    r = _Prompts(states, n_boot, seed)
    special = r.shares(r.own[None])
    ends = [(special * out).sum(1) for out in r.axis_ends()]
    return labelled(ends, n_boot, 0, layer=range(len(ends)))


def doubled(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with their question asked twice."""
    return [replace(sample, prompt=f"{sample.prompt}\n{sample.prompt}") for sample in samples]


def fall(before: xr.DataArray, after: xr.DataArray) -> Estimate:
    """What [layer, draw] falls by in the mean over layers from 1 on, on the same resamplings."""
    (a, resampled, _), (b, again, _) = mean_draws(before), mean_draws(after)
    return inference.from_draws(a[0] - b[0], resampled - again)


@computation(version=2)
def massive_activations(states: States) -> pd.DataFrame:
    """Largest over median magnitude of hidden states that are not normed (Sun et al. 2024).

    Means over each prompt's tokens of a kind: sample, kind, layer, ratio, massive (share of them
    above `MASSIVE`).
    """
    tokens, by = states.tokens[["sample", "kind"]], ["sample", "kind", "layer"]
    ratios = enumerate(map(clouds.massive, states.hidden))
    each = (tokens.assign(layer=i, ratio=ratio, massive=ratio > MASSIVE) for i, ratio in ratios)
    return pd.concat(each).groupby(by, sort=False, as_index=False).mean()


@computation(version=1)
def collected(mllm: MLLM, samples: Sequence[Sample]) -> pd.DataFrame:
    """`attention_sinks` of each prompt: columns sample, layer (from 1), set, collected."""
    tables = {i: attention_sinks(mllm, [sample]) for i, sample in enumerate(samples)}
    table = pd.concat(tables, names=["sample", "row"]).reset_index("sample")
    return table.assign(layer=table["layer"] + 1)[["sample", "layer", "set", "collected"]]


@computation(version=3)
def silenced_ends(mllm: MLLM, samples, neurons, *, n_boot: int = 100, **drawn) -> xr.DataArray:
    """`mean_ends` with these neurons silenced; `drawn` as for `hidden_states`."""
    with deactivate(mllm, neurons):
        states = hidden_states(mllm, samples, **drawn)
    return mean_ends(states, n_boot=n_boot, seed=drawn.get("seed", 0))


@computation(version=1)
def in_short(mllm: MLLM, samples: Sequence[Sample], n_null: int = 200, **drawn) -> pd.DataFrame:
    """For untrained controls: measures of `telomeres`, and `attention` on later special tokens.

    Columns measure, layer, value; drawn as for `hidden_states`.
    """
    states, seed = hidden_states(mllm, samples, **drawn), drawn.get("seed", 0)
    table = by_layer(telomeres(states, n_boot=2, n_null=n_null, seed=seed))
    sinks = attention_sinks(mllm, samples, batch_size=drawn.get("batch_size", 8))
    later = sinks[sinks["set"] == "later special"].rename(columns={"collected": "value"})
    later = later.assign(measure="attention", layer=later["layer"] + 1)
    return pd.concat([table, later], ignore_index=True)[["measure", "layer", "value"]]
