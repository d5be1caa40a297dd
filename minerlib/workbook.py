"""What every notebook opens with: validated parameters, the model, the rows, the run folder.

wb = Workbook(model="data/models/tiny-qwen2-vl", limit=96)
wb.mining["mmlu"], wb.evaluation["mmlu"]        # disjoint slices
total = wb.total()                              # an earlier stage's artefact
wb.answers(neurons)                             # one row per sample, cached
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
import xarray as xr
import yaml
from tqdm.auto import tqdm

import minerlib
from minerlib.aggregation import aggregate
from minerlib.artifacts import Run, digest
from minerlib.deactivation import deactivate
from minerlib.model import MLLM, load
from minerlib.scoring import METRICS, score
from minerlib.selection import STRATEGIES, WEIGHTINGS, select
from minerlib.separation import SPLITS
from minerlib.tasks import REGISTRY, Benchmark, benchmark
from minerlib.tasks.evaluation import Prepared, evaluate, prepare, summarise
from minerlib.tasks.media import FRAMES

ROOT = Path(minerlib.__file__).parents[1]
SHIPPED = Path("data/benchmarks")

PAPER_BENCHMARKS = {
    "vision": ("text_vqa", "coco_caption", "mmlu", "msvd_qa"),
    "audio": ("mmlu", "libri", "vocal_sound"),
}
"""The benchmarks that the paper uses for Qwen2-VL and for Qwen2-Audio."""

PUBLISHED = {
    "Qwen2-VL-7B-Instruct": {"text_vqa": 0.843},
    "Qwen2-Audio-7B-Instruct": {"libri": 1 - 0.0359, "vocal_sound": 0.936},
}
"""Corpus figures of models as they are: Qwen2-VL's README (TextVQA val), lmms-eval (LibriSpeech
test-clean with the chat template, VocalSound test)."""
FAR = 0.05
"""A figure further than this from the published one, beyond its interval, is far off."""


class NotApplicable(ValueError):
    """A notebook has nothing to measure on this model and these benchmarks; a run goes on."""


class Workbook:
    """Validated parameters of a notebook, and what they name, loaded on first use.

    model        folder or hub id
    benchmarks   names, as a list or comma-separated; default: the paper's for the model's media
    source       "auto" (shipped rows for a shipped stand-in, the hub otherwise), "hub" or a folder
    limit        rows per benchmark for mining, from its start
    eval_limit   rows per benchmark for evaluation, from its end: never the mined ones
    ratio, strategy, weights, split, seed    as in `select`; weights also by name
    min_pixels, max_pixels    bounds of a picture's size, in pixels; default: the processor's own
    frames       at most so many evenly spaced frames of a video
    run_dir      where artefacts go; default runs/<model name>
    Relative paths are taken from the repository's root, wherever the notebook runs. Modules named
    in the environment variable MINER_PLUGINS are imported first: they add benchmarks to `REGISTRY`
    and families to `model.FAMILIES`.
    """

    def __init__(
        self,
        *,
        model: str = "data/models/tiny-qwen2-vl",
        benchmarks: str | Sequence[str] | None = None,
        source: str = "auto",
        limit: int = 96,
        eval_limit: int = 96,
        ratio: float = 0.02,
        strategy: str = "LA_MU",
        weights: str | Mapping[str, float] | Sequence[float] = "default",
        split: str = "special_text_separate",
        seed: int = 0,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        frames: int = FRAMES,
        run_dir: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ):
        for module in os.environ.get("MINER_PLUGINS", "").split():
            importlib.import_module(module)
        _whole("limit", limit, 1)
        _whole("eval_limit", eval_limit, 1)
        _whole("batch_size", batch_size, 1)
        _whole("seed", seed, 0)
        _whole("frames", frames, 1)
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        for name, value in {"max_new_tokens": max_new_tokens, **pixels}.items():
            if value is not None:
                _whole(name, value, 1)
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: a share of all neurons, in (0, 1]")
        _one_of("strategy", strategy, STRATEGIES)
        _one_of("split", split, SPLITS)
        _one_of("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.limit, self.eval_limit, self.batch_size, self.seed = (
            limit,
            eval_limit,
            batch_size,
            seed,
        )
        self.frames = frames
        self.pixels = {k: v for k, v in pixels.items() if v is not None}
        self.ratio, self.strategy, self.split = float(ratio), strategy, split
        self.weights = _weights(weights)
        self._names = _list(benchmarks)
        for name in self._names:
            _one_of("benchmarks", name, REGISTRY)
        self.is_stand_in = (ROOT / model).is_dir() and Path(model).parts[:1] == ("data",)
        self.label = Path(model).name
        # A silenced stand-in can ramble on to the real benchmarks' limits; its own longest
        # reference has about 20 tokens.
        self.max_new_tokens = max_new_tokens or (24 if self.is_stand_in else None)
        self.folder = ROOT / (run_dir or f"runs/{self.label}")
        self._own_figures = run_dir is not None or not self.is_stand_in
        transformers.logging.set_verbosity_error()
        if os.environ.get("MINER_PROGRESS") == "0":
            transformers.logging.disable_progress_bar()

    @cached_property
    def mllm(self) -> MLLM:
        local = ROOT / self.model
        name = os.path.relpath(local) if local.is_dir() else self.model
        return load(name, device=self.device, dtype=self.dtype, processor_kwargs=self.pixels)

    @cached_property
    def run(self) -> Run:
        return Run(self.folder, self.mllm)

    @cached_property
    def names(self) -> list[str]:
        """The benchmarks' names, in the paper's order."""
        if self._names:
            return self._names
        kinds = set(self.mllm.kinds)
        names = list(PAPER_BENCHMARKS["vision"]) if {"image", "video"} & kinds else ["mmlu"]
        names += [n for n in PAPER_BENCHMARKS["audio"] if "audio" in kinds and n not in names]
        return [n for n in names if REGISTRY[n].modality in kinds]

    def _rows(self, name: str) -> Benchmark:
        source = self.source
        if source == "auto":
            source = str(SHIPPED) if self.is_stand_in else "hub"
        if source == "hub":  # whose rows may be ordered by subject or class
            bench = benchmark(name, seed=self.seed, frames=self.frames)
        else:
            bench = benchmark(name, source=str(ROOT / source), frames=self.frames)
        if self.limit > len(bench):
            raise ValueError(f"limit={self.limit}: {name} has {len(bench)} rows; lower it")
        return bench

    @cached_property
    def mining(self) -> dict[str, Benchmark]:
        """The first `limit` rows of each benchmark: what neurons are found on."""
        return {name: self._rows(name)[: self.limit] for name in self.names}

    @cached_property
    def evaluation(self) -> dict[str, Benchmark]:
        """The last `eval_limit` rows of each benchmark: what silencing is measured on."""
        held = {name: self._rows(name) for name in self.names}
        for name, bench in held.items():
            if self.limit + self.eval_limit > len(bench):
                raise ValueError(
                    f"limit={self.limit} and eval_limit={self.eval_limit}: {name} has "
                    f"{len(bench)} rows, and rows for mining and for evaluation must not overlap; "
                    "lower one of them"
                )
        return {name: bench[-self.eval_limit :] for name, bench in held.items()}

    def sanity(self) -> pd.DataFrame:
        """The model as it is beside its published figures, one row per benchmark.

        Columns benchmark, corpus (its usual figure over the evaluation rows), low, high (95 %
        interval of the rows' mean), published, verdict: near, FAR OFF (by more than `FAR` beyond
        the interval: check prompt, picture size and dtype before mining), or none published.
        """
        table = summarise(self.answers())[["benchmark", "corpus", "low", "high"]]
        table = table[table["benchmark"] != "average"]
        known = PUBLISHED.get(self.label, {})
        table["published"] = table["benchmark"].map(known)
        beyond = (table["corpus"] - table["published"]).abs() - (table["high"] - table["low"]) / 2
        table["verdict"] = np.where(beyond > FAR, "FAR OFF", "near")
        table.loc[table["published"].isna(), "verdict"] = "none published"
        return table.reset_index(drop=True)

    # ------------------------------------------------------------------ the stages' artefacts

    def mine(self) -> dict[str, xr.DataArray]:
        """Stage 2 per benchmark, computed or read; interrupted mining continues."""
        return {
            name: self.run.cached(
                f"scores-{name}",
                lambda bench=bench: score(
                    self.mllm,
                    bench,
                    batch_size=self.batch_size,
                    checkpoint=self.folder / f"scores-{bench.name}-{bench.fingerprint[:8]}.partial",
                ),
                data=bench.fingerprint,
            )
            for name, bench in self.mining.items()
        }

    def scores(self) -> dict[str, xr.DataArray]:
        """Stage 2 per benchmark, as notebook 02 left it."""
        return {
            name: self.run.load(f"scores-{name}", "02_importance_scores", data=bench.fingerprint)
            for name, bench in self.mining.items()
        }

    def aggregate(self) -> xr.DataArray:
        """Stage 3, computed from notebook 02's artefacts or read."""
        return self.run.cached("total", lambda: aggregate(self.scores().values()), data=self._data)

    def total(self) -> xr.DataArray:
        """Stage 3, as notebook 03 left it."""
        return self.run.load("total", "03_score_aggregation", data=self._data)

    @property
    def _data(self) -> dict[str, str]:
        return {name: bench.fingerprint for name, bench in self.mining.items()}

    def select(self, total: xr.DataArray | None = None, **other) -> xr.DataArray:
        """Stage 4 with this workbook's parameters, or others given by name."""
        chosen = {
            "ratio": self.ratio,
            "strategy": self.strategy,
            "weights": self.weights,
            "split": self.split,
            "seed": self.seed,
        }
        neurons = select(self.total() if total is None else total, **(chosen | other))
        if not other and not neurons.any():
            raise ValueError(
                f"ratio={self.ratio}: a budget of {neurons.attrs['budget']} of "
                f"{neurons.sizes['layer'] * neurons.sizes['neuron']} neurons leaves none for "
                f"each share that {self.strategy} makes of it; raise ratio, or take adaptive"
            )
        return neurons

    # ------------------------------------------------------------------ silencing, measured

    @cached_property
    def _prepared(self) -> dict[str, Prepared]:
        return {
            name: prepare(self.mllm, bench, self.batch_size)
            for name, bench in self.evaluation.items()
        }

    def answers(
        self,
        neurons: xr.DataArray | None = None,
        modalities: Sequence[str] | None = None,
        mode: str = "zero",
        constants: xr.DataArray | None = None,
    ) -> pd.DataFrame:
        """Answers on the evaluation rows with the neurons silenced (None: the model as it is).

        One row per sample, as `evaluate` returns it. Computed once per set of silenced neurons.
        """
        if neurons is not None and modalities is not None:
            neurons = neurons.sel(modality=list(modalities))
        silenced = None if neurons is None else digest(np.asarray(neurons).any(0))
        key = {
            "data": {n: b.fingerprint for n, b in self.evaluation.items()},
            "max_new_tokens": self.max_new_tokens,
            "silenced": silenced,
        }
        if mode != "zero":
            key |= {"mode": mode, "constants": digest(constants[f"activation_{mode}"])}

        def compute() -> pd.DataFrame:
            if neurons is None:
                return pd.concat(list(self._evaluated()), ignore_index=True)
            with deactivate(self.mllm, neurons, mode=mode, constants=constants):
                return pd.concat(list(self._evaluated()), ignore_index=True)

        return self.run.cached("answers", compute, **key)

    def _evaluated(self) -> Iterator[pd.DataFrame]:
        for prepared in self._prepared.values():
            yield evaluate(self.mllm, prepared, max_new_tokens=self.max_new_tokens)

    def save_figure(self, fig, name: str) -> None:
        """Keep a figure: in figures/ for a stand-in's own run, else in the run folder."""
        folder = self.folder / "figures" if self._own_figures else ROOT / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        fig.savefig(folder / f"{name}-{self.label}.png", dpi=150, bbox_inches="tight")

    def __repr__(self) -> str:
        m = self.mllm
        what = "stand-in, trained here from scratch" if self.is_stand_in else "checkpoint"
        return (
            f"{self.label} ({what}): {m.n_layers} decoder layers x {m.n_neurons} neurons, "
            f"{self.mllm.model.num_parameters() / 1e6:.1f} M parameters\n"
            f"token kinds: {', '.join(m.kinds)}\n"
            f"benchmarks: {', '.join(self.names)}; rows each: {self.limit} to mine, "
            f"{self.eval_limit} others to evaluate"
        )


