"""That numbers are compared by their kind: it bites where a result changed, and does not cry where
another processor rounds otherwise."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import printed
import pytest
from conftest import ROOT

SAME = [  # committed, on another processor
    ("score 0.9125", "score 0.9127"),
    ("p = 0.98", "p = 0.97"),
    ("0.98 [0.96, 0.99]", "0.98 [0.95, 0.99]"),
    ("null 1.18", "null 1.19"),
    ("measure   p\n   0.50 0.98", "measure    p\n   0.50 0.97"),
    ("  0.00 of a\n 12.50 b", "-0.00 of a\n12.51 b"),
    ("448 neurons", "449 neurons"),
    ("holds (close)", "does not hold"),
    ("cannot be told", "holds (close)"),
    ("layers 3, 5, 7", "layers 3, 5, 7"),
    ("mined in 12.3 s", "mined in 45.6 s"),
]
OTHER = [  # what is wrong today, and the words that say so
    ("score 0.91", "score 0.94", "measure 0.91 is now 0.94"),
    ("0.98 [0.96, 0.99]", "0.98 [0.91, 0.99]", "interval 0.96 is now 0.91"),
    ("p = 0.05", "p = 0.10", "p 0.05 is now 0.10"),
    ("x    p\n1 0.05", "x    p\n1 0.50", "p 0.05 is now 0.50"),
    ("96 samples", "90 samples", "count 96 is now 90"),
    ("8 layers", "9 layers", "count 8 is now 9"),
    ("layer 3", "layer 4", "count 3 is now 4"),
    ("score -0.20", "score 0.20", "measure -0.20 is now 0.20"),
    ("audio holds", "audio does not hold", "verdict holds is now does not hold"),
    ("HOLDS: x", "CANNOT BE TOLD: x", "verdict holds is now cannot be told"),
    ("image 0.5", "video 0.5", "words or structure differ"),
    ("0.5 0.6", "0.5", "words or structure differ"),
    ("one\ntwo", "one two", "words or structure differ"),
]


def write(path: Path, *outputs: str, tags: tuple[str, ...] = (), injected: bool = False) -> Path:
    """A notebook whose cells show these texts, by turns as a stream and as a table."""
    cells = []
    for i, text in enumerate(outputs):
        data = {"text/plain": text, "text/html": f"<b>{i}</b>"}
        output = nbformat.v4.new_output("stream", text=text)
        if i % 2:
            output = nbformat.v4.new_output("display_data", data=data)
        cells.append(nbformat.v4.new_code_cell("1", outputs=[output], metadata={"tags": [*tags]}))
    if injected:
        tagged = {"tags": ["injected-parameters"]}
        cells.insert(1, nbformat.v4.new_code_cell("model = 'x'", metadata=tagged))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def between(tmp_path):
    """What differs between two texts, as the outputs of two notebooks' cells."""

    def compare(a: str, b: str, **kwargs) -> list[str]:
        old = write(tmp_path / "old.ipynb", "words", a, **kwargs)
        new = write(tmp_path / "new.ipynb", "words", b, injected=True, **kwargs)
        return printed.differences(old, new)

    return compare


@pytest.mark.fault("a regression check that cries wolf")
@pytest.mark.parametrize(("committed", "fresh"), SAME)
def test_another_processors_rounding_is_no_difference(committed, fresh, between):
    assert between(committed, fresh) == []
    assert printed.skeleton(committed) == printed.skeleton(fresh)  # what nbval compares


@pytest.mark.parametrize(("committed", "fresh", "words"), OTHER)
def test_a_changed_result_is_a_difference(committed, fresh, words, between):
    assert between(committed, fresh) == [f"old code cell 1: {words}"]


def test_chaotic_cells_are_shown_and_not_compared(between):
    assert between("0.1", "0.9") and not between("0.1", "0.9", tags=("chaotic",))


@pytest.mark.fault("a regression check that cries wolf")
def test_a_stream_that_comes_in_pieces_is_one(tmp_path):
    def made(name, *pieces):
        streams = [nbformat.v4.new_output("stream", text=text) for text in pieces]
        cells = [nbformat.v4.new_code_cell("1", outputs=streams)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / name)
        return tmp_path / name

    whole = made("a.ipynb", "kept in 12 rows\nand no more\n")
    assert (
        printed.differences(whole, made("b.ipynb", "kept in 12 rows", "\nand no more", "\n")) == []
    )
    assert printed.differences(whole, made("c.ipynb", "kept in 12 rows", "and no more\n"))


def test_names_with_digits_stay_words():
    text = "qwen2-vl, layer0, 2.5-omni, t-SNE seed 0: 0.5 of 12"
    assert printed.skeleton(text) == "qwen2-vl,_layer0,_#-omni,_t-SNE_seed_#:_#_of_#"


def test_hashes_dates_and_durations_are_no_results():
    text = "scores-mmlu-27ae0af94814.nc made 2026-11-23 12:41:29 in 850 ms, 812 MiB"
    assert printed.skeleton(text) == "scores-mmlu-HASH.nc_made_DATE_in_DURATION,_MEMORY"


@pytest.mark.slow
def test_nbval_compares_numbers_too(tmp_path):
    """Two cells that print 0.91; the second was committed with another number."""
    path = write(tmp_path / "one.ipynb", "score 0.91\n")
    notebook = nbformat.read(path, 4)
    notebook.cells[0] |= {"source": "print('score 0.91')", "execution_count": 1}
    notebook.cells.append(copy.deepcopy(notebook.cells[0]))
    notebook.cells[1] |= {"execution_count": 2, "id": "another"}
    notebook.cells[1].outputs[0]["text"] = "score 0.97\n"
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, path)
    how = "--nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg"
    command = [sys.executable, "-m", "pytest", str(path), *how.split(), "-p", "tests.nbval_numbers"]
    told = {k: v for k, v in os.environ.items() if k != "CI"}  # there pytest's summary repeats it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=told)
    assert "1 failed, 1 passed" in done.stdout
    assert done.stdout.count("measure 0.97 is now 0.91") == 1
