"""Several processes on one run, one a device: who does what, and how all come to the same results.

    accelerate launch -m minerlib notebooks/02_importance_scores.ipynb limit=500
    torchrun --nproc-per-node 2 -m minerlib notebooks/05_two_percent_deactivation.ipynb

All run the same code. `score` and `evaluate` deal out whole batches, which are the same for any
number of processes, and end with the same sums and answers in all; `Workbook.each` deals out whole
conditions; an artefact is written by the first process. One that fails ends the others: what they
wait for never comes, and their launcher stops them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

Value = TypeVar("Value")
_apart = False


def _joined() -> bool:
    """Whether this is one of several processes that share their work now."""
    if _apart or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    # Meets the others, once. They may wait long; of one that dies the launcher knows.
    PartialState(timeout=timedelta(days=7))
    return dist.is_initialized()


def size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """Which of them this is; the first is 0."""
    return dist.get_rank() if _joined() else 0


def device() -> torch.device:
    """Where this process computes: an accelerator of its own, if there are any."""
    if _joined():
        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def own_devices() -> dict[str, Any]:
    """For device_map="auto": this process's part of the accelerators, as `max_memory`."""
    if size() == 1:
        return {}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))  # of several machines, on this one
    which = int(os.environ.get("LOCAL_RANK", rank()))
    each = torch.cuda.device_count() // here
    if not each:
        raise ValueError(
            f"device_map='auto' with {here} processes: each needs an accelerator of its own, and "
            f"there are {torch.cuda.device_count()}; take fewer processes"
        )
    own = range(which * each, (which + 1) * each)
    return {"max_memory": {i: torch.cuda.mem_get_info(i)[0] for i in own}}


@contextmanager
def apart() -> Iterator[None]:
    """Work alone meanwhile, as if there were no others."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def dealt(costs: Sequence[float]) -> list[int]:
    """The pieces of work of this process, in their order.

    Dealt out longest first, each to the process that has least to do so far.
    """
    loads, own = [0.0] * size(), []
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[piece]
        if least == rank():
            own.append(piece)
    return sorted(own)


def gathered(value: Value) -> list[Value]:
    """Every process's value, in order of rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def agreed(value: Value) -> Value:
    """The first process's value."""
    return gathered(value)[0]


def wait() -> None:
    """For all others to come here."""
    gathered(None)


def joined(work: Callable[[], Value]) -> list[Value]:
    """What each process makes of its own share; an error of one is raised in all."""
    if size() == 1:
        return [work()]
    value, fault = None, None
    try:
        value = work()
    except Exception as error:
        fault = error
    told = fault and (isinstance(fault, ValueError), f"{type(fault).__name__}: {fault}")
    parts = gathered((value, told))
    if fault is not None:
        raise fault
    for number, (_, other) in enumerate(parts):
        if other:
            raise (ValueError if other[0] else RuntimeError)(f"process {number}: {other[1]}")
    return [value for value, _ in parts if value is not None]
