"""How a model and its processor are entered: one small adapter each, in a registry for plug-ins.

`Family` finds everything by structure, from the config and from the tokenizer; a subclass says
what differs and registers itself under the model classes that it names. minerlib's own are in
`adapters`, CONTRIBUTING.md shows one more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import FunctionType
from typing import Any, ClassVar

from torch import nn

from minerlib.artifacts import digest

MEDIA = ("image", "video", "audio")
KINDS = ("text", "special", *MEDIA)
"""The base kinds: every prompt token has exactly one (paper section 3.1)."""

FAMILIES: dict[str, type[Family]] = {}
"""The adapter of each model class; filled by subclassing `Family`."""

_OWN = "minerlib.adapters"
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_OUTPUTS = ("o_proj", "out_proj")
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
_INPUT_NORMS = ("input_layernorm", "attention_norm", "ln_1", "norm1")


_NOTHING = ("__module__", "__qualname__", "__doc__", "__annotations__", "__dict__", "__weakref__")


def _part(part: Any) -> Any:
    """A part of a class's body as a key holds it: a method, bare, or what it is set to."""
    inside = (getattr(part, name, None) for name in ("fget", "__func__", "func"))
    return next((f for f in (part, *inside) if isinstance(f, FunctionType)), repr(part))


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
    padding: ClassVar[dict[str, Any]] = {"padding": True}
    """What the processor is told of padding."""

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
        if cls.__module__ in (__name__, _OWN):
            return f"{cls.__name__} {cls.version}"
        bases = [base.identity() for base in cls.__bases__ if issubclass(base, Family)]
        return digest([bases, {name: _part(part) for name, part in vars(cls).items()
                               if name not in _NOTHING}])  # fmt: skip

    @staticmethod
    def part(model: Any) -> Any:
        """The part of a loaded model that is mined."""
        return model

    def layers(self) -> Iterable[nn.Module]:
        """The decoder layers, in order."""
        layers = getattr(decoder := self.model.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise self._missing("decoder layers in get_decoder().layers", decoder)
        return layers

    def mlp(self, layer: nn.Module) -> Any:
        """A layer's gated MLP."""
        found = [m for m in layer.modules() if hasattr(m, "down_proj") and _child(m, _ACTIVATIONS)]
        # Experts fused into one module hold their projections as bare parameters.
        if len(found) != 1 or not isinstance(found[0].down_proj, nn.Module):
            sought = f"one gated MLP, a module with down_proj and one of {_ACTIVATIONS}"
            experts = f"{len(found)} MLPs or fused experts in " if found else ""
            raise self._missing(sought, layer, experts)
        return found[0]

    def activation(self, layer: nn.Module) -> nn.Module:
        """The module whose output is the layer's neurons."""
        return _child(self.mlp(layer), _ACTIVATIONS)

    def down_projection(self, layer: nn.Module) -> nn.Module | None:
        """The nn.Linear that reads the layer's neurons, [hidden, neuron]; None if unknown."""
        return self.mlp(layer).down_proj

    def output_projection(self, layer: nn.Module) -> nn.Module:
        """The linear module that reads the layer's attention heads."""
        for module in layer.modules():
            if projection := _child(module, _OUTPUTS):
                return projection
        raise self._missing(f"an attention output projection, one of {_OUTPUTS}", layer)

    def other_mixers(self) -> dict[int, str]:
        """The layers whose tokens meet in a convolution or a recurrence, and its kind."""
        kinds = getattr(self.model.config.get_text_config(decoder=True), "layer_types", None) or []
        known = enumerate(map(str, kinds))
        return {i: k for i, k in known if "attention" not in k or k == "linear_attention"}

    def input_norm(self, layer: nn.Module) -> nn.Module | None:
        """The norm that a layer's input passes first; None where it passes none."""
        return _child(layer, _INPUT_NORMS)

    def final_norm(self) -> nn.Module:
        """The norm between the last decoder layer and the output embeddings."""
        if norm := _child(decoder := self.model.get_decoder(), _NORMS):
            return norm
        raise self._missing(f"a final norm, one of {_NORMS}", decoder)

    def _missing(self, sought: str, part: nn.Module, among: str = "") -> ValueError:
        names = {re.sub(r"\b\d+\b", "*", name) for name, _ in part.named_modules() if name}
        return ValueError(
            f"{self.name}: looked for {sought}; found {among}{type(part).__name__} with "
            f"{sorted(names)}; describe it with a subclass of minerlib.families.Family whose "
            "`architectures` name the class and whose methods return its parts"
        )

    def patch(self) -> None:
        """Mend in the loaded model what would make a batch differ from its rows alone."""

    def placeholder(self, kind: str) -> int | None:
        """The placeholder token id of a medium: on the config, its text part, or the medium's."""
        config, tower = self.model.config, "vision" if kind == "image" else kind
        for part in (config, *(getattr(config, f"{p}_config", None) for p in ("text", tower))):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                if isinstance(id_ := getattr(part, name, None), int):
                    return id_
        return None

    def special(self) -> set[int]:
        """Ids of the tokenizer's special tokens, placeholders among them."""
        added = self.tokenizer.added_tokens_decoder  # mistral-common's is no dict, and not needed
        marked = {i for i, t in added.items() if t.special} if isinstance(added, dict) else set()
        return marked | set(self.tokenizer.all_special_ids)

    @property
    def template(self) -> str | None:
        """The chat template in force."""
        own = getattr(self.processor, "chat_template", None)
        return own or getattr(self.tokenizer, "chat_template", None)

    def template_for(self, sample) -> str | None:
        """The chat template that a sample is entered in."""
        return self.template

    def chat(self, sample) -> str:
        """The sample's prompt in the chat template, medium first or `behind`, to be answered."""
        if not (template := self.template_for(sample)):
            return sample.prompt
        content: Any = sample.prompt
        if self.processor is not self.tokenizer:
            media = [{"type": kind} for kind in MEDIA if getattr(sample, kind) is not None]
            content = [*media, {"type": "text", "text": sample.prompt}]
            content = content[::-1] if sample.behind else content
        how = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
        return self.processor.apply_chat_template([{"role": "user", "content": content}], **how)

    def inputs(self, samples: Sequence) -> dict:
        """What the processor makes of the samples: padded model inputs."""
        text = [self.chat(s) for s in samples]
        kwargs: dict[str, Any] = {}
        if clips := [s.audio for s in samples if s.audio is not None]:
            kwargs = {"audio": clips, "sampling_rate": self.sampling_rate}
        for kind in ("image", "video"):
            # One list per prompt: some processors take a flat one to be one prompt's.
            media = [[m] if (m := getattr(s, kind)) is not None else [] for s in samples]
            if any(media):
                kwargs[f"{kind}s"] = media
        if "videos" in kwargs:  # a sample's frames are sampled already
            kwargs["do_sample_frames"] = False
            kwargs |= self.video_times([s for s in samples if s.video is not None])
        # A template that opens with a token must not get the tokenizer's own one on top of it.
        if (bos := self.tokenizer.bos_token) and text[0].startswith(bos):
            kwargs["add_special_tokens"] = False
        return self.processor(text=text, return_tensors="pt", **self.padding, **kwargs)

    def video_times(self, samples: Sequence) -> dict[str, Any]:
        """Processor arguments that say when the frames were taken; most families take none."""
        return {}

    @property
    def extractor(self) -> Any:
        """The processor's audio part, if it has one."""
        own = getattr(self.processor, "feature_extractor", None)
        return own or getattr(self.processor, "audio_processor", None)

    @property
    def sampling_rate(self) -> int:
        """What the audio tower hears, in Hz."""
        return getattr(self.extractor, "sampling_rate", 16_000)

    def check(self, sample, kinds: Sequence[str]) -> None:
        """Raises RowError for media that the model does not take, or would hear wrongly."""
        for kind in (k for k in MEDIA if getattr(sample, k) is not None):
            fault = self._misheard(sample) if kind == "audio" else ""
            if kind not in kinds:
                fault = f"{self.name} has no placeholder token for {kind} (it takes {kinds}); "
                fault += f"use benchmarks without {kind}"
            if fault:
                raise RowError(sample.benchmark, sample.row, kind, fault)

    def _misheard(self, sample) -> str:
        """Why the encoder would hear a clip wrongly or in part; empty if it would not."""
        if self.extractor is None:
            return ""
        rate, seconds = sample.sampling_rate, len(sample.audio) / sample.sampling_rate
        if rate != self.sampling_rate:
            hears = f"sampled at {rate} Hz, but {self.name} hears {self.sampling_rate} Hz"
            return f"{hears}; load the benchmark with sampling_rate={self.sampling_rate}"
        window = getattr(self.extractor, "n_samples", 0) / rate
        cuts = getattr(self.processor, "audio_kwargs", {}).get("truncation", True)
        if cuts and 0 < window < seconds:
            exceeds = f"an audio clip of {seconds:.2f} s exceeds the encoder's window of "
            return f"{exceeds}{window:.0f} s and would be cut silently; split or drop it"
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


import_module(_OWN)  # which fill FAMILIES
