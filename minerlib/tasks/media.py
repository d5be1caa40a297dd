"""Bytes to a picture, a clip or a sound, as a person perceives it.

The steps are those of transformers' own loaders (`image_utils.load_image`, `video_utils`,
`audio_utils.load_audio`) and, over these, what a viewer does: transparency lies on white, depths
other than 8 bits are scaled and not clipped, a clip is turned and stretched as its file says.
Whatever cannot be decoded is a ValueError that says why.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps

SAMPLING_RATE = 16_000  # Hz; what the feature extractors of all families tested here expect
FRAMES = 16  # at most so many frames of a clip, evenly spaced
MEDIA_COLUMNS = frozenset({"image", "audio", "video", "binary_frames"})

_SHAPE = ("num_frames", "height", "width", "channels")
_CLIP = ("video", "times", "notice")  # what a sample calls the parts of a `Clip`
_RATES = ("fps", "frame_rate", "video_fps")


class Clip(NamedTuple):
    """Frames uint8 [frame, height, width, 3], their times, and what is to be reported of them.

    `times` float64 [frame] are seconds from the clip's first frame; None where none are known.
    """

    frames: np.ndarray
    times: np.ndarray | None
    notice: str | None = None


def picture(value: Any) -> Image.Image:
    """An RGB picture from a file's bytes or path, a {bytes, path} struct, PIL's or an array.

    Arrays are [height, width], or have 1 (grey), 2, 3 or 4 (alpha last) channels, last or first.
    """
    with _reading("picture"):
        if source := _encoded(value):
            value = Image.open(source)
        if isinstance(value, Image.Image):
            value = ImageOps.exif_transpose(value)
            if value.mode[0] not in "IF":  # 16 and 32 bits, which PIL's convert would clip
                if not value.has_transparency_data:
                    return value.convert("RGB")
                value = value.convert("RGBA")
        return Image.fromarray(_rgb(_array(value), 3))


def clip(value: Any, frames: int = FRAMES) -> Clip:
    """At most `frames` evenly spaced frames of a video file, a decoded clip or a row's raw frames.

    Files are given as for `picture`; decoded clips are arrays [frame, height, width(, channel)].
    Raises ValueError where not one frame can be decoded.
    """
    with _reading("clip"):
        if isinstance(value, Mapping) and "binary_frames" in value:
            return raw_clip(value, frames)
        if (source := _encoded(value)) is None:
            array = _array(value)
            return Clip(_rgb(array[_evenly(len(array), frames)], 4), None)
        taken, times, notice = _sample(source, frames)
        if not taken:
            raise ValueError("no frame of this clip can be decoded; is its file damaged?")
        known = None not in times
        seconds = np.array(times)[_evenly(len(times), frames)] - times[0] if known else None
        return Clip(np.stack(taken), seconds, notice)


def raw_clip(row: Mapping[str, Any], frames: int = FRAMES) -> Clip:
    """The uint8 `binary_frames` of a row, whose shape its other columns give (as in MSVD-QA)."""
    if missing := [name for name in _SHAPE if row.get(name) is None]:
        raise ValueError(f"binary_frames without {', '.join(missing)}: their shape is unknown")
    shape = tuple(int(row[name]) for name in _SHAPE)
    raw = np.frombuffer(row["binary_frames"], dtype=np.uint8)
    if raw.size != math.prod(shape):
        raise ValueError(
            f"binary_frames holds {raw.size} bytes, but num_frames x height x width x channels = "
            f"{' x '.join(map(str, shape))} needs {math.prod(shape)}: the set stores its frames "
            "in another way than this loader knows"
        )
    chosen = _evenly(shape[0], frames)
    rate = next((float(row[name]) for name in _RATES if row.get(name)), None)
    return Clip(_rgb(raw.reshape(shape)[chosen], 4), chosen / rate if rate else None)


def sound(value: Any, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Float32 [time], the mean of all channels, resampled to a rate in Hz.

    From any file that soundfile reads, or an {array, sampling_rate} struct. Raises ValueError for
    an empty sound, one with NaN or infinite samples, and one that is cut short.
    """
    with _reading("sound"):
        if source := _encoded(value):
            with soundfile.SoundFile(source) as file:
                wave, rate, promised = file.read(dtype="float32"), file.samplerate, file.frames
            if len(wave) < 0.95 * promised:  # a header may count the encoder's padding
                raise ValueError(f"this sound is cut short: {len(wave)} of {promised} samples")
        else:
            wave, rate = _decoded_sound(value)
            if wave.dtype.kind == "u":
                wave = (wave - 128.0) / 128
            elif wave.dtype.kind == "i":  # the smaller depth that holds all samples
                peak = np.abs(wave, dtype=float).max(initial=0)
                wave = wave / (2**15 if peak <= 2**15 else 2**31)
        if not wave.size:
            raise ValueError("this sound is empty")
        if wave.ndim > 1:
            wave = wave.mean(axis=int(np.argmin(wave.shape)))
        if not np.isfinite(wave).all():
            raise ValueError("this sound has NaN or infinite samples")
        if rate != sampling_rate:
            length = math.ceil(len(wave) * sampling_rate / rate)
            wave = soxr.resample(wave, rate, sampling_rate)[:length]
            wave = np.pad(wave, (0, length - len(wave)))
        return np.ascontiguousarray(wave, dtype=np.float32)


