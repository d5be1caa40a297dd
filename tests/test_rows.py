"""Loaders: the shipped files, folders laid out like the hub repositories, and what goes wrong."""

from __future__ import annotations

import dataclasses
import inspect
import io
import itertools
import shutil
from pathlib import Path

import hub as cache
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from huggingface_hub import errors
from PIL import Image

from minerlib import artifacts
from minerlib.model import RowError
from minerlib.tasks import (
    ANSWER_METRICS,
    REGISTRY,
    Benchmark,
    Join,
    Metric,
    Repo,
    Sample,
    Spec,
    benchmark,
    media,
)  # fmt: skip
from minerlib.tasks.rows import split

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "benchmarks"


# --- small files of the real schemas -------------------------------------------------------------


def png(color: str = "red", size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def flac(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone] * channels, 1), rate, format="FLAC")
    return buffer.getvalue()


def stored(data: bytes, path: str = "file") -> dict:
    return {"bytes": data, "path": path}


def write(file: Path, rows: list[dict], features: str | None = None) -> None:
    """Rows as parquet; `features` names a column marked as an image or audio, as the hub does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if features:
        kind = {"image": "Image", "audio": "Audio"}[features]
        mark = f'{{"info": {{"features": {{"{features}": {{"_type": "{kind}"}}, '
        others = ", ".join(
            f'"{c}": {{"feature": {{"dtype": "string", "_type": "Value"}}, "_type": "List"}}'
            if pa.types.is_list(table.schema.field(c).type)
            else f'"{c}": {{"dtype": "string", "_type": "Value"}}'
            for c in table.column_names
            if c != features
        )
        table = table.replace_schema_metadata({"huggingface": mark + others + "}}}"})
    pq.write_table(table, file)


VQA = [
    {"image": stored(png(c)), "question": f"what color is {i}?", "answers": [c] * 10}
    for i, c in enumerate(("red", "green", "blue"))
]
KARPATHY = [
    {"filename": f"COCO_{i}.jpg", "url": "", "sentences": [f"caption {i} {k}" for k in range(5)]}
    for i in (3, 1)
]
COCO = [
    {"image": stored(png(size=(4 + i, 5))), "file_name": f"COCO_{i}.jpg", "answer": ["x"]}
    for i in range(5)
]
MMLU = [
    {"question": f"q{i}", "subject": s, "choices": list("wxyz"), "answer": i % 4}
    for i, s in enumerate(("high_school_biology", "astronomy"))
]
DEV = [
    {"question": f"{s} {i}", "subject": s, "choices": list("wxyz"), "answer": i % 4}
    for i in range(6)
    for s in ("astronomy", "high_school_biology")
]


def msvd(frames: int = 3, questions: tuple[int, ...] = (2, 1)) -> list[dict]:
    size = frames * 4 * 5 * 3
    return [
        {
            "video_path": f"{v}.avi",
            "qa": [[f"what is {k}?", f"answer {v} {k}"] for k in range(n)],
            "binary_frames": (np.arange(size) % 251).astype(np.uint8).tobytes(),
            "num_frames": frames,
            "height": 4,
            "width": 5,
            "channels": 3,
        }
        for v, n in enumerate(questions)
    ]


LIBRI = [
    {"file": "a", "audio": stored(flac(s)), "text": t, "speaker_id": 1, "chapter_id": 2, "id": t}
    for s, t in ((0.5, "ONE"), (30.5, "TOO LONG"), (1.0, "TWO"))
]
VOCAL = [{"audio": stored(flac(0.5, 192_000, channels=2)), "answer": "Throat clearing"}]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder laid out like the hub: owner/name/..., with other splits and configs beside."""
    write(tmp_path / "lmms-lab/textvqa/data/validation-00000-of-00002.parquet", VQA[:2], "image")
    write(tmp_path / "lmms-lab/textvqa/data/validation-00001-of-00002.parquet", VQA[2:], "image")
    write(tmp_path / "lmms-lab/textvqa/data/train-00000-of-00001.parquet", VQA * 3, "image")
    write(tmp_path / "yerevann/coco-karpathy/data/test-00000-of-00001.parquet", KARPATHY)
    write(tmp_path / "yerevann/coco-karpathy/data/restval-00000-of-00001.parquet", KARPATHY * 2)
    write(tmp_path / "lmms-lab-encoder/COCO-Caption/data/val-00000-of-00001.parquet", COCO, "image")
    write(tmp_path / "cais/mmlu/all/test-00000-of-00001.parquet", MMLU)
    write(tmp_path / "cais/mmlu/all/dev-00000-of-00001.parquet", DEV)
    write(tmp_path / "cais/mmlu/astronomy/test-00000-of-00001.parquet", MMLU)
    write(tmp_path / "morpheushoc/msvd-qa/data/test-00000-of-00001.parquet", msvd())
    write(tmp_path / "openslr/librispeech_asr/clean/test/0000.parquet", LIBRI)
    write(tmp_path / "openslr/librispeech_asr/other/test/0000.parquet", LIBRI * 2)
    write(tmp_path / "lmms-lab/vocalsound/data/test-00000-of-00001.parquet", VOCAL, "audio")
    return tmp_path


# --- the shipped files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(REGISTRY))
def test_shipped(name):
    bench = benchmark(name, SHIPPED)
    assert len(bench) >= 400
    first, last = bench[0], bench[-1]
    assert (first.benchmark, first.row) == (name, 0) and last.row >= len(bench) - 1
    spec = REGISTRY[name]
    for sample in (first, last):
        for kind in ("image", "video", "audio"):
            assert (getattr(sample, kind) is None) == (spec.modality != kind)
        assert (sample.choices == spec.choices) != bool(spec.options)
    # Right answers score high, wrong ones low, with the same references as the samples hold.
    assert bench.references[0] == first.references and bench.references[-1] == last.references
    assert bench.corpus_score([r[0] for r in bench.references]) > 0.8
    assert bench.corpus_score([""] * len(bench)) == 0
    scores = bench[:20].score([r[0] for r in bench[:20].references])
    assert len(scores) == 20 and all(0 <= s <= 1 for s in scores)


# --- hub layout ----------------------------------------------------------------------------------


def test_text_vqa(hub):
    bench = benchmark("text_vqa", hub)
    assert len(bench) == 3
    sample = bench[2]
    assert sample.prompt == "what color is 2?\nAnswer the question using a single word or phrase."
    assert sample.references == ("blue",) * 10
    assert sample.image.mode == "RGB" and sample.image.size == (12, 8)
    assert sample.image.getpixel((0, 0)) == (0, 0, 255)


