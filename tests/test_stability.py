"""Stability: scores put together from blocks, overlaps whose values are known, changed rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import Rows, samples_for
from scipy import stats

from minerlib.aggregation import aggregate
from minerlib.findings import stability
from minerlib.inference import Estimate
from minerlib.scoring import score
from minerlib.separation import SETS


def one(*flat: int, size: int = 20) -> xr.DataArray:
    mask = np.isin(np.arange(size), flat).reshape(1, 2, -1)
    return xr.DataArray(mask, {"modality": ["m"], "layer": range(2)},
                        ("modality", "layer", "neuron"))  # fmt: skip


def test_blocks_are_equal_and_the_first_is_cut_again():
    assert stability.cuts(96) == [1, 2, 5, 10, 12, 24, 36, 48, 60, 72, 84, 96]
    assert stability.cuts(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert stability.cuts(500)[:6] == [1, 2, 5, 10, 20, 50]
    assert all(b > a for n in range(8, 60) for a, b in pairwise(stability.cuts(n)))
    with pytest.raises(ValueError, match="limit=7: stability is measured on at least 8 rows"):
        stability.cuts(7)


def test_pooled_blocks_are_the_scores_of_all_their_rows(mllm):
    samples = samples_for(mllm)
    whole = score(mllm, Rows(samples))
    blocks = [score(mllm, Rows(samples[a:b])) for a, b in ((0, 1), (1, 3), (3, len(samples)))]
    found = stability.pooled(blocks)
    torch.testing.assert_close(
        torch.tensor(found.values), torch.tensor(whole.values), atol=2e-5, rtol=0
    )
    assert found.samples.equals(whole.samples) and found.attrs["rows"] == len(samples)
    np.testing.assert_allclose(found.activation_mean, whole.activation_mean, atol=1e-5)
    np.testing.assert_allclose(found.activation_min, whole.activation_min, atol=1e-5)
    total = stability.of_rows({"rows": blocks}, [0, 1, 2])
    np.testing.assert_allclose(total, aggregate([whole]), atol=2e-5)


def made(blocks: int = 8, seed: int = 0, noise: float = 1.0) -> list[xr.DataArray]:
    """Blocks of one benchmark: image and text, whose true scores differ, with noise."""
    truth, rng = np.random.default_rng(7).random((1, len(SETS), 2, 50)), np.random.default_rng(seed)
    held = np.isin(SETS, ["text", "image"])
    out = []
    for _ in range(blocks):
        values = (truth + noise * rng.random(truth.shape)) * held[:, None, None]
        coords = {"metric": ["mean"], "modality": list(SETS), "layer": range(2)}
        coords |= {"samples": ("modality", 3 * held), "activation_min": ("layer", np.zeros(2))}
        coords |= {"activation_mean": (("layer", "neuron"), np.zeros((2, 50)))}
        dims = ("metric", "modality", "layer", "neuron")
        out.append(xr.DataArray(values.astype(np.float32), coords, dims, attrs={"rows": 3}))
    return out


def choose(scores: xr.DataArray, n: int = 10) -> dict[str, xr.DataArray]:
    found = {}
    for m in (m for m in ("text", "image") if scores.samples.sel(modality=m) > 0):
        value = scores.sel(metric="mean", modality=[m])
        found[m] = value.copy(data=value.values >= np.sort(value.values, axis=None)[-n])
    return found


def test_growing_reaches_the_whole():
    mined = {"b": made(12, noise=3.0)}
    ends = stability.cuts(96)
    grown = stability.growing(mined, ends, choose)
    assert grown["rows"].unique().tolist() == ends
    assert (grown[grown["rows"] == 96]["shared"] == 1).all()
    assert grown[grown["rows"] == 1]["shared"].mean() < 0.6
    same = stability.growing({"b": made(12, noise=0.0)}, ends, choose)
    assert (same["shared"] == 1).all() and stability.enough(same) == 1


def test_enough_is_where_no_modality_falls_short_any_more():
    shared = {1: (0.9, 1.0), 2: (1.0, 1.0), 5: (0.96, 0.9), 10: (0.95, 0.97), 20: (1.0, 1.0)}
    lines = [{"rows": n, "modality": m, "shared": x}
             for n, pair in shared.items() for m, x in zip("ab", pair, strict=True)]  # fmt: skip
    assert stability.enough(pd.DataFrame(lines)) == 10


@pytest.mark.slow
def test_halves_of_rows_that_agree_and_of_rows_that_do_not():
    ends = list(range(1, 9))
    exact = stability.halves({"a": made(noise=0.0), "b": made(noise=0.0)}, ends, choose)
    halves = exact[exact["way"] >= 0]
    assert halves["way"].nunique() == 70  # 8 over 4, each half once
    assert (halves[["other", "whole", "benchmarks"]] == 1).all(axis=None)
    whole = exact[exact["way"] == -1].set_index("modality")
    all_rows = choose(stability.of_rows({"a": made(noise=0.0)}, range(8)))
    assert whole["alone"].to_dict() == stability.alone(all_rows)
    noisy = stability.halves({"a": made(noise=5.0)}, ends, choose)
    noisy = noisy[noisy["way"] >= 0]
    assert noisy["other"].mean() < noisy["whole"].mean() < 1
    assert noisy["benchmarks"].isna().all()  # there is but one
    turned = noisy.pivot(index="way", columns="modality", values="other")
    np.testing.assert_allclose(turned, turned[::-1])  # a half and the other one share alike


def test_the_first_block_counts_whole_in_a_half():
    """However it is cut again."""
    fine, ends = {"a": made(12, noise=2.0)}, [1, 2, 5, 10, 12, 24, 36, 48, 60, 72, 84, 96]
    merged = {"a": [stability.pooled(fine["a"][:5]), *fine["a"][5:]]}
    # `made` gives every block as many samples, so that the first weighs five times.
    a = stability.halves(fine, ends, choose)
    b = stability.halves(merged, ends[4:], choose)
    pd.testing.assert_frame_equal(a, b)


def test_shared_and_alone():
    sets = {"a": one(0, 1, 2, 3), "b": one(3, 4)}
    assert stability.shared(sets, {"a": one(1, 2, 9), "c": one(0)}) == {"a": 0.5}
    assert stability.alone(sets) == {"a": 0.75, "b": 0.5}


def test_neurons_of_other_models_are_met_by_the_smaller_set():
    own = {"a": one(0, 1, 2, 3), "b": one(8)}
    theirs = xr.concat([one(3, 4)[0], one(7, 8, 9)[0]], "modality").assign_coords(
        modality=["x", "y"]
    )
    another = theirs.isel(neuron=slice(5))  # a model of another shape
    found = stability.elsewhere(own, {"near": theirs, "far": another})
    assert set(found["model"]) == {"near"}
    wide = found.set_index(["theirs", "modality"])
    assert wide["shared"].to_dict() == {
        ("x", "a"): 0.5, ("x", "b"): 0.0, ("y", "a"): 0.0, ("y", "b"): 1.0,
    }  # fmt: skip
    size = own["a"].size
    assert wide["chance"].to_dict() == pytest.approx(
        {("x", "a"): 4 / size, ("x", "b"): 2 / size, ("y", "a"): 4 / size, ("y", "b"): 3 / size}
    )
    assert stability.elsewhere(own, {}).empty


def test_chance_is_the_share_of_a_layer():
    chosen = {"m": one(*range(0, 5), 10, 11)}  # five of ten, two of ten
    found = stability.by_chance(chosen, 400, seed=1)
    assert len(found) == 400 and np.mean(found) == pytest.approx((5 * 0.5 + 2 * 0.2) / 7, abs=0.02)


def test_an_error_from_halves():
    found = stability.replicated(0.5, [0.4, 0.6])
    wide = stats.t.ppf(0.975, stability.BLOCKS - 1) * 0.1
    assert isinstance(found, Estimate) and found.error == pytest.approx(0.1)
    assert (found.mean, found.low) == (0.5, pytest.approx(0.5 - wide))


def test_half_samples_give_the_error_of_a_mean():
    """Of a mean of eight blocks: its usual standard error, on average."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        x = rng.standard_normal(8)
        ways = [x[list(w)].mean() for w in stability.combinations(range(8), 4)]
        found.append(stability.replicated(x.mean(), ways).error ** 2)
    assert np.mean(found) == pytest.approx(1 / 8, rel=0.08)


