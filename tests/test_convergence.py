"""Convergence (finding II): known answers on made clouds, and honest nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made import MOST, RNG, states_of, table_of, value
from scipy.stats import ortho_group

from minerlib.findings.convergence import convergence
from minerlib.findings.states import States, hidden_states


@pytest.fixture(scope="module")
def approach() -> States:
    """Two round clouds in four dimensions, 10, 10, 4, 0 and 0 apart in five layers."""
    kinds, samples = table_of({"text": 6, "image": 6}, 30)
    noise = RNG(0).standard_normal((5, len(kinds), 4))
    shift = np.zeros_like(noise)
    for layer, apart in enumerate((10, 10, 4, 0, 0)):
        shift[layer, np.array(kinds) == "image", 0] = apart
    return states_of(noise + shift, kinds, samples)


@pytest.fixture(scope="module")
def curves(approach) -> pd.DataFrame:
    return convergence(approach)


def test_two_clouds_apart_and_mixed(curves):
    expected = {"distance": (5, 0), "accuracy": (1, 0.5), "mixing": (0, 1), "silhouette": (None, 0)}
    for measure, (apart, mixed) in expected.items():
        first, last = value(curves, measure, 0), value(curves, measure, 4)
        assert apart is None or first["value"] == pytest.approx(apart, abs=0.3)
        assert last["value"] == pytest.approx(mixed, abs=0.2)
        assert first["p"] == pytest.approx(1 / 201)
        assert last["null_low"] <= last["value"] <= last["null_high"]
        assert (curves["low"] <= curves["high"]).all()


def test_convergence_does_not_see_rotation_scale_or_names(approach, curves):
    turned = 2 * approach.hidden @ ortho_group.rvs(4, random_state=1) + 3
    names = approach.tokens.assign(kind=approach.tokens["kind"].map({"text": "b", "image": "a"}))
    found = convergence(States(turned.astype(np.float32), names))
    columns = ["value", "low", "high", "null"]
    np.testing.assert_allclose(found[columns], curves[columns], atol=2e-2)


@pytest.mark.slow
def test_convergence_null_keeps_its_level():
    """200 pairs of clouds without a difference, each sample with a place of its own."""
    kinds, samples = table_of({"text": 4, "image": 4}, 12)
    own = RNG(3).standard_normal((200, 12, 3))[:, samples]
    states = states_of(own + RNG(4).standard_normal(own.shape), kinds, samples)
    curves = convergence(states, k=5, n_boot=20, n_null=99)
    rejected = (curves["p"] <= 0.05).groupby(curves["measure"]).sum()
    assert rejected.drop("cka").max() <= MOST
    assert rejected["cka"] > 100  # but the kinds' means do share the sample's place


def test_convergence_runs_on_a_model(mllm, samples):
    states = hidden_states(mllm, samples * 2, tokens_per_kind=5)
    medium = "image" if "image" in mllm.kinds else "audio"
    curves = convergence(states, ["text", medium], k=3, n_boot=20, n_null=20)
    assert set(curves["layer"]) == set(range(mllm.n_layers + 1))
    assert curves["measure"].nunique() == 5
