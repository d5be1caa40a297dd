"""The training loop that both stand-in models share.

A recipe is a set of *tasks*. A task is a function of a numpy generator that returns rows
(`Row`); every step draws one task, so that a batch holds sequences of about one length and little
padding. The data of step k depend on the seed and on k alone, so a run that was cut off goes on
exactly where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IGNORED = -100
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@dataclass(frozen=True)
class Row:
    """One training sequence: token ids, labels (`IGNORED` where unsupervised), model inputs."""

    ids: list[int]
    labels: list[int]
    media: Mapping[str, torch.Tensor] = field(default_factory=dict)


Task = Callable[[np.random.Generator], Sequence[Row]]


def encode(tokenizer, pieces: Iterable[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Tokenise pieces of text and label the supervised ones.

    The pieces must meet where the tokenizer splits anyway (at special tokens, before a space),
    or the ids differ from those of the whole text.
    """
    texts, supervised = zip(*pieces, strict=True)
    ids, labels = [], []
    for part, learn in zip(tokenizer(list(texts))["input_ids"], supervised, strict=True):
        ids += part
        labels += part if learn else [IGNORED] * len(part)
    return ids, labels


Pieces = list[tuple[str, bool]]  # texts, and whether they are supervised


def chat(turns: Sequence[tuple[str, str | Pieces]], media: str = "") -> Pieces:
    """Pieces of a conversation in the models' chat format, the answers supervised.

    `turns` are (prompt, answer), an answer text or pieces of its own; `media`, the placeholders,
    stands before the first prompt.
    """
    pieces = [(SYSTEM, False)]
    for prompt, answer in turns:
        head = f"<|im_start|>user\n{media}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        told = [(answer, True)] if isinstance(answer, str) else answer
        pieces += [(head, False), *told, ("<|im_end|>", True), ("\n", False)]
        media = ""
    return pieces


def collate(rows: Sequence[Row], pad: int) -> dict[str, torch.Tensor]:
    """Right-pad rows into input_ids, attention_mask, labels [row, token]; concatenate media."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.ids)] = torch.tensor(row.labels)
        mask[i, : len(row.ids)] = 1
    media = {key: torch.cat([row.media[key] for row in rows]) for key in rows[0].media}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **media}


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every matrix from N(0, 1/width), width being what one output sums over.

    transformers' default of 0.02 leaves narrow models nearly linear at the start, and the
    four-choice task then stays at chance for tens of thousands of rows. Biases start at 0; norms
    and other vectors keep their values.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                # An embedding's row, too, is as wide as the model.
                width = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(width))
            elif name.endswith("bias"):
                weight.zero_()


def schedule(step: int, steps: int, warmup: float = 0.05, hold: float = 0.5) -> float:
    """Learning-rate factor: linear warm-up, a plateau, then a cosine anneal to 0."""
    done = step / steps
    if done < warmup:
        return (step + 1) / (warmup * steps + 1)
    if done < hold:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - hold) / (1 - hold)))


def _float32_attention(module, query, key, value, attention_mask, **kwargs):
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("sdpa_float32", _float32_attention)
AttentionMaskInterface.register("sdpa_float32", sdpa_mask)


@contextmanager
def half_precision(model: nn.Module, device: str) -> Iterator[None]:
    """Autocast to bfloat16, but for attention: its backward on CPUs would take half of a step."""
    inner = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    before = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa_float32")
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            yield
    finally:
        inner.set_attn_implementation(before)


def fast_bf16(device: str) -> bool:
    """Whether this machine computes bfloat16 faster than float32."""
    return device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)


def move(batch: Mapping[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """The batch on `device`."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def train(
    model: nn.Module,
    batch_at: Callable[[int, np.random.Generator], tuple[str, dict[str, torch.Tensor]]],
    *,
    steps: int,
    lr: float,
    folder: str | Path,
    name: str,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool | None = None,
    loss_of: Callable[[nn.Module, dict], torch.Tensor] | None = None,
    report: Callable[[int], Mapping[str, float]] | None = None,
    report_every: int = 500,
    save_every: int = 200,
    seconds: float | None = None,
    stop_at: int | None = None,
) -> float:
    """Train with AdamW, resuming from `folder/name.pt` if it is there; returns seconds spent.

    Parameters
    ----------
    batch_at
        Maps the step and its own generator to (task name, batch).
    loss_of
        The loss of a batch; by default the model's own.
    report
        Held-out numbers after a step; printed, and appended to `folder/name.jsonl`.
    bf16
        Run the matrix products in bfloat16 (autocast), by default where that is faster; weights,
        attention and optimizer stay float32.
    seconds, stop_at
        Stop the program after this much time or at this step, with a checkpoint to resume from.
    """
    bf16 = fast_bf16(device) if bf16 is None else bf16
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    model.to(device).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    decayed = [weight for weight in weights if weight.dim() > 1]
    plain = [weight for weight in weights if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
    )
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
    losses: dict[str, float] = {}
    begun = time.monotonic()

    def save(step: int) -> None:
        state = {
            # What is frozen, a caller makes again.
            "model": {n: w for n, w in model.named_parameters() if w.requires_grad},
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": spent + time.monotonic() - begun,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        task, batch = batch_at(step, np.random.default_rng([seed, step]))
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        batch = move(batch, device)
        with half_precision(model, device) if bf16 else nullcontext():
            loss = loss_of(model, batch) if loss_of else model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[task] = 0.95 * losses.get(task, value := loss.item()) + 0.05 * value
        bar.set_postfix({key: f"{value:.2f}" for key, value in losses.items()}, refresh=False)
        last = step + 1 == steps
        if report and (last or (step + 1) % report_every == 0):
            model.eval()
            line = {"step": step + 1, "seconds": round(spent + time.monotonic() - begun)}
            line |= {f"loss {key}": round(value, 3) for key, value in losses.items()}
            line |= {key: round(value, 3) for key, value in report(step + 1).items()}
            model.train()
            tqdm.write(json.dumps(line))
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        over = step + 1 == stop_at or (seconds is not None and time.monotonic() - begun > seconds)
        if last or over or (step + 1) % save_every == 0:
            save(step + 1)
        if over and not last:
            raise SystemExit(f"{name}: stopped after step {step + 1}; run again to go on")
    model.eval()
    return spent + time.monotonic() - begun
