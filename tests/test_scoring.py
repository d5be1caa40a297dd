"""Stage 2: the published code's own answers, the oracle, and what must hold for real prompts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, Rows, footprints, random_mllm, samples_for

from minerlib import artifacts, scoring
from minerlib.answering import answered
from minerlib.model import RowError
from minerlib.scoring import METRICS, importance, score
from minerlib.selection import select, weightings
from minerlib.separation import BASE_SETS, SETS, separate, stack

PROB = list(METRICS).index("prob")


# --- known answers and the oracle ----------------------------------------------------------------


def masks_of(kinds: np.ndarray) -> torch.Tensor:
    """Set masks [set, token] of token kinds; any other kind is padding."""
    base = {name: kinds == name for name in BASE_SETS}
    base["special_text"] = base["special"] | base["text"]
    base["prompt"] = np.any([base[name] for name in BASE_SETS], axis=0)
    return torch.from_numpy(np.stack([base[name] for name in SETS]))


@pytest.mark.parametrize("case", ["stage2_image", "stage2_audio"])
def test_known_answers(case):
    known = np.load(ROOT / "tests/parity" / f"{case}.npz")
    x, query, key = (torch.from_numpy(known[n]) for n in ("activations", "query", "key"))
    masks = masks_of(known["token_kind"])[None].expand(len(x), -1, -1)  # layers as the batch
    result = importance(x, query, key, masks).permute(1, 2, 0, 3)
    np.testing.assert_allclose(result, known["scores"], rtol=0, atol=1e-4)


def test_the_oracle_gives_the_known_answers():
    known = np.load(ROOT / "tests/parity/stage2_image.npz")
    masks = np.repeat(masks_of(known["token_kind"])[None].numpy(), 3, axis=0)
    result = reference.importance(known["activations"], known["query"], known["key"], masks)
    np.testing.assert_allclose(result.transpose(1, 2, 0, 3), known["scores"], rtol=0, atol=1e-4)


LAYOUTS = {  # the tokens' kinds; one string is one prompt
    "all kinds": ["special text image special text video special audio text " * 3],
    "non-contiguous": ["text image text special image text audio image special text"],
    "absent sets": ["text text text special text"],
    "one kind": ["image " * 7],
    "one token": ["text"],
    "single-token sets": ["special image text text audio video"],
    "padded batch": [
        "pad " * 5 + "special text image image text",
        "pad " * 2 + "special text video text video special text special",
        "text audio audio audio special text text special image text",
        "pad " * 9 + "text",
    ],
    "padding on both sides": ["pad text image pad special text pad"],
}
HEADS = {"one head": (1, 1), "full heads": (4, 4), "grouped heads": (6, 2), "one key head": (4, 1)}


def tensors(layout: str, heads: str, neurons: int = 33, dim: int = 8, seed: int = 0):
    kinds = np.array([prompt.split() for prompt in LAYOUTS[layout]])
    (batch, n), (h, kv) = kinds.shape, HEADS[heads]
    torch.manual_seed(seed)
    x = torch.nn.functional.silu(torch.randn(batch, n, neurons))
    query, key = 2 * torch.randn(batch, h, n, dim), 2 * torch.randn(batch, kv, n, dim)
    return x, query, key, torch.stack([masks_of(row) for row in kinds])


def expected(x, query, key, masks, scaling=None, causal=False) -> np.ndarray:
    parts = (t.float().numpy() for t in (x, query, key))
    return reference.importance(*parts, masks.numpy(), scaling, causal)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_oracle(layout, heads):
    given = tensors(layout, heads)
    np.testing.assert_allclose(importance(*given), expected(*given), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scaling", [0.05, 1.0])
def test_oracle_with_the_models_own_scaling(scaling):
    given = tensors("padded batch", "grouped heads")
    np.testing.assert_allclose(
        importance(*given, scaling=scaling), expected(*given, scaling), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("block", [1, 64, 2**12])
def test_block_size_does_not_matter(monkeypatch, block):
    given = tensors("padded batch", "grouped heads")
    monkeypatch.setattr(scoring, "_BLOCK", block)
    np.testing.assert_allclose(importance(*given), expected(*given), rtol=0, atol=2e-5)


def test_a_long_prompt_in_many_chunks():
    kinds = np.array((["text"] * 300 + ["image"] * 400 + ["special"] * 20)[::-1])
    torch.manual_seed(0)
    x = torch.randn(1, len(kinds), 16)
    query, key = torch.randn(1, 8, len(kinds), 16), torch.randn(1, 2, len(kinds), 16)
    masks = masks_of(kinds)[None]
    np.testing.assert_allclose(
        importance(x, query, key, masks), expected(x, query, key, masks), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("layout", ["all kinds", "padded batch"])
def test_half_precision_activations(layout):
    x, query, key, masks = tensors(layout, "grouped heads")
    given = (x.bfloat16(), query.bfloat16(), key.bfloat16(), masks)
    result = importance(*given)
    assert result.dtype == torch.float32
    # Every sum is in float32, so the oracle on the same rounded numbers agrees as closely.
    np.testing.assert_allclose(result, expected(*given), rtol=0, atol=2e-5)
    # Against the unrounded ones: bfloat16 keeps 8 bits, and min-max divides by the range.
    continuous = [i for i in range(len(METRICS)) if i != PROB]
    exact = expected(x, query, key, masks)
    np.testing.assert_allclose(result[:, continuous], exact[:, continuous], rtol=0, atol=0.03)


def test_an_activation_of_zero_is_not_above_zero():
    x, query, key, masks = tensors("padded batch", "grouped heads")
    given = (x.relu(), query, key, masks)
    np.testing.assert_allclose(importance(*given), expected(*given), rtol=0, atol=2e-5)


def test_what_padding_holds_does_not_matter():
    x, query, key, masks = tensors("padded batch", "grouped heads")
    before = importance(x, query, key, masks)
    padding = ~masks.any(1)
    x[padding] = 1e4
    query.transpose(1, 2)[padding] = -30
    key.transpose(1, 2)[padding] = 30
    torch.testing.assert_close(importance(x, query, key, masks), before, rtol=0, atol=1e-6)


def test_scores_are_in_the_unit_interval_and_touch_both_ends():
    result = importance(*tensors("all kinds", "grouped heads"))
    assert result.min() == 0 and result.max() == 1
    assert (result.amin(-1) == 0).all() and (result.amax(-1) == 1).all()


def test_a_constant_metric_gives_zero():
    _, query, key, masks = tensors("all kinds", "full heads")
    x = torch.full((*masks.shape[::2], 9), 0.7)
    result = importance(x, query, key, masks)
    assert result.isfinite().all()
    assert (
        not result[:, list(METRICS).index("prob")].any()
        and not result[:, list(METRICS).index("max")].any()
    )


def test_absent_sets_give_zero():
    result = importance(*tensors("absent sets", "full heads"))
    for name in SETS:
        present = name in ("text", "special", "special_text", "prompt")
        assert bool(result[0, :, SETS.index(name)].any()) == present, name


def test_key_and_query_weights_are_row_and_column_sums():
    """One token that all others look at: it takes the most of attn_q and the least of attn_k."""
    n = 6
    query, key = torch.ones(1, 1, n, 4), torch.zeros(1, 1, n, 4)
    key[0, 0, 2] = 3
    weights_k, weights_q = scoring.attention_weights(query, key, torch.ones(1, 1, n, dtype=bool))
    assert weights_q[0, 0].argmax() == 2
    # All queries are alike, so all columns of P are constant and softmax over dim 0 is uniform.
    torch.testing.assert_close(weights_k, torch.ones(1, 1, n))


def test_wrong_number_of_sets_is_named():
    x, query, key, masks = tensors("all kinds", "full heads")
    with pytest.raises(ValueError, match="6 sets"):
        importance(x, query, key, masks[:, :6])


# --- through a model -----------------------------------------------------------------------------


def scores_of(mllm, samples, **kwargs):
    return score(mllm, Rows(samples), **kwargs)


@pytest.mark.parametrize("how", [{}, {"causal": True}, {"generated": 3}], ids=str)
def test_score_is_the_oracle_on_what_the_model_computes(mllm, samples, how, monkeypatch):
    """The hooks' streamed result against captured activations, queries and keys."""
    monkeypatch.setattr(mllm.model.generation_config, "eos_token_id", None)
    batch, seen = mllm.encode(samples), {}
    if how.get("generated"):
        length = batch["input_ids"].shape[1]
        batch = answered(mllm, batch, 3)
        assert batch["input_ids"].shape[1] == length + 3
    with (
        torch.inference_mode(),
        mllm.tap(
            activation=lambda i, x: seen.update({("x", i): x.clone()}),
            attention=lambda i, q, k, mask, scaling: seen.update({("qk", i): (q, k, scaling)}),
        ),
    ):
        mllm.forward(batch)
    masks = stack(separate(mllm, batch))
    present = masks.any(-1).sum(0).clamp(min=1).numpy()
    result = scores_of(mllm, samples, batch_size=len(samples), **how)
    for layer in (0, mllm.n_layers - 1):
        query, key, scaling = seen["qk", layer]
        causal = how.get("causal", False)
        per_sample = expected(seen["x", layer], query, key, masks, scaling, causal)
        mean = per_sample.sum(0) / present[None, :, None]
        np.testing.assert_allclose(result.values[:, :, layer], mean, rtol=0, atol=1e-4)


