"""Times beside a floor, and the arithmetic of larger models."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from conftest import Rows, footprints, samples_for
from families import Rows as Asked

from minerlib.findings import costs


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


def test_two_operations_a_weight_and_token():
    assert costs.hours(3600, 1000, 5e9, 10.0) == pytest.approx(1.0)


def test_tokens_of_a_prompt(mllm):
    samples = samples_for(mllm)
    alone = [mllm.encode([s])["input_ids"].shape[1] for s in samples]
    assert costs.prompt_tokens(mllm, Rows(samples), 4) == pytest.approx(np.mean(alone))


def test_every_step_runs_and_leaves_no_trace(mllm):
    rows = [Asked(samples_for(mllm)[:2])]
    before = footprints(mllm)
    jobs = costs.steps(mllm, rows, 2, 1)
    assert next(iter(jobs)) == "forward pass" and len(jobs) == 7
    for job in jobs.values():
        job()
    assert footprints(mllm) == before
