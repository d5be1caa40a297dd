"""minerlib: find, silence and study modality-specific neurons in multimodal language models.

The rooms, each knowing only those before it: processes (who does what); families, memory, model and
tap (a model and the way in); artifacts (what was computed, never stale); separation, scoring,
aggregation, selection (the four stages), deactivation; inference (intervals, nulls, verdicts);
tasks (what models are asked); findings (a room for each); plots; and workbook, which the notebooks
open with.
"""

from minerlib.aggregation import aggregate
from minerlib.artifacts import Run
from minerlib.deactivation import deactivate
from minerlib.exporting import export
from minerlib.model import MLLM, load
from minerlib.scoring import score
from minerlib.selection import PAPER_WEIGHTS, matched_random, select
from minerlib.separation import separate
from minerlib.sharing import load_neurons, push_neurons, save_neurons
from minerlib.tasks import benchmark
from minerlib.tasks.evaluation import compare, evaluate, prepare, summarise
from minerlib.tasks.rows import split
from minerlib.workbook import Workbook

__all__ = [
    "MLLM", "PAPER_WEIGHTS", "Run", "Workbook", "aggregate", "benchmark", "compare", "deactivate",
    "evaluate", "export", "load", "load_neurons", "matched_random", "prepare", "push_neurons",
    "save_neurons", "score", "select", "separate", "split", "summarise",
]  # fmt: skip
