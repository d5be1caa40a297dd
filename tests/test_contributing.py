"""CONTRIBUTING.md's examples, run as they stand: what is added registers itself, in one file."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import ROOT, Rows, samples_for, shared_mllm

import minerlib as ml
from minerlib import families, scoring, selection
from minerlib.artifacts import digest
from minerlib.findings import rivals
from minerlib.selectors import SELECTORS
from minerlib.tasks import ANSWER_METRICS, REGISTRY

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (my_\w+)\.py\n(.*?)```", TEXT, re.S))
REGISTRIES = (
    scoring.METRICS,
    selection.STRATEGIES,
    SELECTORS,
    REGISTRY,
    ANSWER_METRICS,
    families.FAMILIES,
)


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Import an example as the plug-in that it says it is; every registry is restored."""
    before = [dict(registry) for registry in REGISTRIES]

    def add(name: str):
        path = tmp_path / f"{name}.py"
        path.write_text(EXAMPLES[name])
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield add
    for registry, held in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(held)


@pytest.fixture
def scores():
    mllm = shared_mllm("tiny-qwen2-vl")
    return ml.score(mllm, Rows(samples_for(mllm)[:3]))


def test_each_kind_of_thing_has_an_example():
    kinds = {"metric", "strategy", "selector", "benchmark", "answer_metric", "family"}
    assert set(EXAMPLES) == {f"my_{kind}" for kind in kinds}


def test_an_importance_metric(plug_in):
    plug_in("my_metric")
    mllm = shared_mllm("tiny-qwen2-vl")
    found = ml.score(mllm, Rows(samples_for(mllm)[:3]))
    assert found.metric.values.tolist() == [*selection.PAPER_WEIGHTS, "spread"]
    assert found.sel(metric="spread").std() > 0 and found.sel(metric="spread").max() <= 1
    wb = ml.Workbook(weights="spread")
    assert wb.weights == {"spread": 1.0}
    assert ml.select(found, weights={"spread": 0.5, "attn_k": 0.5}).any()


def test_a_strategy(plug_in, scores):
    plug_in("my_strategy")
    assert ml.Workbook(strategy="margin").strategy == "margin"
    neurons = ml.select(scores, strategy="margin")
    assert int(neurons.sum()) == selection.unique(neurons) == neurons.attrs["budget"]


def test_a_selector(plug_in, monkeypatch):
    """It is compared like the others, and editing it makes what it named anew."""
    before = digest(rivals.compared())
    module = plug_in("my_selector")
    assert [*SELECTORS][-1] == "firing gap" and digest(rivals.compared()) != before
    own = xr.DataArray([[[3.0, 0.0]]], dims=("modality", "layer", "neuron"))
    seen = SimpleNamespace(mean=lambda of: own / 4, elsewhere=lambda of: own / 6)
    found = SELECTORS["firing gap"](seen)
    assert found.values.tolist() == [[[0.25, 0.0]]] and module.firing_gap(seen).equals(found)
    held = digest(rivals.compared())
    monkeypatch.setitem(EXAMPLES, "my_selector", EXAMPLES["my_selector"] + "# edited\n")
    plug_in("my_selector")
    assert digest(rivals.compared()) != held


def test_a_benchmark_and_an_answer_metric(plug_in, tmp_path):
    plug_in("my_answer_metric")
    plug_in("my_benchmark")
    (tmp_path / "capitals").mkdir()
    rows = pd.DataFrame({"country": ["Kenya", "Peru"], "capital": ["Nairobi", "Lima"]})
    rows.to_parquet(tmp_path / "capitals/test-0.parquet")
    bench = ml.benchmark("capitals", source=tmp_path)
    assert bench[1].prompt == "What is the capital of Peru? Answer with one name."
    assert bench.score(["Nairobi.", "Arequipa"]) == [1.0, 0.0]
    assert ml.Workbook(benchmarks="capitals").names == ["capitals"]
    letter = ANSWER_METRICS["first_letter"]
    assert np.array_equal(letter.rows(["nope", "x"], [("Nairobi",), ("Lima",)]), [1.0, 0.0])


def test_a_family(plug_in):
    module = plug_in("my_family")
    assert families.FAMILIES["MyModelForCausalLM"] is module.Mine

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ff = torch.nn.Module()
            self.ff.nonlinearity, self.ff.back = torch.nn.SiLU(), torch.nn.Linear(6, 4)
            self.attention = torch.nn.Module()
            self.attention.out = torch.nn.Linear(4, 4)

    class MyModelForCausalLM(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.trunk = torch.nn.Module()
            self.trunk.blocks = torch.nn.ModuleList([Block(), Block()])
            self.trunk.norm = torch.nn.LayerNorm(4)
            self.config = shared_mllm("tiny-qwen2-vl").model.config

    mllm = ml.MLLM(MyModelForCausalLM(), shared_mllm("tiny-qwen2-vl").tokenizer, "mine")
    assert (mllm.n_layers, mllm.n_neurons) == (2, 6)
    assert mllm.activations == [block.ff.nonlinearity for block in mllm.model.trunk.blocks]
    assert mllm.fingerprint["family"] == module.Mine.identity()
    assert mllm.family.output_projection(mllm.layers[1]) is mllm.layers[1].attention.out
    assert mllm.family.final_norm() is mllm.model.trunk.norm


def test_a_findings_cells(monkeypatch, capsys):
    """Its name is one in metadata, claims and what is kept, as test_notebooks.py asks."""
    (about,) = re.findall(r'"minerlib": ({.*})', TEXT)
    binds, claims, keeps = re.findall(r"```python\n(?!# my_)(.*?)```", TEXT, re.S)
    kept: dict = {"model": "data/models/tiny-qwen2-vl"}
    exec(binds, kept)
    monkeypatch.setattr(ml.Workbook, "save_finding", lambda wb, *given: kept.update(given=given))
    exec(claims + keeps, kept)
    name, table = kept["given"]
    assert {name, *table["finding"]} == {json.loads(about)["finding"]}
    assert table["verdict"].tolist() == ["holds"] and "0.42" in capsys.readouterr().out
