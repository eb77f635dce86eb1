"""Solution 3."""


def trained(D: int, F: int, L: int, r: int, C: int, N1: int, N2: int, kind: str) -> int:
    """Return how many numbers SPAFIT-[N1]-[N2]-[kind] trains, the head's included."""
    # All eight biases: query, key, value, two of attention.output, intermediate, two of output.
    group_2 = 7 * D + F
    # A (r, D) and B (D, r) for each map, and the three biases of intermediate and output.
    maps = {"I": 3, "II": 4}[kind]
    group_3 = maps * 2 * D * r + F + 2 * D
    head = C * D + C
    return (N2 - N1) * group_2 + (L - 1 - N2) * group_3 + head
