"""Golden numbers of every registered computation: when they move, its version has to be raised.

A version is part of the key of every artefact, so a computation whose numbers move under an old
version would go on returning old results. After raising it, write the new numbers:

    python tests/test_golden.py

That refuses numbers that moved under an unchanged version. Everything is computed on weights and
samples that are the same on every machine, in float64 where the computation keeps it, and compared
by sums over each result: one plain, one in which every element has a weight of its own.
"""

from __future__ import annotations

import importlib
import io
import json
import pkgutil
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import xarray as xr
from conftest import ROOT, Rows, random_mllm, random_neurons
from made import states_of, table_of
from PIL import Image

import minerlib
from minerlib import atlas, critical, described, planted
from minerlib.activity import activity, sampled
from minerlib.aggregation import aggregate
from minerlib.artifacts import COMPUTATIONS, digest
from minerlib.controls import permuted, untrained
from minerlib.deactivation import deactivate, silence_heads
from minerlib.findings import (
    attention,
    convergence,
    costs,
    growth,
    last_token,
    probing,
    rivals,
    stability,
    states,
    telomeres,
)
from minerlib.gradients import gradients
from minerlib.model import MLLM
from minerlib.scoring import score
from minerlib.selection import PAPER_WEIGHTS, STRATEGIES, matched_random, select
from minerlib.separation import SETS
from minerlib.tasks import Sample, media, metrics
from minerlib.tasks.evaluation import evaluate
from minerlib.written import as_loud, loudness

for module in pkgutil.walk_packages(minerlib.__path__, "minerlib."):
    importlib.import_module(module.name)

FILE = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-6  # of a result's summed magnitude

# --- the same on every machine -------------------------------------------------------------------


@cache
def mllm():
    """Qwen2-VL with two decoder layers in float64 and weights from numpy's generator."""
    mllm = random_mllm("tiny-qwen2-vl", dtype=torch.float64)
    rng = np.random.default_rng(0)
    for name, weights in mllm.model.named_parameters():
        if "norm" not in name:
            weights.copy_(torch.from_numpy(rng.uniform(-0.1, 0.1, weights.shape)))
    return mllm


@dataclass(frozen=True)
class Asked(Rows):
    """Rows that can be answered."""

    choices: tuple[str, ...] = ()
    modality: str = "text"
    max_new_tokens: int = 4
    whole: tuple = ()

    @property
    def metric(self) -> str:
        return "choice_accuracy" if self.choices else "contains"

    @property
    def media(self) -> list[str]:
        return [f"medium {sample.row // 2}" for sample in self]

    @property
    def spec(self) -> SimpleNamespace:
        return SimpleNamespace(choices=self.choices, options=None, modality=self.modality)


def samples(n: int = 6) -> list[Sample]:
    """Prompts with and without a picture, whose sides the processor leaves as they are."""
    rng, words = np.random.default_rng(1), ("What", "is", "the", "word", "in", "this", "picture")
    out = []
    for i in range(n):
        image = Image.fromarray(rng.integers(0, 256, (32, 32 + 8 * (i % 3), 3), np.uint8))
        prompt = " ".join(rng.permutation(words)[: 4 + i % 4]) + "? A or B."
        out.append(Sample(prompt, ("a",), image=image if i % 3 else None, benchmark="b", row=i))
    return out


def tokens():
    """Clouds of three kinds, stretched, with the places and lengths that findings look at."""
    kinds, numbers = table_of({"special": 2, "image": 6, "text": 8}, 9)
    x = np.random.default_rng(2).standard_normal((3, len(kinds), 6)) * [4, 2, 1, 1, 1, 0.5]
    x[1:, np.array(kinds) == "image", 0] += 3
    made = states_of(x, kinds, numbers)
    # Ids of a hundred words, some of them more than once in a prompt.
    ids = np.random.default_rng(3).integers(0, 12, len(kinds))
    return states.States(made.hidden, made.tokens.assign(id=ids, text=ids.astype(str)))


