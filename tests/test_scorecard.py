"""The scorecard: findings found by themselves, in notebooks and in what runs left."""

from __future__ import annotations

import json
import os
import shutil

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from minerlib import scorecard
from minerlib.scorecard import Scorecard, mark
from minerlib.workbook import NotApplicable

CELL = 'model = "data/models/tiny-qwen2-vl"\nlimit = 96\nratio = 0.02\ndraws = 10'
FINDINGS = scorecard.findings  # before a fixture replaces it
USUAL = {"limit": 96, "ratio": 0.02, "draws": 10}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two finding notebooks, another one, and the folders of two shipped models."""
    for name, finding in {"05_one": "I", "06_two": "II", "00_start": None}.items():
        cell = nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})
        about = {"finding": finding, "claim": f"claim {finding}"} if finding else {"stage": True}
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"minerlib": about})
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        nbformat.write(notebook, tmp_path / f"notebooks/{name}.ipynb")
    for model in ("tiny-a", "tiny-b"):
        (tmp_path / "data/models" / model).mkdir(parents=True)
        (tmp_path / "data/models" / model / "model.yml").touch()
    (tmp_path / "data/models/parts").mkdir()
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(scorecard, "ROOT", tmp_path)
    found = scorecard.findings(tmp_path / "notebooks")
    monkeypatch.setattr(scorecard, "findings", lambda: found)
    return tmp_path


def leave(
    project, finding, model, verdict="holds", age=0, rival=False, name=None, effect=(), **parameters
):
    """What `save_finding` leaves in a run folder; name is that of its claim."""
    of, name = name, f"{finding}-{abs(hash((verdict, age, *parameters.items()))):x}"
    file = project / f"runs/{model}/finding-{name}.json"
    file.parent.mkdir(exist_ok=True)
    claims = [{"claim": f"81 neurons of {finding}", "measured": "0.9", "null": "1.0",
               "p": "0.010", "verdict": verdict, "name": of or finding}]  # fmt: skip
    claims[0] |= zip(scorecard.EFFECT, effect, strict=False)
    claims += [claims[0] | {"claim": "rival: another"}] if rival else []
    value = {"finding": finding, "model": model, "parameters": USUAL | parameters}
    file.write_text(json.dumps(value | {"claims": claims}))
    file.with_name(f"{file.stem}.manifest.json").write_text("{}")
    os.utime(file, (1e9 - age, 1e9 - age))


def test_findings_are_those_of_notebooks_that_say_so(project):
    assert {n: f.notebook for n, f in scorecard.findings().items()} == {
        "I": "05_one",
        "II": "06_two",
    }
    assert scorecard.findings()["I"].claim == "claim I"
    assert scorecard.findings()["I"].parameters == USUAL


def test_a_finding_is_linked_to_the_section_that_judges_it(project):
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n## Before"),
        nbformat.v4.new_markdown_cell("text\n## The claims, told\nmore\n"),
        nbformat.v4.new_code_cell("# not a heading\nwb.save_finding('I', claims)"),
        nbformat.v4.new_markdown_cell("## After"),
    ]
    path = project / "notebooks/05_one.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells += cells
    nbformat.write(notebook, path)
    found = FINDINGS(project / "notebooks")
    assert found["I"].link == "[05_one](05_one.ipynb#The-claims,-told)"
    leave(project, "I", "tiny-a")
    leave(project, "of a plug-in", "tiny-a")
    card = Scorecard()
    assert "a notebook not here" in card.title("of a plug-in")


def test_every_finding_of_the_workbook_has_such_a_section():
    assert all(finding.heading for finding in scorecard.findings().values())


def test_what_is_missing_is_named_with_the_notebook_that_makes_it(project):
    with pytest.raises(NotApplicable, match="no finding of shipped models in runs; run 05_one"):
        Scorecard()
    leave(project, "I", "tiny-a")
    leave(project, "II", "other")  # no shipped model
    card = Scorecard()
    assert card.columns == ["tiny-a"] and card.table["of"].tolist() == ["tiny-a"]
    assert card.missing == [
        "tiny-b: no finding yet; run with model=data/models/tiny-b",
        "II of tiny-a: not measured, or not applicable; run 06_two",
    ]
    assert len(Scorecard(models="tiny-a, tiny-b").missing) == 3
    assert set(Scorecard(models="all").columns) == {"tiny-a", "other"}
    assert Scorecard(models="tiny-b, other").columns == ["other", "tiny-b"]


@pytest.mark.fault("published results beside those asked for anew")
def test_a_fresh_run_sees_nothing_that_is_published(project, monkeypatch):
    leave(project, "I", "tiny-a")
    shutil.move(project / "runs/tiny-a", project / "data/results/tiny-a")
    leave(project, "II", "tiny-a")
    assert set(Scorecard().table["finding"]) == {"I", "II"}
    monkeypatch.setenv("MINER_FRESH", "1")
    assert set(Scorecard().table["finding"]) == {"II"}


def test_what_learning_adds_is_a_graft_less_its_twin(project, monkeypatch):
    monkeypatch.setattr(scorecard, "TWINS", {"tiny-a": "tiny-b"})
    effects = {"tiny-a": (0.9, 0.6, 1.2), "tiny-b": (0.2, -0.2, 0.6)}
    for model, effect in effects.items():
        assert "Q1 taught" not in (set(Scorecard().table["name"]) if model == "tiny-b" else ())
        leave(project, "Q1", model, effect=effect)
    line = Scorecard().table.set_index("name").loc["Q1 taught"]
    assert (line["finding"], line["of"], line["verdict"]) == ("Q1", "tiny-a", "cannot be told")
    assert line[["effect", "low", "high"]].tolist() == pytest.approx([0.7, 0.2, 1.2])  # 3, 4, 5


def test_a_column_for_each_configuration_and_only_the_defaults_unless_asked(project):
    leave(project, "I", "tiny-a")
    leave(project, "I", "tiny-a", "does not hold", ratio=0.5, draws=20)
    leave(project, "I", "tiny-a", "does not hold", age=50)  # older than the first
    (line,) = Scorecard(models=["tiny-a"]).table.to_dict("records")
    assert (line["verdict"], line["p"], line["finding"]) == ("holds", "0.010", "I")
    card = Scorecard(models=["tiny-a"], configurations="all")
    assert card.columns == ["tiny-a", "tiny-a, ratio=0.5, draws=20"]
    assert card.table["verdict"].tolist() == ["holds", "does not hold"]


def test_findings_of_other_parameters_only_are_named(project):
    leave(project, "I", "tiny-a", limit=12)
    leave(project, "I", "other", limit=12)  # no shipped model
    message = r"usual parameters, but I of tiny-a, limit=12: use configurations='all'$"
    with pytest.raises(NotApplicable, match=message):
        Scorecard()
    assert Scorecard(configurations="all").columns == ["tiny-a, limit=12"]
    newest = Scorecard(configurations="newest")
    assert newest.columns == ["tiny-a"] and newest.table["of"].tolist() == ["tiny-a"]


@pytest.mark.parametrize(
    ("about", "cell", "message"),
    [
        ({"finding": "V"}, CELL, 'its metadata need "claim" beside "finding"'),
        ({"finding": "V", "claim": "c"}, None, "no cell is tagged `parameters`"),
        ({"finding": "V", "claim": "c"}, f"{CELL}\nseed = -1", "seed=-1: a whole number"),
        ({"finding": "I", "claim": "c"}, CELL, "finding 'I' is that of 05_one; rename one"),
    ],
)
def test_a_notebook_that_is_amiss_is_named(tmp_path, about, cell, message):
    for name, now, source in (
        ("05_one", {"finding": "I", "claim": "c"}, CELL),
        ("11", about, cell),
    ):
        tags = {"tags": ["parameters"]} if source else {}
        cells = [nbformat.v4.new_code_cell(source or CELL, metadata=tags)]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"minerlib": now})
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    with pytest.raises(ValueError, match=f"^11.ipynb: {message}"):
        scorecard.findings(tmp_path)


def test_a_new_finding_needs_no_list(project):
    leave(project, "V", "tiny-a")
    assert Scorecard().table["finding"].tolist() == ["V"]


def test_all_verdicts_at_a_glance(project, monkeypatch):
    leave(project, "I", "tiny-a", "holds (close)")
    leave(project, "I", "tiny-b", "does not hold", rival=True)
    leave(project, "II", "tiny-b", "cannot be told")
    card = Scorecard()
    fig = card.draw()
    (ax,) = fig.axes
    assert {t.get_text() for t in ax.texts} >= {"yes~", "no", "?"}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["I: neurons of I", "II: neurons of II"]
    monkeypatch.delenv("MINER_FIGURES", raising=False)
    card.save_figure(fig, "20-scorecard")
    assert (project / "runs/figures/20-scorecard.png").exists()
    plt.close(fig)
    with pytest.raises(ValueError, match="verdict 'yes' is none of holds, does not hold, "):
        mark("yes")
    assert mark("holds") == (2, "yes") and mark("cannot be told (close)") == (1, "?~")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runs": "elsewhere"}, "runs='elsewhere': no such folder; run `make workbook`"),
        ({"configurations": "some"}, "configurations='some': use default, newest or all"),
    ],
)
def test_a_bad_parameter_is_named(project, given, message):
    with pytest.raises(ValueError, match=message):
        Scorecard(**given)
    cell = 'runs = "runs"\nmodels = "shipped"\nconfigurations = "default"'
    space = {"In": [cell, "# Parameters\nmodel = 1"], "runs": "runs"}
    with pytest.raises(ValueError, match="unknown parameter 'model'; did you mean 'models'"):
        Scorecard.bind(space)


def test_minor_lines_stand_in_the_table_alone(project):
    leave(project, "I", "tiny-a", name="I")
    leave(project, "II", "tiny-a", name="II behind")
    card = Scorecard()
    assert card.table["name"].tolist() == ["I", "II behind"]
    (ax,) = card.draw().axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["I: neurons of I"]
    plt.close("all")


def test_a_cell_says_the_effect_and_what_it_is_beside():
    line = {"verdict": "holds (close)", "effect": 0.5, "low": 0.4, "high": 0.6, "p": "0.010"}
    line |= {"null": "+0.00 [-0.10, +0.10]", "untrained": float("nan")}
    cell = "yes~  +0.50 [+0.40, +0.60]\np 0.010; null: +0.00 [-0.10, +0.10]"
    assert scorecard.told(pd.Series(line)) == cell
    cell = scorecard.told(pd.Series(line | {"p": "", "untrained": "+0.10 [+0.00, +0.20]"}))
    assert cell.split("\n")[1:] == [
        "null: +0.00 [-0.10, +0.10]; untrained: +0.10",
        "[+0.00, +0.20]",
    ]


def test_questions_stand_apart_from_what_the_paper_says(project):
    leave(project, "I", "tiny-a")
    leave(project, "Q1", "tiny-a", "does not hold", name="Q1", effect=(-0.1, -0.2, 0.001))
    leave(project, "Q3", "tiny-a", "cannot be told", name="Q2")  # one notebook, two questions
    leave(project, "Q3", "tiny-a", name="Q3 whole", age=9)  # no headline
    leave(project, "Q7", "tiny-b", name="Q7 attribution")  # a selector beside
    card = Scorecard(configurations="all")
    drawn = {q: card.draw(questions=q).axes[0] for q in (False, True)}
    rows = {q: [t.get_text() for t in ax.get_yticklabels()] for q, ax in drawn.items()}
    plt.close("all")
    asked = ["Q1: neurons of Q1", "Q2: neurons of Q3", "Q7 attribution: neurons of Q7"]
    assert rows == {False: ["I: neurons of I"], True: asked}
    told = card.answers()
    own = "-0.10 [-0.20, +0.00] does not hold"
    assert told.loc[:, "tiny-a"].tolist() == [own, "cannot be told", ""]
    assert told.loc[:, "tiny-b"].tolist() == ["", "", "holds"]
    assert card.title("Q1").startswith("**Question Q1**, judged in")
    assert scorecard.is_question("Q9") and not scorecard.is_question("Q9 whole")
    assert not scorecard.is_question(float("nan"))
    assert "Q1" not in card.headlines()
