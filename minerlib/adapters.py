"""The families that transformers enters in a way of their own; the others need no adapter."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import soundfile
import torch
from transformers.video_utils import VideoMetadata

from minerlib.families import Family

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


class QwenOmni(Family):
    """Qwen2.5-Omni: its thinker is mined, and the talker's MLPs are left alone."""

    architectures = (
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
    )

    @staticmethod
    def part(model: Any) -> Any:
        return getattr(model, "thinker", model)

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
        turns = [[{"role": "user", "content": [*self._content(s)]}] for s in samples]
        return self.processor.apply_chat_template(turns, return_tensors="pt")

    def _content(self, sample) -> Iterator[dict]:
        if sample.audio is not None:
            wav = io.BytesIO()
            soundfile.write(wav, sample.audio, self.sampling_rate, format="WAV", subtype="FLOAT")
            yield {"type": "audio", "base64": base64.b64encode(wav.getvalue()).decode()}
        yield {"type": "text", "text": sample.prompt}


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
