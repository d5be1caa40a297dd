"""Convergence, semantic probing and telomeres: known answers on made clouds, and honest nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Rows, footprints
from scipy.stats import binom, ortho_group, spearmanr
from sklearn.metrics import pairwise_distances, silhouette_samples

from minerlib import inference
from minerlib.findings import clouds, states
from minerlib.findings.convergence import convergence
from minerlib.findings.probing import probing, tips
from minerlib.findings.states import States, hidden_states, project
from minerlib.findings.telomeres import massive_activations, telomeres

RNG = np.random.default_rng
MOST = int(binom.ppf(0.999, 200, 0.05))  # rejections in 200 tries at the 5 % level


def states_of(hidden: np.ndarray, kinds: list[str], samples: np.ndarray, **columns) -> States:
    """Tokens [layer, token, hidden] with a table; a token's position is its order in its sample."""
    tokens = pd.DataFrame({"sample": samples, "kind": kinds})
    group = tokens.groupby("sample")
    tokens["position"] = group.cumcount()
    tokens["length"] = group["kind"].transform("size")
    tokens["place"] = tokens.groupby(["sample", "kind"]).cumcount()
    tokens["run"] = tokens.groupby(["sample", "kind"])["kind"].transform("size")
    tokens["count"] = tokens["run"]
    return States(np.asarray(hidden, np.float32), tokens.assign(id=0, text="", **columns))


def table_of(per_kind: dict[str, int], samples: int) -> tuple[list[str], np.ndarray]:
    """Kinds and samples of tokens, sample after sample, each with so many tokens per kind."""
    kinds = [kind for kind, n in per_kind.items() for _ in range(n)]
    return kinds * samples, np.repeat(np.arange(samples), len(kinds))


def value(table: pd.DataFrame, measure: str, layer: int = 0) -> pd.Series:
    found = table[(table["measure"] == measure) & (table["layer"] == layer)]
    assert len(found) == 1
    return found.iloc[0]


# --- convergence ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def approach() -> States:
    """Two round clouds in four dimensions, 10, 10, 4, 0 and 0 apart in five layers."""
    kinds, samples = table_of({"text": 6, "image": 6}, 30)
    noise = RNG(0).standard_normal((5, len(kinds), 4))
    shift = np.zeros_like(noise)
    for layer, apart in enumerate((10, 10, 4, 0, 0)):
        shift[layer, np.array(kinds) == "image", 0] = apart
    return states_of(noise + shift, kinds, samples)


@pytest.fixture(scope="module")
def approach_tables(approach) -> tuple[pd.DataFrame, pd.DataFrame]:
    return convergence(approach)


def test_two_clouds_apart_and_mixed(approach_tables):
    curves, _ = approach_tables
    expected = {"distance": (5, 0), "accuracy": (1, 0.5), "mixing": (0, 1), "silhouette": (None, 0)}
    for measure, (apart, mixed) in expected.items():
        first, last = value(curves, measure, 0), value(curves, measure, 4)
        assert apart is None or first["value"] == pytest.approx(apart, abs=0.3)
        assert last["value"] == pytest.approx(mixed, abs=0.2)
        assert first["p"] == pytest.approx(1 / 201)
        assert last["null_low"] <= last["value"] <= last["null_high"]
        assert (curves["low"] <= curves["high"]).all()


def test_the_layer_of_convergence(approach_tables):
    """The distance falls 5, 5, 2, 0, 0: half of the way is done between layers 1 and 2."""
    layers = approach_tables[1].set_index("measure")
    row = layers.loc["distance"]
    assert row["layer"] == pytest.approx(1 + 2.5 / 3, abs=0.15)
    assert row["low"] <= row["layer"] <= row["high"]
    assert row["start"] == pytest.approx(5, abs=0.3) and row["never"] == 0
    assert row["lower_half"] > 0.9