def bar(items: Iterable, desc: str) -> Iterable:
    """A progress bar that leaves nothing in a notebook's output; off with MINER_PROGRESS=0."""
    return tqdm(items, desc=desc, leave=False, disable=os.environ.get("MINER_PROGRESS") == "0")


def _whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: a whole number of at least {least}")


def _one_of(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: use one of {', '.join(allowed)}")


def _list(value: str | Sequence[str] | None) -> list[str]:
    if value is None or value in ("", "None"):
        return []
    return [v.strip() for v in value.split(",")] if isinstance(value, str) else list(value)


def _weights(value) -> dict[str, float]:
    """Weights by name, as a mapping, or five numbers; the papermill CLI passes all as text."""
    if isinstance(value, str) and value not in WEIGHTINGS:
        value = yaml.safe_load(value)
    if isinstance(value, str):
        if value not in WEIGHTINGS:
            raise ValueError(
                f"weights={value!r}: use five numbers or one of {', '.join(WEIGHTINGS)}"
            )
        return dict(WEIGHTINGS[value])
    if isinstance(value, Sequence):
        if len(value) != len(METRICS):
            raise ValueError(f"weights={value!r}: give one for each of {', '.join(METRICS)}")
        value = dict(zip(METRICS, value, strict=True))
    if not isinstance(value, Mapping):
        raise ValueError(f"weights={value!r}: use five numbers or one of {', '.join(WEIGHTINGS)}")
    return {k: float(v) for k, v in value.items()}
