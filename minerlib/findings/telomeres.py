"""Semantic telomeres as numbers with a null (finding IV), and their rivals."""

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
from minerlib.model import MLLM
from minerlib.tasks.spec import Sample

MASSIVE = 1000  # largest over median coordinate from which an activation is (Sun et al. 2024)
ENDS = ["axis_end", "low", "high"]


@computation(version=1)
def telomeres(
    states: States, *, k: int = 10, n_boot: int = 1000, n_null: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Whether special tokens sit at the ends of the text and hold on to it, by layer (finding IV).

    Measures: `axis_end`, how far out the special tokens lie on the text cloud's principal axis,
    as percentiles of the text tokens folded about the median (0 the middle, 1 an end; text itself
    averages 0.5); `sequence_end`, the same along the prompt; `axis_order`, absolute rank
    correlation of that axis with the text's order; `attachment`, share of the k nearest tokens of
    text and media that are text, over chance (no row without media). Null: labels shuffled within
    each sample (special with text; for attachment, text with media); text tokens' places shuffled.
    Columns layer and those of `inference.table_row`.
    """
    part = states.of("text", "special")
    r = inference.Resampling(part.tokens, "special", n_boot, n_null, seed)
    along = (part.tokens["position"] / (part.tokens["length"] - 1)).to_numpy()
    text, kinds, of = ~r.own, states.tokens["kind"], states.tokens["sample"]
    places = inference.shuffles(clouds.standard_ranks(along[text]), r.group[text], n_null, seed)
    sequence = r.means(clouds.extremity(along, r.second), r.second)
    used, ends = of.isin(part.tokens["sample"]), kinds == "special"
    ends, anchors = used & ends, used & ~ends
    is_text = (kinds[anchors] == "text").to_numpy()
    labels = inference.shuffles(is_text, of[anchors].to_numpy(), n_null, seed)
    table = []
    for layer, x in enumerate(part.hidden):
        z, values = x @ clouds.principal_axis(x[text]), np.zeros((n_null + 1, len(x)))
        values[:, text] = places * clouds.standard_ranks(z[text])
        found = {
            "axis_end": r.means(clouds.extremity(z, r.second), r.second),
            "sequence_end": sequence,
            "axis_order": map(np.abs, r.means(values, text)),
        }
        if not is_text.all():
            to = pairwise_distances(*(states.hidden[layer, side] for side in (ends, anchors)))
            near = np.argpartition(to, min(k, to.shape[1]) - 1, axis=1)[:, :k]
            values[:, r.own] = np.stack([row[near].mean(1) for row in labels]) / is_text.mean()
            found["attachment"] = r.means(values, r.own)
        for measure, means in found.items():
            table.append({"layer": layer, **inference.table_row(measure, *means)})
    return pd.DataFrame(table)


def _outwardness(part: States, own: np.ndarray) -> Iterator[np.ndarray]:
    """How far out each token lies on the axis of those that are not `own`, [1, token] by layer."""
    for x in part.hidden:
        yield clouds.extremity(x @ clouds.principal_axis(x[~own]), own[None])


@computation(version=1)
def against_recurring(
    states: States, *, share: float = 0.1, n_boot: int = 1000, n_null: int = 200, seed: int = 0
) -> pd.DataFrame:
    """`axis_end` under a stricter null, for any token that recurs has some fixed place on an axis.

    A draw takes as many different tokens as the special ones, of text tokens in at least `share` of
    the prompts. Columns of `telomeres`, n (special tokens), among (text); no rows where n > among.
    """
    part = states.of("text", "special")
    r = inference.Resampling(part.tokens, "special", n_boot, 0, seed)
    ids = part.tokens["id"].to_numpy()
    prompts = part.tokens[~r.own].groupby("id")["sample"].nunique()
    recurring = prompts.index[prompts / r.size >= share].to_numpy()
    n, among = len(np.unique(ids[r.own])), len(recurring)
    if among < n:
        return pd.DataFrame(columns=["layer", "n", "among"])
    rng = np.random.default_rng(seed)
    words = (rng.choice(recurring, n, replace=False) for _ in range(n_null))
    chosen = np.stack([r.own, *(np.isin(ids, draw) & ~r.own for draw in words)])
    outs = (np.broadcast_to(out, chosen.shape) for out in _outwardness(part, r.own))
    rows = [inference.table_row("axis_end", *r.means(out, chosen)) for out in outs]
    return pd.DataFrame(rows).assign(layer=range(len(rows)), n=n, among=among)


def axis_ends(states: States) -> pd.DataFrame:
    """Mean axis end of each prompt's special tokens: columns layer, sample, axis_end."""
    part = states.of("text", "special")
    own = (part.tokens["kind"] == "special").to_numpy()
    sample = part.tokens["sample"][own].to_numpy()
    outs = enumerate(_outwardness(part, own))
    means = {layer: pd.Series(out[0, own]).groupby(sample).mean() for layer, out in outs}
    return pd.concat(means, names=["layer", "sample"]).rename("axis_end").reset_index()


def reversed_parts(prompt: str) -> str | None:
    """The prompt's blank-line blocks, or a single block's sentences, in reverse; None if one."""
    parts = prompt.split("\n\n")
    if len(parts) == 1:
        parts = prompt.replace("? ", "?\n").replace(". ", ".\n").split("\n")
    return "\n".join(parts[::-1]) if len(parts) > 1 else None


CHANGES: dict[str, Callable[[str], str | None]] = {  # None leaves a prompt out
    "doubled": lambda prompt: f"{prompt}\n{prompt}",
    "reversed": reversed_parts,
}


@computation(version=1)
def changed_ends(
    mllm: MLLM, samples: Sequence[Sample], states: States, change: str, **drawn
) -> pd.DataFrame:
    """Axis ends of the special tokens before and after a change (of `CHANGES`) of the prompts.

    states are those of the samples as they are, drawn as `drawn` (for `hidden_states`) says.
    Columns condition ("as it is", the change, "change": the paired one), layer, axis_end, low,
    high, n (prompts); no rows where no prompt can be changed.
    """
    texts = (CHANGES[change](sample.prompt) for sample in samples)
    new = {i: replace(samples[i], prompt=t) for i, t in enumerate(texts) if t is not None}
    if not (kept := list(new)):
        return pd.DataFrame(columns=["condition", "layer", *ENDS, "n"])
    now, by = axis_ends(hidden_states(mllm, list(new.values()), **drawn)), ("axis_end", ["layer"])
    now["sample"] = np.array(kept)[now["sample"]]
    before = axis_ends(states.where(states.tokens["sample"].isin(kept)))
    each = {"as it is": before, change: now, "change": inference.paired(before, now, *by)}
    means = [inference.mean_over_samples(t, *by).assign(condition=c) for c, t in each.items()]
    return pd.concat(means, ignore_index=True)


@computation(version=1)
def massive_activations(states: States, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Largest over median magnitude of the hidden states, by layer and kind (Sun et al. 2024).

    Columns layer, kind, ratio (mean over samples), low, high, massive (tokens above `MASSIVE`).
    """
    table = []
    for layer, x in enumerate(states.hidden):
        tokens = states.tokens.assign(ratio=clouds.massive(x))
        for kind, of in tokens.groupby("kind", sort=False):
            ends = inference.interval(of.groupby("sample")["ratio"].mean(), n_boot, seed)
            table.append((layer, kind, *map(float, ends), (of["ratio"] > MASSIVE).mean()))
    return pd.DataFrame(table, columns=["layer", "kind", "ratio", "low", "high", "massive"])


def ends_and_rivals(states: States, sinks: pd.DataFrame) -> pd.DataFrame:
    """Axis end of each prompt, and the other measures, as means over the decoder layers.

    sinks as of `attention_sinks`. Columns sample, axis_end and, the same in every row, axis_order,
    attachment (NaN without media), attention on first and on later special, largest coordinate.
    """
    ends = axis_ends(states).query("layer > 0").groupby("sample", as_index=False)["axis_end"].mean()
    table = telomeres(states, n_boot=2, n_null=2).query("layer > 0")
    own = table.groupby("measure")["value"].mean().reindex(["axis_order", "attachment"])
    collected = sinks.groupby("set")["collected"].mean()
    others = {f"attention on {of}": collected[of] for of in ("first", "later special")}
    peaks = massive_activations(states, n_boot=2).query("layer > 0 and kind == 'special'")
    return ends.assign(**own, **others, **{"largest coordinate": peaks["ratio"].mean()})


@computation(version=1)
def silenced_ends(mllm: MLLM, bench, neurons: xr.DataArray, **drawn) -> pd.DataFrame:
    """`ends_and_rivals` with these neurons silenced; `drawn` as in `hidden_states`."""
    with deactivate(mllm, neurons):
        sinks = attention_sinks(mllm, bench, batch_size=drawn.get("batch_size", 8))
        return ends_and_rivals(hidden_states(mllm, bench, **drawn), sinks)


def silenced_beside(
    before: pd.DataFrame, after: pd.DataFrame, draws: Sequence[pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of `ends_and_rivals` as the model is, silenced, and with each random draw silenced.

    Returns a row per measure with a column for each, the draws' mean and range; and the change of
    axis_end, low, high: rows special (95 % interval, paired over prompts) and random (the draws').
    """
    mean, own, *random = (t.drop(columns="sample").mean() for t in (before, after, *draws))
    each = pd.concat(random, axis=1)
    summary = {"as it is": mean, "special silenced": own, "random silenced": each.mean(axis=1)}
    summary |= {"lowest draw": each.min(axis=1), "highest draw": each.max(axis=1)}
    moved = each.loc["axis_end"] - mean["axis_end"]
    paired = inference.paired(before, after, "axis_end", [])["axis_end"].to_numpy()
    ends = inference.interval(paired), (moved.mean(), moved.min(), moved.max())
    change = pd.DataFrame(ends, ["special", "random"], ENDS)
    return pd.DataFrame(summary).rename(index=lambda name: name.replace("_", " ")), change


def claims(
    measured, recurring, without_first, changed: Mapping, sinks, peaks, moved, sink: float
) -> list[dict]:
    """The closing table's lines.

    measured and without_first are of `telomeres`, the others of `against_recurring`, `changed_ends`
    by name, `attention_sinks` with layers from 1, `massive_activations` and `silenced_beside`.
    """

    def of(table: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
        return table[(table[column] == name) & (table["layer"] > 0)]

    def signed(ends: pd.Series) -> str:
        return inference.spread(*ends[ENDS], sign="+")

    ends = of(measured, "measure", "axis_end")
    at_ends, bound = inference.over_layers(ends), ends["null_high"].to_numpy()
    lines = [at_ends.claim("special tokens lie at the ends of the text cloud")]
    nulls = {
        "further out than as many recurring words": recurring[recurring["layer"] > 0],
        "the same without the first token": of(without_first, "measure", "axis_end"),
        "the text cloud's axis is the order of the text": of(measured, "measure", "axis_order"),
        "special tokens have text, not media, around them": of(measured, "measure", "attachment"),
    }
    lines += [inference.over_layers(table).claim(t) for t, table in nulls.items() if len(table)]
    for name, table in changed.items():
        if len(table):
            stays = inference.over_layers(of(table, "condition", name), bound, value="axis_end")
            most = of(table, "condition", "change").loc[lambda t: t["axis_end"].abs().idxmax()]
            claim = f"they stay at the ends when the prompt is {name}"
            measured = f"change {signed(most)} at most, layer {most['layer']}"
            measured += f"; yes at {stays.yes.sum()} of {len(bound)}"
            verdict = inference.given(at_ends.verdict, stays.verdict)
            lines.append(inference.line(claim, measured, f"text below {bound.max():.2f}", verdict))
    sets = {"first": "the first token is an attention sink"}
    sets["later special"] = "later special tokens are attention sinks"
    for name, text in sets.items():
        layers = inference.over_layers(of(sinks, "set", name), sink, value="collected")
        lines.append(layers.claim(f"rival: {text}", f"sink from {sink:.2f}", "collected"))
    layers = inference.over_layers(of(peaks, "kind", "special"), MASSIVE, value="ratio")
    claim = "rival: special tokens are massive activations"
    lines.append(layers.claim(claim, f"massive from {MASSIVE}", "ratio"))
    own, random = moved.loc["special"], moved.loc["random"]
    claim, null = "silencing the special neurons moves them off the ends", signed(random)
    verdict = inference.beyond(own["low"], own["high"], min(0, random["low"]), greater=False)
    return [*lines, inference.line(claim, signed(own), f"{null} (random neurons)", verdict)]
