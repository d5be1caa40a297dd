"""The run folder: what each stage made, written atomically, found again by all that made it.

    run = Run("runs/tiny-qwen2-vl", mllm)
    scores = run.cached("scores-mmlu", lambda: score(mllm, bench), of=score, data=bench.fingerprint)

A file's name ends in a hash of its key: model, configuration, versions of code and packages.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import safetensors.torch
import torch
import xarray as xr

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])

PACKAGES = (
    *("torch", "torchvision", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn"),
    *("pillow", "av", "soundfile", "soxr", "jiwer", "whisper-normalizer", "pycocoevalcap"),
)
"""Packages whose version changes numbers; their public versions are part of every key."""
COMPUTATIONS: dict[str, int] = {}
"""Version of every computation whose result is cached; tests/golden.json has its numbers."""


def computation(version: int) -> Callable[[Function], Function]:
    """Register a function whose result is cached; raise its version when its numbers change."""

    def register(function: Function) -> Function:
        COMPUTATIONS[f"{function.__module__}.{function.__qualname__}"] = version
        return function

    return register


def identity(function: Callable) -> str:
    """Name and version of a registered computation; name and hash of any other plain function.

    The hash is of its source file or notebook cell, its place there, defaults and closure; what it
    calls elsewhere is not followed. TypeError for what is no plain function or has no source.
    """
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    if name in COMPUTATIONS:
        return f"{name} {COMPUTATIONS[name]}"
    try:
        code, bound = function.__code__, [function.__defaults__, function.__kwdefaults__]
        bound += [cell.cell_contents for cell in function.__closure__ or ()]
        return f"{name} {digest([inspect.findsource(code)[0], [*code.co_positions()], bound])}"
    except (AttributeError, OSError) as error:
        raise TypeError(f"{name} is no function with a source: wrap it in a def") from error


def digest(value: Any) -> str:
    """A hash, 16 hex digits, of arrays, bytes, functions (`identity`) and what JSON can hold.

    Arrays count with shape and dtype, labelled ones with dims and coordinates; the order of a
    dict's keys does not count. TypeError names what cannot be hashed faithfully.
    """
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What JSON can hold in the place of this value, one to one."""
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, FunctionType):
        return {"function": identity(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, xr.DataArray):
        coords = {str(k): [c.dims, c.values] for k, c in value.coords.items()}
        return {"dims": value.dims, "coords": coords, "values": value.values}
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype == object and all(isinstance(v, str) for v in value.flat):
            value = value.astype(str)  # text that went through a file
        if not value.dtype.hasobject:
            return {"shape": value.shape, "dtype": value.dtype.str} | _plain(value.tobytes())
    kind = type(value).__name__
    raise TypeError(f"{value!r:.80} ({kind}) has no faithful hash: use text, numbers or arrays")


def key(mllm: Any, of: Any, **config: Any) -> dict[str, dict]:
    """All that can change a result: model, config, the function or functions `of`, packages."""
    return {
        "model": mllm.fingerprint,
        "config": config,
        "of": dict(identity(f).rsplit(" ", 1) for f in ([of] if callable(of) else of)),
        "packages": {name: version(name).split("+")[0] for name in PACKAGES},
    }


class Run:
    """The artefacts (DataArray, DataFrame or dict) of one MLLM in one folder.

    `of` is the function, or functions, that compute an artefact. `notices` are for its manifest.
    """

    def __init__(self, folder: str | Path, mllm: Any):
        self.folder, self.mllm = Path(folder), mllm

    def stem(self, name: str, *, of: Any, **config: Any) -> str:
        """The artefact's file name without its suffix."""
        return f"{name}-{digest(key(self.mllm, of, **config))}"

    def cached(
        self, name: str, compute: Callable[[], Any], *, of: Any, notices: Any = None, **config: Any
    ) -> Any:
        """The artefact of this name and key, computed and saved if it is not there whole."""
        stem = self.stem(name, of=of, **config)
        for path in (self.folder / f"{stem}{suffix}" for suffix in _FORMATS):
            if path.exists():
                try:
                    return _FORMATS[path.suffix][2](path)
                except Exception as error:  # every format has its own
                    log.warning("%s is damaged (%s) and has to be made anew", path.name, error)
        start = time.perf_counter()
        value, seconds = compute(), time.perf_counter() - start
        path = self.save(name, value, of=of, seconds=seconds, notices=notices, **config)
        return _FORMATS[path.suffix][2](path)

    def save(
        self, name: str, value: Any, *, of: Any, seconds=None, notices: Any = None, **config: Any
    ) -> Path:
        """Write an artefact and its manifest, each beside and then renamed."""
        suffix = next((s for s, (kind, *_) in _FORMATS.items() if isinstance(value, kind)), None)
        if suffix is None:
            kinds = ", ".join(kind.__name__ for kind, *_ in _FORMATS.values())
            raise TypeError(f"artefact {name!r} is a {type(value).__name__}, none of {kinds}")
        path = self.folder / f"{self.stem(name, of=of, **config)}{suffix}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = peak * 1024 if sys.platform != "darwin" else peak
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        manifest = {
            **{"name": name, "file": path.name, "model_name": Path(self.mllm.name).name},
            **key(self.mllm, of, **config),
            "python": sys.version.split()[0],
            "seconds": None if seconds is None else round(seconds, 2),
            "peak_memory_mib": (peak + gpu) // 2**20,
            "notices": {**getattr(value, "attrs", {}), **(notices or {})},
        }
        atomically(path, lambda part: _FORMATS[suffix][1](value, part))
        text = json.dumps(manifest, indent=1, default=_plain)
        atomically(path.with_suffix(".manifest.json"), lambda part: part.write_text(text))
        return path

    def load(self, name: str, made_by: str, *, of: Any, **config: Any) -> Any:
        """The artefact of this name and key, which the notebook `made_by` makes.

        FileNotFoundError says how others of this name differ where there are only those.
        """

        def missing():
            wanted = key(self.mllm, of, **config)
            flat, differences = _flat(wanted), []
            for other in (m for m in self.manifests() if m["name"] == name):
                held = _flat({part: other.get(part) for part in wanted})
                keys = [k for k in {**flat, **held} if flat.get(k) != held.get(k)]
                what = ", ".join(f"{k} is {held.get(k)}, not {flat.get(k)}" for k in keys[:4])
                differences.append(f"\n  {other['file']}: {what}")
            raise FileNotFoundError(
                f"no artefact {name!r} of this model and configuration in {self.folder}; run "
                f"notebook {made_by} with the same parameters"
                + ("".join(["; there are others:", *differences]) if differences else "")
            )

        return self.cached(name, missing, of=of, **config)

    def manifests(self) -> list[dict]:
        """The manifests of all artefacts in the folder."""
        texts = (file.read_text() for file in sorted(self.folder.glob("*.manifest.json")))
        return [json.loads(text) for text in texts if text.strip()]


class Checkpoint:
    """Tensors of an unfinished computation, saved every so many seconds for the next run.

    The file's name holds its key's digest: other keys never meet, and processes with one key
    replace the file whole.
    """

    def __init__(self, path: str | Path, key: Any, every: float = 60.0):
        self.path, self.every = Path(f"{path}-{digest(key)}.partial"), every
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last save is `every` seconds ago."""
        return time.monotonic() - self._last >= self.every

    def save(self, tensors: dict[str, torch.Tensor], **meta: Any) -> None:
        """Replace the file with these tensors and facts that JSON can hold."""
        data = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        data["meta"] = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
        atomically(self.path, lambda part: safetensors.torch.save_file(data, part))
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors, on the CPU, and facts of the last save; None if there is none that is whole."""
        if self.path.exists():
            try:  # one read: a file by itself is whole, two opened in turn need not be the same
                tensors = safetensors.torch.load(self.path.read_bytes())
                return tensors, json.loads(bytes(tensors.pop("meta").numpy()))
            except Exception as error:
                log.warning("%s is damaged (%s); starting anew", self.path.name, error)
        return None

    def done(self) -> None:
        """Remove the file: the result is kept elsewhere."""
        self.path.unlink(missing_ok=True)


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, under a name that no other process or call has, and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


_FORMATS: dict[str, tuple[type, Callable, Callable]] = {  # suffix: type, write, read
    ".nc": (
        xr.DataArray,
        lambda value, p: value.to_netcdf(p, engine="h5netcdf"),
        lambda p: xr.load_dataarray(p, engine="h5netcdf"),
    ),
    ".parquet": (pd.DataFrame, pd.DataFrame.to_parquet, pd.read_parquet),
    ".json": (
        dict,
        lambda value, p: p.write_text(json.dumps(value, indent=1)),
        lambda p: json.loads(p.read_text()),
    ),
}


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {prefix[1:]: str(tree)}
    parts = (_flat(value, f"{prefix}.{name}") for name, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}
