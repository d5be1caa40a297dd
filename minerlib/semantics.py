"""Semantic probing and semantic telomeres, each as numbers with a null (finding IV).

The paper shows both on t-SNE plots and defines neither. Here *probing* means that some of a
medium's tokens come nearer to the text than the rest of their cloud does; *telomeres* means that
special tokens lie at the ends of the text cloud and next to it. The rival explanation of the
latter, attention sinks and massive activations, is in `flow.attention_sinks` and
`massive_activations`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import pairwise_distances

from minerlib import clouds
from minerlib.geometry import Resampling, States, table_row


def probing(
    states: States,
    kinds: Sequence[str] | None = None,
    toward: str = "text",
    *,
    nearest: int = 5,
    k: int = 10,
    tip_share: float = 0.1,
    n_boot: int = 1000,
    n_null: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether a kind's tokens reach towards the text tokens, layer by layer (finding IV).

    Measures per kind (image, video and audio unless given): `reach`, mean distance of its tokens
    to their nearest text tokens over that to the nearest of their own kind (below 1: text is
    nearer; the claim is that it is small); `probes`, share of its tokens whose k neighbours hold
    more text than chance allows (`clouds.crowded`); `elongation` of its cloud along the direction
    to the text centroid, against random directions of the clouds' own covariance; `tip_end`, how
    near the tip (the tip_share of tokens with the smallest reach) is to the ends of its run of
    tokens, 0 the middle and 1 an end. Null of `reach` and `probes`: labels shuffled within each
    sample, which mixes the kinds; of `tip_end`: the tip drawn at random within each sample.

    Returns
    -------
    Columns kind, layer, measure, value, low, high, null, null_low, null_high, p.
    """
    table = []
    held = [k for k in dict.fromkeys(states.tokens["kind"]) if k not in ("special", toward)]
    for kind in held if kinds is None else kinds:
        part = states.of(toward, kind)
        r = Resampling(part.tokens, kind, n_boot, n_null, seed)
        place = part.tokens["place"] / (part.tokens["run"] - 1).clip(lower=1)
        end = (2 * place - 1).abs().to_numpy()[r.own]
        share = min(r.own.mean(), 1 - r.own.mean())
        among = int(8 * nearest / share)
        tokens = r.token_draws
        for layer, x in enumerate(part.hidden):
            distance = pairwise_distances(x)
            rows = []

            near = clouds.neighbours(distance, max(k, among))
            seen = [clouds.reach(distance, r.second[:1], nearest)]
            seen.append(clouds.reach(distance, r.second[1:], nearest, near[:, :among]))
            other, own = (np.concatenate(side) for side in zip(*seen, strict=True))
            per = np.stack([r.by_sample(side, r.second) for side in (other, own)])
            drawn = clouds.weighted(per[:, 0].T, r.draws)
            mean = np.nanmean(per, axis=2)
            ratio, ratio_draws = mean[0] / mean[1], drawn[:, 0] / drawn[:, 1]
            rows.append(table_row("reach", ratio[0], ratio_draws, ratio[1:], greater=False))

            crowd = clouds.crowded(near[:, :k], r.second)
            rows.append(r.row("probes", crowd, r.second))

            cloud, text = x[r.own], x[~r.own]
            there = text.mean(0) - cloud.mean(0)
            residue = np.concatenate([cloud - cloud.mean(0), text - text.mean(0)])
            random = clouds.elongation(cloud, clouds.directions_like(residue, n_null, seed))
            w_text, w_cloud = tokens[:, ~r.own], tokens[:, r.own]
            to = w_text @ text / w_text.sum(1, keepdims=True)
            to -= w_cloud @ cloud / w_cloud.sum(1, keepdims=True)
            long = clouds.elongation(cloud, there[None])[0]
            rows.append(
                table_row("elongation", long, clouds.elongation(cloud, to, w_cloud), random)
            )

            reached = (other[0] / np.maximum(own[0], 1e-12))[r.own]
            tip = reached <= np.quantile(reached, tip_share)
            group = r.group[r.own]
            tips = clouds.shuffles(tip, group, n_null, seed)
            tip_end = (tips * end).sum(1) / tip.sum()
            w = w_cloud * tip
            with np.errstate(invalid="ignore"):
                rows.append(table_row("tip_end", tip_end[0], (w @ end) / w.sum(1), tip_end[1:]))
            table += [{"kind": kind, "layer": layer, **row} for row in rows]
    return pd.DataFrame(table)


def tips(states: States, kind: str, toward: str = "text", *, nearest: int = 5) -> pd.DataFrame:
    """The tokens of a kind by how near they are to the text: who the tip is, and where it sits.

    Returns the token table of that kind at every layer, with columns layer, token (its index in
    `states.hidden`), reach (distance to the nearest text tokens over that to the nearest of its
    kind) and place as a share of its run; the smallest reach first within each layer.
    """
    part = states.of(toward, kind)
    own = (part.tokens["kind"] == kind).to_numpy()
    samples = part.tokens["sample"].unique()
    index = np.flatnonzero((states.tokens["kind"] == kind) & states.tokens["sample"].isin(samples))
    tables = []
    for layer, x in enumerate(part.hidden):
        other, same = (d[0, own] for d in clouds.reach(pairwise_distances(x), own[None], nearest))
        table = part.tokens[own].assign(layer=layer, token=index)
        table["place"] = table["place"] / (table["run"] - 1).clip(lower=1)
        table["reach"] = other / np.maximum(same, 1e-12)
        tables.append(table.sort_values("reach", kind="stable"))
    return pd.concat(tables, ignore_index=True)


