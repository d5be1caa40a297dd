"""minerlib: find, silence and study modality-specific neurons in multimodal language models.

The modules in the order in which data passes through them: model, benchmarks, separation,
scoring, aggregation, selection, deactivation, evaluation, artifacts, plots.
"""

from minerlib.aggregation import aggregate
from minerlib.artifacts import Run
from minerlib.benchmarks import benchmark
from minerlib.deactivation import deactivate, export
from minerlib.model import MLLM, load
from minerlib.scoring import score
from minerlib.selection import PAPER_WEIGHTS, matched_random, select
from minerlib.separation import separate

__all__ = [
    "MLLM",
    "PAPER_WEIGHTS",
    "Run",
    "aggregate",
    "benchmark",
    "deactivate",
    "export",
    "load",
    "matched_random",
    "score",
    "select",
    "separate",
]
