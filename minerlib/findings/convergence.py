"""Where the modalities converge (finding II): distances of kinds' clouds, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from sklearn.metrics import pairwise_distances

from minerlib import inference
from minerlib.findings import clouds
from minerlib.findings.states import States
from minerlib.inference import Resampling, table_row

CONVERGENCE = {
    "distance": True,
    "silhouette": True,
    "accuracy": True,
    "mixing": False,
    "cka": False,
}
"""Measures of convergence: whether smaller is more converged."""


def convergence(
    states: States,
    kinds: Sequence[str] | None = None,
    *,
    k: int = 10,
    n_boot: int = 1000,
    n_null: int = 200,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far apart each two kinds lie, layer by layer, and where they converge (finding II).

    Measures: `distance` of the centroids over the spread; `silhouette` of the labels; `accuracy`
    of a cross-validated linear classifier; `mixing`, the share of the k nearest neighbours that
    are of the other kind, over chance; `cka`, debiased linear CKA between the kinds' means
    across samples. Null: labels shuffled within each sample, for `cka` samples paired at random.

    Returns
    -------
    curves: pair, layer, measure, value, low, high, null, null_low, null_high, p (chance that the
    null is as far apart; for cka, as related). layers: pair, measure, layer (see
    `clouds.convergence_layer`), low, high, lower_half (share of resamplings in which it lies in
    the lower half of the layers), start, closest, end (values), never (share of resamplings
    without any convergence).
    """
    curves, layers = [], []
    kinds = list(dict.fromkeys(states.tokens["kind"])) if kinds is None else kinds
    for a, b in combinations(kinds, 2):
        pair, part = f"{a}-{b}", states.of(a, b)
        r = Resampling(part.tokens, b, n_boot, n_null, seed)
        drawn = {m: [] for m in CONVERGENCE}
        values = {m: [] for m in CONVERGENCE}
        for layer, x in enumerate(part.hidden):
            rows, draws = _apart(x, r, k, n_null, seed)
            curves += [{"pair": pair, "layer": layer, **row} for row in rows]
            for row, draw in zip(rows, draws, strict=True):
                values[row["measure"]].append(row["value"])
                drawn[row["measure"]].append(draw)
        for measure, falling in CONVERGENCE.items():
            curve = np.array(values[measure])
            at = clouds.convergence_layer(np.stack(drawn[measure], -1), falling)
            none = np.isnan(at)
            low, high = np.nanquantile(at, [0.025, 0.975]) if not none.all() else (np.nan, np.nan)
            layers.append(
                {
                    "pair": pair,
                    "measure": measure,
                    "layer": float(clouds.convergence_layer(curve, falling)),
                    "low": low,
                    "high": high,
                    "lower_half": float((at < (len(curve) - 1) / 2).mean()),
                    "start": curve[0],
                    "closest": curve.min() if falling else curve.max(),
                    "end": curve[-1],
                    "never": float(none.mean()),
                }
            )
    return pd.DataFrame(curves), pd.DataFrame(layers)


def _apart(x: np.ndarray, r: Resampling, k: int, n_null: int, seed: int) -> tuple[list, list]:
    """The rows of one layer and pair, and each row's bootstrap draws."""
    distance = pairwise_distances(x)
    tokens = r.token_draws
    spread = clouds.centroid_distance(x, ~r.second, r.second)
    spread_draws = clouds.centroid_distance(x, tokens * ~r.own, tokens * r.own)
    rows, draws = [table_row("distance", spread[0], spread_draws, spread[1:])], [spread_draws]
    per_token = {
        "silhouette": (clouds.silhouette(distance, r.second), True),
        "accuracy": (clouds.classified(x, r.second, r.group), True),
        "mixing": (clouds.mixing(clouds.neighbours(distance, k), r.second), False),
    }
    for measure, (values, greater) in per_token.items():
        mean = r.by_sample(values[:1])
        rows.append(r.row(measure, values, greater=greater))
        draws.append(inference.weighted(mean.T, r.draws)[:, 0])
    views = (r.by_sample(x.T, own).T for own in (~r.own, r.own))
    value, cka_draws, null = clouds.cka(*views, r.draws, n_null, seed)
    return [*rows, table_row("cka", value, cka_draws, null)], [*draws, cka_draws]
