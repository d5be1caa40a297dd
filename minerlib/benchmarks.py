"""The six benchmarks as rows -> samples, with one loader for the hub and for local folders.

    bench = benchmark("text_vqa", source="data/benchmarks", limit=200)
    bench[0].prompt, bench[0].image, bench[0].references
    bench[:96].score(answers)

A benchmark is one entry of ``REGISTRY``: where its rows are, which columns it reads, its prompt
as a template over those columns, its references, its modality and its metric. One's own is one
more entry, and nothing else changes:

    REGISTRY["capitals"] = Spec(
        hub=(Repo("me/capitals", "test"),),
        columns=("image", "country", "capital"),
        prompt="What is the capital of {country}? Answer with one name.",
        references=lambda row: (row["capital"],),
        modality="image",
        metric="exact_match",
    )
    benchmark("capitals", source="my_data")    # reads my_data/capitals/test*.parquet
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import metrics

if TYPE_CHECKING:
    import datasets
    from PIL import Image

log = logging.getLogger(__name__)

SAMPLING_RATE = 16_000  # Hz; what the feature extractors of all families tested here expect
FRAMES = 16  # at most so many frames of a video, evenly spaced
VOCAL_SOUNDS = metrics.VOCAL_SOUNDS
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Sample:
    """One prompt with its media and its reference answers.

    `image` is an RGB picture, `video` uint8 [frame, height, width, channel], `audio` float32
    [time], mono at the benchmark's sampling rate, 16 kHz unless asked otherwise. `choices` are
    answers to be ranked by their probability as the next token; without them the model generates.
    `row` is the sample's number in the whole split and survives slicing.
    """

    prompt: str
    references: tuple[str, ...]
    image: Image.Image | None = None
    video: np.ndarray | None = None
    audio: np.ndarray | None = None
    choices: tuple[str, ...] | None = None
    benchmark: str = ""
    row: int = 0


@dataclass(frozen=True)
class Repo:
    """One dataset repository of the hub: "owner/name", its split and its configuration."""

    name: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Join:
    """Rows of a second set that belong to a row: those whose `theirs` equals the row's `ours`.

    They are looked up only when the columns in `provides` are missing from the rows themselves.
    """

    hub: tuple[Repo, ...]
    ours: str
    theirs: str
    columns: tuple[str, ...]
    provides: tuple[str, ...]


@dataclass(frozen=True)
class Spec:
    """All that the loader knows of a benchmark; the pure step from a row to a `Sample`.

    Parameters
    ----------
    hub : candidates in the order in which they are tried (owners move their sets).
    columns : what every row must have; "a|b" stands for either.
    prompt : a template, filled with the row's columns and with what `fields` returns.
    references : row -> reference answers.
    modality : "text", "image", "video" or "audio"; the last three are decoded from the row.
    metric : a name in `metrics.METRICS`.
    max_new_tokens : budget of a generated answer; 1 where `choices` are ranked instead.
    rows : samples in the published split; a different number is reported.
    fields : (row, joined rows) -> further fields for the template. For the references alone it
        gets the row without media and no joined rows.
    each : a list column of which every element is a sample of its own.
    max_seconds : longer clips are skipped and reported.
    """

    hub: tuple[Repo, ...]
    columns: tuple[str, ...]
    prompt: str
    references: Callable[[dict], Sequence[str]]
    modality: str
    metric: str
    max_new_tokens: int = 16
    rows: int | None = None
    choices: tuple[str, ...] | None = None
    fields: Callable[[dict, list[dict]], dict] | None = None
    join: Join | None = None
    each: str | None = None
    max_seconds: float | None = None

    def sample(
        self,
        row: Mapping[str, Any],
        joined: Sequence[dict] = (),
        *,
        frames: int = FRAMES,
        sampling_rate: int = SAMPLING_RATE,
        benchmark: str = "",
        number: int = 0,
    ) -> Sample:
        """The `Sample` of one dataset row (for `each`: the row with one element of that list)."""
        row = self._complete(row, joined)
        media = {}
        if self.modality != "text":
            media[self.modality] = _DECODE[self.modality](row, frames, sampling_rate)
        try:
            prompt = self.prompt.format_map(row)
        except KeyError as error:
            raise ValueError(
                f"{benchmark}: its prompt names {error}, but a row has {sorted(row)}"
            ) from None
        return Sample(
            prompt=prompt,
            references=self._answers(row),
            choices=self.choices,
            benchmark=benchmark,
            row=number,
            **media,
        )

    def _answers(self, row: dict) -> tuple[str, ...]:
        answers = self.references(row)
        return (answers,) if isinstance(answers, str) else tuple(answers)

    def __post_init__(self) -> None:
        if self.modality not in ("text", *_DECODE):
            raise ValueError(f"modality {self.modality!r}: use text, {', '.join(_DECODE)}")
        metrics.metric_of(self.metric)

    def _complete(self, row: Mapping[str, Any], joined: Sequence[dict]) -> dict:
        return {**row, **(self.fields(dict(row), list(joined)) if self.fields else {})}


# --- the pieces that a row needs -----------------------------------------------------------------


def mmlu_item(row: Mapping[str, Any], answered: bool = False) -> str:
    """One MMLU question with its four lettered options, ending in "Answer:" (and the letter)."""
    options = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True)
    )
    answer = f" {'ABCD'[row['answer']]}\n\n" if answered else ""
    return f"{row['question']}\n{options}Answer:{answer}"


def _mmlu_fields(row: dict, dev: list[dict]) -> dict:
    return {
        "topic": row["subject"].replace("_", " "),
        "shots": "".join(mmlu_item(shot, answered=True) for shot in dev[:5]),
        "item": mmlu_item(row),
    }


def _msvd_fields(row: dict, _: list[dict]) -> dict:
    question, answer = row["qa"][:2]
    return {"question": question, "answer": answer}


def _coco_fields(row: dict, joined: list[dict]) -> dict:
    return {"image": joined[0]["image"]} if joined else {}


def _blob(value: Any) -> io.BytesIO | str:
    """What the decoders open: the bytes of a {bytes, path} struct, or the path if it has none."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return io.BytesIO(value) if isinstance(value, bytes) else value


