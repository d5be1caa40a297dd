"""Silencing: the constants at every token, per modality, undone afterwards, and in checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from conftest import Rows, footprints, random_mllm, random_neurons, samples_for

from minerlib.activity import sampled
from minerlib.deactivation import deactivate, silence_heads
from minerlib.exporting import export
from minerlib.scoring import score
from minerlib.separation import separate


@pytest.fixture
def neurons(mllm):
    return random_neurons(mllm)


@pytest.fixture
def constants(mllm, samples):
    return score(mllm, Rows(samples))


def logits(mllm, batch):
    """Of the last token, [batch, vocabulary]."""
    with torch.inference_mode():
        return mllm.forward(batch).logits[:, -1]


def record(mllm, seen: list):
    """Hooks on what the down projections are given: act_fn(gate) * up, [batch, token, neuron]."""
    return [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, i=i: seen.append((i, args[0].clone()))
        )
        for i, layer in enumerate(mllm.layers)
    ]


# --- the constant, everywhere --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero", "mean", "min"])
def test_the_constant_at_every_token(mllm, samples, neurons, constants, mode, monkeypatch):
    """In the prompt and in each step of generation; other neurons are computed as ever."""
    monkeypatch.setattr(mllm.model.generation_config, "eos_token_id", None)
    chosen = neurons.any("modality").values
    expected = {
        "zero": np.zeros(chosen.shape),
        "mean": constants.activation_mean.values,
        "min": np.broadcast_to(constants.activation_min.values[:, None], chosen.shape),
    }[mode].astype(np.float32)
    batch = mllm.encode(samples)
    seen = []
    with deactivate(mllm, neurons, mode=mode, constants=constants):
        hooks = [
            a.register_forward_hook(
                lambda m, args, out, i=i: seen.append((i, args[0], out.clone()))
            )
            for i, a in enumerate(mllm.activations)
        ]
        try:
            mllm.generate(batch, 4)
        finally:
            for hook in hooks:
                hook.remove()
    tokens = [out.shape[1] for i, _, out in seen if i == 0]
    assert tokens == [batch["input_ids"].shape[1], 1, 1, 1]
    assert len(seen) == 4 * mllm.n_layers
    for layer, gate, out in seen:
        silenced = torch.from_numpy(chosen[layer])
        constant = torch.from_numpy(expected[layer][chosen[layer]])
        assert torch.equal(out[..., silenced], constant.expand_as(out[..., silenced]))
        own = torch.nn.functional.silu(gate)[..., ~silenced]
        assert torch.equal(out[..., ~silenced], own)


@pytest.mark.parametrize("where", [None, ["text"]])
def test_a_gain_multiplies_what_neurons_say(mllm, samples, neurons, where):
    chosen = torch.from_numpy(neurons.any("modality").values)
    batch, own, seen = mllm.encode(samples), {}, {}
    at = separate(mllm, batch)["prompt" if where is None else "text"]
    with torch.inference_mode():
        with mllm.tap(activation=lambda i, x: own.update({i: x.clone()}), layers=[0]):
            mllm.forward(batch)
        keep = mllm.tap(activation=lambda i, x: seen.update({i: x.clone()}), layers=[0])
        with deactivate(mllm, neurons, mode="gain", constants=4.0, where=where), keep:
            mllm.forward(batch)
    factor = torch.ones_like(own[0])
    factor[..., chosen[0]] = 4.0
    factor[~at] = 1.0
    real = batch["attention_mask"].bool()
    assert torch.equal(seen[0][real], (own[0] * factor)[real])


def test_resampled_neurons_say_what_they_said_at_a_token_of_the_kind(mllm, samples, neurons):
    """All of a token's neurons what they said at one other; alike in any batch."""
    chosen = torch.from_numpy(neurons.any("modality").values)
    others = sampled(mllm, [Rows(samples[::-1])], each=5, seed=1)
    batch, seen = mllm.encode(samples), []
    keep = mllm.tap(activation=lambda i, x: seen.append((i, x.clone())))
    with deactivate(mllm, neurons, mode="resample", constants=others), keep, torch.inference_mode():
        mllm.forward(batch)
        whole, seen[:] = [x for _, x in seen], []
        mllm.forward(mllm.encode(samples[1:2]))
        alone = [x for _, x in seen]
    sets = separate(mllm, batch)
    for layer, x in enumerate(whole):
        for kind in mllm.kinds:
            bank = others[others.kind == kind].values[:, layer, chosen[layer]]
            said = x[sets[kind]][:, chosen[layer]].numpy()
            assert (said[:, None] == bank[None]).all(-1).any(-1).all()
        n = alone[layer].shape[1]
        assert torch.equal(alone[layer][0][:, chosen[layer]], x[1, -n:][:, chosen[layer]])
    text = whole[0][sets["text"]][:, chosen[0]]
    assert len(torch.unique(text, dim=0)) == 5  # all of them are used