def telomeres(
    states: States,
    kind: str = "special",
    toward: str = "text",
    *,
    k: int = 10,
    n_boot: int = 1000,
    n_null: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether special tokens sit at the ends of the text and hold on to it, by layer (finding IV).

    Measures: `axis_end`, how far out the special tokens lie on the text cloud's principal axis,
    as percentiles of the text tokens folded about the median (0 the middle, 1 an end, text
    itself averages 0.5); `sequence_end`, the same along the prompt; `axis_order`, whether that
    axis is the order of the text (absolute rank correlation with the place in the prompt);
    `attachment`, share of the k nearest tokens of text and media that are text, over chance
    (no row without media); `end_by_length`, rank correlation over samples of axis_end with the
    number of text tokens (two-sided: ends that stay put give 0). Null: labels shuffled within
    each sample (special with text; for attachment, text with media); text tokens' places, or
    samples' lengths, shuffled.

    Returns
    -------
    Columns layer, measure, value, low, high, null, null_low, null_high, p.
    """
    part = states.of(toward, kind)
    r = Resampling(part.tokens, kind, n_boot, n_null, seed)
    along = (part.tokens["position"] / (part.tokens["length"] - 1)).to_numpy()
    text = ~r.own
    places = clouds.shuffles(clouds.standard_ranks(along[text]), r.group[text], n_null, seed)
    count = part.tokens[text].groupby("sample")["count"].first().to_numpy()
    lengths = clouds.shuffles(clouds.standard_ranks(count), np.zeros(r.size), n_null, seed)
    sequence = r.row("sequence_end", clouds.extremity(along, r.second), r.second)

    used = states.tokens["sample"].isin(part.tokens["sample"]).to_numpy()
    is_end = (states.tokens["kind"] == kind).to_numpy()
    ends, anchors = used & is_end, used & ~is_end
    is_text = (states.tokens["kind"] == toward).to_numpy()[anchors]
    labels = clouds.shuffles(is_text, states.tokens["sample"].to_numpy()[anchors], n_null, seed)
    table = []
    for layer, x in enumerate(part.hidden):
        z = x @ clouds.principal_axis(x[text])
        out = clouds.extremity(z, r.second)
        rows = [r.row("axis_end", out, r.second), sequence]

        product = np.zeros((n_null + 1, len(x)))
        product[:, text] = places * clouds.standard_ranks(z[text])
        mean = r.by_sample(product, text)
        drawn = np.abs(clouds.weighted(mean[0][:, None], r.draws)[:, 0])
        mean = np.abs(mean.mean(1))
        rows.append(table_row("axis_order", mean[0], drawn, mean[1:]))

        if not is_text.all():
            full = states.hidden[layer]
            to = pairwise_distances(full[ends], full[anchors])
            near = np.argpartition(to, min(k, to.shape[1]) - 1, axis=1)[:, :k]
            share = np.stack([row[near].mean(1) for row in labels]) / is_text.mean()
            values = np.zeros((n_null + 1, len(x)))
            values[:, r.own] = share
            rows.append(r.row("attachment", values, r.own))

        if count.min() < count.max():
            ranks = clouds.standard_ranks(r.by_sample(out[0], r.own))
            rho = lengths @ ranks / r.size
            drawn = clouds.weighted((lengths[0] * ranks)[:, None], r.draws)[:, 0]
            rows.append(table_row("end_by_length", rho[0], drawn, rho[1:], greater=None))
        table += [{"layer": layer, **row} for row in rows]
    return pd.DataFrame(table)


def massive_activations(states: States, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Largest over median magnitude of the hidden states, by layer and kind (Sun et al. 2024).

    Returns
    -------
    Columns layer, kind, ratio (mean over samples), low, high, massive (share of tokens above
    1000), dimension (the one that is most often the largest), first (the ratio of the prompt's
    first token, NaN unless drawn).
    """
    tokens, table = states.tokens, []
    first = (tokens["position"] == 0).to_numpy()
    for layer, x in enumerate(states.hidden):
        ratio = clouds.massive(x)
        for kind in dict.fromkeys(tokens["kind"]):
            of = (tokens["kind"] == kind).to_numpy()
            per = pd.Series(ratio[of]).groupby(tokens["sample"].to_numpy()[of]).mean().to_numpy()
            mean, low, high = clouds.interval(per[:, None], n_boot, seed)
            top = np.bincount(np.abs(x[of]).argmax(1)).argmax()
            row = {"layer": layer, "kind": kind, "ratio": mean[0], "low": low[0], "high": high[0]}
            head = ratio[of & first].mean() if (of & first).any() else np.nan
            extra = {"massive": (ratio[of] > 1000).mean(), "dimension": int(top), "first": head}
            table.append(row | extra)
    return pd.DataFrame(table)
