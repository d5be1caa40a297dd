"""Semantic probing (finding IV): known answers on made clouds, and honest nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import footprints, random_neurons
from made import MOST, RNG, states_of, table_of, value
from scipy.stats import binom, ortho_group

from minerlib import inference
from minerlib.findings.probing import (
    approach,
    as_many,
    beside_random,
    beyond_random,
    by_layer,
    crowded_pictures,
    headline,
    labelled,
    log_reach,
    over_prompts,
    parts,
    probing,
    silenced_reach,
    tip_places,
    tips,
)
from minerlib.findings.states import States, hidden_states


def probe(reaching: float = 0.2, seed: int = 0) -> States:
    """An audio cloud far from the text, the last `reaching` of each clip moved into the text.

    At the embeddings, layer 0, none of them is.
    """
    kinds, samples = table_of({"audio": 10, "text": 10}, 20)
    x = RNG(seed).standard_normal((2, len(kinds), 4))
    states = states_of(x, kinds, samples)
    audio = (states.tokens["kind"] == "audio").to_numpy()
    stays = audio & (states.tokens["place"] < 10 * (1 - reaching)).to_numpy()
    states.hidden[0, audio, 0] += 20
    states.hidden[1, stays, 0] += 20
    return states


def p_of(found: xr.DataArray, tail: str = "greater") -> np.ndarray:
    """p of each row of [layer, draw]."""
    at, _, null = parts(found)
    return np.array([inference.rank_p(x, n, tail) for x, n in zip(at[:, 0], null, strict=True)])


def test_one_cloud_reaching_into_the_other():
    still, reaching = (by_layer(probing(probe(share), n_boot=50)) for share in (0, 0.2))
    assert value(still, "probes", 1)["value"] == 0
    row = value(reaching, "probes", 1)
    assert 0.05 < row["value"] <= 0.2 and row["null_high"] < row["low"]
    assert value(reaching, "probes", 0)["value"] == 0
    assert value(reaching, "reach", 1)["value"] < value(still, "reach", 1)["value"]
    row = value(still, "reach", 1)
    assert np.exp(row["value"]) > 5 and row["low"] > row["null_high"]
    assert value(reaching, "elongation", 1)["value"] > 3
    row = value(reaching, "tip_end", 1)  # places 8 and 9 of 0..9 lie at 7/9 and 1 of the half-run
    assert 0.6 < row["value"] <= 1 and row["low"] > row["null"]


def test_probing_does_not_see_rotation():
    states = probe()
    turned = States(
        (5 * states.hidden @ ortho_group.rvs(4, random_state=2)).astype(np.float32), states.tokens
    )
    a, b = (by_layer(probing(x, n_boot=100, n_null=50)) for x in (states, turned))
    columns = ["value", "low", "high"]
    np.testing.assert_allclose(a[columns], b[columns], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_probing_nulls_keep_their_level():
    """Clouds that are one, stretched like hidden states, with a text centre drawn like a token."""
    kinds, samples = table_of({"audio": 5, "text": 5}, 10)
    stretch = np.array([4, 2, 1, 1, 1, 0.5])
    x = RNG(6).standard_normal((200, len(kinds), 6)) * stretch
    found = probing(states_of(x, kinds, samples), nearest=3, k=8, n_boot=2, n_null=99)[0]
    tails = {"reach": "less", "probes": "greater", "elongation": "greater", "tip_end": "greater"}
    for measure, tail in tails.items():
        assert (p_of(found.sel(measure=measure), tail) <= 0.05).sum() <= MOST, measure


def test_exchanged_kinds_keep_their_level_where_tokens_of_one_prompt_lie_together():
    """A prompt's medium is one blob and its text another: no draws of their own."""
    kinds, samples = table_of({"audio": 5, "text": 5}, 10)
    blob = np.unique([kinds, samples.astype(str)], axis=1, return_inverse=True)[1]
    rng = RNG(5)
    x = rng.standard_normal((200, len(kinds), 3)) + 3 * rng.standard_normal((200, 20, 3))[:, blob]
    found = probing(states_of(x, kinds, samples), nearest=3, k=8, n_boot=2, n_null=99)[0]
    for measure, tail in {"reach": "less", "probes": "greater"}.items():
        assert (p_of(found.sel(measure=measure), tail) <= 0.05).sum() <= MOST, measure


def test_probing_runs_on_a_model(mllm, samples):
    states = hidden_states(mllm, samples * 2, tokens_per_kind=5, normed=True)
    found = probing(states, k=3, n_boot=20, n_null=20)
    assert set(found["kind"].values) == set(states.tokens["kind"]) - {"text", "special"}
    assert found.sizes["layer"] == mllm.n_layers + 1
    assert by_layer(found).query("measure != 'tip_end'").notna().all(axis=None)


