"""The one way into a decoder's forward pass: hooks and attention that leave no trace.

Attention is entered through transformers' own registry of attention functions, so that the
model's kernel makes its output and no transformers source is changed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from minerlib.model import MLLM

SUFFIX = "+miner"  # of the name of an attention that passes through `_attend`
_listeners: dict[int, Callable] = {}  # id of a layer or of a module in it -> callback


@contextmanager
def tap(
    mllm: MLLM,
    *,
    activation: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    attention: Callable[..., torch.Tensor | None] | None = None,
    hidden: Callable[[int, torch.Tensor], None] | None = None,
    written: Callable[[int, torch.Tensor], None] | None = None,
    layers: Iterable[int] | None = None,
) -> Iterator[None]:
    """Call back from inside the decoder's forward pass; everything is undone on exit.

    >>> with mllm.tap(activation=lambda layer, x: print(layer, x.shape)):
    ...     mllm.forward(batch)

    activation(layer, x [batch, token, neuron]) sees the neurons and may return a replacement.
    attention(layer, query, key, mask, scaling) sees rotated queries [batch, head, token, dim]
    and keys [batch, kv head, token, dim], and may return a replacement mask.
    hidden(depth, h [batch, token, hidden]) sees the residual stream: at depth 0 what enters the
    first layer, at depth i + 1 what layer i returns. written(layer, x [batch, token, neuron]) sees
    what enters the down projection. `layers` defaults to all.
    With a cache all fire once for the prompt and once for each new token. RuntimeError when a
    forward pass ends in which a tapped activation or attention never ran; ValueError for the
    attention of layers without queries and keys.
    """
    chosen = range(mllm.n_layers) if layers is None else list(layers)
    taps = (("activation", activation), ("attention", attention), ("written", written))
    due = {(what, i) for what, callback in taps if callback is not None for i in chosen}
    fired: set[tuple[str, int]] = set()

    def tell(callback: Callable, what: str, i: int, *seen: Any) -> Any:
        fired.add((what, i))
        return callback(i, *seen)

    def settle(*seen: Any) -> None:
        missing = sorted(due - fired)
        fired.clear()
        for what, _ in missing:
            raise RuntimeError(
                f"{mllm.name}: the {what} of layers {[i for w, i in missing if w == what]} never "
                "ran; a fused or compiled kernel passes it by: load the model without it"
            )

    def after(module: Any, callback: Callable) -> Any:
        return module.register_forward_hook(
            lambda m, args, out: callback(out[0] if isinstance(out, tuple) else out)
        )

    with ExitStack() as stack:
        for i in chosen:
            if activation is not None:
                told = partial(tell, activation, "activation", i)
                stack.enter_context(after(mllm.activations[i], told))
            if hidden is not None:
                stack.enter_context(after(mllm.layers[i], partial(hidden, i + 1)))
            if written is not None:
                told = partial(tell, written, "written", i)
                down = mllm.family.down_projection(mllm.layers[i])
                enters = down.register_forward_pre_hook(lambda m, args, told=told: told(args[0]))
                stack.enter_context(enters)
        if attention is not None:
            callbacks = {i: partial(tell, attention, "attention", i) for i in chosen}
            stack.enter_context(_routed(mllm, callbacks))
        if hidden is not None and layers is None:
            enters = mllm.layers[0].register_forward_pre_hook(
                lambda m, args, kwargs: hidden(0, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            stack.enter_context(enters)
        if due:
            stack.enter_context(mllm.model.register_forward_hook(settle))
        yield


@contextmanager
def hear_once(mllm: MLLM, memory: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Each sound goes through the audio tower once: what it made is kept in `memory`.

    No condition changes a tower, and a whole window of 30 s, which most encode however short the
    sound, costs a small model more than its decoder. Gradients end at what is kept. Do not copy the
    model meanwhile.
    """
    tower = getattr(mllm.model.base_model, "audio_tower", None)
    if tower is None:
        yield
        return
    own, patched = tower.forward, "forward" in vars(tower)

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = hashlib.sha256()
        for name, value in (*enumerate(args), *kwargs.items()):
            if torch.is_tensor(value):  # the mask too: it tells padding from silence
                flat = value.detach().cpu().contiguous().flatten()
                key.update(f"{name}{value.dtype}{value.shape}".encode())
                key.update(flat.view(torch.uint8).numpy().data)
            elif value is None or isinstance(value, bool | int | float | str):
                key.update(f"{name}{value!r}".encode())
            else:
                return own(*args, **kwargs)
        if (known := (tower, key.hexdigest())) not in memory:
            with torch.inference_mode(False), torch.no_grad():  # for passes with gradients too
                memory[known] = own(*args, **kwargs)
        return memory[known]

    tower.forward = forward
    try:
        yield
    finally:
        if patched:
            tower.forward = own
        else:
            del tower.forward


def _attend(module, query, key, value, attention_mask, *args, **kwargs):
    """Tell the listener of this attention module, then run the model's own attention."""
    own = module.config._attn_implementation.removesuffix(SUFFIX)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    if (listener := _listeners.get(id(module))) is not None:
        mask = listener(query, key, attention_mask, kwargs.get("scaling"))
        attention_mask = attention_mask if mask is None else mask
    return attention(module, query, key, value, attention_mask, *args, **kwargs)


@contextmanager
def _routed(mllm: MLLM, callbacks: Mapping[int, Callable]) -> Iterator[None]:
    """Route the decoder's attention through `_attend`, which tells the layers' callbacks.

    Where it is tapped already the outer tap is told first, and this one sees the mask it made.
    """
    told = {id(m): tell for i, tell in callbacks.items() for m in mllm.layers[i].modules()}
    outer = {i: _listeners[i] for i in told if i in _listeners}
    told |= {i: partial(_in_turn, tell, told[i]) for i, tell in outer.items()}
    modules = [m for layer in mllm.layers for m in layer.modules() if hasattr(m, "config")]
    before = {id(m.config): (m.config, m.config._attn_implementation) for m in modules}
    if other := {i: kind for i, kind in mllm.family.other_mixers().items() if i in callbacks}:
        kinds = ", ".join(sorted({*other.values()}))
        raise ValueError(
            f"{mllm.name}: layers {sorted(other)} are {kinds}, without queries and keys: attn_k, "
            "attn_q and whatever else looks at attention cannot be measured; activations, "
            "silencing, answers and hidden states can"
        )
    own = modules[0].config._attn_implementation.removesuffix(SUFFIX)
    AttentionInterface.register(own + SUFFIX, _attend)
    AttentionMaskInterface.register(own + SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[own])
    _listeners.update(told)
    for config, _ in before.values():
        config._attn_implementation_internal = own + SUFFIX
    try:
        yield
    finally:
        for config, name in before.values():
            config._attn_implementation_internal = name
        for module in told:
            del _listeners[module]
        _listeners.update(outer)


def _in_turn(outer: Callable, inner: Callable, query, key, mask, scaling) -> torch.Tensor | None:
    made = outer(query, key, mask, scaling)
    again = inner(query, key, mask if made is None else made, scaling)
    return made if again is None else again
