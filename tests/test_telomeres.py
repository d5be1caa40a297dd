"""Semantic telomeres (finding IV) and their rivals: known answers, and honest nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import footprints, random_neurons
from made import MOST, RNG, states_of, table_of, value
from scipy.stats import ortho_group
from test_probing import p_of

from minerlib import inference
from minerlib.findings import clouds
from minerlib.findings.attention import attention_sinks
from minerlib.findings.probing import by_layer, headline, labelled, parts
from minerlib.findings.states import States, hidden_states
from minerlib.findings.telomeres import (
    collected,
    doubled,
    fall,
    in_short,
    massive_activations,
    mean_ends,
    silenced_ends,
    telomeres,
)


def line(at: tuple[float, float], seed: int = 0) -> States:
    """Text along a line in the order of its places, two specials at `at` on it, an image aside."""
    kinds, samples = table_of({"special": 1, "text": 12, "end": 1, "image": 4}, 25)
    kinds = ["special" if k == "end" else k for k in kinds]
    states = states_of(np.zeros((1, len(kinds), 5)), kinds, samples)
    x, tokens = states.hidden[0], states.tokens
    text, special = (tokens["kind"] == k for k in ("text", "special"))
    x[text, 0] = np.linspace(0, 10, 12)[tokens.loc[text, "place"]]
    x[special, 0] = np.array(at)[tokens.loc[special, "place"]]
    x[tokens["kind"] == "image", 1] = 50
    x += 0.1 * RNG(seed).standard_normal(x.shape)
    return states


def test_anchored_specials_at_the_ends_of_the_text():
    found = telomeres(line((-1, 11)), n_boot=50)
    for measure, expected in {"axis_end": 1, "axis_order": 1, "attachment": 16 / 12}.items():
        row = value(by_layer(found), measure)
        assert row["value"] == pytest.approx(expected, abs=0.02), measure
        if measure != "axis_end":  # of one word, as all text is here, nothing can be drawn
            assert p_of(found.sel(measure=measure)) == pytest.approx(1 / 201)


def test_specials_in_the_middle_of_the_text():
    row = value(by_layer(telomeres(line((5, 5)), n_boot=50)), "axis_end")
    assert row["high"] < 0.2


def test_telomeres_do_not_see_rotation_and_need_no_media():
    states = line((-1, 11))
    turned = (states.hidden @ ortho_group.rvs(5, random_state=3)).astype(np.float32)
    columns, few = ["value", "low", "high"], {"n_boot": 50, "n_null": 40}
    a, b = (by_layer(telomeres(x, **few)) for x in (states, States(turned, states.tokens)))
    np.testing.assert_allclose(a[columns], b[columns], atol=1e-3)
    bare = telomeres(states.of("text", "special"), **few)
    assert bare["measure"].values.tolist() == ["axis_end", "beyond_words", "axis_order"]


def test_shuffles_keep_their_level():
    kinds, samples = table_of({"text": 6, "special": 3, "image": 6}, 10)
    order = np.concatenate([15 * s + RNG(s).permutation(15) for s in range(10)])
    kinds = list(np.array(kinds)[order])
    x = RNG(7).standard_normal((200, len(kinds), 4)) * [3, 1, 1, 1]
    found = telomeres(states_of(x, kinds, samples), k=5, n_boot=2, n_null=99)
    for measure in ("axis_order", "attachment"):
        assert (p_of(found.sel(measure=measure)) <= 0.05).sum() <= MOST


def test_telomeres_run_on_a_model(mllm, samples):
    drawn = {"tokens_per_kind": 5, "equal": False, "batch_size": 3, "normed": True}
    found = telomeres(hidden_states(mllm, samples * 2, **drawn), k=3, n_boot=20, n_null=20)
    assert found.sizes["layer"] == mllm.n_layers + 1 and np.isfinite(found).all()
    assert found.attrs["recurring"] >= found.attrs["special"] > 1


# --- recurring words -----------------------------------------------------------------------------


def words(place: float, specials: int = 1) -> States:
    """Words 1 to 5 at places 0 to 4 in every prompt, a word of the prompt's own, and specials."""
    kinds, samples = table_of({"text": 6, "special": specials}, 30)
    states = states_of(np.zeros((1, len(kinds), 2)), kinds, samples)
    tokens = states.tokens
    text = (tokens["kind"] == "text").to_numpy()
    ids = np.where(text, tokens["place"] + 1, 100 + tokens["place"])
    ids[text & (tokens["place"] == 5)] = 1000 + np.arange(30)
    at = np.where(text, tokens["place"], place)
    at[text & (tokens["place"] == 5)] = 2
    states.hidden[0, :, 0] = at
    return States(states.hidden, tokens.assign(id=ids))


