"""Matrix products by either library: the same numbers, and a choice that is never a guess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from spafit.errors import ConfigError
from spafit.kernels import products
from spafit.kernels.products import LIBRARY_VARIABLE, library, product

# (N, in, out): around the size from which oneDNN is used, and of one row, column or inner.
SIZES = [(300, 170, 130), (123, 128, 127), (126, 128, 129), (1, 2000, 1500), (9, 1, 7), (0, 5, 3)]

# One process asks for a library that there is not, and after that for each of the two.
PROGRAM = """
import json, os, sys, torch
from spafit.kernels.products import LIBRARY_VARIABLE, library, product
product(torch.ones(3, 7), torch.ones(5, 7), None)
try:
    product(torch.ones(300, 170), torch.ones(130, 170), None)
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
calls, linear = [], torch.ops.mkldnn._linear_pointwise
torch.ops.mkldnn._linear_pointwise = lambda *given: calls.append(1) or linear(*given)
for asked in sys.argv[2:]:
    os.environ[LIBRARY_VARIABLE] = asked
    library.cache_clear()
    calls.clear()
    worst = []
    for n, k, m in json.loads(sys.argv[1]):
        generator = torch.Generator().manual_seed(n)
        x, W, b = (torch.randn(*s, generator=generator) for s in ((n, k), (m, k), (m,)))
        exact = x.double() @ W.double().T + b.double()
        scale = (x.double().abs() @ W.double().abs().T + b.double().abs()).clamp(min=1)
        forms = {
            "plain": (product(x, W, b), exact),
            "no bias": (product(x, W, None), exact - b.double()),
            "W by columns": (product(x, W.t().contiguous().t(), b), exact),
            "x by columns": (product(x.t().contiguous().t(), W, b), exact),
        }
        for form, (ours, true) in forms.items():
            assert ours.shape == true.shape and ours.dtype == torch.float32, form
            worst.append(float(((ours - true).abs() / scale).max()) if true.numel() else 0.0)
    print(json.dumps([library(), len(calls), max(worst)]))
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forget the choice before and after, and the environment's wish."""
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.cache_clear()


class TestBothLibraries:
    """Oracle: the product in float64; the error is measured in terms of |x| |W|ᵀ + |b|."""

    def test_each_in_a_process_that_asks_for_it(self) -> None:
        """A wrong wish is heard of at the first large product, and not before."""
        wishes = ["mkl", "onednn"] if products.has_onednn() else ["mkl"]
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(SIZES), *wishes],
            env={**os.environ, LIBRARY_VARIABLE: "blis", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        (kind, said), *found = map(json.loads, ran.stdout.splitlines())
        assert kind == "ConfigError"
        assert "SPAFIT_PRODUCTS must be" in said
        assert [name for name, _, _ in found] == wishes
        # 2·N·in·out is at least 4,000,000 in three sizes of the six, in four forms each.
        assert [by_onednn for _, by_onednn, _ in found] == [0, 12][: len(wishes)]
        assert max(worst for _, _, worst in found) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_other_types_are_left_to_pytorch(
        self, fresh: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        fresh.setattr(products, "library", lambda: "onednn")
        x, W, b = (torch.randn(*s).to(dtype) for s in ((300, 170), (130, 170), (130,)))
        assert torch.equal(product(x, W, b), torch.nn.functional.linear(x, W, b))


class TestTheChoice:
    """Oracle: the rule: oneDNN on a CPU with AVX-512 that is not Intel's, unless asked."""

    @pytest.mark.parametrize(
        ("capability", "intel", "has", "expected"),
        [
            ("AVX512", False, True, "onednn"),
            ("AVX512", True, True, "mkl"),
            ("AVX512", False, False, "mkl"),
            ("AVX2", False, True, "mkl"),
            ("DEFAULT", False, True, "mkl"),
        ],
    )
    def test_follows_from_the_processor(
        self, fresh: pytest.MonkeyPatch, capability: str, intel: bool, has: bool, expected: str
    ) -> None:
        fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        fresh.setattr(products, "_is_intel", lambda: intel)
        fresh.setattr(products, "has_onednn", lambda: has)
        assert library() == expected

    @pytest.mark.parametrize("asked", ["mkl", "onednn"])
    def test_the_environment_comes_first(self, fresh: pytest.MonkeyPatch, asked: str) -> None:
        fresh.setattr(products, "has_onednn", lambda: True)
        for intel in (True, False):
            fresh.setattr(products, "_is_intel", lambda intel=intel: intel)
            fresh.setenv(LIBRARY_VARIABLE, asked)
            library.cache_clear()
            assert library() == asked

    @pytest.mark.parametrize("asked", ["blis", "MKL", " mkl", "auto"])
    def test_another_one_is_refused(self, fresh: pytest.MonkeyPatch, asked: str) -> None:
        fresh.setenv(LIBRARY_VARIABLE, asked)
        with pytest.raises(ConfigError, match=rf'"mkl" or "onednn", found {asked!r}'):
            library()

    def test_what_is_not_there_is_refused(self, fresh: pytest.MonkeyPatch) -> None:
        fresh.setattr(products, "has_onednn", lambda: False)
        fresh.setenv(LIBRARY_VARIABLE, "onednn")
        with pytest.raises(ConfigError, match="asks for oneDNN, which this PyTorch lacks"):
            library()
