"""Benchmarks, one script each. Run from a checkout: ``python -m benchmarks.NAME``.

``harness`` has what all of them measure with, ``contenders`` what is measured, ``plans`` grids and
plans that were run for the record, and ``results`` what came of it.
"""
