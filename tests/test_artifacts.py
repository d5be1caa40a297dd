"""The run folder: what comes back is what was saved, whole or not at all, and of the same make."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import ROOT, random_mllm
from hypothesis import given
from hypothesis import strategies as st

from minerlib import artifacts
from minerlib.artifacts import Checkpoint, Run, atomically, computation, digest, identity


def model(weights: str = "0" * 64, dtype: str = "torch.float32"):
    """As much of an MLLM as a run looks at."""
    fingerprint = {"model.safetensors": weights, "dtype": dtype}
    return SimpleNamespace(
        name="some/where/tiny", fingerprint=fingerprint, device=torch.device("cpu")
    )


def made():
    """A plug-in's function: its version is the hash of this file."""


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "runs" / "tiny", model())


@pytest.fixture
def registered(monkeypatch):
    """A function that is registered as version 1."""
    monkeypatch.setattr(artifacts, "COMPUTATIONS", {})
    return computation(1)(made)


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
    run.save("array", value, of=made, ratio=0.02)
    back = run.load("array", "02", of=made, ratio=0.02)
    xr.testing.assert_identical(back, value)
    assert back.dtype == value.dtype


def test_table_comes_back(run):
    run.save("table", TABLE, of=made)
    pd.testing.assert_frame_equal(run.load("table", "02", of=made), TABLE)


def test_dict_comes_back(run):
    run.save("facts", FACTS, of=made)
    assert run.load("facts", "02", of=made) == FACTS


@pytest.mark.parametrize("value", [SCORES, TABLE, FACTS], ids=["array", "table", "dict"])
def test_cached_computes_once(run, value):
    calls = []

    def compute():
        calls.append(1)
        return value

    for _ in range(2):
        back = run.cached("thing", compute, of=made, seed=1)
        assert type(back) is type(value)
    assert len(calls) == 1
    run.cached("thing", compute, of=made, seed=2)
    assert len(calls) == 2
    assert len(run.manifests()) == 2


@pytest.mark.fault("what a killed run leaves beside its result")
def test_what_a_killed_run_left_beside_its_result_goes(run, registered):
    run.cached("a", lambda: {"x": 1}, of=registered)
    stem, other = run.stem("a", of=registered), run.stem("a", of=registered, seed=1)
    for name in (stem, other):
        (run.folder / f"{name}-0123.partial").write_text("half")
    assert run.cached("a", dict, of=registered) == {"x": 1}
    assert [p.name for p in run.folder.glob("*.partial")] == [f"{other}-0123.partial"]


def test_cached_returns_what_a_later_read_returns(run):
    """The first call goes through the file too, so that a rerun cannot differ from it."""
    first = run.cached("facts", lambda: {"tuple": (1, 2)}, of=made)
    again = run.cached("facts", lambda: pytest.fail("computed again"), of=made)
    assert first == again == {"tuple": [1, 2]}


