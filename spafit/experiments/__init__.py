"""Experiments on top of training: what to compare, what to choose, where to put N1 and N2."""
