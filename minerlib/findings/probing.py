"""Semantic probing as numbers with a null (finding IV)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from sklearn.metrics import pairwise_distances

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings.last_token import read
from minerlib.findings.states import States, hidden_states
from minerlib.model import MLLM

CLAIMS = {
    "reach": "tokens lie nearer to text than to their own kind",
    "probes": "some tokens have more text around them than chance",
    "elongation": "the cloud is drawn out towards the text",
}
ENDS = ["reach", "low", "high"]
PLACES = ("first", "2nd", "3rd", "4th", "last")  # the fifths of a medium


def media(states: States) -> list[str]:
    """The kinds of the states that are neither special nor text."""
    return [k for k in states.tokens["kind"].unique() if k not in ("special", "text")]


@computation(version=1)
def probing(
    states: States, *, nearest=5, k=10, tip_share=0.1, n_boot=1000, n_null=200, seed=0
) -> pd.DataFrame:
    """Whether a medium's tokens reach towards the text tokens, layer by layer (finding IV).

    Measures per kind: `reach`, mean distance of its tokens to their nearest text tokens over that
    to the nearest of their own kind (claimed to be small); `probes`, share of its tokens whose k
    neighbours hold more text than chance allows (`clouds.crowded`); `elongation` of its cloud
    towards the text centroid, against random directions of the clouds' own covariance; `tip_end`,
    how near the tip_share of tokens with the smallest reach is to the ends of its run of tokens, 0
    the middle and 1 an end. Null: labels (of `tip_end` the tip) shuffled within each sample.
    Columns kind, layer and those of `inference.table_row`.
    """
    table = []
    for kind in media(states):
        part = states.of("text", kind)
        r = inference.Resampling(part.tokens, kind, n_boot, n_null, seed)
        end = (2 * _place(part.tokens) - 1).abs().to_numpy()[r.own]
        among = int(8 * nearest / min(r.own.mean(), 1 - r.own.mean()))
        w_cloud, w_text = r.token_draws[:, r.own], r.token_draws[:, ~r.own]
        for layer, x in enumerate(part.hidden):
            distance = pairwise_distances(x)
            near = clouds.neighbours(distance, max(k, among))
            seen = [clouds.reach(distance, r.second[:1], nearest)]
            seen.append(clouds.reach(distance, r.second[1:], nearest, near[:, :among]))
            other, own = (np.concatenate(side) for side in zip(*seen, strict=True))
            per = np.stack([r.by_sample(side, r.second) for side in (other, own)])
            drawn = inference.weighted(per[:, 0].T, r.draws)
            ratio = np.divide(*np.nanmean(per, axis=2))
            found = {"reach": (ratio[0], drawn[:, 0] / drawn[:, 1], ratio[1:])}
            found["probes"] = r.means(clouds.crowded(near[:, :k], r.second), r.second)
            cloud, text = x[r.own], x[~r.own]
            there = (text.mean(0) - cloud.mean(0))[None]
            residue = np.concatenate([cloud - cloud.mean(0), text - text.mean(0)])
            random = clouds.elongation(cloud, clouds.directions_like(residue, n_null, seed))
            to = w_text @ text / w_text.sum(1, keepdims=True)
            to -= w_cloud @ cloud / w_cloud.sum(1, keepdims=True)
            long, drawn = clouds.elongation(cloud, there)[0], clouds.elongation(cloud, to, w_cloud)
            found["elongation"] = long, drawn, random
            reached = (other[0] / np.maximum(own[0], 1e-12))[r.own]
            tip = reached <= np.quantile(reached, tip_share)
            tips = inference.shuffles(tip, r.group[r.own], n_null, seed)
            tip_end, w = (tips * end).sum(1) / tip.sum(), w_cloud * tip
            with np.errstate(invalid="ignore"):
                found["tip_end"] = tip_end[0], (w @ end) / w.sum(1), tip_end[1:]
            for measure, of in found.items():
                row = inference.table_row(measure, *of, greater=measure != "reach")
                table.append({"kind": kind, "layer": layer, **row})
    return pd.DataFrame(table)


def _place(tokens: pd.DataFrame) -> pd.Series:
    """Where tokens sit in their run: 0 its start, 1 its end."""
    return tokens["place"] / (tokens["run"] - 1).clip(lower=1)


def tips(states: States, kind: str, *, nearest: int = 5, tip_share: float = 0.1) -> pd.DataFrame:
    """The tokens of a kind at every layer, from the nearest to the text: who the tip is, and where.

    The token table with columns layer, token (its index in `states.hidden`), reach, place (as a
    share of its run), tip (of the tip_share of least reach).
    """
    part = states.of("text", kind)
    own = (part.tokens["kind"] == kind).to_numpy()
    of, met = states.tokens, part.tokens["sample"].unique()
    index = np.flatnonzero((of["kind"] == kind) & of["sample"].isin(met))
    tip = np.arange(len(index)) < np.ceil(tip_share * len(index))
    tables = []
    for layer, x in enumerate(part.hidden):
        other, same = (d[0, own] for d in clouds.reach(pairwise_distances(x), own[None], nearest))
        table = part.tokens[own].assign(layer=layer, token=index, place=_place)
        table["reach"] = other / np.maximum(same, 1e-12)
        tables.append(table.sort_values("reach", kind="stable").assign(tip=tip))
    return pd.concat(tables, ignore_index=True)


def tip_places(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the tip of `tips` in each fifth of the medium, by layer, and of `all tokens`."""
    ends, tip = np.linspace(0, 1, len(PLACES) + 1), table["tip"]
    fifth = pd.cut(table["place"], ends, labels=PLACES, include_lowest=True)
    shares = pd.crosstab(table["layer"][tip], fifth[tip], normalize="index", dropna=False)
    shares.loc["all tokens"] = fifth.value_counts(normalize=True)
    return shares