def test_recurring_words_are_a_stricter_null():
    """A special that lies where the last word lies is out, but no further than words can be."""
    found = telomeres(words(place=4), n_boot=50)
    row = value(by_layer(found), "axis_end")
    assert found.attrs == {"special": 1, "recurring": 5}  # the prompts' own words are left out
    assert row["value"] == pytest.approx(5 / 6)
    assert 0.25 < p_of(found.sel(measure="beyond_words"))[0] < 0.55
    # Words at 0 to 4, of 6: the lowest and the highest lie 5/6 out, the next half, the middle 0.
    assert row["null"] == pytest.approx((5 / 6 + 1 / 2 + 0 + 1 / 2 + 5 / 6) / 5, abs=0.06)
    assert (row["null_low"], row["null_high"]) == pytest.approx((0, 5 / 6))
    further = value(by_layer(found), "beyond_words")
    assert further["value"] == pytest.approx(row["value"] - row["null"])


def test_as_many_recurring_words_as_special_tokens():
    few = {"n_boot": 20, "n_null": 40}
    row = value(by_layer(telomeres(words(place=4, specials=5), **few)), "axis_end")
    assert row["null_low"] == pytest.approx(row["null_high"])  # always all five
    fewer = telomeres(words(place=4, specials=6), **few)
    assert (fewer.attrs["special"], fewer.attrs["recurring"]) == (6, 5)
    assert value(by_layer(fewer), "axis_end")["value"] == pytest.approx(5 / 6)
    assert fewer.sel(measure="beyond_words").isnull().all()
    every = telomeres(words(place=4), share=1 / 30, **few)
    assert every.attrs["recurring"] == 35


def test_the_headline_is_beyond_words_averaged_over_layers_from_1_on():
    for place, word in ((9, inference.HOLDS), (2, inference.FAILS)):
        states = words(place)
        deep = States(np.concatenate([0 * states.hidden, states.hidden]), states.tokens)
        found = telomeres(deep, n_boot=100).sel(measure=["beyond_words"])
        line = inference.judge("IV-telomeres", *headline(found), rows=30)
        mean = (5 / 6 + 1 / 2 + 0 + 1 / 2 + 5 / 6) / 5
        assert line["effect"] == pytest.approx({9: 1, 2: 0}[place] - mean, abs=0.06)
        assert line["verdict"].word == word
        assert (line["p"] <= 0.05) == (word == inference.HOLDS)


def test_special_tokens_that_are_words_like_others_are_told_apart_as_often_as_chance():
    """In each of 200 layers every token, a word or special, has a place of its own."""
    kinds, samples = table_of({"text": 12, "special": 2}, 6)
    ids = np.tile(np.arange(14), 6)
    rng = RNG(4)
    x = 2 * rng.standard_normal((200, 14, 3))[:, ids] + 0.1 * rng.standard_normal((200, 84, 3))
    states = states_of(x, kinds, samples)
    found = telomeres(States(states.hidden, states.tokens.assign(id=ids)), n_boot=2, n_null=99)
    beyond = found.sel(measure="beyond_words")
    assert (p_of(beyond) <= 0.05).sum() <= MOST
    assert abs(next(parts(beyond)).mean()) < 0.05


# --- axis ends and their intervals ---------------------------------------------------------------


