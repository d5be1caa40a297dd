"""Every family of the README's table: through `load`, the four stages, silencing and evaluation."""

from __future__ import annotations

import dataclasses
import shutil
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import random_neurons
from families import (
    CHATML,
    FAMILIES,
    LAYERS,
    NEURONS,
    TEXT,
    Rows,
    chatml,
    randomise,
    samples,
    tokenizer,
)

import minerlib as ml
from minerlib import answering, atlas, families
from minerlib.families import Family as Adapter
from minerlib.findings.attention import attention_between
from minerlib.findings.convergence import CONVERGENCE, PLACE, convergence, in_words
from minerlib.findings.last_token import answer_tokens, knockout, last_token_flow, logit_lens
from minerlib.findings.probing import probing
from minerlib.findings.states import hidden_states
from minerlib.findings.telomeres import telomeres
from minerlib.scoring import SETS, importance
from minerlib.separation import BASE_SETS, separate, stack


@pytest.fixture(scope="session", autouse=True)
def quiet():
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The checkpoint folder of a family, built once."""

    @cache
    def build(name):
        family = FAMILIES[name]
        if family.needs and find_spec(family.needs) is None:
            pytest.skip(f"{family.processor} needs the package {family.needs}")
        path = tmp_path_factory.mktemp(name)
        family.build(path)
        return path

    return build


@pytest.fixture(scope="session")
def loaded(folder):
    """A family loaded from its folder, once for each set of arguments."""
    return cache(lambda name, **kwargs: ml.load(folder(name), **kwargs))


# These take as long as all the others together.
LONG = ("qwen2.5-omni", "qwen2.5-omni-thinker", "phi4-multimodal", "voxtral", "gemma4")


@pytest.fixture(
    params=[pytest.param(f, marks=pytest.mark.slow) if f in LONG else f for f in FAMILIES]
)
def name(request):
    return request.param


@pytest.fixture
def mllm(name, loaded):
    return loaded(name)


def every(name) -> list:
    """Rows of text and of each medium, together."""
    return sum(samples(FAMILIES[name].media).values(), [])


# ------------------------------------------------------------------ parts, prompts, token sets


def test_the_parts_are_found(name, mllm):
    family = FAMILIES[name]
    assert type(mllm.model).__name__ == family.model
    assert type(mllm.processor).__name__ == family.processor
    assert (mllm.n_layers, mllm.n_neurons) == (FAMILIES[name].layers, NEURONS)
    assert mllm.kinds == ("text", "special", *family.media)
    decoder = set(mllm.model.get_decoder().modules())
    assert all(a in decoder for a in mllm.activations)
    ids = sum(mllm.token_ids.values(), [])
    assert len(ids) == len(set(ids))


def test_every_token_is_of_one_kind_and_every_placeholder_holds_a_feature(name, mllm):
    batch = mllm.encode(every(name))
    sets = ml.separate(mllm, batch)
    base = torch.stack([sets[s] for s in BASE_SETS]).sum(0)
    assert (base == batch["attention_mask"]).all()
    assert {s for s in BASE_SETS if sets[s].any()} >= {"text", *FAMILIES[name].media}
    # What enters the first layer differs from the token's embedding where, and only where, a
    # picture, a frame or a sound was put.
    entered = []
    hook = mllm.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.inference_mode(), hook:
        mllm.forward(batch)
        table = mllm.model.get_input_embeddings()
        words = table(batch["input_ids"].clamp(max=table.num_embeddings - 1))
    replaced = (entered[0] - words).abs().amax(-1) > 1e-6
    media = sets["image"] | sets["video"] | sets["audio"]
    assert torch.equal(replaced & sets["prompt"], media)


def test_prompts_end_in_the_question_and_open_with_at_most_one_bos(name, mllm):
    batch = mllm.encode(every(name))
    tokens = mllm.tokenizer
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert "?" in tokens.decode(ids[real])
        if tokens.bos_token_id is not None and name != "phi4-multimodal":
            assert (ids[real] == tokens.bos_token_id).sum() == 1
    special = ml.separate(mllm, batch)["special"]
    if mllm.processor.chat_template or name == "voxtral":
        assert special.any(1).all()


def test_media_that_the_model_does_not_take_are_refused(name, mllm):
    for kind in {"image", "video", "audio"} - set(FAMILIES[name].media):
        with pytest.raises(ValueError, match=f"no placeholder token for {kind}"):
            mllm.encode(samples((kind,))[kind])


# ------------------------------------------------------------------ the four stages, silencing


@pytest.fixture(scope="session")
def mined(loaded):
    """Scores and neurons of a family."""

    @cache
    def mine(name):
        parts = [Rows(rows) for rows in samples(FAMILIES[name].media).values()]
        total = ml.aggregate(ml.score(loaded(name), p) for p in parts)
        return total, ml.select(total, ratio=0.2)

    return mine


def test_scores_and_neurons(name, mined):
    total, neurons = mined(name)
    shape = FAMILIES[name].layers, NEURONS
    assert total.shape == (5, len(SETS), *shape)
    assert np.isfinite(total).all() and total.min() >= 0 and total.max() <= 1
    rows = dict(zip(total.modality.values.tolist(), total.samples.values.tolist(), strict=True))
    assert rows["prompt"] == rows["text"] == 2 + 2 * len(FAMILIES[name].media)
    assert all(rows[kind] == 2 * (kind in FAMILIES[name].media) for kind in families.MEDIA)
    for kind in ("text", *FAMILIES[name].media):  # no set's scores are those of another
        assert (total.sel(modality=kind).std("neuron") > 0).all()
    assert set(neurons.modality.values) == {m for m in BASE_SETS if rows[m]}
    assert 0 < neurons.any("modality").sum() <= int(0.2 * np.prod(shape))


@pytest.mark.parametrize("mode", ["zero", "mean", "min"])
def test_silenced_neurons_are_constant_in_prompt_and_generation(name, mllm, mined, mode):
    total, neurons = mined(name)
    chosen = neurons.any("modality").values
    expected = {
        "zero": np.zeros((mllm.n_layers, NEURONS)),
        "mean": total.activation_mean.values,
        "min": np.broadcast_to(total.activation_min.values[:, None], (mllm.n_layers, NEURONS)),
    }[mode]
    batch = mllm.encode(every(name))
    plain = mllm.forward(batch).logits
    assert plain.shape[1] == 1 and mllm.forward(batch, 3).logits.shape[1] == 3
    seen = [[] for _ in range(mllm.n_layers)]
    with ml.deactivate(mllm, neurons, mode=mode, constants=total):
        with mllm.tap(activation=lambda i, x: seen[i].append(x.clone())):
            mllm.generate(batch, 3)
        assert not torch.allclose(mllm.forward(batch).logits, plain)
    assert torch.equal(mllm.forward(batch).logits, plain)
    sharing = getattr(mllm.text_config, "num_kv_shared_layers", 0)  # these see what is answered
    for layer, parts in enumerate(seen):
        whole = batch["input_ids"].shape[1] if layer < mllm.n_layers - sharing else 1
        assert parts[0].shape[1] == whole and len(parts) > 1
        assert all(part.shape[1] == 1 for part in parts[1:])
        x = torch.cat(parts, 1)
        wanted = torch.tensor(expected[layer][chosen[layer]], dtype=x.dtype)
        assert (x[..., chosen[layer]] == wanted).all()
        assert (x[..., ~chosen[layer]].std((0, 1)) > 0).all()


def test_an_exported_checkpoint_answers_as_the_silenced_model(name, mllm, mined, tmp_path):
    _, neurons = mined(name)
    batch = mllm.encode(every(name))
    with ml.deactivate(mllm, neurons):
        logits, answers = mllm.forward(batch).logits, mllm.generate(batch, 4)
    again = ml.load(ml.export(mllm, neurons, tmp_path / "silenced"))
    batch = again.encode(every(name))
    torch.testing.assert_close(again.forward(batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert again.generate(batch, 4) == answers


def test_evaluation(name, mllm):
    rows = every(name)
    table = ml.evaluate(mllm, Rows(rows), batch_size=3)
    assert table["prompt"].tolist() == [s.prompt for s in rows]
    assert table["score"].between(0, 1).all()
    prepared = ml.prepare(mllm, Rows(rows), batch_size=3)
    assert ml.evaluate(mllm, prepared).equals(table)
    letters = ml.evaluate(mllm, Rows(rows, tuple("ABCD")))
    with torch.inference_mode():
        last = mllm.forward(mllm.encode(rows)).logits[:, -1]
    ids = [mllm.tokenizer.encode(c, add_special_tokens=False)[-1] for c in "ABCD"]
    assert letters["answer"].tolist() == ["ABCD"[i] for i in last[:, ids].argmax(-1)]


# ------------------------------------------------------------------ the findings' measures


@pytest.mark.slow
def test_the_findings_are_measured_on_every_family(name, mllm, mined):
    rows, media = every(name), FAMILIES[name].media
    states = hidden_states(mllm, 2 * rows, batch_size=3)
    assert states.hidden.shape[0] == mllm.n_layers + 1 and np.isfinite(states.hidden).all()
    few = {"n_boot": 20, "n_null": 20}
    special = {"special"} & {*states.tokens["kind"]}  # llama's test tokenizer has no chat template
    for kind in (*media[:1], *special):
        curves = convergence(states, ("text", kind), **few)
        assert curves["layer"].nunique() == mllm.n_layers + 1 and {*curves["measure"]} == {
            *CONVERGENCE
        }
    for kind in media:
        assert probing(states.of("text", kind), **few).sizes["layer"] == mllm.n_layers + 1
    if special:
        assert telomeres(states, **few).sizes["layer"] == mllm.n_layers + 1

    within = attention_between(mllm, rows, batch_size=3)
    assert np.isfinite(within.select_dtypes("number").dropna()).all(axis=None)
    answers = answer_tokens(mllm, rows)
    flow = last_token_flow(mllm, rows, answers, batch_size=3)
    shares = flow.groupby(["sample", "layer"])["attention"].sum()
    np.testing.assert_allclose(shares, 1, atol=1e-4)
    assert flow["saliency"].gt(0).any()
    lens = logit_lens(mllm, rows, answers, batch_size=3)
    cut = knockout(mllm, rows, answers, window=1, batch_size=3)
    assert {"text", *media} <= set(cut["set"])
    with torch.inference_mode():
        last = mllm.forward(mllm.encode(rows)).logits[:, -1].float().softmax(-1)
    expected = last[range(len(rows)), answers].numpy()
    top = cut.drop_duplicates("sample").sort_values("sample")["probability"]
    np.testing.assert_allclose(top, expected, rtol=1e-3, atol=1e-6)
    end = lens[lens["layer"] == mllm.n_layers]["probability"]
    np.testing.assert_allclose(end, expected, rtol=1e-3, atol=1e-6)
    with ml.deactivate(mllm, mined(name)[1]):
        silenced = logit_lens(mllm, rows, answers, batch_size=3)
    assert not np.allclose(silenced["probability"], lens["probability"])


# ------------------------------------------------------------------ attention


@torch.inference_mode()
def test_tapped_queries_and_keys_make_the_models_own_attention(name, loaded):
    """Rotated, normed and scaled as the model does it, under its masks and sliding windows."""
    mllm = loaded(name, attn_implementation="eager")
    batch = mllm.encode(every(name))
    own = mllm.model(**batch, use_cache=False, output_attentions=True).attentions
    tapped = {}

    def attend(layer, query, key, mask, scaling):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        tapped[layer] = (query @ key.transpose(-1, -2) * scaling + mask).softmax(-1)

    with mllm.tap(attention=attend):
        mllm.forward(batch)
    real = batch["attention_mask"].bool()
    for layer in range(LAYERS):
        rows, found = own[layer].transpose(1, 2)[real], tapped[layer].transpose(1, 2)[real]
        torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-6)
        assert rows.max(-1).values.mean() > 2 / real.shape[1]  # far from uniform


# ------------------------------------------------------------------ batches


@torch.inference_mode()
def row_scores(mllm, rows) -> torch.Tensor:
    """Importance scores of each row, [row, layer, metric, set, neuron]."""
    batch = mllm.encode(rows)
    masks, seen, scores = stack(ml.separate(mllm, batch)), {}, {}

    def attend(layer, query, key, mask, scaling):
        seen[layer] = query, key, masks, scaling

    def activate(layer, x):
        scores[layer] = importance(x, *seen[layer])

    with mllm.tap(activation=activate, attention=attend):
        mllm.forward(batch)
    return torch.stack([scores[i] for i in range(mllm.n_layers)], 1)


def test_a_row_scores_and_answers_alike_alone_and_in_any_batch(name, loaded):
    """In float64, for `prob` counts signs: float32 noise may flip one and move it by 1 / tokens."""
    mllm = loaded(name, dtype=FAMILIES[name].exact)
    by_kind = samples(FAMILIES[name].media)
    rows = sum(by_kind.values(), [])
    alone = torch.cat([row_scores(mllm, [row]) for row in rows])
    like = torch.cat([row_scores(mllm, part) for part in by_kind.values()])
    mixed = row_scores(mllm, rows[::-1]).flip(0)
    torch.testing.assert_close(like, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed, alone, rtol=0, atol=1e-4)

    def answers(parts):
        return sum((mllm.generate(mllm.encode(part), 6) for part in parts), [])

    one_by_one = answers([[row] for row in rows])
    assert answers(by_kind.values()) == one_by_one
    assert answers([rows[::-1]])[::-1] == one_by_one


def test_batch_size_does_not_change_scores(name, loaded):
    mllm = loaded(name, dtype=FAMILIES[name].exact)
    one, many = (ml.score(mllm, Rows(every(name)), batch_size=n) for n in (1, 99))
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-4)
    np.testing.assert_allclose(one.activation_min, many.activation_min, atol=1e-6)


def test_videos_of_different_lengths_in_one_llava_batch_are_refused(loaded):
    mllm, rows = loaded("llava-onevision"), samples(("video",))["video"]
    short = type(rows[0])(**{**vars(rows[0]), "video": rows[0].video[:2]})
    with pytest.raises(ValueError, match="use batch_size=1, or media of one shape"):
        mllm.encode([short, rows[1]])
    assert len(mllm.encode([short])["input_ids"]) == 1


def test_phi4_audio_still_needs_its_workaround(folder, loaded):
    """When transformers masks the padding of clips, `_embed_clips_alone` can go."""
    plain = tf.Phi4MultimodalForCausalLM.from_pretrained(folder("phi4-multimodal"))
    mllm, rows = loaded("phi4-multimodal"), samples(("audio",))["audio"]
    together, alone = mllm.encode(rows), mllm.encode(rows[:1])
    with torch.inference_mode():
        for model, same in ((plain, False), (mllm.model, True)):
            a, b = model(**together).logits[0, -1], model(**alone).logits[0, -1]
            assert torch.allclose(a, b, atol=1e-4) == same


# ------------------------------------------------------------------ single families


@pytest.mark.slow
def test_the_full_omni_model_is_mined_in_its_thinker_and_stops(folder, loaded):
    mllm, rows = loaded("qwen2.5-omni"), samples()["text"]
    whole = tf.Qwen2_5OmniForConditionalGeneration.from_pretrained(folder("qwen2.5-omni"))
    assert whole.has_talker and not hasattr(mllm.model, "talker")
    assert mllm.model.generation_config.eos_token_id is None
    first = mllm.forward(mllm.encode(rows)).logits[0, -1].argmax().item()
    own, end = mllm.tokenizer.eos_token, mllm.tokenizer.convert_ids_to_tokens(first)
    assert len(mllm.generate(mllm.encode(rows[:1]), 8)[0]) > 1
    try:
        mllm.tokenizer.eos_token = end
        assert mllm.generate(mllm.encode(rows[:1]), 8) == [mllm.tokenizer.decode(first).strip()]
    finally:
        mllm.tokenizer.eos_token = own


def test_frames_are_not_sampled_twice(loaded):
    mllm, row = loaded("qwen3-vl"), samples(("video",))["video"][0]
    assert mllm.processor.video_processor.do_sample_frames
    video = np.repeat(row.video, 8, 0)  # 32 frames, of which 2 a second would leave few
    many = type(row)(**{**vars(row), "video": video})
    grid = mllm.encode([many])["video_grid_thw"]
    assert grid[0, 0] == 16  # pairs of frames


def lasting(seconds):
    row = samples(("audio",))["audio"][0]
    return type(row)(**{**vars(row), "audio": np.zeros(int(16000 * seconds), np.float32)})


def test_clips_that_the_encoder_would_cut_are_refused(loaded):
    with pytest.raises(ValueError, match="2.50 s exceeds the encoder's window of 2 s"):
        loaded("qwen2-audio").encode([lasting(2.5)])
    with pytest.raises(ValueError, match=r"0.050 s; needs >= 0.1 s"):
        loaded("qwen2-audio").encode([lasting(0.05)])


def test_voxtral_takes_clips_of_any_length(loaded):
    mllm = loaded("voxtral")
    sets = ml.separate(mllm, mllm.encode([lasting(31)]))
    assert sets["audio"].sum() == 2 * 375  # two windows of 30 s


def test_frames_among_image_tokens_are_told_from_pictures(loaded):
    """And a clip's times reach SmolVLM's prompt; a row with both is refused."""
    for name in ("smolvlm", "internvl"):
        mllm, rows = loaded(name), samples(("image", "video"))
        sets = ml.separate(mllm, mllm.encode([rows["image"][0], rows["video"][0]]))
        assert sets["image"].any(1).tolist() == [True, False]
        assert sets["video"].any(1).tolist() == [False, True]
        both = {**vars(rows["video"][0]), "image": rows["image"][0].image}
        with pytest.raises(ValueError, match="row 0: video: .* takes frames for pictures"):
            mllm.encode([type(rows["video"][0])(**both)])
    clip = {**vars(rows["video"][0]), "times": np.array([0.0, 2.0, 4.0, 6.0])}
    mllm = loaded("smolvlm")
    (ids,) = mllm.encode([type(rows["video"][0])(**clip)])["input_ids"]
    assert "Frame from 00:04:" in mllm.tokenizer.decode(ids)


def test_pictures_in_tiles_have_no_places(loaded):
    row = samples(("image",))["image"][0]
    for name in ("smolvlm", "internvl", "llava-onevision"):
        grid = atlas.tokens(loaded(name), row)["grid"]
        assert grid[:2] == [1, 1] and grid[2] > 1, name
    assert atlas.tokens(loaded("gemma3"), row)["grid"] == [1, 2, 2]


@pytest.mark.fault("one tile counts as the whole picture")
def test_words_in_a_pictures_place_are_as_long_as_all_its_tiles(loaded):
    mllm, rows = loaded("smolvlm"), samples(("image",))["image"][:2]
    rows = [dataclasses.replace(row, references=("red and blue " * 200,)) for row in rows]
    look = {"tokens_per_kind": None, "equal": False, "seed": 0}
    found = hidden_states(mllm, rows, **look)
    words = in_words(mllm, rows, found, ["image"], **look)
    for i, row in enumerate(rows):
        length = int(separate(mllm, mllm.encode([row]))["image"].sum())
        runs = found.tokens["run"][
            (found.tokens["kind"] == "image") & (found.tokens["sample"] == i)
        ]
        placed = words.tokens["kind"][words.tokens["sample"] == i] == PLACE
        assert runs.max() < length and placed.sum() == length


def test_a_medium_behind_the_question_is_there(name, mllm):
    for kind in FAMILIES[name].media:
        row = samples((kind,))[kind][1]
        for behind in (False, True):
            told = atlas.tokens(mllm, dataclasses.replace(row, behind=behind))
            ends = (
                i for i in range(len(told["text"])) if "here?" in "".join(told["text"][: i + 1])
            )
            assert (next(ends) < told["kind"].index(kind)) == behind


def test_silencing_at_some_tokens_is_the_same_where_layers_see_the_last_ones_only(loaded):
    """Gemma 4's upper layers while it answers: what it answers is what a whole pass gives."""
    mllm = loaded("gemma4")
    rows = samples(FAMILIES["gemma4"].media)["image"]
    neurons = random_neurons(mllm, 0.5)
    for where in (["special"], ["image"]):
        with ml.deactivate(mllm, neurons, where=where):
            first = mllm.forward(mllm.encode(rows)).logits[:, -1].argmax(-1).tolist()
            new = answering._generated(mllm, mllm.encode(rows), 1)[0][:, 0].tolist()
        assert new == first


