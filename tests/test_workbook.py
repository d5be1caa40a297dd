"""What every notebook opens with: bad parameters are named, rows are disjoint, work is kept."""

from __future__ import annotations

import json
import runpy
import shutil
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import ROOT, random_neurons, shared_mllm
from PIL import Image

import minerlib as ml
from minerlib import atlas, critical, workbook
from minerlib.findings import silencing
from minerlib.model import RowError
from minerlib.parameters import NEUTRAL, at_least
from minerlib.scoring import METRICS
from minerlib.selection import PAPER_WEIGHTS, STRATEGIES, first
from minerlib.tasks import REGISTRY

# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limit": 0}, "limit=0: a whole number of at least 1"),
        ({"limit": True}, "limit=True: a whole number"),
        ({"eval_limit": 9.5}, "eval_limit=9.5: a whole number"),
        ({"batch_size": "eight"}, "batch_size='eight': a whole number"),
        ({"seed": -1}, "seed=-1: a whole number of at least 0"),
        ({"frames": 0}, "frames=0: a whole number"),
        ({"max_pixels": 0}, "max_pixels=0: a whole number of at least 1, or None"),
        ({"ratio": 2}, r"ratio=2: a share of all neurons, in \(0, 1\]"),
        ({"ratio": float("nan")}, "ratio=nan: a share of all neurons"),
        ({"ratio": "2 %"}, "ratio='2 %': a share of all neurons"),
        ({"strategy": "LA"}, "strategy='LA': no 'LA'; use one of adaptive, LA_MU"),
        ({"split": "image"}, "split='image': no 'image'; use one of prompt"),
        ({"dtype": "int8"}, "dtype='int8': no 'int8'; use one of auto"),
        ({"on_error": "ignore"}, "on_error='ignore': use raise or skip"),
        ({"benchmarks": "mmlu, vqa"}, "no 'vqa'; use one of text_vqa"),
        ({"benchmarks": 3}, "benchmarks=3: names, as a list or with commas"),
        ({"model": 3}, "model=3: give text"),
        ({"run_dir": 3}, "run_dir=3: give text, or None"),
        ({"weights": "best"}, "weights='best': give a number for each of prob, .* one of default"),
        ({"weights": "burst"}, "weights='burst': give a number for each of prob"),
        ({"weights": "atn_k"}, "weights='atn_k': did you mean 'attn_k'"),
        ({"weights": "{1"}, "weights='{1': give a number for each of prob"),
        ({"weights": [1, 0]}, r"weights=\[1, 0\]: give a number for each of prob"),
        ({"weights": {"mode": 1}}, "no 'mode'; use one of prob"),
        ({"weights": {"mean": "much"}}, "weights='much': give numbers"),
        ({"weights": 3}, "weights=3: give a number for each of prob"),
        ({"limits": 9}, "unknown parameter 'limits'; did you mean 'limit'"),
    ],
)
def test_a_bad_parameter_is_named_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message) as raised:
        ml.Workbook(**{"model": "no/such/model"} | given)
    assert "\n" not in str(raised.value) and "pydantic" not in str(raised.value)


def test_all_bad_parameters_are_named_at_once():
    with pytest.raises(ValueError, match=r"limit=0: .*\nratio=7: "):
        ml.Workbook(limit=0, ratio=7)


@pytest.mark.parametrize(
    "given",
    ["default", PAPER_WEIGHTS, [0, 0.25, 0.25, 0.5, 0], "[0, 0.25, 0.25, 0.5, 0]",
     "{prob: 0, mean: 0.25, max: 0.25, attn_k: 0.5, attn_q: 0}"],
)  # fmt: skip
def test_weights_by_name_number_and_text(given):
    assert ml.Workbook(weights=given).weights == PAPER_WEIGHTS


def test_text_of_a_command_line_is_read():
    wb = ml.Workbook(
        limit="1_000", ratio="0.05", max_pixels="None", device="", benchmarks="mmlu, libri"
    )
    assert (wb.limit, wb.ratio, wb.max_pixels, wb.device) == (1000, 0.05, None, None)
    assert ml.Workbook(benchmarks="mmlu libri").benchmarks == ("mmlu", "libri")
    assert wb.benchmarks == ("mmlu", "libri") and ml.Workbook(benchmarks="none").benchmarks is None


# --- bound from a notebook -----------------------------------------------------------------------

CELL = """
model = "data/models/tiny-qwen2-vl"
limit = 96  # rows
draws = 10
exact = False
pick = None
"""


def notebook(*cells: str, **now) -> dict:
    """A notebook's globals after these cells; IPython keeps them in `In`."""
    space: dict = {}
    for cell in cells:
        exec(cell, space)
    return space | {"In": ["", *cells]} | now


def test_a_notebook_binds_what_its_parameters_cell_declares():
    space = notebook("seed = 9", CELL, "ratio = 0.5", "# Parameters\nlimit = 8\ndraws = 20\n")
    wb = ml.Workbook.bind(space)
    assert (wb.limit, wb.seed, wb.ratio) == (8, 0, 0.02)
    assert wb.own == {"draws": 20, "exact": False, "pick": None}
    assert wb.parameters == {"limit": 8, **wb.own}


