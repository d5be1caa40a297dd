"""A Hugging Face cache as downloads would leave it: real names and layouts, small contents.

`fill(home)` puts the shipped rows under the names, splits and columns of the real datasets,
`checkpoint` random weights under the name of a model. With HF_HOME=home and HF_HUB_OFFLINE=1 the
hub's own calls then read them.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ROOT
from families import FAMILIES, TEXT

SIZE = {"num_hidden_layers": 4, "intermediate_size": 256}  # enough for 2 % to be some neurons
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def repository(home: Path, kind: str, name: str) -> Path:
    """The empty snapshot folder of a cached repository."""
    folder = home / "hub" / f"{kind}s--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def shipped(name: str, split: str = "test") -> pa.Table:
    (file,) = (ROOT / "data/benchmarks" / name).glob(f"{split}*.parquet")
    return pq.read_table(file)


def checkpoint(home: Path, family: str, name: str) -> None:
    """Write a small checkpoint of a family into a cache folder, as if it were that model."""
    with patch.dict(TEXT, SIZE):
        FAMILIES[family].build(repository(home, "model", name))


def fill(home: Path) -> None:
    """Write all six datasets into a cache folder."""
    captions = shipped("coco_caption")
    sets = {
        ("lmms-lab-encoder/textvqa", "data/validation-00000-of-00001.parquet"): shipped(
            "text_vqa", "validation"
        ),
        ("yerevann/coco-karpathy", "data/test-00000-of-00001.parquet"): captions.select(
            ["filename", "sentences"]
        ),
        ("lmms-lab-encoder/COCO-Caption", "data/val-00000-of-00001.parquet"): captions.select(
            ["image", "file_name", "answer"]
        ),
        ("cais/mmlu", "all/test-00000-of-00001.parquet"): shipped("mmlu"),
        ("cais/mmlu", "all/dev-00000-of-00001.parquet"): shipped("mmlu", "dev"),
        ("morpheushoc/msvd-qa", "data/test-00000-of-00001.parquet"): shipped("msvd_qa"),
        ("openslr/librispeech_asr", "clean/test/0000.parquet"): shipped("libri"),
        ("lmms-lab-audio/vocalsound", "data/test-00000-of-00001.parquet"): shipped("vocal_sound"),
    }
    for (name, file), rows in sets.items():
        path = repository(home, "dataset", name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path)
