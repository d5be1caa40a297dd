"""The notebooks as committed, and the script that executes them. nbval runs them; see Makefile."""

from __future__ import annotations

import ast
import os
import re
import socket
import sys
from pathlib import Path

import nbformat
import papermill
import printed
import pytest
import yaml
from conftest import ROOT, run_script

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEEDED = (
    "00_start_here",
    "01_modality_separation",
    "02_importance_scores",
    "03_score_aggregation",
    "04_neuron_selection",
    "05_two_percent_deactivation",
    "06_lower_layer_convergence",
    "07_last_token_flow",
    "08_semantic_probing",
    "09_semantic_telomeres",
    "20_scorecard",
)
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.~:/-])/(home|root|work|tmp|Users|mnt|opt|usr|var)/|\b[A-Z]:\\\\?\w"
)
EMBEDDED = re.compile(r"base64,[A-Za-z0-9+/=\s]+")  # pictures and sounds: random letters


# --- as committed --------------------------------------------------------------------------------


def test_all_are_there():
    assert not set(NEEDED) - {path.stem for path in NOTEBOOKS}


def test_numbers_are_consecutive_and_the_scorecard_is_last():
    *numbers, last = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == [f"{i:02}" for i in range(len(numbers))] and last == "20"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list[nbformat.NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def texts(notebook):
    """Sources and textual outputs, without embedded pictures and sounds."""
    for i, cell in enumerate(notebook.cells):
        yield f"cell {i}", cell.source
        for output in cell.get("outputs", []):
            data = {"text": output.get("text", ""), **output.get("data", {})}
            for kind, text in data.items():
                if not kind.startswith(("image/png", "image/jpeg", "audio/")):
                    yield f"cell {i}, {kind}", EMBEDDED.sub("", str(text))


def test_format(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_starts_with_a_heading(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")


def test_parameters_come_first(notebook):
    tagged = [
        i for i, c in enumerate(code_cells(notebook)) if "parameters" in c.metadata.get("tags", [])
    ]
    assert tagged == [0], "the first code cell, and no other, is tagged `parameters`"


def test_every_cell_was_executed_in_order(notebook):
    """nbval compares nothing in a cell whose execution_count is null."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_errors_and_no_bars(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", output.get("evalue")
            assert output.get("name") != "stderr", output.get("text")


def test_nothing_of_this_machine(notebook):
    host = socket.gethostname()
    for where, text in texts(notebook):
        assert not ABSOLUTE_PATH.search(text), f"{where}: {ABSOLUTE_PATH.search(text)}"
        if len(host) > 4:
            assert not re.search(rf"\b{re.escape(host)}\b", text), f"{where} names the host"


# --- prose, calls and figures --------------------------------------------------------------------

BOUND = re.compile(r"^(wb = ml\.Workbook|card = Scorecard)\.bind\(globals\(\)\)$", re.M)
NOT_FOR_EVERY_MODEL = re.compile(r"\b2 ?%|\btwo percent\b|\bten times\b|\bthe odd one out\b", re.I)
CITED = re.compile(r"\bpaper|Qwen2-(VL|Audio)|arxiv|reviewers?\b", re.I)


def functions(cell) -> list[ast.FunctionDef]:
    source = re.sub(r"^[%!].*$", "", cell.source, flags=re.M)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def sections(notebook) -> list[tuple[str, str]]:
    """Headings with the prose below them, of the markdown cells."""
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    return re.findall(r"^#+ (.*)\n([^#]*)", text, re.M)


@pytest.mark.fault("parameters typed twice")
def test_parameters_are_bound_in_one_line(notebook):
    first, second = code_cells(notebook)[:2]
    assert BOUND.findall(second.source), "the second code cell binds them"
    names = {t.id for x in ast.parse(first.source).body for t in x.targets}
    passed = [k for k in ast.walk(ast.parse(second.source)) if isinstance(k, ast.keyword)]
    again = {k.arg for k in passed if isinstance(k.value, ast.Name) and k.value.id == k.arg}
    assert not names & again, "parameters are not passed one by one"


@pytest.mark.fault("computation in a notebook")
def test_no_function_is_longer_than_ten_lines(notebook):
    for cell in code_cells(notebook):
        for function in functions(cell):
            assert function.end_lineno - function.lineno < 10, f"{function.name} is for the library"


@pytest.mark.fault("one helper in two notebooks")
def test_no_helper_stands_in_two_notebooks():
    defined: dict[str, list[str]] = {}
    for path in NOTEBOOKS:
        for cell in code_cells(nbformat.read(path, as_version=4)):
            for function in functions(cell):
                defined.setdefault(function.name, []).append(path.stem)
    assert {name: where for name, where in defined.items() if len(where) > 1} == {}


def test_every_figure_is_kept_and_followed_by_what_to_see_in_it(notebook):
    for cell, following in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and re.search(r"\bfig(, \w+)? =", cell.source):
            assert "save_figure(" in cell.source, cell.source
            assert following.cell_type == "markdown", cell.source
            assert not following.source.startswith("#"), "first what to see, then the next heading"


@pytest.mark.fault("prose that another model contradicts")
def test_prose_holds_for_any_model_ratio_and_seed(notebook):
    """Figures of the paper may be cited, in sentences that say whose they are."""
    text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    text = re.sub(r"^#+ .*$", "", text, flags=re.M)
    for part in re.split(r"\n\n|\n- |(?<=[.:!?])\s", text):
        if NOT_FOR_EVERY_MODEL.search(part):
            assert CITED.search(part), part
        if "stand-in" in part:  # the model may be none
            assert "data/README.md" in part, part


def test_tables_are_shown_as_tables(notebook):
    for cell in code_cells(notebook):
        assert ".to_string(" not in cell.source, cell.source


def test_every_notebook_has_its_parts(notebook):
    headings = [title for title, _ in sections(notebook)]
    assert headings[-2:] == ["On your own", "Further reading"]
    for part in ("**What you'll see**", "**What you need**"):
        assert part in notebook.cells[0].source


def test_a_findings_notebook_ends_with_its_claims_and_keeps_them(notebook):
    about = notebook.metadata.get("minerlib", {})
    if "finding" in about:
        *_, last = code_cells(notebook)
        assert about["claim"] and f'save_finding("{about["finding"]}",claims' in re.sub(
            r"\s", "", last.source
        )
        assert any("show(claims" in cell.source for cell in code_cells(notebook)[-3:])


def test_what_is_chaotic_is_shown_and_not_compared(notebook):
    for cell in code_cells(notebook):
        tags = cell.metadata.get("tags", [])
        assert ("chaotic" in tags) == ("nbval-ignore-output" in tags)


def test_no_injected_parameters(notebook):
    """The committed notebook is the one with the defaults, not a run's output."""
    assert "papermill" not in notebook.metadata
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in notebook.cells)


# --- the sanitise file ---------------------------------------------------------------------------

SANITISED = [
    ("mined in 12.3 s, peak 812 MiB", "mined in DURATION, peak MEMORY"),
    ("2026-11-23 12:41:29 done", "DATE done"),
    ("<Figure at 0x7f27e828ef90>", "<Figure at ADDRESS>"),
    ("scores-mmlu-27ae0af94814.nc", "scores-mmlu-HASH.nc"),
    ("saved to /home/me/miner/runs/x.nc", "saved to PATH"),
]
KEPT = [
    "score 0.9125 of 96 samples",
    "448 neurons, 8 layers",
    "image 0.02 0.31 -0.48",
    "mean 0.5 min 0.1 max 0.9",
    "std 0.31\nmin 0.02\nsum 12\ns 3",
    "deadbeef",
]


def sanitise(text: str) -> str:
    """As nbval does, but for the numbers, which tests/printed.py compares."""
    return printed.skeleton(text, before="verdicts")


@pytest.mark.parametrize(("text", "expected"), SANITISED)
def test_what_changes_from_run_to_run_is_not_compared(text, expected):
    assert sanitise(text) == expected


@pytest.mark.parametrize("text", KEPT)
def test_results_are_compared(text):
    assert sanitise(text) == text


# --- notebooks/run.py ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script, with two small notebooks in a project of its own."""
    script = run_script()
    monkeypatch.setitem(sys.modules, "run", script)  # where its processes look for functions
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "SIZES", tmp_path / "sizes.yml")
    (tmp_path / "sizes.yml").write_text("{default: {}, quick: {all: {limit: 1}, '01': {ratio: 1}}}")
    monkeypatch.setenv("MINER_FRESH", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "models/tiny/config.json").touch()
    write("00_one", "model = 'none'\nlimit = 3", "print(limit, type(limit).__name__, model)")
    write("01_two", "ratio = 0.02\nrun_dir = None", "print(ratio, run_dir)")
    return script


def write(name: str, parameters: str, code: str, about: dict | None = None) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(code),
        ],
        metadata={
            "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"},
            "minerlib": about or {},
        },
    )
    nbformat.write(notebook, Path("notebooks") / f"{name}.ipynb")


