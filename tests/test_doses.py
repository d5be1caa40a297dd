"""The dose that costs half: read off curves whose crossing is known."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import random_neurons, shared_mllm

from minerlib import plots
from minerlib.findings import doses

DOSES = {10: 1.0, 100: 0.75, 1000: 0.25, 10000: 0.0}  # what is left of the score


def table(left: float, benchmark: str = "b", n: int = 100, start: float = 1.0) -> pd.DataFrame:
    score = (np.arange(n) < round(left * start * n)).astype(float)
    return pd.DataFrame({"benchmark": benchmark, "row": range(n), "medium": np.arange(n) // 2,
                         "score": score, "chance": 0.0})  # fmt: skip


def test_half_is_read_off_between_two_doses():
    found = doses.half_doses(table(1.0), {n: table(left) for n, left in DOSES.items()})
    (line,) = found.to_dict("records")
    assert line["benchmark"] == "b" and line["neurons"] == pytest.approx(10**2.5)
    assert line["low"] < line["neurons"] < line["high"]
    assert line["low"] > 100 and line["high"] < 1000
    quarter = doses.half_doses(table(1.0), {n: table(x) for n, x in DOSES.items()}, lost=0.25)
    assert quarter["neurons"][0] == pytest.approx(100)


def test_a_curve_that_falls_back_counts_as_its_maximum():
    after = {10: table(0.4), 100: table(0.9), 1000: table(0.2)}
    assert doses.half_doses(table(1.0), after)["neurons"][0] == pytest.approx(10)


def test_what_no_dose_costs_is_infinite_and_benchmarks_are_averaged():
    hard = {n: table(1.0, "never") for n in DOSES}
    soft = {n: table(left, "soon") for n, left in DOSES.items()}
    before = pd.concat([table(1.0, "never"), table(1.0, "soon")])
    after = {n: pd.concat([hard[n], soft[n]]) for n in DOSES}
    found = doses.half_doses(before, after).set_index("benchmark")
    assert np.isinf(found.loc["never"]).all()
    assert found.loc["soon", "neurons"] == pytest.approx(10**2.5)
    assert found.loc["average", "neurons"] == pytest.approx(10000)  # then half of both is gone


def test_shares_are_of_what_lies_above_chance():
    guess = {"chance": 0.25}
    before = table(1.0, start=0.75).assign(**guess)  # a half above chance
    after = {n: table(1.0, start=x).assign(**guess) for n, x in ((10, 0.75), (100, 0.25))}
    assert doses.half_doses(before, after)["neurons"][0] == pytest.approx(10**1.5)


def test_nothing_above_chance_has_no_half_dose():
    before = table(0.25).assign(chance=0.25)
    after = {n: table(x).assign(chance=0.25) for n, x in DOSES.items()}
    (line,) = doses.half_doses(before, after).to_dict("records")
    assert np.isnan(line["neurons"])


def test_no_neuron_is_no_dose():
    with pytest.raises(ValueError, match=r"doses \[0, 4\]: a dose is of one neuron or more"):
        doses.half_doses(pd.DataFrame(), {4: pd.DataFrame(), 0: pd.DataFrame()})


def test_the_order_of_rows_does_not_count():
    after = {n: table(x).sample(frac=1, random_state=n) for n, x in DOSES.items()}
    ordered = doses.half_doses(table(1.0), {n: table(x) for n, x in DOSES.items()})
    pd.testing.assert_frame_equal(doses.half_doses(table(1.0), after), ordered)


def test_heads_and_mlps(mllm):
    neuron, head = doses.weights_of(mllm)
    layer = mllm.layers[0]
    mlp, attention = mllm.family.mlp(layer), layer.self_attn
    own = sum(p.weight.numel() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert neuron * mllm.n_neurons == own
    both = attention.q_proj.weight.numel() + attention.o_proj.weight.numel()
    assert head * mllm.text_config.num_attention_heads == both
    draws = doses.random_heads(mllm, 3, 4, seed=1)
    assert len({of.tobytes() for of in draws}) == 4
    assert all(of.shape == doses.heads_of(mllm) and of.sum() == 3 for of in draws)
    with pytest.raises(ValueError, match="99 attention heads are more than the"):
        doses.random_heads(mllm, 99, 1)
    again = doses.random_heads(mllm, 3, 4, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(draws, again, strict=True))
    whole = doses.as_mlp(random_neurons(shared_mllm("tiny-qwen2-vl")), 1)
    assert whole.values[0, 1].all() and whole.sum() == whole.sizes["neuron"]


def test_a_curve_for_every_group():
    names = [f"benchmark {i}" for i in range(7)]
    table = pd.DataFrame({"dose": [0.1, 0.2] * 7, "of": np.repeat(names, 2), "mean": 0.5})
    fig, ax = plt.subplots()
    plots.dose(table, ax, x="dose", group="of", colours=dict.fromkeys(names, "#222222"))
    assert [line.get_label() for line in ax.lines] == names
    plt.close(fig)