def test_bound_values_are_written_back_as_what_they_mean():
    space = notebook(CELL, limit="1_000", draws="25", exact="true", pick="None")
    wb = ml.Workbook.bind(space)
    assert (space["limit"], space["draws"], space["exact"], space["pick"]) == (1000, 25, True, None)
    assert wb.own["draws"] == 25


@pytest.mark.fault("unknown parameter in a notebook")
@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("limits = 8", "unknown parameter 'limits'; did you mean 'limit'?"),
        ("draw = 8", "unknown parameter 'draw'; did you mean 'draws'?"),
        ("ratio = 0.1", "unknown parameter 'ratio'; use one of draws, exact, limit, model, pick"),
    ],
)
def test_an_injected_parameter_that_is_not_declared_is_refused(injected, message):
    with pytest.raises(ValueError) as raised:
        ml.Workbook.bind(notebook(CELL, f"# Parameters\n{injected}\n"))
    assert message in str(raised.value)


@pytest.mark.fault("a parameter of another type")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draws": "many"}, "draws='many': give a int, such as 10"),
        ({"draws": 2.5}, "draws=2.5: give a int, such as 10"),
        ({"exact": "maybe"}, "exact='maybe': give a bool, such as False"),
        ({"limit": "few"}, "limit='few': a whole number of at least 1"),
    ],
)
def test_a_notebooks_own_parameters_are_of_their_defaults_type(given, message):
    with pytest.raises(ValueError) as raised:
        ml.Workbook.bind(notebook(CELL, **given))
    assert message in str(raised.value)


def test_cells_that_are_not_python_and_scripts_without_cells():
    assert ml.Workbook.bind(notebook(CELL) | {"In": ["!ls", "%time x", CELL]}).own["draws"] == 10
    assert ml.Workbook.bind({"limit": 8, "else": 1}).parameters == {"limit": 8}
    with pytest.raises(ValueError, match="draws=3: give at least 10"):
        at_least(draws=(3, 10), shuffled=(5, 5))


# --- rows ----------------------------------------------------------------------------------------


def make(tmp_path, name: str = "tiny-qwen2-vl", **given) -> ml.Workbook:
    """A workbook of few rows over a model with random weights."""
    wb = ml.Workbook(model=f"data/models/{name}", run_dir=str(tmp_path), **given)
    wb.__dict__["mllm"] = shared_mllm(name)
    return wb


def test_references_are_read_as_the_card_says_that_a_model_writes(tmp_path, monkeypatch):
    """libri stands in capitals; its rows are others then, and so is what is kept of them."""
    wb = make(tmp_path, "tiny-qwen2-audio", benchmarks="libri, vocal_sound")
    card = wb.card.model_copy(update={"lower_case": ("libri",)})
    monkeypatch.setattr(ml.Workbook, "card", card)
    small = make(tmp_path, "tiny-qwen2-audio", benchmarks="libri, vocal_sound")
    (told,), (read,) = wb.rows["libri"].references[0], small.rows["libri"].references[0]
    assert told.isupper() and read == told.lower()
    prints = [{n: b.fingerprint for n, b in w.rows.items()} for w in (wb, small)]
    assert prints[0]["libri"] != prints[1]["libri"]
    assert prints[0]["vocal_sound"] == prints[1]["vocal_sound"]


@pytest.mark.fault("mining and evaluation share media")
def test_rows_for_mining_and_evaluation_share_no_medium(tmp_path):
    wb = make(tmp_path, limit=200, eval_limit=80)
    assert wb.names == ["text_vqa", "coco_caption", "mmlu", "msvd_qa"]
    for name in wb.names:
        mined, evaluated = wb.mining[name], wb.evaluation[name]
        assert (len(mined), len(evaluated)) == (200, 80)
        assert not set(mined.numbers) & set(evaluated.numbers)
        assert not set(mined.media) & set(evaluated.media)
    with pytest.raises(ValueError, match="limit=450"):
        _ = make(tmp_path, limit=450, eval_limit=40).evaluation
    assert len(make(tmp_path, limit=450, eval_limit=40).mining["mmlu"]) == 450
    with pytest.raises(ValueError, match="limit=500: text_vqa has 480 rows; lower it"):
        _ = make(tmp_path, limit=500).mining


@pytest.mark.fault("a folder's rows are not shuffled")
@pytest.mark.parametrize("source", ["auto", "data/benchmarks"])
def test_every_source_is_shuffled_with_the_seed(tmp_path, source):
    first, same, other = (
        make(tmp_path, benchmarks="mmlu", source=source, seed=seed).mining["mmlu"].numbers.tolist()
        for seed in (0, 0, 1)
    )
    assert first == same != other and first != sorted(first)


# --- artefacts -----------------------------------------------------------------------------------


def test_a_stage_says_which_notebook_comes_before_it(tmp_path):
    wb = make(tmp_path, benchmarks="mmlu", limit=2)
    with pytest.raises(FileNotFoundError, match="02_importance_scores"):
        wb.total()
    with pytest.raises(FileNotFoundError, match="02_importance_scores"):
        wb.scores()
    scores = wb.mine()
    total = wb.total()
    np.testing.assert_allclose(total, ml.aggregate(scores.values()), atol=1 / 65534)
    with pytest.raises(ValueError, match=r"ratio=0.0005: its budget of 2 neurons .* raise ratio"):
        make(tmp_path, benchmarks="mmlu", limit=2, ratio=0.0005, split="prompt",
             strategy="LU_MA").select(total)  # fmt: skip


