"""What every notebook opens with: validated parameters, the model, the rows, the run folder.

wb = Workbook.bind(globals())                   # in a notebook, after its parameters cell
wb = Workbook(model="data/models/tiny-qwen2-vl", limit=96)       # anywhere else
wb.mining["mmlu"], wb.evaluation["mmlu"]        # rows that share no medium
total = wb.total()                              # an earlier stage's artefact
wb.answers(neurons)                             # one row per sample, cached
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import transformers
import xarray as xr
from pydantic import PrivateAttr

from minerlib.aggregation import aggregate
from minerlib.artifacts import Run, digest
from minerlib.deactivation import deactivate
from minerlib.model import MLLM, load
from minerlib.parameters import Parameters, at_least
from minerlib.plots import save, show
from minerlib.scoring import METRICS, own_metrics, score
from minerlib.selection import STRATEGIES, matched_random, select
from minerlib.tasks import REGISTRY, Benchmark, benchmark
from minerlib.tasks.evaluation import Prepared, evaluate, prepare, summarise
from minerlib.tasks.rows import split as apart

__all__ = ["ROOT", "NotApplicable", "Workbook", "at_least", "show"]

ROOT = Path(__file__).parents[1]
if not ((ROOT / "notebooks").is_dir() and (ROOT / "data").is_dir()):
    ROOT = Path.cwd()
"""Where relative paths start: the checkout that minerlib lies in, else the current folder."""
SHIPPED = ("data/models", "data/benchmarks")

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


class Workbook(Parameters):
    """Validated parameters of a notebook, and what they name, loaded on first use.

    model        folder or hub id
    benchmarks   names, as a list or comma-separated; default: the paper's for the model's media
    source       "auto" (shipped rows for a shipped model, the hub otherwise), "hub" or a folder
    limit        rows per benchmark for mining, the first after shuffling with the seed
    eval_limit   rows per benchmark for evaluation; none shares a medium with the mined ones
    ratio, strategy, weights, split, seed    as in `select`; weights also by name
    max_new_tokens   longest answer; default: the benchmark's own, 24 for a shipped model
    min_pixels, max_pixels    bounds of a picture's size, in pixels; default: the processor's own
    frames       at most so many evenly spaced frames of a video
    run_dir      where artefacts go; default runs/<model name>
    on_error     "raise" at a row that fails, or "skip" it and list it
    Relative paths are taken from `ROOT`, wherever the notebook runs.
    """

    _ready: dict[str, Prepared] = PrivateAttr(default_factory=dict)

    @property
    def configuration(self) -> dict[str, Any]:
        """What, with the model, a figure or a finding belongs to: parameters and rows."""
        rows = {"mining": _prints(self.mining)}
        if "eval_limit" in self._declared:
            rows["evaluation"] = _prints(self.evaluation)
        return {"parameters": self.parameters, "rows": rows}

    @property
    def choice(self) -> dict[str, Any]:
        """The parameters of stage 4."""
        return {n: getattr(self, n) for n in ("ratio", "strategy", "weights", "split", "seed")}

    @property
    def label(self) -> str:
        """The model's name in files and figures."""
        return Path(self.model).name

    @property
    def is_shipped(self) -> bool:
        """Whether the model is one of the repository's stand-ins."""
        folder = (ROOT / self.model).resolve()
        return folder.is_dir() and folder.is_relative_to((ROOT / SHIPPED[0]).resolve())

    @property
    def folder(self) -> Path:
        """The run folder."""
        return ROOT / (self.run_dir or f"runs/{self.label}")

    @cached_property
    def mllm(self) -> MLLM:
        local = ROOT / self.model
        name = os.path.relpath(local) if local.is_dir() else self.model
        bounds = ("min_pixels", "max_pixels")
        pixels = {bound: n for bound in bounds if (n := getattr(self, bound)) is not None}
        transformers.logging.set_verbosity_error()
        if os.environ.get("TQDM_DISABLE"):
            transformers.logging.disable_progress_bar()
        return load(name, device=self.device, dtype=self.dtype, processor_kwargs=pixels)

    @cached_property
    def run(self) -> Run:
        return Run(self.folder, self.mllm)

    @cached_property
    def names(self) -> list[str]:
        """The benchmarks' names, in the paper's order."""
        if self.benchmarks:
            return list(self.benchmarks)
        kinds = set(self.mllm.kinds)
        names = list(PAPER_BENCHMARKS["vision"]) if {"image", "video"} & kinds else ["mmlu"]
        names += [n for n in PAPER_BENCHMARKS["audio"] if "audio" in kinds and n not in names]
        return [n for n in names if REGISTRY[n].modality in kinds]

    @cached_property
    def rows(self) -> dict[str, Benchmark]:
        """All rows of each benchmark, shuffled with the seed."""
        auto = SHIPPED[1] if self.is_shipped else "hub"
        source = auto if self.source == "auto" else self.source
        how = {name: getattr(self, name) for name in ("seed", "frames", "on_error")}
        how["source"] = None if source == "hub" else str(ROOT / source)
        how["sampling_rate"] = self.mllm.family.sampling_rate
        return {name: benchmark(name, **how) for name in self.names}

    @cached_property
    def mining(self) -> dict[str, Benchmark]:
        """The first `limit` rows of each benchmark: what neurons are found on."""
        for name, bench in self.rows.items():
            if self.limit > len(bench):
                raise ValueError(f"limit={self.limit}: {name} has {len(bench)} rows; lower it")
        return {name: bench[: self.limit] for name, bench in self.rows.items()}

    @cached_property
    def evaluation(self) -> dict[str, Benchmark]:
        """`eval_limit` rows of each benchmark, from its end: what silencing is measured on."""
        return {n: apart(b, self.limit, self.eval_limit)[1] for n, b in self.rows.items()}

    # ------------------------------------------------------------------ the stages' artefacts

    def cached(
        self,
        name: str,
        compute: Callable[[], Any],
        *,
        of: Any,
        rows: Mapping[str, Benchmark] | None = None,
        **config: Any,
    ) -> Any:
        """The artefact of this model, these rows (default: the evaluation's) and config."""
        config |= {"rows": _prints(self.evaluation if rows is None else rows)}
        of = [*([of] if callable(of) else of), *self._plugged]
        return self.run.cached(name, compute, of=of, on_error=self.on_error, **config)

    def mine(self) -> dict[str, xr.DataArray]:
        """Stage 2 per benchmark, computed or read; interrupted mining continues."""
        return {name: self._mined(name, self.run.cached) for name in self.mining}

    def scores(self) -> dict[str, xr.DataArray]:
        """Stage 2 per benchmark, as notebook 02 left it."""
        load = self._loaded("02_importance_scores")
        return {name: self._mined(name, load) for name in self.mining}

    def aggregate(self) -> xr.DataArray:
        """Stage 3, computed from notebook 02's artefacts or read."""
        return self._total(self.run.cached)

    def total(self) -> xr.DataArray:
        """Stage 3, as notebook 03 left it."""
        return self._total(self._loaded("03_score_aggregation"))

    def _loaded(self, made_by: str) -> Callable[..., Any]:
        return lambda name, compute, **key: self.run.load(name, made_by, **key)

    def _mined(self, name: str, get: Callable[..., Any]) -> xr.DataArray:
        bench, how = self.mining[name], {"on_error": self.on_error}
        key = {"rows": bench.fingerprint, **how}
        how |= {"batch_size": self.batch_size, "checkpoint": self.folder / f"scores-{name}"}
        compute = partial(score, self.mllm, bench, **how)
        return get(f"scores-{name}", compute, of=(score, *self._plugged), **key)

    def _total(self, get: Callable[..., Any]) -> xr.DataArray:
        key = {"rows": _prints(self.mining), "on_error": self.on_error}
        of = (score, aggregate, *self._plugged)
        return get("total", lambda: aggregate(self.scores().values()), of=of, **key)

    @property
    def _plugged(self) -> list[Callable]:
        """The user's own metrics and strategy: what they are is part of a key."""
        own = [STRATEGIES[self.strategy], *(METRICS[name] for name in own_metrics())]
        return [function for function in own if function.__module__ != select.__module__]

    def select(self, total: xr.DataArray | None = None, **other: Any) -> xr.DataArray:
        """Stage 4 with this workbook's parameters, or others given by name."""
        neurons = select(self.total() if total is None else total, **(self.choice | other))
        if not other and not neurons.any():
            raise ValueError(
                f"ratio={self.ratio}: a budget of {neurons.attrs['budget']} of "
                f"{neurons.sizes['layer'] * neurons.sizes['neuron']} neurons leaves none for "
                f"each share that {self.strategy} makes of it; raise ratio, or take adaptive"
            )
        return neurons

    def alone(self, modality: str) -> xr.DataArray:
        """A whole budget of the modality's own highest neurons, bool [1, layer, neuron].

        What silencing them does cannot depend on how a strategy shares the budget out.
        """
        scores = self.total().sel(modality=[modality])
        return select(scores, **(self.choice | {"strategy": "LA_MU"}))

    def draws(self, neurons: xr.DataArray, n: int, by_layer: bool = False) -> list[xr.DataArray]:
        """A null: n random draws of as many different neurons, with by_layer in each layer."""
        return [matched_random(neurons, self.seed + i, by_layer) for i in range(n)]

    # ------------------------------------------------------------------ silencing, measured

    def answers(
        self,
        neurons: xr.DataArray | None = None,
        modalities: Sequence[str] | None = None,
        mode: str = "zero",
        constants: xr.DataArray | None = None,
    ) -> pd.DataFrame:
        """Answers on the evaluation rows with the neurons silenced (None: the model as it is).

        One row per sample, as `evaluate` returns it. Computed once per benchmark and set of
        silenced neurons, whatever their modalities are called.
        """
        if neurons is not None and modalities is not None:
            neurons = neurons.sel(modality=list(modalities))
        key = {"max_new_tokens": self._longest, "on_error": self.on_error, "silenced": None}
        if neurons is not None:
            key["silenced"] = {"neurons": digest(np.asarray(neurons).any(0)), "mode": mode}
        if mode != "zero" and constants is not None:
            key["silenced"]["constants"] = digest(constants[f"activation_{mode}"])
        silenced = partial(deactivate, self.mllm, neurons, mode=mode, constants=constants)

        def compute(name: str) -> pd.DataFrame:
            with nullcontext() if neurons is None else silenced():
                return self._evaluated(name)

        of = (evaluate, deactivate)
        tables = [
            self.run.cached(f"answers-{n}", partial(compute, n), of=of, rows=b.fingerprint, **key)
            for n, b in self.evaluation.items()
        ]
        whole = pd.concat(tables, ignore_index=True)
        whole.attrs = {"skipped": [line for t in tables for line in t.attrs.get("skipped", [])]}
        return whole

    @property
    def _longest(self) -> int | None:
        # A silenced stand-in can ramble on to the real benchmarks' limits; its own longest
        # reference has about 20 tokens.
        return self.max_new_tokens or (24 if self.is_shipped else None)

    def _evaluated(self, name: str) -> pd.DataFrame:
        if name not in self._ready:
            bench, how = self.evaluation[name], {"on_error": self.on_error}
            self._ready[name] = prepare(self.mllm, bench, self.batch_size, **how)
        return evaluate(self.mllm, self._ready[name], max_new_tokens=self._longest)

    def sanity(self) -> pd.DataFrame:
        """The model as it is beside its published figures, one row per benchmark.

        Columns benchmark, corpus (its usual figure), low, high (95 % interval of the rows' mean),
        published, verdict: near, FAR OFF (more than `FAR` beyond the interval), none published.
        """
        table = summarise(self.answers())[["benchmark", "corpus", "low", "high"]]
        table = table[table["benchmark"] != "average"]
        table["published"] = table["benchmark"].map(PUBLISHED.get(self.label, {}))
        beyond = (table["corpus"] - table["published"]).abs() - (table["high"] - table["low"]) / 2
        table["verdict"] = np.where(beyond > FAR, "FAR OFF", "near")
        table.loc[table["published"].isna(), "verdict"] = "none published"
        return table.reset_index(drop=True)

    # ------------------------------------------------------------------ what a notebook leaves

    def save_finding(self, name: str, claims: pd.DataFrame, **tables: Any) -> None:
        """Keep a finding's claims and what they rest on, beside those of other parameters."""
        value = {"finding": name, "model": self.label, "parameters": self.parameters}
        for key, table in {"claims": claims, **tables}.items():
            value[key] = table.to_dict("records") if isinstance(table, pd.DataFrame) else table
        self.run.save(f"finding-{name}", value, of=self._plugged, **self.configuration)
        print(f"finding {name} of {self.label} is kept in the run folder")

    def save_figure(self, fig: Any, name: str) -> None:
        """Keep a figure in the run folder, and without its digest where MINER_FIGURES says."""
        stem = self.run.stem(name, of=self._plugged, **self.configuration)
        files = [self.folder / f"figures/{stem}.png", *tracked(f"{name}-{self.label}.png")]
        save(fig, files, {"model": self.label, **self.configuration})

    def __repr__(self) -> str:
        m, n = self.mllm, self.mllm.model.num_parameters() / 1e6
        what = "a stand-in, see data/README.md" if self.is_shipped else "checkpoint"
        rows = f"rows each: {self.limit} to mine"
        if "eval_limit" in self._declared:
            rows += f", {self.eval_limit} others to evaluate"
        return (
            f"{self.label} ({what}): {m.n_layers} decoder layers x {m.n_neurons} neurons, "
            f"{n:.1f} M parameters\ntoken kinds: {', '.join(m.kinds)}\n"
            f"benchmarks: {', '.join(self.names)}; {rows}"
        )


def tracked(name: str) -> list[Path]:
    """Where a figure of this name goes besides the run folder: the folder MINER_FIGURES, if any."""
    folder = os.environ.get("MINER_FIGURES")
    return [ROOT / folder / name] if folder else []


def _prints(rows: Mapping[str, Benchmark]) -> dict[str, str]:
    return {name: bench.fingerprint for name, bench in rows.items()}