def test_coco_joins_pictures_by_file_name(hub):
    bench = benchmark("coco_caption", hub)
    assert [s.image.size for s in bench] == [(7, 5), (5, 5)]  # pictures 3 and 1, in this order
    assert bench[0].references == tuple(f"caption 3 {k}" for k in range(5))
    assert bench[0].prompt == "Describe the image in one sentence."


def test_coco_without_a_picture(hub):
    write(hub / "lmms-lab-encoder/COCO-Caption/data/val-00000-of-00001.parquet", COCO[:2], "image")
    with pytest.raises(RowError, match="no row with file_name 'COCO_3.jpg' in lmms-lab-enc") as e:
        benchmark("coco_caption", hub)
    assert (e.value.benchmark, e.value.row, e.value.field) == ("coco_caption", 0, "filename")
    assert [s.row for s in benchmark("coco_caption", hub, on_error="skip")] == [1]


def test_mmlu_prompt(hub):
    bench = benchmark("mmlu", hub)
    assert len(bench) == 2 and bench[0].choices == ("A", "B", "C", "D")
    shots = "".join(
        f"high_school_biology {i}\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCD'[i % 4]}\n\n"
        for i in range(5)
    )
    assert bench[0].prompt == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        f"{shots}q0\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert [s.references for s in bench] == [("A",), ("B",)]


def test_mmlu_needs_its_dev_rows(hub):
    (hub / "cais/mmlu/all/dev-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="dev"):
        benchmark("mmlu", hub)


def test_msvd_has_one_sample_per_question(hub):
    bench = benchmark("msvd_qa", hub)
    assert [s.references for s in bench] == [("answer 0 0",), ("answer 0 1",), ("answer 1 0",)]
    assert [s.row for s in bench] == [0, 1, 2]
    video = bench[1].video
    assert video.shape == (3, 4, 5, 3) and video.dtype == np.uint8
    np.testing.assert_array_equal(video.ravel(), np.arange(180) % 251)
    assert benchmark("msvd_qa", hub, frames=2)[0].video.shape[0] == 2


def test_msvd_frames_of_another_layout(hub):
    rows = msvd()
    rows[0]["num_frames"] = 4
    write(hub / "morpheushoc/msvd-qa/data/test-00000-of-00001.parquet", rows)
    bench = benchmark("msvd_qa", hub)
    with pytest.raises(RowError, match="msvd_qa row 1: video: .*180 bytes.*4 x 4 x 5 x 3"):
        bench[1]
    assert bench[2].video.shape == (3, 4, 5, 3)


def test_libri_skips_long_clips_and_says_so(hub, caplog):
    bench = benchmark("libri", hub)
    assert "skipped 1 of 3 clips longer than 30 s" in caplog.text
    assert [s.row for s in bench] == [0, 2]  # row numbers are those of the whole split
    assert [len(s.audio) for s in bench] == [8000, 16000] and bench[0].audio.dtype == np.float32
    assert bench.references == [("ONE",), ("TWO",)]


def test_vocal_sound_is_resampled_and_mixed_down(hub):
    audio = benchmark("vocal_sound", hub)[0].audio
    assert audio.shape == (8000,) and audio.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(audio))
    assert np.argmax(spectrum) * 16_000 / len(audio) == pytest.approx(440, abs=2)
    assert np.abs(audio).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.fault("row count")
def test_published_row_count_is_checked(hub, monkeypatch):
    told = "text_vqa: loaded 3 samples, the published split has 5000: scores may not compare"
    with pytest.warns(UserWarning, match=told):
        bench = benchmark("text_vqa", hub, limit=1)
    assert bench.notices == [told] == bench[:1].notices and bench.origin["rows"] == 3
    right = dataclasses.replace(REGISTRY["text_vqa"], rows=3)
    monkeypatch.setitem(REGISTRY, "text_vqa", right)
    assert benchmark("text_vqa", hub).notices == []
    assert benchmark("text_vqa", SHIPPED).notices == []  # a folder of one's own has its own count


# --- the hub -------------------------------------------------------------------------------------


def failing(kind: type, status: int = 404) -> Exception:
    """One of the hub's errors, as its client raises it."""
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no way\nmore")
    response = type("Response", (), {"headers": {}, "request": None, "status_code": status})()
    return kind("no way", response=response)


