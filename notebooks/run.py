"""Execute the workbook with Papermill: every numbered notebook in order, for each model.

    python notebooks/run.py                                  # both shipped models, into runs/
    python notebooks/run.py model=Qwen/Qwen2-VL-7B-Instruct dtype=bfloat16 limit=500
    python notebooks/run.py params="ratio=0.05 seed=1"       # the same as ratio=0.05 seed=1

Arguments are NAME=VALUE, names in any case, values YAML. `model` takes one or more models and `run`
the folder that holds a folder for each; any other name is a parameter of the notebooks and reaches
those that declare it. An executed notebook is not executed again while it is newer than the
notebook, minerlib, the model and the data and its parameters are the same, so a run that was
stopped picks up where it stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODELS = "data/models/tiny-qwen2-vl data/models/tiny-qwen2-audio"


def value(text: str) -> Any:
    """A value as YAML; JSON first, for to YAML 1.1 a number such as 1e-3 is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return yaml.safe_load(text)


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE arguments as {lower-case name: text}; `params` holds several in one."""
    given = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SystemExit(f"{argument!r} is not NAME=VALUE, such as limit=100")
        given |= parse(shlex.split(text)) if name.lower() == "params" else {name.lower(): text}
    return given


def declared(notebook: Path) -> set[str]:
    """The names that the notebook's parameters cell assigns."""
    return set(papermill.inspect_notebook(str(notebook)))


def finished(output: Path, parameters: dict, inputs: Sequence[Path]) -> bool:
    """Whether the output is a whole run with these parameters, newer than all inputs."""
    if not output.exists():
        return False
    run = nbformat.read(output, as_version=4).metadata.get("papermill", {})
    whole = run.get("end_time") and not run.get("exception")
    newest = max(path.stat().st_mtime for path in inputs)
    return bool(whole) and run["parameters"] == parameters and output.stat().st_mtime > newest


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    models = given.pop("model", MODELS).split()
    runs = Path(given.pop("run", "runs"))
    parameters = {name: value(text) for name, text in given.items()}

    os.chdir(ROOT)  # so that the paths that Papermill records are relative ones
    notebooks = {path: declared(path) for path in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))}
    if unknown := set(parameters) - set().union(*notebooks.values()):
        known = sorted(set().union(*notebooks.values()) | {"run"})
        raise SystemExit(f"no notebook has the parameter {', '.join(sorted(unknown))}; use {known}")

    shared = [*Path("minerlib").glob("*.py"), *Path("data/benchmarks").rglob("*.parquet")]
    for model in models:
        run_dir = runs / Path(model).name
        folder = run_dir / "notebooks"
        folder.mkdir(parents=True, exist_ok=True)
        everything = {**parameters, "model": model, "run_dir": run_dir.as_posix()}
        weights = [path for path in Path(model).glob("*") if path.is_file()]
        for notebook, names in notebooks.items():
            output = folder / notebook.name
            chosen = {name: everything[name] for name in everything if name in names}
            if finished(output, chosen, [notebook, *shared, *weights]):
                print(f"{output}: up to date", flush=True)
                continue
            print(f"{output}", flush=True)
            try:
                papermill.execute_notebook(
                    notebook, output, chosen, kernel_name="python3", cwd=ROOT
                )
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                raise SystemExit(f"{notebook} failed for {model}: {reason}\nsee {output}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
