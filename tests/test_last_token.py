"""What reaches the last token: against transformers' eager attention, and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, Rows, footprints, random_neurons, samples_for
from eager import eager, sdpa, uniform

from minerlib.deactivation import deactivate
from minerlib.findings import last_token
from minerlib.findings.states import hidden_states
from minerlib.separation import separate
from minerlib.tasks import Sample


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def rows_of(mllm) -> Rows:
    return Rows(samples_for(mllm))


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    key = [c for c in ("sample", "set", "layer") if c in table]
    return table.sort_values(key).reset_index(drop=True)


# --- the token followed --------------------------------------------------------------------------


def test_answer_tokens(mllm, samples):
    ids = last_token.answer_tokens(mllm, samples)
    for id_, sample in zip(ids, samples, strict=True):
        assert mllm.tokenizer.encode(sample.references[0])[0] == id_
    generated = mllm.model.generate(**mllm.encode(samples), max_new_tokens=1, do_sample=False)
    np.testing.assert_array_equal(
        last_token.answer_tokens(mllm, samples, "model"), generated[:, -1]
    )
    usual = [Sample("Who?", ("gym", "Arlen", "Arlen"))]
    expected = mllm.tokenizer.encode("Arlen", add_special_tokens=False)[0]
    assert last_token.answer_tokens(mllm, usual).tolist() == [expected]
    with pytest.raises(ValueError, match=r"samples \[1\] have an empty reference"):
        last_token.answer_tokens(mllm, [*usual, Sample("Who?", ("",))])
    with pytest.raises(ValueError, match="reference or model"):
        last_token.answer_tokens(mllm, samples, "truth")
    with pytest.raises(ValueError, match="4 samples|5 samples"):
        last_token.logit_lens(mllm, samples, ids[:2])


# --- attention and saliency ----------------------------------------------------------------------


def test_last_row_by_hand():
    """Four heads share two key heads, in order; hidden keys get nothing."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    seen = torch.tensor([[False, True, True, False, True], [True] * 5])
    logits = torch.einsum("bhd,bhkd->bhk", query[:, :, -1], key.repeat_interleave(2, 1))
    for scaling in (None, 0.7):
        expected = logits * (8**-0.5 if scaling is None else scaling)
        expected = expected.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        torch.testing.assert_close(last_token.last_row(query, key, seen, scaling), expected)


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
    whole = found.groupby(["sample", "layer"])[["tokens", "attention"]].transform("sum")
    np.testing.assert_allclose(whole["attention"], 1, atol=1e-5)
    np.testing.assert_allclose(found["uniform"], found["tokens"] / whole["tokens"], atol=1e-6)


