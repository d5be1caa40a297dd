"""Metrics against values worked out by hand and against independent implementations.

The independent sides: a slow character-by-character VQA accuracy, CIDEr-D and edit distance
written here from their definitions, transformers' copy of Whisper's normaliser, scikit-learn's
accuracy, and the Penn tokeniser where Java is there.
"""

# ruff: noqa: SIM905  (word lists read better as text)
from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import whisper_normalizer
from conftest import ROOT
from sklearn.metrics import accuracy_score
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from minerlib import artifacts
from minerlib.tasks import ANSWER_METRICS, Metric, metrics

CASES = 400


# --- VQA accuracy --------------------------------------------------------------------------------

PARTS = """stop Stop STOP the a an A The two TWO ten none zero one t-shirt T-shirt isnt isn't dont
couldnt've couldn'tve he'd hed man's mans 1,000 1000 2.5 .5 5. 3.14 u.s.a. 10:30 $5 50% n/a N/A
yes! no? "hi" (b) [x] a_b a+b = / - ; & café naïve 東京 ß é ü\u2019s \u2014 \u00a0 what's whats
\n \t , . ... ?! 'twas twas ow's'at somebody'd yall'd've o'clock @ # `q` <b> {c} \\""".split(" ")


def slow_normal(text: str) -> str:
    """The EvalAI rules, one character at a time."""
    text = text.lower()
    text = "".join(c for c in text if c not in ",?")
    text = text.replace("'s", " 's").strip().replace("\n", " ").replace("\t", " ").strip()
    around = [(text[i - 1 : i], text[i + 1 : i + 2]) for i in range(len(text))]
    loose = {text[i] for i, sides in enumerate(around) if " " in sides}
    out = []
    for i, c in enumerate(text):
        if c in ';/[]"{}()=+\\_-><@`!':
            out.append("" if c in loose else " ")
        elif c == ".":
            # What follows is judged after the marks are gone.
            rest = "".join(
                "" if d in loose and d in ';/[]"{}()=+\\_-><@`!' else d for d in text[i + 1 :]
            )
            out.append("." if rest[:1].isdecimal() else "")
        else:
            out.append(c)
    words = []
    for word in "".join(out).split():
        if word in ("none", "zero"):
            word = "0"
        numbers = "one two three four five six seven eight nine ten".split()
        if word in numbers:
            word = str(numbers.index(word) + 1)
        if word in ("a", "an", "the"):
            continue
        pairs = {
            "isnt": "isn't", "dont": "don't", "couldnt've": "couldn't've", "mans": "mans",
            "couldn'tve": "couldn't've", "hed": "he'd", "whats": "what's", "twas": "'twas",
            "somebody'd": "somebodyd", "yall'd've": "y'all'd've",
        }  # fmt: skip
        words.append(pairs.get(word, word))
    return " ".join(words)


def slow_same(a: str, b: str) -> bool:
    """Equal as normalised; where nothing is left of both, as casefolded words, or as written."""
    if slow_normal(a) or slow_normal(b):
        return slow_normal(a) == slow_normal(b)
    a, b = a.casefold().strip(), b.casefold().strip()
    words = ["".join(c for c in t if c.isalnum() or c.isspace()).strip() for t in (a, b)]
    return words[0] == words[1] if any(words) else a == b


def slow_vqa(answer: str, humans: list[str]) -> float:
    if len(humans) == 1:
        return float(slow_same(answer, humans[0]))
    scores = []
    for i in range(len(humans)):
        others = humans[:i] + humans[i + 1 :]
        scores.append(min(1, sum(slow_same(answer, other) for other in others) / 3))
    return float(np.mean(scores))


def short_answers(seed: int, n: int) -> list[str]:
    rng = np.random.default_rng(seed)
    glue = ["", " ", " ", "  ", "-", ". "]
    return [
        "".join(p + glue[rng.integers(6)] for p in rng.choice(PARTS, rng.integers(0, 5)))
        for _ in range(n)
    ]


