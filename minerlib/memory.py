"""What fits: batches in halves, backward passes cut to size, inputs that wait off the device; and
how long prompts are."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import send_to_device

from minerlib.families import RowError


def free(device: torch.device) -> int:
    """Bytes that can still be had there."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def whole(device: torch.device) -> int:
    """Bytes that there are."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    return torch.cuda.mem_get_info(device)[1]


def backward_rows(mllm: Any, tokens: int) -> int:
    """How many prompts of so many tokens a backward pass can hold, at least 1.

    Measured at 7 B in bfloat16: 3.7 GB a row of 750 tokens for saliency and 5.1 GB for gradients at
    the neurons (book/speed.md), 5 and 7 times the bytes of its activations.
    """
    each = 7 * mllm.n_layers * mllm.n_neurons * mllm.model.dtype.itemsize * tokens
    return max(1, free(mllm.device) // each)


def kept(batch: dict, device: torch.device) -> dict:
    """Model inputs where they may wait: on the device while half of it is free, else off it."""
    if device.type == "cpu" or free(device) > whole(device) / 2:
        return batch
    return send_to_device(batch, torch.device("cpu"))


def too_large(sample: Any) -> RowError:
    """The error of a row for which there is not enough memory even alone."""
    way_out = "out of memory: lower max_pixels or frames, or take a smaller dtype"
    return RowError(sample.benchmark, sample.row, "prompt", way_out)


def halves(positions: list[int]) -> list[list[int]]:
    """The rows of a batch that memory was too small for, in two."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn("out of memory: batches that do not fit are run in halves", stacklevel=2)
    half = len(positions) // 2
    return [positions[:half], positions[half:]]


def lengths(bench: Any, on_error: str = "raise") -> np.ndarray:
    """An estimate of the tokens of each row's prompt, of its medium's size; 0 for one that may be
    skipped."""
    found, later = np.zeros(len(bench)), [RowError] if on_error == "skip" else []
    for i in range(len(bench)):
        with suppress(*later):
            found[i] = length(bench[i])
    return found


def length(sample: Any) -> float:
    """A cheap estimate of a prompt's tokens."""
    audio = 0 if sample.audio is None else len(sample.audio) / 640  # 25 tokens a second
    image = 0 if sample.image is None else math.prod(sample.image.size) / 28**2
    video = 0 if sample.video is None else math.prod(sample.video.shape[:3]) / (2 * 28**2)
    return len(sample.prompt) / 4 + audio + image + video