def test_causal_scores_differ_in_attention_only(mllm, samples):
    plain, causal = scores_of(mllm, samples), scores_of(mllm, samples, causal=True)
    for metric in ("prob", "mean", "max"):
        np.testing.assert_array_equal(plain.sel(metric=metric), causal.sel(metric=metric))
    for metric in ("attn_k", "attn_q"):
        assert not np.allclose(plain.sel(metric=metric), causal.sel(metric=metric), atol=1e-3)


def test_the_plain_way_gives_the_same(mllm, samples, tmp_path):
    """What `make bench` times minerlib against computes the same scores."""
    rows = samples[1:3]  # of the same sets
    plain = reference.plain_score(mllm, rows, tmp_path / "sums.pt", new_tokens=2)
    np.testing.assert_allclose(scores_of(mllm, rows), plain, rtol=0, atol=1e-4)


def test_labels(mllm, samples):
    result = scores_of(mllm, samples)
    assert result.dims == ("metric", "modality", "layer", "neuron")
    assert (
        tuple(result.metric.values) == tuple(METRICS) == ("prob", "mean", "max", "attn_k", "attn_q")
    )
    assert tuple(result.modality.values) == SETS
    assert result.shape == (5, 7, mllm.n_layers, mllm.n_neurons)
    assert result.dtype == np.float32 and result.min() >= 0 and result.max() <= 1
    held = {"image": 2, "video": 2} if "image" in mllm.kinds else {"audio": 3}
    for name, count in zip(SETS, result.samples.values, strict=True):
        everywhere = name in ("text", "special", "special_text", "prompt")
        assert count == (len(samples) if everywhere else held.get(name, 0)), name
    assert result.attrs == {"benchmark": "rows", "rows": len(samples)}


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_batch_is_its_rows(exact_mllm, batch_size):
    """In float64, where no activation lies within rounding of 0, `prob` agrees as well."""
    samples = samples_for(exact_mllm)
    one = scores_of(exact_mllm, samples, batch_size=1)
    many = scores_of(exact_mllm, samples, batch_size=batch_size)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(many.samples, one.samples)
    for name in ("activation_mean", "activation_min"):
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=1e-6)


