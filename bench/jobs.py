"""Whole jobs over their floors, on a model with a real language model inside."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from accelerate import debug_launcher
from PIL import Image

import minerlib as ml
from minerlib import atlas, processes
from minerlib.tap import hear_once
from minerlib.tasks import media
from minerlib.tasks.evaluation import prepare

from .harness import (
    ROOT,
    alternate,
    exponent,
    forward,
    generate,
    line,
    ratio,
    rows_of,
    stand_in,
    two_percent,
)

MODEL = "smol-qwen2-vl"
ROWS = 24


def whole_jobs(rounds: int) -> list[dict]:
    """Mining, and the atlas' pass over the same rows."""
    mllm, rows = stand_in(MODEL), rows_of("text_vqa", ROWS)

    def passes() -> None:
        for i in range(0, ROWS, 8):
            forward(mllm, mllm.encode(rows[i : i + 8]))

    setting = f"{MODEL}, {ROWS} rows of text_vqa"
    mined = alternate({"score": partial(ml.score, mllm, rows), "forward": passes}, rounds)
    found = [ratio("scoring / forward", setting, mined, 1.15)]
    named = [(layer, 7 * i) for layer in range(mllm.n_layers) for i in range(60)]
    looked = partial(atlas.excited, mllm, {"text_vqa": rows}, named)
    seconds = alternate({"atlas": looked, "forward": passes}, rounds)
    found.append(ratio("atlas / forward", f"{setting}, {len(named)} neurons", seconds, 1.2))
    return found


def conditions(rounds: int) -> list[dict]:
    """Answers of a silenced model over bare generation of as many tokens; their growth."""
    mllm, rows = stand_in(MODEL), rows_of("text_vqa", ROWS)
    ready, neurons = prepare(mllm, rows, 8), two_percent(mllm)

    def condition(seed: int = 0) -> None:
        with ml.deactivate(mllm, two_percent(mllm, seed)):
            ml.evaluate(mllm, ready, max_new_tokens=24)

    with ml.deactivate(mllm, neurons):
        answers = ml.evaluate(mllm, ready, max_new_tokens=24)["answer"]
    lengths = [len(mllm.tokenizer.encode(a)) + 1 for a in answers]  # and what ends an answer
    longest = [max(lengths[i] for i in positions) for positions, *_ in ready.batches]

    def bare() -> None:
        with hear_once(mllm, ready.heard):
            for (_, _, batch, _), n in zip(ready.batches, longest, strict=True):
                generate(mllm, batch, min(n, 24))

    seconds = alternate({"condition": condition, "bare": bare}, rounds)
    setting = f"{MODEL}, {ROWS} rows of text_vqa"
    found = [ratio("a condition of notebook 05 / its floor", setting, seconds, 1.15)]
    many = {n: partial(lambda n: [condition(i) for i in range(n)], n) for n in (1, 2, 4)}
    each = {n: float(np.median(s)) / n for n, s in alternate(many, 3).items()}
    what = "seconds per condition with conditions"
    return [
        *found,
        line("growth of silencing", what, exponent(each), "exponent", 0.05, points=each),
    ]


def loading(rounds: int) -> list[dict]:
    """Rows as samples over the bare decoding of their media's bytes."""
    found = []
    for name, modality in {"text_vqa": "image", "coco_caption": "image", "libri": "audio"}.items():
        bench = rows_of(name, ROWS)
        (file,) = (ROOT / "data/benchmarks" / name).glob("*.parquet")
        rows = pq.read_table(file).to_pylist()
        raw = [media.source_bytes(media.medium(rows[i], modality)) for i in bench.numbers]

        def load(bench=bench) -> None:
            for i in range(ROWS):
                bench[i]

        def decode(raw=raw, modality=modality) -> None:
            for value in raw:
                _bare(modality, io.BytesIO(value))

        seconds = alternate({"load": load, "decode": decode}, rounds)
        setting = f"{ROWS} rows of {name}, {np.median(seconds['load']) / ROWS * 1e3:.2f} ms a row"
        found.append(ratio("loading rows / decoding them", setting, seconds, 1.2))
    large, file = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), np.uint8), io.BytesIO()
    Image.fromarray(large).save(file, "JPEG")
    sides = {
        "load": lambda: media.picture(file.getvalue()),
        "decode": lambda: _bare("image", io.BytesIO(file.getvalue())),
    }
    setting = "a JPEG of 1024 x 768"
    return [*found, ratio("loading / decoding", setting, alternate(sides, 5 * rounds), 1.2)]


def _bare(modality: str, file: io.BytesIO) -> None:
    """What the library that decodes it needs for that alone."""
    if modality == "image":
        Image.open(file).convert("RGB")
    else:
        soundfile.read(file, dtype="float32")


def two_processes(rounds: int) -> list[dict]:
    """One process on one core over twice two processes on two: 1 is a perfect share."""
    mllm, rows, threads = stand_in(MODEL), rows_of("text_vqa", 32), torch.get_num_threads()
    torch.set_num_threads(1)

    def timed() -> None:
        processes.wait()
        seconds = alternate({"all": partial(ml.score, mllm, rows)}, 3)["all"]
        if processes.rank() == 0:
            np.save(file, seconds)

    file = ROOT / "runs/bench-processes.npy"
    file.parent.mkdir(exist_ok=True)
    one = alternate({"all": partial(ml.score, mllm, rows)}, 3)["all"]
    debug_launcher(timed, num_processes=2)
    torch.set_num_threads(threads)
    two = np.load(file)
    file.unlink()
    share = float(np.median(one) / np.median(two) / 2)
    setting = f"{MODEL}, {len(rows)} rows of text_vqa, 2 processes on 2 cores"
    return [line("parallel efficiency of scoring", setting, share, "")]
