"""What mining and silencing cost at 7 B on one accelerator in bfloat16, and what limits each.

The decoder is Qwen2-VL-7B's 28 layers with random weights, without its large vocabulary and tower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import minerlib as ml
from minerlib.findings.last_token import last_token_flow
from minerlib.gradients import slopes

from .harness import (
    NEW_TOKENS,
    alternate,
    generate,
    line,
    prompt,
    ratio,
    real_width,
    scored_and_plain,
    two_percent,
)

LAYERS = 28
PROMPTS = [(320, 8), (1280, 1), (1280, 8), (4096, 1), (4096, 4)]  # tokens, batch
ANSWERS = [(320, 1), (320, 16)]
BACKWARD, TOKENS = (1, 2, 4, 8), 750
GIB = 2**30


def limits(device: str, side: int = 8192) -> tuple[float, float]:
    """What the accelerator gives in bfloat16: FLOP/s of a large product, bytes/s of a copy."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    whole = torch.empty(8 * side * side, device=device, dtype=torch.bfloat16)
    sides = {"product": lambda: a @ b, "copy": whole.clone}
    seconds = {name: float(np.median(s)) for name, s in alternate(sides, 10).items()}
    return 2 * side**3 / seconds["product"], 2 * whole.nbytes / seconds["copy"]


def peak(device: str, run: Callable[[], object]) -> float:
    """The most memory that a call takes beside what is held before it, GiB."""
    if not torch.cuda.is_available():
        run()
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - held) / GIB


def accelerator(rounds: int, device: str = "cuda", layers: int = LAYERS, **text) -> list[dict]:
    """Scoring over forward, silencing over plain generation, backward passes, each with its limit.

    SystemExit where there is no accelerator.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no accelerator here: the other sections need none")
    mllm = real_width("tiny-qwen2-vl", layers, torch.bfloat16, device, **text)
    flops, bandwidth = limits(device, 8192 if device == "cuda" else 512)
    weights = sum(p.numel() for layer in mllm.layers for p in layer.parameters())
    found = [
        line("limit", "product of 8192 x 8192 in bfloat16", flops / 1e12, "TFLOP/s"),
        line("limit", "copy, bytes read and written", bandwidth / 1e12, "TB/s"),
    ]
    for tokens, batch in PROMPTS:
        inputs, setting = prompt(mllm, tokens, batch), f"7B, {tokens} tokens x {batch}"
        sides = scored_and_plain(mllm, inputs)
        seconds = alternate(sides, rounds)
        more = peak(device, sides["score"]) - peak(device, sides["forward"])
        found.append(ratio("scoring / forward", setting, seconds, 1.05, memory=more * 1024))
        work = 2 * weights * tokens * batch / np.median(seconds["forward"])
        found.append(line("forward, share of the product's speed", setting, work / flops, ""))
    neurons = two_percent(mllm)
    for tokens, batch in ANSWERS:
        inputs, setting = prompt(mllm, tokens, batch), f"7B, {tokens} tokens x {batch}"

        def silenced(inputs=inputs):
            with ml.deactivate(mllm, neurons):
                generate(mllm, inputs)

        seconds = alternate(
            {"silenced": silenced, "plain": partial(generate, mllm, inputs)}, rounds
        )
        found.append(ratio("silenced / plain generation", setting, seconds, 1.02))
        one = alternate({"one": partial(generate, mllm, inputs, 1)}, rounds)["one"]
        step = (np.median(seconds["plain"]) - np.median(one)) / (NEW_TOKENS - 1)
        read = 2 * weights / step  # of bfloat16: each new token reads every weight once
        found.append(line("a new token, share of the copy's speed", setting, read / bandwidth, ""))
    return found + _backward(mllm, device)


def _backward(mllm: ml.MLLM, device: str) -> list[dict]:
    """Seconds and memory of the two backward passes, by rows at once."""
    found = []
    for rows in BACKWARD:
        inputs, answers = prompt(mllm, TOKENS, rows), np.full(rows, 400)
        mllm.encode = lambda samples: prompt(mllm, TOKENS, len(samples))
        flow = partial(last_token_flow, mllm, [None] * rows, answers, batch_size=rows)
        ways = {"last token's saliency": flow}
        ways["gradients at the neurons"] = partial(slopes, mllm, inputs, ["yes"] * rows)
        for name, way in ways.items():
            setting, more = f"7B, {TOKENS} tokens x {rows}", {}
            try:
                more["memory"] = peak(device, way) * 1024
                seconds = alternate({name: way}, 3)[name]
                more |= {"low": seconds.min(), "high": seconds.max()}
                value = float(np.median(seconds))
            except torch.OutOfMemoryError:
                setting, value = f"{setting}: out of memory", None
            found.append(line(f"backward: {name}", setting, value, "s", **more))
    return found
