"""A multimodal language model with its parts found: decoder layers, neurons, token ids.

`load` finds and checks them through the model's `families`; `MLLM.tap` is the one way in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from minerlib import answering, memory, processes, shipped
from minerlib.families import FAMILIES, KINDS, MEDIA, Family, RowError
from minerlib.tap import SUFFIX, tap


@dataclass(eq=False)
class MLLM:
    """A model and its processor, from `load`.

    A *neuron* is one unit of the activation function's output in a decoder layer's gated MLP,
    act_fn(gate_proj(x)); the towers have none.
    """

    model: Any
    processor: Any
    name: str
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        size = f"{self.n_layers} decoder layers x {self.n_neurons} neurons"
        return f"{self.name}: {type(self.model).__name__}, {size}, {self.model.dtype}"

    def __post_init__(self):
        self.family = FAMILIES.get(type(self.model).__name__, Family)(self.model, self.processor)
        self.family.check_settings(self.settings)
        self.tokenizer = self.family.tokenizer
        self.tokenizer.padding_side = "left"  # generation continues the last column
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.text_config = self.model.config.get_text_config(decoder=True)
        self.layers = list(self.family.layers())
        self.activations = [self.family.activation(layer) for layer in self.layers]
        for what, parts in (("layers", self.layers), ("activation modules", self.activations)):
            if shared := [i for i, part in enumerate(parts) if parts.index(part) < i]:
                raise ValueError(
                    f"{self.name}: decoder layers {shared} share their {what} with earlier ones, "
                    "so a hook cannot tell the layers apart; give each its own"
                )
        self.n_layers, self.n_neurons = len(self.layers), self._width()
        self.family.patch()
        self.model.eval().requires_grad_(False)

    def _width(self) -> int:
        """Neurons per decoder layer, from the weights that read them."""
        said: Any = getattr(self.text_config, "intermediate_size", None)
        down = map(self.family.down_projection, self.layers)
        widths = [getattr(d, "in_features", said) for d in down]
        if unknown := [i for i, width in enumerate(widths) if not isinstance(width, int)]:
            raise ValueError(
                f"{self.name}: how many neurons layers {unknown} have is not known: their "
                "`Family.down_projection` has no in_features (an nn.Linear has), and the config no "
                "intermediate_size"
            )
        if odd := {i: w for i, w in enumerate(widths) if w != widths[0]}:
            raise ValueError(
                f"{self.name}: decoder layers must have equally many neurons; of {widths[0]} in "
                f"layer 0, layers {odd} differ. A model trimmed layer by layer is not supported"
            )
        return widths[0]

    @property
    def device(self) -> torch.device:
        """Where inputs go: of weights that wait elsewhere, where they are used."""
        embeddings = self.model.get_input_embeddings()
        used = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        return torch.device(embeddings.weight.device if used is None else used)

    @cached_property
    def token_ids(self) -> dict[str, list[int]]:
        """Token ids of each kind but text, from config and tokenizer (paper section 3.1)."""
        media = {kind: self.family.placeholder(kind) for kind in MEDIA}
        special = sorted(self.family.special() - set(media.values()))
        return {"special": special, **{k: [] if i is None else [i] for k, i in media.items()}}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The base kinds that this model's prompts can hold."""
        return tuple(k for k in KINDS if k == "text" or self.token_ids[k])

    @property
    def fingerprint(self) -> dict[str, str]:
        """All that makes this model's numbers: files or commit, adapter, settings, template."""
        commit = getattr(self.model.config, "_commit_hash", None)
        return ({"commit": commit} if commit else self._origin) | {
            "class": type(self.model).__name__,
            "family": self.family.identity(),
            "dtype": str(self.model.dtype),
            "attention": str(self.text_config._attn_implementation).removesuffix(SUFFIX),
            "template": hashlib.sha256(str(self.family.template).encode()).hexdigest(),
            **{name: str(value) for name, value in self.settings.items()},
        }

    @cached_property
    def _origin(self) -> dict[str, str]:
        """What was loaded, whatever lies there later: files, or what is in memory."""
        if files := shipped.content(Path(self.name)):
            return files
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            raw = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(name.encode() + raw.tobytes())
        made = self.processor.to_json_string() if hasattr(self.processor, "to_json_string") else ""
        words = sorted(self.tokenizer.get_vocab().items())
        return {
            "weights": digest.hexdigest(),
            "processor": hashlib.sha256(f"{made}{words}".encode()).hexdigest(),
        }

    tap = tap  # the way in
    generate, choose, logprob = answering.generate, answering.choose, answering.logprob

    def encode(self, samples: Iterable) -> transformers.BatchFeature:
        """Left-padded model inputs for the samples, on the model's device; ids [batch, token].

        Raises RowError for a sample that this model or its processor cannot take.
        """
        for sample in (samples := list(samples)):
            self.family.check(sample, self.kinds)
        try:
            inputs = self.family.inputs(samples)
        except Exception as error:
            if len(samples) == 1:
                raise RowError(samples[0].benchmark, samples[0].row, "prompt", error) from error
            for sample in samples:
                self.encode([sample])  # raises if it is this one's fault
            raise ValueError(
                f"{self.name}: its {type(self.processor).__name__} takes each of these "
                f"{len(samples)} samples, but not in one batch ({type(error).__name__}: {error}); "
                "use batch_size=1, or media of one shape"
            ) from error
        if not inputs["attention_mask"][:, -1].all():
            raise ValueError(f"{self.name}: the processor padded on the right; set it to the left")
        batch = transformers.BatchFeature(dict(inputs))
        return batch.to(self.device, dtype=self.model.dtype)  # only floating inputs change dtype

    def gather(
        self, bench, positions: Iterable[int], on_error: str = "raise"
    ) -> tuple[list[int], list, Any, list[str]]:
        """Decode and encode these rows: positions, samples, model inputs, and what was skipped.

        With on_error="skip" rows that fail are left out and named; the inputs are None if all do.
        """
        positions = list(positions)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: use raise or skip")
        try:
            samples = [bench[i] for i in positions]
            return positions, samples, self.encode(samples), []
        except RowError as error:
            if on_error == "raise":
                raise
            if len(positions) == 1:
                return [], [], None, [str(error)]
        alone = [self.gather(bench, [i], "skip") for i in positions]
        kept = [i for one, *_ in alone for i in one]
        skipped = [text for *_, texts in alone for text in texts]
        return (*self.gather(bench, kept)[:3], skipped) if kept else ([], [], None, skipped)

    def batches(self, bench, batch_size: int, label: str = "") -> Iterator[tuple[int, Any]]:
        """(position of the first row, model inputs) of one batch after another, with a bar.

        Where gradients are on, they are cut to what a backward pass, which keeps what a forward
        pass forgets, has memory for.
        """
        for i in tqdm(starts(bench, batch_size), label, leave=False):
            batch = self.encode(bench[i : i + batch_size])
            rows, tokens = batch["input_ids"].shape
            fit = memory.backward_rows(self, tokens) if torch.is_grad_enabled() else rows
            if fit >= rows:
                yield i, batch
                continue
            for j in range(i, i + rows, fit):
                yield j, self.encode(bench[j : min(j + fit, i + rows)])

    def forward(self, batch, keep: int = 1) -> Any:
        """The prompt's forward pass (prefill), with logits of the last `keep` tokens only."""
        with self.last_logits(keep):
            return self.model(**batch, use_cache=False)

    @contextmanager
    def last_logits(self, keep: int = 1) -> Iterator[None]:
        """The output layer sees the last `keep` tokens only: not all models take logits_to_keep."""
        if (head := self.model.get_output_embeddings()) is None:
            yield
            return
        handle = head.register_forward_pre_hook(lambda _, seen: (seen[0][:, -keep:], *seen[1:]))
        try:
            yield
        finally:
            handle.remove()