def said(path: str) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", [])).strip()


@pytest.fixture
def executed(run, monkeypatch) -> list[tuple[str, dict]]:
    """Record what would be executed instead of starting kernels."""
    calls = []

    def execute(notebook, output, parameters, **_):
        calls.append((Path(notebook).stem, parameters))
        result = nbformat.read(notebook, as_version=4)
        result.metadata["papermill"] = {"end_time": "now", "parameters": parameters, "duration": 1}
        nbformat.write(result, output)
        return result

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return calls


def test_values_are_yaml(run):
    values = {"8": 8, "1e-3": 0.001, "true": True, "mmlu": "mmlu", "null": None}
    values |= {"[mmlu, libri]": ["mmlu", "libri"], "{mean: 1.0}": {"mean": 1.0}}
    assert {text: run.value(text) for text in values} == values


def test_arguments(run):
    given = run.parse(["MODEL=a=b", "limit=8", "PARAMS=ratio=0.05 weights='{mean: 1}'"])
    assert given == {"model": "a=b", "limit": "8", "ratio": "0.05", "weights": "{mean: 1}"}
    with pytest.raises(SystemExit, match="'fast' is not NAME=VALUE"):
        run.parse(["fast"])


def test_a_sweep_is_a_table_of_runs(run, tmp_path, capsys):
    table = tmp_path / "sweep.csv"
    table.write_text("model,seed,ratio,NOTEBOOKS\na,0,,02\na,1,0.05,05\nb,,0.01,05\n")
    with pytest.raises(SystemExit, match="^   0 model=a seed=0 notebooks=02\n   1 model=a seed=1"):
        run.main([f"sweep={table}"])
    one = run.swept({"sweep": str(table), "one": "1", "ratio": "0.1"})
    assert one == {"model": "a", "seed": "1", "ratio": "0.1", "notebooks": "05"}
    with pytest.raises(SystemExit, match="one=3: .* has rows 0 to 2"):
        run.main([f"sweep={table}", "one=3"])


