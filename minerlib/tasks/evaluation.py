"""Answers and official scores per sample, and paired comparisons of conditions.

prepared = prepare(mllm, bench)                  # encoded once, used under every condition
before = evaluate(mllm, prepared)
with deactivate(mllm, neurons):
    after = evaluate(mllm, prepared)
compare(before, after)                           # mean change per benchmark, with intervals
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from minerlib import inference
from minerlib.tasks import metrics
from minerlib.tasks.rows import Benchmark
from minerlib.tasks.spec import REGISTRY, Sample

if TYPE_CHECKING:
    from minerlib.model import MLLM

KEY = ["benchmark", "row"]
AVERAGE = "average"


@dataclass(frozen=True)
class Prepared:
    """A benchmark whose samples are encoded: batches of like length, on the model's device.

    `samples` are in the benchmark's order and carry no media any more; `batches` pairs positions
    in that order with model inputs.
    """

    benchmark: Benchmark
    samples: list[Sample]
    batches: list[tuple[list[int], Any]]

    def __len__(self) -> int:
        return len(self.samples)


def _length(sample: Sample) -> float:
    """A cheap estimate of a prompt's tokens, to batch samples of like length."""
    audio = 0 if sample.audio is None else len(sample.audio) / 640  # 25 tokens a second
    image = 0 if sample.image is None else math.prod(sample.image.size) / 28**2
    video = 0 if sample.video is None else math.prod(sample.video.shape[:3]) / (2 * 28**2)
    return len(sample.prompt) / 4 + audio + image + video


def _bar(items: Sequence, total: int, text: str, progress: bool) -> Iterable:
    """Progress in samples; `items` are pairs whose first part is a list of samples' positions."""
    off = not progress or os.environ.get("MINER_PROGRESS") == "0"
    with tqdm(total=total, desc=text, unit="sample", disable=off, leave=False) as bar:
        for item in items:
            yield item
            bar.update(len(item[0]))


def prepare(mllm: MLLM, bench: Benchmark, batch_size: int = 32, progress: bool = True) -> Prepared:
    """Encode a benchmark once, pictures through their tower, for many evaluations of its rows.

    All model inputs stay on the model's device: at a real model's size prepare as many rows as
    fit there (Qwen2-VL: some 19 kB per image token in float32), or let `evaluate` encode anew.
    """
    batches, samples = [], {}
    for positions, batch, part in _encode(
        mllm, bench, batch_size, f"encode {bench.name}", progress
    ):
        batches.append((positions, mllm.encode_media(batch)))
        samples |= {
            i: replace(s, image=None, video=None, audio=None)
            for i, s in zip(positions, part, strict=True)
        }
    return Prepared(bench, [samples[i] for i in range(len(bench))], batches)


