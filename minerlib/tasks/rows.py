"""Where the rows of a benchmark come from: the hub, or a folder."""

import itertools
import logging
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np

from minerlib.artifacts import digest, identity
from minerlib.families import RowError
from minerlib.tasks import media, metrics
from minerlib.tasks.spec import REGISTRY, Repo, Sample, Spec, blamed

log = logging.getLogger(__name__)

Change = Callable[[Sample], Sample]


def _parquet_files(folder: Path, repo: Repo) -> list[Path]:
    """Parquet files of a split, all its shards: `all/test-*.parquet`, `clean/test/0.parquet`."""
    found, shards = [], defaultdict(set)
    for file in sorted(folder.rglob("*.parquet")):
        folders = file.relative_to(folder).parts[:-1]
        if repo.split in (*folders, *file.stem.split("-")) and repo.config in (None, *folders):
            found.append(file)
            if part := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})", file.stem):
                shards[file.parent / part[1]].add((int(part[2]), int(part[3])))
    for stem, have in shards.items():
        total = max(of for _, of in have)
        if odd := have ^ {(i, total) for i in range(total)}:
            names = ", ".join(f"{stem.name}-{i:05}-of-{of:05}.parquet" for i, of in sorted(odd))
            raise FileNotFoundError(f"{stem.parent}: {names} missing, or left from other shards")
    return found


