"""Stage 1: the token sets of encoded prompts."""

from __future__ import annotations

import torch
from conftest import Rows, shared_mllm

from minerlib.separation import BASE_SETS, SETS, SPLITS, separate, so_far, stack
from minerlib.tasks import Sample


def test_order(mllm, samples):
    batch = mllm.encode(samples)
    sets = separate(mllm, batch)
    assert tuple(sets) == SETS
    assert SETS == ("text", "special", "special_text", "image", "video", "audio", "prompt")
    masks = stack(sets)
    assert masks.dtype == torch.bool and masks.shape == (
        len(samples),
        7,
        batch["input_ids"].shape[1],
    )
    for i, name in enumerate(SETS):
        assert torch.equal(masks[:, i], sets[name])


def test_base_sets_partition_each_prompt(mllm, samples):
    batch = mllm.encode(samples)
    sets = separate(mllm, batch)
    members = torch.stack([sets[name] for name in BASE_SETS]).sum(0)
    assert torch.equal(members, batch["attention_mask"])  # one set each, and none for padding


def test_unions(mllm, samples):
    sets = separate(mllm, mllm.encode(samples))
    assert torch.equal(sets["special_text"], sets["special"] | sets["text"])
    assert torch.equal(sets["prompt"], torch.stack([sets[name] for name in BASE_SETS]).any(0))


def test_every_split_covers_the_prompt(mllm, samples):
    sets = separate(mllm, mllm.encode(samples))
    for parts in SPLITS.values():
        assert torch.equal(torch.stack([sets[name] for name in parts]).sum(0), sets["prompt"].int())


def test_media_occur_only_where_they_are(mllm, samples):
    sets = separate(mllm, mllm.encode(samples))
    for row, sample in enumerate(samples):
        for kind in ("image", "video", "audio"):
            assert bool(sets[kind][row].any()) == (getattr(sample, kind) is not None)


def test_special_tokens_are_the_delimiters(mllm, samples):
    """By their spelling: <|...|> but for the placeholders; everything else is text."""
    batch = mllm.encode(samples)
    sets = separate(mllm, batch)
    seen = set()
    for row in range(len(samples)):
        tokens = mllm.tokenizer.convert_ids_to_tokens(batch["input_ids"][row].tolist())
        for i, token in enumerate(tokens):
            if not batch["attention_mask"][row, i]:
                continue
            placeholder = token in ("<|image_pad|>", "<|video_pad|>", "<|AUDIO|>")
            delimiter = token.startswith("<|") and token.endswith("|>") and not placeholder
            assert bool(sets["special"][row, i]) == delimiter, token
            assert bool(sets["text"][row, i]) == (not delimiter and not placeholder), token
            if delimiter:
                seen.add(token)
    bounds = {"<|vision_start|>", "<|vision_end|>"} if "image" in mllm.kinds else set()
    bounds |= {"<|audio_bos|>", "<|audio_eos|>"} if "audio" in mllm.kinds else set()
    assert seen == {"<|im_start|>", "<|im_end|>"} | bounds


def test_padding_with_a_special_token_is_not_special(mllm, samples):
    batch = mllm.encode(samples)
    padding = ~batch["attention_mask"].bool()
    assert padding.any() and mllm.tokenizer.pad_token_id in mllm.token_ids["special"]
    assert not stack(separate(mllm, batch)).transpose(1, 2)[padding].any()


def test_sets_do_not_depend_on_the_batch(mllm, samples):
    batch = mllm.encode(samples)
    real = batch["attention_mask"].bool()
    together = stack(separate(mllm, batch))
    for row, sample in enumerate(Rows(samples)):
        alone = stack(separate(mllm, mllm.encode([sample])))[0]
        assert torch.equal(together[row][:, real[row]], alone)


def test_ids_come_from_the_model(monkeypatch):
    """Another model's ids are other numbers: what the config calls an image is an image."""
    mllm = shared_mllm("tiny-qwen2-vl")
    assert mllm.token_ids["image"] == [mllm.model.config.image_token_id]
    assert mllm.token_ids["video"] == [mllm.model.config.video_token_id]
    assert mllm.token_ids["audio"] == []
    batch = mllm.encode([Sample("What?", ())])
    word = batch["input_ids"][0, 5].item()
    monkeypatch.setitem(mllm.token_ids, "video", [word])
    assert separate(mllm, batch)["video"][0].any()
    assert shared_mllm("tiny-qwen2-audio").token_ids["audio"] == [
        shared_mllm("tiny-qwen2-audio").model.config.audio_token_id
    ]


def test_what_a_forward_pass_is_given(mllm, samples):
    """The tokens so far, with and without a mask, from the prompt on."""
    batch = mllm.encode(samples)
    ids, mask = so_far(batch)
    assert torch.equal(ids, batch["input_ids"]) and torch.equal(mask, batch["attention_mask"])
    alone, seen = mllm.encode(samples[:1]), []
    look = mllm.model.register_forward_pre_hook(
        lambda module, args, given: seen.append([x.shape[1] for x in so_far(given)]),
        with_kwargs=True,
    )
    try:
        mllm.model.generate(**alone, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    finally:
        look.remove()
    n = alone["input_ids"].shape[1]
    assert seen == [[n, n], [1, n + 1], [1, n + 2]]
    assert so_far({"input_ids": ids})[1].all()
