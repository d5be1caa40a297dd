"""Bytes to a picture, a clip or a sound, as a person perceives it.

The steps are those of transformers' own loaders (image_utils, video_utils, audio_utils) and, over
these, what a viewer does: transparency lies on white, other depths than 8 bits are scaled and not
clipped, a clip is turned and stretched as its file says. What cannot be decoded is a ValueError.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps

from minerlib.artifacts import computation

SAMPLING_RATE = 16_000  # Hz; what the feature extractors of all families tested here expect
FRAMES = 16  # at most so many frames of a clip, evenly spaced
MEDIA_COLUMNS = frozenset({"image", "audio", "video", "binary_frames"})
_PARTS = ("video", "times", "notice")  # what a sample calls the parts of a `Clip`
_SHAPE = ("num_frames", "height", "width", "channels")
_RATES = ("fps", "frame_rate", "video_fps")


class Clip(NamedTuple):
    """Uint8 [frame, height, width, 3], seconds from the first frame [frame], what is missing."""

    frames: np.ndarray
    times: np.ndarray | None = None
    notice: str | None = None


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Make the decoders' many errors ValueErrors, worded alike in every process."""
    try:
        yield
    except Exception as error:
        if type(error) in (ValueError, MemoryError):
            raise
        cause = re.sub("<_io.BytesIO[^>]*>", "its bytes", f"{type(error).__name__}: {error}")
        raise ValueError(f"this {what} cannot be decoded: {cause}") from error


@computation(version=1)
@_reading("picture")
def picture(value: Any) -> Image.Image:
    """An RGB picture from a file's bytes or path, a {bytes, path} struct, PIL's or an array.

    Arrays are [height, width], or have 1 (grey), 2, 3 or 4 (alpha last) channels, last or first.
    """
    if source := _encoded(value):
        value = Image.open(source)
    if isinstance(value, Image.Image):
        value = ImageOps.exif_transpose(value)
        if value.mode[0] not in "IF":  # 16 and 32 bits, which PIL's convert would clip
            value = value.convert("RGBA" if value.has_transparency_data else "RGB")
        if value.mode == "RGB":
            return value
    return Image.fromarray(_rgb(_array(value), 3))


@computation(version=1)
@_reading("clip")
def clip(value: Any, frames: int = FRAMES) -> Clip:
    """At most `frames` evenly spaced frames of a video file, a decoded clip or a row's raw frames.

    Files as for `picture`; decoded clips are arrays [frame, height, width(, channel)]; raw frames
    are uint8 `binary_frames` and their shape (as in MSVD-QA), and a rate if known.
    """
    if source := _encoded(value):
        return _sampled(source, frames)
    chosen = _evenly(len(array := _array(value)), frames)
    rates = map(value.get, _RATES) if isinstance(value, Mapping) else ()
    rate = next((rate for rate in rates if rate and rate > 0), None)
    return Clip(_rgb(array[chosen], 4), chosen / rate if rate else None)


@computation(version=1)
@_reading("sound")
def sound(value: Any, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Float32 [time], the mean of all channels, resampled to a rate in Hz.

    From what soundfile reads or {array, sampling_rate}; ValueError if empty, cut or not finite.
    """
    if source := _encoded(value):
        with soundfile.SoundFile(source) as file:
            wave, rate, promised = file.read(dtype="float32"), file.samplerate, file.frames
        if len(wave) < 0.95 * promised:  # a header may count the encoder's padding
            raise ValueError(f"this sound is cut short: {len(wave)} of {promised} samples")
    else:
        wave, rate = _decoded_sound(value)
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


@_reading("sound")
def duration(value: Any) -> float:
    """Seconds of a sound; a file's header says them, so nothing is decoded."""
    if source := _encoded(value):
        return soundfile.info(source).duration
    wave, rate = _decoded_sound(value)
    return max(wave.shape) / rate


DECODE: dict[str, Callable[[Any, int, int], dict[str, Any]]] = {
    "image": lambda value, frames, rate: {"image": picture(value)},
    "video": lambda value, frames, rate: dict(zip(_PARTS, clip(value, frames), strict=True)),
    "audio": lambda value, frames, rate: {"audio": sound(value, rate), "sampling_rate": rate},
}
"""Modality -> (medium, frames, sampling rate) -> a sample's fields."""


def medium(row: Mapping[str, Any], modality: str) -> Any:
    """What the functions here take as `value`: the column, or a struct of a row's raw frames."""
    if row.get(modality) is not None:
        return row[modality]
    if modality == "video" and row.get("binary_frames") is not None:
        return {name: row[name] for name in ("binary_frames", *_SHAPE, *_RATES) if name in row}
    raise ValueError(f"no {modality} in this row; it has {', '.join(sorted(row))}")


def source_bytes(value: Any) -> bytes:
    """A file's bytes, undecoded, or a decoded medium's with shape, dtype and rate; never a path."""
    if source := _encoded(value):
        return source.getvalue()
    if isinstance(value, Mapping):
        keys = sorted(key for key in value if key != "path" and value[key] is not None)
        parts = [(key, source_bytes(value[key])) for key in keys]
        return b"".join(f"{key}:{len(part)}:".encode() + part for key, part in parts)
    array = _array(picture(value) if isinstance(value, Image.Image) else value)
    return f"{array.dtype.str}{array.shape}".encode() + array.tobytes()


def _encoded(value: Any) -> io.BytesIO | None:
    """The file that the decoders read; None for a medium that is decoded already."""
    if isinstance(value, Mapping) and not {"array", "binary_frames"} & set(value):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError("neither bytes nor a path")
    if isinstance(value, str | PathLike):
        if not Path(value).is_file():
            raise ValueError(f"no file {str(value)!r}")
        value = Path(value).read_bytes()
    return io.BytesIO(value) if isinstance(value, bytes | bytearray | memoryview) else None


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Mapping) and "binary_frames" in value:
        shape = [int(value[name]) for name in _SHAPE]
        array = np.frombuffer(value["binary_frames"], np.uint8)
        if array.size != math.prod(shape):
            product = f"{' x '.join(_SHAPE)} = {' x '.join(map(str, shape))}"
            what = f"{array.size} bytes, but {product} needs {math.prod(shape)}: are they encoded?"
            raise ValueError(f"binary_frames holds {what}")
        return array.reshape(shape)
    array = np.asarray(value["array"] if isinstance(value, Mapping) else value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"neither a file nor numbers: {type(value).__name__} {str(value)[:40]!r}")
    return array


