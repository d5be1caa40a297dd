"""Neurons described in words, and whether the words foretell what they say on rows not looked at.

1. A description is a sentence and a rule: an expression over what is known of each token, such as
   `kind == "audio" and loud > -30`.
2. `known` is that: a table of a prompt's tokens, with colours of patches and loudness of moments.
3. `foretold` correlates the rule with the neuron's activation, over all tokens of other rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydantic
import torch
import yaml
from PIL import Image

from minerlib.artifacts import computation
from minerlib.atlas import checked, parsed, tokens
from minerlib.inference import middle95, resamples
from minerlib.model import MLLM
from minerlib.separation import BASE_SETS
from minerlib.tasks import Sample

COLOURS = ("red", "green", "blue")


class Description(pydantic.BaseModel):
    """What somebody saw who looked at a neuron: words, and a rule for pandas' `eval`."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    neuron: str
    words: str
    rule: str


def descriptions(file: Path) -> list[Description]:
    """Those of a YAML file, none where there is no file. ValueError names a wrong one."""
    entries = yaml.safe_load(file.read_text()) if file.is_file() else None
    try:
        return [Description(**entry) for entry in entries or []]
    except (TypeError, ValueError) as error:
        what = "a list of neuron, words and rule, each a text"
        raise ValueError(f"{file} is not {what}: {error}") from error


def known(mllm: MLLM, sample: Sample, batch: Any = None) -> pd.DataFrame:
    """What is known of each token of a prompt, without the model's neurons.

    Columns benchmark, reference, kind, token (text; "" in a medium), before (the token before it),
    place and back (counted from the start and from the end of its kind, from 0); of a patch x, y in
    [0, 1] and its mean red, green, blue in [0, 1]; of a patch of a clip and of a moment of a sound
    time, in [0, 1]; of a moment loud, in dB, as if the tokens covered the sound evenly. 0 where a
    token has none, and where it is not known where patches lie (`atlas.tokens`).
    """
    found = tokens(mllm, sample, batch)
    table = pd.DataFrame({"kind": found["kind"], "token": found["text"]})
    table = table.assign(benchmark=sample.benchmark, reference=sample.reference)
    table["before"] = table["token"].shift(fill_value="")
    table["place"] = (of := table.groupby("kind")).cumcount()
    table["back"] = of.cumcount(ascending=False)
    table[["x", "y", "time", *COLOURS, "loud"]] = 0.0
    if (medium := found["medium"]) is not None:
        at = table.index[table["kind"] == medium]
        sound = sample.audio
        if sound is not None:
            seen = heard(sound, len(at))
        else:
            seen = patches(sample, found["grid"]) if found["grid"] != [1, 1, len(at)] else {}
        for name, values in seen.items():
            table.loc[at, name] = values
    return table


def heard(sound: np.ndarray, moments: int) -> dict[str, np.ndarray]:
    """When each moment of a sound is, and how loud, in dB of full scale."""
    edges = np.linspace(0, len(sound), moments + 1).astype(int)
    power = [np.square(sound[a:b]).mean() for a, b in zip(edges, edges[1:], strict=False)]
    return {"time": middles(moments), "loud": 10 * np.log10(np.maximum(power, 1e-10))}


def patches(sample: Sample, grid: Sequence[int]) -> dict[str, np.ndarray]:
    """Where each patch is and its mean colour, [time, height, width] in a row."""
    times, height, width = grid
    frames = sample.video if sample.video is not None else np.asarray(sample.image)[None]
    parts = np.array_split(np.asarray(frames), times)
    whole = [Image.fromarray(part.mean(0).round().astype(np.uint8)) for part in parts]
    small = [np.asarray(of.resize((width, height), Image.Resampling.BOX)) for of in whole]
    time, y, x = np.meshgrid(middles(times), middles(height), middles(width), indexing="ij")
    seen = {"time": time} if sample.video is not None else {}
    seen |= {"x": x, "y": y} | dict(
        zip(COLOURS, np.moveaxis(np.stack(small) / 255, -1, 0), strict=True)
    )
    return {name: values.ravel() for name, values in seen.items()}


