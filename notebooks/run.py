"""Execute the workbook with Papermill: every numbered notebook in order, for each model.

    python notebooks/run.py                                  # both grafts, into runs/
    python notebooks/run.py quick=1                          # a first look; full=1: as committed
    python notebooks/run.py model=Qwen/Qwen2-VL-7B-Instruct dtype=bfloat16 limit=500
    python notebooks/run.py preset=smolvlm-256m              # a model of minerlib/presets.yml
    python notebooks/run.py notebooks=11,13-15               # some; all=00-99
    python notebooks/run.py params="ratio=0.05 seed=1"       # the same as ratio=0.05 seed=1
    python notebooks/run.py processes=4                      # each notebook by so many, one a GPU
    python notebooks/run.py sweep=sweep.csv                  # a table of runs; one=17: one of them

Arguments are NAME=VALUE, names in any case, values YAML. `model` takes one or more models; `run` is
where they leave a folder each: a name stands for runs/NAME, a path for itself, and without it they
go to runs/. `notebooks` are those to run, by number: without it all up to 10, which measure what
the paper says, and the scorecard. How much is computed stands in sizes.yml, for the default run and
for quick=1; full=1 takes the committed notebooks' own parameters, runs all of them and alone finds
what is published in data/results, unless fresh=1. Any other name is a parameter of the notebooks
and reaches those that declare it; executed notebooks of other parameters lie beside those of the
defaults. An executed notebook is not executed again while it is newer than the notebook, minerlib,
the model and the data and its parameters are the same, so a run that was stopped picks up where it
stopped.

With `processes` a notebook's cells are first run by so many processes (`python -m minerlib`), which
share the work, and then by Papermill, which finds what they made. A `sweep` is a table whose
columns are arguments and whose rows are runs: alone it is printed, `one` runs a row of it, so that
any scheduler can take the rows one by one; runs that share a folder share what they have in common.

Several models on a machine without accelerator share its cores, for small models gain little from
more threads: as many notebooks run side by side as there are models, first each model's stages,
then the findings, which wait for nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
import papermill
import psutil
import torch
import yaml

from minerlib.parameters import value
from minerlib.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
MODELS = "data/models/smol-qwen2-vl data/models/smol-qwen2-audio"
NOTEBOOKS = "00-10,20"  # what the paper says; those between ask what its reviewers did
FLAGS = ("quick", "full", "fresh")
SIZES = Path(__file__).with_name("sizes.yml")


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE arguments as {lower-case name: text}; `params` holds several in one."""
    given = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SystemExit(f"{argument!r} is not NAME=VALUE, such as limit=100")
        given |= parse(shlex.split(text)) if name.lower() == "params" else {name.lower(): text}
    return given


def preset(given: dict[str, str]) -> dict[str, str]:
    """The arguments with those of the `preset` they name, into runs/<preset>; the given win."""
    if (name := given.get("preset")) is None:
        return given
    if name not in PRESETS:
        raise SystemExit(f"preset={name!r}: there are {', '.join(PRESETS)}")
    own = {n: json.dumps(v) for n, v in PRESETS[name].parameters.items()}
    rest = {n: text for n, text in given.items() if n != "preset"}
    return {"model": PRESETS[name].model, "run": name, **own, **rest}


def swept(given: dict[str, str]) -> dict[str, str]:
    """The arguments of the row `one` of the table `sweep`; those given besides win."""
    table = pd.read_csv(given["sweep"], dtype=str, keep_default_na=False)
    rows = table.to_dict("records")
    runs = [parse([f"{name}={text}" for name, text in row.items() if text]) for row in rows]
    if "one" not in given:
        lines = [
            f"{i:4} " + shlex.join(f"{n}={t}" for n, t in row.items()) for i, row in enumerate(runs)
        ]
        raise SystemExit("\n".join(lines))
    if not given["one"].isdigit() or int(given["one"]) >= len(runs):
        raise SystemExit(f"one={given['one']}: {given['sweep']} has rows 0 to {len(runs) - 1}")
    rest = {name: text for name, text in given.items() if name not in ("sweep", "one")}
    return runs[int(given["one"])] | rest


def numbered(text: str) -> set[int]:
    """The numbers in "11,13-15"."""
    found: set[int] = set()
    for part in text.replace(",", " ").split():
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise SystemExit(f"notebooks={text!r}: give numbers such as 11,13-15")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def is_finding(notebook: Path) -> bool:
    """Whether it measures a finding, and so reads what the other notebooks, the stages, made."""
    return "finding" in nbformat.read(notebook, as_version=4).metadata.get("minerlib", {})


