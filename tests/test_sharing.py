"""Neurons that are handed on: what was written is read, another model's are refused."""

from __future__ import annotations

import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ROOT, random_mllm, random_neurons

import minerlib as ml
from minerlib import sharing, shipped


@pytest.fixture
def saved(mllm, tmp_path):
    neurons = random_neurons(mllm).assign_coords(modality=["text", "audio"])
    how = {"rows": {"libri": "96 rows"}, "method": {"ratio": 0.02}, "effect": "0.8 to 0.1"}
    return neurons, ml.save_neurons(neurons, tmp_path / "mine", mllm, **how)


def test_what_was_written_is_read(mllm, saved):
    neurons, folder = saved
    for source in (folder, folder / "neurons.nc"):
        found = ml.load_neurons(source, mllm)
        assert found.dtype == bool and np.array_equal(found.values, neurons.values)
        assert found.modality.values.tolist() == ["text", "audio"]
    card = found.attrs["card"]
    assert card["neurons"]["text"] == int(neurons[0].sum()) and card["method"] == {"ratio": 0.02}
    assert card["fingerprint"] == mllm.fingerprint and card["effect"] == "0.8 to 0.1"
    text = (folder / "README.md").read_text()
    told = (
        "0.8 to 0.1",
        f"| text | {int(neurons[0].sum())} |",
        "- libri: 96 rows",
        "- ratio: 0.02",
    )
    assert all(part in text for part in told) and "load_neurons" in text
    with ml.deactivate(mllm, found, ["audio"]):
        pass


def test_layers_of_different_weights(mllm, tmp_path):
    """A convolution in some, or keys that others share."""
    other = random_mllm(mllm.name.rsplit("/", 1)[-1])
    other.layers[0].more = torch.nn.Linear(40, 40)
    neurons = random_neurons(other)
    folder = ml.save_neurons(neurons, tmp_path / "mine", other, method={"ratio": 0.02})
    assert np.array_equal(ml.load_neurons(folder, other), neurons)
    with pytest.raises(ValueError, match="mine your own model"):
        ml.load_neurons(folder, mllm)


def test_they_are_known_again_in_16_bits_and_not_in_another_model(saved, mllm):
    _, folder = saved
    name = mllm.name.rsplit("/", 1)[-1]
    for dtype in (torch.bfloat16, torch.float16):
        assert ml.load_neurons(folder, random_mllm(name, dtype=dtype)).any()
    with pytest.raises(ValueError, match="whose weights are not those of .*: mine your own model"):
        ml.load_neurons(folder, random_mllm(name, seed=1))
    tuned = random_mllm(name)
    with torch.no_grad():
        for weight in tuned.layers[0].parameters():
            weight.mul_(1.02)
    with pytest.raises(ValueError, match="mine your own model"):
        ml.load_neurons(folder, tuned)
    one = random_mllm(name)
    with torch.no_grad():  # a single attention weight, such as an adapter changes
        one.layers[-1].self_attn.o_proj.weight[:, :2] += 0.05
    with pytest.raises(ValueError, match="mine your own model"):
        ml.load_neurons(folder, one)
    others = {"tiny-qwen2-vl": "tiny-qwen2-audio", "tiny-qwen2-audio": "tiny-qwen2-vl"}
    with pytest.raises(ValueError, match=f"of {name}, a Qwen2.* is a Qwen2"):
        ml.load_neurons(folder, random_mllm(others[name]))
    assert ml.load_neurons(folder).any()  # unasked


def test_what_does_not_fit_is_named(mllm, saved, tmp_path, monkeypatch):
    neurons, _ = saved
    with pytest.raises(ValueError, match="neurons is bool .* has bool .modality"):
        ml.save_neurons(neurons[:, :1], tmp_path / "x", mllm)
    with pytest.raises(FileNotFoundError, match="no neurons in .*: give a folder with neurons.nc"):
        ml.load_neurons(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="`save_neurons` writes it"):
        ml.push_neurons(tmp_path / "nowhere", "user/name")
    monkeypatch.setattr(torch.Tensor, "is_floating_point", lambda self: False)
    with pytest.raises(ValueError, match="quantised or offloaded"):
        sharing._signature(mllm)


def test_there_and_back_over_the_hub(mllm, saved, tmp_path, monkeypatch):
    """A repository is a folder here: what is uploaded is what is downloaded."""
    neurons, folder = saved
    hub, made = tmp_path / "hub", []
    (folder / "secrets.txt").write_text("not to be pushed")

    class Api:
        def create_repo(self, name, private, exist_ok):
            made.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            for pattern in allow_patterns:
                to = hub / repo_id / pattern
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder_path / pattern, to)
            return f"https://the.hub/{repo_id}"

    def download(repo, name, revision):
        assert revision in (None, "v1")
        return str(hub / repo / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert ml.push_neurons(folder, "user/one") == "https://the.hub/user/one"
    assert made == [("user/one", False, True)]
    assert {p.name for p in (hub / "user/one").iterdir()} == {"neurons.nc", "README.md"}
    found = ml.load_neurons("user/one", mllm, revision="v1")
    assert np.array_equal(found.values, neurons.values)
    ml.push_neurons(folder.parent, "user/several", private=True)
    again = ml.load_neurons("user/several", mllm, subfolder="mine")
    assert np.array_equal(again.values, neurons.values)


def test_a_run_says_where_they_are_from(tmp_path, monkeypatch):
    wb = ml.Workbook(model="data/models/tiny-qwen2-vl", benchmarks="mmlu", limit=3,
                     run_dir=str(tmp_path / "run"))  # fmt: skip
    neurons = random_neurons(wb.mllm)
    with pytest.raises(ValueError, match="say by which method these neurons were found"):
        wb.save_neurons(neurons, tmp_path / "n")
    neurons.attrs["strategy"] = "mine"
    card = ml.load_neurons(wb.save_neurons(neurons, tmp_path / "n"), wb.mllm).attrs["card"]
    assert card["rows"]["mmlu"].startswith("3 rows, ") and card["method"] == {"strategy": "mine"}
    wb.save_neurons(neurons, tmp_path / "n", method={"by": "hand"})
    assert ml.load_neurons(tmp_path / "n").attrs["card"]["method"] == {"by": "hand"}
    assert card["effect"] == "" and card["model"] == "tiny-qwen2-vl"


HANDED_ON = sorted(path.parent for path in (ROOT / "data/neurons").glob("*/neurons.nc"))


def test_every_model_with_published_scores_has_its_neurons_handed_on():
    published = {path.parent.name for path in (ROOT / "data/results").glob("*/scores-*.nc")}
    assert {folder.name for folder in HANDED_ON} == published


@pytest.mark.slow
@pytest.mark.parametrize("folder", HANDED_ON, ids=lambda folder: folder.name)
def test_shipped_neurons_are_those_of_the_notebooks(folder):
    """Of this model, by its weights, and what stages 3 and 4 make of the published scores."""
    try:
        shipped.checkpoint(f"{ROOT}/data/models/{folder.name}")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    wb = ml.Workbook(model=f"data/models/{folder.name}", limit=96)
    neurons = ml.load_neurons(folder, wb.mllm)
    xr.testing.assert_equal(neurons, wb.select(wb.total()))
    card = neurons.attrs["card"]
    assert card["model"] == folder.name and set(card["rows"]) == set(wb.names)
    assert card["different"] == neurons.any("modality").sum() and card["method"]["ratio"] == 0.02
