"""What models are asked: benchmarks, their media and rows, answers and official scores."""

from minerlib.tasks.rows import Benchmark, benchmark
from minerlib.tasks.spec import REGISTRY, Join, Repo, Sample, Spec

__all__ = ["REGISTRY", "Benchmark", "Join", "Repo", "Sample", "Spec", "benchmark"]
