"""Attention flow: hand-made queries and keys, and transformers' own eager attention as referee."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, Rows, footprints, random_mllm, random_neurons, samples_for

from minerlib.deactivation import deactivate
from minerlib.findings import attention as flow
from minerlib.findings import last_token
from minerlib.findings.states import hidden_states
from minerlib.inference import paired, summarise
from minerlib.separation import separate


@cache
def eager(name: str):
    """A random model with sharp attention, whose weights transformers itself can return."""
    mllm = random_mllm(name, seed=1, attn_implementation="eager")
    for layer in mllm.layers:
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.v_proj.weight.data *= 5
    return mllm


@cache
def sdpa(name: str):
    """The same weights under the attention kernel that models load with."""
    mllm = random_mllm(name, seed=1)
    mllm.model.load_state_dict(eager(name).model.state_dict())
    return mllm


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def rows_of(mllm) -> Rows:
    return Rows(samples_for(mllm))


def attentions(mllm, batch) -> list[torch.Tensor]:
    """Attention [batch, head, query, key] of each layer, as transformers computes it."""
    return mllm.model(**batch, use_cache=False, output_attentions=True).attentions


def uniform(name: str):
    """A model whose queries are 0: every token attends uniformly over the tokens it sees."""
    mllm = copy.copy(sdpa(name))
    mllm.model = copy.deepcopy(mllm.model)
    mllm.layers = mllm.model.get_decoder().layers
    mllm.activations = [layer.mlp.act_fn for layer in mllm.layers]
    for layer in mllm.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.q_proj.bias)
    return mllm


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    key = [c for c in ("sample", "set", "layer") if c in table]
    return table.sort_values(key).reset_index(drop=True)


# --- pure ----------------------------------------------------------------------------------------


def test_every_form_of_mask_says_the_same():
    real = torch.tensor([[False, True, True, True], [True] * 4])
    causal = torch.ones(4, 4, dtype=torch.bool).tril() & real[:, None]
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~causal[:, None], torch.finfo(torch.float32).min)
    for mask in (None, real, causal[:, None], additive, additive.half()):
        assert (flow.visible(mask, real) == causal).all()
    assert (flow.visible(None, real, 1) == causal[:, -1:]).all()
    assert (flow.visible(None, real, 2) == causal[:, -2:]).all()


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
    heads = last_token.last_row(query[None], key[None], seen[None, -1])
    torch.testing.assert_close(heads, torch.tensor([0.0, 0, 0, 1]).expand(1, 2, 4))


def test_chunks_and_scaling(monkeypatch):
    torch.manual_seed(0)
    query, key = torch.randn(4, 9, 8), torch.randn(2, 9, 8)
    seen = torch.rand(9, 9) < 0.5
    seen.fill_diagonal_(True)
    logits = query @ key.repeat_interleave(2, 0).transpose(1, 2) * 0.7
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
    for block in (1, 100, 2**20):
        monkeypatch.setattr(flow, "_BLOCK", block)
        rows = torch.cat([p for _, p in flow.attention_rows(query, key, seen, 0.7)])
        torch.testing.assert_close(rows, expected)


# --- attention between sets ----------------------------------------------------------------------


def test_attention_between_is_the_models_own(name):
    """Against transformers' eager attention, sample by sample, from a padded batch of another."""
    bench = rows_of(sdpa(name))
    table = flow.attention_between(sdpa(name), bench, batch_size=3)
    kinds = sdpa(name).kinds
    expected = []
    for sample in bench:
        batch = eager(name).encode([sample])
        base = separate(eager(name), batch)
        with torch.inference_mode():
            for layer, p in enumerate(attentions(eager(name), batch)):
                p = p[0].mean(0)
                for q in kinds:
                    for k in kinds:
                        if base[q].any() and base[k].any():
                            mass = p[base[q][0]][:, base[k][0]].sum(1).mean()
                            expected.append((layer, q, k, float(mass)))
    expected = pd.DataFrame(expected, columns=["layer", "query", "key", "share"])
    expected = expected.groupby(["layer", "query", "key"])["share"].mean()
    found = table.set_index(["layer", "query", "key"])["share"]
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected.loc[found.index], atol=1e-5)
    assert found.max() - found.min() > 0.3  # sharp enough to be a test
    within = flow.attention_within(sdpa(name), bench)
    assert list(within.columns) == ["layer", "set", "share", "low", "high", "uniform", "n"]
    own = found[found.index.get_level_values("query") == found.index.get_level_values("key")]
    np.testing.assert_allclose(within["share"], own, atol=1e-5)
    assert ((within["low"] <= within["share"]) & (within["share"] <= within["high"])).all()


