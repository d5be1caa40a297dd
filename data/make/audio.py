"""Spoken words (espeak-ng) and six kinds of synthesised vocal sound, and their two benchmarks.

All clips are 16 kHz mono float32 in [-1, 1], one to two seconds long.  `Speech` calls the espeak-ng
library itself rather than its command: a word takes under a millisecond, and the library tells
where each word begins, which the audio tower's pretraining uses.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from scipy.signal import fftconvolve, resample_poly

RATE = 16_000
LONGEST = 2 * RATE
TEST_ROWS = 432

_WORDS = (
    "APPLE BIRD BLACK BOAT BREAD BRIDGE CASTLE CIRCLE CLOUD COFFEE DOCTOR DRAGON EIGHT FATHER FIRE "
    "FIVE FLOWER FOREST GARDEN GREEN HAPPY HORSE ISLAND JACKET KITCHEN LETTER LITTLE MARKET MONEY "
    "MORNING NINE ORANGE PAPER PURPLE QUIET RIVER SEVEN SILVER SISTER SUMMER THREE TIGER VILLAGE "
    "WATER WINDOW WINTER YELLOW ZERO"
)
WORDS = tuple(_WORDS.split())
VOCAL_SOUNDS = ("Laughter", "Sniff", "Throat clearing", "Cough", "Sigh", "Sneeze")

_ACCENTS = ("en-US", "en", "en-GB-x-rp", "en-GB-scotland", "en-029")
# Voice variants, apart from whispering and robot voices; the second list is never trained on.
_VARIANTS = {
    "train": "m1 m2 m3 m4 m6 m7 f1 f2 f3 f4 klatt klatt2 klatt4 adam Alex Alicia Andy belinda "
    "benjamin boris david ed Gene linda Lee max Michael norbert paul quincy rob steph",
    "test": "m5 m8 f5 klatt3 Andrea Annie caleb edward Gene2 john Mike steph2 victor zac",
}


@dataclass(frozen=True)
class Utterance:
    """Spoken words: samples, the words, the sample at which each begins, and the voice's name."""

    sound: np.ndarray
    words: tuple[str, ...]
    starts: tuple[int, ...]
    voice: str


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


class Speech:
    """The espeak-ng library as a function from words, voice, speed and pitch to an `Utterance`."""

    _RETRIEVE_AT_ONCE, _RATE, _PITCH, _PITCH_RANGE, _UTF8, _WORD_EVENT = 2, 1, 3, 4, 1, 1

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise RuntimeError(
                "espeak-ng is needed to make the spoken words: install it "
                "(Debian, Ubuntu: apt-get install espeak-ng; macOS: brew install espeak-ng)"
            ) from error
        self._rate = self._library.espeak_Initialize(self._RETRIEVE_AT_ONCE, 0, None, 0)
        self._chunks: list[np.ndarray] = []
        self._begins: list[int] = []

        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
        )

        def collect(samples, count, events) -> int:
            if samples and count:
                self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            i = 0
            while events[i].type:
                if events[i].type == self._WORD_EVENT:
                    self._begins.append(events[i].sample)
                i += 1
            return 0

        self._callback = callback(collect)  # kept alive: the library holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def say(
        self, words: tuple[str, ...], voice: str, speed: int, pitch: int, spread: int
    ) -> Utterance:
        """Speak words; speed in words a minute, pitch and its spread from 0 to 99."""
        self._chunks.clear()
        self._begins.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"espeak-ng has no voice {voice!r}: install its full voice data")
        for parameter, value in (
            (self._RATE, speed),
            (self._PITCH, pitch),
            (self._PITCH_RANGE, spread),
        ):
            self._library.espeak_SetParameter(parameter, int(value), 0)
        text = " ".join(words).lower().encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        sound = np.concatenate(self._chunks).astype(np.float32) / 2**15
        sound = resample_poly(sound, RATE, self._rate).astype(np.float32)
        starts = tuple(round(begin * RATE / self._rate) for begin in self._begins)
        return Utterance(sound, words, starts, voice)

    def draw(self, rng: np.random.Generator, variants: str) -> Utterance:
        """Speak two to four random words, at most 1.9 s, in a voice of some of the variants."""
        while True:
            words = tuple(rng.choice(WORDS, rng.integers(2, 5)).tolist())
            voice = f"gmw/{rng.choice(_ACCENTS)}+{rng.choice(variants.split())}"
            speed, pitch, spread = rng.integers((150, 20, 30), (240, 80, 70))
            said = self.say(words, voice, speed, pitch, spread)
            if len(said.sound) <= 0.95 * LONGEST and len(said.starts) == len(words):
                return said


