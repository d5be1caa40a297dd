"""The benchmarks' official scores, per row and per corpus, and bootstrap intervals.

    score("vqa_accuracy", ["Stop."], [("stop",) * 10])         # [1.0], one number per row
    corpus_score("wrr", ["a b"], [("A B C",)])                 # 1 - corpus WER
    bootstrap([0.0, 1.0, 1.0])                                 # mean, low, high

Rows' scores lie in [0, 1], so that they can enter an average over benchmarks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

Answers = Sequence[str]
References = Sequence[Sequence[str]]

VOCAL_SOUNDS = ("Laughter", "Sniff", "Throat clearing", "Cough", "Sigh", "Sneeze")

# --- VQA accuracy and exact match ----------------------------------------------------------------

# The evaluation server writes a contraction that lost one apostrophe with it again. Words that
# are words without it ("well", "shell", "ill", "were") are left alone.
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll
y'all'd've you'd've 'ow's'at
""".split()  # noqa: SIM905
_RESTORED = {
    form[:i] + form[i + 1 :]: form
    for form in _CONTRACTIONS
    for i, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the server's own slip, kept so that scores agree
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"} | {
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'


def normalise_answer(text: str) -> str:
    """The EvalAI normalisation of a short answer: case, punctuation, numbers, articles.

    A punctuation mark that touches a blank anywhere in the text is deleted throughout, any other
    becomes a blank ("t-shirt" -> "t shirt"); a full stop stays only before a digit; "'s" stands
    apart from its word.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = re.sub(r"[\n\t]", " ", text).strip()
    text = text.translate(
        {ord(m): None if f"{m} " in text or f" {m}" in text else " " for m in _PUNCTUATION}
    )
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answers: Answers, references: References) -> np.ndarray:
    """VQA accuracy per row: mean over the humans i of min(1, matches among the others / 3).

    Defined for ten human answers; a single reference has no others and scores 0.
    """
    scores = []
    for answer, humans in zip(answers, references, strict=True):
        answer = normalise_answer(answer)
        matches, n = sum(normalise_answer(human) == answer for human in humans), len(humans)
        agreeing, others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
        scores.append((matches * agreeing + (n - matches) * others) / n)
    return np.array(scores)


def exact_match(answers: Answers, references: References) -> np.ndarray:
    """1 where the normalised answer equals a normalised reference, else 0."""
    return np.array(
        [
            float(normalise_answer(answer) in {normalise_answer(r) for r in refs})
            for answer, refs in zip(answers, references, strict=True)
        ]
    )


def contains(answers: Answers, references: References) -> np.ndarray:
    """1 where a normalised reference occurs in the normalised answer as whole words, else 0."""
    hits = []
    for answer, refs in zip(answers, references, strict=True):
        padded = f" {normalise_answer(answer)} "
        wanted = [normalise_answer(r) for r in refs]
        hits.append(float(any(w and f" {w} " in padded for w in wanted)))
    return np.array(hits)


# --- captions ------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"\w+(?=n't\b)|n't\b"  # do n't
    r"|\d+(?:[.,:]\d+)+"  # 1,000  2.5  10:30
    r"|(?:\w\.){2,}|o'\w+"  # u.s.  o'clock
    r"|\w+(?:[-.&/]\w+)*"  # words, black-and-white
    r"|'(?:s|re|ve|ll|d|m)\b"  # man 's
    r"|[^\w\s.,;:?!'\"`\u2013\u2014-]"  # signs that the Penn tokeniser keeps
)


def tokenise_caption(text: str) -> str:
    """Lower-case tokens near those of the Penn Treebank tokeniser, without punctuation."""
    return " ".join(_TOKEN.findall(text.lower().replace("\u2019", "'")))


def _penn(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Captions tokenised by pycocoevalcap's Stanford tokeniser, which runs Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    listed = {i: [{"caption": c} for c in group] for i, group in enumerate(captions)}
    tokens = PTBTokenizer().tokenize(listed)
    return [tokens[i] for i in listed]


def cider_d(answers: Answers, references: References, penn: bool = False) -> np.ndarray:
    """CIDEr-D per row (n-grams to 4, sigma 6), from 0 to 10, by pycocoevalcap's scorer.

    Document frequencies come from the references given here: scores of a subset do not compare
    with those of the whole set, and one row alone scores 0. Tokens are `tokenise_caption`'s, or
    with `penn` those of the official Java tokeniser.
    """
    from pycocoevalcap.cider.cider import Cider

    groups = [[answer, *refs] for answer, refs in zip(answers, references, strict=True)]
    if not groups:
        return np.empty(0)
    if empty := [i for i, group in enumerate(groups) if len(group) < 2]:
        raise ValueError(f"rows {empty[:5]} have no reference caption, and CIDEr-D needs one")
    groups = _penn(groups) if penn else [[tokenise_caption(c) for c in g] for g in groups]
    truth = {i: group[1:] for i, group in enumerate(groups)}
    guess = {i: group[:1] for i, group in enumerate(groups)}
    return Cider(n=4, sigma=6.0).compute_score(truth, guess)[1]


# --- speech --------------------------------------------------------------------------------------


@cache
def _english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def _transcripts(answers: Answers, references: References) -> tuple[list[str], list[str]]:
    """Normalised references and answers; the first reference is the transcript."""
    normal = _english()
    pairs = list(zip(answers, references, strict=True))
    return [normal(refs[0]) for _, refs in pairs], [normal(answer) for answer, _ in pairs]


def word_recognition_rate(answers: Answers, references: References) -> np.ndarray:
    """1 - WER of each row after Whisper's English normaliser; negative with many insertions."""
    import jiwer

    truth, heard = _transcripts(answers, references)
    return np.array([1.0 - jiwer.wer(t, h) for t, h in zip(truth, heard, strict=True)])


def corpus_wrr(answers: Answers, references: References) -> float:
    """1 - corpus WER: all errors over all reference words, after Whisper's English normaliser."""
    import jiwer

    return 1.0 - jiwer.wer(*_transcripts(answers, references))


# --- classes and choices -------------------------------------------------------------------------

_SOUND = re.compile(r"\b(" + "|".join(VOCAL_SOUNDS).replace(" ", r"[\s-]*") + r")\b", re.IGNORECASE)


def find_sound(text: str) -> str | None:
    """The first VocalSound class named in a text, as it is spelt in `VOCAL_SOUNDS`."""
    found = _SOUND.search(text)
    key = re.sub(r"[\s-]", "", found[0]).lower() if found else ""
    return next((s for s in VOCAL_SOUNDS if s.replace(" ", "").lower() == key), None)


def vocal_sound_accuracy(answers: Answers, references: References) -> np.ndarray:
    """1 where the first class named in the answer is the row's class, else 0."""
    hits = []
    for answer, refs in zip(answers, references, strict=True):
        truth = find_sound(refs[0])
        if truth is None:
            raise ValueError(f"{refs[0]!r} is none of the classes {', '.join(VOCAL_SOUNDS)}")
        hits.append(float(find_sound(answer) == truth))
    return np.array(hits)


def choice_accuracy(answers: Answers, references: References) -> np.ndarray:
    """1 where the chosen letter is the reference letter, else 0."""
    return np.array(
        [float(a.strip() == refs[0].strip()) for a, refs in zip(answers, references, strict=True)]
    )


# --- the table of metrics ------------------------------------------------------------------------


def _mean(rows: Callable[[Answers, References], np.ndarray]) -> Callable[..., float]:
    return lambda answers, references: float(np.mean(rows(answers, references)))


@dataclass(frozen=True)
class Metric:
    """A score per row, the corpus figure (the rows' mean unless given), and what to call them.

    `extra` holds further per-row columns of an evaluation table.
    """

    rows: Callable[[Answers, References], np.ndarray]
    label: str
    corpus: Callable[[Answers, References], float] | None = None
    extra: Mapping[str, Callable[[Answers, References], np.ndarray]] = field(default_factory=dict)


METRICS: dict[str, Metric] = {
    "vqa_accuracy": Metric(vqa_accuracy, "VQA accuracy"),
    "cider_d": Metric(
        cider_d, "CIDEr-D (regex tokens; rows clipped at 1)", extra={"cider_d": cider_d}
    ),
    "cider_d_penn": Metric(
        lambda a, r: cider_d(a, r, penn=True),
        "CIDEr-D (Penn tokens; rows clipped at 1)",
        extra={"cider_d": lambda a, r: cider_d(a, r, penn=True)},
    ),
    "exact_match": Metric(
        exact_match,
        "exact match (no LLM judge: not comparable with judged scores)",
        extra={"contains": contains},
    ),
    "contains": Metric(contains, "reference contained (no LLM judge)"),
    "wrr": Metric(word_recognition_rate, "WRR = 1 - WER (rows clipped to 0..1)", corpus_wrr),
    "vocal_sound": Metric(vocal_sound_accuracy, "accuracy of the first class named"),
    "choice_accuracy": Metric(choice_accuracy, "accuracy of the most probable choice"),
}


def metric_of(name: str) -> Metric:
    """The entry of `METRICS`; ValueError names what there is."""
    if name not in METRICS:
        raise ValueError(
            f"unknown metric {name!r}; there are {', '.join(METRICS)}. "
            "Add your own with METRICS[name] = Metric(...)"
        )
    return METRICS[name]


def score(metric: str, answers: Answers, references: References) -> list[float]:
    """Each row's score, clipped to [0, 1] so that it can enter an average over benchmarks."""
    rows = metric_of(metric).rows(list(answers), list(references))
    return np.clip(rows, 0.0, 1.0).tolist()


def corpus_score(metric: str, answers: Answers, references: References) -> float:
    """The figure that is published for the whole set: unclipped CIDEr-D, 1 - corpus WER, means."""
    entry = metric_of(metric)
    return float((entry.corpus or _mean(entry.rows))(list(answers), list(references)))
