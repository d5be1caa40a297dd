"""What differs between architectures: one small adapter each, in a registry open to plug-ins.

`Family` finds everything by structure, from the config and from the tokenizer; a subclass says
what differs and registers itself under the model classes that it names:

    class Mine(Family):
        architectures = ("MyModelForCausalLM",)

        def layers(self):
            return self.model.trunk.blocks

        def activation(self, layer):
            return layer.ff.nonlinearity
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from torch import nn
from transformers.video_utils import VideoMetadata

from minerlib.artifacts import digest

MEDIA = ("image", "video", "audio")
KINDS = ("text", "special", *MEDIA)
"""The base kinds: every prompt token has exactly one (paper section 3.1)."""

FAMILIES: dict[str, type[Family]] = {}
"""The adapter of each model class; filled by subclassing `Family`."""

_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_TICKS = 1000  # per second: video processors take times as whole frames at a rate


class RowError(ValueError):
    """One row cannot be used: names its benchmark, row, field and the cause."""

    def __init__(self, benchmark: str, row: int, field: str, cause: Exception | str):
        self.benchmark, self.row, self.field, self.cause = benchmark, row, field, cause
        what = f"{type(cause).__name__}: {cause}" if isinstance(cause, Exception) else cause
        super().__init__(f"{benchmark or 'sample'} row {row}: {field}: {what}")


class Family:
    """How a model, whose decoder is mined, and its processor or tokenizer are entered."""

    architectures: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1
    """Raised when what the adapter changes changes numbers: part of every artefact's key."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FAMILIES.update(dict.fromkeys(cls.architectures, cls))

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.name = type(model).__name__

    @classmethod
    def identity(cls) -> str:
        """What of the adapter changes numbers: its version, or a plug-in's source."""
        if cls.__module__ == __name__:
            return f"{cls.__name__} {cls.version}"
        return digest({n: f for n, f in vars(cls).items() if isinstance(f, FunctionType)})

    @staticmethod
    def part(model: Any) -> Any:
        """The part of a loaded model that is mined."""
        return model

    def layers(self) -> Iterable[nn.Module]:
        """The decoder layers, in order."""
        get_decoder = getattr(self.model, "get_decoder", None)
        decoder = self.model if get_decoder is None else get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            held = f"{type(decoder).__name__} with {[n for n, _ in decoder.named_children()]}"
            raise self._missing("decoder layers in get_decoder().layers", held)
        return layers

    def _mlp(self, layer: nn.Module) -> Any:
        found = [m for m in layer.modules() if hasattr(m, "down_proj") and _child(m, _ACTIVATIONS)]
        # Experts fused into one module hold their projections as bare parameters.
        if len(found) != 1 or not isinstance(found[0].down_proj, nn.Module):
            experts = f"{len(found)} MLPs or fused experts in " if found else ""
            sought = f"one gated MLP in a {type(layer).__name__}, a module with down_proj and one "
            held = sorted({n for n, _ in layer.named_modules() if n})
            raise self._missing(f"{sought}of {_ACTIVATIONS}", f"{experts}{held}")
        return found[0]

    def activation(self, layer: nn.Module) -> nn.Module:
        """The module whose output is the layer's neurons."""
        return _child(self._mlp(layer), _ACTIVATIONS)

    def down_projection(self, layer: nn.Module) -> nn.Module | None:
        """The linear module that reads the layer's neurons, [hidden, neuron]; None if unknown."""
        return self._mlp(layer).down_proj

    def output_projection(self, layer: nn.Module) -> nn.Module:
        """The linear module that reads the layer's attention heads."""
        found = (_child(module, ("o_proj", "out_proj")) for module in layer.modules())
        if (projection := next(filter(None, found), None)) is None:
            raise self._missing("an attention output projection o_proj or out_proj", str(layer))
        return projection

    def final_norm(self) -> nn.Module:
        """The norm between the last decoder layer and the output embeddings."""
        names = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
        if (norm := _child(decoder := self.model.get_decoder(), names)) is None:
            held = str([n for n, _ in decoder.named_children()])
            raise self._missing(f"a final norm, one of {names}", held)
        return norm

    def _missing(self, sought: str, held: str) -> ValueError:
        return ValueError(
            f"{self.name}: looked for {sought}; found {held}; describe it with a subclass of "
            "minerlib.families.Family whose `architectures` name the class and whose methods "
            "return its parts"
        )

    def patch(self) -> None:
        """Mend in the loaded model what would make a batch differ from its rows alone."""

    def placeholder(self, kind: str) -> int | None:
        """The placeholder token id of a medium: on the config, its text part, or the medium's."""
        config, tower = self.model.config, "vision" if kind == "image" else kind
        parts = (config, *(getattr(config, f"{p}_config", None) for p in ("text", tower)))
        for part in filter(None, parts):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                if isinstance(id_ := getattr(part, name, None), int):
                    return id_
        return None

    def special(self) -> set[int]:
        """Ids of the tokenizer's special tokens, placeholders among them."""
        added = self.tokenizer.added_tokens_decoder
        if not isinstance(added, dict):  # mistral-common: all_special_ids has them all
            added = {}
        return {i for i, t in added.items() if t.special} | set(self.tokenizer.all_special_ids)

    @property
    def template(self) -> str | None:
        """The chat template in force."""
        parts = (self.processor, self.tokenizer)
        return next((t for p in parts if (t := getattr(p, "chat_template", None))), None)

    def chat(self, sample) -> str:
        """The sample's prompt in the chat template, media first, ready to be answered."""
        if not self.template:
            return sample.prompt
        content: Any = sample.prompt
        if self.processor is not self.tokenizer:
            media = [{"type": kind} for kind in MEDIA if getattr(sample, kind) is not None]
            content = [*media, {"type": "text", "text": sample.prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
        )

    def inputs(self, samples: Sequence) -> dict:
        """What the processor makes of the samples: padded model inputs."""
        text = [self.chat(s) for s in samples]
        kwargs: dict[str, Any] = {}
        if clips := [s.audio for s in samples if s.audio is not None]:
            kwargs = {"audio": clips, "sampling_rate": self.sampling_rate}
        for kind, key in (("image", "images"), ("video", "videos")):
            # One list per prompt: some processors take a flat one to be one prompt's.
            media = [[m] if (m := getattr(s, kind)) is not None else [] for s in samples]
            if any(media):
                kwargs[key] = media
        if "videos" in kwargs:  # a sample's frames are sampled already
            seen = [s for s in samples if s.video is not None]
            kwargs |= {"do_sample_frames": False, **self.video_times(seen)}
        # A template that opens with a token must not get the tokenizer's own one on top of it.
        if (bos := self.tokenizer.bos_token) and text[0].startswith(bos):
            kwargs["add_special_tokens"] = False
        return self.processor(text=text, padding=True, return_tensors="pt", **kwargs)

    def video_times(self, samples: Sequence) -> dict[str, Any]:
        """Processor arguments that say when the frames were taken; most families take none."""
        return {}

    @property
    def extractor(self):
        """The processor's audio part, if it has one."""
        names = ("feature_extractor", "audio_processor")
        return next((p for n in names if (p := getattr(self.processor, n, None))), None)

    @property
    def sampling_rate(self) -> int:
        """What the audio tower hears, in Hz."""
        return getattr(self.extractor, "sampling_rate", 16_000)

    def check(self, sample, kinds: Sequence[str]) -> None:
        """Raises RowError for media that the model does not take, or would hear wrongly."""
        for kind in (k for k in MEDIA if getattr(sample, k) is not None):
            fault = ""
            if kind not in kinds:
                fault = f"{self.name} has no placeholder token for {kind} (it takes {kinds}); use "
                fault += f"benchmarks without {kind}"
            elif kind == "audio" and self.extractor is not None:
                fault = self._misheard(len(sample.audio), sample.sampling_rate)
            if fault:
                raise RowError(sample.benchmark, sample.row, kind, fault)

    def _misheard(self, length: int, rate: int) -> str:
        """Why the encoder would hear a clip wrongly or in part; empty if it would not."""
        seconds, window = length / rate, getattr(self.extractor, "n_samples", None)
        if rate != self.sampling_rate:
            hears = f"sampled at {rate} Hz, but {self.name} hears {self.sampling_rate} Hz; load "
            return hears + f"the benchmark with sampling_rate={self.sampling_rate}"
        cuts = getattr(self.processor, "audio_kwargs", {}).get("truncation", True)
        if cuts and window and length > window:
            exceeds = f"an audio clip of {seconds:.2f} s exceeds the encoder's window of "
            return exceeds + f"{window / rate:.0f} s and would be cut silently; split or drop it"
        return f"an audio clip of {seconds:.3f} s; needs >= 0.1 s" if seconds < 0.1 else ""

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises ValueError for bounds of a picture's size that the processor would ignore."""
        if (pictures := getattr(self.processor, "image_processor", None)) is None:
            return
        known = getattr(getattr(pictures, "valid_kwargs", None), "__annotations__", {})
        for bound in {"min_pixels", "max_pixels"} & set(settings) - set(known):
            raise ValueError(
                f"{self.name}: {bound}={settings[bound]} would be ignored, for its "
                f"{type(pictures).__name__} scales pictures in another way; leave it out"
            )


def _child(module: nn.Module, names: Sequence[str]) -> Any:
    """The first of a module's children by name, None without any."""
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the last two place frames in time."""

    architectures = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )

    def video_times(self, samples: Sequence) -> dict[str, Any]:
        return {"video_metadata": [_metadata(s.video, s.times) for s in samples]}


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
            clips = [s for s in samples if s.video is not None]
            patch = self.processor.video_processor.temporal_patch_size
            batch["video_second_per_grid"] = torch.tensor(
                [patch * _step(s.times, default=0.5) for s in clips]
            )
        return batch


class Voxtral(Family):
    """Voxtral: mistral-common makes ids from conversations whose audio is base64 WAV."""

    architectures = ("VoxtralForConditionalGeneration",)

    def chat(self, sample) -> str:
        return sample.prompt

    def inputs(self, samples: Sequence) -> dict:
        return self.processor.apply_chat_template(
            [self._conversation(s) for s in samples], return_tensors="pt"
        )

    def _conversation(self, sample) -> list[dict]:
        content = [{"type": "text", "text": sample.prompt}]
        if sample.audio is not None:
            wav, rate = io.BytesIO(), self.extractor.sampling_rate
            soundfile.write(wav, sample.audio, rate, format="WAV", subtype="FLOAT")
            encoded = base64.b64encode(wav.getvalue()).decode()
            content.insert(0, {"type": "audio", "base64": encoded})
        return [{"role": "user", "content": content}]


class Phi4Multimodal(Family):
    """Phi-4-multimodal, whose audio encoder must hear each clip alone."""

    architectures = ("Phi4MultimodalForCausalLM",)

    def patch(self) -> None:
        for module in self.model.modules():
            if type(module).__name__ == "Phi4MultimodalAudioEmbedding":
                _embed_clips_alone(module)


def _embed_clips_alone(embed: nn.Module) -> None:
    """Make this audio embedding treat each prompt as if it were alone.

    In transformers 5.23 its encoder adds the padding mask to the logits as 0 and 1, so that clips
    see padding, and one image in a batch changes the projection of every clip in it.
    """
    forward, config = embed.forward, embed.config

    def alone(input_ids, inputs_embeds, audio_input_features, audio_embed_sizes, **kwargs):
        audio = input_ids == config.audio_config.audio_token_id
        image = input_ids == config.vision_config.image_token_id
        frames = kwargs.get("audio_attention_mask")
        rows = list(inputs_embeds.split(1))
        for clip, b in enumerate(audio.any(1).nonzero().flatten().tolist()):
            stop = None if frames is None else int(frames[clip].sum())
            rows[b] = forward(
                input_ids[b : b + 1],
                rows[b],
                audio_input_features[clip : clip + 1, :stop],
                audio_embed_sizes[clip : clip + 1],
                audio_projection_mode="vision" if image[b].any() else "speech",
            )
        return torch.cat(rows)

    embed.forward = alone


def _step(times: np.ndarray | None, default: float = 1.0) -> float:
    """Seconds between two frames; `default` where it is not known."""
    if times is None or len(times) < 2:
        return default
    return float(times[-1] - times[0]) / (len(times) - 1) or default


def _metadata(video: np.ndarray, times: np.ndarray | None) -> VideoMetadata:
    """When the frames were taken, as transformers' processors take it."""
    if times is None:
        return VideoMetadata(len(video), frames_indices=list(range(len(video))))
    indices = (np.asarray(times) * _TICKS).round().astype(int).tolist()
    whole = round(len(indices) * _step(times) * _TICKS)  # so that the sampled rate comes out right
    return VideoMetadata(whole, fps=_TICKS, frames_indices=indices)
