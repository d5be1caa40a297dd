"""The text sides of Qwen2-VL-7B and Qwen2-Audio-7B at their real size, through the four stages.

Real hidden size, heads, grouped key-value heads, neurons, vocabulary and special token ids, in
bfloat16; two decoder layers, small towers and random weights. What small shapes hide shows here:
memory, grouped heads, half precision.
"""

from __future__ import annotations

import resource
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from families import CHATML, MEL, QWEN_VISION, Rows, chatml, qwen_vision, samples, whisper
from tokenizers import pre_tokenizers

import minerlib as ml
from minerlib.scoring import attention

pytestmark = pytest.mark.slow
LAYERS = 2
AUDIO = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


def qwen_tokenizer(special: dict[str, int]) -> tf.Qwen2Tokenizer:
    """A byte-level tokenizer whose special tokens have the real ids, from 151643 on."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"piece {i}" for i in range(len(pieces), 151643)]
    names = {number: token for token, number in special.items()}
    pieces += [names.get(i, f"<|extra_{i}|>") for i in range(151643, max(names) + 1)]
    return tf.Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        eos_token="<|im_end|>",
        extra_special_tokens=list(special),
    )


def qwen2_vl():
    numbers = [*range(151643, 151646), 151652, 151653, 151655, 151656]
    special = dict(zip([*CHATML, *QWEN_VISION], numbers, strict=True))
    config = tf.Qwen2VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
            },
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 3584}
        | {"patch_size": 4, "mlp_ratio": 1},
    )  # fmt: skip
    processor = tf.Qwen2VLProcessor(
        tokenizer=qwen_tokenizer(special),
        chat_template=chatml({"image": "<|vision_start|><|image_pad|><|vision_end|>"}),
        **qwen_vision(),
    )
    return tf.Qwen2VLForConditionalGeneration, config, processor, special, "image"


def qwen2_audio():
    special = dict(zip([*CHATML, *AUDIO], range(151643, 151649), strict=True))
    config = tf.Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": 156032,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        audio_config={"num_mel_bins": MEL, "d_model": 32, "encoder_layers": 1}
        | {"encoder_attention_heads": 2, "encoder_ffn_dim": 40, "max_source_positions": 100},
        audio_token_index=special["<|AUDIO|>"],
    )
    processor = tf.Qwen2AudioProcessor(
        feature_extractor=whisper(2),
        tokenizer=qwen_tokenizer(special),
        chat_template=chatml({"audio": "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"}),
    )
    return tf.Qwen2AudioForConditionalGeneration, config, processor, special, "audio"


def build(make) -> tuple[ml.MLLM, dict[str, int], str]:
    """The model in bfloat16 without an initialisation: one random block fills every matrix."""
    cls, config, processor, special, medium = make()
    with torch.device("meta"):
        model = cls(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    block = torch.rand(2**20 - 3, generator=torch.Generator().manual_seed(0)).sub_(0.5)
    block = block.to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            flat = weight.view(-1)
            if weight.dim() == 1:
                flat.fill_(1.0)
                continue
            width = weight[0].numel()
            scaled = block * (12 / width) ** 0.5  # variance 1 / width
            for i in range(0, len(flat), len(scaled)):
                part = flat[i : i + len(scaled)]
                part.copy_(scaled[: len(part)])
    for buffer in model.buffers():  # `to_empty` left them unset
        buffer.zero_()
    for module in model.modules():
        if hasattr(module, "compute_default_rope_parameters") and hasattr(module, "inv_freq"):
            module.inv_freq = module.compute_default_rope_parameters(module.config)[0]
    return ml.MLLM(model, processor, cls.__name__), special, medium


@pytest.mark.parametrize("make", [qwen2_vl, qwen2_audio])
def test_four_stages_at_real_shape(make):
    mllm, special, medium = build(make)
    config = mllm.text_config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert mllm.model.dtype == torch.bfloat16
    assert mllm.n_neurons == config.intermediate_size
    placeholders = {"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|AUDIO|>"}
    for kind in mllm.kinds[2:]:
        assert mllm.token_ids[kind] == [special.pop(placeholders[kind])]
    assert mllm.token_ids["special"] == sorted(special.values())

    rows = sum(samples((medium,)).values(), [])
    batch, seen = mllm.encode(rows), {}
    with torch.inference_mode(), mllm.tap(attention=lambda i, *args: seen.update({i: args})):
        logits = mllm.forward(batch).logits
    assert torch.isfinite(logits).all() and logits.shape[-1] == config.vocab_size

    # Grouped heads: the averaged attention is that of the repeated keys, in float32.
    query, key, _, scaling = seen[0]
    real = batch["attention_mask"].bool()
    assert query.shape[1] == heads and key.shape[1] == kv_heads and query.dtype == torch.bfloat16
    keys = key[0].float().repeat_interleave(heads // kv_heads, 0)
    plain = (query[0].float() @ keys.transpose(-1, -2) * scaling).masked_fill(
        ~real[0], float("-inf")
    )
    torch.testing.assert_close(attention(query, key, real)[0], plain.softmax(-1).mean(0))

    bench = Rows(rows)
    one, many = (ml.score(mllm, bench, batch_size=n) for n in (1, len(rows)))
    assert np.abs(one - many).mean() < 1e-2  # bfloat16 depends on the batch's shape
    total = ml.aggregate([one, many])
    assert total.shape == (5, 7, LAYERS, config.intermediate_size)
    assert np.isfinite(total).all() and total.min() >= 0 and total.max() <= 1
    neurons = ml.select(total)
    budget = int(0.02 * LAYERS * config.intermediate_size)
    assert 0 < neurons.any("modality").sum() <= budget
    with ml.deactivate(mllm, neurons), torch.inference_mode():
        assert not torch.equal(mllm.forward(batch).logits, logits)
        assert len(mllm.generate(batch, 2)) == len(rows)
    with torch.inference_mode():
        assert torch.equal(mllm.forward(batch).logits, logits)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak < 10 * 2 ** (30 if sys.platform == "darwin" else 20)
