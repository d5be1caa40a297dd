"""What a benchmark is: samples, specifications and the registry."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np
from PIL.Image import Image

from minerlib.families import RowError
from minerlib.tasks import media, metrics
from minerlib.tasks.media import FRAMES, SAMPLING_RATE

SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Sample:
    """One prompt with its media and its reference answers.

    `image` is an RGB picture, `video` uint8 [frame, height, width, channel] with `times` in
    seconds [frame] if known, `audio` float32 [time], mono at `sampling_rate` Hz. `choices` are
    answers to be ranked as the next token, instead of generation. `row` is the sample's number in
    the whole split, `notice` what its medium lacks. `behind`: the medium comes after the prompt.
    """

    prompt: str
    references: tuple[str, ...]
    image: Image | None = None
    video: np.ndarray | None = None
    audio: np.ndarray | None = None
    choices: tuple[str, ...] | None = None
    benchmark: str = ""
    row: int = 0
    times: np.ndarray | None = None
    sampling_rate: int = SAMPLING_RATE
    notice: str | None = None
    behind: bool = False

    @property
    def reference(self) -> str:
        """The reference that is given most often, the first of them; a blank one where no other is
        given."""
        told = [text for text in self.references if text.strip()] or self.references
        return Counter(told).most_common(1)[0][0]


@dataclass(frozen=True)
class Repo:
    """One dataset repository of the hub: "owner/name", its split and its configuration."""

    name: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Join:
    """Rows of a second set that belong to a row: those whose `theirs` equals the row's `ours`.

    Looked up only if a column in `provides` is missing; with `many` there may be several.
    """

    hub: tuple[Repo, ...]
    ours: str
    theirs: str
    columns: tuple[str, ...]
    provides: tuple[str, ...]
    many: bool = False


@dataclass(frozen=True)
class Spec:
    """All that the loader knows of a benchmark; the pure step from a row to a `Sample`.

    hub : candidates in the order in which they are tried (owners move their sets).
    columns : what every row must have; "a|b" stands for either.
    prompt : a template, filled with the row's columns and with what `fields` returns.
    references : row -> reference answers, texts or numbers, or one.
    modality : "text", "image", "video" or "audio"; the last three are decoded from the row.
    metric : a name in `metrics.ANSWER_METRICS`.
    chance : the mean score of blind guesses.
    max_new_tokens : budget of a generated answer; 1 where `choices` are ranked instead.
    rows : samples in the published split; a different number is reported.
    options : row -> texts of which one is the answer, ranked by their mean log-probability after
        the prompt (cloze); `references` gives the text of the right one.
    fields : (row, joined rows) -> further fields for the template. For the references alone it
        gets the row without media and no joined rows.
    each : a list column of which every element is a sample of its own.
    max_seconds : longer sounds are skipped and reported.
    language : of the references; a metric made for another says so.
    lower_case : references are written in small letters, as the model at hand writes.
    """

    hub: tuple[Repo, ...]
    columns: tuple[str, ...]
    prompt: str
    references: Callable[[dict], Any]
    modality: str
    metric: str
    chance: float = 0.0
    max_new_tokens: int = 16
    rows: int | None = None
    choices: tuple[str, ...] | None = None
    options: Callable[[dict], Sequence[str]] | None = None
    fields: Callable[[dict, list[dict]], dict] | None = None
    join: Join | None = None
    each: str | None = None
    max_seconds: float | None = None
    language: str = "en"
    lower_case: bool = False

    def __post_init__(self) -> None:
        if self.modality not in ("text", *media.DECODE):
            raise ValueError(f"modality {self.modality!r}: use text, {', '.join(media.DECODE)}")
        if self.max_seconds and self.modality != "audio":
            raise ValueError(f"max_seconds={self.max_seconds} is for audio, not {self.modality}")
        metrics.metric_of(self.metric)

    def sample(
        self, row, joined=(), *, frames=FRAMES, sampling_rate=SAMPLING_RATE, benchmark="", number=0
    ) -> Sample:
        """The `Sample` of a row (for `each`: with one element of that list); raises RowError."""
        at, row = (benchmark, number), self.completed(row, joined, (benchmark, number))
        choices = tuple(self.options(dict(row))) if self.options else self.choices
        known: dict[str, Any] = {"choices": choices, "benchmark": benchmark, "row": number}
        if self.modality != "text":
            with blamed(*at, self.modality):
                value = media.medium(row, self.modality)
                known |= media.DECODE[self.modality](value, frames, sampling_rate)
        return Sample(self.asked(row, at), self.answers(row, at), **known)

    def completed(self, row: Mapping, joined: Sequence[dict], at: tuple[str, int]) -> dict:
        """A row with what `fields` adds; `at` names benchmark and row in a RowError."""
        with blamed(*at, "fields"):
            return {**row, **(self.fields(dict(row), list(joined)) if self.fields else {})}

    def asked(self, row: Mapping[str, Any], at: tuple[str, int]) -> str:
        """The prompt of a completed row."""
        with blamed(*at, "prompt"):
            for _, named, *_ in Formatter().parse(self.prompt):
                column = (named or "").partition(".")[0].partition("[")[0]
                if named is not None and row.get(column) is None:
                    what = "empty in this row" if column in row else f"not in {sorted(row)}"
                    raise ValueError(f"names {column!r}, which is {what}")
            return self.prompt.format_map(row)

    def answers(self, row: dict, at: tuple[str, int]) -> tuple[str, ...]:
        """The references of a completed row as texts, never none and never all blank."""
        with blamed(*at, "references"):
            given = self.references(row)
            several = isinstance(given, list | tuple | np.ndarray)
            answers = tuple(map(_text, given if several else (given,)))
            if not any(answer.strip() for answer in answers):
                raise ValueError(f"{answers} is blank" if answers else "an empty list")
            answers = tuple(map(str.lower, answers)) if self.lower_case else answers
            if self.choices and not set(answers) & set(self.choices):
                raise ValueError(f"{answers} is none of the choices {self.choices}")
            if check := metrics.metric_of(self.metric).check:
                check(answers)
            return answers


@contextmanager
def blamed(benchmark: str, row: int, field: str) -> Iterator[None]:
    """Whatever goes wrong inside is a RowError of this benchmark, row and field."""
    try:
        yield
    except Exception as error:
        cause = str(error) if type(error) is ValueError else error
        raise RowError(benchmark, row, field, cause) from error


def _text(value: Any) -> str:
    """A reference as text; numbers as one writes them, without the ".0" of a whole one."""
    if isinstance(value, str):
        return value
    number = isinstance(value, int | float | np.integer | np.floating) and np.isfinite(value)
    if number and not isinstance(value, bool):
        return str(int(value)) if value == int(value) else str(value)
    raise ValueError(f"{value!r} ({type(value).__name__}) is no text; let `references` return text")


_LETTERS = dict(enumerate("ABCD"))  # unlike a text, it has no letter for -1


def mmlu_item(row: Mapping[str, Any], answered: bool = False) -> str:
    """One MMLU question with its four lettered options, ending in "Answer:" (and the letter)."""
    options = [f"{x}. {choice}\n" for x, choice in zip("ABCD", row["choices"], strict=True)]
    answer = f" {_LETTERS[row['answer']]}\n\n" if answered else ""
    return f"{row['question']}\n{''.join(options)}Answer:{answer}"


def _mmlu_fields(row: dict, dev: list[dict]) -> dict:
    shots = "".join(mmlu_item(shot, answered=True) for shot in dev[:5])
    return {"topic": row["subject"].replace("_", " "), "shots": shots, "item": mmlu_item(row)}


# --- the registry: one entry per benchmark -------------------------------------------------------

_OWNERS = ("lmms-lab-encoder", "lmms-lab")  # of the same sets, now and until July 2026

REGISTRY: dict[str, Spec] = {
    "text_vqa": Spec(
        hub=tuple(Repo(f"{owner}/textvqa", "validation") for owner in _OWNERS),
        columns=("image", "question", "answers"),
        prompt=SHORT_ANSWER,
        references=lambda row: row["answers"],
        modality="image", metric="vqa_accuracy", rows=5000,
    ),
    "coco_caption": Spec(
        hub=(Repo("yerevann/coco-karpathy", "test"),),
        columns=("filename", "sentences|answer"),
        prompt="Describe the image in one sentence.",
        references=lambda row: row["sentences"] if "sentences" in row else row["answer"],
        modality="image", metric="cider_d", max_new_tokens=48, rows=5000,
        fields=lambda row, joined: {"image": joined[0]["image"]} if joined else {},
        # The Karpathy test rows name their pictures; the pictures are in the COCO 2014 val set.
        join=Join(
            hub=tuple(Repo(f"{owner}/COCO-Caption", "val") for owner in _OWNERS),
            ours="filename", theirs="file_name",
            columns=("image", "file_name"), provides=("image",),
        ),
    ),
    "mmlu": Spec(
        hub=(Repo("cais/mmlu", "test", "all"),),
        columns=("question", "subject", "choices", "answer"),
        prompt="The following are multiple choice questions (with answers) about {topic}.\n\n"
        "{shots}{item}",
        references=lambda row: _LETTERS[row["answer"]],
        modality="text", metric="choice_accuracy", chance=1 / 4, max_new_tokens=1, rows=14042,
        choices=("A", "B", "C", "D"),
        fields=_mmlu_fields,
        join=Join(  # many: five of them are shown
            hub=(Repo("cais/mmlu", "dev", "all"),),
            ours="subject", theirs="subject", many=True,
            columns=("question", "subject", "choices", "answer"), provides=("shots",),
        ),
    ),
    # Everyday facts that a small language model partly knows; shipped, in MMLU's schema.
    "common_knowledge": Spec(
        hub=(),
        columns=("question", "subject", "choices", "answer"),
        prompt="{question}",
        references=lambda row: row["choices"][row["answer"]],
        modality="text",
        metric="choice_accuracy",
        chance=1 / 4,
        max_new_tokens=1,
        rows=544,
        options=lambda row: row["choices"],
    ),
    "msvd_qa": Spec(
        hub=(Repo("morpheushoc/msvd-qa", "test"),),
        columns=("qa", "binary_frames", "num_frames", "height", "width", "channels"),
        prompt=SHORT_ANSWER,
        references=lambda row: row["answer"],
        modality="video", metric="exact_match", rows=13157,
        fields=lambda row, _: {"question": row["qa"][0], "answer": row["qa"][1]},
        each="qa",
    ),
    "libri": Spec(
        hub=(Repo("openslr/librispeech_asr", "test", "clean"),),
        columns=("audio", "text"),
        prompt="Recognize the speech and output only the transcript.",
        references=lambda row: row["text"],
        modality="audio", metric="wrr", max_new_tokens=128, rows=2620,
        max_seconds=30.0,  # Qwen2-Audio's encoder hears 30 s and drops the rest without a word
    ),
    "vocal_sound": Spec(
        hub=(
            *(Repo(f"{owner}/vocalsound", "test") for owner in ("lmms-lab-audio", "lmms-lab")),
            Repo("flozi00/VocalSound_audio_16k", "train"),
        ),
        columns=("audio", "answer"),
        prompt="Which vocal sound is this: Laughter, Sniff, Throat clearing, Cough, Sigh or "
        "Sneeze? Answer with one name.",
        references=lambda row: row["answer"],
        modality="audio", metric="vocal_sound", chance=1 / 6,
    ),
}  # fmt: skip
