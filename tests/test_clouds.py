"""Measures of clouds of points: known answers on made clouds."""

from __future__ import annotations

import numpy as np
import pytest
from made import MOST, RNG
from scipy.stats import ortho_group, spearmanr
from sklearn.metrics import pairwise_distances, silhouette_samples

from minerlib import inference
from minerlib.findings import clouds

# --- two clouds -----------------------------------------------------------------------------------


def test_centroid_distance_by_hand():
    """Centroids 1 and 12, variances 1 and 4; a point that is drawn twice counts twice."""
    x = np.array([[0.0], [2], [10], [14]])
    first, second = np.eye(2)[[0, 0, 1, 1]].T
    found = clouds.centroid_distance(x, np.array([first]), np.array([second]))
    assert found == pytest.approx([11 / np.sqrt(2.5)])
    twice = clouds.centroid_distance(x, np.array([first]), np.array([[0, 0, 1, 2]]))
    assert twice == pytest.approx([(38 / 3 - 1) / np.sqrt((1 + 32 / 9) / 2)])


def test_silhouette_is_scikit_learns():
    x, second = RNG(1).standard_normal((40, 3)), RNG(2).random((3, 40)) < 0.4
    found = clouds.silhouette(pairwise_distances(x), second)
    for row, labels in zip(found, second, strict=True):
        np.testing.assert_allclose(row, silhouette_samples(x, labels), atol=1e-10)


def test_neighbours_are_others_nearest_first():
    distance = pairwise_distances(np.array([[0.0], [1.0], [3.0], [7.0]]))
    assert clouds.neighbours(distance, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert clouds.neighbours(distance, 99).shape == (4, 3)


def test_mixing_by_hand():
    """Points 0, 1, 3 and 7 and their nearest other: only 3's is of the other cloud."""
    near = np.array([[1], [0], [1], [2]])
    second = np.array([[0, 0, 1, 1], [0, 1, 1, 1]], bool)
    np.testing.assert_allclose(clouds.mixing(near, second), [[0, 0, 1.5, 0], [1, 3, 0, 0]])


def test_no_fold_straddles_a_sample():
    """Labels that follow the sample, and samples that look alone: nothing carries over."""
    group = np.repeat(np.arange(20), 6)
    look = RNG(0).standard_normal((20, 400))[group]
    label = (RNG(1).random(20) < 0.5)[group]
    right = clouds.classified(look + 0.01 * RNG(2).standard_normal(look.shape), label[None], group)
    assert right.mean() < 0.75  # 1.0 if tokens of a sample were on both sides


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


def test_cka_null_keeps_its_level():
    draws = RNG(5).standard_normal((200, 2, 12, 3))
    found = [clouds.cka(a, b, shuffled=99) for a, b in draws]
    assert sum((null >= v).sum() + 1 <= 5 for v, _, null in found) <= MOST


# --- one cloud reaching for another --------------------------------------------------------------


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


def test_reach_of_a_cloud_smaller_than_k():
    """Fewer than k are all that count; of a cloud without any other point, the furthest does."""
    distance = pairwise_distances(np.array([[0.0], [1.0], [3.0]]))
    other, own = clouds.reach(distance, np.array([[False, False, True]]), 5)
    np.testing.assert_allclose(other, [[3, 2, 2.5]])
    np.testing.assert_allclose(own, [[1, 1, 3]])


def test_crowded_is_beyond_the_binomial():
    """Of 4 neighbours, 3 of 11 points text: chance allows 3 around others, 2 around text."""
    second = np.arange(11) >= 3
    counts = np.array([2, 3, 4, 3, 4, 0, 0, 0, 0, 0, 0])
    near = np.where(np.arange(4) < counts[:, None], 0, 10)
    found = clouds.crowded(near, second[None])
    assert found[0].tolist() == [False, True, True, False, True] + 6 * [False]


def test_elongation_is_variance_over_mean_variance():
    x = RNG(0).standard_normal((20_000, 4)) * [3, 1, 1, 1]
    along = clouds.elongation(x, np.array([[2.0, 0, 0, 0], [0, 5, 0, 0]]))
    np.testing.assert_allclose(along, [3, 1 / 3], rtol=0.05)
    weights = np.vstack([np.arange(len(x)) < 10_000] * 2).astype(float)
    halves = clouds.elongation(x, np.eye(4)[:2], weights)
    np.testing.assert_allclose(halves, clouds.elongation(x[:10_000], np.eye(4)[:2]))


def test_directions_vary_as_the_points_do():
    x = RNG(0).standard_normal((50, 3)) * [3, 1, 0.1] + 7
    found = clouds.directions_like(x, 20_000)
    np.testing.assert_allclose(np.cov(found.T) / 49, np.cov(x.T), atol=0.3)
    assert found.shape == (20_000, 3) and abs(found.mean(0)).max() < 1


# --- points at the ends of a cloud ---------------------------------------------------------------


def test_principal_axis_in_both_shapes():
    x = RNG(0).standard_normal((300, 4)) * [5, 1, 1, 1]
    assert abs(clouds.principal_axis(x)[0]) > 0.99
    few = np.zeros((5, 50))
    few[:, 7] = [0, 1, 2, 3, 4]
    assert abs(clouds.principal_axis(few)[7]) == pytest.approx(1)


def test_extremity_by_hand():
    z = np.array([0.0, 1, 2, 3, -5, 1.5, 9, 2])
    second = np.array([[False] * 4 + [True] * 4])
    np.testing.assert_allclose(clouds.extremity(z, second)[0, 4:], [1, 0, 1, 0.25])


def test_standard_ranks_give_spearman():
    a, b = RNG(0).standard_normal((2, 30))
    a[:5] = 0
    rho = (clouds.standard_ranks(a) * clouds.standard_ranks(b)).mean()
    assert rho == pytest.approx(spearmanr(a, b)[0])


def test_massive_is_the_largest_over_the_median_magnitude():
    x = np.array([[1.0, -8, 2, 2, 3], [0, 0, 0, 0, 5]])
    np.testing.assert_allclose(clouds.massive(x), [4, 5e12])