# --- the headline --------------------------------------------------------------------------------


def shares(x: np.ndarray, second: np.ndarray, group: np.ndarray, k: int = 10) -> np.ndarray:
    """The share of the second kind's tokens that are probes, prompt by prompt, as it is said."""
    n = len(x)
    first = (~second).sum() / (n - 1)  # a token of the second kind is not its own neighbour
    apart = np.linalg.norm(x[:, None] - x[None], axis=-1) + np.diag([np.inf] * n)
    text = (~second)[np.argsort(apart, axis=1)[:, :k]].sum(1)
    probes = text > binom.ppf(0.95, k, first)
    return np.array([probes[second & (group == g)].mean() for g in np.unique(group)])


def test_the_headline_is_probes_over_exchanged_kinds():
    states = probe()
    found = probing(states, n_boot=200, n_null=40, seed=3)
    effect, null = headline(found.sel(measure=["probes"]))
    own = (states.tokens["kind"] == "audio").to_numpy()
    group, x = states.tokens["sample"].to_numpy(), states.hidden[1].astype(float)
    draws = inference.exchanged(own, group, 40, 3)
    each, *others = (shares(x, labels, group) for labels in draws)
    others = np.mean(others, axis=1)
    resampled = inference.resamples(20, 200, 3) @ each / 20 - others.mean()
    assert effect.mean == pytest.approx(each.mean() - others.mean())
    assert effect[1:3] == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    np.testing.assert_allclose(null, others - others.mean(), atol=1e-9)
    line = inference.judge("IV-probing", effect, null, rows=20)
    assert line["p"] == inference.rank_p(each.mean(), others, "greater") == 1 / 41


def test_the_headline_is_a_mean_over_layers_from_1_on_and_media():
    values = [[[99, 0, 9, 9, 9], [4, 3, 5, 1, 2], [8, 7, 9, 3, 4]]] * 2
    found = labelled(
        np.array(values, float) * [[[1.0]], [[2.0]]], 2, 2, kind=["a", "b"], layer=[0, 1, 2]
    )
    effect, null = headline(found)
    assert effect.mean == pytest.approx(1.5 * (6 - 2.5))
    np.testing.assert_allclose(effect[1:3], 1.5 * (np.array([5.05, 6.95]) - 2.5))
    np.testing.assert_allclose(null, [-0.75, 0.75])


def test_draws_by_layer():
    values = [[[1, 0, 2, 5, 7]], [[3, 3, 3, 4, 4]]]
    found = labelled(values, 2, 2, measure=["a", "b"], layer=[4])
    table = by_layer(found)
    assert table[["measure", "layer", "value", "null"]].values.tolist() == [
        ["a", 4, 1, 6],
        ["b", 4, 3, 4],
    ]
    np.testing.assert_allclose(table.loc[0, ["low", "high"]].astype(float), [0.05, 1.95])
    np.testing.assert_allclose(table.loc[0, ["null_low", "null_high"]].astype(float), [5.05, 6.95])
    assert not {"null", "null_low", "null_high"} & set(by_layer(found[..., :3]))
    assert not {"p"} & set(table)  # one p for each claim, none for layers


# --- the tip -------------------------------------------------------------------------------------


@pytest.fixture
def small() -> States:
    """Text at 0 and 1, sounds at 3, 4.5 and 10; in the second layer all is ten times as far."""
    kinds = ["audio", "special", "text", "text", "audio", "audio"]
    x = np.array([3, 77, 0, 1, 4.5, 10])[:, None]
    return states_of(np.stack([x, 10 * x]), kinds, np.zeros(6, int))


def test_tips_by_hand(small):
    table = tips(small, "audio", nearest=1, tip_share=0.34)
    assert table["layer"].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["token"].tolist() == [0, 5, 4] * 2
    np.testing.assert_allclose(table["reach"], np.log([2 / 1.5, 9 / 5.5, 3.5 / 1.5] * 2), rtol=1e-6)
    np.testing.assert_allclose(table["place"], [0, 1, 0.5] * 2)
    assert table["tip"].tolist() == [True, True, False] * 2  # a third and a bit of three: two


def test_tips_are_the_tokens_that_reach():
    states = probe(0.2)
    table = tips(states, "audio")
    first = table[table["layer"] == 1].head(40)
    assert (first["place"] >= 8 / 9 - 1e-9).all() and (first["reach"] < np.log(5)).all()
    np.testing.assert_array_equal(states.tokens.loc[table["token"], "place"] / 9, table["place"])
    assert (states.tokens.loc[table["token"], "kind"] == "audio").all()