def test_resampling_goes_on_in_generation(mllm, samples, neurons, monkeypatch):
    monkeypatch.setattr(mllm.model.generation_config, "eos_token_id", None)
    chosen = torch.from_numpy(neurons.any("modality").values)
    others = sampled(mllm, [Rows(samples)], each=3)
    seen = []
    keep = mllm.tap(activation=lambda i, x: seen.append(x.clone()), layers=[0])
    alone = samples[:1]  # nothing is padded, so generation leaves the mask out
    with deactivate(mllm, neurons, mode="resample", constants=others), keep:
        mllm.generate(mllm.encode(alone), 3)
    bank = others[others.kind.isin(["text", "special"])].values[:, 0, chosen[0]]
    for x in seen[1:]:
        assert x.shape[1] == 1 and (x[0, 0, chosen[0]].numpy() == bank).all(-1).any()


def test_modes_say_what_they_need(mllm, samples, neurons):
    others = sampled(mllm, [Rows(samples)], each=2)
    wrong = {
        ("gain", None): "mode 'gain' needs a number: constants=2.0, not None",
        ("gain", float("nan")): "needs a number",
        ("resample", 1.0): "needs constants=minerlib.activity.sampled",
    }
    for (mode, constants), match in wrong.items():
        with (
            pytest.raises(ValueError, match=match),
            deactivate(mllm, neurons, mode=mode, constants=constants),
        ):
            pass
    some = others[others.kind == "text"]
    lacking = pytest.raises(ValueError, match="no tokens of 'special' among those sampled")
    with lacking, deactivate(mllm, neurons, mode="resample", constants=some):
        logits(mllm, mllm.encode(samples[:1]))
    other = pytest.raises(ValueError, match="of another model")
    with other, deactivate(mllm, neurons, mode="resample", constants=others[:, :1]):
        pass


def test_silenced_heads_are_heads_without_output_weights(mllm, samples):
    heads = np.zeros((mllm.n_layers, mllm.text_config.num_attention_heads), bool)
    heads[0, 1] = heads[-1, 0] = True
    batch, before, own = mllm.encode(samples), footprints(mllm), logits(mllm, mllm.encode(samples))
    with silence_heads(mllm, heads):
        found = logits(mllm, batch)
    assert footprints(mllm) == before and not torch.allclose(found, own)
    weights = [mllm.family.output_projection(mllm.layers[i]).weight for i in (0, -1)]
    kept = [w.clone() for w in weights]
    wide = weights[0].shape[1] // heads.shape[1]
    try:
        with torch.no_grad():
            weights[0][:, wide : 2 * wide] = 0
            weights[1][:, :wide] = 0
        torch.testing.assert_close(found, logits(mllm, batch))
    finally:
        with torch.no_grad():
            for w, k in zip(weights, kept, strict=True):
                w.copy_(k)
    for wrong in (heads[:1], heads.astype(int)):
        named = pytest.raises(ValueError, match="needs bool .layer, head. of")
        with named, silence_heads(mllm, wrong):
            pass


