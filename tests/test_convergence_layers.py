"""Finding II beyond its measures: where the approach is done, where neurons sit, what moves it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import Rows, footprints, random_neurons
from made import MOST, states_of, table_of
from scipy.stats import hypergeom

from minerlib import inference
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings import convergence as room
from minerlib.findings.states import States, hidden_states

RNG = np.random.default_rng


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
    curves = room.convergence(found, ["text", "image", "video"], n_boot=20, n_null=20)
    assert set(curves["pair"]) == {"text-image"}
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


# --- the lower half, the upper half ---------------------------------------------------------------


def curves_of(*kinds, names=("image", "video")) -> xr.DataArray:
    """Distances [kind, draw, layer] from a list of draws for each kind."""
    coords = {"kind": list(names[: len(kinds)])}
    return xr.DataArray(np.array(kinds, float), coords, ("kind", "draw", "layer"))


@pytest.mark.parametrize(
    ("curve", "value"),
    [
        ([9, 4, 1, 1], 3 / 4),  # layers 1, 2, 3: the middle is 2: falls by 3, then by 0
        ([9, 4, 4, 1], -3 / 4),
        ([0, 4, 2, 0], 0),
        ([0, 4, 3, 1, 0], ((4 - 2) - (2 - 0)) / 4),  # the middle between layers 2 and 3
        ([0, 4, 0, 0, 0], 4 / 4),
        ([5, 5, 5, 5], 0),
    ],
)
def test_lower_less_upper(curve, value):
    effect, null = room.lower_less_upper(curves_of([curve] * 3), 2)
    assert effect[:3] == pytest.approx((value,) * 3) and not null.size


def test_lower_less_upper_averages_kinds_and_keeps_resamplings_from_the_null():
    image = [[0, 4, 1, 1], [0, 4, 2, 1], [0, 0.4, 0.4, 0.1]]
    video = [[0, 2, 2, 1], [0, 2, 1, 1], [0, 0.2, 0.1, 0.1]]
    effect, null = room.lower_less_upper(curves_of(image, video), 1)
    assert effect.mean == pytest.approx((3 / 4 - 1 / 2) / 2)
    assert effect.low == effect.high == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert null == pytest.approx([((-0.3) / 4 + 0.1 / 2) / 2])  # over where the kinds do start


def early(seed: int, apart=(8, 8, 2, 1, 1), n: int = 24) -> States:
    """Two round clouds that come together early."""
    kinds, samples = table_of({"text": 3, "image": 3}, n)
    noise = RNG(seed).standard_normal((len(apart), len(kinds), 4))
    noise[:, np.array(kinds) == "image", 0] += np.array(apart, float)[:, None]
    return states_of(noise, kinds, samples)


def test_an_early_approach_is_found_and_exchanged_kinds_show_none():
    found = room.distances(early(0), ["image"], n_boot=200, n_null=199)
    effect, null = room.lower_less_upper(found, 200)
    assert effect.low > 0.3 and effect.low < effect.mean < effect.high
    assert abs(null.mean()) < 0.05 and null.size == 199
    late = room.distances(early(0, (8, 8, 8, 8, 1)), ["image"], n_boot=50)
    assert room.lower_less_upper(late, 50)[0].high < 0


@pytest.mark.slow
def test_the_level_under_no_difference():
    """Clouds of one kind, called two: at most one in twenty looks early."""
    rejected = 0
    for seed in range(200):
        found = room.distances(early(seed, (0, 0, 0, 0), n=10), ["image"], n_null=39)
        effect, null = _effect(found)
        rejected += inference.rank_p(effect, null, "greater") < 0.05
    assert rejected <= MOST


def _effect(found: xr.DataArray) -> tuple[float, np.ndarray]:
    effect, null = room.lower_less_upper(xr.concat([found[:, :1], found], "draw"), 1)
    return effect.mean, null


def test_words_stand_where_the_medium_stood(mllm, samples):
    kind = medium(mllm)
    look = {"tokens_per_kind": 60, "equal": False, "seed": 0}
    found = hidden_states(mllm, samples, **look)
    words = room.in_words(mllm, samples, found, [kind], **look)
    assert set(words.tokens["kind"]) == {"text", "special", room.PLACE}
    lengths = found.tokens[found.tokens["kind"] == kind].groupby("sample")["run"].first()
    for i, (_, length) in enumerate(lengths.items()):
        placed = words.tokens[(words.tokens["sample"] == i) & (words.tokens["kind"] == room.PLACE)]
        assert 0 < len(placed) <= length
        assert placed["position"].diff().dropna().eq(1).all()  # one run of tokens
        text = words.tokens[(words.tokens["sample"] == i) & (words.tokens["kind"] == "text")]
        assert text["position"].max() > placed["position"].max()  # the question comes after


def test_the_medium_behind_the_question(mllm, samples):
    kind = medium(mllm)
    some = [s for s in samples if getattr(s, kind) is not None]
    turned = room.behind(some)
    assert all(
        s.behind and replace(s, behind=False) == t for s, t in zip(turned, some, strict=True)
    )
    placeholder = mllm.token_ids[kind][0]
    for a, b in zip(some, turned, strict=True):
        first, second = (mllm.encode([s])["input_ids"][0].tolist() for s in (a, b))
        assert sorted(first) == sorted(second)
        assert second.index(placeholder) > first.index(placeholder)


# --- neurons -------------------------------------------------------------------------------------


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
    assert table["chance"].tolist() == pytest.approx([0.6, 0.6])
    effect, draws = room.low(table.reset_index(), 100)
    assert effect[:3] == pytest.approx(((0.4 + 1 / 3 - 0.6) / 2,) * 3)
    assert draws.mean() == pytest.approx(0, abs=0.01)
    a, b = hypergeom(100, 60, 10), hypergeom(100, 60, 9)
    assert draws.std() == pytest.approx(np.hypot(a.std() / 10, b.std() / 9) / 2, rel=0.03)


def medium(mllm) -> str:
    return "image" if "image" in mllm.kinds else "audio"


def test_distances_are_the_models(mllm, samples):
    kind, rows = medium(mllm), Rows(samples * 2)
    how = {"tokens_per_kind": 3, "seed": 1, "batch_size": 3, "normed": True}
    table = room.silenced_distances(mllm, rows, [kind], n_boot=7, **how)
    assert table.dims == ("kind", "draw", "layer") and table.shape == (1, 8, mllm.n_layers + 1)
    part = hidden_states(mllm, rows, **how).of("text", kind)
    own = (part.tokens["kind"] == kind).to_numpy()[None]
    expected = [clouds.centroid_distance(x, 1.0 * ~own, 1.0 * own)[0] for x in part.hidden]
    np.testing.assert_allclose(table.sel(kind=kind)[0], expected, rtol=1e-4)
    assert (table.sel(kind=kind)[1:].std("draw") > 0).all()


def test_distances_with_neurons_silenced_in_pairs(mllm, samples):
    kind, rows = medium(mllm), Rows(samples * 2)
    neurons, before = random_neurons(mllm, 0.5), footprints(mllm)
    how = {"n_boot": 5, "tokens_per_kind": 3}
    silenced = room.silenced_distances(mllm, rows, [kind], neurons, **how)
    assert footprints(mllm) == before
    with deactivate(mllm, neurons):
        again = room.silenced_distances(mllm, rows, [kind], **how)
    xr.testing.assert_allclose(again, silenced, rtol=1e-4)
    plain = room.silenced_distances(mllm, rows, [kind], **how)
    # The embeddings are the same in every resampling, so the draws are the same samples.
    np.testing.assert_allclose(plain.isel(layer=0), silenced.isel(layer=0), rtol=1e-5)
    assert (abs(plain - silenced).isel(layer=-1) > 1e-6).all()


def sets_of(kind: str, curves: list) -> xr.DataArray:
    """One curve per set of neurons, the same under three resamplings."""
    return xr.concat([curves_of([x] * 3).assign_coords(kind=[kind]) for x in curves], "set")


def test_silencing_beside_random_draws():
    """Changes of +2 and -1 at layers 1 and 2, over a start of 4, do not cancel."""
    base = [9, 4, 3, 2]
    sets = [base, [9, 6, 2, 2], [9, 4, 3, 2.4], [9, 4, 3, 1.2]]
    apart = {"image": sets, "video": [[0, 2, 2, 2]] * 4}
    effect, null, steps = room.moved({k: sets_of(k, x) for k, x in apart.items()})
    draws = np.array([0.4 / 3 / 4, 0.8 / 3 / 4]) / 2
    assert effect[:3] == pytest.approx(((3 / 3 / 4) / 2 - draws.mean(),) * 3)
    assert null == pytest.approx(draws - draws.mean())
    own = steps[(steps["kind"] == "image") & (steps["what"] == "own")]
    assert own["value"].tolist() == [0, 2, -1, 0] and own["layer"].tolist() == [0, 1, 2, 3]
    band = steps[(steps["kind"] == "image") & (steps["what"] == "random")].iloc[3]
    assert [band["value"], band["low"], band["high"]] == pytest.approx([-0.2, -0.8, 0.4])


def test_intervals_resample_in_pairs():
    """Draws that differ widely, and change alike: the interval of the change is a point."""
    wide = np.stack([np.array([1, 4, 2, 4.0])] * 4) + np.arange(4)[:, None] * [0, 0, 9, 5]
    apart = xr.concat([curves_of(x) for x in (wide, wide + [0, 0, 1, 0], *[wide] * 20)], "set")
    effect, *_ = room.moved({"image": apart})
    assert effect[:3] == pytest.approx((1 / 3 / 4,) * 3)
