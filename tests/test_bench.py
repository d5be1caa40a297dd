"""The bench's own arithmetic, and that README shows what it last measured."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from bench import harness
from bench.__main__ import PAGES, SECTIONS, mine, shown, table
from minerlib import scoring

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1}


def test_sides_alternate_after_a_warm_up():
    calls = []
    seconds = harness.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4
    )
    assert "".join(calls) == "ab" + "baab" * 2
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}


def test_a_ratio_is_the_median_of_the_rounds():
    seconds = {"slow": np.array([2.0, 3.0, 8.0]), "fast": np.array([1.0, 2.0, 2.0])}
    found = harness.ratio("x / y", "here", seconds, target=1.9)
    assert (found["value"], found["low"], found["high"]) == (2.0, 1.75, 3.0)
    assert found["met"] is False and found["seconds"] == [3.0, 2.0]
    assert harness.ratio("x / y", "here", seconds, target=2.0)["met"] is True
    assert harness.ratio("x / y", "here", seconds)["met"] is None


def test_time_is_time():
    seconds = harness.alternate({"a": lambda: time.sleep(0.02), "b": lambda: None}, rounds=5)
    assert (seconds["a"] >= 0.02).all() and np.median(seconds["b"]) < 0.02


@pytest.mark.slow
def test_a_function_alone_returns_its_value_and_its_own_peak():
    value, small = harness.alone(np.zeros, 1)
    assert value == 0
    _, large = harness.alone(_touch, 200)
    assert 150 < large - small < 400
    with pytest.raises(RuntimeError, match="_die.* died"):
        harness.alone(_die)


def _touch(mib: int) -> float:
    return float(np.ones(mib * 2**17).sum())


def _die() -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("name", harness.TEXT)
def test_models_of_another_width(name):
    mllm = harness.real_width(name, layers=3, **SMALL)
    assert (mllm.n_layers, mllm.n_neurons) == (3, 96)
    batch = harness.prompt(mllm, 40, 2)
    sums = scoring.Sums(3)
    scoring.add_batch(mllm, batch, sums)
    assert sums.scores[0].shape == (5, 7, 96) and torch.isfinite(sums.scores[0]).all()
    assert sums.samples[0] == 2 and (sums.samples[3:6] > 0).any()  # text, and a medium
    mine(mllm, batch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_what_was_measured(page):
    results = json.loads((ROOT / "figures/bench.json").read_text())
    assert set(results) == set(SECTIONS)
    assert shown(page, results) == page.read_text()
    found = table(results)
    assert len(found) == sum(len(part["lines"]) for part in results.values())
    assert results["scoring"]["rounds"] >= 7