def test_layers_without_attention_say_what_cannot_be_measured():
    """Qwen3.5's linear attention; LFM2's convolutions, whose MLP hides its activation as well."""
    tokens = tokenizer(CHATML, eos_token="<|im_end|>")
    tokens.chat_template = chatml({})
    kinds = ["linear_attention", "full_attention"]
    text = TEXT | {"vocab_size": len(tokens), "layer_types": kinds}
    narrow = {f"linear_{k}_head_dim": 16 for k in ("key", "value")}
    narrow |= {f"linear_num_{k}_heads": 2 for k in ("key", "value")}
    config = tf.Qwen3_5TextConfig(**text, **narrow, head_dim=16)
    mllm = ml.model.MLLM(tf.Qwen3_5ForCausalLM(config), tokens, "qwen3.5")
    rows = Rows(samples()["text"])
    with pytest.raises(ValueError, match=r"layers \[0\] are linear_attention, without queries"):
        ml.score(mllm, rows)
    neurons = np.zeros((1, LAYERS, NEURONS), bool)
    neurons[0, 0, :9] = True
    before = ml.evaluate(mllm, rows, measure="logprob")["logprob"]
    with ml.deactivate(mllm, neurons):
        assert (ml.evaluate(mllm, rows, measure="logprob")["logprob"] != before).all()

    config = tf.Lfm2Config(**text | {"layer_types": ["conv", "full_attention"]})
    with pytest.raises(ValueError, match="looked for one gated MLP"):
        ml.model.MLLM(tf.Lfm2ForCausalLM(config), tokens, "lfm2")