def test_vqa_agrees_with_slow_version():
    rng = np.random.default_rng(0)
    answers, humans = short_answers(1, CASES), []
    for i, answer in enumerate(answers):
        close = [answer, answer.upper(), f"the {answer}", f"{answer}.", *short_answers(i, 3)]
        humans.append(list(rng.choice(close, 1 if i % 20 == 0 else 10)))
    got = metrics.vqa_accuracy(answers, humans)
    np.testing.assert_allclose(got, [slow_vqa(*case) for case in zip(answers, humans, strict=True)])
    assert len(set(got.round(3))) >= 5


def test_vqa_agrees_with_the_public_implementation():
    """What lmms-eval 0.7.3 made of 500 hard cases, recorded."""
    cases = json.loads((ROOT / "tests/parity/vqa_accuracy.json").read_text())["cases"]
    answers, humans = ([case[key] for case in cases] for key in ("answer", "humans"))
    normal = [metrics.normalise_answer(answer) for answer in answers]
    assert normal == [case["normalised"] for case in cases]
    got, want = metrics.vqa_accuracy(answers, humans), np.array([case["score"] for case in cases])
    left = np.array([bool(text) for text in normal])
    np.testing.assert_allclose(got[left], want[left])
    assert len(set(got[left].round(3))) >= 5
    # There "." is a right answer to "an", since normalising leaves nothing of either.
    assert (got[~left] <= want[~left] + 1e-9).all() and (got < want - 1e-9).any()


