"""Finding I's tables, with a made model whose answers follow from which neurons are silenced."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import xarray as xr

from minerlib import inference
from minerlib.findings import silencing
from minerlib.inference import FAILS, HOLDS, UNKNOWN

LAYERS, NEURONS, ROWS = 4, 50, 20
CRITICAL = np.zeros((LAYERS, NEURONS), bool)
CRITICAL[1, :10] = True  # what the answers need


def neurons(mask, modality: str = "text") -> xr.DataArray:
    dims = ("modality", "layer", "neuron")
    return xr.DataArray(mask[None], {"modality": [modality], "layer": range(LAYERS)}, dims)


def answers(silenced=None, mode="zero", constants=None) -> pd.DataFrame:
    """A picture row fails for each critical neuron silenced; text rows are always right."""
    lost = 0 if silenced is None else int((silenced.any("modality").values & CRITICAL).sum())
    lost = {"zero": lost, "mean": lost // 2, "min": 2 * lost}[mode]
    table = pd.DataFrame({"benchmark": np.repeat(["pictures", "questions"], ROWS), "score": 1.0})
    table["row"] = np.tile(np.arange(ROWS), 2)
    table.loc[: lost - 1, "score"] = 0.0
    return table.assign(answer="", references=[("x",)] * len(table))


HARMLESS = np.zeros_like(CRITICAL)
HARMLESS[3, :10] = True
PICKED = {"harmless": neurons(HARMLESS), "critical": neurons(CRITICAL)}


def test_the_average_is_over_benchmarks():
    found = silencing.average(answers(PICKED["critical"]))
    assert found["mean"] == 0.75
    rows = {"pictures": np.repeat([0.0, 1.0], 10), "questions": np.ones(20)}
    assert [*found.values()] == pytest.approx(inference.estimate(rows)[:3])
    one = answers(PICKED["critical"]).query("benchmark == 'pictures'")
    assert silencing.average(one)["mean"] == 0.5


def test_conditions_count_each_neuron_once():
    twice = xr.concat([neurons(CRITICAL, "a"), neurons(CRITICAL, "b")], "modality")
    picked = {"twice": twice, "harmless": PICKED["harmless"]}
    line, other = silencing.conditions(answers, picked, "name").to_dict("records")
    assert (line["name"], line["neurons"], line["share"], line["mean"]) == ("twice", 10, 0.05, 0.75)
    assert line["low"] < 0.75 < line["high"]
    assert (other["name"], other["neurons"], other["mean"]) == ("harmless", 10, 1.0)


# --- more than random neurons --------------------------------------------------------------------


def made(media=None, **scores) -> pd.DataFrame:
    """Answers with these scores by benchmark; media: what each row of every benchmark is about."""
    parts = [
        pd.DataFrame({"benchmark": name, "row": range(len(v)), "score": np.array(v, float)}).assign(
            medium=np.arange(len(v)) if media is None else media
        )
        for name, v in scores.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(prompt="?", answer="x", references=[("x",)] * len(table))


def right(count: int, of: int) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


# mmlu: one in four answers is a lucky guess; libri: none
BEFORE = made(mmlu=right(6, 8), libri=[0.9, 0.8, 0.7, 0.6])
AFTER = made(mmlu=right(2, 8), libri=[0.1, 0.2, 0.0, 0.3])
DRAWN = [
    made(mmlu=right(5, 8), libri=[0.9, 0.6, 0.7, 0.6]),
    made(mmlu=right(6, 8), libri=[0.5, 0.7, 0.5, 0.7]),
]
# The draws' means are 11/16 and 0.65, those after are 1/4 and 0.15.
LOST = ((11 / 16 - 1 / 4) + (0.65 - 0.15)) / 2
ABOVE = ((3 / 4 - 1 / 4) + 3 / 4) / 2


def test_what_is_lost_beyond_draws_by_hand():
    found = silencing.beyond_draws(BEFORE, AFTER, DRAWN)
    assert (LOST, ABOVE) == (0.46875, 0.625) and found.mean == pytest.approx(0.75)
    free = {"mmlu": "a", "libri": "b"}  # no such benchmarks: there is no chance in them
    unlucky = [t.replace({"benchmark": free}) for t in (BEFORE, AFTER, *DRAWN)]
    assert silencing.beyond_draws(*unlucky[:2], unlucky[2:]).mean == pytest.approx(LOST / 0.75)
    alone = [t.query("benchmark == 'mmlu'") for t in (BEFORE, AFTER, *DRAWN)]
    assert silencing.beyond_draws(*alone[:2], alone[2:]).mean == pytest.approx((7 / 16) / (1 / 2))
    none = silencing.beyond_draws(BEFORE, DRAWN[0], [DRAWN[0]])
    assert none.mean == 0 and none.low < 0 < none.high
    gain = silencing.beyond_draws(BEFORE, BEFORE, [AFTER])
    assert gain.mean < -0.5


@pytest.mark.fault("another chance than the table's")
def test_of_choices_the_table_says_what_guesses_score():
    free = {"mmlu": "a", "libri": "b"}
    tables = [t.replace({"benchmark": free}).assign(chance=0.25) for t in (BEFORE, AFTER, *DRAWN)]
    found = silencing.beyond_draws(*tables[:2], tables[2:])
    assert found.mean == pytest.approx(LOST / (0.75 - 0.25))


@pytest.mark.fault("an interval ends at its own estimate")
def test_more_than_what_is_above_chance_can_be_lost():
    """Of four choices none right, where guesses would be: the interval is open above it."""
    was, after = made(mmlu=right(16, 20)), made(mmlu=right(0, 20))
    found = silencing.beyond_draws(was, after, [was])
    assert found.mean == pytest.approx(0.8 / 0.55) and found.high > found.mean + 0.05


def test_the_order_of_rows_does_not_matter():
    shuffled = [t.sample(frac=1, random_state=i) for i, t in enumerate((BEFORE, AFTER, *DRAWN))]
    expected = silencing.beyond_draws(BEFORE, AFTER, DRAWN)
    for first, *rest in (shuffled, [BEFORE, *shuffled[1:]], [shuffled[0], AFTER, *DRAWN]):
        assert silencing.beyond_draws(first, rest[0], rest[1:]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="only 11 rows are in both"):
        silencing.beyond_draws(BEFORE, AFTER, [DRAWN[0], DRAWN[1].iloc[1:]])
    with pytest.raises(ValueError, match="mmlu row 0: its prompt differs"):
        silencing.beyond_draws(BEFORE, AFTER.assign(prompt="!"), DRAWN)


@pytest.fixture(scope="module")
def many() -> tuple:
    """300 rows a benchmark, of which rows lose more the better the model was on them."""
    rng = np.random.default_rng(0)
    was = {"mmlu": rng.random(300) < 0.6, "libri": rng.beta(1, 1, 300)}
    gone = {name: rng.random(300) < 0.8 for name in was}
    after = {name: np.where(gone[name], rng.random(300) < 0.2, was[name]) for name in was}
    drawn = {name: np.where(rng.random(300) < 0.1, 0, was[name]) for name in was}
    return was, after, drawn


def test_its_error_is_that_of_a_ratio(many):
    """As wide as the ratio is spread over resampled rows; one draw has no spread of its own."""
    was, after, drawn = many
    found = silencing.beyond_draws(made(**was), made(**after), [made(**drawn)])
    rng, chance = np.random.default_rng(1), {"mmlu": 1 / 4, "libri": 0}
    lost, above = np.zeros(4000), np.zeros(4000)
    for name in was:
        counts = rng.multinomial(300, np.full(300, 1 / 300), 4000) / 300
        lost += counts @ (drawn[name] - after[name])
        above += counts @ (was[name] - chance[name])
    assert found.mean == pytest.approx((lost / above).mean(), abs=0.003)
    assert found.error == pytest.approx((lost / above).std(), rel=0.05)
    naive = lost.std() / above.mean()
    assert abs(found.error - naive) > 0.1 * naive  # which a loss over a fixed number would have
    half = scipy.stats.t(600).ppf(0.975) * found.error
    assert found.high - found.low == pytest.approx(2 * half, rel=0.02)
    assert found.high90 - found.low90 == pytest.approx(2 * half * 1.645 / 1.96, rel=0.02)


def test_the_spread_of_draws_is_added():
    """Two draws beside one that is their average: the variance of their mean, over the same."""
    two = silencing.beyond_draws(BEFORE, AFTER, DRAWN)
    averaged = DRAWN[0].assign(score=(DRAWN[0]["score"] + DRAWN[1]["score"]) / 2)
    one = silencing.beyond_draws(BEFORE, AFTER, [averaged])
    means = [(5 / 8 + 0.7) / 2, (6 / 8 + 0.6) / 2]
    assert two.mean == pytest.approx(one.mean)
    assert two.error**2 - one.error**2 == pytest.approx(np.var(means, ddof=1) / 2 / ABOVE**2)
    # Draws further apart, with the same average.
    apart = [averaged.assign(score=averaged["score"] + move) for move in (-0.2, 0.2)]
    assert silencing.beyond_draws(BEFORE, AFTER, apart).error > 1.3 * two.error


def test_rows_about_one_medium_widen_the_interval(many):
    was, after, drawn = ({k: np.repeat(v[:100], 5) for k, v in s.items()} for s in many)
    once = {name: [s[name][:100] for s in many] for name in was}
    media = np.repeat(np.arange(100), 5)
    tables = [made(media, **s) for s in (was, after, drawn)]
    clustered = silencing.beyond_draws(*tables[:2], tables[2:])
    single = silencing.beyond_draws(made(**was), made(**after), [made(**drawn)])
    few = silencing.beyond_draws(
        *(made(**{k: v[i] for k, v in once.items()}) for i in (0, 1)),
        [made(**{k: v[2] for k, v in once.items()})],
    )
    assert clustered.mean == pytest.approx(single.mean) == pytest.approx(few.mean)
    assert clustered.error == pytest.approx(5**0.5 * single.error, rel=0.03)
    assert clustered.error == pytest.approx(few.error, rel=0.03)
    bare = [t.drop(columns="medium") for t in (made(**was), made(**after), made(**drawn))]
    assert silencing.beyond_draws(*bare[:2], bare[2:]) == pytest.approx(single)


def test_where_nothing_can_be_lost_there_is_no_share():
    for blind in (made(mmlu=right(2, 8), libri=right(0, 4)), made(mmlu=right(1, 8))):
        found = silencing.beyond_draws(blind, blind, [blind, blind])
        assert np.isnan(found).all()
        assert inference.decide(found, 0.25, 0.01).word == UNKNOWN
    nearly = made(mmlu=right(3, 8), libri=right(0, 4))
    assert not np.isnan(silencing.beyond_draws(nearly, nearly, [nearly])).any()


# --- log-probabilities ---------------------------------------------------------------------------


def told(values: np.ndarray) -> pd.DataFrame:
    """A table of log-probabilities from values [set, row]; half the rows are of each benchmark."""
    sets, rows = values.shape
    table = pd.DataFrame({"neurons": np.repeat(np.arange(sets), rows), "logprob": values.ravel()})
    return table.assign(benchmark=np.tile(np.repeat(["a", "b"], rows // 2), sets))


def test_nats_weigh_benchmarks_alike():
    table = pd.DataFrame(
        [(1, "a", -1.0), (1, "b", -4.0), (0, "b", -6.0), (1, "a", -3.0), (0, "a", -1.0)],
        columns=["neurons", "benchmark", "logprob"],
    )
    assert silencing.nats(table).tolist() == [-3.5, -3.0]
    wide = -np.arange(24.0).reshape(12, 2)  # set 10 is behind set 9
    assert silencing.nats(told(wide)).tolist() == wide.mean(1).tolist()


def test_500_nulls_are_rejected_once_in_twenty():
    """Selections that are draws themselves: each set has an effect, each row its noise."""
    rng, p = np.random.default_rng(3), []
    for _ in range(500):
        values = rng.normal(size=(100, 1)) + rng.normal(size=(100, 4))
        selected, *null = silencing.nats(told(values))
        p.append(inference.rank_p(selected, null, "less"))
    rejected = np.mean(np.array(p) < inference.LEVEL)
    assert 0.01 < rejected <= 0.05 + 3 * (0.05 * 0.95 / 500) ** 0.5
    assert np.mean(p) == pytest.approx(0.5, abs=3 / (12 * 500) ** 0.5)


# --- the line of the claim -----------------------------------------------------------------------

COLUMNS = ["claim", "measured", "null", "p", "verdict", *inference.MEASURED]


def larger(table: pd.DataFrame, times: int = 12) -> pd.DataFrame:
    """As many copies of every row, numbered and about media of their own."""
    more = pd.concat([table] * times, ignore_index=True)
    return more.assign(row=more.groupby("benchmark").cumcount(), medium=more.index)


def spoken(selected: float, n: int = 39) -> pd.DataFrame:
    """Log-probabilities: the selected neurons', and draws from -2 to -1."""
    return told(np.repeat([[selected], *np.linspace(-2, -1, n)[:, None]], 2, axis=1))