@pytest.mark.parametrize("where", ["special", ["text", "image", "audio"], ["prompt"]])
def test_only_at_the_tokens_of_some_sets(mllm, samples, neurons, where, monkeypatch):
    """In the prompt where the set is; what is generated is text."""
    monkeypatch.setattr(mllm.model.generation_config, "eos_token_id", None)
    chosen = torch.from_numpy(neurons.any("modality").values)
    batch, seen = mllm.encode(samples), []
    sets, wanted = separate(mllm, batch), [where] if isinstance(where, str) else where
    keep = mllm.tap(activation=lambda i, x: seen.append((i, x.clone())))
    with deactivate(mllm, neurons, where=where), keep:
        mllm.generate(batch, 3)
    assert len(seen) == 3 * mllm.n_layers
    first = torch.stack([sets[name] for name in wanted]).any(0)
    for layer, x in seen:
        prompt = x.shape[1] > 1
        generated = torch.full(x.shape[:2], bool({"text", "prompt"} & set(wanted)))
        at = first if prompt else generated
        zero = x == 0
        assert zero[at][:, chosen[layer]].all()
        assert not zero[~at & sets["prompt"] if prompt else ~at].any()
        assert not zero[sets["prompt"] if prompt else at | True][:, ~chosen[layer]].any()


def test_everywhere_is_at_every_prompt_token(mllm, samples, neurons):
    batch = mllm.encode(samples)
    with deactivate(mllm, neurons):
        everywhere = mllm.generate(batch, 4), logits(mllm, batch)
    with deactivate(mllm, neurons, where=("special", "text", "image", "video", "audio")):
        assert mllm.generate(batch, 4) == everywhere[0]
        assert torch.equal(logits(mllm, batch), everywhere[1])
    assert not torch.equal(logits(mllm, batch), everywhere[1])


def test_what_comes_before_is_untouched(mllm, samples, neurons):
    """Causal: hidden states of tokens before the first one silenced are the model's own."""
    batch = mllm.encode([s for s in samples if s.image is not None or s.audio is not None][:1])
    medium = "image" if "image" in mllm.kinds else "audio"
    first = separate(mllm, batch)[medium][0].int().argmax().item()
    states = {}
    for name, how in {"own": None, "silenced": medium}.items():
        some = neurons if how else xr.zeros_like(neurons)
        keep = mllm.tap(hidden=lambda i, h, name=name: states.update({(name, i): h.clone()}))
        with deactivate(mllm, some, where=how), keep, torch.inference_mode():
            mllm.forward(batch)
    last = mllm.n_layers
    own, silenced = states["own", last][0], states["silenced", last][0]
    assert torch.equal(own[:first], silenced[:first]) and first > 0
    assert not torch.allclose(own[first], silenced[first])


@pytest.mark.parametrize("where", ["pictures", [], ["image", "txt"]])
def test_no_such_tokens(mllm, neurons, where):
    wrong = pytest.raises(ValueError, match="where=.*use some of the token sets")
    with wrong, deactivate(mllm, neurons, where=where):
        pass


def test_zero_reaches_the_down_projection(mllm, samples, neurons):
    seen = []
    hooks = record(mllm, seen)
    try:
        with deactivate(mllm, neurons):
            mllm.generate(mllm.encode(samples), 3)
    finally:
        for hook in hooks:
            hook.remove()
    chosen = neurons.any("modality").values
    assert all(not given[..., torch.from_numpy(chosen[i])].any() for i, given in seen)


def test_modalities_are_silenced_separately(mllm, samples, neurons):
    batch = mllm.encode(samples)
    outputs = {}
    for name, modalities in {"m0": ["m0"], "m1": "m1", "both": ["m0", "m1"], "all": None}.items():
        with deactivate(mllm, neurons, modalities):
            outputs[name] = logits(mllm, batch)
    with deactivate(mllm, neurons.sel(modality=["m1"])):
        assert torch.equal(logits(mllm, batch), outputs["m1"])
    assert torch.equal(outputs["both"], outputs["all"])
    assert not torch.allclose(outputs["m0"], outputs["m1"], atol=1e-4)
    assert not torch.allclose(outputs["m0"], outputs["both"], atol=1e-4)


