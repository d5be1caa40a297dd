"""What every notebook opens with: bad parameters are named, rows are disjoint, work is kept."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, random_mllm

import minerlib as ml
from minerlib import workbook
from minerlib.selection import PAPER_WEIGHTS
from minerlib.tasks import REGISTRY


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limit": 0}, "limit=0: a whole number of at least 1"),
        ({"limit": True}, "limit=True: a whole number"),
        ({"eval_limit": 9.5}, "eval_limit=9.5"),
        ({"batch_size": "8"}, "batch_size='8'"),
        ({"seed": -1}, "seed=-1"),
        ({"frames": 0}, "frames=0"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"ratio": 2}, r"ratio=2: a share of all neurons, in \(0, 1\]"),
        ({"ratio": "2 %"}, "ratio='2 %'"),
        ({"strategy": "LA"}, "strategy='LA': use one of adaptive, LA_MU"),
        ({"split": "image"}, "split='image': use one of prompt"),
        ({"dtype": "int8"}, "dtype='int8': use one of auto"),
        ({"benchmarks": "mmlu, vqa"}, "benchmarks='vqa': use one of text_vqa"),
        ({"weights": "best"}, "weights='best': use five numbers or one of default"),
        ({"weights": [1, 0]}, r"weights=\[1, 0\]: give one for each of prob"),
        ({"weights": 3}, "weights=3: use five numbers"),
    ],
)
def test_a_bad_parameter_is_named_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message):
        ml.Workbook(model="no/such/model", **given)


@pytest.mark.parametrize(
    "given",
    ["default", PAPER_WEIGHTS, [0, 0.25, 0.25, 0.5, 0], "[0, 0.25, 0.25, 0.5, 0]",
     "{prob: 0, mean: 0.25, max: 0.25, attn_k: 0.5, attn_q: 0}"],
)  # fmt: skip
def test_weights_by_name_number_and_text(given):
    assert ml.Workbook(weights=given).weights == PAPER_WEIGHTS


def make(tmp_path, name: str = "tiny-qwen2-vl", **given) -> ml.Workbook:
    """A workbook of few rows over a model with random weights."""
    wb = ml.Workbook(model=f"data/models/{name}", run_dir=str(tmp_path), **given)
    wb.__dict__["mllm"] = random_mllm(name)
    return wb


def test_rows_for_mining_and_evaluation_are_disjoint(tmp_path):
    wb = make(tmp_path, limit=400, eval_limit=80)
    assert wb.names == ["text_vqa", "coco_caption", "mmlu", "msvd_qa"]
    for name in wb.names:
        mined, evaluated = set(wb.mining[name].numbers), set(wb.evaluation[name].numbers)
        assert (len(mined), len(evaluated)) == (400, 80) and not mined & evaluated
    with pytest.raises(ValueError, match="limit=450 and eval_limit=40: text_vqa has 480 rows"):
        _ = make(tmp_path, limit=450, eval_limit=40).evaluation
    assert len(make(tmp_path, limit=450, eval_limit=40).mining["mmlu"]) == 450
    with pytest.raises(ValueError, match="limit=500: text_vqa has 480 rows"):
        _ = make(tmp_path, limit=500).mining


def test_a_stage_says_which_notebook_comes_before_it(tmp_path):
    wb = make(tmp_path, benchmarks="mmlu", limit=2)
    with pytest.raises(FileNotFoundError, match="03_score_aggregation"):
        wb.total()
    with pytest.raises(FileNotFoundError, match="02_importance_scores"):
        wb.aggregate()
    wb.mine()
    total = wb.aggregate()
    np.testing.assert_array_equal(wb.total(), total)
    with pytest.raises(ValueError, match=r"ratio=0.0005: a budget of 2 of 4096 .* raise ratio"):
        make(tmp_path, benchmarks="mmlu", limit=2, ratio=0.0005, split="prompt",
             strategy="LU_MA").select(total)  # fmt: skip


def test_answers_are_computed_once_for_each_set_of_silenced_neurons(tmp_path, monkeypatch):
    wb, calls = make(tmp_path, benchmarks="mmlu", limit=2, eval_limit=4), []
    evaluate = workbook.evaluate

    def counted(*args, **kwargs):
        calls.append(1)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(workbook, "evaluate", counted)
    before = wb.answers()
    assert len(before) == 4 and wb.answers().equals(before) and len(calls) == 1
    scores = wb.mine()["mmlu"]
    neurons = ml.select(scores, ratio=0.5)
    after = wb.answers(neurons)
    # The same neurons under other names of modalities are the same condition.
    assert wb.answers(neurons.assign_coords(modality=["a", "b"])).equals(after)
    assert len(calls) == 2
    wb.answers(neurons, mode="mean", constants=scores)
    wb.answers(neurons, modalities=["text"])
    assert len(calls) == 4


def test_pictures_of_other_bounds_are_another_model(tmp_path):
    path = ROOT / "data/models/tiny-qwen2-vl"
    plain = ml.load(path).fingerprint
    bounded = ml.load(path, processor_kwargs={"max_pixels": 1024}).fingerprint
    assert bounded == plain | {"max_pixels": "1024"}


def test_sanity_says_what_is_far_from_the_published_figure(tmp_path, monkeypatch):
    wb = make(tmp_path, "tiny-qwen2-audio", benchmarks="mmlu, libri, vocal_sound")
    rows = [
        ("mmlu", "A", ("A",), 1.0),
        ("libri", "cat dog cow", ("CAT DOG BIRD",), 2 / 3),
        ("vocal_sound", "Cough", ("Cough",), 1.0),
    ]
    columns = ["benchmark", "answer", "references", "score"]
    table = pd.DataFrame([r for r in rows for _ in range(20)], columns=columns)
    monkeypatch.setattr(wb, "answers", lambda: table)
    published = {"libri": 0.96, "vocal_sound": 0.96}
    monkeypatch.setitem(workbook.PUBLISHED, "tiny-qwen2-audio", published)
    found = wb.sanity().set_index("benchmark")
    assert found["verdict"].to_dict() == {
        "mmlu": "none published", "libri": "FAR OFF", "vocal_sound": "near",
    }  # fmt: skip
    assert found.loc["libri", "corpus"] == pytest.approx(2 / 3)


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