def test_a_uniform_model_is_its_own_null(name):
    mllm = uniform(name)
    bench = rows_of(mllm)
    table = flow.attention_within(mllm, bench)
    np.testing.assert_allclose(table["share"], table["uniform"], atol=1e-6)
    np.testing.assert_allclose(flow.attention_sinks(mllm, bench)["collected"], 1, atol=1e-5)
    last = last_token.last_token_flow(mllm, bench, saliency=False)
    np.testing.assert_allclose(last["attention"], last["uniform"], atol=1e-6)


def test_sinks_by_hand(name):
    """The mass that a set collects over all queries, over the same under uniform attention."""
    sample = samples_for(sdpa(name))[1]
    table = flow.attention_sinks(sdpa(name), [sample]).set_index(["layer", "set"])["collected"]
    batch = eager(name).encode([sample])
    base = separate(eager(name), batch)
    first = torch.zeros_like(base["text"])
    first[0, 0] = True
    with torch.inference_mode():
        p = torch.stack(attentions(eager(name), batch))[:, 0].mean(1)
    n = p.shape[-1]
    even = (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]).sum(0)
    sets = {"text": base["text"], "first": first, "later special": base["special"] & ~first}
    for set_, members in sets.items():
        expected = p[:, :, members[0]].sum((1, 2)) / even[members[0]].sum()
        np.testing.assert_allclose(table.xs(set_, level="set"), expected, rtol=1e-4)


# --- the last token ------------------------------------------------------------------------------


def test_last_token_flow_against_autograd_on_eager_attention(name):
    """Saliency |sum over heads of A dL/dA| by the definition, from a batch with padding."""
    bench = rows_of(sdpa(name))
    answers = last_token.answer_tokens(sdpa(name), bench)
    found = ordered(last_token.last_token_flow(sdpa(name), bench, answers, batch_size=3))
    rows = []
    for s, sample in enumerate(bench):
        batch = eager(name).encode([sample])
        embeddings = eager(name).model.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
        try:
            out = eager(name).model(**batch, use_cache=False, output_attentions=True)
        finally:
            hook.remove()
        loss = -out.logits[0, -1].log_softmax(-1)[answers[s]]
        grads = torch.autograd.grad(loss, out.attentions)
        base = separate(eager(name), batch)
        last = torch.zeros_like(base["text"])
        last[:, -1] = True
        sets = {k: base[k] & ~last for k in eager(name).kinds} | {"last": last}
        for layer, (p, g) in enumerate(zip(out.attentions, grads, strict=True)):
            slope = (p * g)[0, :, -1].sum(0).abs().detach()
            p = p[0, :, -1].mean(0).detach()
            rows += [
                (s, layer, k, int(m.sum()), float(p[m[0]].sum()), float(slope[m[0]].sum()))
                for k, m in sets.items()
                if m.any()
            ]
    columns = ["sample", "layer", "set", "tokens", "attention", "saliency"]
    expected = ordered(pd.DataFrame(rows, columns=columns))
    assert found[columns[:4]].equals(
        expected[columns[:4]].astype({"tokens": found["tokens"].dtype})
    )
    np.testing.assert_allclose(found["attention"], expected["attention"], atol=1e-5)
    size = expected["saliency"].max()
    np.testing.assert_allclose(found["saliency"], expected["saliency"], atol=1e-3 * size, rtol=1e-2)
    total = found.groupby(["sample", "layer"])[["attention", "uniform"]].sum()
    np.testing.assert_allclose(total, 1, atol=1e-5)
    quick = ordered(last_token.last_token_flow(sdpa(name), bench, answers, saliency=False))
    np.testing.assert_allclose(quick["attention"], found["attention"], atol=1e-5)


