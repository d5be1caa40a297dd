"""Measures of clouds of points: pure functions on arrays, each with a known answer.

Measures of two clouds take `second`, bool [r, n]: which of the n points belong to the second
cloud, once per labelling (the observed one and its shuffles), so that a null costs one call.
"""

import numpy as np
from scipy.stats import binom, rankdata
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import NearestNeighbors


def centroid_distance(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distance of two clouds' centroids over the root mean square distance from them, [r].

    x [n, hidden]; first and second are the clouds' weights [r, n], 0 outside the cloud.
    """
    x, w = x - x.mean(0), np.stack([first, second])
    w = w / w.sum(-1, keepdims=True)
    centres = w @ x
    variance = (w @ (x**2).sum(1) - (centres**2).sum(-1)).mean(0)
    return np.linalg.norm(centres[0] - centres[1], axis=1) / np.sqrt(np.maximum(variance, 1e-12))


def silhouette(distance: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Silhouette of each point under each labelling, [r, n], in -1..1; 0 is mixed (Rousseeuw)."""
    labels = second.astype(distance.dtype)
    n, to = labels.sum(1, keepdims=True), labels @ distance
    rest = distance.sum(0) - to
    own = np.where(second, to / (n - 1).clip(1), rest / (second.shape[1] - n - 1).clip(1))
    other = np.where(second, rest / (second.shape[1] - n), to / n)
    return (other - own) / np.maximum(np.maximum(own, other), 1e-12)


def neighbours(distance: np.ndarray, k: int) -> np.ndarray:
    """Indices of each point's k nearest others, [n, k], nearest first."""
    k = min(k, len(distance) - 1)
    search = NearestNeighbors(n_neighbors=k, metric="precomputed").fit(distance)
    return search.kneighbors(return_distance=False)


def mixing(near: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of each point's neighbours [n, k] in the other cloud over chance: 0 apart, 1 mixed."""
    share = np.stack([(row[near] != row[:, None]).mean(1) for row in second])
    n, size = second.shape[1], second.sum(1, keepdims=True)
    return share / (np.where(second, n - size, size) / (n - 1))


def classified(x: np.ndarray, second: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether a linear classifier of the cloud is right about each held-out point, bool [r, n].

    Least squares with a ridge of a thousandth of the mean variance; no group straddles two folds.
    """
    x, target = x.astype(float), np.where(second, 1.0, -1.0).T
    right = np.zeros(second.shape, bool)
    folds = min(5, len(np.unique(groups)))
    for train, test in GroupKFold(folds).split(x, groups=groups):
        penalty = 1e-3 * len(train) * x[train].var(0).mean() + 1e-12
        model = Ridge(penalty, solver="cholesky").fit(x[train], target[train])
        right[:, test] = ((model.predict(x[test]).reshape(len(test), -1) > 0) == second.T[test]).T
    return right


def cka(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None, shuffled: int = 0, seed=0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Debiased linear CKA of two views [sample, hidden] of the same samples; 0 is unrelated.

    Returns the value, its bootstrap values under weights [r, sample] and its null under
    `shuffled` random pairings. No sample is compared with itself, drawn twice or not: the Gram
    matrices' diagonal is 0 (the unbiased HSIC of Song et al. 2012).
    """
    k, m = _centred_gram(a), _centred_gram(b)
    weights = np.ones((1, len(k))) if weights is None else np.vstack([np.ones(len(k)), weights])
    km, kk, mm = (((weights @ p) * weights).sum(1) for p in (k * m, k * k, m * m))
    values = km / np.sqrt(np.maximum(kk * mm, 1e-24))
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(len(k)) for _ in range(shuffled))
    null = np.array([(k * m[np.ix_(o, o)]).sum() for o in orders]) / np.sqrt(kk[0] * mm[0] + 1e-24)
    return values[0], values[1:], null


def _centred_gram(x: np.ndarray) -> np.ndarray:
    if (n := len(x)) < 4:
        raise ValueError(f"{n} samples hold both kinds; CKA needs at least 4: raise the limit")
    x = x - x.mean(0)
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    row = gram.sum(0) / (n - 2)
    gram += gram.sum() / ((n - 1) * (n - 2)) - row - row[:, None]
    np.fill_diagonal(gram, 0)
    return gram


def reach(
    distance: np.ndarray, second: np.ndarray, k: int = 5, near: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean distance of each point to its k nearest of the other cloud and of its own, [r, n] each.

    near limits the search to each point's nearest others, from `neighbours` (default all), which
    suffice where clouds are mixed; a cloud that is not among them is put at the furthest of them.
    """
    near = neighbours(distance, len(distance)) if near is None else near
    candidates = np.take_along_axis(distance, near, 1)
    other, own = np.empty((2, *second.shape))
    for r, row in enumerate(second):
        same = row[near] == row[:, None]
        for out, chosen in ((other, ~same), (own, same)):
            first = chosen & (chosen.cumsum(1, dtype=np.int32) <= k)
            met = first.sum(1)
            total = np.einsum("nk,nk->n", candidates, first, dtype=float)
            out[r] = np.where(met, total / met.clip(1), candidates[:, -1])
    return other, own


def crowded(near: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whose neighbours are of the first cloud more often than in 95 % of random draws, [r, n]."""
    n, k = second.shape[1], near.shape[1]
    found = np.stack([(~row[near]).sum(1) for row in second])
    first = n - second.sum(1, keepdims=True)
    most = [binom.ppf(0.95, k, (first - self_) / (n - 1)) for self_ in (0, 1)]
    return found > np.where(second, *most)  # a point is not its own neighbour


def elongation(x: np.ndarray, directions: np.ndarray, weights=None) -> np.ndarray:
    """Variance of x [n, hidden] (weights [r, n]) along directions [r, hidden] over its mean [r]."""
    x = x - x.mean(0)
    weights = np.ones((1, len(x))) if weights is None else weights
    weights = weights / weights.sum(1, keepdims=True)
    along = directions / np.linalg.norm(directions, axis=1, keepdims=True) @ x.T
    variance = (weights * along**2).sum(1) - (weights * along).sum(1) ** 2
    total = weights @ (x**2).sum(1) - ((weights @ x) ** 2).sum(1)
    return variance / np.maximum(total / x.shape[1], 1e-24)


def directions_like(x: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Random directions with the covariance of the points, [n, hidden]."""
    return np.random.default_rng(seed).standard_normal((n, len(x))) @ (x - x.mean(0))


def principal_axis(x: np.ndarray, weights=None, span: int = 32) -> np.ndarray:
    """The unit direction of greatest variance of the points [n, hidden]; its sign is arbitrary.

    With weights [r, n] that of the points so weighted, [r, hidden], among all combinations of the
    first `span` principal directions.
    """
    x = x - x.mean(0)
    few = len(x) < x.shape[1]  # the smaller of the two Gram matrices
    axes = np.linalg.eigh(x @ x.T if few else x.T @ x)[1][:, : -span - 1 : -1]
    axes = x.T @ axes if few else axes
    axes = axes / np.maximum(np.linalg.norm(axes, axis=0), 1e-24)
    if weights is None:
        return axes[:, 0]
    y, w = x @ axes, weights / weights.sum(1, keepdims=True)
    centre, squares = w @ y, y[:, :, None] * y[:, None]
    moments = np.tensordot(w, squares, 1) - centre[:, :, None] * centre[:, None]
    return np.linalg.eigh(moments)[1][..., -1] @ axes.T


def extremity(z: np.ndarray, second: np.ndarray, weights=None) -> np.ndarray:
    """How far out each z [n] lies among the first cloud's, [r, n]: 0 at the median, 1 at an end.

    weights [r, n] say how often each point of the first cloud counts.
    """
    order = np.argsort(z, kind="stable")
    new = np.append(True, np.diff(z[order]) > 0)  # else tied with the one before
    edges, at = np.append(np.flatnonzero(new), len(z)), new.cumsum()
    counts = (~second if weights is None else ~second * weights)[:, order]
    first = np.cumsum(np.pad(counts, ((0, 0), (1, 0))), axis=1)
    out = np.empty(second.shape)
    out[:, order] = np.abs((first[:, edges[at - 1]] + first[:, edges[at]]) / first[:, -1:] - 1)
    return out


def standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (mean rank for ties) with mean 0 and mean square 1: products average to Spearman's."""
    ranks = rankdata(values)
    ranks -= ranks.mean()
    return ranks / max(np.sqrt((ranks**2).mean()), 1e-24)


def massive(x: np.ndarray) -> np.ndarray:
    """Largest over median magnitude of each point's coordinates, [...] of x [..., hidden]."""
    size = np.abs(x)
    return size.max(-1) / np.maximum(np.median(size, axis=-1), 1e-12)