def test_axis_ends_by_hand():
    """Text at 0 to 4: a special at 2 is in the middle, those at 5 and -1 at the ends."""
    kinds, samples = table_of({"text": 5, "special": 2}, 2)
    x = np.array([0, 1, 2, 3, 4, 2, 5, 0, 1, 2, 3, 4, 5, -1], float)[:, None] * [1, 0]
    found = mean_ends(states_of(np.stack([x, 3 * x[:, ::-1]]), kinds, samples), n_boot=50)
    at, drawn, _ = parts(found)
    np.testing.assert_allclose(at, [[0.75], [0.75]])
    assert {*np.round(drawn[0], 6)} == {0.5, 0.75, 1}  # one prompt twice, or both


def test_weights_are_how_often_points_count():
    rng = RNG(1)
    x, w = rng.standard_normal((20, 5)) * [3, 2, 1, 1, 1], rng.integers(0, 4, (6, 20))
    second = np.arange(20) >= 15
    axes = clouds.principal_axis(x, w)
    for axis, weight in zip(axes, w, strict=True):
        own = clouds.principal_axis(np.repeat(x, weight, axis=0))
        assert abs(axis @ own) == pytest.approx(1)
        z, all_once = x @ axis, np.maximum(weight, second)
        repeated = clouds.extremity(np.repeat(z, all_once), np.repeat(second, all_once)[None])
        found = clouds.extremity(z, second[None], weight[None])[0]
        np.testing.assert_allclose(repeated[0], np.repeat(found, all_once), atol=1e-12)
    np.testing.assert_allclose(
        abs(clouds.principal_axis(x, np.ones((1, 20)))[0]), abs(clouds.principal_axis(x))
    )


def copied(states: States, counts: np.ndarray) -> States:
    """The prompts as often as counts say, each a sample of its own."""
    tokens, at = states.tokens, []
    chosen = np.repeat(np.arange(len(counts)), counts.astype(int))
    at = [np.flatnonzero(tokens["sample"] == sample) for sample in chosen]
    table = tokens.iloc[np.concatenate(at)].assign(
        sample=np.repeat(range(len(at)), [*map(len, at)])
    )
    return States(states.hidden[:, np.concatenate(at)], table.reset_index(drop=True))


def test_a_resampling_measures_all_of_it_again():
    """Axis, percentiles, specials and words of the resampled prompts, as if that was all."""
    kinds, samples = table_of({"text": 5, "special": 2}, 8)
    states = states_of(RNG(2).standard_normal((2, len(kinds), 4)) * [2, 1, 1, 1], kinds, samples)
    ids = np.where(states.tokens["kind"] == "text", states.tokens["place"], 9)
    states = States(states.hidden, states.tokens.assign(id=ids))
    found = telomeres(states, n_boot=6, n_null=40, seed=5)
    for i, counts in enumerate(inference.resamples(8, 6, 5)):
        again = telomeres(copied(states, counts), n_boot=2, n_null=40, seed=5)
        for measure in ("axis_end", "beyond_words"):
            drawn = found.sel(measure=measure)[:, 1 + i]
            np.testing.assert_allclose(drawn, again.sel(measure=measure)[:, 0], atol=1e-6)
    ends = mean_ends(states, n_boot=6, seed=5)
    np.testing.assert_allclose(ends, found.sel(measure="axis_end")[:, :7])


# --- rivals --------------------------------------------------------------------------------------


def test_a_fall_is_a_mean_over_layers_from_1_on_of_the_same_resamplings():
    before = labelled([[0, 9, 9, 9], [0.9, 0.8, 1.0, 7], [0.7, 0.8, 1.0, 7]], 2, 1, layer=range(3))
    after = labelled([[9, 9, 9], [0.5, 0.6, 0.6], [0.5, 0.4, 0.6]], 2, 0, layer=range(3))
    effect = fall(before, after)
    assert effect.mean == pytest.approx(0.3)
    np.testing.assert_allclose(effect[1:3], [0.3025, 0.3975])  # of 0.3 and 0.4
    assert fall(before, before)[:3] == (0, 0, 0)


