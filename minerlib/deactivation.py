"""Silencing neurons while the model runs; `exporting` bakes it into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import xarray as xr

from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.separation import SETS, separate

Neurons = xr.DataArray | np.ndarray
Names = Sequence[str] | None


@computation(version=1)
@contextmanager
def deactivate(
    mllm: MLLM,
    neurons: Neurons,
    modalities: Names = None,
    mode: str = "zero",
    constants=None,
    where: Names = None,
) -> Iterator[MLLM]:
    """Set the neurons' activation outputs to a constant while the block runs.

    >>> with deactivate(mllm, neurons, modalities=["image"]):
    ...     table = evaluate(mllm, bench)

    neurons bool [modality, layer, neuron], modalities called "0", "1", ... without labels; default
    all. The constant is 0; or, recorded in scoring and passed as constants=scores, each neuron's
    `mean` or its layer's minimum (`min`; the paper's code takes that of the tensor at hand, which
    depends on batch, padding and decode step). It holds at every token, in prompt and generation,
    or only at those of the token sets in `where` (as `separate` names them; what is generated is
    text), which tells those who compute at a medium's tokens from those who read them later.
    RuntimeError when a silenced layer's hook does not fire in a forward pass.
    """
    chosen, _ = union(mllm, neurons, modalities)
    values = _constants(mode, constants, chosen)
    index = {i: torch.from_numpy(np.flatnonzero(row)) for i, row in enumerate(chosen) if row.any()}
    value = {i: torch.from_numpy(values[i, chosen[i]]) for i in index}

    wanted = [where] if isinstance(where, str) else where
    if wanted is not None and not (wanted and set(wanted) <= set(SETS)):
        raise ValueError(f"where={where!r}: use some of the token sets {SETS}")
    there: dict[str, torch.Tensor] = {}

    def locate(module, args, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        sets = separate(mllm, {"input_ids": ids, "attention_mask": mask[:, -ids.shape[1] :]})
        there["at"] = torch.stack([sets[name] for name in wanted]).any(0)[..., None]

    def silence(layer, x):
        if index[layer].device != x.device or value[layer].dtype != x.dtype:
            index[layer], value[layer] = index[layer].to(x.device), value[layer].to(x)
        if torch.is_grad_enabled():
            x = x.clone()  # in place would break the activation's own backward pass
        if wanted is None:
            x[..., index[layer]] = value[layer]
        else:
            at = there["at"].to(x.device)
            x[..., index[layer]] = torch.where(at, value[layer], x[..., index[layer]])
        return x

    with ExitStack() as stack:
        if wanted is not None:
            handle = mllm.model.register_forward_pre_hook(locate, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(mllm.tap(activation=silence, layers=list(index)))
        yield mllm


def union(mllm: MLLM, neurons, modalities) -> tuple[np.ndarray, list[str]]:
    """The neurons of the named modalities as one mask, bool [layer, neuron], and the names."""
    values, expected = np.asarray(neurons), (mllm.n_layers, mllm.n_neurons)
    if values.dtype != bool or values.ndim != 3 or values.shape[1:] != expected:
        raise ValueError(
            f"neurons is {values.dtype} {values.shape}; {mllm.name} needs bool [modality, layer, "
            f"neuron] with (layer, neuron) = {expected}"
        )
    names = [str(m) for m in np.asarray(getattr(neurons, "modality", range(len(values))))]
    modalities = [modalities] if isinstance(modalities, str) else modalities
    wanted = names if modalities is None else list(modalities)
    if missing := sorted(set(wanted) - set(names)):
        raise ValueError(f"no neurons of modality {missing}; there are {names}")
    return np.asarray(values[np.isin(names, wanted)].any(0)), wanted


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
    if values.shape != chosen.shape[: values.ndim]:
        raise ValueError(f"{name} is {values.shape}, of another model; the neurons {chosen.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} is not finite: mine again, with dtype='bfloat16' or 'float32'")
    values = values.reshape(len(chosen), -1)  # a minimum is its layer's
    return np.broadcast_to(values, chosen.shape).astype(np.float32)