@pytest.mark.parametrize("wrong", ["0", "two"])
def test_a_wrong_number_of_processes_is_named(run, wrong):
    with pytest.raises(SystemExit, match=f"processes='{wrong}': give a number of processes"):
        run.main([f"processes={wrong}"])


def test_some_notebooks(run, executed):
    """By number; of what is not asked for nothing runs, and full=1 runs all."""
    write("12_more", "limit = 3", "print(limit)")
    run.main(["model=models/tiny"])
    assert [name for name, _ in executed] == ["00_one", "01_two"]
    run.main(["model=models/tiny", "notebooks=1,11-13"])
    assert [name for name, _ in executed[2:]] == ["12_more"]  # 01 is up to date
    run.main(["model=models/tiny", "full=1"])
    assert [name for name, _ in executed[3:]] == ["00_one", "01_two", "12_more"]
    assert run.numbered("11, 13-15") == {11, 13, 14, 15}
    for wrong in ("a", "1-", "-3"):
        with pytest.raises(SystemExit, match="give numbers such as 11,13-15"):
            run.numbered(wrong)
    with pytest.raises(SystemExit, match="'77': there are none of these numbers"):
        run.main(["notebooks=77"])


def test_a_notebook_gets_what_it_declares(run, executed):
    run.main(["model=models/tiny", "limit=8", "ratio=1e-3"])
    assert executed == [
        ("00_one", {"limit": 8, "model": "models/tiny"}),
        ("01_two", {"ratio": 0.001}),
    ]
    assert Path("runs/tiny/notebooks-limit=8-ratio=1e-3/01_two.ipynb").exists()
    run.main(["model=models/tiny", "run=elsewhere"])
    assert executed[-1] == ("01_two", {"run_dir": "runs/elsewhere/tiny"})


def test_sizes(run, executed):
    """A size is for all notebooks or for one; what is given comes last; only FULL finds results."""
    run.main(["model=models/tiny", "quick=1"])
    assert executed == [("00_one", {"limit": 1, "model": "models/tiny"}), ("01_two", {"ratio": 1})]
    assert Path("runs/tiny/notebooks-quick=1").is_dir() and os.environ["MINER_FRESH"] == "1"
    run.main(["model=models/tiny", "quick=1", "limit=2"])
    assert executed[2][1]["limit"] == 2
    os.environ["MINER_FRESH"] = ""
    run.main(["model=models/tiny", "full=1"])
    assert executed[-2:] == [("00_one", {"model": "models/tiny"}), ("01_two", {})]
    assert not os.environ["MINER_FRESH"]
    run.main(["model=models/tiny", "full=1", "fresh=1", "limit=5"])
    assert os.environ["MINER_FRESH"] == "1"


