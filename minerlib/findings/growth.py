"""How many samples are enough? Selections from growing, disjoint parts of the mining rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import xarray as xr

from minerlib.aggregation import aggregate
from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.scoring import score
from minerlib.selection import select
from minerlib.tasks import Benchmark


def sizes_up_to(limit: int) -> list[int]:
    """Numbers of samples: powers of two from 4, and half of the rows."""
    half = max(1, limit // 2)
    return sorted({half, *(n for n in (4, 8, 16, 32) if n < half)})


@computation(version=1)
def growth(
    mllm: MLLM,
    mining: Mapping[str, Benchmark],
    whole: xr.DataArray,
    sizes: Sequence[int],
    choice: Mapping[str, Any],
    **how: Any,
) -> pd.DataFrame:
    """Agreement of the selections from two disjoint parts of n rows per benchmark, for each n.

    whole is the selection from all rows, bool [modality, layer, neuron]; choice holds `select`'s
    arguments, how those of `score`. Returns columns samples, modality, overlap (Jaccard of the two
    parts' neurons), inside (share of the first part's that the whole has); a modality that a part
    does not hold is left out there.
    """
    halves = {
        name: (bench[: len(bench) // 2], bench[len(bench) // 2 :]) for name, bench in mining.items()
    }
    rows = []
    for n in sizes:
        parts = [
            select(aggregate(score(mllm, half[i][:n], **how) for half in halves.values()), **choice)
            for i in (0, 1)
        ]
        for modality in whole.modality.values.tolist():
            if all(modality in part.modality for part in parts):
                a, b, c = (part.sel(modality=modality).values for part in (*parts, whole))
                overlap = (a & b).sum() / max(1, (a | b).sum())
                rows.append((n, modality, overlap, (a & c).sum() / max(1, a.sum())))
    return pd.DataFrame(rows, columns=["samples", "modality", "overlap", "inside"])