def line_of(before=BEFORE, after=AFTER, drawn=DRAWN, selected=-3.0, name="I") -> dict:
    tables = [larger(t) for t in (before, after, *drawn)]
    return silencing.judged(name, *tables[:2], tables[2:], spoken(selected))


def test_the_line_of_the_claim():
    line, claim = line_of(), inference.claim("I")
    assert [name for name in line if name != "high90"] == COLUMNS and "high90" in line
    assert line["claim"] == claim.text and line["verdict"].word == HOLDS
    assert (line["name"], line["smallest"]) == ("I", claim.smallest)
    assert line["p"] == 1 / 40 and line["effect"] == pytest.approx(0.75)
    assert line["null"] == "0.67 (2 draws: 0.66 to 0.68)"
    tables = [larger(t) for t in (BEFORE, AFTER, *DRAWN)]
    effect = silencing.beyond_draws(*tables[:2], tables[2:])
    assert (line["low"], line["high"]) == (effect.low, effect.high)
    assert line["settles"] == inference.settles(effect, 0.25, 96)  # rows of the larger benchmark
    start, end = (inference.spread(*silencing.average(t).values()) for t in tables[:2])
    assert start.startswith("0.75 [") and end.startswith("0.20 [")
    lost = inference.spread(effect.mean, effect.low, effect.high, sign="+")
    assert line["measured"] == f"{start} to {end}; {lost} of it lost" and lost[:5] == "+0.75"
    table = inference.claims_table("I", [line])
    assert table["verdict"][0].startswith("holds") and table["p"][0] == "0.025"


