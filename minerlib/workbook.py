"""What every notebook opens with: validated parameters, the model, the rows, the run folder.

wb = Workbook.bind(globals())                   # in a notebook, after its parameters cell
wb = Workbook(model="data/models/tiny-qwen2-vl", limit=96)       # anywhere else
wb.mining["mmlu"], wb.evaluation["mmlu"]        # rows that share no medium
total = wb.total()                              # an earlier stage's artefact
wb.answers(neurons)                             # one row per sample, cached
"""

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import transformers
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import rankdata
from tqdm import tqdm

from minerlib import atlas, critical, processes, shipped
from minerlib.activity import sampled
from minerlib.aggregation import aggregate
from minerlib.artifacts import Run, atomically, digest, unfinished
from minerlib.controls import CONTROLS, permuted, untrained
from minerlib.deactivation import deactivate
from minerlib.findings.silencing import nats
from minerlib.model import MLLM, load, starts
from minerlib.parameters import Parameters, at_least
from minerlib.plots import show
from minerlib.presets import published
from minerlib.scoring import METRICS, own_metrics, score
from minerlib.selection import STRATEGIES, first, matched_random, select, unique, weighted
from minerlib.sharing import save_neurons
from minerlib.tap import hear_once
from minerlib.tasks import REGISTRY, Benchmark, benchmark
from minerlib.tasks.evaluation import (
    CHOICES,
    Prepared,
    above_chance,
    evaluate,
    prepare,
    summarise,
)
from minerlib.tasks.metrics import metric_of
from minerlib.tasks.rows import split as apart
from minerlib.written import loudness

__all__ = ["ROOT", "NotApplicable", "Workbook", "at_least", "show"]

ROOT = Path(__file__).parents[1]
if not ((ROOT / "notebooks").is_dir() and (ROOT / "data").is_dir()):
    ROOT = Path.cwd()
"""Where relative paths start: the checkout that minerlib lies in, else the current folder."""
MODELS, ROWS, RESULTS = "data/models", "data/benchmarks", "data/results"
"""What is shipped; a model of the repository is one that has a card. Results are what the committed
notebooks rest on, found unless MINER_FRESH is set; with MINER_PUBLISH a run goes there."""

PAPER_BENCHMARKS = ("text_vqa", "coco_caption", "mmlu", "msvd_qa", "libri", "vocal_sound")
"""What the paper asks Qwen2-VL and Qwen2-Audio: each what its media allow."""

FAR = 0.05  # a figure is far off that differs by more, beyond its interval


class NotApplicable(ValueError):
    """A notebook has nothing to measure on this model and these benchmarks; a run goes on."""