def _encode(mllm: MLLM, bench: Benchmark, batch_size: int, text: str, progress: bool) -> Iterable:
    """Positions, model inputs and samples of one batch after another, of like length."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give a positive number")
    # Sorting needs a look at every sample; decoding it twice is cheaper than keeping its media.
    order = np.argsort([_length(sample) for sample in bench], kind="stable")
    parts = [(order[i : i + batch_size].tolist(),) for i in range(0, len(order), batch_size)]
    for (positions,) in _bar(parts, len(bench), text, progress):
        samples = [bench[i] for i in positions]
        yield positions, mllm.encode(samples), samples


def evaluate(
    mllm: MLLM,
    bench: Benchmark | Prepared,
    batch_size: int = 32,
    progress: bool = True,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Answer a benchmark greedily and score it, one row per sample in the benchmark's order.

    Samples with choices are answered by the most probable choice at the last prompt token, the
    others by generation of at most `max_new_tokens` (the benchmark's own number by default; a
    silenced model may ramble to the end of it). Batches hold samples of like length;
    `batch_size` counts only where `bench` is not prepared yet.

    Returns
    -------
    Columns benchmark, row, prompt, answer, references, score (in [0, 1]) and the metric's own:
    `cider_d` for captions, `contains` for exact match.
    """
    text = f"answer {(bench.benchmark if isinstance(bench, Prepared) else bench).name}"
    if isinstance(bench, Prepared):
        samples, bench = bench.samples, (prepared := bench).benchmark
        batches = (
            (positions, batch, [samples[i] for i in positions])
            for positions, batch in _bar(prepared.batches, len(samples), text, progress)
        )
    else:
        batches = _encode(mllm, bench, batch_size, text, progress)

    rows: dict[int, dict] = {}
    for positions, batch, part in batches:
        if bench.spec.choices:
            answers = mllm.choose(batch, bench.spec.choices)
        else:
            answers = mllm.generate(batch, max_new_tokens or bench.max_new_tokens)
        for position, sample, answer in zip(positions, part, answers, strict=True):
            rows[position] = {
                "benchmark": sample.benchmark,
                "row": sample.row,
                "prompt": sample.prompt,
                "answer": answer,
                "references": sample.references,
            }
    columns = [*KEY, "prompt", "answer", "references"]
    table = pd.DataFrame([rows[i] for i in range(len(rows))], columns=columns)
    answers, references = table["answer"].tolist(), table["references"].tolist()
    table["score"] = metrics.score(bench.metric, answers, references)
    for column, rows_of in metrics.METRICS[bench.metric].extra.items():
        table[column] = rows_of(answers, references)
    return table


def _scores(table: pd.DataFrame) -> dict[str, np.ndarray]:
    groups = table.groupby("benchmark", sort=False)["score"]
    return {name: group.to_numpy() for name, group in groups}


def _lines(scores: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The lines of a summary: one per benchmark, and the average where there are several."""
    lines = {name: {name: values} for name, values in scores.items()}
    return lines | ({AVERAGE: scores} if len(scores) > 1 else {})


def summarise(table: pd.DataFrame, n: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Mean score with its 95 % bootstrap interval, per benchmark and averaged over benchmarks.

    `corpus` is the benchmark's published figure over these rows (unclipped CIDEr-D, 1 - corpus
    WER, else the mean); the average has none, for the figures have different scales.
    """
    lines = []
    for name, scores in _lines(_scores(table)).items():
        rows = table[table["benchmark"] == name]
        corpus = math.nan
        if name in REGISTRY and len(rows):
            corpus = metrics.corpus_score(REGISTRY[name].metric, rows["answer"], rows["references"])
        interval = inference.bootstrap(scores, n, seed)
        size = sum(map(len, scores.values()))
        lines.append({"benchmark": name, "n": size, **interval._asdict(), "corpus": corpus})
    return pd.DataFrame(lines)


def compare(a: pd.DataFrame, b: pd.DataFrame, n: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """The paired change from `a` to `b` (b - a), per benchmark and averaged over benchmarks.

    Both tables must hold the same rows, in any order; rows are resampled in pairs.

    Returns
    -------
    Columns benchmark, n, a, b (mean scores), difference, low, high (95 % interval).
    """
    pairs = a[[*KEY, "score"]].merge(
        b[[*KEY, "score"]], on=KEY, suffixes=("_a", "_b"), validate="one_to_one"
    )
    if not len(pairs) == len(a) == len(b):
        raise ValueError(
            f"only {len(pairs)} rows are in both tables (of {len(a)} and {len(b)}): evaluate both "
            "conditions on the same samples"
        )
    first = _lines(_scores(pairs.rename(columns={"score_a": "score"})))
    second = _lines(_scores(pairs.rename(columns={"score_b": "score"})))
    lines = []
    for name in first:
        change = inference.paired_bootstrap(first[name], second[name], n, seed)
        means = [np.mean([v.mean() for v in side[name].values()]) for side in (first, second)]
        lines.append(
            {
                "benchmark": name,
                "n": sum(map(len, first[name].values())),
                "a": means[0],
                "b": means[1],
                "difference": change.mean,
                "low": change.low,
                "high": change.high,
            }
        )
    return pd.DataFrame(lines)
