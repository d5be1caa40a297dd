"""What `MLLM` finds in a model, its inputs and answers, and that a tap leaves no trace."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import MODELS, ROOT, footprints, random_mllm, samples_for, shared_mllm
from torch import nn

from minerlib import answering
from minerlib import tap as tap_module
from minerlib.model import MLLM, load
from minerlib.separation import separate
from minerlib.tasks import Sample

# --- what is found -------------------------------------------------------------------------------


def test_parts(mllm):
    text = mllm.model.config.get_text_config()
    assert (mllm.n_layers, mllm.n_neurons) == (text.num_hidden_layers, text.intermediate_size)
    assert mllm.activations == [layer.mlp.act_fn for layer in mllm.layers]
    assert mllm.n_neurons == mllm.layers[0].mlp.down_proj.in_features
    assert not mllm.model.training
    assert not any(p.requires_grad for p in mllm.model.parameters())


def test_kinds():
    assert shared_mllm("tiny-qwen2-vl").kinds == ("text", "special", "image", "video")
    assert shared_mllm("tiny-qwen2-audio").kinds == ("text", "special", "audio")


@pytest.mark.parametrize("name", MODELS)
def test_load_is_the_checkpoint(name):
    folder = ROOT / "data/models" / name
    mllm = load(folder, device="cpu")
    assert type(mllm.model).__name__ == mllm.model.config.architectures[0]
    assert mllm.fingerprint.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    files = {f.name for f in folder.iterdir()} - {"README.md", "model.yml"}
    assert files <= mllm.fingerprint.keys()
    assert all(len(mllm.fingerprint[file]) == 64 for file in files)
    assert mllm.model.dtype == torch.float32
    assert load(folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.fault("a file that changes after loading")
def test_a_model_is_what_was_loaded(tmp_path):
    folder = shutil.copytree(ROOT / "data/models" / MODELS[0], tmp_path / "mine")
    loaded = load(folder, device="cpu")
    first = dict(loaded.fingerprint)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert loaded.fingerprint == first != load(folder, device="cpu").fingerprint


@pytest.mark.fault("a fingerprint that leaves something out")
def test_the_processor_of_a_model_in_memory_counts():
    own = shared_mllm(MODELS[0])
    small = transformers.AutoProcessor.from_pretrained(
        ROOT / "data/models" / MODELS[0], max_pixels=1024
    )
    a, b = (MLLM(own.model, processor, "nowhere") for processor in (own.processor, small))
    assert a.fingerprint["weights"] == b.fingerprint["weights"] and a.fingerprint != b.fingerprint


def test_the_device_that_is_asked_for():
    assert load(ROOT / "data/models" / MODELS[0], device="meta").device.type == "meta"


def test_a_tokenizer_without_padding_pads_with_its_end():
    own = shared_mllm(MODELS[0])
    assert own.tokenizer.pad_token not in (None, own.tokenizer.eos_token)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data/models" / MODELS[0])
    tokenizer.pad_token = None
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    assert MLLM(model, tokenizer, "llama").tokenizer.pad_token == tokenizer.eos_token


def text_only(config: transformers.PretrainedConfig) -> MLLM:
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data/models" / MODELS[0])
    model = transformers.AutoModelForCausalLM.from_config(config)
    return MLLM(model, tokenizer, config.model_type)


SMALL = dict(
    vocab_size=1100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)


@pytest.mark.parametrize("config", ["Llama", "Mistral", "Qwen3", "Gemma2", "Gemma3Text", "Phi3"])
def test_other_decoders(config):
    """Other MLPs (fused gate and up, GELU), norms and attention scalings are entered alike."""
    mllm = text_only(getattr(transformers, f"{config}Config")(**SMALL))
    seen = []
    with mllm.tap(
        activation=lambda i, x: seen.append((i, x.shape[-1])),
        attention=lambda i, q, k, mask, scaling: seen.append((i, q.shape[1], k.shape[1])),
    ):
        mllm.forward(mllm.encode([Sample("What is it?", ())]))
    assert seen == [(0, 4, 2), (0, 48), (1, 4, 2), (1, 48)]


def test_no_gated_mlp_is_explained():
    config = transformers.GPT2Config(vocab_size=1100, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(
        ValueError, match=r"GPT2.*looked for .*a subclass of minerlib\.families\.Family"
    ):
        text_only(config)


def test_shared_activation_modules_are_refused(mllm):
    model = random_mllm(mllm.name.rsplit("/")[-1]).model
    layers = model.get_decoder().layers
    own, layers[2].mlp.act_fn = layers[2].mlp.act_fn, layers[0].mlp.act_fn
    with pytest.raises(ValueError, match=r"layers \[2\] share their activation modules with"):
        MLLM(model, mllm.processor, mllm.name)
    layers[2].mlp.act_fn, layers[3] = own, layers[1]
    with pytest.raises(ValueError, match=r"layers \[3\] share their layers with earlier ones"):
        MLLM(model, mllm.processor, mllm.name)


# --- inputs and answers --------------------------------------------------------------------------


def test_encode_pads_on_the_left(mllm, samples):
    batch = mllm.encode(samples)
    real = batch["attention_mask"].bool()
    assert real[:, -1].all() and not real.all()
    assert (real.int().diff(dim=1) >= 0).all()
    for row, sample in enumerate(samples):
        alone = mllm.encode([sample])["input_ids"][0]
        assert torch.equal(batch["input_ids"][row][real[row]], alone)


def test_placeholders_are_as_many_as_features(mllm, samples):
    for sample in samples:
        batch = mllm.encode([sample])
        sets = separate(mllm, batch)
        for kind, grid in (("image", "image_grid_thw"), ("video", "video_grid_thw")):
            if grid in batch:
                merged = mllm.model.config.vision_config.spatial_merge_size**2
                assert sets[kind].sum() == batch[grid].prod() // merged > 0
        if "input_features" in batch:
            mel = batch["feature_attention_mask"].sum()
            assert sets["audio"].sum() == ((mel - 1) // 2 + 1 - 2) // 2 + 1 > 0
            assert mel == -(-len(sample.audio) // 160)  # 10 ms a frame


def test_media_come_before_the_text(mllm, samples):
    for sample in samples:
        chat = mllm.family.chat(sample)
        for kind in ("image", "video", "audio"):
            if getattr(sample, kind) is not None:
                placeholder = mllm.tokenizer.convert_ids_to_tokens(mllm.token_ids[kind])[0]
                assert 0 < chat.index(placeholder) < chat.index(sample.prompt)


def test_a_medium_that_the_model_does_not_take():
    sound, picture = np.zeros(16_000, np.float32), np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="no placeholder token for audio"):
        shared_mllm("tiny-qwen2-vl").encode([Sample("?", (), audio=sound)])
    with pytest.raises(ValueError, match="no placeholder token for video"):
        shared_mllm("tiny-qwen2-audio").encode([Sample("?", (), video=picture)])


@pytest.mark.parametrize(
    ("seconds", "message"), [(2.5, r"2\.50 s exceeds .* window of 2 s"), (0.05, r"0\.050 s")]
)
def test_audio_that_the_encoder_cannot_take(seconds, message):
    clip = np.zeros(int(16_000 * seconds), np.float32)
    with pytest.raises(ValueError, match=message):
        shared_mllm("tiny-qwen2-audio").encode([Sample("?", (), audio=clip)])


def test_a_batch_generates_what_its_rows_generate(exact_mllm):
    samples = samples_for(exact_mllm)
    together = exact_mllm.generate(exact_mllm.encode(samples), 6)
    assert together == [exact_mllm.generate(exact_mllm.encode([s]), 6)[0] for s in samples]


def test_generation_ignores_the_checkpoints_settings(mllm, samples, monkeypatch):
    batch = mllm.encode(samples)
    before = mllm.generate(batch, 6)
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=9.0, num_beams=3,
        min_new_tokens=6, suppress_tokens=mllm.tokenizer.encode("".join(before)),
    )  # fmt: skip
    settings.eos_token_id = mllm.model.generation_config.eos_token_id
    monkeypatch.setattr(mllm.model, "generation_config", settings)
    assert mllm.generate(batch, 6) == before


def test_logits_that_are_no_numbers_are_no_answers(mllm, samples):
    """Of NaN the first choice would be the likeliest, and a mean would leave the row out."""
    batch = mllm.encode(samples)

    def poison(module, args, out):
        out[-1] = float("nan")  # of the last row alone

    hook = mllm.activations[-1].register_forward_hook(poison)
    calls = (lambda: mllm.choose(batch, "AB"), lambda: mllm.generate(batch, 2),
             lambda: mllm.logprob(batch, ["yes"] * len(samples)))  # fmt: skip
    try:
        for call in calls:
            with pytest.raises(ValueError, match="torch.float32 gives logits of NaN; try dtype="):
                call()
    finally:
        hook.remove()
    for call in calls:
        call()


def test_choose_ranks_the_last_tokens_probabilities(mllm, samples):
    batch = mllm.encode(samples)
    choices = ("A", "B", "C", "D")
    ids = [
        [mllm.tokenizer.encode(form, add_special_tokens=False) for form in (c, " " + c)]
        for c in choices
    ]
    with torch.inference_mode():
        probs = mllm.model(**batch).logits[:, -1].softmax(-1)
    scores = torch.stack([sum(probs[:, i[0]] for i in forms if len(i) == 1) for forms in ids])
    assert mllm.choose(batch, choices) == [choices[i] for i in scores.argmax(0)]
    with pytest.raises(ValueError, match="'a long choice' is not a single token"):
        mllm.choose(batch, ("A", "a long choice"))


ANSWERS = ("Arlen", "a small red square", "nobody at all", "circle and two more", "to the left")


def test_an_answers_log_probability_is_its_tokens_mean_after_the_prompt(exact_mllm):
    """In one padded batch as of each row alone, whose tokens are told one by one."""
    samples = samples_for(exact_mllm)
    answers = [ANSWERS[i % 5] for i in range(len(samples))]
    got = exact_mllm.logprob(exact_mllm.encode(samples), answers)
    assert len({len(exact_mllm.tokenizer.encode(answer)) for answer in answers}) > 1
    for sample, answer, mean in zip(samples, answers, got, strict=True):
        batch, told = dict(exact_mllm.encode([sample])), []
        ids = exact_mllm.tokenizer.encode(answer, add_special_tokens=False)
        for token in ids:
            with torch.inference_mode():
                logits = exact_mllm.model(**batch, use_cache=False).logits[0, -1]
            told.append(logits.log_softmax(-1)[token].item())
            shape = batch["input_ids"].shape
            new = {k: v for k, v in batch.items() if getattr(v, "shape", None) == shape}
            more = {"input_ids": token, "attention_mask": 1}
            for name, value in new.items():
                last = torch.full_like(value[:, :1], more.get(name, 0))
                batch[name] = torch.cat([value, last], 1)
        assert mean == pytest.approx(np.mean(told), abs=1e-6)


def test_an_answer_without_tokens_is_refused(mllm, samples):
    with pytest.raises(ValueError, match="the answer '' has no token"):
        mllm.logprob(mllm.encode(samples[:2]), ["yes", ""])


def test_after_a_word_an_answer_starts_with_a_blank():
    """A template may end in a word (ASSISTANT:), where " yes" is what a model would say."""
    own = shared_mllm(MODELS[0])
    tokenizer, model = own.tokenizer, text_only(transformers.LlamaConfig(**SMALL)).model
    mllm = MLLM(model, tokenizer, "llama")
    batch = tokenizer(["Is it red? Answer:"], return_tensors="pt")
    ids = tokenizer.encode(" yes", add_special_tokens=False)
    whole = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
    with torch.inference_mode():
        probs = model(input_ids=whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    mean = probs[range(len(ids)), ids].mean().item()
    assert mllm.logprob(batch, ["yes"]) == pytest.approx([mean], abs=1e-5)


@pytest.mark.fault("a row's number depends on the first row of its batch")
def test_each_prompt_says_how_its_answer_starts():
    tokenizer = shared_mllm(MODELS[0]).tokenizer
    mllm = MLLM(text_only(transformers.LlamaConfig(**SMALL)).model, tokenizer, "llama")
    prompts = ["Is it red? Answer:", "Is it a red one? Answer:\n"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    alone = [mllm.logprob(tokenizer([p], return_tensors="pt"), ["yes"])[0] for p in prompts]
    assert mllm.logprob(batch, ["yes", "yes"]) == pytest.approx(alone, abs=1e-5)


# --- the way in ----------------------------------------------------------------------------------


def nothing(*_):
    return None


EVERYTHING = dict(activation=nothing, attention=nothing, hidden=nothing)


def test_a_tap_changes_nothing(mllm, samples):
    batch = mllm.encode(samples)
    with torch.inference_mode():
        before = mllm.forward(batch).logits
        with mllm.tap(**EVERYTHING):
            during = mllm.forward(batch).logits
    assert torch.equal(before, during)


def test_an_empty_tap_is_harmless(mllm, samples):
    with mllm.tap(), mllm.tap(activation=nothing, layers=[]):
        mllm.forward(mllm.encode(samples[:1]))


@pytest.mark.parametrize("where", ["body", "activation", "attention", "hidden"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_trace_after_an_error(mllm, samples, where, error):
    before = footprints(mllm)
    batch = mllm.encode(samples[:1])
    last = mllm.n_layers - 1

    def fail(layer, *_):
        if layer == last:
            raise error("in the middle")

    taps = EVERYTHING if where == "body" else {**EVERYTHING, where: fail}
    with pytest.raises(error, match="in the middle"), mllm.tap(**taps):
        assert footprints(mllm) != before
        mllm.forward(batch)
        fail(last)
    assert footprints(mllm) == before
    assert not tap_module._listeners


def test_no_trace_when_a_layer_cannot_be_tapped(mllm):
    before = footprints(mllm)
    with pytest.raises(IndexError), mllm.tap(**EVERYTHING, layers=[0, 99]):
        pass
    assert footprints(mllm) == before


def test_attention_is_tapped_in_turn(mllm, samples):
    """The inner tap sees the mask that the outer one made, and the kernel what the inner made."""
    before, batch, seen = footprints(mllm), mllm.encode(samples[:1]), []
    n = batch["input_ids"].shape[1]
    own = torch.eye(n, dtype=torch.bool)[None, None]
    with mllm.tap(attention=lambda *_: own):
        inside, alone = footprints(mllm), mllm.forward(batch).logits
        with mllm.tap(attention=lambda i, q, k, mask, *_: seen.append(mask)):
            assert torch.equal(mllm.forward(batch).logits, alone)
        with mllm.tap(attention=lambda *_: own.new_ones(n, n).tril()[None, None]):
            assert not torch.equal(mllm.forward(batch).logits, alone)
        assert footprints(mllm) == inside
        assert torch.equal(mllm.forward(batch).logits, alone)
    assert len(seen) == mllm.n_layers and all(mask is own for mask in seen)
    assert footprints(mllm) == before


def test_taps_of_different_layers_nest(mllm, samples):
    before, seen = footprints(mllm), []
    outer, inner = ({"attention": lambda i, *_: seen.append(i), "layers": [i]} for i in (0, 1))
    with mllm.tap(**outer):
        inside = footprints(mllm)
        with mllm.tap(**inner):
            mllm.forward(mllm.encode(samples[:1]))
        assert footprints(mllm) == inside
    assert seen == [0, 1] and footprints(mllm) == before


def test_only_the_named_layers_fire(mllm, samples):
    fired = []
    with mllm.tap(
        activation=lambda i, x: fired.append(("activation", i)),
        attention=lambda i, *_: fired.append(("attention", i)),
        hidden=lambda i, h: fired.append(("hidden", i)),
        layers=[1, 3],
    ):
        mllm.forward(mllm.encode(samples[:1]))
    expected = [[("attention", i), ("activation", i), ("hidden", i + 1)] for i in (1, 3)]
    assert fired == sum(expected, [])


def test_all_fire_once_for_the_prompt_and_once_for_each_new_token(mllm, samples, monkeypatch):
    monkeypatch.setattr(mllm.model.generation_config, "eos_token_id", None)  # never stop early
    batch = mllm.encode(samples)
    prompt, new = batch["input_ids"].shape[1], 5
    seen = {name: [] for name in EVERYTHING}
    with mllm.tap(
        activation=lambda i, x: seen["activation"].append((i, x.shape[1])),
        attention=lambda i, q, k, *_: seen["attention"].append((i, q.shape[2])),
        hidden=lambda i, h: seen["hidden"].append((i, h.shape[1])),
    ):
        mllm.generate(batch, new)
    # The last new token is not fed back, and the first comes from the prompt.
    steps = [prompt] + [1] * (new - 1)
    expected = [(i, n) for n in steps for i in range(mllm.n_layers)]
    assert seen["activation"] == seen["attention"] == expected
    assert seen["hidden"] == [(i, n) for n in steps for i in range(mllm.n_layers + 1)]


def test_queries_and_keys_are_those_of_the_models_attention(samples, mllm):
    """With the causal mask put back they give the weights that eager attention reports."""
    eager = random_mllm(mllm.name.rsplit("/")[-1], attn_implementation="eager")
    batch = eager.encode(samples[-1:])
    seen = []
    with torch.inference_mode():
        with eager.tap(attention=lambda i, q, k, mask, scaling: seen.append((q, k, scaling))):
            eager.forward(batch)
        reported = eager.model(**batch, output_attentions=True).attentions
    for (query, key, scaling), weights in zip(seen, reported, strict=True):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query @ key.transpose(-1, -2) * scaling
        future = torch.ones(logits.shape[-2:], dtype=bool).triu(1)
        expected = logits.masked_fill(future, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_attention_may_replace_the_mask(mllm, samples):
    """A mask that hides the first token from all others changes what comes out."""
    batch = mllm.encode(samples[:1])
    n = batch["input_ids"].shape[1]
    causal = torch.ones(n, n, dtype=bool).tril()
    hidden = causal.clone()
    hidden[1:, 0] = False

    def logits(mask):
        with torch.inference_mode(), mllm.tap(attention=lambda *_: mask[None, None]):
            return mllm.forward(batch).logits

    with torch.inference_mode():
        own = mllm.forward(batch).logits
    torch.testing.assert_close(logits(causal), own, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(hidden), own, rtol=0, atol=1e-5)


def test_hidden_sees_the_layers_outputs(mllm, samples):
    batch = mllm.encode(samples[:1])
    seen = []
    with torch.inference_mode(), mllm.tap(hidden=lambda i, h: seen.append(h.clone())):
        states = mllm.model(**batch, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(seen[:-1], states[:-1], strict=True))


def test_activations_may_be_replaced(mllm, samples):
    """Zero activations in every layer leave the MLPs out: the same as zero down projections."""
    batch = mllm.encode(samples[:1])
    other = random_mllm(mllm.name.rsplit("/")[-1])
    with torch.inference_mode():
        with mllm.tap(activation=lambda i, x: torch.zeros_like(x)):
            silent = mllm.forward(batch).logits
        for layer in other.layers:
            nn.init.zeros_(layer.mlp.down_proj.weight)
        torch.testing.assert_close(other.forward(batch).logits, silent, rtol=0, atol=1e-6)


def test_an_answer_is_scored_as_it_was_generated(mllm, samples, monkeypatch):
    """Its own ids up to what ends it; a row that ends at once has none."""
    batch = mllm.encode(samples[:2])
    length = batch["input_ids"].shape[1]
    new = torch.tensor([[11, 12, 99, 98], [99, 98, 98, 98]])
    whole = torch.cat([batch["input_ids"], new], 1)
    monkeypatch.setattr(mllm.model, "generate", lambda **given: whole)
    monkeypatch.setattr(mllm.model.generation_config, "eos_token_id", [99])
    got = answering.answered(mllm, batch, 4)
    assert got["input_ids"][0, length:].tolist() == [11, 12]
    assert got["attention_mask"][:, length:].tolist() == [[1, 1], [0, 0]]
    assert torch.equal(got["attention_mask"][:, :length], batch["attention_mask"])
