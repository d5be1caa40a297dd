"""Evaluation with a fake model that answers from the prompt, and paired comparisons."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, random_mllm, random_neurons, samples_for, shared_mllm
from PIL import Image
from scipy import stats

from minerlib import inference, memory
from minerlib.deactivation import deactivate
from minerlib.model import MLLM, RowError
from minerlib.tap import hear_once
from minerlib.tasks import REGISTRY, Repo, Sample, Spec, benchmark, evaluation, metrics
from minerlib.tasks import rows as benchmarks
from minerlib.tasks.evaluation import Prepared, compare, evaluate, prepare, summarise

WORDS = ("red", "green", "blue", "a dog on a mat", "two", "ten")


class FakeMLLM:
    """Answers each prompt with what stands behind its colon, and keeps what it was asked.

    Refuses rows in `bad`, and batches of more than `most` samples.
    """

    model = SimpleNamespace(forward=lambda ids: None, base_model=None)
    gather, device = MLLM.gather, torch.device("cpu")

    def __init__(self, bad=(), most=99):
        self.batches, self.encoded, self.bad, self.most = [], 0, bad, most

    def encode(self, samples):
        for sample in samples:
            if sample.row in self.bad:
                raise RowError(sample.benchmark, sample.row, "image", ValueError("no placeholder"))
        if len(samples) > self.most:
            raise ValueError("not in one batch; use batch_size=1")
        self.encoded += len(samples)
        return {"ids": [s.prompt for s in samples]}

    def answer(self, prompt):
        return prompt.split(": ")[-1]

    def generate(self, batch, max_new_tokens):
        self.batches.append((batch["ids"], max_new_tokens))
        return [self.answer(p) for p in batch["ids"]]

    def choose(self, batch, choices):
        self.batches.append((batch["ids"], choices))
        return [choices["wxyz".index(self.answer(p))] for p in batch["ids"]]


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """Benchmarks whose answer is the end of the prompt, by name of their metric."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "echo").mkdir()
    rows = [{"pad": "x" * (7 * i % 50), "answer": WORDS[i % 6]} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "echo" / "test.parquet")

    def make(metric="exact_match", **changes):
        spec = Spec(
            hub=(Repo("me/echo", "test"),),
            columns=("pad", "answer"),
            prompt="{pad}: {answer}",
            references=lambda row: (row["answer"],) * 10,
            modality="text",
            metric=metric,
            max_new_tokens=9,
        )
        spec = dataclasses.replace(spec, **changes) if changes else spec
        monkeypatch.setitem(benchmarks.REGISTRY, "echo", spec)
        return benchmark("echo", tmp_path)

    return make


def test_one_row_per_sample_in_order(echo):
    bench, mllm = echo(), FakeMLLM()
    table = evaluate(mllm, bench[3:], batch_size=8)
    assert list(table) == [
        "benchmark", "row", "prompt", "answer", "references", "score", "contains", "medium",
    ]  # fmt: skip
    assert table["row"].tolist() == list(range(3, 40))
    assert table["prompt"].tolist() == [s.prompt for s in bench[3:]]
    assert (table["score"] == 1).all() and (table["benchmark"] == "echo").all()
    assert [len(b) for b, _ in mllm.batches] == [8, 8, 8, 8, 5]
    assert {budget for _, budget in mllm.batches} == {9}
    lengths = [len(p) for b, _ in mllm.batches for p in b]
    assert lengths == sorted(lengths)  # batches hold prompts of like length
    evaluate(mllm, bench[:1], max_new_tokens=3)
    assert mllm.batches[-1][1] == 3


def test_prepared_encodes_once(echo):
    bench, mllm = echo(), FakeMLLM()
    prepared = prepare(mllm, bench, batch_size=16)
    assert isinstance(prepared, Prepared) and prepared.benchmark is bench
    first, again = (evaluate(mllm, prepared) for _ in range(2))
    assert mllm.encoded == 40
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first, evaluate(mllm, bench, batch_size=3))


