"""The run folder: what comes back is what was saved, whole or not at all, and of the same make."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from minerlib import artifacts
from minerlib.artifacts import Run, digest


def model(sha: str = "0" * 64, dtype=torch.float32):
    """As much of an MLLM as a run looks at."""
    return SimpleNamespace(
        name="some/where/tiny", model=SimpleNamespace(dtype=dtype), fingerprint={"weights": sha}
    )


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "runs" / "tiny", model())


SCORES = xr.DataArray(
    np.random.default_rng(0).random((2, 3, 4), np.float32),
    dims=("modality", "layer", "neuron"),
    coords={
        "modality": ["text", "image"],
        "layer": range(3),
        "samples": ("modality", [7, 9]),
        "activation_min": ("layer", np.array([-0.25, -0.5, -0.125], np.float32)),
    },
    name="importance",
    attrs={"benchmark": "mmlu", "rows": 9},
)
NEURONS = (SCORES > 0.5).rename("neurons").assign_attrs(strategy="LA_MU", ratio=0.02, seed=0)
TABLE = pd.DataFrame(
    {"benchmark": ["a", "b"], "row": [1, 2], "answer": ["é", ""], "score": [0.5, np.nan]}
)
FACTS = {"text": "é", "number": 0.1, "list": [1, None, True], "nested": {"a": {"b": "c"}}}


@pytest.mark.parametrize("value", [SCORES, NEURONS], ids=["float", "bool"])
def test_array_comes_back(run, value):
    run.save("array", value, ratio=0.02)
    back = run.load("array", "02", ratio=0.02)
    xr.testing.assert_identical(back, value)
    assert back.dtype == value.dtype


def test_table_comes_back(run):
    run.save("table", TABLE)
    pd.testing.assert_frame_equal(run.load("table", "02"), TABLE)


def test_dict_comes_back(run):
    run.save("facts", FACTS)
    assert run.load("facts", "02") == FACTS


@pytest.mark.parametrize("value", [SCORES, TABLE, FACTS], ids=["array", "table", "dict"])
def test_cached_computes_once(run, value):
    calls = []

    def compute():
        calls.append(1)
        return value

    for _ in range(2):
        back = run.cached("thing", compute, seed=1)
        assert type(back) is type(value)
    assert len(calls) == 1
    run.cached("thing", compute, seed=2)
    assert len(calls) == 2
    assert len(run.manifests()) == 2


def test_cached_returns_what_a_later_read_returns(run):
    """The first call goes through the file too, so that a rerun cannot differ from it."""
    first = run.cached("facts", lambda: {"tuple": (1, 2)})
    assert first == run.cached("facts", lambda: pytest.fail("computed again")) == {"tuple": [1, 2]}


def test_manifest(run):
    path = run.save("table", TABLE, seconds=1.23456, ratio=0.02, data={"mmlu": "abc"})
    (manifest,) = run.manifests()
    assert manifest["file"] == path.name and path.exists()
    assert manifest["name"] == "table" and manifest["seconds"] == 1.23
    assert manifest["config"] == {"ratio": 0.02, "data": {"mmlu": "abc"}}
    assert manifest["model"] == {
        "name": "tiny",
        "dtype": "torch.float32",
        "files": {"weights": "0" * 64},
    }
    assert manifest["packages"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["peak_memory_mib"] > 10
    assert str(run.folder) not in json.dumps(manifest)


def test_formats_are_open_ones(run):
    for name, value in {"a": SCORES, "b": TABLE, "c": FACTS}.items():
        run.save(name, value)
    files = {
        f.name.split("-")[0]: f.suffix for f in run.folder.iterdir() if "manifest" not in f.name
    }
    assert files == {"a": ".nc", "b": ".parquet", "c": ".json"}
    with pytest.raises(TypeError, match="artefact 'd' is a list"):
        run.save("d", [1])


# --- whole or not at all -------------------------------------------------------------------------


def fail_halfway(monkeypatch, error):
    def write(path):
        path.write_text("hal")
        raise error("disk full")

    monkeypatch.setattr(artifacts, "_writer", lambda name, value: (".json", write))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failing_writer_leaves_nothing(run, monkeypatch, error):
    fail_halfway(monkeypatch, error)
    with pytest.raises(error, match="disk full"):
        run.save("facts", FACTS)
    assert not list(run.folder.iterdir())
    assert not run.manifests()


def test_a_failing_rewrite_keeps_the_old(run, monkeypatch):
    run.save("facts", FACTS)
    before = {f.name: f.read_bytes() for f in run.folder.iterdir()}
    fail_halfway(monkeypatch, OSError)
    with pytest.raises(OSError, match="disk full"):
        run.save("facts", {"other": 1})
    assert {f.name: f.read_bytes() for f in run.folder.iterdir()} == before


def test_a_failing_computation_leaves_nothing(run):
    with pytest.raises(ZeroDivisionError):
        run.cached("facts", lambda: 1 / 0)
    assert not run.folder.exists() or not list(run.folder.iterdir())
    assert run.cached("facts", lambda: FACTS) == FACTS


# --- of the same make ----------------------------------------------------------------------------


def test_what_was_never_made(run):
    with pytest.raises(FileNotFoundError, match="no artefact 'total'.*run notebook 03_score"):
        run.load("total", "03_score_aggregation")


def test_another_parameter_is_refused_and_named(run):
    run.save("scores", SCORES, ratio=0.02, data={"mmlu": "abc"})
    with pytest.raises(FileNotFoundError, match=r"config\.ratio is 0\.02, not 0\.05"):
        run.load("scores", "02", ratio=0.05, data={"mmlu": "abc"})
    with pytest.raises(FileNotFoundError, match=r"config\.data\.mmlu is abc, not xyz"):
        run.load("scores", "02", ratio=0.02, data={"mmlu": "xyz"})
    with pytest.raises(FileNotFoundError, match=r"config\.seed is None, not 1"):
        run.load("scores", "02", ratio=0.02, data={"mmlu": "abc"}, seed=1)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (model(sha="1" * 64), r"model\.files\.weights is 0+, not 1+"),
        (model(dtype=torch.bfloat16), r"model\.dtype is torch\.float32, not torch\.bfloat16"),
    ],
)
def test_another_model_is_refused_and_named(run, other, difference):
    run.save("scores", SCORES, ratio=0.02)
    with pytest.raises(FileNotFoundError, match=difference):
        Run(run.folder, other).load("scores", "02", ratio=0.02)


def test_configurations_lie_side_by_side(run):
    run.save("facts", {"n": 1}, seed=1)
    run.save("facts", {"n": 2}, seed=2)
    assert run.load("facts", "02", seed=1) == {"n": 1}
    assert run.load("facts", "02", seed=2) == {"n": 2}


def test_digest_sees_values_types_and_shapes():
    values = np.arange(6)
    same = [digest(values), digest(values.copy()), digest(xr.DataArray(values))]
    assert len(set(same)) == 1
    others = [
        values[::-1],
        values.astype(np.int32),
        values.reshape(2, 3),
        values.tolist(),
        {"a": 1},
    ]
    assert len({same[0], *map(digest, others)}) == 1 + len(others)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
