"""The bench's lines as one figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from minerlib import plots

BLUE, GREY = "#0072B2", "#444444"
MARKERS = {"tokens": "o", "layers": "s", "neurons": "^"}


def draw(results: dict, folder: Path) -> None:
    """Write figures/bench.png: ratios with their targets, extra memory, growth."""
    here = [part for name, part in results.items() if name != "accelerator"]
    lines = [row for section in here for row in section["lines"]]
    plots.style()
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.8), width_ratios=(1.5, 1, 1))
    _ratios([r for r in lines if r["unit"] == "x" and r["target"]], left)
    _memory([r for r in lines if "tokens" in r and r["rows"] == 1], middle)
    _growth([r for r in lines if r["setting"].startswith("with ")], right)
    fig.savefig(folder / "bench.png", dpi=150, bbox_inches="tight")
    plt.close(fig)


def _ratios(rows: list[dict], ax) -> None:
    y = np.arange(len(rows))[::-1]
    for at, row in zip(y, rows, strict=True):
        ax.plot([row["low"], row["high"]], [at, at], color=BLUE, lw=2)
        ax.plot(row["value"], at, "o", color=BLUE)
        ax.plot(row["target"], at, "|", color=GREY, ms=10)
    names = [f"{r['what']}: {r['setting']}" for r in rows]
    ax.set_yticks(y, names, fontsize=6)
    ax.axvline(1, color=GREY, lw=0.6, ls=":")
    ax.set(xlabel="time over its floor (bar: quartiles; tick: target)", title="Ratios")


def _memory(rows: list[dict], ax) -> None:
    if rows:
        tokens = [r["tokens"] for r in rows]
        ax.plot(tokens, [r["plain"] for r in rows], "o-", color=GREY, label="forward")
        ax.plot(tokens, [r["scored"] for r in rows], "s--", color=BLUE, label="scoring")
        ax.legend()
    ax.set(xscale="log", xlabel="tokens of a prompt", ylabel="peak memory / MiB", ylim=(0, None))
    ax.set_title("Memory, one process")


def _growth(rows: list[dict], ax) -> None:
    for row in rows:
        name = row["setting"].removeprefix("with ")
        x = np.array([float(v) for v in row["points"]])
        seconds = np.array(list(row["points"].values()))
        label = f"{name}: exponent {row['value']:.2f}"
        ax.plot(x / x[0], seconds / seconds[0], MARKERS[name] + "-", label=label)
    ax.set(xscale="log", yscale="log", xlabel="times the smallest", ylabel="seconds, relative")
    ax.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    ax.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    ax.minorticks_off()
    ax.set_title("Growth, one row")
    if rows:
        ax.legend(fontsize="x-small", loc="lower right")