def test_prompts_are_sorted_by_an_estimate_of_their_tokens():
    """A quarter of the characters, 25 a second of sound, one for 28 x 28 pixels or two frames."""
    picture, clip = Image.new("RGB", (56, 84)), np.zeros((6, 28, 56, 3), np.uint8)
    sound = np.zeros(16_000, np.float32)
    for media, more in [
        ({}, 0),
        ({"image": picture}, 6),
        ({"video": clip}, 6),
        ({"audio": sound}, 25),
    ]:
        assert memory.length(Sample("x" * 40, ("y",), **media)) == 10 + more


def test_benchmarks_keep_their_order():
    table = pd.DataFrame({"benchmark": ["b", "a", "b"], "score": [0.1, 0.2, 0.3]})
    strata = evaluation.by_benchmark(table, "score")
    assert {k: v.tolist() for k, v in strata.items()} == {"b": [0.1, 0.3], "a": [0.2]}
    assert list(strata) == ["b", "a"]


@pytest.mark.parametrize("measure", ["score", "logprob only"])
def test_a_sound_goes_through_the_tower_once_and_changes_nothing(measure):
    mllm = shared_mllm("tiny-qwen2-audio")
    tower, calls = mllm.model.base_model.audio_tower, []
    handle = tower.conv1.register_forward_hook(lambda *seen: calls.append(len(seen[1][0])))
    rows = benchmark("libri", source=ROOT / "data/benchmarks", limit=3)
    how = {"measure": measure, "max_new_tokens": 4}
    neurons = random_neurons(mllm)
    alone = [evaluate(mllm, rows, 2, **how)]
    with deactivate(mllm, neurons):
        alone.append(evaluate(mllm, rows, 2, **how))
    calls.clear()
    prepared = prepare(mllm, rows, 2)
    kept = [evaluate(mllm, prepared, **how)]
    with deactivate(mllm, neurons):
        kept.append(evaluate(mllm, prepared, **how))
    handle.remove()
    assert calls == [2, 1] and "forward" not in vars(tower)
    for one, other in zip(alone, kept, strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert not alone[0].equals(alone[1])


def test_what_one_model_heard_is_not_anothers():
    mllm, rows = (
        shared_mllm("tiny-qwen2-audio"),
        benchmark("libri", ROOT / "data/benchmarks", limit=3),
    )
    other = random_mllm("tiny-qwen2-audio", seed=1)
    prepared = prepare(mllm, rows, 2)
    first = evaluate(mllm, prepared, measure="logprob only")
    second = evaluate(other, prepared, measure="logprob only")
    pd.testing.assert_frame_equal(second, evaluate(other, rows, 2, measure="logprob only"))
    assert not first.equals(second) and len(prepared.heard) == 4


def test_sounds_of_one_spectrogram_are_told_apart_by_their_mask():
    mllm = shared_mllm("tiny-qwen2-audio")
    (sample,) = [s for s in samples_for(mllm) if s.audio is not None][:1]
    long = dataclasses.replace(
        sample, audio=np.concatenate([sample.audio, np.zeros(3200, np.float32)])
    )
    batches = [mllm.encode([x]) for x in (sample, long)]
    for batch in batches:
        batch["input_features"] = batches[0]["input_features"]
    plain = [mllm.forward(batch).logits for batch in batches]
    with hear_once(mllm, memory := {}):
        heard = [mllm.forward(batch).logits for batch in batches for _ in range(2)]
    assert len(memory) == 2
    for i, logits in enumerate(heard):
        assert torch.equal(logits, plain[i // 2])


def test_choices_are_ranked_not_generated(echo, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"pad": "", "answer": "wxyz"[i % 4]} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "echo" / "test.parquet")
    bench = echo(
        "choice_accuracy",
        choices=("A", "B", "C", "D"),
        references=lambda row: ("ABCD"["wxyz".index(row["answer"])],),
    )
    mllm = FakeMLLM()
    table = evaluate(mllm, bench)
    assert table["answer"].tolist() == list("ABCDABCD") and (table["score"] == 1).all()
    assert mllm.batches[0][1] == ("A", "B", "C", "D")


def test_a_captions_score_is_that_of_the_whole_file(echo):
    bench = echo("cider_d")
    every = evaluate(FakeMLLM(), bench).set_index("row")["score"]
    few = evaluate(FakeMLLM(), bench[5:9]).set_index("row")["score"]
    pd.testing.assert_series_equal(few, every[few.index])
    assert bench[5:9].fingerprint != echo("exact_match")[5:9].fingerprint


@pytest.mark.fault("a fingerprint that leaves something out")
def test_what_a_users_metric_is_divided_by_counts(echo, monkeypatch):
    """Its functions may be minerlib's, whose versions say nothing of it."""
    made = {}
    for change in ({}, {"largest": 5.0}, {"clip": True}):
        monkeypatch.setitem(
            metrics.ANSWER_METRICS, "mine", metrics.Metric(metrics.contains, "mine", **change)
        )
        made[str(change)] = echo("mine").fingerprint
    assert len(set(made.values())) == 3


def test_texts_are_ranked_by_their_mean_log_probability(echo):
    """Of each row's own options, in any batch; the letters of a list play no part."""

    class Ranking(FakeMLLM):
        def logprob(self, batch, answers):
            return [
                -abs(len(a) - len(self.answer(p)))
                for a, p in zip(answers, batch["ids"], strict=True)
            ]

    bench = echo(
        "choice_accuracy",
        references=lambda row: row["answer"],
        options=lambda row: (row["answer"] + "!", row["answer"], "none of these"),
    )
    assert bench[0].choices == ("red!", "red", "none of these")
    table = evaluate(Ranking(), bench, batch_size=7)
    assert (table["answer"] == [s.references[0] for s in bench]).all() and (
        table["score"] == 1
    ).all()


def test_measures(echo):
    """Log-probability is of the commonest reference: a column more, or in place of answers."""

    class Probable(FakeMLLM):
        def logprob(self, batch, answers):
            return [-float(len(answer)) for answer in answers]

    bench = echo(references=lambda row: ("other", row["answer"], row["answer"]))
    plain = evaluate(FakeMLLM(), bench)
    both = evaluate(Probable(), bench, measure="logprob")
    pd.testing.assert_frame_equal(both.drop(columns="logprob"), plain)
    assert both["logprob"].tolist() == [-float(len(WORDS[i % 6])) for i in range(40)]
    only = evaluate(Probable(), bench, measure="logprob only")
    assert list(only) == ["benchmark", "row", "prompt", "references", "logprob", "medium"]
    pd.testing.assert_frame_equal(only, both[list(only)])
    with pytest.raises(ValueError, match="measure='loss': use one of score, logprob"):
        evaluate(Probable(), bench, measure="loss")


def test_a_choice_among_answers_of_other_rows_needs_no_words(echo):
    class Seeing(FakeMLLM):
        """Finds the longest answer most probable for some rows, the right one for the others."""

        def logprob(self, batch, answers):
            self.asked.append(answers)
            pairs = zip(batch["ids"], answers, strict=True)
            blind = (len(a) if p.startswith(":") else a == self.answer(p) for p, a in pairs)
            return [float(x) for x in blind]

    bench, seeing = echo(), Seeing()
    seeing.asked = []
    table = evaluate(seeing, bench, 40, measure="choice")
    offered = list(zip(*seeing.asked, strict=True))
    assert len(offered) == 40 and all(len(set(row)) == evaluation.CHOICES for row in offered)
    assert {row[-1] for row in offered} == set(WORDS)
    longest = [max(evaluation.offered(bench, [s])[0], key=len) for s in bench]
    answers = [long if s.prompt.startswith(":") else s.reference
               for s, long in zip(bench, longest, strict=True)]  # fmt: skip
    assert table["answer"].tolist() == answers
    right = [float(a == s.reference) for s, a in zip(bench, answers, strict=True)]
    assert table["score"].tolist() == right and 0 < np.mean(right) < 1
    columns = ["benchmark", "row", "prompt", "answer", "references", "score", "chance", "medium"]
    assert list(table) == columns and (table["chance"] == 1 / evaluation.CHOICES).all()
    assert summarise(table).iloc[0]["mean"] == pytest.approx(np.mean(right))
    assert evaluation.above_chance(table) == pytest.approx(np.mean(right) - 0.25)
    with pytest.raises(ValueError, match="are choices, the other's are not"):
        compare(table, evaluate(FakeMLLM(), bench))
    again = evaluate(seeing, bench[10:20], 3, measure="choice")
    assert again["answer"].tolist() == answers[10:20]  # whatever the batch and the part


def test_a_blank_is_no_reference_where_something_is_said():
    assert Sample("?", ("", " ", "", "yes")).reference == "yes"
    assert Sample("?", ("b", "a", "a", "b")).reference == "b" and Sample("?", ("",)).reference == ""


def test_a_guess_at_the_commonest_answer_is_right_by_chance():
    """Of a real benchmark's references, half of which are one of a few words."""
    bench = benchmark("text_vqa", source=ROOT / "data/benchmarks")
    often = Counter(Counter(of).most_common(1)[0][0].casefold() for of in bench.whole)
    assert often.most_common(1)[0][1] > 2 * len(bench) / len(often)  # else there is none to guess
    asked = [Sample("?", of, row=i) for i, of in enumerate(bench.references)]
    offered = evaluation.offered(bench, asked)
    guess = [max(row, key=lambda text: often[text.casefold()]) for row in offered]
    right = np.mean([a == row[-1] for a, row in zip(guess, offered, strict=True)])
    assert 0.18 < right < 0.32
    assert all(len({text.casefold() for text in row}) == evaluation.CHOICES for row in offered)


def test_a_choice_needs_other_answers(echo):
    bench = echo()
    sample = dataclasses.replace(bench[0], references=("Two", "ten"))  # and so neither two nor ten
    (row,) = evaluation.offered(bench, [sample])
    assert row[-1] == "Two" and len(set(row)) == evaluation.CHOICES and not {"two", "ten"} & {*row}
    few = echo(references=lambda row: ("yes" if row["answer"] == "red" else "no",))
    with pytest.raises(ValueError, match="'echo' row 0: only 1 other answers.*needs 3"):
        evaluate(FakeMLLM(), few, measure="choice")


def test_captions_carry_their_own_column(echo):
    table = evaluate(FakeMLLM(), echo("cider_d"))
    assert table["cider_d"].max() > 1
    np.testing.assert_allclose(table["score"], table["cider_d"] / 10)
    line = summarise(table).iloc[0]
    assert line["corpus"] == pytest.approx(table["cider_d"].mean())


@pytest.mark.parametrize("ready", [False, True], ids=["bench", "prepared"])
def test_rows_say_what_they_are_about(echo, ready):
    """In the rows' order, not the batches', and without those that are skipped."""
    bench, mllm = echo()[2:], FakeMLLM(bad=[31])
    given = prepare(mllm, bench, 8, on_error="skip") if ready else bench
    with pytest.warns(UserWarning, match="row 31"):
        table = evaluate(mllm, given, 8, on_error="skip")
    media = dict(zip(range(2, 40), bench.media, strict=True))
    assert table["medium"].tolist() == [media[row] for row in table["row"]]
    assert len(table) == 37 and table["medium"].nunique() == 37


def test_questions_about_one_picture_share_a_medium():
    """Of the shipped clips every question's row; none of another benchmark's."""
    bench = benchmark("msvd_qa", ROOT / "data/benchmarks")[:40]
    table = evaluate(FakeMLLM(), bench)
    assert table["medium"].tolist() == bench.media
    same = [(s.video.tobytes(), medium) for s, medium in zip(bench, bench.media, strict=True)]
    clips, media, both = (len({*x}) for x in (*zip(*same, strict=True), same))
    assert clips == media == both < 40


def test_table_survives_parquet(echo, tmp_path):
    table = evaluate(FakeMLLM(), echo())
    table.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(
        summarise(pd.read_parquet(tmp_path / "table.parquet")), summarise(table)
    )


def test_progress_is_switched_off_by_the_environment(echo, monkeypatch, capfd):
    """conftest sets tqdm's own switch, which it reads when it is imported."""
    bench = echo()
    evaluate(FakeMLLM(), prepare(FakeMLLM(), bench))
    assert not capfd.readouterr().err
    monkeypatch.setattr(evaluation, "tqdm", functools.partial(evaluation.tqdm, disable=False))
    for call, label in ((evaluate, "echo:"), (prepare, "echo:")):
        result = call(FakeMLLM(), bench)
        assert label in capfd.readouterr().err
    evaluate(FakeMLLM(), result)
    assert "echo:" in capfd.readouterr().err


def test_empty_batch_size(echo):
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(FakeMLLM(), echo(), batch_size=0)


# --- rows that cannot be used --------------------------------------------------------------------


@pytest.fixture
def broken(echo, monkeypatch):
    """The echo benchmark with rows 5 and 17 that cannot be decoded."""
    bench = echo()
    own = type(bench).__getitem__

    def get(self, which):
        if isinstance(which, int | np.integer) and self.numbers[which] in (5, 17):
            raise RowError("echo", int(self.numbers[which]), "image", OSError("truncated"))
        return own(self, which)

    monkeypatch.setattr(type(bench), "__getitem__", get)
    return bench


SKIPPED = [
    "echo row 5: image: OSError: truncated",
    "echo row 17: image: OSError: truncated",
    "echo row 31: image: ValueError: no placeholder",
]


@pytest.mark.fault("one bad row ends a run without its name")
@pytest.mark.parametrize("call", [evaluate, prepare])
def test_a_bad_row_is_named(broken, call):
    mllm = FakeMLLM()
    with pytest.raises(RowError, match="echo row 5: image: OSError: truncated"):
        call(mllm, broken)
    with pytest.raises(RowError, match="echo row 7: image: ValueError: no placeholder"):
        call(FakeMLLM(bad=[7]), broken[6:16])
    assert not mllm.batches  # found before hours of answers


@pytest.mark.fault("one bad row loses all others")
@pytest.mark.parametrize("ready", [False, True], ids=["bench", "prepared"])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_bad_rows_are_skipped_on_request(broken, ready, batch_size):
    mllm = FakeMLLM(bad=[31])
    with pytest.warns(UserWarning, match="rows skipped.*row 17.*row 31|rows skipped.*31"):
        bench = prepare(mllm, broken, batch_size, on_error="skip") if ready else broken
        table = evaluate(mllm, bench, batch_size, on_error="skip")
    assert sorted(table.attrs["skipped"]) == sorted(SKIPPED)
    assert table["row"].tolist() == [i for i in range(40) if i not in (5, 17, 31)]
    assert (table["score"] == 1).all()
    if ready:  # a second condition has the same rows
        with pytest.warns(UserWarning):
            again = evaluate(mllm, bench)
        pd.testing.assert_frame_equal(again, table)
        assert again.attrs == table.attrs


def test_nothing_skipped_is_nothing_said(echo, recwarn):
    table = evaluate(FakeMLLM(), echo(), on_error="skip")
    assert table.attrs["skipped"] == [] and len(table) == 40
    assert not [w for w in recwarn if "skipped" in str(w.message)]


def test_a_benchmark_without_a_usable_row(echo):
    with pytest.raises(ValueError, match="'echo': every row was skipped: echo row [34]"):
        evaluate(FakeMLLM(bad=range(40)), echo()[3:5], on_error="skip")
    with pytest.raises(ValueError, match="'echo' has no rows"):
        evaluate(FakeMLLM(), echo()[:0])


@pytest.mark.fault("a batch's fault is blamed on its rows")
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_failing_batch_is_no_failing_row(echo, on_error):
    mllm = FakeMLLM(most=4)
    with pytest.raises(ValueError, match="batch_size=1") as error:
        evaluate(mllm, echo(), batch_size=8, on_error=on_error)
    assert not isinstance(error.value, RowError)
    assert len(evaluate(mllm, echo(), batch_size=4, on_error=on_error)) == 40


def test_an_unknown_metric_is_named(echo):
    with pytest.raises(ValueError, match="unknown metric 'none'"):
        evaluate(FakeMLLM(), echo("none"))


# --- summaries and comparisons -------------------------------------------------------------------


def scores(name: str, values) -> pd.DataFrame:
    return pd.DataFrame({"benchmark": name, "row": range(len(values)), "score": values}).assign(
        answer="", references=[()] * len(values)
    )


def test_compare_is_paired():
    rng = np.random.default_rng(0)
    before = pd.concat([scores("a", rng.random(60)), scores("b", rng.random(40))])
    after = before.assign(score=before["score"] - 0.25).sample(frac=1, random_state=0)
    table = compare(before, after).set_index("benchmark")
    assert list(table.index) == ["a", "b", "average"] and list(table["n"]) == [60, 40, 100]
    np.testing.assert_allclose(table[["difference"]], -0.25)
    np.testing.assert_allclose(table["b"] - table["a"], -0.25)
    # A constant change varies by the added rows only, however much the scores do: rows are paired.
    same = np.full(60, -0.25)
    found = inference.estimate(same, ends=(-1, 1), added=1)
    np.testing.assert_allclose(table.loc["a", ["low", "high"]].tolist(), found[1:3])
    both = inference.estimate({"a": same, "b": same[:40]}, ends=(-1, 1), added=1)
    np.testing.assert_allclose(table.loc["average", ["low", "high"]].tolist(), both[1:3])
    means = [before.query(f"benchmark == '{k}'")["score"].mean() for k in "ab"]
    assert table.loc["average", "a"] == pytest.approx(np.mean(means))


def about(table: pd.DataFrame) -> pd.DataFrame:
    """The table with four rows to a medium."""
    return table.assign(medium="m" + (table["row"] // 4).astype(str))


def test_rows_about_one_medium_are_no_further_evidence():
    before = scores("a", np.repeat([1.0, 0.5, 1, 0, 1, 1], 4))
    after = before.assign(score=np.repeat([0.0, 0.5, 1, 0, 0, 1], 4))
    order = np.random.default_rng(1).permutation(24)
    clustered = compare(about(before), about(after).iloc[order]).iloc[0]
    media = np.arange(24) // 4
    expected = inference.change(before["score"], after["score"], media)
    assert clustered[["difference", "low", "high"]].tolist() == pytest.approx(expected[:3])
    single = compare(before, after.iloc[order]).iloc[0]
    expected = inference.change(before["score"], after["score"])
    assert single[["difference", "low", "high"]].tolist() == pytest.approx(expected[:3])
    assert clustered["high"] - clustered["low"] > 1.5 * (single["high"] - single["low"])
    (line,) = summarise(about(before)).to_dict("records")
    expected = inference.estimate(before["score"], media)
    assert (line["mean"], line["low"], line["high"]) == pytest.approx(expected[:3])


def test_media_of_different_benchmarks_are_different_ones():
    table = pd.concat([scores("a", [1.0, 0, 0, 1] * 5), scores("b", [0.0, 0, 1, 1] * 5)])
    average = summarise(about(table)).iloc[-1]
    rows = {k: t["score"].to_numpy() for k, t in table.groupby("benchmark")}
    expected = inference.estimate(rows, np.arange(20) // 4)
    assert average[["mean", "low", "high"]].tolist() == pytest.approx(expected[:3])


def test_answers_of_older_runs_have_no_media():
    """Such tables can be compared, with each other and with newer ones."""
    old = pd.concat([scores("a", [1.0, 0.0] * 8), scores("b", [1.0, 1.0, 0.0, 0.0])])
    new, worse = about(old), old.assign(score=old["score"] / 2)
    known = compare(new, about(worse))
    for a, b, expected in ((new, worse, known), (old, about(worse), known)):
        pd.testing.assert_frame_equal(compare(a, b), expected)
    unknown = compare(old, worse)
    assert unknown["difference"].tolist() == known["difference"].tolist()
    single = new.assign(medium=np.arange(len(new)))
    pd.testing.assert_frame_equal(summarise(old), summarise(single))
    assert not summarise(old).equals(summarise(new))


def test_chance_is_that_of_blind_guesses():
    """One in as many as there are choices; nothing where an answer is free."""
    of = {name: spec.chance for name, spec in REGISTRY.items()}
    for name, spec in REGISTRY.items():
        assert of[name] == (1 / len(spec.choices) if spec.choices else of[name])
    assert of["common_knowledge"] == 1 / 4 and of["vocal_sound"] == 1 / len(metrics.VOCAL_SOUNDS)
    free = set(REGISTRY) - {"mmlu", "common_knowledge", "vocal_sound"}
    assert {of[name] for name in free} == {0}


@pytest.mark.fault("NaN score enters an average")
@pytest.mark.parametrize("call", [summarise, lambda t: compare(t, t)], ids=["summarise", "compare"])
def test_a_score_that_is_no_number_is_refused(call):
    table = scores("a", [1.0, np.nan, 0.5, np.nan])
    with pytest.raises(ValueError, match=r"a row 1 is there twice or has no score \(2 such rows"):
        call(table)


@pytest.mark.fault("a row counts twice")
@pytest.mark.parametrize("call", [summarise, lambda t: compare(t, t)], ids=["summarise", "compare"])
def test_a_row_that_is_there_twice_is_refused(call):
    table = pd.concat([scores("a", [1.0, 0.5]), scores("b", [1.0]), scores("b", [0.0, 1.0])])
    with pytest.raises(ValueError, match=r"b row 0 is there twice or has no score \(1 such rows"):
        call(table)


@pytest.mark.fault("answers to an edited benchmark are paired")
@pytest.mark.parametrize(("column", "other"), [("prompt", "Why?"), ("references", ("no",))])
def test_compare_refuses_an_edited_benchmark(column, other):
    before = scores("a", [1.0, 0.0, 1.0]).assign(prompt="Who?", references=[("yes",)] * 3)
    after = before.iloc[::-1].reset_index(drop=True)
    assert len(compare(before, after)) == 1
    after[column] = [after[column][0], other, other]
    with pytest.raises(ValueError, match=rf"a row 0: its {column} differs.*\(2 such rows\)"):
        compare(before, after)
    with pytest.raises(ValueError, match=rf"its {column} differs"):
        compare(after, before)


def test_compare_knows_references_from_a_file(tmp_path):
    before = scores("a", [1.0, 0.0]).assign(prompt="Who?", references=[("yes", "no")] * 2)
    before.to_parquet(tmp_path / "table.parquet")
    assert len(compare(before, pd.read_parquet(tmp_path / "table.parquet"))) == 1


@pytest.mark.fault("interval with other quantiles")
def test_intervals_are_the_middle_95_percent():
    """By hand: of 40 rows 10 lose their point, and a row more changes by -1 and one by 1."""
    before = scores("a", [1.0] * 40)
    after = before.assign(score=[0.0] * 10 + [1.0] * 30)
    t = stats.t(39).ppf(0.975)
    (line,) = compare(before, after).to_dict("records")
    half = t * stats.sem([-1] * 10 + [0] * 30 + [-1, 1])
    assert line["difference"] == -0.25
    assert (line["low"], line["high"]) == pytest.approx((-10 / 40 - half, -10 / 42 + half))
    (line,) = summarise(after).to_dict("records")
    half = t * stats.sem([0] * 12 + [1] * 32)
    assert (line["low"], line["high"]) == pytest.approx((32 / 44 - half, 32 / 44 + half))


def test_compare_refuses_other_rows():
    with pytest.raises(ValueError, match="only 2 rows are in both"):
        compare(scores("a", [1.0, 0.0, 1.0]), scores("a", [1.0, 0.0]))


def test_summarise_weighs_benchmarks_alike():
    table = summarise(pd.concat([scores("a", [1.0] * 30), scores("b", [0.0, 1.0])]))
    assert table["benchmark"].tolist() == ["a", "b", "average"]
    assert table["mean"].tolist() == [1.0, 0.5, 0.75]
    assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
    both = inference.estimate({"a": np.ones(30), "b": [0.0, 1.0]})
    assert table.iloc[2][["low", "high"]].tolist() == pytest.approx(both[1:3])
    assert table.iloc[0]["low"] < 1 == table.iloc[0]["high"]  # open where all rows are right
    assert len(summarise(scores("a", [1.0]))) == 1  # no average of one benchmark
