"""How many samples are enough? Selections from growing, disjoint parts of the mining rows."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import xarray as xr

from minerlib.aggregation import aggregate
from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.scoring import score
from minerlib.selection import jaccard, select
from minerlib.tasks import Benchmark


def sizes_up_to(limit: int) -> list[int]:
    """Numbers of samples: powers of two from 4, and half of the rows."""
    half = max(1, limit // 2)
    return sorted({half, *(n for n in (4, 8, 16, 32) if n < half)})


@computation(version=1)
def growth(
    mllm: MLLM, mining: Mapping[str, Benchmark], whole: xr.DataArray, sizes, choice, **how: Any
) -> pd.DataFrame:
    """Agreement of the selections from two disjoint parts of n rows per benchmark, n in sizes.

    whole is the selection from all rows, bool [modality, layer, neuron]; choice holds `select`'s
    arguments, how those of `score`. Columns samples, modality (where both parts hold it), overlap
    (Jaccard of the two parts' neurons), inside (share of the first part's that the whole has).
    """
    rows, benches = [], mining.values()
    halves = [b[: len(b) // 2] for b in benches], [b[len(b) // 2 :] for b in benches]
    for n in sizes:
        scores = ([score(mllm, bench[:n], **how) for bench in half] for half in halves)
        parts = [select(aggregate(each), **choice) for each in scores]
        for modality in whole.modality.values.tolist():
            if all(modality in part.modality for part in parts):
                a, b, c = (part.sel(modality=modality).values for part in (*parts, whole))
                overlap = float(jaccard(a.ravel(), b.ravel()))
                rows.append((n, modality, overlap, (a & c).sum() / max(1, a.sum())))
    return pd.DataFrame(rows, columns=["samples", "modality", "overlap", "inside"])
