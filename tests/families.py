"""Small random models of every family, with their real processor classes, built offline.

`FAMILIES[name].build(folder)` writes a checkpoint as its maker's repository holds it: config,
random weights, tokenizer with the family's real special tokens over a byte alphabet, chat template,
image, video and audio processors. Two decoder layers with grouped key-value heads; the towers have
one or two. Weights are N(0, 1/width), so that attention is not nearly uniform.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import pre_tokenizers

from minerlib.tasks import Sample

HIDDEN, HEADS, KV_HEADS, LAYERS, NEURONS = 64, 4, 2, 2, 48
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
}
PATCH = 4  # pixels; a token is 2 x 2 patches
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MEL = 16


@dataclass(frozen=True)
class Family:
    """The model class that is mined, its processor's class, its media, and how to build it."""

    model: str
    processor: str
    media: tuple[str, ...]
    build: Callable[[Path], None]
    needs: str | None = None
    layers: int = LAYERS
    exact: str = "float64"  # or what its towers take


# ------------------------------------------------------------------ rows


def samples(media: tuple[str, ...] = (), seed: int = 0) -> dict[str, list[Sample]]:
    """Two rows of text and two of each medium, of different lengths, sizes and durations."""
    rng = np.random.default_rng(seed)

    def picture(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    def frames(width: int, height: int) -> np.ndarray:
        return rng.integers(0, 256, (4, height, width, 3), dtype=np.uint8)

    def clip(seconds: float) -> np.ndarray:
        return rng.normal(0, 0.1, int(16000 * seconds)).astype(np.float32)

    made = {
        "image": [{"image": picture(40, 24)}, {"image": picture(32, 60)}],
        "video": [{"video": frames(32, 24)}, {"video": frames(24, 40)}],
        "audio": [{"audio": clip(0.5)}, {"audio": clip(1.3)}],
    }
    prompts = ("Which?", "What is to be seen or heard here?")
    return {
        kind: [
            Sample(p, ("a", "b"), benchmark="rows", row=i, **m)
            for i, (p, m) in enumerate(zip(prompts, made.get(kind, [{}, {}]), strict=True))
        ]
        for kind in ("text", *media)
    }


class Rows(list):
    """Samples with what `score` and `evaluate` ask of a benchmark."""

    name, metric, max_new_tokens, whole = "rows", "exact_match", 4, ()

    def __init__(self, rows, choices: tuple[str, ...] | None = None):
        super().__init__(rows)
        self.spec = SimpleNamespace(choices=choices, options=None)
        self.fingerprint = f"{len(self)} {choices}"

    @property
    def media(self) -> list[str]:
        return [str(i) for i in range(len(self))]

    def __getitem__(self, which):
        found = super().__getitem__(which)
        return Rows(found, self.spec.choices) if isinstance(which, slice) else found


# ------------------------------------------------------------------ tokenizers and templates


def tokenizer(special: list[str], cls=tf.Qwen2Tokenizer, **named) -> tf.PreTrainedTokenizerBase:
    """A byte-level tokenizer without merges: every byte is a token, and so is each special one."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return cls(vocab=vocab, merges=[], extra_special_tokens=special, **named)


def gemma_tokenizer(**more: str) -> tf.PreTrainedTokenizerBase:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    return tf.GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        add_bos_token=True,  # which the template writes too
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        model_specific_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            **more,
        },
    )


def template(placeholders: dict[str, str], start: str, end: str, system: str = "", bos="") -> str:
    """A chat template: turns between `start` and `end`, media as placeholders before the text."""
    parts = "".join(
        f"{{% {word} part.type == '{kind}' %}}{{{{ '{text}' }}}}"
        for word, (kind, text) in zip(["if", "elif", "elif"], placeholders.items(), strict=False)
    )
    parts += "{% elif part.type == 'text' %}" if parts else "{% if part.type == 'text' %}"
    return (
        bos + system + "{% for message in messages %}" + start.replace("ROLE", "{{ message.role }}")
        + "{% if message.content is string %}{{ message.content }}{% else %}"
        + "{% for part in message.content %}" + parts + "{{ part.text }}{% endif %}{% endfor %}"
        + "{% endif %}" + end + "{% endfor %}"
        + "{% if add_generation_prompt %}" + start.replace("ROLE", "assistant") + "{% endif %}"
    )  # fmt: skip


def chatml(placeholders: dict[str, str]) -> str:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return template(placeholders, "<|im_start|>ROLE\n", "<|im_end|>\n", system)


# ------------------------------------------------------------------ processors


def qwen_vision(video_cls=tf.Qwen2VLVideoProcessor, patch: int = PATCH) -> dict:
    token = (2 * patch) ** 2  # pixels
    kwargs = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 4 * token, "longest_edge": 64 * token}
    video = kwargs | {"size": {"shortest_edge": 8 * token, "longest_edge": 1024 * token}}
    kwargs["size"] = size
    return {
        "image_processor": tf.Qwen2VLImageProcessor(**kwargs),
        "video_processor": video_cls(**video),
    }


def whisper(seconds: int) -> tf.WhisperFeatureExtractor:
    return tf.WhisperFeatureExtractor(feature_size=MEL, chunk_length=seconds)


# ------------------------------------------------------------------ saving


def save(folder: Path, cls: str, config, processor, **special) -> None:
    """Random weights N(0, 1/width) and the processor, as one checkpoint folder."""
    model = getattr(tf, cls)(config)
    randomise(model)
    tokens = getattr(processor, "tokenizer", processor)
    model.generation_config = tf.GenerationConfig(
        eos_token_id=special.get("eos", tokens.eos_token_id),
        pad_token_id=tokens.pad_token_id,
        repetition_penalty=1.3,  # a checkpoint's own settings must not leak into answers
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
            elif name.endswith("bias"):
                weight.copy_(0.1 * noise)
            else:  # norms, as far from 1 as trained ones are
                weight.add_(0.1 * noise)


def ids(tokens, **names: str) -> dict[str, int]:
    return {key: tokens.convert_tokens_to_ids(token) for key, token in names.items()}


# ------------------------------------------------------------------ Qwen vision-language models

QWEN_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def qwen_vl(family: str, rope: dict, vision: dict, video_cls=tf.Qwen2VLVideoProcessor):
    def build(folder: Path) -> None:
        tokens = tokenizer([*CHATML, *QWEN_VISION], eos_token="<|im_end|>")
        around = "<|vision_start|>%s<|vision_end|>"
        processor = getattr(tf, PROCESSORS[family])(
            tokenizer=tokens,
            chat_template=chatml(
                {"image": around % "<|image_pad|>", "video": around % "<|video_pad|>"}
            ),
            **qwen_vision(video_cls),
        )
        cls = f"{family}ForConditionalGeneration"
        config = getattr(tf, cls).config_class(
            text_config=TEXT | {"vocab_size": len(tokens)} | rope | {"pad_token_id": None},
            vision_config={"patch_size": PATCH, "spatial_merge_size": 2} | vision,
            **ids(
                tokens,
                image_token_id="<|image_pad|>",
                video_token_id="<|video_pad|>",
                vision_start_token_id="<|vision_start|>",
                vision_end_token_id="<|vision_end|>",
            ),
        )
        save(folder, cls, config, processor)

    return build


PROCESSORS = {
    "Qwen2VL": "Qwen2VLProcessor",
    "Qwen2_5_VL": "Qwen2_5_VLProcessor",
    "Qwen3VL": "Qwen3VLProcessor",
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
TOWER = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 40}
TOWER_2_5 = TOWER | {"out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]}

# ------------------------------------------------------------------ audio and omni models


def qwen_audio(folder: Path) -> None:
    audio = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokens = tokenizer([*CHATML, *audio], eos_token="<|im_end|>")
    processor = tf.Qwen2AudioProcessor(
        feature_extractor=whisper(2),
        tokenizer=tokens,
        chat_template=chatml({"audio": "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"}),
    )
    config = tf.Qwen2AudioConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokens)},
        audio_config=AUDIO_TOWER | {"max_source_positions": 100},
        audio_token_index=tokens.convert_tokens_to_ids("<|AUDIO|>"),
    )
    save(folder, "Qwen2AudioForConditionalGeneration", config, processor)


AUDIO_TOWER = {
    "num_mel_bins": MEL,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
}
OMNI = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def qwen_omni(whole: bool):
    def build(folder: Path) -> None:
        tokens = tokenizer(CHATML, eos_token="<|im_end|>", model_specific_special_tokens=OMNI)
        around = {k: "<|vision_bos|>%s<|vision_eos|>" for k in ("image", "video")}
        around["audio"] = "<|audio_bos|>%s<|audio_eos|>"
        processor = tf.Qwen2_5OmniProcessor(
            feature_extractor=whisper(4),
            tokenizer=tokens,
            chat_template=chatml({k: v % OMNI[f"{k}_token"] for k, v in around.items()}),
            # The processor itself asks for 128 x 28 x 28 pixels of a video.
            **qwen_vision(patch=14),
        )
        text = TEXT | {"vocab_size": len(tokens)} | MROPE
        thinker = {
            "text_config": text,
            "vision_config": TOWER_2_5
            | {"patch_size": 14, "spatial_merge_size": 2, "window_size": 56},
            "audio_config": AUDIO_TOWER | {"output_dim": HIDDEN, "n_window": 20},
            **ids(
                tokens,
                image_token_index="<|IMAGE|>",
                video_token_index="<|VIDEO|>",
                audio_token_index="<|AUDIO|>",
                audio_start_token_id="<|audio_bos|>",
                audio_end_token_id="<|audio_eos|>",
                vision_start_token_id="<|vision_bos|>",
                vision_end_token_id="<|vision_eos|>",
            ),
        }
        if not whole:
            config = tf.Qwen2_5OmniThinkerConfig(**thinker)
            save(folder, "Qwen2_5OmniThinkerForConditionalGeneration", config, processor)
            return
        config = tf.Qwen2_5OmniConfig(
            thinker_config=thinker,
            # A talker with other layers, to be left alone.
            talker_config=text | {"embedding_size": HIDDEN, "head_dim": 16, "num_hidden_layers": 3},
            token2wav_config={
                "dit_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
                | {"head_dim": 16, "enc_channels": [8, 8, 8, 8, 24], "enc_emb_dim": 8, "enc_dim": 8}
                | {"emb_dim": 16, "enc_attention_channels": 8, "enc_se_channels": 8},
                "bigvgan_config": {"upsample_initial_channel": 64},
            },
        )
        save(folder, "Qwen2_5OmniForConditionalGeneration", config, processor)
        torch.save({}, folder / "spk_dict.pt")

    return build


def voxtral(folder: Path) -> None:
    """Voxtral's tokenizer is mistral-common's Tekken: control tokens first, then bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    named = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS]"
    named += " [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE]"
    named += " [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
    named = dict(enumerate(named.split())) | {24: "[AUDIO]", 25: "[BEGIN_AUDIO]"}
    named[34] = "[TRANSCRIBE]"
    special = [
        {"rank": i, "token_str": named.get(i, f"<SPECIAL_{i}>"), "is_control": True}
        for i in range(40)
    ]
    tekken = {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 296,
            "default_num_special_tokens": 40,
            "version": "v7",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
            for i in range(256)
        ],
        "special_tokens": special,
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": MEL, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 30.0,
        },
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    tokens = tf.MistralCommonBackend(folder / "tekken.json")
    processor = tf.VoxtralProcessor(whisper(30), tokens)
    config = tf.VoxtralConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": 296, "head_dim": 16},
        audio_config={
            "model_type": "voxtral_encoder",
            "num_mel_bins": MEL,
            "hidden_size": 16,
            "intermediate_size": 64,  # four frames are one token
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        audio_token_id=24,
    )
    save(folder, "VoxtralForConditionalGeneration", config, processor)


