"""Search N1, N2 and the type of a SPAFIT plan under a budget, beside random choice."""
