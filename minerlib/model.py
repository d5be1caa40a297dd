"""A multimodal language model with its parts found: decoder layers, neurons, token ids.

Everything the other modules need to know about a transformers model is worked out here, once,
from its config and tokenizer, and every way into its forward pass is the one context manager
`MLLM.tap`. No transformers source is changed.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import soundfile
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MEDIA = ("image", "video", "audio")
KINDS = ("text", "special", *MEDIA)
"""The base kinds: every prompt token has exactly one (paper section 3.1)."""

FAMILIES: dict[str, Callable[[nn.Module], tuple[Sequence[nn.Module], Sequence[nn.Module]]]] = {}
"""Families whose parts are not found by themselves: the model's class name -> a function of the
model that returns its decoder layers and the activation module of each."""

_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")
_listeners: dict[int, Callable] = {}  # id of an attention module -> callback, filled by tap


def _tapped_attention(module, query, key, value, attention_mask, *args, **kwargs):
    """Tell the listener of this attention module, then run the model's own attention."""
    own = module.config._attn_implementation.removesuffix("+miner")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    if (listener := _listeners.get(id(module))) is not None:
        mask = listener(query, key, attention_mask, kwargs.get("scaling"))
        attention_mask = attention_mask if mask is None else mask
    return attention(module, query, key, value, attention_mask, *args, **kwargs)


