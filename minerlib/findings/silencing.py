"""What silencing selected neurons does to a model's answers (finding I).

`answers` is, throughout, a callable from neurons (None: the model as it is) to answers, one row
per sample, as `evaluate` returns them; `Workbook.answers` is one that keeps what it has answered.
Neurons are bool [modality, layer, neuron], as `select` returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import pandas as pd
import xarray as xr
from tqdm.auto import tqdm

from minerlib import inference
from minerlib.selection import matched_random, unique
from minerlib.tasks.evaluation import AVERAGE, compare, summarise

Answers = Callable[..., pd.DataFrame]

REVIEWERS_RATIOS = tuple(round(0.005 * i, 3) for i in range(1, 11))
"""Budgets that the paper's reviewers asked for: 0.5 % to 5 % of all neurons."""


def average(table: pd.DataFrame) -> dict[str, float]:
    """The mean over benchmarks of their mean scores, with its 95 % interval: mean, low, high."""
    return summarise(table).iloc[-1][["mean", "low", "high"]].to_dict()


def conditions(
    answers: Answers, picked: Mapping[Hashable, xr.DataArray], column: str = "condition"
) -> pd.DataFrame:
    """The average score with each set of neurons silenced.

    Returns columns `column` (the sets' names), neurons (different ones), share (of all neurons),
    mean, low, high.
    """
    rows = []
    for name, neurons in tqdm(picked.items(), desc=column, leave=False):
        n = unique(neurons)
        share = n / (neurons.sizes["layer"] * neurons.sizes["neuron"])
        rows.append({column: name, "neurons": n, "share": share, **average(answers(neurons))})
    return pd.DataFrame(rows)