@pytest.fixture
def online(hub, monkeypatch):
    """The hub's folder behind its download call; `online(name=error)` makes repositories fail."""
    import fnmatch

    def serve(**broken):
        calls = []

        def snapshot_download(repo, repo_type, allow_patterns):
            folder = hub / repo
            calls.append(repo)
            if (key := repo.replace("/", "__").replace("-", "_")) in broken:
                raise broken[key]
            if not folder.is_dir():
                raise failing(errors.RepositoryNotFoundError)
            assert repo_type == "dataset"
            names = [f.relative_to(folder).as_posix() for f in folder.rglob("*.parquet")]
            wanted = [n for n in names if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
            assert wanted
            assert not any("train" in n or "astronomy" in n or "other" in n for n in wanted)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return serve


def test_hub_calls_download_one_split_and_fall_back_to_the_old_owner(hub, online):
    calls = online()
    with pytest.raises(FileNotFoundError, match="'common_knowledge' on the hub .* none is known"):
        benchmark("common_knowledge")
    for name in [name for name, spec in REGISTRY.items() if spec.hub]:
        remote, local = benchmark(name), benchmark(name, hub)
        assert [s.prompt for s in remote] == [s.prompt for s in local]
        assert remote.fingerprint == local.fingerprint and remote.origin == local.origin
    assert calls[:2] == ["lmms-lab-encoder/textvqa", "lmms-lab/textvqa"]
    assert remote.origin["repo"] == "lmms-lab/vocalsound"


@pytest.mark.fault("hub repository fails")
@pytest.mark.parametrize(
    ("error", "offline", "way_out"),
    [
        (failing(errors.GatedRepoError, 403), False, "GatedRepoError: no way; ask for access on "
         "https://huggingface.co/datasets/lmms-lab-encoder/textvqa"),
        (failing(errors.HfHubHTTPError, 500), False, "HfHubHTTPError: no way; check the network"),
        (ConnectionError("no way\nmore"), False, "ConnectionError: no way; check the network"),
        (TimeoutError(), False, "TimeoutError: no message; check the network"),
        (failing(errors.LocalEntryNotFoundError), True,
         "LocalEntryNotFoundError: no way; HF_HUB_OFFLINE=1 allows cached files only"),
    ],
)  # fmt: skip
def test_a_failing_repository_is_an_error(online, monkeypatch, error, offline, way_out):
    """And not a reason to take the next owner's rows."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    calls = online(lmms_lab_encoder__textvqa=error)
    with pytest.raises(FileNotFoundError) as told:
        benchmark("text_vqa")
    assert str(told.value).startswith(f"lmms-lab-encoder/textvqa on the hub failed: {way_out}")
    assert "source=" in str(told.value) and "more" not in str(told.value)
    assert told.value.__cause__ is error and calls == ["lmms-lab-encoder/textvqa"]


@pytest.mark.fault("hub repository fails")
def test_the_next_owner_is_not_asked_for_a_split_that_the_first_lacks(hub, online):
    write(hub / "lmms-lab-encoder/textvqa/data/other-00000-of-00001.parquet", VQA, "image")
    with pytest.raises(
        FileNotFoundError, match=r"lmms-lab-encoder/textvqa \(validation\): no parq"
    ):
        benchmark("text_vqa", hub)
    with pytest.raises(FileNotFoundError, match="Tried: lmms-lab-enc[^;]*Give source="):
        benchmark("text_vqa", hub)


def test_repositories_that_are_nowhere_are_all_named(hub, online):
    online()
    shutil.rmtree(hub / "lmms-lab")
    with pytest.raises(
        FileNotFoundError,
        match=r"'vocal_sound' on the hub .*HF_TOKEN.*lmms-lab-audio/vocalsound \(test\): no such "
        r"repository; lmms-lab/vocalsound.*flozi00/VocalSound_audio_16k \(train\).*Give source=",
    ):
        benchmark("vocal_sound")


@pytest.mark.fault("revision unknown")
def test_the_revision_is_known(tmp_path, monkeypatch):
    """With the hub's own client, offline, on a cache as a download leaves it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files = cache.repository(tmp_path, "dataset", "cais/mmlu") / "all"
    write(files / "test-00000-of-00001.parquet", MMLU)
    write(files / "dev-00000-of-00001.parquet", DEV)
    known = {"repo": "cais/mmlu", "revision": cache.COMMIT, "config": "all"}
    origin = benchmark("mmlu").origin
    joined = known | {"split": "dev", "files": ["all/dev-00000-of-00001.parquet"]}
    here = {"split": "test", "files": ["all/test-00000-of-00001.parquet"], "rows": 2}
    assert origin == known | here | {"joined": joined}
    with pytest.raises(FileNotFoundError, match=r"lmms-lab-encoder/textvqa .*HF_HUB_OFFLINE=1"):
        benchmark("text_vqa")
    local = benchmark("mmlu", SHIPPED).origin
    assert (local["repo"], local["revision"], local["split"]) == (None, None, "test")


@pytest.mark.fault("missing shards")
@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([(0, 3), (2, 3)], "validation-00001-of-00003.parquet missing"),
        ([(1, 2)], "validation-00000-of-00002.parquet missing"),
        ([(0, 4)], "00001-of-00004.parquet, validation-00002-of-00004.parquet, .*-00003-of-00004"),
        ([(0, 1), (0, 2), (1, 2)], "validation-00000-of-00001.parquet missing, or left from other"),
    ],
)
def test_all_shards_are_there_or_named(tmp_path, shards, message):
    for i, n in shards:
        write(tmp_path / f"text_vqa/validation-{i:05}-of-{n:05}.parquet", VQA)
    write(tmp_path / "text_vqa/train-00000-of-00002.parquet", VQA)  # no concern of this split
    with pytest.raises(FileNotFoundError, match=message):
        benchmark("text_vqa", tmp_path)


# --- slices, order, fingerprints -----------------------------------------------------------------


def test_slices_are_benchmarks(hub):
    bench = benchmark("text_vqa", hub)
    tail = bench[-2:]
    assert isinstance(tail, Benchmark) and tail.name == "text_vqa"
    assert [s.row for s in tail] == [1, 2] and tail[0].references == ("green",) * 10
    assert tail[1:][0].row == 2 and bench[[2, 0]][0].row == 2
    assert tail.score(["Green.", "red"]) == [1.0, 0.0] and tail.corpus_score(["green", ""]) == 0.5
    with pytest.raises(IndexError):
        bench[3]
    assert repr(tail) == "Benchmark('text_vqa', 2 of 3 samples, metric='vqa_accuracy')"


def test_limit_and_seed(hub):
    assert len(benchmark("text_vqa", hub, limit=2)) == 2
    assert len(benchmark("text_vqa", hub, limit=99)) == 3
    drawn = [[s.row for s in benchmark("text_vqa", hub, seed=s)] for s in range(6)]
    assert all(sorted(rows) == [0, 1, 2] for rows in drawn) and len(set(map(tuple, drawn))) > 1
    first = benchmark("text_vqa", hub, seed=3, limit=2)
    assert [s.row for s in first] == drawn[3][:2]


def pictures(colours: str) -> list[dict]:
    """Questions about pictures, each a letter: r, g, b, ... alike letters are one picture."""
    names = {"r": "red", "g": "green", "b": "blue", "w": "white", "k": "black", "y": "yellow"}
    return [
        {"image": stored(png(names[c]), f"{i}.png"), "question": f"{i}?", "answers": ["x"] * 10}
        for i, c in enumerate(colours)
    ]