def test_normalisation_agrees_with_slow_version():
    texts = short_answers(2, 2000)
    assert [metrics.normalise_answer(t) for t in texts] == [slow_normal(t) for t in texts]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat.", "cat"),
        ("T-shirt", "t shirt"),
        ("a - b", "b"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("No. 7", "no 7"),
        ("none", "0"),
        ("TEN", "10"),
        ("dont", "don't"),
        ("that's", "that 's"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("well", "well"),
        ("", ""),
        ("the", ""),
        ("what?!", "what"),
        ("Ω é", "ω é"),
    ],
)
def test_normalisation_by_hand(text, normal):
    assert metrics.normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_by_hand(matches, expected):
    # One match of ten: nine humans see it once (1/3 each), the tenth sees none -> 9/30.
    humans = ["stop"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert metrics.vqa_accuracy(["Stop!"], [humans])[0] == pytest.approx(expected)


def test_vqa_edges():
    assert metrics.vqa_accuracy([""], [("yes",) * 10])[0] == 0


@pytest.mark.parametrize(
    ("humans", "expected"),
    [
        ("y", 1),
        ("n", 0),
        ("yy", 1),
        ("yn", 0.5),
        ("nn", 0),
        ("yyy", 1),
        ("yyn", 2 / 3),
        ("yyyy", 1),
    ],
)
def test_vqa_of_few_humans_reaches_one(humans, expected):
    """As rows of one's own have them; of the others, so many as there are have to agree."""
    assert metrics.vqa_accuracy(["y"], [tuple(humans)])[0] == pytest.approx(expected)


def test_exact_match_and_contains():
    answers = ["A dog.", "the dog runs", "dogs", "", "two", "hot dog"]
    references = [("dog",), ("dog",), ("dog",), ("dog",), ("2",), ("hot dog", "sausage")]
    assert metrics.exact_match(answers, references).tolist() == [1, 0, 0, 0, 1, 1]
    assert metrics.contains(answers, references).tolist() == [1, 1, 0, 0, 1, 1]
    assert metrics.contains(["anything"], [("",)])[0] == 0
    rng = np.random.default_rng(3)
    texts = short_answers(4, CASES)
    refs = [(str(rng.choice(texts[:40])),) for _ in texts]
    expected = [float(slow_same(t, r[0])) for t, r in zip(texts, refs, strict=True)]
    assert metrics.exact_match(texts, refs).tolist() == expected
    assert sum(expected) > 0


# --- captions ------------------------------------------------------------------------------------


def slow_cider_d(answers: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D from its definition (Vedantam et al. 2015, section 5), with dense dictionaries."""

    def grams(text: str, n: int) -> Counter:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    images = len(answers)
    scores = np.zeros(images)
    for n in (1, 2, 3, 4):
        seen = Counter()
        for refs in references:
            seen.update(set().union(*(grams(r, n) for r in refs)))

        def vector(text: str, n: int = n, seen: Counter = seen) -> dict:
            counts = grams(text, n)
            return {g: c * math.log(images / max(1, seen[g])) for g, c in counts.items()}

        for i, (answer, refs) in enumerate(zip(answers, references, strict=True)):
            x = vector(answer)
            for ref in refs:
                y = vector(ref)
                dot = sum(min(x[g], y[g]) * y[g] for g in x.keys() & y.keys())
                norm = math.hypot(*x.values()) * math.hypot(*y.values())
                # The implementation counts a caption's length in bigrams.
                gap = max(len(answer.split()) - 1, 0) - max(len(ref.split()) - 1, 0)
                if norm:
                    scores[i] += dot / norm * math.exp(-(gap**2) / 72) / len(refs)
    return (scores / 4 * 10).tolist()


def captions(seed: int, n: int) -> tuple[list[str], list[list[str]]]:
    rng = np.random.default_rng(seed)
    words = (
        "a the red blue round square circle dog's cat isn't don't left-hand of on above 2 10.5 , . "
        "! café 東京 (big) man's 'hot' & next to"
    ).split()

    def caption() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 12)))

    references = [[caption() for _ in range(1 if i % 7 == 0 else 5)] for i in range(n)]
    answers = [
        [refs[0], caption(), "", refs[0] + " " + caption(), refs[0].upper()][i % 5]
        for i, refs in enumerate(references)
    ]
    return answers, references


def test_cider_agrees_with_definition():
    answers, references = captions(0, 250)
    got = metrics.cider_d(answers, references)
    tokens = [metrics.tokenise_caption(a) for a in answers]
    refs = [[metrics.tokenise_caption(r) for r in group] for group in references]
    np.testing.assert_allclose(got, slow_cider_d(tokens, refs), atol=1e-9)
    assert got.max() > 1 and (got[2::5] == 0).all()  # identical ones, and empty answers
    assert metrics.corpus_score("cider_d", answers, references) == pytest.approx(got.mean())
    shares = metrics.row_scores("cider_d", answers, references)
    np.testing.assert_allclose(shares, got / 10)


def test_a_captions_score_does_not_hang_on_the_rows_beside_it():
    """Document frequencies are the whole file's, which a subset is given."""
    answers, references = captions(0, 250)
    every = metrics.row_scores("cider_d", answers, references)
    for part in (slice(0, 1), slice(10, 30), slice(249, 0, -3)):
        few = answers[part], references[part]
        np.testing.assert_allclose(metrics.row_scores("cider_d", *few, references), every[part])
    assert metrics.row_scores("cider_d", *few) != pytest.approx(every[part])
    mean = metrics.corpus_score("cider_d", *few, references)
    assert mean == pytest.approx(10 * np.mean(every[part]))


def test_cider_by_hand():
    # Two images with captions of one word each: idf = log 2, cosine 1 for unigrams, and no longer
    # n-grams, so 10 * 1/4.
    got = metrics.cider_d(["cat", "cat"], [["cat"], ["dog"]])
    np.testing.assert_allclose(got, [2.5, 0.0])
    # All five references alike count once in the document frequency.
    np.testing.assert_allclose(metrics.cider_d(["cat", "cat"], [["cat"] * 5, ["dog"] * 5]), got)
    assert metrics.cider_d(["a red cat sits"], [["a red cat sits"]])[0] == 0  # one image alone
    with pytest.raises(ValueError, match="no reference caption"):
        metrics.cider_d(["x", "y"], [["x"], []])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog.", "a man 's dog"),
        ("He doesn't, can't!", "he does n't ca n't"),
        ("black-and-white; 1,000 cats", "black-and-white 1,000 cats"),
        ('They\u2019re (both) 2.5 "m"', "they 're ( both ) 2.5 m"),
        ("", ""),
        ("...", ""),
    ],
)
def test_caption_tokens_by_hand(text, tokens):
    assert metrics.tokenise_caption(text) == tokens


