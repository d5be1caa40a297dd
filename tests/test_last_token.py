"""What reaches the last token: against transformers' eager attention, and by hand."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, Rows, footprints, random_neurons, samples_for
from eager import eager, sdpa, uniform
from scipy import stats

from minerlib import inference
from minerlib.answering import continued
from minerlib.deactivation import deactivate
from minerlib.findings import attention, last_token
from minerlib.findings.states import hidden_states
from minerlib.inference import FAILS, HOLDS, UNKNOWN
from minerlib.scoring import score
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


def test_answer_tokens(mllm, samples, monkeypatch):
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
    assert last_token.answer_tokens(mllm, []).tolist() == []
    begins = mllm.tokenizer.encode(" Arlen", add_special_tokens=False)[0]
    assert begins != expected
    bare = "{% for part in messages[0].content %}{{ part.text }}{% endfor %} Assistant:"
    with monkeypatch.context() as patch:  # no blank ends it: the answer begins with one
        patch.setattr(type(mllm.family), "template", bare)
        assert last_token.answer_tokens(mllm, usual).tolist() == [begins]
        assert continued(mllm, mllm.encode(usual), ["Arlen"])[1][0, 0] == begins
        patch.setattr(type(mllm.family), "template", None)  # every prompt ends in its own way
        asked = [Sample("Who is it:", ("Arlen",)), Sample("Who is it:\n", ("Arlen",))]
        assert last_token.answer_tokens(mllm, asked).tolist() == [begins, expected]
    with pytest.raises(ValueError, match=r"samples \[1\] have an empty reference"):
        last_token.answer_tokens(mllm, [*usual, Sample("Who?", ("",))])
    with pytest.raises(ValueError, match="reference or model"):
        last_token.answer_tokens(mllm, samples, "truth")
    with pytest.raises(ValueError, match="4 samples|5 samples"):
        last_token.logit_lens(mllm, samples, ids[:2])


ASKS = ("cpu", "tolist", "item", "nonzero", "numpy", "__float__", "__bool__")


@pytest.mark.parametrize(
    "measure",
    [
        last_token.last_token_flow,
        last_token.logit_lens,
        partial(last_token.knockout, cache=False, layers=[0, 3]),
        attention.attention_between,
    ],
    ids=["flow", "lens", "knockout", "attention"],
)
def test_no_hook_waits_for_the_device(mllm, measure, monkeypatch):
    """Whatever a hook asks of the device would stop all layers behind it."""
    inside, waits = [], []

    def watched(name):
        own = getattr(torch.Tensor, name)

        def ask(self, *args, **kwargs):
            at = sys._getframe(1)
            # scoring.attention asks on CPUs alone.
            hook = "minerlib" in at.f_code.co_filename and at.f_code.co_name != "attention"
            if inside and hook:
                waits.append(f"{name} in {at.f_code.co_name}")
            return own(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, ask)

    forward = type(mllm).forward

    def entered(*args, **kwargs):
        inside.append(True)
        try:
            return forward(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(type(mllm), "forward", entered)
    for name in ASKS:
        watched(name)
    assert len(measure(mllm, rows_of(mllm), batch_size=2)) and waits == []


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
    """The probability of any answer in every layer, and in the last the model's own."""
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
    assert of_answer.max() > 2 * of_answer.min()
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
        np.testing.assert_allclose(parts[measure]["value"], flow[measure], atol=1e-5)
    whole = flow.groupby("sample")["saliency"].transform("sum")
    expected = flow["saliency"] / (whole / mllm.n_layers)
    np.testing.assert_allclose(parts["saliency"]["value"], expected, atol=1e-3)
    assert mllm.n_layers == 8 and parts["knockout"][keys].equals(cut[keys])
    wide = last_token.measures(mllm, bench, answers, window=6, samples=[2])
    assert sorted(wide["layer"][wide["measure"] == "knockout"].unique()) == [3, 7]  # 0 to 5, 6 to 7
    pair = last_token.knockout(mllm, Rows(bench[2:3]), answers[2:3], window=2, layers=[7])
    last = wide[(wide["measure"] == "knockout") & (wide["layer"] == 7)].sort_values("set")
    np.testing.assert_allclose(last["value"], pair.sort_values("set")["loss"], atol=1e-5)
    np.testing.assert_allclose(parts["knockout"]["value"], cut["loss"], atol=1e-5)
    assert (parts["lens"]["set"] == "answer").all()
    np.testing.assert_allclose(parts["lens"]["value"], lens["probability"], atol=1e-5)
    some = ordered(wide[wide["measure"] == "attention"])  # of one sample, which keeps its number
    expected = parts["attention"].query("sample == 2")
    assert some[keys].equals(expected[keys].reset_index(drop=True))
    np.testing.assert_allclose(some["value"], expected["value"], atol=1e-5)


