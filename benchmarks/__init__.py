"""Benchmarks, one script each. Run from a checkout: ``python -m benchmarks.NAME``."""
