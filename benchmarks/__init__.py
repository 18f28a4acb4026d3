"""Benchmarks and the reference models that they measure."""
