"""Benchmarks of the whole network."""