@pytest.mark.parametrize(
    "curve, falling, layer",
    [
        ([4, 4, 2, 0, 0], True, 2),
        ([4, 0, 0, 0], True, 0.5),
        ([0, 0, 1], False, 1.5),
        ([4, 0, 4, 4], True, 0.5),  # a later divergence does not undo it
        ([0, 1, 2], True, np.nan),  # never converges
        ([1, 1, 1], True, np.nan),
        ([3, 5, 1, 1], True, 1.75),  # counts from the start, not from the peak
    ],
)
def test_convergence_layer(curve, falling, layer):
    found = clouds.convergence_layer(np.array([curve, curve], float), falling)
    np.testing.assert_allclose(found, [layer, layer], equal_nan=True)


def test_silhouette_is_scikit_learns():
    x, second = RNG(1).standard_normal((40, 3)), RNG(2).random((3, 40)) < 0.4
    found = clouds.silhouette(pairwise_distances(x), second)
    for row, labels in zip(found, second, strict=True):
        np.testing.assert_allclose(row, silhouette_samples(x, labels), atol=1e-10)


def test_neighbours_are_others_nearest_first():
    distance = pairwise_distances(np.array([[0.0], [1.0], [3.0], [7.0]]))
    assert clouds.neighbours(distance, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert clouds.neighbours(distance, 99).shape == (4, 3)


def test_cka_known_answers():
    a = RNG(0).standard_normal((60, 8))
    rotated = 3 * a @ ortho_group.rvs(8, random_state=0) + 5
    assert clouds.cka(a, rotated)[0] == pytest.approx(1)
    b = RNG(1).standard_normal((60, 500))  # where plain CKA is far from 0
    found, draws, null = clouds.cka(a, b, inference.resamples(60, 200), 200)
    assert abs(found) < 0.15 and abs(null.mean()) < 0.05
    assert np.quantile(draws, 0.025) < 0 < np.quantile(draws, 0.975)
    with pytest.raises(ValueError, match="at least 4"):
        clouds.cka(a[:3], b[:3])


def test_no_fold_straddles_a_sample():
    """Labels that follow the sample, and samples that look alone: nothing carries over."""
    group = np.repeat(np.arange(20), 6)
    look = RNG(0).standard_normal((20, 400))[group]
    label = (RNG(1).random(20) < 0.5)[group]
    right = clouds.classified(look + 0.01 * RNG(2).standard_normal(look.shape), label[None], group)
    assert right.mean() < 0.75  # 1.0 if tokens of a sample were on both sides


def test_convergence_does_not_see_rotation_scale_or_names(approach, approach_tables):
    turned = 2 * approach.hidden @ ortho_group.rvs(4, random_state=1) + 3
    names = approach.tokens.assign(kind=approach.tokens["kind"].map({"text": "b", "image": "a"}))
    curves, _ = convergence(States(turned.astype(np.float32), names))
    columns = ["value", "low", "high", "null"]
    np.testing.assert_allclose(curves[columns], approach_tables[0][columns], atol=2e-2)


def test_convergence_null_keeps_its_level():
    """200 pairs of clouds without a difference, each sample with a place of its own."""
    kinds, samples = table_of({"text": 4, "image": 4}, 12)
    own = RNG(3).standard_normal((200, 12, 3))[:, samples]
    states = states_of(own + RNG(4).standard_normal(own.shape), kinds, samples)
    curves, _ = convergence(states, k=5, n_boot=20, n_null=99)
    rejected = (curves["p"] <= 0.05).groupby(curves["measure"]).sum()
    assert rejected.drop("cka").max() <= MOST
    assert rejected["cka"] > 100  # but the kinds' means do share the sample's place


def test_cka_null_keeps_its_level():
    draws = RNG(5).standard_normal((200, 2, 12, 3))
    found = [clouds.cka(a, b, shuffled=99) for a, b in draws]
    assert sum((null >= v).sum() + 1 <= 5 for v, _, null in found) <= MOST


# --- semantic probing ----------------------------------------------------------------------------


def probe(reaching: float = 0.2, seed: int = 0) -> States:
    """An audio cloud far from the text, the last `reaching` of each clip moved into the text."""
    kinds, samples = table_of({"audio": 10, "text": 10}, 20)
    x = RNG(seed).standard_normal((1, len(kinds), 4))
    states = states_of(x, kinds, samples)
    audio = states.tokens["kind"] == "audio"
    stays = audio & (states.tokens["place"] < 10 * (1 - reaching))
    states.hidden[0, stays.to_numpy(), 0] += 20
    return states


def test_one_cloud_reaching_into_the_other():
    still, reaching = (probing(probe(share)) for share in (0, 0.2))
    assert value(still, "probes")["value"] == 0
    row = value(reaching, "probes")
    assert 0.05 < row["value"] <= 0.2 and row["p"] == pytest.approx(1 / 201)
    assert value(reaching, "reach")["value"] < value(still, "reach")["value"]
    assert value(still, "reach")["value"] > 5 and value(still, "reach")["p"] == 1
    assert value(reaching, "elongation")["value"] > 3
    row = value(reaching, "tip_end")  # places 8 and 9 of 0..9 lie at 7/9 and 1 of the half-run
    assert 0.6 < row["value"] <= 1 and row["p"] < 0.05


def test_tips_are_the_tokens_that_reach():
    states = probe(0.2)
    table = tips(states, "audio")
    first = table.head(40)
    assert (first["place"] >= 8 / 9 - 1e-9).all() and (first["reach"] < 5).all()
    np.testing.assert_array_equal(states.tokens.loc[table["token"], "place"] / 9, table["place"])
    assert (states.tokens.loc[table["token"], "kind"] == "audio").all()


def test_reach_by_hand():
    distance = pairwise_distances(np.array([[0.0], [1.0], [3.0], [4.5]]))
    second = np.array([[False, False, True, True]])
    other, own = clouds.reach(distance, second, 1)
    np.testing.assert_allclose(other, [[3, 2, 2, 3.5]])
    np.testing.assert_allclose(own, [[1, 1, 1.5, 1.5]])
    np.testing.assert_allclose(clouds.reach(distance, second, 2)[0], [[3.75, 2.75, 2.5, 4]])
    x, second = RNG(0).standard_normal((60, 3)), RNG(1).random((4, 60)) < 0.5
    distance = pairwise_distances(x)
    near = clouds.neighbours(distance, 40)
    exact, quick = clouds.reach(distance, second, 5), clouds.reach(distance, second, 5, near)
    np.testing.assert_allclose(exact, quick)


def test_elongation_is_variance_over_mean_variance():
    x = RNG(0).standard_normal((20_000, 4)) * [3, 1, 1, 1]
    along = clouds.elongation(x, np.array([[2.0, 0, 0, 0], [0, 5, 0, 0]]))
    np.testing.assert_allclose(along, [3, 1 / 3], rtol=0.05)
    weights = np.vstack([np.arange(len(x)) < 10_000] * 2).astype(float)
    halves = clouds.elongation(x, np.eye(4)[:2], weights)
    np.testing.assert_allclose(halves, clouds.elongation(x[:10_000], np.eye(4)[:2]))


def test_probing_does_not_see_rotation():
    states = probe()
    turned = States(
        (5 * states.hidden @ ortho_group.rvs(4, random_state=2)).astype(np.float32), states.tokens
    )
    a, b = probing(states), probing(turned)
    np.testing.assert_allclose(a[["value", "low", "high"]], b[["value", "low", "high"]], rtol=1e-3)


def test_probing_null_keeps_its_level():
    """Clouds that are one, stretched like hidden states, with a text centre drawn like a token."""
    kinds, samples = table_of({"audio": 5, "text": 5}, 10)
    stretch = np.array([4, 2, 1, 1, 1, 0.5])
    x = RNG(6).standard_normal((200, len(kinds), 6)) * stretch
    table = probing(states_of(x, kinds, samples), nearest=3, k=8, n_boot=20, n_null=99)
    rejected = (table["p"] <= 0.05).groupby(table["measure"]).sum()
    assert rejected.index.tolist() == ["elongation", "probes", "reach", "tip_end"]
    assert rejected.max() <= MOST


# --- semantic telomeres --------------------------------------------------------------------------


def line(at: tuple[float, float], seed: int = 0) -> States:
    """Text along a line in the order of its places, two specials at `at` on it, an image aside."""
    kinds, samples = table_of({"special": 1, "text": 12, "end": 1, "image": 4}, 25)
    kinds = ["special" if k == "end" else k for k in kinds]
    states = states_of(np.zeros((1, len(kinds), 5)), kinds, samples)
    x, tokens = states.hidden[0], states.tokens
    text, special = (tokens["kind"] == k for k in ("text", "special"))
    x[text, 0] = np.linspace(0, 10, 12)[tokens.loc[text, "place"]]
    x[special, 0] = np.array(at)[tokens.loc[special, "place"]]
    x[tokens["kind"] == "image", 1] = 50
    x += 0.1 * RNG(seed).standard_normal(x.shape)
    return states


def test_specials_at_the_ends_of_the_text():
    table = telomeres(line((-1, 11)))
    for measure, expected in {"axis_end": 1, "axis_order": 1, "attachment": 16 / 12}.items():
        row = value(table, measure)
        assert row["value"] == pytest.approx(expected, abs=0.02), measure
        assert row["p"] == pytest.approx(1 / 201)
    assert value(table, "sequence_end")["value"] == pytest.approx(1, abs=0.02)


def test_specials_in_the_middle_of_the_text():
    row = value(telomeres(line((5, 5))), "axis_end")
    assert row["value"] < 0.2 and row["p"] == 1
    assert row["null"] == pytest.approx(0.5, abs=0.05)


def test_ends_that_depend_on_the_length():
    """Specials nearer to the middle the longer the text: a rank correlation of -1."""
    kinds, samples = table_of({"special": 1, "text": 12}, 20)
    states = states_of(np.zeros((1, len(kinds), 3)), kinds, samples)
    text = (states.tokens["kind"] == "text").to_numpy()
    states.tokens.loc[text, "count"] = 12 + states.tokens.loc[text, "sample"]
    states.hidden[0, text, 0] = RNG(0).uniform(-1, 1, text.sum())
    states.hidden[0, ~text, 0] = np.linspace(0.95, 0.05, 20)
    row = value(telomeres(states), "end_by_length")
    assert row["value"] == pytest.approx(-1, abs=0.02) and row["p"] < 0.01


def test_telomeres_do_not_see_rotation_and_need_no_media():
    states = line((-1, 11))
    turned = (states.hidden @ ortho_group.rvs(5, random_state=3)).astype(np.float32)
    columns = ["value", "low", "high"]
    a, b = telomeres(states)[columns], telomeres(States(turned, states.tokens))[columns]
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert "attachment" not in set(telomeres(states.of("text", "special"))["measure"])


def test_telomeres_null_keeps_its_level():
    kinds, samples = table_of({"text": 6, "special": 3, "image": 6}, 10)
    order = np.concatenate([15 * s + RNG(s).permutation(15) for s in range(10)])
    kinds = list(np.array(kinds)[order])
    x = RNG(7).standard_normal((200, len(kinds), 4)) * [3, 1, 1, 1]
    states = states_of(x, kinds, samples)
    text = (states.tokens["kind"] == "text").to_numpy()
    states.tokens.loc[text, "count"] = 6 + states.tokens.loc[text, "sample"]
    table = telomeres(states, k=5, n_boot=20, n_null=99)
    rejected = (table["p"] <= 0.05).groupby(table["measure"]).sum()
    assert set(rejected.index) == {"axis_end", "axis_order", "attachment", "end_by_length"} | {
        "sequence_end"
    }
    assert rejected.drop("sequence_end").max() <= MOST  # that one is the same at every layer


def test_percentiles_and_extremity_by_hand():
    z = np.array([0.0, 1, 2, 3, -5, 1.5, 9, 2])
    second = np.array([[False] * 4 + [True] * 4])
    np.testing.assert_allclose(clouds.percentile(z, second)[0, 4:], [0, 0.5, 1, 0.625])
    np.testing.assert_allclose(clouds.extremity(z, second)[0, 4:], [1, 0, 1, 0.25])


def test_principal_axis_in_both_shapes():
    x = RNG(0).standard_normal((300, 4)) * [5, 1, 1, 1]
    assert abs(clouds.principal_axis(x)[0]) > 0.99
    few = np.zeros((5, 50))
    few[:, 7] = [0, 1, 2, 3, 4]
    assert abs(clouds.principal_axis(few)[7]) == pytest.approx(1)


def test_massive_activations():
    x = np.ones((2, 6, 5), np.float32)
    x[1, 0, 3] = -4000
    kinds, samples = table_of({"special": 1, "text": 2}, 2)
    table = massive_activations(states_of(x, kinds, samples)).set_index(["layer", "kind"])
    assert table.loc[(0, "special"), "ratio"] == 1
    row = table.loc[(1, "special")]
    assert (row["ratio"], row["massive"], row["first"]) == (2000.5, 0.5, 2000.5)
    assert table.loc[(1, "text"), "massive"] == 0 and np.isnan(table.loc[(1, "text"), "first"])


# --- resampling ----------------------------------------------------------------------------------


def test_shuffles_stay_within_their_group():
    labels, groups = np.array([1, 0, 0, 1, 1, 0, 0]), np.array([5, 5, 2, 2, 5, 2, 9])
    shuffled = inference.shuffles(labels, groups, 200)
    assert (shuffled[0] == labels).all() and shuffled.shape == (201, 7)
    for group in (2, 5, 9):
        assert (shuffled[:, groups == group].sum(1) == labels[groups == group].sum()).all()
    share = shuffled[1:].mean(0)
    assert share[groups == 5] == pytest.approx(2 / 3, abs=0.12)
    assert (inference.shuffles(labels, groups, 200) == shuffled).all()


def test_interval_is_a_bootstrap_over_samples():
    values = RNG(0).standard_normal((50, 2))
    mean, low, high = inference.interval(values)
    expected = inference.bootstrap(values[:, 1])
    assert (mean[1], low[1], high[1]) == pytest.approx(expected, abs=0.03)
    holes = np.column_stack(
        [np.where(np.arange(50) < 20, values[:, 0], np.nan), np.full(50, np.nan)]
    )
    mean, low, high = inference.interval(holes)
    assert mean[0] == pytest.approx(values[:20, 0].mean()) and low[0] < mean[0] < high[0]
    assert np.isnan([mean[1], low[1], high[1]]).all()


def test_interval_covers():
    """Of 200 true values some 95 % lie inside."""
    _, low, high = inference.interval(RNG(8).standard_normal((40, 200)))
    assert ((low > 0) | (high < 0)).sum() <= MOST


def test_standard_ranks_give_spearman():
    a, b = RNG(0).standard_normal((2, 30))
    a[:5] = 0
    rho = (clouds.standard_ranks(a) * clouds.standard_ranks(b)).mean()
    assert rho == pytest.approx(spearmanr(a, b)[0])


def test_summaries_of_paired_conditions():
    before = pd.DataFrame(
        {"sample": [0, 0, 1, 1], "layer": [0, 1] * 2, "set": "text", "v": [1.0] * 4}
    )
    after = before.assign(v=[2.0, 1, 4, 1])
    change = inference.paired(before, after.sample(frac=1, random_state=0), "v")
    table = inference.summarise(change, "v")
    assert table["v"].tolist() == [2, 0] and table["n"].tolist() == [2, 2]
    assert (table.loc[0, "low"], table.loc[0, "high"]) == (1, 3)
    with pytest.raises(ValueError, match="same samples"):
        inference.paired(before, after.iloc[:2], "v")


# --- collecting ----------------------------------------------------------------------------------


def test_hidden_states_are_the_models(mllm, samples):
    states = hidden_states(mllm, Rows(samples), tokens_per_kind=None, equal=False, batch_size=2)
    assert states.hidden.shape == (
        mllm.n_layers + 1,
        len(states.tokens),
        mllm.layers[0].hidden_size,
    )
    assert states.hidden.dtype == np.float32
    for s, sample in enumerate(samples):
        batch = mllm.encode([sample])
        with torch.inference_mode():
            expected = mllm.model(**batch, output_hidden_states=True).hidden_states
        own = (states.tokens["sample"] == s).to_numpy()
        assert (states.tokens.loc[own, "id"].to_numpy() == batch["input_ids"][0].numpy()).all()
        assert states.tokens.loc[own, "position"].tolist() == list(range(own.sum()))
        for layer in range(mllm.n_layers):  # transformers' last one is after the final norm
            np.testing.assert_allclose(states.hidden[layer, own], expected[layer][0], atol=1e-4)
        norm = mllm.model.get_decoder().norm
        with torch.inference_mode():
            last = norm(torch.from_numpy(states.hidden[-1, own]))
        np.testing.assert_allclose(last, expected[-1][0], atol=1e-4)


def test_the_draw_is_equal_seeded_and_blind_to_batches(mllm, samples):
    draws = [hidden_states(mllm, samples, tokens_per_kind=4, batch_size=b) for b in (1, 3)]
    pd.testing.assert_frame_equal(draws[0].tokens, draws[1].tokens)
    np.testing.assert_allclose(draws[0].hidden, draws[1].hidden, atol=1e-4)
    counts = draws[0].tokens.groupby(["sample", "kind"]).size().unstack()
    assert (counts.max(axis=1) == counts.min(axis=1)).all() and counts.max().max() <= 4
    other = hidden_states(mllm, samples, tokens_per_kind=4, seed=1).tokens
    assert not other["position"].equals(draws[0].tokens["position"])


def test_the_token_table(mllm, samples):
    tokens = hidden_states(mllm, samples, tokens_per_kind=None, equal=False).tokens
    for _, own in tokens.groupby("sample"):
        kinds = own["kind"].tolist()
        for i, row in enumerate(own.itertuples()):
            start = i - row.place
            assert kinds[start : start + row.run] == [row.kind] * row.run
            assert start == 0 or kinds[start - 1] != row.kind
            assert row.count == kinds.count(row.kind) and row.length == len(kinds)
    special = tokens.query("kind == 'special'")["text"]
    assert special.str.startswith("<|").all()


def test_nothing_remains_after_an_error(mllm, samples):
    before = footprints(mllm)

    def fail(layer, h):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), states.residual_stream(mllm, fail):
        mllm.forward(mllm.encode(samples[:1]))
    assert footprints(mllm) == before
    with pytest.raises(ValueError, match="no rows"):
        hidden_states(mllm, [])