@pytest.mark.fault("shuffled with the seed")
@pytest.mark.parametrize("place", ["text_vqa", "lmms-lab/textvqa/data", "hub"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_source_is_shuffled_alike(tmp_path, monkeypatch, place, shards):
    """A folder of one's own, one laid out like the hub, and the hub; however it is cut."""
    rows = pictures("rgbwky")
    folder = tmp_path / ("text_vqa" if place == "text_vqa" else "lmms-lab/textvqa/data")
    for i in range(shards):
        part = rows[i * 6 // shards : (i + 1) * 6 // shards]
        write(folder / f"validation-{i:05}-of-{shards:05}.parquet", part, "image")

    def snapshot_download(repo, **_):
        if "encoder" in repo:
            raise failing(errors.RepositoryNotFoundError)
        return str(tmp_path / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = None if place == "hub" else tmp_path
    for seed in range(4):
        bench = benchmark("text_vqa", source, seed=seed)
        assert [s.row for s in bench] == np.random.default_rng(seed).permutation(6).tolist()
        assert [s.prompt[0] for s in bench] == [str(s.row) for s in bench]


def groups(bench: Benchmark, name) -> list:
    return [key for key, _ in itertools.groupby(name(s) for s in bench)]


@pytest.mark.fault("shuffled with the seed")
def test_questions_about_one_medium_stay_together(hub, tmp_path):
    write(tmp_path / "text_vqa/validation.parquet", pictures("rgrbgrwb"))
    write(tmp_path / "msvd_qa/test.parquet", msvd(questions=(2, 3, 1, 2)))
    captions = [KARPATHY[0] | {"url": str(i)} for i in range(2)] + [KARPATHY[1]] + [KARPATHY[0]]
    write(hub / "yerevann/coco-karpathy/data/test-00000-of-00001.parquet", captions)
    twice = [MMLU[0], MMLU[1], MMLU[0] | {"answer": 2}, MMLU[1]]
    write(hub / "cais/mmlu/all/test-00000-of-00001.parquet", twice)
    cases = {
        "text_vqa": (tmp_path, lambda s: s.image.getpixel((0, 0)), 4),
        "msvd_qa": (tmp_path, lambda s: s.references[0].split()[1], 4),
        "coco_caption": (hub, lambda s: s.image.size, 2),
        "mmlu": (hub, lambda s: s.prompt, 2),
    }
    for name, (source, medium, n) in cases.items():
        orders = set()
        for seed in range(8):
            bench = benchmark(name, source, seed=seed)
            assert len(groups(bench, medium)) == n, name
            rows = [s.row for s in bench]
            assert sorted(rows) == list(range(len(bench)))
            # Inside a group rows keep their order.
            assert all(
                [s.row for s in part] == sorted(s.row for s in part)
                for part in ([s for s in bench if medium(s) == m] for m in groups(bench, medium))
            )
            orders.add(tuple(rows))
        assert len(orders) > 1


@pytest.mark.fault("rows share a medium")
@pytest.mark.parametrize(
    ("colours", "limit", "eval_limit", "rows"),
    [
        ("rgbrwgky", 2, 3, [4, 6, 7]),  # not 5, the green one
        ("rgbrwgky", 2, 4, [2, 4, 6, 7]),  # nor 3, the red one
        ("rgbrwgky", 3, 2, [6, 7]),
        ("rrrrrr", 1, 1, "has 6 rows, and after the first 1 there are 0 about other media"),
        ("rgbrwgky", 2, 5, "has 8 rows, and after the first 2 there are 4 about other media"),
        ("rgb", 4, 1, "limit=4 and eval_limit=1: text_vqa has 3 rows"),
        ("rgb", 3, 1, "after the first 3 there are 0"),
    ],
)
def test_mining_and_evaluation_share_no_picture(tmp_path, colours, limit, eval_limit, rows):
    write(tmp_path / "text_vqa/validation.parquet", pictures(colours))
    bench = benchmark("text_vqa", tmp_path)
    if isinstance(rows, str):
        with pytest.raises(ValueError, match=rows):
            split(bench, limit, eval_limit)
        return
    mining, evaluation = split(bench, limit, eval_limit)
    assert [s.row for s in mining] == list(range(limit)) and mining.name == "text_vqa"
    assert [s.row for s in evaluation] == rows
    pixels = [{s.image.tobytes() for s in part} for part in (mining, evaluation)]
    assert not pixels[0] & pixels[1]


@pytest.mark.fault("rows share a medium")
def test_no_medium_is_on_both_sides_whatever_the_source(hub, tmp_path):
    clips = msvd(questions=(2, 2, 1))
    clips[1]["binary_frames"] = bytes(180)  # the first and third rows hold the same clip
    write(tmp_path / "msvd_qa/test.parquet", clips)
    _, evaluation = split(benchmark("msvd_qa", tmp_path), 1, 2)
    assert [s.row for s in evaluation] == [2, 3]
    # The same picture under two names, joined.
    write(hub / "yerevann/coco-karpathy/data/test-00000-of-00001.parquet", [*KARPATHY, KARPATHY[1]])
    same = [COCO[1] | {"file_name": f"COCO_{i}.jpg"} for i in (1, 3)]
    write(hub / "lmms-lab-encoder/COCO-Caption/data/val-00000-of-00001.parquet", same, "image")
    with pytest.raises(ValueError, match="there are 0"):
        split(benchmark("coco_caption", hub), 1, 1)
    # Text: the whole prompt, so that another answer to it is no other row.
    again = [MMLU[0], MMLU[0] | {"answer": 3}, MMLU[1]]
    write(hub / "cais/mmlu/all/test-00000-of-00001.parquet", again)
    assert [s.row for s in split(benchmark("mmlu", hub), 1, 1)[1]] == [2]


@pytest.mark.parametrize("name", list(REGISTRY))
def test_shipped_rows_are_enough_for_both_sides(name):
    for limit in (96, 200):
        mining, evaluation = split(benchmark(name, SHIPPED, seed=0), limit, limit)
        assert len(mining) == len(evaluation) == limit
        assert not set(mining.media) & set(evaluation.media)


# --- what a fingerprint holds --------------------------------------------------------------------

OWN = [
    {
        "audio": stored(flac(0.1 * (i + 1))),
        "question": f"q{i}",
        "answer": f"a{i}",
        "tags": ["x", "y"],
    }
    for i in range(3)
]


def hear(**other) -> Spec:
    """A spec that uses every field."""
    given = {"hub": (Repo("me/sounds", "test"),), "columns": ("audio",), "rows": 3}
    given |= {"prompt": "{question} {hint}", "references": lambda row: row["answer"]}
    given |= {"modality": "audio", "metric": "exact_match", "choices": ("a0", "a1", "a2")}
    given["fields"] = lambda row, joined: {"hint": joined[0]["hint"] if joined else ""}
    given["join"] = Join((Repo("me/hints", "test"),), "question", "key", ("key", "hint"), ("hint",))
    return Spec(**(given | {"max_seconds": 5.0, "language": "en"} | other))


@pytest.fixture
def sounds(tmp_path, monkeypatch):
    """Open a benchmark of such a spec: `sounds(spec, rows, ...)`."""
    for name, key in (("me/hints", "hint"), ("me/others", "other hint")):
        hints = [{"key": f"q{i}", "hint": f"{key} {i}"} for i in range(3)]
        write(tmp_path / name / "test.parquet", hints)

    def load(spec=None, rows=OWN, folder="", **how) -> Benchmark:
        source = tmp_path / folder
        write(source / "me/sounds/test.parquet", rows)
        write(source / "you/sounds/test.parquet", rows[::-1])
        if folder:
            shutil.copytree(tmp_path / "me/hints", source / "me/hints")
        monkeypatch.setitem(REGISTRY, "sounds", spec or hear())
        return benchmark("sounds", source, **how)

    return load


CHANGES = {
    "hub": (Repo("you/sounds", "test"),),
    "columns": ("audio", "speaker"),
    "prompt": "{question}! {hint}",
    "references": lambda row: [row["answer"], "a2"],
    "modality": "text",
    "metric": "contains",
    "max_new_tokens": 17,
    "rows": 4,
    "choices": ("a0", "a1", "a2", "a3"),
    "options": lambda row: ["a0", row["answer"]],
    "chance": 0.5,
    "fields": lambda row, joined: {"hint": "none"},
    "join": Join((Repo("me/others", "test"),), "question", "key", ("key", "hint"), ("hint",)),
    "each": "tags",
    "max_seconds": 0.25,
    "language": "de",
    "lower_case": True,
}
SHOUTED = {"references": lambda row: row["answer"].upper(), "choices": None}
TOLD = {
    "columns": "column 'speaker' is missing",
    "rows": "published split has 4",
    "language": "'de'",
}


@pytest.mark.fault("stale: a benchmark's entry")
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Spec)])
def test_every_field_of_a_spec_counts(sounds, field):
    """In the fingerprint; or, where it decides nothing of a result, in what is refused or told."""
    same = {"modality": {"max_seconds": None}, "lower_case": SHOUTED}.get(field, {})
    before, changed = sounds(hear(**same)), hear(**(same | {field: CHANGES[field]}))
    assert before.notices == [] and sounds(hear(**same)).fingerprint == before.fingerprint
    if field == "columns":
        with pytest.raises(ValueError, match=TOLD[field]):
            sounds(changed)
        return
    after = sounds(changed)
    if field == "chance":  # tables are read with it, and hold nothing of it
        assert after.fingerprint == before.fingerprint and after.spec.chance == 0.5
    elif field in TOLD:
        assert TOLD[field] in after.notices[0] and after.fingerprint == before.fingerprint
    else:
        assert after.fingerprint != before.fingerprint


@pytest.mark.fault("stale: a benchmark's arguments")
@pytest.mark.parametrize("argument", list(inspect.signature(benchmark).parameters))
def test_every_argument_of_benchmark_counts(sounds, hub, argument, monkeypatch):
    changes = {
        "name": None, "source": None, "split": None, "on_error": None,
        "limit": 2, "seed": 3, "frames": 2, "sampling_rate": 8000, "lower_case": True,
    }  # fmt: skip
    value = changes[argument]
    if argument == "frames":
        loads = [benchmark("msvd_qa", hub, frames=n) for n in (2, 3)]
    elif value is not None:
        loads = [sounds(hear(**SHOUTED)), sounds(hear(**SHOUTED), **{argument: value})]
    elif argument == "name":
        monkeypatch.setitem(REGISTRY, "again", REGISTRY["text_vqa"])
        loads = [benchmark(name, hub) for name in ("text_vqa", "again")]
    elif argument == "on_error":
        rows = [OWN[0], OWN[1] | {"answer": ""}, OWN[2]]
        pytest.raises(RowError, sounds, None, rows)
        loads = [sounds(), sounds(None, rows, on_error="skip")]
    elif argument == "split":
        loads = [benchmark("text_vqa", hub), benchmark("text_vqa", hub, split="train")]
    else:  # the rows that are there count, and not where
        assert sounds().fingerprint == sounds(folder="elsewhere").fingerprint
        loads = [sounds(), sounds(rows=OWN[1:], folder="third")]
    assert loads[0].fingerprint != loads[1].fingerprint


def test_references_are_read_in_small_letters_where_the_model_writes_so(sounds):
    shouted = sounds(hear(**SHOUTED))
    assert shouted.references == [("A0",), ("A1",), ("A2",)]
    quiet = sounds(hear(**SHOUTED), lower_case=True)
    assert quiet.references == [("a0",), ("a1",), ("a2",)] and quiet[1].references == ("a1",)
    assert quiet.spec.metric == shouted.spec.metric and REGISTRY["sounds"].lower_case is False


def test_settings_of_other_media_do_not_count(sounds, hub):
    assert sounds(frames=2).fingerprint == sounds().fingerprint
    assert benchmark("msvd_qa", hub, sampling_rate=8000).fingerprint == (
        benchmark("msvd_qa", hub).fingerprint
    )


@pytest.mark.fault("stale: rows")
@pytest.mark.parametrize(
    "edit",
    [
        {"answer": "a0"},
        {"question": "q0"},
        {"audio": stored(flac(0.2, 8000))},
        {"audio": stored(flac(0.2, channels=2))},
    ],
)
def test_a_fingerprint_is_that_of_its_own_rows(sounds, edit):
    before = sounds()
    after = sounds(rows=[OWN[0], OWN[1] | edit, OWN[2]])
    assert after[:1].fingerprint == before[:1].fingerprint
    assert after[2:].fingerprint == before[2:].fingerprint
    assert after[1:2].fingerprint != before[1:2].fingerprint
    assert after.fingerprint != before.fingerprint


def test_a_fingerprint_is_that_of_an_ordered_slice(sounds):
    bench = sounds()
    parts = [[0, 1, 2], [0, 1], [1, 2], [0, 2], [2, 1, 0], [1]]
    assert len({bench[part].fingerprint for part in parts}) == 6
    assert bench[:].fingerprint == bench[[0, 1, 2]].fingerprint == bench.fingerprint
    renamed = [row | {"audio": row["audio"] | {"path": "elsewhere"}, "tags": []} for row in OWN]
    assert sounds(rows=renamed).fingerprint == bench.fingerprint  # neither is what is asked


@pytest.mark.fault("stale: rows")
def test_a_file_behind_a_path_counts(sounds, tmp_path):
    """The medium's bytes, not where they lie."""
    prints = []
    for name, seconds in (("a.flac", 0.1), ("b.flac", 0.1), ("b.flac", 0.2)):
        (tmp_path / name).write_bytes(flac(seconds))
        rows = [row | {"audio": str(tmp_path / name)} for row in OWN]
        prints.append(sounds(rows=rows).fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.fault("stale: decoding")
def test_a_new_version_of_the_decoding_counts(sounds, monkeypatch):
    before = sounds()
    monkeypatch.setitem(artifacts.COMPUTATIONS, "minerlib.tasks.media.picture", 2)
    assert sounds().fingerprint == before.fingerprint
    monkeypatch.setitem(artifacts.COMPUTATIONS, "minerlib.tasks.media.sound", 2)
    assert sounds().fingerprint != before.fingerprint


@pytest.mark.fault("stale: metric function")
def test_a_users_metric_counts(sounds, monkeypatch, tmp_path):
    prints = []
    for i, text in enumerate(("0.0", "1.0", "1.0")):
        file = tmp_path / f"metric{i}.py"
        file.write_text(f"def rows(answers, references):\n    return [{text} for _ in answers]\n")
        space = {"__name__": "plugin"}
        exec(compile(file.read_text(), str(file), "exec"), space)
        for extra in ({}, {"more": space["rows"]}):
            monkeypatch.setitem(ANSWER_METRICS, "mine", Metric(space["rows"], "mine", extra=extra))
            prints.append(sounds(hear(metric="mine")).fingerprint)
    assert prints[2:4] == prints[4:] and len(set(prints)) == 4


# --- one's own benchmark -------------------------------------------------------------------------


def test_own_benchmark_is_one_entry(tmp_path, monkeypatch):
    spec = Spec(
        hub=(Repo("me/capitals", "test"),),
        columns=("country", "capital"),
        prompt="What is the capital of {country}? Answer with one name.",
        references=lambda row: (row["capital"],),
        modality="text",
        metric="exact_match",
    )
    monkeypatch.setitem(REGISTRY, "capitals", spec)
    rows = [{"country": "France", "capital": "Paris"}, {"country": "{odd}", "capital": "X"}]
    write(tmp_path / "capitals/test.parquet", rows)
    bench = benchmark("capitals", tmp_path)
    assert bench[1].prompt == "What is the capital of {odd}? Answer with one name."
    assert bench.score(["paris.", "Y"]) == [1.0, 0.0]


def test_own_video_benchmark_decodes_files(tmp_path, monkeypatch):
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for level in range(0, 250, 10):
            frame = np.full((32, 32, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    spec = dataclasses.replace(
        REGISTRY["text_vqa"], hub=(Repo("me/clips", "test"),), modality="video",
        columns=("video", "question", "answers"),
    )  # fmt: skip
    monkeypatch.setitem(REGISTRY, "clips", spec)
    rows = [{"video": stored(buffer.getvalue()), "question": "?", "answers": ["x"] * 10}]
    write(tmp_path / "clips/test-00000-of-00001.parquet", rows)
    sample = benchmark("clips", tmp_path, frames=5)[0]
    video = sample.video
    assert video.shape == (5, 32, 32, 3) and video.dtype == np.uint8
    np.testing.assert_allclose(video.mean((1, 2, 3)), [0, 60, 120, 180, 240], atol=8)
    np.testing.assert_allclose(sample.times, [0, 0.6, 1.2, 1.8, 2.4])
    assert sample.notice is None


# --- what goes wrong -----------------------------------------------------------------------------


def test_errors_name_the_thing_and_the_way_out(hub, tmp_path):
    with pytest.raises(ValueError, match=r"unknown benchmark 'textvqa'; there are text_vqa.*REGIS"):
        benchmark("textvqa", hub)
    with pytest.raises(
        FileNotFoundError, match=r"'nowhere' is not a folder; .*text_vqa/\*.parquet"
    ):
        benchmark("text_vqa", "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no rows for 'mmlu'.*cais/mmlu \(all, train\)"):
        benchmark("mmlu", hub, split="train")
    write(tmp_path / "bad/text_vqa/validation-00000-of-00001.parquet", [{"image": 1, "query": "x"}])
    with pytest.raises(
        ValueError, match=r"column 'question', 'answers' is missing in validation.*'image', 'query'"
    ):
        benchmark("text_vqa", tmp_path / "bad")
    for wrong in ({"frames": 0}, {"sampling_rate": 0}, {"limit": 0}, {"limit": -1}):
        ((key, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{key}={value}: give a positive number"):
            benchmark("msvd_qa", hub, **wrong)
    with pytest.raises(ValueError, match="on_error='ignore': use raise or skip"):
        benchmark("msvd_qa", hub, on_error="ignore")


def own(**other) -> Spec:
    given = {"hub": (Repo("me/own", "test"),), "columns": ("word",), "prompt": "{word}?"}
    given |= {"references": lambda row: row["word"], "modality": "text", "metric": "exact_match"}
    return Spec(**(given | other))


def test_a_single_reference_may_be_a_plain_string():
    assert own().sample({"word": "red"}).references == ("red",)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"modality": "picture"}, "modality 'picture': use text, image"),
        ({"metric": "nope"}, "unknown metric 'nope'; there are vqa_accuracy"),
        ({"max_seconds": 30.0}, "max_seconds=30.0 is for audio, not text"),
    ],
)
def test_a_wrong_entry_is_refused_when_it_is_made(other, message):
    with pytest.raises(ValueError, match=message):
        own(**other)


@pytest.mark.fault("one bad row")
@pytest.mark.parametrize(
    ("prompt", "row", "message"),
    [
        ("{colour}?", {"word": "red"}, r"names 'colour', which is not in \['word'\]"),
        ("{word[0]} {x.y}?", {"word": "red"}, "names 'x', which is not in"),
        ("{word}?", {"word": None}, "names 'word', which is empty in this row"),
        ("{word[7]}?", {"word": ["red"]}, "IndexError"),
        ("{word:d}?", {"word": "red"}, "Unknown format code 'd'"),
    ],
)
def test_a_prompt_that_cannot_be_filled_says_so(prompt, row, message):
    spec = own(prompt=prompt, references=lambda row: "red")
    with pytest.raises(RowError, match=f"^own row 4: prompt: .*{message}") as error:
        spec.sample(row, benchmark="own", number=4)
    assert (error.value.benchmark, error.value.row, error.value.field) == ("own", 4, "prompt")


def test_a_prompt_may_hold_braces_and_empty_text():
    spec = own(prompt="{{{word}}} {more}", fields=lambda row, joined: {"more": ""})
    assert spec.sample({"word": "red"}).prompt == "{red} "


# --- references ----------------------------------------------------------------------------------


@pytest.mark.fault("references checked when opened")
@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, r"None \(NoneType\) is no text"),
        ([], "an empty list"),
        ("", r"\('',\) is blank"),
        (["", " \n"], "is blank"),
        (True, r"True \(bool\) is no text"),
        (["yes", False], r"False \(bool\) is no text"),
        (np.True_, r"\(bool\) is no text"),
        (["a", None], r"None \(NoneType\) is no text"),
        (float("nan"), r"nan \(float\) is no text"),
        ({"a": 1}, r"\(dict\) is no text"),
        (b"red", r"\(bytes\) is no text"),
        ([["red"]], r"\['red'\] \(list\) is no text"),
    ],
)
def test_references_that_are_none_are_refused_when_opened(
    tmp_path, monkeypatch, references, message
):
    good = own(references=lambda row: row["word"])
    bad = own(references=lambda row: references if row["word"] == "w1" else row["word"])
    write(tmp_path / "own/test.parquet", [{"word": f"w{i}"} for i in range(3)])
    monkeypatch.setitem(REGISTRY, "own", good)
    assert benchmark("own", tmp_path).references == [("w0",), ("w1",), ("w2",)]
    monkeypatch.setitem(REGISTRY, "own", bad)
    with pytest.raises(RowError, match=f"^own row 1: references: .*{message}") as error:
        benchmark("own", tmp_path)
    assert (error.value.benchmark, error.value.row, error.value.field) == ("own", 1, "references")


