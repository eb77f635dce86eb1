"""Grids: one file that says what many runs are, and the workers that train them."""
