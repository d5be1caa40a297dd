"""Loaders: the shipped files, folders laid out like the hub repositories, and what goes wrong."""

from __future__ import annotations

import dataclasses
import io
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from minerlib.tasks import REGISTRY, Repo, Spec, benchmark
from minerlib.tasks import rows as benchmarks

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


def media(data: bytes, path: str = "file") -> dict:
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
    {"image": media(png(c)), "question": f"what color is {i}?", "answers": [c] * 10}
    for i, c in enumerate(("red", "green", "blue"))
]
KARPATHY = [
    {"filename": f"COCO_{i}.jpg", "url": "", "sentences": [f"caption {i} {k}" for k in range(5)]}
    for i in (3, 1)
]
COCO = [
    {"image": media(png(size=(4 + i, 5))), "file_name": f"COCO_{i}.jpg", "answer": ["x"]}
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
    {"file": "a", "audio": media(flac(s)), "text": t, "speaker_id": 1, "chapter_id": 2, "id": t}
    for s, t in ((0.5, "ONE"), (30.5, "TOO LONG"), (1.0, "TWO"))
]
VOCAL = [{"audio": media(flac(0.5, 192_000, channels=2)), "answer": "Throat clearing"}]


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
        assert sample.choices == spec.choices
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
    with pytest.raises(ValueError, match="no row with file_name 'COCO_3.jpg'"):
        benchmark("coco_caption", hub)[0]


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
    with pytest.raises(ValueError, match="180 bytes.*4 x 4 x 5 x 3"):
        benchmark("msvd_qa", hub)[0]


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


def test_published_row_count_is_checked(hub, caplog):
    benchmark("text_vqa", hub)
    assert "loaded 3 samples, the published split has 5000" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="minerlib.tasks.rows"):
        benchmark("vocal_sound", hub)
    assert "loaded 1 samples" in caplog.text


def test_hub_calls_download_one_split_and_fall_back_to_the_old_owner(hub, monkeypatch):
    import fnmatch

    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    calls = []

    def snapshot_download(repo, repo_type, allow_patterns):
        folder = hub / repo
        calls.append(repo)
        if not folder.is_dir():
            response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
            raise RepositoryNotFoundError(f"404 for {repo}", response=response)
        assert repo_type == "dataset"
        wanted = [
            f.relative_to(folder).as_posix()
            for f in folder.rglob("*.parquet")
            if any(fnmatch.fnmatch(f.relative_to(folder).as_posix(), p) for p in allow_patterns)
        ]
        assert wanted and not any("train" in f or "astronomy" in f or "other" in f for f in wanted)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in REGISTRY:
        online, local = benchmark(name), benchmark(name, hub)
        assert [s.prompt for s in online] == [s.prompt for s in local]
        assert online.fingerprint == local.fingerprint
    assert calls[:2] == ["lmms-lab-encoder/textvqa", "lmms-lab/textvqa"]


def test_offline_hub_says_what_was_tried(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("offline mode\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError,
        match=r"'vocal_sound' on the hub.*lmms-lab-audio/vocalsound.*ConnectionError: offline mode;"
        r".*lmms-lab/vocalsound.*Give source=",
    ):
        benchmark("vocal_sound")


# --- slices, order, fingerprints -----------------------------------------------------------------


def test_slices_are_benchmarks(hub):
    bench = benchmark("text_vqa", hub)
    tail = bench[-2:]
    assert isinstance(tail, benchmarks.Benchmark) and tail.name == "text_vqa"
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
    with pytest.raises(ValueError, match="limit=0"):
        benchmark("text_vqa", hub, limit=0)


def test_fingerprint_follows_data_rows_and_prompt(hub, monkeypatch):
    bench = benchmark("text_vqa", hub)
    prints = {bench.fingerprint, bench[:2].fingerprint, bench[1:].fingerprint}
    assert len(prints) == 3 and benchmark("text_vqa", hub).fingerprint == bench.fingerprint
    spec = dataclasses.replace(REGISTRY["text_vqa"], prompt="{question}")
    monkeypatch.setitem(REGISTRY, "text_vqa", spec)
    prints.add(benchmark("text_vqa", hub).fingerprint)
    write(hub / "lmms-lab/textvqa/data/validation-00001-of-00002.parquet", VQA[:1], "image")
    prints.add(benchmark("text_vqa", hub).fingerprint)
    assert len(prints) == 5


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
    rows = [{"video": media(buffer.getvalue()), "question": "?", "answers": ["x"] * 10}]
    write(tmp_path / "clips/test-00000-of-00001.parquet", rows)
    video = benchmark("clips", tmp_path, frames=5)[0].video
    assert video.shape == (5, 32, 32, 3) and video.dtype == np.uint8
    np.testing.assert_allclose(video.mean((1, 2, 3)), [0, 60, 120, 180, 240], atol=8)


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
    with pytest.raises(ValueError, match="frames=0"):
        benchmark("msvd_qa", hub, frames=0)[0]


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
    ],
)
def test_a_wrong_entry_is_refused_when_it_is_made(other, message):
    with pytest.raises(ValueError, match=message):
        own(**other)


def test_a_prompt_that_names_no_column_says_so():
    with pytest.raises(ValueError, match=r"own: its prompt names 'colour', but a row has .*'word'"):
        own(prompt="{colour}?").sample({"word": "red"}, benchmark="own")