@pytest.mark.skipif(not shutil.which("java"), reason="the Penn tokeniser runs Java")
def test_caption_tokens_near_penn():
    rng = np.random.default_rng(0)
    words = """a the dog's man's isn't can't don't they're we've I'm he'd it'll black-and-white
    t-shirt 1,000 2.5 10:30 red, blue; green. "quoted" stop! why? two - three -- four 7th &
    skate-board café \N{EN DASH} U-turn 50's o'clock U.S. and/or $5 50% a.m.""".split()
    texts = [" ".join(rng.choice(words, 9)) for _ in range(300)]
    penn = [group[0] for group in metrics._penn([[t] for t in texts])]
    same = [
        metrics.tokenise_caption(t).split() == p.split() for t, p in zip(texts, penn, strict=True)
    ]
    assert np.mean(same) > 0.9


# --- speech --------------------------------------------------------------------------------------


def slow_errors(truth: list[str], heard: list[str]) -> int:
    """Edit distance over words."""
    costs = list(range(len(heard) + 1))
    for i, word in enumerate(truth, 1):
        last, costs[0] = costs[0], i
        for j, other in enumerate(heard, 1):
            last, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, last + (word != other))
    return costs[-1]


def test_wrr_agrees_with_transformers_normaliser_and_edit_distance():
    rng = np.random.default_rng(0)
    words = """THE MISTER Mr. colour color isn't ISN'T can't we've twenty one 21 $5 five dollars
    3rd third um uh hmm [noise] (laughs) naïve café o'clock 1,000 thousand a.m. Dr. won't gonna
    two hundred and six - — !""".split()
    truth = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(CASES)]
    heard = [
        [t.lower(), "", t + " extra words", " ".join(rng.choice(words, 4))][i % 4]
        for i, t in enumerate(truth)
    ]
    folder = Path(whisper_normalizer.__file__).parent
    normal = EnglishTextNormalizer(json.loads((folder / "normalizers/english.json").read_text()))
    pairs = [(normal(t).split(), normal(h).split()) for t, h in zip(truth, heard, strict=True)]
    errors = np.array([slow_errors(*pair) for pair in pairs])
    lengths = np.array([len(t) for t, _ in pairs])
    references = [(t,) for t in truth]
    got = metrics.word_recognition_rate(heard, references)
    spoken = lengths > 0
    np.testing.assert_allclose(got[spoken], (1 - errors / np.maximum(lengths, 1))[spoken])
    pairs = [(h, r) for h, r, s in zip(heard, references, spoken, strict=True) if s]
    corpus = metrics.corpus_wrr(*zip(*pairs, strict=True))
    assert corpus == pytest.approx(1 - errors[spoken].sum() / lengths.sum())
    assert np.min(metrics.row_scores("wrr", heard, references)) == 0.0


def test_wrr_by_hand():
    assert metrics.corpus_wrr(["hello world"], [("HELLO WORLD",)]) == 1
    rows = metrics.word_recognition_rate(["a b x d", "", "a b c"], [("A B C D",), ("E F",), ("A",)])
    np.testing.assert_allclose(rows, [0.75, 0.0, -1.0])
    # 1 + 2 + 2 errors in 7 words
    answers, references = ["a b x d", "", "a b c"], [("A B C D",), ("E F",), ("A",)]
    assert metrics.corpus_score("wrr", answers, references) == pytest.approx(1 - 5 / 7)
    assert metrics.row_scores("wrr", answers, references) == pytest.approx([0.75, 0.0, 0.0])


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Laughter", "Laughter"),
        ("it is a COUGH, not a sigh.", "Cough"),
        ("Throat-clearing", "Throat clearing"),
        ("throatclearing", "Throat clearing"),
        ("coughing", None),
        ("", None),
        ("打喷嚏 sneeze", "Sneeze"),
    ],
)
def test_find_sound(text, found):
    assert metrics.find_sound(text) == found


def test_accuracies_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    truth, guess = rng.choice(metrics.VOCAL_SOUNDS, CASES), rng.choice(metrics.VOCAL_SOUNDS, CASES)
    frames = ["{}", "The sound is {}.", "**{}**", "{} or sneeze", "\n{}!"]
    answers = [frames[i % 5].format(g.upper() if i % 2 else g) for i, g in enumerate(guess)]
    references = [(t,) for t in truth]
    assert metrics.corpus_score("vocal_sound", answers, references) == accuracy_score(truth, guess)
    truth, guess = rng.choice(list("ABCD"), CASES), rng.choice(list("ABCD"), CASES)
    got = metrics.corpus_score("choice_accuracy", list(guess), [(t,) for t in truth])
    assert got == accuracy_score(truth, guess)
    with pytest.raises(ValueError, match="'Bark' is none of the classes"):
        metrics.row_scores("vocal_sound", ["Cough"], [("Bark",)])