def test_a_modality_alone_gets_a_whole_budget(tmp_path):
    wb = make(tmp_path, benchmarks="mmlu", limit=2, ratio=0.1)
    wb.mine()
    total = wb.total()
    alone = wb.alone("special")
    assert alone.modality.values.tolist() == ["special"] and alone.sum() == int(0.1 * 8 * 512)
    value = ml.selection.weighted(total.sel(modality=["special"]), wb.weights)
    assert value[alone.values].min() >= value[~alone.values].max()
    draws = wb.draws(alone, 3, by_layer=True)
    assert [d.attrs["seed"] for d in draws] == [0, 1, 2]
    assert all((d.sum("neuron").values == alone.sum("neuron").values).all() for d in draws)
    assert not np.array_equal(draws[0], draws[1])


def test_what_is_known_of_a_neuron(tmp_path):
    """What it writes; its sets and ranks once the scores are there."""
    wb = make(tmp_path, benchmarks="mmlu", limit=2, ratio=0.01)
    (known,) = wb.about([(1, 7)])
    assert known.keys() == {"writes"}
    wb.mine()
    value = ml.selection.weighted(wb.total().sel(modality=["text"]), wb.weights)[0]
    order = np.argsort(-value, axis=None, kind="stable")
    first, last = (tuple(map(int, divmod(order[i], 512))) for i in (0, -1))
    one, other = wb.about([first, last])
    assert one["ranks"]["the paper's score, text"] == 1 and "text" in one["sets"]
    assert other["ranks"]["the paper's score, text"] == 8 * 512 and "text" not in other["sets"]
    costs = wb.costs([first, last])
    few = wb.evaluation["mmlu"][:16]
    whole = ml.evaluate(wb.mllm, few, measure="logprob")["logprob"]
    with ml.deactivate(wb.mllm, critical.as_neurons(wb.total()[0, 0], [order[0]])):
        without = ml.evaluate(wb.mllm, few, measure="logprob")["logprob"]
    assert costs["mean"][0] == pytest.approx((whole - without).mean(), abs=1e-5)
    assert one["effect"]["mean"] == pytest.approx(costs["mean"][0], abs=1e-4)
    (known,) = wb.about([first], ranks={atlas.named(first): {"LAPE, text": 3}})
    assert known["ranks"]["LAPE, text"] == 3
    page = wb.look(*first, top=1).page
    assert "the paper's score, text" in page and '"effect": {"mean"' in page
    (of_one_row,) = wb.about([first], rows=1)  # no interval, which JSON has no number for
    assert of_one_row["effect"]["low"] is None and of_one_row["effect"]["mean"] is not None
    assert '"low": null' in wb.overview([first, last], top=1, rows=1).page
    places = {atlas.named(first): {"miner, text": 1, "random, text": 9}}  # on fewer rows; of none
    assert not {"miner, text", "random, text"} & wb.about([first], ranks=places)[0]["ranks"].keys()


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The benchmarks that are really answered."""
    calls, evaluated = [], ml.Workbook._evaluated

    def count(self, bench, *how):
        calls.append(bench.name)
        return evaluated(self, bench, *how)

    monkeypatch.setattr(ml.Workbook, "_evaluated", count)
    return calls


def test_answers_are_computed_once_for_each_set_of_silenced_neurons(tmp_path, counted):
    wb = make(tmp_path, benchmarks="mmlu", limit=2, eval_limit=4)
    before = wb.answers()
    assert len(before) == 4 and wb.answers().equals(before) and len(counted) == 1
    scores = wb.mine()["mmlu"]
    neurons = ml.select(scores, ratio=0.5)
    after = wb.answers(neurons)
    # The same neurons under other names of modalities are the same condition.
    assert wb.answers(neurons.assign_coords(modality=["a", "b"])).equals(after)
    assert len(counted) == 2
    wb.answers(neurons, mode="mean", constants=scores)
    wb.answers(neurons.sel(modality=["text"]))
    assert len(counted) == 4


@pytest.mark.fault("answers of a stopped run are lost")
def test_answers_are_kept_benchmark_by_benchmark(tmp_path, counted, monkeypatch):
    few = {"benchmarks": "mmlu, text_vqa", "limit": 2, "eval_limit": 2, "max_new_tokens": 1}
    wb = make(tmp_path, **few)
    whole, stopped = ml.Workbook._evaluated, []

    def stop(self, bench, *how):
        if bench.name == "text_vqa" and not stopped:
            raise KeyboardInterrupt
        return whole(self, bench, *how)

    monkeypatch.setattr(ml.Workbook, "_evaluated", stop)
    with pytest.raises(KeyboardInterrupt):
        wb.answers()
    stopped.append(True)
    assert len(make(tmp_path, **few).answers()) == 4 and counted == ["mmlu", "text_vqa"]
    # One benchmark alone finds what it has.
    make(tmp_path, **few | {"benchmarks": "text_vqa"}).answers()
    assert counted == ["mmlu", "text_vqa"]


# --- log-probabilities under many sets of neurons ------------------------------------------------


FEW = {"benchmarks": "mmlu, text_vqa", "limit": 2, "eval_limit": 3}


def some_sets(mllm, n: int = 3) -> list:
    return [random_neurons(mllm, 0.3, seed=seed) for seed in range(n)]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many rows each call of `MLLM.logprob` is asked about; the call `stop` is interrupted."""

    class Calls(list):
        stop = -1

    calls, own = Calls(), ml.MLLM.logprob

    def count(self, batch, answers):
        if len(calls) == calls.stop:
            raise KeyboardInterrupt
        calls.append(len(answers))
        return own(self, batch, answers)

    monkeypatch.setattr(ml.MLLM, "logprob", count)
    return calls


