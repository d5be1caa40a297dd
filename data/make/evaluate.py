"""Score the shipped models on all test rows of their benchmarks, as minerlib answers them.

    python -m data.make.evaluate [MODEL ...]

A graft whose decoder is wholly frozen answers text as plain SmolLM2 does.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import minerlib as ml
from minerlib import shipped
from minerlib.tasks import REGISTRY
from minerlib.tasks.spec import mmlu_item

from . import grafts
from .train_vl import caption_right

BENCHMARKS = str(grafts.parts.ROOT / "data/benchmarks")
LETTERS = replace(
    REGISTRY["common_knowledge"],
    prompt="{item}",
    references=lambda row: "ABCD"[row["answer"]],
    choices=("A", "B", "C", "D"),
    options=None,
    fields=lambda row, joined: {"item": mmlu_item(row)},
)


def main(names: list[str]) -> None:
    """Print a line per model and benchmark: rows, mean score, 95 % interval, usual figure."""
    for card_file in sorted(grafts.MODELS.glob(f"*/{shipped.CARD}")):
        folder = card_file.parent
        if names and folder.name not in names:
            continue
        mllm, card = ml.load(folder), shipped.card(folder)
        assert card is not None
        for name in card.benchmarks:
            table = ml.evaluate(
                mllm, ml.benchmark(name, BENCHMARKS), 48, max_new_tokens=card.max_new_tokens
            )
            line = ml.summarise(table).iloc[0]
            print(
                f"{folder.name:18} {name:16} n={line['n']}  {line['mean']:.3f} "
                f"[{line['low']:.3f}, {line['high']:.3f}]  usual figure {line['corpus']:.3f}",
                flush=True,
            )
            if name == "coco_caption":
                right = table.apply(lambda r: caption_right(r["answer"], r["references"]), axis=1)
                print(f"{folder.name:18} objects, colours and relation right  {right.mean():.3f}")
            if name == "common_knowledge":
                print(f"{folder.name:18} the same, by letters  {by_letters(mllm):.3f}")


def by_letters(mllm: ml.MLLM) -> float:
    """The accuracy on common_knowledge with lettered options, as MMLU asks without examples."""
    texts = REGISTRY["common_knowledge"]
    REGISTRY["common_knowledge"] = LETTERS
    try:
        bench = ml.benchmark("common_knowledge", BENCHMARKS)
        return float(ml.evaluate(mllm, bench, 48)["score"].mean())
    finally:
        REGISTRY["common_knowledge"] = texts


if __name__ == "__main__":
    main(sys.argv[1:])