@dataclass(eq=False)
class MLLM:
    """A model and its processor; see `load`.

    A *neuron* is one unit of the activation function's output in a decoder layer's gated MLP,
    act_fn(gate_proj(x)). The vision and audio towers have none.

    For a family whose parts `load` does not find, describe it once, by its class name:
    `FAMILIES["MyModel"] = lambda model: (model.my.blocks, [b.ff.act for b in model.my.blocks])`.
    """

    model: nn.Module
    processor: Any
    name: str
    layers: Sequence[nn.Module] = field(default=None, repr=False)
    activations: Sequence[nn.Module] = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"  # generation continues the last column
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not getattr(self.processor, "chat_template", None):  # Phi-4's reaches its tokenizer only
            self.processor.chat_template = getattr(self.tokenizer, "chat_template", None)
        if self.layers is None and (describe := FAMILIES.get(type(self.model).__name__)):
            self.layers, self.activations = describe(self.model)
        if self.layers is None:
            self.layers = _find_layers(self.model)
        if self.activations is None:
            self.activations = [_find_activation(i, layer) for i, layer in enumerate(self.layers)]
        if len(self.activations) != len(self.layers):
            raise ValueError(
                f"{self.name}: {len(self.activations)} activation modules for {len(self.layers)} "
                "decoder layers; describe one for each"
            )
        if len(set(map(id, self.activations))) < len(self.layers):
            raise ValueError(
                f"{self.name}: {len(self.layers)} decoder layers share activation modules, so a "
                "hook cannot tell the layers apart; give each its own"
            )
        self.text_config = self.model.config.get_text_config(decoder=True)
        for module in self.model.modules():
            if type(module).__name__ == "Phi4MultimodalAudioEmbedding":
                _embed_clips_alone(module)
        self.model.eval().requires_grad_(False)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_neurons(self) -> int:
        """Neurons per decoder layer, the MLP's intermediate size."""
        size = getattr(self.text_config, "intermediate_size", None)
        if size is None:
            raise ValueError(
                f"{self.name}: its text config has no intermediate_size; set "
                "mllm.text_config.intermediate_size to the number of neurons of a layer"
            )
        return size[0] if isinstance(size, list) else size

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def token_ids(self) -> dict[str, list[int]]:
        """Token ids of each kind but text, from config and tokenizer (paper section 3.1)."""
        media = {kind: _placeholder_id(self.model.config, kind) for kind in MEDIA}
        ids = {kind: [] if id_ is None else [id_] for kind, id_ in media.items()}
        added = self.tokenizer.added_tokens_decoder
        if not isinstance(added, dict):  # mistral-common: all_special_ids has them all
            added = {}
        special = {i for i, token in added.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        return {"special": sorted(special - set(media.values())), **ids}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The base kinds this model's prompts can hold."""
        return tuple(k for k in KINDS if k == "text" or self.token_ids[k])

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What identifies weights and processor: SHA-256 of a local folder's files, else the hub
        commit, and the processor's settings that differ from the checkpoint's.
        """
        folder, settings = Path(self.name), {k: str(v) for k, v in self.settings.items()}
        if not folder.is_dir():
            return {"commit": str(getattr(self.model.config, "_commit_hash", None)), **settings}
        files = sorted(f for f in folder.iterdir() if f.suffix in {".json", ".safetensors"})
        digests = {}
        for file in files:
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digests | settings

    # ------------------------------------------------------------------ inputs and answers

    def chat(self, sample) -> str:
        """The sample's prompt in the model's chat template, media first, ready to be answered."""
        media = [{"type": kind} for kind in MEDIA if getattr(sample, kind) is not None]
        if missing := [m["type"] for m in media if m["type"] not in self.kinds]:
            raise ValueError(
                f"{self.name} has no placeholder token for {missing[0]} (it takes {self.kinds}); "
                f"use benchmarks without {missing[0]}"
            )
        if not self.processor.chat_template:
            return sample.prompt
        multimodal = self.processor is not self.tokenizer
        content = [*media, {"type": "text", "text": sample.prompt}] if multimodal else sample.prompt
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def encode(self, samples: Iterable) -> transformers.BatchFeature:
        """Left-padded model inputs for the samples, on the model's device; ids [batch, token]."""
        samples = list(samples)
        text = [self.chat(s) for s in samples]
        clips = [s.audio for s in samples if s.audio is not None]
        if clips:
            self._check_audio(clips)
        if self._renders_itself:
            batch = self.processor.apply_chat_template(
                [self._spoken(s) for s in samples], return_tensors="pt"
            )
        else:
            kwargs = (
                {"audio": clips, "sampling_rate": self._extractor.sampling_rate} if clips else {}
            )
            for kind, key in (("image", "images"), ("video", "videos")):
                # One list per prompt: some processors take a flat one to be one prompt's.
                media = [[m] if (m := getattr(s, kind)) is not None else [] for s in samples]
                if any(media):
                    kwargs[key] = media
            if "videos" in kwargs:
                kwargs["do_sample_frames"] = False  # a sample's frames are sampled already
            # A template that opens with a token must not get the tokenizer's own one on top of it.
            if (bos := self.tokenizer.bos_token) and text[0].startswith(bos):
                kwargs["add_special_tokens"] = False
            try:
                batch = self.processor(text=text, padding=True, return_tensors="pt", **kwargs)
            except ValueError as error:
                raise ValueError(
                    f"{self.name}: its {type(self.processor).__name__} cannot put these "
                    f"{len(samples)} samples in one batch ({error}); use batch_size=1, or media of "
                    "one shape (videos of as many frames)"
                ) from error
        if not batch["attention_mask"][:, -1].all():
            raise ValueError(f"{self.name}: the processor padded on the right; set it to the left")
        batch = transformers.BatchFeature(dict(batch))
        return batch.to(self.device, dtype=self.model.dtype)  # only floating inputs change dtype

    @property
    def _renders_itself(self) -> bool:
        """Whether the processor has no template but makes ids from conversations (Voxtral's)."""
        return (
            self.processor is not self.tokenizer
            and not self.processor.chat_template
            and "apply_chat_template" in vars(type(self.processor))
        )

    def _spoken(self, sample) -> list[dict]:
        """The sample as a conversation whose audio is base64 WAV, as mistral-common takes it."""
        content = [{"type": "text", "text": sample.prompt}]
        if sample.audio is not None:
            wav = io.BytesIO()
            rate = self._extractor.sampling_rate
            soundfile.write(wav, sample.audio, rate, format="WAV", subtype="FLOAT")
            encoded = base64.b64encode(wav.getvalue()).decode()
            content.insert(0, {"type": "audio", "base64": encoded})
        return [{"role": "user", "content": content}]

    @property
    def _extractor(self):
        """The processor's audio part, which most families call feature_extractor."""
        return getattr(self.processor, "feature_extractor", None) or self.processor.audio_processor

    def _check_audio(self, clips: list) -> None:
        rate, window = self._extractor.sampling_rate, getattr(self._extractor, "n_samples", None)
        longest, shortest = max(map(len, clips)), min(map(len, clips))
        cuts = getattr(self.processor, "audio_kwargs", {}).get("truncation", True)
        if cuts and window and longest > window:
            raise ValueError(
                f"{self.name}: an audio clip of {longest / rate:.2f} s exceeds the encoder's "
                f"window of {window / rate:.0f} s and would be cut silently; split or drop it"
            )
        if shortest < 0.1 * rate:
            raise ValueError(
                f"{self.name}: an audio clip of {shortest / rate:.3f} s; needs >= 0.1 s"
            )

    @torch.inference_mode()
    def encode_media(self, batch) -> dict:
        """The batch with pictures and clips already through their tower, which is never silenced.

        Worth it where the same prompts are run many times. Models that take no `mm_encoder_outputs`
        (a transformers argument) get the batch back as it is.
        """
        batch, seen = dict(batch), {}
        if "mm_encoder_outputs" not in self._arguments:
            return batch
        for kind in ("image", "video"):
            tower = getattr(self.model.base_model, f"get_{kind}_features", None)
            names = [k for k in inspect.signature(tower).parameters if k in batch] if tower else []
            if pixels := [k for k in names if k.startswith("pixel")]:
                seen[kind] = tower(**{k: batch[k] for k in names}, return_dict=True)
                for k in pixels:
                    del batch[k]
        return batch | {"mm_encoder_outputs": seen} if seen else batch

    def forward(self, batch):
        """The prompt's forward pass (prefill), with logits of the last token only."""
        last = {"logits_to_keep": 1} if "logits_to_keep" in self._arguments else {}
        return self.model(**batch, use_cache=False, **last)

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.forward).parameters)

    @torch.inference_mode()
    def generate(self, batch, max_new_tokens: int = 32) -> list[str]:
        """Greedy answers, stripped; settings are explicit so a checkpoint's own do not leak in."""
        tokens = self.model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            # A part of a larger model (Omni's thinker) has no generation settings of its own.
            eos_token_id=self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id,
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        return [t.strip() for t in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def choose(self, batch, choices: Sequence[str]) -> list[str]:
        """The most probable choice at the last prompt token, per row; "A" and " A" both count."""
        ids = [self._first_token_ids(c) for c in choices]
        probs = self.forward(batch).logits[:, -1].float().softmax(-1)
        best = torch.stack([probs[:, i].sum(-1) for i in ids], -1).argmax(-1)
        return [choices[i] for i in best.tolist()]

    def _first_token_ids(self, choice: str) -> list[int]:
        forms = [self.tokenizer.encode(t, add_special_tokens=False) for t in (choice, " " + choice)]
        ids = sorted({f[0] for f in forms if len(f) == 1})
        if not ids:
            raise ValueError(f"{self.name}: the choice {choice!r} is not a single token")
        return ids

    # ------------------------------------------------------------------ the way in

    @contextmanager
    def tap(
        self,
        *,
        activation: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
        attention: Callable[..., torch.Tensor | None] | None = None,
        hidden: Callable[[int, torch.Tensor], None] | None = None,
        layers: Iterable[int] | None = None,
    ) -> Iterator[None]:
        """Call back from inside the decoder's forward pass; everything is undone on exit.

        >>> with mllm.tap(activation=lambda layer, x: print(layer, x.shape)):
        ...     mllm.forward(batch)

        activation(layer, x [batch, token, neuron]) sees the neurons and may return a replacement.
        attention(layer, query, key, mask, scaling) sees rotated queries [batch, head, token, dim]
        and keys [batch, kv head, token, dim], and may return a replacement mask.
        hidden(layer, h [batch, token, hidden]) sees the output of each decoder layer.
        With a cache all fire once for the prompt and once for each new token.
        """
        with ExitStack() as stack:
            for i in range(self.n_layers) if layers is None else layers:
                if activation is not None:
                    hook = self.activations[i].register_forward_hook(
                        lambda module, args, out, i=i: activation(i, out)
                    )
                    stack.callback(hook.remove)
                if hidden is not None:
                    hook = self.layers[i].register_forward_hook(
                        lambda module, args, out, i=i: hidden(
                            i, out[0] if isinstance(out, tuple) else out
                        )
                    )
                    stack.callback(hook.remove)
                if attention is not None:
                    stack.enter_context(self._listen(i, attention))
            if attention is not None:
                stack.enter_context(self._tapped_config())
            yield

    @contextmanager
    def _listen(self, i: int, attention: Callable) -> Iterator[None]:
        ids = [id(m) for m in self.layers[i].modules()]
        if taken := [m for m in ids if m in _listeners]:
            raise RuntimeError(f"layer {i}: attention is tapped already; {len(taken)} listener(s)")
        _listeners.update(dict.fromkeys(ids, lambda *args: attention(i, *args)))
        try:
            yield
        finally:
            for m in ids:
                del _listeners[m]

    @contextmanager
    def _tapped_config(self) -> Iterator[None]:
        """Route the decoder's attention through `_tapped_attention` via transformers' registry."""
        configs = {
            id(m.config): m.config
            for layer in self.layers
            for m in layer.modules()
            if hasattr(m, "config")
        }
        own = next(iter(configs.values()))._attn_implementation
        name = f"{own}+miner"
        AttentionInterface.register(name, _tapped_attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
        for config in configs.values():
            config._attn_implementation_internal = name
        try:
            yield
        finally:
            for config in configs.values():
                config._attn_implementation_internal = own


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    processor_kwargs: dict | None = None,
    **model_kwargs,
) -> MLLM:
    """Load a transformers model and its processor from a hub id or a local folder.

    device defaults to the accelerator if there is one, dtype to the checkpoint's.
    processor_kwargs, such as min_pixels and max_pixels, and model_kwargs, such as
    quantization_config, reach the two `from_pretrained`. Raises ValueError when no decoder
    layers with gated MLPs are found, saying what was looked for and how to describe the model.
    """
    name = str(name)
    if name.startswith((".", "/", "data/")) and not Path(name).is_dir():
        raise FileNotFoundError(f"no model folder {name!r}; `make data` builds the stand-ins")
    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    cls = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    if attn_implementation:
        model_kwargs["attn_implementation"] = attn_implementation
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    model = cls.from_pretrained(
        name, revision=revision, dtype=dtype, device_map=device_map, **model_kwargs
    )
    if device_map is None and getattr(model, "hf_quantizer", None) is None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device or default)
    model = getattr(model, "thinker", model)  # full Qwen-Omni: the talker's MLPs are left alone
    processor = transformers.AutoProcessor.from_pretrained(
        name, revision=revision, **(processor_kwargs or {})
    )
    return MLLM(model, processor, name, settings=processor_kwargs or {})