class Workbook(Parameters):
    """Validated parameters of a notebook, and what they name, loaded on first use.

    model        folder or hub id; relative paths are taken from `ROOT`
    benchmarks   names, as a list or comma-separated; default: the card's of a shipped model, else
                 the paper's for the model's media
    source       "auto" (shipped rows for a shipped model, the hub otherwise), "hub" or a folder
    limit        rows per benchmark for mining, the first after shuffling with the seed
    eval_limit   rows per benchmark for evaluation; none shares a medium with the mined ones
    ratio, strategy, weights, split, seed    as in `select`; weights also by name
    max_new_tokens   longest answer; default: the benchmark's own, for a shipped model its card's
    min_pixels, max_pixels    bounds of a picture's size, in pixels; default: the processor's own
    frames       at most so many evenly spaced frames of a video
    run_dir      where artefacts go; default runs/<model name>
    on_error     "raise" at a row that fails, or "skip" it and list it
    """

    _ready: dict[str, Prepared] = {}

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
        return self.model_dump(include={"ratio", "strategy", "weights", "split", "seed"})

    @property
    def how(self) -> dict[str, Any]:
        """The parameters of `selection.first`: those of stage 4 without the ratio."""
        return {name: value for name, value in self.choice.items() if name != "ratio"}

    @property
    def label(self) -> str:
        """The model's name in files and figures."""
        return Path(self.model).name

    @cached_property
    def card(self) -> shipped.Card | None:
        """What a model of the repository is: None for any other."""
        return shipped.card(ROOT / self.model)

    @property
    def folder(self) -> Path:
        """The run folder."""
        usual = RESULTS if os.environ.get("MINER_PUBLISH") else "runs"
        return ROOT / (self.run_dir or f"{usual}/{self.label}")

    @cached_property
    def mllm(self) -> MLLM:
        local = ROOT / self.model
        name = os.path.relpath(local) if local.is_dir() else self.model
        pixels = self.model_dump(include={"min_pixels", "max_pixels"}, exclude_none=True)
        transformers.logging.set_verbosity_error()
        if os.environ.get("TQDM_DISABLE"):
            transformers.logging.disable_progress_bar()
        return load(name, device=self.device, dtype=self.dtype, processor_kwargs=pixels)

    @cached_property
    def run(self) -> Run:
        fresh = os.environ.get("MINER_FRESH")
        return Run(self.folder, self.mllm, () if fresh else (ROOT / RESULTS / self.label,))

    @cached_property
    def names(self) -> list[str]:
        """The benchmarks' names, in the paper's order."""
        fitting = [n for n in PAPER_BENCHMARKS if REGISTRY[n].modality in self.mllm.kinds]
        return list(self.benchmarks or (self.card.benchmarks if self.card else fitting))

    @cached_property
    def rows(self) -> dict[str, Benchmark]:
        """All rows of each benchmark, shuffled with the seed."""
        auto = ROWS if self.card else "hub"
        source = auto if self.source == "auto" else self.source
        how = self.model_dump(include={"seed", "frames", "on_error"})
        how["source"] = None if source == "hub" else str(ROOT / source)
        how["sampling_rate"] = self.mllm.family.sampling_rate
        small = self.card.lower_case if self.card else ()
        rows = {name: benchmark(name, lower_case=name in small, **how) for name in self.names}
        self.run.notices |= {n: {**b.origin, "notices": b.notices} for n, b in rows.items()}
        return rows

    @cached_property
    def mining(self) -> dict[str, Benchmark]:
        """The first `limit` rows of each benchmark: what neurons are found on."""
        for name, bench in self.rows.items():
            if self.limit > len(bench):
                raise ValueError(f"limit={self.limit}: {name} has {len(bench)} rows; lower it")
        return {name: self._usable(bench[: self.limit]) for name, bench in self.rows.items()}

    @cached_property
    def evaluation(self) -> dict[str, Benchmark]:
        """`eval_limit` rows of each benchmark, from its end: what silencing is measured on."""
        limits = self.limit, self.eval_limit
        return {name: self._usable(apart(b, *limits)[1]) for name, b in self.rows.items()}

    def _usable(self, bench: Benchmark) -> Benchmark:
        """The rows that can be decoded and encoded, where others may be skipped."""
        if self.on_error == "raise":
            return bench
        kept: list[int] = []
        for i in starts(bench, self.batch_size):
            part = range(len(bench))[i : i + self.batch_size]
            fine, *_, skipped = self.mllm.gather(bench, part, "skip")
            kept += fine
            self.run.notices[bench.name]["notices"] += skipped
        return bench[kept]

    def cached(
        self, name: str, compute: Callable, *, of, rows=None, made_by="", part=False, **config
    ) -> Any:
        """The artefact of this model, these rows (default: those to evaluate on) and config.

        Computed where it is not there; made_by names the notebook that alone may compute it. A
        part of another one lies apart, and is not published.
        """
        config["rows"] = _prints(self.evaluation if rows is None else rows)
        config["of"] = [*([of] if callable(of) else of), *self._plugged]
        config["on_error"] = self.on_error
        if made_by:
            return self.run.load(name, made_by, **config)
        run = Run(self.folder / "parts", self.mllm) if part else self.run
        return run.cached(name, compute, **config)

    def each(
        self, name: str, compute: Callable, sets: Sequence[xr.DataArray | None], **config: Any
    ) -> Any:
        """What compute(neurons) makes of each set (None: of none), as one artefact; see `cached`.

        Labelled arrays get a dimension `neurons` in front, tables a column of that name: the place
        in `sets`. Interrupted, it continues.
        """
        if not sets:
            raise ValueError("no sets of neurons to silence")
        marks = [None if neurons is None else digest(_union(neurons)) for neurons in sets]
        own = processes.dealt([1.0] * len(sets))

        def whole() -> Any:
            def one(i: int) -> Any:
                how = {"silenced": marks[i], "part": True, **config}
                return self.cached(name, partial(compute, sets[i]), **how)

            with hear_once(self.mllm, {}), processes.apart():
                done = {i: one(i) for i in tqdm(own, name, leave=False)}
            processes.wait()
            with processes.apart():  # the others' are only read
                found = [done[i] if i in done else one(i) for i in range(len(sets))]
            if isinstance(found[0], xr.DataArray):
                return xr.concat(found, "neurons").drop_encoding()
            return pd.concat([t.assign(neurons=i) for i, t in enumerate(found)], ignore_index=True)

        return self.cached(name, whole, silenced=marks, **config)

    def controls(
        self, name: str, compute: Callable[[MLLM], pd.DataFrame], *, of, **config: Any
    ) -> pd.DataFrame:
        """The tables that `compute` makes of the untrained controls, in one; column `control`."""
        of, tables = [*([of] if callable(of) else of), untrained, permuted], []
        for control, make in tqdm(CONTROLS.items(), "untrained controls", leave=False):
            config["control"] = control
            table = self.cached(name, lambda make=make: compute(make(self.mllm)), of=of, **config)
            tables.append(table.assign(control=control))
        return pd.concat(tables, ignore_index=True)

    def mine(self, made_by: str = "") -> dict[str, xr.DataArray]:
        """Stage 2 per benchmark, computed or read; interrupted mining continues."""
        how: dict[str, Any] = {"batch_size": self.batch_size, "on_error": self.on_error}
        found = {}
        for name, bench in self.mining.items():

            def compute(bench: Benchmark = bench) -> xr.DataArray:
                part = unfinished(f"batches of {self.batch_size}")
                return self._scored(bench, checkpoint=part, **how)

            stem = f"scores-{name}"
            found[name] = self.cached(stem, compute, of=score, rows=bench, made_by=made_by)
        return found

    def _scored(self, bench: Benchmark, **how: Any) -> xr.DataArray:
        """Scores that are kept in 16 bits, steps of 1 / 65534."""
        scores = score(self.mllm, bench, **how)
        # Scores are in [0, 1] and never NaN; the fill value is there so that a NaN stays one.
        fine = {"scale_factor": 1 / 65534, "_FillValue": 65535}
        scores.encoding = {"dtype": "uint16", "zlib": True, **fine}
        return scores

    def scored(
        self,
        bench: Benchmark,
        condition: Callable[[], AbstractContextManager] = nullcontext,
        of: Callable | None = None,
        key: dict[str, Any] | None = None,
        **how: Any,
    ) -> xr.DataArray:
        """Stage 2 on any rows, scored otherwise (how: as for `score`) or while a condition holds,
        which `of` makes and `key` describes; kept, but not published."""

        def compute() -> xr.DataArray:
            with condition():
                both = {"batch_size": self.batch_size, "on_error": self.on_error}
                return self._scored(bench, **both, **how)

        made_by = (score, of) if of else score
        about = (key or {}) | how
        return self.cached(
            f"scores-{bench.name}", compute, of=made_by, rows=bench, part=True, **about
        )

    def loudness(self, **what: str) -> xr.DataArray:
        """How loud every neuron is on the mined rows: `written.loudness`, computed once."""
        rows = self.mining
        compute = partial(loudness, self.mllm, rows.values(), batch_size=self.batch_size, **what)
        return self.cached("loudness", compute, of=loudness, rows=rows, **what)

    def scores(self) -> dict[str, xr.DataArray]:
        """Stage 2 per benchmark, as notebook 02 left it."""
        return self.mine("02_importance_scores")

    def total(self) -> xr.DataArray:
        """Stage 3, from what notebook 02 left."""
        return self._total

    @cached_property
    def _total(self) -> xr.DataArray:
        return aggregate(self.scores().values())

    @property
    def _plugged(self) -> list[Callable]:
        """The user's own metrics and strategy: what they are is part of a key."""
        own: list[Any] = [STRATEGIES[self.strategy], *(METRICS[name] for name in own_metrics())]
        return [function for function in own if function.__module__ != select.__module__]

    def select(self, total: xr.DataArray | None = None, **other: Any) -> xr.DataArray:
        """Stage 4 with this workbook's parameters, or others given by name."""
        neurons = select(self.total() if total is None else total, **(self.choice | other))
        if not other and not neurons.any():
            what = f"its budget of {neurons.attrs['budget']} neurons leaves none for each share"
            way_out = f"that {self.strategy} makes of it; raise ratio, or take adaptive"
            raise ValueError(f"ratio={self.ratio}: {what} {way_out}")
        return neurons

    def alone(self, modality: str, n: int | None = None, total=None) -> xr.DataArray:
        """One modality's n highest neurons, by default a whole budget, whatever its share is.

        By the scores `total`, as of stage 3; default: the run's.
        """
        own = (self.total() if total is None else total).sel(modality=[modality])
        if n is None:
            return self.select(own, strategy="LA_MU")
        return first(own, n, **self.how | {"strategy": "LA_MU"})

    def ranks(self, modality: str) -> np.ndarray:
        """Every neuron's place by the paper's score for a modality, 1 the first [layer, neuron]."""
        value = weighted(self.total().sel(modality=[modality]), self.weights)[0]
        return rankdata(-value, method="ordinal").reshape(value.shape)

    def half_dose(self) -> int:
        """How many neurons, of those the strategy takes first, cost half of the score above chance.

        To a fifth, by `costs_half`. Where no dose up to a sixth of all neurons costs as much it
        says so, and is the number that a whole budget holds.
        """
        every = self.total()[0, 0].size

        def halved(n: int) -> bool:
            try:
                taken = first(self.total(), n, **self.how)
            except ValueError:  # a strategy that takes more at once, or fewer in all: of doses from
                return n > round(every * 0.0064)  # 0.02 % to 17 % those above the middle are enough
            return self.costs_half(taken)

        return self._dose(halved)

    def crossing_dose(self, of: Callable[[int], dict[str, xr.DataArray]]) -> int:
        """How many neurons, of the sets that `of` makes of a number, cost half of the score above
        chance on average over the sets, each asked for all benchmarks, 8 mined rows of each.

        To a fifth; where no dose up to a sixth of all neurons costs as much, as for `half_dose`.
        """
        few = {name: bench[:8] for name, bench in self.mining.items()}
        half = above_chance(self.answers(rows=few)) / 2

        def halved(n: int) -> bool:
            if half <= 0:  # there is nothing to lose
                return False
            left = [above_chance(self.answers(neurons, rows=few)) for neurons in of(n).values()]
            return float(np.mean(left)) <= half

        return self._dose(halved)

    def _dose(self, halved: Callable[[int], bool]) -> int:
        """The first dose that costs half, of four in each doubling."""
        every = self.total()[0, 0].size
        doses = [max(1, round(every * 0.0002 * 2 ** (i / 4))) for i in range(40)]
        at = bisect_left(doses, True, key=halved)
        if at < len(doses):
            return doses[at]
        print(
            "no dose up to a sixth of all neurons costs half of the score: a whole budget instead"
        )
        return unique(self.select())

    def costs_half(self, neurons: xr.DataArray) -> bool:
        """Whether silencing them costs half of the score above chance, on at most 24 mined rows of
        each benchmark; False where there is none."""
        start = above_chance(self._few_before)
        return start > 0 and above_chance(self.answers(neurons, rows=self._few)) <= start / 2

    def critical(self, tried: int) -> tuple[xr.DataArray, np.ndarray]:
        """Few neurons that jointly cost half of the score, and what each candidate costs.

        Candidates are `tried` in all, half of them of greatest |activation x gradient| on 16 mined
        rows, half the first that LA_MU takes (adaptive, where that takes more at once). They are
        silenced one at a time on these rows, and the worst taken together until `costs_half`; none
        where all of them do not. The costs are nats a token, the greatest first.
        """
        few = {name: b[: max(1, 16 // len(self.names))] for name, b in self.mining.items()}
        slopes = self.cached(
            "attribution",
            partial(
                critical.attribution, self.mllm, few.values(), batch_size=min(self.batch_size, 8)
            ),
            of=critical.attribution,
            rows=few,
        )
        half = -(-tried // 2)
        try:
            taken = first(self.total(), half, **self.how | {"strategy": "LA_MU"})
        except ValueError:  # its first step takes more
            taken = first(self.total(), half, **self.how | {"strategy": "adaptive"})
        singles = critical.candidates(slopes, tried, taken.any("modality"))
        intact, *after = nats(self.logprobs([None, *singles], few))
        worst = [singles[i] for i in np.argsort(after, kind="stable")]
        costly = bisect_left(
            range(1, len(worst) + 1),
            True,
            key=lambda k: self.costs_half(critical.together(worst[:k])),
        )
        found = singles[0] & False
        if costly < len(worst):
            found = critical.together(worst[: costly + 1])
        return found, intact - np.sort(after)

    @cached_property
    def _few(self) -> dict[str, Benchmark]:
        return {name: bench[:24] for name, bench in self.mining.items()}

    @cached_property
    def _few_before(self) -> pd.DataFrame:
        return self.answers(rows=self._few)

    def draws(self, neurons: xr.DataArray, n: int, by_layer=False, **how) -> list[xr.DataArray]:
        """A null: n draws of as many different neurons (`matched_random`), with by_layer in each
        layer."""
        return [matched_random(neurons, self.seed + i, by_layer, **how) for i in range(n)]

    def answers(
        self, neurons=None, mode="zero", constants=None, rows=None, where=None, measure="score"
    ) -> pd.DataFrame:
        """`evaluate` with neurons silenced (None: as it is), done once; rows: by default the
        evaluation rows. mode="resample" takes what they say on the mined rows."""
        key: dict[str, Any] = {"of": (evaluate, deactivate)}
        if neurons is None:
            return self.under(nullcontext, rows, measure, **key)
        key |= {"silenced": digest(_union(neurons)), "mode": mode}
        if mode in ("mean", "min") and constants is not None:
            key["constants"] = digest(constants[f"activation_{mode}"])
        elif mode == "resample":  # known by where they are from: their bits are a processor's
            if constants is not None:
                raise ValueError("mode='resample' takes its own constants, of the mined rows")
            key["constants"] = [sampled, _prints(self.mining), self.seed]
        elif mode != "zero":
            key["constants"] = digest(constants)
        if where is not None:
            key["where"] = where

        def silenced() -> AbstractContextManager:
            of = self._sampled if mode == "resample" else constants
            return deactivate(self.mllm, neurons, mode=mode, constants=of, where=where)

        return self.under(silenced, rows, measure, **key)

    @cached_property
    def _sampled(self) -> xr.DataArray:
        """Activations of other inputs, of the mined rows."""
        rows, how = self.mining, {"seed": self.seed}
        compute = partial(sampled, self.mllm, rows.values(), batch_size=self.batch_size, **how)
        return self.cached("sampled", compute, of=sampled, rows=rows, part=True, **how)

    def under(
        self,
        condition: Callable[[], AbstractContextManager],
        rows: dict[str, Benchmark] | None = None,
        measure: str = "score",
        **key: Any,
    ) -> pd.DataFrame:
        """`evaluate` while a condition holds, done once for each key, which says what it is.

        Measured by "score" or "choice"; rows: by default the evaluation rows.
        """
        key |= {"max_new_tokens": self.longest, "on_error": self.on_error}
        if measure != "score":
            key["measure"] = measure

        def compute(bench: Benchmark) -> pd.DataFrame:
            with condition():
                return self._evaluated(bench, measure)

        tables = []
        for name, bench in (self.evaluation if rows is None else rows).items():
            key["rows"] = bench.fingerprint
            if measure == "choice":  # among the other rows' answers
                key["whole"] = digest([bench.whole, CHOICES])
            tables.append(self.run.cached(f"answers-{name}", partial(compute, bench), **key))
        whole = pd.concat(tables, ignore_index=True)
        whole.attrs = {"skipped": [line for t in tables for line in t.attrs.get("skipped", [])]}
        return whole

    def logprobs(
        self, sets: Sequence[xr.DataArray | None], rows: int | dict[str, Benchmark]
    ) -> pd.DataFrame:
        """Log-probabilities of the references, each set of neurons silenced in turn, done once.

        On these rows, or on each benchmark's first so many to evaluate on; interrupted, it
        continues. Columns benchmark, row, medium, logprob (mean per token, in nats), neurons (the
        place in `sets`).
        """
        whole = self.evaluation
        few = {k: b[:rows] for k, b in whole.items()} if isinstance(rows, int) else rows
        columns = ["benchmark", "row", "medium", "logprob"]

        @cache
        def ready() -> list[Prepared]:
            return [prepare(self.mllm, b, self.batch_size, self.on_error) for b in few.values()]

        def told(neurons: xr.DataArray | None) -> pd.DataFrame:
            how: dict[str, Any] = {"measure": "logprob only", "on_error": self.on_error}
            with nullcontext() if neurons is None else deactivate(self.mllm, neurons):
                tables = [
                    evaluate(self.mllm, of, checkpoint=unfinished(of.benchmark.name), **how)
                    for of in ready()
                ]
            return pd.concat(tables, ignore_index=True)[columns]

        return self.each("logprobs", told, sets, of=(evaluate, deactivate), rows=few)

    @property
    def longest(self) -> int | None:
        """A silenced small model can ramble on to the real benchmarks' limits."""
        return self.max_new_tokens or (self.card.max_new_tokens if self.card else None)

    def _evaluated(self, bench: Benchmark, measure: str = "score") -> pd.DataFrame:
        # Of several processes each prepares its own rows, and all rows when it works apart.
        rows = f"{bench.fingerprint}{processes.size()}"
        if rows not in self._ready:
            self._ready[rows] = prepare(self.mllm, bench, self.batch_size, self.on_error)
        how: dict[str, Any] = {"max_new_tokens": self.longest, "measure": measure}
        how["on_error"] = self.on_error
        return evaluate(self.mllm, self._ready[rows], checkpoint=unfinished(bench.name), **how)

    def sanity(self) -> pd.DataFrame:
        """The model as it is beside its published figures, one row per benchmark.

        Columns benchmark, corpus (its usual figure, of captions CIDEr-D), mean, low, high (of the
        rows' scores), published, verdict: near, FAR OFF, or none published.
        """
        table = summarise(self.answers()).query("benchmark != 'average'").reset_index(drop=True)
        table = table[["benchmark", "corpus", "mean", "low", "high"]]
        table["published"] = table["benchmark"].map(published(self.label))
        largest = table["benchmark"].map(lambda name: metric_of(self.rows[name].metric).largest)
        away = (table["corpus"] - table["published"]).abs() / largest
        beyond = away - (table["high"] - table["low"]) / 2
        rules = [table["published"].isna(), beyond > FAR]
        return table.assign(verdict=np.select(rules, ["none published", "FAR OFF"], "near"))

    def excited(self, neurons: Sequence[atlas.Neuron], top: int = 6) -> dict[str, Any]:
        """What excites neurons, (layer, neuron) each, of the mined rows: `atlas.excited`, once."""
        compute = partial(
            atlas.excited, self.mllm, self.mining, neurons, top=top, batch_size=self.batch_size
        )
        named = [atlas.named(neuron) for neuron in neurons]
        rows, how = self.mining, {"neurons": named, "top": top}
        return self.cached("excited", compute, of=atlas.excited, rows=rows, **how)

    def costs(self, neurons: Sequence[atlas.Neuron], rows: int = 16) -> pd.DataFrame:
        """`atlas.costs` of silencing each neuron alone, on so many rows or a few more, of every
        benchmark as many."""
        like = self.total()[0, 0]
        at = [np.ravel_multi_index(n, like.shape) for n in atlas.checked(self.mllm, neurons)]
        sets = [None, *(critical.as_neurons(like, [i]) for i in at)]
        return atlas.costs(self.logprobs(sets, -(-rows // len(self.rows))), neurons)

    def about(
        self,
        neurons: Sequence[atlas.Neuron],
        rows: int = 16,
        ranks: Mapping[str, dict[str, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Of each neuron what an atlas says beside what excites it: what it writes, and, where
        notebook 02 was run, the modalities whose budgets, by LA_MU, hold it, its rank for each,
        beside those of others, and what silencing it alone costs, where there are rows to evaluate
        on."""
        about: list[dict[str, Any]] = [{"writes": w} for w in atlas.writes(self.mllm, neurons)]
        with suppress(FileNotFoundError):
            modalities = self.select(strategy="LA_MU").modality.values.tolist()
            inside = {m: self.alone(m).values[0] for m in modalities}
            places = {f"the paper's score, {m}": self.ranks(m) for m in modalities}
            for known, neuron in zip(about, neurons, strict=True):
                known["sets"] = [m for m in modalities if inside[m][neuron]]
                known["ranks"] = {name: int(of[neuron]) for name, of in places.items()}
                others = (ranks or {}).get(atlas.named(neuron), {}).items()
                known["ranks"] |= {
                    k: of for k, of in others if not k.startswith(("miner,", "random,"))
                }
            if "eval_limit" in self._declared:
                costs = self.costs(neurons, rows)[["mean", "low", "high"]].round(4)
                # One medium has no interval, and a page knows no NaN.
                lines = costs.astype(object).where(costs.notna(), None).to_dict("records")
                for known, effect in zip(about, lines, strict=True):
                    known["effect"] = effect
        return about

    def look(self, layer: int, neuron: int, top: int = 4, rows: int = 16) -> atlas.Framed:
        """One neuron's page of the atlas, on the mined rows, as a notebook shows it."""
        return self.overview([(layer, neuron)], top, rows)

    def overview(
        self, neurons: Sequence[atlas.Neuron], top: int = 4, rows: int = 16
    ) -> atlas.Framed:
        """The atlas of a few neurons, on the mined rows, as a notebook shows it."""
        found, about = self.excited(neurons, top), self.about(neurons, rows)
        title = f"{self.label}, {', '.join(map(atlas.named, neurons))}"
        page = atlas.in_one_page(self.mllm, self.mining, found, about, title=title)
        return atlas.Framed(page)

    def save_finding(self, name: str, claims: pd.DataFrame, **tables: Any) -> None:
        """Keep a finding's claims and what they rest on, beside those of other parameters."""
        value = {"finding": name, "model": self.label, "parameters": self.parameters}
        for key, table in {"claims": claims, **tables}.items():
            value[key] = table.to_dict("records") if isinstance(table, pd.DataFrame) else table
        self.run.save(f"finding-{name}", value, of=self._plugged, **self.configuration)
        print(f"finding {name} of {self.label} is kept in the run folder")

    def save_neurons(
        self,
        neurons: xr.DataArray,
        folder: str | Path,
        effect: str = "",
        method: dict[str, Any] | None = None,
    ) -> Path:
        """Neurons to hand on, with a card of this run: `sharing.save_neurons`.

        What `select` made says by itself how; of others `method` has to.
        """
        if not (method := method or dict(neurons.attrs)):
            raise ValueError("say by which method these neurons were found: method={...}")
        rows = {name: f"{len(b)} rows, {b.fingerprint}" for name, b in self.mining.items()}
        made: dict[str, Any] = {"rows": rows, "method": method, "effect": effect}
        return save_neurons(neurons, ROOT / folder, self.mllm, **made)

    def save_figure(self, fig: Figure, name: str) -> None:
        """Keep a figure in the run folder, and without its digest where MINER_FIGURES says."""
        about = self.configuration
        file = self.folder / f"figures/{self.run.stem(name, of=self._plugged, **about)}.png"
        save(fig, file, f"{name}-{self.label}", model=self.label, **about)

    def __repr__(self) -> str:
        m = self.mllm
        what = self.card.what if self.card else "checkpoint"
        size = f"{m.n_layers} decoder layers x {m.n_neurons} neurons"
        return (
            f"{self.label} ({what}): {size}, {m.model.num_parameters() / 1e6:.1f} M parameters\n"
            f"token kinds: {', '.join(m.kinds)}; benchmarks: {', '.join(self.names)}"
        )


def save(fig: Figure, file: Path, name: str, **about: Any) -> None:
    """Write a PNG whose metadata say what it is about; in the folder MINER_FIGURES, if any, too."""
    how: dict[str, Any] = {"format": "png", "dpi": 150, "bbox_inches": "tight"}
    how["metadata"] = {"Configuration": json.dumps(about)}
    folder = os.environ.get("MINER_FIGURES")
    for path in [file, ROOT / folder / f"{name}.png"] if folder else [file]:
        atomically(path, lambda part: fig.savefig(part, **how))


def _union(neurons: xr.DataArray) -> Any:
    """The neurons of all modalities, bool [layer, neuron]: what silencing them depends on."""
    return np.asarray(neurons).any(0)


def _prints(rows: Benchmark | dict[str, Benchmark]) -> Any:
    if isinstance(rows, Benchmark):
        return rows.fingerprint
    return {name: bench.fingerprint for name, bench in rows.items()}
