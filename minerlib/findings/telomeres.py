"""Semantic telomeres as numbers with a null (finding IV), and their rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr
from sklearn.metrics import pairwise_distances

from minerlib import inference
from minerlib.artifacts import computation
from minerlib.deactivation import deactivate
from minerlib.findings import clouds
from minerlib.findings.attention import attention_sinks
from minerlib.findings.states import States, hidden_states
from minerlib.inference import Resampling, table_row
from minerlib.model import MLLM
from minerlib.tasks.spec import Sample

MASSIVE = 1000
"""Largest over median coordinate from which Sun et al. (2024) speak of a massive activation."""


@computation(version=1)
def telomeres(
    states: States,
    kind: str = "special",
    toward: str = "text",
    *,
    k: int = 10,
    n_boot: int = 1000,
    n_null: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether special tokens sit at the ends of the text and hold on to it, by layer (finding IV).

    Measures: `axis_end`, how far out the special tokens lie on the text cloud's principal axis,
    as percentiles of the text tokens folded about the median (0 the middle, 1 an end, text
    itself averages 0.5); `sequence_end`, the same along the prompt; `axis_order`, whether that
    axis is the order of the text (absolute rank correlation with the place in the prompt);
    `attachment`, share of the k nearest tokens of text and media that are text, over chance
    (no row without media); `end_by_length`, rank correlation over samples of axis_end with the
    number of text tokens (two-sided: ends that stay put give 0). Null: labels shuffled within
    each sample (special with text; for attachment, text with media); text tokens' places, or
    samples' lengths, shuffled.

    Returns
    -------
    Columns layer, measure, value, low, high, null, null_low, null_high, p.
    """
    part = states.of(toward, kind)
    r = Resampling(part.tokens, kind, n_boot, n_null, seed)
    along = (part.tokens["position"] / (part.tokens["length"] - 1)).to_numpy()
    text = ~r.own
    places = inference.shuffles(clouds.standard_ranks(along[text]), r.group[text], n_null, seed)
    count = part.tokens[text].groupby("sample")["count"].first().to_numpy()
    lengths = inference.shuffles(clouds.standard_ranks(count), np.zeros(r.size), n_null, seed)
    sequence = r.row("sequence_end", clouds.extremity(along, r.second), r.second)

    used = states.tokens["sample"].isin(part.tokens["sample"]).to_numpy()
    is_end = (states.tokens["kind"] == kind).to_numpy()
    ends, anchors = used & is_end, used & ~is_end
    is_text = (states.tokens["kind"] == toward).to_numpy()[anchors]
    labels = inference.shuffles(is_text, states.tokens["sample"].to_numpy()[anchors], n_null, seed)
    table = []
    for layer, x in enumerate(part.hidden):
        z = x @ clouds.principal_axis(x[text])
        out = clouds.extremity(z, r.second)
        rows = [r.row("axis_end", out, r.second), sequence]

        product = np.zeros((n_null + 1, len(x)))
        product[:, text] = places * clouds.standard_ranks(z[text])
        mean = r.by_sample(product, text)
        drawn = np.abs(inference.weighted(mean[0][:, None], r.draws)[:, 0])
        mean = np.abs(mean.mean(1))
        rows.append(table_row("axis_order", mean[0], drawn, mean[1:]))

        if not is_text.all():
            full = states.hidden[layer]
            to = pairwise_distances(full[ends], full[anchors])
            near = np.argpartition(to, min(k, to.shape[1]) - 1, axis=1)[:, :k]
            share = np.stack([row[near].mean(1) for row in labels]) / is_text.mean()
            values = np.zeros((n_null + 1, len(x)))
            values[:, r.own] = share
            rows.append(r.row("attachment", values, r.own))

        if count.min() < count.max():
            ranks = clouds.standard_ranks(r.by_sample(out[0], r.own))
            rho = lengths @ ranks / r.size
            drawn = inference.weighted((lengths[0] * ranks)[:, None], r.draws)[:, 0]
            rows.append(table_row("end_by_length", rho[0], drawn, rho[1:], greater=None))
        table += [{"layer": layer, **row} for row in rows]
    return pd.DataFrame(table)