@pytest.mark.fault("references checked when opened")
@pytest.mark.parametrize(
    ("references", "texts"),
    [
        (3, ("3",)),
        (np.int64(-7), ("-7",)),
        (2.5, ("2.5",)),
        (4.0, ("4",)),  # what a table makes of a whole number beside an empty cell
        (np.float32(0.1), ("0.1",)),
        ([1, "two"], ("1", "two")),
        (np.array(["a", "b"]), ("a", "b")),
        (["", "b"], ("", "b")),
    ],
)
def test_numbers_become_text(references, texts):
    sample = own(references=lambda row: references).sample({"word": "red"})
    assert sample.references == texts and all(isinstance(text, str) for text in texts)


@pytest.mark.fault("references checked when opened")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mmlu", {"answer": -1}, "references: KeyError: -1"),  # which "ABCD"[-1] answers with D
        ("mmlu", {"answer": 4}, "references: KeyError: 4"),
        ("mmlu", {"choices": ["w"]}, "fields: ValueError|fields: zip"),
        ("vocal_sound", {"answer": "Bark"}, "references: 'Bark' is none of the classes Laughter"),
        ("libri", {"text": "  "}, "references: .* is blank"),
        ("text_vqa", {"answers": []}, "references: an empty list"),
        ("coco_caption", {"sentences": None}, r"references: None \(NoneType\)"),
    ],
)
def test_references_of_the_registry_are_checked(hub, monkeypatch, name, change, message):
    """When the set is opened, and no medium is decoded for it."""
    monkeypatch.setattr(media, "DECODE", {})
    tables = {"mmlu": MMLU, "vocal_sound": VOCAL, "libri": LIBRI, "text_vqa": VQA}
    repo = next(r for r in REGISTRY[name].hub if (hub / r.name).is_dir())
    rows = [*tables.get(name, KARPATHY)]
    for file in (hub / repo.name).rglob(f"*{repo.split}*.parquet"):
        file.unlink()
    place = hub / repo.name / (repo.config or "data") / f"{repo.split}-00000-of-00001.parquet"
    shutil.rmtree(hub / repo.name / "clean", ignore_errors=True)
    write(place, rows)
    benchmark(name, hub)
    write(place, [rows[0] | change, *rows[1:]])
    with pytest.raises(RowError, match=f"^{name} row 0: ({message})"):
        benchmark(name, hub)


