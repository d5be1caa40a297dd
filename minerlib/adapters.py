"""The families that transformers enters in a way of their own; the others need no adapter."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE
from transformers.video_utils import VideoMetadata

from minerlib.families import Family, RowError

_TICKS = 1000  # per second: video processors take times as whole frames at a rate


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the last two place frames in time."""

    architectures = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )

    def video_times(self, samples: Sequence) -> dict[str, Any]:
        return {"video_metadata": [_metadata(sample) for sample in samples]}


class Gemma4(Family):
    """Gemma 4, which writes when a frame was taken before it.

    Where upper layers look at keys of lower ones (E4B) a prompt's other tokens than the last do not
    pass through them while it answers.
    """

    architectures = ("Gemma4ForConditionalGeneration",)

    video_times = QwenVL.video_times


class QwenOmni(Family):
    """Qwen2.5-Omni: its thinker is mined, and the talker's MLPs are left alone."""

    architectures = (
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
    )
    version = 2

    @staticmethod
    def part(model: Any) -> Any:
        return getattr(model, "thinker", model)

    def patch(self) -> None:
        # Its processor's class bounds a clip's pixels whatever the video processor was told.
        own = getattr(self.processor, "videos_kwargs", {})
        told = self.processor.video_processor.size
        if told["longest_edge"] < own.get("size", {}).get("longest_edge", 0):
            self.processor.videos_kwargs = own | {"size": dict(told)}

    def inputs(self, samples: Sequence) -> dict:
        batch = super().inputs(samples)
        if "video_second_per_grid" in batch:  # its processor knows one rate for all videos
            patch = self.processor.video_processor.temporal_patch_size
            steps = [_step(s.times, default=0.5) for s in samples if s.video is not None]
            batch["video_second_per_grid"] = torch.tensor([patch * step for step in steps])
        return batch


class Voxtral(Family):
    """Voxtral: mistral-common makes ids from conversations whose audio is base64 WAV."""

    architectures = ("VoxtralForConditionalGeneration",)

    def inputs(self, samples: Sequence) -> dict:
        turns = [[{"role": "user", "content": self._content(s)}] for s in samples]
        return self.processor.apply_chat_template(turns, return_tensors="pt")

    def _content(self, sample) -> list[dict]:
        content = [{"type": "text", "text": sample.prompt}]
        if sample.audio is not None:
            wav = io.BytesIO()
            soundfile.write(wav, sample.audio, self.sampling_rate, format="WAV", subtype="FLOAT")
            sound = {"type": "audio", "base64": base64.b64encode(wav.getvalue()).decode()}
            content.insert(len(content) if sample.behind else 0, sound)
        return content


class FramesAsPictures(Family):
    """InternVL: a clip's frames stand as image tokens, so that ids would not tell it from pictures.

    Here they have the id of the video token, which the model's body is given as image tokens.
    """

    architectures: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)

    @cached_property
    def _video(self) -> int:
        known = self.tokenizer.get_vocab()
        return known.get(self.processor.video_token, len(known))  # any that nothing else has

    def placeholder(self, kind: str) -> int | None:
        return self._video if kind == "video" else super().placeholder(kind)

    def patch(self) -> None:
        video, image = self.placeholder("video"), self.placeholder("image")

        def restore(body, args, given):
            if (ids := given.get("input_ids")) is not None:
                given = {**given, "input_ids": ids.masked_fill(ids == video, image)}
            return args, given

        self.model.base_model.register_forward_pre_hook(restore, with_kwargs=True)

    def inputs(self, samples: Sequence) -> dict:
        for sample in (s for s in samples if s.video is not None and s.image is not None):
            fault = f"{self.name} takes frames for pictures, so a row has one or the other"
            raise RowError(sample.benchmark, sample.row, "video", fault)
        batch = super().inputs(samples)
        clips = torch.tensor([s.video is not None for s in samples])[:, None]
        frames = clips & (batch["input_ids"] == self.placeholder("image"))
        batch["input_ids"] = batch["input_ids"].masked_fill(frames, self.placeholder("video"))
        return batch