def suffix(given: dict[str, str]) -> str:
    """What tells executed notebooks of these parameters from others: "-limit=12-seed=1"."""
    text = "".join(f"-{name}={given[name]}" for name in sorted(given))
    safe = re.sub(r"[^\w.,=-]+", "_", text)
    whole = safe == text and len(text) <= 80
    return text if whole else f"{safe[:60]}-{zlib.crc32(text.encode()):08x}"


def finished(output: Path, parameters: dict, inputs: Sequence[Path]) -> bool:
    """Whether the output is a whole run with these parameters, newer than all inputs."""
    if not output.exists():
        return False
    made = nbformat.read(output, as_version=4).metadata
    run = made.get("papermill", {})
    whole = run.get("end_time") and not run.get("exception")
    same = run.get("parameters") == parameters and made.get("minerlib_with") == beside()
    newest = max(path.stat().st_mtime for path in inputs)
    return bool(whole) and same and output.stat().st_mtime > newest


def beside() -> dict[str, str]:
    """What, beside its parameters, decides what a notebook shows."""
    return {name: os.environ.get(name, "") for name in ("MINER_FRESH", "MINER_PLUGINS")}


def plugins() -> list[Path]:
    """The files of the modules that MINER_PLUGINS names."""
    sys.path.insert(0, str(ROOT))  # where the kernels run
    found = {name: find_spec(name) for name in os.environ.get("MINER_PLUGINS", "").split()}
    if missing := [name for name, spec in found.items() if spec is None]:
        raise SystemExit(
            f"MINER_PLUGINS: no module {', '.join(missing)} in {ROOT.name}/ or on PYTHONPATH; "
            "names are separated by blanks"
        )
    return [Path(spec.origin) for spec in found.values()]


class Task(NamedTuple):
    """Notebooks to execute into a folder, one after the other until one fails."""

    notebooks: dict[Path, set[str]]  # with the names that each declares
    folder: Path
    parameters: dict[str, Any]
    inputs: Sequence[Path]
    what: str
    size: dict[str, dict[str, Any]] = {}
    processes: int = 1

    def chosen(self, notebook: Path) -> dict[str, Any]:
        """The parameters of a notebook: of the size for all, for this one, and as given."""
        size = {**self.size.get("all", {}), **self.size.get(notebook.stem[:2], {})}
        given = {**size, **self.parameters}
        return {name: given[name] for name in given if name in self.notebooks[notebook]}


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    given = preset(swept(given) if "sweep" in given else given)
    many = given.pop("processes", "1")
    if not many.isdigit() or many == "0":
        raise SystemExit(f"processes={many!r}: give a number of processes, such as 2")
    models = given.get("model", MODELS).split()
    run = given.get("run", "")
    runs = Path("runs", run) if Path(run).name == run else Path(run)
    flags = {name: bool(value(given.get(name, "0"))) for name in FLAGS}
    sizes = yaml.safe_load(SIZES.read_text())
    size = {} if flags["full"] else sizes["quick" if flags["quick"] else "default"]
    if flags["fresh"] or not flags["full"]:
        os.environ["MINER_FRESH"] = "1"
    own = ("model", "run", "fresh", "notebooks")
    texts = {name: text for name, text in given.items() if name not in own}
    parameters = {n: value(text) for n, text in texts.items() if n not in FLAGS}
    folder = "notebooks" if run else f"notebooks{suffix(texts)}"
    os.chdir(ROOT)  # so that the paths that Papermill records are relative ones
    wanted = numbered(given.get("notebooks", "00-99" if flags["full"] else NOTEBOOKS))
    files = sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
    files = [path for path in files if int(path.name[:2]) in wanted]
    if not files:
        raise SystemExit(f"notebooks={given['notebooks']!r}: there are none of these numbers")
    notebooks = {path: set(papermill.inspect_notebook(str(path))) for path in files}
    known = set().union(*notebooks.values())
    if unknown := sorted(set(parameters) - known):
        use = sorted(known | {"run", "notebooks", *FLAGS})
        raise SystemExit(f"no notebook has the parameter {', '.join(unknown)}; use {use}")
    # A notebook with the parameter `runs` gathers what all models left: it comes once and last.
    last = {path: names for path, names in notebooks.items() if "runs" in names}
    each = {path: names for path, names in notebooks.items() if path not in last}
    findings = {path: names for path, names in each.items() if is_finding(path)}
    stages = {path: names for path, names in each.items() if path not in findings}

    shared = [path for path in Path("minerlib").rglob("*.*") if path.suffix != ".pyc"]
    shared += [*plugins(), *Path("data").glob("*.txt"), *Path("data/neurons").rglob("*.yml")]
    for source in {"data/benchmarks", given.get("source", "data/benchmarks")}:
        shared += Path(source).rglob("*.parquet")
    tasks = []
    for model in models:
        run_dir = runs / Path(model).name
        everything = {**parameters, "model": model}
        if run:  # else the notebooks' own default
            everything["run_dir"] = run_dir.as_posix()
        inputs = [*shared, *(path for path in Path(model).glob("*") if path.is_file())]
        what = f"for {model}"
        tasks.append(Task(stages, run_dir / folder, everything, inputs, what, size, int(many)))

    with pool(1 if torch.cuda.is_available() else len(models)) as over:
        failures = list(over(execute, tasks))
        going = [t for t, failure in zip(tasks, failures, strict=True) if not failure]
        later = [t._replace(notebooks={p: n}) for p, n in findings.items() for t in going]
        failed = [text for text in (*failures, *over(execute, later)) if text]
    if not failed:
        names = [Path(model).name for model in models]
        everything = {**parameters, "runs": runs.as_posix(), "models": names}
        everything["configurations"] = "newest" if parameters or size else "default"
        found = [*shared, *runs.glob("*/finding-*.json")]
        text = execute(Task(last, runs / folder, everything, found, "over all models"))
        failed = [text] if text else []
    if failed:
        raise SystemExit("\n".join(failed))


