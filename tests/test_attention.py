"""Attention between sets: hand-made queries and keys, and transformers' own eager attention."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, Rows, samples_for
from eager import attentions, eager, sdpa, uniform
from made import MOST
from scipy import stats

from minerlib import scoring
from minerlib.findings import attention as flow
from minerlib.findings.stability import noise
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
    for s, sample in enumerate(bench):
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
                        rows.append((s, layer, q, k, *map(float, pair)))
    rows = pd.DataFrame(rows, columns=["sample", "layer", "query", "key", "share", "uniform"])
    groups = rows.groupby(["layer", "query", "key"])
    found = table.set_index(["layer", "query", "key"])
    expected = groups[["share", "uniform"]].mean().loc[found.index]
    assert len(found) == groups.ngroups and (found["n"] == groups.size().loc[found.index]).all()
    np.testing.assert_allclose(found[expected.columns], expected, atol=1e-5)
    assert found["share"].max() - found["share"].min() > 0.3  # sharp enough to be a test
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    assert table["high"].gt(table["low"])[table["n"] > 1].mean() > 0.8

    within = flow.attention_within(sdpa(name), bench, batch_size=3)
    assert list(within.columns) == ["sample", "layer", "set", "share", "uniform"]
    own = rows[rows["query"] == rows["key"]].rename(columns={"key": "set"})
    both = within.merge(own, on=["sample", "layer", "set"], suffixes=("", "_eager"))
    assert len(both) == len(within) == len(own)
    for column in ("share", "uniform"):
        np.testing.assert_allclose(both[column], both[f"{column}_eager"], atol=1e-5)


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


# --- hypothesis 1 --------------------------------------------------------------------------------


def made(excess, media=None, set_="image", benchmark="a", uniform=0.3) -> pd.DataFrame:
    """A table of `attention_within` with these excesses [prompt, layer]."""
    excess = np.asarray(excess, float)
    sample, layer = (x.ravel() for x in np.indices(excess.shape))
    table = pd.DataFrame({"sample": sample, "layer": layer, "set": set_, "benchmark": benchmark})
    table["medium"] = (np.arange(len(excess)) if media is None else np.asarray(media))[sample]
    return table.assign(share=uniform + excess.ravel(), uniform=uniform)


def test_hypothesis_1_by_hand():
    """Layers of a prompt, prompts of a benchmark and then benchmarks are averaged; t intervals."""
    first = np.array([[0.1, 0.3], [0.2, 0.2], [0.3, 0.5], [0.0, 0.4]])  # means 0.2, 0.2, 0.4, 0.2
    second = np.array([[0.1, 0.1], [0.0, 0.4]])
    table = flow.hypothesis_1(pd.concat([made(first), made(second, benchmark="b", uniform=0.5)]))
    (line,) = table.reset_index().to_dict("records")
    assert line["set"] == "image" and line["uniform"] == pytest.approx(0.4)
    assert line["excess"] == pytest.approx((0.25 + 0.15) / 2)
    assert line["share"] == pytest.approx(0.4 + 0.2)
    parts = np.array([np.var([0.2, 0.2, 0.4, 0.2], ddof=1) / 4, np.var([0.1, 0.2], ddof=1) / 2]) / 4
    df = parts.sum() ** 2 / (parts**2 / [3, 1]).sum()
    half = stats.t.ppf(0.975, df) * np.sqrt(parts.sum())
    assert [line["low"], line["high"]] == pytest.approx([0.2 - half, 0.2 + half])
    # Twice the same about one medium tells no more than once.
    once, twice = (flow.hypothesis_1(made(x, m)).iloc[0] for x, m in (
        (first, range(4)), (np.repeat(first, 2, 0), np.repeat(range(4), 2)),
    ))  # fmt: skip
    assert [twice["low"], twice["high"]] == pytest.approx([once["low"], once["high"]])


def test_hypothesis_1_says_what_the_rule_says():
    noise = 0.01 * np.random.default_rng(0).standard_normal((20, 4))
    sets = {"text": 0.2, "special": 0.05, "image": -0.2, "video": 0.1}
    table = flow.hypothesis_1(pd.concat([made(x + noise, set_=k) for k, x in sets.items()]))
    assert table.index.tolist() == list(sets)
    said = [word.removesuffix(" (close)") for word in table["hypothesis 1"]]
    assert said == ["holds", "does not hold", "does not hold", "cannot be told"]
    assert flow.hypothesis_1(made(0.2 + noise), smallest=0.3)["hypothesis 1"].iloc[0] == said[1]


def test_hypothesis_1_keeps_its_level():
    """At the smallest effect neither word is said too often, with few and unlike prompts."""
    rng = np.random.default_rng(1)
    prompt = rng.choice([-0.15, 0.0, 0.15], (200, 10, 1))
    excess = 0.1 + prompt + 0.05 * rng.standard_normal((200, 10, 3))
    tables = [made(x, set_=f"set {i}") for i, x in enumerate(excess)]
    said = flow.hypothesis_1(pd.concat(tables))["hypothesis 1"].str.removesuffix(" (close)")
    assert (said == "holds").sum() <= stats.binom.ppf(0.999, 200, 0.025)
    assert (said == "does not hold").sum() <= MOST


# --- attention taken away ------------------------------------------------------------------------


def with_other_media(samples):
    """The same prompts with other pictures, clips and sounds of the same sizes."""
    return [noise(sample) for sample in samples]


def last(mllm, samples):
    with torch.inference_mode():
        return mllm.forward(mllm.encode(samples)).logits[:, -1]


def test_cut_off_everywhere_nothing_of_a_medium_reaches_the_answer(name):
    mllm = sdpa(name)
    samples = samples_for(mllm)
    media = [kind for kind in mllm.kinds if kind not in ("text", "special")]
    others = with_other_media(samples)
    assert not torch.allclose(last(mllm, samples), last(mllm, others))
    with flow.cut_off(mllm, media, range(mllm.n_layers)):
        torch.testing.assert_close(last(mllm, samples), last(mllm, others))
        generated = mllm.generate(mllm.encode(samples), 3), mllm.generate(mllm.encode(others), 3)
    assert generated[0] == generated[1]
    with flow.cut_off(mllm, media, range(mllm.n_layers - 1)):  # one layer is enough to read
        assert not torch.allclose(last(mllm, samples), last(mllm, others))


def test_a_medium_cut_off_sees_what_it_saw(name):
    """Its own tokens' states are as ever; a prompt without it is untouched."""
    mllm = sdpa(name)
    samples = samples_for(mllm)
    medium = "image" if "image" in mllm.kinds else "audio"
    batch, states = mllm.encode(samples), {}
    own = separate(mllm, batch)[medium]
    for key, layers in {"own": [], "cut": range(mllm.n_layers)}.items():
        keep = mllm.tap(hidden=lambda i, h, key=key: states.update({(key, i): h.clone()}))
        with flow.cut_off(mllm, [medium], layers), keep, torch.inference_mode():
            mllm.forward(batch)
    a, b = states["own", mllm.n_layers], states["cut", mllm.n_layers]
    assert torch.equal(a[own], b[own])
    without = ~own.any(1)
    real = separate(mllm, batch)["prompt"]
    assert torch.equal(a[without][real[without]], b[without][real[without]])
    assert not torch.allclose(a[~without][:, -1], b[~without][:, -1])


def test_kinds_that_are_not_there_are_named(name):
    mllm = sdpa(name)
    unknown = pytest.raises(ValueError, match="kinds .'smell'.: .* has text, special")
    with unknown, flow.cut_off(mllm, ["smell"], [0]):
        pass
