"""The atlas: what excites a neuron is what it says, and a row's text stays text."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from importlib import resources

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, Rows, samples_for
from PIL import Image

from minerlib import atlas, shipped
from minerlib.separation import separate
from minerlib.tasks import Sample

NEURONS = [(1, 7), (0, 3), (1, 2)]
EVIL = "</script><script>document.title='run'</script><img src=x onerror=document.title='run'>"


def said(mllm, samples) -> list[tuple[np.ndarray, dict]]:
    """Of every prompt, the neurons' activations [neuron, token], and its sets."""
    out = []
    for sample in samples:
        batch, seen = mllm.encode([sample]), {}
        with torch.inference_mode(), mllm.tap(activation=lambda i, x, s=seen: s.update({i: x[0]})):
            mllm.forward(batch)
        values = np.stack([seen[layer][:, k].numpy() for layer, k in NEURONS])
        out.append((values, {name: of[0].numpy() for name, of in separate(mllm, batch).items()}))
    return out


def test_what_excites_a_neuron_most(mllm):
    samples = samples_for(mllm)
    rows = {"a": Rows(samples[:2]), "b": Rows(samples[2:])}
    found = atlas.excited(mllm, rows, NEURONS, top=2, batch_size=2)
    assert found["neurons"] == ["L1N7", "L0N3", "L1N2"]
    own = said(mllm, samples)
    for i, top in enumerate(found["top"]):
        highest = sorted((values[i].max() for values, _ in own), reverse=True)
        assert len({(name, at) for name, at, _ in top}) == 2
        for (name, at, told), peak in zip(top, highest, strict=False):
            values, _ = own[at if name == "a" else at + 2]
            np.testing.assert_allclose(told, values[i], atol=2e-3)
            assert max(told) == pytest.approx(peak, abs=2e-3)  # prompts that begin alike may tie


def test_histograms_count_every_token_of_a_kind(mllm):
    samples = samples_for(mllm)
    found = atlas.excited(mllm, {"a": Rows(samples)}, NEURONS, batch_size=3)
    for i, by_kind in enumerate(found["histogram"]):
        for kind, counts in zip(found["kinds"], by_kind, strict=True):
            values = np.concatenate([v[i][sets[kind]] for v, sets in said(mllm, samples)])
            bins = np.histogram(values, [*atlas.EDGES, np.inf])[0]
            assert sum(counts) == len(values)
            assert np.abs(np.cumsum(counts) - np.cumsum(bins)).max() <= 1  # on a bin's edge


def test_fewer_rows_than_are_asked_for_and_any_number_of_neurons(mllm):
    samples = samples_for(mllm)[:1]
    found = atlas.excited(mllm, {"a": Rows(samples)}, [*NEURONS, (1, 7)], top=9)
    assert [len(of) for of in found["top"]] == [1] * 4
    assert found["top"][0] == found["top"][3]


def test_a_column_writes_the_token_that_it_points_to(mllm):
    head, norm = mllm.model.get_output_embeddings().weight, mllm.family.final_norm().weight
    down = mllm.family.down_projection(mllm.layers[0]).weight
    kept = down[:, 5].clone()
    try:
        with torch.no_grad():
            down[:, 5] = head[42] / head[42].norm() / norm
        (found,) = atlas.writes(mllm, [(0, 5)], k=3)
    finally:
        with torch.no_grad():
            down[:, 5] = kept
    expected = (head.float() @ head[42].float()).topk(3)[1].tolist()
    assert found["for"] == [mllm.tokenizer.decode([i]) for i in expected]
    least = (-head.float() @ head[42].float()).topk(3)[1].tolist()
    assert found["against"] == [mllm.tokenizer.decode([i]) for i in least]


def test_where_a_mediums_tokens_lie(mllm):
    for sample in samples_for(mllm):
        told = atlas.tokens(mllm, sample)
        count = told["kind"].count(told["medium"]) if told["medium"] else 0
        assert np.prod(told["grid"]) == count
        if sample.image is not None:
            assert told["grid"][0] == 1 and told["grid"][1] == told["grid"][2]
        if sample.video is not None:
            assert told["grid"][0] == len(sample.video) // 2  # two frames a token in time
        if sample.audio is not None:
            assert told["grid"] == [1, 1, count] and count
        words = "".join(t for t, k in zip(told["text"], told["kind"], strict=True) if k == "text")
        assert sample.prompt in words


