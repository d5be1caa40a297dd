"""The smol models: SmolLM2-135M-Instruct's decoder inside the classes of three multimodal families.

With q, k, v biases of zero, Qwen2's decoder is SmolLM2's, and M-RoPE gives text plain RoPE
positions; so the grafts' logits on text are SmolLM2's. Whisper base hears; small towers trained
here see. What is trained here is little and stands in NAME/graft.safetensors: projectors or
mergers, the delimiters' embeddings and, in some, low-rank adapters of the decoder's attention, and
in one, for a comparison, of its MLPs.
`assemble` joins all to an ordinary checkpoint.

    python -m data.make.grafts                # `make models`: all that are not assembled yet
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from minerlib.shipped import ASSEMBLED, GRAFT, NOTE

from . import parts

MODELS = parts.ROOT / "data/models"
VERSION = 1  # of the way models are built; raise it when another one comes out of the same parts
HIDDEN, VOCABULARY, SECONDS = 576, 49152, 2
PATCH = 4
DECODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
# A head has 64 dimensions, so 32 frequencies: for time, height and width.
MROPE = {"rope_parameters": DECODER["rope_parameters"] | {"mrope_section": [8, 12, 12]}}
EARS = {
    "num_mel_bins": 80,
    "d_model": 512,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "max_source_positions": 50 * SECONDS,
}
AUDIO_TOKENS = {
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
SCALE = 2.0  # of the low-rank additions, which are in some grafts' attention or MLPs too
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def template(media: Mapping[str, str]) -> str:
    """SmolLM2's chat format with media first, as {kind: text}; without its system message."""
    kinds = "".join(
        f"{{%- elif part.type == '{kind}' -%}}{{{{ '{text}' }}}}" for kind, text in media.items()
    )
    return (
        "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- for part in message.content -%}"
        f"{{%- if part.type == 'text' -%}}{{{{ part.text }}}}{kinds}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


def eyes() -> dict[str, tf.Qwen2VLImageProcessor | tf.Qwen2VLVideoProcessor]:
    """Image and video processor for patches of 4 pixels; larger pictures are scaled down."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    kwargs = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    return {
        "image_processor": tf.Qwen2VLImageProcessor(**kwargs),
        "video_processor": tf.Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **kwargs),
    }


def ears() -> tf.WhisperFeatureExtractor:
    """Whisper's log-mel features of two seconds."""
    return tf.WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS)


def ids(tokens, **names: str) -> dict[str, int]:
    """Token ids by configuration name."""
    return {name: tokens.convert_tokens_to_ids(text) for name, text in names.items()}


def qwen2_vl():
    """Untrained smol-qwen2-vl: its tower is tiny-qwen2-vl's, all but the last layer."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    ends = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tokens = parts.tokenizer(**names, **ends)
    around = "<|vision_start|>%s<|vision_end|>"
    media = {"image": around % "<|image_pad|>", "video": around % "<|video_pad|>"}
    processor = tf.Qwen2VLProcessor(tokenizer=tokens, chat_template=template(media), **eyes())
    config = tf.Qwen2VLConfig(
        text_config=DECODER | MROPE | {"vocab_size": len(tokens)},
        vision_config={"depth": 4, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 3}
        | {"hidden_size": HIDDEN, "patch_size": PATCH, "spatial_merge_size": 2},
        tie_word_embeddings=True,
        **ids(tokens, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
              vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    )  # fmt: skip
    model = tf.Qwen2VLForConditionalGeneration(config).float()
    tower = load_file(MODELS / "tiny-qwen2-vl/model.safetensors")
    own = model.model.visual.state_dict()
    for name in own:
        if (weight := tower[f"visual.{name}"]).shape == own[name].shape:
            own[name] = weight
    model.model.visual.load_state_dict(own)
    return model, processor


def qwen2_audio():
    """Untrained smol-qwen2-audio: its tower is Whisper base's encoder."""
    tokens = parts.tokenizer(**AUDIO_TOKENS)
    media = {"audio": "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"}
    processor = tf.Qwen2AudioProcessor(ears(), tokens, chat_template=template(media))
    untied = {"vocab_size": len(tokens), "tie_word_embeddings": False}
    config = tf.Qwen2AudioConfig(
        text_config={"model_type": "qwen2"} | DECODER | untied,
        audio_config={"model_type": "qwen2_audio_encoder"} | EARS,
        tie_word_embeddings=False,
        **ids(tokens, audio_token_index="<|AUDIO|>"),
    )
    model = tf.Qwen2AudioForConditionalGeneration(config).float()
    hear(model.model.audio_tower)
    return model, processor