@pytest.mark.fault("up to date, though made of something else")
def test_what_a_notebook_rests_on_besides_its_parameters(run, executed):
    """Published results or not, plug-ins, and what the library reads beside its modules."""
    Path("minerlib").mkdir(exist_ok=True)
    Path("minerlib/claims.yml").write_text("I: 1")
    os.utime("minerlib/claims.yml", (1e9, 1e9))
    again = ["model=models/tiny", "full=1"]
    for given, change in (
        (again, lambda: None),
        (again, lambda: os.utime("minerlib/claims.yml")),
        ([*again, "fresh=1"], lambda: None),
    ):
        change()
        os.environ["MINER_FRESH"] = ""
        executed.clear()
        run.main(given)
        assert len(executed) == 2, given
        executed.clear()
        run.main(given)
        assert not executed


def test_the_sizes_name_notebooks_and_parameters_that_are_there():
    script = run_script()
    declared = {p.stem[:2]: set(papermill.inspect_notebook(str(p))) for p in NOTEBOOKS}
    for size in yaml.safe_load(script.SIZES.read_text()).values():
        assert set(size) - {"all"} <= set(declared)
        assert set(size.pop("all")) <= set().union(*declared.values())
        for number, parameters in size.items():
            assert set(parameters) <= declared[number], number


def test_every_model_gets_every_notebook(run, executed, monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)  # else side by side
    write("01_three", "model = 'none'", "print(model)", {"finding": "III"})
    run.main(["model=models/tiny owner/big"])
    assert [name for name, _ in executed] == ["00_one", "01_two"] * 2 + ["01_three"] * 2
    assert {p.parent.parent.name for p in Path("runs").rglob("*.ipynb")} == {"tiny", "big"}


