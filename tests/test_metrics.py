"""Metrics against values worked out by hand and against independent implementations.

The independent sides: a slow character-by-character VQA accuracy, CIDEr-D and edit distance
written here from their definitions, transformers' copy of Whisper's normaliser, scikit-learn's
accuracy, SciPy's bootstrap, and the Penn tokeniser where Java is there.
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
import scipy.stats
import whisper_normalizer
from conftest import ROOT
from sklearn.metrics import accuracy_score
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from minerlib import inference
from minerlib.tasks import metrics

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


def slow_vqa(answer: str, humans: list[str]) -> float:
    answer, humans = slow_normal(answer), [slow_normal(h) for h in humans]
    scores = []
    for i in range(len(humans)):
        others = humans[:i] + humans[i + 1 :]
        scores.append(min(1, others.count(answer) / 3))
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
    got = metrics.vqa_accuracy(answers, humans)
    np.testing.assert_allclose(got, [case["score"] for case in cases])
    assert len(set(got.round(3))) >= 5


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
    assert metrics.vqa_accuracy(["yes"], [("yes",)])[0] == 0  # no other human agrees


def test_exact_match_and_contains():
    answers = ["A dog.", "the dog runs", "dogs", "", "two", "hot dog"]
    references = [("dog",), ("dog",), ("dog",), ("dog",), ("2",), ("hot dog", "sausage")]
    assert metrics.exact_match(answers, references).tolist() == [1, 0, 0, 0, 1, 1]
    assert metrics.contains(answers, references).tolist() == [1, 1, 0, 0, 1, 1]
    assert metrics.contains(["anything"], [("",)])[0] == 0
    rng = np.random.default_rng(3)
    texts = short_answers(4, CASES)
    refs = [(str(rng.choice(texts[:40])),) for _ in texts]
    expected = [
        float(slow_normal(t) == slow_normal(r[0])) for t, r in zip(texts, refs, strict=True)
    ]
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
    assert max(metrics.score("cider_d", answers, references)) == 1.0


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
    assert metrics.corpus_wrr(heard, references) == pytest.approx(1 - errors.sum() / lengths.sum())
    assert np.min(metrics.score("wrr", heard, references)) == 0.0


def test_wrr_by_hand():
    assert metrics.corpus_wrr(["hello world"], [("HELLO WORLD",)]) == 1
    rows = metrics.word_recognition_rate(["a b x d", "", "a b c"], [("A B C D",), ("E F",), ("A",)])
    np.testing.assert_allclose(rows, [0.75, 0.0, -1.0])
    # 1 + 2 + 2 errors in 7 words
    answers, references = ["a b x d", "", "a b c"], [("A B C D",), ("E F",), ("A",)]
    assert metrics.corpus_score("wrr", answers, references) == pytest.approx(1 - 5 / 7)
    assert metrics.score("wrr", answers, references) == pytest.approx([0.75, 0.0, 0.0])


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
        metrics.score("vocal_sound", ["Cough"], [("Bark",)])


def test_unknown_metric_and_uneven_lengths():
    with pytest.raises(ValueError, match="unknown metric 'bleu'.*METRICS"):
        metrics.score("bleu", [], [])
    for name in metrics.METRICS:
        if name != "cider_d_penn":
            with pytest.raises(ValueError):
                metrics.score(name, ["a"], [])


# --- intervals -----------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).beta(2, 1, 150)
    ours = inference.bootstrap(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", vectorized=True, rng=0
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert ours == inference.bootstrap(values) != inference.bootstrap(values, seed=1)


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        _, low, high = inference.bootstrap(rng.random(80) < 0.7, n=500, seed=i)
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_bootstrap_over_benchmarks_weighs_them_alike():
    mean, low, high = inference.bootstrap({"a": [1.0] * 90, "b": [0.0] * 10})
    assert (mean, low, high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one row"):
        inference.bootstrap({"a": [1.0], "b": []})


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    a = rng.random(200)
    change = inference.paired_bootstrap(a, a - 0.1)
    assert change == pytest.approx((-0.1, -0.1, -0.1))
    noisy = inference.paired_bootstrap(a, rng.random(200))
    assert noisy.low < noisy.mean < noisy.high
    with pytest.raises(ValueError, match="same rows"):
        inference.paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="same benchmarks"):
        inference.paired_bootstrap({"a": [1.0]}, {"b": [1.0]})
