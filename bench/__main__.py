"""How close minerlib comes to its floors: one table, a chart and figures/bench.json.

    python -m bench                      # every section
    python -m bench scoring memory       # these; the others keep what they last measured
    python -m bench --quick scoring      # without the largest prompts

All speeds are ratios of two sides that alternate within one run: the median of the rounds, with
quartiles. Run it with nothing else running. `peers` needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import torch
import transformers
import xarray as xr
from tqdm.auto import tqdm

import minerlib as ml
from book.tables import markdown, placed
from minerlib import scoring
from minerlib.selection import STRATEGIES

from . import charts, jobs, peers
from .accelerator import accelerator
from .harness import (
    REAL,
    ROOT,
    TEXT,
    alone,
    alternate,
    exponent,
    footprint,
    generate,
    line,
    mine,
    prompt,
    ratio,
    real_width,
    rows_of,
    scored_and_plain,
    stand_in,
    two_percent,
)

JSON = ROOT / "figures/bench.json"
MODELS = tuple(TEXT)
BENCHMARK = {"tiny-qwen2-vl": "text_vqa", "tiny-qwen2-audio": "libri"}
SHAPES = [(320, 1), (320, 4), (1280, 1), (1280, 4)]  # tokens, batch


# --- sections ------------------------------------------------------------------------------------


def at_width(name: str, shapes: list[tuple[int, int]], rounds: int) -> list[dict]:
    """All five metrics and all sets over the same prompts' plain forward pass, at real width."""
    mllm, found = real_width(name), []
    for tokens, batch in shapes:
        sides = scored_and_plain(mllm, prompt(mllm, tokens, batch))
        setting = f"{REAL[name]}, {tokens} tokens x {batch}"
        found.append(ratio("scoring / forward", setting, alternate(sides, rounds), 1.05))
    return found


def scoring_cost(rounds: int) -> list[dict]:
    """At real width, and on the stand-ins."""
    found = []
    for name in MODELS:
        found += at_width(name, SHAPES, rounds)
        mllm = stand_in(name)
        sides = scored_and_plain(mllm, mllm.encode(rows_of(BENCHMARK[name], 32)))
        setting = f"{name}, 32 rows"
        found.append(ratio("scoring / forward", setting, alternate(sides, 5 * rounds), 1.4))
    return found