def test_unknown_metric_and_uneven_lengths():
    with pytest.raises(ValueError, match="unknown metric 'bleu'.*ANSWER_METRICS"):
        metrics.row_scores("bleu", [], [])
    for name in metrics.ANSWER_METRICS:
        if name != "cider_d_penn":
            with pytest.raises(ValueError):
                metrics.row_scores(name, ["a"], [])


# --- what no metric may do -----------------------------------------------------------------------

TEXTS = [name for name in ANSWER_METRICS if name not in ("vocal_sound", "cider_d_penn")]


@pytest.fixture
def own(monkeypatch):
    """Register a metric under the name "own"."""

    def register(rows, **other):
        monkeypatch.setitem(ANSWER_METRICS, "own", Metric(rows, "own", **other))

    return register


@pytest.mark.fault("normalising leaves nothing")
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("answer", "reference"),
    [("An!", "A"), ("?", "!"), ("the", "a"), (".", "the"), ("...", "?"), ("", "."), ("uh", "um")],
)
def test_a_wrong_answer_is_wrong_though_normalising_leaves_nothing(name, answer, reference):
    refs = [(reference,) * 10, ("the red dog",) * 10]
    assert metrics.row_scores(name, [answer, "blue"], refs) == [0, 0]
    if name != "cider_d":
        assert metrics.corpus_score(name, [answer], refs[:1]) <= 0


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"cider_d", "choice_accuracy"}))
@pytest.mark.parametrize(("answer", "reference"), [("A.", "a"), ("The", "the!"), ("?", "?")])
def test_a_right_answer_is_right_though_normalising_leaves_nothing(name, answer, reference):
    assert metrics.row_scores(name, [answer], [(reference,) * 10]) == [1]
    assert metrics.corpus_score(name, [answer], [(reference,) * 10]) == 1


@pytest.mark.fault("normalising leaves nothing")
@pytest.mark.parametrize(
    ("answers", "references", "wrr"),
    [
        (["yes"], [("um",)], 0.0),  # one substitution
        (["um, uh"], [("yes",)], 0.0),  # the normaliser hears nothing: one deletion, not two errors
        (["a b", "uh"], [("a b",), ("um",)], 2 / 3),
    ],
)
def test_wrr_where_whisper_normalises_all_away(answers, references, wrr):
    assert metrics.corpus_score("wrr", answers, references) == pytest.approx(wrr)


@pytest.mark.fault("Unicode forms")
@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_compared_in_one_unicode_form(name):
    composed, decomposed = "caf\u00e9 noir bleu vert", "cafe\u0301 noir bleu vert"
    assert composed != decomposed
    for answer, truth in ((composed, decomposed), (decomposed, composed)):
        refs = [(truth,) * 10, ("red dogs",) * 10]
        want = metrics.row_scores(name, [truth, "x"], refs)
        assert metrics.row_scores(name, [answer, "x"], refs) == want == [1, 0]
        function = ANSWER_METRICS[name].rows
        assert list(function([answer, "x"], refs)) == list(function([truth, "x"], refs))
        corpus = [metrics.corpus_score(name, [a, "x"], refs) for a in (answer, truth)]
        assert corpus[0] == corpus[1] > 0


@pytest.mark.fault("Unicode forms")
def test_a_users_metric_gets_one_unicode_form_too(own):
    own(lambda answers, refs: [float(a == r[0]) for a, r in zip(answers, refs, strict=True)])
    assert metrics.row_scores("own", ["e\u0301"], [("\u00e9",)]) == [1]
    assert metrics.corpus_score("own", ["\u00e9"], [("e\u0301",)]) == 1


