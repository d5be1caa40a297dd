"""Synthetic pictures and clips, and the three vision benchmarks made of them.

A picture is 48 x 48 pixels: a dark, slightly tinted ground with noise, on it words, two-digit
numbers and coloured shapes. A clip has 8 frames of 32 x 32 pixels in which one to three shapes
move, grow, shrink, blink or rest. Within a scene no colour, shape or text occurs twice, so every
question has one answer. Fonts are those that matplotlib ships, so any machine makes the same files.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

SIDE, CLIP_SIDE, FRAMES, CELL = 48, 32, 8, 8
TEST_ROWS = 480
COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 175, 65),
    "blue": (65, 100, 245),
    "yellow": (240, 220, 50),
    "purple": (165, 60, 200),
    "orange": (245, 140, 35),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
WORDS = """
art bank bar beer bike book bus cafe club exit farm fish food gate gold gym hair hot ice inn jam
keys lift map milk news nuts oil open park pen pie post pub rice sale salt shoe shop soup spa stop
taxi tea toys wine zoo law
""".split()  # noqa: SIM905
RELATIONS = ("left", "right", "above", "below")
MOTIONS = ("rest", "left", "right", "up", "down", "grow", "shrink", "blink")
DOING = {"rest": "resting", "grow": "growing", "shrink": "shrinking", "blink": "blinking"}
COUNTS = ("one", "two", "three")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FONTS = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
_FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@dataclass(frozen=True)
class Thing:
    """A shape, word or number: what it is, its colour, its centre and size in pixels."""

    kind: str
    value: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    font: tuple[str, int] = ("", 0)
    motion: str = "rest"
    speed: float = 0.0

    def at(self, frame: int) -> tuple[float, float, float]:
        """Centre and size in a frame; size 0 while a blinking thing is off."""
        step = self.speed * (frame - (FRAMES - 1) / 2)
        dx = {"left": -step, "right": step}.get(self.motion, 0.0)
        dy = {"up": -step, "down": step}.get(self.motion, 0.0)
        size = self.width + {"grow": step, "shrink": -step}.get(self.motion, 0.0)
        if self.motion == "blink" and frame % 2:
            size = 0.0
        return self.x + dx, self.y + dy, size


@dataclass(frozen=True)
class Scene:
    """Things on a ground colour; `noise` is the standard deviation in grey levels."""

    things: tuple[Thing, ...]
    ground: tuple[int, int, int]
    noise: float
    noise_seed: int

    @property
    def key(self) -> tuple:
        """What two scenes must share to count as the same, whatever their ground and noise."""
        return tuple(
            (thing.value, thing.colour, thing.motion, round(thing.x), round(thing.y))
            for thing in self.things
        )


@dataclass(frozen=True)
class Question:
    """A question on a scene and its answer."""

    text: str
    answer: str


Maker = Callable[[np.random.Generator], Scene]


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONT_FOLDER / f"{name}.ttf"), size)


@lru_cache(maxsize=4096)
def _text_mask(text: str, name: str, size: int) -> np.ndarray:
    font = _font(name, size)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), text, fill=255, font=font)
    return np.asarray(picture, np.float32) / 255


def _shape_mask(shape: str, x: float, y: float, size: float, side: int) -> np.ndarray:
    """Coverage of each pixel by a shape, with edges one pixel soft."""
    axis = np.arange(side, dtype=np.float32) + 0.5
    dx, dy, r = axis[None] - x, axis[:, None] - y, size / 2
    if shape == "circle":
        inside = r - np.hypot(dx, dy)
    elif shape == "square":
        inside = 0.9 * r - np.maximum(abs(dx), abs(dy))
    elif shape == "diamond":
        inside = (1.1 * r - abs(dx) - abs(dy)) * 0.7
    elif shape == "triangle":
        inside = np.minimum(0.8 * r - dy, (dy + r - 2 * abs(dx) + 0.2 * r) * 0.45)
    else:
        arm = 0.32 * r
        inside = np.maximum(
            np.minimum(arm - abs(dx), r - abs(dy)), np.minimum(r - abs(dx), arm - abs(dy))
        )
    return np.clip(inside + 0.5, 0, 1) if size else np.zeros((side, side), np.float32)


def _boxes_apart(a: Thing, b: Thing, frames: Sequence[int]) -> bool:
    for frame in frames:
        ax, ay, asize = a.at(frame)
        bx, by, bsize = b.at(frame)
        wide = (max(asize, a.width) + max(bsize, b.width)) / 2 + 1
        high = (max(asize, a.height) + max(bsize, b.height)) / 2 + 1
        if abs(ax - bx) < wide and abs(ay - by) < high:
            return False
    return True


def _ground(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(v) for v in rng.integers(0, 45) + rng.integers(0, 25, 3))


def _place(rng: np.random.Generator, wanted: list[Thing], side: int, frames: int) -> tuple | None:
    placed: list[Thing] = []
    for thing in wanted:
        for _ in range(30):
            travel = abs(thing.speed) * (frames - 1) / 2
            sized = thing.motion in ("grow", "shrink")
            room_x = thing.width / 2 + travel * (sized or thing.motion in ("left", "right"))
            room_y = thing.height / 2 + travel * (sized or thing.motion in ("up", "down"))
            if 2 * room_x > side - 1 or 2 * room_y > side - 1:
                return None
            x = float(rng.uniform(room_x, side - room_x))
            y = float(rng.uniform(room_y, side - room_y))
            there = Thing(**(vars(thing) | {"x": x, "y": y}))
            if all(_boxes_apart(there, other, range(frames)) for other in placed):
                placed.append(there)
                break
        else:
            return None
    return tuple(placed)


def _scene(rng: np.random.Generator, draw: Callable[[], list[Thing]], side: int, frames: int,
           noise: float) -> Scene:  # fmt: skip
    while (things := _place(rng, draw(), side, frames)) is None:
        pass
    return Scene(things, _ground(rng), float(rng.uniform(0, noise)), int(rng.integers(2**31)))


def _shape(rng: np.random.Generator, value: str, colour: str, low: float, high: float) -> Thing:
    size = float(rng.uniform(low, high))
    return Thing("shape", value, colour, 0, 0, size, size)


def _text(rng: np.random.Generator, kind: str, colour: str) -> Thing:
    value = WORDS[rng.integers(len(WORDS))] if kind == "word" else str(rng.integers(10, 100))
    font = FONTS[rng.integers(len(FONTS))], int(rng.integers(13, 17))
    height, width = _text_mask(value.upper(), *font).shape
    return Thing(kind, value, colour, 0, 0, width, height, font)


def sign_scene(rng: np.random.Generator) -> Scene:
    """A text_vqa picture: a word or number with two shapes, or a word, a number and one shape."""

    def draw() -> list[Thing]:
        colours = rng.permutation(list(COLOURS)).tolist()
        shapes = rng.permutation(SHAPES).tolist()
        kinds = [["word"], ["number"], ["word", "number"]][rng.choice(3, p=[0.35, 0.2, 0.45])]
        things = [_text(rng, kind, colours.pop()) for kind in kinds]
        return things + [
            _shape(rng, shapes.pop(), colours.pop(), 11, 14) for _ in range(3 - len(kinds))
        ]

    return _scene(rng, draw, SIDE, 1, 14)


def pair_scene(rng: np.random.Generator) -> Scene:
    """A coco_caption picture: two shapes, clearly beside or above each other."""

    def draw() -> list[Thing]:
        colours, shapes = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
        return [
            _shape(rng, str(shape), str(colour), 11, 17)
            for shape, colour in zip(shapes[:2], colours[:2], strict=True)
        ]

    while True:
        scene = _scene(rng, draw, SIDE, 1, 14)
        a, b = scene.things
        across, along = sorted((abs(a.x - b.x), abs(a.y - b.y)))
        if along > across + 8:
            return scene


def crowd_scene(rng: np.random.Generator) -> Scene:
    """A picture for training alone: four shapes."""

    def draw() -> list[Thing]:
        colours, shapes = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
        return [_shape(rng, str(shapes[i]), str(colours[i]), 11, 14) for i in range(4)]

    return _scene(rng, draw, SIDE, 1, 14)


def clip_scene(rng: np.random.Generator) -> Scene:
    """An msvd_qa clip: one to three shapes, each with a motion of its own."""

    def draw() -> list[Thing]:
        colours = rng.permutation(list(COLOURS)).tolist()
        shapes = rng.permutation(SHAPES).tolist()
        motions = rng.permutation(MOTIONS).tolist()
        things = []
        for _ in range(rng.integers(1, 4)):
            motion = motions.pop()
            size = float(rng.uniform(8, 10))
            travels = motion in ("left", "right", "up", "down")
            speed = rng.uniform(1.4, 2.2) if travels else rng.uniform(0.8, 1.1)
            speed = float(speed) * (motion not in ("rest", "blink"))
            things.append(Thing("shape", shapes.pop(), colours.pop(), 0, 0, size, size,
                                motion=motion, speed=speed))  # fmt: skip
        return things

    return _scene(rng, draw, CLIP_SIDE, FRAMES, 4)


def render(scene: Scene, side: int = SIDE, frames: int = 1) -> np.ndarray:
    """Draw a scene as uint8 [frame, height, width, channel]."""
    rng = np.random.default_rng(scene.noise_seed)
    slope = rng.uniform(-8, 8, 2)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    shade = slope[0] * axis + slope[1] * axis[:, None]
    ground = np.array(scene.ground, np.float32) + shade[..., None]
    # Clips have one noise pattern for all frames, which keeps their files small.
    ground = ground + rng.normal(0, scene.noise, (side, side, 3)).astype(np.float32)
    tints = [np.array(COLOURS[t.colour]) + rng.uniform(-15, 15, 3) for t in scene.things]
    pictures = []
    for frame in range(frames):
        picture = ground
        for thing, tint in zip(scene.things, tints, strict=True):
            x, y, size = thing.at(frame)
            if thing.kind == "shape":
                mask = _shape_mask(thing.value, x, y, size, side)
            else:
                ink = _text_mask(thing.value.upper(), *thing.font)
                mask = np.zeros((side, side), np.float32)
                top, left = round(y - thing.height / 2), round(x - thing.width / 2)
                top, left = min(top, side - ink.shape[0]), min(left, side - ink.shape[1])
                mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
            picture = picture + mask[..., None] * (tint.astype(np.float32) - picture)
        pictures.append(picture)
    return np.clip(np.round(np.stack(pictures)), 0, 255).astype(np.uint8)


def clip(scene: Scene) -> np.ndarray:
    """Draw a clip, uint8 [frame, height, width, channel]."""
    return render(scene, CLIP_SIDE, FRAMES)


def relation(a: Thing, b: Thing) -> str:
    """Where a is, seen from b."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def sign_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every question on a text_vqa picture, in random order."""
    found = []
    for thing in scene.things:
        if thing.kind == "shape":
            found.append(Question(f"What color is the {thing.value}?", thing.colour))
            found.append(Question(f"What shape is {thing.colour}?", thing.value))
        elif thing.kind == "word":
            asked = ("What word is written?", "What does the sign say?", "What is the word?")
            # Reading is what this benchmark is about, so it counts twice.
            found += [Question(asked[i], thing.value) for i in rng.permutation(3)[:2]]
            found.append(Question("What color is the word?", thing.colour))
        else:
            asked = ("What number is shown?", "What is the number?", "Which number is written?")
            found += [Question(asked[i], thing.value) for i in rng.permutation(3)[:2]]
            found.append(Question("What color is the number?", thing.colour))
    return [found[i] for i in rng.permutation(len(found))]