def test_utterances(speech: Speech) -> list[Utterance]:
    """Speak the libri rows: no two with the same words, half of them in voices not trained on."""
    rng, rows = np.random.default_rng(101), {}
    while len(rows) < TEST_ROWS:
        said = speech.draw(rng, _VARIANTS["test" if len(rows) % 2 else "train"])
        rows.setdefault(said.words, said)
    return list(rows.values())


def train_utterances(speech: Speech, count: int, seed: int = 1) -> list[Utterance]:
    """Speak utterances for training, none with the words of a libri row."""
    rng, bank = np.random.default_rng([102, seed]), []
    held_out = {said.words for said in test_utterances(speech)}
    while len(bank) < count:
        said = speech.draw(rng, _VARIANTS["train"])
        if said.words not in held_out:
            bank.append(said)
    return bank


# ---------------------------------------------------------------- recording conditions


def stretch(said: Utterance, factor: float) -> Utterance:
    """Play an utterance faster or slower, its pitch moving along."""
    times = np.arange(0, len(said.sound) - 1, factor)
    sound = np.interp(times, np.arange(len(said.sound)), said.sound).astype(np.float32)
    return Utterance(sound, said.words, tuple(int(s / factor) for s in said.starts), said.voice)


def coloured_noise(rng: np.random.Generator, count: int, tilt: float) -> np.ndarray:
    """Draw noise of unit power whose power spectrum falls as 1 / frequency**tilt."""
    # Drawn at the longest length and cut: odd lengths make slow Fourier transforms.
    spectrum = np.fft.rfft(rng.standard_normal(LONGEST))
    spectrum *= np.maximum(np.fft.rfftfreq(LONGEST, 1 / RATE), 40.0) ** -(tilt / 2)
    noise = np.fft.irfft(spectrum)[:count]
    return noise / noise.std()


def record(
    rng: np.random.Generator, sound: np.ndarray, snr: tuple[float, float]
) -> tuple[np.ndarray, int]:
    """Place a sound in a clip of one to two seconds with noise, some echo and a random loudness.

    Returns the clip and the sample at which the sound begins in it.  `snr` is the range of the
    signal-to-noise ratio in dB.
    """
    if rng.random() < 0.3:
        length = rng.integers(300, 1500)
        echo = rng.standard_normal(length) * np.exp(-5 * np.arange(length) / length)
        sound = fftconvolve(sound, np.r_[1.0, 0.15 * echo])[: len(sound)]
    shortest = max(len(sound) + 320, RATE)
    count = int(rng.integers(shortest, LONGEST)) if shortest < LONGEST else LONGEST
    begin = int(rng.integers(0, count - len(sound) + 1))
    clip = np.zeros(count)
    clip[begin : begin + len(sound)] = sound
    level = np.sqrt(np.mean(sound**2))
    noise = coloured_noise(rng, count, rng.uniform(0, 2)) * level * 10 ** (-rng.uniform(*snr) / 20)
    clip = clip + noise
    return (clip * (rng.uniform(0.02, 0.2) / np.abs(clip).max())).astype(np.float32), begin


# ---------------------------------------------------------------- vocal sounds


