"""What `hf-mim benchmark` measures on this machine: one file each, with a dataclass `Benchmark` of its options."""

import importlib

BENCHMARKS = ("step", "data", "evaluate")


def load_benchmark(name: str) -> type:
    """The dataclass of a benchmark. An instance is called without arguments, prints a table and returns the numbers."""
    return importlib.import_module(f"hf_mim.benchmark.{name}").Benchmark