@pytest.fixture
def made(mllm, tmp_path):
    """An atlas whose rows try to run scripts, its folder and what it was made of."""
    samples = [replace(s, prompt=f"{EVIL} {s.prompt}", references=(EVIL,))
               for s in samples_for(mllm)]  # fmt: skip
    rows = {"a": Rows(samples)}
    found = atlas.excited(mllm, rows, NEURONS, top=len(samples))
    about = [{"sets": [f"set {i}"], "ranks": {"miner": i + 1}, "writes": words,
              "effect": {"mean": 0.1 * i, "low": 0.0, "high": 0.3}}
             for i, words in enumerate(atlas.writes(mllm, NEURONS))]  # fmt: skip
    how = {"title": f"Neurons {EVIL}", "note": EVIL}
    budgets = {"set 0": [0, 5], "empty": np.zeros(2, int)}
    page = atlas.write_atlas(tmp_path / "atlas", mllm, rows, found, about, budgets=budgets, **how)
    return page, (rows, found, about, how)


def handed(text: str) -> list:
    return json.loads(re.fullmatch(r"atlas\((.*)\)\s*", text, re.S)[1])


def test_a_folder_with_a_page_for_each_neuron(mllm, made):
    page, (rows, found, about, _) = made
    folder = page.parent
    what, _, whole = handed((folder / "index.js").read_text())
    assert what == "index" and whole["layers"] == mllm.n_layers
    assert whole["budgets"] == {"set 0": [0, 5], "empty": [0, 0]}
    assert [n["name"] for n in whole["neurons"]] == found["neurons"]
    assert whole["neurons"][1]["effect"] == about[1]["effect"]
    assert whole["neurons"][0]["peak"] == max(found["top"][0][0][2])
    for neuron, top in zip(whole["neurons"], found["top"], strict=True):
        texts = [
            atlas.tokens(mllm, rows[n][at])["text"][int(np.argmax(told))] for n, at, told in top
        ]
        assert neuron["excited"] == sorted({text.strip() for text in texts} - {""})
    _, name, of = handed((folder / "neurons/L1N7.js").read_text())
    assert name == "L1N7" and of["histogram"] == found["histogram"][0]
    for (key, low, high, packed), (*_, told) in zip(of["top"], found["top"][0], strict=True):
        _, _, row = handed((folder / f"rows/{key}.js").read_text())
        steps = np.frombuffer(base64.b64decode(packed), "<u2")
        assert len(row["kind"]) == len(steps) and (low, high) == (min(told), max(told))
        np.testing.assert_allclose(
            low + (high - low) * steps / 65535, told, atol=(high - low) / 1e5
        )
        sample = rows["a"][int(key.split("-")[1])]
        shown = [row["picture"], row["sound"]]
        assert all((folder / file).stat().st_size for file in shown if file)
        has = sample.image is not None or sample.video is not None, sample.audio is not None
        assert (bool(row["picture"]), bool(row["sound"])) == (has[0] or has[1], has[1])


def test_a_thousand_neurons_of_usual_prompts_are_light(mllm, tmp_path, monkeypatch):
    """750 tokens a prompt, most of a picture that fills its page; 200 rows, 60 selectors."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (24, 32, 3), np.uint8) for _ in range(200)]
    whole = [Image.fromarray(p).resize((atlas.SIDE, atlas.SIDE * 3 // 4)) for p in pictures]
    rows = {"a": [Sample("what is it?", ("x",), image=image) for image in whole]}
    kinds = ["text"] * 30 + ["image"] * 720
    prompt = {"text": [" word"] * 30 + [""] * 720, "kind": kinds, "medium": "image"}
    monkeypatch.setattr(atlas, "tokens", lambda *_: prompt | {"grid": [1, 24, 30]})
    told = rng.normal(size=750).round(3).tolist()
    names = [f"L{i % 2}N{i // 2}" for i in range(1000)]
    top = [[["a", int(at), told] for at in rng.choice(200, 6, False)] for _ in names]
    counts = rng.integers(0, 10**5, (1000, 2, len(atlas.EDGES))).tolist()
    found = {"kinds": ["text", "image"], "neurons": names, "top": top, "histogram": counts}
    known = {"sets": ["image"], "ranks": {f"selector {i}, image": 10**5 for i in range(60)},
             "effect": {"mean": -0.1234, "low": -0.1234, "high": 0.1234},
             "writes": {"for": ["word"] * 8, "against": ["word"] * 8}}  # fmt: skip
    atlas.write_atlas(tmp_path, mllm, rows, found, [dict(known) for _ in names], title="many")
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert 10e6 < size < 50e6  # 10 MB are the values alone: all of them are there


def test_words_stand_out_from_the_strongest_shade():
    """WCAG's contrast of 4.5, light and dark."""
    page = resources.files("minerlib").joinpath("atlas.html").read_text()
    most = float(re.search(r"const shade = \(share, most = ([\d.]+)\)", page)[1])

    def bright(colour):
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05

    def colour(text):
        digits = text if len(text) == 6 else "".join(2 * c for c in text)
        return np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255

    schemes = re.findall(r"--ink: #(\w+);.*?--back: #(\w+); --mark: ([\d, ]+);", page)
    assert len(schemes) == 2
    for ink, back, mark in schemes:
        behind = (1 - most) * colour(back) + most * np.array([*map(int, mark.split(","))]) / 255
        light, dark = sorted([bright(colour(ink)), bright(behind)], reverse=True)
        assert light / dark > 4.5