def test_logprobs_are_those_of_evaluate_with_each_set_silenced(tmp_path, passes):
    wb = make(tmp_path, **FEW)
    sets = some_sets(wb.mllm)
    table = wb.logprobs(sets, 2)
    assert list(table) == ["benchmark", "row", "medium", "logprob", "neurons"] and len(table) == 12
    for i, neurons in enumerate(sets):
        with ml.deactivate(wb.mllm, neurons):
            parts = [
                ml.evaluate(wb.mllm, bench[:2], measure="logprob only")
                for bench in wb.evaluation.values()
            ]
        expected = pd.concat(parts, ignore_index=True)
        found = table[table["neurons"] == i].reset_index(drop=True)
        columns = ["benchmark", "row", "medium"]
        assert found[columns].equals(expected[columns])
        np.testing.assert_allclose(found["logprob"], expected["logprob"], rtol=1e-4)
    apart = table.pivot(index=["benchmark", "row"], columns="neurons", values="logprob")
    assert (apart.nunique(axis=1) == 3).all()  # the sets are really silenced, one by one
    nats = silencing.nats(table)
    assert nats.shape == (3,) and nats[1] == pytest.approx(
        apart[1].groupby("benchmark").mean().mean()
    )


def test_logprobs_are_computed_once_for_these_sets_and_rows(tmp_path, passes):
    wb = make(tmp_path, **FEW)
    sets = some_sets(wb.mllm)
    table = wb.logprobs(sets, 2)
    assert passes == [2] * 6  # three sets of two benchmarks
    assert wb.logprobs(sets, 2).equals(table) and len(passes) == 6
    renamed = [neurons.assign_coords(modality=["a", "b"]) for neurons in sets]
    assert make(tmp_path, **FEW).logprobs(renamed, 2).equals(table) and len(passes) == 6
    turned = wb.logprobs(sets[::-1], 2)
    first, last = (t[t["neurons"] == i]["logprob"].tolist() for t, i in ((table, 0), (turned, 2)))
    assert first == last and len(passes) == 6  # put together of what is there
    assert len(wb.logprobs(sets, 3)) == 18 and passes[6:] == [3] * 6


@pytest.mark.fault("log-probabilities of a stopped run are lost")
@pytest.mark.parametrize("done", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2))])
def test_logprobs_of_a_stopped_run_are_kept(tmp_path, passes, done):
    """The sets that were finished are not computed again, and the numbers are the same."""
    wb = make(tmp_path / "stopped", **FEW)
    sets = some_sets(wb.mllm)
    expected = make(tmp_path / "whole", **FEW).logprobs(sets, 2)
    before = len(passes)
    passes.stop = before + 2 * done + 1  # at the second benchmark of the next set
    with pytest.raises(KeyboardInterrupt):
        wb.logprobs(sets, 2)
    passes.stop, before = -1, len(passes)
    again = make(tmp_path / "stopped", **FEW)
    found = again.logprobs(sets, 2)
    assert len(passes) - before == 2 * (3 - done)
    pd.testing.assert_frame_equal(found, expected)
    turned = again.logprobs(sets[::-1], 2)  # of the same parts
    assert len(passes) - before == 2 * (3 - done)
    assert turned["logprob"].tolist() != found["logprob"].tolist()


def test_logprobs_on_other_rows_and_of_the_model_as_it_is(tmp_path):
    wb = make(tmp_path, **FEW)
    rows = {"mmlu": wb.mining["mmlu"]}
    table = wb.logprobs([None, *some_sets(wb.mllm, 1)], rows)
    plain = ml.evaluate(wb.mllm, rows["mmlu"], measure="logprob only")
    own = table[table["neurons"] == 0]["logprob"]
    np.testing.assert_allclose(own, plain["logprob"], rtol=1e-4)
    assert table["row"].tolist() == [*plain["row"]] * 2 and table["logprob"].nunique() == 4


def test_what_costs_half_of_the_score(tmp_path, monkeypatch):
    """Of what lies above chance, on at most 24 mined rows."""
    wb = make(tmp_path, benchmarks="mmlu", limit=30)
    neurons, asked, left = some_sets(wb.mllm, 1)[0], [], [0.75]

    def answers(self, neurons=None, rows=None):
        asked.append(len(rows["mmlu"]))
        score = 0.75 if neurons is None else left[-1]
        return pd.DataFrame({"benchmark": "mmlu", "score": [score] * 4})

    monkeypatch.setattr(ml.Workbook, "answers", answers)
    for score, half in [(0.75, False), (0.51, False), (0.5, True), (0.0, True)]:
        left.append(score)
        assert wb.costs_half(neurons) == half
    assert set(asked) == {24}


