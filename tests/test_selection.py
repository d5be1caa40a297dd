"""Stage 4: the published code's own selections, the strategies by definition, and the nulls."""

from __future__ import annotations

import itertools
import json
import math
import time
from functools import partial

import numpy as np
import pytest
import xarray as xr
from conftest import ROOT

from minerlib.scoring import METRICS
from minerlib.selection import (
    PAPER_WEIGHTS,
    RATIOS,
    STRATEGIES,
    first,
    matched_random,
    overlap,
    select,
    unique,
    weightings,
)

KNOWN = np.load(ROOT / "tests/parity/stage4.npz")
CASES = json.loads(str(KNOWN["cases"]))
NAMES = ("text", "special", "image", "video", "audio")


def as_scores(values: np.ndarray, modalities=NAMES) -> xr.DataArray:
    coords = {
        "metric": list(METRICS),
        "modality": list(modalities),
        "layer": range(values.shape[2]),
    }
    return xr.DataArray(values, coords, ("metric", "modality", "layer", "neuron"))


def random_scores(layers=6, neurons=50, modalities=NAMES[:3], seed=0) -> xr.DataArray:
    rng = np.random.default_rng(seed)
    shape = (len(METRICS), len(modalities), layers, neurons)
    return as_scores(rng.random(shape, np.float32), modalities)


# --- known answers and definitions ---------------------------------------------------------------


def case_name(i: int) -> str:
    case = CASES[i]
    return f"{case['strategy']}-{case['ratio']}-{'/'.join(map(str, case['weights']))}"


@pytest.mark.parametrize("i", range(len(CASES)), ids=case_name)
def test_known_answers(i):
    values, case = KNOWN["scores"], CASES[i]
    scores = as_scores(values, KNOWN["modalities"].tolist())
    mask = select(scores, case["ratio"], case["strategy"], case["weights"])
    expected = np.unpackbits(KNOWN["masks"][i], axis=-1)[..., : values.shape[-1]].astype(bool)
    assert mask.modality.values.tolist() == KNOWN["modalities"].tolist()
    np.testing.assert_array_equal(mask, expected)