def test_manifest(run, registered):
    table = TABLE.copy()
    table.attrs["skipped"] = ["mmlu row 3: image: cannot be decoded"]
    config = {"ratio": 0.02, "data": {"mmlu": "abc"}, "mask": NEURONS, "share": np.float32(0.5)}
    run.notices["mmlu"] = {"revision": "f00"}
    path = run.save("table", table, of=registered, seconds=1.23456, **config)
    (manifest,) = run.manifests()
    assert manifest["file"] == path.name and path.exists()
    assert manifest["name"] == "table" and manifest["seconds"] == 1.23
    assert manifest["model_name"] == "tiny"
    assert manifest["config"].items() >= {"ratio": 0.02, "data": {"mmlu": "abc"}}.items()
    assert manifest["config"]["mask"]["values"]["shape"] == [2, 3, 4]
    assert manifest["model"] == {"model.safetensors": "0" * 64, "dtype": "torch.float32"}
    assert manifest["of"] == {f"{__name__}.made": "1"}
    assert manifest["packages"].keys() == set(artifacts.PACKAGES)
    assert manifest["packages"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["notices"] == {"mmlu": {"revision": "f00"}} | table.attrs
    assert manifest["device"] == "cpu"
    assert 10 < manifest["peak_memory_mib"] < 100_000
    assert str(run.folder) not in json.dumps(manifest)
    assert run.load("table", "02", of=registered, **config).attrs == table.attrs


def test_seconds_and_notices_are_not_in_the_key(run):
    first = run.save("facts", FACTS, of=made, seconds=1)
    run.notices["why"] = "x"
    assert run.save("facts", FACTS, of=made) == first
    run.cached("slow", lambda: FACTS, of=made)
    slow = next(m for m in run.manifests() if m["name"] == "slow")
    assert slow["notices"] == {"why": "x"} and 0 <= slow["seconds"] < 5


def test_formats_are_open_ones(run):
    for name, value in {"a": SCORES, "b": TABLE, "c": FACTS}.items():
        run.save(name, value, of=made)
    files = {
        f.name.split("-")[0]: f.suffix for f in run.folder.iterdir() if "manifest" not in f.name
    }
    assert files == {"a": ".nc", "b": ".parquet", "c": ".json"}
    with pytest.raises(TypeError, match="artefact 'd' is a list, none of DataArray, DataFrame"):
        run.save("d", [1], of=made)


@pytest.mark.parametrize("name", ["scores-mmlu.v2", "a.nc", "b.manifest", "total"])
def test_dots_in_a_name_are_part_of_it(run, name):
    path = run.save(name, FACTS, of=made)
    assert path.name == f"{run.stem(name, of=made)}.json" and path.name.startswith(f"{name}-")
    (manifest,) = run.manifests()
    assert manifest["name"] == name and run.load(name, "02", of=made) == FACTS
    with pytest.raises(FileNotFoundError):
        run.load(name.split(".")[0] + "x", "02", of=made)


# --- whole or not at all -------------------------------------------------------------------------


def fail_halfway(monkeypatch, error):
    def write(value, path):
        path.write_text("hal")
        raise error("disk full")

    formats = artifacts._FORMATS | {dict: (".json", write, artifacts._json)}
    monkeypatch.setattr(artifacts, "_FORMATS", formats)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failing_writer_leaves_nothing(run, monkeypatch, error):
    fail_halfway(monkeypatch, error)
    with pytest.raises(error, match="disk full"):
        run.save("facts", FACTS, of=made)
    assert not list(run.folder.iterdir())
    assert not run.manifests()


def test_a_failing_rewrite_keeps_the_old(run, monkeypatch):
    run.save("facts", FACTS, of=made)
    before = {f.name: f.read_bytes() for f in run.folder.iterdir()}
    fail_halfway(monkeypatch, OSError)
    with pytest.raises(OSError, match="disk full"):
        run.save("facts", {"other": 1}, of=made)
    assert {f.name: f.read_bytes() for f in run.folder.iterdir()} == before


def test_a_failing_computation_leaves_nothing(run):
    with pytest.raises(ZeroDivisionError):
        run.cached("facts", lambda: 1 / 0, of=made)
    assert not run.folder.exists() or not list(run.folder.iterdir())
    assert run.cached("facts", lambda: FACTS, of=made) == FACTS


@pytest.mark.fault("damaged artefact is read")
@pytest.mark.parametrize("left", [0, 0.3, 0.9], ids=["empty", "third", "most"])
@pytest.mark.parametrize("value", [SCORES, TABLE, FACTS], ids=["array", "table", "dict"])
def test_a_damaged_file_is_made_anew(run, value, left, caplog):
    path = run.save("thing", value, of=made)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(FileNotFoundError, match="run notebook 02"):
        run.load("thing", "02", of=made)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run.cached("thing", lambda: value, of=made)
    assert f"{path.name} is damaged" in caplog.text
    assert run.load("thing", "02", of=made) is not None
    assert len(path.read_bytes()) == len(whole)


@pytest.mark.fault("damaged manifest stops a run")
def test_an_empty_manifest_is_no_manifest(run):
    path = run.save("facts", FACTS, of=made)
    path.with_suffix(".manifest.json").write_text("")
    assert run.manifests() == [] and run.load("facts", "02", of=made) == FACTS
    with pytest.raises(FileNotFoundError, match="no artefact"):
        run.load("facts", "02", of=made, seed=1)


@pytest.mark.fault("two processes share a .part name")
def test_parts_have_names_of_their_own(tmp_path):
    path, parts = tmp_path / "new" / "x.json", []

    def write(part):
        parts.append(part)
        if len(parts) < 3:
            atomically(path, write)  # as if another call came in between
        part.write_text(f"{len(parts)}")

    atomically(path, write)
    assert len(set(parts)) == 3 and path not in parts
    assert {part.parent for part in parts} == {path.parent}  # one disk, so that a rename is whole
    assert [f.name for f in path.parent.iterdir()] == ["x.json"]


def test_a_part_is_never_read_as_an_artefact(run):
    path = run.folder / f"{run.stem('facts', of=made)}.json"
    seen = []

    def write(part):
        part.write_text("{}")
        seen.append((run.manifests(), run.cached("facts", lambda: FACTS, of=made)))

    atomically(path, write)
    assert seen == [([], FACTS)]
    atomically(
        path.with_suffix(".manifest.json"),
        lambda part: seen.append(run.manifests()) or part.touch(),
    )
    assert seen[1] != [{}]


def write_often(path, number):
    value = xr.DataArray(np.full((64, 1024), float(number)), dims=("a", "b"))
    for _ in range(25):
        atomically(path, lambda part: value.to_netcdf(part, engine="h5netcdf"))
        back = xr.load_dataarray(path, engine="h5netcdf")
        assert back.values.min() == back.values.max()  # one writer's file, whole


@pytest.mark.fault("two processes share a .part name")
def test_two_processes_write_one_artefact(tmp_path):
    path, fork = tmp_path / "shared.nc", multiprocessing.get_context("fork")
    workers = [fork.Process(target=write_often, args=(path, n)) for n in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [f.name for f in tmp_path.iterdir()] == ["shared.nc"]


@pytest.mark.fault("two processes share a .part name")
@pytest.mark.parametrize("value", [SCORES, TABLE, FACTS], ids=["array", "table", "dict"])
def test_threads_write_and_read_one_artefact(run, value):
    def work(_):
        return run.load("thing", "02", of=made) if run.save("thing", value, of=made) else None

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(12)))
    assert len(results) == 12 and all(type(r) is type(value) for r in results)
    assert len(list(run.folder.iterdir())) == 2


