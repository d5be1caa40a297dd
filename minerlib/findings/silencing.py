"""What silencing selected neurons does to a model's answers (finding I).

`answers` is, throughout, a callable from neurons (None: the model as it is) to the rows that
`evaluate` returns, such as `Workbook.answers`. Neurons are bool [modality, layer, neuron].
"""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import xarray as xr
from tqdm import tqdm

from minerlib import inference
from minerlib.selection import matched_random, unique
from minerlib.tasks.evaluation import AVERAGE, compare, summarise

Answers = Callable[..., pd.DataFrame]
Sets = Mapping[Any, xr.DataArray]

REVIEWERS_RATIOS = tuple(round(0.005 * i, 3) for i in range(1, 11))
"""Budgets that the paper's reviewers asked for: 0.5 % to 5 % of all neurons."""


def average(table: pd.DataFrame) -> dict[str, float]:
    """The mean over benchmarks of their mean scores, with its 95 % interval: mean, low, high."""
    return summarise(table).iloc[-1][["mean", "low", "high"]].to_dict()


def conditions(answers: Answers, picked: Sets, column: str = "condition") -> pd.DataFrame:
    """Average scores with each set silenced: `column`, neurons, share (of all), mean, low, high."""
    rows = []
    for name, neurons in tqdm(picked.items(), desc=column, leave=False):
        spent = {"neurons": unique(neurons), "share": neurons.values.any(0).mean()}
        rows.append({column: name, **spent, **average(answers(neurons))})
    return pd.DataFrame(rows)


