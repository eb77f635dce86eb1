"""Sweeps over many cases, of which the default run takes some."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(every: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Return all cases of a sweep for ``parametrize``: those not chosen are marked ``full``.

    Parameters
    ----------
    every : iterable
        The cases: tuples of values, or single values.
    chosen : collection
        Those of the default run.
    """
    cases = list(every)
    assert all(case in cases for case in chosen), "a chosen case is not in the sweep"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in chosen else pytest.mark.full,
        )
        for case in cases
    ]
