"""A multimodal language model with its parts found: decoder layers, neurons, token ids.

Everything the other modules need to know about a transformers model is worked out here, once,
from its config and tokenizer, and every way into its forward pass is the one context manager
`MLLM.tap`. No transformers source is changed.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MEDIA = ("image", "video", "audio")
KINDS = ("text", "special", *MEDIA)
"""The base kinds: every prompt token has exactly one (paper section 3.1)."""

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

    For a family whose parts `load` does not find, build this by hand:
    `MLLM(model, processor, name, layers=model.my.blocks, activations=[b.ff.act for b in ...])`.
    """

    model: nn.Module
    processor: Any
    name: str
    layers: Sequence[nn.Module] = field(default=None, repr=False)
    activations: Sequence[nn.Module] = field(default=None, repr=False)

    def __post_init__(self):
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"  # generation continues the last column
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.layers is None:
            self.layers = _find_layers(self.model)
        if self.activations is None:
            self.activations = [_find_activation(i, layer) for i, layer in enumerate(self.layers)]
        if len(set(map(id, self.activations))) < len(self.layers):
            raise ValueError(
                f"{self.name}: {len(self.layers)} decoder layers share activation modules, so a hook "
                "cannot tell the layers apart; give each layer its own and pass activations=[...]"
            )
        self.text_config = self.model.config.get_text_config(decoder=True)
        self.model.eval().requires_grad_(False)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_neurons(self) -> int:
        """Neurons per decoder layer, the MLP's intermediate size."""
        size = self.text_config.intermediate_size
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
        special = {i for i, token in added.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        return {"special": sorted(special - set(media.values())), **ids}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The base kinds this model's prompts can hold."""
        return tuple(k for k in KINDS if k == "text" or self.token_ids[k])

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the weights: SHA-256 of a local folder's files, else the hub commit."""
        folder = Path(self.name)
        if not folder.is_dir():
            return {"commit": str(getattr(self.model.config, "_commit_hash", None))}
        files = sorted(f for f in folder.iterdir() if f.suffix in {".json", ".safetensors"})
        digests = {}
        for file in files:
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digests

    # ------------------------------------------------------------------ inputs and answers

    def chat(self, sample) -> str:
        """The sample's prompt in the model's chat template, media first, ready to be answered."""
        media = [{"type": kind} for kind in MEDIA if getattr(sample, kind) is not None]
        if missing := [m["type"] for m in media if m["type"] not in self.kinds]:
            raise ValueError(
                f"{self.name} has no placeholder token for {missing[0]} (it takes {self.kinds}); "
                f"use benchmarks without {missing[0]}"
            )
        if not getattr(self.processor, "chat_template", None):
            return sample.prompt
        multimodal = self.processor is not self.tokenizer
        content = [*media, {"type": "text", "text": sample.prompt}] if multimodal else sample.prompt
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def encode(self, samples: Iterable) -> transformers.BatchFeature:
        """Left-padded model inputs for the samples, on the model's device; ids [batch, token]."""
        samples = list(samples)
        text = [self.chat(s) for s in samples]  # refuses media that the model does not take
        media = {
            key: [getattr(s, kind) for s in samples if getattr(s, kind) is not None]
            for kind, key in zip(MEDIA, ("images", "videos", "audio"), strict=True)
        }
        media = {key: items for key, items in media.items() if items}
        if "audio" in media:
            self._check_audio(media["audio"])
            media["sampling_rate"] = self.processor.feature_extractor.sampling_rate
        # A template that opens with a token must not get the tokenizer's own one on top of it.
        bos = self.tokenizer.bos_token
        kwargs = {"add_special_tokens": False} if bos and text[0].startswith(bos) else {}
        batch = self.processor(text=text, padding=True, return_tensors="pt", **media, **kwargs)
        if not batch["attention_mask"][:, -1].all():
            raise ValueError(f"{self.name}: the processor padded on the right; set it to the left")
        batch = transformers.BatchFeature(batch)  # what a tokenizer alone returns takes no dtype
        return batch.to(self.device, dtype=self.model.dtype)  # only floating inputs change dtype

    def _check_audio(self, clips: list) -> None:
        extractor = self.processor.feature_extractor
        rate, window = extractor.sampling_rate, getattr(extractor, "n_samples", None)
        longest, shortest = max(map(len, clips)), min(map(len, clips))
        if window and longest > window:
            raise ValueError(
                f"{self.name}: an audio clip of {longest / rate:.2f} s exceeds the encoder's window "
                f"of {window / rate:.0f} s and would be cut silently; split or drop it"
            )
        if shortest < 0.1 * rate:
            raise ValueError(
                f"{self.name}: an audio clip of {shortest / rate:.3f} s; needs >= 0.1 s"
            )

    def forward(self, batch):
        """The prompt's forward pass (prefill), with logits of the last token only."""
        return self.model(**batch, use_cache=False, **self._last_logit)

    @cached_property
    def _last_logit(self) -> dict[str, int]:
        takes = inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

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
    if device_map is None and not hasattr(model, "hf_quantizer"):
        default = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device or default)
    model = getattr(model, "thinker", model)  # full Qwen-Omni: the talker's MLPs are left alone
    processor = transformers.AutoProcessor.from_pretrained(
        name, revision=revision, **(processor_kwargs or {})
    )
    return MLLM(model, processor, name)


def _find_layers(model: nn.Module) -> Sequence[nn.Module]:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None or not len(layers):
        raise ValueError(
            f"{type(model).__name__}: looked for decoder layers in get_decoder().layers, found "
            f"{type(decoder).__name__} with {[n for n, _ in decoder.named_children()]}; "
            "describe it with minerlib.model.MLLM(model, processor, name, layers=[...], activations=[...])"
        )
    return layers


def _find_activation(i: int, layer: nn.Module) -> nn.Module:
    """The activation module of a layer's gated MLP, found by name beside a down projection."""
    for mlp in layer.modules():
        for name in _ACTIVATION_NAMES:
            activation = getattr(mlp, name, None)
            if isinstance(activation, nn.Module) and hasattr(mlp, "down_proj"):
                return activation
    raise ValueError(
        f"decoder layer {i} ({type(layer).__name__}): looked for a module with down_proj and one of "
        f"{_ACTIVATION_NAMES}, found {sorted({n for n, _ in layer.named_modules() if n})}; describe "
        "it with minerlib.model.MLLM(model, processor, name, layers=[...], activations=[...])"
    )


def _placeholder_id(config, kind: str) -> int | None:
    """The placeholder token id of a medium: on the config, its text part, or the medium's own."""
    tower = "vision" if kind == "image" else kind
    parts = [config, getattr(config, "text_config", None), getattr(config, f"{tower}_config", None)]
    for part in filter(None, parts):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if isinstance(id_ := getattr(part, name, None), int):
                return id_
    return None