# ------------------------------------------------------------------ other vision-language models

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


def llava(folder: Path) -> None:
    tokens = tokenizer([*CHATML, "<image>", "<video>"], eos_token="<|im_end|>")
    size = {"height": 28, "width": 28}
    pins = [[28 * i, 28 * j] for i in (1, 2) for j in (1, 2)]
    processor = tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins),
        video_processor=tf.LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokens,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml({"image": "<image>\n", "video": "<video>\n"}),
    )
    config = tf.LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokens)},
        vision_config=SIGLIP | {"vision_use_head": False},
        image_grid_pinpoints=pins,
        **ids(tokens, image_token_index="<image>", video_token_index="<video>"),
    )
    save(folder, "LlavaOnevisionForConditionalGeneration", config, processor)


def gemma(folder: Path) -> None:
    tokens = gemma_tokenizer()
    processor = tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokens,
        image_seq_length=4,
        chat_template=template(
            {"image": "<start_of_image>"},
            "<start_of_turn>ROLE\n", "<end_of_turn>\n", bos="{{ bos_token }}",
        ),
    )  # fmt: skip
    config = tf.Gemma3Config(
        text_config=TEXT
        | {
            "vocab_size": len(tokens),
            "head_dim": 16,
            "query_pre_attn_scalar": 24,  # not the head's size, as in the 27B model
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"]
            * (TEXT["num_hidden_layers"] // 2),
        },
        vision_config=SIGLIP | {"vision_use_head": False},
        mm_tokens_per_image=4,
        **ids(
            tokens,
            image_token_index="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )
    eos = tokens.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    save(folder, "Gemma3ForConditionalGeneration", config, processor, eos=eos)


def gemma4(folder: Path) -> None:
    """As E4B, the upper layers look at keys and values of lower ones, and frames stand as video."""
    tokens = gemma_tokenizer(
        audio_token="<audio_soft_token>", boa_token="<start_of_audio>", eoa_token="<end_of_audio>"
    )
    tower = {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(feature_size=MEL),
        tf.Gemma4ImageProcessor(**tower),
        tokens,
        tf.Gemma4VideoProcessor(**tower),
        chat_template=template(
            {"image": tokens.image_token, "video": "<|video|>", "audio": tokens.audio_token},
            "<start_of_turn>ROLE\n", "<end_of_turn>\n", bos="{{ bos_token }}",
        ),
    )  # fmt: skip
    heads = {"num_attention_heads": 2, "head_dim": 16, "num_hidden_layers": 2, "hidden_size": 32}
    config = tf.Gemma4Config(
        text_config=TEXT
        | {
            "num_hidden_layers": 2 * LAYERS,
            "layer_types": ["sliding_attention", "full_attention"] * LAYERS,
            "num_kv_shared_layers": LAYERS,
            "vocab_size": len(tokens),
            "vocab_size_per_layer_input": len(tokens),
            "hidden_size_per_layer_input": 8,
            "head_dim": 16,
            "global_head_dim": 24,
            "sliding_window": 12,
            "final_logit_softcapping": 30.0,
        },
        vision_config=heads
        | {"intermediate_size": 40, "num_key_value_heads": 2, "position_embedding_size": 256}
        | {"patch_size": PATCH, "pooling_kernel_size": 2},
        audio_config=heads | {"output_proj_dims": 24, "subsampling_conv_channels": [MEL, 4]},
        **ids(
            tokens,
            image_token_id="<image_soft_token>",
            video_token_id="<|video|>",
            audio_token_id="<audio_soft_token>",
            boi_token_id="<start_of_image>",
            eoi_token_id="<end_of_image>",
            boa_token_id="<start_of_audio>",
            eoa_token_index="<end_of_audio>",
        ),
    )
    eos = tokens.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    save(folder, "Gemma4ForConditionalGeneration", config, processor, eos=eos)


def phi4(folder: Path) -> None:
    image, audio = "<|endoftext10|>", "<|endoftext11|>"
    tokens = tokenizer(
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        cls=tf.GPT2Tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_specific_special_tokens={"image_token": image, "audio_token": audio},
    )
    processor = tf.Phi4MultimodalProcessor(
        image_processor=tf.Phi4MultimodalImageProcessor(dynamic_hd=2),
        audio_processor=tf.Phi4MultimodalFeatureExtractor(),
        tokenizer=tokens,
        chat_template=template({"image": image, "audio": audio}, "<|ROLE|>", "<|end|>"),
    )
    config = tf.Phi4MultimodalConfig(
        **TEXT,
        vocab_size=len(tokens),
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_token_id": tokens.image_token_id,
        },
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
            "audio_token_id": tokens.audio_token_id,
        },
    )
    eos = tokens.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    save(folder, "Phi4MultimodalForCausalLM", config, processor, eos=eos)


def tiled_tokens():
    """The tokenizer of Idefics3 and SmolVLM, which cut a picture into tiles."""
    named = ["<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    split = ["<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))]
    ends = {"eos_token": "<end_of_utterance>", "pad_token": "<|im_start|>"}
    return tokenizer([*named, *split], **ends)


