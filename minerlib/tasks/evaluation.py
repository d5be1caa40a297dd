"""Answers and official scores per sample, and paired comparisons of conditions.

prepared = prepare(mllm, bench)                  # encoded once, used under every condition
before = evaluate(mllm, prepared)
with deactivate(mllm, neurons):
    after = evaluate(mllm, prepared)
compare(before, after)                           # mean change per benchmark, with intervals
"""

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from tqdm import tqdm

from minerlib import inference, memory, processes
from minerlib.artifacts import Checkpoint, computation
from minerlib.model import MLLM, starts
from minerlib.tap import hear_once
from minerlib.tasks import REGISTRY, Benchmark, Sample, metrics

KEY, AVERAGE = ["benchmark", "row"], "average"
ASKED = [*KEY, "prompt", "references"]
MEASURES = ("score", "logprob", "logprob only", "choice")
CHOICES = 4
Batch = tuple[list[int], list[Sample], Any, list[str]]  # as of `MLLM.gather`


class Prepared(NamedTuple):
    """A benchmark whose samples are encoded: batches of like length, on the model's device."""

    benchmark: Benchmark
    batches: list[Batch]
    heard: dict[tuple[Any, str], Any]  # as of `hear_once`
    processes: int = 1  # that share its batches


def prepare(
    mllm: MLLM, bench: Benchmark, batch_size: int = 32, on_error: str = "raise"
) -> Prepared:
    """Encode a benchmark once, media through their towers, for many evaluations of its rows.

    Model inputs stay on the model's device while half of it is free, then off it (Qwen2-VL: some
    19 kB per image token in float32; Qwen2-Audio: 5 MB a row). Of several processes each prepares
    its own batches. Errors as in `evaluate`.
    """
    ready = []
    for positions, samples, batch, left_out in _encode(mllm, bench, batch_size, on_error):
        with suppress(torch.OutOfMemoryError):  # then with its rows, in halves
            batch = batch and memory.kept(_encode_media(mllm, batch), mllm.device)
        ready.append((positions, samples, batch, left_out))
    return Prepared(bench, ready, {}, processes.size())


def _encode(mllm: MLLM, bench: Benchmark, batch_size: int, on_error: str) -> Iterator[Batch]:
    """One batch of samples of like length after another."""
    firsts = starts(bench, batch_size)
    # Sorting needs a look at every sample; decoding it twice is cheaper than keeping its media.
    lengths = memory.lengths(bench, on_error)
    order = np.argsort(lengths, kind="stable").tolist()
    parts = [order[i : i + batch_size] for i in firsts]
    own = processes.dealt([lengths[part].sum() for part in parts])
    for part in tqdm([parts[i] for i in own], bench.name, leave=False):
        positions, samples, batch, skipped = mllm.gather(bench, part, on_error)
        light = [replace(s, image=None, video=None, audio=None) for s in samples]
        yield positions, light, batch, skipped


@torch.inference_mode()
def _encode_media(mllm: MLLM, batch: Any) -> dict:
    """The batch with pictures and clips already through their tower, which is never silenced."""
    batch, seen = dict(batch), {}
    if "mm_encoder_outputs" not in inspect.signature(mllm.model.forward).parameters:
        return batch  # a transformers argument that not all models take
    for kind in ("image", "video"):
        if tower := getattr(mllm.model.base_model, f"get_{kind}_features", None):
            given = {k: batch[k] for k in inspect.signature(tower).parameters if k in batch}
            if pixels := [k for k in given if k.startswith("pixel")]:
                seen[kind] = tower(**given, return_dict=True)
                batch = {k: v for k, v in batch.items() if k not in pixels}
    return batch | {"mm_encoder_outputs": seen} if seen else batch


