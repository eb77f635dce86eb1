"""Every Triton kernel compiled for GPUs that are not here, at the sizes of BERT-large.

Each kernel's own test module says what is compiled, and what must hold of the result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.triton_compiler import in_fresh_process

MODULES = [
    "test_triton_attention",
    "test_triton_linear",
    "test_triton_gelu",
    "test_triton_add_norm",
]


class TestCompiled:
    """Oracle: Triton's own compiler and the assembler's report, for A100 and H100."""

    @pytest.mark.parametrize(
        "function", ["compile_some", pytest.param("compile_all", marks=pytest.mark.full)]
    )
    def test_no_register_is_spilled(self, function: str) -> None:
        """In one process, which takes a second or two to come up."""
        in_fresh_process(Path(__file__).parent, MODULES, function)

    @pytest.mark.slow
    def test_attention_in_every_type(self) -> None:
        in_fresh_process(Path(__file__).parent, MODULES[:1], "compile_every_type")