# --- of the same make ----------------------------------------------------------------------------


def test_what_was_never_made(run):
    with pytest.raises(FileNotFoundError, match="no artefact 'total'.*run notebook 03_score") as e:
        run.load("total", "03_score_aggregation", of=made)
    assert "there is" not in str(e.value)


def test_another_parameter_is_refused_and_named(run):
    config = {"ratio": 0.02, "data": {"mmlu": "abc"}}
    path = run.save("scores", SCORES, of=made, **config)
    run.save("other", SCORES, of=made, ratio=0.7)
    with pytest.raises(FileNotFoundError, match=r"config\.ratio is 0\.02, not 0\.05") as error:
        run.load("scores", "02", of=made, **(config | {"ratio": 0.05}))
    assert f"\n  there is {path.name}: config.ratio is 0.02, not 0.05" in str(error.value)
    assert "0.7" not in str(error.value) and "mmlu" not in str(error.value)
    assert str(error.value).count("there is") == 1
    with pytest.raises(FileNotFoundError, match=r"config\.data\.mmlu is abc, not xyz"):
        run.load("scores", "02", of=made, ratio=0.02, data={"mmlu": "xyz"})
    with pytest.raises(FileNotFoundError, match=r"config\.seed is None, not 1"):
        run.load("scores", "02", of=made, seed=1, **config)
    with pytest.raises(FileNotFoundError, match=r"config\.ratio is 0\.02, not None"):
        run.load("scores", "02", of=made, data={"mmlu": "abc"})


def test_an_array_or_a_tuple_in_a_key_is_compared_by_content(run):
    run.save("facts", FACTS, of=made, mask=NEURONS.values, kinds=("a", "b"), seed=1)
    with pytest.raises(FileNotFoundError) as error:
        run.load("facts", "02", of=made, mask=NEURONS.values, kinds=("a", "b"), seed=2)
    assert str(error.value).endswith(".json: config.seed is 1, not 2")
    with pytest.raises(FileNotFoundError, match=r"config\.mask\.bytes is"):
        run.load("facts", "02", of=made, mask=~NEURONS.values, kinds=("a", "b"), seed=1)


@pytest.mark.fault("edited computation returns old numbers")
def test_another_version_is_refused_and_named(run, registered):
    run.save("facts", {"n": 1}, of=registered)
    computation(2)(made)
    with pytest.raises(FileNotFoundError, match=rf"of\.{__name__}\.made is 1, not 2"):
        run.load("facts", "02", of=registered)
    assert run.cached("facts", lambda: {"n": 2}, of=registered) == {"n": 2}
    computation(1)(made)
    assert run.load("facts", "02", of=registered) == {"n": 1}


