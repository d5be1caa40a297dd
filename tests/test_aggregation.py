"""Stage 3: the mean over the benchmarks that hold a set."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from minerlib.aggregation import aggregate
from minerlib.scoring import METRICS
from minerlib.separation import SETS

LAYERS, NEURONS = 2, 4


def scores(name: str, seed: int, **samples: int) -> xr.DataArray:
    """Random scores of a benchmark that holds the named sets in so many samples."""
    rng = np.random.default_rng(seed)
    held = np.array([samples.get(s, 0) for s in SETS])
    values = rng.random((len(METRICS), len(SETS), LAYERS, NEURONS), np.float32)
    return xr.DataArray(
        values * (held > 0)[:, None, None],
        dims=("metric", "modality", "layer", "neuron"),
        coords={
            "metric": list(METRICS),
            "modality": list(SETS),
            "layer": range(LAYERS),
            "samples": ("modality", held),
            "activation_mean": (("layer", "neuron"), rng.normal(size=(LAYERS, NEURONS))),
            "activation_min": ("layer", -rng.random(LAYERS)),
        },
        attrs={"benchmark": name},
    )


@pytest.fixture
def three() -> list[xr.DataArray]:
    return [
        scores("a", 0, text=9, special=9, image=9),
        scores("b", 1, text=100, special=100),
        scores("c", 2, text=3, special=3, image=1, video=2),
    ]


def test_mean_over_the_benchmarks_that_hold_the_set(three):
    total = aggregate(three)
    a, b, c = (s.values for s in three)
    text, image, video = (SETS.index(s) for s in ("text", "image", "video"))
    np.testing.assert_allclose(total[:, text], (a + b + c)[:, text] / 3, rtol=1e-6)
    np.testing.assert_allclose(total[:, image], (a + c)[:, image] / 2, rtol=1e-6)
    np.testing.assert_allclose(total[:, video], c[:, video], rtol=1e-6)
    assert not total[:, SETS.index("audio")].any()


def test_rows_of_an_absent_set_are_ignored_whatever_they_hold(three):
    before = aggregate(three)
    three[1].loc[{"modality": "image"}] = 0.9
    np.testing.assert_array_equal(aggregate(three), before)


def test_constants_are_combined_alike(three):
    total = aggregate(three)
    np.testing.assert_array_equal(total.samples, sum(s.samples.values for s in three))
    means = [s.activation_mean.values for s in three]
    np.testing.assert_allclose(total.activation_mean, np.mean(means, axis=0))
    minima = [s.activation_min.values for s in three]
    np.testing.assert_allclose(total.activation_min, np.min(minima, axis=0))


def test_form(three):
    total = aggregate(three)
    assert total.dims == three[0].dims and total.dtype == np.float32
    assert total.attrs["benchmarks"] == "a, b, c"
    for name in ("metric", "modality", "layer"):
        np.testing.assert_array_equal(total[name], three[0][name])


def test_order_and_kind_of_iterable_do_not_matter(three):
    forward, backward = aggregate(iter(three)), aggregate(s for s in reversed(three))
    np.testing.assert_allclose(forward, backward, rtol=1e-6)


def test_one_benchmark_is_itself(three):
    np.testing.assert_array_equal(aggregate(three[:1]), three[0])


def test_inputs_are_left_alone(three):
    before = [s.copy(deep=True) for s in three]
    aggregate(three)
    for a, b in zip(before, three, strict=True):
        xr.testing.assert_identical(a, b)


def test_nothing_to_aggregate():
    with pytest.raises(ValueError, match="at least one benchmark"):
        aggregate([])


def test_scores_of_different_models_are_refused(three):
    with pytest.raises(ValueError, match="'c'.*different models"):
        aggregate([three[0], three[2].isel(layer=[0])])
