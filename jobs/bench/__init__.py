"""Benchmarks of training and serving: their cost compared with the network alone, and their scaling."""