def lens_words(
    mllm: MLLM, states: States, table: pd.DataFrame, layers: Sequence[int], top: int = 4
) -> pd.DataFrame:
    """The `top` most frequent words that the logit lens reads in the tip and rest of `tips`."""
    lines = []
    for layer in layers:
        at = table[table["layer"] == layer]
        said = pd.Series([w[0] for w in read(mllm, states.hidden[layer, at["token"]])], at.index)
        for name, of in (("tip", at["tip"]), ("rest", ~at["tip"])):
            counts = said[of].value_counts(normalize=True).head(top)
            words = ", ".join(f"{word!r} {share:.2f}" for word, share in counts.items())
            lines.append({"layer": layer, "tokens": name, "words": words})
    return pd.DataFrame(lines)


def crowded_pictures(states: States, panels: pd.DataFrame, k: int = 10) -> pd.DataFrame:
    """Share of probes by kind and layer, were each picture of `project` (columns) `full space`."""
    lines = []
    for (layer, view), part in panels.groupby(["layer", "view"], sort=False):
        for kind in media(states):
            pair = part[part["kind"].isin([kind, "text"])]
            second = (pair["kind"] == kind).to_numpy()
            spaces = {"full space": states.hidden[layer, pair["token"]], view: pair[["x", "y"]]}
            for space, x in spaces.items():
                near = clouds.neighbours(pairwise_distances(x), k)
                probes = clouds.crowded(near, second[None])[0, second].mean()
                lines.append({"kind": kind, "layer": layer, "space": space, "probes": probes})
    return pd.DataFrame(lines).pivot_table("probes", ["kind", "layer"], "space", sort=False)


@computation(version=1)
def log_reach(states: States, *, nearest: int = 5) -> pd.DataFrame:
    """Mean log reach of each medium's tokens: columns kind, sample, layer, reach."""
    table = pd.concat([tips(states, kind, nearest=nearest) for kind in media(states)])
    by = table.assign(reach=np.log(table["reach"])).groupby(["kind", "sample", "layer"])
    return by["reach"].mean().reset_index()


@computation(version=1)
def silenced_reach(mllm: MLLM, bench, neurons: xr.DataArray, **drawn) -> pd.DataFrame:
    """`log_reach` of the tokens that `hidden_states` draws, with these neurons silenced."""
    with deactivate(mllm, neurons):
        return log_reach(hidden_states(mllm, bench, **drawn))


def approach(reach: pd.DataFrame, origin: int = 0) -> pd.DataFrame:
    """One kind's `log_reach` over layer `origin`'s, as factors: layer, reach, low, high, n."""
    wide = reach.pivot(index="sample", columns="layer", values="reach")
    change = wide.sub(wide[origin], axis=0).melt(ignore_index=False, value_name="reach")
    return _factor(inference.mean_over_samples(change.reset_index(), "reach", ["layer"]))


def pushed(
    before: pd.DataFrame, after: pd.DataFrame, draws: Sequence[pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far silencing pushes one kind's tokens away from the text, beside random draws.

    From its `log_reach` as the model is, and with its neurons and each draw silenced: two tables,
    by layer and as the mean over decoder layers: silenced (own, random), layer, reach (as a
    factor, above 1: away), low, high (a 95 % interval over prompts; lowest and highest draw).
    """
    changes = [inference.paired(before, table, "reach", ["layer"]) for table in (after, *draws)]
    inner = (table[table["layer"] > 0].groupby("sample", as_index=False) for table in changes)
    means, tables = [table["reach"].mean().assign(layer="mean") for table in inner], []
    for own, *random in (changes, means):
        own = _factor(inference.mean_over_samples(own, "reach", ["layer"])).drop(columns="n")
        each = np.exp(pd.concat([t.groupby("layer")["reach"].mean() for t in random], axis=1))
        ends = {"reach": each.mean(axis=1), "low": each.min(axis=1), "high": each.max(axis=1)}
        both = own.assign(silenced="own"), each[[]].assign(**ends, silenced="random").reset_index()
        tables.append(pd.concat(both, ignore_index=True))
    return tables[0], tables[1]


def _factor(table: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals of logarithms, as factors."""
    return table.assign(**np.exp(table[ENDS]))


def claims(measured: pd.DataFrame, reach: pd.DataFrame, moved: dict) -> list[dict]:
    """The lines of the closing table: of `probing`, `log_reach` and, by kind, `pushed`'s second."""
    lines: list[dict] = []

    def add(claim: str, factor, null: str, bound: float = 1, greater: bool = False) -> None:
        mean, low, high = factor
        verdict = inference.beyond(low, high, bound, greater=greater)
        measured = f"x {inference.spread(mean, low, high)}"
        lines.append(inference.line(claim, measured, f"x {null}", verdict))

    for kind, whole in moved.items():
        own = measured[(measured["kind"] == kind) & (measured["layer"] > 0)]
        for measure, text in CLAIMS.items():
            of, greater = own[own["measure"] == measure], measure != "reach"
            layers = inference.over_layers(of, greater=greater, need=1, corrected=True)
            lines.append(layers.claim(f"{kind}: {text}"))
        for origin, name in enumerate(("embeddings", "layer 1")):
            nearer = approach(reach[reach["kind"] == kind], origin)[ENDS].to_numpy()[-1]
            add(f"{kind}: tokens come nearer to text from {name} to the last layer", nearer, "1.00")
        own, random = whole.set_index("silenced").loc[["own", "random"], ENDS].to_numpy()
        null, bound = f"{inference.spread(*random)} (random neurons)", max(1, random[2])
        claim = f"{kind}: silencing its neurons pushes its tokens away from text"
        add(claim, own, null, bound, greater=True)
    return lines
