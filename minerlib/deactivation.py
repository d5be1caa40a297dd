"""Silencing neurons while the model runs; `exporting` bakes it into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
import xarray as xr

from minerlib.artifacts import computation
from minerlib.model import MLLM
from minerlib.separation import BASE_SETS, SETS, separate_new

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
    depends on batch, padding and decode step). Other than a constant are mode="gain", which
    multiplies what they say by the number `constants`, and "resample", which replaces it by what
    they said at one token of its kind in other inputs, constants=`activity.sampled`, picked by the
    token and its place. It holds at every token, in prompt and generation, or only at those of the
    token sets in `where` (as `separate` names them; what is generated is text), which tells those
    who compute at a medium's tokens from those who read them later. RuntimeError when a silenced
    layer's hook does not fire in a forward pass.
    """
    chosen, _ = union(mllm, neurons, modalities)
    values = _values(mode, constants, chosen)
    index = {i: torch.from_numpy(np.flatnonzero(row)) for i, row in enumerate(chosen) if row.any()}
    # [neuron], or of other inputs [token, neuron]
    value = {i: torch.from_numpy(values[..., i, chosen[i]]) for i in index}

    wanted = [where] if isinstance(where, str) else where
    if wanted is not None and not (wanted and set(wanted) <= set(SETS)):
        raise ValueError(f"where={where!r}: use some of the token sets {SETS}")
    there: dict[str, torch.Tensor] = {}

    def locate(module, args, batch):
        sets, ids, mask = separate_new(mllm, batch)
        if wanted is not None:
            there["at"] = torch.stack([sets[name] for name in wanted]).any(0)[..., None]
        if mode == "resample":
            place = mask.cumsum(1)[:, -ids.shape[1] :]  # by it a token is the same in every batch
            there["picked"] = _picked(constants, sets, 7919 * place + ids)

    def silence(layer, x):
        if index[layer].device != x.device or value[layer].dtype != x.dtype:
            index[layer], value[layer] = index[layer].to(x.device), value[layer].to(x)
        if torch.is_grad_enabled():
            x = x.clone()  # in place would break the activation's own backward pass
        new, last = value[layer], -x.shape[1]  # some layers are given the last tokens only
        if mode == "gain":
            new = x[..., index[layer]] * new
        elif mode == "resample":
            new = new[there["picked"][:, last:].to(x.device)]
        if wanted is not None:
            new = torch.where(there["at"][:, last:].to(x.device), new, x[..., index[layer]])
        x[..., index[layer]] = new
        return x

    with ExitStack() as stack:
        if wanted is not None or mode == "resample":
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


def _values(mode: str, constants, chosen: np.ndarray) -> np.ndarray:
    """What a mode sets neurons to or multiplies them by, float32 [layer, neuron]; or, of other
    inputs, [token, layer, neuron]."""
    if mode == "zero":
        return np.zeros(chosen.shape, np.float32)
    if mode == "gain":
        if not (isinstance(constants, int | float) and math.isfinite(constants)):
            raise ValueError(f"mode 'gain' needs a number: constants=2.0, not {constants!r}")
        return np.full(chosen.shape, constants, np.float32)
    if mode == "resample":
        if getattr(constants, "dims", None) != ("token", "layer", "neuron"):
            raise ValueError("mode 'resample' needs constants=minerlib.activity.sampled(...)")
        return _of_this_model(constants.values, chosen, "sampled activations")
    if mode not in ("mean", "min"):
        raise ValueError(f"unknown mode {mode!r}; use zero, mean, min, gain or resample")
    name = f"activation_{mode}"
    if constants is None or name not in getattr(constants, "coords", ()):
        raise ValueError(f"mode {mode!r} needs what scoring recorded: pass constants=scores")
    values = constants[name].values
    if mode == "min":  # its layer's
        values = np.broadcast_to(values[:, None], (len(values), chosen.shape[1]))
    return _of_this_model(values, chosen, name)


def _of_this_model(values: np.ndarray, chosen: np.ndarray, what: str) -> np.ndarray:
    if values.shape[-2:] != chosen.shape:
        raise ValueError(f"{what} is {values.shape}, of another model; the neurons {chosen.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} is not finite: mine again, with dtype='bfloat16' or 'float32'")
    return values.astype(np.float32)


def _picked(sampled: xr.DataArray, sets: dict, number: torch.Tensor) -> torch.Tensor:
    """The sampled token of its kind that stands for each token, [batch, token], by its number."""
    picked = torch.zeros_like(number)
    for kind in (kind for kind in BASE_SETS if sets[kind].any()):
        of_kind = torch.from_numpy(np.flatnonzero(sampled.kind == kind)).to(number)
        if not len(of_kind):
            lack = f"no tokens of {kind!r} among those sampled"
            raise ValueError(f"mode 'resample': {lack}; sample prompts that hold them")
        picked = torch.where(sets[kind], of_kind[number % len(of_kind)], picked)
    return picked


def heads_of(mllm: MLLM) -> tuple[int, int]:
    """Layers and attention heads in each."""
    return mllm.n_layers, mllm.text_config.num_attention_heads


@computation(version=1)
@contextmanager
def silence_heads(mllm: MLLM, heads: np.ndarray) -> Iterator[MLLM]:
    """Set what attention heads write to 0 while the block runs; heads bool [layer, head].

    Their part of what enters the attention's output projection, at every token.
    """
    expected = heads_of(mllm)
    if heads.dtype != bool or heads.shape != expected:
        what = f"heads is {heads.dtype} {heads.shape}"
        raise ValueError(f"{what}; {mllm.name} needs bool [layer, head] of {expected}")

    def silence(module, args, of):
        wide = args[0].shape[-1] // len(of)
        kept = torch.from_numpy(~of).to(args[0].device).repeat_interleave(wide)
        return (args[0] * kept, *args[1:])

    with ExitStack() as stack:
        for layer, of in zip(mllm.layers, heads, strict=True):
            if of.any():
                output = mllm.family.output_projection(layer)
                hook = output.register_forward_pre_hook(partial(silence, of=of))
                stack.callback(hook.remove)
        yield mllm
