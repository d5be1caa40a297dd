"""Stage 3, aggregation: one score per metric, modality and neuron over benchmarks (paper 3.3)."""

from __future__ import annotations

from collections.abc import Iterable

import xarray as xr


def aggregate(scores: Iterable[xr.DataArray]) -> xr.DataArray:
    """Mean over the benchmarks in which a set occurs, [metric, modality, layer, neuron].

    A benchmark without a set (MMLU has no image) does not dilute the others' scores of it; a set
    in none keeps 0. Benchmarks count equally, whatever their number of rows. The coordinates
    `samples`, `activation_mean` and `activation_min` are combined alike (sum, mean, minimum).
    Takes any iterable and holds one benchmark's scores at a time.
    """
    total = occurs = mean = minimum = samples = None
    names = []
    for array in scores:
        present = (array.samples > 0).astype(array.dtype)
        plain = array.reset_coords(drop=True)
        if total is None:
            total, occurs, samples = plain * present, present, array.samples
            mean, minimum = array.activation_mean, array.activation_min
        else:
            if plain.sizes != total.sizes:
                raise ValueError(
                    f"scores of {array.attrs.get('benchmark')!r} have sizes {dict(plain.sizes)}, "
                    f"the others {dict(total.sizes)}: they are of different models"
                )
            total, occurs, samples = (
                total + plain * present,
                occurs + present,
                samples + array.samples,
            )
            mean = mean + array.activation_mean
            minimum = minimum.where(minimum < array.activation_min, array.activation_min)
        names.append(str(array.attrs.get("benchmark", len(names))))
    if total is None:
        raise ValueError("nothing to aggregate: give at least one benchmark's scores")
    result = (total / occurs.clip(min=1)).transpose("metric", "modality", "layer", "neuron")
    result = result.reset_coords(drop=True).assign_coords(
        samples=("modality", samples.values),
        activation_mean=(("layer", "neuron"), mean.values / len(names)),
        activation_min=("layer", minimum.values),
    )
    return result.astype(plain.dtype).assign_attrs(benchmarks=", ".join(names)).rename("importance")