def test_saliency_is_the_slope_of_the_loss(name):
    """By finite differences: attention to one token scaled by 1 + e moves the loss by A dL/dA e."""
    mllm, layer = sdpa(name), 2
    bench = samples_for(mllm)[1:2]
    answers = last_token.answer_tokens(mllm, bench)
    flow = last_token.last_token_flow(mllm, bench, answers).query("layer == @layer")
    found = flow.set_index("set")["saliency"]["last"]  # one token, so no absolute values are summed
    attention = mllm.layers[layer].self_attn
    batch = mllm.encode(bench)

    @torch.inference_mode()
    def loss(scale: float) -> float:
        """With the value of the last token scaled for the last query, as its attention would be."""
        parts = {}

        def see(i, query, key, mask, scaling):
            seen = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
            parts["p"] = last_token.last_row(query, key, seen, scaling)[0, :, -1]

        def add(module, args):
            heads = args[0].clone()
            value = parts["v"][0, -1].view(-1, module.in_features // len(parts["p"]))
            value = value.repeat_interleave(len(parts["p"]) // len(value), 0)
            heads[0, -1] += (scale * parts["p"][:, None] * value).flatten()
            return (heads,)

        hooks = [
            attention.v_proj.register_forward_hook(lambda m, a, out: parts.update(v=out)),
            attention.o_proj.register_forward_pre_hook(add),
        ]
        try:
            with mllm.tap(attention=see, layers=[layer]):
                logits = mllm.forward(batch).logits[0, -1]
        finally:
            for hook in hooks:
                hook.remove()
        return float(-logits.double().log_softmax(-1)[answers[0]])

    step = 0.05
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert abs(abs(slope) - found) < 0.02 * found


def test_a_uniform_model_is_its_own_null(name):
    mllm = uniform(name)
    answers = last_token.answer_tokens(mllm, rows_of(mllm))
    flow = last_token.last_token_flow(mllm, rows_of(mllm), answers)
    np.testing.assert_allclose(flow["attention"], flow["uniform"], atol=1e-6)


# --- knockout ------------------------------------------------------------------------------------


def test_the_width_of_a_window():
    for n, expected in ((1, 1), (4, 1), (8, 2), (28, 6)):
        assert last_token.width(SimpleNamespace(n_layers=n)) == expected
    mllm = SimpleNamespace(n_layers=8)
    assert [last_token.width(mllm, w) for w in (1, 8)] == [1, 8]
    for window in (0, 9):
        with pytest.raises(ValueError, match=f"window={window}: give 1 to 8 layers"):
            last_token.width(mllm, window)


@pytest.mark.parametrize(
    ("centre", "window", "cut_in"),
    [(3, 3, (2, 3, 4)), (0, 2, (0,)), (5, 2, (4, 5)), (7, 3, (6, 7))],
)
def test_knockout_cuts_what_it_says(name, centre, window, cut_in):
    """In the window the last row loses the set's columns, never itself; no other row changes."""
    mllm = eager(name)
    bench = Rows(samples_for(mllm)[1:3])
    sets = [kind for kind in mllm.kinds if kind != "video"]  # in none of these samples
    seen, logits = [], []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out: seen.append(out[1]))
        for layer in mllm.layers
    ]
    hooks.append(mllm.model.register_forward_hook(lambda m, a, out: logits.append(out.logits)))
    answers = last_token.answer_tokens(mllm, bench)
    settings = {"layers": [centre], "window": window, "cache": False}
    try:
        table = last_token.knockout(mllm, bench, answers, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(table) == 2 * len(sets) and (table["layer"] == centre).all()
    n, base = mllm.n_layers, separate(mllm, mllm.encode(bench))
    free, *runs = (torch.stack(seen[i : i + n]) for i in range(0, len(seen), n))
    p = torch.stack(logits)[:, :, -1].softmax(-1)[:, torch.arange(2), answers].numpy()
    held = torch.tensor([layer not in cut_in for layer in range(n)])
    for set_, cut, blocked in zip(sets, runs, p[1:], strict=True):
        members = base[set_].clone()
        members[:, -1] = False
        for b in range(2):
            rows = base["prompt"][b].nonzero()[:-1, 0]
            torch.testing.assert_close(cut[:, b][:, :, rows], free[:, b][:, :, rows])
            mass = cut[:, b, :, -1][..., members[b]].sum((1, 2))
            assert ((mass > 0) == held).all()
            left = free[cut_in[0], b, :, -1] * ~members[b]
            left /= left.sum(-1, keepdim=True)
            torch.testing.assert_close(cut[cut_in[0], b, :, -1], left)
        found = table[table["set"] == set_].sort_values("sample")
        expected = {"probability": p[0], "blocked": blocked, "loss": p[0] - blocked}
        for column, values in expected.items():
            np.testing.assert_allclose(found[column], values, rtol=1e-4, atol=1e-7)


def test_knockout_over_cached_keys_is_the_same(name):
    mllm = sdpa(name)
    bench = rows_of(mllm)
    answers = last_token.answer_tokens(mllm, bench)
    settings = {"layers": [0, 5], "window": 2}
    tables = [
        ordered(last_token.knockout(mllm, bench, answers, cache=cache, batch_size=size, **settings))
        for cache, size in ((False, 1), (True, 3))
    ]
    keys = ["sample", "layer", "set"]
    assert tables[0][keys].equals(tables[1][keys])
    assert tables[0]["loss"].abs().max() > 1e-4
    for column in ("probability", "blocked", "loss"):
        np.testing.assert_allclose(tables[0][column], tables[1][column], atol=1e-5)


def test_a_cache_that_cannot_step_back_is_an_error(name, monkeypatch):
    bench = rows_of(sdpa(name))
    answers = last_token.answer_tokens(sdpa(name), bench)
    noise = iter(np.linspace(0, 1, 200))
    own = last_token._log_p
    monkeypatch.setattr(last_token, "_log_p", lambda *args: own(*args) + float(next(noise)))
    with pytest.raises(RuntimeError, match="call with cache=False"):
        last_token.knockout(sdpa(name), bench, answers, cache=True)


# --- the logit lens ------------------------------------------------------------------------------


def test_logit_lens_by_hand(name):
    """Probability and rank of any answer in every layer, and in the last the model's own."""
    mllm = sdpa(name)
    bench = rows_of(mllm)
    states = hidden_states(mllm, bench, tokens_per_kind=None, equal=False)
    ends = (states.tokens["position"] == states.tokens["length"] - 1).to_numpy()
    with torch.inference_mode():
        logits = last_token.unembed(mllm, torch.from_numpy(states.hidden[:, ends]))
        own = mllm.forward(mllm.encode(list(bench))).logits[:, -1]
    torch.testing.assert_close(logits[-1], own, rtol=1e-3, atol=1e-4)
    answers = last_token.answer_tokens(mllm, bench)
    p = logits.softmax(-1).numpy()  # [layer, sample, token]
    of_answer = p[:, range(len(bench)), answers]
    table = last_token.logit_lens(mllm, bench, answers, batch_size=2)
    assert len(table) == of_answer.size
    at = table["layer"], table["sample"]
    np.testing.assert_allclose(table["probability"], of_answer[at], rtol=1e-3)
    ranks = (p > of_answer[..., None]).sum(-1)[at]
    assert ranks.max() > 10 and (abs(table["rank"] - ranks) <= 1).all()
    assert (table["rank"] == ranks).mean() > 0.9
    best = last_token.logit_lens(mllm, bench, last_token.answer_tokens(mllm, bench, "model"))
    assert (best["rank"][best["layer"] == mllm.n_layers] == 0).all()
    tokens = [[mllm.tokenizer.decode([i]) for i in row] for row in own.topk(2)[1].tolist()]
    assert last_token.read(mllm, states.hidden[-1, ends], 2) == tokens


# --- the finding ---------------------------------------------------------------------------------


def test_measures_are_the_four_in_one_table(name):
    mllm = sdpa(name)
    bench = Rows(samples_for(mllm)[1:4])
    answers = last_token.answer_tokens(mllm, bench, "model")
    table = last_token.measures(mllm, bench, answers, window=3, batch_size=3)
    assert list(table) == ["measure", "sample", "layer", "set", "value"]
    assert set(table["measure"]) == {*last_token.MEASURES, "uniform"}
    assert not table.duplicated(["measure", "sample", "layer", "set"]).any()
    flow = ordered(last_token.last_token_flow(mllm, bench, answers))
    cut = ordered(last_token.knockout(mllm, bench, answers, window=3, layers=[1, 4, 7]))
    lens = ordered(last_token.logit_lens(mllm, bench, answers))
    parts = {m: ordered(part) for m, part in table.groupby("measure")}
    keys = ["sample", "layer", "set"]
    for measure in ("attention", "uniform", "saliency"):
        assert parts[measure][keys].equals(flow[keys])
    for measure in ("attention", "uniform"):
        np.testing.assert_allclose(parts[measure]["value"], 100 * flow[measure], atol=1e-3)
    whole = flow.groupby("sample")["saliency"].transform("sum")
    expected = 100 * flow["saliency"] / whole
    np.testing.assert_allclose(parts["saliency"]["value"], expected, atol=0.1)
    assert mllm.n_layers == 8 and parts["knockout"][keys].equals(cut[keys])
    wide = last_token.measures(mllm, bench, answers, window=6).query("measure == 'knockout'")
    assert sorted(wide["layer"].unique()) == [3, 7]  # layers 0 to 5, and 4 to 7
    np.testing.assert_allclose(parts["knockout"]["value"], 100 * cut["loss"], atol=1e-3)
    assert (parts["lens"]["set"] == "answer").all()
    np.testing.assert_allclose(parts["lens"]["value"], 100 * lens["probability"], atol=1e-3)


def made(n: int = 10, layers: int = 3, base: float = 10, **shifts) -> pd.DataFrame:
    """A table of measures that is `base`, plus shifts["measure_set"](sample, layer)."""
    sets = {"attention": ("text", "image"), "uniform": ("text", "image"), "lens": ("answer",)}
    sets |= {"saliency": ("text", "image"), "knockout": ("text", "image")}
    rows = [
        (m, i, layer, s, base + shifts.get(f"{m}_{s}", lambda i, layer: 0)(i, layer))
        for m, names in sets.items()
        for s in names
        for i in range(n)
        for layer in range(layers)
    ]
    return pd.DataFrame(rows, columns=["measure", "sample", "layer", "set", "value"])


def conditions(n: int = 10):
    """Image neurons that add to attention in layer 2, draws that shift all by -1 to 1 points."""
    shifts = {
        "attention_image": lambda i, layer: 6.0 * (layer == 2),
        "saliency_image": lambda i, layer: 0.2,
        "knockout_image": lambda i, layer: 5.0 * (-1) ** i + 0.1 * i,
        "lens_answer": lambda i, layer: -1.5 + (i - (n - 1) / 2) / n,
    }
    before = made(n)
    draws = {i: made(n, base=10 + (i - 9) / 9) for i in range(19)}
    changed = last_token.changes(before, {"image": made(n, **shifts)})
    return before, changed, last_token.changes(before, draws)


def test_summaries_of_a_made_change():
    before, changed, chance = conditions()
    assert set(changed) == {"silenced", "measure", "sample", "layer", "set", "value"}
    assert chance["silenced"].nunique() == 19 and np.isclose(chance["value"].abs().max(), 1)
    start, change = last_token.over_layers(before), last_token.over_layers(changed)
    assert (start["attention", "image"] == 10).all() and (start["saliency", "image"] == 30).all()
    np.testing.assert_allclose(change["image", "attention", "image"], 2)  # the mean over layers
    np.testing.assert_allclose(change["image", "saliency", "image"], 0.6)  # their sum
    assert change["image", "knockout", "image"].index.tolist() == list(range(10))

    sources = last_token.by_source(changed, chance)
    assert np.isclose(sources.loc[("attention", "image"), "image"], 2)
    assert np.isclose(sources.loc[("saliency", "image"), "image"], 0.6)
    random = sources.xs("random", level="silenced").loc["attention"].dropna()
    np.testing.assert_allclose(random, 0, atol=1e-9)
    shifted = last_token.changes(before, {i: made(base=11) for i in range(2)})
    random = last_token.by_source(changed, shifted).xs("random", level="silenced")
    assert random.loc["saliency", "text"] == 3 and random.loc["attention", "text"] == 1

    own = last_token.at_own_source(changed, chance)
    assert set(own["measure"]) == set(last_token.MEASURES)
    assert set(own.loc[own["measure"] != "lens", "set"]) == {"image"}
    at = own.set_index(["measure", "layer"])
    np.testing.assert_allclose(at[["null_low", "null", "null_high"]], [[-1, 0, 1]] * 12, atol=1e-9)
    np.testing.assert_allclose(at["clear"]["attention"], [-1, -1, 5], atol=1e-9)
    np.testing.assert_allclose(at["clear"]["saliency"], -0.8, atol=1e-9)
    below = at["null_low"]["lens"] - at["high"]["lens"]
    assert (at["clear"]["knockout"] < 0).all() and at["clear"]["lens"].equals(below)
    assert at["value"]["attention", 2] == 6 and (at["n"] == 10).all()


def test_claims_of_a_made_change():
    before, changed, chance = conditions()
    table = last_token.claims(before, changed, chance)
    assert list(table) == ["finding", "claim", "measured", "null", "p", "verdict"]
    assert (table["finding"] == "III").all() and len(table) == 5
    whole, attention, saliency, knockout, lens = table.to_dict("records")
    assert attention["verdict"] == "holds" and attention["p"] == "0.050"
    assert attention["measured"] == "10.0 %, change +2.0 [+2.0, +2.0]"
    assert attention["null"] == "random: -1.0 to +1.0"
    assert saliency["measured"] == "30.0 %, change +0.6 [+0.6, +0.6]"
    assert saliency["null"] == "random: -3.0 to +3.0" and saliency["verdict"] == "does not hold"
    assert knockout["verdict"] == "cannot be told"  # the interval spans every draw
    assert lens["verdict"].startswith("holds") and "-1.5" in lens["measured"]
    assert whole["measured"] == "2 of 4 lines hold" and whole["verdict"].startswith("cannot")
    few = last_token.claims(*conditions(7))
    assert (few["verdict"] == "cannot be told").all()


# --- together with silencing, and without traces -------------------------------------------------


def test_everything_composes_with_silencing(name):
    """Silencing changes every measure, and nothing remains of it or of the measuring."""
    mllm = sdpa(name)
    bench = rows_of(mllm)
    answers = last_token.answer_tokens(mllm, bench, "model")
    before_footprints = footprints(mllm)
    settings = {"window": mllm.n_layers}
    free = last_token.measures(mllm, bench, answers, **settings)
    with deactivate(mllm, random_neurons(mllm, 0.5)):
        silent = last_token.measures(mllm, bench, answers, **settings)
    moved = last_token.changes(free, {"some": silent}).groupby("measure")["value"].agg(np.ptp)
    assert (moved[list(last_token.MEASURES)] > 0).all()
    assert moved["uniform"] == 0
    again = last_token.measures(mllm, bench, answers, **settings)
    pd.testing.assert_frame_equal(again, free)
    assert footprints(mllm) == before_footprints


def test_errors_name_the_way_out(mllm, samples, monkeypatch):
    answers = last_token.answer_tokens(mllm, samples)
    with pytest.raises(ValueError, match="window=0"):
        last_token.knockout(mllm, samples, answers, window=0)
    before = footprints(mllm)
    monkeypatch.setattr(last_token, "last_row", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last_token.last_token_flow(mllm, samples, answers)
    assert footprints(mllm) == before
    for kind in ("flash_attention_2", "flex_attention"):
        monkeypatch.setattr(mllm.text_config, "_attn_implementation_internal", kind)
        for measure in (last_token.knockout, last_token.last_token_flow):
            with pytest.raises(ValueError, match="sdpa"):
                measure(mllm, samples, answers)
