"""Hidden states of drawn tokens, and pictures of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Rows
from made import RNG, states_of, table_of

from minerlib.findings.states import hidden_states, project


def test_hidden_states_are_the_models(mllm, samples):
    states = hidden_states(mllm, Rows(samples), tokens_per_kind=None, equal=False, batch_size=2)
    assert states.hidden.shape == (
        mllm.n_layers + 1,
        len(states.tokens),
        mllm.layers[0].hidden_size,
    )
    assert states.hidden.dtype == np.float32
    for s, sample in enumerate(samples):
        batch = mllm.encode([sample])
        with torch.inference_mode():
            expected = mllm.model(**batch, output_hidden_states=True).hidden_states
        own = (states.tokens["sample"] == s).to_numpy()
        assert (states.tokens.loc[own, "id"].to_numpy() == batch["input_ids"][0].numpy()).all()
        assert states.tokens.loc[own, "position"].tolist() == list(range(own.sum()))
        for layer in range(mllm.n_layers):  # transformers' last one is after the final norm
            np.testing.assert_allclose(states.hidden[layer, own], expected[layer][0], atol=1e-4)
        norm = mllm.model.get_decoder().norm
        with torch.inference_mode():
            last = norm(torch.from_numpy(states.hidden[-1, own]))
        np.testing.assert_allclose(last, expected[-1][0], atol=1e-4)


def test_the_draw_is_equal_seeded_and_blind_to_batches(mllm, samples):
    draws = [hidden_states(mllm, samples, tokens_per_kind=4, batch_size=b) for b in (1, 3)]
    pd.testing.assert_frame_equal(draws[0].tokens, draws[1].tokens)
    np.testing.assert_allclose(draws[0].hidden, draws[1].hidden, atol=1e-4)
    counts = draws[0].tokens.groupby(["sample", "kind"]).size().unstack()
    assert (counts.max(axis=1) == counts.min(axis=1)).all() and counts.max().max() <= 4
    other = hidden_states(mllm, samples, tokens_per_kind=4, seed=1).tokens
    assert not other["position"].equals(draws[0].tokens["position"])


def test_the_token_table(mllm, samples):
    tokens = hidden_states(mllm, samples, tokens_per_kind=None, equal=False).tokens
    for _, own in tokens.groupby("sample"):
        kinds = own["kind"].tolist()
        for i, row in enumerate(own.itertuples()):
            start = i - row.place
            assert kinds[start : start + row.run] == [row.kind] * row.run
            assert start == 0 or kinds[start - 1] != row.kind
            assert row.length == len(kinds)
    special = tokens.query("kind == 'special'")["text"]
    assert special.str.startswith("<|").all()


def test_a_limit_that_is_not_equal(mllm, samples):
    """Each kind gives what it has, up to the limit."""
    drawn = {"equal": False, "batch_size": 2}
    few, every = (
        hidden_states(mllm, samples, tokens_per_kind=n, **drawn).tokens for n in (6, None)
    )
    counts = [t.groupby(["sample", "kind"]).size() for t in (few, every)]
    pd.testing.assert_series_equal(counts[0], counts[1].clip(upper=6))
    assert (counts[1] > 6).any()


def test_no_rows(mllm):
    with pytest.raises(ValueError, match="no rows"):
        hidden_states(mllm, [])


def test_some_of_the_tokens():
    kinds, samples = table_of({"text": 2, "image": 1, "special": 1}, 2)
    kinds[-2] = "text"  # the second sample holds no image
    states = states_of(np.arange(8)[None, :, None], kinds, samples)
    assert states.of("image", "text").hidden[0, :, 0].tolist() == [0, 1, 2]
    part = states.where(states.tokens["kind"] == "special")
    assert part.hidden[0, :, 0].tolist() == [3, 7]
    assert part.tokens["sample"].to_dict() == {0: 0, 1: 1}
    with pytest.raises(ValueError, match="no sample holds"):
        states.of("text", "smell")


def test_projections_show_the_same_tokens():
    kinds, samples = table_of({"audio": 10, "text": 10}, 8)
    states = states_of(RNG(0).standard_normal((3, 160, 4)), kinds, samples)
    table = project(states, [0, 2], seeds=(0, 1), n_tokens=60)
    assert table["view"].unique().tolist() == ["t-SNE, seed 0", "t-SNE, seed 1", "PCA"]
    panels = {key: part for key, part in table.groupby(["layer", "view"])}
    tokens = panels[0, "PCA"]["token"].tolist()
    assert len(panels) == 6 and len(set(tokens)) == 60
    assert all(panel["token"].tolist() == tokens for panel in panels.values())
    shown = states.tokens.loc[table["token"], ["sample", "kind"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(table[["sample", "kind"]], shown)
    a, b = (panels[0, f"t-SNE, seed {seed}"][["x", "y"]].to_numpy() for seed in (0, 1))
    assert not np.allclose(a, b)
    for layer in (0, 2):
        x = states.hidden[layer, tokens].astype(float)
        expected = np.linalg.svd(x - x.mean(0), full_matrices=False)
        xy = abs(panels[layer, "PCA"][["x", "y"]].to_numpy())
        np.testing.assert_allclose(xy, abs(expected[0] * expected[1])[:, :2], atol=1e-4)
    again = project(states, [0, 2], seeds=(0, 1), n_tokens=60)
    pd.testing.assert_frame_equal(again, table)
    other = project(states, [0], seeds=(0,), n_tokens=60, draw=1)["token"]
    assert other.tolist()[:60] != tokens