# --- what silencing changes, and the claims ------------------------------------------------------

N, LAYERS, DRAWS = 12, 4, 20
HOLD = {"text": range(N), "image": range(6), "video": range(6, N)}  # samples
SIZE = {"attention": 0.3, "saliency": 1.0, "knockout": 0.2, "lens": 0.1, "uniform": 0.5}
KEYS = ["measure", "set", "sample", "layer"]
BASE = pd.DataFrame(
    [
        (measure, set_, i, layer)
        for measure in SIZE
        for set_, held in ({"answer": range(N)} if measure == "lens" else HOLD).items()
        for i in held
        for layer in range(LAYERS + (measure == "lens"))
    ],
    columns=KEYS,
)


def nothing(at: pd.DataFrame):
    return 0.0


def planted(size: float):
    """A change that is by turns up and down over layers, and but for a tenth alike in samples."""
    return lambda at: size * (-1.0) ** at["layer"] * (1 + 0.1 * (-1.0) ** at["sample"])


def table(samples, change=nothing) -> pd.DataFrame:
    """A table of measures of samples: `SIZE`, plus change of the keys."""
    at = BASE[BASE["sample"].isin(samples)]
    moved = np.where(at["measure"] == "uniform", 0.0, change(at))
    return at.assign(value=at["measure"].map(SIZE) + moved)


def silenced(media=None, draw=0.02, draws=DRAWS, **own) -> pd.DataFrame:
    """Changes by own["image"] and the like; draws add to every number -draw to draw."""
    after = {}
    for name, samples in HOLD.items():
        shifts = () if name == "text" else np.linspace(-draw, draw, draws)
        drawn = [table(samples, lambda at, shift=shift: shift) for shift in shifts]
        sets = [table(samples, own.get(name, nothing)), *drawn]
        after[name] = pd.concat([t.assign(neurons=i) for i, t in enumerate(sets)])
    return last_token.changes(table(range(N)), after, range(N) if media is None else media)


def by_name(changed, **kwargs) -> dict[str, dict]:
    return {line["name"]: line for line in last_token.judged(changed, **kwargs)}


def test_changes_are_paired_and_numbered():
    image = {"image": lambda at: at["sample"] + 0.5 * at["layer"]}
    changed = silenced(media=list("aabbccddeeff"), **image)
    assert set(changed) == {"silenced", "draw", *KEYS, "value", "was", "medium"}
    np.testing.assert_allclose(changed["was"], changed["measure"].map(SIZE))
    assert set(changed["measure"]) == set(last_token.MEASURES)
    counts = changed.groupby("silenced")[["draw", "sample"]].nunique().T.to_dict("list")
    assert counts == {"text": [1, N], "image": [1 + DRAWS, 6], "video": [1 + DRAWS, 6]}
    own = changed[(changed["silenced"] == "image") & (changed["draw"] == 0)]
    np.testing.assert_allclose(own["value"], own["sample"] + 0.5 * own["layer"])
    assert own.groupby("sample")["medium"].first().tolist() == list("aabbcc")
    assert (changed["value"][changed["silenced"] == "text"] == 0).all()

    sources = last_token.by_source(changed)
    assert sources.loc[("attention", "image"), "image"] == pytest.approx(2.5 + 0.75)
    assert np.isnan(sources.loc[("attention", "image"), "video"])  # no sample holds both
    drawn = sources.loc[[("saliency", f"random, as {kind}") for kind in ("image", "video")]]
    np.testing.assert_allclose(drawn.fillna(0), 0, atol=1e-12)


def test_layers_beside_the_draws():
    own = {"image": lambda at: (at["sample"] - 2.5) / 100 + 0.06 * (at["layer"] == 2)}
    found = last_token.at_own_source(silenced(media=list("aabbccddeeff"), **own))
    assert set(found["silenced"]) == {"image", "video"}
    assert ((found["set"] == found["silenced"]) == (found["measure"] != "lens")).all()
    at = found.set_index(["silenced", "measure", "layer"]).sort_index()
    np.testing.assert_allclose(at["value"]["image", "attention"], [0, 0, 0.06, 0], atol=1e-12)
    assert (at["n"] == 3).all() and at["low"]["image"].lt(at["high"]["image"]).all()
    bands = at[["null_low", "null", "null_high"]]
    np.testing.assert_allclose(bands, [[-0.02, 0, 0.02]] * len(at), atol=1e-12)