@computation(version=1)
def against_recurring(
    states: States,
    kind: str = "special",
    toward: str = "text",
    *,
    share: float = 0.1,
    n_boot: int = 1000,
    n_null: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """`axis_end` of `telomeres` under a stricter null: as many different recurring text tokens.

    Any token that recurs at about the same place has some fixed place on an axis. Each draw of
    the null takes as many different tokens as the special ones, from the text tokens that were
    drawn in at least `share` of the prompts.

    Returns
    -------
    Columns layer, measure, value, low, high, null, null_low, null_high, p, n (different special
    tokens), among (recurring text tokens); no rows where these are fewer.
    """
    part = states.of(toward, kind)
    r = Resampling(part.tokens, kind, n_boot, 0, seed)
    ids = part.tokens["id"].to_numpy()
    prompts = part.tokens[~r.own].groupby("id")["sample"].nunique()
    recurring = prompts.index[prompts / r.size >= share].to_numpy()
    n, among = len(np.unique(ids[r.own])), len(recurring)
    if among < n:
        return pd.DataFrame(columns=["layer", "n", "among"])
    rng = np.random.default_rng(seed)
    words = (rng.choice(recurring, n, replace=False) for _ in range(n_null))
    chosen = np.stack([r.own, *(np.isin(ids, draw) & ~r.own for draw in words)])
    rows = [
        {"layer": layer, **r.row("axis_end", out, chosen), "n": n, "among": among}
        for layer, out in enumerate(_outwardness(part, r.own))
    ]
    return pd.DataFrame(rows)


def _outwardness(part: States, own: np.ndarray) -> Iterator[np.ndarray]:
    """How far out each token lies on the axis of those that are not `own`, [1, token] by layer."""
    for x in part.hidden:
        yield clouds.extremity(x @ clouds.principal_axis(x[~own]), own[None])


def axis_ends(states: States, kind: str = "special", toward: str = "text") -> pd.DataFrame:
    """Mean axis end of each prompt's special tokens: columns layer, sample, axis_end."""
    part = states.of(toward, kind)
    own = (part.tokens["kind"] == kind).to_numpy()
    outs = enumerate(_outwardness(part, own))
    sample = part.tokens["sample"][own]
    means = {layer: pd.Series(out[0, own]).groupby(sample.to_numpy()).mean() for layer, out in outs}
    return pd.concat(means, names=["layer", "sample"]).rename("axis_end").reset_index()


def doubled(prompt: str) -> str:
    """The prompt twice."""
    return f"{prompt}\n{prompt}"


def reversed_parts(prompt: str) -> str | None:
    """The prompt with its blank-line blocks in reverse order, or the sentences of a single block.

    None where there is only one.
    """
    parts = prompt.split("\n\n")
    if len(parts) == 1:
        parts = prompt.replace("? ", "?\n").replace(". ", ".\n").split("\n")
    return "\n".join(parts[::-1]) if len(parts) > 1 else None


CHANGES: dict[str, Callable[[str], str | None]] = {"doubled": doubled, "reversed": reversed_parts}
"""How a prompt is changed in `changed_ends`."""


@computation(version=1)
def changed_ends(
    mllm: MLLM, samples: Sequence[Sample], states: States, change: str, **drawn
) -> pd.DataFrame:
    """Axis ends of the special tokens before and after a change of the prompts.

    change is a key of `CHANGES`; prompts that it leaves out count in neither. states are those of
    the samples as they are, drawn as `drawn` (for `hidden_states`) says; axis and percentiles are
    taken anew.

    Returns
    -------
    Columns condition ("as it is", the change, "change": the paired one), layer, axis_end, low,
    high, n (prompts); no rows where no prompt can be changed.
    """
    texts = {i: CHANGES[change](sample.prompt) for i, sample in enumerate(samples)}
    kept = {i: text for i, text in texts.items() if text is not None}
    if not kept:
        return pd.DataFrame(columns=["condition", "layer"])
    was = axis_ends(states.where(states.tokens["sample"].isin(kept)))
    new = [replace(samples[i], prompt=text) for i, text in kept.items()]
    now = axis_ends(hidden_states(mllm, new, **drawn))
    now["sample"] = np.array(list(kept))[now["sample"]]
    each = {"as it is": was, change: now}
    each["change"] = inference.paired(was, now, "axis_end", ["layer"])
    means = {k: inference.mean_over_samples(t, "axis_end", ["layer"]) for k, t in each.items()}
    return pd.concat(means, names=["condition"]).reset_index("condition").reset_index(drop=True)


@computation(version=1)
def massive_activations(states: States, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Largest over median magnitude of the hidden states, by layer and kind (Sun et al. 2024).

    Returns
    -------
    Columns layer, kind, ratio (mean over samples), low, high, massive (share of tokens above
    `MASSIVE`), dimension (the one that is most often the largest), first (the ratio of the prompt's
    first token, NaN unless drawn).
    """
    tokens, table = states.tokens, []
    first = (tokens["position"] == 0).to_numpy()
    for layer, x in enumerate(states.hidden):
        ratio = clouds.massive(x)
        for kind in dict.fromkeys(tokens["kind"]):
            of = (tokens["kind"] == kind).to_numpy()
            per = pd.Series(ratio[of]).groupby(tokens["sample"].to_numpy()[of]).mean().to_numpy()
            mean, low, high = inference.interval(per[:, None], n_boot, seed)
            top = np.bincount(np.abs(x[of]).argmax(1)).argmax()
            row = {"layer": layer, "kind": kind, "ratio": mean[0], "low": low[0], "high": high[0]}
            head = ratio[of & first].mean() if (of & first).any() else np.nan
            extra = {"massive": (ratio[of] > MASSIVE).mean(), "dimension": int(top), "first": head}
            table.append(row | extra)
    return pd.DataFrame(table)


def ends_and_rivals(states: States, sinks: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Axis end of each prompt, and the other measures, as means over the decoder layers.

    sinks is the table of `attention_sinks`. Columns sample, axis_end, and, the same in every row,
    axis_order, attachment (NaN without media), attention on first token, attention on later
    special, largest coordinate.
    """
    ends = axis_ends(states).query("layer > 0").groupby("sample", as_index=False)["axis_end"].mean()
    table = telomeres(states, n_boot=2, n_null=2, seed=seed).query("layer > 0")
    mean = table.groupby("measure")["value"].mean()
    collected = sinks.groupby("set")["collected"].mean()
    peaks = massive_activations(states, n_boot=2).query("layer > 0 and kind == 'special'")
    others = {
        "axis_order": mean["axis_order"],
        "attachment": mean.get("attachment", np.nan),
        "attention on first token": collected["first"],
        "attention on later special": collected["later special"],
        "largest coordinate": peaks["ratio"].mean(),
    }
    return ends.assign(**others)


@computation(version=1)
def silenced_ends(
    mllm: MLLM, bench, neurons: xr.DataArray, *, batch_size: int = 8, **drawn
) -> pd.DataFrame:
    """`ends_and_rivals` with these neurons silenced; `drawn` as in `hidden_states`."""
    with deactivate(mllm, neurons):
        states = hidden_states(mllm, bench, batch_size=batch_size, **drawn)
        sinks = attention_sinks(mllm, bench, batch_size=batch_size)
    return ends_and_rivals(states, sinks, drawn.get("seed", 0))


def silenced_beside(
    before: pd.DataFrame, after: pd.DataFrame, draws: Sequence[pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of `ends_and_rivals` as the model is, silenced, and with each random draw silenced.

    Returns
    -------
    summary: a row per measure, columns as it is, special silenced, random silenced, lowest draw,
    highest draw. change: of axis_end, columns silenced (special, random), axis_end, low, high:
    paired over prompts with its 95 % interval, and the mean and range of the draws.
    """
    means = [table.drop(columns="sample").mean() for table in (before, after, *draws)]
    each = pd.concat(means[2:], axis=1)
    columns = {
        "as it is": means[0],
        "special silenced": means[1],
        "random silenced": each.mean(axis=1),
        "lowest draw": each.min(axis=1),
        "highest draw": each.max(axis=1),
    }
    summary = pd.DataFrame(columns).rename(index=lambda name: name.replace("_", " "))
    own = inference.paired(before, after, "axis_end", [])
    mean, low, high = inference.interval(own["axis_end"].to_numpy())
    moved = each.loc["axis_end"] - means[0]["axis_end"]
    ends = [("special", float(mean), float(low), float(high))]
    ends.append(("random", moved.mean(), moved.min(), moved.max()))
    return summary, pd.DataFrame(ends, columns=["silenced", "axis_end", "low", "high"])


def claims(
    measured: pd.DataFrame,
    recurring: pd.DataFrame,
    without_first: pd.DataFrame,
    changed: Mapping[str, pd.DataFrame],
    sinks: pd.DataFrame,
    peaks: pd.DataFrame,
    moved: pd.DataFrame,
    sink: float = 2.0,
) -> list[dict]:
    """The lines of the closing table.

    measured and without_first are tables of `telomeres`, recurring that of `against_recurring`,
    changed those of `changed_ends` by name, sinks that of `attention_sinks` with layers counted
    from 1, peaks that of `massive_activations`, moved the second table of `silenced_beside`.
    """
    inner, later = (table[table["layer"] > 0] for table in (measured, without_first))
    ends = inner[inner["measure"] == "axis_end"]
    at_ends = inference.over_layers(ends)
    lines = [at_ends.claim("special tokens lie at the ends of the text cloud")]
    nulls = {
        "further out than as many recurring words": recurring[recurring["layer"] > 0],
        "the same without the first token": later[later["measure"] == "axis_end"],
        "the text cloud's axis is the order of the text": inner[inner["measure"] == "axis_order"],
        "special tokens have text, not media, around them": inner[inner["measure"] == "attachment"],
    }
    lines += [inference.over_layers(table).claim(t) for t, table in nulls.items() if len(table)]
    bound = ends["null_high"].to_numpy()
    for name, table in changed.items():
        by = {condition: of[of["layer"] > 0] for condition, of in table.groupby("condition")}
        if not by:
            continue
        stays = inference.over_layers(by[name], bound, value="axis_end")
        most = by["change"].loc[by["change"]["axis_end"].abs().idxmax()]
        change = inference.spread(*most[["axis_end", "low", "high"]], sign="+")
        lines.append(
            {
                "claim": f"they stay at the ends when the prompt is {name}",
                "measured": f"change {change} at most, layer {most['layer']}; "
                f"yes at {stays.yes.sum()} of {len(stays.yes)}",
                "null": f"text below {bound.max():.2f}",
                "verdict": inference.given(at_ends.verdict, stays.verdict),
            }
        )
    rivals = {
        "the first token is an attention sink": "first",
        "later special tokens are attention sinks": "later special",
    }
    for text, which in rivals.items():
        layers = inference.over_layers(sinks[sinks["set"] == which], sink, value="collected")
        lines.append(layers.claim(f"rival: {text}", f"sink from {sink:.2f}", "collected"))
    special = peaks[(peaks["kind"] == "special") & (peaks["layer"] > 0)]
    layers = inference.over_layers(special, MASSIVE, value="ratio")
    text = "rival: special tokens are massive activations"
    lines.append(layers.claim(text, f"massive from {MASSIVE}", "ratio"))
    own, random = (
        moved.set_index("silenced").loc[which, ["axis_end", "low", "high"]]
        for which in ("special", "random")
    )
    verdict = inference.beyond(own["low"], own["high"], min(0, random["low"]), greater=False)
    lines.append(
        {
            "claim": "silencing the special neurons moves them off the ends",
            "measured": inference.spread(*own, sign="+"),
            "null": f"{inference.spread(*random, sign='+')} (random neurons)",
            "verdict": verdict,
        }
    )
    return lines
