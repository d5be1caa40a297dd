"""How many samples are enough: parts that share no row, agreement with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from minerlib.findings import growth as room
from minerlib.findings.growth import growth, sizes_up_to


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(96, [4, 8, 16, 32, 48]), (12, [4, 6]), (16, [4, 8]), (1, [1]), (500, [4, 8, 16, 32, 250])],
)  # fmt: skip
def test_sizes_end_at_half_of_the_rows(limit, sizes):
    assert sizes_up_to(limit) == sizes


def test_two_disjoint_parts_of_each_size(monkeypatch):
    scored = []

    def score(mllm, rows, batch_size):
        scored.append(rows)
        return rows

    def select(rows, **choice):
        """Neurons 0 and 1 for a first part, 1 and 2 for a second; no video in parts of one row."""
        first = rows[0][0] == 0
        mask = np.zeros((2, 1, 4), bool)
        mask[:, 0, [0, 1] if first else [1, 2]] = True
        found = xr.DataArray(mask, {"modality": ["text", "video"]}, ("modality", "layer", "neuron"))
        return found if len(rows[0]) > 1 else found.sel(modality=["text"])

    for name, fake in {"score": score, "select": select, "aggregate": list}.items():
        monkeypatch.setattr(room, name, fake)
    mining = {"a": list(range(8)), "b": list(range(8))}
    whole = select([[0, 1]])
    table = growth(None, mining, whole, [1, 4], {}, batch_size=3)
    assert scored[:4] == [[0], [0], [4], [4]] and scored[-1] == [4, 5, 6, 7]
    assert table.values.tolist() == [
        [1, "text", 1 / 3, 1.0], [4, "text", 1 / 3, 1.0], [4, "video", 1 / 3, 1.0],
    ]  # fmt: skip
