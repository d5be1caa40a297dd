"""Attention between sets: hand-made queries and keys, and transformers' own eager attention."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, Rows, samples_for
from eager import attentions, eager, sdpa, uniform

from minerlib import scoring
from minerlib.findings import attention as flow
from minerlib.separation import separate


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


# --- pure ----------------------------------------------------------------------------------------


def test_every_form_of_mask_says_the_same():
    real = torch.tensor([[False, True, True, True], [True] * 4])
    causal = torch.ones(4, 4, dtype=torch.bool).tril() & real[:, None]
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~causal[:, None], torch.finfo(torch.float32).min)
    biased = additive - 3  # a bias leaves a key visible
    for mask in (None, real, causal[:, None], additive, additive.half(), biased):
        assert (flow.visible(mask, real) == causal).all()
    assert (flow.visible(None, real, 1) == causal[:, -1:]).all()
    assert (flow.visible(None, real, 2) == causal[:, -2:]).all()
    window = causal & ~torch.ones(4, 4, dtype=torch.bool).tril(-2)  # of two tokens
    assert (flow.visible(window[:, None], real) == window).all()


def test_a_hand_made_flow():
    """Of four tokens the third attends to the first, the fourth to itself, the second evenly."""
    key = 30 * torch.eye(4)[None]
    query = torch.zeros(2, 4, 4)  # two heads share one key head
    query[:, 2, 0] = query[:, 3, 3] = 10
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    sets = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    mass, even = flow.mass_between(query, key, seen, sets)
    nan = torch.nan
    expected = torch.tensor([[1, 0, nan], [0.5, 0.5, nan], [nan, nan, nan]])
    torch.testing.assert_close(mass, expected, equal_nan=True)
    expected = torch.tensor([[1, 0, nan], [7 / 12, 5 / 12, nan], [nan, nan, nan]])
    torch.testing.assert_close(even, expected, equal_nan=True)


def test_chunks_masks_and_scaling(monkeypatch):
    torch.manual_seed(0)
    query, key = torch.randn(4, 9, 8), torch.randn(2, 9, 8)
    seen = torch.rand(9, 9) < 0.5
    seen.fill_diagonal_(True)
    logits = query @ key.repeat_interleave(2, 0).transpose(1, 2) * 0.7
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
    for block in (1, 100, 2**20):
        monkeypatch.setattr(scoring, "_BLOCK", block)
        mass, _ = flow.mass_between(query, key, seen, torch.eye(9), 0.7)
        torch.testing.assert_close(mass, expected)


# --- against the models' own attention -----------------------------------------------------------


def test_attention_between_is_the_models_own(name):
    """Against transformers' eager attention, sample by sample, from a padded batch of another."""
    bench = Rows(samples_for(sdpa(name)))
    table = flow.attention_between(sdpa(name), bench, batch_size=3)
    columns = ["layer", "query", "key", "share", "low", "high", "uniform", "n"]
    assert list(table.columns) == columns
    kinds = sdpa(name).kinds
    rows = []
    for sample in bench:
        batch = eager(name).encode([sample])
        base = separate(eager(name), batch)
        with torch.inference_mode():
            found = [p[0].mean(0) for p in attentions(eager(name), batch)]
        even = torch.ones_like(found[0]).tril()
        even /= even.sum(-1, keepdim=True)
        for layer, p in enumerate(found):
            for q in kinds:
                for k in kinds:
                    if base[q].any() and base[k].any():
                        pair = [x[base[q][0]][:, base[k][0]].sum(1).mean() for x in (p, even)]
                        rows.append((layer, q, k, *map(float, pair)))
    rows = pd.DataFrame(rows, columns=["layer", "query", "key", "share", "uniform"])
    groups = rows.groupby(["layer", "query", "key"])
    found = table.set_index(["layer", "query", "key"])
    expected = groups.mean().loc[found.index]
    assert len(found) == groups.ngroups and (found["n"] == groups.size().loc[found.index]).all()
    np.testing.assert_allclose(found[expected.columns], expected, atol=1e-5)
    assert found["share"].max() - found["share"].min() > 0.3  # sharp enough to be a test
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    assert table["high"].gt(table["low"])[table["n"] > 1].mean() > 0.8

    within = flow.attention_within(sdpa(name), bench)
    assert list(within.columns) == ["layer", "set", "share", "low", "high", "uniform", "n"]
    own = table[table["query"] == table["key"]].reset_index()
    assert within["set"].equals(own["key"])
    np.testing.assert_allclose(within["share"], own["share"], atol=1e-5)


def test_a_uniform_model_is_its_own_null(name):
    mllm = uniform(name)
    bench = Rows(samples_for(mllm))
    table = flow.attention_between(mllm, bench, batch_size=3)
    np.testing.assert_allclose(table["share"], table["uniform"], atol=1e-6)
    np.testing.assert_allclose(flow.attention_sinks(mllm, bench)["collected"], 1, atol=1e-5)


def test_sinks_by_hand(name):
    """The mass that a set collects over all queries, over the same under uniform attention."""
    bench = samples_for(sdpa(name))[:3]
    table = flow.attention_sinks(sdpa(name), bench, batch_size=3)
    assert list(table.columns) == ["layer", "set", "collected", "low", "high", "n"]
    ratios: dict[str, list] = {}
    for sample in bench:
        batch = eager(name).encode([sample])
        base = separate(eager(name), batch)
        first = torch.zeros_like(base["text"])
        first[0, 0] = True
        with torch.inference_mode():
            p = torch.stack(attentions(eager(name), batch))[:, 0].mean(1)
        n = p.shape[-1]
        even = (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]).sum(0)
        sets = {k: base[k] for k in eager(name).kinds}
        sets |= {"first": first, "later special": base["special"] & ~first}
        for set_, members in sets.items():
            if members.any():
                ratio = p[:, :, members[0]].sum((1, 2)) / even[members[0]].sum()
                ratios.setdefault(set_, []).append(ratio)
    assert set(table["set"]) == set(ratios)
    for set_, values in ratios.items():
        found = table[table["set"] == set_]
        assert (found["n"] == len(values)).all()
        np.testing.assert_allclose(found["collected"], torch.stack(values).mean(0), rtol=1e-4)


def test_hypothesis_1_by_hand():
    """Nine of ten layers above the null hold, five do not, seven hold in part; ties are close."""

    def layers(name, above):
        low = [0.6] * above + [0.1] * (10 - above)
        return pd.DataFrame({"set": name, "share": 0.5, "low": low, "high": 0.7, "uniform": 0.5})

    within = pd.concat([layers(n, k) for n, k in {"a": 10, "b": 9, "c": 7, "d": 5, "e": 1}.items()])
    table = flow.hypothesis_1(within)
    assert table["above"].tolist() == [1.0, 0.9, 0.7, 0.5, 0.1] and not table["below"].any()
    said = ["holds", "holds (close)", "holds in part", "does not hold (close)", "does not hold"]
    assert table["hypothesis 1"].tolist() == said
