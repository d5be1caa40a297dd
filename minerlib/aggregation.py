"""Stage 3, aggregation: one score per metric, modality and neuron over benchmarks (paper 3.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from minerlib.artifacts import computation


@computation(version=1)
def aggregate(scores: Iterable[xr.DataArray]) -> xr.DataArray:
    """Mean over the benchmarks in which a set occurs, [metric, modality, layer, neuron].

    A benchmark without a set (MMLU has no image) does not dilute the others' scores of it; a set
    in none keeps 0. Benchmarks count equally, whatever their number of rows. The coordinates
    `samples`, `activation_mean` and `activation_min` are combined alike (sum, mean, minimum).
    Takes any iterable and holds one benchmark's scores at a time.
    """
    sums: Any = None
    names: list[str] = []
    for array in scores:
        plain, present = array.reset_coords(drop=True), (array.samples > 0).astype(array.dtype)
        parts = plain * present, present, array.samples, array.activation_mean, array.activation_min
        if sums is None:
            sums = parts
        elif any(not np.array_equal(plain[dim], sums[0][dim]) for dim in plain.dims):
            raise ValueError(
                f"scores of {array.attrs.get('benchmark')!r} have sizes {dict(plain.sizes)}, the "
                f"others {dict(sums[0].sizes)}: they are of different models or metrics"
            )
        else:
            *added, low = zip(sums, parts, strict=True)
            sums = *(a + b for a, b in added), np.minimum(*low)
        names.append(str(array.attrs.get("benchmark", len(names))))
    if sums is None:
        raise ValueError("nothing to aggregate: give at least one benchmark's scores")
    total, occurs, samples, mean, minimum = sums
    total = (total / occurs.clip(min=1)).transpose("metric", "modality", "layer", "neuron")
    total = total.reset_coords(drop=True).assign_coords(
        samples=("modality", samples.values),
        activation_mean=(("layer", "neuron"), mean.values / len(names)),
        activation_min=("layer", minimum.values),
    )
    return total.astype(plain.dtype).assign_attrs(benchmarks=", ".join(names)).rename("importance")
