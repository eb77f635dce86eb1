"""``fit`` inside a caller's ``no_grad``, ``inference_mode`` or autocast.

Oracle: the same run outside of it, bit for bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import SmallRun, trained

from spafit.errors import PlanError
from spafit.training import plain
from spafit.training.fit import Result

MODES = ["no_grad", "inference_mode", "autocast"]


def mode(name: str) -> AbstractContextManager[object]:
    if name == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    context: AbstractContextManager[object] = getattr(torch, name)()
    return context


def bits(result: Result) -> tuple[object, ...]:
    return result.losses, result.history, result.best_step


@pytest.fixture(scope="module", params=[False, True], ids=["computed", "kept"])
def outside(
    request: pytest.FixtureRequest, small: SmallRun
) -> tuple[dict[str, Any], Result, dict[str, torch.Tensor]]:
    """Train outside of all modes, with hidden states kept or not: settings, result and values."""
    kept = request.param
    settings = {"dropout_in_group_1": not kept, "cache_prefix": "memory" if kept else "off"}
    model = small.model()
    return settings, small.fit(model, epochs=2, **settings), trained(model)


class TestFit:
    @pytest.mark.parametrize("name", MODES)
    def test_computes_as_it_does_outside(
        self,
        small: SmallRun,
        outside: tuple[dict[str, Any], Result, dict[str, torch.Tensor]],
        name: str,
    ) -> None:
        settings, expected, values = outside
        inside = small.model()
        with mode(name):
            found = small.fit(inside, epochs=2, **settings)
            assert torch.is_grad_enabled() == (name == "autocast")
            assert torch.is_inference_mode_enabled() == (name == "inference_mode")
            assert torch.is_autocast_enabled("cpu") == (name == "autocast")
        assert bits(found) == bits(expected)
        assert all(torch.equal(value, values[key]) for key, value in trained(inside).items())

    def test_the_precision_asked_for_inside_another_autocast(self, small: SmallRun) -> None:
        expected = small.fit(epochs=1, precision="bf16")
        with torch.autocast("cpu", torch.float16):
            found = small.fit(epochs=1, precision="bf16")
        assert bits(found) == bits(expected)
        assert bits(found) != bits(small.fit(epochs=1))

    @pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
    def test_so_does_the_plain_form(self, small: SmallRun, name: str) -> None:
        config = small.settings(epochs=1)
        data = (small.tokenizer, small.train, small.dev, config)
        expected = plain.fit(small.model(), *data)
        inside = small.model()
        with mode(name):
            assert plain.fit(inside, *data) == expected

    def test_switched_off_for_good(self, small: SmallRun, tmp_path: Path) -> None:
        """As by a call at the top of a notebook; with a run folder too."""
        expected = small.fit(epochs=1)
        model = small.model()
        torch.set_grad_enabled(False)
        try:
            found = small.fit(model, epochs=1, out=tmp_path)
            assert not torch.is_grad_enabled()
        finally:
            torch.set_grad_enabled(True)
        assert bits(found) == bits(expected)

    def test_a_model_made_in_inference_mode_is_refused_by_name(self, small: SmallRun) -> None:
        with torch.inference_mode():
            model = small.model()
        with pytest.raises(PlanError, match=r"^bert\.\S+ was made under torch\.inference_mode"):
            small.fit(model)
