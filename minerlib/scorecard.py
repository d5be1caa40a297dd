"""Every claim of every model: findings found by themselves, in notebooks and in run folders.

A notebook measures a finding if its metadata say so, "minerlib": {"finding": "II", "claim": the
paper's claim}; what it measured lies in run folders, as `Workbook.save_finding` left it.
"""

import json
import os
import re
import textwrap
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Self

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from minerlib import inference
from minerlib.inference import FAILS, HOLDS, UNKNOWN, claim, spread
from minerlib.parameters import assigned, declared, listed
from minerlib.shipped import CARD
from minerlib.workbook import MODELS, RESULTS, ROOT, NotApplicable, Workbook, save

COLUMNS = ["finding", "of", "claim", "measured", "null", "p", "verdict", "name", "effect"]
COLUMNS += ["low", "high", "untrained"]
EFFECT = ["effect", "low", "high"]
TWINS = {"smol-qwen2.5-omni-mlp": "smol-qwen2.5-omni"}
"""Grafts whose MLPs learnt from media, and those that differ from them in nothing else."""
BESIDE = ("Q1 taught", "Q7 attribution")
"""Lines that stand with the headlines of the questions: what learning adds, a second selector."""
MARKS = {HOLDS: (2, "yes"), FAILS: (0, "no"), UNKNOWN: (1, "?")}


class Finding(NamedTuple):
    """A notebook that measures a finding: the paper's claim, its file, its default parameters, and
    the heading under which the claims are judged."""

    claim: str
    notebook: str
    parameters: dict[str, Any]
    heading: str = ""

    @property
    def link(self) -> str:
        """The section that judges the claims, as Markdown that JupyterLab follows."""
        return f"[{self.notebook}]({self.notebook}.ipynb#{self.heading.replace(' ', '-')})"


def findings(folder: Path = ROOT / "notebooks") -> dict[str, Finding]:
    """The findings that notebooks measure, by name; ValueError names one that is amiss."""
    found: dict[str, Finding] = {}
    for file in sorted(folder.glob("*.ipynb")):
        notebook = json.loads(file.read_text())
        about = notebook["metadata"].get("minerlib", {})
        if (name := about.get("finding")) is None:
            continue
        tagged = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
        try:
            if name in found:
                raise ValueError(f"finding {name!r} is that of {found[name].notebook}; rename one")
            if not about.get("claim"):
                raise ValueError('its metadata need "claim" beside "finding", in "minerlib"')
            if not tagged:
                raise ValueError("no cell is tagged `parameters`")
            cell = "".join(tagged[0]["source"])
            wb = Workbook.bind({"In": [cell], **assigned(cell)})
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None
        found[name] = Finding(about["claim"], file.stem, wb.parameters, _judged(notebook["cells"]))
    return found


def _judged(cells: list[dict]) -> str:
    """The last heading before a finding is kept."""
    texts = ["".join(cell["source"]) for cell in cells]
    kept = next((i for i, text in enumerate(texts) if ".save_finding(" in text), 0)
    prose = "\n".join(
        t for t, c in zip(texts[:kept], cells, strict=False) if c["cell_type"] == "markdown"
    )
    return (re.findall(r"^#+ (.+)$", prose, re.MULTILINE) or [""])[-1]


