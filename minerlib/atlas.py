"""An atlas of neurons: a folder of HTML that opens from disk, one page for each neuron.

1. `excited`: one streamed pass over the rows finds what excites each neuron most, and how often it
   says what at tokens of each kind; memory is bounded by neurons x rows kept x tokens.
2. `writes`: which tokens its column of the down projection speaks for and against.
3. `write_atlas`: the rows' media, once each, and a page that shows them: patches shaded over the
   picture, moments over the sound, words by how much the neuron says there.
"""

import base64
import html
import io
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import soundfile
import torch
from PIL import Image
from tqdm import tqdm

from minerlib.artifacts import atomically, computation
from minerlib.inference import estimate
from minerlib.model import MLLM
from minerlib.separation import BASE_SETS, kinds_of, separate
from minerlib.tasks import Sample
from minerlib.tasks.evaluation import by_benchmark

EDGES = [-np.inf, *np.arange(-0.3, 0.3, 0.05).round(2), *(0.3 * 2 ** np.arange(0, 9, 0.5)).round(2)]
"""Where bins of activations begin: even ones around 0, then half octaves."""
SIDE = 320  # pixels of a picture's longer side

Neuron = tuple[int, int]  # layer, neuron


def named(neuron: Neuron) -> str:
    """A neuron's stable name, and the address of its page: L3N45."""
    return f"L{neuron[0]}N{neuron[1]}"


def parsed(name: str) -> Neuron:
    """The layer and the number of a neuron that is called like L3N45."""
    if not (found := re.fullmatch(r"L(\d+)N(\d+)", name.strip())):
        raise ValueError(f"{name!r} is no neuron: call it like L3N45, layer 3, neuron 45")
    return int(found[1]), int(found[2])


@computation(version=1)
@torch.inference_mode()
def excited(
    mllm: MLLM,
    rows: Mapping[str, Any],
    neurons: Sequence[Neuron],
    *,
    top: int = 6,
    batch_size: int = 8,
) -> dict[str, Any]:
    """What excites neurons, in one pass over the rows of benchmarks.

    Of each neuron: `top`, the rows of its highest activations, highest first, as [benchmark, place
    among the rows, activation at every prompt token]; and `histogram`, by kind of token how many
    activations lie in each bin of `EDGES`. A row counts once, by its highest token.
    """
    neurons = checked(mllm, neurons)
    order = sorted(range(len(neurons)), key=lambda i: neurons[i])
    layers: dict[int, list[int]] = {}
    for i in order:
        layers.setdefault(neurons[i][0], []).append(i)
    kinds = [kind for kind in BASE_SETS if kind in mllm.kinds]
    histogram = np.zeros((len(neurons), len(kinds), len(EDGES)), int)
    best: list[list[tuple[float, str, int, list[float]]]] = [[] for _ in neurons]
    for name, bench in rows.items():
        for first, batch in mllm.batches(bench, batch_size, f"excited {name}"):
            sets, seen = separate(mllm, batch), dict[int, np.ndarray]()

            def keep(layer, x, seen=seen):
                which = torch.tensor([neurons[i][1] for i in layers[layer]], device=x.device)
                seen[layer] = x[..., which].float().cpu().numpy()

            with mllm.tap(activation=keep, layers=list(layers)):
                mllm.forward(batch)
            values = np.concatenate([seen[layer] for layer in layers], -1)  # [row, token, ordered]
            real = sets["prompt"].cpu().numpy()
            for k, kind in enumerate(kinds):
                own = values[sets[kind].cpu().numpy()]  # [token, ordered]
                bins = np.searchsorted(EDGES, own, "right") - 1
                for place, i in enumerate(order):
                    histogram[i, k] += np.bincount(bins[:, place], minlength=len(EDGES))
            for b, mask in enumerate(real):
                for place, i in enumerate(order):
                    told = values[b, mask, place]
                    peak = float(told.max())
                    if len(best[i]) < top or peak > best[i][-1][0]:
                        entry = peak, name, first + b, told.astype(float).round(3).tolist()
                        best[i] = sorted([*best[i], entry], key=lambda e: -e[0])[:top]
    found = {"kinds": kinds, "neurons": [named(n) for n in neurons]}
    tops = [[[name, at, told] for _, name, at, told in of] for of in best]
    return found | {"top": tops, "histogram": histogram.tolist()}


