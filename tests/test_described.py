"""Neurons described in words: what is known of a token, and whether a rule foretells a neuron."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import MODELS, ROOT, Rows, random_mllm, samples_for, shared_mllm
from PIL import Image

from minerlib import described
from minerlib.described import Description, correlation, descriptions, foretold, known, said
from minerlib.tasks import Sample

SHIPPED = sorted((ROOT / "data/neurons").glob("*/descriptions.yml"))


def of(**media) -> Sample:
    return Sample("Which is it?", ("it",), benchmark="made", row=0, **media)


def test_a_picture_is_known_by_place_and_colour():
    """Left red, right blue; the lower half is as bright as the upper one."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 2] = 255, 51
    table = known(shared_mllm("tiny-qwen2-vl"), of(image=Image.fromarray(pixels)))
    patches = table[table["kind"] == "image"]
    left = patches["x"] < 0.5
    assert left.sum() == (~left).sum() > 0
    assert (patches["red"] == left).all()
    np.testing.assert_allclose(patches["blue"], np.where(left, 0, 0.2))
    side = int(len(patches) ** 0.5)
    np.testing.assert_allclose(patches["y"], np.repeat((np.arange(side) + 0.5) / side, side))
    assert (patches["place"] == np.arange(len(patches))).all() and not patches["green"].any()
    assert (patches["back"] == np.arange(len(patches))[::-1]).all()
    words = table[table["kind"] == "text"]
    assert not words[["x", "y", "time", "red", "loud"]].any(axis=None)
    assert "".join(words["token"]).count("Which is it?") == 1
    assert (table["before"].iloc[1:].to_numpy() == table["token"].iloc[:-1].to_numpy()).all()


def test_a_clip_is_known_by_time_and_the_colour_of_its_frames():
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    frames[4:] = 255  # dark, then white
    table = known(shared_mllm("tiny-qwen2-vl"), of(video=frames, times=np.arange(8) / 8))
    patches = table[table["kind"] == "video"]
    assert patches["time"].is_monotonic_increasing and patches["time"].between(0, 1).all()
    assert (patches["green"] == (patches["time"] > 0.5)).all()


def test_a_sound_is_known_by_time_and_loudness():
    """The first half is silent, the second at a tenth of full scale: -20 dB."""
    sound = np.full(16_000, 0.1, np.float32)
    sound[:8000] = 0
    table = known(shared_mllm("tiny-qwen2-audio"), of(audio=sound))
    moments = table[table["kind"] == "audio"]
    np.testing.assert_allclose(moments["loud"].iloc[-3:], -20, atol=1e-3)
    np.testing.assert_allclose(moments["loud"].iloc[:3], -100, atol=1e-3)
    assert moments["time"].iloc[0] == pytest.approx(0.5 / len(moments))


def test_a_rule_foretells_as_pearson_says():
    """Over all tokens of all rows; rows about one medium are drawn together."""
    mllm = random_mllm("tiny-qwen2-vl")
    rows = {"b": Rows(samples_for(mllm))}
    made = [
        Description(neuron="L1N3", words="pictures", rule='kind == "image"'),
        Description(neuron="L0N7", words="late", rule="2 * place + 1"),
        Description(neuron="L0N8", words="never", rule="0"),
    ]
    found = foretold(mllm, rows, made).set_index("neuron")
    parts = list(said(mllm, rows, [(1, 3), (0, 7)]))
    table = pd.concat([known for _, known, _ in parts], ignore_index=True)
    values = np.concatenate([v for *_, v in parts])
    by_hand = [
        np.corrcoef(table["kind"] == "image", values[:, 0])[0, 1],
        np.corrcoef(table["place"], values[:, 1])[0, 1],
    ]
    np.testing.assert_allclose(found["correlation"].iloc[:2], by_hand, atol=1e-6)
    assert found["tokens"].unique() == len(table) and found["rows"].unique() == len(parts)
    assert np.isnan(found.loc["L0N8", "correlation"])
    means = table.assign(y=values[:, 0]).groupby("kind")["y"].transform("mean")
    alone = np.corrcoef(means, values[:, 0])[0, 1]  # of the best rule by kind
    assert found.loc["L1N3", "by kind"] == pytest.approx(alone, abs=1e-5)
    assert found.loc["L1N3", "by kind"] >= abs(by_hand[0]) - 1e-6
    inside = found.iloc[:2]
    assert (inside["low"] <= inside["correlation"]).all()
    assert (inside["correlation"] <= inside["high"]).all() and (
        inside["low"] < inside["high"]
    ).all()


