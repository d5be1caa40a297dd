"""Neurons to hand on: a file with a card, that another decoder refuses, here or on the hub.

ml.save_neurons(neurons, "my-neurons", mllm, method={"ratio": 0.02})
with ml.deactivate(mllm, ml.load_neurons("user/their-neurons", mllm)):
    ...
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import xarray as xr
from torch.nn.utils.rnn import pad_sequence

from minerlib.artifacts import atomically
from minerlib.model import MLLM
from minerlib.selection import unique

FILE, CARD = "neurons.nc", "README.md"
_VALUES = 16  # of every weight matrix of a layer, by which a model is known again


def save_neurons(
    neurons: xr.DataArray,
    folder: str | Path,
    mllm: MLLM,
    *,
    rows: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    effect: str = "",
) -> Path:
    """Write neurons, bool [modality, layer, neuron], and a card into a folder.

    The card says whose they are (the model and its files' hashes), the rows that they were found
    on, by which method, how many there are of each modality, and the effect that was measured.
    Values of the model's weights go with them, by which `load_neurons` knows it again.
    """
    names = [str(m) for m in neurons.modality.values]
    expected = mllm.n_layers, mllm.n_neurons
    if neurons.dtype != bool or neurons.shape[1:] != expected:
        what = f"neurons is {neurons.dtype} {neurons.shape}"
        raise ValueError(f"{what}; {mllm.name} has bool [modality, {expected[0]}, {expected[1]}]")
    about = {
        "model": Path(mllm.name).name,
        "fingerprint": mllm.fingerprint,
        "rows": dict(rows or {}),
        "method": dict(method or {}),
        "neurons": dict(zip(names, neurons.values.sum((1, 2)).tolist(), strict=True)),
        "different": unique(neurons),
        "effect": effect,
    }
    parts: dict[str, Any] = {
        "neurons": (("modality", "layer", "neuron"), neurons.values.astype("int8"))
    }
    parts["weights"] = (("layer", "value"), _signature(mllm))
    out = xr.Dataset(parts, {"modality": names}, {"card": json.dumps(about)})
    out["neurons"].encoding = {"zlib": True}
    folder = Path(folder)
    atomically(folder / FILE, lambda part: out.to_netcdf(part, engine="h5netcdf"))
    atomically(folder / CARD, lambda part: part.write_text(_told(about)))
    return folder


def load_neurons(
    source: str | Path,
    mllm: MLLM | None = None,
    *,
    subfolder: str = "",
    revision: str | None = None,
) -> xr.DataArray:
    """Neurons that `save_neurons` wrote: from a folder, its file, or a repository of the hub.

    bool [modality, layer, neuron], the card as a dict in attrs["card"]. With mllm, ValueError if
    they are of another model: another class, another shape, or weights that differ by more than
    rounding to 16 bits.
    """
    path = Path(source, subfolder) if Path(source).is_dir() else Path(source)
    if path.is_dir():
        path /= FILE
    if not path.is_file():
        if not str(source).count("/") == 1 or str(source).startswith((".", "/")):
            raise FileNotFoundError(
                f"no neurons in {source}: give a folder with {FILE}, or a hub id"
            )
        name = f"{subfolder}/{FILE}" if subfolder else FILE
        path = Path(huggingface_hub.hf_hub_download(str(source), name, revision=revision))
    held = xr.load_dataset(path, engine="h5netcdf")
    card = json.loads(held.attrs["card"])
    if mllm is not None:
        _same(held, card, mllm)
    neurons = held["neurons"].astype(bool).assign_attrs(card=card)
    return neurons.assign_coords(layer=range(neurons.sizes["layer"]))


def push_neurons(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Put a folder of neurons, or of such folders, into a repository of the hub; its address."""
    if not (found := sorted(Path(folder).rglob(FILE))):
        raise FileNotFoundError(f"no {FILE} in {folder}: `save_neurons` writes it")
    hub = huggingface_hub.HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    patterns = [str(file.relative_to(folder).with_name(name)) for file in found
                for name in (FILE, CARD)]  # fmt: skip
    return str(hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=patterns))


def _signature(mllm: MLLM) -> np.ndarray:
    """Values from all over every weight matrix of each decoder layer, float32 [layer, value]; NaN
    at the end of a layer that has fewer."""
    found = []
    for layer in mllm.layers:
        weights = [w for _, w in sorted(layer.named_parameters()) if w.ndim == 2]
        if not weights or not all(w.is_floating_point() and not w.is_meta for w in weights):
            raise ValueError(
                f"{mllm.name}: its weights are quantised or offloaded, so that it cannot be told "
                "which model it is; load it with float weights, or give load_neurons no mllm"
            )
        flat = [w.detach().flatten() for w in weights]
        found.append(torch.cat([w[:: len(w) // _VALUES + 1].float().cpu() for w in flat]))
    return pad_sequence(found, batch_first=True, padding_value=math.nan).numpy()


def _same(held: xr.Dataset, card: Mapping[str, Any], mllm: MLLM) -> None:
    """ValueError unless these neurons are the model's."""
    of = f"these neurons are of {card['model']}"
    kind, own = card["fingerprint"]["class"], type(mllm.model).__name__
    size = held.sizes["layer"], held.sizes["neuron"]
    if kind != own or size != (mllm.n_layers, mllm.n_neurons):
        whose = f"a {kind} of {size[0]} x {size[1]}"
        here = f"a {own} of {mllm.n_layers} x {mllm.n_neurons}"
        raise ValueError(f"{of}, {whose}; {mllm.name} is {here}")
    theirs, mine = held["weights"].values, _signature(mllm)
    if theirs.shape != mine.shape or not np.allclose(
        mine, theirs, rtol=2**-8, atol=1e-6, equal_nan=True
    ):
        raise ValueError(f"{of}, whose weights are not those of {mllm.name}: mine your own model")


def _told(about: Mapping[str, Any]) -> str:
    """The card in words, as the hub shows it."""
    counts = "\n".join(f"| {m} | {n} |" for m, n in about["neurons"].items())
    lists = {k: "\n".join(f"- {a}: {b}" for a, b in about[k].items()) or "- not said"
             for k in ("rows", "method", "fingerprint")}  # fmt: skip
    return (
        "---\ntags: [minerlib, interpretability, neurons]\n---\n"
        f"# Modality-specific neurons of {about['model']}\n\n"
        f"{about['different']} different neurons. A neuron is one unit of the activation "
        "function's output in a decoder layer's gated MLP.\n\n"
        f"| modality | neurons |\n|---|---|\n{counts}\n\n"
        f"**Effect of silencing them:** {about['effect'] or 'not said'}\n\n"
        f"## Found on\n\n{lists['rows']}\n\n## By\n\n{lists['method']}\n\n"
        f"## Of the model\n\n{lists['fingerprint']}\n\n"
        "```python\nimport minerlib as ml\n\n"
        f'neurons = ml.load_neurons("this folder or repository", mllm)  # refuses another decoder\n'
        "with ml.deactivate(mllm, neurons):\n    ...\n```\n"
    )
