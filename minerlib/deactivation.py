"""Silencing neurons: as a context manager while the model runs, or baked into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import torch
import xarray as xr

from minerlib.artifacts import computation
from minerlib.model import MLLM


@computation(version=1)
@contextmanager
def deactivate(
    mllm: MLLM,
    neurons: xr.DataArray | np.ndarray,
    modalities: Sequence[str] | None = None,
    mode: str = "zero",
    constants: xr.DataArray | None = None,
) -> Iterator[MLLM]:
    """Set the neurons' activation outputs to a constant while the block runs.

    >>> with deactivate(mllm, neurons, modalities=["image"]):
    ...     table = evaluate(mllm, bench)

    neurons bool [modality, layer, neuron]; modalities defaults to all of them. The constant holds
    at every token, in the prompt and in generation: 0; or, recorded during scoring and passed as
    constants=scores, each neuron's `mean` or its layer's minimum (`min`; the paper's code takes
    the minimum of whatever tensor is at hand, which depends on batch, padding and decode step).
    A forward pass in which a silenced layer's hook does not fire raises RuntimeError.
    """
    chosen = _union(mllm, neurons, modalities)
    values = _constants(mode, constants, chosen)
    index, value = {}, {}
    for layer in np.flatnonzero(chosen.any(-1)).tolist():
        index[layer] = torch.from_numpy(np.flatnonzero(chosen[layer]))
        value[layer] = torch.as_tensor(values[layer][chosen[layer]])

    def silence(layer, x):
        if index[layer].device != x.device or value[layer].dtype != x.dtype:
            index[layer], value[layer] = index[layer].to(x.device), value[layer].to(x)
        if torch.is_grad_enabled():
            x = x.clone()  # in place would break the activation's own backward pass
        x[..., index[layer]] = value[layer]
        return x

    with mllm.tap(activation=silence, layers=list(index)):
        yield mllm


def export(
    mllm: MLLM,
    neurons: xr.DataArray | np.ndarray,
    folder: str | Path,
    modalities: Sequence[str] | None = None,
    note: str = "",
) -> Path:
    """Write a checkpoint whose weights silence the neurons (mode zero), loadable by any engine.

    A neuron reaches the rest of the model only through its column of the MLP's down projection,
    so that column becomes 0. The model in memory is unchanged. What was written is read back and
    compared before the card is written. Raises ValueError for a model that is quantised or partly
    offloaded, and for layers whose down projection is not one plain weight.
    """
    chosen, state = _union(mllm, neurons, modalities), dict(mllm.model.state_dict())
    quantised = getattr(mllm.model, "hf_quantizer", None) is not None
    if absent := [name for name, weight in state.items() if quantised or weight.is_meta]:
        raise ValueError(
            f"{mllm.name}: {len(absent)} weights are quantised or offloaded ({absent[0]}); export "
            "needs it loaded whole, with float weights and a device_map without disk or cpu parts"
        )
    names = {module: name for name, module in mllm.model.named_modules()}
    silenced = {}
    for layer in np.flatnonzero(chosen.any(-1)).tolist():
        key = f"{names[_down_projection(mllm, layer)]}.weight"
        silenced[key] = state[key] = state[key].clone()
        state[key][:, torch.from_numpy(chosen[layer]).to(state[key].device)] = 0
    folder = Path(folder)
    mllm.model.save_pretrained(folder, state_dict=state)
    mllm.processor.save_pretrained(folder)
    _verify(folder, silenced)
    how = dict(getattr(neurons, "attrs", {}))
    counts = "\n".join(f"| {i} | {int(c)} |" for i, c in enumerate(chosen.sum(-1)))
    (folder / "README.md").write_text(
        f"# {Path(mllm.name).name} with {int(chosen.sum())} neurons silenced\n\n"
        f"Made with minerlib from `{Path(mllm.name).name}`: the down-projection columns of the "
        f"neurons selected for {', '.join(modalities or _names(neurons))} are 0, so their "
        f"activations have no effect. Selection: {how or 'given by hand'}. {note}\n\n"
        f"| decoder layer | silenced of {mllm.n_neurons} |\n|---|---|\n{counts}\n"
    )
    return folder


def _verify(folder: Path, silenced: dict[str, torch.Tensor]) -> None:
    """Raises RuntimeError unless the folder holds these weights, whatever it calls them."""
    held: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as tensors:
            held |= dict.fromkeys(tensors.keys(), file)
    for key, weight in silenced.items():
        for name in (n for n in held if n.split(".")[-4:] == key.split(".")[-4:]):
            with safetensors.safe_open(held[name], "pt") as tensors:
                if torch.equal(tensors.get_tensor(name), weight.cpu()):
                    break
        else:
            raise RuntimeError(
                f"{folder} does not hold {key} as it was silenced; do not use this checkpoint"
            )


def _names(neurons) -> list[str]:
    return [str(m) for m in np.asarray(getattr(neurons, "modality", np.arange(len(neurons))))]


def _union(mllm: MLLM, neurons, modalities) -> np.ndarray:
    """The neurons of the named modalities as one mask, bool [layer, neuron]."""
    values = np.asarray(neurons)
    expected = (mllm.n_layers, mllm.n_neurons)
    if values.dtype != bool or values.ndim != 3 or values.shape[1:] != expected:
        raise ValueError(
            f"neurons is {values.dtype} {values.shape}; {mllm.name} needs bool [modality, layer, "
            f"neuron] with (layer, neuron) = {expected}"
        )
    if modalities is None:
        return np.asarray(values.any(0))
    modalities = [modalities] if isinstance(modalities, str) else modalities
    names = _names(neurons)
    if missing := sorted(set(modalities) - set(names)):
        raise ValueError(f"no neurons of modality {missing}; there are {names}")
    return np.asarray(values[[name in modalities for name in names]].any(0))


def _constants(mode: str, constants, chosen: np.ndarray) -> np.ndarray:
    """The value of each neuron when silenced, float32 [layer, neuron]."""
    if mode == "zero":
        return np.zeros(chosen.shape, np.float32)
    if mode not in ("mean", "min"):
        raise ValueError(f"unknown mode {mode!r}; use zero, mean or min")
    name = f"activation_{mode}"
    if constants is None or name not in constants.coords:
        raise ValueError(f"mode {mode!r} needs what scoring recorded: pass constants=scores")
    values = constants[name].values
    values = values[:, None] if mode == "min" else values
    if len(values) != len(chosen) or values.shape[1] not in (1, chosen.shape[1]):
        raise ValueError(f"{name} is {values.shape}, of another model; the neurons {chosen.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} is not finite: mine again, with dtype='bfloat16' or 'float32'")
    return np.broadcast_to(values, chosen.shape).astype(np.float32)


def _down_projection(mllm: MLLM, layer: int) -> torch.nn.Module:
    down = mllm.family.down_projection(mllm.layers[layer])
    parts = dict(down.named_parameters()) if down is not None else {}
    if "weight" not in parts or set(parts) - {"weight", "bias"}:
        raise ValueError(
            f"layer {layer}: no down projection of one weight; export cannot silence it"
        )
    if not parts["weight"].is_floating_point():
        raise ValueError(f"layer {layer}: its down projection is quantised; export needs floats")
    return down