def test_all_measures_run_on_a_model(mllm, samples):
    states = hidden_states(mllm, samples * 2, tokens_per_kind=5)
    medium = "image" if "image" in mllm.kinds else "audio"
    few = {"n_boot": 20, "n_null": 20}
    curves, layers = convergence(states, ["text", medium], k=3, **few)
    assert set(curves["layer"]) == set(range(mllm.n_layers + 1)) and len(layers) == 5
    assert set(probing(states, k=3, **few)["kind"]) == set(states.tokens["kind"]) - {
        "text",
        "special",
    }
    assert set(telomeres(states, k=3, **few)["layer"]) == set(range(mllm.n_layers + 1))
    assert np.isfinite(massive_activations(states)["ratio"]).all()
    with pytest.raises(ValueError, match="no sample holds"):
        states.of("text", "smell")


def test_projections_show_the_same_tokens():
    states = probe()
    tsne = project(states, [0], "tsne", seeds=(0, 1), n_tokens=60)
    pca = project(states, [0], "pca", n_tokens=60)
    panels = [*(p for _, p in tsne.groupby("seed")), pca]
    assert all(panel["token"].tolist() == panels[0]["token"].tolist() for panel in panels)
    assert not np.allclose(panels[0][["x", "y"]], panels[1][["x", "y"]])
    pd.testing.assert_frame_equal(project(states, [0], "tsne", seeds=(0, 1), n_tokens=60), tsne)
    assert (pca["kind"] == states.tokens.loc[pca["token"], "kind"].to_numpy()).all()
    with pytest.raises(ValueError, match="tsne or pca"):
        project(states, [0], "umap")