@pytest.mark.fault("new package returns old numbers")
@pytest.mark.parametrize("package", artifacts.PACKAGES)
def test_another_package_is_refused_and_named(run, monkeypatch, package):
    run.save("facts", FACTS, of=made)
    own = artifacts.version
    monkeypatch.setattr(artifacts, "version", lambda p: "0.1" if p == package else own(p))
    with pytest.raises(FileNotFoundError, match=rf"packages\.{package} is .*, not 0\.1"):
        run.load("facts", "02", of=made)


def test_a_build_is_not_another_version(run, monkeypatch):
    run.save("facts", FACTS, of=made)
    own = artifacts.version
    monkeypatch.setattr(artifacts, "version", lambda p: own(p).split("+")[0] + "+cu131")
    assert run.load("facts", "02", of=made) == FACTS


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (model(weights="1" * 64), r"model\.model\.safetensors is 0+, not 1+"),
        (model(dtype="torch.bfloat16"), r"model\.dtype is torch\.float32, not torch\.bfloat16"),
    ],
)
def test_another_model_is_refused_and_named(run, other, difference):
    run.save("scores", SCORES, of=made, ratio=0.02)
    with pytest.raises(FileNotFoundError, match=difference):
        Run(run.folder, other).load("scores", "02", of=made, ratio=0.02)


def test_configurations_lie_side_by_side(run):
    run.save("facts", {"n": 1}, of=made, seed=1)
    run.save("facts", {"n": 2}, of=made, seed=2)
    assert run.load("facts", "02", of=made, seed=1) == {"n": 1}
    assert run.load("facts", "02", of=made, seed=2) == {"n": 2}


def test_where_the_model_lies_does_not_matter(run):
    run.save("facts", FACTS, of=made)
    moved = model()
    moved.name = "else/where"
    assert Run(run.folder, moved).load("facts", "02", of=made) == FACTS


# --- the key: every part of it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small copy of a model's folder: its files, with weights of a few bytes."""
    copy = tmp_path_factory.mktemp("tiny-qwen2-vl")
    for file in (ROOT / "data/models/tiny-qwen2-vl").iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[:100_000])
    (copy / "pytorch_model.bin").write_bytes(b"weights")
    (copy / "more").mkdir()
    (copy / "more" / "code.py").write_text("pass")
    return copy


@pytest.fixture(scope="module")
def mllm(folder):
    mllm = random_mllm("tiny-qwen2-vl")
    mllm.name = str(folder)
    return mllm