@contextmanager
def pool(workers: int) -> Iterator:
    """A `map` over so many processes, each with an equal share of the cores."""
    if workers == 1:
        yield map
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    os.environ["TQDM_DISABLE"] = "1"  # the bars of several would mix
    with ProcessPoolExecutor(workers) as processes:
        yield processes.map


def execute(task: Task) -> str | None:
    """Execute a task's notebooks that are not up to date; what failed, if anything did."""
    task.folder.mkdir(parents=True, exist_ok=True)
    for notebook in task.notebooks:
        output, chosen = task.folder / notebook.name, task.chosen(notebook)
        if finished(output, chosen, [notebook, *task.inputs]):
            say(f"{output}: up to date")
            continue
        say(f"{output}")
        try:
            with peak_memory() as peak:
                if task.processes > 1:
                    ahead(notebook, chosen, task.processes)
                done = papermill.execute_notebook(
                    notebook,
                    output,
                    chosen,
                    kernel_name="python3",
                    cwd=ROOT,
                    progress_bar=os.environ.get("TQDM_DISABLE") != "1",
                    # Else kernels say that their ports are not encrypted and that they were
                    # interrupted, which is how they are shut down.
                    extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
                )
        except papermill.PapermillExecutionError as error:
            if error.ename == "NotApplicable":
                say(f"{output}: not applicable {task.what}: {error.evalue}")
                continue
            reason = f"{error.ename}: {error.evalue}"
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
        else:
            done.metadata |= {"peak_memory_mib": peak[0], "minerlib_with": beside()}
            nbformat.write(done, output)
            say(f"{output}: {done.metadata.papermill.duration:.0f} s, {peak[0]} MiB")
            outputs = [out for cell in done.cells for out in cell.get("outputs", [])]
            told = "\n".join(out.get("text", "") for out in outputs)  # a bar ends in no new line
            for page in re.findall(r"^open \S+\.html", told, re.MULTILINE):
                say(page)
            continue
        failure = f"{notebook} failed {task.what}: {reason}\nsee {output}"
        say(failure)  # now, and once more when all others are done
        return failure
    return None


def ahead(notebook: Path, parameters: dict[str, Any], processes: int) -> None:
    """Run the notebook's cells in so many processes; what they compute is kept for Papermill."""
    launch = f"-m torch.distributed.run --standalone --nproc-per-node={processes} -m minerlib"
    given = [f"{name}={json.dumps(value)}" for name, value in parameters.items()]
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // processes))}
    command = [sys.executable, *launch.split(), str(notebook), *given]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"one of {processes} processes failed: its rank and cause stand above")


def say(line: str) -> None:
    """Print a line in one piece, for other processes print too."""
    print(f"{line}\n", end="", flush=True)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Peak memory in MiB of the kernel that this process starts meanwhile."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        here = psutil.Process()
        while not over.wait(0.2):
            for child in here.children(recursive=True):
                with suppress(psutil.Error):
                    peak[0] = max(peak[0], child.memory_info().rss // 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


if __name__ == "__main__":
    main(sys.argv[1:])
