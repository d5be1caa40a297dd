"""Execute the workbook with Papermill: every numbered notebook in order, for each model.

    python notebooks/run.py                                  # both shipped models, into runs/
    python notebooks/run.py model=Qwen/Qwen2-VL-7B-Instruct dtype=bfloat16 limit=500
    python notebooks/run.py params="ratio=0.05 seed=1"       # the same as ratio=0.05 seed=1

Arguments are NAME=VALUE, names in any case, values YAML. `model` takes one or more models; `run` is
where they leave a folder each: a name stands for runs/NAME, a path for itself, and without it they
go to runs/. Any other name is a parameter of the notebooks and reaches those that declare it. An
executed notebook is not executed again while it is newer than the notebook, minerlib, the model and
the data and its parameters are the same, so a run that was stopped picks up where it stopped.

Several models on a machine without accelerator run side by side and share its cores, for small
models gain little from more threads.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import torch
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


def plugins() -> list[Path]:
    """The files of the modules that MINER_PLUGINS names."""
    sys.path.insert(0, str(ROOT))  # where the kernels run
    found = {name: find_spec(name) for name in os.environ.get("MINER_PLUGINS", "").split()}
    if missing := [name for name, spec in found.items() if spec is None]:
        raise SystemExit(
            f"MINER_PLUGINS: no module {', '.join(missing)} in {ROOT.name}/ or on PYTHONPATH"
        )
    return [Path(spec.origin) for spec in found.values()]


def side_by_side(models: Sequence[str], arguments: Sequence[str]) -> None:
    """Run each model in a process of its own, with an equal share of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // len(models)))
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MINER_PROGRESS": "0",
        "MINER_SIDE_BY_SIDE": "1",
    }
    processes = {
        model: subprocess.Popen(
            [sys.executable, ROOT / "notebooks/run.py", *arguments, f"model={model}"],
            env=environment,
        )
        for model in models
    }
    if failed := [model for model, process in processes.items() if process.wait()]:
        raise SystemExit(f"the workbook failed for {', '.join(failed)}; see above")


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    models = given.get("model", MODELS).split()
    labels = [Path(model).name for model in models]
    runs = given.get("run")
    if runs and Path(runs).name == runs:
        runs = f"runs/{runs}"
    parameters = {n: value(text) for n, text in given.items() if n not in ("model", "run")}
    os.chdir(ROOT)  # so that the paths that Papermill records are relative ones
    notebooks = {
        path: declared(path) for path in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
    }
    if unknown := set(parameters) - set().union(*notebooks.values()):
        known = sorted(set().union(*notebooks.values()) | {"run"})
        raise SystemExit(f"no notebook has the parameter {', '.join(sorted(unknown))}; use {known}")
    # A notebook with the parameter `runs` gathers what all models left: it comes once and last.
    last = {path: names for path, names in notebooks.items() if "runs" in names}
    each = {path: names for path, names in notebooks.items() if path not in last}
    if len(models) > 1 and not torch.cuda.is_available():
        side_by_side(models, [a for a in arguments if not a.lower().startswith("model=")])
        models = []

    shared = [*Path("minerlib").glob("*.py"), *plugins()]
    for source in {"data/benchmarks", given.get("source", "data/benchmarks")}:
        shared += Path(source).rglob("*.parquet")
    for model in models:
        run_dir = Path(runs or "runs", Path(model).name)
        everything = {**parameters, "model": model}
        if runs:  # else the notebooks' own default, with which the shipped models refresh figures/
            everything["run_dir"] = run_dir.as_posix()
        weights = [path for path in Path(model).glob("*") if path.is_file()]
        execute(each, run_dir / "notebooks", everything, [*shared, *weights], f"for {model}")
    if "MINER_SIDE_BY_SIDE" not in os.environ:
        everything = {**parameters, "runs": runs or "runs", "models": labels}
        found = [*shared, *Path(runs or "runs").glob("*/finding-*.json")]
        execute(last, Path(runs or "runs", "notebooks"), everything, found, "over all models")


def execute(
    notebooks: dict[Path, set[str]],
    folder: Path,
    everything: dict[str, Any],
    inputs: Sequence[Path],
    what: str,
) -> None:
    """Execute notebooks into a folder, each with the parameters that it declares."""
    folder.mkdir(parents=True, exist_ok=True)
    for notebook, names in notebooks.items():
        output = folder / notebook.name
        chosen = {name: everything[name] for name in everything if name in names}
        if finished(output, chosen, [notebook, *inputs]):
            print(f"{output}: up to date", flush=True)
            continue
        print(f"{output}", flush=True)
        try:
            with timed(folder / "timings.json", notebook.stem) as spent:
                papermill.execute_notebook(
                    notebook,
                    output,
                    chosen,
                    kernel_name="python3",
                    cwd=ROOT,
                    progress_bar=os.environ.get("MINER_PROGRESS") != "0",
                    # Else every kernel warns that the ports of this machine are not encrypted.
                    extra_arguments=["--IPKernelApp.log_level=ERROR"],
                )
        except papermill.PapermillExecutionError as error:
            if error.ename == "NotApplicable":
                print(f"{output}: not applicable {what}: {error.evalue}", flush=True)
                continue
            raise SystemExit(
                f"{notebook} failed {what}: {error.ename}: {error.evalue}\nsee {output}"
            ) from error
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            raise SystemExit(f"{notebook} failed {what}: {reason}\nsee {output}") from error
        print(f"{output}: {spent['seconds']:.0f} s, {spent['peak_memory_mib']} MiB", flush=True)


@contextmanager
def timed(file: Path, name: str) -> Iterator[dict]:
    """Seconds and peak memory of a notebook's kernel, kept in a JSON file beside the others'."""
    spent, over, start = {"peak_memory_mib": 0}, threading.Event(), time.perf_counter()

    def watch() -> None:
        here = psutil.Process()
        while not over.wait(0.2):
            for child in here.children(recursive=True):
                with suppress(psutil.Error):
                    mib = child.memory_info().rss // 2**20
                    spent["peak_memory_mib"] = max(spent["peak_memory_mib"], mib)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield spent
    finally:
        over.set()
        watcher.join()
        spent["seconds"] = round(time.perf_counter() - start, 1)
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {name: spent}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