def duration(value: Any) -> float:
    """Seconds of a sound; a file's header says them, so nothing is decoded."""
    with _reading("sound"):
        if source := _encoded(value):
            return soundfile.info(source).duration
        wave, rate = _decoded_sound(value)
        return max(wave.shape) / rate


def medium(row: Mapping[str, Any], modality: str) -> Any:
    """What the functions here take as `value`: the column, or a struct of a row's raw frames."""
    if row.get(modality) is not None:
        return row[modality]
    if modality == "video" and row.get("binary_frames") is not None:
        return {name: row[name] for name in ("binary_frames", *_SHAPE, *_RATES) if name in row}
    raise ValueError(f"no {modality} in this row; it has {', '.join(sorted(row))}")


def source_bytes(value: Any) -> bytes:
    """What a medium is made from: a file's bytes, or a decoded one's with shape, dtype and rate.

    Never a path and, for files, never pixels, so that it is the same on another processor.
    """
    source = _encoded(value)
    if isinstance(source, io.BytesIO):
        return source.getvalue()
    if source is not None:
        return Path(source).read_bytes()
    if isinstance(value, Mapping):
        parts = {key: value[key] for key in sorted(value) if key != "path"}
        encoded = {key: source_bytes(part) for key, part in parts.items() if part is not None}
        return b"".join(f"{key}:{len(part)}:".encode() + part for key, part in encoded.items())
    array = _array(picture(value) if isinstance(value, Image.Image) else value)
    return f"{array.dtype.str}{array.shape}".encode() + array.tobytes()


DECODE: dict[str, Callable[[Any, int, int], dict[str, Any]]] = {
    "image": lambda value, frames, rate: {"image": picture(value)},
    "video": lambda value, frames, rate: dict(zip(_CLIP, clip(value, frames), strict=True)),
    "audio": lambda value, frames, rate: {"audio": sound(value, rate), "sampling_rate": rate},
}
"""Modality -> (medium, frames, sampling rate) -> a sample's fields, and a clip's notice or None."""


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Make the decoders' many errors ValueErrors, alike in every process."""
    try:
        yield
    except Exception as error:
        if type(error) in (ValueError, MemoryError):
            raise
        cause = re.sub("<_io.BytesIO[^>]*>", "its bytes", str(error)) or type(error).__name__
        raise ValueError(f"this {what} cannot be decoded: {cause}") from error