# As their makers publish it: without a word on videos.
TILED_CHAT = template({"image": "<image>"}, "<|im_start|>ROLE: ", "<end_of_utterance>\n")
ONE_TILE = {"longest_edge": 32}
TILES = {"size": {"longest_edge": 64}, "max_image_size": ONE_TILE}


def tiled_config(cls: str, tokens):
    return getattr(tf, cls)(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokens)},
        vision_config=VISION_TOWER | {"image_size": 32, "patch_size": 8},
        scale_factor=2,
        pad_token_id=tokens.pad_token_id,
        **ids(tokens, image_token_id="<image>"),
    )


def smolvlm(folder: Path) -> None:
    tokens, sampling = tiled_tokens(), {"max_frames": 64, "video_size": ONE_TILE, "fps": 1}
    processor = tf.SmolVLMProcessor(
        image_processor=tf.SmolVLMImageProcessor(**TILES),
        video_processor=tf.SmolVLMVideoProcessor(
            size=ONE_TILE, max_image_size=ONE_TILE, video_sampling=sampling
        ),
        tokenizer=tokens,
        image_seq_len=4,
        chat_template=TILED_CHAT,
    )
    config = tiled_config("SmolVLMConfig", tokens)
    save(folder, "SmolVLMForConditionalGeneration", config, processor)