# ------------------------------------------------------------------ families nobody listed


class ToyConfig(tf.LlamaConfig):
    model_type = "toy"


class ToyMLP(torch.nn.Module):
    """A gated MLP with names of its own."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w3 = torch.nn.Linear(width, inner), torch.nn.Linear(width, inner)
        self.w2, self.squash = torch.nn.Linear(inner, width), torch.nn.SiLU()

    def forward(self, x):
        return self.w2(self.squash(self.w1(x)) * self.w3(x))


class ToyForCausalLM(tf.LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        if config.own_names:
            for layer in self.model.layers:
                layer.mlp = ToyMLP(config)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    tf.AutoConfig.register("toy", ToyConfig, exist_ok=True)
    tf.AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)

    @cache
    def build(own_names):
        tokens = tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
        tokens.chat_template = chatml({})
        model = ToyForCausalLM(ToyConfig(**TEXT, vocab_size=len(tokens), own_names=own_names))
        randomise(model)
        path = tmp_path_factory.mktemp("toy")
        model.save_pretrained(path)
        tokens.save_pretrained(path)
        return path

    return build


def test_an_unknown_family_with_gated_mlps_just_works(toy):
    mllm = ml.load(toy(own_names=False))
    assert type(mllm.model) is ToyForCausalLM
    scores = ml.score(mllm, Rows(samples()["text"]))
    with ml.deactivate(mllm, ml.select(scores, ratio=0.1)):
        assert len(mllm.generate(mllm.encode(samples()["text"]), 3)) == 2


def test_a_family_with_other_names_says_what_was_sought_and_is_described_once(
    toy, tmp_path, monkeypatch
):
    with pytest.raises(ValueError) as caught:
        ml.load(toy(own_names=True))
    for words in ("ToyForCausalLM", "LlamaDecoderLayer", "down_proj", "act_fn", "mlp.squash",
                  "a subclass of minerlib.families.Family"):  # fmt: skip
        assert words in str(caught.value)

    class Toy(Adapter):
        def activation(self, layer):
            return layer.mlp.squash

        def down_projection(self, layer):
            return None

    monkeypatch.setitem(families.FAMILIES, "ToyForCausalLM", Toy)
    mllm = ml.load(toy(own_names=True))
    scores = ml.score(mllm, Rows(samples()["text"]))
    neurons = ml.select(scores, ratio=0.1)
    batch = mllm.encode(samples()["text"])
    with ml.deactivate(mllm, neurons):
        silenced = mllm.forward(batch).logits
    assert not torch.allclose(silenced, mllm.forward(batch).logits)
    with pytest.raises(ValueError, match="no down projection of one float weight .none known"):
        ml.export(mllm, neurons, tmp_path / "toy")


def test_a_model_without_decoder_layers_says_so(toy):
    model = ToyForCausalLM.from_pretrained(toy(own_names=False))
    tokens = tf.AutoTokenizer.from_pretrained(toy(own_names=False))
    model.get_decoder = lambda: torch.nn.ModuleDict({"blocks": torch.nn.ModuleList()})
    with pytest.raises(ValueError, match=r"get_decoder\(\).layers; found ModuleDict.*'blocks'"):
        ml.MLLM(model, tokens, "toy")
    del model.get_decoder
    assert ml.MLLM(model, tokens, "toy").n_neurons == NEURONS


@pytest.mark.fault("layers of different widths")
def test_layers_of_different_widths_are_named(folder):
    model = tf.LlamaForCausalLM.from_pretrained(folder("llama"))
    tokens = tf.AutoTokenizer.from_pretrained(folder("llama"))
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(NEURONS - 8, TEXT["hidden_size"])
    with pytest.raises(ValueError, match=rf"of {NEURONS} in layer 0, layers {{1: {NEURONS - 8}}}"):
        ml.MLLM(model, tokens, "trimmed")


def test_a_width_that_nothing_says_is_named(folder, monkeypatch):
    class GPT2(Adapter):
        def layers(self):
            return self.model.transformer.h

        def activation(self, layer):
            return layer.mlp.act

        def down_projection(self, layer):
            return layer.mlp.c_proj  # a Conv1D

    monkeypatch.setitem(families.FAMILIES, "GPT2LMHeadModel", GPT2)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2))
    tokens = tf.AutoTokenizer.from_pretrained(folder("llama"))
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have is not known: .*in_features"):
        ml.MLLM(model, tokens, "gpt2")


@pytest.mark.fault("a config that says another width than the weights")
def test_the_weights_say_how_many_neurons_there_are(folder):
    model = tf.LlamaForCausalLM.from_pretrained(folder("llama"))
    model.config.intermediate_size = 999
    tokens = tf.AutoTokenizer.from_pretrained(folder("llama"))
    assert ml.MLLM(model, tokens, "odd").n_neurons == NEURONS


@pytest.mark.fault("experts")
def test_experts_are_named_at_load(folder):
    config = tf.MixtralConfig(**TEXT, vocab_size=300, num_local_experts=2)
    tokens = tf.AutoTokenizer.from_pretrained(folder("llama"))
    with pytest.raises(ValueError, match="one gated MLP.*fused experts in MixtralDecoderLayer"):
        ml.MLLM(tf.MixtralForCausalLM(config), tokens, "moe")


@pytest.mark.fault("bounds that a processor ignores")
@pytest.mark.parametrize("family", ["llava-onevision", "gemma3"])
def test_pixel_bounds_that_would_be_ignored_are_refused(family, folder):
    with pytest.raises(ValueError, match="max_pixels=1024 would be ignored"):
        ml.load(folder(family), processor_kwargs={"max_pixels": 1024})
    ml.load(folder("qwen2-audio"), processor_kwargs={"max_pixels": 1024})  # has no pictures


@pytest.mark.fault("bounds that a processor ignores")
@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-omni-thinker"])
def test_a_clip_obeys_the_bounds_that_were_given(family, folder):
    """Qwen2.5-Omni's processor scales clips to 100,352 pixels at least, whatever it was told."""
    clip, bounds = samples(("video",))["video"][:1], {"min_pixels": 784, "max_pixels": 3136}
    mllm = ml.load(folder(family), processor_kwargs=bounds)
    (grid,) = mllm.encode(clip)["video_grid_thw"].tolist()
    patch = mllm.processor.video_processor.patch_size
    assert 784 <= grid[1] * grid[2] * patch**2 <= 3136


