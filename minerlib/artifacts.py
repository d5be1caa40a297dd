"""The run folder: what each stage made, written atomically, found again by its configuration.

    run = Run("runs/tiny-qwen2-vl", mllm)
    scores = run.cached("scores-mmlu", lambda: score(mllm, bench), data=bench.fingerprint)

An artefact's file name ends in a hash of its whole configuration: model files, data, parameters.
A rerun with the same configuration reads it, one with another writes beside it, and a stage that
asks for what was never made is told which configurations there are and how they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from minerlib.model import MLLM

PACKAGES = ("torch", "transformers", "numpy", "xarray", "pandas", "minerlib")

Artefact = xr.DataArray | pd.DataFrame | dict


def digest(value: Any) -> str:
    """A short hash of an array or of anything JSON can hold."""
    if isinstance(value, xr.DataArray):
        value = value.values
    if isinstance(value, np.ndarray):
        data = f"{value.shape}{value.dtype}".encode() + np.ascontiguousarray(value).tobytes()
    else:
        data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:12]


class Run:
    """The artefacts of one model in one folder."""

    def __init__(self, folder: str | Path, mllm: MLLM):
        self.folder = Path(folder)
        self.model = {"name": Path(mllm.name).name, "dtype": str(mllm.model.dtype)}
        self.model["files"] = mllm.fingerprint

    def cached(self, name: str, compute: Callable[[], Artefact], **config) -> Artefact:
        """The artefact of this name and configuration, computed and saved if it is not there."""
        path = self._find(name, config)
        if path is None:
            start = time.perf_counter()
            value = compute()
            path = self.save(name, value, seconds=time.perf_counter() - start, **config)
        return _read(path)

    def save(self, name: str, value: Artefact, *, seconds: float | None = None, **config) -> Path:
        """Write an artefact and its manifest, each beside and then renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix, write = _writer(name, value)
        path = self.folder / f"{self._stem(name, config)}{suffix}"
        manifest = {
            "name": name,
            "file": path.name,
            "model": self.model,
            "config": config,
            "packages": {p: version(p) for p in PACKAGES} | {"python": sys.version.split()[0]},
            "seconds": None if seconds is None else round(seconds, 2),
            "peak_memory_mib": _peak_memory_mib(),
        }
        _atomically(path, write)
        text = json.dumps(manifest, indent=1, default=str)
        _atomically(path.with_suffix(".manifest.json"), lambda p: p.write_text(text))
        return path

    def load(self, name: str, made_by: str, **config) -> Artefact:
        """The artefact of this name and configuration; made_by is the notebook that makes it.

        Raises FileNotFoundError naming what differs when only other configurations are there.
        """
        path = self._find(name, config)
        if path is None:
            wanted = _flat({"model": self.model, "config": config})
            others = [m for m in self.manifests() if m["name"] == name]
            differences = []
            for other in others:
                held = _flat({"model": other["model"], "config": other["config"]})
                keys = [k for k in wanted | held if wanted.get(k) != held.get(k)]
                what = ", ".join(f"{k} is {held.get(k)}, not {wanted.get(k)}" for k in keys[:4])
                differences.append(f"\n  {other['file']}: {what}")
            raise FileNotFoundError(
                f"no artefact {name!r} of this model and configuration in {self.folder}; run "
                f"notebook {made_by} with the same parameters"
                + ("".join(["; there are others:", *differences]) if others else "")
            )
        return _read(path)

    def manifests(self) -> list[dict]:
        """The manifests of all artefacts in the folder."""
        files = sorted(self.folder.glob("*.manifest.json"))
        return [json.loads(file.read_text()) for file in files]

    def _stem(self, name: str, config: dict) -> str:
        return f"{name}-{digest({'model': self.model, 'config': config})}"

    def _find(self, name: str, config: dict) -> Path | None:
        stem = self._stem(name, config)
        found = (self.folder / f"{stem}{suffix}" for suffix in _READERS)
        return next((path for path in found if path.exists()), None)


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _writer(name: str, value: Artefact) -> tuple[str, Callable[[Path], Any]]:
    if isinstance(value, xr.DataArray):
        return ".nc", lambda p: value.to_netcdf(p, engine="h5netcdf")
    if isinstance(value, pd.DataFrame):
        return ".parquet", lambda p: value.to_parquet(p)
    if isinstance(value, dict):
        return ".json", lambda p: p.write_text(json.dumps(value, indent=1))
    raise TypeError(f"artefact {name!r} is a {type(value).__name__}; DataArray, DataFrame or dict")


_READERS = {
    ".nc": lambda p: xr.load_dataarray(p, engine="h5netcdf"),
    ".parquet": pd.read_parquet,
    ".json": lambda p: json.loads(p.read_text()),
}


def _read(path: Path) -> Artefact:
    return _READERS[path.suffix](path)


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _peak_memory_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak //= 1024 if sys.platform != "darwin" else 2**20
    return peak + (torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else 0)
