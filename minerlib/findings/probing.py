"""Semantic probing as numbers with a null (finding IV)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import pairwise_distances

from minerlib import inference
from minerlib.findings import clouds
from minerlib.findings.states import States
from minerlib.inference import Resampling, table_row


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
            drawn = inference.weighted(per[:, 0].T, r.draws)
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
            tips = inference.shuffles(tip, group, n_null, seed)
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