@pytest.mark.fault("frames without their times")
@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "qwen2.5-omni-thinker"])
def test_frames_carry_their_times(family, loaded):
    """Two clips of one batch at 2 and 0.5 frames a second: seconds are what each was taken at."""
    mllm = loaded(family)
    rows = [
        dataclasses.replace(row, times=np.arange(4) / rate)
        for row, rate in zip(samples(("video",))["video"], (2.0, 0.5), strict=True)
    ]
    batch = mllm.encode(rows)
    if family == "qwen3-vl":  # writes seconds into the prompt, the mean of each two frames
        texts = mllm.tokenizer.batch_decode(batch["input_ids"])
        assert all(t in texts[0] for t in ("<0.2 seconds>", "<1.2 seconds>"))
        assert all(t in texts[1] for t in ("<1.0 seconds>", "<5.0 seconds>"))
    else:
        name = {"qwen2.5-vl": "second_per_grid_ts"}.get(family, "video_second_per_grid")
        seconds = torch.as_tensor(batch[name]).flatten().tolist()
        assert seconds == pytest.approx([1.0, 4.0])  # two frames make one place in time
    slow = mllm.encode(rows[1:])
    with torch.inference_mode():
        fast = mllm.encode([dataclasses.replace(rows[1], times=np.arange(4) / 8.0)])
        changed = not torch.allclose(mllm.forward(slow).logits, mllm.forward(fast).logits)
    assert changed


