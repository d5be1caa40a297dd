"""Bytes to a picture, a clip or a sound."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SAMPLING_RATE = 16_000  # Hz; what the feature extractors of all families tested here expect
FRAMES = 16  # at most so many frames of a video, evenly spaced


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