def _decoded_sound(value: Any) -> tuple[np.ndarray, float]:
    rate = value.get("sampling_rate") if isinstance(value, Mapping) else None
    if not rate or rate <= 0 or (wave := _array(value)).dtype.kind != "f":
        raise ValueError("a decoded sound is {'array': floats in [-1, 1], 'sampling_rate': Hz}")
    return wave, rate


def _evenly(total: int, frames: int) -> np.ndarray:
    if frames < 1:
        raise ValueError(f"frames={frames}: a video needs at least one frame")
    return np.linspace(0, total - 1, min(total, frames)).round().astype(int)


def _sampled(source: io.BytesIO, frames: int, total: int | None = None) -> Clip:
    """Evenly spaced frames of a video file of `total` frames, at first what its header counts."""
    source.seek(0)
    taken, times, end = list[np.ndarray](), list[float | None](), 0.0
    with av.open(source, "r") as container:
        if not container.streams.video:
            raise ValueError("this file has no video stream")
        stream = container.streams.video[0]
        promised, seconds = stream.frames, (container.duration or 0) / av.time_base
        total = promised if total is None else total
        wanted = set(_evenly(total, frames).tolist())
        with suppress(av.FFmpegError):  # a damaged file: what is missing is counted below
            for packet in container.demux(stream):
                promised -= packet.is_discard  # cut out of the clip by its container
                if packet.is_corrupt:  # half a frame, where the file ends too early
                    continue
                with suppress(av.FFmpegError):
                    for frame in packet.decode():
                        if len(times) in wanted:
                            taken.append(_shown(frame, stream.sample_aspect_ratio or 1))
                        times.append(frame.time)
                        end = (frame.time or 0) + float(frame.duration * (frame.time_base or 0))
        alone = len(container.streams) == 1
    if not times:
        raise ValueError("no frame of this clip can be decoded; is its file damaged?")
    if len(times) != total:  # a header that has no count, or a wrong one
        return _sampled(source, frames, len(times))
    notice = None
    if total < promised:
        notice = f"{total} of the {promised} frames that its header promises can be decoded"
    elif not promised and alone and end < 0.95 * seconds:
        notice = f"{end:.2f} of the {seconds:.2f} s that its header promises can be decoded"
    seen = None if None in times else np.array(times)[_evenly(total, frames)] - times[0]
    return Clip(np.stack(taken), seen, notice)


def _shown(frame: av.VideoFrame, aspect: Any) -> np.ndarray:
    """Uint8 [height, width, 3] with square pixels, over white, turned by the display matrix."""
    kind = "rgba" if any(part.is_alpha for part in frame.format.components) else "rgb24"
    width = round(frame.width * aspect)
    pixels = _rgb(frame.to_ndarray(format=kind, width=width, height=frame.height), 3)
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
    shape, x = values.shape, values[..., None] if values.ndim == axes - 1 else values
    if x.ndim == axes and x.shape[-1] > 4:
        x = np.moveaxis(x, -3, -1)
    if x.ndim != axes or x.shape[-1] > 4 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"an array of shape {shape} is no finite pixels [height, width, 1 to 4]")
    if x.dtype != np.uint8:
        # White is the first of 1 (not of integers), 8 and 16 bits that holds all, else the largest
        # value; black is 0, or the smallest value if that is negative.
        low, high = min(0.0, float(x.min())), float(x.max())
        start = 2 if x.dtype.str[1:] == "u2" else int(x.dtype.kind in "iu")
        if low == 0:
            high = next((depth for depth in (1, 255, 65535)[start:] if high <= depth), high)
        x = ((x - low) * (255 / ((high - low) or 1))).round().astype(np.uint8)
    if x.shape[-1] in (2, 4):
        alpha = x[..., -1:].astype(np.uint16)
        x = ((x[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.array(np.broadcast_to(x, (*x.shape[:-1], 3)), order="C")
