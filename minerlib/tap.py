"""The one way into a decoder's forward pass: hooks and attention that leave no trace.

Attention is entered through transformers' own registry of attention functions, so that the
model's kernel makes its output and no transformers source is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from minerlib.model import MLLM

_listeners: dict[int, Callable] = {}  # id of an attention module -> callback


@contextmanager
def tap(
    mllm: MLLM,
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
    hidden(depth, h [batch, token, hidden]) sees the residual stream: at depth 0 what enters the
    first layer, at depth i + 1 what layer i returns. `layers` defaults to all.
    With a cache all fire once for the prompt and once for each new token. Raises RuntimeError when
    a forward pass ends in which a tapped activation or attention never ran.
    """
    chosen = range(mllm.n_layers) if layers is None else list(layers)
    due: set[tuple[str, int]] = set()
    fired: set[tuple[str, int]] = set()

    def told(what: str, i: int, callback: Callable) -> Callable:
        due.add((what, i))

        def tell(*args):
            fired.add((what, i))
            return callback(i, *args)

        return tell

    def settle(*_) -> None:
        missing = sorted(due - fired)
        fired.clear()
        if missing:
            what = missing[0][0]
            raise RuntimeError(
                f"{mllm.name}: the {what} of layers {[i for w, i in missing if w == what]} never "
                "ran; a fused or compiled kernel passes it by: load the model without it"
            )

    with ExitStack() as stack:
        for i in chosen:
            if activation is not None:
                tell = told("activation", i, activation)
                hook = mllm.activations[i].register_forward_hook(lambda m, a, out, t=tell: t(out))
                stack.callback(hook.remove)
            if hidden is not None:
                hook = mllm.layers[i].register_forward_hook(
                    lambda m, a, out, i=i: hidden(i + 1, out[0] if isinstance(out, tuple) else out)
                )
                stack.callback(hook.remove)
            if attention is not None:
                modules = [id(m) for m in mllm.layers[i].modules()]
                stack.enter_context(_listen(i, modules, told("attention", i, attention)))
        if hidden is not None and layers is None:
            hook = mllm.layers[0].register_forward_pre_hook(
                lambda m, args, kwargs: hidden(0, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        if attention is not None:
            stack.enter_context(_routed(mllm))
        if due:
            stack.callback(mllm.model.register_forward_hook(settle).remove)
        yield


def _attend(module, query, key, value, attention_mask, *args, **kwargs):
    """Tell the listener of this attention module, then run the model's own attention."""
    own = module.config._attn_implementation.removesuffix("+miner")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    if (listener := _listeners.get(id(module))) is not None:
        mask = listener(query, key, attention_mask, kwargs.get("scaling"))
        attention_mask = attention_mask if mask is None else mask
    return attention(module, query, key, value, attention_mask, *args, **kwargs)


@contextmanager
def _listen(layer: int, modules: list[int], tell: Callable) -> Iterator[None]:
    if taken := [m for m in modules if m in _listeners]:
        raise RuntimeError(f"layer {layer}: attention is tapped already; {len(taken)} listener(s)")
    _listeners.update(dict.fromkeys(modules, tell))
    try:
        yield
    finally:
        for m in modules:
            del _listeners[m]


@contextmanager
def _routed(mllm: MLLM) -> Iterator[None]:
    """Route the decoder's attention through `_attend`."""
    modules = [m for layer in mllm.layers for m in layer.modules() if hasattr(m, "config")]
    configs = {id(m.config): m.config for m in modules}
    own = next(iter(configs.values()))._attn_implementation
    name = f"{own}+miner"
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    for config in configs.values():
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = own