def clip_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every question on a clip, in random order."""
    found = [Question("how many shapes are there?", COUNTS[len(scene.things) - 1])]
    for thing in scene.things:
        named = (f"the {thing.value}", f"the {thing.colour} shape")[rng.integers(2)]
        doing = DOING.get(thing.motion, "moving")
        found.append(Question(f"what color is the {thing.value}?", thing.colour))
        found.append(Question(f"what shape is {thing.colour}?", thing.value))
        found.append(Question(f"what is {named} doing?", doing))
        if doing == "moving":
            found.append(Question(f"which way is {named} moving?", thing.motion))
        if sum(DOING.get(other.motion, "moving") == doing for other in scene.things) == 1:
            found.append(Question(f"what shape is {doing}?", thing.value))
    return [found[i] for i in rng.permutation(len(found))]


def captions(scene: Scene) -> list[str]:
    """Five captions of a picture with two shapes."""
    a, b = scene.things
    if relation(a, b) in ("right", "below"):
        a, b = b, a
    one, two = f"{a.colour} {a.value}", f"{b.colour} {b.value}"
    if relation(a, b) == "left":
        return [
            f"A {one} to the left of a {two}.",
            f"A {two} to the right of a {one}.",
            f"There is a {one} on the left and a {two} on the right.",
            f"A {one} is left of a {two}.",
            f"The {two} is right of the {one}.",
        ]
    return [
        f"A {one} above a {two}.",
        f"A {two} below a {one}.",
        f"There is a {one} at the top and a {two} at the bottom.",
        f"A {one} is over a {two}.",
        f"The {two} is under the {one}.",
    ]


def caption_facts(caption: str) -> tuple | None:
    """Read (first colour, shape, second colour, shape, axis) out of a caption, or None.

    First is what is left or above; axis is 'left' or 'above'. Works on any wording of `captions`.
    """
    words = caption.lower().strip().rstrip(".").split()
    named = [
        (words[i], words[i + 1])
        for i in range(len(words) - 1)
        if words[i] in COLOURS and words[i + 1] in SHAPES
    ]
    if len(named) != 2:
        return None
    turned = {"left": ("left", False), "right": ("left", True), "above": ("above", False),
              "over": ("above", False), "top": ("above", False), "below": ("above", True),
              "under": ("above", True), "bottom": ("above", True)}  # fmt: skip
    told = [turned[word] for word in words if word in turned]
    if not told:
        return None
    axis, swap = told[0]
    first, second = named[::-1] if swap else named
    return (*first, *second, axis)


# What the vision tower is taught before it meets the language model: for every merged token (a cell
# of 8 x 8 pixels) the thing that covers it. -100 leaves a cell out.
WHAT = ("nothing", "number", *SHAPES, *WORDS)
HEADS = {
    "what": len(WHAT),
    "colour": len(COLOURS),
    "relation": len(RELATIONS),
    "motion": len(MOTIONS),
    "count": len(COUNTS),
    **{f"character{i}": len(CHARACTERS) + 1 for i in range(4)},
}


def targets(scene: Scene, side: int = SIDE, frames: int = 1) -> dict[str, np.ndarray]:
    """Per-cell classes of a scene, int64 [frame pair x row x column] for each head."""
    cells, pairs = side // CELL, max(1, frames // 2)
    out = {head: np.full((pairs, cells, cells), -100) for head in HEADS}
    out["what"][:] = 0
    edges = np.arange(cells) * CELL
    for thing in scene.things:
        for pair in range(pairs):
            x, y, size = thing.at(2 * pair)
            width, height = (size, size) if thing.kind == "shape" else (thing.width, thing.height)
            over_x = np.minimum(edges + CELL, x + width / 2) - np.maximum(edges, x - width / 2)
            over_y = np.minimum(edges + CELL, y + height / 2) - np.maximum(edges, y - height / 2)
            area = np.clip(over_y, 0, None)[:, None] * np.clip(over_x, 0, None)
            grid = (area >= 0.25 * CELL**2) | (area == area.max())
            out["what"][pair][(area > 0) & ~grid] = -100
            told = {"colour": list(COLOURS).index(thing.colour)}
            if thing.kind == "shape":
                told["what"] = WHAT.index(thing.value)
                if frames > 1:
                    told["motion"] = MOTIONS.index(thing.motion)
                    told["count"] = len(scene.things) - 1
                elif len(scene.things) == 2:
                    (other,) = (t for t in scene.things if t is not thing)
                    told["relation"] = RELATIONS.index(relation(thing, other))
            else:
                told["what"] = WHAT.index("number" if thing.kind == "number" else thing.value)
                for i in range(4):
                    known = CHARACTERS.find(thing.value.upper()[i : i + 1] or "?")
                    told[f"character{i}"] = known + 1
            for head, value in told.items():
                out[head][pair][grid] = value
    return {head: value.reshape(-1) for head, value in out.items()}


def fresh(make: Maker, rng: np.random.Generator, held_out: frozenset) -> Scene:
    """One training scene that no test row shows."""
    while (scene := make(rng)).key in held_out:
        pass
    return scene


def _human_answers(rng: np.random.Generator, answer: str) -> list[str]:
    """Ten answers as people give them: most agree, up to three slip or word it differently."""
    slips = [answer[:-1], answer[0] + answer, f"the {answer} one", "unanswerable"]
    if answer in COLOURS:
        slips = [f"dark {answer}", f"light {answer}", answer[:-1], "unanswerable"]
    elif answer.isdigit():
        slips = [answer[::-1], f"number {answer}", answer[0], "unanswerable"]
    given = [answer, answer.capitalize(), answer, answer.upper(), answer]
    answers = [given[rng.integers(len(given))] for _ in range(10)]
    for i in rng.permutation(10)[: rng.integers(0, 4)]:
        answers[i] = slips[rng.integers(len(slips))]
    return answers


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


_TEST = {"text_vqa": (101, sign_scene), "coco_caption": (102, pair_scene),
         "msvd_qa": (103, clip_scene)}  # fmt: skip


@lru_cache(maxsize=1)
def test_scenes() -> dict[str, list[Scene]]:
    """The scenes behind the test rows, all different, by benchmark."""
    found = {}
    for name, (seed, make) in _TEST.items():
        rng, kept = np.random.default_rng(seed), {}
        while len(kept) < TEST_ROWS:
            scene = make(rng)
            kept.setdefault(scene.key, scene)
        found[name] = list(kept.values())
    return found


def held_out() -> frozenset:
    """Keys of all test scenes."""
    return frozenset(scene.key for each in test_scenes().values() for scene in each)


def _text_vqa_rows() -> list[dict]:
    rng, rows = np.random.default_rng(201), []
    for i, scene in enumerate(test_scenes()["text_vqa"]):
        question = sign_questions(scene, rng)[0]
        path = f"scene_{i:04d}.png"
        rows.append({
            "image_id": f"scene_{i:04d}",
            "question_id": i,
            "question": question.text,
            "question_tokens": question.text.lower().rstrip("?").split(),
            "image": {"bytes": _png(render(scene)[0]), "path": path},
            "image_width": SIDE,
            "image_height": SIDE,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": _human_answers(rng, question.answer),
            "image_classes": [t.value for t in scene.things if t.kind == "shape"],
            "set_name": "val",
            "ocr_tokens": [t.value.upper() for t in scene.things if t.kind != "shape"],
        })  # fmt: skip
    return rows


def _coco_caption_rows() -> list[dict]:
    rows = []
    for i, scene in enumerate(test_scenes()["coco_caption"]):
        name, texts = f"pair_{i:04d}.png", captions(scene)
        rows.append({
            "question_id": f"pair_{i:04d}",
            "image": {"bytes": _png(render(scene)[0]), "path": name},
            "question": "Please carefully observe the image and come up with a caption for it.",
            "answer": texts,
            "id": i,
            "license": 0,
            "file_name": name,
            "coco_url": "",
            "filename": name,
            "sentences": texts,
        })  # fmt: skip
    return rows


def _msvd_qa_rows() -> list[dict]:
    rng, rows = np.random.default_rng(203), []
    for i, scene in enumerate(test_scenes()["msvd_qa"]):
        asked = clip_questions(scene, rng)[: 1 + i % 2]
        rows.append({
            "video_id": f"clip_{i:04d}",
            "qa": [[question.text, question.answer] for question in asked],
            "binary_frames": clip(scene).tobytes(),
            "num_frames": FRAMES,
            "height": CLIP_SIDE,
            "width": CLIP_SIDE,
            "channels": 3,
        })  # fmt: skip
    return rows


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXTS = pa.list_(pa.string())
_SCHEMAS = {
    "text_vqa": pa.schema([
        ("image_id", pa.string()), ("question_id", pa.int32()), ("question", pa.string()),
        ("question_tokens", _TEXTS), ("image", _IMAGE), ("image_width", pa.int32()),
        ("image_height", pa.int32()), ("flickr_original_url", pa.string()),
        ("flickr_300k_url", pa.string()), ("answers", _TEXTS), ("image_classes", _TEXTS),
        ("set_name", pa.string()), ("ocr_tokens", _TEXTS),
    ]),
    "coco_caption": pa.schema([
        ("question_id", pa.string()), ("image", _IMAGE), ("question", pa.string()),
        ("answer", _TEXTS), ("id", pa.int64()), ("license", pa.int8()),
        ("file_name", pa.string()), ("coco_url", pa.string()), ("filename", pa.string()),
        ("sentences", _TEXTS),
    ]),
    "msvd_qa": pa.schema([
        ("video_id", pa.string()), ("qa", pa.list_(_TEXTS)), ("binary_frames", pa.binary()),
        ("num_frames", pa.int64()), ("height", pa.int64()), ("width", pa.int64()),
        ("channels", pa.int64()),
    ]),
}  # fmt: skip
_FILES = {
    "text_vqa": ("validation-00000-of-00001.parquet", _text_vqa_rows),
    "coco_caption": ("test-00000-of-00001.parquet", _coco_caption_rows),
    "msvd_qa": ("test-00000-of-00001.parquet", _msvd_qa_rows),
}


def write(folder: str | Path) -> None:
    """Write the three benchmarks under a folder."""
    for name, (file, rows) in _FILES.items():
        path = Path(folder) / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows(), schema=_SCHEMAS[name])
        pq.write_table(table, path, compression="zstd", compression_level=12)
        print(f"{path}: {len(table)} rows, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    write(Path(__file__).parents[1] / "benchmarks")
