"""Score both stand-ins on all test rows, as minerlib answers them.

python -m data.make.evaluate
"""

from __future__ import annotations

import minerlib as ml

from . import vision

MODELS = {
    "data/models/tiny-qwen2-vl": ("text_vqa", "coco_caption", "mmlu", "msvd_qa"),
    "data/models/tiny-qwen2-audio": ("mmlu", "libri", "vocal_sound"),
}


def main() -> None:
    """Print a line per model and benchmark: rows, mean score, 95 % interval, usual figure."""
    for folder, names in MODELS.items():
        mllm = ml.load(folder)
        for name in names:
            table = ml.evaluate(mllm, ml.benchmark(name, source="data/benchmarks"), batch_size=48)
            line = ml.summarise(table).iloc[0]
            print(
                f"{folder}  {name:13} n={line['n']}  {line['mean']:.3f} "
                f"[{line['low']:.3f}, {line['high']:.3f}]  corpus {line['corpus']:.3f}",
                flush=True,
            )
            if name == "coco_caption":
                facts = [
                    vision.caption_facts(answer) == vision.caption_facts(references[0])
                    for answer, references in zip(table["answer"], table["references"], strict=True)
                ]
                print(f"{folder}  objects, colours, relation right: {sum(facts) / len(facts):.3f}")


if __name__ == "__main__":
    main()
