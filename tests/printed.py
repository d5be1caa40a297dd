"""The printed numbers of two executions of a notebook, side by side, by stated tolerances.

nbval compares words and structure exactly and sees every number as `#` and every verdict as
VERDICT (tests/nbval_sanitize.cfg). Here, and for nbval by tests/nbval_numbers.py, the numbers
themselves are compared, each by its kind, and verdicts exactly, unless one of the two says that it
is close to its boundary.

    python tests/printed.py runs/tiny-qwen2-vl/notebooks     # against the committed notebooks

Processors round sums differently. What that moves: the last printed digit of a measure; an answer
of a silenced model, and with it a mean over rows; a draw that passes the observed value, and with
it a p; a neuron at the border of a selection, and with it a count. Cells tagged `chaotic` (t-SNE
and what is read off it) are shown and not compared.
"""

from __future__ import annotations

import configparser
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]

TOLERANCE = {  # kind: (absolute, share of the committed number), and one unit of the last digit
    "measure": (0.005, 0.01),
    "interval": (0.01, 0.01),
    "p": (0.02, 0.1),
    "count": (0, 0.02),
}
NUMBER = r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
VERDICT = r"(?i)\b(?:holds in part|holds|does not hold|cannot be told)(?: \(close\))?"
_PARTS = re.compile(f"(?P<verdict>{VERDICT[4:]})|(?P<number>{NUMBER})", re.IGNORECASE)


def skeleton(text: str, before: str = "") -> str:
    """The text as nbval compares it; or as it is after the sections `before` this one."""
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "tests/nbval_sanitize.cfg")
    for name in parser.sections():
        if name == before:
            break
        text = re.sub(parser[name]["regex"], parser[name]["replace"], text)
    return text


def parts(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each number and verdict, in order."""
    ends: set[int] = set()  # where a table's column `p` ends in its lines
    for line in skeleton(text, before="verdicts").splitlines():
        if header := [m.end() for m in re.finditer(r"(?<=\s)p(?=\s|$)", line)]:
            ends = set(header)
        elif not line.strip():
            ends = set()
        for found in _PARTS.finditer(line):
            if found["verdict"]:
                yield "verdict", found[0].lower()
                continue
            before = line[: found.start()]
            if found.end() in ends or re.search(r"\bp\s*[=<>≤≥]?\s*$", before):
                kind = "p"
            elif "." not in found[0] and "e" not in found[0]:
                kind = "count"
            else:
                inside = before.rfind("[") > before.rfind("]")
                kind = "interval" if inside else "measure"
            yield kind, found[0]


def agree(kind: str, committed: str, fresh: str) -> bool:
    """Whether two printed numbers, or verdicts, are the same up to another processor's rounding."""
    if kind == "verdict":
        close = " (close)" in committed or " (close)" in fresh
        return close or committed == fresh
    absolute, share = TOLERANCE[kind]
    digits = len(committed.partition(".")[2].partition("e")[0])
    unit = 10.0**-digits if digits else 0 if abs(float(committed)) < 20 and kind == "count" else 1
    room = absolute + share * abs(float(committed)) + unit
    return abs(float(committed) - float(fresh)) <= room * (1 + 1e-9)


def shown(outputs: Iterable) -> str:
    """The text of a cell's outputs; a stream may come in pieces, cut anywhere."""
    found, stream = "", False
    for output in outputs:
        text = output.get("text", output.get("data", {}).get("text/plain", ""))
        found += "" if stream and output.output_type == "stream" else "\n\n"
        found += text if isinstance(text, str) else "".join(text)
        stream = output.output_type == "stream"
    return found.strip()


def changes(committed: Iterable, fresh: Iterable) -> list[str]:
    """What differs between two executions' outputs of a cell by more than it may, one line each."""
    texts = shown(committed), shown(fresh)
    if skeleton(texts[0]) != skeleton(texts[1]):
        return ["words or structure differ"]
    sides = zip(*(parts(text) for text in texts), strict=False)
    return [f"{kind} {a} is now {b}" for (kind, a), (_, b) in sides if not agree(kind, a, b)]


def compared(path: Path) -> list[nbformat.NotebookNode]:
    """A notebook's code cells, without those that Papermill injected."""
    cells = nbformat.read(path, as_version=4).cells
    tags = "injected-parameters"
    return [c for c in cells if c.cell_type == "code" and tags not in c.metadata.get("tags", [])]


def differences(committed: Path, fresh: Path) -> list[str]:
    """What differs by more than it may, one line each: cell, kind, committed and fresh."""
    pairs = enumerate(zip(compared(committed), compared(fresh), strict=True))
    return [
        f"{committed.stem} code cell {i}: {change}"
        for i, (old, new) in pairs
        if "chaotic" not in old.metadata.get("tags", [])
        for change in changes(old.get("outputs", []), new.get("outputs", []))
    ]


def main(folders: list[str]) -> int:
    wrong = []
    for folder in folders:
        for fresh in sorted(Path(folder).glob("[0-9]*.ipynb")):
            wrong += differences(ROOT / "notebooks" / fresh.name, fresh)
    print("\n".join(wrong) or "every number is within its tolerance")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
