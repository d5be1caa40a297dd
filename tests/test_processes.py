"""Several processes come to what one comes to; one that fails ends all, and what was done stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from accelerate import debug_launcher
from conftest import ROOT, Rows, random_mllm, random_neurons, samples_for

import minerlib as ml
from minerlib import processes, scoring
from minerlib.artifacts import Run
from minerlib.model import MLLM, RowError
from minerlib.tasks import Benchmark
from minerlib.tasks.evaluation import evaluate, prepare
from minerlib.workbook import Workbook

MANY = [2, pytest.param(3, marks=pytest.mark.slow)]


def together(function, n: int, folder) -> list:
    """What `function()` returns in each of n processes."""

    def run() -> None:
        torch.save(function(), folder / f"{processes.rank()}.pt")

    debug_launcher(run, num_processes=n)
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(n)]


@pytest.fixture
def bench() -> Benchmark:
    return ml.benchmark("text_vqa", source=ROOT / "data/benchmarks", limit=7)


@pytest.fixture(scope="module")
def mllm() -> MLLM:
    return random_mllm("tiny-qwen2-vl")


def test_alone_there_are_no_others():
    assert (processes.size(), processes.rank()) == (1, 0)
    assert processes.dealt([3, 1, 2]) == [0, 1, 2]
    assert processes.gathered("x") == ["x"]


def test_work_is_dealt_out_longest_first(tmp_path):
    def own():
        with processes.apart():
            everything = processes.dealt([1.0] * 5)
        return processes.dealt([5, 1, 9, 3, 1, 1]), everything, processes.agreed(processes.rank())

    first, second = together(own, 2, tmp_path)
    assert first == ([2, 4], [0, 1, 2, 3, 4], 0)  # 9 + 1, then 5 + 3 + 1 + 1
    assert second == ([0, 1, 3, 5], [0, 1, 2, 3, 4], 0)


@pytest.mark.parametrize("n", MANY)
@pytest.mark.parametrize("prepared", [False, True])
def test_scores_and_answers_are_those_of_one(mllm, bench, tmp_path, n, prepared):
    neurons = random_neurons(mllm)

    def run():
        asked = prepare(mllm, bench, 2) if prepared else bench
        with ml.deactivate(mllm, neurons):
            answers = evaluate(mllm, asked, 2, 4, measure="logprob")
        return ml.score(mllm, bench, batch_size=2), answers

    scores, answers = run()
    for theirs, their_answers in together(run, n, tmp_path):
        np.testing.assert_allclose(theirs, scores, atol=1e-5)
        np.testing.assert_allclose(theirs.activation_mean, scores.activation_mean, atol=1e-6)
        np.testing.assert_array_equal(theirs.activation_min, scores.activation_min)
        np.testing.assert_array_equal(theirs.samples, scores.samples)
        assert theirs.attrs == scores.attrs
        pd.testing.assert_frame_equal(their_answers, answers, rtol=1e-5)


def test_more_processes_than_batches(mllm, bench, tmp_path):
    one = ml.score(mllm, bench[:3], batch_size=2)
    for theirs in together(lambda: ml.score(mllm, bench[:3], batch_size=2), 3, tmp_path):
        np.testing.assert_allclose(theirs, one, atol=1e-5)


def test_each_process_has_its_part_of_the_devices(monkeypatch):
    assert processes.own_devices() == {}
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (100 + i, 200))
    assert processes.own_devices() == {"max_memory": {2: 102, 3: 103}}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes: each needs an accelerator of its own"):
        ml.load(ROOT / "data/models/tiny-qwen2-vl", device_map="auto")


def test_rows_that_are_skipped_are_named_in_all(tmp_path):
    mllm = random_mllm("tiny-qwen2-audio")
    rows = Rows([s for s in samples_for(mllm) for _ in range(2)])
    rows.samples[3] = rows.samples[3].__class__("What?", ("x",), audio=np.zeros(9), row=77)

    def run():
        with pytest.warns(UserWarning, match="row 77"):
            return ml.score(mllm, rows, batch_size=2, on_error="skip")

    one = run()
    for theirs in together(run, 2, tmp_path):
        assert theirs.attrs == one.attrs and len(one.attrs["skipped"]) == 1
        np.testing.assert_allclose(theirs, one, atol=1e-5)


def test_each_continues_its_own_share(mllm, bench, tmp_path, monkeypatch):
    """Two processes that were killed with a checkpoint each end with the scores of one."""
    one, add = ml.score(mllm, bench, batch_size=1), scoring.add_batch

    def run(kill):
        done = []

        def counted(*args, **how):
            done.append(1)
            if len(done) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            add(*args, **how)

        monkeypatch.setattr(scoring, "add_batch", counted)
        how = {"batch_size": 1, "checkpoint": tmp_path / "sums", "every": 0}
        return ml.score(mllm, bench, **how), len(done)

    with pytest.raises(Exception, match="SIGKILL"):
        debug_launcher(lambda: run(3), num_processes=2)
    assert [*tmp_path.glob("*.partial")]
    found = together(lambda: run(0), 2, tmp_path)
    assert sum(done for _, done in found) < len(bench)
    for scores, _ in found:
        np.testing.assert_allclose(scores, one, atol=1e-5)
    assert not [*tmp_path.glob("*.partial")]


def test_an_error_in_one_is_raised_in_all(mllm, bench, tmp_path, monkeypatch):
    """So that a notebook that goes on without a benchmark goes on in every process."""

    def run():
        if processes.rank() == 1:
            monkeypatch.setattr(MLLM, "generate", lambda *args: 1 / 0)
        with pytest.raises((RuntimeError, ZeroDivisionError), match="division by zero"):
            evaluate(mllm, bench, 2, 4)
        with processes.apart():
            ready = prepare(mllm, bench, 2)
        with pytest.raises(ValueError, match="prepared by 1 processes.* asked by 2"):
            evaluate(mllm, ready)
        return processes.gathered(processes.rank())

    assert together(run, 2, tmp_path) == [[0, 1], [0, 1]]


def test_a_row_that_cannot_be_decoded_is_skipped(mllm, tmp_path):
    class Damaged(Rows):
        def __getitem__(self, which):
            if which == 2:
                raise RowError("rows", 2, "image", "damaged")
            return super().__getitem__(which)

    rows = Damaged(samples_for(mllm))

    def run():
        with pytest.warns(UserWarning, match="damaged"):
            return ml.score(mllm, rows, batch_size=1, on_error="skip")

    one = run()
    for theirs in together(run, 2, tmp_path):
        np.testing.assert_allclose(theirs, one, atol=1e-5)


def test_conditions_are_dealt_out_and_each_is_computed_once(tmp_path):
    def run():
        where = {"limit": 8, "eval_limit": 2, "run_dir": str(tmp_path / "run")}
        wb = Workbook(model="data/models/tiny-qwen2-vl", benchmarks=["text_vqa"], **where)
        done = []

        def compute(neurons):
            done.append(int(neurons.sum()))
            return xr.DataArray([float(neurons.sum())], dims="x")

        return wb.each("sizes", compute, draws, of=Run.save), done

    draws = [random_neurons(random_mllm("tiny-qwen2-vl"), 0.1, seed=i) for i in range(5)]
    sizes = [int(draw.sum()) for draw in draws]
    found = together(run, 2, tmp_path)
    assert Counter(n for _, done in found for n in done) == Counter(sizes)
    assert sorted(len(done) for _, done in found) == [2, 3]
    for values, _ in found:
        assert values.values.ravel().tolist() == sizes


def test_an_artefact_is_computed_together_and_written_once(mllm, tmp_path):
    def run():
        kept = Run(tmp_path / "run", mllm)

        def compute():
            return {"of": processes.gathered(processes.rank())}

        return [kept.cached("ranks", compute, of=Run.save) for _ in range(2)]

    assert together(run, 2, tmp_path) == [[{"of": [0, 1]}] * 2] * 2
    assert len([*(tmp_path / "run").iterdir()]) == 2  # with its manifest


@pytest.mark.parametrize("dies", ["raises", "is killed"])
def test_one_that_fails_ends_all_and_what_was_done_stays(mllm, bench, tmp_path, dies):
    def run():
        kept = Run(tmp_path / "run", mllm)
        kept.cached("before", lambda: {"done": True}, of=Run.save)
        if processes.rank() == 1:
            if dies == "raises":
                raise OSError("cable pulled")
            os.kill(os.getpid(), signal.SIGKILL)
        ml.score(mllm, bench, batch_size=2)

    why = "cable pulled" if dies == "raises" else "process 1 terminated with signal SIGKILL"
    with pytest.raises(Exception, match=why):
        debug_launcher(run, num_processes=2)
    assert Run(tmp_path / "run", mllm).cached("before", dict, of=Run.save) == {"done": True}


@pytest.mark.slow
def test_a_run_by_two_processes_leaves_what_one_leaves(tmp_path):
    """Also the launcher says which of them failed."""
    found = {}
    for n in (1, 2):
        where, run = tmp_path / str(n), [sys.executable, "notebooks/run.py", "quick=1"]
        run += ["limit=4", "eval_limit=4", "notebooks=0", f"run={where}"]  # scores and answers
        run += ["model=data/models/tiny-qwen2-audio"]
        done = subprocess.run([*run, f"processes={n}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        folder = where / "tiny-qwen2-audio"
        found[n] = {path.name: path for path in folder.glob("*.*") if "manifest" not in path.name}
    assert set(found[1]) == set(found[2])
    assert {Path(name).suffix for name in found[1]} >= {".parquet", ".nc"}
    for name, path in found[1].items():
        if path.suffix == ".parquet":
            one, two = pd.read_parquet(path), pd.read_parquet(found[2][name])
            pd.testing.assert_frame_equal(one, two, rtol=1e-4)
        elif path.suffix == ".nc":
            one, two = xr.load_dataarray(path), xr.load_dataarray(found[2][name])
            np.testing.assert_allclose(one, two, atol=1e-4)
    wrong = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    wrong += ["-m", "minerlib", "notebooks/02_importance_scores.ipynb", "limit=100000"]
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "limit=100000" in done.stderr and "rank" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("raised", "code"), [("NotApplicable", 0), ("ValueError", 1)])
def test_a_notebook_that_does_not_apply_is_no_failure(tmp_path, raised, code):
    cells = ["from minerlib.workbook import NotApplicable", f"raise {raised}('no clips')", "1 / 0"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, tmp_path / "one.ipynb")
    command = [sys.executable, "-m", "minerlib", str(tmp_path / "one.ipynb")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "ZeroDivisionError" not in done.stdout + done.stderr