def test_knockout_cuts_what_it_says(name):
    """In the window the last row loses the set's columns and no other row changes."""
    mllm = eager(name)
    bench = Rows(samples_for(mllm)[1:3])
    medium = "image" if "image" in mllm.kinds else "audio"
    seen: list[tuple[int, torch.Tensor]] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i: seen.append((i, out[1])))
        for i, layer in enumerate(mllm.layers)
    ]
    try:
        settings = {"sets": [medium], "layers": [3], "cache": False}
        table = last_token.knockout(mllm, bench, window=3, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(table) == 2 and (table["layer"] == 3).all()
    free, cut = seen[: mllm.n_layers], seen[mllm.n_layers :]
    members = separate(mllm, mllm.encode(bench))[medium]
    for (layer, before), (_, after) in zip(free, cut, strict=True):
        real = separate(mllm, mllm.encode(bench))["prompt"]
        for b in range(2):
            rows = real[b].nonzero()[:-1, 0]
            torch.testing.assert_close(before[b][:, rows], after[b][:, rows])
            mass = after[b][:, -1, members[b]].sum()
            assert (mass == 0) == (layer in (2, 3, 4))
        torch.testing.assert_close(after[:, :, -1].sum(-1), torch.ones_like(after[:, :, -1, 0]))


def test_knockout_over_cached_keys_is_the_same(name):
    mllm = sdpa(name)
    bench = rows_of(mllm)
    settings = {"layers": [0, 5], "window": 2}
    tables = [
        ordered(last_token.knockout(mllm, bench, cache=cache, batch_size=size, **settings))
        for cache, size in ((False, 1), (True, 3))
    ]
    keys = ["sample", "layer", "set"]
    assert tables[0][keys].equals(tables[1][keys])
    assert tables[0]["log_loss"].abs().max() > 1e-3
    for column in ("probability", "blocked", "log_loss"):
        np.testing.assert_allclose(tables[0][column], tables[1][column], atol=1e-5)
    loss = tables[0]["probability"] - tables[0]["blocked"]
    np.testing.assert_allclose(tables[0]["loss"], loss)


def test_logit_lens_ends_in_the_models_own_answer(name):
    mllm = sdpa(name)
    bench = rows_of(mllm)
    answers = last_token.answer_tokens(mllm, bench, "model")
    table = last_token.logit_lens(mllm, bench, answers, batch_size=2)
    assert table["layer"].max() == mllm.n_layers and len(table) == len(bench) * (mllm.n_layers + 1)
    last = table[table["layer"] == mllm.n_layers].sort_values("sample")
    assert (last["rank"] == 0).all()
    with torch.inference_mode():
        p = mllm.forward(mllm.encode(list(bench))).logits[:, -1].softmax(-1).amax(-1)
    np.testing.assert_allclose(last["probability"], p, rtol=1e-3)
    states = hidden_states(mllm, bench, tokens_per_kind=None, equal=False)
    ends = (states.tokens["position"] == states.tokens["length"] - 1).to_numpy()
    texts = [mllm.tokenizer.decode([i]) for i in answers]
    assert [best[0] for best in last_token.read(mllm, states.hidden[-1, ends], 2)] == texts


def test_answer_tokens(mllm, samples):
    ids = last_token.answer_tokens(mllm, samples)
    for id_, sample in zip(ids, samples, strict=True):
        assert mllm.tokenizer.encode(sample.references[0])[0] == id_
    generated = mllm.model.generate(**mllm.encode(samples), max_new_tokens=1, do_sample=False)
    np.testing.assert_array_equal(
        last_token.answer_tokens(mllm, samples, "model"), generated[:, -1]
    )
    with pytest.raises(ValueError, match="reference or model"):
        last_token.answer_tokens(mllm, samples, "truth")
    with pytest.raises(ValueError, match="4 samples|5 samples"):
        last_token.logit_lens(mllm, samples, ids[:2])


# --- together with silencing, and without traces -------------------------------------------------


def test_everything_composes_with_silencing(name):
    """Silencing changes every measure, and nothing remains of it or of the measuring."""
    mllm = sdpa(name)
    bench = rows_of(mllm)
    answers = last_token.answer_tokens(mllm, bench, "model")
    before_footprints = footprints(mllm)
    measures = {
        "saliency": lambda: last_token.last_token_flow(mllm, bench, answers),
        "blocked": lambda: last_token.knockout(mllm, bench, answers, layers=[2]),
        "probability": lambda: last_token.logit_lens(mllm, bench, answers),
    }
    for column, measure in measures.items():
        free = measure()
        with deactivate(mllm, random_neurons(mllm, 0.5)):
            silent = measure()
        by = ["layer", "set"] if "set" in free else ["layer"]
        change = summarise(paired(free, silent, column, by), column, by)
        assert change[column].abs().max() > 0
        pd.testing.assert_frame_equal(measure(), free)
    assert footprints(mllm) == before_footprints


def test_errors_name_the_way_out(mllm, samples, monkeypatch):
    with pytest.raises(ValueError, match="window=0"):
        last_token.knockout(mllm, samples, window=0)
    with pytest.raises(ValueError, match="no sets"):
        last_token.knockout(mllm, samples, sets=["smell"])
    before = footprints(mllm)
    monkeypatch.setattr(last_token, "last_row", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last_token.last_token_flow(mllm, samples)
    assert footprints(mllm) == before
    monkeypatch.setattr(mllm.text_config, "_attn_implementation_internal", "flash_attention_2")
    for measure in (last_token.knockout, last_token.last_token_flow):
        with pytest.raises(ValueError, match="sdpa"):
            measure(mllm, samples)
