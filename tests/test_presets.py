"""The README's presets, replayed offline: real names, hub calls and layouts, small contents.

Four of the notebooks run here, the stages that every other one stands on; what they were given and
what they left is checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import nbformat
import numpy as np
import pytest
import xarray as xr
from conftest import ROOT

pytestmark = pytest.mark.slow
STAGES = ("00", "02", "03", "04")
BENCHMARKS = {
    "qwen2-vl": ["text_vqa", "coco_caption", "mmlu", "msvd_qa"],
    "qwen2-audio": ["mmlu", "libri", "vocal_sound"],
}
PUBLISHED = {"qwen2-vl": {"text_vqa": "0.843"}, "qwen2-audio": {"libri": "0.964"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub")
    hub.fill(path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [o for c in cells for o in c.get("outputs", [])]
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


@pytest.mark.parametrize("family", hub.MODELS)
def test_preset(family, home, tmp_path):
    model = hub.MODELS[family]
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    for name in ("run.py", "sizes.yml"):
        shutil.copy(ROOT / "notebooks" / name, project / "notebooks")
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        if file.name[:2] in STAGES:
            shutil.copy(file, project / "notebooks")
    given = ["LIMIT=8", "EVAL_LIMIT=8", "DTYPE=bfloat16"]
    given += ["MAX_PIXELS=1024"] if family == "qwen2-vl" else []
    done = subprocess.run(
        [sys.executable, project / "notebooks/run.py", f"MODEL={model}", f"RUN={tmp_path / 'run'}",
         *given],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    run = tmp_path / "run" / Path(model).name
    start = printed(run / "notebooks/00_start_here.ipynb")
    assert f"{Path(model).name} (checkpoint)" in start
    assert f"benchmarks: {', '.join(BENCHMARKS[family])}" in start
    # Random weights are nowhere near the published figures, and the workbook says so.
    for name, figure in PUBLISHED[family].items():
        (line,) = [x for x in start.splitlines() if x.split()[:1] == [name] and "FAR OFF" in x]
        assert figure in line
    assert "do not trust what follows" in start
    for name in BENCHMARKS[family]:
        (file,) = run.glob(f"scores-{name}-*.nc")
        scores = xr.load_dataarray(file, engine="h5netcdf")
        assert scores.attrs["rows"] == 8 and np.isfinite(scores).all()
    (neurons,) = run.glob("neurons-*.nc")
    assert xr.load_dataarray(neurons, engine="h5netcdf").any()