def assert_close_but_for_flips(a, b):
    """Equal to 1e-4, but for `prob` where rounding moves an activation across 0.

    Such a flip moves the `prob` of a set of n tokens by 1/n, whatever the tolerance. Flips are
    rare: nearly all of `prob` is equal.
    """
    rest = [name for name in METRICS if name != "prob"]
    np.testing.assert_allclose(a.sel(metric=rest), b.sel(metric=rest), rtol=0, atol=1e-4)
    assert (np.abs(a - b).sel(metric="prob") > 1e-4).mean() < 1e-3


def test_a_batch_is_its_rows_in_float32(mllm, samples):
    one = scores_of(mllm, samples, batch_size=1)
    assert_close_but_for_flips(scores_of(mllm, samples, batch_size=16), one)


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_the_attention_implementation_does_not_matter(mllm, samples, own):
    other = random_mllm(Path(mllm.name).name, attn_implementation=own)
    assert other.layers[0].self_attn.config._attn_implementation == own
    assert_close_but_for_flips(scores_of(other, samples), scores_of(mllm, samples))


def test_constants_are_mean_and_minimum_over_prompt_tokens(mllm, samples):
    means, lowest = [], []
    for sample in samples:
        seen = []
        with (
            torch.inference_mode(),
            mllm.tap(activation=lambda i, x, seen=seen: seen.append(x[0])),
        ):
            mllm.forward(mllm.encode([sample]))
        means.append(torch.stack([x.mean(0) for x in seen]))
        lowest.append(torch.stack([x.min() for x in seen]))
    result = scores_of(mllm, samples, batch_size=3)
    np.testing.assert_allclose(result.activation_mean, torch.stack(means).mean(0), atol=1e-5)
    np.testing.assert_allclose(result.activation_min, torch.stack(lowest).amin(0), atol=1e-6)