def by_definition(v: np.ndarray, budget: int, strategy: str) -> np.ndarray:
    """The strategies one neuron after another; v [modality, layer, neuron]."""
    m, layers, n = v.shape
    mask = np.zeros(v.shape, bool)

    def take(candidates, count):
        for place in sorted(candidates, key=lambda c: -v[c])[:count]:  # stable: ties in order
            mask[place] = True

    if strategy == "adaptive":
        places = [(a, b) for a in range(layers) for b in range(n)]
        for a, b in sorted(places, key=lambda p: -v[:, p[0], p[1]].sum())[:budget]:
            mask[max(range(m), key=lambda i: (v[i, a, b], -i)), a, b] = True
    elif strategy == "LA_MU":
        for i in range(m):
            take([(i, a, b) for a in range(layers) for b in range(n)], budget // m)
    elif strategy == "LU_MA":
        for a in range(layers):
            take([(i, a, b) for i in range(m) for b in range(n)], budget // layers)
    elif strategy == "uniform":
        for i in range(m):
            for a in range(layers):
                take([(i, a, b) for b in range(n)], budget // (m * layers))
    return mask


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("strategy", ["adaptive", "LA_MU", "LU_MA", "uniform"])
@pytest.mark.parametrize("ties", [False, True])
def test_by_definition(strategy, ratio, ties):
    scores = random_scores()
    if ties:  # few different values, exact in binary
        scores = (scores * 3).round() / 4
    weights = {"mean": 0.5, "attn_k": 0.5}
    v = 0.5 * scores.sel(metric="mean") + 0.5 * scores.sel(metric="attn_k")
    expected = by_definition(v.values, int(ratio * 6 * 50), strategy)
    np.testing.assert_array_equal(select(scores, ratio, strategy, weights), expected)


# --- what each strategy promises -----------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_counts(ratio):
    scores = random_scores(layers=7, neurons=300, modalities=NAMES)
    m, layers, n = 5, 7, 300
    k = int(ratio * layers * n)

    def counts(strategy, *dims):
        return np.unique(select(scores, ratio, strategy).sum(dims).values).tolist()

    adaptive = select(scores, ratio, "adaptive")
    assert adaptive.sum() == k and adaptive.sum("modality").max() <= 1  # no overlap
    assert counts("LA_MU", "layer", "neuron") == [k // m]
    assert counts("LU_MA", "modality", "neuron") == [k // layers]
    assert counts("uniform", "neuron") == [k // (m * layers)]
    drawn = select(scores, ratio, "random")
    assert drawn.sum() == unique(drawn) == k
    assert np.ptp(drawn.sum(("layer", "neuron")).values) <= 1  # dealt out evenly


def test_the_highest_are_selected():
    scores = random_scores()
    v = sum(w * scores.sel(metric=metric) for metric, w in PAPER_WEIGHTS.items())
    mask = select(scores, 0.1, "LA_MU")
    for name in mask.modality.values:
        inside, outside = v.sel(modality=name), v.sel(modality=name)
        chosen = mask.sel(modality=name)
        assert inside.where(chosen).min() >= outside.where(~chosen).max()


@pytest.mark.parametrize("strategy", ["adaptive", "LA_MU", "LU_MA", "uniform"])
def test_ties_go_to_the_lower_layer_then_neuron(strategy):
    scores = as_scores(np.full((5, 2, 4, 30), 0.5, np.float32), NAMES[:2])
    mask = select(scores, 0.1, strategy)  # K = 12
    first = {
        "adaptive": [(0, 0, 12)],  # (modality, layer, how many)
        "LA_MU": [(0, 0, 6), (1, 0, 6)],
        "LU_MA": [(0, layer, 3) for layer in range(4)],
        "uniform": [(m, layer, 1) for m in range(2) for layer in range(4)],
    }[strategy]
    expected = np.zeros(mask.shape, bool)
    for modality, layer, count in first:
        expected[modality, layer, :count] = True
    np.testing.assert_array_equal(mask, expected)


def test_seed():
    scores = random_scores()
    for strategy in STRATEGIES:
        a, b = (select(scores, 0.1, strategy, seed=3) for _ in range(2))
        xr.testing.assert_identical(a, b)
        other = select(scores, 0.1, strategy, seed=4)
        assert (strategy == "random") != bool((other == a).all())


def test_labels():
    mask = select(random_scores(), 0.05, "LU_MA", seed=7)
    assert mask.dims == ("modality", "layer", "neuron") and mask.dtype == bool
    assert mask.attrs == {
        "ratio": 0.05,
        "strategy": "LU_MA",
        "split": "special_text_separate",
        "budget": 15,
        "seed": 7,
    }


def test_split_keeps_the_sets_that_occur():
    names = ("text", "special", "special_text", "image", "video", "audio", "prompt")
    scores = random_scores(modalities=names)
    held = scores.assign_coords(samples=("modality", [9, 9, 9, 0, 4, 0, 9]))

    def modalities(split):
        return select(held, 0.1, split=split).modality.values.tolist()

    assert modalities("prompt") == ["prompt"]
    assert modalities("special_text_as_one") == ["special_text", "video"]
    assert modalities("special_text_separate") == ["text", "special", "video"]


def test_order_of_the_metrics_does_not_matter():
    scores = random_scores()
    shuffled = scores.sel(metric=["attn_q", "prob", "max", "attn_k", "mean"]).transpose(
        "neuron", "metric", "modality", "layer"
    )
    np.testing.assert_array_equal(select(shuffled, 0.1), select(scores, 0.1))


def test_weights_as_mapping_or_sequence():
    scores = random_scores()
    a = select(scores, 0.1, weights=PAPER_WEIGHTS)
    np.testing.assert_array_equal(a, select(scores, 0.1, weights=(0, 0.25, 0.25, 0.5, 0)))
    np.testing.assert_array_equal(a, select(scores, 0.1, weights="default"))
    for name, weights in weightings().items():
        assert sum(weights.values()) == pytest.approx(1), name
    assert PAPER_WEIGHTS == {"prob": 0, "mean": 0.25, "max": 0.25, "attn_k": 0.5, "attn_q": 0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(strategy="best"), "unknown strategy 'best'; use one of .*LA_MU"),
        (dict(split="sentence"), "unknown split 'sentence'; use one of .*special_text_as_one"),
        (dict(ratio=0), r"ratio is 0; .*\(0, 1\]"),
        (dict(ratio=2), "ratio is 2"),
        (dict(weights={"mean": 0.5, "median": 0.5}), r"unknown metric \['median'\]"),
        (dict(weights={"mean": 0.7}), "sum to 1"),
        (dict(weights={"mean": math.nan}), "sum to 1"),
        (dict(weights={"mean": 1.5, "max": -0.5}), "at least 0"),
        (dict(weights="best"), "no weights 'best'; use one of default, prob, .*, or numbers"),
        (dict(weights=(0.5, 0.5)), "2 weights, expected one for each of .*attn_q"),
        (dict(weights=(0.5, 0.1, 0.1, 0.1, 0.1, 0.1)), "6 weights, expected one for each of"),
    ],
)
def test_wrong_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        select(random_scores(), **wrong)


def test_a_split_of_which_nothing_occurs():
    scores = random_scores(modalities=("text", "special"))
    with pytest.raises(ValueError, match="split 'prompt' needs .*the scores hold"):
        select(scores, split="prompt")


# --- the first of them ---------------------------------------------------------------------------

OF_THE_PAPER = ("adaptive", "LA_MU", "LU_MA", "uniform")


@pytest.mark.parametrize("strategy", OF_THE_PAPER)
def test_the_first_neurons_are_as_many_as_asked_and_nested(strategy):
    scores = random_scores()
    taken = [first(scores, n, strategy) for n in range(20, 150, 9)]
    assert [unique(mask) for mask in taken] == [*range(20, 150, 9)]
    for fewer, more in itertools.pairwise(taken):
        assert not (fewer & ~more).any()
    assert taken[0].dtype == bool and taken[0].modality.values.tolist() == [*NAMES[:3]]


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("strategy", OF_THE_PAPER)
def test_the_first_of_a_budget_are_its_neurons(strategy, ratio):
    """As many as a budget holds are the budget's; weights and split count as in `select`."""
    names = ("text", "special", "special_text", "image", "video")
    scores, how = random_scores(modalities=names, seed=1), {"strategy": strategy}
    for more in ({}, {"weights": "mean"}, {"split": "special_text_as_one"}):
        whole = select(scores, ratio, **how | more)
        found = first(scores, unique(whole), **how | more)
        assert found.modality.values.tolist() == whole.modality.values.tolist()
        np.testing.assert_array_equal(found.any("modality"), whole.any("modality"))
        assert not (whole & ~found).any()  # given to whom the budget gives them
    if strategy == "adaptive":
        np.testing.assert_array_equal(found, whole)


def hand_made() -> xr.DataArray:
    """Two modalities, two layers of six neurons, of which `uniform` takes four a step."""
    values = np.zeros((len(METRICS), 2, 2, 6), np.float32)
    mean = values[list(METRICS).index("mean")]
    mean[0, 0, [0, 1]], mean[0, 1, [2, 3]] = (0.9, 0.5), (0.8, 0.1)
    mean[1, 0, [4, 5]], mean[1, 1, [0, 1]] = (0.7, 0.6), (0.95, 0.2)
    values[list(METRICS).index("max")] = 1 - mean  # which must not count
    return as_scores(values, NAMES[:2])


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (4, []),
        (5, [(1, 0, 5)]),  # 0.6 of the second step's 0.5, 0.1, 0.6 and 0.2
        (6, [(1, 0, 5), (0, 0, 1)]),
        (7, [(1, 0, 5), (0, 0, 1), (1, 1, 1)]),
        (8, [(1, 0, 5), (0, 0, 1), (1, 1, 1), (0, 1, 3)]),
    ],
)
def test_the_highest_of_a_step_are_taken(n, expected):
    mask = first(hand_made(), n, "uniform", weights={"mean": 1.0})
    step = [(0, 0, 0), (0, 1, 2), (1, 0, 4), (1, 1, 0)]
    found = [tuple(place) for place in np.argwhere(mask.values).tolist()]
    assert sorted(found) == sorted(step + expected)


def test_the_first_of_too_few_and_of_too_many():
    """A first step of four is not cut; three a modality and layer are nine different ones."""
    how = {"strategy": "uniform", "weights": {"mean": 1.0}}
    with pytest.raises(ValueError, match="n=0 neurons: take at least 1"):
        first(hand_made(), 0, **how)
    for n in (1, 3):
        with pytest.raises(ValueError, match=f"n={n}: strategy 'uniform' takes at least 4 neurons"):
            first(hand_made(), n, **how)
    np.testing.assert_array_equal(first(hand_made(), 9, **how), select(hand_made(), 1, **how))
    for n in (10, 13):
        with pytest.raises(ValueError, match=f"n={n}: strategy 'uniform' takes at most 9"):
            first(hand_made(), n, **how)
    assert unique(first(hand_made(), 12, "adaptive")) == 12
    with pytest.raises(ValueError, match="n=13: strategy 'adaptive' takes at most 12"):
        first(hand_made(), 13, "adaptive")


# --- overlap and nulls ---------------------------------------------------------------------------


def test_unique_and_overlap():
    mask = np.zeros((3, 1, 10), bool)
    mask[0, 0, :4] = mask[1, 0, 2:6] = True
    neurons = xr.DataArray(mask, {"modality": list("abc")}, ("modality", "layer", "neuron"))
    assert unique(neurons) == 6
    table = overlap(neurons)
    assert table.loc["a", "b"] == table.loc["b", "a"] == pytest.approx(2 / 6)
    assert table.loc["a", "a"] == 1 and table.loc["a", "c"] == 0
    assert np.isnan(table.loc["c", "c"])  # two empty sets have nothing to agree on


@pytest.mark.parametrize("by_layer", [False, True])
def test_matched_random(by_layer):
    neurons = select(random_scores(), 0.2, "LA_MU")
    draws = [matched_random(neurons, seed, by_layer) for seed in range(20)]
    for drawn in draws:
        assert drawn.modality.values.tolist() == ["random"] and drawn.dtype == bool
        assert drawn.shape == (1, *neurons.shape[1:])
        assert drawn.sum() == unique(neurons)
        if by_layer:
            per_layer = neurons.any("modality").sum("neuron")
            np.testing.assert_array_equal(drawn[0].sum("neuron"), per_layer)
    np.testing.assert_array_equal(draws[3], matched_random(neurons, 3, by_layer))
    assert len({d.values.tobytes() for d in draws}) == len(draws)
    # Every neuron can be drawn: 20 draws of a fifth leave out 1 % of them.
    assert np.mean([np.any([d.values for d in draws], axis=0)]) > 0.9


def test_more_than_there_are_cannot_be_drawn():
    neurons = select(random_scores(), 0.2, "LA_MU")
    wanted = int(neurons.any("modality").sum("neuron")[0])
    outside = xr.zeros_like(neurons[0])
    outside[0, wanted - 1 :] = True
    with pytest.raises(ValueError, match=f"{wanted} random .* layer 0 has {wanted - 1} to draw"):
        matched_random(neurons, 0, True, outside)
    with pytest.raises(ValueError, match="there are 0 to draw from"):
        matched_random(neurons, 0, outside=xr.ones_like(neurons[0]))


def test_an_empty_selection_is_matched_by_an_empty_draw():
    neurons = select(random_scores(), 0.001)  # K = 0
    assert not neurons.any() and not matched_random(neurons, 0).any()


# --- speed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen2_vl_7b() -> xr.DataArray:
    return random_scores(layers=28, neurons=18_944, modalities=NAMES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fast_at_the_size_of_qwen2_vl_7b(qwen2_vl_7b, strategy):
    start = time.process_time()  # other work on the machine does not count
    select(qwen2_vl_7b, 0.02, strategy)
    assert time.process_time() - start <= 1.5


def test_a_strategy_must_give_a_mask(monkeypatch):
    scores = random_scores()
    for wrong, gave in (
        (lambda value, k, rng: value, "float32 .*"),
        (lambda value, k, rng: value[0] > 0, r"bool \(6, 50\)"),
        (lambda value, k, rng: None, "None"),
    ):
        monkeypatch.setitem(STRATEGIES, "wrong", wrong)
        with pytest.raises(ValueError, match=f"strategy 'wrong' gave {gave}, not bool .*, 6, 50"):
            select(scores, strategy="wrong")


def test_a_budget_is_of_different_neurons(monkeypatch):
    """The same neurons for every modality count once."""

    def first(value, budget, rng, over=0):
        mask = np.zeros(value.shape, bool)
        mask[:, 0, : budget + over] = True
        return mask

    monkeypatch.setitem(STRATEGIES, "first", first)
    assert unique(select(random_scores(), 0.1, "first")) == 30
    monkeypatch.setitem(STRATEGIES, "first", partial(first, over=1))
    with pytest.raises(ValueError, match=r"'first' gave 31 different neurons; .* = 30$"):
        select(random_scores(), 0.1, "first")


def test_the_shares_that_the_paper_compares():
    assert RATIOS == (0.001, 0.005, 0.01, 0.015, 0.02, 0.05, 0.1)


@pytest.mark.parametrize("by_layer", [False, True])
def test_random_draws_from_outside_a_set(by_layer):
    """Of those that are left as many as ever; without such a set the draws are what they were."""
    rng = np.random.default_rng(0)
    values = rng.random((1, 4, 50)) < 0.2
    axes = {"modality": ["m"], "layer": range(4)}
    neurons = xr.DataArray(values, axes, ("modality", "layer", "neuron"))
    outside = xr.DataArray(rng.random((4, 50)) < 0.5, {"layer": range(4)}, ("layer", "neuron"))
    found = matched_random(neurons, 3, by_layer, outside)
    assert found.sum() == neurons.sum() and not (found.values[0] & outside.values).any()
    if by_layer:
        assert (found.sum("neuron").values == neurons.sum("neuron").values).all()
    plain = matched_random(neurons, 3, by_layer)
    assert plain.equals(matched_random(neurons, 3, by_layer, outside & False))
    assert not plain.equals(found)
