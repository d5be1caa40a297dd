"""Whose neurons are needed for what, on answers whose truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from minerlib.findings.specificity import (
    answerable,
    at_own_tokens,
    by_contrast,
    by_layer,
    contrasts,
    costlier,
    crossing,
    in_two,
    interaction,
    interactions,
    more_specific,
    pairwise,
    rounds,
    without,
)

BENCHMARKS = ("sees", "hears", "reads")
CHANCES = {"sees": 0.0, "hears": 0.2, "reads": 0.25}
N = 200


def answers(right: dict[str, float], seed: int = 0) -> pd.DataFrame:
    """Scores of 0 and 1, as many right as said, two rows about each medium."""
    rng = np.random.default_rng(seed)
    parts = []
    for name in BENCHMARKS:
        score = (np.arange(N) < right[name] * N).astype(float)
        rng.shuffle(score)
        table = {
            "benchmark": name,
            "row": range(N),
            "score": score,
            "prompt": "?",
            "chance": CHANCES[name],
        }
        parts.append(pd.DataFrame(table | {"references": "x", "medium": np.arange(N) // 2}))
    return pd.concat(parts, ignore_index=True)


BEFORE = answers({"sees": 0.9, "hears": 0.8, "reads": 0.65})
NEITHER = answers({"sees": 0.45, "hears": 0.5, "reads": 0.45}, 1)


def test_shares_of_what_is_above_chance():
    table = crossing(BEFORE, {"a": BEFORE, "b": NEITHER}).set_index(["silenced", "benchmark"])
    assert (table.loc["a", "lost"] == 0).all()
    assert table.loc["b", "lost"].to_dict() == pytest.approx(
        {"sees": 0.45 / 0.9, "hears": 0.3 / 0.6, "reads": 0.2 / 0.4}
    )
    assert ((table["low"] < table["lost"]) & (table["lost"] < table["high"])).all()
    assert (table["high"] - table["low"]).max() < 0.5


def test_the_interaction_by_hand():
    own = answers({"sees": 0.0, "hears": 0.8, "reads": 0.65}, 2)  # takes all of `sees` alone
    other = answers({"sees": 0.9, "hears": 0.2, "reads": 0.25}, 3)  # takes all of the others
    media = {"sees": "image", "hears": "audio", "reads": "audio"}
    both = {"image": own, "audio": other}
    assert interaction(BEFORE, both, media).mean == pytest.approx(2)
    turned = dict(zip(both, [other, own], strict=True))
    assert interaction(BEFORE, turned, media).mean == pytest.approx(-2)
    found = interaction(BEFORE, {"image": NEITHER, "audio": own}, media)
    assert found.mean == pytest.approx((0.5 - 1) - (0.5 - 0))
    same = interaction(BEFORE, {"image": NEITHER, "audio": NEITHER}, media)
    assert same.mean == 0 and same.low < 0 < same.high
    assert more_specific(BEFORE, both, turned, media).mean == pytest.approx(4)
    alike = more_specific(BEFORE, both, both, media)
    assert alike.mean == 0 and alike.low < 0 < alike.high


def test_the_mean_over_pairs_of_modalities():
    """Of three, each benchmark's own set against the two others', pair by pair."""
    media = {"sees": "image", "hears": "audio", "reads": "text"}
    takes = {
        m: answers({**{"sees": 0.9, "hears": 0.8, "reads": 0.65}, name: least}, i)
        for i, (name, m, least) in enumerate(
            [("sees", "image", 0.0), ("hears", "audio", 0.5), ("reads", "text", 0.65)]
        )
    }
    lost = {"image": 1.0, "audio": 0.5, "text": 0.0}  # each on its own benchmark alone
    found = pairwise(BEFORE, takes, media).set_index("pair")["interaction"].to_dict()
    pairs = {"image, audio": 1.5, "image, text": 1.0, "audio, text": 0.5}
    assert found == pytest.approx(pairs)
    assert interaction(BEFORE, takes, media).mean == pytest.approx(np.mean([*pairs.values()]))
    weights = contrasts([*takes, "special"], media)
    assert weights.loc["special"].eq(0).all() and weights.sum().abs().max() < 1e-12
    assert sum(weights.loc[m, n] * lost[m] for n, m in media.items()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="two modalities need both"):
        contrasts(["image"], media)


def test_what_costs_everything_alike_has_none():
    """A set that costs twice as much everywhere is important, and not specific."""
    more = answers({"sees": 0.0, "hears": 0.2, "reads": 0.25}, 4)
    media = {"sees": "image", "hears": "audio", "reads": "audio"}
    found = interaction(BEFORE, {"image": more, "audio": NEITHER}, media)
    assert found.mean == pytest.approx(0, abs=1e-12) and found.low > -0.3 and found.high < 0.3
    cost = costlier(BEFORE, {"image": more}, {"image": NEITHER, "audio": BEFORE})
    assert cost.mean == pytest.approx(1 - 0.25)


def test_at_its_own_tokens_and_elsewhere():
    media = {"sees": "image", "hears": "audio", "reads": "text"}
    silent = answers({"sees": 0.0, "hears": 0.2, "reads": 0.25}, 5)
    own, elsewhere = {"image": silent, "audio": BEFORE}, {"image": BEFORE, "audio": NEITHER}
    assert at_own_tokens(BEFORE, own, elsewhere, media).mean == pytest.approx((1 - 0.5) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("score", "guess"), [(0.9, 0.0), (0.65, 0.25)])
def test_intervals_hold_the_truth_in_nineteen_of_twenty(score, guess):
    """Rows about one medium go together; a's neurons cost 0.3 more on one benchmark alone."""
    rng, held = np.random.default_rng(0), []
    media = {"sees": "image", "hears": "audio", "reads": "audio"}
    for _ in range(150):
        tables = []
        for drop in ({}, {"sees": 0.35}, {"sees": 0.05}):
            right = [np.repeat(rng.random(60), 2) < score - drop.get(k, 0) for k in BENCHMARKS]
            about = {"benchmark": np.repeat(BENCHMARKS, 120), "row": np.tile(range(120), 3)}
            about |= {"medium": np.tile(range(120), 3) // 2, "chance": guess}
            tables.append(pd.DataFrame(about | {"score": np.concatenate(right).astype(float)}))
        before, own, other = tables
        found = interaction(before, {"image": own, "audio": other}, media)
        held.append(found.low <= 0.3 / (score - guess) <= found.high)
    assert 0.91 <= np.mean(held) <= 0.995


def test_in_nats_of_rounds():
    media = {"sees": "image", "hears": "audio", "reads": "audio"}
    told = pd.DataFrame(
        {
            "neurons": np.repeat(range(4), 3),
            "benchmark": BENCHMARKS * 4,
            "logprob": [-5, -1, -1, -2, -3, -2, -1, -1, -1, -1, -1, -1.0],
        }
    )
    found = interactions(told, ["image", "audio"], media)
    assert found.tolist() == pytest.approx([3 - (-2 + -1) / 2, 0])
    with pytest.raises(ValueError, match="3 sets of neurons are no rounds of 2"):
        interactions(told[told["neurons"] < 3], ["image", "audio"], media)


# --- sets of neurons -----------------------------------------------------------------------------


def one(*flat: int, shape=(2, 5)) -> xr.DataArray:
    mask = np.zeros((1, *shape), bool)
    mask.reshape(-1)[list(flat)] = True
    return xr.DataArray(mask, {"modality": ["m"], "layer": range(shape[0])},
                        ("modality", "layer", "neuron"))  # fmt: skip


def test_shared_neurons_and_overlap_by_layer():
    sets = {"a": one(0, 1, 5), "b": one(1, 2, 6), "c": one(9)}
    both = in_two(sets)
    assert np.flatnonzero(both).tolist() == [1]
    left = without(sets, both)
    assert [np.flatnonzero(x).tolist() for x in left.values()] == [[0, 5], [2, 6], [9]]
    table = by_layer(sets).set_index(["pair", "layer"])["overlap"]
    assert table["a, b"].tolist() == [1 / 3, 0]
    assert np.isnan(by_layer({"a": one(0), "b": one(1)})["overlap"].iloc[1])


def test_contrast_is_with_the_largest_other():
    rng = np.random.default_rng(0)
    coords = {"metric": ["mean", "max"], "modality": ["a", "b", "c"], "layer": range(2)}
    scores = xr.DataArray(
        rng.random((2, 3, 2, 5)), coords, ("metric", "modality", "layer", "neuron")
    )
    weights = {"mean": 0.25, "max": 0.75}
    value = 0.25 * scores.values[0] + 0.75 * scores.values[1]
    expected = value[1] - np.maximum(value[0], value[2])
    found = by_contrast(scores, weights)
    np.testing.assert_allclose(found.sel(metric="mean", modality="b"), expected, atol=1e-6)
    np.testing.assert_allclose(found.sel(metric="max", modality="b"), expected, atol=1e-6)


def test_rounds_of_partners_are_outside_all_sets():
    """Nor of those that are left out; each round of as many, for the same neurons, as loud."""
    rng = np.random.default_rng(0)
    shape = 2, 400
    loud = xr.DataArray(rng.lognormal(size=(2, 2, *shape)), {"statistic": ["mean", "max"],
                        "modality": ["a", "b"], "layer": range(2)},
                        ("statistic", "modality", "layer", "neuron"))  # fmt: skip
    sets = {
        "a": one(*range(0, 60), shape=shape).assign_coords(modality=["a"]),
        "b": one(*range(60, 120), shape=shape).assign_coords(modality=["b"]),
    }
    spared = one(*range(120, 150), shape=shape)
    found, pairs = rounds(sets, loud, 3, seed=1, outside=[spared])
    assert len(found) == 2 * (1 + 3) and len(pairs) == 120
    for own, (m, of) in zip(found[:2], sets.items(), strict=True):
        there = pairs[(pairs["modality"] == m) & (pairs["partner"] >= 0)]
        assert own.sum() == len(there) > 30 and not (own & ~of).any()
    for i, drawn in enumerate(found[2:]):
        assert not drawn.values.ravel()[:150].any()
        assert 0.8 * found[i % 2].sum() <= drawn.sum() <= found[i % 2].sum()
    assert not found[2].equals(found[4])
    with pytest.raises(ValueError, match="none of the neurons of .'a', 'b'. has a partner"):
        rounds(sets, loud, 1, outside=[one(*range(800), shape=shape)])


def test_what_cannot_be_asked_is_named():
    flat = answers({"sees": 0.9, "hears": 0.2, "reads": 0.65})
    with pytest.raises(ValueError, match="hears: the score as it is is not surely above chance"):
        crossing(flat, {"a": NEITHER})
    assert answerable(flat) == ["sees", "reads"]
    with pytest.raises(ValueError, match="two modalities need both"):
        interaction(BEFORE, {"image": NEITHER}, {"sees": "image", "hears": "audio"})
