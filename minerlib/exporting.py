"""Silencing neurons for good: a checkpoint without them, for any engine."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import nn

from minerlib.deactivation import Names, Neurons, union
from minerlib.model import MLLM


def export(
    mllm: MLLM, neurons: Neurons, folder: str | Path, modalities: Names = None, note: str = ""
) -> Path:
    """Write a checkpoint whose weights silence the neurons (mode zero), loadable by any engine.

    neurons and modalities as in `deactivate`. A neuron reaches the rest of the model only through
    its column of the MLP's down projection, which becomes 0; the model in memory is unchanged. What
    was written is read back and compared before the card is written. ValueError for a model that is
    quantised or partly offloaded, and for layers whose down projection is no plain nn.Linear.
    """
    chosen, names = union(mllm, neurons, modalities)
    state, folder = dict(mllm.model.state_dict()), Path(folder)
    quantised = getattr(mllm.model, "hf_quantizer", None) is not None
    if absent := [name for name, weight in state.items() if quantised or weight.is_meta]:
        raise ValueError(
            f"{mllm.name}: {len(absent)} weights are quantised or offloaded ({absent[0]}); export "
            "needs it loaded whole, with float weights and a device_map without disk or cpu parts"
        )
    silenced = {}
    for layer in np.flatnonzero(chosen.any(-1)).tolist():
        name = _down_weight(mllm, layer)
        silenced[name] = weight = state[name].clone()
        weight[:, torch.from_numpy(chosen[layer]).to(weight.device)] = 0
    mllm.model.save_pretrained(folder, state_dict=state | silenced)
    if backend := getattr(mllm.tokenizer, "backend_tokenizer", None):
        backend.no_padding()  # of the last batch, which would be kept as if it were the model's
        backend.no_truncation()
    mllm.processor.save_pretrained(folder)
    _verify(folder, silenced)
    how = dict(getattr(neurons, "attrs", {})) or "given by hand"
    counts = "\n".join(f"| {i} | {int(c)} |" for i, c in enumerate(chosen.sum(-1)))
    (folder / "README.md").write_text(
        f"# {Path(mllm.name).name} with {int(chosen.sum())} neurons silenced\n\n"
        f"Made with minerlib from `{Path(mllm.name).name}`: the down-projection columns of the "
        f"neurons selected for {', '.join(names)} are 0, so their activations have no effect. "
        f"Selection: {how}. {note}\n\n"
        f"| decoder layer | silenced of {mllm.n_neurons} |\n|---|---|\n{counts}\n"
    )
    return folder


def _down_weight(mllm: MLLM, layer: int) -> str:
    """The name of the weight that reads the layer's neurons."""
    down = mllm.family.down_projection(mllm.layers[layer])
    parts = {} if down is None else {name: p.dtype for name, p in down.named_parameters()}
    plain = set(parts) - {"bias"} == {"weight"} and parts["weight"].is_floating_point
    # A Conv1D's weight has its neurons on the other side, and a square one would not say so.
    if not plain or not isinstance(down, nn.Linear):
        found = "none known" if down is None else f"{type(down).__name__} {parts}"
        raise ValueError(
            f"layer {layer}: no down projection of one float weight ({found}) that is an "
            "nn.Linear; export cannot silence it, `deactivate` can"
        )
    return next(f"{name}.weight" for name, m in mllm.model.named_modules() if m is down)


def _verify(folder: Path, silenced: dict[str, torch.Tensor]) -> None:
    """Raises RuntimeError unless the folder holds these weights, whatever it calls them."""
    held = set()
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as tensors:
            for key, name in product(silenced, tensors.keys()):
                alike = key.split(".")[-4:] == name.split(".")[-4:]
                if alike and torch.equal(tensors.get_tensor(name), silenced[key].cpu()):
                    held.add(key)
    for key in (key for key in silenced if key not in held):
        raise RuntimeError(
            f"{folder} does not hold {key} as it was silenced; do not use this checkpoint"
        )