def test_the_activations_are_those_of_a_batch():
    mllm = random_mllm("tiny-qwen2-vl")
    rows = samples_for(mllm)
    seen = {}
    batch = mllm.encode(rows)
    with mllm.tap(activation=lambda layer, x: seen.update({layer: x.clone()})):
        mllm.forward(batch)
    for b, (_, _, values) in enumerate(said(mllm, {"b": Rows(rows)}, [(0, 7), (2, 5)])):
        real = batch["attention_mask"][b].bool()
        np.testing.assert_allclose(values[:, 1], seen[2][b, real, 5], atol=1e-4)


def test_correlation_from_sums():
    x, y = np.random.default_rng(0).random((2, 40))
    sums = np.array([[40, x.sum(), y.sum(), x @ x, y @ y, x @ y]]).T
    assert correlation(sums)[0] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_a_rule_that_cannot_be_read_is_named():
    one = Description(neuron="L0N1", words="", rule="colour > 3")
    table = known(shared_mllm("tiny-qwen2-vl"), of())
    with pytest.raises(ValueError, match=r"L0N1: the rule 'colour > 3' cannot .* name kind, token"):
        described.rule(one, table)


def test_there_may_be_no_descriptions_and_none_of_another_form(tmp_path):
    assert descriptions(tmp_path / "none.yml") == []
    (tmp_path / "odd.yml").write_text("- {neuron: L0N1, word: x, rule: '1'}")
    with pytest.raises(ValueError, match=r"odd.yml is not a list of neuron, words(?s:.*)word"):
        descriptions(tmp_path / "odd.yml")
    (tmp_path / "empty.yml").write_text("# nothing yet")
    assert descriptions(tmp_path / "empty.yml") == []
    (tmp_path / "one.yml").write_text("neuron: L0N1")
    with pytest.raises(ValueError, match=r"one.yml is not a list"):
        descriptions(tmp_path / "one.yml")


def test_a_neuron_that_is_not_there_is_named():
    mllm = shared_mllm("tiny-qwen2-vl")
    one = Description(neuron="L99N1", words="", rule="1")
    has = f"there is no L99N1: .* has layers 0 to {mllm.n_layers - 1} of neurons 0 to"
    with pytest.raises(ValueError, match=has):
        foretold(mllm, {"b": Rows(samples_for(mllm))}, [one])


def test_places_that_are_not_known_are_left_out(monkeypatch):
    """A picture that a processor cuts into tiles is no grid, even if its tokens make a square."""
    pixels = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    mllm = shared_mllm("tiny-qwen2-vl")
    whole = described.tokens
    count = (known(mllm, of(image=pixels))["kind"] == "image").sum()
    monkeypatch.setattr(described, "tokens", lambda *of: whole(*of) | {"grid": [1, 1, count]})
    assert not known(mllm, of(image=pixels))[["x", "y", "red"]].any(axis=None)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.parent.name)
def test_shipped_descriptions_can_be_read(file):
    """On a prompt of a model of that kind."""
    mllm = shared_mllm(next(name for name in MODELS if name[5:] == file.parent.name[5:]))
    found = descriptions(file)
    assert len({d.neuron for d in found}) == len(found) == 10
    table = known(mllm, samples_for(mllm)[0])
    assert all(len(described.rule(d, table)) == len(table) and d.words for d in found)
