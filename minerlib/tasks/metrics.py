"""The benchmarks' official scores, per row and per corpus.

row_scores("vqa_accuracy", ["Stop."], [("stop",) * 10])    # [1.0], one number per row
corpus_score("wrr", ["a b"], [("A B C",)])                 # 1 - corpus WER

All texts are compared in Unicode's NFC. Where normalising leaves nothing of a reference it is
compared as it is written, or "An!" would be a right answer to "A".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from itertools import chain

import jiwer
import numpy as np
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs
from whisper_normalizer.english import EnglishTextNormalizer

from minerlib.artifacts import computation

Answers = Sequence[str]
References = Sequence[Sequence[str]]
Rows = Callable[[Answers, References], np.ndarray]

VOCAL_SOUNDS = ("Laughter", "Sniff", "Throat clearing", "Cough", "Sigh", "Sneeze")


def _pairs(answers: Answers, references: References) -> list[tuple[str, list[str]]]:
    """Each answer beside its references, in one Unicode form: what every metric compares."""
    form = partial(unicodedata.normalize, "NFC")
    return [(form(a), [*map(form, refs)]) for a, refs in zip(answers, references, strict=True)]


def _per_row(score: Callable[[str, Sequence[str]], float]) -> Rows:
    """The metric that scores each row so, float [row]."""

    @computation(version=1)
    @wraps(score)
    def rows(answers: Answers, references: References) -> np.ndarray:
        return np.array([float(score(*pair)) for pair in _pairs(answers, references)])

    return rows


def _bare(text: str) -> str:
    """What stands for a text of which normalising leaves nothing."""
    text = text.casefold().strip()
    return re.sub(r"[^\w\s]|_", "", text).strip() or text


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
_DIGITS = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_DIGITS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'


def normalise_answer(text: str) -> str:
    """The EvalAI normalisation of a short answer: case, punctuation, numbers, articles.

    A mark that touches a blank anywhere in the text is deleted throughout, any other becomes a
    blank ("t-shirt" -> "t shirt"); a full stop stays only before a digit; "'s" stands apart.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = re.sub(r"[\n\t]", " ", text).strip()
    loose = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    text = text.translate({ord(m): None if m in loose else " " for m in _PUNCTUATION})
    words = (_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _compared(text: str) -> str:
    return normalise_answer(text) or _bare(text)


@_per_row
def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Mean over the humans i of min(1, matches among the others / 3).

    Where there are fewer than three others all of them must agree, and a single human is right.
    """
    given, n = _compared(answer), len(humans)
    matches = sum(_compared(human) == given for human in humans)
    if n == 1:
        return float(matches)
    enough = min(3, n - 1)
    agreeing, others = min(1.0, (matches - 1) / enough), min(1.0, matches / enough)
    return (matches * agreeing + (n - matches) * others) / n


@_per_row
def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the normalised answer equals a normalised reference, else 0."""
    return _compared(answer) in map(_compared, references)


@_per_row
def contains(answer: str, references: Sequence[str]) -> float:
    """1 where a normalised reference occurs in the normalised answer as whole words, else 0."""
    padded = f" {_compared(answer)} "
    return any(words and f" {words} " in padded for words in map(_compared, references))


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


def _tokens(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[tokenise_caption(caption) for caption in group] for group in groups]


def _penn(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Captions tokenised by pycocoevalcap's Stanford tokeniser, which runs Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    listed = {i: [{"caption": caption} for caption in group] for i, group in enumerate(groups)}
    tokens = PTBTokenizer().tokenize(listed)
    return [tokens[i] for i in listed]


@computation(version=1)
def cider_d(
    answers: Answers, references: References, whole: References = (), tokens: Callable = _tokens
) -> np.ndarray:
    """CIDEr-D per row (n-grams to 4, sigma 6), from 0 to 10, by pycocoevalcap's scorer.

    Document frequencies are those of `whole`, the references of all rows of a file, so that a row's
    score does not depend on which rows stand beside it; without it those of the references given,
    where one row alone scores 0. Tokens are `tokenise_caption`'s.
    """
    groups = [(answer, *refs) for answer, refs in _pairs(answers, references)]
    if empty := [i for i, group in enumerate(groups) if len(group) < 2]:
        raise ValueError(f"rows {empty[:5]} have no reference caption, and CIDEr-D needs one")
    others = Counter(tuple(refs) for _, refs in _pairs([""] * len(whole), whole))
    rest = (others - Counter(group[1:] for group in groups)).elements()
    scorer = CiderScorer(n=4, sigma=6.0)
    for caption, *truth in tokens(groups):
        scorer += (caption, truth)
    # Frequencies count all references; scores are of the rows that have an answer, the first.
    scorer.crefs += map(cook_refs, tokens([*map(list, rest)]))
    scorer.compute_doc_freq()
    return np.array(scorer.compute_cider(), float)


@computation(version=1)
def cider_d_penn(answers: Answers, references: References, whole: References = ()) -> np.ndarray:
    """As `cider_d`, with the tokens of the official tokeniser, which runs Java."""
    return cider_d(answers, references, whole, _penn)


_english = cache(EnglishTextNormalizer)


def _transcripts(answer: str, references: Sequence[str]) -> tuple[str, str]:
    """The first reference, which is the transcript, and the answer, normalised."""
    form = _english() if _english()(references[0]).strip() else _bare
    return form(references[0]), form(answer)


@_per_row
def word_recognition_rate(answer: str, references: Sequence[str]) -> float:
    """1 - WER after Whisper's English normaliser; negative with many insertions."""
    return 1.0 - jiwer.wer(*_transcripts(answer, references))


@computation(version=1)
def corpus_wrr(answers: Answers, references: References) -> float:
    """1 - corpus WER: all errors over all reference words, after Whisper's English normaliser."""
    truth, heard = zip(*(_transcripts(*pair) for pair in _pairs(answers, references)), strict=True)
    return 1.0 - jiwer.wer(list(truth), list(heard))


_NAMES = "|".join(f"({name})" for name in VOCAL_SOUNDS).replace(" ", r"[\s-]*")


def find_sound(text: str) -> str | None:
    """The first VocalSound class named in a text, as it is spelt in `VOCAL_SOUNDS`."""
    found = re.search(rf"\b(?:{_NAMES})\b", text, re.IGNORECASE)
    return VOCAL_SOUNDS[found.lastindex - 1] if found and found.lastindex else None


def _class_of(references: Sequence[str]) -> str:
    if (truth := find_sound(references[0])) is None:
        raise ValueError(f"{references[0]!r} is none of the classes {', '.join(VOCAL_SOUNDS)}")
    return truth


@_per_row
def vocal_sound_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 where the first class named in the answer is the row's class, else 0."""
    return find_sound(answer) == _class_of(references)


@_per_row
def choice_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 where the chosen letter is a reference letter, else 0."""
    return answer.strip() in map(str.strip, references)


@dataclass(frozen=True)
class Metric:
    """A score per row, the corpus figure (the rows' mean unless given), and what to call them.

    `extra` holds further per-row columns of an evaluation table; `language` is the only one that
    the metric fits, if any; `clip` says that rows may lie outside [0, 1] and are cut there;
    `check` raises ValueError on references of a row that the metric cannot score.
    """

    rows: Callable[..., np.ndarray]
    label: str
    corpus: Callable[[Answers, References], float] | None = None
    extra: Mapping[str, Callable[..., np.ndarray]] = field(default_factory=dict)
    published: str = ""
    whole: bool = False
    largest: float = 1.0
    language: str | None = None
    clip: bool = False
    check: Callable[[Sequence[str]], object] | None = None

    @property
    def functions(self) -> list[Callable]:
        """All that computes numbers: what the metric's identity in a key is made of."""
        return [f for f in (self.rows, self.corpus, *self.extra.values()) if f]


_english_only = partial(Metric, language="en")
_captions = partial(_english_only, published="cider_d", whole=True, largest=10.0)

ANSWER_METRICS: dict[str, Metric] = {
    "vqa_accuracy": _english_only(vqa_accuracy, "VQA accuracy"),
    "cider_d": _captions(cider_d, "CIDEr-D / 10 (regex tokens)", extra={"cider_d": cider_d}),
    "cider_d_penn": _captions(cider_d_penn, "CIDEr-D / 10 (Penn tokens)",
                              extra={"cider_d": cider_d_penn}),
    "exact_match": _english_only(
        exact_match, "exact match (no LLM judge: not comparable with judged scores)",
        extra={"contains": contains},
    ),
    "contains": _english_only(contains, "reference contained (no LLM judge)"),
    "wrr": _english_only(word_recognition_rate, "WRR = 1 - WER (rows clipped to 0..1)",
                         corpus_wrr, clip=True),
    "vocal_sound": _english_only(vocal_sound_accuracy, "accuracy of the first class named",
                                 check=_class_of),
    "choice_accuracy": Metric(choice_accuracy, "accuracy of the most probable choice"),
}  # fmt: skip
_SHIPPED = tuple(ANSWER_METRICS.values())


def is_shipped(metric: Metric) -> bool:
    """Whether it is one of minerlib's own, whose functions' versions say all of it."""
    return metric in _SHIPPED


def metric_of(name: str) -> Metric:
    """The entry of `ANSWER_METRICS`; ValueError names what there is."""
    if name not in ANSWER_METRICS:
        known = f"there are {', '.join(ANSWER_METRICS)}"
        way_out = "Add your own with ANSWER_METRICS[name] = Metric(...)"
        raise ValueError(f"unknown metric {name!r}; {known}. {way_out}")
    if not isinstance(found := ANSWER_METRICS[name], Metric):
        what = f"ANSWER_METRICS[{name!r}] is a {type(found).__name__}"
        raise ValueError(f"{what}; wrap it in Metric(rows=..., label=...)")
    return found


def misfit(metric: str, references: References, language: str = "en") -> str:
    """Why a metric made for one language does not fit these references; empty if it does."""
    fits, why = metric_of(metric).language, f"language={language!r}"
    if language == fits:
        letters = Counter(filter(str.isalpha, chain(*chain(*references))))
        latin = sum(n for c, n in letters.items() if "LATIN" in unicodedata.name(c, ""))
        why = "most letters here are not Latin" if 2 * latin < letters.total() else ""
    told = f"metric {metric!r} is made for {fits!r}, but {why}: its scores may mislead"
    return told if fits and why else ""


def _values(
    metric: str, answers: Answers, references: References, whole: References, rows: Callable
) -> np.ndarray:
    """Unclipped scores of each row, or a corpus figure; ValueError names what is wrong."""
    pairs, entry = _pairs(answers, references), metric_of(metric)
    more = {"whole": whole} if entry.whole else {}
    given = [answer for answer, _ in pairs], [refs for _, refs in pairs]
    values = np.asarray(rows(*given, **more), dtype=float)
    if rows is not entry.corpus and values.shape != (len(pairs),):
        raise ValueError(f"metric {metric!r} gives {values.shape} scores for {len(pairs)} rows")
    for row in np.flatnonzero(~np.isfinite(values)):
        place = f"row {row}: {pairs[row]}" if values.ndim else "all rows"
        raise ValueError(f"metric {metric!r} gives {values.flat[row]} for {place}")
    return values


def columns(
    metric: str, answers: Answers, references: References, whole: References = ()
) -> dict[str, list[float]]:
    """Each row's score in [0, 1], as "score", and the metric's further columns.

    `whole` are the references of all rows of the file; a metric whose scores hang on them takes
    those given here where it is empty.
    """
    entry, told = metric_of(metric), partial(_values, metric, answers, references, whole)
    raw = told(entry.rows)
    values = raw / entry.largest
    if not entry.clip and (far := np.abs(values - 0.5) > 0.5 + 1e-9).any():
        raise ValueError(
            f"metric {metric!r} gives {values[far][0]:g} for row {np.argmax(far)}; scores lie in "
            "[0, 1]: divide by the largest, or have them cut by Metric(..., clip=True)"
        )
    extra = {name: (raw if rows is entry.rows else told(rows)).tolist()
             for name, rows in entry.extra.items()}  # fmt: skip
    return {"score": np.clip(values, 0.0, 1.0).tolist()} | extra


def row_scores(metric: str, answers: Answers, references: References, whole=()) -> list[float]:
    """Each row's score in [0, 1], so that it can enter an average over benchmarks."""
    return columns(metric, answers, references, whole)["score"]


def corpus_score(metric: str, answers: Answers, references: References, whole=()) -> float:
    """The figure that is published for the whole set: CIDEr-D, 1 - corpus WER, else the mean."""
    if not len(answers):
        raise ValueError(f"metric {metric!r}: no answers, so no figure")
    entry = metric_of(metric)
    return float(_values(metric, answers, references, whole, entry.corpus or entry.rows).mean())