def idefics3(folder: Path) -> None:
    """Also of the first SmolVLM, whose checkpoints are of this class."""
    tokens = tiled_tokens()
    processor = tf.Idefics3Processor(
        image_processor=tf.Idefics3ImageProcessor(**TILES),
        tokenizer=tokens,
        image_seq_len=4,
        chat_template=TILED_CHAT,
    )
    config = tiled_config("Idefics3Config", tokens)
    save(folder, "Idefics3ForConditionalGeneration", config, processor)


def internvl(folder: Path) -> None:
    named = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    named |= {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokens = tokenizer(CHATML, eos_token="<|im_end|>", model_specific_special_tokens=named)
    size = {"height": 32, "width": 32}
    processor = tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size=size, max_patches=4),
        video_processor=tf.InternVLVideoProcessor(size=size),
        tokenizer=tokens,
        image_seq_length=4,
        chat_template=chatml({"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}),
    )
    config = tf.InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokens)},
        vision_config=VISION_TOWER | {"image_size": [32, 32], "patch_size": [8, 8]},
        image_seq_length=4,
        **ids(tokens, image_token_id="<IMG_CONTEXT>"),
    )
    save(folder, "InternVLForConditionalGeneration", config, processor)


VISION_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

# ------------------------------------------------------------------ other audio models