class Scorecard:
    """What run folders hold of the findings, in `table`; what they lack, in `missing`.

    runs             folder of run folders, beside what is published
    models           "shipped", "all", or models' names, as a list or with commas
    configurations   "default": runs with the notebooks' own parameters; "newest": each model's
                     last, whatever its parameters; "all": any, a column each
    """

    def __init__(self, runs: str = "runs", models="shipped", configurations: str = "default"):
        self.folder, published = ROOT / runs, ROOT / RESULTS
        if not self.folder.is_dir() and not published.is_dir():
            raise ValueError(f"runs={runs!r}: no such folder; run `make workbook` first")
        if configurations not in ("default", "newest", "all"):
            raise ValueError(f"configurations={configurations!r}: use default, newest or all")
        self.findings = findings()
        shipped = [path.parent.name for path in (ROOT / MODELS).glob(f"*/{CARD}")]
        wanted = {"all": [], "shipped": shipped}.get(str(models), listed(models))
        held, other = {}, []  # a newer one in the place of an older; manifests end in "t.json"
        kept, fresh = "*/finding-*[!t].json", os.environ.get("MINER_FRESH")
        files = [] if fresh else [*published.glob(kept)]
        files += sorted(self.folder.glob(kept), key=os.path.getmtime)
        for file in files:
            value = json.loads(file.read_text())
            changed = self._changed(value)
            asked = models == "all" or value["model"] in wanted
            of = ", ".join([value["model"], *(changed if configurations == "all" else [])])
            if asked and (not changed or configurations != "default"):
                held[value["finding"], of] = value["claims"]
            elif asked:
                other.append(f"{value['finding']} of {', '.join([value['model'], *changed])}")
        if not held:
            makers = ", ".join(finding.notebook for finding in self.findings.values())
            way_out = f"; run {makers}"
            if there := "; ".join(dict.fromkeys(other)):
                way_out = f" with the usual parameters, but {there}: use configurations='all'"
            raise NotApplicable(f"no finding of {models} models in {runs}{way_out}")
        found = {of for _, of in held}
        unmeasured = set(wanted) - {of.split(", ")[0] for of in found}
        none = (
            sorted(unmeasured) if models == "shipped" else []
        )  # no column of what was not asked for
        self.columns = sorted(found | unmeasured - {*none}, key=_grafts_first)
        lack = [key for key in product(self.findings, self.columns) if key not in held]
        why = "not measured, or not applicable; run"
        self.missing = [f"{of}: no finding yet; run with model={MODELS}/{of}" for of in none]
        self.missing += [f"{n} of {of}: {why} {self.findings[n].notebook}" for n, of in lack]
        names = dict.fromkeys([*self.findings, *(name for name, _ in held)])
        cells = [(name, of, held.get((name, of), [])) for name, of in product(names, self.columns)]
        lines = [{"finding": n, "of": of, **line} for n, of, claims in cells for line in claims]
        self.table = pd.DataFrame(lines).reindex(columns=COLUMNS)
        beyond = [line for pair in TWINS.items() if (line := self._taught(*pair))]
        if beyond:
            added = pd.DataFrame(beyond).reindex(columns=COLUMNS[:-1])
            self.table = pd.concat([self.table, added], ignore_index=True)

    @classmethod
    def bind(cls, namespace: dict[str, Any]) -> Self:
        """From a notebook's `globals()`, as `Workbook.bind`."""
        return cls(**declared(namespace, ("runs", "models", "configurations")))

    def _taught(self, of: str, twin: str) -> dict | None:
        """What a graft's MLPs learnt adds to Q1, None where it or its twin was not asked.

        Both were asked the same rows, but errors add as those of different rows do: the interval is
        rather too wide.
        """
        asked = self.table[self.table["name"] == "Q1"].drop_duplicates("of").set_index("of")
        if not {of, twin} <= {*asked.index}:
            return None
        more = inference.less(*(inference.reported(*asked.loc[m, EFFECT]) for m in (of, twin)))
        line = inference.judge("Q1 taught", more, claim("Q1 taught").against)
        table = inference.claims_table("Q1", [line]).assign(of=of)
        return table.iloc[0].to_dict()

    def _changed(self, value: dict) -> list[str]:
        """The parameters in which a finding differs from its notebook's own, as name=value."""
        usual = getattr(self.findings.get(value["finding"]), "parameters", value["parameters"])
        return [f"{k}={v}" for k, v in value["parameters"].items() if usual.get(k, ...) != v]

    @property
    def questions(self) -> pd.DataFrame:
        """Of the table, what answers the reviewers' questions: each one's headline, and BESIDE."""
        names = self.table["name"]
        asked = self.table[names.map(is_question) | names.isin(BESIDE)]
        return asked.sort_values("name", kind="stable")

    def answers(self) -> pd.DataFrame:
        """`questions` in words, a row for each and a column per model: the effect, the verdict."""
        lines = self.questions
        lines = lines.assign(told=lines.apply(answered, axis=1))
        wide = lines.pivot(index=["name", "claim"], columns="of", values="told").fillna("")
        return wide[[of for of in self.columns if of in wide]]

    def title(self, name: str) -> str:
        """A finding and where it is judged, as Markdown."""
        known = self.findings.get(name)
        what = "Question" if is_question(name) else "Finding"
        return f"**{what} {name}**, judged in {known.link if known else 'a notebook not here'}"

    def draw(self, questions: bool = False) -> plt.Figure:
        """The verdicts: a row per claim, a column per model; a cell is what `told` says.

        The paper's claims but for minor ones and rivals, which are other explanations; or those
        on its reviewers' `questions`.
        """
        table = self.table
        if questions:
            table = self.questions
            names = table["name"]
        else:
            other = table["claim"].str.startswith("rival") | table["name"].map(is_minor)
            table = table[~other & ~table["finding"].map(is_question)]
            names = table["finding"]
        rows = (names + ": " + table["claim"]).map(wrapped)
        grid = table.assign(row=rows).drop_duplicates(["row", "of"]).set_index(["row", "of"])
        columns = [of for of in self.columns if of in set(table["of"])]
        shape = {"index": rows.unique(), "columns": columns}
        codes = grid["verdict"].map(lambda v: mark(v)[0]).unstack().reindex(**shape)
        signs = grid.apply(told, axis=1).unstack().reindex(**shape).astype(object).fillna("")
        tall = max(text.count("\n") for text in signs.to_numpy().ravel())
        size = 4.4 + 2.1 * len(columns), 0.7 + (0.25 + 0.1 * tall) * len(signs)
        fig, ax = plt.subplots(figsize=size, layout="none")  # labels are as long as they are
        style = {"annot_kws": {"fontsize": 6, "color": "black"}, "linewidths": 0.8, "fmt": ""}
        style |= {"cmap": ["#D55E00", "#DDDDDD", "#56B4E9"], "vmin": 0, "vmax": 2, "cbar": False}
        sns.heatmap(codes.astype(float), annot=signs, ax=ax, **style)
        ax.set(xlabel="", ylabel="")
        ax.set_xticks(ax.get_xticks(), [of.replace(", ", "\n") for of in columns], rotation=0)
        ax.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
        fig.set_layout_engine("constrained")
        return fig

    def headlines(self) -> str:
        """The findings' headlines as a Markdown table, a column per model that has any."""
        paper = [name for name in self.findings if not is_question(name)]
        firsts = self.table.groupby(["finding", "of"], sort=False).first()
        firsts = firsts[firsts.index.isin(paper, level="finding")]
        cells = firsts["measured"] + "<br>**" + firsts["verdict"] + "**"
        told = cells.unstack("of", fill_value="not measured").sort_index(axis=1)
        lines = [
            ["the paper says", *told, "smallest effect of interest"],
            ["---"] * (2 + len(told.T)),
        ]
        for name in (n for n in paper if n in told.index):
            of = f"{name}: {self.findings[name].claim}"
            lines.append([of, *told.loc[name], f"{claim(name).smallest:g}"])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def save_figure(self, fig: plt.Figure, name: str) -> None:
        """Beside the run folders and, where MINER_FIGURES names a folder, there."""
        save(fig, self.folder / f"figures/{name}.png", name, columns=self.columns)


