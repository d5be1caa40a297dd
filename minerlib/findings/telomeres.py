"""Semantic telomeres as numbers with a null (finding IV), and their rivals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import pairwise_distances

from minerlib import inference
from minerlib.findings import clouds
from minerlib.findings.states import States
from minerlib.inference import Resampling, table_row


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
    places = inference.shuffles(clouds.standard_ranks(along[text]), r.group[text], n_null, seed)
    count = part.tokens[text].groupby("sample")["count"].first().to_numpy()
    lengths = inference.shuffles(clouds.standard_ranks(count), np.zeros(r.size), n_null, seed)
    sequence = r.row("sequence_end", clouds.extremity(along, r.second), r.second)

    used = states.tokens["sample"].isin(part.tokens["sample"]).to_numpy()
    is_end = (states.tokens["kind"] == kind).to_numpy()
    ends, anchors = used & is_end, used & ~is_end
    is_text = (states.tokens["kind"] == toward).to_numpy()[anchors]
    labels = inference.shuffles(is_text, states.tokens["sample"].to_numpy()[anchors], n_null, seed)
    table = []
    for layer, x in enumerate(part.hidden):
        z = x @ clouds.principal_axis(x[text])
        out = clouds.extremity(z, r.second)
        rows = [r.row("axis_end", out, r.second), sequence]

        product = np.zeros((n_null + 1, len(x)))
        product[:, text] = places * clouds.standard_ranks(z[text])
        mean = r.by_sample(product, text)
        drawn = np.abs(inference.weighted(mean[0][:, None], r.draws)[:, 0])
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
            drawn = inference.weighted((lengths[0] * ranks)[:, None], r.draws)[:, 0]
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
            mean, low, high = inference.interval(per[:, None], n_boot, seed)
            top = np.bincount(np.abs(x[of]).argmax(1)).argmax()
            row = {"layer": layer, "kind": kind, "ratio": mean[0], "low": low[0], "high": high[0]}
            head = ratio[of & first].mean() if (of & first).any() else np.nan
            extra = {"massive": (ratio[of] > 1000).mean(), "dimension": int(top), "first": head}
            table.append(row | extra)
    return pd.DataFrame(table)
