"""Measurements; one script a thing. Run from a checkout: ``python -m benchmarks.NAME``."""
