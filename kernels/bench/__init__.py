"""Benchmarks and builds of the kernels."""