def some_scores(layers, neurons):
    scores = np.random.default_rng(0).random((5, 1, layers, neurons))
    axes = {"metric": [*METRICS][:5], "modality": ["text"], "layer": range(layers)}
    return xr.DataArray(scores, axes, ("metric", "modality", "layer", "neuron"))


def test_the_half_dose(tmp_path, monkeypatch):
    """The least of 0.02 % times powers of the fourth root of two that costs half."""
    wb = make(tmp_path, benchmarks="mmlu", limit=30)
    total = some_scores(30, 1000)
    monkeypatch.setattr(ml.Workbook, "total", lambda self: total)
    for enough in (200, 7):
        monkeypatch.setattr(ml.Workbook, "costs_half", lambda self, of, n=enough: of.sum() >= n)
        series = [round(6 * 2 ** (i / 4)) for i in range(40)]
        assert wb.half_dose() == next(n for n in series if n >= enough)
    monkeypatch.setattr(ml.Workbook, "costs_half", lambda self, of: False)
    assert wb.half_dose() == int(wb.select().any("modality").sum())


def test_the_dose_of_a_crossing_is_where_the_mean_of_all_is_half(tmp_path, monkeypatch):
    """Over all sets and benchmarks: a set that costs all does not hide what others leave."""
    wb = make(tmp_path, benchmarks="mmlu, text_vqa", limit=30)
    total = xr.DataArray(np.zeros((1, 1, 30, 1000)), dims=("metric", "modality", "layer", "neuron"))
    monkeypatch.setattr(ml.Workbook, "total", lambda self: total)

    def answers(self, n=None, rows=None):
        assert {len(bench) for bench in rows.values()} == {8}
        lost = 0 if n is None else min(n[1] / n[0], 1)  # linear, up to all
        scores = {"mmlu": 0.25 + 0.7 * (1 - lost), "text_vqa": 0.9 * (1 - lost)}
        return pd.DataFrame([{"benchmark": k, "score": v} for k, v in scores.items()])

    monkeypatch.setattr(ml.Workbook, "answers", answers)
    series = [round(6 * 2 ** (i / 4)) for i in range(40)]
    for one, two, at in [(200, 200, 100), (100, 400, 80), (100, 1e9, 100)]:
        dose = wb.crossing_dose(lambda n, one=one, two=two: {"a": (one, n), "b": (two, n)})
        assert dose == next(n for n in series if n >= at)


def test_where_nothing_can_be_lost_there_is_no_dose(tmp_path, monkeypatch, capsys):
    """A model at chance loses half of nothing with every set."""
    wb, total = make(tmp_path, benchmarks="mmlu", limit=30), some_scores(2, 64)
    monkeypatch.setattr(ml.Workbook, "total", lambda self: total)
    table = pd.DataFrame([{"benchmark": "mmlu", "score": 0.25}])
    monkeypatch.setattr(ml.Workbook, "answers", lambda self, neurons=None, rows=None: table)
    assert wb.crossing_dose(lambda n: {"a": n}) == int(wb.select().any("modality").sum())
    assert wb.half_dose() == int(wb.select().any("modality").sum())
    assert capsys.readouterr().out.count("no dose") == 2


def test_critical_neurons_are_few_that_cost_half(tmp_path, monkeypatch):
    wb = make(tmp_path, benchmarks="mmlu", limit=30)
    shape = wb.mllm.n_layers, wb.mllm.n_neurons
    slopes = xr.DataArray(np.arange(np.prod(shape), dtype=float).reshape(shape),
                          {"layer": range(shape[0])}, ("layer", "neuron"))  # fmt: skip
    monkeypatch.setattr(critical, "attribution", lambda *_, **how: slopes)

    def logprobs(self, sets, rows):
        assert len(rows["mmlu"]) == 16 and sets[0] is None
        cost = [0.0, 0.1, 0.4, 0.3, 0.2]
        return pd.DataFrame({"neurons": range(5), "benchmark": "mmlu", "logprob": -np.array(cost)})

    total = some_scores(*shape)
    monkeypatch.setattr(ml.Workbook, "total", lambda self: total)
    monkeypatch.setattr(ml.Workbook, "logprobs", logprobs)
    monkeypatch.setattr(ml.Workbook, "cached", lambda self, name, compute, **how: compute())
    enough = lambda self, neurons: neurons.values.sum() >= 2  # noqa: E731
    monkeypatch.setattr(ml.Workbook, "costs_half", enough)
    found, costs = wb.critical(4)
    taken = first(total, 2, **wb.how | {"strategy": "LA_MU"}).any("modality")
    # Of the four, the second and the third cost most: the strategy's second, the steepest other.
    worst = [np.flatnonzero(taken.values)[1], slopes.size - 1]
    assert np.flatnonzero(found.values).tolist() == worst
    assert costs.tolist() == [0.4, 0.3, 0.2, 0.1]
    monkeypatch.setattr(ml.Workbook, "costs_half", lambda self, neurons: False)
    assert not wb.critical(4)[0].any()


