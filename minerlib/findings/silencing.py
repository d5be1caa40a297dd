"""What silencing selected neurons does to a model's answers (finding I).

`answers` is, throughout, a callable from neurons (None: the model as it is) to the rows that
`evaluate` returns, such as `Workbook.answers`. Neurons are bool [modality, layer, neuron].
"""

from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from tqdm import tqdm

from minerlib import inference
from minerlib.inference import Estimate
from minerlib.selection import unique
from minerlib.tasks.evaluation import (
    AVERAGE,
    KEY,
    above_chance,
    by_benchmark,
    compare,
    guesses,
    paired,
    summarise,
)

Answers = Callable[..., pd.DataFrame]
Sets = Mapping[Any, xr.DataArray]


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


# --- more than random neurons --------------------------------------------------------------------


def beyond_draws(
    before: pd.DataFrame, after: pd.DataFrame, drawn: Sequence[pd.DataFrame]
) -> Estimate:
    """The share of the score above chance that is lost, less what the draws lose on average.

    Row by row: the draws' mean score minus the score after, over what the model had above chance,
    benchmarks counting alike (a ratio, linearised); rows about one medium together, and with the
    spread of the draws. NaN where the model is not above chance: nothing can be lost.
    """
    scores = [paired(before, table).set_index(KEY)["score_b"] for table in (after, *drawn)]
    rows = before.set_index(KEY)
    rows["lost"] = pd.concat(scores[1:], axis=1).mean(axis=1) - scores[0]
    rows = rows.reset_index()
    rows["above"] = rows["score"] - guesses(rows)
    means = [above_chance(table) for table in drawn]
    n = len(means)
    extra = float(np.var(means, ddof=1)) / n if n > 1 else 0.0
    lost, above, media = (by_benchmark(rows, name) for name in ("lost", "above", "medium"))
    return inference.share(lost, above, media, extra, max(n, 2))


def nats(told: pd.DataFrame) -> np.ndarray:
    """Of each set silenced, the mean over benchmarks of the reference's log-probability [set]."""
    means = told.groupby(["neurons", "benchmark"])["logprob"].mean(skipna=False)
    return means.groupby("neurons").mean().to_numpy()


def judged(
    name: str,
    before: pd.DataFrame,
    after: pd.DataFrame,
    drawn: Sequence[pd.DataFrame],
    told: pd.DataFrame | None = None,
) -> dict:
    """The line of a claim (`inference.judge`): the effect in scores, its rank in log-probability.

    before, after and drawn hold answers; told the references' log-probabilities with the selected
    neurons silenced (set 0) and each draw, as of `Workbook.logprobs` (none: judged by the effect).
    """
    effect, p = beyond_draws(before, after, drawn), None
    if told is not None:
        selected, *null_nats = nats(told)
        p = inference.rank_p(selected, null_nats, "less")
    start, end = (inference.spread(*average(table).values()) for table in (before, after))
    means = [average(table)["mean"] for table in drawn]
    null = f"{np.mean(means):.2f} ({len(means)} draws: {min(means):.2f} to {max(means):.2f})"
    line = inference.judge(name, effect, null, p, before.groupby("benchmark").size().max())
    return line | {"measured": f"{start} to {end}; {line['measured']} of it lost"}


# --- how answers fail ----------------------------------------------------------------------------

FAILURES = ("right", "wrong", "loop", "empty")


def failure(answer: str, score: float) -> str:
    """One of `FAILURES`: at least half the score, no word at all, words over and over, or wrong.

    A loop is an answer of at least six words (or, in a script without blanks, characters) of which
    at most a third differ.
    """
    if score >= 0.5:
        return "right"
    if not any(character.isalnum() for character in answer):
        return "empty"
    parts = answer.split()
    if len(parts) <= 2 and not answer.isascii():
        parts = list("".join(parts))
    return "loop" if len(parts) >= 6 and len(set(parts)) <= len(parts) / 3 else "wrong"


def failures(conditions: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The share of answers of each kind (`FAILURES`), by condition and benchmark."""
    lines = {}
    for what, table in conditions.items():
        kinds = [failure(*x) for x in table[["answer", "score"]].itertuples(index=False)]
        for name, of in table.assign(kind=kinds).groupby("benchmark", sort=False)["kind"]:
            lines[what, name] = of.value_counts(normalize=True)
    found = pd.DataFrame(lines).T.reindex(columns=list(FAILURES)).fillna(0.0)
    return found.rename_axis(["condition", "benchmark"])


def examples(conditions: Mapping[str, pd.DataFrame], each: int = 2) -> pd.DataFrame:
    """What is asked, the reference, and the answers: a few rows of each benchmark.

    The first condition is the model as it is: only rows that it answers right are shown, and of
    them first those that the second condition answers otherwise.
    """
    first, *others = conditions.values()
    right = first[first["score"] >= 0.5]
    if others:
        then = right[KEY].merge(others[0][[*KEY, "answer"]], on=KEY, how="left")["answer"]
        same = right["answer"].to_numpy() == then.to_numpy()
        right = right.iloc[np.lexsort((same, pd.factorize(right["benchmark"])[0]))]
    right = right.groupby("benchmark", sort=False).head(each)
    asked = right["prompt"].map(lambda prompt: shorten(prompt.partition("\n")[0], 48))
    table = right[KEY].assign(asked=asked, reference=right["references"].str[0])
    for what, answers in conditions.items():
        table = table.merge(answers[[*KEY, "answer"]].rename(columns={"answer": what}), on=KEY)
    return table.drop(columns="row")


# --- dose, constants, specificity ----------------------------------------------------------------


def breaking_points(doses: pd.DataFrame, before: float, lost: float = 0.5) -> pd.Series:
    """By `what`, the fewest neurons that cost this share of the score `before`; NaN: none do."""
    gone = doses[before - doses["mean"] >= lost * before - 1e-12]
    return gone.groupby("what")["neurons"].min().reindex(doses["what"].unique())


def constants(answers: Answers, neurons: xr.DataArray, scores: xr.DataArray) -> pd.DataFrame:
    """Silenced with each constant of `deactivate`, which scores hold: constant, mean, low, high."""
    modes = {m: answers(neurons, mode=m, constants=scores) for m in ("zero", "mean", "min")}
    return pd.DataFrame([{"constant": m, **average(table)} for m, table in modes.items()])


def specificity(answers: Answers, alone: Mapping[str, Sets]) -> pd.DataFrame:
    """One modality's neurons silenced at a time, on every benchmark.

    alone holds, by what they are ("selected", "random"), each modality's neurons. Columns silenced,
    what, benchmark, difference (paired), low, high.
    """
    before, parts = answers(), []
    for what, sets in alone.items():
        for modality, neurons in tqdm(sets.items(), desc=what, leave=False):
            change = compare(before, answers(neurons)).assign(silenced=modality, what=what)
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
