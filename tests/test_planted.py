"""Planted neurons: neutral, needed by one kind of token alone, and as loud as one likes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import ROOT, footprints

import minerlib as ml
from minerlib import planted
from minerlib.deactivation import deactivate
from minerlib.scoring import METRICS
from minerlib.separation import separate
from minerlib.written import loudness

EACH = 2


@pytest.fixture
def medium(exact_mllm) -> str:
    return "image" if "image" in exact_mllm.kinds else "audio"


@pytest.fixture
def sites(exact_mllm, samples_of, medium) -> pd.DataFrame:
    written = loudness(exact_mllm, [samples_of])
    return planted.sites(written, ["text", medium], [0, 2], EACH, seed=0)


@pytest.fixture
def samples_of(exact_mllm, request):
    from conftest import samples_for

    return samples_for(exact_mllm)


def states(mllm, batch) -> np.ndarray:
    """The residual stream [depth, token, hidden] of the first prompt."""
    seen = []
    with torch.inference_mode(), mllm.tap(hidden=lambda d, h: seen.append(h[0].double().numpy())):
        mllm.forward(batch)
    return np.stack(seen)


def test_sites_are_the_quietest_and_as_many_of_each_role(exact_mllm, samples_of, medium, sites):
    assert (sites.groupby(["modality", "role"]).size() == EACH).all() and len(sites) == 2 * 3 * EACH
    assert set(sites["layer"]) == {0, 2} and not sites.duplicated(["layer", "neuron"]).any()
    written = loudness(exact_mllm, [samples_of]).sel(statistic="max", modality="prompt").values
    for layer, of in sites.groupby("layer"):
        assert set(of["neuron"]) == set(np.argsort(written[layer])[: len(of)])


@pytest.mark.fault("a mistake is taken for what cannot be done")
def test_where_no_neurons_can_be_planted(exact_mllm, sites, monkeypatch):
    """An error of its own: notebook 14 goes on without them, and at no other error."""
    with pytest.raises(planted.NotPlantable, match="loudness 0: a planted neuron must fire"):
        planted.plant(exact_mllm, sites, np.zeros(len(sites)), 3.0, seed=1)
    monkeypatch.setattr(
        exact_mllm, "family", SimpleNamespace(mlp=lambda layer: torch.nn.Linear(1, 1))
    )
    with pytest.raises(planted.NotPlantable, match="planted in an MLP with an up_proj of its own"):
        planted.plant(exact_mllm, sites, np.ones(len(sites)), 3.0, seed=1)
    monkeypatch.setattr(exact_mllm, "model", SimpleNamespace(dtype=torch.bfloat16))
    with pytest.raises(planted.NotPlantable, match="bfloat16: neurons are planted in float32 only"):
        planted.plant(exact_mllm, sites, np.ones(len(sites)), 3.0, seed=1)


def test_the_intact_model_computes_what_it_did_however_loud(exact_mllm, samples_of, sites):
    before, batch = footprints(exact_mllm), exact_mllm.encode(samples_of)
    quiet = planted.plant(exact_mllm, sites, np.full(len(sites), 0.01), 3.0, seed=1)
    loud = planted.plant(exact_mllm, sites, np.full(len(sites), 50.0), 3.0, seed=1)
    none = planted.plant(exact_mllm, sites, np.full(len(sites), 1.0), 0.0, seed=1)
    with torch.inference_mode():
        a, b, c = (m.forward(batch).logits for m in (quiet, loud, none))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-8)
    assert footprints(exact_mllm) == before


@pytest.mark.parametrize("role", planted.ROLES)
def test_silencing_leaves_the_direction_at_the_tokens_that_need_it(
    exact_mllm, samples_of, medium, role
):
    sites = planted.sites(loudness(exact_mllm, [samples_of]), ["text", medium], [0], EACH, seed=0)
    batch = exact_mllm.encode(samples_of[1:2])
    mllm = planted.plant(exact_mllm, sites, np.full(len(sites), 2.0), 3.0, seed=1)
    of = sites[(sites["modality"] == medium) & (sites["role"] == role)][:1]
    mask = planted.mask(of, (mllm.n_layers, mllm.n_neurons))
    intact = states(mllm, batch)
    with deactivate(mllm, mask[None]):
        change = states(mllm, batch)[1] - intact[1]
    there = separate(mllm, batch)["prompt" if role == "everywhere" else medium][0].numpy()
    size = np.linalg.norm(change, axis=1)
    if role == "idle":
        assert size.max() < 1e-9
        return
    assert (size[there] > 1e-3).all() and (size[~there] < 1e-9).all()
    ways = change[there] / size[there][:, None]
    np.testing.assert_allclose(ways, ways[:1].repeat(len(ways), 0), atol=1e-6)  # one direction
    length = np.concatenate([m for m in lengths(mllm, batch)])[there]
    ratio = size[there] / length
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert ratio[0] == pytest.approx(3.0)


def lengths(mllm, batch):
    """The length of what enters layer 0's MLP, [token]."""
    seen = []
    mlp = mllm.family.mlp(mllm.layers[0])
    handle = mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0][0].norm(dim=-1).numpy()))
    with torch.inference_mode():
        mllm.forward(batch)
    handle.remove()
    return seen