def test_how_and_where_are_part_of_a_key(tmp_path, counted):
    few = {"benchmarks": "text_vqa", "limit": 8, "eval_limit": 2, "max_new_tokens": 1}
    wb = make(tmp_path, **few)
    neurons = some_sets(wb.mllm, 1)[0]
    asked = [{}, {"where": ["text"]}, {"where": ["image"]}, {"mode": "gain", "constants": 2.0},
             {"mode": "gain", "constants": 0.5}, {"mode": "resample"},
             {"measure": "choice"}]  # fmt: skip
    tables = [wb.answers(neurons, **how) for how in asked]
    assert len(counted) == len(asked)
    again = [make(tmp_path, **few).answers(neurons, **how) for how in asked]
    assert len(counted) == len(asked)
    for one, two in zip(tables, again, strict=True):
        pd.testing.assert_frame_equal(one, two)
    assert "chance" in tables[-1] and "chance" not in tables[0]
    with pytest.raises(ValueError, match="takes its own constants"):
        wb.answers(neurons, mode="resample", constants=2.0)
    other = make(tmp_path, **few | {"limit": 7})  # other inputs
    other.answers(neurons, mode="resample")
    assert len(counted) == len(asked) + 1


def test_answers_under_any_condition(tmp_path, counted):
    wb = make(tmp_path, benchmarks="mmlu", limit=2, eval_limit=2, max_new_tokens=1)
    neurons = some_sets(wb.mllm, 1)[0]
    condition = partial(ml.deactivate, wb.mllm, neurons)
    found = wb.under(condition, of=(ml.evaluate, ml.deactivate), what="mine")
    pd.testing.assert_frame_equal(found, wb.answers(neurons))
    wb.under(condition, of=(ml.evaluate, ml.deactivate), what="mine")
    wb.under(condition, of=(ml.evaluate, ml.deactivate), what="another")
    assert len(counted) == 3


def test_each_set_of_neurons_in_one_artefact(tmp_path):
    wb = make(tmp_path, **FEW)
    sets = [None, *some_sets(wb.mllm, 2)]

    def count(neurons):
        n = 0 if neurons is None else int(neurons.any("modality").sum())
        return xr.DataArray([n, -n], {"x": ["a", "b"]}, ("x",)) * 1.5

    def name(neurons):
        return pd.DataFrame({"row": [0, 1], "none": neurons is None})

    found = wb.each("count", count, sets, of=make, extra=1)
    assert found.dims == ("neurons", "x") and found[0].values.tolist() == [0, 0]
    assert found[2, 1] == -1.5 * int(sets[2].any("modality").sum())
    assert wb.each("count", lambda neurons: 1 / 0, sets, of=make, extra=1).equals(found)
    with pytest.raises(ZeroDivisionError):
        wb.each("count", lambda neurons: 1 / 0, sets, of=make, extra=2)
    table = wb.each("name", name, sets[:2], of=make)
    assert (
        table["neurons"].tolist() == [0, 0, 1, 1]
        and table["none"].tolist() == [True] * 2 + [False] * 2
    )
    assert {p.parent for p in tmp_path.rglob("count-*.nc")} == {wb.folder, wb.folder / "parts"}
    with pytest.raises(ValueError, match="no sets of neurons"):
        wb.each("count", count, [], of=make)


def test_pictures_of_other_bounds_are_another_model():
    path = ROOT / "data/models/tiny-qwen2-vl"
    plain = ml.load(path).fingerprint
    assert ml.load(path, processor_kwargs={"max_pixels": 1024}).fingerprint != plain


# --- keys ----------------------------------------------------------------------------------------

DEFAULTS = {"benchmarks": "text_vqa, msvd_qa", "limit": 4, "eval_limit": 3}
CHANGED = {
    "model": "data/models/tiny-qwen2-audio",
    "benchmarks": "mmlu",
    "source": "other rows",
    "limit": 5,
    "eval_limit": 2,
    "ratio": 0.05,
    "strategy": "adaptive",
    "weights": "all",
    "split": "prompt",
    "seed": 1,
    "batch_size": 3,
    "max_new_tokens": 7,
    "min_pixels": 1568,
    "max_pixels": 3136,
    "frames": 4,
    "run_dir": "elsewhere",
    "device": "cpu",
    "dtype": "bfloat16",
    "on_error": "skip",
}
# Which fields change what is mined, and what is answered; a finding hangs on all but the neutral.
SCORED = {"model", "benchmarks", "source", "limit", "seed", "min_pixels", "max_pixels", "frames",
          "dtype", "on_error"}  # fmt: skip
ANSWERED = SCORED - {"limit"} | {"eval_limit", "max_new_tokens"}


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory) -> Path:
    """The shipped rows, but for the questions of text_vqa."""
    folder = tmp_path_factory.mktemp("rows") / "benchmarks"
    shutil.copytree(ROOT / "data/benchmarks", folder)
    (file,) = (folder / "text_vqa").glob("*.parquet")
    table = pd.read_parquet(file)
    table.assign(question="Say: " + table["question"]).to_parquet(file)
    return folder