FILES = ["model.safetensors", "config.json", "chat_template.jinja", "pytorch_model.bin"] + [
    *("generation_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "more/code.py"),
]


def fresh(mllm, **changes):
    """The same model as another MLLM, as after a new load."""
    parts = {f.name: getattr(mllm, f.name) for f in dataclasses.fields(mllm) if f.init}
    return type(mllm)(**(parts | changes))


@pytest.mark.fault("edited model file returns old numbers")
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_model_is_in_the_key(mllm, folder, tmp_path, name):
    before, file = Run(tmp_path, fresh(mllm)).stem("x", of=made), folder / name
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as long as before
        assert Run(tmp_path, fresh(mllm)).stem("x", of=made) != before
        file.unlink()
        assert Run(tmp_path, fresh(mllm)).stem("x", of=made) != before
    finally:
        file.write_bytes(content)
    assert Run(tmp_path, fresh(mllm)).stem("x", of=made) == before


def set_attention(mllm):
    mllm.model.set_attn_implementation("eager")


def set_template(mllm):
    for part in (mllm.processor, mllm.tokenizer):
        part.chat_template = (part.chat_template or "") + " "


MODEL_CHANGES = {
    "dtype": lambda mllm: mllm.model.to(torch.bfloat16),
    "attention": set_attention,
    "template": set_template,
    "processor setting": lambda mllm: mllm.settings.update(max_pixels=3136),
    "adapter": lambda mllm: setattr(mllm, "family", SimpleNamespace(
        identity=lambda: "Other 1", template=mllm.family.template)),
    "class": lambda mllm: setattr(mllm, "model", SimpleNamespace(
        config=mllm.model.config, dtype=mllm.model.dtype)),
}  # fmt: skip


@pytest.mark.fault("another dtype, attention, template or processor reads old numbers")
@pytest.mark.parametrize("change", MODEL_CHANGES.values(), ids=MODEL_CHANGES)
def test_every_setting_of_a_model_is_in_the_key(folder, tmp_path, change):
    mllm = random_mllm("tiny-qwen2-vl")
    mllm.name = str(folder)
    run = Run(tmp_path, mllm)
    before = run.stem("x", of=made)
    assert run.stem("x", of=made) == before
    change(mllm)
    assert run.stem("x", of=made) != before


@pytest.mark.fault("weights made in memory have no key")
def test_weights_in_memory_are_in_the_key(tmp_path):
    first, second, again = (random_mllm("tiny-qwen2-vl", seed=seed) for seed in (0, 1, 0))
    for mllm in (first, second, again):
        mllm.name = "made in memory"
    stems = [Run(tmp_path, mllm).stem("x", of=made) for mllm in (first, second, again)]
    assert stems[0] == stems[2] != stems[1]


def test_a_hub_commit_is_in_the_key(tmp_path):
    mllm, stems = random_mllm("tiny-qwen2-vl"), []
    mllm.name = "owner/model"
    for commit in ("a" * 40, "b" * 40):
        mllm.model.config._commit_hash = commit
        stems.append(Run(tmp_path, mllm).stem("x", of=made))
    assert stems[0] != stems[1]


def test_every_other_part_is_in_the_key(run, registered):
    def other():
        pass

    stems = [
        run.stem("x", of=registered),
        run.stem("y", of=registered),
        run.stem("x", of=other),
        run.stem("x", of=(registered, other)),
        run.stem("x", of=registered, seed=0),
        run.stem("x", of=registered, seed=1),
        run.stem("x", of=registered, seed=None),
        run.stem("x", of=registered, other=0),
        run.stem("x", of=registered, data={"seed": 0}),
    ]
    assert len(set(stems)) == len(stems)
    assert run.stem("x", of=[registered]) == stems[0]
    assert run.stem("x", of=(other, registered)) == stems[3]
    name, _, key = stems[0].rpartition("-")
    assert name == "x" and len(key) == 16 and set(key) <= set("0123456789abcdef")


# --- identities and digests ----------------------------------------------------------------------


def function_of(path, text, name="f"):
    path.write_text(text)
    space = {"__name__": "plugin"}
    exec(compile(text, str(path), "exec"), space)
    return space[name]


@pytest.mark.fault("edited plug-in returns old numbers")
def test_identity_of_a_plugin_is_its_source(tmp_path):
    text = "def helper(): return 1\ndef f(x=1): return helper()\ng = lambda: 1; h = lambda: 1\n"
    file = tmp_path / "plugin.py"
    first = identity(function_of(file, text))
    assert first.startswith("plugin.f ") and len(first.split()[1]) == 16
    assert identity(function_of(file, text)) == first
    lambdas = {identity(function_of(file, text, name)) for name in "gh"}
    assert len(lambdas) == 2
    assert identity(function_of(file, text.replace("return 1", "return 2"))) != first
    assert identity(function_of(tmp_path / "moved.py", text)) == first  # not where it lies


def test_arrays_are_kept_compressed_and_floats_in_32_bits_unless_told_otherwise(tmp_path):
    value = xr.DataArray(np.arange(4.0), dims="x")
    told = value.copy()
    told.encoding = {"dtype": "float64"}
    usual = [
        (value, "float32", True),
        (value > 1, "bool", True),
        (value.astype(int), "int64", True),
    ]
    for array, dtype, packed in (*usual, (told, "float64", False)):
        artifacts._to_netcdf(array, tmp_path / "a.nc")
        kept = xr.load_dataarray(tmp_path / "a.nc", engine="h5netcdf")
        assert kept.dtype == dtype and bool(kept.encoding.get("zlib")) == packed


@pytest.mark.fault("a plug-in that is edited while it runs")
def test_a_running_function_is_what_it_was(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_plugin.py"
    file.write_text("SCALE = 1\ndef f(): return SCALE\n")
    module = importlib.import_module("edited_plugin")
    artifacts.remember(module)
    file.write_text("SCALE = 20\ndef f(): return SCALE\n")
    before = identity(module.f)
    assert before == identity(module.f)
    importlib.reload(module)
    assert module.f() == 20 and identity(module.f) != before


def test_identity_of_a_version_is_not_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "COMPUTATIONS", {"plugin.f": 3})
    f = function_of(tmp_path / "a.py", "def f(): return 1")
    assert identity(f) == identity(function_of(tmp_path / "a.py", "def f(): return 2"))
    assert identity(f) == "plugin.f 3"


def test_computation_registers_and_leaves_the_function(monkeypatch):
    monkeypatch.setattr(artifacts, "COMPUTATIONS", {})
    assert computation(version=4)(made) is made
    assert {f"{__name__}.made": 4} == artifacts.COMPUTATIONS


def test_identity_counts_defaults_and_closures():
    def make(bound, default=1, *, named=1):
        def f(x=default, *, y=named):
            return bound

        return f

    same = identity(make(1)), identity(make(1))
    others = [make(2), make(1, 2), make(1, named=2), make(np.zeros(2)), make(make)]
    assert len({*same, *map(identity, others)}) == 1 + len(others)
    with pytest.raises(TypeError, match="object"):
        identity(make(object()))


def test_two_functions_of_one_name_are_refused(run):
    first, second = (lambda: 1), (lambda: 2)
    name = first.__qualname__
    with pytest.raises(ValueError, match=f"two functions are called .*{name}"):
        run.stem("x", of=[first, second])
    assert run.stem("x", of=[first, first]) == run.stem("x", of=first)


@pytest.mark.parametrize(
    "value",
    [functools.partial(made), len, np.mean, object(), "".join],
    ids=lambda v: type(v).__name__,
)
def test_identity_refuses_what_has_no_source(value):
    with pytest.raises(TypeError, match="wrap it in a def"):
        identity(value)


def test_digest_sees_values_types_and_shapes():
    values = np.arange(6)
    same = [digest(values), digest(values.copy()), digest(values[::-1][::-1])]
    assert len(set(same)) == 1 and len(same[0]) == 16
    labelled = xr.DataArray(values, dims="a")
    others = [
        values[::-1],
        values.astype(np.int32),
        values.astype(">i8"),
        values.reshape(2, 3),
        values.tolist(),
        values[:5],
        labelled,
        labelled.rename(a="b"),
        labelled.assign_coords(a=range(6)),
        labelled.assign_coords(a=list("abcdef")),
        labelled.assign_coords(c=1),
        {"a": 1},
        {"b": 1},
        {"a": {"a": 1}},
        *(0, 1, 1.0, 0.1, True, False, None, "", "1", "a", b"a", [], {}, [[]], [1], float("nan")),
        *(np.float32(0.1), np.float32(1), np.bool_(True), np.array("a"), made),
    ]
    assert len({same[0], *map(digest, others)}) == 1 + len(others)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest((1, [2])) == digest([1, (2,)])  # as JSON has it


def test_digest_survives_a_file(run):
    """Text coordinates come back from netCDF as objects; they are the same text."""
    run.save("scores", SCORES, of=made)
    assert digest(run.load("scores", "02", of=made)) == digest(SCORES)


@pytest.mark.fault("config hashed by its str()")
@pytest.mark.parametrize(
    "value",
    [object(), {1}, ROOT, 1j, np.array([None]), np.array([object(), "a"]), print, TABLE,
     {"a": [object()]}, {(1, 2): 1}, xr.DataArray(np.array([None]))],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_digest_refuses_what_it_cannot_hash(run, value):
    with pytest.raises(TypeError, match="has no faithful hash|keys must be str"):
        digest(value)
    with pytest.raises(TypeError, match="has no faithful hash|keys must be str"):
        run.cached("x", lambda: pytest.fail("computed"), of=made, config=value)


def test_digest_names_what_it_refuses():
    with pytest.raises(TypeError, match="PosixPath.*no faithful hash"):
        digest({"a": [ROOT]})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
    max_leaves=6,
)


@given(PLAIN, PLAIN)
def test_digests_are_equal_where_values_are(a, b):
    text = [json.dumps(v, sort_keys=True) for v in (a, b)]
    assert (digest(a) == digest(b)) == (text[0] == text[1])
    assert digest({"x": a}) != digest(a)


def test_the_order_of_keys_does_not_count():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


# --- checkpoints ---------------------------------------------------------------------------------

STATE = {"scores": [torch.rand(2, 3), 0], "half": torch.rand(3).bfloat16(), "n": torch.arange(4)}
STATE |= {"rows": 8, "skipped": ["é row 1"], "view": torch.arange(6).view(2, 3).T}


def test_checkpoint_comes_back_and_goes(tmp_path):
    kept = Checkpoint(tmp_path / "new" / "scores.v2", {"model": "a"}, every=0)
    assert kept.load() is None
    kept.done(STATE)  # nothing there yet
    kept.save(STATE)
    back = Checkpoint(tmp_path / "new" / "scores.v2", {"model": "a"}).load()
    assert (back["rows"], back["skipped"], back["scores"][1]) == (8, ["é row 1"], 0)
    assert torch.equal(back["scores"][0], STATE["scores"][0])
    for name in ("half", "n", "view"):
        assert back[name].dtype == STATE[name].dtype and torch.equal(back[name], STATE[name])
    assert [f.name for f in kept.path.parent.iterdir()] == [kept.path.name]
    kept.done(STATE)
    assert not list(kept.path.parent.iterdir()) and kept.load() is None


@pytest.mark.fault("checkpoint of another dtype is continued")
def test_checkpoints_of_other_keys_never_meet(tmp_path):
    first, second = (
        Checkpoint(tmp_path / "scores", {"dtype": d}, every=0) for d in ("float32", "bfloat16")
    )
    first.save({"rows": 1})
    assert second.load() is None
    second.save({"rows": 2})
    second.done({})
    assert first.load() == {"rows": 1}
    assert len(first.path.stem.rsplit("-", 1)[1]) == 16


def test_a_checkpoint_that_is_held_stays_until_its_artefact_is_kept(tmp_path):
    kept = Checkpoint(tmp_path / "scores", "key", every=0)
    kept.held = True
    kept.done({"rows": 3})
    assert kept.load() == {"rows": 3}
    kept.drop()
    assert kept.load() is None


@pytest.mark.fault("checkpoints count batches")
def test_checkpoints_go_by_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(artifacts.time, "monotonic", lambda: now[0])
    kept = Checkpoint(tmp_path / "scores", "key")
    for i, (seconds, saved) in enumerate([(0, None), (59.9, None), (0.1, 2), (59.9, 2), (0.1, 4)]):
        now[0] += seconds
        kept.save({"i": i})
        assert kept.load() == (saved and {"i": saved})
    Checkpoint(tmp_path / "scores", "key", every=0).save({"i": 9})
    assert kept.load() == {"i": 9}


@pytest.mark.fault("damaged checkpoint stops a run")
@pytest.mark.parametrize("left", [0, 10, 200, 0.9])
def test_a_damaged_checkpoint_starts_anew(tmp_path, left, caplog):
    kept = Checkpoint(tmp_path / "scores", "key", every=0)
    kept.save(STATE)
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole[: int(left * len(whole) if left < 1 else left)])
    with caplog.at_level(logging.WARNING):
        assert kept.load() is None
    assert f"{kept.path.name} is damaged" in caplog.text