def test_one_pass_holds_few_rows_at_a_time(mllm):
    """However many there are: what is kept of a row is its activations alone."""
    sample, alive, most = samples_for(mllm)[0], weakref.WeakValueDictionary(), []

    class Made:
        def __len__(self):
            return 40

        def __getitem__(self, at):
            made = [replace(sample) for _ in range(*at.indices(len(self)))]
            alive.update((at.start + i, row) for i, row in enumerate(made))
            most.append(len(alive))
            return made

    atlas.excited(mllm, {"a": Made()}, NEURONS, top=2, batch_size=2)
    assert len(most) == 20 and 2 <= max(most) <= 8


def test_text_of_rows_is_never_html(mllm, made):
    page, (rows, found, about, how) = made
    for file in (*page.parent.rglob("*.js"), page):
        assert "<script>document.title" not in file.read_text(), file
        assert "<img src=x" not in file.read_text(), file
    one = atlas.in_one_page(mllm, rows, found, about, **how)
    assert "<script>document.title" not in one and "<img src=x" not in one
    assert EVIL not in atlas.Framed(one)._repr_html_()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_the_page_draws_itself_and_runs_nothing_of_a_row(mllm, made):
    page, (rows, found, about, how) = made
    single = page.parent / "one.html"
    few = {k: v if k == "kinds" else v[:1] for k, v in found.items()}
    single.write_text(atlas.in_one_page(mllm, rows, few, about[:1], **how))
    bare = page.parent / "bare.html"  # nothing is known of it
    bare.write_text(atlas.in_one_page(mllm, rows, few, [{}], **how))
    for address in (f"{page.as_uri()}#L1N7", single.as_uri(), bare.as_uri(), page.as_uri()):
        run = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             "--virtual-time-budget=5000", address], capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "<title>Neurons &lt;/script" in run.stdout  # the title that it was given
        if address == page.as_uri():
            assert "3 of 3" in run.stdout and 'href="#L1N7"' in run.stdout
        else:
            assert "Neuron 7 of decoder layer 1" in run.stdout
            shown = re.sub("<[^>]*>", "", re.sub("<script.*?</script>", "", run.stdout, flags=re.S))
            assert "null" not in shown and "undefined" not in shown and "NaN" not in shown
            assert rows["a"][0].prompt.removeprefix(EVIL).strip() in shown


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_neurons_are_found_by_token_and_rank_and_turned_over_by_key(mllm, made, monkeypatch):
    browser = pytest.importorskip("playwright.sync_api")
    page, (rows, found, about, how) = made
    nowhere = atlas.tokens
    monkeypatch.setattr(atlas, "tokens", lambda *of: nowhere(*of) | {  # as of a picture in tiles
        "grid": [1, 1, nowhere(*of)["kind"].count(nowhere(*of)["medium"] or "")]})  # fmt: skip
    strip = atlas.write_atlas(page.parent.parent / "strip", mllm, rows, found, about, **how)
    with browser.sync_playwright() as started:
        shown = started.chromium.launch(executable_path=shutil.which("chromium"),
                                        args=["--no-sandbox"]).new_page()  # fmt: skip
        shown.goto(page.as_uri())
        shown.get_by_label("rank at most").fill("2")
        assert shown.locator("#count").inner_text() == "2 of 3"
        index = handed((page.parent / "index.js").read_text())[2]["neurons"]
        word = next(word for neuron in index for word in neuron["excited"])
        has = [word.lower() in " ".join(n["words"] + n["excited"]).lower() for n in index]
        shown.get_by_label("rank at most").fill("")
        shown.get_by_label("find").fill(word)
        assert shown.locator("#count").inner_text() == f"{sum(has)} of 3"
        shown.goto(page.as_uri() + "#" + found["neurons"][0])
        shown.locator("#next").wait_for()
        shown.keyboard.press("ArrowRight")
        shown.wait_for_url("**#" + index[1]["name"])
        seen = any(s.image is not None or s.video is not None for s in rows["a"])
        for where, laid in ((page, 0), (strip, 1)):
            shown.goto(where.as_uri() + "#" + found["neurons"][0])
            shown.locator(".row").first.wait_for()
            assert (shown.locator(".strip").count() > 0) == (seen and bool(laid))


def test_names():
    assert atlas.named((3, 45)) == "L3N45" and atlas.parsed(" L3N45") == (3, 45)
    with pytest.raises(ValueError, match="'3.45' is no neuron: call it like L3N45"):
        atlas.parsed("3.45")