@pytest.mark.fault("sound at another rate than the model hears")
def test_sound_at_another_rate_is_refused(loaded):
    row = dataclasses.replace(samples(("audio",))["audio"][0], sampling_rate=8000)
    with pytest.raises(ml.model.RowError, match="sampled at 8000 Hz, but .* hears 16000 Hz"):
        loaded("qwen2-audio").encode([row])


@pytest.mark.fault("a processor's error without the row")
def test_an_error_of_the_processor_names_its_row(loaded, monkeypatch):
    """One row's fault is that row's; what only a batch cannot take asks for batch_size=1."""
    mllm, rows = loaded("qwen2-vl"), samples(("image",))["image"]
    own = type(mllm.processor).__call__

    def fails(self, *args, text, **kwargs):
        if any("heard" in t for t in text):
            raise TypeError("cannot read this")
        return own(self, *args, text=text, **kwargs)

    monkeypatch.setattr(type(mllm.processor), "__call__", fails)
    with pytest.raises(ml.model.RowError, match="rows row 1: prompt: TypeError: cannot read this"):
        mllm.encode(rows)
    kept, _, batch, skipped = mllm.gather(rows, [0, 1], "skip")
    assert kept == [0] and len(batch["input_ids"]) == 1
    assert skipped == ["rows row 1: prompt: TypeError: cannot read this"]
    assert mllm.gather(rows, [1], "skip") == ([], [], None, skipped)

    def alone(self, *args, text, **kwargs):
        if len(text) > 1:
            raise RuntimeError("shapes differ")
        return own(self, *args, text=text, **kwargs)

    monkeypatch.setattr(type(mllm.processor), "__call__", alone)
    message = r"takes each of these 2 samples, but not in one batch \(RuntimeError: shapes differ\)"
    with pytest.raises(ValueError, match=message):
        mllm.encode(rows)