@pytest.mark.fault("references checked when opened")
def test_a_reference_that_is_no_choice_is_refused():
    spec = own(choices=("yes", "no"))
    assert spec.sample({"word": "no"}).references == ("no",)
    with pytest.raises(RowError, match=r"\('maybe',\) is none of the choices \('yes', 'no'\)"):
        spec.sample({"word": "maybe"})


@pytest.mark.fault("one bad row")
def test_bad_rows_are_left_out_on_request_and_listed(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(REGISTRY, "own", own())
    words = ["a", "", "b", None, "c"]
    write(tmp_path / "own/test.parquet", [{"word": word} for word in words])
    bench = benchmark("own", tmp_path, on_error="skip")
    assert [s.row for s in bench] == [0, 2, 4] and bench.references == [("a",), ("b",), ("c",)]
    assert [n.split(":")[0] for n in bench.notices] == ["own", "own row 1", "own row 3"]
    assert bench.notices[0].startswith("own: left out 2 of 5 rows, the first: own row 1: refer")
    assert len(caplog.records) == 1 and "left out 2 of 5 rows" in caplog.text
    assert repr(bench) == "Benchmark('own', 3 of 5 samples, metric='exact_match')"
    write(tmp_path / "own/test.parquet", [{"word": ""}])
    with pytest.raises(ValueError, match="own: no row that can be used, of 1.*is blank"):
        benchmark("own", tmp_path, on_error="skip")


@pytest.mark.fault("one bad row")
def test_a_row_that_cannot_be_decoded_is_named_and_loses_no_other(tmp_path):
    rows = pictures("rgb")
    rows[1]["image"] = stored(png()[:40])
    write(tmp_path / "text_vqa/validation.parquet", rows)
    bench = benchmark("text_vqa", tmp_path, seed=1)  # shuffled though its medium is none
    with pytest.raises(RowError, match="^text_vqa row 1: image: ") as error:
        list(bench)
    assert (error.value.benchmark, error.value.row, error.value.field) == ("text_vqa", 1, "image")
    kept = [i for i, number in enumerate(bench.numbers) if number != 1]
    assert sorted(s.row for s in bench[kept]) == [0, 2]
    assert len({bench.fingerprint, bench[kept].fingerprint}) == 2
    rows[1]["image"] = None
    write(tmp_path / "text_vqa/validation.parquet", rows)
    with pytest.raises(RowError, match="text_vqa row 1: image: no image in this row"):
        benchmark("text_vqa", tmp_path)[1]


def test_rows_without_a_readable_medium_share_none(tmp_path):
    rows = [row | {"image": None, "question": "?"} for row in pictures("rgb")]
    write(tmp_path / "text_vqa/validation.parquet", rows)
    assert len(set(benchmark("text_vqa", tmp_path).media)) == 3


@pytest.mark.fault("joined rows")
@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([1, 3, 3], "row 0: filename: 2 rows with file_name 'COCO_3.jpg' in lmms-lab-encoder/COCO"),
        ([3], "row 1: filename: no row with file_name 'COCO_1.jpg' in lmms-lab-encoder/COCO-Capt"),
    ],
)
def test_joined_rows_are_one_each(hub, pictures, message):
    file = hub / "lmms-lab-encoder/COCO-Caption/data/val-00000-of-00001.parquet"
    write(file, [COCO[i] for i in pictures], "image")
    with pytest.raises(RowError, match=message):
        benchmark("coco_caption", hub)


