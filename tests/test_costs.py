"""Times beside a floor, and the arithmetic of larger models."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from conftest import footprints, samples_for
from families import Rows as Asked

from minerlib import memory
from minerlib.findings import costs
from minerlib.presets import PRESETS


def test_jobs_take_turns_and_the_first_turn_does_not_count():
    calls = []
    jobs = {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.02))}
    table = costs.timed(jobs, 3)
    assert calls == ["a", "b"] * 4
    assert table["job"].tolist() == ["a", "b"] * 3 and table["round"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table[table["job"] == "b"]["seconds"].between(0.02, 0.5).all()


def test_memory_beyond_the_start():
    with costs.memory() as most:
        kept = np.ones(40 * 2**17)  # 40 MiB, touched
        time.sleep(0.1)
    assert 35 < most[0] < 80 and kept[0] == 1


def test_ratios_are_of_the_same_round():
    times = pd.DataFrame({"job": ["a", "b"] * 2, "round": [0, 0, 1, 1], "seconds": [1, 3, 2, 8.0]})
    table = costs.ratios(times, "a").set_index(["job", "round"])["ratio"]
    assert table.to_dict() == {("a", 0): 1, ("a", 1): 1, ("b", 0): 3, ("b", 1): 4}


def test_minutes_of_a_whole_run():
    """By hand: a prompt of 1000 tokens through 5 billion weights, and no tower, is 10^13."""
    one = PRESETS["qwen2-vl-7b"].model_copy(
        update={"billions": (6.0, 5.0), "tokens": 1000, "tower": (0.0, 0)}
    )
    found = costs.whole_run(one, 1.2, rows=200, draws=10, sets=2, few=20, longest=5,
                            batch_size=32, teraflops=10.0, terabytes=1.0)  # fmt: skip
    assert found == pytest.approx({
        "mining, 200 rows a benchmark": 1.2 * 600 / 60,  # a second each
        "log-probability of 10 draws": 10 * 60 / 60,
        # Two batches of 60 prompts write 5 tokens each, and read 12 GB for each.
        "answers of 2 sets": 2 * (60 + 2 * 5 * 0.012) / 60,
        "all": 12 + 10 + 2.004,
    })  # fmt: skip


def test_every_step_runs_and_leaves_no_trace(mllm, monkeypatch):
    rows = [Asked(samples_for(mllm)[:2])]
    before = footprints(mllm)
    jobs = costs.steps(mllm, rows, 2, 1)
    assert next(iter(jobs)) == "forward pass" and len(jobs) == 7
    with monkeypatch.context() as patch:  # memory for less than a backward pass of all
        patch.setattr(memory, "backward_rows", lambda *_: 1)
        encoded, encode = [], mllm.encode
        patch.setattr(type(mllm), "encode", lambda _, rows: encoded.append(rows) or encode(rows))
        jobs["forward pass"]()
        assert [len(samples) for samples in encoded] == [2]
    for job in jobs.values():
        job()
    assert footprints(mllm) == before