def test_what_one_neuron_costs():
    told = pd.DataFrame({
        "benchmark": ["a"] * 6 + ["b"] * 3, "row": [0, 1] * 3 + [0] * 3,
        "medium": ["x", "y"] * 3 + ["z"] * 3, "neurons": [0, 0, 1, 1, 2, 2, 0, 1, 2],
        "logprob": [-1, -2, -1.5, -2.5, -1, -2, -1, -3, -1.0],
    })  # fmt: skip
    found = atlas.costs(told, [(0, 1), (2, 3)])
    assert found["neuron"].tolist() == ["L0N1", "L2N3"] and found["layer"].tolist() == [0, 2]
    assert found.assign(sets="text").attrs["rows"] == 3
    assert found["mean"].tolist() == pytest.approx([(0.5 + 2.0) / 2, 0.0])


def test_tokens_of_no_known_place_are_drawn_below_their_picture():
    picture = Image.new("RGB", (40, 20), "red")
    sample, about = Sample("what?", ("x",), image=picture), {"kind": ["image"] * 6}
    fig, ax = plt.subplots()
    told = np.array([0.0, 0.5, 1.0, 0.0, 0.0, 2.0])
    atlas._sketch(ax, sample, about | {"grid": [1, 1, 6], "text": [""] * 6}, told, 2.0)
    whole, strip = ax.images
    assert whole.get_extent() == [0, 40, 20, 0] and strip.get_extent()[3] > 20
    np.testing.assert_allclose(strip.get_array()[0], told / 2)
    plt.close(fig)


def test_a_gallery_is_pale_where_a_neuron_is_quiet(mllm):
    """Each medium once, the loudest first; of words what leads to the peak."""
    samples = samples_for(mllm)
    rows = {"a": Rows(samples), "again": Rows(samples)}  # the same media under another name
    media = next(s for s in samples if s.image is not None or s.audio is not None)
    at, about = samples.index(media), atlas.tokens(mllm, media)
    inside = np.array([kind == about["medium"] for kind in about["kind"]])
    told = np.where(inside, np.linspace(-1, 2, len(inside)), -1.0)
    words = np.zeros(len(atlas.tokens(mllm, samples[0])["kind"]))
    words[4] = 1.0
    top = [["a", at, told.tolist()], ["again", at, told.tolist()], ["a", 0, words.tolist()]]
    fig = atlas.gallery(mllm, rows, {"top": [top]}, ["what it answers to"])
    first, second, *rest = fig.subfigs[0].axes
    shares = np.clip(told[inside] / told.max(), 0, 1)
    if media.image is not None:
        shade = first.images[-1]
        pale = shade.get_alpha().ravel()
        np.testing.assert_allclose(pale, 0.9 * (1 - shares))
        assert (shade.get_array() == 1).all()
    else:
        np.testing.assert_allclose(first.images[0].get_array().ravel(), shares)
    (text,) = second.texts
    leads = "".join(atlas.tokens(mllm, samples[0])["text"][1:5])
    assert text.get_text().split() == leads.replace("\n", "↵").split()
    assert not any(ax.images or ax.texts for ax in rest)
    assert fig.subfigs[0].get_suptitle() == "what it answers to"
    plt.close(fig)


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_the_page_of_a_neuron(tmp_path):
    """As book/your-model.md has it, with a model that is not of the repository, on a dozen rows."""
    pictures = tmp_path / "my_pictures"
    pictures.mkdir()
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 0, 120)).save(pictures / f"{i}.png")
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data/models/tiny-qwen2-vl", model)
    (model / shipped.CARD).unlink()
    told = (ROOT / "book/your-model.md").read_text().split("## Rows of your own")[1]
    snippet = re.search(r"```python\n(.*?)```", told, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    command = re.search(r"make atlas (.*?)\n", told)[1].replace("owner/model", str(model))
    command = command.replace("=12", "=6").replace("my_rows", str(tmp_path / "my_rows"))
    command = command.replace("RUN=mine", f"RUN={tmp_path}/mine FOLDER={tmp_path}/atlas")
    script = [sys.executable, "notebooks/run.py", "notebooks=2,16", *shlex.split(command)]
    how = {"capture_output": True, "text": True, "env": os.environ | {"TQDM_DISABLE": "0"}}
    done = subprocess.run(script, cwd=ROOT, check=True, **how)  # with bars, as a reader has them
    assert f"open {tmp_path}/atlas/index.html" in done.stdout
    index = (tmp_path / "atlas/index.js").read_text()
    (known,) = (n for n in json.loads(index[6:-2])[2]["neurons"] if n["name"] == "L3N45")
    assert known["effect"].keys() == {"mean", "low", "high"}
    assert {"the paper's score, image", "LAPE, image"} <= known["ranks"].keys()
    assert "contrast, image" not in known["ranks"]  # there is no other modality