def test_joined_rows_come_from_their_own_split(hub, tmp_path):
    write(tmp_path / "own/mmlu/test-00000-of-00001.parquet", MMLU)
    with pytest.raises(
        FileNotFoundError, match=r"no rows for 'mmlu'.*Tried: mmlu \(dev\)[^;]*Give"
    ):
        benchmark("mmlu", tmp_path / "own")  # and not from the rows that are asked


def test_columns_that_stand_for_one_another(tmp_path):
    """Captions under the name of either published set, the first where both are there."""
    rows = [{"filename": "x", "image": stored(png()), "answer": ["from answer"]}]
    write(tmp_path / "coco_caption/test.parquet", rows)
    assert benchmark("coco_caption", tmp_path).references == [("from answer",)]
    write(tmp_path / "coco_caption/test.parquet", [rows[0] | {"sentences": ["from sentences"]}])
    assert benchmark("coco_caption", tmp_path).references == [("from sentences",)]
    write(tmp_path / "coco_caption/test.parquet", [{"filename": "x", "image": stored(png())}])
    with pytest.raises(ValueError, match=r"column 'sentences\|answer' is missing"):
        benchmark("coco_caption", tmp_path)


# --- what samples carry, and what is told --------------------------------------------------------


@pytest.mark.fault("rate of sounds")
@pytest.mark.parametrize("rate", [8000, 16_000, 22_050])
def test_sounds_carry_their_rate(hub, rate):
    sample = benchmark("vocal_sound", hub, sampling_rate=rate)[0]
    assert sample.sampling_rate == rate and len(sample.audio) == rate // 2
    assert Sample("?", ("x",)).sampling_rate == 16_000


