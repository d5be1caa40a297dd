"""The run folder: what each stage made, written whole, found again by all that made it.

Run(folder, mllm).cached("scores", lambda: score(mllm, bench), of=score, rows=bench.fingerprint)
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import logging
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib import metadata
from itertools import product
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xarray as xr

from minerlib import processes

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable)

PACKAGES = (
    *("torch", "torchvision", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn"),
    *("pillow", "av", "soundfile", "soxr", "jiwer", "whisper-normalizer", "pycocoevalcap"),
)
"""Packages whose version changes numbers; their public versions are part of every key."""
version = lru_cache(metadata.version)  # read from disk once: every key asks for all of them

FULL = 2**20  # bytes left with which a disk counts as full

COMPUTATIONS: dict[str, int] = {}
"""Version of every computation whose result is cached; tests/golden.json has its numbers."""


def computation(version: int) -> Callable[[Function], Function]:
    """Register a function whose result is cached; raise its version when its numbers change."""

    def register(function: Function) -> Function:
        COMPUTATIONS[f"{function.__module__}.{function.__qualname__}"] = version
        return function

    return register


# By a code object's id, itself and the text it came from: an edit reaches no running function.
_TEXTS: dict[int, tuple[CodeType, list[str]]] = {}


def remember(module: ModuleType) -> None:
    """Take down the text of a module's functions, before anybody edits it."""
    for value in vars(module).values():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            with suppress(OSError):  # it has no source
                _text(value.__code__)


def _text(code: CodeType) -> list[str]:
    if id(code) not in _TEXTS:
        _TEXTS[id(code)] = code, inspect.findsource(code)[0]
    return _TEXTS[id(code)][1]


def identity(function: Callable) -> str:
    """Name and version of a registered computation; name and hash of any other plain function.

    The hash is of its source file or notebook cell, its place there, defaults and closure; what it
    calls elsewhere is not followed. TypeError for what is no plain function or has no source.
    """
    try:
        name = f"{function.__module__}.{function.__qualname__}"
        if name in COMPUTATIONS:
            return f"{name} {COMPUTATIONS[name]}"
        code, bound = function.__code__, [function.__defaults__, function.__kwdefaults__]
        bound += [cell.cell_contents for cell in function.__closure__ or ()]
        return f"{name} {digest([_text(code), [*code.co_positions()], bound])}"
    except (AttributeError, OSError) as error:
        raise TypeError(f"{function!r} is no function with a source; wrap it in a def") from error


def entries(registry: Mapping[str, Callable]) -> list:
    """The names of a registry's functions, and a user's own as they are: part of a key."""
    return [name if of.__module__.startswith("minerlib.") else [name, of]
            for name, of in registry.items()]  # fmt: skip


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
    if isinstance(value, xr.DataArray):
        coords = {str(k): [c.dims, c.values] for k, c in value.coords.items()}
        return {"dims": value.dims, "coords": coords, "values": value.values}
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype == object and all(isinstance(v, str) for v in value.flat):
            value = value.astype(str)  # text that went through a file
        if not value.dtype.hasobject:
            return {"shape": value.shape, "dtype": value.dtype.str} | _plain(value.tobytes())
    raise TypeError(f"{value!r:.80} ({type(value).__name__}) has no faithful hash")


def key(mllm: Any, of: Any, **config: Any) -> dict[str, dict]:
    """All that can change a result: model, config, the function or functions `of`, packages.

    ValueError if two different functions bear one name: which one made it could not be told.
    """
    marks = {identity(f) for f in ([of] if callable(of) else of)}
    made_of = dict(mark.rsplit(" ", 1) for mark in sorted(marks))
    if len(made_of) < len(marks):
        names = [mark.rsplit(" ", 1)[0] for mark in marks]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two functions are called {', '.join(twice)}: give one another name")
    return {
        "model": mllm.fingerprint,
        "config": config,
        "of": made_of,
        "packages": {name: version(name).split("+")[0] for name in PACKAGES},
    }


