"""Semantic probing (finding IV): known answers on made clouds, and honest nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import footprints, random_neurons
from made import MOST, RNG, states_of, table_of, value
from scipy.stats import ortho_group

from minerlib.findings import probing as room
from minerlib.findings.probing import (
    approach,
    claims,
    lens_words,
    log_reach,
    probing,
    pushed,
    silenced_reach,
    tip_places,
    tips,
)
from minerlib.findings.states import States, hidden_states


def probe(reaching: float = 0.2, seed: int = 0) -> States:
    """An audio cloud far from the text, the last `reaching` of each clip moved into the text."""
    kinds, samples = table_of({"audio": 10, "text": 10}, 20)
    x = RNG(seed).standard_normal((1, len(kinds), 4))
    states = states_of(x, kinds, samples)
    audio = states.tokens["kind"] == "audio"
    stays = audio & (states.tokens["place"] < 10 * (1 - reaching))
    states.hidden[0, stays.to_numpy(), 0] += 20
    return states


def test_one_cloud_reaching_into_the_other():
    still, reaching = (probing(probe(share)) for share in (0, 0.2))
    assert value(still, "probes")["value"] == 0
    row = value(reaching, "probes")
    assert 0.05 < row["value"] <= 0.2 and row["p"] == pytest.approx(1 / 201)
    assert value(reaching, "reach")["value"] < value(still, "reach")["value"]
    assert value(still, "reach")["value"] > 5 and value(still, "reach")["p"] == 1
    assert value(reaching, "elongation")["value"] > 3
    row = value(reaching, "tip_end")  # places 8 and 9 of 0..9 lie at 7/9 and 1 of the half-run
    assert 0.6 < row["value"] <= 1 and row["p"] < 0.05


def test_probing_does_not_see_rotation():
    states = probe()
    turned = States(
        (5 * states.hidden @ ortho_group.rvs(4, random_state=2)).astype(np.float32), states.tokens
    )
    a, b = probing(states), probing(turned)
    np.testing.assert_allclose(a[["value", "low", "high"]], b[["value", "low", "high"]], rtol=1e-3)


def test_probing_null_keeps_its_level():
    """Clouds that are one, stretched like hidden states, with a text centre drawn like a token."""
    kinds, samples = table_of({"audio": 5, "text": 5}, 10)
    stretch = np.array([4, 2, 1, 1, 1, 0.5])
    x = RNG(6).standard_normal((200, len(kinds), 6)) * stretch
    table = probing(states_of(x, kinds, samples), nearest=3, k=8, n_boot=20, n_null=99)
    rejected = (table["p"] <= 0.05).groupby(table["measure"]).sum()
    assert rejected.index.tolist() == ["elongation", "probes", "reach", "tip_end"]
    assert rejected.max() <= MOST


def test_probing_runs_on_a_model(mllm, samples):
    states = hidden_states(mllm, samples * 2, tokens_per_kind=5)
    table = probing(states, k=3, n_boot=20, n_null=20)
    assert set(table["kind"]) == set(states.tokens["kind"]) - {"text", "special"}
    assert set(table["layer"]) == set(range(mllm.n_layers + 1))


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
    np.testing.assert_allclose(table["reach"], [2 / 1.5, 9 / 5.5, 3.5 / 1.5] * 2)
    np.testing.assert_allclose(table["place"], [0, 1, 0.5] * 2)
    assert table["tip"].tolist() == [True, True, False] * 2  # a third and a bit of three: two


def test_tips_are_the_tokens_that_reach():
    states = probe(0.2)
    table = tips(states, "audio")
    first = table.head(40)
    assert (first["place"] >= 8 / 9 - 1e-9).all() and (first["reach"] < 5).all()
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


def test_what_the_lens_reads(small, monkeypatch):
    """Each state read as its own number: words are those of the layer, the tip's and the rest's."""
    monkeypatch.setattr(room, "read", lambda mllm, x: [[f"{v:g}"] for v in x[:, 0]])
    table = tips(small, "audio", nearest=1)
    found = lens_words(None, small, table, [1])
    assert found[["layer", "tokens"]].values.tolist() == [[1, "tip"], [1, "rest"]]
    assert found["words"].tolist() == ["'30' 1.00", "'100' 0.50, '45' 0.50"]
    assert lens_words(None, small, table, [0], top=1)["words"].tolist() == ["'3' 1.00", "'10' 0.50"]


# --- coming nearer -------------------------------------------------------------------------------


def test_log_reach_is_a_mean_of_logarithms(small):
    table = log_reach(small, nearest=1)
    assert table["kind"].tolist() == ["audio"] * 2 and table["layer"].tolist() == [0, 1]
    np.testing.assert_allclose(table["reach"], np.log([4 / 3, 18 / 11, 7 / 3]).mean())


def reach_table(*layers: list[float]) -> pd.DataFrame:
    """Log reach of prompts, from factors [layer][sample]."""
    table = pd.DataFrame(np.log(layers).T).rename_axis("sample").reset_index()
    table = table.melt("sample", var_name="layer", value_name="reach")
    return table.assign(kind="audio")


def test_approach_is_relative_to_a_layer():
    reach = reach_table([4, 1], [8, 2], [2, 2])
    found = approach(reach, 0)
    assert found["layer"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found["reach"], [1, 2, 1])  # geometric means over prompts
    np.testing.assert_allclose(found.loc[2, ["low", "high"]].astype(float), [0.5, 2])
    np.testing.assert_allclose(approach(reach, 1)["reach"], [0.5, 1, 0.5])


def test_pushed_beside_random_draws():
    before = reach_table([9, 9], [1, 2], [1, 2])
    after = reach_table([9, 9], [2, 4], [8, 16])
    draws = [reach_table([9, 9], [f, 2 * f], [f, 2 * f]) for f in (0.5, 3.0)]
    layers, whole = pushed(before, after, draws)
    assert layers["silenced"].tolist() == ["own"] * 3 + ["random"] * 3
    np.testing.assert_allclose(layers["reach"], [1, 2, 8, 1, 1.75, 1.75])
    np.testing.assert_allclose(layers["low"], [1, 2, 8, 1, 0.5, 0.5])
    np.testing.assert_allclose(layers["high"], [1, 2, 8, 1, 3, 3])
    assert whole["silenced"].tolist() == ["own", "random"]  # over decoder layers, not embeddings
    np.testing.assert_allclose(whole[["reach", "low", "high"]], [[4, 4, 4], [1.75, 0.5, 3]])


def test_silencing_is_of_the_neurons_and_ends(mllm, samples):
    before, drawn = footprints(mllm), {"tokens_per_kind": 5, "batch_size": 3}
    as_is = log_reach(hidden_states(mllm, samples, **drawn))
    none, some = (random_neurons(mllm, share) for share in (0, 0.3))
    pd.testing.assert_frame_equal(silenced_reach(mllm, samples, none, **drawn), as_is)
    moved = silenced_reach(mllm, samples, some, **drawn)
    same = np.isclose(moved["reach"], as_is["reach"], atol=1e-6)
    assert same[as_is["layer"] == 0].all() and not same[as_is["layer"] > 0].any()
    assert footprints(mllm) == before


# --- the claims ----------------------------------------------------------------------------------


def measured(reach, probes=(0.5, 0.5, 0.5)) -> pd.DataFrame:
    """A table of `probing` for three layers: values with narrow intervals against 1 and 0.5."""
    tables = []
    for measure, values, null in (("reach", reach, 1), ("probes", probes, 0.5)):
        table = pd.DataFrame({"layer": [0, 1, 2], "value": values, "null": null})
        near = {"low": table["value"] - 0.05, "high": table["value"] + 0.05}
        near |= {"null_low": table["null"] - 0.1, "null_high": table["null"] + 0.1}
        ahead = (table["null"] - table["value"]) * (1 if measure == "reach" else -1)
        table["p"] = np.where(ahead > 0, 0.001, 1)
        tables.append(table.assign(kind="audio", measure=measure, **near))
    long = tables[1].assign(measure="elongation")
    return pd.concat([*tables, long], ignore_index=True)


def verdicts(table, last: float, own: float, random: float) -> list[str]:
    reach = reach_table([1, 1], [2, 2], [last, last])
    rows = [("own", own, own, own), ("random", 1, 0.9, random)]
    whole = pd.DataFrame(rows, columns=["silenced", "reach", "low", "high"])
    return [line["verdict"].word for line in claims(table, reach, {"audio": whole})]


def test_claims_by_hand():
    no, yes = "does not hold", "holds"
    far = np.array([0.1, 2, 2])  # near at the embeddings, which do not count
    assert verdicts(measured(far), 3, 0.8, 1.1) == [no] * 6
    near = np.array([2, 0.1, 2])  # one layer is enough
    found = verdicts(measured(near, np.array([0.5, 0.5, 0.9])), 0.5, 1.5, 1.1)
    assert found == [yes] * 6
    assert verdicts(measured(far), 1.5, 1.05, 1.1)[3:] == [no, yes, no]  # nearer than layer 1 only


def test_claims_say_what_was_measured():
    reach = reach_table([1, 1], [2, 2], [0.5, 0.5])
    rows = [("own", 1.5, 1.4, 1.6), ("random", 1, 0.9, 1.1)]
    whole = pd.DataFrame(rows, columns=["silenced", "reach", "low", "high"])
    lines = claims(measured(np.array([9, 0.5, 0.1])), reach, {"audio": whole})
    assert all(line["claim"].startswith("audio: ") for line in lines) and len(lines) == 6
    assert lines[0]["measured"] == "0.10 [0.05, 0.15] at layer 2; yes at 2 of 2"
    assert lines[0]["null"] == "1.00 [0.90, 1.10]" and lines[0]["p"] == 0.001
    assert lines[3]["measured"] == "x 0.50 [0.50, 0.50]"
    assert lines[4]["measured"] == "x 0.25 [0.25, 0.25]"
    assert lines[5]["measured"] == "x 1.50 [1.40, 1.60]"
    assert lines[5]["null"] == "x 1.00 [0.90, 1.10] (random neurons)"
