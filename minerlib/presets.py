"""Models that people run, by a short name: their parameters, published figures, and what they take.

PRESETS["smolvlm-256m"].parameters      # what `make workbook PRESET=smolvlm-256m` sets
published("Qwen2-VL-7B-Instruct")       # {"text_vqa": 0.843}
"""

from importlib.resources import files
from typing import Any

import pandas as pd
import pydantic
import yaml

GPU, CORES = 100e12, 0.1e12
"""Operations a second: a quarter of what a large GPU can do in bfloat16, two cores in float32."""


class Preset(pydantic.BaseModel):
    """One model of presets.yml, which says what each field is."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    model: str
    family: str
    billions: tuple[float, float]
    neurons: int
    tokens: int
    tower: tuple[float, int]
    parameters: dict[str, Any]
    published: dict[str, float] = {}
    source: str = ""

    @property
    def gigabytes(self) -> tuple[float, float]:
        """Of the weights, and with what scoring adds: three activations of a layer at a time."""
        size = 4 if self.parameters["dtype"] == "float32" else 2
        batch = self.parameters.get("batch_size", 32) * self.tokens * self.neurons * size
        weights = self.billions[0] * size
        return weights, weights + 3 * batch / 1e9

    def minutes(self, rows: int, rate: float = GPU) -> float:
        """To score so many rows, at two operations a token and parameter."""
        passed = self.tokens * self.billions[1] + self.tower[0] * self.tower[1]
        return rows * 2e9 * passed / rate / 60


_TEXT = files("minerlib").joinpath("presets.yml").read_text()
PRESETS = {name: Preset(**entry) for name, entry in yaml.safe_load(_TEXT).items()}


def published(label: str) -> dict[str, float]:
    """The published corpus figures of a model, by benchmark, known by the last part of its name."""
    known = (p.published for p in PRESETS.values() if p.model.endswith(f"/{label}"))
    return next(known, {})


def table() -> pd.DataFrame:
    """What is known of each before it is run, one row per preset."""
    lines = []
    for name, preset in PRESETS.items():
        weights, memory = preset.gigabytes
        figures = ", ".join(f"{of} {value:.3f}" for of, value in preset.published.items())
        lines.append(
            {
                "preset": name,
                "model": preset.model,
                "test id": preset.family,
                "parameters": ", ".join(f"{k}={v}" for k, v in preset.parameters.items()),
                "weights, GB": f"{weights:.1f}",
                "memory from, GB": f"{memory:.1f}",
                "1000 rows: minutes on a GPU": f"{preset.minutes(1000):.2g}",
                "hours on two cores": f"{preset.minutes(1000, CORES) / 60:.2g}",
                "published": figures + (f" ({preset.source})" if figures else ""),
            }
        )
    return pd.DataFrame(lines)