@pytest.mark.fault("metric of wrong numbers")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], r"metric 'own' gives \(1,\) scores for 2 rows"),
        ([0.5] * 3, r"\(3,\) scores for 2 rows"),
        (0.5, r"\(\) scores for 2 rows"),
        ([[0.5, 0.5]], r"\(1, 2\) scores"),
        ([0.5, math.nan], r"'own' gives nan for row 1: \('b', \['y'\]\)"),
        ([math.inf, 0.5], "'own' gives inf for row 0"),
        ([0.5, 50], r"'own' gives 50 for row 1; .*\[0, 1\].*clip=True"),
        ([-0.5, 0.5], "'own' gives -0.5 for row 0"),
    ],
)
def test_a_metric_that_gives_no_scores_is_refused_by_name(own, values, message):
    own(lambda answers, references: values)
    with pytest.raises(ValueError, match=message):
        metrics.row_scores("own", ["a", "b"], [("x",), ("y",)])


def test_a_plain_function_is_no_metric(monkeypatch):
    monkeypatch.setitem(ANSWER_METRICS, "own", len)
    with pytest.raises(
        ValueError, match=r"\['own'\] is a builtin.*; wrap it in Metric\(rows=\.\.\."
    ):
        metrics.metric_of("own")


def test_a_metric_may_say_that_it_is_clipped(own):
    own(lambda answers, references: np.array([-2.0, 0.25, 7.0]), clip=True)
    assert metrics.row_scores("own", list("abc"), [("x",)] * 3) == [0, 0.25, 1]
    assert metrics.corpus_score("own", list("abc"), [("x",)] * 3) == pytest.approx(1.75)
    own(lambda answers, references: [1 + 1e-12], clip=False)  # rounding is no fault
    assert metrics.row_scores("own", ["a"], [("x",)]) == [1]


@pytest.mark.fault("metric of wrong numbers")
def test_a_corpus_figure_that_is_none_is_refused_by_name(own):
    own(lambda answers, references: [1.0], corpus=lambda answers, references: math.nan)
    with pytest.raises(ValueError, match="'own' gives nan for all rows"):
        metrics.corpus_score("own", ["a"], [("a",)])
    with pytest.raises(ValueError, match="'wrr': no answers"):
        metrics.corpus_score("wrr", [], [])
    assert metrics.row_scores("wrr", [], []) == []


@pytest.mark.fault("English only")
@pytest.mark.parametrize(
    ("metric", "references", "language", "message"),
    [
        ("exact_match", ["Hund"], "de", "'exact_match' is made for 'en', but language='de'"),
        ("wrr", ["привет мир, ok"], "en", "'wrr' is made for 'en', but most letters here are not"),
        ("cider_d", ["一只狗在跑"], "en", "not Latin"),
        ("vqa_accuracy", ["κόσμος"], "en", "not Latin"),
        ("vocal_sound", ["Husten"], "de", "language='de'"),
        ("contains", ["naïve café, ŁÓDŹ"], "en", ""),
        ("exact_match", ["2014", "42", "!"], "en", ""),
        ("exact_match", ["dogs", "狗"], "en", ""),
        ("choice_accuracy", ["\N{CYRILLIC CAPITAL LETTER BE}"], "ru", ""),
    ],
)
def test_a_metric_for_english_says_so(metric, references, language, message):
    found = metrics.misfit(metric, [(r,) for r in references], language)
    assert message in found and bool(found) == bool(message)


@pytest.mark.fault("stale: metric function")
def test_what_a_metric_is_known_by():
    """By names and versions of its functions, whatever their text; a user's by its file's hash."""
    for entry in ANSWER_METRICS.values():
        for function in entry.functions:
            known = f"{function.__module__}.{function.__qualname__}"
            assert artifacts.identity(function) == f"{known} {artifacts.COMPUTATIONS[known]}"
    assert ANSWER_METRICS["wrr"].functions == [metrics.word_recognition_rate, metrics.corpus_wrr]
    assert ANSWER_METRICS["exact_match"].functions == [metrics.exact_match, metrics.contains]


def test_choices_may_have_several_right_letters():
    assert metrics.choice_accuracy(["B", " B", "C"], [("A", "B")] * 3).tolist() == [1, 1, 0]
