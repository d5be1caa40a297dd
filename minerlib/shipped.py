"""What stands beside a model's weights: a card, and for a graft the checkpoint made of its parts.

A folder may hold `model.yml` (`Card`), which changes no number by itself. A graft's folder tracks
only what was trained; `make models` assembles the checkpoint in a subfolder, with a note of what
it is made of.
"""

import json
from glob import glob
from pathlib import Path

import pydantic
import yaml

from minerlib.artifacts import file_hash

CARD, GRAFT, ASSEMBLED, NOTE = "model.yml", "graft.safetensors", "assembled", "made_of.json"


class Card(pydantic.BaseModel):
    """What the workbook needs to know: what the model is, its benchmarks, its longest answer.

    On those in `lower_case` it answers in small letters, and so references are read.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    what: str
    benchmarks: tuple[str, ...]
    max_new_tokens: int
    lower_case: tuple[str, ...] = ()


def card(folder: Path) -> Card | None:
    """The card in a model's folder, if there is one."""
    file = folder / CARD
    return Card(**yaml.safe_load(file.read_text())) if file.is_file() else None


def checkpoint(name: str) -> str:
    """Where `from_pretrained` finds a model: the name itself, or a graft's assembled checkpoint.

    FileNotFoundError where a folder is not there or not assembled.
    """
    folder = Path(name)
    if name.startswith((".", "/", "data/")) and not folder.is_dir():
        there = sorted(card.parent.name for card in folder.parent.glob(f"*/{CARD}"))
        ours = f"; beside it are {', '.join(there)}" if there else ""
        raise FileNotFoundError(f"there is no model folder {name!r}{ours}")
    if not (folder / GRAFT).is_file():
        return name
    if not (folder / ASSEMBLED / NOTE).is_file():
        raise FileNotFoundError(f"{name} is not assembled from its parts yet: run `make models`")
    return str(folder / ASSEMBLED)


def content(folder: Path) -> dict[str, str]:
    """SHA-256 by file of all that makes a local model's numbers; empty for what is no folder.

    For an assembled checkpoint as `make models` left it, of its parts: its merged weights may
    differ in their last bits from one processor to the next.
    """
    note = folder / ASSEMBLED / NOTE
    made = json.loads(note.read_text()) if note.is_file() else {}
    hashes = {}
    # Unlike `rglob`, in folders that are links too: what lies there makes numbers as well.
    for file in sorted(folder / name for name in glob("**", root_dir=folder, recursive=True)):
        if file.is_file() and file.name not in ("README.md", CARD, NOTE):
            stat, name = file.stat(), file.relative_to(folder).as_posix()
            hashes[name] = file_hash(file.resolve(), stat.st_size, stat.st_mtime_ns)
    inside = {f"{ASSEMBLED}/{name}": value for name, value in made.get("files", {}).items()}
    untouched = made and {n: h for n, h in hashes.items() if n.startswith(ASSEMBLED)} == inside
    return made["parts"] if untouched else hashes
