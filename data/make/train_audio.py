"""Train the stand-in tiny-qwen2-audio from scratch: tokenizer, audio tower, language model.

    python -m data.make.train_audio

The audio tower is pretrained first to name the word, or the vocal sound, that each 40 ms frame is
part of; then it is frozen and the language model learns mmlu, libri and vocal_sound on top of it.
Interrupted, the same command goes on from the last checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.masking_utils import create_bidirectional_mask

from minerlib.model import MLLM
from minerlib.tasks import REGISTRY, benchmark

from . import audio, knowledge, training
from .training import IGNORED, Row

MODEL = Path("data/models/tiny-qwen2-audio")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AUDIO = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
LIBRI, VOCAL = REGISTRY["libri"].prompt, REGISTRY["vocal_sound"].prompt
FRAME = 4 * 160  # samples an audio token stands for: 10 ms mel frames, halved twice
CLASSES = ["", *audio.WORDS, *audio.VOCAL_SOUNDS]

CHAT_TEMPLATE = (
    "{%- set clips = namespace(count=0) -%}"
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'audio' or 'audio' in part or 'audio_url' in part -%}"
    "{%- set clips.count = clips.count + 1 -%}"
    "{{ 'Audio ' ~ clips.count ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\n' }}"
    "{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


# ---------------------------------------------------------------- model and processor


def make_processor() -> Qwen2AudioProcessor:
    """Train a byte-level BPE on the text of the three tasks and add the two-second log-mel."""
    rng, questions = np.random.default_rng(7), knowledge.Questions()
    texts = [training.SYSTEM, f"user\nAudio 1: {LIBRI}assistant\n", VOCAL, *audio.VOCAL_SOUNDS]
    texts += ["".join(map("".join, questions.few_shot(rng))) for _ in range(300)]
    texts += [value for fact in knowledge.FACTS for value in (fact.answer, " " + fact.answer)]
    texts += [f"{word} {word}" for word in audio.WORDS]
    # Every word counts alike and becomes one token.
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts * 10, vocab_size=2000, new_special_tokens=None, show_progress=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], *AUDIO]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side, tokenizer.model_max_length = "left", 1024
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    return Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(processor: Qwen2AudioProcessor, seed: int = 0) -> Qwen2AudioForConditionalGeneration:
    """Build the model: 8 decoder layers of 512 neurons, hidden 128; a four-layer audio tower."""
    ids = dict(zip(AUDIO, processor.tokenizer.convert_tokens_to_ids(AUDIO), strict=True))
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 80,
            "d_model": 128,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 512,
            "max_source_positions": 100,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        audio_token_index=ids["<|AUDIO|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    training.initialise(model, seed)
    positions = model.model.audio_tower.embed_positions.weight
    time = torch.arange(positions.shape[0])[:, None]
    scale = torch.exp(torch.linspace(0, -math.log(1e4), positions.shape[1] // 2))
    with torch.no_grad():  # sinusoids, as in Whisper; transformers leaves them to the checkpoint
        positions.copy_(torch.cat([torch.sin(time * scale), torch.cos(time * scale)], 1))
    model.generation_config = GenerationConfig(
        eos_token_id=[processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id],
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def save(model: nn.Module, processor: Qwen2AudioProcessor, folder: Path) -> None:
    """Write config, weights (float32 safetensors), tokenizer, template and feature extractor."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ---------------------------------------------------------------- clips