@pytest.mark.fault("clip shorter than it says")
def test_what_a_clip_lacks_is_told_once(tmp_path, monkeypatch, caplog):
    spec = dataclasses.replace(
        REGISTRY["text_vqa"], modality="video", columns=("video",), rows=None
    )
    monkeypatch.setitem(REGISTRY, "clips", spec)
    rows = [{"video": stored(bytes([i])), "question": "?", "answers": ["x"] * 10} for i in range(2)]
    write(tmp_path / "clips/validation.parquet", rows)
    cut = {"video": np.zeros((2, 4, 4, 3), np.uint8), "times": np.array([0, 0.5]), "notice": "cut"}
    monkeypatch.setitem(media.DECODE, "video", lambda value, frames, rate: dict(cut))
    bench = benchmark("clips", tmp_path)
    assert bench.notices == []
    assert bench[1].notice == "cut" and bench[1].times.tolist() == [0, 0.5]
    assert bench.notices == ["clips row 1: video: cut"] and caplog.text.count("cut") == 1


@pytest.mark.fault("long clips")
def test_long_and_broken_sounds(tmp_path, monkeypatch):
    rows = [*LIBRI, LIBRI[0] | {"audio": stored(b"no sound")}]
    write(tmp_path / "libri/test.parquet", rows)
    with pytest.raises(RowError, match="^libri row 3: audio: .*cannot be decoded"):
        benchmark("libri", tmp_path)
    bench = benchmark("libri", tmp_path, on_error="skip")
    assert [s.row for s in bench] == [0, 2]
    assert bench.notices[0].startswith("libri: skipped 1 of 4 clips longer than 30 s")
    assert bench.notices[1].startswith("libri: left out 1 of 4 rows, the first: libri row 3: audio")
    exact = dataclasses.replace(REGISTRY["libri"], max_seconds=30.5)  # a clip as long is not longer
    monkeypatch.setitem(REGISTRY, "libri", exact)
    write(tmp_path / "libri/test.parquet", LIBRI)
    assert len(benchmark("libri", tmp_path)) == 3


@pytest.mark.fault("English only")
@pytest.mark.parametrize(
    ("other", "words", "told"),
    [
        (
            {"language": "de"},
            ["Hund"],
            "own: metric 'exact_match' is made for 'en', but language='de'",
        ),
        ({}, ["собака", "dog"], "most letters here are not Latin"),
        ({}, ["chien", "2014"], None),
        ({"metric": "choice_accuracy", "language": "ru"}, ["Б"], None),  # noqa: RUF001
    ],
)
def test_a_metric_for_another_language_says_so_when_opened(
    tmp_path, monkeypatch, recwarn, other, words, told
):
    monkeypatch.setitem(REGISTRY, "own", own(**other))
    write(tmp_path / "own/test.parquet", [{"word": word} for word in words])
    bench = benchmark("own", tmp_path)
    if told:
        assert told in bench.notices[0] and told in str(recwarn.pop(UserWarning).message)
    else:
        assert bench.notices == [] and not recwarn.list


def test_rows_whose_list_is_empty_are_told(tmp_path):
    rows = msvd(questions=(2, 1, 1))
    rows[1]["qa"] = []
    write(tmp_path / "msvd_qa/test.parquet", rows)
    bench = benchmark("msvd_qa", tmp_path)
    assert [s.references for s in bench] == [("answer 0 0",), ("answer 0 1",), ("answer 2 0",)]
    assert bench.notices == ["msvd_qa: 1 rows have an empty 'qa'"]


def test_each_element_may_be_a_medium_of_its_own(tmp_path, monkeypatch):
    spec = own(
        columns=("images",), prompt="?", references=lambda row: "x", modality="image",
        each="images", fields=lambda row, _: {"image": row.get("images")},
    )  # fmt: skip
    monkeypatch.setitem(REGISTRY, "own", spec)
    rows = [{"images": [stored(png(c)) for c in ("red", "blue")], "id": "0"}]
    write(tmp_path / "own/test.parquet", rows)
    bench = benchmark("own", tmp_path)
    assert [s.image.getpixel((0, 0)) for s in bench] == [(255, 0, 0), (0, 0, 255)]
    assert len(set(bench.media)) == 2


def test_a_text_benchmark_may_call_its_column_text(tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTRY, "own", own(columns=("text",), prompt="{text}?",
                                             references=lambda row: row["text"]))  # fmt: skip
    write(tmp_path / "own/test.parquet", [{"text": "red"}])
    assert benchmark("own", tmp_path)[0] == Sample("red?", ("red",), benchmark="own")


def test_published_sizes():
    """As the sets' owners state them; what is not known is not checked."""
    rows = {name: REGISTRY[name].rows for name in ("text_vqa", "coco_caption", "mmlu", "msvd_qa")}
    assert rows == {"text_vqa": 5000, "coco_caption": 5000, "mmlu": 14042, "msvd_qa": 13157}
    assert REGISTRY["libri"].rows == 2620 and REGISTRY["vocal_sound"].rows is None


def test_the_same_rows_asked_otherwise():
    """Every sample goes through the change; what it is counts in the fingerprint."""
    bench = benchmark("mmlu", source=SHIPPED, limit=4)
    louder = bench.changed(shout)
    assert [s.prompt for s in louder] == [s.prompt.upper() for s in bench]
    assert louder[1:3][0].prompt == bench[1].prompt.upper() and len(louder[1:3]) == 2
    assert louder.references == bench.references and louder.name == bench.name
    prints = {x.fingerprint for x in (bench, louder, bench.changed(twice), louder.changed(twice))}
    assert len(prints) == 4
    assert louder.changed(twice)[0].prompt == 2 * bench[0].prompt.upper()
    assert bench.changed(shout).fingerprint == louder.fingerprint


def shout(sample):
    return dataclasses.replace(sample, prompt=sample.prompt.upper())


def twice(sample):
    return dataclasses.replace(sample, prompt=2 * sample.prompt)
