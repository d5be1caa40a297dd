"""Nothing that was computed is lost: kills, a full disk, too little memory."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import time
import warnings
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import ROOT, Rows, random_mllm, random_neurons, samples_for

import minerlib as ml
from minerlib import artifacts, memory
from minerlib.critical import attribution
from minerlib.findings.last_token import last_token_flow
from minerlib.gradients import gradients
from minerlib.model import MLLM, RowError
from minerlib.scoring import score
from minerlib.tasks.evaluation import evaluate, prepare
from minerlib.workbook import Workbook

SETS = [random_neurons(random_mllm("tiny-qwen2-vl"), seed=i) for i in range(3)]


def job(folder) -> None:
    """All that a run keeps on its way: scores, answers, conditions."""
    wb = Workbook(model="data/models/tiny-qwen2-vl", benchmarks=["text_vqa"], limit=12,
                  eval_limit=8, batch_size=2, run_dir=str(folder))  # fmt: skip
    wb.mine()
    wb.answers(SETS[0])
    wb.logprobs([None, *SETS], 8)


def files(folder) -> dict[str, object]:
    """What a run left, but for manifests and what a killed process was writing."""
    read = {".nc": xr.load_dataarray, ".parquet": pd.read_parquet}
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*.*") if p.suffix in read}
    assert not [*folder.rglob("*.partial")]
    return {name: read[path.suffix](path) for name, path in found.items()}


def left(folder) -> dict[str, int]:
    """When each file of an unfinished run was last written."""
    with suppress(FileNotFoundError):  # one that was renamed meanwhile
        return {str(p): p.stat().st_mtime_ns for p in (folder / "killed").rglob("*.*")}
    return left(folder)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_like_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(score.__kwdefaults__, "every", 0.0)  # checkpoints at every batch
    monkeypatch.setattr(artifacts.Checkpoint.__init__, "__defaults__", (0.0,))
    start = time.monotonic()
    job(tmp_path / "whole")
    took, chance = time.monotonic() - start, random.Random(0)
    fork, partial = multiprocessing.get_context("fork"), 0
    for _ in range(10):  # a while after it has got a little further
        before, process = left(tmp_path), fork.Process(target=job, args=(tmp_path / "killed",))
        process.start()
        while process.is_alive() and left(tmp_path) == before:
            time.sleep(0.002)
        process.join(chance.uniform(0, took / 30))
        process.kill()
        process.join()
        assert process.exitcode != 0, "it was over before it was killed ten times"
        partial += any((tmp_path / "killed").rglob("*.partial"))
    assert partial, "no kill met a computation that had a checkpoint"
    job(tmp_path / "killed")
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert set(whole) == set(killed)
    for name, value in whole.items():
        assert value.identical(killed[name]) if name.endswith("nc") else value.equals(killed[name])


def test_answers_continue_where_they_stopped(tmp_path, monkeypatch):
    mllm = random_mllm("tiny-qwen2-vl")
    bench = ml.benchmark("text_vqa", source=ROOT / "data/benchmarks", limit=8)
    ready, asked, generate = prepare(mllm, bench, 2), [], type(mllm).generate

    def counted(mllm, batch, longest):
        asked.append(len(batch["input_ids"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(mllm, batch, longest)

    monkeypatch.setattr(type(mllm), "generate", counted)

    def place():
        return artifacts.Checkpoint(tmp_path / "answers", "key", 0)

    with pytest.raises(KeyboardInterrupt):
        evaluate(mllm, ready, max_new_tokens=3, checkpoint=place())
    table = evaluate(mllm, ready, max_new_tokens=3, checkpoint=place())
    assert asked == [2] * 5  # two, one that stopped, and the last two
    pd.testing.assert_frame_equal(table, evaluate(mllm, ready, max_new_tokens=3))
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_written_is_not_computed_again(tmp_path, monkeypatch):
    """A checkpoint goes when its artefact is there, and not when the computation is over."""
    monkeypatch.setattr(artifacts.Checkpoint.__init__, "__defaults__", (0.0,))
    answered, save, generate = [], artifacts.Run.save, MLLM.generate
    monkeypatch.setattr(MLLM, "generate", lambda *a: (answered.append(1), generate(*a))[1])
    wb = Workbook(model="data/models/tiny-qwen2-vl", benchmarks=["text_vqa"], limit=4,
                  eval_limit=6, batch_size=2, run_dir=str(tmp_path))  # fmt: skip

    def full(*args, **how):
        raise OSError("no space")

    monkeypatch.setattr(artifacts.Run, "save", full)
    with pytest.raises(OSError, match="no space"):
        wb.answers()
    monkeypatch.setattr(artifacts.Run, "save", save)
    assert len(wb.answers()) == 6 and len(answered) == 3
    assert not [*tmp_path.rglob("*.partial")]


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=244k", "tmpfs", str(where)]
    if os.geteuid() or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_loses_nothing(small_disk, tmp_path):
    with pytest.raises(OSError, match="no space for .*make room and run it again"):
        job(small_disk)
    before = {path.name: path.stat().st_mtime for path in small_disk.glob("*.nc")}
    assert before and not [*small_disk.rglob("*.part")]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    job(small_disk)
    job(tmp_path / "whole")
    whole, found = files(tmp_path / "whole"), files(small_disk)
    assert set(whole) == set(found)
    assert before.items() <= {p.name: p.stat().st_mtime for p in small_disk.glob("*.nc")}.items()


@pytest.fixture
def little():
    """A model that has memory for no more than two prompts at once."""
    mllm, tried, limit = random_mllm("tiny-qwen2-audio"), [], {"most": 2}

    def checked(body, args, given):
        tried.append(len(given["input_ids"]))
        if tried[-1] > limit["most"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    mllm.model.base_model.register_forward_pre_hook(checked, with_kwargs=True)
    return mllm, tried, limit


def test_memory_that_runs_out_while_sums_grow_counts_nothing_twice(monkeypatch):
    mllm, calls, minimum = random_mllm("tiny-qwen2-audio"), [], torch.minimum
    rows = Rows(samples_for(mllm))
    expected = ml.score(mllm, rows)

    def fourth(*args):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return minimum(*args)

    monkeypatch.setattr(torch, "minimum", fourth)
    with pytest.warns(UserWarning, match="run in halves"):
        found = ml.score(mllm, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found.samples, expected.samples)


@pytest.mark.parametrize("prepared", [False, True])
def test_batches_that_do_not_fit_are_run_in_halves(little, prepared):
    mllm, tried, _ = little
    rows = Rows(samples_for(random_mllm("tiny-qwen2-audio")) * 2)
    whole = random_mllm("tiny-qwen2-audio")
    expected = ml.score(whole, rows), evaluate(whole, bench(), measure="logprob")
    with pytest.warns(UserWarning, match="run in halves"):
        scores = ml.score(mllm, rows)
        asked = prepare(mllm, bench(), 8) if prepared else bench()
        answers = evaluate(mllm, asked, measure="logprob")
    assert {8, 4, 2} <= set(tried)
    np.testing.assert_allclose(scores, expected[0], atol=1e-5)
    pd.testing.assert_frame_equal(answers, expected[1], rtol=1e-5)


def bench():
    return ml.benchmark("vocal_sound", source=ROOT / "data/benchmarks", limit=8)


def test_it_is_said_once(little):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        ml.score(little[0], Rows(samples_for(little[0]) * 4), batch_size=4)
    assert sum("run in halves" in str(warning.message) for warning in said) == 1


def test_a_row_that_does_not_fit_alone_is_named(little):
    little[2]["most"] = 0
    with pytest.raises(RowError, match=r"row \d+: prompt: out of memory: lower max_pixels"):
        ml.score(little[0], bench())
    with pytest.raises(RowError, match=r"vocal_sound row \d+: prompt: out of memory"):
        evaluate(little[0], bench())
    for ask in (ml.score, evaluate):
        with pytest.raises(ValueError, match="every row was skipped.*out of memory"):
            ask(little[0], bench(), on_error="skip")


def test_backward_passes_are_cut_to_what_fits(monkeypatch):
    mllm = random_mllm("tiny-qwen2-vl")
    rows = Rows(samples_for(mllm))
    (_, batch), *_ = mllm.batches(rows, 5)
    assert len(batch["input_ids"]) == 5
    tokens = batch["input_ids"].shape[1]
    each = 7 * mllm.n_layers * mllm.n_neurons * 4 * tokens
    by = ["sample", "layer", "set"]

    def flow():
        found = last_token_flow(mllm, rows, np.full(5, 300), batch_size=5)
        return found.sort_values(by, ignore_index=True)

    whole = flow()
    slopes = gradients(mllm, [rows], steps=1, batch_size=5), attribution(mllm, [rows])
    monkeypatch.setattr(memory, "free", lambda device: 5 * each // 2)
    cut = [(i, len(b["input_ids"])) for i, b in mllm.batches(rows, 5)]
    assert cut == [(0, 2), (2, 2), (4, 1)]
    with torch.no_grad():
        assert [len(b["input_ids"]) for _, b in mllm.batches(rows, 5)] == [5]
    encoded, encode = [], type(mllm).encode
    monkeypatch.setattr(
        type(mllm), "encode", lambda m, s: (encoded.append(len(s)), encode(m, s))[1]
    )
    pd.testing.assert_frame_equal(flow(), whole, rtol=1e-3, atol=1e-6)
    again = gradients(mllm, [rows], steps=1, batch_size=5), attribution(mllm, [rows])
    for one, other in zip(slopes, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    assert encoded == [5, 2, 2, 1] * 3  # each of the three looks, and then cuts


def test_inputs_wait_off_a_device_that_is_half_full(monkeypatch):
    batch = {"input_ids": torch.ones(2, 3), "seen": {"image": [torch.ones(4)]}}
    device = torch.device("meta")  # stands for any that is not the processor
    monkeypatch.setattr(memory, "whole", lambda device: 100)
    there = memory.send_to_device(batch, device)
    assert there["seen"]["image"][0].device == device and batch["input_ids"].device.type == "cpu"
    for left, kept in ((51, True), (50, False)):
        monkeypatch.setattr(memory, "free", lambda device, left=left: left)
        monkeypatch.setattr(memory, "send_to_device", lambda batch, to: "moved")
        assert (memory.kept(batch, device) is batch) == kept