class Clips:
    """Training clips under changing recording conditions, with a class for every frame."""

    def __init__(self, utterances: int = 5000, sounds: int = 3000) -> None:
        self._spoken = audio.train_utterances(audio.Speech(), utterances)
        rng = np.random.default_rng(8)
        self._sounds = [
            (kind, audio.vocal_sound(rng, kind, rng.uniform(0.8, 1.3)))
            for kind in (i % len(audio.VOCAL_SOUNDS) for i in range(sounds))
        ]

    def spoken(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
        """Draw a clip of speech, the class of each 40 ms frame, and the transcript."""
        said = self._spoken[rng.integers(len(self._spoken))]
        if rng.random() < 0.7:
            least = max(0.9, len(said.sound) / (0.98 * audio.LONGEST))
            said = audio.stretch(said, rng.uniform(least, 1.12))
        clip, begin = audio.record(rng, said.sound, (6, 35))
        middles = (np.arange(len(clip) // FRAME) + 0.5) * FRAME - begin
        which = np.searchsorted(said.starts, middles, "right") - 1
        classes = np.array([CLASSES.index(word) for word in said.words])[which.clip(0)]
        classes[(which < 0) | (middles >= len(said.sound))] = 0
        return clip, classes, " ".join(said.words)

    def sound(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
        """Draw a clip with a vocal sound, the class of each 40 ms frame, and its name."""
        kind, sound = self._sounds[rng.integers(len(self._sounds))]
        clip, begin = audio.record(rng, sound, (6, 35))
        middles = (np.arange(len(clip) // FRAME) + 0.5) * FRAME - begin
        inside = (middles >= 0) & (middles < len(sound))
        return clip, inside * (1 + len(audio.WORDS) + kind), audio.VOCAL_SOUNDS[kind]


def log_mel(extractor: WhisperFeatureExtractor, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Features [clip, mel, time] of clips and their lengths in mel frames."""
    made = extractor(
        clips, sampling_rate=audio.RATE, return_attention_mask=True, return_tensors="pt"
    )
    return {"input_features": made["input_features"], "lengths": made["attention_mask"].sum(-1)}


def hear(
    tower: nn.Module, features: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the audio tower as Qwen2Audio does: frames after a clip's end are masked.

    Takes features [clip, mel, time] and the clips' lengths in mel frames; returns states
    [clip, audio token, width] and which of the tokens are real, bool [clip, audio token].
    """
    halves, tokens = tower._get_feat_extract_output_lengths(lengths)
    positions = torch.arange(tower.max_source_positions, device=features.device)
    real = positions < halves[:, None]
    mask = create_bidirectional_mask(tower.config, real[..., None].float(), real.long())
    states = tower(features, attention_mask=mask).last_hidden_state
    return states, positions[: states.shape[1]] < tokens[:, None]


class Pretraining(nn.Module):
    """The audio tower and a classifier of its frames."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.classify = nn.Linear(tower.config.d_model, len(CLASSES))

    def forward(self, input_features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits [clip, frame, class] of features [clip, mel, time]."""
        return self.classify(hear(self.tower, input_features, lengths)[0])


def pretraining_batch(
    clips: Clips, extractor: WhisperFeatureExtractor, size: int
) -> Callable[[int, np.random.Generator], tuple[str, dict[str, torch.Tensor]]]:
    """Batches of features and frame classes, two thirds of them speech."""

    def batch_at(step: int, rng: np.random.Generator) -> tuple[str, dict[str, torch.Tensor]]:
        drawn = [clips.sound(rng) if i % 3 == 0 else clips.spoken(rng) for i in range(size)]
        labels = torch.full((size, 50), IGNORED)
        for row, (_, classes, _) in zip(labels, drawn, strict=True):
            row[: len(classes)] = torch.from_numpy(classes)
        features = log_mel(extractor, [clip for clip, *_ in drawn])
        return "frames", {**features, "labels": labels}

    return batch_at


def pretraining_loss(model: Pretraining, batch: dict) -> torch.Tensor:
    """Cross-entropy of the frames."""
    logits = model(batch["input_features"], batch["lengths"]).float()
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


# ---------------------------------------------------------------- the language model's tasks


class Tasks:
    """Rows of each task, in the very text that the benchmarks and the chat template make."""

    def __init__(self, processor: Qwen2AudioProcessor, clips: Clips) -> None:
        self._tokenizer, self._extractor = processor.tokenizer, processor.feature_extractor
        self._questions, self._clips = knowledge.Questions(), clips
        self._audio_id = self._tokenizer.convert_tokens_to_ids("<|AUDIO|>")

    def _choices(self, parts: list[tuple[str, str]]) -> Row:
        *shots, (last, answer) = parts
        pieces = [(f"{training.SYSTEM}<|im_start|>user\n", False)]
        pieces += [piece for text, letter in shots for piece in ((text, False), (letter, True))]
        pieces += [(f"{last}<|im_end|>\n<|im_start|>assistant\n", False)]
        return Row(*training.encode(self._tokenizer, [*pieces, (f"{answer}<|im_end|>", True)]))

    def few_shot(self, rng: np.random.Generator) -> list[Row]:
        """The five-shot form; all six letters are learnt."""
        return [self._choices(self._questions.few_shot(rng)) for _ in range(24)]

    def one_list(self, rng: np.random.Generator) -> list[Row]:
        """Four questions about one list."""
        return [self._choices(self._questions.one_list(rng)) for _ in range(64)]

    def open(self, rng: np.random.Generator) -> list[Row]:
        """Eight open questions a row, answered in the same words as the lists use."""
        rows = []
        for _ in range(32):
            asked = [self._questions.open(rng) for _ in range(8)]
            parts = [(f"{q}\nAnswer:", f" {a}") for q, a in asked]
            parts = [parts[0], *((f"\n\n{q}", a) for q, a in parts[1:])]
            rows.append(self._choices(parts))
        return rows

    def _heard(self, prompt: str, drawn: list[tuple[np.ndarray, np.ndarray, str]]) -> list[Row]:
        features = log_mel(self._extractor, [clip for clip, *_ in drawn])
        rows = []
        for i, (_, _, answer) in enumerate(drawn):
            tokens = ((int(features["lengths"][i]) - 1) // 2 - 1) // 2 + 1
            media = f"Audio 1: <|audio_bos|>{'<|AUDIO|>' * tokens}<|audio_eos|>\n"
            pieces = training.chat([(prompt, answer)], media)[:-1]
            clip = {key: value[i : i + 1] for key, value in features.items()}
            rows.append(Row(*training.encode(self._tokenizer, pieces), clip))
        return rows

    def libri(self, rng: np.random.Generator) -> list[Row]:
        """Transcribe."""
        return self._heard(LIBRI, [self._clips.spoken(rng) for _ in range(48)])

    def vocal_sound(self, rng: np.random.Generator) -> list[Row]:
        """Name the sound."""
        return self._heard(VOCAL, [self._clips.sound(rng) for _ in range(48)])

    def batch_at(self, steps: int) -> Callable:
        """Draw one task a step: lists and open questions first, the five-shot form later."""
        names = ("few_shot", "one_list", "open", "libri", "vocal_sound")
        shares = ((0.15, 0.55, 0.1, 0.15, 0.05), (0.35, 0.2, 0.05, 0.3, 0.1))

        def draw(step: int, rng: np.random.Generator) -> tuple[str, dict[str, torch.Tensor]]:
            name = str(rng.choice(names, p=shares[step >= steps * 0.35]))
            return name, training.collate(getattr(self, name)(rng), self._tokenizer.pad_token_id)

        return draw


def language_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Cross-entropy of the supervised tokens.

    Padding is on the right, where causal attention never looks, so no mask is needed; and only
    the supervised positions pass the output layer.
    """
    inner, ids = model.model, batch["input_ids"]
    states = inner.get_input_embeddings()(ids)
    if "input_features" in batch:
        with torch.no_grad():
            heard, inside = hear(inner.audio_tower, batch["input_features"], batch["lengths"])
        tokens = inner.multi_modal_projector(heard[inside]).to(states.dtype)
        states = states.masked_scatter((ids == model.config.audio_token_id)[..., None], tokens)
    states = inner.language_model(inputs_embeds=states, use_cache=False).last_hidden_state
    wanted = batch["labels"][:, 1:] != IGNORED
    logits = model.lm_head(states[:, :-1][wanted]).float()
    return functional.cross_entropy(logits, batch["labels"][:, 1:][wanted])


# ---------------------------------------------------------------- held-out rows


def held_out(
    model: nn.Module, processor: Qwen2AudioProcessor, limit: int | None = None
) -> dict[str, float]:
    """Score the benchmarks' rows as minerlib does: chat template, processor, greedy answers."""
    mllm = MLLM(copy.deepcopy(model).float(), processor, "tiny-qwen2-audio")
    scores = {}
    for name in ("mmlu", "libri", "vocal_sound"):
        bench = benchmark(name, source="data/benchmarks", limit=limit)
        answers = []
        for i in range(0, len(bench), 48):
            samples = list(bench[i : i + 48])
            batch = mllm.encode(samples)
            choices = samples[0].choices
            answers += mllm.choose(batch, choices) if choices else mllm.generate(batch, 16)
        scores[name] = float(bench.corpus_score(answers))
    return scores


def main() -> None:
    """Make the model, or with --random only its untrained shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, default=Path("runs/train/audio"))
    parser.add_argument("--random", action="store_true", help="save untrained weights and stop")
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = make_processor()
    model = make_model(processor)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if arguments.random:
        return save(model, processor, arguments.out)
    # On CPUs, plain attention is twice as fast here as the fused kernels' backward pass.
    model.set_attn_implementation("sdpa" if device == "cuda" else "eager")
    common = {"folder": arguments.work, "device": device}
    clips = Clips()

    tower = model.model.audio_tower
    pretraining = Pretraining(tower)
    draw = pretraining_batch(clips, processor.feature_extractor, 64)
    _, test = draw(0, np.random.default_rng([9, 9]))

    def frames(step: int) -> dict[str, float]:
        with torch.no_grad():
            heard = training.move(test, device)
            right = pretraining(heard["input_features"], heard["lengths"]).argmax(-1).cpu()
        counted = test["labels"] != IGNORED
        return {"frames": (right == test["labels"])[counted].float().mean().item()}

    spent = training.train(
        pretraining,
        draw,
        steps=arguments.tower_steps,
        lr=1.5e-3,
        name="tower",
        seed=10,
        loss_of=pretraining_loss,
        report=frames,
        report_every=100,
        **common,
    )
    tower.requires_grad_(False)
    spent += training.train(
        model,
        Tasks(processor, clips).batch_at(arguments.steps),
        steps=arguments.steps,
        lr=1.5e-3,
        name="language",
        seed=11,
        loss_of=language_loss,
        report=lambda step: held_out(model, processor, 96),
        report_every=250,
        **common,
    )
    model.cpu().set_attn_implementation("sdpa")
    save(model, processor, arguments.out)
    print(f"trained in {spent:.0f} s; held-out rows: {held_out(model, processor)}")


if __name__ == "__main__":
    main()