@torch.inference_mode()
def writes(mllm: MLLM, neurons: Sequence[Neuron], k: int = 8) -> list[dict[str, list[str]]]:
    """The tokens that each neuron's column of the down projection makes likelier and less likely.

    By the logit lens: through the final norm's scale and the output embeddings, `for` and
    `against`.
    """
    head, norm = mllm.model.get_output_embeddings(), mllm.family.final_norm()
    out = []
    for layer, neuron in checked(mllm, neurons):
        down = mllm.family.down_projection(mllm.layers[layer])
        column = down.weight[:, neuron].float().to(head.weight.device)
        scale = norm.weight.float().to(column) if hasattr(norm, "weight") else 1.0
        logits = head.weight.float() @ (column * scale)
        sides = {"for": logits.topk(k)[1], "against": (-logits).topk(k)[1]}
        out.append({way: [mllm.tokenizer.decode([i]) for i in ids.tolist()]
                    for way, ids in sides.items()})  # fmt: skip
    return out


def placed(grid: Sequence[int]) -> bool:
    """Whether a picture's or clip's `grid`, of `tokens`, tells where in it each token looks."""
    return [*grid[:2]] != [1, 1] or grid[2] == 1


def tokens(mllm: MLLM, sample: Sample, batch: Any = None) -> dict[str, Any]:
    """A prompt's tokens, `text` and `kind`, and how those of its medium lie: `grid` [time, height,
    width]; a row of moments, [1, 1, token], where the processor says nothing of places, as where it
    cuts a picture into tiles. batch: the sample encoded, where it is already."""
    batch = mllm.encode([sample]) if batch is None else batch
    kinds = kinds_of(separate(mllm, batch))
    ids = batch["input_ids"][0].tolist()
    texts = [mllm.tokenizer.decode([i]) if k in ("text", "special") else ""
             for i, k in zip(ids, kinds, strict=True)]  # fmt: skip
    medium = next((k for k in ("image", "video", "audio") if k in kinds), None)
    count = kinds.count(medium) if medium else 0
    grid = [1, 1, count]
    if (places := batch.get(f"{medium}_grid_thw")) is not None:
        time, height, width = places[0].tolist()
        side = round((time * height * width / count) ** 0.5)
        grid = [time, height // side, width // side]
    elif medium == "image" and (side := round(count**0.5)) ** 2 == count and not _tiled(batch):
        grid = [1, side, side]
    elif sample.video is not None:
        side = max(1, round((count / len(sample.video)) ** 0.5))
        grid = [count // side**2, side, side]
    if np.prod(grid) != count:
        grid = [1, 1, count]
    return {"text": texts, "kind": kinds, "medium": medium, "grid": grid}


def _tiled(batch) -> bool:
    """Whether one picture was entered as several."""
    pixels = batch.get("pixel_values")
    return pixels is not None and np.prod(pixels.shape[:-3]) > 1


def checked(mllm: MLLM, neurons: Sequence[Neuron]) -> Sequence[Neuron]:
    """The neurons, if the model has them all; else ValueError names the first it has not."""
    for layer, neuron in neurons:
        if not (0 <= layer < mllm.n_layers and 0 <= neuron < mllm.n_neurons):
            has = f"layers 0 to {mllm.n_layers - 1} of neurons 0 to {mllm.n_neurons - 1}"
            raise ValueError(f"there is no {named((layer, neuron))}: {mllm.name} has {has}")
    return neurons


def write_atlas(
    folder: str | Path,
    mllm: MLLM,
    rows: Mapping[str, Any],
    found: Mapping[str, Any],
    about: Sequence[Mapping[str, Any]],
    *,
    title: str,
    note: str = "",
    budgets: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write the atlas; its `index.html` opens from disk and from any static host.

    found is of `excited` on these rows; about has for each neuron what else is known: `sets` (names
    of the sets it is in), `ranks` {selector: rank}, `effect` {mean, low, high} in nats, `writes`;
    budgets, of each set, how many neurons it has in every layer, whether they are shown or not.
    All of it is text to the page: nothing of a row can run. Addresses are index.html#L3N45.
    """
    folder = Path(folder)
    for what, name, value in tqdm(
        _parts(mllm, rows, found, about, title, note, budgets), "pages", leave=False
    ):
        if what == "row":
            value |= {part: _beside(folder, f"media/{name}", value[part]) for part in _MEDIA}
        file = "index" if what == "index" else f"{what}s/{name}"
        _write(folder / f"{file}.js", f"{_call(what, name, value)}\n".encode())
    page = _page(title, '<script src="index.js"></script>')
    _write(folder / "index.html", page.encode())
    return folder / "index.html"


def in_one_page(
    mllm: MLLM,
    rows: Mapping[str, Any],
    found: Mapping[str, Any],
    about: Sequence[Mapping[str, Any]],
    *,
    title: str,
    note: str = "",
) -> str:
    """The same as one HTML text with everything in it, for few neurons."""
    calls = []
    for what, name, value in _parts(mllm, rows, found, about, title, note):
        if what == "row":
            value |= {part: _inside(value[part]) for part in _MEDIA}
        calls.append(f"<script>{_call(what, name, value)}</script>")
    return _page(title, "\n".join(calls))


def gallery(
    mllm: MLLM, rows: Mapping[str, Any], found: Mapping[str, Any], titles: Sequence[str]
) -> plt.Figure:
    """What excites neurons most, four rows for each, two neurons side by side under their titles.

    A medium, each shown once, is pale where the neuron is quiet, a clip stands there by the frame
    of its peak; of a prompt whose peak lies in its words these stand there, up to the peak.
    """
    lines = -(-len(found["top"]) // 2)
    fig = plt.figure(figsize=(9, 1.35 * lines))
    for part, title, top in zip(
        np.ravel(fig.subfigures(lines, 2, squeeze=False)), titles, found["top"], strict=False
    ):
        part.suptitle(title, fontsize="x-small")
        loudest = max(max(told) for *_, told in top)
        once = {rows[name].media[at]: (name, at, told) for name, at, told in reversed(top)}
        best = sorted(once.values(), key=lambda of: -max(of[2]))
        for ax, (name, at, told) in zip(part.subplots(1, 4), best, strict=False):
            sample = rows[name][at]
            _sketch(ax, sample, tokens(mllm, sample), np.array(told), loudest)
        for ax in part.axes:
            ax.axis("off")
    return fig


def _sketch(ax, sample: Sample, about: Mapping[str, Any], told: np.ndarray, loudest: float) -> None:
    """One row of a gallery."""
    kinds, grid = np.array(about["kind"]), about["grid"]
    peak = int(told.argmax())
    if kinds[peak] in ("text", "special"):
        text = "".join(about["text"][max(0, peak - 3) : peak + 1]).replace("\n", "↵")
        ax.text(0.5, 0.5, textwrap.fill(text, 13), ha="center", va="center", fontsize=6.5)
        return
    shares = np.clip(told[kinds == kinds[peak]] / max(loudest, 1e-9), 0, 1)
    if sample.audio is not None:
        ends = (0, len(sample.audio), -1, 1)
        ax.imshow(shares[None], extent=ends, aspect="auto", cmap="Oranges", vmin=0, vmax=1.2)
        ax.plot(sample.audio / max(np.abs(sample.audio).max(), 1e-9), lw=0.3, color="#222222")
        return
    shares = shares.reshape(grid)
    time = int(shares.max((1, 2)).argmax())
    frames = sample.video if sample.video is not None else np.asarray(sample.image)[None]
    tall, wide = frames.shape[1:3]
    ends = (0, wide, tall, 0)
    if not placed(grid):  # a strip below
        ax.imshow(frames[len(frames) // 2], extent=ends)
        below = (0, wide, 1.15 * tall, 1.03 * tall)
        ax.imshow(shares[0], extent=below, aspect="auto", cmap="Oranges", vmin=0, vmax=1.2)
        ax.set(xlim=(0, wide), ylim=(1.15 * tall, 0))
        return
    ax.imshow(frames[round((time + 0.5) / grid[0] * len(frames) - 0.5)], extent=ends)
    pale = 0.9 * (1 - shares[time])
    ax.imshow(np.ones_like(pale), extent=ends, cmap="gray", vmin=0, vmax=1, alpha=pale)


class Framed(NamedTuple):
    """A page as a notebook shows it, apart from the notebook's own styles and scripts."""

    page: str
    height: int = 700

    def _repr_html_(self) -> str:
        look = f"width: 100%; height: {self.height}px; border: 0; background: white"
        source = html.escape(self.page)
        return f'<iframe sandbox="allow-scripts" style="{look}" srcdoc="{source}"></iframe>'

    def __repr__(self) -> str:
        return f"a page of {len(self.page) / 1024:.0f} kB"


def _parts(
    mllm, rows, found, about, title: str, note: str, budgets=None
) -> Iterator[tuple[str, str, dict]]:
    """What the page is handed: every row that is shown, every neuron, the index."""
    texts = {}
    for name, at in sorted({(name, at) for of in found["top"] for name, at, _ in of}):
        sample = rows[name][at]
        told = tokens(mllm, sample) | {"prompt": sample.prompt, "benchmark": name}
        texts[name, at] = told["text"]
        told |= {"references": list(dict.fromkeys(sample.references))[:3]}
        told["placed"] = told["medium"] == "audio" or placed(told["grid"])
        yield "row", f"{name}-{at}", told | _media(sample, told["grid"][0])
    index = []
    for i, name in enumerate(found["neurons"]):
        known, top = dict(about[i]), found["top"][i]
        page = {"histogram": found["histogram"][i], "writes": known.pop("writes", None)}
        yield "neuron", name, page | {"top": [[f"{n}-{at}", *packed(told)] for n, at, told in top]}
        layer, neuron = parsed(name)
        peak = max((max(told) for _, _, told in top), default=0.0)
        words = (page["writes"] or {}).get("for", [])
        own = {"name": name, "layer": layer, "neuron": neuron, "peak": peak, "words": words}
        loudest = {texts[n, at][int(np.argmax(told))].strip() for n, at, told in top}
        index.append(own | {"excited": sorted(loudest - {""})} | known)
    edges = [None if np.isinf(x) else float(x) for x in EDGES]
    whole = {"title": title, "note": note, "layers": mllm.n_layers, "neurons": index}
    whole |= {"budgets": {name: [*map(int, of)] for name, of in (budgets or {}).items()}}
    yield "index", "", whole | {"kinds": list(found["kinds"]), "edges": edges}


def packed(values: Sequence[float]) -> tuple[float, float, str]:
    """Values in a third of what they take as text: the lowest, the highest, and in base64 where
    between the two each lies, in 65 535 steps."""
    low, high = min(values), max(values)
    steps = (np.asarray(values) - low) / max(high - low, 1e-9) * 65535
    return low, high, base64.b64encode(steps.round().astype("<u2").tobytes()).decode()


def _call(what: str, name: str, value: Any) -> str:
    """A script that hands a value to the page: from disk a browser reads no JSON, but scripts."""
    text = json.dumps([what, name, value], ensure_ascii=True, allow_nan=False)
    return f"atlas({text})".replace("<", "\\u003c").replace(">", "\\u003e")


def _page(title: str, scripts: str) -> str:
    text = resources.files("minerlib").joinpath("atlas.html").read_text(encoding="utf-8")
    return text.replace("{{title}}", html.escape(title)).replace("{{scripts}}", scripts)


_MEDIA = {"picture": "image", "sound": "audio"}
_Bytes = tuple[str, bytes] | None  # a file's type, such as "jpeg", and what is in it


def _beside(folder: Path, name: str, medium: _Bytes) -> str | None:
    """Write a medium into the folder; its address there."""
    if medium is None:
        return None
    kind, data = medium
    _write(folder / f"{name}.{kind}", data)
    return f"{name}.{kind}"


def _write(path: Path, data: bytes) -> None:
    atomically(path, lambda part: part.write_bytes(data))


def _inside(medium: _Bytes) -> str | None:
    """A medium as an address that holds it."""
    if medium is None:
        return None
    kind, data = medium
    of = "audio" if kind == "mp3" else "image"
    return f"data:{of}/{kind};base64,{base64.b64encode(data).decode()}"


def _media(sample: Sample, times: int) -> dict[str, _Bytes]:
    """A sample's medium as a browser shows it: `picture`, of a clip the frames that stand for the
    grid's times, side by side, and `sound`."""
    if sample.image is not None:
        return {"picture": _picture(sample.image, 1), "sound": None}
    if sample.video is not None:
        at = np.linspace(0, len(sample.video) - 1, max(times, 1)).round().astype(int)
        frames = Image.fromarray(np.hstack(list(sample.video[at])))
        return {"picture": _picture(frames, len(at)), "sound": None}
    if sample.audio is not None:
        soundfile.write(file := io.BytesIO(), sample.audio, sample.sampling_rate, format="MP3")
        return {"picture": _spectrogram(sample.audio), "sound": ("mp3", file.getvalue())}
    return {"picture": None, "sound": None}


def _picture(image: Image.Image, across: int) -> _Bytes:
    longest = max(image.width / across, image.height)
    size = [max(1, round(x * min(1.0, SIDE / longest))) for x in image.size]
    image.convert("RGB").resize(size).save(file := io.BytesIO(), "JPEG", quality=80)
    return "jpeg", file.getvalue()


def _spectrogram(sound: np.ndarray) -> _Bytes:
    """Waveform above spectrogram, to the edges, so that moments can be shaded over both."""
    with plt.rc_context({"figure.constrained_layout.use": False}):
        fig, axes = plt.subplots(2, 1, figsize=(6.4, 2.0), height_ratios=(1, 2))
        fig.subplots_adjust(0, 0, 1, 1, hspace=0)
        axes[0].plot(sound, lw=0.4, color="#222222")
        axes[0].set(xlim=(0, len(sound)))
        axes[1].specgram(sound + 1e-6, NFFT=400, noverlap=240, cmap="gray_r")
        for ax in axes:
            ax.axis("off")
        fig.savefig(file := io.BytesIO(), format="png", dpi=75)
    plt.close(fig)
    return "png", file.getvalue()


def costs(told: pd.DataFrame, neurons: Sequence[Neuron]) -> pd.DataFrame:
    """What silencing each neuron alone costs, in nats a token: columns neuron (its name), layer,
    mean, low, high (95 %); attrs["rows"], on how many rows.

    told is of `Workbook.logprobs` of [None, *each neuron]; benchmarks count alike, rows about one
    medium together.
    """
    wide = told.pivot(index=["benchmark", "row", "medium"], columns="neurons", values="logprob")
    lost = wide.rsub(wide[0], axis=0).rename(columns=str).reset_index()
    media, lines = by_benchmark(lost, "medium"), []
    for i, neuron in enumerate(neurons, 1):
        found = estimate(by_benchmark(lost, str(i)), media, None)
        lines.append([named(neuron), neuron[0], *found[:3]])
    out = pd.DataFrame(lines, columns=["neuron", "layer", "mean", "low", "high"])
    out.attrs["rows"] = len(lost)
    return out