def test_a_notebook_over_all_runs_comes_once_and_last(run, executed, monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    write("00_all", "runs = 'runs'\nmodels = None", "print(runs, models)")
    run.main(["model=models/tiny owner/big", "run=elsewhere"])
    assert [name for name, _ in executed] == ["00_one", "01_two"] * 2 + ["00_all"]
    assert executed[-1] == ("00_all", {"runs": "runs/elsewhere", "models": ["tiny", "big"]})


@pytest.mark.fault("another configuration overwrites executed notebooks")
def test_other_parameters_leave_the_executed_notebooks_of_the_defaults(run, executed):
    run.main(["model=models/tiny"])
    folder = Path("runs/tiny/notebooks")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    run.main(["model=models/tiny", "limit=7"])
    run.main(["model=models/tiny", "limit=7", "ratio=0.5"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    others = {path.name for path in Path("runs/tiny").iterdir()}
    assert others == {"notebooks", "notebooks-limit=7", "notebooks-limit=7-ratio=0.5"}


def test_the_suffix_of_a_folder_is_a_file_name_and_tells_values_apart(run):
    texts = ["a/b", "a_b", "[1, 2]", "x" * 300, "x" * 301, "{mean: 1}", "ü"]
    names = [run.suffix({"source": text}) for text in texts]
    assert len(set(names)) == len(texts) and max(map(len, names)) < 100
    assert all(re.fullmatch(r"[-\w.,=]+", name) for name in names)
    assert run.suffix({}) == "" and run.suffix({"seed": "1", "limit": "8"}) == "-limit=8-seed=1"


@pytest.mark.slow
def test_models_run_side_by_side_on_cpus(run, monkeypatch):
    """Stages model by model, then findings; a failure stops its model only and is named."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run.os, "cpu_count", lambda: 6)
    about = {"finding": "III"}
    code = "import os; print(os.environ['OMP_NUM_THREADS'], model)"
    write("05_three", "model = 'none'", code, about)
    write("06_four", "model = 'none'", "assert 'good' in model, 'model is ' + model", about)
    write("00_one", "model = 'none'", "assert 'bad' not in model")
    message = r"00_one\.ipynb failed for owner/bad: [^$]*06_four\.ipynb failed for owner/so: .*so"
    with pytest.raises(SystemExit, match=message):
        run.main(["model=owner/bad owner/so owner/good"])
    assert {p.parent.parent.name for p in Path("runs").rglob("05_*")} == {"so", "good"}
    assert said("runs/good/notebooks/05_three.ipynb") == "2 owner/good"
    noted = nbformat.read("runs/good/notebooks/06_four.ipynb", as_version=4).metadata
    assert noted["peak_memory_mib"] > 10


def test_an_unknown_parameter_is_an_error(run, executed):
    with pytest.raises(SystemExit, match=r"no notebook has the parameter limits; .*'limit'"):
        run.main(["model=models/tiny", "limits=8"])
    assert not executed


def test_picks_up_where_it_stopped(run, executed):
    arguments = ["model=models/tiny", "limit=8"]

    def names():
        executed.clear()
        run.main(arguments)
        return [name for name, _ in executed]

    def touch(file):
        newest = max(p.stat().st_mtime for p in Path().rglob("*") if p.is_file())
        os.utime(file, (newest + 1, newest + 1))

    assert names() == ["00_one", "01_two"]
    folder = Path("runs/tiny/notebooks-limit=8")
    touch(folder / "00_one.ipynb")
    touch(folder / "01_two.ipynb")
    assert names() == []

    output = folder / "01_two.ipynb"
    whole = output.read_text()
    for unfinished in ('"end_time": null', '"end_time": "now", "exception": true'):
        output.write_text(whole.replace('"end_time": "now"', unfinished))
        assert names() == ["01_two"]
    output.unlink()
    assert names() == ["01_two"]

    touch(output)
    touch("notebooks/01_two.ipynb")
    touch(folder / "00_one.ipynb")
    assert names() == ["01_two"]
    for file in ("models/tiny/config.json", "minerlib/deep/room.py"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
        touch(file)
        assert names() == ["00_one", "01_two"], file
        touch(folder / "00_one.ipynb")
        touch(folder / "01_two.ipynb")
        assert names() == []
    arguments.append("run=mine")  # in a folder of one's own: other parameters, executed anew
    assert names() == ["00_one", "01_two"]
    for name in ("00_one", "01_two"):
        touch(f"runs/mine/tiny/notebooks/{name}.ipynb")
    arguments[1] = "limit=9"  # for the notebook that has it
    assert names() == ["00_one"]


def test_executes_with_papermill(run, capsys):
    run.main(["model=models/tiny", "limit=1_000", "ratio=0.05"])
    folder = "runs/tiny/notebooks-limit=1_000-ratio=0.05"
    assert said(f"{folder}/00_one.ipynb") == "1000 int models/tiny"
    assert said(f"{folder}/01_two.ipynb") == "0.05 None"
    capsys.readouterr()
    for path in Path("runs").rglob("*.ipynb"):
        os.utime(path, (2e9, 2e9))
    run.main(["model=models/tiny", "limit=1_000", "ratio=0.05"])
    assert capsys.readouterr().out.count("up to date") == 2


def test_a_failing_notebook_is_named(run):
    write("00_one", "model = 'none'", "raise ValueError('limit=-1 is negative')")
    with pytest.raises(SystemExit, match=r"00_one\.ipynb failed .*\n?.*limit=-1 is negative"):
        run.main(["model=models/tiny"])
    assert not Path("runs/tiny/notebooks/01_two.ipynb").exists()


def test_a_notebook_that_does_not_apply_is_passed_over(run, capsys):
    code = "class NotApplicable(ValueError): pass\nraise NotApplicable('no picture')"
    write("00_one", "model = 'none'", code)
    run.main(["model=models/tiny"])
    assert "00_one.ipynb: not applicable for models/tiny: no picture" in capsys.readouterr().out
    assert said("runs/tiny/notebooks/01_two.ipynb") == "0.02 None"


def test_own_rows_and_plugins_are_inputs(run, executed, monkeypatch):
    monkeypatch.setenv("MINER_PLUGINS", "own_plugin")
    with pytest.raises(SystemExit, match="no module own_plugin"):
        run.main(["model=models/tiny"])
    Path("own_plugin.py").touch()
    Path("mine").mkdir()
    Path("mine/test-0.parquet").touch()
    write("00_one", "model = 'none'\nsource = 'auto'", "1")
    run.main(["model=models/tiny", "source=mine"])
    for file in ("own_plugin.py", "mine/test-0.parquet"):
        for output in Path("runs").rglob("*.ipynb"):
            os.utime(output, (2e9, 2e9))
        executed.clear()
        run.main(["model=models/tiny", "source=mine"])
        assert not executed
        os.utime(file, (2.1e9, 2.1e9))
        run.main(["model=models/tiny", "source=mine"])
        assert executed
        os.utime(file, (1e9, 1e9))