class Run:
    """The artefacts (DataArray, DataFrame or dict) of an MLLM in a folder, found by their `key`.

    Those in the folders `also` are found too, and never written. What is put in `notices` stands in
    every manifest from then on.
    """

    def __init__(self, folder: str | Path, mllm: Any, also: Sequence[Path] = ()):
        self.folder, self.mllm, self.also = Path(folder), mllm, also
        self.notices: dict[str, Any] = {}

    def stem(self, name: str, *, of: Any, **config: Any) -> str:
        """The artefact's file name without its suffix."""
        return f"{name}-{digest(key(self.mllm, of, **config))}"

    def cached(self, name: str, compute: Callable[[], Any], *, of: Any, **config: Any) -> Any:
        """The artefact of this name and key, computed and saved if it is not there whole."""
        stem, start = self.stem(name, of=of, **config), time.perf_counter()
        value = self._kept(stem) if processes.rank() == 0 else None
        if not processes.agreed(value is not None):
            with _computing(self.folder / stem) as held:
                value = compute()
            if processes.rank() == 0:
                self.save(name, value, of=of, seconds=time.perf_counter() - start, **config)
            processes.wait()
            for checkpoint in held:
                checkpoint.drop()
            value = None
        elif processes.rank() == 0:  # a run that was killed when it had saved, and not tidied up
            for left in self.folder.glob(f"{stem}-*.partial"):
                left.unlink(missing_ok=True)
        value = self._kept(stem) if value is None else value
        if value is None:
            raise FileNotFoundError(
                f"{stem} was made by the first process, and is not in this one's {self.folder}: "
                "processes must share the run folder"
            )
        return value

    def _kept(self, stem: str) -> Any:
        """The artefact of this file name, if it is there whole."""
        for folder, (suffix, _, read) in product((self.folder, *self.also), _FORMATS.values()):
            if (value := _whole(folder / f"{stem}{suffix}", read)) is not None:
                return value
        return None

    def save(self, name: str, value: Any, *, of: Any, seconds: float = 0, **config: Any) -> Path:
        """Write an artefact and its manifest, each beside and then renamed."""
        if type(value) not in _FORMATS:
            kinds = ", ".join(kind.__name__ for kind in _FORMATS)
            raise TypeError(f"artefact {name!r} is a {type(value).__name__}, none of {kinds}")
        suffix, write, _ = _FORMATS[type(value)]
        path = self.folder / f"{self.stem(name, of=of, **config)}{suffix}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak //= 2**20 if sys.platform == "darwin" else 2**10  # to MiB
        manifest = {
            **{"name": name, "file": path.name, "model_name": Path(self.mllm.name).name},
            **key(self.mllm, of, **config),
            **{"seconds": round(seconds, 2), "python": sys.version.split()[0]},
            "device": _device_name(self.mllm.device),
            "peak_memory_mib": peak + torch.cuda.max_memory_allocated() // 2**20,
            "notices": self.notices | getattr(value, "attrs", {}),
        }
        atomically(path, partial(write, value))
        text = json.dumps(manifest, indent=1, default=_plain)
        atomically(path.with_suffix(".manifest.json"), lambda part: part.write_text(text))
        return path

    def load(self, name: str, made_by: str, *, of: Any, **config: Any) -> Any:
        """The artefact that notebook `made_by` makes; without it FileNotFoundError.

        The error says how others of this name differ where there are only those.
        """

        def missing() -> None:
            text = f"no artefact {name!r} of this model and configuration in {self.folder}; run "
            text += f"notebook {made_by} with the same parameters"
            wanted = json.loads(json.dumps(key(self.mllm, of, **config), default=_plain))
            for other in (m for m in self.manifests() if m["name"] == name):
                held = {part: other.get(part) for part in wanted}
                a, b = (pd.json_normalize(tree).iloc[0].to_dict() for tree in (held, wanted))
                keys = [k for k in {**b, **a} if str(a.get(k)) != str(b.get(k))]
                what = ", ".join(f"{k} is {a.get(k)}, not {b.get(k)}" for k in keys[:4])
                text += f"\n  there is {other['file']}: {what}"
            raise FileNotFoundError(text)

        return self.cached(name, missing, of=of, **config)

    def manifests(self) -> list[dict]:
        """The manifests of all artefacts in the folders."""
        folders = (self.folder, *self.also)
        files = [file for folder in folders for file in sorted(folder.glob("*.manifest.json"))]
        return [manifest for file in files if (manifest := _whole(file, _json)) is not None]


