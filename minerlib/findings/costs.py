"""What each step takes in time and memory, and what a larger model would take."""

import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import pandas as pd
import psutil
import torch
from tqdm import tqdm

from minerlib import processes
from minerlib.activity import activity
from minerlib.aggregation import aggregate
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.gradients import gradients
from minerlib.model import MLLM
from minerlib.presets import Preset
from minerlib.scoring import score
from minerlib.selection import select
from minerlib.tasks import Benchmark
from minerlib.tasks.evaluation import evaluate, prepare


@processes.apart()
def steps(
    mllm: MLLM,
    rows: Sequence[Benchmark],
    batch_size: int,
    longest: int | None,
    integrated: int = 4,
) -> dict[str, Callable[[], object]]:
    """What notebooks do with rows, each as a job for `timed`, the bare forward pass first.

    Media are decoded and encoded anew each time but where answers are asked for: prepared rows.
    """
    total = aggregate(score(mllm, bench, batch_size=batch_size) for bench in rows)
    neurons, ready = select(total), [prepare(mllm, bench, batch_size) for bench in rows]

    @torch.inference_mode()
    def forward() -> None:
        for bench in rows:
            for _, batch in mllm.batches(bench, batch_size):
                mllm.forward(batch)

    def silenced(measure: str) -> None:
        with deactivate(mllm, neurons):
            for bench in ready:
                evaluate(mllm, bench, max_new_tokens=longest, measure=measure)

    return {
        "forward pass": forward,
        "scoring (stage 2)": lambda: [score(mllm, b, batch_size=batch_size) for b in rows],
        "selection (stage 4)": lambda: select(total),
        "activity of rivals": lambda: activity(mllm, rows, batch_size=batch_size),
        "gradients of rivals": lambda: gradients(
            mllm, rows, steps=integrated, batch_size=batch_size
        ),
        "log-probability, silenced": lambda: silenced("logprob only"),
        "answers, silenced": lambda: silenced("score"),
    }


@computation(version=1)
@processes.apart()
def timed(jobs: Mapping[str, Callable[[], object]], rounds: int) -> pd.DataFrame:
    """Seconds, and MiB of host memory beyond what was there before, of each job in every round.

    The jobs take turns, so that what else the machine does falls on all; one round before is not
    counted. Columns job, round, seconds, memory.
    """
    lines = []
    for turn in tqdm(range(-1, rounds), "rounds", leave=False):
        for name, job in jobs.items():
            with memory() as peak:
                _settle()
                start = time.perf_counter()
                job()
                _settle()
                seconds = time.perf_counter() - start
            lines.append((name, turn, seconds, peak[0]))
    table = pd.DataFrame(lines, columns=["job", "round", "seconds", "memory"])
    return table[table["round"] >= 0].reset_index(drop=True)


def _settle() -> None:
    """Wait for what runs on an accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def memory() -> Iterator[list[float]]:
    """The most MiB that this process has beyond those at the start, looked at every 5 ms."""
    with suppress(AttributeError, OSError):  # what was freed would be used again, unseen
        ctypes.CDLL(None).malloc_trim(0)
    own, over = psutil.Process(), threading.Event()
    start, most = own.memory_info().rss, [0.0]

    def watch() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], (own.memory_info().rss - start) / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def ratios(times: pd.DataFrame, floor: str) -> pd.DataFrame:
    """Each job's seconds over the floor's of the same round: job, round, ratio."""
    wide = times.pivot(index="round", columns="job", values="seconds")
    wide = wide.div(wide[floor], axis=0)[times["job"].unique()]
    return wide.melt(value_name="ratio", ignore_index=False).reset_index()[
        ["job", "round", "ratio"]
    ]


def whole_run(
    preset: Preset,
    scoring: float,
    *,
    rows: int = 500,
    draws: int = 99,
    sets: int = 250,
    few: int = 24,
    longest: int = 24,
    batch_size: int = 32,
    teraflops: float,
    terabytes: float,
) -> dict[str, float]:
    """Minutes of a run on a preset's model and three benchmarks, worked out (`Preset.minutes`).

    scoring is its ratio to the forward pass; `rows` are mined, `draws` told apart by
    log-probability and `sets` answer with `longest` tokens on `few` rows, on a device that does so
    many operations and reads so many bytes (10^12) a second: for every token that a batch writes
    all weights, in 16 bits.
    """
    prompts, rate = 3 * few, teraflops * 1e12
    steps = longest * math.ceil(prompts / batch_size)
    writing = steps * 2 * preset.billions[0] * 1e9 / (terabytes * 1e12) / 60
    found = {
        f"mining, {rows} rows a benchmark": scoring * preset.minutes(3 * rows, rate),
        f"log-probability of {draws} draws": draws * preset.minutes(prompts, rate),
        f"answers of {sets} sets": sets * (preset.minutes(prompts, rate) + writing),
    }
    return found | {"all": sum(found.values())}