class SmolVLM(FramesAsPictures):
    """SmolVLM: frames with their times, in a chat template of their own."""

    architectures = ("SmolVLMForConditionalGeneration",)

    video_times = QwenVL.video_times

    def template_for(self, sample) -> str | None:
        knows = sample.video is None or "video" in str(self.template)
        return self.template if knows else DEFAULT_CHAT_TEMPLATE

    def inputs(self, samples: Sequence) -> dict:
        """Pictures and clips in one batch one by one, for the processor keeps only the latter."""
        if (
            len({s.video is None for s in samples if s.image is not None or s.video is not None})
            < 2
        ):
            return super().inputs(samples)
        rows = [super(SmolVLM, self).inputs([sample]) for sample in samples]
        ids = {"input_ids": [row["input_ids"][0].tolist() for row in rows]}
        batch = self.tokenizer.pad(ids, return_tensors="pt")
        for name in ("pixel_values", "pixel_attention_mask"):
            batch[name] = pad_sequence([r[name][0] for r in rows if name in r], batch_first=True)
        return batch


class SoundInEveryPrompt(Family):
    """Audio Flamingo 3 and Qwen3-ASR, whose processors want a sound for each prompt.

    Each sound is entered alone: Qwen3-ASR's processor pads a shorter one of a batch with silence,
    which its encoder then hears beside the end.
    """

    architectures = ("AudioFlamingo3ForConditionalGeneration", "Qwen3ASRForConditionalGeneration")
    padding: ClassVar[dict[str, Any]] = {}  # theirs: text to the longest, sounds as the tower wants

    def inputs(self, samples: Sequence) -> dict:
        ids, sounds = [], []
        for sample in samples:
            if sample.audio is None:
                ids.append(self.tokenizer(self.chat(sample))["input_ids"])
            else:
                sounds.append(super().inputs([sample]))
                ids.append(sounds[-1].pop("input_ids")[0].tolist())
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        for name in ("input_features", "input_features_mask") if sounds else ():
            parts = [sound[name] for sound in sounds]
            widest = max(part.shape[-1] for part in parts)
            batch[name] = torch.cat([pad(part, (0, widest - part.shape[-1])) for part in parts])
        return batch


class Phi4Multimodal(Family):
    """Phi-4-multimodal, whose audio encoder must hear each clip alone."""

    architectures = ("Phi4MultimodalForCausalLM",)

    def patch(self) -> None:
        for module in self.model.modules():
            if type(module).__name__ == "Phi4MultimodalAudioEmbedding":
                module.forward = partial(_embed_clips_alone, module.forward, module.config)


def _embed_clips_alone(
    forward, config, input_ids, inputs_embeds, *, audio_input_features, audio_embed_sizes, **kwargs
) -> torch.Tensor:
    """Phi-4's own audio embedding of each prompt as if it were alone.

    In transformers 5.23 its encoder adds the padding mask to the logits as 0 and 1, so that clips
    see padding, and one image in a batch changes the projection of every clip in it.
    """
    audio = input_ids == config.audio_config.audio_token_id
    image = input_ids == config.vision_config.image_token_id
    frames, rows = kwargs.get("audio_attention_mask"), list(inputs_embeds.split(1))
    for clip, b in enumerate(audio.any(1).nonzero().flatten().tolist()):
        stop = None if frames is None else int(frames[clip].sum())
        own = audio_input_features[clip : clip + 1, :stop], audio_embed_sizes[clip : clip + 1]
        mode = "vision" if image[b].any() else "speech"
        rows[b] = forward(input_ids[b : b + 1], rows[b], *own, audio_projection_mode=mode)
    return torch.cat(rows)


def _step(times: np.ndarray | None, default: float = 1.0) -> float:
    """Seconds between two frames; `default` where it is not known."""
    if times is None or len(times) < 2:
        return default
    return float(times[-1] - times[0]) / (len(times) - 1) or default


def _metadata(sample) -> VideoMetadata:
    """When the frames were taken, as transformers' processors take it."""
    if sample.times is None:
        return VideoMetadata(len(sample.video), frames_indices=[*range(len(sample.video))])
    indices = (sample.times * _TICKS).round().astype(int).tolist()
    whole = round(len(indices) * _step(sample.times) * _TICKS)  # makes the sampled rate right
    return VideoMetadata(whole, fps=_TICKS, frames_indices=indices)