@pytest.mark.fault("a fingerprint that leaves something out")
def test_all_that_makes_the_numbers_is_in_the_fingerprint(folder, loaded, tmp_path):
    plain = loaded("qwen2-vl").fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(folder("qwen2-vl"), copy)
    same = ml.load(copy).fingerprint
    assert same == plain
    others = {
        "dtype": ml.load(copy, dtype="bfloat16"),
        "attention": ml.load(copy, attn_implementation="eager"),
        "max_pixels": ml.load(copy, processor_kwargs={"max_pixels": 1024}),
    }
    for name, mllm in others.items():
        changed = {k for k in plain | mllm.fingerprint if plain.get(k) != mllm.fingerprint.get(k)}
        assert changed == {name}
    mllm = ml.load(copy)
    mllm.processor.chat_template += " "
    assert mllm.fingerprint["template"] != plain["template"]
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + "!")
    (copy / "README.md").write_text("a card changes nothing")
    (copy / "pytorch_model.bin").write_bytes(b"weights")
    edited = ml.load(copy).fingerprint
    assert edited["chat_template.jinja"] != plain["chat_template.jinja"]
    assert "pytorch_model.bin" in edited and "README.md" not in edited


@pytest.mark.fault("models made in memory share a key")
def test_a_model_made_in_memory_is_known_by_its_weights(folder):
    tokens = tf.AutoTokenizer.from_pretrained(folder("llama"))

    def made(scale=1.0):
        model = tf.LlamaForCausalLM.from_pretrained(folder("llama"))
        model.config._commit_hash = None
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] *= scale
        return ml.MLLM(model, tokens, "in memory").fingerprint

    assert made() == made() != made(1.5)