def test_places_of_the_tip():
    place = [0, 0.2, 0.21, 0.5, 0.81, 1]
    tip = [True, True, True, False, True, False]
    tables = [pd.DataFrame({"layer": n, "place": place, "tip": tip}) for n in (0, 1)]
    tables[1]["tip"] = [False] * 5 + [True]
    found = tip_places(pd.concat(tables, ignore_index=True))
    assert found.index.tolist() == [0, 1, "all tokens"]
    assert found.columns.tolist() == ["first", "2nd", "3rd", "4th", "last"]
    np.testing.assert_allclose(found.loc[0], [0.5, 0.25, 0, 0, 0.25])
    np.testing.assert_allclose(found.loc[1], [0, 0, 0, 0, 1])
    np.testing.assert_allclose(found.loc["all tokens"], np.array([2, 1, 1, 0, 2]) / 6)


def test_places_are_shares_of_the_medium_not_of_what_was_drawn():
    """Tokens drawn from the second half only sit in the second half."""
    table = pd.DataFrame({"layer": 0, "place": [0.5, 0.75, 1], "tip": True})
    np.testing.assert_allclose(tip_places(table).loc[0], np.array([0, 0, 1, 1, 1]) / 3)


# --- coming nearer, and being pushed away --------------------------------------------------------


def test_log_reach_is_a_mean_of_logarithms(small):
    found = log_reach(small, nearest=1)
    assert found.dims == ("kind", "sample", "layer") and found.shape == (1, 1, 2)
    np.testing.assert_allclose(found[0, 0], np.log([4 / 3, 18 / 11, 7 / 3]).mean())


def test_log_reach_is_the_reach_of_probing():
    states = probe()
    found = by_layer(probing(states, n_boot=2, n_null=2))
    each = log_reach(states).sel(kind="audio").mean("sample")
    np.testing.assert_allclose(found.loc[found["measure"] == "reach", "value"], each, rtol=1e-5)


def test_copies_are_not_infinitely_near():
    """The tokens of an opening that all prompts share are copies: all else is far."""
    kinds, samples = table_of({"audio": 2, "text": 2}, 8)
    states = states_of(np.zeros((2, len(kinds), 1)), kinds, samples)
    states.hidden[:, states.tokens["kind"] == "audio"] = 1
    mean = 0.5 * 32 / 31 * 31 / 32  # half of all pairs lie at 1
    np.testing.assert_allclose(log_reach(states), np.log(1000 / mean), rtol=1e-6)


def reach_of(**factors: list) -> xr.DataArray:
    """Log reach by kind, from factors [layer][sample]; prompts of one kind hold no other."""
    each = [
        xr.DataArray(np.log(of).T[None], {"kind": [kind], "sample": np.arange(len(of[0])) + 9 * i},
                     ("kind", "sample", "layer")).assign_coords(layer=range(len(of)))
        for i, (kind, of) in enumerate(factors.items())
    ]  # fmt: skip
    return xr.concat(each, "kind", join="outer")


def test_approach_is_from_layer_1_to_the_last_prompt_by_prompt():
    reach = reach_of(audio=[[9, 9, 9], [2, 4, 2], [1, 3, 1]], video=[[1, 1], [4, 4], [3, 2]])
    audio, video = np.log([2, 4 / 3, 2]), np.log([4 / 3, 2])
    effect = approach(reach, [0.0, 0.0])
    assert effect.mean == pytest.approx((audio.mean() + video.mean()) / 2)
    error = np.hypot(audio.std(ddof=1) / 3**0.5, video.std(ddof=1) / 2**0.5) / 2
    assert effect.error == pytest.approx(error)
    assert approach(reach_of(audio=[[5, 6]] * 3), [0.0, 0.0]).mean == 0


def test_approach_is_more_than_that_of_untrained_controls():
    reach = reach_of(audio=[[9, 9, 9], [2, 4, 2], [1, 3, 1]], video=[[1, 1], [4, 4], [3, 2]])
    plain, beyond = (approach(reach, untrained) for untrained in ([0, 0], [0.1, 0.5]))
    assert beyond.mean == pytest.approx(plain.mean - 0.3)
    assert beyond.error**2 == pytest.approx(plain.error**2 + 0.08 / 2)
    assert beyond.high > beyond.mean + 2.5 * beyond.error  # two controls tell little


def moved_of(*draws: list) -> xr.DataArray:
    """Changes [draw, sample, layer] from [sample][layer] each."""
    return xr.DataArray(
        np.array(draws, float),
        {"sample": range(len(draws[0])), "layer": range(len(draws[0][0]))},
        ("draw", "sample", "layer"),
    )