def _encoded(value: Any) -> io.BytesIO | str | None:
    """What the decoders open, a file's bytes or path; None for a medium that is decoded already."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value) and "array" not in value:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError("neither bytes nor a path")
    if isinstance(value, bytes | bytearray | memoryview):
        return io.BytesIO(value)
    if isinstance(value, str | os.PathLike):
        if not os.path.isfile(value):
            raise ValueError(f"no file {os.fspath(value)!r}")
        return os.fspath(value)
    return None


def _array(value: Any) -> np.ndarray:
    array = np.asarray(value["array"] if isinstance(value, Mapping) else value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"neither a file nor numbers: {type(value).__name__} {str(value)[:40]!r}")
    return array


def _decoded_sound(value: Any) -> tuple[np.ndarray, float]:
    rate = value.get("sampling_rate") if isinstance(value, Mapping) else None
    if not rate or rate <= 0:
        raise ValueError("a decoded sound needs its rate: give {'array': ..., 'sampling_rate': Hz}")
    return _array(value), rate


def _sample(
    source: io.BytesIO | str, frames: int, total: int | None = None
) -> tuple[list[np.ndarray], list[float | None], str | None]:
    """Evenly spaced frames of a video file of `total` frames (first what its header counts), the
    times of all frames that decode, and what is missing.
    """
    if isinstance(source, io.BytesIO):
        source.seek(0)
    taken: list[np.ndarray] = []
    times: list[float | None] = []
    with av.open(source, "r") as container:
        if not container.streams.video:
            raise ValueError("this file has no video stream")
        stream = container.streams.video[0]
        promised, end = stream.frames, 0.0
        total = promised if total is None else total
        wanted = set(_evenly(total, frames).tolist())
        with suppress(av.FFmpegError):  # a damaged file: what is missing is counted below
            for packet in container.demux(stream):
                if packet.is_discard:  # cut out of the clip by its container
                    promised -= 1
                if packet.is_corrupt:  # half a frame, where the file ends too early
                    continue
                with suppress(av.FFmpegError):
                    for frame in packet.decode():
                        if len(times) in wanted:
                            taken.append(_shown(frame, stream.sample_aspect_ratio or 1))
                        times.append(frame.time)
                        end = (frame.time or 0) + float(frame.duration * (frame.time_base or 0))
        if (found := len(times)) != total:  # a header that has no count, or a wrong one
            return _sample(source, frames, found)
        notice = None
        seconds = (container.duration or 0) / av.time_base
        if found < promised:
            notice = f"{found} of the {promised} frames that its header promises can be decoded"
        elif not promised and len(container.streams) == 1 and end < 0.95 * seconds:
            notice = f"{end:.2f} of the {seconds:.2f} s that its header promises can be decoded"
    return taken, times, notice


def _shown(frame: av.VideoFrame, aspect: Any) -> np.ndarray:
    """Uint8 [height, width, 3] with square pixels, over white, turned by the display matrix."""
    alpha = any(part.is_alpha for part in frame.format.components)
    width = round(frame.width * aspect)
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24", width=width, height=frame.height)
    pixels = _rgb(pixels, 3)
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # x' = a x + c y and y' = b x + d y, of which a quarter turn or a mirror leaves one term each.
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _rgb(values: np.ndarray, axes: int) -> np.ndarray:
    """Uint8 [..., height, width, 3], transparency over white, from any depth and channels."""
    shape = values.shape
    if values.ndim == axes - 1:
        values = values[..., None]
    if values.ndim == axes and values.shape[-1] > 4:
        values = np.moveaxis(values, -3, -1)
    if values.ndim != axes or values.shape[-1] > 4 or not values.size:
        raise ValueError(f"an array of shape {shape} holds no pixels [height, width, 1 to 4]")
    pixels = _eight_bits(values)
    if pixels.shape[-1] in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        pixels = ((pixels[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)), order="C")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scaled to uint8: white is the smallest of 1 (not for integers), 8 bits and 16 bits that holds
    all values, else the largest of them; black is 0, or the smallest value if that is negative.
    """
    if values.dtype == np.uint8:
        return values
    if not np.isfinite(values).all():
        raise ValueError("these pixels have NaN or infinite values")
    low, high = min(0.0, float(values.min())), float(values.max())
    if values.dtype.kind == "u" and values.itemsize == 2:
        high = 65535
    elif low == 0:
        depths = (1, 255, 65535)[values.dtype.kind in "iu" :]
        high = next((depth for depth in depths if high <= depth), high)
    return ((values - low) * (255 / ((high - low) or 1))).round().astype(np.uint8)


def _evenly(total: int, frames: int) -> np.ndarray:
    if frames < 1:
        raise ValueError(f"frames={frames}: a video needs at least one frame")
    return np.linspace(0, total - 1, min(total, frames)).round().astype(int)