def test_its_verdict_is_by_the_effect_and_by_rank(monkeypatch):
    assert line_of(selected=-1.99)["p"] == 2 / 40  # one draw is lower
    assert line_of(selected=-1.99)["verdict"].word == UNKNOWN
    assert line_of(selected=0.0)["p"] == 1 and line_of(selected=0.0)["verdict"].word == UNKNOWN
    harmless = line_of(after=DRAWN[0])
    assert harmless["p"] == 1 / 40 and harmless["verdict"].word == FAILS  # not by the effect
    blind = made(mmlu=right(2, 8), libri=right(0, 4))
    line = line_of(blind, blind, [blind, blind])
    assert line["verdict"].word == UNKNOWN and np.isnan([line["effect"], line["settles"]]).all()
    stated = inference.claim("I")
    for smallest, word in ((0.75, UNKNOWN), (0.95, FAILS)):
        monkeypatch.setattr(
            inference, "claim", lambda name, s=smallest: stated._replace(smallest=s)
        )
        assert line_of()["verdict"].word == word


# --- how answers fail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "score", "kind"),
    [
        ("a cat", 1.0, "right"),
        ("a a a a a a", 0.5, "right"),  # half the score, whatever it says
        ("", 1.0, "right"),
        ("a cat", 0.49, "wrong"),
        ("", 0.0, "empty"),
        (" \n", 0.0, "empty"),
        ("!!! ... ???", 0.0, "empty"),
        ("。。。。。。", 0.0, "empty"),
        ("dog", 0.0, "wrong"),
        ("7", 0.0, "wrong"),
        ("a a a a a", 0.0, "wrong"),  # five words
        ("a a a a a a", 0.0, "loop"),
        ("a b a b a b", 0.0, "loop"),  # a third differ
        ("a b c a b c", 0.0, "wrong"),
        ("the cat and the cat and the cat and the", 0.0, "loop"),
        ("a man is riding a horse on a beach", 0.0, "wrong"),
        ("猫猫猫猫猫猫", 0.0, "loop"),
        ("猫狗猫狗猫狗", 0.0, "loop"),
        ("猫猫猫猫猫", 0.0, "wrong"),
        ("一只猫坐在垫子上", 0.0, "wrong"),
        (" 猫狗猫狗猫狗 ", 0.0, "loop"),
    ],
)
def test_how_an_answer_fails(answer, score, kind):
    assert silencing.failure(answer, score) == kind


