"""Benchmark of the data stream against other readers."""