def stems(wb: ml.Workbook) -> dict[str, str | list[str]]:
    """The file names, but for their folder, of a workbook's scores, answers and finding."""
    found: dict[str, list] = {"scores": [], "answers": []}

    class Recording(ml.Run):
        def cached(self, name, compute, *, of, **config):
            found[name.split("-")[0]].append(self.stem(name, of=of, **config))
            return pd.DataFrame()

    wb.__dict__["run"] = Recording(wb.folder, wb.mllm)
    wb.mine()
    wb.answers()
    return found | {"finding": wb.run.stem("finding", of=(), **wb.configuration)}


@pytest.fixture(scope="module")
def usual() -> dict:
    return stems(ml.Workbook(**DEFAULTS))


@pytest.mark.fault("keys that miss a parameter")
@pytest.mark.parametrize("field", ml.Workbook.model_fields)
def test_every_field_that_can_change_a_result_is_in_its_key(field, usual, other_rows):
    assert field in CHANGED, f"say here what a change of the new field {field} changes"
    change = {field: str(other_rows) if field == "source" else CHANGED[field]}
    if field == "model":
        change["benchmarks"] = "mmlu"
        usual = stems(ml.Workbook(**DEFAULTS | {"benchmarks": "mmlu"}))
    changed = stems(ml.Workbook(**DEFAULTS | change))
    assert (changed["scores"] != usual["scores"]) == (field in SCORED)
    assert (changed["answers"] != usual["answers"]) == (field in ANSWERED)
    assert (changed["finding"] != usual["finding"]) == (field not in NEUTRAL)


@pytest.mark.fault("keys that miss a plug-in's code")
def test_a_users_own_metric_and_strategy_are_in_keys(usual, monkeypatch):
    monkeypatch.setitem(METRICS, "least", lambda layer: layer.highest * 0)
    assert stems(ml.Workbook(**DEFAULTS))["scores"] != usual["scores"]
    monkeypatch.delitem(METRICS, "least")
    monkeypatch.setitem(STRATEGIES, "LA_MU", lambda value, budget, rng: value > 0)
    wb = ml.Workbook(**DEFAULTS)
    assert wb._plugged == [STRATEGIES["LA_MU"]]


@pytest.mark.fault("keys that miss a notebook's own parameter")
def test_a_notebooks_own_parameters_belong_to_its_finding(tmp_path):
    cell = f'{CELL}\nbenchmarks = "mmlu"\nrun_dir = {str(tmp_path)!r}'
    keys = [ml.Workbook.bind(notebook(cell, draws=draws)).configuration for draws in (10, 20)]
    assert keys[0] != keys[1] and "evaluation" not in keys[0]["rows"]


# --- findings and figures ------------------------------------------------------------------------


def saved(tmp_path, **given) -> ml.Workbook:
    wb = make(tmp_path, benchmarks="mmlu", limit=2, eval_limit=2, **given)
    claims = pd.DataFrame([{"finding": "I", "claim": "c", "measured": "1", "verdict": "holds"}])
    wb.save_finding("I", claims, doses=pd.DataFrame({"ratio": [0.1]}), baseline=np.float64(0.5))
    fig, ax = plt.subplots()
    ax.plot([0, 1])
    wb.save_figure(fig, "05-dose")
    plt.close(fig)
    return wb


@pytest.mark.fault("another configuration overwrites findings and figures")
def test_another_configuration_keeps_its_own_finding_and_figures(tmp_path, capsys):
    saved(tmp_path)
    saved(tmp_path)
    assert "finding I of tiny-qwen2-vl is kept" in capsys.readouterr().out
    saved(tmp_path, ratio=0.5)
    saved(tmp_path, seed=3)
    files = [f for f in tmp_path.glob("finding-I-*.json") if "manifest" not in f.name]
    found = [json.loads(file.read_text()) for file in files]
    assert sorted((f["parameters"]["ratio"], f["parameters"]["seed"]) for f in found) == [
        (0.02, 0), (0.02, 3), (0.5, 0),
    ]  # fmt: skip
    assert found[0]["claims"][0]["verdict"] == "holds" and found[0]["doses"] == [{"ratio": 0.1}]
    figures = list((tmp_path / "figures").iterdir())
    belongs = [json.loads(Image.open(file).info["Configuration"]) for file in figures]
    assert len(figures) == 3 and {b["parameters"]["ratio"] for b in belongs} == {0.02, 0.5}
    assert {b["model"] for b in belongs} == {"tiny-qwen2-vl"}


@pytest.mark.fault("a run changes the tracked figures")
def test_tracked_figures_change_only_where_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(workbook, "ROOT", tmp_path)
    monkeypatch.delenv("MINER_FIGURES", raising=False)
    for asked in (False, True):
        if asked:
            monkeypatch.setenv("MINER_FIGURES", "kept")
        wb = saved(tmp_path / "run", source=str(ROOT / "data/benchmarks"))
        assert (tmp_path / f"kept/05-dose-{wb.label}.png").exists() == asked


# --- what a notebook shows -----------------------------------------------------------------------