def decode_image(value: Any) -> Image.Image:
    """An RGB picture from encoded bytes, a path or a {bytes, path} struct."""
    from PIL import Image

    return Image.open(_blob(value)).convert("RGB")


def decode_audio(value: Any, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Float32 [time], mono, resampled to a rate in Hz, from encoded bytes, a path or a struct."""
    import soundfile
    import soxr

    wave, rate = soundfile.read(_blob(value), dtype="float32", always_2d=True)
    return np.ascontiguousarray(soxr.resample(wave.mean(axis=1), rate, sampling_rate))


def decode_video(value: Any, frames: int = FRAMES) -> np.ndarray:
    """Uint8 [frame, height, width, 3], at most `frames` evenly spaced, from an encoded file."""
    import av

    with av.open(_blob(value)) as container:
        total = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
        container.seek(0)
        wanted = set(_evenly(total, frames).tolist())
        pictures = [
            frame.to_ndarray(format="rgb24")
            for i, frame in enumerate(container.decode(video=0))
            if i in wanted
        ]
    return np.stack(pictures)


def _evenly(total: int, frames: int) -> np.ndarray:
    if frames < 1:
        raise ValueError(f"frames={frames}: a video needs at least one frame")
    return np.linspace(0, total - 1, min(total, frames)).round().astype(int)


def _video(row: Mapping[str, Any], frames: int) -> np.ndarray:
    """The raw frames of an MSVD-QA row (uint8 in `binary_frames`), or an encoded `video`."""
    if "binary_frames" not in row:
        return decode_video(row["video"], frames)
    shape = tuple(int(row[k]) for k in ("num_frames", "height", "width", "channels"))
    raw = np.frombuffer(row["binary_frames"], dtype=np.uint8)
    if raw.size != np.prod(shape):
        raise ValueError(
            f"binary_frames holds {raw.size} bytes, but num_frames x height x width x channels = "
            f"{' x '.join(map(str, shape))} needs {np.prod(shape)}: the set stores its frames "
            "in another way than this loader knows"
        )
    return raw.reshape(shape)[_evenly(shape[0], frames)]


_DECODE: dict[str, Callable[[Mapping[str, Any], int, int], Any]] = {
    "image": lambda row, frames, rate: decode_image(row["image"]),
    "audio": lambda row, frames, rate: decode_audio(row["audio"], rate),
    "video": lambda row, frames, rate: _video(row, frames),
}
_MEDIA_COLUMNS = {"image", "audio", "video", "binary_frames"}


# --- the registry: one entry per benchmark -------------------------------------------------------

REGISTRY: dict[str, Spec] = {
    "text_vqa": Spec(
        hub=(
            Repo("lmms-lab-encoder/textvqa", "validation"),
            Repo("lmms-lab/textvqa", "validation"),
        ),
        columns=("image", "question", "answers"),
        prompt=SHORT_ANSWER,
        references=lambda row: row["answers"],
        modality="image",
        metric="vqa_accuracy",
        rows=5000,
    ),
    "coco_caption": Spec(
        hub=(Repo("yerevann/coco-karpathy", "test"),),
        columns=("filename", "sentences|answer"),
        prompt="Describe the image in one sentence.",
        references=lambda row: row["sentences"] if "sentences" in row else row["answer"],
        modality="image",
        metric="cider_d",
        max_new_tokens=48,
        rows=5000,
        fields=_coco_fields,
        # The Karpathy test rows name their pictures; the pictures are in the COCO 2014 val set.
        join=Join(
            hub=(
                Repo("lmms-lab-encoder/COCO-Caption", "val"),
                Repo("lmms-lab/COCO-Caption", "val"),
            ),
            ours="filename",
            theirs="file_name",
            columns=("image", "file_name"),
            provides=("image",),
        ),
    ),
    "mmlu": Spec(
        hub=(Repo("cais/mmlu", "test", "all"),),
        columns=("question", "subject", "choices", "answer"),
        prompt="The following are multiple choice questions (with answers) about {topic}.\n\n"
        "{shots}{item}",
        references=lambda row: ("ABCD"[row["answer"]],),
        modality="text",
        metric="choice_accuracy",
        max_new_tokens=1,
        rows=14042,
        choices=("A", "B", "C", "D"),
        fields=_mmlu_fields,
        join=Join(
            hub=(Repo("cais/mmlu", "dev", "all"),),
            ours="subject",
            theirs="subject",
            columns=("question", "subject", "choices", "answer"),
            provides=("shots",),
        ),
    ),
    "msvd_qa": Spec(
        hub=(Repo("morpheushoc/msvd-qa", "test"),),
        columns=("qa", "binary_frames", "num_frames", "height", "width", "channels"),
        prompt=SHORT_ANSWER,
        references=lambda row: (row["answer"],),
        modality="video",
        metric="exact_match",
        rows=13157,
        fields=_msvd_fields,
        each="qa",
    ),
    "libri": Spec(
        hub=(Repo("openslr/librispeech_asr", "test", "clean"),),
        columns=("audio", "text"),
        prompt="Recognize the speech and output only the transcript.",
        references=lambda row: (row["text"],),
        modality="audio",
        metric="wrr",
        max_new_tokens=128,
        rows=2620,
        # Qwen2-Audio's encoder hears 30 s and drops the rest without a word.
        max_seconds=30.0,
    ),
    "vocal_sound": Spec(
        hub=(
            Repo("lmms-lab-audio/vocalsound", "test"),
            Repo("lmms-lab/vocalsound", "test"),
            Repo("flozi00/VocalSound_audio_16k", "train"),
        ),
        columns=("audio", "answer"),
        prompt="Which vocal sound is this: Laughter, Sniff, Throat clearing, Cough, Sigh or "
        "Sneeze? Answer with one name.",
        references=lambda row: (row["answer"],),
        modality="audio",
        metric="vocal_sound",
    ),
}


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