@computation(version=2)
def evaluate(
    mllm: MLLM,
    bench: Benchmark | Prepared,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    on_error: str = "raise",
    measure: str = "score",
    checkpoint: Checkpoint | None = None,
) -> pd.DataFrame:
    """Answer a benchmark greedily and score it, one row per sample in the benchmark's order.

    Samples with choices are answered by the most probable of them: letters at the last prompt
    token, texts (`Spec.options`) by their mean log-probability. The others are answered by
    generation of at most `max_new_tokens` (default: the benchmark's own number). `measure` is
    "score"; "logprob", which adds a column: the mean log-probability per token, in nats, of the
    commonest reference after the prompt; "logprob only", without answers and scores, which takes
    one forward pass; or "choice": the answer is the most probable of `CHOICES`, the row's reference
    and others of the benchmark, and the score whether it is the reference, so that a model need not
    speak to show that it sees. `batch_size` and `on_error` count only where `bench` is not prepared
    yet. With a `checkpoint` rows are kept from time to time, and a rerun continues with the others.
    Raises RowError for a row that cannot be used; on_error="skip" leaves it out, warns and
    names it in attrs["skipped"].

    Columns: benchmark, row, prompt, answer, references, score (in [0, 1]), the metric's own
    (`cider_d` for captions, `contains` for exact match; of a choice `chance`), and `medium`, a hash
    of what is asked of.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: use one of {', '.join(MEASURES)}")
    how = (max_new_tokens, measure)
    if isinstance(bench, Prepared):
        bench, ready, heard, shared = bench
        if shared != processes.size():
            what = f"{bench.name!r} was prepared by {shared} processes, each its part of the rows"
            raise ValueError(f"{what}, and is asked by {processes.size()}: prepare it anew")
        with hear_once(mllm, heard):
            batches = tqdm(ready, bench.name, leave=False)
            return _evaluated(mllm, bench, batches, how, on_error, checkpoint)
    batches = _encode(mllm, bench, batch_size, on_error)
    return _evaluated(mllm, bench, batches, how, on_error, checkpoint)


def _evaluated(mllm, bench, batches, how, on_error, checkpoint) -> pd.DataFrame:
    def own() -> tuple[dict[int, dict], list[str]]:
        rows: dict[int, dict] = (checkpoint and checkpoint.load()) or {}
        skipped: list[str] = []
        for positions, samples, batch, left_out in batches:
            skipped += left_out
            if set(positions) <= set(rows):
                continue
            found, too_large = _asked(mllm, bench, positions, samples, batch, how, on_error)
            rows, skipped = rows | found, skipped + too_large
            if checkpoint:
                checkpoint.save(rows)
        return rows, skipped

    parts = processes.joined(own)
    rows = {i: row for found, _ in parts for i, row in found.items()}
    skipped = [line for _, lines in parts for line in lines]
    if checkpoint:
        checkpoint.done(rows)
    if not rows:
        raise ValueError(f"benchmark {bench.name!r}: every row was skipped: {skipped[0]}")
    if skipped:
        warnings.warn("; ".join(["rows skipped", *skipped]), stacklevel=2)
    table = pd.DataFrame([rows[i] for i in sorted(rows)])
    if "answer" in table:
        table.insert(3, "answer", table.pop("answer"))
        if "score" not in table:  # a choice has its own
            given = table["answer"].tolist(), table["references"].tolist()
            scores = metrics.columns(bench.metric, *given, bench.whole)
            for place, (name, values) in enumerate(scores.items(), start=5):
                table.insert(place, name, values)
    about = bench.media
    table["medium"] = [about[i] for i in sorted(rows)]
    table.attrs["skipped"] = skipped
    return table


def _asked(
    mllm, bench, positions, samples, batch, how, on_error
) -> tuple[dict[int, dict], list[str]]:
    """The lines of these rows, and what was skipped; what memory is too small for, in halves."""
    longest, measure = how
    found: dict[str, list] = {name: [getattr(s, name) for s in samples] for name in ASKED}
    try:
        batch = send_to_device(dict(batch), mllm.device)
        if measure == "choice":
            found["answer"] = _likeliest(mllm, batch, offered(bench, samples))
            right = [s.reference == a for s, a in zip(samples, found["answer"], strict=True)]
            found["score"], found["chance"] = list(map(float, right)), [1 / CHOICES] * len(right)
        elif measure != "logprob only":
            found["answer"] = _answers(mllm, bench, samples, batch, longest)
        if measure.startswith("logprob"):
            found["logprob"] = mllm.logprob(batch, [s.reference for s in samples])
    except torch.OutOfMemoryError:
        if len(positions) == 1 and on_error == "raise":
            raise memory.too_large(samples[0]) from None
        if len(positions) == 1:
            return {}, [str(memory.too_large(samples[0]))]
        parts = memory.halves(positions)
    else:
        lines = [dict(zip(found, line, strict=True)) for line in zip(*found.values(), strict=True)]
        return dict(zip(positions, lines, strict=True)), []
    rows, skipped = dict[int, dict](), list[str]()
    for part in parts:
        some, these, inputs, _ = mllm.gather(bench, part)
        own, left_out = _asked(mllm, bench, some, these, inputs, how, on_error)
        rows, skipped = rows | own, skipped + left_out
    return rows, skipped


def _answers(mllm: MLLM, bench: Benchmark, samples: list[Sample], batch, longest) -> list[str]:
    if bench.spec.choices:
        return mllm.choose(batch, bench.spec.choices)
    if not bench.spec.options:
        return mllm.generate(batch, longest or bench.max_new_tokens)
    return _likeliest(mllm, batch, [s.choices or () for s in samples])


def _likeliest(mllm: MLLM, batch, choices: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each row's choices, as many for all, the one of highest mean log-probability."""
    told = [mllm.logprob(batch, column) for column in zip(*choices, strict=True)]
    return [row[i] for row, i in zip(choices, np.argmax(told, axis=0), strict=True)]