@pytest.mark.slow
def test_halves_of_halves_tell_how_much_the_rows_matter():
    """Complementary halves share alike whatever the rows: only within a half does it show."""
    held = {}
    for name, noise in {"little": 0.2, "much": 3.0}.items():
        found = stability.halves({"a": made(noise=noise)}, list(range(1, 9)), choose)
        found = found[found["way"] >= 0]
        by_way = found.groupby("way")[["other", "other within", "whole within"]].mean()
        held[name] = by_way
        assert (by_way["other within"] < by_way["other"]).mean() > 0.5  # a quarter knows less
    errors = {name: stability.spread_of(x["other"].mean(), x["other within"]).error
              for name, x in held.items()}  # fmt: skip
    assert errors["much"] > errors["little"]
    x = held["much"]["other within"]
    found = stability.spread_of(0.6, x)
    assert found.mean == 0.6 and found.error == pytest.approx(x.std(ddof=0))


@pytest.mark.slow
def test_the_interval_of_what_halves_share_holds_the_truth():
    """Where some blocks of rows are far noisier than others, as heavy tails make them."""
    truth = np.random.default_rng(7).random(600)
    rng = np.random.default_rng(0)

    def mined():
        scale = rng.lognormal(0, 0.7, 8)
        return truth + scale[:, None] * 0.5 * rng.standard_normal((8, 600))

    def share(blocks, one, two):
        a, b = (set(np.argsort(-blocks[list(w)].mean(0))[:30]) for w in (one, two))
        return len(a & b) / 30

    def estimate(blocks):
        ways = list(stability.combinations(range(8), 4))
        other = [share(blocks, w, [i for i in range(8) if i not in w]) for w in ways]
        within = [np.mean([share(blocks, q, [i for i in w if i not in q])
                           for q in stability.combinations(w, 2)]) for w in ways]  # fmt: skip
        return stability.spread_of(np.mean(other), within)

    found = [estimate(mined()) for _ in range(60)]
    mean = np.mean([x.mean for x in found])
    assert np.mean([x.low <= mean <= x.high for x in found]) >= 0.9


def test_rows_asked_otherwise(mllm):
    for sample in samples_for(mllm):
        worded = stability.reworded(sample)
        assert (
            worded.prompt.endswith(f"\n{sample.prompt}") and worded.references == sample.references
        )
        assert stability.medium_behind(sample).behind and not sample.behind
        other, again = stability.noise(sample), stability.noise(sample)
        for of, kind in ((lambda x: x.image, "image"), (lambda x: x.video, "video"),
                         (lambda x: x.audio, "audio")):  # fmt: skip
            own, new = of(sample), of(other)
            if own is None:
                assert new is None, kind
                continue
            own, new = np.asarray(own), np.asarray(new)
            assert own.shape == new.shape and own.dtype == new.dtype
            assert not np.array_equal(own, new) and np.array_equal(new, np.asarray(of(again)))
        if sample.audio is not None:
            assert other.audio.std() == pytest.approx(sample.audio.std(), rel=0.05)
    assert set(stability.CHANGES) == {"other words", "medium behind", "noise for the medium"}