def test_two_checkpoints_with_one_key(tmp_path):
    def work(n):
        kept = Checkpoint(tmp_path / "scores", "key", every=0)
        for _ in range(20):
            kept.save({"x": torch.full((1000,), n), "rows": n})
            state = kept.load()
            assert (state["x"] == state["rows"]).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("index", [None, pd.Index(["x", "y"], name="of")])
def test_a_table_comes_back_as_it_was_and_is_small(index, tmp_path):
    """Types, lists, attributes and an index that says something; a small table in a small file."""
    table = pd.DataFrame({
        "text": ["a", "ü"], "n": np.array([1, 2], np.int32), "x": [0.1, np.nan],
        "yes": [True, False],
        "references": [["b", "c"], ["d"]], "logprob": np.array([1, 2], np.float32),
    }, index=index)  # fmt: skip
    table.attrs = {"skipped": ["b row 3: gone"]}
    file = tmp_path / "table.parquet"
    artifacts._to_parquet(table, file)
    found = artifacts._from_parquet(file)
    found["references"] = found["references"].map(list)
    pd.testing.assert_frame_equal(found, table, check_exact=True)
    assert found.attrs == table.attrs
    assert file.stat().st_size < (2500 if index is None else 9000)
    table.to_parquet(file)  # as artefacts were written before
    old = artifacts._from_parquet(file)
    assert old.attrs == table.attrs and old["x"].equals(table["x"])
