"""Benchmarks: the asv suite (`bench_*.py`) and scripts, run as ``python -m benchmarks.<name>``."""
