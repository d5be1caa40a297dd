"""Semantic telomeres (finding IV) and their rivals: known answers, and honest nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import footprints, random_neurons
from made import MOST, RNG, states_of, table_of, value
from scipy.stats import ortho_group

from minerlib.findings import telomeres as room
from minerlib.findings.attention import attention_sinks
from minerlib.findings.states import States, hidden_states
from minerlib.findings.telomeres import (
    against_recurring,
    axis_ends,
    changed_ends,
    claims,
    ends_and_rivals,
    massive_activations,
    reversed_parts,
    silenced_beside,
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


def test_specials_at_the_ends_of_the_text():
    table = telomeres(line((-1, 11)))
    for measure, expected in {"axis_end": 1, "axis_order": 1, "attachment": 16 / 12}.items():
        row = value(table, measure)
        assert row["value"] == pytest.approx(expected, abs=0.02), measure
        assert row["p"] == pytest.approx(1 / 201)
    assert value(table, "sequence_end")["value"] == pytest.approx(1, abs=0.02)


def test_specials_in_the_middle_of_the_text():
    row = value(telomeres(line((5, 5))), "axis_end")
    assert row["value"] < 0.2 and row["p"] == 1
    assert row["null"] == pytest.approx(0.5, abs=0.05)


def test_telomeres_do_not_see_rotation_and_need_no_media():
    states = line((-1, 11))
    turned = (states.hidden @ ortho_group.rvs(5, random_state=3)).astype(np.float32)
    columns = ["value", "low", "high"]
    a, b = telomeres(states)[columns], telomeres(States(turned, states.tokens))[columns]
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert "attachment" not in set(telomeres(states.of("text", "special"))["measure"])


def test_telomeres_null_keeps_its_level():
    kinds, samples = table_of({"text": 6, "special": 3, "image": 6}, 10)
    order = np.concatenate([15 * s + RNG(s).permutation(15) for s in range(10)])
    kinds = list(np.array(kinds)[order])
    x = RNG(7).standard_normal((200, len(kinds), 4)) * [3, 1, 1, 1]
    states = states_of(x, kinds, samples)
    table = telomeres(states, k=5, n_boot=20, n_null=99)
    rejected = (table["p"] <= 0.05).groupby(table["measure"]).sum()
    assert set(rejected.index) == {"axis_end", "axis_order", "attachment", "sequence_end"}
    assert rejected.drop("sequence_end").max() <= MOST  # that one is the same at every layer


def test_massive_activations():
    x = np.ones((2, 6, 5), np.float32)
    x[1, 0, 3] = -4000
    kinds, samples = table_of({"special": 1, "text": 2}, 2)
    table = massive_activations(states_of(x, kinds, samples)).set_index(["layer", "kind"])
    assert table.loc[(0, "special"), "ratio"] == 1
    row = table.loc[(1, "special")]
    assert (row["ratio"], row["massive"]) == (2000.5, 0.5)
    assert (row["low"], row["high"]) == (1, 4000)  # of two prompts, one is massive
    assert table.loc[(1, "text"), ["ratio", "massive"]].tolist() == [1, 0]


def test_telomeres_run_on_a_model(mllm, samples):
    states = hidden_states(mllm, samples * 2, tokens_per_kind=5)
    table = telomeres(states, k=3, n_boot=20, n_null=20)
    assert set(table["layer"]) == set(range(mllm.n_layers + 1))
    assert np.isfinite(massive_activations(states)["ratio"]).all()


def test_axis_ends_by_hand():
    """Text at 0 to 4: a special at 2 is in the middle, one at 5 at the end."""
    kinds, samples = table_of({"text": 5, "special": 2}, 2)
    x = np.array([0, 1, 2, 3, 4, 2, 5, 0, 1, 2, 3, 4, 5, -1], float)[:, None] * [1, 0]
    table = axis_ends(states_of(np.stack([x, 3 * x[:, ::-1]]), kinds, samples))
    assert table[["layer", "sample"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    np.testing.assert_allclose(table["axis_end"], [0.5, 1, 0.5, 1])


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
    states = words(place=4)
    row, stricter = value(telomeres(states), "axis_end"), against_recurring(states).iloc[0]
    assert (stricter["n"], stricter["among"]) == (1, 5)  # the prompts' own words are left out
    assert stricter[["value", "low", "high"]].tolist() == row[["value", "low", "high"]].tolist()
    assert row["p"] == pytest.approx(1 / 201) and 0.25 < stricter["p"] < 0.55
    # Words at 0 to 4, of 6: the lowest and the highest lie 5/6 out, the next half, the middle 0.
    assert stricter["null"] == pytest.approx((5 / 6 + 1 / 2 + 0 + 1 / 2 + 5 / 6) / 5, abs=0.06)
    assert (stricter["null_low"], stricter["null_high"]) == pytest.approx((0, 5 / 6))
    assert against_recurring(words(place=9)).iloc[0]["p"] == pytest.approx(1 / 201)


def test_as_many_recurring_words_as_special_tokens():
    stricter = against_recurring(words(place=4, specials=5)).iloc[0]
    assert (stricter["n"], stricter["among"]) == (5, 5)
    assert stricter["null_low"] == pytest.approx(stricter["null_high"])  # always all five
    assert not len(against_recurring(words(place=4, specials=6)))
    every = against_recurring(words(place=4), share=1 / 30).iloc[0]
    assert every["among"] == 35


# --- changed prompts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("Who?", None),
        ("Who? Why. No", "No\nWhy.\nWho?"),
        ("A. B\n\nC. D", "C. D\nA. B"),  # blocks before sentences
    ],
)
def test_parts_in_reverse(prompt, expected):
    assert reversed_parts(prompt) == expected
    assert room.CHANGES["doubled"](prompt) == f"{prompt}\n{prompt}"


def test_change_is_prompt_by_prompt(mllm, samples, monkeypatch):
    drawn = {"tokens_per_kind": None, "equal": False, "batch_size": 2}
    states = hidden_states(mllm, samples, **drawn)
    some = {sample.prompt for sample in samples[1:]}
    monkeypatch.setitem(room.CHANGES, "same", lambda prompt: prompt if prompt in some else None)
    table = changed_ends(mllm, samples, states, "same", **drawn).set_index("condition")
    assert set(table["n"]) == {len(samples) - 1}
    np.testing.assert_allclose(table.loc["change", ["axis_end", "low", "high"]], 0, atol=1e-4)
    table = changed_ends(mllm, samples, states, "doubled", **drawn)
    means = table.pivot(index="layer", columns="condition", values="axis_end")
    np.testing.assert_allclose(means["change"], means["doubled"] - means["as it is"], atol=1e-9)
    twice = [type(s)(**{**vars(s), "prompt": room.CHANGES["doubled"](s.prompt)}) for s in samples]
    now = axis_ends(hidden_states(mllm, twice, **drawn)).groupby("layer")["axis_end"].mean()
    np.testing.assert_allclose(means["doubled"], now, atol=1e-9)
    monkeypatch.setitem(room.CHANGES, "none", lambda prompt: None)
    assert not len(changed_ends(mllm, samples, states, "none", **drawn))


# --- silencing -----------------------------------------------------------------------------------


def test_silencing_is_of_the_neurons_and_ends(mllm, samples):
    before, drawn = footprints(mllm), {"tokens_per_kind": 6, "equal": False, "seed": 3}
    sinks = attention_sinks(mllm, samples, batch_size=3)
    as_is = ends_and_rivals(hidden_states(mllm, samples, batch_size=3, **drawn), sinks)
    none, some = (
        silenced_ends(mllm, samples, random_neurons(mllm, share), batch_size=3, **drawn)
        for share in (0, 0.3)
    )
    pd.testing.assert_frame_equal(none, as_is)
    moved = (some != as_is).any()  # but the attachment of so few tokens may be at its most
    assert moved.drop(["sample", "attachment"]).all() and not moved["sample"]
    assert footprints(mllm) == before


def test_ends_and_rivals_are_means_over_decoder_layers():
    states = line((-1, 11))
    inner = states.hidden[0].copy()
    middle = (states.tokens["kind"] == "special").to_numpy()
    inner[middle] = inner[states.tokens["kind"] == "text"].mean(0)
    deep = States(np.stack([states.hidden[0], inner, inner]), states.tokens)
    sinks = pd.DataFrame({"set": ["first", "later special"] * 2, "collected": [1, 5, 3, 7.0]})
    table = ends_and_rivals(deep, sinks)
    assert len(table) == 25 and table["axis_end"].max() < 0.1  # not the embeddings
    assert table.loc[0, "attention on first"] == 2
    assert table.loc[0, "attention on later special"] == 6
    assert table.loc[0, "attachment"] == pytest.approx(16 / 12)
    peaks = massive_activations(deep).query("layer == 1 and kind == 'special'")["ratio"]
    assert table.loc[0, "largest coordinate"] == pytest.approx(peaks.item())


def test_silenced_beside_random_draws():
    def table(*ends, other=1.0):
        return pd.DataFrame({"sample": [0, 1], "axis_end": ends, "axis_order": other})

    draws = [table(0.5, 0.9), table(0.7, 0.9), table(0.6, 0.9, other=4)]
    summary, change = silenced_beside(table(0.6, 0.8), table(0.2, 0.6, other=3), draws)
    assert summary.index.tolist() == ["axis end", "axis order"]
    np.testing.assert_allclose(summary.loc["axis end"], [0.7, 0.4, 0.75, 0.7, 0.8])
    np.testing.assert_allclose(summary.loc["axis order"], [1, 3, 2, 1, 4])
    assert change.index.tolist() == ["special", "random"]
    expected = [[-0.3, -0.4, -0.2], [0.05, 0, 0.1]]
    np.testing.assert_allclose(change[["axis_end", "low", "high"]], expected, atol=1e-9)


# --- the claims ----------------------------------------------------------------------------------


def by_layer(values, measure="axis_end", column="value", **more) -> pd.DataFrame:
    """Four layers with narrow intervals, against a null of 0.5."""
    table = pd.DataFrame({"layer": range(5), column: values, "measure": measure})
    null = {"null": 0.5, "null_low": 0.4, "null_high": 0.6, "p": 0.5}
    return table.assign(low=table[column] - 0.01, high=table[column] + 0.01, **null, **more)


def lines_of(ends, stays=0.9, moved=-0.2, lowest=-0.1, collected=1.0, ratio=5.0) -> dict[str, str]:
    measured = pd.concat(
        [by_layer(ends), by_layer(ends, "axis_order"), by_layer(ends, "attachment")]
    )
    now = pd.concat(
        [
            by_layer([0.9] * 5, column="axis_end", condition="as it is"),
            by_layer([0.1, stays, stays, 0.1, 0.1], column="axis_end", condition="doubled"),
            by_layer([-0.9, 0, -0.3, 0, 0.1], column="axis_end", condition="change"),
        ]
    )
    change = {"special": [moved, moved - 0.05, moved + 0.05], "random": [0, lowest, 0.1]}
    lines = claims(
        measured,
        by_layer(ends),
        by_layer(ends),
        {"doubled": now, "reversed": pd.DataFrame(columns=["condition", "layer"])},
        pd.concat([by_layer([0, *[c] * 4], column="collected", set=s).iloc[1:] for s, c in
                   (("first", collected), ("later special", 1.0))]),
        by_layer([9000, *[ratio] * 4], column="ratio", kind="special"),
        pd.DataFrame(change, index=["axis_end", "low", "high"]).T,
        sink=2.0,
    )  # fmt: skip
    assert len({line["claim"] for line in lines}) == len(lines) == 10
    return {line["claim"]: line for line in lines}


def words_of(lines: dict) -> list[str]:
    return [line["verdict"].word for line in lines.values()]


def test_claims_by_hand():
    no, yes = "does not hold", "holds"
    out = [0.1, 0.9, 0.9, 0.1, 0.1]  # at half of the decoder layers
    assert words_of(lines_of(out)) == [yes] * 6 + [no] * 3 + [yes]
    inside = [0.9, 0.9, 0.1, 0.1, 0.1]  # the embeddings do not count
    assert words_of(lines_of(inside)) == [no] * 9 + [yes]  # and there is nothing to stay
    assert words_of(lines_of(out, stays=0.55))[5] == no
    rival = words_of(lines_of(out, collected=3.0, ratio=2000.0))
    assert rival[6:9] == [yes, no, yes]
    assert words_of(lines_of(out, moved=-0.2, lowest=-0.3))[-1] == no  # as random draws do
    assert words_of(lines_of(out, moved=0.2))[-1] == no


def test_claims_say_what_was_measured():
    lines = lines_of([0.1, 0.8, 0.9, 0.1, 0.1])
    line = lines["special tokens lie at the ends of the text cloud"]
    assert line["measured"] == "0.90 [0.89, 0.91] at layer 2; yes at 2 of 4"
    assert line["null"] == "0.50 [0.40, 0.60]"
    line = lines["they stay at the ends when the prompt is doubled"]
    assert line["measured"] == "change -0.30 [-0.31, -0.29] at most, layer 2; yes at 2 of 4"
    assert line["null"] == "text below 0.60"
    assert lines["rival: the first token is an attention sink"]["null"] == "sink from 2.00"
    line = lines["silencing the special neurons moves them off the ends"]
    assert line["measured"] == "-0.20 [-0.25, -0.15]"
    assert line["null"] == "+0.00 [-0.10, +0.10] (random neurons)"