def test_shares_of_failures():
    table = made(a=[1.0, 0, 0, 0], b=[0.0, 0])
    table["answer"] = ["x", "y", "", "z z z z z z", "", "-"]
    found = silencing.failures({"as it is": table.assign(score=1.0), "silenced": table})
    assert tuple(found) == silencing.FAILURES and (found.sum(axis=1) == 1).all()
    assert found.index.names == ["condition", "benchmark"]
    assert [*found.index] == [(c, b) for c in ("as it is", "silenced") for b in "ab"]
    assert found.loc[("as it is", "a")].tolist() == [1, 0, 0, 0]
    assert found.loc[("silenced", "a")].tolist() == [0.25, 0.25, 0.25, 0.25]
    assert found.loc[("silenced", "b")].tolist() == [0, 0, 0, 1]


def test_examples_are_of_rows_that_were_right():
    before = made(a=[0.0, 1.0, 0.5, 1.0], b=[0.4, 0.0, 1.0])
    before["prompt"] = [f"Question {i}?\nAnswer:" for i in range(6)] + ["Once upon a time " * 9]
    before["references"] = [(f"r{i}", "other") for i in range(7)]
    before["answer"] = [f"r{i}" for i in range(7)]
    after = before.assign(answer="loop", score=0.0)
    table = silencing.examples({"as it is": before, "silenced": after})
    assert list(table) == ["benchmark", "asked", "reference", "as it is", "silenced"]
    assert table["reference"].tolist() == table["as it is"].tolist() == ["r1", "r2", "r6"]
    assert table["benchmark"].tolist() == ["a", "a", "b"]  # the first two of each
    assert table["asked"].tolist()[:2] == ["Question 1?", "Question 2?"]
    assert len(table["asked"][2]) <= 48 and table["asked"][2].startswith("Once upon")
    assert (table["silenced"] == "loop").all() and [*table.index] == [0, 1, 2]
    assert silencing.examples({"silenced": after, "as it is": before}).empty
    every = silencing.examples({"as it is": before}, each=9)
    assert every["reference"].tolist() == ["r1", "r2", "r3", "r6"]