def test_beyond_random_draws_by_hand():
    own = [[0, 3, 5], [0, 1, 1], [0, 2, 2]]
    moved = moved_of(own, [[0, 1, 1], [0, 0, 0], [0, 2, 2]], [[0, 0, 2], [0, 2, 2], [0, 3, 3]])
    effect, null = beyond_random({"audio": moved})
    beyond = np.array([4 - 1, 1 - 1, 2 - 2.5])
    assert effect.mean == pytest.approx(beyond.mean())
    extra = np.var([1, 2], ddof=1) / 2
    assert effect.error == pytest.approx((beyond.var(ddof=1) / 3 + extra) ** 0.5)
    np.testing.assert_allclose(null, [-0.5, 0.5])
    both, null = beyond_random({"audio": moved, "image": moved_of(*[[[9, 1, 1]]] * 3)})
    assert both.mean == pytest.approx(beyond.mean() / 2)  # media alike, however many prompts
    np.testing.assert_allclose(null, [-0.25, 0.25])


def test_own_neurons_that_are_random_ones_are_told_apart_as_often_as_chance():
    rng, p, held = RNG(8), [], 0
    for _ in range(200):
        moved = xr.DataArray(
            rng.standard_normal((20, 1, 2)) + 0.3 * rng.standard_normal((20, 12, 2)),
            {"layer": [1, 2]}, ("draw", "sample", "layer"),
        )  # fmt: skip
        line = inference.judge("IV-probing silenced", *beyond_random({"audio": moved}))
        p.append(line["p"])
        held += line["verdict"].word == inference.HOLDS
    assert (np.array(p) <= 0.05).sum() <= MOST and held <= MOST


def test_changes_by_layer():
    moved = moved_of([[0, 3], [0, 1]], [[0, 1], [0, 1]], [[0, 4], [0, 6]], [[0, 0], [0, 0]])
    own = over_prompts(moved[0])
    assert own.loc[1, ["layer", "value", "low", "high"]].tolist() == [1, 2, 1, 3]
    table = beside_random(own, moved[1:].mean("sample")).set_index(["silenced", "layer"])
    assert table.loc[("own", 1)].tolist() == [2, 1, 3]
    assert table.loc[("random", 1)].tolist() == [2, 0, 5]
    assert (table.xs(0, level="layer") == 0).all(axis=None)


def test_silencing_is_of_the_neurons_and_ends(mllm, samples):
    before, drawn = footprints(mllm), {"tokens_per_kind": 5, "batch_size": 3, "normed": True}
    as_is = log_reach(hidden_states(mllm, samples, **drawn))
    none, some = (random_neurons(mllm, share) for share in (0, 0.3))
    xr.testing.assert_identical(silenced_reach(mllm, samples, none, **drawn), as_is)
    moved = silenced_reach(mllm, samples, some, **drawn) - as_is
    there = as_is.notnull()
    np.testing.assert_allclose(moved.sel(layer=0).fillna(0), 0, atol=1e-6)
    assert (abs(moved) > 1e-6).sel(layer=slice(1, None)).equals(there.sel(layer=slice(1, None)))
    assert footprints(mllm) == before


# --- pictures ------------------------------------------------------------------------------------


def test_probes_of_a_picture_are_not_those_of_the_space():
    states = probe(0)
    shown = states.tokens.reset_index(names="token")[["token", "sample", "kind"]]
    panels = shown.assign(view="t-SNE, seed 0", layer=1, x=0.0, y=np.arange(len(shown)))
    panels["y"] = RNG(0).permutation(len(shown))  # a picture in which all is mixed
    found = crowded_pictures(states, panels)
    assert found.loc[("audio", 1), "full space"] == 0
    assert found.loc[("audio", 1), "t-SNE, seed 0"] > 0


def test_as_many_tokens_of_each_kind():
    kinds = [*"aaaaabb", *"abbb", *"aa"]  # of three samples, the last without b
    tokens = pd.DataFrame({"sample": [0] * 7 + [1] * 4 + [2] * 2, "kind": kinds})
    states = States(np.arange(13, dtype=np.float32)[None, :, None], tokens)
    found = as_many(states, ["a", "b"], 8)
    count = found.tokens.groupby(["sample", "kind"]).size().to_dict()
    assert count == {(0, "a"): 2, (0, "b"): 2, (1, "a"): 1, (1, "b"): 1}
    kept = found.hidden[0, :, 0].astype(int)
    assert found.tokens["kind"].tolist() == [kinds[i] for i in kept]  # states go with their tokens
    few = as_many(states, ["a", "b"], 1).tokens
    assert few.groupby(["sample", "kind"]).size().tolist() == [1, 1, 1, 1]
    drawn = {tuple(as_many(states, ["a", "b"], 1, i).hidden[0, :, 0]) for i in range(9)}
    assert len(drawn) > 1
