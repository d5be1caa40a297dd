"""Evaluation with a fake model that answers from the prompt, and paired comparisons."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from minerlib import inference
from minerlib.tasks import Repo, Spec, benchmark
from minerlib.tasks import rows as benchmarks
from minerlib.tasks.evaluation import Prepared, compare, evaluate, prepare, summarise

WORDS = ("red", "green", "blue", "a dog on a mat", "two", "ten")


class FakeMLLM:
    """Answers each prompt with what stands behind its colon, and keeps what it was asked."""

    def __init__(self):
        self.batches, self.encoded = [], 0

    def encode(self, samples):
        self.encoded += len(samples)
        return [s.prompt for s in samples]

    def encode_media(self, batch):
        return batch

    def answer(self, prompt):
        return prompt.split(": ")[-1]

    def generate(self, batch, max_new_tokens):
        self.batches.append((batch, max_new_tokens))
        return [self.answer(p) for p in batch]

    def choose(self, batch, choices):
        self.batches.append((batch, choices))
        return [choices["wxyz".index(self.answer(p))] for p in batch]


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
    table = evaluate(mllm, bench[3:], batch_size=8, progress=False)
    assert list(table) == [
        "benchmark", "row", "prompt", "answer", "references", "score", "contains",
    ]  # fmt: skip
    assert table["row"].tolist() == list(range(3, 40))
    assert table["prompt"].tolist() == [s.prompt for s in bench[3:]]
    assert (table["score"] == 1).all() and (table["benchmark"] == "echo").all()
    assert [len(b) for b, _ in mllm.batches] == [8, 8, 8, 8, 5]
    assert {budget for _, budget in mllm.batches} == {9}
    lengths = [len(p) for b, _ in mllm.batches for p in b]
    assert lengths == sorted(lengths)  # batches hold prompts of like length
    evaluate(mllm, bench[:1], progress=False, max_new_tokens=3)
    assert mllm.batches[-1][1] == 3


def test_prepared_encodes_once(echo):
    bench, mllm = echo(), FakeMLLM()
    prepared = prepare(mllm, bench, batch_size=16, progress=False)
    assert isinstance(prepared, Prepared) and len(prepared) == 40
    first, again = (evaluate(mllm, prepared, progress=False) for _ in range(2))
    assert mllm.encoded == 40
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first, evaluate(mllm, bench, batch_size=3, progress=False))


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
    table = evaluate(mllm, bench, progress=False)
    assert table["answer"].tolist() == list("ABCDABCD") and (table["score"] == 1).all()
    assert mllm.batches[0][1] == ("A", "B", "C", "D")


def test_captions_carry_their_own_column(echo):
    table = evaluate(FakeMLLM(), echo("cider_d"), progress=False)
    assert table["cider_d"].max() > 1 == table["score"].max()
    np.testing.assert_allclose(table["score"], table["cider_d"].clip(0, 1))
    line = summarise(table, n=100).iloc[0]
    assert line["corpus"] == pytest.approx(table["cider_d"].mean())


def test_table_survives_parquet(echo, tmp_path):
    table = evaluate(FakeMLLM(), echo(), progress=False)
    table.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(
        summarise(pd.read_parquet(tmp_path / "table.parquet")), summarise(table)
    )


def test_progress_is_switched_off_by_the_environment(echo, monkeypatch, capfd):
    bench = echo()
    monkeypatch.setenv("MINER_PROGRESS", "0")
    evaluate(FakeMLLM(), bench)
    assert not capfd.readouterr().err
    monkeypatch.setenv("MINER_PROGRESS", "1")
    evaluate(FakeMLLM(), bench)
    assert "answer echo" in capfd.readouterr().err


def test_empty_batch_size(echo):
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(FakeMLLM(), echo(), batch_size=0)


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
    # A constant change has no spread, however much the scores have: rows are paired.
    np.testing.assert_allclose(table[["difference", "low", "high"]], -0.25)
    np.testing.assert_allclose(table["b"] - table["a"], -0.25)
    means = [before.query(f"benchmark == '{k}'")["score"].mean() for k in "ab"]
    assert table.loc["average", "a"] == pytest.approx(np.mean(means))


def test_compare_refuses_other_rows():
    with pytest.raises(ValueError, match="only 2 rows are in both"):
        compare(scores("a", [1.0, 0.0, 1.0]), scores("a", [1.0, 0.0]))


def test_summarise_weighs_benchmarks_alike():
    table = summarise(pd.concat([scores("a", [1.0] * 30), scores("b", [0.0, 1.0])]))
    assert table["benchmark"].tolist() == ["a", "b", "average"]
    assert table["mean"].tolist() == [1.0, 0.5, 0.75]
    assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
    assert table.iloc[2][["low", "high"]].tolist() == [0.5, 1.0]
    assert len(summarise(scores("a", [1.0]))) == 1  # no average of one benchmark
    assert inference.bootstrap([1.0]) == (1.0, 1.0, 1.0)