def test_without_the_first_token():
    """The first token of each prompt lies out, the second in the middle: half of the end falls."""
    states = line((11, 5))
    deep = States(np.concatenate([states.hidden, states.hidden]), states.tokens)
    ends, rest = (mean_ends(x, n_boot=100) for x in (deep, deep.where(deep.tokens["position"] > 0)))
    made = inference.judge("IV-telomeres first", fall(ends, rest), "no change")
    assert made["effect"] == pytest.approx(0.5, abs=0.1) and made["verdict"].word == inference.HOLDS


def test_doubled(mllm, samples):
    twice = doubled(samples)
    assert [s.prompt for s in twice] == [f"{s.prompt}\n{s.prompt}" for s in samples]
    assert [s.image is x.image and s.row == x.row for s, x in zip(twice, samples, strict=True)]
    drawn = {"tokens_per_kind": None, "equal": False, "normed": True}
    ends = [mean_ends(hidden_states(mllm, x, **drawn), n_boot=20) for x in (samples, twice)]
    assert np.isfinite(fall(*ends)).all() and fall(*ends).mean != 0


def test_massive_activations():
    x = np.ones((2, 6, 5), np.float32)
    x[1, 0, 3] = -4000
    kinds, samples = table_of({"special": 1, "text": 2}, 2)
    table = massive_activations(states_of(x, kinds, samples))
    at = table.set_index(["layer", "kind", "sample"]).sort_index()
    assert at.loc[(0, "special"), "ratio"].tolist() == [1, 1]
    assert at.loc[(1, "special"), "ratio"].tolist() == [4000, 1]
    assert at.loc[(1, "special"), "massive"].tolist() == [1, 0]
    assert at.loc[(1, "text"), ["ratio", "massive"]].values.tolist() == [[1, 0], [1, 0]]


def test_attention_collected_prompt_by_prompt(mllm, samples):
    each, whole = collected(mllm, samples), attention_sinks(mllm, samples, batch_size=3)
    mean = each.groupby(["layer", "set"])["collected"].mean()
    whole = whole.assign(layer=whole["layer"] + 1).set_index(["layer", "set"])["collected"]
    pd.testing.assert_series_equal(mean, whole.sort_index(), rtol=1e-3)
    assert each["sample"].nunique() == len(samples) and each["layer"].min() == 1


def test_silencing_is_of_the_neurons_and_ends(mllm, samples):
    before = footprints(mllm)
    drawn = {"tokens_per_kind": 6, "equal": False, "seed": 3, "batch_size": 3, "normed": True}
    as_is = mean_ends(hidden_states(mllm, samples, **drawn), n_boot=100, seed=3)
    none, some = (
        silenced_ends(mllm, samples, random_neurons(mllm, share), **drawn) for share in (0, 0.3)
    )
    xr.testing.assert_identical(none, as_is)
    np.testing.assert_allclose(some.sel(layer=0), as_is.sel(layer=0), atol=1e-6)
    assert (some != as_is).any() and footprints(mllm) == before


def test_own_neurons_that_are_random_ones_are_told_apart_as_often_as_chance():
    rng, p, held = RNG(8), [], 0
    for _ in range(200):
        size, noise = rng.standard_normal((20, 2, 1)), rng.standard_normal((20, 2, 60))
        change = (size + 0.3 * noise)[None]  # [kind, set, layer, draw]
        line = inference.judge("IV-telomeres silenced", *inference.moved(change))
        p.append(line["p"])
        held += line["verdict"].word == inference.HOLDS
    assert (np.array(p) <= 0.05).sum() <= MOST and held <= MOST


def test_in_short(mllm, samples):
    drawn = {"tokens_per_kind": 6, "equal": False, "seed": 3, "batch_size": 3, "normed": True}
    table = in_short(mllm, samples, 40, **drawn)
    found = telomeres(hidden_states(mllm, samples, **drawn), n_boot=2, n_null=40, seed=3)
    at = table.set_index(["measure", "layer"])["value"]
    for measure in found["measure"].values:
        np.testing.assert_allclose(at[measure], found.sel(measure=measure)[:, 0], atol=1e-6)
    later = attention_sinks(mllm, samples, batch_size=3).query("set == 'later special'")
    np.testing.assert_allclose(at["attention"], later["collected"])
    assert table.columns.tolist() == ["measure", "layer", "value"]