def test_a_random_set_changes_the_output(mllm, samples, neurons):
    batch = mllm.encode(samples)
    before = logits(mllm, batch)
    with deactivate(mllm, neurons):
        assert (logits(mllm, batch) - before).abs().max() > 1e-3


def test_an_empty_selection_changes_nothing(mllm, samples, neurons):
    batch = mllm.encode(samples)
    before = logits(mllm, batch), mllm.generate(batch, 4)
    for empty in (xr.zeros_like(neurons), neurons[:0]):
        with deactivate(mllm, empty):
            assert torch.equal(logits(mllm, batch), before[0])
            assert mllm.generate(batch, 4) == before[1]
    with deactivate(mllm, neurons, modalities=[]):
        assert torch.equal(logits(mllm, batch), before[0])


def test_nothing_is_left_behind(mllm, samples, neurons):
    batch, before = mllm.encode(samples), footprints(mllm)
    own = logits(mllm, batch)
    with pytest.raises(KeyboardInterrupt), deactivate(mllm, neurons):
        assert footprints(mllm) != before
        raise KeyboardInterrupt
    assert footprints(mllm) == before
    assert torch.equal(logits(mllm, batch), own)


def test_selections_nest(mllm, samples, neurons):
    batch = mllm.encode(samples)
    with deactivate(mllm, neurons):
        together = logits(mllm, batch)
    with deactivate(mllm, neurons, ["m0"]), deactivate(mllm, neurons, ["m1"]):
        assert torch.equal(logits(mllm, batch), together)


def test_a_silenced_model_can_be_scored(mllm, samples, neurons):
    with deactivate(mllm, neurons):
        scores = score(mllm, Rows(samples))
    chosen = neurons.any("modality").values
    assert not scores.sel(metric="prob", modality="prompt").values[chosen].any()


def test_a_batch_is_its_rows_when_silenced(exact_mllm):
    samples, neurons = samples_for(exact_mllm), random_neurons(exact_mllm)
    constants = score(exact_mllm, Rows(samples))
    for mode in ("zero", "mean", "min"):
        with deactivate(exact_mllm, neurons, mode=mode, constants=constants):
            together = logits(exact_mllm, exact_mllm.encode(samples))
            alone = torch.cat([logits(exact_mllm, exact_mllm.encode([s])) for s in samples])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_any_array_of_the_right_shape(mllm, samples, neurons):
    batch = mllm.encode(samples)
    with deactivate(mllm, neurons):
        expected = logits(mllm, batch)
    with deactivate(mllm, neurons.values):  # without labels, modalities are 0, 1, ...
        assert torch.equal(logits(mllm, batch), expected)
    with deactivate(mllm, neurons.values, ["0", "1"]):
        assert torch.equal(logits(mllm, batch), expected)


def test_half_precision(mllm, samples):
    half = random_mllm("tiny-qwen2-vl", dtype=torch.bfloat16)
    neurons = random_neurons(half)
    batch = half.encode(samples[:1])
    constants = score(half, Rows(samples[:1]))
    with deactivate(half, neurons, mode="mean", constants=constants):
        assert logits(half, batch).dtype == torch.bfloat16


def test_gradients_pass_through(mllm, samples, neurons):
    batch = mllm.encode(samples[:1])
    norm = mllm.layers[0].input_layernorm.weight
    norm.requires_grad_(True)
    try:
        with deactivate(mllm, neurons):
            mllm.forward(batch).logits.sum().backward()
        assert norm.grad is not None and norm.grad.abs().sum() > 0
    finally:
        norm.requires_grad_(False)
        norm.grad = None