def _device_name(device: torch.device) -> str:
    """What a person would call it: "NVIDIA H100 80GB HBM3", "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# The artefacts that are being computed, the innermost last, with the checkpoints of their parts.
_now: list[tuple[Path, list[Checkpoint]]] = []


@contextmanager
def _computing(path: Path) -> Iterator[list[Checkpoint]]:
    held: list[Checkpoint] = []
    _now.append((path, held))
    try:
        yield held
    finally:
        _now.pop()


class Checkpoint:
    """The state of an unfinished computation, saved every so many seconds for the next run.

    The file's name holds its key's digest, so other keys never meet.
    """

    def __init__(self, path: str | Path, key: Any, every: float = 60.0):
        key = [key, processes.rank(), processes.size()] if processes.size() > 1 else key
        self.path, self.every = Path(f"{path}-{digest(key)}.partial"), every
        self._last, self.held = time.monotonic(), False

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file with tensors and plain values, if the last save is long enough ago."""
        if time.monotonic() - self._last >= self.every:
            atomically(self.path, partial(torch.save, state))
            self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state last saved, tensors on the CPU; None if there is none that is whole."""
        return _whole(self.path, partial(torch.load, map_location="cpu", weights_only=True))

    def done(self, state: dict[str, Any]) -> None:
        """Remove the file, for the computation is over; of one that is held, save what is due."""
        if self.held:
            self.save(state)
        else:
            self.drop()

    def drop(self) -> None:
        """Remove the file: the result is kept elsewhere."""
        self.path.unlink(missing_ok=True)


def unfinished(part: str) -> Checkpoint:
    """The checkpoint of a part of the artefact that `Run.cached` is computing, held until that is
    kept."""
    path, held = _now[-1]
    held.append(checkpoint := Checkpoint(path, part))
    checkpoint.held = True
    return checkpoint


@lru_cache(maxsize=1024)
def file_hash(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file's content, read again only when its size or time of change differs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, under a name that no other process or call has, and rename.

    OSError where the disk is full; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        write(part)
        part.replace(path)
    except Exception as error:  # each format says it in words of its own
        if shutil.disk_usage(path.parent).free > FULL:
            raise
        kept = "what was kept before is whole: make room and run it again"
        raise OSError(errno.ENOSPC, f"no space for {path.name}; {kept}", path.parent) from error
    finally:
        part.unlink(missing_ok=True)


def _whole(path: Path, read: Callable[[Path], Any]) -> Any:
    """What the file holds; None if it is not there, or damaged."""
    try:
        return read(path) if path.exists() else None
    except Exception as error:  # every format has its own
        log.warning("%s is damaged and counts as missing: %s", path.name, error)
        return None


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _to_netcdf(value: xr.DataArray, path: Path) -> None:
    """Compressed, floats in 32 bits unless the array's encoding says otherwise."""
    if value.dtype.kind in "fbiu" and not value.encoding:
        value = value.copy(deep=False)
        value.encoding = {"zlib": True} | ({"dtype": "float32"} if value.dtype.kind == "f" else {})
    value.to_netcdf(path, **_H)


def _to_parquet(value: pd.DataFrame, path: Path) -> None:
    """Without the descriptions of pandas and arrow, which outweigh a small table, where the columns
    say all: the index only counts rows."""
    table = pa.Table.from_pandas(value)
    how: dict[str, Any] = {"compression": "zstd", "compression_level": 19}
    how |= {"write_statistics": False, "store_schema": not isinstance(value.index, pd.RangeIndex)}
    with pq.ParquetWriter(path, table.schema, **how) as file:
        file.write_table(table)
        file.add_key_value_metadata({"attrs": json.dumps(value.attrs)})


def _from_parquet(path: Path) -> pd.DataFrame:
    with pq.ParquetFile(path) as file:
        value = file.read().to_pandas()
        told = (file.metadata.metadata or {}).get(b"attrs")
    value.attrs = json.loads(told) if told else value.attrs
    return value


_H: dict[str, Any] = {"engine": "h5netcdf"}
_FORMATS: dict[type, tuple[str, Callable, Callable]] = {  # suffix, write, read
    xr.DataArray: (".nc", _to_netcdf, partial(xr.load_dataarray, **_H)),
    pd.DataFrame: (".parquet", _to_parquet, _from_parquet),
    dict: (".json", lambda value, p: p.write_text(json.dumps(value, indent=1)), _json),
}