def middles(n: int) -> np.ndarray:
    """The middles of n equal parts of [0, 1]."""
    return (np.arange(n) + 0.5) / n


def rule(description: Description, table: pd.DataFrame) -> np.ndarray:
    """What a description foretells at each token; ValueError where its rule cannot be read."""
    try:
        told = table.eval(description.rule, engine="python")
        return np.broadcast_to(np.asarray(told, float), len(table))
    except Exception as error:
        raise ValueError(
            f"{description.neuron}: the rule {description.rule!r} cannot be read "
            f"({type(error).__name__}: {error}); it may name {', '.join(table)}"
        ) from error


@torch.inference_mode()
def said(mllm: MLLM, rows: Mapping[str, Any], neurons: Sequence[tuple[int, int]]) -> Iterator:
    """For each row its medium, what is `known` of its tokens, and activations [token, neuron]."""
    layers = sorted({layer for layer, _ in checked(mllm, neurons)})
    for bench in rows.values():
        for i in range(len(bench)):
            sample, seen = bench[i], dict[int, torch.Tensor]()
            batch = mllm.encode([sample])

            def keep(layer, x, seen=seen):
                seen[layer] = x[0].clone()

            with mllm.tap(activation=keep, layers=layers):
                mllm.forward(batch)
            values = [seen[layer][:, neuron].float().cpu().numpy() for layer, neuron in neurons]
            yield bench.media[i], known(mllm, sample, batch), np.stack(values, -1)


@computation(version=2)
def foretold(
    mllm: MLLM, rows: Mapping[str, Any], described: Sequence[Description], *, seed: int = 0
) -> pd.DataFrame:
    """How well each rule foretells its neuron, over all tokens of these rows: one row each.

    Columns neuron, words, rule, rows, tokens, correlation (Pearson's), low, high: its 95 % interval
    over what the rows are about; and `by kind`, the correlation of the best rule that knows a
    token's kind alone, fitted to these rows.
    """
    neurons = [parsed(d.neuron) for d in described]
    media, sums = [], []
    for medium, table, y in said(mllm, rows, neurons):
        x = np.stack([rule(d, table) for d in described], -1)
        media.append(medium)
        own = [(table["kind"] == kind).to_numpy(float) for kind in BASE_SETS]
        of_kinds = [v for k in own for v in (k.sum() + 0 * y[0], k @ y)]
        moments = [v.sum(0) for v in (x * 0 + 1, x, y, x * x, y * y, x * y)]
        sums.append([*moments, *of_kinds])
    _, group = np.unique(media, return_inverse=True)
    totals = np.zeros((group.max() + 1, *np.shape(sums)[1:]))  # [medium, sum, neuron]
    np.add.at(totals, group, sums)
    low, high = middle95(correlation(np.tensordot(resamples(len(totals), 2000, seed), totals, 1)))
    whole = totals.sum(0)
    return pd.DataFrame(
        {
            "neuron": [d.neuron for d in described],
            "words": [d.words for d in described],
            "rule": [d.rule for d in described],
            "rows": len(media),
            "tokens": whole[0].astype(int),
            "correlation": correlation(whole),
            "low": low,
            "high": high,
            "by kind": by_kind(whole),
        }
    )


def by_kind(sums: np.ndarray) -> np.ndarray:
    """The correlation ratio of y on the kinds, [neuron], from sums [sum, neuron] of 1, x, y, x²,
    y², xy and then, for each kind, of 1 and y."""
    n, _, y, _, yy, _ = sums[:6]
    count, of_kind = sums[6::2], sums[7::2]
    between = (of_kind**2 / count.clip(1)).sum(0) - y**2 / n
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(between / (yy - y**2 / n))


def correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's, [..., neuron], from sums [..., sum, neuron] of 1, x, y, x², y² and xy."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -2, 0)[:6]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x**2) * (n * yy - y**2))
