"""Bytes to pictures, clips and sounds: every fault by its right value, in files made here."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minerlib.tasks import media

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RAMP = np.linspace(0, 1, 256).reshape(16, 16)  # black to white, one step of 8 bits at a time


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corner(mode: str = "RGB", colour=RED, ground=BLUE) -> Image.Image:
    """Six by four pixels, with one of another colour at the top left."""
    image = Image.new(mode, (6, 4), ground)
    image.putpixel((0, 0), colour)
    return image


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.fault("picture: orientation flag")
@pytest.mark.parametrize(
    ("flag", "size", "where"),
    [(2, (6, 4), (5, 0)), (3, (6, 4), (5, 3)), (6, (4, 6), (3, 0)), (8, (4, 6), (0, 5))],
)
def test_a_picture_is_turned_as_its_orientation_says(flag, size, where):
    exif = Image.Exif()
    exif[0x0112] = flag
    image = media.picture(encoded(corner(), exif=exif))
    assert image.size == size and image.getpixel(where) == RED
    assert np.asarray(image).reshape(-1, 3).tolist().count(list(BLUE)) == 23


@pytest.mark.fault("picture: transparency")
@pytest.mark.parametrize(
    ("image", "options"),
    [
        (corner("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), {}),
        (corner("LA", (0, 0), (0, 255)), {}),
        (corner().convert("P"), {"transparency": corner().convert("P").getpixel((0, 0))}),
        (corner("L", 1, 0), {"transparency": 1}),
        (corner("RGB"), {"transparency": RED}),
    ],
    ids=["RGBA", "LA", "P", "L", "RGB"],
)
def test_transparency_lies_on_white(image, options):
    assert media.picture(encoded(image, **options)).getpixel((0, 0)) == WHITE
    assert media.picture(encoded(image, **options)).getpixel((1, 1)) != WHITE


@pytest.mark.fault("picture: half transparency")
def test_half_transparent_red_is_pink():
    image = media.picture(encoded(corner("RGBA", (255, 0, 0, 128), (0, 0, 0, 255))))
    assert image.getpixel((0, 0)) == (255, 127, 127) and image.getpixel((1, 0)) == (0, 0, 0)


def test_palettes_grey_and_one_bit_become_rgb():
    assert media.picture(encoded(corner().convert("P"))).getpixel((0, 0)) == RED
    assert media.picture(encoded(corner("L", 200, 10))).getpixel((0, 0)) == (200, 200, 200)
    assert media.picture(encoded(corner("1", 1, 0))).getpixel((0, 0)) == WHITE


def test_pure_cyan_in_cmyk():
    data = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert media.picture(data).getpixel((4, 4)) == (0, 255, 255)


@pytest.mark.fault("picture: 16 and 32 bits are clipped")
@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "PPM"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 2 - 1).astype(np.float32), "TIFF"),
    ],
    ids=["16-png", "16-tiff", "16-pgm", "32-integer", "float", "signed-float"],
)
def test_deep_pictures_are_scaled(pixels, kind):
    ramp = np.asarray(media.picture(encoded(Image.fromarray(pixels), kind)))
    assert ramp.shape == (16, 16, 3)
    assert np.abs(ramp.reshape(-1, 3) - np.arange(256)[:, None]).max() <= 1
    assert ramp[0, 0, 0] == 0 and ramp[-1, -1, 0] == 255


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_eight_bits_in_a_deeper_array_stay_as_they_are(dtype):
    pixels = (RAMP * 254).round().astype(dtype)  # not even white is needed to tell
    assert np.array_equal(np.asarray(media.picture(pixels))[..., 0], pixels)
    assert np.array_equal(np.asarray(media.picture(RAMP > 0.5))[..., 0], (RAMP > 0.5) * 255)


@pytest.mark.fault("picture: a dark 16-bit one is not stretched")
def test_a_dark_sixteen_bit_picture_stays_dark():
    for value, grey in ((200 * 257 // 10, 20), (200, 1)):
        data = encoded(Image.fromarray(np.full((4, 4), value, np.uint16)))
        assert media.picture(data).getpixel((0, 0)) == (grey, grey, grey)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert media.picture(data).getpixel((0, 0)) == RED


@pytest.mark.fault("picture: errors name their cause")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (encoded(corner().resize((99, 99)), "PNG")[:-60], "(?i)truncated"),
        (
            b"no picture",
            "cannot be decoded: UnidentifiedImageError: cannot identify image file its bytes",
        ),
        (b"", "cannot be decoded"),
        (None, "neither a file nor numbers: NoneType"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": None, "path": "gone.png"}, "no file 'gone.png'"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\) is no finite pixels"),
        (np.zeros((9, 9, 5)), r"shape \(9, 9, 5\) is no finite pixels"),
        (np.full((4, 4), np.nan), "no finite pixels"),
    ],
)
def test_what_is_no_picture_says_why(value, message):
    with pytest.raises(ValueError, match=message):
        media.picture(value)


@pytest.mark.fault("picture: decoded ones are refused")
def test_a_picture_from_every_source(tmp_path):
    image = corner()
    data, pixels = encoded(image), np.asarray(image)
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        data, bytearray(data), tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels,
        {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(tmp_path / "a.png")},
        pixels.tolist(), np.moveaxis(pixels, -1, 0), pixels / 255,
        np.dstack([pixels, np.full((4, 6), 255, np.uint8)]), pixels.astype(np.uint16) * 257,
    ]  # fmt: skip
    for source in sources:
        assert np.array_equal(np.asarray(media.picture(source)), pixels), type(source)


# --- clips ---------------------------------------------------------------------------------------


def video(
    path, n=10, *, kind="mp4", codec="libx264", times=None, turned=None, aspect=None, noise=False
) -> bytes:
    """Black frames 64 x 32 with a red top left corner, frame i of 10 * i blue, 10 a second."""
    random = np.random.default_rng(0)
    options = {"avoid_negative_ts": "disabled"}
    if kind == "mp4":  # the header first, so that a cut file has one
        options["movflags"] = "faststart"
    with av.open(str(path), "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turned:
            stream.set_display_rotation(*turned)
        for i in range(n):
            pixels = np.zeros((32, 64, 3), np.uint8)
            pixels[..., 2] = 10 * i
            pixels[:16, :32] = RED
            if noise:
                pixels = random.integers(0, 255, pixels.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (times[i] if times else i / 10))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def red(frame: np.ndarray) -> tuple[int, int]:
    """The (row, column) of the frame's quarter that is red."""
    height, width = frame.shape[:2]
    quarters = frame.astype(int).reshape(2, height // 2, 2, width // 2, 3).mean((1, 3))
    row, column = divmod(int((quarters[..., 0] - quarters[..., 1]).argmax()), 2)
    assert quarters[row, column, 0] > 200
    return row, column


@pytest.mark.fault("clip: rotation")
@pytest.mark.parametrize(
    ("turned", "shape", "where"),
    [
        ((90,), (64, 32), (1, 0)),
        ((-90,), (64, 32), (0, 1)),
        ((180,), (32, 64), (1, 1)),
        ((0, True), (32, 64), (0, 1)),
        ((90, True), (64, 32), (1, 1)),
    ],
)
def test_a_clip_is_turned_as_its_container_says(tmp_path, turned, shape, where):
    frames = media.clip(video(tmp_path / "v", turned=turned), 2).frames
    assert frames.shape == (2, *shape, 3) and red(frames[0]) == red(frames[1]) == where


@pytest.mark.fault("clip: non-square pixels")
def test_pixels_of_a_clip_are_square(tmp_path):
    assert media.clip(video(tmp_path / "v", aspect="2/1"), 1).frames.shape == (1, 32, 128, 3)


@pytest.mark.fault("clip: times of frames")
def test_frames_carry_their_times(tmp_path):
    clip = media.clip(video(tmp_path / "v"), 4)
    assert clip.times.tolist() == pytest.approx([0, 0.3, 0.6, 0.9]) and clip.notice is None
    blue = clip.frames[:, -1, -1, 2].astype(int)
    assert np.abs(blue - [0, 30, 60, 90]).max() <= 6


@pytest.mark.fault("clip: variable frame rate")
def test_times_of_a_variable_frame_rate(tmp_path):
    times = [0.0, 0.1, 0.2, 0.7, 0.8, 1.5, 1.6, 1.7, 1.8, 3.0]
    clip = media.clip(video(tmp_path / "v", times=times, kind="matroska"), 16)
    assert clip.times.tolist() == pytest.approx(times)
    assert media.clip(tmp_path / "v", 4).times.tolist() == pytest.approx([0, 0.7, 1.6, 3.0])


@pytest.mark.fault("clip: times count from its first frame")
def test_times_start_at_zero(tmp_path):
    clip = media.clip(video(tmp_path / "v", times=[1.4 + i / 5 for i in range(10)], kind="mpegts"))
    assert clip.times.tolist() == pytest.approx([i / 5 for i in range(10)], abs=1e-3)


def test_a_stream_without_times_has_none(tmp_path):
    clip = media.clip(video(tmp_path / "v", kind="h264"), 3)
    assert clip.times is None and len(clip.frames) == 3


@pytest.mark.fault("clip: shorter than its header says")
def test_a_clip_cut_short_is_reported_and_sampled_from_what_is_there(tmp_path):
    whole = video(tmp_path / "v", noise=True)
    cut = media.clip(whole[: int(0.7 * len(whole))], 3)
    n = int(cut.notice.split()[0])
    assert cut.notice == f"{n} of the 10 frames that its header promises can be decoded"
    assert 5 <= n <= 7 and len(cut.frames) == 3
    assert cut.times[-1] == pytest.approx((n - 1) / 10), "the last one that is there"
    every = media.clip(whole, 10).frames
    assert np.array_equal(cut.frames[0], every[0]) and np.array_equal(cut.frames[-1], every[n - 1])


@pytest.mark.fault("clip: shorter than a header without a count says")
def test_a_cut_clip_without_a_count_of_frames_is_reported(tmp_path):
    whole = video(tmp_path / "v", noise=True, kind="matroska", codec="mpeg4")
    assert media.clip(whole).notice is None
    cut = media.clip(whole[: int(0.7 * len(whole))])
    assert cut.notice == "0.40 of the 1.00 s that its header promises can be decoded"
    assert len(cut.frames) == 4


@pytest.mark.fault("clip: frames that its container cuts out")
def test_frames_before_an_edit_list_do_not_count(tmp_path):
    clip = media.clip(video(tmp_path / "v", times=[i / 10 - 0.3 for i in range(10)]), 4)
    assert clip.times.tolist() == pytest.approx([0, 0.2, 0.4, 0.6]) and clip.notice is None
    assert np.abs(clip.frames[:, -1, -1, 2].astype(int) - [30, 50, 70, 90]).max() <= 6


@pytest.mark.fault("clip: half a frame at its end")
def test_half_a_frame_is_none(tmp_path):
    whole = video(tmp_path / "v", noise=True, codec="mpeg4")
    cut = media.clip(whole[: int(0.7 * len(whole))])
    assert len(cut.frames) == 4 and "4 of the 10" in cut.notice


@pytest.mark.fault("clip: errors name their cause")
def test_what_is_no_clip_says_why(tmp_path):
    whole = video(tmp_path / "v", noise=True)
    with pytest.raises(ValueError, match="no frame of this clip can be decoded"):
        media.clip(whole[: whole.index(b"mdat") + 20])
    with pytest.raises(ValueError, match="clip cannot be decoded: .*Invalid data"):
        media.clip(b"no clip" * 20)
    with pytest.raises(ValueError, match="no video stream"):
        media.clip(wav(tone(), 8000))
    with pytest.raises(ValueError, match="frames=0"):
        media.clip(whole, 0)


@pytest.mark.fault("clip: transparency")
def test_a_transparent_clip_lies_on_white(tmp_path):
    pixels = np.asarray(corner("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)))
    with av.open(str(tmp_path / "v"), "w", format="mov") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 6, 4, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    frame = media.clip(tmp_path / "v").frames[0]
    assert tuple(frame[0, 0]) == RED and tuple(frame[-1, -1]) == WHITE


def raw(shape, **columns) -> dict:
    values = np.arange(np.prod(shape), dtype=np.uint32).astype(np.uint8)
    names = ("num_frames", "height", "width", "channels")
    return {"binary_frames": values.tobytes(), **dict(zip(names, shape, strict=True)), **columns}


@pytest.mark.fault("raw frames: grey and transparent ones")
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_raw_frames_become_rgb(channels):
    row = raw((5, 2, 3, channels))
    clip = media.clip(row, 3)
    values = np.frombuffer(row["binary_frames"], np.uint8).reshape(5, 2, 3, channels)[[0, 2, 4]]
    assert clip.frames.shape == (3, 2, 3, 3) and clip.times is None
    if channels in (2, 4):
        colour, alpha = values[..., :-1].astype(float), values[..., -1:] / 255
        values = (colour * alpha + 255 * (1 - alpha)).round()
    assert np.array_equal(clip.frames, np.broadcast_to(values, clip.frames.shape))


@pytest.mark.fault("raw frames: times")
def test_raw_frames_have_times_where_a_rate_is_known():
    assert media.clip(raw((9, 2, 2, 3), fps=4.0), 3).times.tolist() == [0, 1, 2]
    clip = media.clip(media.medium({**raw((9, 2, 2, 3)), "fps": 2, "qa": "?"}, "video"), 2)
    assert clip.times.tolist() == [0, 4]


@pytest.mark.fault("raw frames: shape is checked")
def test_raw_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match="holds 60 bytes, but .* = 5 x 2 x 3 x 3 needs 90"):
        media.clip({**raw((5, 2, 3, 2)), "channels": 3})
    row = raw((5, 2, 3, 3))
    del row["width"]
    with pytest.raises(ValueError, match="KeyError: .width"):
        media.clip(row)


@pytest.mark.fault("clip: decoded ones are refused")
def test_decoded_clips():
    frames = np.random.default_rng(0).integers(0, 255, (7, 5, 6, 3), np.uint8)
    pictures = [Image.fromarray(frame) for frame in frames]
    for value in (frames, frames.tolist(), np.moveaxis(frames, -1, 1), frames / 255, pictures):
        clip = media.clip(value, 3)
        assert np.array_equal(clip.frames, frames[[0, 3, 6]]) and clip.times is None
    assert np.array_equal(media.clip(frames[..., 0], 7).frames[..., 2], frames[..., 0])
    with pytest.raises(ValueError, match="is no finite pixels"):
        media.clip(np.zeros((0, 4, 4, 3)))


@given(st.integers(1, 200), st.integers(1, 40))
def test_frames_are_evenly_spaced_from_the_first_to_the_last(total, frames):
    values = np.zeros((total, 1, 1, 1), np.uint8)
    values[:, 0, 0, 0] = np.arange(total)
    row = {"binary_frames": values.tobytes(), "num_frames": total, "height": 1, "width": 1}
    clip = media.clip({**row, "channels": 1, "fps": 1.0}, frames)
    steps = np.diff(clip.times)
    assert len(clip.frames) == len(clip.times) == min(total, frames)
    assert clip.times[0] == 0 and (frames == 1 or clip.times[-1] == total - 1)
    assert (steps > 0).all() and np.ptp(steps if len(steps) else [0]) <= 1
    assert np.array_equal(clip.frames[:, 0, 0, 0], clip.times)


# --- sounds --------------------------------------------------------------------------------------


def tone(rate: int = 8000, seconds: float = 1.0, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


def wav(wave: np.ndarray, rate: int, kind: str = "WAV", **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, **options)
    return file.getvalue()


def pitch(wave: np.ndarray, rate: int) -> float:
    """The strongest frequency, in Hz."""
    return float(np.fft.rfftfreq(len(wave), 1 / rate)[np.abs(np.fft.rfft(wave)).argmax()])


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_tone_keeps_its_pitch_and_length(kind, rate):
    wave = media.sound(wav(tone(rate), rate, kind), 16_000)
    assert wave.dtype == np.float32 and abs(len(wave) / 16_000 - 1) < 0.08
    assert abs(pitch(wave, 16_000) - 440) < 2 and abs(np.abs(wave).max() - 0.5) < 0.1
    if kind in ("WAV", "FLAC"):
        assert len(wave) == 16_000


def test_channels_are_mixed():
    wave = media.sound(wav(np.stack([tone(), np.zeros(8000)], 1), 8000), 8000)
    assert np.allclose(wave, tone() / 2, atol=1e-3)


@pytest.mark.fault("sound: decoded ones are refused")
def test_decoded_sounds():
    wave = tone().astype(np.float32)
    stereo = np.stack([wave, wave])
    for array in (wave, wave.tolist(), stereo, stereo.T, wave.astype(np.float64)):
        value = {"array": array, "sampling_rate": 8000, "path": "gone.wav"}
        assert np.allclose(media.sound(value, 8000), wave)
        assert media.duration(value) == 1.0
        assert pitch(media.sound(value, 16_000), 16_000) == 440
    with pytest.raises(ValueError, match="floats in .*Hz"):
        media.sound(wave)


@pytest.mark.fault("sound: empty or NaN")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (wav(np.zeros(0), 8000), "empty"),
        (wav(np.zeros((0, 2)), 8000), "empty"),
        ({"array": [], "sampling_rate": 8000}, "empty"),
        (wav(np.array([0.1, np.nan]), 8000, subtype="FLOAT"), "NaN"),
        ({"array": [0.1, np.inf], "sampling_rate": 8000}, "NaN or infinite"),
        (wav(tone(16_000, 5), 16_000, "FLAC")[:9000], "sound cannot be decoded"),
        (wav(tone(16_000, 5), 16_000, "MP3")[:5000], "cut short: .* of 80000 samples"),
        (b"no sound", "cannot be decoded: LibsndfileError: Error opening its bytes"),
        ({"array": [1, -200, 30], "sampling_rate": 8000}, "floats in"),
        ({"array": tone(), "sampling_rate": None}, "floats in .*Hz"),
    ],
    ids=range(10),  # bytes would be ids of their own, and encoders write the time into them
)
def test_what_is_no_sound_says_why(value, message):
    with pytest.raises(ValueError, match=message):
        media.sound(value)


def test_duration_without_decoding(monkeypatch, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(tone(seconds=2.5), 8000))
    monkeypatch.setattr(soundfile, "read", None)
    assert media.duration(str(tmp_path / "a.wav")) == 2.5
    assert media.duration({"bytes": wav(tone(), 8000), "path": "x"}) == 1.0
    with pytest.raises(ValueError, match="sound cannot be decoded"):
        media.duration(b"no sound")


# --- sources -------------------------------------------------------------------------------------


def test_source_bytes_are_of_the_content_and_never_of_the_path(tmp_path):
    data = wav(tone(), 8000)
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(data)
        assert media.source_bytes(tmp_path / name) == data
        assert media.source_bytes({"bytes": None, "path": str(tmp_path / name)}) == data
        assert media.source_bytes({"bytes": data, "path": name}) == data
    decoded = {"array": tone(), "sampling_rate": 8000}
    assert media.source_bytes({**decoded, "path": "a"}) == media.source_bytes({**decoded})


def test_source_bytes_tell_decoded_media_apart():
    zeros = np.zeros((2, 6), np.uint8)
    row = raw((2, 2, 3, 1))
    values = [
        zeros,
        zeros.reshape(3, 4),
        zeros.astype(np.float32),
        {"array": zeros, "sampling_rate": 8000},
        {"array": zeros, "sampling_rate": 16_000},
        row,
        {**row, "height": 3, "width": 2},
        {**row, "fps": 2.0},
        corner(),
        corner(colour=GREEN),
    ]
    assert len({media.source_bytes(value) for value in values}) == len(values)
    assert media.source_bytes(corner()) == media.source_bytes(np.asarray(corner()))
    with pytest.raises(ValueError, match="neither a file nor numbers"):
        media.source_bytes(None)


def test_the_medium_of_a_row():
    row = raw((2, 2, 3, 1), question="?")
    assert media.medium({"image": b"x"}, "image") == b"x"
    assert media.medium({"video": b"x", **row}, "video") == b"x"
    assert "question" not in media.medium(row, "video")
    with pytest.raises(ValueError, match="no image in this row; it has image, text"):
        media.medium({"image": None, "text": "?"}, "image")


def test_decoders_fill_a_sample(tmp_path):
    assert set(media.DECODE) == {"image", "video", "audio"}
    sound = media.DECODE["audio"]({"array": tone(), "sampling_rate": 8000}, 4, 16_000)
    assert sound["sampling_rate"] == 16_000 == len(sound["audio"])
    assert media.DECODE["image"](corner(), 4, 1)["image"].size == (6, 4)
    whole = video(tmp_path / "v", noise=True)
    clip = media.DECODE["video"](whole, 4, 1)
    assert clip["notice"] is None and len(clip["video"]) == len(clip["times"]) == 4
    assert "promises" in media.DECODE["video"](whole[: int(0.7 * len(whole))], 4, 1)["notice"]
