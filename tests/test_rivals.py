"""Rivals side by side: what they name, what it costs, how far they agree."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import Rows, samples_for, shared_mllm
from scipy.stats import spearmanr

from minerlib import selectors
from minerlib.findings import rivals, specificity
from minerlib.selectors import SELECTORS


@dataclass(frozen=True)
class Of(Rows):
    """Rows about one medium."""

    modality: str = "text"

    @property
    def spec(self) -> SimpleNamespace:
        return SimpleNamespace(modality=self.modality)


def made(names=("a", "b"), modalities=("text", "image"), seed=0) -> xr.DataArray:
    shape = len(names), len(modalities), 2, 30
    values = np.random.default_rng(seed).random(shape).astype(np.float32)
    coords = {"selector": list(names), "modality": list(modalities), "layer": range(2)}
    return xr.DataArray(values, coords, ("selector", "modality", "layer", "neuron"), "ranks")


def test_as_many_neurons_of_each_by_rank():
    ranks = made()
    ranks[1, 0] = np.nan  # has none for text
    mask = rivals.named(ranks, 7)
    assert mask.sum(("layer", "neuron")).values.tolist() == [[7, 7], [0, 7]]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        own = ranks.values[i, j]
        assert own[mask.values[i, j]].min() > own[~mask.values[i, j]].max()
    sets = rivals.sets(mask.astype("int8"))  # as it comes from a file
    assert {name: [*of] for name, of in sets.items()} == {"a": ["text", "image"], "b": ["image"]}
    assert sets["b"]["image"].dims == ("modality", "layer", "neuron")
    assert sets["b"]["image"].modality.values.tolist() == ["image"]


def test_some_selectors_beside_those_of_the_claims():
    assert rivals.asked(None) == list(SELECTORS)
    need = ["miner", "LAPE", "loudness", "attribution"]
    assert rivals.asked([]) == need and rivals.asked(["miner"]) == need
    some = [*need[:1], "contrast", *need[1:], "weight norm"]
    assert rivals.asked("weight norm,contrast") == rivals.asked(["contrast", "weight norm"]) == some
    with pytest.raises(ValueError, match=r"selectors=\['contrast', 'lape'\]: no 'lape'; use some"):
        rivals.asked("contrast, lape")


def test_a_neurons_place_by_every_selector():
    values = made()[0].drop_vars("selector")
    values[0, 1, 3] = 9.0  # first of all for text
    ranks = xr.concat([selectors.ranked(values)[0].drop_vars("metric")] * 2, "selector")
    ranks = ranks.assign_coords(selector=["a", "b"])
    ranks[1, 1] = np.nan  # b has none for image
    order = np.argsort(-values.values[1], axis=None)
    last = tuple(map(int, divmod(order[-1], 30)))
    one, other = rivals.places(ranks, [(1, 3), last]).values()
    assert one.keys() == other.keys() == {"a, text", "a, image", "b, text"}
    assert one["a, text"] == one["b, text"] == 1 and other["a, image"] == 60
    assert one["a, image"] == 1 + np.flatnonzero(order == 33)[0]


def test_overlap_and_repetition():
    mask = rivals.named(made(), 20)
    sets = rivals.sets(mask)
    table = rivals.overlap(sets)
    x, y = mask.values
    by_hand = np.mean([(x[j] & y[j]).sum() / (x[j] | y[j]).sum() for j in (0, 1)])
    assert table.loc["a", "a"] == 1 and table.loc["a", "b"] == table.loc["b", "a"]
    assert table.loc["a", "b"] == pytest.approx(by_hand)
    other = rivals.sets(rivals.named(made(seed=1), 20))
    again = rivals.repeated(sets, other)
    z = rivals.named(made(seed=1), 20).values
    assert again["a"] == pytest.approx(np.mean([(x[j] & z[0, j]).sum() / 20 for j in (0, 1)]))
    assert (rivals.repeated(sets, sets) == 1).all()


def test_half_of_a_sample_is_named():
    mask = rivals.named(made(), 5)
    index = rivals.sample(mask, 30, seed=2)
    named = mask.values.any((0, 1)).ravel()
    assert len(set(index.tolist())) == 30 and named[index].sum() == 15
    few = rivals.sample(rivals.named(made(), 1), 30)
    assert len(few) == 30  # where fewer are named, more of the others


def test_agreement_is_spearmans_on_the_benchmarks_of_the_modality():
    ranks, rng = made(), np.random.default_rng(3)
    ranks[1, 0], ranks[1, 1] = np.nan, 0.5
    index = np.arange(40)
    costs = pd.DataFrame(rng.random((40, 3)), columns=["t", "i", "j"])
    media = {"t": "text", "i": "image", "j": "image"}
    table = rivals.agreement(ranks, index, costs, media).set_index(["selector", "modality"])
    value = ranks.values[0, 1].ravel()[index]
    own = spearmanr(value, costs[["i", "j"]].mean(axis=1)).statistic
    assert table.loc[("a", "image"), "own"] == pytest.approx(own)
    assert table.loc[("a", "image"), "everything"] == pytest.approx(
        spearmanr(value, costs.mean(axis=1)).statistic
    )
    assert ("b", "text") not in table.index and np.isnan(table.loc[("b", "image"), "own"])


def test_losses_of_a_selector():
    n = 60

    def table(left):
        parts = [pd.DataFrame({"benchmark": b, "row": range(n), "medium": range(n), "chance": 0.0,
                               "score": (np.arange(n) < x * n).astype(float)})
                 for b, x in left.items()]  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    before = table({"sees": 1.0, "hears": 1.0})
    silenced = {
        "image": table({"sees": 0.0, "hears": 0.5}),
        "audio": table({"sees": 1.0, "hears": 0.2}),
    }
    media = {"sees": "image", "hears": "audio"}
    found = rivals.losses(before, silenced, media)
    assert found["cost"] == pytest.approx((1 + 0.5 + 0 + 0.8) / 4)
    assert found["own"] == pytest.approx(0.9) and found["others"] == pytest.approx(0.25)
    assert found["interaction"] == pytest.approx(
        specificity.interaction(before, silenced, media).mean
    )
    assert found["low"] < found["interaction"] < found["high"]


def test_every_selector_ranks_every_neuron():
    """Activity of either unit from one pass; what does not ask for it is there once."""
    mllm = shared_mllm("tiny-qwen2-vl")
    pictures = [s for s in samples_for(mllm) if s.image is not None]
    texts = [s for s in samples_for(mllm) if s.benchmark == "text"]
    rows = {
        "pictures": Of(pictures, modality="image"),
        "texts": Of(texts),
    }
    seen = rivals.evidence(mllm, rows, ["text", "image"], steps=1)
    whole = seen["written"].sums("absolute").sel(modality="text")
    apart = [
        of.sel(statistic="absolute", modality="text") for of in seen["written"].domains.values()
    ]
    np.testing.assert_allclose(whole, sum(x.values for x in apart), rtol=1e-5)
    assert seen["activation"].media == {"pictures": "image", "texts": "text"}
    found = rivals.ranks(mllm, rows, ["text", "image"], steps=1)
    names = found.selector.values.tolist()
    assert set(SELECTORS) < set(names) and "loudness, written" in names
    assert not {"miner, written", "weight norm, written", "CAN, written", "random, written"} & set(
        names
    )
    assert (found.max(("layer", "neuron")) <= 1).all()


def test_a_selector_has_numbers_for_all_neurons_or_none(monkeypatch):
    """NaN at a few would make their modality's ranks all NaN, and leave the selector out."""
    few, seen = made()[0].drop_vars("selector"), {"activation": None, "written": None}
    few[1, 0, :3] = np.nan
    selectors_ = {"odd": lambda _: few, "none": lambda _: few[[0]]}
    monkeypatch.setattr(rivals, "SELECTORS", selectors_)
    with pytest.raises(ValueError, match="selector 'odd' is NaN at 3 of 60 neurons for 'image'"):
        rivals.values(seen)
    few[1] = np.nan
    assert list(rivals.values(seen)) == ["odd", "none"]


def test_a_selector_takes_the_passes_whose_results_it_looks_at():
    mllm = shared_mllm("tiny-qwen2-vl")
    seen = rivals.evidence(mllm, {"a": Of(samples_for(mllm)[:1])}, ["text"], steps=1)
    passes = {"scoring (stage 2)": 1.0, "activity of rivals": 10.0, "gradients of rivals": 100.0}
    found = rivals.price(seen["activation"], passes)
    told = {"miner": 1, "contrast": 1, "LAPE": 10, "MMNeuron": 10, "loudness": 10, "CAN": 100}
    assert found[[*told]].to_dict() == told
    assert found["weight norm"] == found["random"] == 0 and set(found.index) == set(SELECTORS)
