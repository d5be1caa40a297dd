"""What models are asked: benchmarks, their media and rows, answers and official scores."""

from minerlib.tasks.metrics import ANSWER_METRICS, Metric
from minerlib.tasks.rows import Benchmark, benchmark
from minerlib.tasks.spec import REGISTRY, Join, Repo, Sample, Spec

__all__ = [
    "ANSWER_METRICS", "REGISTRY", "Benchmark", "Join", "Metric", "Repo", "Sample", "Spec",
    "benchmark",
]  # fmt: skip