def test_a_table_is_shown_as_a_table_and_as_unwrapped_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    row = {"name": "x" * 60, "share": -0.001, "p": 0.0312, "n": 3, "same": True, "none": np.nan}
    workbook.show(pd.DataFrame([row] * 2), digits={"p": 3})
    text, html = shown[0]["text/plain"], shown[0]["text/html"]
    assert len(text.splitlines()) == 3 and "x" * 60 in text and "x" * 60 in html
    assert text.split()[-5:] == ["x" * 60, "0.00", "0.031", "3", "yes"]
    assert "-0" not in text and "nan" not in text.lower() and "<table" in html
    workbook.show(pd.Series([0.126, 2], index=["a", "b"], name="mean"))
    assert shown[1]["text/plain"].split() == ["mean", "a", "0.13", "b", "2.00"]


def test_sanity_says_what_is_far_from_the_published_figure(tmp_path, monkeypatch):
    wb = make(tmp_path, "tiny-qwen2-audio", benchmarks="mmlu, libri, vocal_sound")
    rows = [
        ("mmlu", "A", ("A",), 1.0),
        ("libri", "cat dog cow", ("CAT DOG BIRD",), 2 / 3),
        ("vocal_sound", "Cough", ("Cough",), 1.0),
    ]
    columns = ["benchmark", "answer", "references", "score"]
    table = pd.DataFrame([r for r in rows for _ in range(20)], columns=columns)
    table["row"] = range(len(table))
    monkeypatch.setattr(ml.Workbook, "answers", lambda self: table)
    published = {"libri": 0.96, "vocal_sound": 0.96}
    monkeypatch.setattr(workbook, "published", {"tiny-qwen2-audio": published}.get)
    found = wb.sanity().set_index("benchmark")
    assert found["verdict"].to_dict() == {
        "mmlu": "none published", "libri": "FAR OFF", "vocal_sound": "near",
    }  # fmt: skip
    assert found.loc["libri", "corpus"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("name", "error"), [("my_a,my_b", ValueError), ("os no_such", ValueError),
                                             ("my_importer", ModuleNotFoundError)])  # fmt: skip
def test_a_plugin_that_is_not_there_is_named(tmp_path, monkeypatch, name, error):
    (tmp_path / "my_importer.py").write_text("import no_such")  # which is the plug-in's own fault
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MINER_PLUGINS", name)
    sought = f"^MINER_PLUGINS: no module '{name.split()[-1]}' in .*separated by blanks$"
    with pytest.raises(error, match=sought if error is ValueError else "'no_such'"):
        ml.Workbook()


def test_plugins_add_benchmarks(tmp_path, monkeypatch):
    (tmp_path / "my_plugin.py").write_text(
        "from minerlib.tasks import REGISTRY, Repo, Spec\n"
        "REGISTRY['capitals'] = Spec(hub=(Repo('me/capitals', 'test'),), columns=('country',),\n"
        "    prompt='{country}?', references=lambda row: ('x',), modality='text',\n"
        "    metric='exact_match')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MINER_PLUGINS", "my_plugin")
    try:
        assert ml.Workbook(benchmarks="capitals").names == ["capitals"]
    finally:
        REGISTRY.pop("capitals", None)


@pytest.mark.fault("an installed package writes beside itself")
def test_relative_paths_start_here_where_there_is_no_checkout(tmp_path, monkeypatch):
    (tmp_path / "site/minerlib").mkdir(parents=True)
    installed = shutil.copy(ROOT / "minerlib/workbook.py", tmp_path / "site/minerlib")
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(installed)["ROOT"] == tmp_path
    assert workbook.ROOT == ROOT


@pytest.mark.fault("the rows' revision is not in the manifest")
def test_manifests_say_where_rows_came_from(tmp_path):
    saved(tmp_path)
    (manifest,) = (json.loads(f.read_text()) for f in tmp_path.glob("finding-*.manifest.json"))
    held = manifest["notices"]["mmlu"]
    assert held["split"] == "test" and held["notices"] == [] and "revision" in held


@pytest.mark.fault("a bad row that only some stages could skip")
def test_rows_that_fail_are_left_out_for_every_stage(tmp_path, monkeypatch):
    """The findings' measures, which take rows as they come, see only those that can be used."""
    wb = ml.Workbook(limit=4, eval_limit=4, benchmarks="text_vqa,mmlu", on_error="skip",
                     run_dir=str(tmp_path))  # fmt: skip
    plain = wb.model_copy(update={"on_error": "raise"})
    bad = plain.evaluation["text_vqa"][1].row
    own = type(wb.mllm).encode

    def fails(self, samples):
        samples = list(samples)
        if any(s.benchmark == "text_vqa" and s.row == bad for s in samples):
            raise RowError("text_vqa", bad, "image", "cannot be read")
        return own(self, samples)

    monkeypatch.setattr(type(wb.mllm), "encode", fails)
    assert [s.row for s in wb.evaluation["text_vqa"]] == [
        s.row for s in plain.evaluation["text_vqa"] if s.row != bad
    ]
    assert len(wb.evaluation["mmlu"]) == 4
    assert f"text_vqa row {bad}: image: cannot be read" in wb.run.notices["text_vqa"]["notices"]
