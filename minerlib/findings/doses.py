"""Dose and response: at which dose is half of the score lost, and which ability goes first."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from minerlib.deactivation import heads_of
from minerlib.model import MLLM
from minerlib.tasks.evaluation import AVERAGE, KEY, guesses, paired


def half_doses(
    before: pd.DataFrame, after: Mapping[int, pd.DataFrame], lost: float = 0.5, n: int = 2000
) -> pd.DataFrame:
    """Of each benchmark and of their average, the neurons that cost this share above chance.

    after holds answers by the number of neurons silenced. The share lost is taken as growing with
    the dose (its running maximum) and read off between two doses on a log scale. Columns benchmark,
    neurons, low, high: the middle 95 % of resamplings of what rows are about; infinite where no
    dose costs as much, the lowest dose where it already does, NaN where nothing is above chance.
    """
    doses = sorted(after)
    if not doses or doses[0] < 1:
        raise ValueError(f"doses {doses}: a dose is of one neuron or more; `before` is of none")
    columns = [*KEY, "medium", "score", "chance"]
    scores = before.assign(chance=guesses(before))[columns].set_index(KEY)
    for dose in doses:
        scores[dose] = paired(before, after[dose]).set_index(KEY)["score_b"]
    scores = scores.reset_index()
    rng, shares = np.random.default_rng(0), {}
    above: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for name, of in scores.groupby("benchmark", sort=False):
        rows = of.groupby("medium").agg({**dict.fromkeys(["score", "chance", *doses], "sum"),
                                         "row": "size"})  # fmt: skip
        drawn = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), n)
        counts = np.vstack([np.ones(len(rows)), drawn])  # [1 + n, medium]
        means = counts @ rows.to_numpy() / (counts @ rows["row"].to_numpy())[:, None]
        over = means[:, 0] - means[:, 1]
        over = np.where(over > 0, over, np.nan)  # nothing is there to be lost
        above.append(over)
        left.append(means[:, 2:-1] - means[:, [1]])
        shares[str(name)] = 1 - left[-1] / over[:, None]
    if len(above) > 1:
        shares[AVERAGE] = 1 - np.mean(left, axis=0) / np.mean(above, axis=0)[:, None]
    lines = []
    for name, share in shares.items():
        at = _crossing(np.log(doses), np.maximum.accumulate(share, axis=1), lost)
        low, high = np.nanquantile(at[1:], [0.025, 0.975], method="nearest")
        lines.append([name, *np.exp([at[0], low, high])])
    return pd.DataFrame(lines, columns=["benchmark", "neurons", "low", "high"])


def _crossing(x: np.ndarray, y: np.ndarray, level: float) -> np.ndarray:
    """Where each row of y [row, x], which grows, first reaches the level; inf: nowhere."""
    reached = y >= level  # never, of NaN
    i = reached.argmax(1)
    before = np.maximum(i - 1, 0)
    rows = np.arange(len(y))
    low, high = y[rows, before], y[rows, i]
    part = np.where(high > low, (level - low) / np.where(high > low, high - low, 1), 0)
    at = x[before] + np.clip(part, 0, 1) * (x[i] - x[before])
    return np.where(np.isnan(y).any(1), np.nan, np.where(reached.any(1), at, np.inf))


def weights_of(mllm: MLLM) -> tuple[int, int]:
    """How many weights a neuron has (its rows of gate and up, its column of down), and a head (its
    rows of the query and its columns of the output projection; keys and values are shared)."""
    hidden = mllm.text_config.hidden_size
    size = getattr(mllm.text_config, "head_dim", None) or hidden // heads_of(mllm)[1]
    return 3 * hidden, 2 * hidden * size


def random_heads(mllm: MLLM, n: int, draws: int, seed: int = 0) -> list[np.ndarray]:
    """Draws of n attention heads, each bool [layer, head]."""
    found = np.zeros((draws, *heads_of(mllm)), bool)
    if n > found[0].size:
        raise ValueError(f"{n} attention heads are more than the {found[0].size} of {mllm.name}")
    for i, of in enumerate(found.reshape(draws, -1)):
        of[np.random.default_rng((seed, i)).choice(of.size, n, replace=False)] = True
    return list(found)


def as_mlp(like: xr.DataArray, layer: int) -> xr.DataArray:
    """All neurons of a layer: silencing them takes its MLP away."""
    found = xr.zeros_like(like.isel(modality=[0])).astype(bool)
    found[0, layer] = True
    return found
