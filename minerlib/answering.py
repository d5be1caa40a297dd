"""What a model answers: greedy text, one of some letters, how probable an answer is.

Each is a method of `model.MLLM` and takes one encoded batch, padded on the left.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig


@torch.inference_mode()
def generate(mllm, batch, max_new_tokens: int = 32) -> list[str]:
    """Greedy answers, stripped, whatever settings of its own a checkpoint has for generation."""
    new, _ = _generated(mllm, batch, max_new_tokens)
    return [t.strip() for t in mllm.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _generated(mllm, batch, max_new_tokens: int) -> tuple[torch.Tensor, list[int]]:
    """Ids of greedy answers [row, token], and those that end one."""
    # A part of a larger model (Omni's thinker) has no generation settings of its own.
    end = mllm.model.generation_config.eos_token_id or mllm.tokenizer.eos_token_id
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    how |= {"pad_token_id": mllm.tokenizer.pad_token_id, "eos_token_id": end}
    with mllm.last_logits(), _settings(mllm.model, **how):
        tokens = mllm.model.generate(**batch, logits_processor=[lambda _, x: _numbers(mllm, x)])
    return tokens[:, batch["input_ids"].shape[1] :], [end] if isinstance(end, int) else list(end)


@contextmanager
def _settings(model, **how: Any) -> Iterator[None]:
    """These settings of generation in place of a model's own, which fill in for what a call does
    not name."""
    held, model.generation_config = model.generation_config, GenerationConfig(**how)
    try:
        yield
    finally:
        model.generation_config = held


def _numbers(mllm, values: torch.Tensor) -> torch.Tensor:
    """Logits or log-probabilities, if they are numbers: of others a largest would be the first."""
    if values.isnan().any():
        way_out = "try dtype='bfloat16' or 'float32'"
        raise ValueError(f"{mllm.name} in {mllm.model.dtype} gives logits of NaN; {way_out}")
    return values


@torch.inference_mode()
def choose(mllm, batch, choices: Sequence[str]) -> list[str]:
    """The most probable choice at the last prompt token, per row; "A" and " A" both count."""
    ids = []
    for choice in choices:
        forms = [_ids(mllm, text) for text in (choice, f" {choice}")]
        ids.append(sorted({form[0] for form in forms if len(form) == 1}))
        if not ids[-1]:
            raise ValueError(f"{mllm.name}: the choice {choice!r} is not a single token")
    probs = _numbers(mllm, mllm.forward(batch).logits[:, -1].float().softmax(-1))
    best = torch.stack([probs[:, i].sum(-1) for i in ids]).argmax(0)
    return [choices[i] for i in best.tolist()]


@torch.inference_mode()
def logprob(mllm, batch, answers: Sequence[str]) -> list[float]:
    """Mean log-probability per token, in nats, of each row's answer right after its prompt."""
    return logprobs(mllm, batch, answers).tolist()


def logprobs(mllm, batch, answers: Sequence[str]) -> torch.Tensor:
    """`logprob` as a tensor [row], which can be differentiated; one forward pass."""
    whole, new, told = continued(mllm, batch, answers)
    if empty := [text for text, row in zip(answers, told, strict=True) if not row.any()]:
        raise ValueError(f"{mllm.name}: the answer {empty[0]!r} has no token to be probable")
    keep = new.shape[1] + 1
    logits = mllm.forward(whole, keep).logits[:, -keep:-1].float()
    probs = logits.log_softmax(-1).gather(-1, new[..., None].to(logits.device))[..., 0].cpu()
    return _numbers(mllm, (probs * told).sum(1) / told.sum(1))


def continued(mllm, batch, answers: Sequence[str]) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """The prompts followed by their answers (`begun`), as of `_appended`."""
    last = batch["input_ids"][:, -1].tolist()
    rows = [torch.tensor(begun(mllm, *of)) for of in zip(last, answers, strict=True)]
    return _appended(mllm, batch, rows)


def begun(mllm, last: int, answer: str) -> list[int]:
    """An answer's ids after a prompt whose last token is `last`: as it is after a special token or
    blank space, else with " " before it."""
    met = last in mllm.family.special() or mllm.tokenizer.decode([last])[-1:].isspace()
    return _ids(mllm, answer if met else f" {answer}")


@torch.inference_mode()
def answered(mllm, batch, max_new_tokens: int) -> dict:
    """The prompts followed by what the model generates after them, without what ends it."""
    new, ends = _generated(mllm, batch, max_new_tokens)
    over = torch.isin(new, new.new_tensor(ends)).cumsum(1) > 0
    return _appended(mllm, batch, [row[~of].cpu() for row, of in zip(new, over, strict=True)])[0]


def _appended(mllm, batch, rows: list[torch.Tensor]) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Model inputs with ids after the prompts, these ids, and which are real, both [row, token].

    They are padded on the right, where causal attention does not look.
    """
    shape = batch["input_ids"].shape
    new = pad_sequence(rows, batch_first=True, padding_value=mllm.tokenizer.pad_token_id).long()
    told = torch.arange(new.shape[1]) < torch.tensor([[len(row)] for row in rows])
    more, whole = {"input_ids": new, "attention_mask": told}, dict(batch)
    for name, value in batch.items():
        if getattr(value, "shape", None) == shape:  # of what is per token, nothing else applies
            added = more.get(name, torch.zeros_like(new)).to(value)
            whole[name] = torch.cat([value, added], 1)
    return whole, new, told


def _ids(mllm, text: str) -> list[int]:
    return mllm.tokenizer.encode(text, add_special_tokens=False)