def qwen2_5_omni():
    """Untrained smol-qwen2.5-omni (the thinker): Whisper's encoder, a tower to be trained."""
    media = ("image", "audio", "video")
    names = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in media}
    ends = {f"{kind}_{end}_token": f"<|{kind}_{end}|>"
            for kind in ("vision", "audio") for end in ("bos", "eos")}  # fmt: skip
    tokens = parts.tokenizer(**names, **ends)
    around = "<|{0}_bos|>{1}<|{0}_eos|>"
    holes = {k: around.format("audio" if k == "audio" else "vision", names[f"{k}_token"])
             for k in media}  # fmt: skip
    processor = tf.Qwen2_5OmniProcessor(
        feature_extractor=ears(), tokenizer=tokens, chat_template=template(holes), **eyes()
    )
    tower = {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384}
    tower |= {"out_hidden_size": HIDDEN, "patch_size": PATCH, "spatial_merge_size": 2}
    config = tf.Qwen2_5OmniThinkerConfig(
        text_config=DECODER | MROPE | {"vocab_size": len(tokens)},
        # Every layer sees the whole picture: it is no larger than a window.
        vision_config=tower | {"window_size": 64, "fullatt_block_indexes": [0, 1, 2, 3]},
        # One attention window of the tower is two seconds, in mel frames halved.
        audio_config=EARS | {"output_dim": HIDDEN, "n_window": 50 * SECONDS},
        tie_word_embeddings=True,
        **ids(tokens, image_token_index="<|IMAGE|>", video_token_index="<|VIDEO|>",
              audio_token_index="<|AUDIO|>", audio_start_token_id="<|audio_bos|>",
              audio_end_token_id="<|audio_eos|>", vision_start_token_id="<|vision_bos|>",
              vision_end_token_id="<|vision_eos|>"),
    )  # fmt: skip
    model = tf.Qwen2_5OmniThinkerForConditionalGeneration(config).float()
    hear(model.model.audio_tower)
    return model, processor


BUILD = {
    "smol-qwen2-vl": qwen2_vl,
    "smol-qwen2-audio": qwen2_audio,
    "smol-qwen2-audio-seed1": qwen2_audio,
    "smol-qwen2-audio-seed2": qwen2_audio,
    "smol-qwen2.5-omni": qwen2_5_omni,
    "smol-qwen2.5-omni-mlp": qwen2_5_omni,
}


def hear(tower: nn.Module) -> None:
    """Give an audio tower Whisper's weights, whatever it calls them."""
    own, rows = tower.state_dict(), EARS["max_source_positions"]
    for name, weight in parts.whisper_encoder().items():
        if name not in own:
            name = name.replace("layer_norm.", "ln_post.")
        if name == "embed_positions.weight" and name not in own:
            name = "positional_embedding.positional_embedding"
        weight = weight[:rows] if "position" in name else weight
        if name in own:
            own[name] = weight
        else:
            tower.get_buffer(name).copy_(weight)
    tower.load_state_dict(own)


def untrained(name: str):
    """The graft before training: (model, processor), the decoder SmolLM2's, the rest as drawn."""
    torch.manual_seed(0)
    model, processor = BUILD[name]()
    decoder, smol = model.get_decoder(), parts.language_model().model.state_dict()
    own = decoder.state_dict()
    for key, weight in own.items():
        if key == "embed_tokens.weight":
            weight[:VOCABULARY], weight[VOCABULARY:] = smol[key], smol[key].mean(0)
        elif key in smol:
            own[key] = smol[key]
        else:
            own[key] = torch.zeros_like(weight)  # Qwen2's biases of q, k and v
    decoder.load_state_dict(own)
    settle(model)
    model.generation_config = tf.GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 0], pad_token_id=0, do_sample=False
    )
    return model.eval(), processor


def settle(model: nn.Module) -> None:
    """The output embeddings are the input embeddings, whether the class ties them or not."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embeddings.weight:
        with torch.no_grad():
            head.weight.copy_(embeddings.weight)


@torch.no_grad()
def graft(model: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
    """Put what was trained into a model, in place.

    Names are the model's own. "X.lora_a" [rank, in] and "X.lora_b" [out, rank] are added to the
    weight of module X as SCALE b @ a; "embedding.I" is the row of token I.
    """
    for name, value in trained.items():
        place, _, kind = name.rpartition(".")
        value = value.float()
        if kind == "lora_b":
            low = trained[f"{place}.lora_a"].float()
            model.get_submodule(place).weight.add_(SCALE * value @ low)
        elif place == "embedding":
            model.get_input_embeddings().weight[int(kind)] = value
        elif kind != "lora_a":
            model.get_parameter(name).copy_(value)
    settle(model)


def made_of(name: str) -> dict[str, str]:
    """All that an assembled checkpoint is made of, by SHA-256."""
    tracked = MODELS / name / GRAFT, MODELS / "tiny-qwen2-vl/model.safetensors"
    hashes = {parts.shown(file): parts.sha256(file) for file in tracked}
    hashes |= {part.file: part.sha256 for part in (parts.SMOLLM2, parts.WHISPER)}
    return hashes | {"version": str(VERSION)}


def assemble(name: str) -> Path:
    """The assembled checkpoint's folder, made if it is not there or of other parts."""
    folder, wanted = MODELS / name / ASSEMBLED, made_of(name)
    note = folder / NOTE
    if note.is_file() and json.loads(note.read_text())["parts"] == wanted:
        return folder
    parts.need(folder.parent, 800_000_000, f"{name}/{ASSEMBLED}")
    print(f"assembling {name}", flush=True)
    scratch = folder.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        model, processor = untrained(name)
        graft(model, load_file(MODELS / name / GRAFT))
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        files = {file.name: parts.sha256(file) for file in scratch.iterdir()}
        (scratch / NOTE).write_text(json.dumps({"parts": wanted, "files": files}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def main() -> None:
    """Assemble every model whose trained part is there; one sentence says what is wrong."""
    tf.utils.logging.set_verbosity_error()
    try:
        for name in BUILD:
            if (MODELS / name / GRAFT).exists():
                print(parts.shown(assemble(name)))
    except (parts.PartError, OSError) as error:
        sys.exit(f"make models: {error}")


if __name__ == "__main__":
    main()