def _grafts_first(of: str) -> tuple[bool, str]:
    return not of.startswith("smol-"), of


def is_minor(name: object) -> bool:
    """Whether the claim of this name stands in the table alone."""
    return isinstance(name, str) and claim(name).minor


def is_question(name: object) -> bool:
    """Whether it is the name of a question of the paper's reviewers, or of its headline."""
    return bool(re.fullmatch(r"Q\d+", str(name)))


def wrapped(claim: str) -> str:
    """A claim in lines, without numbers of neurons, which differ between models."""
    return textwrap.fill(re.sub(r"\b\d+ (?=neurons)", "", claim), 66)


def told(line: pd.Series) -> str:
    """A cell of the scorecard: the verdict's sign and, where it was measured, the effect with its
    interval, p, null and the same in untrained controls."""
    _, sign = mark(line["verdict"])
    if pd.isna(line["effect"]):
        return sign
    against = [f"p {line['p']}"] if line["p"] else []
    against.append(f"null: {line['null']}")
    if pd.notna(line["untrained"]):
        against.append(f"untrained: {line['untrained']}")
    effect = f"{sign}  {spread(*line[EFFECT], sign='+')}"
    return "\n".join([effect, *textwrap.wrap("; ".join(against), 46)])


def answered(line: pd.Series) -> str:
    """A line's effect with its interval, where it was measured, and its verdict."""
    effect = "" if pd.isna(line["effect"]) else f"{spread(*line[EFFECT], sign='+')} "
    return f"{effect}{line['verdict']}"


def mark(verdict: Any) -> tuple[float, str]:
    """A verdict's colour code and sign; ~ where a number lies close to its boundary."""
    if pd.isna(verdict):
        return float("nan"), ""
    if not (known := [word for word in MARKS if verdict.startswith(word)]):
        raise ValueError(f"verdict {verdict!r} is none of {', '.join(MARKS)}")
    code, sign = MARKS[known[0]]
    return code, sign + ("~" if verdict.endswith("(close)") else "")