def _shape(
    sound: np.ndarray, peaks: list[tuple[float, float, float]], floor: float = 0.01
) -> np.ndarray:
    """Filter with resonances (frequency Hz, width Hz, gain), as a mouth and nose would."""
    frequency = np.fft.rfftfreq(len(sound), 1 / RATE)
    gain = floor + sum(g / (1 + ((frequency - f) / w) ** 2) for f, w, g in peaks)
    shaped = np.fft.irfft(np.fft.rfft(sound) * gain, len(sound))
    return shaped / (np.abs(shaped).max() + 1e-9)


def _voice(rng: np.random.Generator, pitch: np.ndarray, rough: float = 0.0) -> np.ndarray:
    """Make a buzz with the given pitch (Hz at each sample); rough ones jitter and drop pulses."""
    drift = np.interp(
        np.arange(len(pitch)),
        np.arange(0, len(pitch) + 160, 160),
        rng.standard_normal(len(pitch) // 160 + 2)[: len(np.arange(0, len(pitch) + 160, 160))],
    )
    phase = np.cumsum(pitch * (1 + (0.01 + 0.1 * rough) * drift)) / RATE
    buzz = (1 - 2 * (phase % 1)) * (1 - rough * 0.7 * (np.floor(phase) % 2))
    return buzz - buzz.mean()


def _time(seconds: float) -> np.ndarray:
    return np.linspace(0, 1, max(int(seconds * RATE), 64))


def _hump(x: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Rise from 0 to 1 over the first share `attack`, fall back over the last share `release`."""
    return np.sin(0.5 * np.pi * np.clip(np.minimum(x / attack, (1 - x) / release), 0, 1)) ** 2


def _vowel(rng: np.random.Generator, size: float) -> list[tuple[float, float, float]]:
    first, second = rng.uniform(450, 850), rng.uniform(1000, 1900)
    peaks = ((first, 90, 1.0), (second, 140, 0.5), (2700, 200, 0.25), (3600, 300, 0.1))
    return [(f * size, w, g) for f, w, g in peaks]


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE))


def _laughter(rng: np.random.Generator, size: float) -> np.ndarray:
    """Repeat short vowels with breath between them, usually voiced, falling in pitch."""
    period, pitch = rng.uniform(0.15, 0.26), rng.uniform(110, 280) * size
    voiced = rng.random() < 0.8
    vowel = _vowel(rng, size)
    parts = []
    for i in range(rng.integers(3, 8)):
        x = _time(period * rng.uniform(0.5, 0.75))
        breath = _shape(rng.standard_normal(len(x)), vowel, 0.05)
        if voiced:
            tone = pitch * (0.95**i) * (1 + 0.15 * np.sin(np.pi * x) * rng.uniform(0, 1))
            tone = _shape(_voice(rng, tone, 0.1), vowel)
            sound = tone * _hump(x, 0.35, 0.5) + 0.25 * breath * _hump(x, 0.1, 0.8)
        else:
            sound = breath * _hump(x, 0.2, 0.6)
        rest = _silence(period - len(x) / RATE)
        parts += [sound * rng.uniform(0.6, 1), rest + 0.03 * rng.standard_normal(len(rest))]
    return np.concatenate(parts)


def _sniff(rng: np.random.Generator, size: float) -> np.ndarray:
    """Draw air in through the nose, one to three times: hissing, rising, ending abruptly."""
    parts = []
    for _ in range(rng.integers(1, 4)):
        x = _time(rng.uniform(0.12, 0.4))
        low, high = rng.uniform(1200, 2200) * size, rng.uniform(2500, 4800) * size
        noise = rng.standard_normal(len(x))
        start = _shape(noise, [(low, 500, 1.0), (high, 900, 0.4)])
        end = _shape(noise, [(low * 1.35, 600, 0.6), (high * 1.25, 1100, 1.0)])
        parts += [(start * (1 - x) + end * x) * x ** rng.uniform(0.5, 1.5) * _hump(x, 0.3, 0.06)]
        parts += [_silence(rng.uniform(0.08, 0.3))]
    return np.concatenate(parts)


def _throat_clearing(rng: np.random.Generator, size: float) -> np.ndarray:
    """Grind low and rough, once to three times, closing on a hum."""
    parts = []
    for _ in range(rng.integers(1, 4)):
        x = _time(rng.uniform(0.22, 0.5))
        pitch = rng.uniform(65, 120) * size * (1 + 0.25 * np.sin(np.pi * x))
        peaks = [(rng.uniform(300, 550) * size, 150, 1.0), (rng.uniform(900, 1400), 250, 0.35)]
        growl = _shape(_voice(rng, pitch, rng.uniform(0.5, 1)), peaks)
        rasp = _shape(rng.standard_normal(len(x)), peaks + [(2400, 500, 0.2)])
        flutter = 1 + 0.6 * np.sin(2 * np.pi * rng.uniform(22, 40) * x * len(x) / RATE)
        sound = (growl + rng.uniform(0.2, 0.7) * rasp * flutter) * _hump(x, 0.15, 0.35)
        parts += [sound, _silence(rng.uniform(0.02, 0.15))]
    if rng.random() < 0.5:
        x = _time(rng.uniform(0.1, 0.3))
        hum = _voice(rng, np.full(len(x), rng.uniform(90, 150) * size))
        parts.append(0.4 * _shape(hum, [(250, 80, 1.0)]) * _hump(x, 0.2, 0.5))
    return np.concatenate(parts)


def _burst(rng: np.random.Generator, seconds: float, peaks: list, sharp: float) -> np.ndarray:
    """Explode in noise that decays."""
    x = _time(seconds)
    noise = _shape(rng.standard_normal(len(x)), peaks, 0.08)
    return noise * np.minimum(x / 0.015, 1) * np.exp(-sharp * x) * _hump(x, 0.01, 0.2)


def _cough(rng: np.random.Generator, size: float) -> np.ndarray:
    """Explode once to four times, broad and low, some with a voiced tail."""
    parts, voiced = [], rng.random() < 0.6
    body = [(rng.uniform(400, 800) * size, 300, 1.0), (rng.uniform(1300, 2200) * size, 700, 0.8)]
    for _ in range(rng.integers(1, 5)):
        sound = _burst(rng, rng.uniform(0.15, 0.32), body, rng.uniform(3, 6))
        if voiced:
            x = np.linspace(0, 1, len(sound))
            tone = _voice(rng, rng.uniform(140, 300) * size * (1 - 0.35 * x), 0.3)
            sound = sound + 0.4 * _shape(tone, body) * _hump(x, 0.3, 0.5) * np.exp(-2 * x)
        parts += [sound * rng.uniform(0.6, 1), _silence(rng.uniform(0.04, 0.2))]
    return np.concatenate(parts)


def _sigh(rng: np.random.Generator, size: float) -> np.ndarray:
    """Breathe out once, long and soft, some with a falling voice."""
    x = _time(rng.uniform(0.6, 1.5))
    peaks = [(rng.uniform(500, 900) * size, 250, 1.0), (rng.uniform(1200, 1900) * size, 400, 0.6)]
    noise = rng.standard_normal(len(x))
    open_, closed = _shape(noise, peaks), _shape(noise, [(f * 0.75, w, g) for f, w, g in peaks])
    sound = open_ * (1 - x) + closed * x
    if rng.random() < 0.5:
        tone = _voice(rng, rng.uniform(130, 260) * size * (1.15 - 0.4 * x), 0.05)
        sound = sound + rng.uniform(0.3, 1.2) * _shape(tone, _vowel(rng, size))
    return sound * _hump(x, rng.uniform(0.1, 0.35), rng.uniform(0.4, 0.65))


def _sneeze(rng: np.random.Generator, size: float) -> np.ndarray:
    """Gasp in, hold, then burst out in a hiss, sometimes voiced."""
    x = _time(rng.uniform(0.2, 0.5))
    gasp = _shape(rng.standard_normal(len(x)), _vowel(rng, size), 0.04)
    if rng.random() < 0.5:
        tone = _voice(rng, rng.uniform(160, 320) * size * (0.9 + 0.3 * x), 0.1)
        gasp = gasp + 0.8 * _shape(tone, _vowel(rng, size))
    gasp = rng.uniform(0.15, 0.5) * gasp * x * _hump(x, 0.2, 0.1)
    hiss = [(rng.uniform(2800, 4500) * size, 900, 1.0), (rng.uniform(5000, 6800), 900, 0.7)]
    out = _burst(rng, rng.uniform(0.2, 0.5), hiss, rng.uniform(2.5, 5))
    if rng.random() < 0.6:
        y = np.linspace(0, 1, len(out))
        tone = _voice(rng, rng.uniform(180, 380) * size * (1 - 0.3 * y), 0.1)
        out = out + 0.5 * _shape(tone, _vowel(rng, size)) * _hump(y, 0.15, 0.7)
    return np.concatenate([gasp, _silence(rng.uniform(0.02, 0.18)), out])


_MAKERS = (_laughter, _sniff, _throat_clearing, _cough, _sigh, _sneeze)


def vocal_sound(rng: np.random.Generator, kind: int, size: float) -> np.ndarray:
    """Make one sound of class `kind`; size scales resonances and pitch (a small speaker: 1.3)."""
    sound = _MAKERS[kind](rng, size)[: int(0.95 * LONGEST)]
    return (sound / np.abs(sound).max()).astype(np.float32)


def vocal_clip(
    rng: np.random.Generator, kind: int, size: float, snr: tuple[float, float] = (10, 35)
) -> np.ndarray:
    """Make a clip of one to two seconds with one vocal sound in it."""
    return record(rng, vocal_sound(rng, kind, size), snr)[0]


# ---------------------------------------------------------------- the benchmarks

_AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def flac(clip: np.ndarray) -> bytes:
    """Encode a clip as 16-bit FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, clip, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def libri() -> pa.Table:
    """Make the libri benchmark in the columns of openslr/librispeech_asr."""
    rng, rows, voices = np.random.default_rng(103), [], {}
    for i, said in enumerate(test_utterances(Speech())):
        clip, _ = record(rng, said.sound, (10, 35))
        speaker = 1000 + voices.setdefault(said.voice, len(voices))
        name = f"{speaker}-{1}-{i:04d}"
        rows.append(
            {
                "file": f"{name}.flac",
                "audio": {"bytes": flac(clip), "path": f"{name}.flac"},
                "text": " ".join(said.words),
                "speaker_id": speaker,
                "chapter_id": 1,
                "id": name,
            }
        )
    schema = pa.schema(
        [
            ("file", pa.string()),
            ("audio", _AUDIO),
            ("text", pa.string()),
            ("speaker_id", pa.int64()),
            ("chapter_id", pa.int64()),
            ("id", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema)


def vocal() -> pa.Table:
    """Make the vocal_sound benchmark: seventy-two clips a class, speakers of forty sizes."""
    rng, rows = np.random.default_rng(104), []
    for i in range(TEST_ROWS):
        speaker = int(rng.integers(40))
        kind = i % len(VOCAL_SOUNDS)
        clip = vocal_clip(rng, kind, 0.8 + 0.5 * speaker / 39)
        rows.append(
            {
                "audio": {"bytes": flac(clip), "path": f"s{speaker:02d}_{i:04d}.flac"},
                "spk_id": f"s{speaker:02d}",
                "answer": VOCAL_SOUNDS[kind],
            }
        )
    schema = pa.schema([("audio", _AUDIO), ("spk_id", pa.string()), ("answer", pa.string())])
    return pa.Table.from_pylist([rows[i] for i in rng.permutation(len(rows))], schema)


def main(folder: Path = Path("data/benchmarks")) -> None:
    """Write both benchmarks' parquet files."""
    for name, table in (("libri", libri()), ("vocal_sound", vocal())):
        path = folder / name / "test-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        print(f"{path}: {table.num_rows} rows, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
