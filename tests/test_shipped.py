"""A model's card, where its checkpoint lies, and what of its folder makes its numbers."""

from __future__ import annotations

import hashlib
import json

import pytest
import yaml
from conftest import ROOT

from minerlib import load, shipped
from minerlib.tasks import REGISTRY

FOLDERS = sorted(path.parent for path in ROOT.glob("data/models/*/model.yml"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_shipped_model_has_a_card_of_known_benchmarks(folder):
    card = shipped.card(folder)
    assert set(card.benchmarks) <= set(REGISTRY) and card.max_new_tokens >= 1
    assert set(card.lower_case) <= set(card.benchmarks)
    assert folder.name.startswith("tiny") == ("stand-in" in card.what)
    assert folder.name.startswith("smol") == ("graft" in card.what)


def test_a_folder_without_a_card_has_none(tmp_path):
    assert shipped.card(tmp_path) is None


def graft(folder, **files: str):
    """A graft's folder whose assembled checkpoint holds these files."""
    made = folder / "assembled"
    made.mkdir(parents=True)
    (folder / "graft.safetensors").write_text("trained")
    (folder / "model.yml").write_text(yaml.safe_dump({"what": "a graft", "benchmarks": ["libri"],
                                                      "max_new_tokens": 3}))  # fmt: skip
    for name, text in files.items():
        (made / name).write_text(text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    note = {"parts": {"a part": "its hash"}, "files": hashes}
    (made / "made_of.json").write_text(json.dumps(note))
    return folder


def test_an_assembled_checkpoint_is_found_and_is_its_parts(tmp_path):
    folder = graft(tmp_path / "smol", weights="w", config="c")
    assert shipped.checkpoint(str(folder)) == str(folder / "assembled")
    assert shipped.content(folder) == {"a part": "its hash"}


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_checkpoint_that_was_touched_is_its_own_files(tmp_path, change):
    folder = graft(tmp_path / "smol", weights="w", config="c")
    file = folder / "assembled" / ("extra" if change == "added" else "weights")
    file.unlink() if change == "removed" else file.write_text("x")
    content = shipped.content(folder)
    assert "a part" not in content and content.keys() >= {"assembled/config", "graft.safetensors"}


def test_a_folder_that_is_a_link_counts_as_what_lies_there(tmp_path):
    folder = graft(tmp_path / "smol", weights="w", config="c")
    (folder / "assembled").rename(tmp_path / "elsewhere")
    (folder / "assembled").symlink_to(tmp_path / "elsewhere")
    assert shipped.content(folder) == {"a part": "its hash"}
    (tmp_path / "elsewhere/weights").write_text("x")
    assert "assembled/weights" in shipped.content(folder)


def test_what_is_not_assembled_says_so_in_one_sentence(tmp_path):
    folder = graft(tmp_path / "smol")
    (folder / "assembled/made_of.json").unlink()
    with pytest.raises(FileNotFoundError, match="not assembled from its parts yet: run `make mod"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load(tmp_path / "elsewhere")


def test_an_ordinary_checkpoint_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert shipped.checkpoint(str(tmp_path)) == str(tmp_path)
    assert shipped.checkpoint("Qwen/Qwen2-VL-7B-Instruct") == "Qwen/Qwen2-VL-7B-Instruct"
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "model.yml").write_text("what: words")
    assert list(shipped.content(tmp_path)) == ["config.json"]