def audio_flamingo(folder: Path) -> None:
    tokens = tokenizer([*CHATML, "<sound>"], eos_token="<|im_end|>")
    processor = tf.AudioFlamingo3Processor(
        feature_extractor=whisper(2),
        tokenizer=tokens,
        chat_template=chatml({"audio": "<sound>"}),
    )
    tower = {"model_type": "audioflamingo3_encoder", "num_mel_bins": MEL}
    config = tf.AudioFlamingo3Config(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokens)},
        audio_config=VISION_TOWER | tower | {"max_source_positions": 100},
        **ids(tokens, audio_token_id="<sound>"),
    )
    save(folder, "AudioFlamingo3ForConditionalGeneration", config, processor)


def qwen_asr(folder: Path) -> None:
    named = {"audio_token": "<|audio_pad|>"}
    named |= {"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokens = tokenizer(CHATML, eos_token="<|im_end|>", model_specific_special_tokens=named)
    processor = tf.Qwen3ASRProcessor(
        feature_extractor=tf.Qwen3ASRFeatureExtractor(feature_size=MEL),
        tokenizer=tokens,
        chat_template=chatml({"audio": "".join(named[k] for k in sorted(named, key=AROUND.index))}),
    )
    config = tf.Qwen3ASRConfig(
        text_config=TEXT | {"model_type": "qwen3", "vocab_size": len(tokens), "head_dim": 16},
        audio_config=AUDIO_TOWER
        | {"model_type": "qwen3_asr_encoder", "output_dim": HIDDEN, "downsample_hidden_size": 16},
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        **ids(tokens, audio_token_id="<|audio_pad|>"),
    )
    save(folder, "Qwen3ASRForConditionalGeneration", config, processor)


AROUND = ["audio_bos_token", "audio_token", "audio_eos_token"]

# ------------------------------------------------------------------ text-only models


def text_only(cls: str, config_cls: str, chat: bool):
    def build(folder: Path) -> None:
        tokens = tokenizer(CHATML, eos_token="<|im_end|>")
        tokens.chat_template = chatml({}) if chat else None
        config = getattr(tf, config_cls)(**TEXT, vocab_size=len(tokens))
        save(folder, cls, config, tokens)

    return build


VISION, OMNI_MEDIA = ("image", "video"), ("image", "video", "audio")
FAMILIES = {
    "qwen2-vl": Family(
        "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", VISION,
        qwen_vl("Qwen2VL", MROPE, {"depth": 2, "num_heads": 2, "embed_dim": 32, "mlp_ratio": 2}
                | {"hidden_size": HIDDEN}),
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", VISION,
        qwen_vl("Qwen2_5_VL", MROPE, TOWER_2_5),
    ),
    "qwen3-vl": Family(
        "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", VISION,
        qwen_vl("Qwen3VL", MROPE | {"head_dim": 16},
                TOWER | {"out_hidden_size": HIDDEN, "num_position_embeddings": 64}
                | {"deepstack_visual_indexes": [0, 1]}, tf.Qwen3VLVideoProcessor),
    ),
    "qwen2-audio": Family(
        "Qwen2AudioForConditionalGeneration", "Qwen2AudioProcessor", ("audio",), qwen_audio
    ),
    "qwen2.5-omni-thinker": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniProcessor", OMNI_MEDIA,
        qwen_omni(whole=False),
    ),
    "qwen2.5-omni": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniProcessor", OMNI_MEDIA,
        qwen_omni(whole=True),
    ),
    "llava-onevision": Family(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor", VISION, llava
    ),
    "gemma3": Family("Gemma3ForConditionalGeneration", "Gemma3Processor", ("image",), gemma),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration", "Gemma4Processor", OMNI_MEDIA, gemma4,
        layers=2 * LAYERS, exact="float32",
    ),
    "voxtral": Family(
        "VoxtralForConditionalGeneration", "VoxtralProcessor", ("audio",), voxtral,
        needs="mistral_common",
    ),
    "phi4-multimodal": Family(
        "Phi4MultimodalForCausalLM", "Phi4MultimodalProcessor", ("image", "audio"), phi4
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration", "SmolVLMProcessor", VISION, smolvlm, needs="num2words"
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration", "Idefics3Processor", ("image",), idefics3
    ),
    "internvl": Family("InternVLForConditionalGeneration", "InternVLProcessor", VISION, internvl),
    "audioflamingo3": Family(
        "AudioFlamingo3ForConditionalGeneration", "AudioFlamingo3Processor", ("audio",),
        audio_flamingo,
    ),
    "qwen3-asr": Family(
        "Qwen3ASRForConditionalGeneration", "Qwen3ASRProcessor", ("audio",), qwen_asr
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", "Qwen2Tokenizer", (), text_only("Qwen2ForCausalLM", "Qwen2Config", True)
    ),
    "llama": Family(
        "LlamaForCausalLM", "Qwen2Tokenizer", (),
        text_only("LlamaForCausalLM", "LlamaConfig", False),
    ),
}  # fmt: skip