def neurons():
    return random_neurons(mllm())


def scores(seed: int) -> xr.DataArray:
    """Made scores of one benchmark, as `score` returns them, the last set in none of its rows."""
    rng = np.random.default_rng(seed)
    samples = np.array([*rng.integers(1, 9, len(SETS) - 1), 0])
    coords = {
        "metric": list(PAPER_WEIGHTS),
        "modality": list(SETS),
        "layer": range(4),
        "samples": ("modality", samples),
        "activation_mean": (("layer", "neuron"), rng.random((4, 50))),
        "activation_min": ("layer", rng.random(4)),
    }
    values = rng.random((len(PAPER_WEIGHTS), len(SETS), 4, 50)) * (samples > 0)[:, None, None]
    return xr.DataArray(values, coords, ("metric", "modality", "layer", "neuron"))


def selected() -> tuple:
    return tuple(select(scores(4), 0.1, strategy) for strategy in STRATEGIES)


def silenced() -> tuple:
    """The last token's logits of a prompt, by what is put in the neurons' place."""
    shape = mllm().n_layers, mllm().n_neurons
    rng = np.random.default_rng(5)
    constants = scores(0).isel(layer=[0] * shape[0], neuron=[0] * shape[1], drop=True)
    constants = constants.drop_vars(["activation_mean", "activation_min"]).assign_coords(
        activation_mean=(("layer", "neuron"), rng.random(shape)),
        activation_min=("layer", rng.random(shape[0])),
    )
    out, batch = [], mllm().encode(samples(2))
    for mode in ("zero", "mean", "min"):
        with torch.no_grad(), deactivate(mllm(), neurons(), mode=mode, constants=constants):
            out.append(mllm().forward(batch).logits.numpy())
    return tuple(out)