def random_draws(answers: Answers, neurons: xr.DataArray, draws=10, seed=0) -> pd.DataFrame:
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
    answers: Answers, picked: Sets, default: str, *, draws: int = 10, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Each strategy's neurons silenced, the model as it is, and the nulls.

    picked holds each strategy's neurons, and as "random" the paper's null, the whole budget. The
    most damaging strategy (the default if none is clearly worse) and the default get matched nulls
    (`random_draws`). Returns a table: condition, neurons, share, mean, low, high (of these nulls
    95 % of the draws); the draws: strategy, null, draw, mean; and the most damaging strategy.
    """
    measured = {name: neurons for name, neurons in picked.items() if name != "random"}
    if default not in measured:
        raise ValueError(f"strategy={default!r}: the null is none; use one of {list(measured)}")
    table = conditions(answers, measured)
    at, lines = table.set_index("condition"), []
    best = str(at["mean"].idxmin())
    if at["mean"][default] - at["mean"][best] <= inference.TOLERANCE:  # one answer would decide
        best = default
    tested = {name: measured[name] for name in (best, default)}
    nulls = [random_draws(answers, n, draws, seed).assign(strategy=s) for s, n in tested.items()]
    null = pd.concat(nulls, ignore_index=True)
    for (name, where), part in null.groupby(["strategy", "null"], sort=False)["mean"]:
        what = f"random, as many as {name}" + (f", {where}" if where == "same layers" else "")
        low, high = inference.middle95(part)
        spent = {"condition": what, **at.loc[name, ["neurons", "share"]]}
        lines.append({**spent, "mean": part.mean(), "low": low, "high": high})
    whole = conditions(answers, {"random, whole budget": picked["random"]})
    start = {"condition": "as it is", "neurons": 0, "share": 0.0, **average(answers())}
    parts = pd.DataFrame([start]), table, pd.DataFrame(lines), whole
    return pd.concat(parts, ignore_index=True).astype({"neurons": int}), null, best


def doses(answers: Answers, picked: Sets, seed: int = 0) -> pd.DataFrame:
    """`conditions` by ratio, of its neurons and of one random draw of as many (column `what`)."""
    random = {ratio: matched_random(neurons, seed=seed) for ratio, neurons in picked.items()}
    sets = {"selected": picked, "random": random}
    tables = [conditions(answers, s, "ratio").assign(what=what) for what, s in sets.items()]
    return pd.concat(tables, ignore_index=True)


def breaking_points(doses: pd.DataFrame, before: float, lost: float = 0.25) -> pd.Series:
    """By `what`, the smallest ratio at which this share of the score `before` is lost, or NaN."""
    gone = doses[before - doses["mean"] >= lost * before - 1e-12]
    return gone.groupby("what")["ratio"].min().reindex(doses["what"].unique())


def constants(answers: Answers, neurons: xr.DataArray, scores: xr.DataArray) -> pd.DataFrame:
    """Silenced with each constant of `deactivate`, which scores hold: constant, mean, low, high."""
    modes = {m: answers(neurons, mode=m, constants=scores) for m in ("zero", "mean", "min")}
    return pd.DataFrame([{"constant": m, **average(table)} for m, table in modes.items()])


def specificity(answers: Answers, alone: Sets, seed: int = 0) -> pd.DataFrame:
    """One modality's neurons silenced at a time, and one draw of as many, on every benchmark.

    Columns silenced, what ("selected" or "random"), benchmark, difference (paired), low, high.
    """
    before, parts = answers(), []
    for modality, neurons in tqdm(alone.items(), desc="modalities", leave=False):
        for what, which in (("selected", neurons), ("random", matched_random(neurons, seed=seed))):
            change = compare(before, answers(which)).assign(silenced=modality, what=what)
            parts.append(change[change["benchmark"] != AVERAGE])
    columns = ["silenced", "what", "benchmark", "difference", "low", "high"]
    return pd.concat(parts, ignore_index=True)[columns]


def by_medium(specific: pd.DataFrame, media: Mapping[str, str]) -> pd.DataFrame:
    """Mean drop on the benchmarks with a modality's medium and on those without.

    media holds each benchmark's; modalities that none has are left out. Columns silenced, with,
    without, specific (the difference of the two).
    """
    asked = specific["silenced"].isin(set(media.values()) - {"text"})
    own = specific[asked & (specific["what"] == "selected")]
    where = own["benchmark"].map(media).eq(own["silenced"]).map({True: "with", False: "without"})
    drops = -own.assign(where=where).pivot_table("difference", "silenced", "where", sort=False)
    drops = drops.reindex(columns=["with", "without"]).rename_axis(columns=None).reset_index()
    return drops.assign(specific=drops["with"] - drops["without"])


def claims(table: pd.DataFrame, changes: pd.DataFrame, null: pd.DataFrame) -> pd.DataFrame:
    """The claim that silencing hurts more than random neurons, for each strategy and null.

    table and null as of `strategies`; changes as of `compare`, with a column strategy. Columns of
    `inference.claims_table`, then strategy, neurons, before, after, change, random draws.
    """
    at, spread, lines = table.set_index("condition"), inference.spread, []
    start, ends = at.loc["as it is"], ["mean", "low", "high"]
    for (name, where), part in null.groupby(["strategy", "null"], sort=False):
        draws, line = part["mean"].to_numpy(), at.loc[name]
        change = changes[changes["strategy"] == name].iloc[-1]
        own = {"strategy": name, "neurons": int(line["neurons"])}
        own |= {"before": spread(*start[ends]), "after": spread(*line[ends])}
        own["change"] = spread(*change[["difference", "low", "high"]], sign="+")
        own["random draws"] = spread(draws.mean(), draws.min(), draws.max())
        claim = f"silencing {name} neurons hurts more than as many random, {where}"
        measured = f"{own['before']} to {own['after']}, change {own['change']}"
        verdict = inference.beyond(line["high"], line["high"], draws.min(), greater=False)
        p = inference.rank_p(line["mean"], draws, "less")
        lines.append(inference.line(claim, measured, own["random draws"], verdict, p) | own)
    return inference.claims_table("I", lines).join(pd.DataFrame(lines)[list(own)])
