"""Made tokens with known answers, for the tests of the findings' measures."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import binom

from minerlib.findings.states import States

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
    return States(np.asarray(hidden, np.float32), tokens.assign(id=0, text="", **columns))


def table_of(per_kind: dict[str, int], samples: int) -> tuple[list[str], np.ndarray]:
    """Kinds and samples of tokens, sample after sample, each with so many tokens per kind."""
    kinds = [kind for kind, n in per_kind.items() for _ in range(n)]
    return kinds * samples, np.repeat(np.arange(samples), len(kinds))


def value(table: pd.DataFrame, measure: str, layer: int = 0) -> pd.Series:
    found = table[(table["measure"] == measure) & (table["layer"] == layer)]
    assert len(found) == 1
    return found.iloc[0]