def picture() -> np.ndarray:
    """A PNG with transparency; PNG decodes alike everywhere."""
    pixels = np.random.default_rng(6).integers(0, 256, (9, 7, 4), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return np.asarray(media.picture(file.getvalue()))


def clip() -> tuple:
    """Frames of a video of PNGs, half a second apart."""
    file = io.BytesIO()
    with av.open(file, "w", "mov") as container:
        stream = container.add_stream("png", rate=2)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
        for pixels in np.random.default_rng(7).integers(0, 256, (9, 16, 16, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    found = media.clip(file.getvalue(), 4)
    return found.frames, found.times


def sound() -> np.ndarray:
    """A stereo WAV at 8 kHz as 16 kHz."""
    wave = np.random.default_rng(8).uniform(-0.5, 0.5, (800, 2)).astype(np.float32)
    soundfile.write(file := io.BytesIO(), wave, 8000, format="WAV", subtype="FLOAT")
    return media.sound(file.getvalue(), 16_000)


ANSWERS = ["a cat on a mat", "Two.", "a dog", "well, the Sneeze", "B", ""]
REFERENCES = [["a cat on the mat"], ["2"] * 10, ["a dog runs"], ["sneeze"], ["B"], ["A"]]
DRAWN = {"tokens_per_kind": 4, "seed": 1}
FEW = {"n_boot": 20, "n_null": 20, "seed": 1}


def answered(*choices: str) -> pd.DataFrame:
    return evaluate(mllm(), Asked(samples(), choices=choices), 2).drop(columns="prompt")


def sites() -> tuple:
    """Where neurons are planted, and how loud."""
    written = loudness(mllm(), [Rows(samples())])
    where = planted.sites(written, ["text", "image"], [0, 1], 2, seed=1)
    return where, np.linspace(1, 2, len(where))


def grown() -> pd.DataFrame:
    choice = {"ratio": 0.1, "strategy": "LA_MU"}
    whole = neurons().assign_coords(modality=["text", "image"])
    return growth.growth(mllm(), {"b": Rows(samples(8))}, whole, [2, 4], choice)


def weights(other: MLLM) -> tuple:
    """The weights of a model's first decoder layer."""
    return tuple(weight.detach().numpy() for weight in other.layers[0].parameters())


def last_logits(condition: Any) -> np.ndarray:
    """The last token's logits of two prompts, the second with a picture, while it holds."""
    with torch.no_grad(), condition:
        return mllm().forward(mllm().encode(samples(2))).logits[:, -1].numpy()


def otherwise(change: Callable[[Sample], Sample]) -> tuple:
    """Rows asked otherwise: prompts, where the medium is, pictures."""
    made = [change(sample) for sample in samples(3)]
    table = pd.DataFrame({"prompt": [s.prompt for s in made], "behind": [s.behind for s in made]})
    return table, *(np.asarray(s.image) for s in made if s.image)


def some_heads() -> np.ndarray:
    heads = np.zeros((mllm().n_layers, mllm().text_config.num_attention_heads), bool)
    heads[0, 1] = True
    return heads


def seen() -> tuple:
    """What excites two neurons, and how often they say what."""
    found = atlas.excited(mllm(), {"b": Rows(samples())}, [(0, 3), (1, 7)], top=2)
    told = [np.array(values) for top in found["top"] for _, _, values in top]
    return (
        *told,
        np.array(found["histogram"]),
        np.array([at for t in found["top"] for _, at, _ in t]),
    )


def told() -> pd.DataFrame:
    """How well two rules foretell two neurons."""
    rules = {"L0N3": 'kind == "image"', "L1N7": "place + red - blue"}
    made = [described.Description(neuron=n, words="", rule=rule) for n, rule in rules.items()]
    return described.foretold(mllm(), {"b": Asked(samples())}, made).drop(columns=["words", "rule"])


def in_words() -> states.States:
    """Pictures' places taken by the words of other samples' answers."""
    rows = [replace(sample, references=("red", f"the {sample.row}")) for sample in samples()]
    held = states.hidden_states(mllm(), rows, **DRAWN)
    return convergence.in_words(mllm(), rows, held, ["image"], **DRAWN)


def partners() -> tuple:
    """Random neurons that write as much as some, and who stands for whom."""
    chosen = neurons().assign_coords(modality=["text", "image"])
    return as_loud(chosen, loudness(mllm(), [Rows(samples())]), seed=3, caliper=1.0)


def some_ranks() -> xr.DataArray:
    """Ranks of two selectors, the second without any for text."""
    ranks = np.random.default_rng(9).random((2, 2, 3, 20))
    ranks[1, 0] = np.nan
    coords = {"selector": ["a", "b"], "modality": ["text", "image"], "layer": range(3)}
    return xr.DataArray(ranks, coords, ("selector", "modality", "layer", "neuron"))


def untied(found: pd.DataFrame) -> pd.DataFrame:
    """Without selectors by how much a neuron writes: planted ones of a layer write alike, and what
    orders them is a processor's rounding."""
    loud = ["loudness", "loudness, written", "MANU variance"]
    assert set(loud) <= set(found["selector"])
    return found[~found["selector"].isin(loud)].reset_index(drop=True)


def blocks() -> dict[str, list[xr.DataArray]]:
    """Two benchmarks' scores in eight blocks."""
    return {b: [scores(seed + i).assign_attrs(rows=3) for i in range(8)] for b, seed in
            (("a", 20), ("b", 40))}  # fmt: skip


def chosen(total: xr.DataArray) -> dict[str, xr.DataArray]:
    return {m: select(total.sel(modality=[m]), 0.1) for m in ("text", "image")}


def agreed() -> pd.DataFrame:
    costs = pd.DataFrame(np.random.default_rng(10).random((30, 2)), columns=["t", "i"])
    media = {"t": "text", "i": "image"}
    return rivals.agreement(some_ranks(), np.arange(30), costs, media)


def domains() -> dict[str, Asked]:
    """Two benchmarks, of pictures and of text."""
    rows = samples(6)
    return {
        "pictures": Asked([s for s in rows if s.image], modality="image"),
        "texts": Asked([s for s in rows if not s.image]),
    }


METRICS = {
    name: (lambda name=name: getattr(metrics, name)(ANSWERS, REFERENCES))
    for name in (
        *("exact_match", "contains", "cider_d", "cider_d_penn"),
        *("word_recognition_rate", "corpus_wrr", "choice_accuracy"),
    )
}
TEN = [[*of, *of[:1] * (10 - len(of))] for of in REFERENCES]  # people, as of all shipped rows
METRICS["vqa_accuracy"] = lambda: metrics.vqa_accuracy(ANSWERS, TEN)
GOLDEN: dict[str, Callable[[], Any]] = {
    "scoring.score": lambda: score(mllm(), Rows(samples()), batch_size=2),
    "aggregation.aggregate": lambda: aggregate([scores(0), scores(1), scores(2)]),
    "selection.select": selected,
    "selection.matched_random": lambda: (
        matched_random(neurons(), 0),
        matched_random(neurons(), 1, by_layer=True),
    ),
    "deactivation.deactivate": silenced,
    "tasks.media.picture": picture,
    "tasks.media.clip": clip,
    "tasks.media.sound": sound,
    "tasks.evaluation.evaluate": lambda: (answered(), answered("A", "B")),
    **{f"tasks.metrics.{name}": call for name, call in METRICS.items()},
    "tasks.metrics.vocal_sound_accuracy": lambda: metrics.vocal_sound_accuracy(
        ["a cough", "Throat-clearing, then a sigh", "none"], [["Cough"], ["Sigh"], ["Sneeze"]]
    ),
    "findings.attention.attention_between": lambda: attention.attention_between(
        mllm(), samples(), batch_size=4
    ),
    "findings.attention.attention_within": lambda: attention.attention_within(mllm(), samples()),
    "findings.attention.attention_sinks": lambda: attention.attention_sinks(mllm(), samples()),
    "findings.states.hidden_states": lambda: states.hidden_states(mllm(), samples(), **DRAWN),
    "findings.convergence.convergence": lambda: convergence.convergence(tokens(), k=5, **FEW),
    "findings.convergence.distances": lambda: convergence.distances(tokens(), ["image"], **FEW),
    "findings.convergence.silenced_distances": lambda: convergence.silenced_distances(
        mllm(), samples(), ["image"], neurons(), n_boot=5, n_null=5, normed=True, **DRAWN
    ),
    "findings.convergence.in_words": in_words,
    # Without t-SNE, whose pictures differ from one processor to the next.
    "findings.states.project": lambda: states.project(tokens(), [0, 2], seeds=(), n_tokens=40),
    "findings.growth.growth": grown,
    "findings.last_token.last_token_flow": lambda: last_token.last_token_flow(mllm(), samples(3)),
    "findings.last_token.measures": lambda: last_token.measures(mllm(), samples(3), window=2),
    "findings.probing.probing": lambda: probing.probing(tokens(), nearest=3, k=5, **FEW),
    "findings.probing.log_reach": lambda: probing.log_reach(tokens(), nearest=3),
    "findings.probing.silenced_reach": lambda: probing.silenced_reach(
        mllm(), samples(), neurons(), **DRAWN, normed=True
    ),
    "findings.telomeres.telomeres": lambda: telomeres.telomeres(tokens(), k=5, **FEW),
    "findings.telomeres.mean_ends": lambda: telomeres.mean_ends(tokens(), n_boot=20),
    "findings.telomeres.massive_activations": lambda: telomeres.massive_activations(tokens()),
    "findings.telomeres.collected": lambda: telomeres.collected(mllm(), samples(3)),
    "findings.telomeres.silenced_ends": lambda: telomeres.silenced_ends(
        mllm(), samples(), neurons(), **DRAWN, normed=True
    ),
    "findings.telomeres.in_short": lambda: telomeres.in_short(
        mllm(), samples(), n_null=20, **DRAWN
    ),
    "written.as_loud": partners,
    "written.loudness": lambda: loudness(mllm(), [Rows(samples())]),
    "deactivation.silence_heads": lambda: last_logits(silence_heads(mllm(), some_heads())),
    "findings.attention.cut_off": lambda: last_logits(attention.cut_off(mllm(), ["image"], [1])),
    "findings.costs.timed": lambda: costs.timed({"a": list, "b": dict}, 2)[["job", "round"]],
    **{
        f"findings.stability.{of.__name__}": (lambda of=of: otherwise(of))
        for of in stability.CHANGES.values()
    },
    "findings.rivals.ranks": lambda: rivals.ranks(mllm(), domains(), ["text", "image"], steps=1),
    "findings.stability.growing": lambda: stability.growing(blocks(), [1, 2, 8], chosen),
    "findings.stability.halves": lambda: stability.halves(blocks(), list(range(1, 9)), chosen),
    "findings.rivals.agreement": agreed,
    "findings.rivals.places": lambda: rivals.places(some_ranks(), [(0, 3), (2, 19)]),
    "findings.rivals.named": lambda: rivals.named(some_ranks(), 5),
    "findings.rivals.recovered": lambda: untied(
        rivals.recovered(mllm(), domains(), *sites(), strength=30.0, steps=1)
    ),
    "atlas.excited": seen,
    "described.foretold": told,
    "activity.sampled": lambda: sampled(mllm(), [Rows(samples())], each=4, seed=1),
    "activity.activity": lambda: activity(mllm(), [Rows(samples())]),
    "gradients.gradients": lambda: gradients(mllm(), [Rows(samples(4))], steps=2),
    "critical.attribution": lambda: critical.attribution(mllm(), [Rows(samples(4))]),
    "critical.plain": lambda: critical.plain(mllm(), ["What is the word?", "A dog runs."]),
    "critical.as_damaging": lambda: critical.as_damaging(
        lambda x: float(x.values.ravel() @ np.arange(x.size)), 9000, neurons()[0], seed=1, start=4
    ),
    "planted.necessity": lambda: planted.necessity(
        mllm(), [Asked(samples())], *sites(), strength=30.0, max_new_tokens=2
    ),
    "planted.control": lambda: planted.control(
        mllm(),
        [Asked(samples())],
        *sites(),
        strength=30.0,
        draws=3,
        answer_draws=1,
        max_new_tokens=2,
    ).drop(columns="prompt", errors="ignore"),
    "planted.recovered": lambda: planted.recovered(
        mllm(), [Rows(samples())], [Asked(samples())], *sites(), strength=30.0
    ),
    "controls.untrained": lambda: weights(untrained(mllm(), 1)),
    "controls.permuted": lambda: weights(permuted(mllm(), 1)),
}
GOLDEN = {f"minerlib.{name}": call for name, call in GOLDEN.items()}
JAVA = "minerlib.tasks.metrics.cider_d_penn"

# --- a result in a few numbers -------------------------------------------------------------------


def numbers(value: Any, name: str = "value") -> dict[str, Any]:
    """By part of a result: shape, count of NaN, magnitude and two sums; a digest of text."""
    if isinstance(value, tuple):
        parts = {f"{name}.{i}": part for i, part in enumerate(value)}
    elif isinstance(value, states.States):
        parts = {"hidden": value.hidden, "tokens": value.tokens}
    elif isinstance(value, pd.DataFrame):
        parts = {f"{name}.{column}": value[column].to_numpy() for column in value}
    elif isinstance(value, xr.DataArray):
        parts = {f"{name}.{k}": c.values for k, c in value.coords.items()} | {name: value.values}
    else:
        array = np.asarray(value)
        if array.dtype == object and all(isinstance(v, int | float | None) for v in array.flat):
            array = array.astype(float)
        if array.dtype.kind not in "fiub":
            return {name: digest([str(list(v) if isinstance(v, tuple) else v) for v in array.flat])}
        x = np.where(np.isnan(array), 0, array).astype(float).ravel()
        own = np.cos(np.arange(x.size) ** 1.5)  # neighbours, rows and columns weigh differently
        sums = [float(np.abs(x).sum()), float(x.sum()), float(x @ own)]
        return {name: [list(array.shape), int(np.isnan(array).sum()), *sums]}
    return {k: v for part, held in parts.items() for k, v in numbers(held, part).items()}


def differences(found: dict[str, Any], golden: dict[str, Any], tolerance: float) -> list[str]:
    """The parts of two results that differ."""
    out = [f"{k} is not in both" for k in found.keys() ^ golden.keys()]
    for k in found.keys() & golden.keys():
        a, b = found[k], golden[k]
        if isinstance(a, str) or isinstance(b, str) or a[:2] != b[:2]:
            same = a == b
        else:
            same = np.allclose(a[2:], b[2:], rtol=0, atol=tolerance * max(b[2], 1e-9))
        if not same:
            out.append(f"{k} is {a}, not {b}")
    return out


def moved(name: str, golden: dict[str, Any]) -> list[str]:
    return differences(numbers(GOLDEN[name]()), golden, TOLERANCE)


# --- the tests -----------------------------------------------------------------------------------

HELD = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.fault("edited computation returns old numbers")
@pytest.mark.parametrize("name", GOLDEN)
def test_numbers_are_golden(name):
    if name == JAVA and not shutil.which("java"):
        pytest.skip("the Penn tokeniser needs Java")
    if found := moved(name, HELD[name]["numbers"]):
        raise AssertionError(
            f"{name}'s numbers moved: raise its version and run python tests/test_golden.py\n"
            + "\n".join(found)
        )


@pytest.mark.fault("new computation without golden numbers")
def test_every_computation_has_golden_numbers():
    own = {name: v for name, v in COMPUTATIONS.items() if name.startswith("minerlib.")}
    assert own.keys() == GOLDEN.keys() == HELD.keys()
    assert own == {name: held["version"] for name, held in HELD.items()}


@pytest.mark.fault("a comment in the source makes a published result stale")
def test_published_results_rest_on_registered_computations():
    """Of any other function the key holds the text of its whole file."""
    files = (ROOT / "data/results").glob("*/*.manifest.json")
    used = set().union(*(json.loads(file.read_text())["of"] for file in files))
    assert used and {name for name in used if name.startswith("minerlib.")} <= COMPUTATIONS.keys()


def test_golden_numbers_notice():
    """What they are there for: a swapped axis, a shuffled row, a changed value."""
    x = np.random.default_rng(0).random((4, 5))
    table = xr.DataArray(x, {"layer": range(4)}, ("layer", "neuron"))
    golden = numbers(table)
    for other in (table.T, table[::-1], table + 1e-5, table * -1, table.where(x > 0.01), table[:3]):
        assert differences(numbers(other), golden, TOLERANCE)
    assert not differences(numbers(table * (1 + 1e-8)), golden, TOLERANCE)
    words = pd.DataFrame({"answer": ["a", "b"]})
    assert differences(numbers(words[::-1]), numbers(words), TOLERANCE)


def write() -> None:
    """Write the golden numbers of all computations; refuse those that moved under one version."""
    new = {}
    for name, version in COMPUTATIONS.items():
        held = HELD.get(name, {})
        if held.get("version") == version:
            if found := moved(name, held["numbers"]):
                raise SystemExit(f"{name}: raise its version, for its numbers moved\n{found}")
            new[name] = held
        else:
            new[name] = {"version": version, "numbers": numbers(GOLDEN[name]())}
            print(f"{name} {version}: written")
    lines = (f" {json.dumps(name)}: {json.dumps(held)}" for name, held in sorted(new.items()))
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()