def test_a_plugins_adapter_is_known_by_its_source():
    class One(Adapter):
        def chat(self, sample):
            return sample.prompt

    assert families.FAMILIES["Qwen2VLForConditionalGeneration"].identity() == "QwenVL 1"
    assert len(One.identity()) >= 16 and "One" not in One.identity()


@pytest.mark.fault("edited plug-in returns old numbers")
def test_all_of_a_plugins_adapter_counts():
    """What it is set to, what it is made of, properties and static methods."""

    def made(base=Adapter, **body):
        return type("One", (base,), body).identity()

    class Other(Adapter):
        version = 2

        def chat(self, sample):
            return ""

    bodies = {
        "padding": {"padding": {"padding_side": "left"}},
        "property": {"chat": property(lambda self: 1)},
        "static": {"part": staticmethod(lambda model: model)},
    }
    found = [made(), made(Other), *(made(**body) for body in bodies.values())]
    assert len(set(found)) == 5 and made() == found[0]


def test_layers_that_share_an_activation_are_refused(toy):
    model = ToyForCausalLM.from_pretrained(toy(own_names=False))
    tokens = tf.AutoTokenizer.from_pretrained(toy(own_names=False))
    shared = torch.nn.SiLU()
    for layer in model.model.layers:
        layer.mlp.act_fn = shared
    with pytest.raises(ValueError, match=r"layers \[1\] share their activation modules"):
        ml.MLLM(model, tokens, "toy")