# --- dose, constants, specificity ----------------------------------------------------------------


def test_breaking_points():
    doses = pd.DataFrame(
        [("selected", 30, 0.1), ("selected", 10, 0.4), ("selected", 3, 0.41), ("random", 10, 0.8),
         ("random", 30, 0.7)],
        columns=["what", "neurons", "mean"],
    )  # fmt: skip
    half = silencing.breaking_points(doses, 0.8)
    assert half["selected"] == 10 and np.isnan(half["random"])  # 0.4 is half of 0.8
    assert silencing.breaking_points(doses, 0.8, lost=0.1).to_dict() == {
        "selected": 3,
        "random": 30,
    }
    assert silencing.breaking_points(doses, 0.8, lost=0.6)["selected"] == 30


def test_doses_and_the_breaking_point():
    def upto(n, layer=1):
        mask = np.zeros_like(CRITICAL)
        mask[layer, :n] = True
        return neurons(mask)

    sets = {what: {n: upto(n, at) for n in (2, 4, 10)} for what, at in (("own", 1), ("other", 2))}
    doses = pd.concat(
        silencing.conditions(answers, picked, "dose").assign(what=what)
        for what, picked in sets.items()
    )
    own = doses[doses["what"] == "own"].set_index("dose")["mean"]
    assert own.to_dict() == pytest.approx({2: 0.95, 4: 0.9, 10: 0.75})
    points = silencing.breaking_points(doses, 1.0, lost=0.1)
    assert points["own"] == 4 and np.isnan(points["other"])
    assert silencing.breaking_points(doses, 1.0, lost=0.25)["own"] == 10


def test_each_constant():
    table = silencing.constants(answers, PICKED["critical"], xr.DataArray(0))
    assert dict(zip(table["constant"], table["mean"], strict=True)) == pytest.approx(
        {"zero": 0.75, "mean": 0.875, "min": 0.5}
    )


def test_specificity_crosses_modalities_and_benchmarks():
    own = {"image": neurons(CRITICAL, "image"), "text": neurons(HARMLESS, "text")}
    alone = {"selected": own, "random": dict.fromkeys(own, neurons(HARMLESS))}
    table = silencing.specificity(answers, alone)
    own = table[table["what"] == "selected"]
    matrix = own.pivot(index="silenced", columns="benchmark", values="difference")
    assert matrix.loc["image"].to_dict() == {"pictures": -0.5, "questions": 0}
    assert (matrix.loc["text"] == 0).all() and "average" not in matrix
    assert len(table) == 8 and (table["low"] <= table["difference"]).all()
    assert (table[table["what"] == "random"]["difference"] == 0).all()
    line = own.set_index(["silenced", "benchmark"]).loc[("image", "pictures")]
    expected = inference.change(np.ones(20), right(10, 20))
    assert line[["low", "high"]].tolist() == pytest.approx(expected[1:3])
    media = {"pictures": "image", "questions": "text"}
    (line,) = silencing.by_medium(table, media).to_dict("records")
    assert line == {"silenced": "image", "with": 0.5, "without": 0, "specific": 0.5}
    everywhere = silencing.by_medium(table, dict.fromkeys(media, "image"))
    assert everywhere["with"].tolist() == [0.25] and everywhere["without"].isna().all()
    assert silencing.by_medium(table, dict.fromkeys(media, "text")).empty