def _download(repo: Repo) -> Path | None:
    """A hub repository's folder with the files of its split; None if there is none."""
    from huggingface_hub import constants, errors, snapshot_download

    inside = f"{repo.config}/*" if repo.config else "*"
    patterns = [f"{inside}{repo.split}{rest}*.parquet" for rest in "/-"]
    try:
        return Path(snapshot_download(repo.name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the network's and the hub's own errors differ by version
        way_out = "check the network and HF_TOKEN and try again"
        if isinstance(error, errors.GatedRepoError):  # which is a RepositoryNotFoundError too
            way_out = f"ask for access on https://huggingface.co/datasets/{repo.name}, set HF_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            return None
        elif constants.HF_HUB_OFFLINE:
            way_out = "HF_HUB_OFFLINE=1 allows cached files only: unset it once to download"
        cause = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        text = f"{repo.name} on the hub failed: {cause}; {way_out}, or give source=, a folder"
        raise FileNotFoundError(text) from error


def _locate(
    name: str, candidates: Sequence[Repo], source: Any, split: str | None = None, *alias: str
) -> tuple[list[Path], dict[str, Any]]:
    """Files of a split from the first candidate that exists, and where they come from."""
    # split: another than the candidates'; alias: what it may also be called in NAME/.
    base = None if source is None else Path(source)
    if base and not base.is_dir():
        way_out = f"give one with {name}/*.parquet, or none"
        raise FileNotFoundError(f"source {str(source)!r} is not a folder; {way_out}")
    splits = [split] if split else [*(c.split for c in candidates[:1]), *alias]
    if own := base is not None and (base / name).is_dir():
        candidates = [Repo(name, each) for each in dict.fromkeys(splits)]
    tried = []
    for repo in candidates:
        repo = replace(repo, split=split or repo.split)
        tried.append(f"{repo.name} ({repo.config + ', ' if repo.config else ''}{repo.split})")
        folder = base / repo.name if base else _download(repo)
        if folder is None or not folder.is_dir():
            tried[-1] += ": no such repository"
        elif files := _parquet_files(folder, repo):
            named = [file.relative_to(folder).as_posix() for file in files]
            revision = folder.name if folder.parent.name == "snapshots" else None
            origin = {"repo": None if own else repo.name, "revision": revision, "files": named}
            return files, origin | {"split": repo.split, "config": repo.config}
        elif not own:  # the next owner's rows may be others
            tried[-1] += ": no parquet file of this split"
            break
    where = f"in {str(source)!r}" if base else "on the hub (a private one needs HF_TOKEN)"
    way_out = f"Give source=, a folder with {name}/{splits[0]}-*.parquet, or check the split"
    sought = "; ".join(tried) or "none is known"
    raise FileNotFoundError(f"no rows for {name!r} {where}. Tried: {sought}. {way_out}")


def _read(name: str, files: Sequence[Path], columns: Sequence[str]) -> Any:
    """Memory-mapped rows of parquet files, a `datasets.Dataset`; media columns stay undecoded."""
    import datasets as hf

    bars = not hf.are_progress_bars_disabled()
    hf.disable_progress_bars()
    try:
        rows = hf.load_dataset("parquet", data_files=[*map(str, files)], split="train")
    finally:
        if bars:
            hf.enable_progress_bars()
    have = set(rows.column_names)
    if missing := [c for c in columns if not have & set(c.split("|"))]:
        what = f"column {', '.join(map(repr, missing))} is missing in {files[0].name}"
        way_out = f"Rename the column, or change `columns` of REGISTRY[{name!r}]"
        raise ValueError(f"{name}: {what}; found {sorted(have)}. {way_out}")
    for column, feature in rows.features.items():
        if isinstance(feature, hf.Audio | hf.Image | hf.Video):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


class _Rows:
    """The rows of a split, those joined to them, and the samples that they hold, by number."""

    def __init__(
        self, name: str, spec: Spec, source: Any, split: str | None, on_error: str, **how: int
    ):
        self.name, self.how, self.spec = name, how, spec
        files, self.origin = _locate(name, spec.hub, source, split, "test")
        self.rows = _read(name, files, spec.columns)
        self.join, self.joined_at = spec.join, defaultdict[Any, list[int]](list)
        if self.join and set(self.join.provides) <= set(self.rows.column_names):
            self.join = None
        if self.join:
            files, self.origin["joined"] = _locate(name, self.join.hub, source)
            self.joined = _read(name, files, self.join.columns)
            for i, key in enumerate(self.joined[self.join.theirs]):
                self.joined_at[key].append(i)
        self.notices: list[str] = []
        self.places: list[tuple[int, int]] = []  # a sample's row, and element of its `each` column
        self.references: list[tuple[str, ...]] = []
        self._raw = lru_cache(1)(self.rows.__getitem__)  # one clip, many questions
        self.made_of = cache(self._made_of)
        self._sources: dict[tuple[bool, int], str] = {}
        self._check(on_error)

    def _check(self, on_error: str) -> None:
        """Find all that can be known before a medium is decoded: faults, lengths, numbers."""
        name, spec, faults = self.name, self.spec, dict[int, RowError]()

        def attempt(step: Callable, number: int, *given) -> Any:
            try:
                return step(number, *given)
            except RowError as error:
                if on_error == "raise":
                    raise
                faults[number] = error

        for index, row in enumerate(self._light()):
            for element in range(len(row[spec.each] or ()) if spec.each else 1):
                self.places.append((index, element))
                self.references.append(attempt(self._answers, len(self.references), row) or ())
        self.origin["rows"] = total = len(self.places)
        if empty := len(self.rows) - len({index for index, _ in self.places}):
            self.note(f"{name}: {empty} rows have an empty {spec.each!r}")
        if self.origin["repo"] and spec.rows not in (None, total):
            text = f"loaded {total} samples, the published split has {spec.rows}"
            self.note(f"{name}: {text}: scores may not compare", warnings.warn)
        if odd := metrics.misfit(spec.metric, self.references, spec.language):
            self.note(f"{name}: {odd}", warnings.warn)
        most = spec.max_seconds or math.inf
        sounds = [n for n in range(total) if n not in faults] if spec.max_seconds else []
        if long := [n for n in sounds if (attempt(self._seconds, n) or 0) > most]:
            text = f"skipped {len(long)} of {total} clips longer than {most:g} s"
            self.note(f"{name}: {text}, which the audio encoder would cut")
        if faults:
            first = next(iter(faults.values()))
            self.note(f"{name}: left out {len(faults)} of {total} rows, the first: {first}")
            self.notices += map(str, faults.values())
        self.kept = np.setdiff1d(range(total), [*faults, *long]).astype(int)
        if not len(self.kept):
            raise ValueError(f"{name}: no row that can be used, of {total}. {self.notices}")

    def note(self, text: str, tell: Callable[[str], object] = log.warning) -> None:
        """Say once what a reader of results must know, and keep it for their manifests."""
        if text not in self.notices:
            self.notices.append(text)
            tell(text)

    def _light(self) -> Iterable[dict]:
        """The rows without their media."""
        schema, modality = self.rows.features.arrow_schema, self.spec.modality
        heavy = {f.name for f in schema if f.name == modality != "text" or "binary" in str(f.type)}
        light = self.rows.remove_columns([*heavy - {self.spec.each}])
        return light if light.column_names else itertools.repeat({}, len(self.rows))

    def _row(self, number: int, row: dict) -> tuple[dict, list[int]]:
        """A sample's own row, and where the rows are that are joined to it."""
        each, join = self.spec.each, self.join
        row = {**row, each: row[each][self.places[number][1]]} if each else dict(row)
        if not join:
            return row, []
        with blamed(self.name, number, join.ours):
            found = self.joined_at.get(row[join.ours], [])
            if not found or len(found) > 1 and not join.many:
                place = self.origin["joined"]["repo"] or self.origin["joined"]["files"][0]
                count = f"{len(found)} rows" if found else "no row"
                raise ValueError(f"{count} with {join.theirs} {row[join.ours]!r} in {place}")
        return row, found

    def _answers(self, number: int, light: dict) -> tuple[str, ...]:
        at = (self.name, number)
        return self.spec.answers(self.spec.completed(self._row(number, light)[0], (), at), at)

    def _whole(self, number: int) -> tuple[dict, list[dict]]:
        """A sample's row and those joined to it, with media as they are stored."""
        row, found = self._row(number, self._raw(self.places[number][0]))
        return row, [self.joined[i] for i in found]

    def _completed(self, number: int) -> dict:
        return self.spec.completed(*self._whole(number), (self.name, number))

    def _seconds(self, number: int) -> float:
        with blamed(self.name, number, self.spec.modality):
            return media.duration(media.medium(self._completed(number), self.spec.modality))

    def sample(self, number: int) -> Sample:
        row, joined = self._whole(number)
        sample = self.spec.sample(row, joined, benchmark=self.name, number=number, **self.how)
        if sample.notice:
            self.note(f"{self.name} row {number}: {self.spec.modality}: {sample.notice}")
        return sample

    def _made_of(self, number: int) -> tuple[str, str]:
        """Hashes of what is asked and of the medium as it is stored (text: of the prompt)."""
        # For a row that cannot be used its name: whoever reads that row is told why.
        prompt = source = f"row {number}"
        index, modality = self.places[number][0], self.spec.modality
        with suppress(ValueError, OSError):
            row, raw = self._completed(number), self._raw(index)
            prompt = asked = digest(self.spec.asked(row, (self.name, number)))
            if self.spec.options:
                prompt = digest([asked, *self.spec.options(row)])
            if modality == "text":
                return prompt, asked
            # Hashed once a clip, unless it is joined, added or one element of a list.
            own = all(row.get(c) is raw.get(c) for c in media.MEDIA_COLUMNS)
            if (key := (own, index if own else number)) not in self._sources:
                self._sources[key] = digest(media.source_bytes(media.medium(row, modality)))
            source = self._sources[key]
        return prompt, source

    def shuffled(self, seed: int) -> np.ndarray:
        """The kept numbers in random order, samples that share a medium one after another."""
        known, units = range(len(self.rows)) if self.spec.each else None, defaultdict(list)
        if self.join and self.spec.modality in self.join.provides:
            known = self.rows[self.join.ours]
        for number in self.kept.tolist():
            unit = known[self.places[number][0]] if known else self.made_of(number)[1]
            units[unit].append(number)
        groups, order = [*units.values()], np.random.default_rng(seed).permutation(len(units))
        return np.concatenate([groups[i] for i in order])


class Benchmark(Sequence):
    """Samples of one benchmark, decoded when asked for; a slice is a benchmark again.

    `numbers` are the samples' in the whole split. `notices` say what a reader of results must
    know: rows left out, counts and clips that are not right. `origin` says where the rows are
    from: repo and revision (None for a folder), split, config, files, rows, and what is `joined`.
    `made`, of `changed`, is what every sample goes through.
    """

    def __init__(self, rows: _Rows, numbers: np.ndarray, made: tuple[Change, ...] = ()) -> None:
        self._rows, self.numbers, self.name, self.spec = rows, numbers, rows.name, rows.spec
        self.made = made
        self.metric, self.max_new_tokens = rows.spec.metric, rows.spec.max_new_tokens
        self.notices, self.origin = rows.notices, rows.origin

    @property
    def media(self) -> list[str]:
        """A hash of each sample's medium as it is stored, or of its prompt where it has none."""
        return [self._rows.made_of(number)[1] for number in self.numbers.tolist()]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Any:
        numbers = self.numbers[which]
        if numbers.ndim:
            return Benchmark(self._rows, numbers, self.made)
        return reduce(lambda x, change: change(x), self.made, self._rows.sample(int(numbers)))

    def changed(self, change: Change) -> "Benchmark":
        """The same rows, asked otherwise: `change` makes one sample of another."""
        return Benchmark(self._rows, self.numbers, (*self.made, change))

    def __repr__(self) -> str:
        total = len(self._rows.references)
        return f"Benchmark({self.name!r}, {len(self)} of {total} samples, metric={self.metric!r})"

    @cached_property
    def references(self) -> list[tuple[str, ...]]:
        """The reference answers of every sample."""
        return [self._rows.references[number] for number in self.numbers]

    @property
    def whole(self) -> list[tuple[str, ...]]:
        """The reference answers of all samples of the split, which some metrics count in."""
        return self._rows.references

    def score(self, answers: Sequence[str]) -> list[float]:
        """The metric of each sample, in [0, 1]."""
        return metrics.row_scores(self.metric, answers, self.references, self.whole)

    def corpus_score(self, answers: Sequence[str]) -> float:
        """The benchmark's own figure over all samples, as it is published."""
        return metrics.corpus_score(self.metric, answers, self.references, self.whole)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that makes these samples and their scores; alike on every processor."""
        spec, numbers = self.spec, self.numbers.tolist()
        decoded = {
            "image": [media.picture],
            "video": [media.clip, self._rows.how["frames"]],
            "audio": [media.sound, self._rows.how["sampling_rate"], spec.max_seconds],
        }.get(spec.modality)
        entry = metrics.metric_of(self.metric)
        metric: list = [self.metric, *map(identity, entry.functions)]
        metric += [] if metrics.is_shipped(entry) else [entry.largest, entry.clip]
        counted = [self.whole] if entry.whole else []
        asked = [self.name, spec.choices, spec.max_new_tokens, *map(self._rows.made_of, numbers)]
        made = [[identity(change) for change in self.made]] if self.made else []
        return digest([numbers, asked, self.references, decoded, [*metric, *counted], *made])


def benchmark(
    name: str,
    source: str | os.PathLike | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int | None = None,
    frames: int = media.FRAMES,
    sampling_rate: int = media.SAMPLING_RATE,
    on_error: str = "raise",
    lower_case: bool = False,
) -> Benchmark:
    """Load a benchmark by its name in `REGISTRY`, from the hub or from a folder.

    source : None is the hub (only the files of one split are downloaded); a folder holds
        `NAME/*.parquet` with the same columns, or hub repositories as `owner/name/...`.
    split : "test" is the split that is evaluated, whatever the set itself calls it.
    limit : at most so many samples: the first ones, or with `seed` a random draw.
    seed : shuffles the samples, those about one medium as a unit, so that any slice is random.
    frames : at most so many evenly spaced frames of a video.
    sampling_rate : audio is resampled to so many Hz, the rate of the model's feature extractor.
    on_error : "raise" RowError for the first row whose references or joined rows are not right,
        or "skip" such rows, which `notices` then lists.
    lower_case : references in small letters, for a model that writes so where the set does not.
    """
    if name not in REGISTRY:
        known = f"there are {', '.join(REGISTRY)}. Add your own with REGISTRY[name] = Spec(...)"
        raise ValueError(f"unknown benchmark {name!r}; {known}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: use raise or skip")
    how = {"frames": frames, "sampling_rate": sampling_rate}
    _positive(limit=1 if limit is None else limit, **how)
    spec = replace(REGISTRY[name], lower_case=True) if lower_case else REGISTRY[name]
    rows = _Rows(name, spec, source, None if split == "test" else split, on_error, **how)
    return Benchmark(rows, rows.kept if seed is None else rows.shuffled(seed))[:limit]


def split(bench: Benchmark, limit: int, eval_limit: int) -> tuple[Benchmark, Benchmark]:
    """Rows for mining and for evaluation: the first `limit`, and `eval_limit` from the end.

    No medium (for text: no prompt) is in both; ValueError says how many rows there are.
    """
    _positive(limit=limit, eval_limit=eval_limit)
    mining, late = bench[:limit], reversed(range(limit, len(bench)))
    mined = set(mining.media)
    others = (i for i in late if mined.isdisjoint(bench[i : i + 1].media))
    last = list(itertools.islice(others, eval_limit))
    if len(mining) < limit or len(last) < eval_limit:
        what = f"limit={limit} and eval_limit={eval_limit}: {bench.name} has {len(bench)} rows"
        left = f"after the first {limit} there are {len(last)} about other media"
        raise ValueError(f"{what}, and {left}; lower one of them")
    return mining, bench[last[::-1]]


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number}: give a positive number")