def test_a_planted_change_is_found_and_its_numbers_are_these():
    """Effects, intervals and p by the definitions, from arrays [sample, layer]."""
    extra = 0.01 * np.random.default_rng(2).standard_normal((N, LAYERS + 1))
    signs = np.array([1, -1, 1, 1, -1])
    sizes = {"attention": 0.15, "saliency": 0.0, "knockout": -0.2, "lens": 0.09}

    def image(at):
        size = at["measure"].map(sizes).fillna(0)
        return size * signs[at["layer"]] + extra[at["sample"], at["layer"]]

    changed = silenced(image=image, video=planted(0.1), text=planted(0.03))
    lines = by_name(changed, rows=6)
    assert list(lines) == ["III", "III specific", "III knockout", "III lens"]
    drawn = np.abs(np.linspace(-0.02, 0.02, DRAWS))
    alternating = 1 + 0.1 * (-1.0) ** np.arange(6)

    def check(name, media, freedom=5, more=0.0, was=1.0, smallest=0.05):
        variances = [np.var(x, ddof=1) / 6 / 4 for x in media]  # of half of each mean
        variance = sum(variances) + more
        df = variance**2 / ((np.square(variances) / freedom).sum() + more**2 / (DRAWS - 1))
        half = stats.t.ppf(0.975, df) * np.sqrt(variance)
        mean = np.mean(media)
        ends = was * np.array([lines[name][k] for k in ("effect", "low", "high")])
        assert ends == pytest.approx([mean, mean - half, mean + half])
        assert lines[name]["smallest"] == smallest
        holds = (mean - half) / was > smallest
        assert lines[name]["verdict"].word == (HOLDS if holds else UNKNOWN)

    def own(measure):
        """Of each image sample: its change with the planted sign, which the others' mean has."""
        layers = slice(1, None) if measure == "lens" else slice(LAYERS)
        sign = np.sign(sizes[measure]) * signs
        return (sign * (sizes[measure] * signs + extra[:6]))[:, layers].mean(1)

    for name, measure in {"": "attention", " knockout": "knockout", " lens": "lens"}.items():
        less = [own(measure) - drawn.mean(), 0.1 * alternating - drawn.mean()]
        share = {} if measure == "attention" else {"was": SIZE[measure], "smallest": 0.25}
        check(f"III{name}", less, more=drawn.var(ddof=1) / DRAWS, **share)
        assert lines[f"III{name}"]["p"] == 1 / (DRAWS + 1)
    check("III specific", [own("attention") - 0.03 * alternating, 0.07 * alternating])
    assert lines["III specific"]["p"] is None
    assert lines["III specific"]["null"] == "the text's neurons"


def test_p_is_the_rank_among_the_draws():
    size = np.abs(np.linspace(-0.1, 0.1, DRAWS))
    for own in (0.07, 0.2):
        line = by_name(silenced(draw=0.1, image=planted(own), video=planted(own)))["III"]
        assert line["p"] == pytest.approx((1 + (size >= own).sum()) / (1 + DRAWS))
        assert line["effect"] == pytest.approx(own - size.mean())
        assert (line["verdict"].word == HOLDS) == (own == 0.2)


def test_important_neurons_are_not_specific_and_small_effects_do_not_hold():
    lines = by_name(silenced(image=planted(0.2), video=planted(0.2), text=planted(0.21)))
    assert lines["III"]["verdict"].word == HOLDS
    assert lines["III specific"]["verdict"].word == FAILS
    small = by_name(silenced(draw=0.001, image=planted(0.02), video=planted(0.02)))
    assert small["III"]["p"] < 0.05
    assert {line["verdict"].word for line in small.values()} == {FAILS}


def test_magnitudes_are_of_means_over_samples_and_averaged_over_layers():
    def of(media=None, **own):
        size = last_token.magnitudes(silenced(media, draws=0, **own)).loc["image", "attention"][0]
        return size.mean()

    assert of(image=planted(0.2)) == pytest.approx(0.2)  # ups and downs do not cancel
    # What samples do not share is none: each of six is the odd one out among five others.
    assert of(image=lambda at: 0.2 * (-1.0) ** at["sample"]) == pytest.approx(-0.2)
    # Samples about one medium are no others: two that agree about it say nothing of the rest.
    pair = {"image": lambda at: 0.2 * (at["sample"] < 2)}
    assert of(**pair) == pytest.approx(0.2 * 2 / 6)
    assert of([0, 0, *range(2, N)], **pair) == 0
    one = silenced([0] * 6 + [*range(6, N)], draws=2, image=planted(0.2), video=planted(0.2))
    with np.errstate(invalid="ignore", divide="ignore"):
        line = by_name(one)["III"]
    assert line["verdict"].word == UNKNOWN and np.isnan([line["effect"], line["p"]]).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # the other claims, of no change at all
