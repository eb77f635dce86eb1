"""Runs that are stopped and resumed on a CUDA device.

Run by hand: ``pytest -m gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interruptions import differences, everything, interrupted
from support.small_runs import SmallRun, read_log

from spafit.training import step as training_step
from spafit.training.optimisation import loss_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def in_a_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the forms that sum in a fixed order, and choose them anew for both runs."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class TestBitForBit:
    """Oracle: the same run, uninterrupted."""

    @pytest.mark.parametrize("step", ["eager", "captured"])
    @pytest.mark.parametrize("precision", ["float32", "auto"])
    @pytest.mark.parametrize("cache", ["off", "memory"])
    def test_taken_up_again(
        self, small: SmallRun, tmp_path: Path, step: str, precision: str, cache: str
    ) -> None:
        settings: dict[str, Any] = {
            "device": "cuda",
            "step": step,
            "precision": precision,
            "cache_prefix": cache,
            "dropout_in_group_1": cache == "off",
            "accumulation": 2,
            "eval_every": 3,
            "save_every": 2,
        }
        small.fit(out=tmp_path / "whole", **settings)
        interrupted(small, tmp_path / "parts", [2, 7, 8, 13], **settings)
        assert not differences(everything(tmp_path / "whole"), everything(tmp_path / "parts"))


class TestOutOfMemory:
    """Oracle: the run that was asked to compute in two parts from the start."""

    @pytest.mark.parametrize("step", ["eager", "captured"])
    def test_of_the_card(
        self, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        settings: dict[str, Any] = {"device": "cuda", "step": step, "precision": "float32"}
        expected = small.fit(accumulation=2, **settings)

        def greedy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if len(targets) > 3:  # more than any card has
                torch.empty(2**45, device=logits.device)
            return loss_function(logits, targets)

        monkeypatch.setattr(training_step, "loss_function", greedy)
        found = small.fit(out=tmp_path, **settings)
        assert max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)) < 1e-5
        notes = [row["note"] for row in read_log(tmp_path, "note")]
        assert sum("not enough memory for 6 examples" in note for note in notes) == 1