# --- wrong parameters ----------------------------------------------------------------------------


def test_wrong_parameters_are_named(mllm, neurons, constants):
    wrong = [
        (dict(modalities=["touch"]), r"no neurons of modality \['touch'\]; there are .*'m0'"),
        (dict(mode="max"), "unknown mode 'max'; use zero, mean, min, gain or resample"),
        (dict(mode="mean"), "pass constants=scores"),
        (dict(mode="min", constants=constants.reset_coords(drop=True)), "pass constants=scores"),
        (dict(neurons=neurons.astype(int)), "neurons is int64"),
        (dict(neurons=neurons[0]), "needs bool .modality, layer, neuron."),
        (dict(neurons=neurons[:, 1:]), r"\(layer, neuron\) = \(8, 512\)"),
    ]
    for arguments, message in wrong:
        arguments = {"neurons": neurons, **arguments}
        with pytest.raises(ValueError, match=message), deactivate(mllm, **arguments):
            pass
    assert not any(m._forward_hooks for m in mllm.activations)


@pytest.mark.fault("silencing that never happened")
def test_a_hook_that_does_not_fire_is_an_error(mllm, samples, neurons, monkeypatch):
    """A fused MLP passes the activation module by: in the prompt, and in generation."""
    batch, before = mllm.encode(samples[:1]), footprints(mllm)
    monkeypatch.setattr(mllm.layers[3].mlp, "forward", lambda x: x)
    for run in (mllm.forward, mllm.generate):
        missed = pytest.raises(RuntimeError, match=r"the activation of layers \[3\] never ran")
        with missed, deactivate(mllm, neurons):
            run(batch)
    neurons[:, 3] = False
    with deactivate(mllm, neurons):  # nothing is to be silenced there
        mllm.forward(batch)
    assert footprints(mllm) == before


@pytest.mark.fault("constants of another model, or not finite")
def test_constants_must_fit(mllm, neurons, constants):
    half = constants.isel(layer=slice(0, 4))
    with pytest.raises(ValueError, match="activation_min is .* of another model"):
        deactivate(mllm, neurons, mode="min", constants=half).__enter__()
    for grown in ({"layer": 1}, {"neuron": 1}):
        more = constants.pad(grown, mode="edge")
        with pytest.raises(ValueError, match="activation_mean is .* of another model"):
            deactivate(mllm, neurons, mode="mean", constants=more).__enter__()
    broken = constants.assign_coords(activation_mean=constants.activation_mean * np.nan)
    with pytest.raises(ValueError, match="activation_mean is not finite"):
        deactivate(mllm, neurons, mode="mean", constants=broken).__enter__()


def test_a_name_that_occurs_twice_silences_both(mllm, samples, neurons):
    twice = neurons.assign_coords(modality=["m", "m"])
    batch = mllm.encode(samples)
    with deactivate(mllm, neurons):
        expected = logits(mllm, batch)
    with deactivate(mllm, twice, ["m"]):
        assert torch.equal(logits(mllm, batch), expected)


# --- baked into a checkpoint ---------------------------------------------------------------------


def test_export_is_what_the_hooks_do(mllm, samples, neurons, tmp_path):
    batch = mllm.encode(samples)
    weights = {name: p.clone() for name, p in mllm.model.state_dict().items()}
    folder = export(mllm, neurons, tmp_path / "silenced", modalities="m1", note="A note.")
    for name, p in mllm.model.state_dict().items():
        assert torch.equal(p, weights[name]), name  # the model in memory is as it was

    silenced = type(mllm.model).from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor) is type(mllm.processor)
    other = type(mllm)(silenced, processor, str(folder))
    with deactivate(mllm, neurons, ["m1"]):
        expected = logits(mllm, batch), mllm.generate(batch, 5)
    torch.testing.assert_close(logits(other, other.encode(samples)), expected[0], rtol=0, atol=1e-5)
    assert other.generate(other.encode(samples), 5) == expected[1]
    assert not torch.allclose(logits(mllm, batch), expected[0], atol=1e-4)

    card = (folder / "README.md").read_text()
    assert f"{int(neurons.sel(modality='m1').sum())} neurons silenced" in card
    assert "selected for m1 are 0" in card and "A note." in card and str(tmp_path) not in card
    for layer, count in enumerate(neurons.sel(modality="m1").sum("neuron").values):
        assert f"| {layer} | {count} |" in card
    assert str(mllm.name) not in card  # the folder's name, not its path on this machine