_DESCRIBE = (
    "describe it with minerlib.model.FAMILIES[class name] = lambda model: ([the decoder layers], "
    "[the activation module of each])"
)


def _find_layers(model: nn.Module) -> Sequence[nn.Module]:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = model if get_decoder is None else get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"{type(model).__name__}: looked for decoder layers in get_decoder().layers, found "
            f"{type(decoder).__name__} with {[n for n, _ in decoder.named_children()]}; {_DESCRIBE}"
        )
    return layers


def _find_activation(i: int, layer: nn.Module) -> nn.Module:
    """The activation module of a layer's only gated MLP, found by name beside a down projection."""
    found = [
        (mlp, activation)
        for mlp in layer.modules()
        for name in _ACTIVATION_NAMES
        if isinstance(activation := getattr(mlp, name, None), nn.Module)
        and hasattr(mlp, "down_proj")
    ]
    # Experts fused into one module hold their projections as bare parameters.
    if len(found) == 1 and isinstance(found[0][0].down_proj, nn.Module):
        return found[0][1]
    experts = f" in {len(found)} MLPs or fused experts" if found else ""
    raise ValueError(
        f"decoder layer {i} ({type(layer).__name__}): looked for one gated MLP, a module with "
        f"down_proj and one of {_ACTIVATION_NAMES}; found{experts} "
        f"{sorted({n for n, _ in layer.named_modules() if n})}; {_DESCRIBE}"
    )


def _embed_clips_alone(embed: nn.Module) -> None:
    """Make this Phi-4-multimodal audio embedding treat each prompt as if it were alone.

    In transformers 5.23 its encoder adds the padding mask to the attention logits as 0 and 1, so
    that clips of different lengths see padding, and one image in a batch changes the projection of
    every clip in it.
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


def _placeholder_id(config, kind: str) -> int | None:
    """The placeholder token id of a medium: on the config, its text part, or the medium's own."""
    tower = "vision" if kind == "image" else kind
    parts = [config, getattr(config, "text_config", None), getattr(config, f"{tower}_config", None)]
    for part in filter(None, parts):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if isinstance(id_ := getattr(part, name, None), int):
                return id_
    return None
