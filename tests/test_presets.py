"""The README's presets, replayed offline: real names, hub calls and layouts, small contents.

Notebook 00, which has the four stages in three lines, and 02, on whose scores every other one
stands, run here, of the paper's two models 03 and 04 too; what they were given and what they left
is checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import hub
import nbformat
import numpy as np
import pytest
import xarray as xr
from conftest import ROOT, run_script
from families import FAMILIES

from minerlib.presets import PRESETS, published, table
from minerlib.tasks import REGISTRY
from minerlib.workbook import PAPER_BENCHMARKS, Workbook

PAPERS = ("qwen2-vl-7b", "qwen2-audio-7b")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub")
    hub.fill(path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [o for c in cells for o in c.get("outputs", [])]
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_preset(name, home, tmp_path):
    preset, family = PRESETS[name], FAMILIES[PRESETS[name].family]
    if family.needs and find_spec(family.needs) is None:
        pytest.skip(f"{family.processor} needs the package {family.needs}")
    hub.checkpoint(home, preset.family, preset.model)
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    for file in ("run.py", "sizes.yml"):
        shutil.copy(ROOT / "notebooks" / file, project / "notebooks")
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        if file.name[:2] in ("00", "02", *(("03", "04") if name in PAPERS else ())):
            shutil.copy(file, project / "notebooks")
    given = [f"PRESET={name}", "LIMIT=4", "EVAL_LIMIT=4", "FRAMES=4", f"RUN={tmp_path / 'run'}"]
    given += ["MAX_PIXELS=1024"] if preset.family.endswith(("-vl", "-omni")) else []  # small
    done = subprocess.run(
        [sys.executable, project / "notebooks/run.py", *given],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    run = tmp_path / "run" / Path(preset.model).name
    start = printed(run / "notebooks/00_start_here.ipynb")
    assert f"{Path(preset.model).name} (checkpoint)" in start
    asked = [n for n in PAPER_BENCHMARKS if REGISTRY[n].modality in ("text", *family.media)]
    assert f"benchmarks: {', '.join(asked)}" in start
    # Random weights are nowhere near the published figures, and the workbook says so.
    for of, figure in preset.published.items():
        lines = [x for x in start.splitlines() if x.split()[:1] == [of] and f"{figure:.3f}" in x]
        assert ["FAR OFF" in line for line in lines] == [True]
    assert ("do not trust what follows" in start) == bool(preset.published)
    for of in asked:
        (file,) = run.glob(f"scores-{of}-*.nc")
        scores = xr.load_dataarray(file, engine="h5netcdf")
        assert scores.attrs["rows"] == 4 and np.isfinite(scores).all()
    if name in PAPERS:
        (neurons,) = run.glob("neurons-*.nc")
        assert xr.load_dataarray(neurons, engine="h5netcdf").any()


# ------------------------------------------------------------------ the table


def test_what_a_preset_takes_is_reckoned_from_its_size():
    preset = PRESETS["qwen2-vl-7b"]
    assert preset.gigabytes == pytest.approx((16.58, 16.58 + 3 * 32 * 750 * 18944 * 2e-9))
    assert preset.minutes(2000) == pytest.approx(2000 * 2 * (750 * 6.53e9 + 2900 * 0.675e9) / 6e15)
    assert PRESETS["smolvlm-256m"].gigabytes[0] == pytest.approx(4 * 0.256)
    shown = table().set_index("preset")
    assert shown.loc["qwen2-vl-7b", "published"] == "text_vqa 0.843 (its README)"
    assert shown.loc["smolvlm-256m", "parameters"].startswith("limit=96, dtype=float32, frames=8")
    assert shown.loc["smolvlm-256m", "published"] == ""
    assert published("Qwen2-VL-7B-Instruct") == {"text_vqa": 0.843} and published("mine") == {}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_there_is(name):
    preset = PRESETS[name]
    assert preset.family in FAMILIES
    assert {*preset.parameters} < {*Workbook.model_fields} and "dtype" in preset.parameters
    media = ("text", *FAMILIES[preset.family].media)
    assert all(REGISTRY[of].modality in media for of in preset.published)
    assert bool(preset.published) == bool(preset.source)


def test_what_is_given_wins_over_a_preset_and_a_wrong_name_is_refused():
    run = run_script()
    given = run.preset({"preset": "smolvlm-256m", "limit": "8", "run": "mine"})
    assert given["model"] == PRESETS["smolvlm-256m"].model and given["run"] == "mine"
    assert given["limit"] == "8" and run.value(given["dtype"]) == "float32"
    assert "preset" not in given and run.preset({"limit": "8"}) == {"limit": "8"}
    with pytest.raises(SystemExit, match="preset='smol': there are qwen2-vl-7b"):
        run.preset({"preset": "smol"})