def test_half_precision_model(mllm, samples):
    half = random_mllm(Path(mllm.name).name, dtype=torch.bfloat16)
    result = scores_of(half, samples)
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    rest = [name for name in METRICS if name != "prob"]
    difference = np.abs(result - scores_of(mllm, samples)).sel(metric=rest)
    assert difference.mean() < 0.02


@pytest.mark.fault("no checkpoint before so many batches")
def test_a_killed_run_continues_to_identical_sums(mllm, samples, tmp_path, monkeypatch):
    whole = scores_of(mllm, samples, batch_size=1)
    file = tmp_path / "sums"
    add, seen = scoring.add_batch, []

    def killed(mllm, batch, sums, rows, **how):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch)
        add(mllm, batch, sums, rows, **how)

    def run(every):
        return scores_of(mllm, samples, batch_size=1, checkpoint=file, every=every)

    monkeypatch.setattr(scoring, "add_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(3600)
    assert not list(tmp_path.iterdir())  # not due for an hour
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run(0)
    (saved,) = tmp_path.iterdir()
    assert saved.name.startswith("sums-")
    done = []
    monkeypatch.setattr(
        scoring, "add_batch", lambda *args, **how: (done.append(1), add(*args, **how))
    )
    resumed = run(3600)
    assert len(done) == len(samples) - 2  # the two rows of the checkpoint are not run again
    np.testing.assert_array_equal(resumed, whole)
    for name in ("samples", "activation_mean", "activation_min"):
        np.testing.assert_array_equal(resumed[name], whole[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("sums of another dtype, rows or version continued")
def test_a_checkpoint_is_continued_by_the_same_rows_model_and_version_only(
    mllm, samples, tmp_path, monkeypatch
):
    half = random_mllm(mllm.name.rsplit("/")[-1], dtype=torch.bfloat16)
    add, runs = scoring.add_batch, []

    def killed(mllm, batch, sums, rows, **how):
        runs.append(len(rows))
        if len(runs) == 2:
            raise KeyboardInterrupt
        add(mllm, batch, sums, rows, **how)

    def run(mllm, fingerprint="rows", **options):
        runs.clear()
        bench = Rows(samples, fingerprint=fingerprint)
        options = {"batch_size": 1, "checkpoint": tmp_path / "sums", "every": 0, **options}
        return score(mllm, bench, **options)

    monkeypatch.setattr(scoring, "add_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(half)
    monkeypatch.setattr(
        scoring, "add_batch", lambda *args, **how: (runs.append(1), add(*args, **how))
    )
    for other in (
        lambda: run(mllm),
        lambda: run(half, fingerprint="edited"),
        lambda: run(half, on_error="skip"),
    ):
        other()
        assert len(runs) == len(samples), "nothing of another key may be continued"
    monkeypatch.setitem(artifacts.COMPUTATIONS, "minerlib.scoring.score", 99)
    run(half)
    assert len(runs) == len(samples)
    monkeypatch.undo()
    monkeypatch.setattr(
        scoring, "add_batch", lambda *args, **how: (runs.append(1), add(*args, **how))
    )
    run(half)
    assert len(runs) == len(samples) - 1


@pytest.mark.fault("NaN reaches selection")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops_with_layer_benchmark_and_row(mllm, samples, value):
    """The last row of a batch; it is named, and can be skipped."""
    few = samples[-3:]

    def poison(module, args, out):
        if len(out) > 1 or out.shape[1] == length:
            out[-1, -1, 3] = value

    length = mllm.encode(few[-1:])["input_ids"].shape[1]
    hook = mllm.activations[2].register_forward_hook(poison)
    try:
        message = rf"row {few[-1].row}: layer 2: .*not finite; try dtype='bfloat16'"
        with pytest.raises(RowError, match=message):
            scores_of(mllm, few, batch_size=3)
        with pytest.warns(UserWarning, match=message):
            rest = scores_of(mllm, few, batch_size=3, on_error="skip")
    finally:
        hook.remove()
    np.testing.assert_allclose(rest, scores_of(mllm, few[:-1]), atol=1e-5)


@pytest.mark.fault("one bad row ends mining")
def test_rows_that_fail_are_skipped_on_request(mllm, samples):
    bad = dataclasses.replace(samples[0], video=None, audio=np.zeros(10, np.float32), row=77)
    rows = [*samples[:1], bad, *samples[1:]]
    with pytest.raises(RowError, match=r"row 77: audio: .*"):
        scores_of(mllm, rows, batch_size=3)
    with pytest.warns(UserWarning, match="rows skipped; .* row 77: audio"):
        found = scores_of(mllm, rows, batch_size=3, on_error="skip")
    assert len(found.attrs["skipped"]) == 1 and found.attrs["rows"] == len(samples)
    np.testing.assert_allclose(found, scores_of(mllm, samples, batch_size=1), atol=1e-5)
    with pytest.raises(ValueError, match="every row was skipped: .*row 77"):
        scores_of(mllm, [bad], on_error="skip")


def test_a_metric_sees_how_many_tokens_each_set_holds():
    """One token counts as one, and an empty set as one too, so that nothing divides by zero."""
    masks = masks_of(np.array(["text", "special", "special"]))[None]
    seen = []
    METRICS["seen"] = lambda layer: seen.append(layer) or layer.attn_k
    try:
        x = torch.arange(6.0).view(1, 3, 2)
        weights = scoring.attention_weights(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), masks)
        raw = scoring.metrics(x, *weights, masks, scoring.layout(masks))
    finally:
        del METRICS["seen"]
    (layer,) = seen
    assert layer.tokens[0, :, 0].tolist() == [1, 2, 3, 1, 1, 1, 3]
    assert raw[0, 1, [0, 1, 2]].tolist() == [[0, 1], [3, 4], [2, 3]]  # means of each set
    assert raw[0, 2].tolist() == [[0, 1], [4, 5], [4, 5], [0, 0], [0, 0], [0, 0], [4, 5]]  # highest


def test_an_importance_metric_is_one_entry(mllm, samples, monkeypatch):
    """It sees the layer, is normalised as the others are, and can weigh in selection."""
    monkeypatch.setitem(METRICS, "range", lambda layer: layer.highest - layer.total / layer.tokens)
    assert scoring.own_metrics() == ["range"]
    found = scores_of(mllm, samples)
    assert found.metric.values.tolist()[-1] == "range" and found.shape[0] == 6
    assert found.sel(metric="range").max() <= 1 and found.sel(metric="range").std() > 0
    assert select(found, weights={"range": 1.0}).any() and weightings()["range"] == {"range": 1.0}


@pytest.mark.parametrize("wrong", [lambda x: x.sum(1), lambda x: torch.cat([x, x], -1)])
def test_a_metric_of_another_shape_is_named(mllm, samples, monkeypatch, wrong):
    monkeypatch.setitem(METRICS, "own", lambda layer: wrong(layer.total))
    with pytest.raises(ValueError, match=r"'own' gave \(.*not \[batch, set, neuron\]"):
        scores_of(mllm, samples[:1])


def test_a_metric_that_is_not_finite_is_named(mllm, samples, monkeypatch):
    """It, and not the model's precision, where the paper's metrics of the same row are finite."""
    monkeypatch.setitem(METRICS, "own", lambda layer: layer.total * math.nan)
    with pytest.raises(RowError, match=r"layer 0: importance metric 'own' gives .*not finite$"):
        scores_of(mllm, samples)


def test_no_rows_is_an_error(mllm):
    with pytest.raises(ValueError, match="'rows' has no rows"):
        scores_of(mllm, [])


def test_an_attention_that_bypasses_the_interface_is_an_error(mllm, samples, monkeypatch):
    before = footprints(mllm)
    layer = mllm.layers[1].self_attn
    own = type(layer).forward

    def bypass(self, hidden_states, *args, **kwargs):
        if self is layer:
            return hidden_states, None
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(layer), "forward", bypass)
    with pytest.raises(RuntimeError, match=r"the attention of layers \[1\] never ran"):
        scores_of(mllm, samples[:1])
    assert footprints(mllm) == before


def test_a_fused_mlp_is_an_error(mllm, samples, monkeypatch):
    mlp = mllm.layers[2].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: x)
    with pytest.raises(RuntimeError, match=r"the activation of layers \[2\] never ran"):
        scores_of(mllm, samples[:1])
