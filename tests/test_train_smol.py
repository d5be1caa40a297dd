"""What the grafts are trained on and what of it is kept: the same prompts, the same function."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_mllm, samples_for
from safetensors.torch import save_file

from data.make import grafts, train_smol, vision
from data.make.training import IGNORED

NAMES = ("tiny-qwen2-vl", "tiny-qwen2-audio")


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_chat_template_with_answers_told(name):
    """First turn as `MLLM.encode` asks it, later turns as the template writes them."""
    mllm = random_mllm(name)
    samples = samples_for(mllm)
    turns = [[(s.prompt, f"answer {i}"), ("And then?", "no")][: 1 + i % 2]
             for i, s in enumerate(samples)]  # fmt: skip
    batch = train_smol.batch_of(mllm, samples, turns)
    for i, (sample, asked) in enumerate(zip(samples, turns, strict=True)):
        alone = mllm.encode([sample])["input_ids"][0].tolist()
        real = batch["attention_mask"][i].bool()
        ids, labels = batch["input_ids"][i][real].tolist(), batch["labels"][i][real].tolist()
        assert ids[: len(alone)] == alone and set(labels[: len(alone)]) == {IGNORED}
        assert (batch["labels"][i][~real] == IGNORED).all()
        told = mllm.tokenizer.decode([x for x in labels if x != IGNORED])
        assert told == "".join(f"{answer}<|im_end|>" for _, answer in asked)
        turn = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
        after = f"{asked[0][1]}<|im_end|>" + "".join(turn.format(*x) for x in asked[1:])
        whole = mllm.tokenizer(after, add_special_tokens=False)["input_ids"]
        assert ids[len(alone) :] == whole


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_kept_makes_the_trained_function(rank, monkeypatch):
    """The adapted model's logits are those of a fresh model with its graft merged in."""
    name = "tiny-qwen2-audio"
    mllm, fresh = random_mllm(name), random_mllm(name)
    monkeypatch.setattr(grafts, "HIDDEN", 128)
    monkeypatch.setattr(grafts, "VOCABULARY", len(mllm.tokenizer) - 3)
    inputs = mllm.encode(samples_for(mllm))
    grafts.settle(mllm.model)  # as in a graft, embeddings read out too
    grafts.settle(fresh.model)
    delimiters = train_smol.prepare(mllm, rank, grafts.ATTENTION, seed=1)
    media = mllm.family.placeholder("audio")
    assert len(delimiters) == 2 and media not in delimiters
    learning = [n for n, w in mllm.model.named_parameters() if w.requires_grad]
    assert not [n for n in learning if "mlp" in n or "norm" in n or "embed" in n or "tower" in n]
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (w for w in mllm.model.parameters() if w.requires_grad):
            weight.copy_((0.1 * torch.randn_like(weight)).half())
    kept = train_smol.trained(mllm.model, delimiters)
    assert all(weight.dtype == torch.float16 for weight in kept.values())
    before = fresh.model(**inputs).logits
    grafts.graft(fresh.model, kept)
    with torch.inference_mode():
        wanted, found = mllm.model(**inputs).logits, fresh.model(**inputs).logits
    # The output rows of the delimiters themselves move with their embeddings; nothing else does.
    others = [i for i in range(wanted.shape[-1]) if i not in delimiters]
    torch.testing.assert_close(found[..., others], wanted[..., others], atol=2e-3, rtol=2e-3)
    assert (found - before).abs().max() > 0.1


def test_a_tower_is_that_of_a_graft_that_was_trained_before(tmp_path, monkeypatch):
    mllm, other = random_mllm("tiny-qwen2-vl", seed=0), random_mllm("tiny-qwen2-vl", seed=1)
    monkeypatch.setattr(grafts, "MODELS", tmp_path)
    with pytest.raises(SystemExit, match=r"other/graft.safetensors is not there: train other firs"):
        train_smol.see_as(mllm, "other")
    theirs = dict(other.model.named_parameters())
    tower = {n: w.half() for n, w in theirs.items() if n.startswith(train_smol.TOWER)}
    (tmp_path / "other").mkdir()
    save_file(tower, tmp_path / "other" / grafts.GRAFT)
    before = {n: w.clone() for n, w in mllm.model.named_parameters()}
    train_smol.see_as(mllm, "other")
    for name, weight in mllm.model.named_parameters():
        assert torch.equal(weight, tower[name].float() if name in tower else before[name])
    assert any("merger" in name for name in tower)


def test_a_cell_is_told_in_the_words_for_what_it_shows():
    named = {"what": torch.eye(len(vision.WHAT), 80), "colour": torch.eye(7, 80) * 2}
    named |= {f"character{i}": torch.eye(37, 80) * (i + 3) for i in range(2)}
    number, circle = vision.WHAT.index("number"), vision.WHAT.index("circle")
    targets = {"what": [0, circle, number], "colour": [-100, 3, 1]}
    targets |= {"character0": [-100, -100, 30], "character1": [-100, -100, 31]}
    got = train_smol.told({k: torch.tensor(v) for k, v in targets.items()}, named)
    wanted = np.zeros((3, 80))
    wanted[0, 0] = 1
    wanted[1, circle], wanted[1, 3] = 1 / 2, 2 / 2
    wanted[2, 1], wanted[2, 30], wanted[2, 31] = 2 / 4, 2 * 3 / 4, 4 / 4
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_naming_is_measured_by_the_variance_left_unexplained():
    """0 for a tower that says what each known cell shows, 1 for one that says the mean."""

    class Tower(torch.nn.Module):
        def forward(self, cells, grid_thw):
            return SimpleNamespace(pooler_output=cells)

    rng = torch.Generator().manual_seed(0)
    named = {"what": torch.randn(len(vision.WHAT), 16, generator=rng)}
    what = torch.tensor([0, 2, 5, 9, 30, -100, 12])
    batch = {"what": what, "grids": None}
    loss, goal = train_smol.naming_loss(named), named["what"][what.clip(0)]
    goal[5] = 99.0  # a cell of which nothing is known
    assert loss(Tower(), batch | {"patches": goal}).item() == 0
    mean = goal[what >= 0].mean(0).expand(7, -1)
    assert loss(Tower(), batch | {"patches": mean}).item() == pytest.approx(5 / 6)