def test_export_changes_nothing_else(mllm, neurons, tmp_path):
    folder = export(mllm, neurons, tmp_path)
    silenced = type(mllm.model).from_pretrained(folder).state_dict()
    chosen = torch.from_numpy(neurons.any("modality").values)
    for name, p in mllm.model.state_dict().items():
        if name.endswith("mlp.down_proj.weight") and "language_model" in name:
            layer = int(name.split("layers.")[1].split(".")[0])
            p = p.clone()
            p[:, chosen[layer]] = 0
        assert torch.equal(silenced[name], p), name


def test_export_of_a_quantised_layer_is_refused(mllm, neurons, tmp_path, monkeypatch):
    projection = mllm.layers[0].mlp.down_proj
    packed = torch.nn.Parameter(projection.weight.to(torch.uint8), requires_grad=False)
    monkeypatch.setitem(projection._parameters, "weight", packed)
    with pytest.raises(ValueError, match=r"layer 0: no down projection of one float .*uint8"):
        export(mllm, neurons, tmp_path / "silenced")
    assert not (tmp_path / "silenced").exists()


def test_export_of_what_is_no_linear_module_is_refused(mllm, neurons, tmp_path, monkeypatch):
    """The weight of a square Conv1D would be silenced along the wrong axis."""
    turned = transformers.pytorch_utils.Conv1D(mllm.n_neurons, mllm.n_neurons)
    monkeypatch.setitem(mllm.layers[0].mlp._modules, "down_proj", turned)
    with pytest.raises(
        ValueError, match=r"layer 0: .*\(Conv1D .* an nn.Linear; .*`deactivate` can"
    ):
        export(mllm, neurons, tmp_path / "silenced")
    assert not (tmp_path / "silenced").exists()


@pytest.mark.fault("export of an offloaded model")
def test_export_of_an_offloaded_model_is_refused(mllm, neurons, tmp_path, monkeypatch):
    projection = mllm.layers[1].mlp.down_proj
    away = torch.nn.Parameter(torch.empty_like(projection.weight, device="meta"), False)
    monkeypatch.setitem(projection._parameters, "weight", away)
    with pytest.raises(
        ValueError, match=r"1 weights are quantised or offloaded \(.*1.mlp.down_proj.weight\)"
    ):
        export(mllm, neurons, tmp_path / "silenced")
    assert not (tmp_path / "silenced").exists()


@pytest.mark.fault("export of a quantised model")
def test_export_of_a_quantised_model_is_refused(mllm, neurons, tmp_path, monkeypatch):
    monkeypatch.setattr(mllm.model, "hf_quantizer", object(), raising=False)
    with pytest.raises(ValueError, match="weights are quantised or offloaded"):
        export(mllm, neurons, tmp_path / "silenced")


@pytest.mark.fault("a checkpoint whose card says otherwise")
def test_what_was_written_is_read_back(mllm, neurons, tmp_path, monkeypatch):
    """An engine that saves the weights as they were: no card, and an error that names one."""
    save = type(mllm.model).save_pretrained
    monkeypatch.setattr(
        type(mllm.model), "save_pretrained", lambda self, folder, state_dict: save(self, folder)
    )
    with pytest.raises(RuntimeError, match=r"does not hold .*layers\.0\.mlp\.down_proj\.weight"):
        export(mllm, neurons, tmp_path / "silenced")
    assert not (tmp_path / "silenced/README.md").exists()
