"""Workload W on one GPU: this serving stack beside transformers' `generate`. See benchmarks/GPU.md."""
