"""Finding II beyond its measures: verdicts, where neurons sit, what silencing them moves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import Rows, footprints, random_neurons
from scipy.stats import hypergeom

from minerlib import inference
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings import convergence as room
from minerlib.findings.states import States, hidden_states
from minerlib.inference import FAILS, HOLDS, UNKNOWN

RNG = np.random.default_rng


def tables(values, half, measure="distance", pair="text-image", wide=0.05):
    """The curves and layers of one pair and measure, every interval as wide."""
    values = np.array(values, float)
    layer = range(len(values))
    curve = {"value": values, "low": values - wide, "high": values + wide}
    curves = pd.DataFrame({"pair": pair, "layer": layer, "measure": measure, **curve})
    curves = curves.assign(null=0.1, p=[0.9] + [0.01] * (len(values) - 1))
    line = {"pair": pair, "measure": measure, "layer": np.mean(half)}
    line |= {"low": half[0], "high": half[1], "start": values[0], "closest": values.min()}
    return curves, pd.DataFrame([line])


@pytest.mark.parametrize(
    ("values", "half", "at", "converges", "word"),
    [
        ([4, 1, 1, 1, 0.9], (0.4, 0.8), 4, True, HOLDS),
        ([4, 4, 3.9, 1, 0.9], (2.4, 2.9), 4, True, FAILS),
        ([4, 3, 2, 1, 1.1], (1.4, 2.6), 3, True, UNKNOWN),
        ([1, 2, 3, 4, 5], (np.nan, np.nan), 0, False, FAILS),
        ([4, 4, 4, 3.95, 4], (0.5, 0.6), 3, False, UNKNOWN),
    ],
)
def test_verdicts(values, half, at, converges, word):
    line = room.verdicts(*tables(values, half)).iloc[0]
    assert (line["at"], line["converges"], line["verdict"].word) == (at, converges, word)
    assert line["apart"] == ("no" if at == 0 else "yes") and line["null"] == 0.1


def test_a_rising_measure_converges_upwards():
    curves, layers = tables([0, 0.9, 1, 1, 1], (0.4, 0.8), "mixing")
    assert room.verdicts(curves, layers)["verdict"].iloc[0].word == HOLDS
    curves, layers = tables([0, 0.9, 1, 1, 1], (0.4, 0.8), "cka")
    assert room.verdicts(curves, layers)["apart"].iloc[0] == ""
    curves, layers = tables([1, 0.9, 0, 0, 0], (0.4, 0.8), "mixing")
    assert room.verdicts(curves, layers)["verdict"].iloc[0].word == FAILS


def states(samples: int = 12, layers: int = 3) -> States:
    """Text and images that meet, and videos in samples of their own, without text."""
    kinds = (["text"] * 3 + ["image"] * 3) * samples + ["video"] * 3 * samples
    sample = np.r_[np.repeat(np.arange(samples), 6), np.repeat(samples + np.arange(samples), 3)]
    hidden = RNG(0).standard_normal((layers, len(kinds), 5)).astype(np.float32)
    return States(hidden, pd.DataFrame({"sample": sample, "kind": kinds}))


def test_pairs_that_never_meet_are_left_out():
    found = states()
    meetings = room.meetings(found, ["text", "image", "video"])
    assert meetings.to_dict() == {
        ("text", "image"): 12,
        ("text", "video"): 0,
        ("image", "video"): 0,
    }
    curves, layers = room.convergence(found, ["text", "image", "video"], n_boot=20, n_null=20)
    assert set(curves["pair"]) == set(layers["pair"]) == {"text-image"}
    with pytest.raises(ValueError, match="video.*choose kinds that meet"):
        room.convergence(found, ["text", "video"])


def test_against_text():
    pairs = ["text-image", "special-image", "audio-text", "special-audio", "text-special"]
    found = room.against_text(pd.DataFrame({"pair": pairs}))
    assert found["kind"].tolist() == ["image", "audio", "special"]


def test_disparity_does_not_see_what_a_picture_may_do():
    xy = RNG(0).standard_normal((30, 2))
    turned = 3 * xy @ [[0, 1], [-1, 0]] + 7
    other = RNG(1).standard_normal((30, 2))
    views = {"t-SNE, seed 0": xy, "t-SNE, seed 1": turned, "PCA": other}
    table = pd.concat(
        [
            pd.DataFrame(p, columns=["x", "y"]).assign(view=v, layer=layer)
            for layer in (0, 2)
            for v, p in (views | ({"t-SNE, seed 2": other} if layer else {})).items()
        ]
    )
    found = room.disparity(table).set_index("layer")
    assert found.loc[0].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert found.loc[2, "least"] == pytest.approx(0, abs=1e-9) and found.loc[2, "most"] > 0.5


def test_where_neurons_sit_beside_chance():
    low, high = np.zeros((2, 5, 20), bool)
    low[:2, :5], high[2:, :3] = True, True  # three of five layers are in the lower half
    sets = {
        name: xr.DataArray(mask[None], dims=("modality", "layer", "neuron"))
        for name, mask in (("image", low), ("text", high))
    }
    table = room.lower_share(sets).set_index("modality")
    assert table.loc["image", ["neurons", "lower"]].tolist() == [10, 1]
    assert table.loc["text", "lower"] == pytest.approx(1 / 3)  # layer 2 of 0..4 is below 2.5
    assert table["null"].tolist() == pytest.approx([0.6, 0.6])
    assert table.loc["image", "p"] == pytest.approx(hypergeom(100, 60, 10).pmf(10))
    assert table.loc["text", "p"] == pytest.approx(hypergeom(100, 60, 9).sf(2))
    low, high = hypergeom(100, 60, 10).interval(0.95)
    assert table.loc["image", ["null_low", "null_high"]].tolist() == [low / 10, high / 10]


# --- silencing -----------------------------------------------------------------------------------


def medium(mllm) -> str:
    return "image" if "image" in mllm.kinds else "audio"


def test_distances_are_the_models(mllm, samples):
    kind, rows = medium(mllm), Rows(samples * 2)
    table = room.distances(mllm, rows, [kind], n_boot=7, tokens_per_kind=3, seed=1, batch_size=3)
    assert table.dims == ("kind", "draw", "layer") and table.shape == (1, 8, mllm.n_layers + 1)
    part = hidden_states(mllm, rows, tokens_per_kind=3, seed=1, batch_size=3).of("text", kind)
    own = (part.tokens["kind"] == kind).to_numpy()[None]
    expected = [clouds.centroid_distance(x, 1.0 * ~own, 1.0 * own)[0] for x in part.hidden]
    np.testing.assert_allclose(table.sel(kind=kind)[0], expected, rtol=1e-4)
    assert (table.sel(kind=kind)[1:].std("draw") > 0).all()


def test_distances_with_neurons_silenced_in_pairs(mllm, samples):
    kind, rows = medium(mllm), Rows(samples * 2)
    neurons, before = random_neurons(mllm, 0.5), footprints(mllm)
    how = {"n_boot": 5, "tokens_per_kind": 3}
    silenced = room.distances(mllm, rows, [kind], neurons, **how)
    assert footprints(mllm) == before
    with deactivate(mllm, neurons):
        xr.testing.assert_allclose(room.distances(mllm, rows, [kind], **how), silenced, rtol=1e-4)
    plain = room.distances(mllm, rows, [kind], **how)
    # The embeddings are the same in every resampling, so the draws are the same samples.
    np.testing.assert_allclose(plain.isel(layer=0), silenced.isel(layer=0), rtol=1e-5)
    assert (abs(plain - silenced).isel(layer=-1) > 1e-6).all()


def curves_of(rows) -> xr.DataArray:
    return xr.DataArray(np.array([rows], float), {"kind": ["image"]}, ("kind", "draw", "layer"))


BASE = np.array([4, 2, 0, 0.0])  # half of the convergence is done in layer 1
LATE = np.array([4, 4, 2, 0.0])  # in layer 2


def test_silencing_beside_random_draws():
    before = curves_of([BASE] * 5)
    after = {"text": curves_of([LATE] * 5), "image": curves_of([BASE] * 5)}
    null = [curves_of([BASE + [0, 0.01 * i, 0, 0]]) for i in range(-9, 10)]
    moved, steps = room.silenced(before, after, null)
    at = moved.set_index(["silenced", "change"])
    assert at.loc[("text", "layer"), ["value", "low", "high"]].tolist() == [1, 1, 1]
    assert at.loc[("text", "distance"), "value"] == 1
    assert at.loc[("text", "layer"), "p"] == 1 / 20
    words = {i: v.word for i, v in at["verdict"].items()}
    assert words == {
        ("text", "layer"): HOLDS,
        ("text", "distance"): HOLDS,
        ("image", "layer"): FAILS,
        ("image", "distance"): FAILS,
    }
    assert at.loc[("image", "layer"), "p"] == 1
    assert at.loc[("text", "distance"), ["least", "most"]].tolist() == pytest.approx(
        [-0.09 / 4, 0.09 / 4]
    )
    text = steps[steps["modality"] == "text"]
    assert text["value"].tolist() == [0, 2, 2, 0] and text["layer"].tolist() == [0, 1, 2, 3]
    band = steps[steps["modality"] == "random"].iloc[1]
    assert [band["low"], band["high"]] == pytest.approx([-0.09, 0.09])


def test_intervals_resample_in_pairs():
    """Draws that differ widely, and change alike: the interval of the change is a point."""
    wide = np.stack([BASE * f for f in (1, 0.2, 3, 5)])
    moved, _ = room.silenced(curves_of(wide), {"m": curves_of(wide + 1)}, [curves_of([BASE])] * 19)
    line = moved.set_index("change").loc["distance"]
    assert line[["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1])


def test_a_model_without_convergence_cannot_be_told():
    flat = curves_of([[1, 2, 3, 4.0]] * 4)
    moved, _ = room.silenced(flat, {"m": flat}, [flat] * 19)
    line = moved.set_index("change").loc["layer"]
    assert np.isnan(line["value"]) and line["verdict"].word == UNKNOWN and np.isnan(line["p"])


def test_the_claims_as_sentences():
    parts = [
        tables([4, 1, 1, 1, 0.9], (0.4, 0.8)),
        tables([4, 1, 1, 1, 0.9], (0.4, 0.8), "accuracy"),
        tables([1, 2, 3, 4, 5], (np.nan, np.nan), "silhouette"),
        tables([4, 1, 1, 1, 0.9], (0.4, 0.8), pair="text-special"),
    ]
    curves, layers = (pd.concat(p, ignore_index=True) for p in zip(*parts, strict=True))
    mask = xr.DataArray(np.ones((1, 4, 3), bool), dims=("modality", "layer", "neuron"))
    sits = room.lower_share({"image": mask})
    base = curves_of([BASE] * 5)
    moved, _ = room.silenced(base, {"image": curves_of([LATE] * 5)}, [base] * 19)
    lines = room.claims(room.verdicts(curves, layers), sits, moved, 4)
    table = inference.claims_table("II", lines)
    assert len(table) == 1 + 3 + 1 + 2  # special is no medium
    assert table.loc[0, "measured"] == "2 of 3 measures of text and media hold"
    assert table.loc[0, "verdict"].startswith(HOLDS)
    assert table.loc[1, "measured"] == "4.00 to 0.90, half done in layer 0.6 [0.4, 0.8]"
    assert table.loc[1, "null"] == "steady: layer 2; shuffled: 0.10"
    assert table.loc[3, "measured"] == "1.00 to 1.00, never nearer"
    assert table.loc[3, "verdict"].startswith(FAILS)
    assert table.loc[4, "claim"] == "image neurons sit in the lower layers"
    assert table.loc[4, "measured"] == "0.50 of 12 in the lower half"
    assert table.loc[4, "verdict"].startswith(FAILS)  # all neurons sit as they must
    assert (
        table.loc[5, "claim"]
        == "silencing image neurons moves the layer of convergence of text-image"
    )
    assert table.loc[5, "measured"] == "+1.00 [+1.00, +1.00]"
    assert table.loc[5, "null"] == "random: +0.00 to +0.00"
