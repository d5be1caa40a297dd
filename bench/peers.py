"""Capturing every layer's neurons, and all of stage 2, with other libraries beside minerlib.

Each way returns what it captured, so that all are seen to capture the same. A library that does not
take the model says so in its line of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version

import torch

import minerlib as ml
from minerlib.separation import stack
from tests import reference

from .harness import (
    REAL,
    TEXT,
    alone,
    alternate,
    forget_peak,
    forward,
    line,
    prompt,
    ratio,
    real_width,
    rows_of,
    stand_in,
)

Way = Callable[[], list[torch.Tensor]]


def with_minerlib(mllm: ml.MLLM, batch) -> Way:
    def capture():
        seen = []
        with torch.inference_mode(), mllm.tap(activation=lambda i, x: seen.append(x)):
            mllm.forward(batch)
        return seen

    return capture


def with_nnsight(mllm: ml.MLLM, batch) -> Way:
    from nnsight import NNsight

    wrapped = NNsight(mllm.model)

    def capture():
        # nnsight rewrites the body of its own `with`, so no other context shares the line.
        with torch.inference_mode():  # noqa: SIM117
            with wrapped.trace(**batch, use_cache=False, logits_to_keep=1):
                seen = list().save()
                for layer in wrapped.model.language_model.layers:
                    seen.append(layer.mlp.act_fn.output)
        return seen

    return capture


def with_pyvene(mllm: ml.MLLM, batch) -> Way:
    import pyvene

    kept: dict[str, torch.Tensor] = {}
    path = "model.language_model.layers[{}].mlp.act_fn.output"

    def keep(name):
        def see(base, source=None, *args, **kwargs):
            kept[name] = base
            return base

        return see

    wanted = [{"component": path.format(i), "intervention": keep(i)} for i in range(mllm.n_layers)]
    wrapped = pyvene.IntervenableModel(wanted, model=mllm.model)
    wrapped.disable_model_gradients()

    def capture():
        kept.clear()
        with torch.inference_mode():
            wrapped({**batch, "use_cache": False, "logits_to_keep": 1})
        return [kept[i] for i in range(mllm.n_layers)]

    return capture


@lru_cache(maxsize=1)  # a model that is done with is let go
def bridged(mllm: ml.MLLM):
    """The model behind transformer-lens' hooks; it stays behind them."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        mllm.name, hf_model=mllm.model, tokenizer=mllm.tokenizer, device="cpu"
    )


def with_transformer_lens(mllm: ml.MLLM, batch) -> Way:
    bridge = bridged(mllm)
    # It hooks the gate before its activation function and the product after it: apply the former.
    names = [f"blocks.{i}.mlp.hook_pre" for i in range(mllm.n_layers)]

    def capture():
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(batch["input_ids"], names_filter=names)
            return [act(cache[n]) for n, act in zip(names, mllm.activations, strict=True)]

    return capture


# --- the whole job: all neurons scored by the paper's five metrics ------------------------------

JOB, ASKED = "smol-qwen2-audio", 8
Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of a layer: queries, keys, activations


def job() -> tuple[ml.MLLM, ml.benchmarks.Benchmark]:
    return stand_in(JOB), rows_of("libri", ASKED)