def starts(bench, batch_size: int) -> range:
    """Where the batches of a benchmark start; refuses what has no rows or no batch size."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give a positive number")
    if not len(bench):
        raise ValueError(f"benchmark {getattr(bench, 'name', '')!r} has no rows; raise its limit")
    return range(0, len(bench), batch_size)


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    processor_kwargs: dict | None = None,
    **model_kwargs,
) -> MLLM:
    """Load a transformers model and its processor from a hub id or a local folder.

    device defaults to the accelerator if there is one, dtype to the checkpoint's. processor_kwargs
    (min_pixels, max_pixels, ...) and model_kwargs (device_map, attn_implementation,
    quantization_config, ...) reach the two `from_pretrained`. ValueError when parts are not found
    or cannot be told apart (`families`).
    """
    name, settings = str(name), dict(processor_kwargs or {})
    path = shipped.checkpoint(name)
    config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
    cls = cls or transformers.AutoModelForCausalLM
    places = processes.own_devices() if model_kwargs.get("device_map") == "auto" else {}
    model = cls.from_pretrained(path, revision=revision, dtype=dtype, **places, **model_kwargs)
    if model_kwargs.get("device_map") is None and getattr(model, "hf_quantizer", None) is None:
        model.to(device or processes.device())
    processor = transformers.AutoProcessor.from_pretrained(path, revision=revision, **settings)
    # Where its parts lie changes nothing, and the model knows which attention it runs.
    others = ("device_map", "attn_implementation")
    settings |= {key: value for key, value in model_kwargs.items() if key not in others}
    part = FAMILIES.get(type(model).__name__, Family).part(model)
    return MLLM(part, processor, name, settings)
