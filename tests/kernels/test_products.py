"""Matrix products by either library: the same numbers, and a choice that is never a guess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.profiler import profile

from spafit.errors import ConfigError
from spafit.kernels import products
from spafit.kernels.products import (
    LIBRARY_VARIABLE,
    bf16_products,
    laid_out,
    library,
    product,
    transposed_product,
)
from spafit.kernels.stacking import cut, stacked

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


@pytest.fixture
def with_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend a processor of the capabilities given."""

    def pretend(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        bf16_products.cache_clear()

    bf16_products.cache_clear()
    yield pretend
    monkeypatch.undo()
    bf16_products.cache_clear()


class TestUnitsForBf16:
    """Oracle: the names of the processor's features, pretended."""

    @pytest.mark.parametrize(
        ("capabilities", "expected"),
        [
            ({}, ""),
            ({"avx512_f": True, "avx512_bf16": False, "amx_tile": False}, ""),
            ({"avx512_bf16": True}, "AVX512-BF16"),
            ({"avx512_bf16": True, "amx_bf16": True}, "AMX-BF16"),
            ({"avx512_bf16": True, "amx_tile": True}, "AMX-BF16"),
        ],
        ids=str,
    )
    def test_which(
        self, with_units: Callable[..., None], capabilities: dict[str, bool], expected: str
    ) -> None:
        with_units(**capabilities)
        assert bf16_products() == (expected if products.has_onednn() else "")

    def test_none_without_onednn(
        self, with_units: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(products, "has_onednn", lambda: False)
        with_units(avx512_bf16=True)
        assert bf16_products() == ""


@pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")
class TestPacked:
    """Oracle: the product with W rounded to bf16, in float64, rounded once."""

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("rows", [0, 1, 7, 203])
    @pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
    def test_is_the_product(self, own: torch.dtype, rows: int, transposed: bool) -> None:
        W, b = torch.randn(37, 53).to(own), torch.randn(37).bfloat16()
        given, before = (W.t(), W.clone()) if transposed else (W, W.clone())
        bias = None if transposed else b
        x = torch.randn(rows, given.shape[1]).bfloat16()
        true = x.double() @ given.bfloat16().double().T + (0.0 if bias is None else b.double())
        with laid_out([W]):
            y = product(x, given, bias)
            again = product(x, given, bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, again)
        assert torch.allclose(y.double(), true, rtol=2**-8, atol=2**-8)
        assert torch.equal(W, before)

    def test_no_weight_is_converted_twice(self) -> None:
        """A stack lies in the memory of several; a matrix that is not packed is converted."""
        whole = torch.randn(30, 53)
        parts, other = cut(whole, [10, 13, 7]), torch.randn(9, 53)
        x, dY = torch.randn(5, 53).bfloat16(), torch.randn(5, 30).bfloat16()
        before = list(products._laid_out)
        with laid_out(parts[:2]), laid_out(parts[2:]):
            stack = stacked(parts[:2])
            for _ in range(2):
                with profile() as found:
                    product(x, stack, None), product(dY[:, :23], stack.t(), None)
                    product(x, parts[2], None)
                converted = [each.name for each in found.events() if each.name == "aten::_to_copy"]
            assert converted == []
            for given in (other, stacked(parts)):  # of the stack, one part is packed elsewhere
                with profile() as found:
                    product(x, given, None)
                assert "aten::_to_copy" in {each.name for each in found.events()}
        assert products._laid_out == before

    def test_ends_with_the_block(self) -> None:
        W, x = torch.randn(11, 53), torch.randn(5, 53).bfloat16()
        with pytest.raises(ZeroDivisionError), laid_out([W]):
            before = product(x, W, None)
            W.zero_()  # which is not allowed, and shows what is read
            assert torch.equal(product(x, W, None), before)
            _ = 1 / 0
        assert not product(x, W, None).any()


class TestSumsOfBf16:
    """Oracle: the sum over rows in float64."""

    @pytest.mark.parametrize("by_columns", [False, True])
    def test_is_rounded_once(self, by_columns: bool) -> None:
        a, b = torch.randn(771, 26).bfloat16(), torch.randn(771, 11).bfloat16()
        a = a[:, 5:18] if by_columns else a
        found, true = transposed_product(a, b), a.double().T @ b.double()
        assert found.dtype == torch.float32
        assert ((found - true).abs() <= 2**-8 * true.abs() + 1e-4).all()