def summed(mllm: ml.MLLM, rows, take: Callable[[dict], list[Taken]]) -> torch.Tensor:
    """Mean scores [layer, metric, set, neuron] of what another library takes out of the model."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    total: list = [0] * mllm.n_layers
    decoder = mllm.model.get_decoder()
    for sample in rows:
        batch = mllm.encode([sample])
        masks = stack(ml.separate(mllm, batch))[0]
        places = torch.arange(masks.shape[-1])[None]
        for i, (query, key, x) in enumerate(take(batch)):
            wide = mllm.layers[i].self_attn.head_dim
            query, key = (v.view(*v.shape[:2], -1, wide).transpose(1, 2) for v in (query, key))
            query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(x, places))
            total[i] = total[i] + reference.plain_importance(x[0], query[0], key[0], masks)
    return torch.stack(total) / len(rows)


def job_of_minerlib(mllm: ml.MLLM, rows) -> torch.Tensor:
    found = ml.score(mllm, rows).transpose("layer", "metric", "modality", "neuron")
    return torch.from_numpy(found.values)


@torch.inference_mode()
def job_of_nnsight(mllm: ml.MLLM, rows) -> torch.Tensor:
    from nnsight import NNsight

    wrapped = NNsight(mllm.model)

    def take(batch):
        with wrapped.trace(**batch, use_cache=False):
            seen = list().save()
            for layer in wrapped.model.language_model.layers:
                attention = layer.self_attn
                query, key = attention.q_proj.output, attention.k_proj.output
                seen.append((query, key, layer.mlp.act_fn.output))
        return seen

    return summed(mllm, rows, take)


@torch.inference_mode()
def job_of_pyvene(mllm: ml.MLLM, rows) -> torch.Tensor:
    import pyvene

    kept: dict[tuple[int, str], torch.Tensor] = {}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "mlp.act_fn")

    def keep(name):
        def see(base, source=None, *args, **kwargs):
            kept[name] = base
            return base

        return see

    wanted = [
        {"component": f"model.language_model.layers[{i}].{part}.output",
         "intervention": keep((i, part))}
        for i in range(mllm.n_layers) for part in parts
    ]  # fmt: skip
    wrapped = pyvene.IntervenableModel(wanted, model=mllm.model)
    wrapped.disable_model_gradients()

    def take(batch):
        wrapped({**batch, "use_cache": False})
        return [tuple(kept[i, part] for part in parts) for i in range(mllm.n_layers)]

    return summed(mllm, rows, take)


@torch.inference_mode()
def job_of_transformer_lens(mllm: ml.MLLM, rows) -> torch.Tensor:
    bridge, parts = bridged(mllm), ("attn.hook_q", "attn.hook_k", "mlp.hook_pre")
    names = [f"blocks.{i}.{part}" for i in range(mllm.n_layers) for part in parts]

    def take(batch):
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        _, kept = bridge.run_with_cache(batch["input_ids"], names_filter=names, **rest)
        taken = []
        for i, act in enumerate(mllm.activations):
            query, key, x = (kept[f"blocks.{i}.{part}"] for part in parts)
            taken.append((query.flatten(2), key.flatten(2), act(x)))
        return taken

    return summed(mllm, rows, take)


JOBS = {
    "minerlib": job_of_minerlib,
    "nnsight": job_of_nnsight,
    "pyvene": job_of_pyvene,
    "transformer-lens": job_of_transformer_lens,
}


def _job(name: str) -> float:
    """Do the job once; returns what was held before, MiB."""
    mllm, rows = job()
    before = forget_peak()
    JOBS[name](mllm, rows)
    return before


def whole_job(rounds: int) -> list[dict]:
    """Seconds of the whole job over minerlib's, and the most memory each takes for it."""
    mllm, rows = job()
    expected = job_of_minerlib(mllm, rows)
    setting, found = f"{JOB}, {ASKED} rows of libri", []
    for name, do in JOBS.items():
        label = "minerlib" if name == "minerlib" else f"{name} {version(name)}"
        theirs, _ = job()  # a library may keep the model behind its hooks
        # A mean, for one sign moves `prob` by 1 / tokens.
        off = (do(theirs, rows) - expected).abs().mean().item()
        sides = {name: partial(do, theirs, rows), "own": partial(job_of_minerlib, mllm, rows)}
        before, peak = alone(_job, name)
        what = f"{label}, {setting}" + (", OTHER VALUES" if off > 1e-4 else "")
        seconds = alternate(sides, max(3, rounds // 2))
        found.append(ratio("whole job / minerlib", what, seconds, memory=peak - before))
    return found


# --- capturing alone -----------------------------------------------------------------------------

WAYS = {
    "minerlib": with_minerlib,
    "nnsight": with_nnsight,
    "pyvene": with_pyvene,
    "transformer-lens": with_transformer_lens,
}


def _footprint(model: str, tokens: int, way: str | None) -> float:
    """Capture once, or only run; returns what was held before, MiB, with libraries and model."""
    mllm = real_width(model)
    batch = prompt(mllm, tokens)
    run = partial(forward, mllm, batch) if way is None else WAYS[way](mllm, batch)
    before = forget_peak()
    run()
    return before


def _extra(model: str, tokens: int, way: str | None) -> float:
    """The most memory a capture adds to what the process holds, MiB."""
    before, peak = alone(_footprint, model, tokens, way)
    return peak - before


def capture(rounds: int, tokens: int = 320) -> list[dict]:
    """Seconds over the plain forward pass, and peak memory over its, for each way that works."""
    found = []
    for model in TEXT:
        mllm = real_width(model)
        batch = prompt(mllm, tokens)
        truth = with_minerlib(mllm, batch)()
        plain = _extra(model, tokens, None)

        for name, way in WAYS.items():
            try:
                label = "minerlib" if name == "minerlib" else f"{name} {version(name)}"
                run = way(mllm, batch)
                same = all(
                    torch.allclose(a, b, atol=1e-4) for a, b in zip(truth, run(), strict=True)
                )
            except PackageNotFoundError:
                raise SystemExit(f"{name} is missing: pip install -e '.[bench]'") from None
            except Exception as error:  # what a library says of a model it does not take
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
                setting = f"{label}, {REAL[model]}: {reason}"
                found.append(line("capture / forward", setting, None, "x"))
                continue
            seconds = alternate({name: run, "forward": partial(forward, mllm, batch)}, rounds)
            setting = f"{label}, {REAL[model]}, {tokens} tokens{'' if same else ', OTHER VALUES'}"
            memory = _extra(model, tokens, name) - plain
            found.append(ratio("capture / forward", setting, seconds, memory=memory))
    return found
