"""Exercise 3: count what a SPAFIT plan trains, without building a model."""


def trained(D: int, F: int, L: int, r: int, C: int, N1: int, N2: int, kind: str) -> int:
    """Return how many numbers SPAFIT-[N1]-[N2]-[kind] trains, the head's included.

    Layers are counted from 0, and each end belongs to its group: group 1 is layers 0 to N1, group 2
    layers N1 + 1 to N2, and group 3 the rest.

    Parameters
    ----------
    D, F, L : int
        Hidden size, intermediate size, number of layers.
    r, C : int
        Rank of the LoRA matrices; number of labels.
    N1, N2 : int
        The last layers of groups 1 and 2.
    kind : {"I", "II"}
        Whether LoRA is on query, key and value alone, or on attention.output.dense too.
    """
    raise NotImplementedError("group 2 layer by layer, group 3 layer by layer, and the head")
