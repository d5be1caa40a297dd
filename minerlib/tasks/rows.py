"""Where the rows of a benchmark come from: the hub, or a folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minerlib.tasks import metrics
from minerlib.tasks.media import _MEDIA_COLUMNS, FRAMES, SAMPLING_RATE, _blob
from minerlib.tasks.spec import REGISTRY, Repo, Sample, Spec

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)


# --- where rows come from ------------------------------------------------------------------------


def _parquet_files(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Parquet files of one split: the split is a folder, or a part of the file's name.

    Covers `data/test-00000-of-00002.parquet`, `all/test-*.parquet`, `clean/test/0000.parquet`.
    """
    found = []
    for file in sorted(folder.rglob("*.parquet")):
        *folders, name = file.relative_to(folder).parts
        in_config = config is None or config in folders
        if in_config and (split in folders or split in name.removesuffix(".parquet").split("-")):
            found.append(file)
    return found


def _download(repo: Repo) -> Path:
    """The folder with a hub repository's parquet files of one split, downloaded or cached."""
    from huggingface_hub import snapshot_download

    inside = f"{repo.config}/" if repo.config else ""
    patterns = [f"{inside}{repo.split}/*.parquet", f"{inside}*{repo.split}-*.parquet"]
    if not inside:
        patterns.append(f"*/{repo.split}/*.parquet")
    return Path(snapshot_download(repo.name, repo_type="dataset", allow_patterns=patterns))