def test_experts_are_no_gated_mlp():
    config = tf.Qwen3MoeConfig(
        **TEXT, head_dim=16, vocab_size=300, num_experts=2, moe_intermediate_size=8
    )
    with pytest.raises(ValueError, match="found 1 MLPs or fused experts in"):
        ml.MLLM(tf.Qwen3MoeForCausalLM(config), tokenizer([]), "experts")


# ------------------------------------------------------------------ load


def test_arguments_reach_transformers(folder, monkeypatch):
    path, calls = folder("qwen2-vl"), {}

    def spy(cls):
        own = cls.from_pretrained.__func__

        def called(klass, *args, **kwargs):
            calls[cls.__name__] = kwargs
            kwargs = {k: v for k, v in kwargs.items() if k != "quantization_config"}
            return own(klass, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(called))

    for cls in (tf.AutoConfig, tf.AutoProcessor, tf.Qwen2VLForConditionalGeneration):
        spy(cls)
    quantised = tf.BitsAndBytesConfig(load_in_8bit=True)
    mllm = ml.load(
        str(path),
        dtype="bfloat16",
        revision="v1",
        device_map={"": "cpu"},
        attn_implementation="eager",
        quantization_config=quantised,
        processor_kwargs={"min_pixels": 256, "max_pixels": 512},
    )
    asked = calls["Qwen2VLForConditionalGeneration"]
    assert asked["dtype"] == "bfloat16" and asked["device_map"] == {"": "cpu"}
    assert asked["attn_implementation"] == "eager" and asked["quantization_config"] is quantised
    assert {c["revision"] for c in calls.values()} == {"v1"}
    assert calls["AutoProcessor"]["max_pixels"] == 512
    assert mllm.model.dtype == torch.bfloat16
    assert mllm.text_config._attn_implementation == "eager"


def test_pixels_are_bounded(folder):
    rows = samples(("image",))["image"]
    few, many = (
        ml.load(folder("qwen2-vl"), processor_kwargs={"min_pixels": n, "max_pixels": n * 2})
        for n in (16 * 16, 48 * 48)
    )
    count = [ml.separate(m, m.encode(rows))["image"].sum(1) for m in (few, many)]
    assert (count[0] <= 8).all() and (count[1] >= 30).all()


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="no model folder 'data/models/none'"):
        ml.load("data/models/none")


def test_the_fingerprint_names_the_files(folder, loaded):
    digests = loaded("llama").fingerprint
    assert set(digests) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert digests == ml.load(folder("llama")).fingerprint != loaded("qwen2").fingerprint