def random_draws(
    answers: Answers, neurons: xr.DataArray, draws: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Average scores under random draws of as many different neurons: columns null, draw, mean.

    null is "any layer", or "same layers": the stricter one, with as many in each layer too.
    """
    rows = []
    for null in ("any layer", "same layers"):
        for i in tqdm(range(draws), desc=f"random draws, {null}", leave=False):
            drawn = matched_random(neurons, seed=seed + i, by_layer=null == "same layers")
            rows.append({"null": null, "draw": i, "mean": average(answers(drawn))["mean"]})
    return pd.DataFrame(rows)


def strategies(
    answers: Answers,
    picked: Mapping[str, xr.DataArray],
    default: str,
    *,
    draws: int = 10,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Each strategy's neurons silenced, the model as it is, and the nulls.

    picked holds each strategy's neurons; "random" among them is the paper's null, the whole
    budget whatever the others spend of it. The most damaging and the default strategy get
    matched nulls, see `random_draws`.

    Returns
    -------
    table: condition, neurons, share, mean, low, high, where the ends of matched nulls hold 95 %
    of the draws; null: strategy, null, draw, mean; and the most damaging strategy.
    """
    measured = {name: neurons for name, neurons in picked.items() if name != "random"}
    if default not in measured:
        raise ValueError(f"strategy={default!r}: the null is none; use one of {list(measured)}")
    table = conditions(answers, measured)
    best = str(table.loc[table["mean"].idxmin(), "condition"])
    lines, nulls = [], []
    for name in dict.fromkeys((best, default)):
        drawn = random_draws(answers, measured[name], draws, seed).assign(strategy=name)
        nulls.append(drawn)
        spent = table.set_index("condition").loc[name, ["neurons", "share"]].to_dict()
        for null, part in drawn.groupby("null", sort=False)["mean"]:
            what = f"random, as many as {name}" + (", same layers" if null == "same layers" else "")
            low, high = inference.middle95(part.to_numpy())
            lines.append(
                {"condition": what, **spent, "mean": part.mean(), "low": low, "high": high}
            )
    whole = {"random, whole budget": picked["random"]} if "random" in picked else {}
    start = {"condition": "as it is", "neurons": 0, "share": 0.0, **average(answers())}
    parts = [pd.DataFrame([start]), table, pd.DataFrame(lines), conditions(answers, whole)]
    table = pd.concat(parts, ignore_index=True).astype({"neurons": int})
    return table, pd.concat(nulls, ignore_index=True), best


def doses(answers: Answers, picked: Mapping[float, xr.DataArray], seed: int = 0) -> pd.DataFrame:
    """Dose and response: columns ratio, what ("selected" or "random"), neurons, share, mean, ...

    picked holds the neurons of each budget; random is one draw of as many.
    """
    random = {ratio: matched_random(neurons, seed=seed) for ratio, neurons in picked.items()}
    parts = {"selected": conditions(answers, picked, "ratio")}
    parts["random"] = conditions(answers, random, "ratio")
    return pd.concat([t.assign(what=what) for what, t in parts.items()], ignore_index=True)


def breaking_points(doses: pd.DataFrame, before: float, lost: float = 0.25) -> pd.Series:
    """By `what`, the smallest ratio at which this share of the score `before` is lost, or NaN."""
    gone = doses[before - doses["mean"] >= lost * before - 1e-12]
    return gone.groupby("what")["ratio"].min().reindex(doses["what"].unique())


def constants(answers: Answers, neurons: xr.DataArray, scores: xr.DataArray) -> pd.DataFrame:
    """The neurons silenced with each constant of `deactivate`: columns constant, mean, low, high.

    scores, as `score` or `aggregate` returns them, hold the recorded constants.
    """
    modes = ("zero", "mean", "min")
    tables = {mode: answers(neurons, mode=mode, constants=scores) for mode in modes}
    return pd.DataFrame([{"constant": mode, **average(t)} for mode, t in tables.items()])


def specificity(answers: Answers, alone: Mapping[str, xr.DataArray], seed: int = 0) -> pd.DataFrame:
    """One modality's neurons silenced at a time, every benchmark tested.

    Returns columns silenced (modality), what ("selected", or "random": one draw of as many),
    benchmark, difference (of the score, paired), low, high.
    """
    before, parts = answers(), []
    for modality, neurons in tqdm(alone.items(), desc="modalities", leave=False):
        random = matched_random(neurons, seed=seed)
        for what, silenced in (("selected", neurons), ("random", random)):
            change = compare(before, answers(silenced)).assign(silenced=modality, what=what)
            parts.append(change[change["benchmark"] != AVERAGE])
    columns = ["silenced", "what", "benchmark", "difference", "low", "high"]
    return pd.concat(parts, ignore_index=True)[columns]


def by_medium(specific: pd.DataFrame, media: Mapping[str, str]) -> pd.DataFrame:
    """Mean drop on the benchmarks with a modality's medium and on those without.

    media holds each benchmark's medium; modalities that no benchmark has as its medium are left
    out. Returns columns silenced, with, without, specific (the difference of the two).
    """
    own = specific[specific["what"] == "selected"]
    own = own[own["silenced"].isin(set(media.values()) - {"text"})]
    where = own["benchmark"].map(media).eq(own["silenced"]).map({True: "with", False: "without"})
    drops = -own.assign(where=where).pivot_table("difference", "silenced", "where", sort=False)
    drops = drops.reindex(columns=["with", "without"]).rename_axis(columns=None).reset_index()
    return drops.assign(specific=drops["with"] - drops["without"])


def claims(table: pd.DataFrame, changes: pd.DataFrame, null: pd.DataFrame) -> pd.DataFrame:
    """The claim that silencing hurts more than random neurons do, for each strategy and null.

    table and null as `strategies` returns them; changes as `compare` does, with a column
    strategy. It holds if the silenced model's interval lies below every random draw; p is the
    share of draws, one-sided, that hurt as much.

    Returns the columns of `inference.claims_table`, then strategy, neurons, before, after,
    change, random draws.
    """
    at, lines = table.set_index("condition"), []
    ends = ["mean", "low", "high"]
    for (name, where), part in null.groupby(["strategy", "null"], sort=False):
        draws, line = part["mean"].to_numpy(), at.loc[name]
        # The last line is the average over benchmarks, or the only benchmark.
        change = changes.loc[changes["strategy"] == name, ["difference", "low", "high"]].iloc[-1]
        before, after = (inference.spread(*of[ends]) for of in (at.loc["as it is"], line))
        change = inference.spread(*change, sign="+")
        drawn = inference.spread(draws.mean(), draws.min(), draws.max())
        lines.append(
            {
                "claim": f"silencing what {name} selects hurts more than random ones, {where}",
                "measured": f"{before} to {after}, change {change}",
                "null": drawn,
                "p": inference.rank_p(line["mean"], draws, "less"),
                "verdict": inference.below_every_draw(line["high"], draws),
                "strategy": name,
                "neurons": int(line["neurons"]),
                "before": before,
                "after": after,
                "change": change,
                "random draws": drawn,
            }
        )
    own = pd.DataFrame(lines)[["strategy", "neurons", "before", "after", "change", "random draws"]]
    return inference.claims_table("I", lines).join(own)
