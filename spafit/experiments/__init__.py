"""Experiments of many runs: grids of methods, tasks and seeds."""