def test_the_ends_of_an_interval_take_too_little_and_too_much():
    """Of six samples three are up and three down, by nearly 0.2: -0.2 by the others' sign."""

    def split(at):
        return 0.2 * (-1.0) ** at["sample"] + 0.001 * at["sample"]

    change = 0.2 * (-1.0) ** np.arange(N) + 0.001 * np.arange(N)
    least, most = ([x[:6], x[6:]] for x in (-np.abs(change), change))
    low, high = (inference.estimate(dict(enumerate(x)), ends=None) for x in (least, most))
    line = by_name(silenced(draw=0.0, draws=2, image=split, video=split))["III"]
    ends = [line[k] for k in ("effect", "low", "high")]
    assert ends == pytest.approx([-np.abs(change).mean(), low.low, high.high])
    # What is subtracted counts the other way round.
    line = by_name(silenced(draw=0.0, draws=2, text=split))["III specific"]
    low = inference.estimate(dict(enumerate(-x for x in most)), ends=None)
    high = inference.estimate(dict(enumerate(-x for x in least)), ends=None)
    ends = [line[k] for k in ("effect", "low", "high")]
    assert ends == pytest.approx([np.abs(change).mean(), low.low, high.high])


def test_samples_about_one_medium_count_together():
    """Three media of two samples each that agree: as if each medium had one sample."""
    steps = {k: lambda at: 0.2 + 0.05 * (at["sample"] // 2 % 3 - 1) for k in ("image", "video")}
    line = by_name(silenced(np.arange(N) // 2, draw=0.0, **steps))["III"]
    half = stats.t.ppf(0.975, 4) * np.sqrt(np.var([0.15, 0.2, 0.25], ddof=1) / 3 / 2)
    assert [line["low"], line["high"]] == pytest.approx([0.2 - half, 0.2 + half])


@pytest.mark.slow
def test_the_claims_keep_their_level():
    """At the smallest effect, and where the neurons are one more draw."""
    rng = np.random.default_rng(3)
    of = {k: BASE[BASE["sample"].isin(held)] for k, held in HOLD.items()}
    counts = {"text": 1, "image": 1 + DRAWS, "video": 1 + DRAWS}
    keys = {(k, draw): of[k] for k, n in counts.items() for draw in range(n)}
    changed = pd.concat(keys, names=["silenced", "draw"]).reset_index(["silenced", "draw"])
    changed = changed[changed["measure"] == "attention"].assign(medium=lambda at: at["sample"])
    noises = [changed.assign(measure=m) for m in ("attention", "knockout", "lens")]
    changed = pd.concat(noises, ignore_index=True)
    changed.loc[changed["measure"] == "lens", "set"] = "answer"
    changed["was"] = 0.2
    special = (changed["draw"] == 0) & (changed["measure"] == "attention")
    special &= changed["silenced"] != "text"
    words, p = [], []
    for noise in np.repeat([0.03, 0.12], 12):
        shift = 0.05 * rng.choice([-1, 1], LAYERS)[changed["layer"].clip(upper=LAYERS - 1)]
        value = noise * rng.standard_normal(len(changed)) + shift * special
        lines = by_name(changed.assign(value=value))
        words.append(lines["III"]["verdict"].word)
        p.append(lines["III knockout"]["p"])
    assert words.count(HOLDS) <= stats.binom.ppf(0.999, 24, 0.025)
    assert words.count(FAILS) <= stats.binom.ppf(0.999, 24, 0.05)
    assert sum(x < 0.05 for x in p) <= stats.binom.ppf(0.999, 24, 1 / (1 + DRAWS))


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
    moved = last_token.changes(free, {"some": silent.assign(neurons=0)}, range(len(bench)))
    moved = moved.groupby("measure")["value"].agg(np.ptp)
    assert (moved > 0).all() and set(moved.index) == set(last_token.MEASURES)
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
    # A kernel that does not say how far back its layers see.
    monkeypatch.setattr(mllm.text_config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(mllm.text_config, "sliding_window", 4, raising=False)
    for measure in (attention.attention_within, partial(score, causal=True)):
        with pytest.raises(ValueError, match="flash_attention_2.*the last 4 tokens only: load it"):
            measure(mllm, samples)