def _locate(
    name: str, candidates: Sequence[Repo], source: str | os.PathLike | None, split: str | None
) -> tuple[list[Path], bool]:
    """Files of a split from the first candidate that has them, and whether it is a hub set.

    A local `source` holds either `NAME/*.parquet` or folders laid out like the hub: `owner/name/`.
    """
    tried = []
    if source is not None and not Path(source).is_dir():
        raise FileNotFoundError(
            f"source {str(source)!r} is not a folder; give the folder that holds {name}/*.parquet, "
            "or leave source out to load from the hub"
        )
    if source is not None and (own := Path(source) / name).is_dir():
        # "test" stands for the split that is evaluated, whatever the published set calls it.
        for wanted in dict.fromkeys([split] if split else [candidates[0].split, "test"]):
            if files := _parquet_files(own, wanted):
                return files, False
            tried.append(f"{name}/*{wanted}*.parquet")
    else:
        for repo in candidates:
            wanted = split or repo.split
            place = f"{repo.name} ({repo.config + ', ' if repo.config else ''}{wanted})"
            try:
                folder = (
                    _download(Repo(repo.name, wanted, repo.config))
                    if source is None
                    else Path(source) / repo.name
                )
            except Exception as error:  # the hub's own errors differ by version and by cause
                tried.append(f"{place}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            if files := _parquet_files(folder, wanted, repo.config):
                return files, True
            tried.append(f"{place}: no parquet file of this split")
    where = "on the hub" if source is None else f"in {str(source)!r}"
    raise FileNotFoundError(
        f"no rows for {name!r} {where}. Tried: {'; '.join(tried)}. Give source=, a folder with "
        f"{name}/{split or candidates[0].split}-*.parquet, or check the network and the split"
    )


def _read(files: Sequence[Path]) -> datasets.Dataset:
    """Memory-mapped rows of parquet files; media columns stay undecoded."""
    import datasets as hf

    bars = not hf.are_progress_bars_disabled()
    hf.disable_progress_bars()
    try:
        rows = hf.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    finally:
        if bars:
            hf.enable_progress_bars()
    for column, feature in rows.features.items():
        if isinstance(feature, hf.Audio | hf.Image | hf.Video):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


def _require(
    name: str, rows: datasets.Dataset, columns: Sequence[str], files: Sequence[Path]
) -> None:
    have = set(rows.column_names)
    missing = [c for c in columns if not have & set(c.split("|"))]
    if missing:
        raise ValueError(
            f"{name}: column {', '.join(map(repr, missing))} is missing in {files[0].name}; found "
            f"{sorted(have)}. Rename the column, or change `columns` of REGISTRY[{name!r}]"
        )


@lru_cache(maxsize=256)
def _file_hash(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Rows:
    """The rows of a split, those joined to them, and the list of samples they hold."""

    def __init__(
        self,
        name: str,
        source: str | os.PathLike | None,
        split: str | None,
        frames: int,
        sampling_rate: int,
    ) -> None:
        self.name, self.frames, self.sampling_rate = name, frames, sampling_rate
        self.spec = spec = REGISTRY[name]
        self.files, published = _locate(name, spec.hub, source, split)
        self.rows = _read(self.files)
        self.joined: datasets.Dataset | None = None
        self.join_index: dict[Any, list[int]] = defaultdict(list)
        wanted = list(spec.columns)
        if spec.join and not set(spec.join.provides) <= set(self.rows.column_names):
            files, _ = _locate(name, spec.join.hub, source, spec.join.hub[0].split)
            self.joined = _read(files)
            _require(name, self.joined, spec.join.columns, files)
            for i, key in enumerate(self.joined[spec.join.theirs]):
                self.join_index[key].append(i)
            self.files = [*self.files, *files]
        elif spec.join:
            wanted += spec.join.provides
        _require(name, self.rows, wanted, self.files)
        # Sample number -> (row, element of the `each` column).
        counts = (
            [len(value) for value in self.rows[spec.each]]
            if spec.each
            else np.ones(len(self.rows), dtype=int)
        )
        self.row_of = np.repeat(np.arange(len(self.rows)), counts)
        self.element_of = np.concatenate([np.arange(n) for n in counts] or [np.empty(0, int)])
        if published and spec.rows and len(self.row_of) != spec.rows:
            log.warning(
                "%s: loaded %d samples, the published split has %d: scores may not compare",
                name, len(self.row_of), spec.rows,
            )  # fmt: skip
        else:
            log.info("%s: loaded %d samples", name, len(self.row_of))

    def keep(self) -> np.ndarray:
        """Numbers of the samples that are not too long for the model's audio encoder."""
        import soundfile

        numbers = np.arange(len(self.row_of))
        if self.spec.max_seconds is None:
            return numbers
        seconds = np.array([soundfile.info(_blob(clip)).duration for clip in self.rows["audio"]])
        short = seconds[self.row_of] <= self.spec.max_seconds
        if not short.all():
            log.warning(
                "%s: skipped %d of %d clips longer than %g s, which the audio encoder would cut",
                self.name, (~short).sum(), len(short), self.spec.max_seconds,
            )  # fmt: skip
        return numbers[short]

    @cached_property
    def light(self) -> datasets.Dataset:
        """The rows without their media columns, for the references."""
        heavy = _MEDIA_COLUMNS & set(self.rows.column_names)
        return self.rows.remove_columns(sorted(heavy))

    def row(self, number: int, rows: datasets.Dataset) -> dict:
        row = rows[int(self.row_of[number])]
        if self.spec.each:
            row[self.spec.each] = row[self.spec.each][int(self.element_of[number])]
        return row

    def sample(self, number: int) -> Sample:
        row, joined = self.row(number, self.rows), []
        if self.joined is not None:
            key = row[self.spec.join.ours]
            joined = [self.joined[i] for i in self.join_index.get(key, ())]
            if not joined:
                raise ValueError(
                    f"{self.name}: no row with {self.spec.join.theirs} {key!r} in "
                    f"{self.spec.join.hub[0].name}, which row {number} needs"
                )
        return self.spec.sample(
            row,
            joined,
            frames=self.frames,
            sampling_rate=self.sampling_rate,
            benchmark=self.name,
            number=int(number),
        )

    def references(self, number: int) -> tuple[str, ...]:
        row = self.spec._complete(self.row(number, self.light), [])
        return self.spec._answers(row)


class Benchmark(Sequence):
    """Samples of one benchmark, decoded when asked for; a slice is a benchmark again."""

    def __init__(self, rows: _Rows, numbers: np.ndarray) -> None:
        self._rows, self.numbers = rows, numbers

    @property
    def name(self) -> str:
        """The name in `REGISTRY`."""
        return self._rows.name

    @property
    def spec(self) -> Spec:
        """The registry's entry."""
        return self._rows.spec

    @property
    def metric(self) -> str:
        """The name in `metrics.METRICS`."""
        return self.spec.metric

    @property
    def max_new_tokens(self) -> int:
        """How many tokens an answer may take."""
        return self.spec.max_new_tokens

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Any:
        if isinstance(which, int | np.integer):
            return self._rows.sample(self.numbers[which])
        return Benchmark(self._rows, self.numbers[which])

    def __iter__(self) -> Iterator[Sample]:
        return (self._rows.sample(number) for number in self.numbers)

    def __repr__(self) -> str:
        total = len(self._rows.row_of)
        return f"Benchmark({self.name!r}, {len(self)} of {total} samples, metric={self.metric!r})"

    @cached_property
    def references(self) -> list[tuple[str, ...]]:
        """The reference answers of every sample; no media is decoded for them."""
        return [self._rows.references(number) for number in self.numbers]

    def score(self, answers: Sequence[str]) -> list[float]:
        """The metric of each sample, in [0, 1]."""
        return metrics.score(self.metric, answers, self.references)

    def corpus_score(self, answers: Sequence[str]) -> float:
        """The benchmark's own figure over all samples, as it is published."""
        return metrics.corpus_score(self.metric, answers, self.references)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the data files, the samples, the prompt, frames per video, sampling rate."""
        how = (self._rows.frames, self._rows.sampling_rate)
        digest = hashlib.sha256(
            repr((self.name, self.spec.prompt, self.spec.metric, *how)).encode()
        )
        for file in self._rows.files:
            stat = file.stat()
            digest.update(_file_hash(str(file), stat.st_size, stat.st_mtime_ns).encode())
        digest.update(self.numbers.astype("<i8").tobytes())
        return digest.hexdigest()


def benchmark(
    name: str,
    source: str | os.PathLike | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int | None = None,
    frames: int = FRAMES,
    sampling_rate: int = SAMPLING_RATE,
) -> Benchmark:
    """Load a benchmark by its name in `REGISTRY`, from the hub or from a folder.

    Parameters
    ----------
    source : None is the hub (only the files of one split are downloaded); a folder holds
        `NAME/*.parquet` with the same columns, or hub repositories as `owner/name/...`.
    split : "test" is the split that is evaluated, whatever the set itself calls it.
    limit : at most so many samples: the first ones, or with `seed` a random draw.
    seed : shuffles the samples, so that any slice is a random one.
    frames : at most so many evenly spaced frames of a video. Picture sizes (`min_pixels`,
        `max_pixels`) belong to the model's processor and are set when it is loaded.
    sampling_rate : audio is resampled to so many Hz, the rate of the model's feature extractor.
    """
    if name not in REGISTRY:
        raise ValueError(
            f"unknown benchmark {name!r}; there are {', '.join(REGISTRY)}. "
            "Add your own with REGISTRY[name] = Spec(...)"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give a positive number, or None for all samples")
    rows = _Rows(name, source, None if split == "test" else split, frames, sampling_rate)
    numbers = rows.keep()
    if seed is not None:
        numbers = np.random.default_rng(seed).permutation(numbers)
    return Benchmark(rows, numbers[:limit])
