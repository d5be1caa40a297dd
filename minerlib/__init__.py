"""minerlib: find, silence and study modality-specific neurons in multimodal language models.

The modules in the order in which data passes through them: model, benchmarks, separation,
scoring, aggregation, selection, deactivation, metrics, evaluation; clouds, geometry, semantics,
flow and last_token measure hidden states and attention; artifacts keeps results, plots draws
them, and workbook is what the notebooks open with.
"""

from minerlib.aggregation import aggregate
from minerlib.artifacts import Run
from minerlib.deactivation import deactivate, export
from minerlib.model import MLLM, load
from minerlib.scoring import score
from minerlib.selection import PAPER_WEIGHTS, matched_random, select
from minerlib.separation import separate
from minerlib.tasks import benchmark
from minerlib.tasks.evaluation import compare, evaluate, prepare, summarise
from minerlib.workbook import Workbook

__all__ = [
    "MLLM",
    "PAPER_WEIGHTS",
    "Run",
    "Workbook",
    "aggregate",
    "benchmark",
    "compare",
    "deactivate",
    "evaluate",
    "export",
    "load",
    "matched_random",
    "prepare",
    "score",
    "select",
    "separate",
    "summarise",
]