def test_the_model_generates(exact_mllm, samples_of, sites):
    mllm = planted.plant(exact_mllm, sites, np.full(len(sites), 1.0), 1.0, seed=0)
    none = planted.plant(exact_mllm, sites, np.full(len(sites), 1.0), 0.0, seed=0)
    batch = exact_mllm.encode(samples_of[:2])
    assert mllm.generate(batch, 4) == none.generate(batch, 4)


def test_found_by_hand():
    sites = pd.DataFrame(
        {
            "modality": ["image", "image", "image", "text", "text", "text"],
            "role": ["needed", "needed", "idle", "needed", "everywhere", "idle"],
            "layer": [0, 1, 0, 1, 1, 0],
            "neuron": [0, 2, 1, 0, 3, 3],
        }
    )
    scores = np.array([[0.9, 1.0, 0.1, 0.0], [0.2, 0.3, 0.5, 0.4]])
    # Needed: 0.9 (second) and 0.5 (third) of eight; the idle one lies above both.
    assert planted.found(scores, sites, "image") == pytest.approx(
        {"recall": 0.5, "idle": 0.5, "auc": 0.0, "percentile": 1 - 1.5 / 8}
    )
    found = planted.found(scores, sites.assign(modality="image"), "image")
    assert (found["recall"], found["idle"], found["everywhere"]) == (2 / 3, 1 / 3, 0)


def test_loudness_is_a_quantile_of_the_layers_maxima_on_the_modality():
    values = np.zeros((2, 2, 2, 5), np.float32)  # statistic, modality, layer, neuron
    values[1, 1, 0] = [4, 0, 1, 3, 2]
    values[1, 0, 1] = [10, 30, 20, 0, 40]
    axes = {"statistic": ["mean", "max"], "modality": ["text", "image"], "layer": [0, 1]}
    activation = xr.DataArray(values, axes, (*axes, "neuron"))
    sites = pd.DataFrame({"modality": ["image", "text"], "layer": [0, 1], "neuron": [3, 3]})
    assert planted.as_loud(activation, sites, 0.75).tolist() == [3, 30]


@pytest.fixture
def both(exact_mllm, medium):
    """Sites of text and the medium, loud neurons, rows with the medium and rows of text."""
    names = {"image": "text_vqa", "audio": "libri"}[medium], "mmlu"
    rows = [ml.benchmark(name, str(ROOT / "data/benchmarks"))[:2] for name in names]
    sites = planted.sites(loudness(exact_mllm, rows), ["text", medium], [0, 1], EACH, seed=0)
    return sites, np.full(len(sites), 50.0), rows


@pytest.mark.slow
def test_what_is_needed_costs_and_nothing_else_does(exact_mllm, both, medium):
    sites, loud, rows = both
    name = rows[0].name
    table = planted.recovered(exact_mllm, rows, rows, sites, loud, strength=30.0, batch_size=4)
    own = table[table["by"] == "planted"].set_index("modality")
    assert own["recall"].tolist() == [1, 1] and abs(own.loc[medium, name]) > 1e-3
    assert abs(own.loc[medium, "mmlu"]) < 1e-9  # rows without the medium
    assert (own.loc["text", [name, "mmlu"]].abs() > 1e-3).all()
    alone = table[table["by"].isin(METRICS)]
    assert len(alone) == 2 * len(METRICS) and alone["auc"].between(0, 1).all()
    shares = table[["recall", "idle", "everywhere"]]
    assert (shares.fillna(0) >= 0).all(axis=None) and (shares.fillna(0) <= 1).all(axis=None)
    assert set(table["by"]) >= {"adaptive", "LA_MU"}


@pytest.mark.slow
def test_scores_as_it_is_intact_and_without_each_role(exact_mllm, both, medium):
    sites, loud, rows = both
    table = planted.necessity(exact_mllm, rows, sites, loud, strength=30.0, max_new_tokens=2)
    assert list(table) == ["silenced", "modality", "benchmark", "score", "logprob"]
    conditions = table.groupby(["silenced", "modality"], sort=False).size()
    assert (conditions == 2).all() and len(conditions) == 2 + 3 * 2
    rows, intact = ["silenced", "modality"], ("intact", "")
    for measure in ("score", "logprob"):
        wide = table.pivot(index=rows, columns="benchmark", values=measure)
        for same in [("as it is", ""), ("idle", "text"), ("idle", medium)]:
            apart = np.abs(wide.loc[same] - wide.loc[intact]).max()
            assert apart == 0 if measure == "score" else apart < 0.02