def long_prompts(rounds: int) -> list[dict]:
    """At real width, one prompt of 4096 tokens."""
    return [x for name in MODELS for x in at_width(name, [(4096, 1)], max(3, rounds // 2))]


def silencing_cost(rounds: int) -> list[dict]:
    """Generation with 2 % silenced by hooks, or in an exported checkpoint, over a plain one's."""
    found = []
    for name in MODELS:
        for mllm, setting, target in (
            (real_width(name), REAL[name], 1.02),
            (stand_in(name), name, 1.10),
        ):
            tiny = target > 1.05
            inputs = mllm.encode(rows_of(BENCHMARK[name], 8)) if tiny else prompt(mllm, 320)
            neurons = two_percent(mllm)

            def silenced(mllm=mllm, inputs=inputs, neurons=neurons):
                with ml.deactivate(mllm, neurons):
                    generate(mllm, inputs)

            def plain(mllm=mllm, inputs=inputs):
                generate(mllm, inputs)

            seconds = alternate({"silenced": silenced, "plain": plain}, rounds * (5 if tiny else 1))
            found.append(ratio("silenced / plain generation", setting, seconds, target))
            if not tiny:
                continue
            with tempfile.TemporaryDirectory() as folder:
                exported = ml.load(ml.export(mllm, neurons, folder))
                answers = exported.generate(inputs, 8)
                with ml.deactivate(mllm, neurons):
                    same = answers == mllm.generate(inputs, 8)

                def baked(mllm=exported, inputs=inputs):
                    generate(mllm, inputs)

                seconds = alternate({"exported": baked, "plain": plain}, rounds * 5)
            setting = f"{name}, {'the same' if same else 'OTHER'} answers as with hooks"
            found.append(ratio("exported / plain generation", setting, seconds, 1.02))
    return found


LENGTHS = (256, 1024, 4096, 16384)


def memory(rounds: int) -> list[dict]:
    """Peak memory of scoring over that of a plain forward pass, each in a process of its own."""
    found = []
    for tokens, rows in [(n, 1) for n in LENGTHS] + [(1024, 20)]:
        layer, plain = alone(footprint, tokens, rows, False)
        _, scored = alone(footprint, tokens, rows, True)
        accumulators = 2 * 5 * 7 * 5504 * 4
        allowed = (2 * layer + accumulators) / 2**20
        setting = f"hidden 1024 x 5504 neurons, {tokens} tokens" + f", {rows} rows" * (rows > 1)
        found.append(
            line("scoring - forward, peak memory", setting, scored - plain, "MiB", allowed,
                 tokens=tokens, rows=rows, plain=plain, scored=scored)
        )  # fmt: skip
    return found


def growth(rounds: int) -> list[dict]:
    """How the seconds of scoring one row grow; the exponent of a fit on logarithms."""
    size = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = {"tokens": 512, "layers": 2, "neurons": 4096}
    steps = {"tokens": (256, 512, 1024, 2048), "layers": (1, 2, 4, 8)}
    steps["neurons"] = (2048, 4096, 8192, 16384)
    found = []
    for what, values in steps.items():
        sides = {}
        for value in values:
            now = base | {what: value}
            mllm = real_width("tiny-qwen2-vl", now["layers"], intermediate_size=now["neurons"],
                              **size)  # fmt: skip
            inputs = prompt(mllm, now["tokens"])
            sides[value] = lambda mllm=mllm, inputs=inputs: mine(mllm, inputs)
        seconds = {v: float(np.median(s)) for v, s in alternate(sides, rounds).items()}
        found.append(line("growth of scoring", f"with {what}", exponent(seconds), "exponent",
                          points=seconds))  # fmt: skip
    mllm = stand_in("tiny-qwen2-vl")
    benches = {n: rows_of(BENCHMARK["tiny-qwen2-vl"], n) for n in (32, 64, 128, 256)}
    sides = {
        n: lambda bench=bench: ml.score(mllm, bench, batch_size=32) for n, bench in benches.items()
    }
    times = alternate(sides, max(3, rounds // 2))
    seconds = {n: float(np.median(s)) / n for n, s in times.items()}
    found.append(line("growth of scoring", "seconds per row with rows", exponent(seconds),
                      "exponent", 0.05, points=seconds))  # fmt: skip
    return found


def selection(rounds: int) -> list[dict]:
    """Each strategy at the size of Qwen2-VL-7B, on one core."""
    rng = np.random.default_rng(0)
    sets = list(ml.separation.SETS)
    values = rng.random((5, len(sets), 28, 18944), dtype=np.float32)
    coords = {"metric": list(scoring.METRICS), "modality": sets}
    coords["samples"] = ("modality", np.ones(len(sets), int))
    scores = xr.DataArray(values, coords, ("metric", "modality", "layer", "neuron"))
    sides = {s: lambda s=s: ml.select(scores, strategy=s) for s in STRATEGIES}
    seconds = alternate(sides, rounds)
    return [
        line("selection of 2 %", f"{name}, 5 x 5 x 28 x 18944", np.median(s), "s", 0.5,
             low=s.min(), high=s.max())
        for name, s in seconds.items()
    ]  # fmt: skip


def plain_way(rounds: int) -> list[dict]:
    """The formulas as they read, one row at a time with 128 generated tokens, over minerlib."""
    from tests import reference

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            bench = rows_of(BENCHMARK[name], 8)
            for mllm, setting in ((real_width(name, 2), REAL[name]), (stand_in(name), name)):
                rows = bench if setting == name else bench[:1]
                sides = {
                    "plain": lambda mllm=mllm, rows=rows: reference.plain_score(
                        mllm, list(rows), Path(folder, "sums.pt")
                    ),
                    "minerlib": lambda mllm=mllm, rows=rows: ml.score(mllm, rows),
                }
                seconds = alternate(sides, 3 if setting != name else rounds)
                setting = f"{setting}, {len(rows)} row{'s' * (len(rows) > 1)} of {bench.name}"
                found.append(ratio("plain way / minerlib", setting, seconds))
    return found


def notebooks(rounds: int) -> list[dict]:
    """Seconds and peak memory of every notebook, as the last `make workbook` left them."""
    found, starts, ends = [], [], []
    for file in sorted((ROOT / "runs").glob("*/notebooks/*.ipynb")):
        noted = nbformat.read(file, as_version=4).metadata
        if "peak_memory_mib" not in noted:  # failed, or did not apply to the model
            continue
        setting = f"{file.stem}, {file.parent.parent.name}"
        found.append(line("notebook", setting, noted.papermill.duration, "s",
                          memory=noted["peak_memory_mib"]))  # fmt: skip
        starts.append(datetime.fromisoformat(noted.papermill.start_time))
        ends.append(datetime.fromisoformat(noted.papermill.end_time))
    if not found:
        raise SystemExit("no executed notebooks in runs/: run `make workbook` first")
    whole = (max(ends) - min(starts)).total_seconds()
    found.append(line("workbook", "both models, side by side", whole, "s", 2700))
    return found


SECTIONS = {
    "scoring": scoring_cost,
    "long": long_prompts,
    "silencing": silencing_cost,
    "jobs": jobs.whole_jobs,
    "conditions": jobs.conditions,
    "loading": jobs.loading,
    "processes": jobs.two_processes,
    "memory": memory,
    "growth": growth,
    "selection": selection,
    "plain": plain_way,
    "peers": peers.capture,
    "job": peers.whole_job,
    "accelerator": accelerator,
    "notebooks": notebooks,
}


def machine() -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "minerlib": version("minerlib"),
    }


def table(results: dict) -> pd.DataFrame:
    """All lines of all sections, as pages and terminal show them."""
    rows = [row for name in SECTIONS for row in results.get(name, {}).get("lines", [])]
    columns = ["what", "setting", "value", "unit", "low", "high", "target", "met", "memory"]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    unit = frame["unit"].replace({"x": "", "exponent": ""})
    frame["value"] = [
        f"{v:.3g} {u}".strip() + (f", {m:+.0f} MiB" if pd.notna(m) else "")
        if pd.notna(v)
        else "not supported"
        for v, u, m in zip(frame["value"].astype(float), unit, frame["memory"], strict=True)
    ]
    frame["spread"] = [
        f"{a:.3g} to {b:.3g}" if pd.notna(a) else "" for a, b in frame[["low", "high"]].values
    ]
    frame["target"] = [f"{t:.3g}" if pd.notna(t) else "" for t in frame["target"]]
    frame["met"] = frame["met"].map({True: "yes", False: "no"}).fillna("")
    return frame[["what", "setting", "value", "spread", "target", "met"]]


BRIEF = (
    ("scoring / forward", "Qwen2-VL-7B width, 1280 tokens x 4"),
    ("scoring / forward", "Qwen2-VL-7B width, 1280 tokens x 1"),
    ("silenced / plain generation", "Qwen2-VL-7B width"),
    ("scoring - forward, peak memory", "hidden 1024 x 5504 neurons, 4096 tokens"),
    ("selection of 2 %", "LA_MU, 5 x 5 x 28 x 18944"),
    ("plain way / minerlib", "Qwen2-VL-7B width, 1 row of text_vqa"),
)
"""The lines that README shows; all are in book/speed.md."""


def brief(results: dict) -> str:
    """README's six lines."""
    found = table(results).set_index(["what", "setting"], drop=False)
    return markdown(found.loc[list(BRIEF)])


def whole(results: dict) -> str:
    """The table as book/speed.md shows it, and the machine's name."""
    apart = ("notebooks", "accelerator")
    found = table({name: part for name, part in results.items() if name not in apart})
    lines = [_where(results["scoring"]["machine"]), "", markdown(found)]
    if "accelerator" in results:
        there = {"accelerator": results["accelerator"]}
        lines += ["", _where(results["accelerator"]["machine"]), "", markdown(table(there))]
    if "notebooks" in results:
        *parts, last = results["notebooks"]["lines"]
        spent = [
            [*row["setting"].split(", "), f"{row['value']:.0f}", str(row["memory"])]
            for row in parts
        ]
        names = ["notebook", "model", "seconds", "peak memory, MiB"]
        models = " and ".join(dict.fromkeys(model for _, model, *_ in spent))
        lines += ["", f"A workbook of {models} took {last['value'] / 60:.1f} minutes.", ""]
        lines += [markdown(pd.DataFrame(spent, columns=names))]
    return "\n".join(lines)


def _where(machine: dict) -> str:
    return (
        f"Measured on {machine['cpu']}, {machine['cores']} cores, {machine['device']}; torch "
        f"{machine['torch']}, transformers {machine['transformers']}."
    )


PAGES = {ROOT / "README.md": brief, ROOT / "book/speed.md": whole}


def shown(page: Path, results: dict) -> str:
    """A page with its table as it should stand there."""
    return placed(page, "bench", PAGES[page](results))


def main() -> None:
    """Measure, print, and write figures/bench.json, its chart and the tables of `PAGES`."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="leave out the largest prompts")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if arguments.quick:
        del SHAPES[3:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = json.loads(JSON.read_text()) if JSON.exists() else {}
    off = os.environ.get("TQDM_DISABLE") == "1"
    absent = {"long"} if arguments.quick else set()
    absent |= set() if torch.cuda.is_available() else {"accelerator"}
    here = [name for name in SECTIONS if name not in absent]
    for name in tqdm(arguments.sections or here, desc="bench", disable=off):
        lines = SECTIONS[name](arguments.rounds)
        results[name] = {"machine": machine(), "rounds": arguments.rounds, "lines": lines}
        part = JSON.with_suffix(".part")  # a section that is measured is kept
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(JSON)
        print(table({name: results[name]}).to_string(index=False), flush=True)
    charts.draw(results, JSON.parent)
    for page in PAGES:
        page.write_text(shown(page, results))


if __name__ == "__main__":
    main()
