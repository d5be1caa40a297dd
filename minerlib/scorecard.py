"""Every claim of every model: findings found by themselves, in notebooks and in run folders.

A notebook measures a finding if its metadata say so, "minerlib": {"finding": "II", "claim": the
paper's claim}; what it measured lies in run folders, as `Workbook.save_finding` left it.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from minerlib.parameters import assigned, declared
from minerlib.plots import save
from minerlib.workbook import ROOT, SHIPPED, NotApplicable, Workbook, tracked

COLUMNS = ["finding", "of", "claim", "measured", "null", "p", "verdict"]
MARKS = {"holds": (2, "yes"), "does not hold": (0, "no"), "cannot be told": (1, "?")}


class Finding(NamedTuple):
    """A notebook that measures a finding: the paper's claim, its file, its default parameters."""

    claim: str
    notebook: str
    parameters: dict[str, Any]


def findings(folder: Path = ROOT / "notebooks") -> dict[str, Finding]:
    """The findings that notebooks measure, by name, in the notebooks' order."""
    found = {}
    for file in sorted(folder.glob("*.ipynb")):
        notebook = json.loads(file.read_text())
        about = notebook["metadata"].get("minerlib", {})
        if "finding" in about:
            tagged = (c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
            wb = Workbook.bind({"In": [cell := "".join(next(tagged)["source"])], **assigned(cell)})
            found[about["finding"]] = Finding(about["claim"], file.stem, wb.parameters)
    return found


class Scorecard:
    """What run folders hold of the findings.

    runs             folder of run folders
    models           "shipped", "all", or models' names, as a list or with commas
    configurations   "default": runs with the notebooks' own parameters; "all": any, a column each
    """

    def __init__(self, runs="runs", models="shipped", configurations="default"):
        self.folder = ROOT / runs
        if not self.folder.is_dir():
            raise ValueError(f"runs={runs!r}: no such folder; run `make workbook` first")
        if configurations not in ("default", "all"):
            raise ValueError(f"configurations={configurations!r}: use default or all")
        self.findings = findings()
        names = models.split(",") if isinstance(models, str) else models
        self.models = [name.strip() for name in names]
        if models == "shipped":
            self.models = sorted(path.name for path in (ROOT / SHIPPED[0]).glob("*/"))
        found = [
            value for value in self._saved() if models == "all" or value["model"] in self.models
        ]
        held = {}  # newest last
        for value in found:
            given = self._given(value)
            if not given or configurations == "all":
                held[value["finding"], ", ".join([value["model"], *given])] = value["claims"], given
        if not held:
            raise NotApplicable(
                f"no finding of {models} with {configurations} parameters in {runs}: run the "
                f"notebooks {', '.join(f.notebook for f in self.findings.values())}"
            )
        changed = {of: given for (_, of), (_, given) in held.items()}
        self.columns = sorted({*changed, *(() if models in ("shipped", "all") else self.models)})
        self.missing = [
            f"{name} of {of}: not measured, or not applicable; run {finding.notebook}"
            for name, finding in self.findings.items()
            for of in self.columns
            if (name, of) not in held and self._wants(finding, changed.get(of, []))
        ]
        order = [*self.findings, *sorted({name for name, _ in held} - self.findings.keys())]
        lines = [
            {"finding": name, "of": of, **line}
            for name in order
            for of in self.columns
            for line in held.get((name, of), ([],))[0]
        ]
        self.table = pd.DataFrame(lines).reindex(columns=COLUMNS)

    @classmethod
    def bind(cls, namespace: dict[str, Any]) -> Scorecard:
        """From a notebook's `globals()`, as `Workbook.bind`."""
        return cls(**declared(namespace, ("runs", "models", "configurations")))

    def _saved(self) -> list[dict]:
        """All findings in the run folders, the oldest first."""
        files = sorted(self.folder.glob("*/finding-*.json"), key=lambda p: p.stat().st_mtime)
        files = [file for file in files if not file.name.endswith(".manifest.json")]
        return [json.loads(file.read_text()) for file in files]

    def _given(self, value: dict) -> list[str]:
        """The parameters in which it differs from its notebook's own, as name=value."""
        finding = self.findings.get(value["finding"])
        usual = finding.parameters if finding else value["parameters"]
        missing = object()
        return [f"{k}={v}" for k, v in value["parameters"].items() if usual.get(k, missing) != v]

    @staticmethod
    def _wants(finding: Finding, given: list[str]) -> bool:
        """Whether the notebook has any of the parameters that a column differs in."""
        return not given or any(text.partition("=")[0] in finding.parameters for text in given)

    def draw(self) -> Figure:
        """All verdicts: a row per claim, a column per model and configuration."""
        # Numbers of neurons differ between models: without them their rows meet.
        claims = self.table["claim"].str.replace(r"\b\d+ (?=neurons)", "", regex=True)
        whole = self.table["finding"] + ": " + claims
        rows = whole.map(lambda text: textwrap.fill(text, 66, subsequent_indent="    "))
        grid = self.table.assign(row=rows).drop_duplicates(["row", "of"])
        grid = grid.pivot(index="row", columns="of", values="verdict")
        grid = grid.reindex(index=rows.unique(), columns=self.columns)
        codes = grid.map(lambda v: float("nan") if pd.isna(v) else mark(v)[0]).astype(float)
        signs = grid.map(lambda v: "" if pd.isna(v) else mark(v)[1])
        tall = sum(1.3 + 0.75 * row.count("\n") for row in grid.index)
        fig, ax = plt.subplots(figsize=(4.6 + 1.1 * len(self.columns), 0.9 + 0.17 * tall))
        colours = ListedColormap(["#D55E00", "#DDDDDD", "#56B4E9"])
        text = {"fontsize": 8, "color": "black"}
        sns.heatmap(
            codes, ax=ax, vmin=0, vmax=2, cmap=colours, annot=signs, fmt="", cbar=False,
            linewidths=0.8, annot_kws=text,
        )  # fmt: skip
        ax.set(xlabel="", ylabel="")
        ax.set_yticks(ax.get_yticks(), grid.index, ha="left")
        ax.set_xticks(ax.get_xticks(), [of.replace(", ", "\n") for of in self.columns], rotation=0)
        ax.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
        ax.tick_params(axis="y", pad=268)
        begins = [row.split(":")[0] for row in grid.index]
        for i in range(1, len(begins)):
            if begins[i] != begins[i - 1]:
                ax.axhline(i, color="black", lw=1)
        return fig

    def save_figure(self, fig: Figure, name: str) -> None:
        """Beside the run folders and, where MINER_FIGURES names a folder, there."""
        files = [self.folder / f"figures/{name}.png", *tracked(f"{name}.png")]
        save(fig, files, {"columns": self.columns})


def mark(verdict: str) -> tuple[int, str]:
    """A verdict's colour code and sign; ~ where a number lies close to its boundary."""
    code, sign = next((v for key, v in MARKS.items() if verdict.startswith(key)), (1, "?"))
    return code, sign + ("~" if verdict.endswith("(close)") else "")