def offered(bench: Benchmark, samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """Each sample's reference behind others of the benchmark, drawn by its row.

    As often as they are references, so that a guess at the commonest is right no more often.
    """
    commonest = [Counter(of).most_common(1)[0][0] for of in bench.whole if any(map(str.strip, of))]
    often = Counter(text.casefold() for text in commonest if text.strip())
    spelt = {text.casefold(): text for text in reversed(commonest)}
    rows = []
    for sample in samples:
        own = {text.casefold() for text in sample.references}
        others = sorted(text for text in often if text not in own)
        if len(others) < CHOICES - 1:
            few = (
                f"{bench.name!r} row {sample.row}: only {len(others)} other answers to choose from"
            )
            raise ValueError(f"{few}; measure='choice' needs {CHOICES - 1}")
        share = np.array([often[text] for text in others], float)
        rng = np.random.default_rng(sample.row)
        drawn = rng.choice(others, CHOICES - 1, replace=False, p=share / share.sum())
        rows.append((*(spelt[str(text)] for text in drawn), sample.reference))
    return rows


Strata = dict[str, np.ndarray]


def by_benchmark(table: pd.DataFrame, column: str) -> Strata:
    """A column's values of each benchmark; of `medium`, where it is missing, one for every row."""
    if column == "medium" and column not in table:
        table = table.assign(medium=np.arange(len(table)))
    return {str(k): v.to_numpy() for k, v in table.groupby("benchmark", sort=False)[column]}


def _scores(table: pd.DataFrame, column: str = "score") -> dict[str, Strata]:
    """Scores by benchmark, for each line of a summary: every benchmark, and their average."""
    if (bad := table.duplicated(KEY) | table[column].isna()).any():
        name, row = table.loc[bad, KEY].iloc[0]
        raise ValueError(f"{name} row {row} is there twice or has no score ({bad.sum()} such rows)")
    scores = by_benchmark(table, column)
    lines = {name: {name: values} for name, values in scores.items()}
    return lines | ({AVERAGE: scores} if len(scores) > 1 else {})


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean score with its 95 % interval (`inference.estimate`), per benchmark and averaged.

    `corpus` is the figure that is published for a benchmark, see `corpus_score`, over these rows.
    """
    lines, media = [], by_benchmark(table, "medium")
    for name, scores in _scores(table).items():
        rows, corpus = table[table["benchmark"] == name], math.nan
        if name in REGISTRY and len(rows) and "chance" not in rows:  # a choice is none
            corpus = _published(REGISTRY[name].metric, rows)
        mean, low, high, *_ = inference.estimate(scores, media)
        lines.append([name, sum(map(len, scores.values())), mean, low, high, corpus])
    return pd.DataFrame(lines, columns=["benchmark", "n", "mean", "low", "high", "corpus"])


def chance(benchmark: str) -> float:
    """The mean score of blind guesses."""
    return REGISTRY[benchmark].chance if benchmark in REGISTRY else 0.0


def guesses(table: pd.DataFrame) -> pd.Series:
    """The same for each row: of a choice, the table's own."""
    return table["chance"] if "chance" in table else table["benchmark"].map(chance)


def above_chance(table: pd.DataFrame) -> float:
    """The mean over benchmarks of the mean score less that of blind guesses."""
    above = table.assign(above=table["score"] - guesses(table))
    return float(np.mean([v.mean() for v in by_benchmark(above, "above").values()]))


def _published(metric: str, rows: pd.DataFrame) -> float:
    """The figure that is published for a benchmark, over these rows."""
    if (column := metrics.metric_of(metric).published) in rows:
        return rows[column].mean()
    return metrics.corpus_score(metric, rows["answer"], rows["references"])


def compare(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The paired change from `a` to `b` (b - a), per benchmark and averaged over benchmarks.

    Both tables must hold the same rows, prompts and references, in any order. Columns: benchmark,
    n, a, b (mean scores), difference, low, high (95 % interval, `inference.change`).
    """
    pairs = paired(a, b)
    media, after, lines = by_benchmark(pairs, "medium"), _scores(pairs, "score_b"), []
    for name, first in _scores(pairs, "score_a").items():
        difference, low, high, *_ = inference.change(first, second := after[name], media)
        means = [np.mean([v.mean() for v in side.values()]) for side in (first, second)]
        lines.append([name, sum(map(len, first.values())), *means, difference, low, high])
    return pd.DataFrame(lines, columns=["benchmark", "n", "a", "b", "difference", "low", "high"])


def _comparable(value: Any) -> Any:
    """References, a list or an array once they were in a file, as a tuple."""
    return value if isinstance(value, str | int) else tuple(value)


def paired(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The rows of two tables of answers side by side, once it is certain that they are the same."""
    for table in (a, b):
        _scores(table)
    if ("chance" in a) != ("chance" in b):
        raise ValueError("one table's answers are choices, the other's are not: measure both alike")
    pairs = inference.matched(a, b, KEY)
    for column in [c for c in ("prompt", "references", "medium") if f"{c}_a" in pairs]:
        one, two = (pairs[f"{column}_{side}"].map(_comparable) for side in "ab")
        other = one != two
        if other.any():
            name, row = pairs.loc[other, KEY].iloc[0]
            what = f"{name} row {row}: its {column} differs ({other.sum()} such rows)"
            why = "the benchmark was changed in between: evaluate both conditions anew"
            raise ValueError(f"{what}, so {why}")
    return pairs.rename(columns={"medium_a": "medium"})
