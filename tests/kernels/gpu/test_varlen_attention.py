"""PyTorch's two operators for packed attention, as far as they can be tested without a GPU.

Run on a GPU in ``test_gpu_attention.py``.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import library as torch_library

from spafit.kernels import reference
from spafit.kernels.gpu import varlen_attention
from spafit.kernels.gpu.varlen_attention import efficient, flash, why_no_efficient, why_no_flash

FORMS = {"flash": flash, "efficient": efficient}
LENGTHS = (5, 1, 7)
TOKENS, LONGEST = sum(LENGTHS), max(LENGTHS)
A = 3
CUDA = torch.device("cuda")


def boundaries_of(lengths=LENGTHS, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


class TestOperators:
    """Oracle: the schemas and the kernels for tensors without numbers of the PyTorch at hand."""

    @pytest.mark.parametrize(
        ("operator", "names"),
        [
            (
                "_flash_attention_forward",
                "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
                "return_debug_mask",
            ),
            (
                "_efficient_attention_forward",
                "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
                "dropout_p custom_mask_type compute_log_sumexp",
            ),
        ],
    )
    def test_take_what_is_given_in_this_order(self, operator, names):
        schema = getattr(torch.ops.aten, operator).default._schema
        names = names.split()
        found = [argument.name for argument in schema.arguments]
        assert found[: len(names)] == names
        keywords = {argument.name for argument in schema.arguments if argument.kwarg_only}
        assert "scale" in keywords
        assert not keywords & set(names)
        assert all(a.has_default_value() for a in schema.arguments if a.kwarg_only)
        assert schema.returns[0].name == "output"

    @pytest.mark.parametrize("filler", [0, 3])
    @pytest.mark.parametrize("head_size", [8, 20])
    @pytest.mark.parametrize("name", FORMS)
    def test_have_a_derivative(self, name, head_size, filler):
        D = A * head_size
        QKV = torch.empty(
            TOKENS + filler, 3 * D, dtype=torch.bfloat16, device="meta", requires_grad=True
        )
        H1 = FORMS[name](QKV, boundaries_of(device="meta"), TOKENS, LONGEST, A, 0.1)
        assert H1.shape == (TOKENS + filler, D) and H1.dtype == torch.bfloat16
        assert H1.requires_grad
        if name == "flash":  # the other one's backward for such tensors miscounts its arguments
            [dQKV] = torch.autograd.grad(H1, QKV, torch.empty_like(H1))
            assert dQKV.shape == QKV.shape


def scores_of(Q, K, scale):
    """Return softmax(QKᵀ scale) of (T, A, Dh) as (A, T, T)."""
    return torch.softmax(scale * torch.einsum("tah,sah->ats", Q, K), dim=-1)


class OnCPU:
    """Both operators for CPU tensors, from the equations; they note what they were called with.

    Rows of no sequence get no number, as on a GPU.
    """

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def forward(self, Q, K, V, boundaries, max_q, max_k, dropout, scale):
        assert boundaries.dtype == torch.int32 and boundaries.is_contiguous()
        assert boundaries[-1] == len(Q)
        for x in (Q, K, V):
            assert x.dim() == 3 and x.stride(2) == 1
            assert x.shape[2] % 8 == 0
            assert x.stride(0) % 8 == x.stride(1) % 8 == x.storage_offset() % 8 == 0
        self.calls.append(SimpleNamespace(longest=(max_q, max_k), dropout=dropout, Q=Q))
        out = torch.full(Q.shape, math.nan, dtype=Q.dtype)
        for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
            P = scores_of(Q[start:end], K[start:end], scale)
            out[start:end] = torch.einsum("ats,sah->tah", P, V[start:end])
        return out

    def backward(self, dout, Q, K, V, boundaries, scale):
        gradients = [torch.full(x.shape, math.nan, dtype=x.dtype) for x in (Q, K, V)]
        for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
            q, k, v, do = (x[start:end] for x in (Q, K, V, dout))
            P = scores_of(q, k, scale)
            dP = torch.einsum("tah,sah->ats", do, v)
            dS = P * (dP - (dP * P).sum(-1, keepdim=True)) * scale
            gradients[0][start:end] = torch.einsum("ats,sah->tah", dS, k)
            gradients[1][start:end] = torch.einsum("ats,tah->sah", dS, q)
            gradients[2][start:end] = torch.einsum("ats,tah->sah", P, do)
        return tuple(gradients)

    def flash_forward(
        self, Q, K, V, first, second, max_q, max_k, dropout, causal, mask, *, scale, **others
    ):
        assert first is second and not causal and not mask and not any(others.values())
        out = self.forward(Q, K, V, first, max_q, max_k, dropout, scale)
        state = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return out, torch.zeros(Q.shape[1], len(Q)), *state, torch.zeros(0)

    def flash_backward(self, dout, Q, K, V, out, lse, first, second, *numbers, scale, **others):
        assert not any(others.values())
        return self.backward(dout, Q, K, V, first, scale)

    def efficient_forward(
        self,
        Q,
        K,
        V,
        bias,
        first,
        second,
        max_q,
        max_k,
        dropout,
        mask,
        keep=False,
        *,
        scale,
        **others,
    ):
        assert bias is None and first is second and not mask and not any(others.values())
        assert max_q <= Q.shape[1] and len(Q) == 1
        out = self.forward(Q[0], K[0], V[0], first, max_q, max_k, dropout, scale)
        self.calls[-1].keep = keep
        state = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        return out[None], torch.zeros(len(first) - 1, Q.shape[2], 32), *state, max_q, max_k

    def efficient_backward(self, dout, Q, K, V, bias, out, first, *numbers, scale, **others):
        gradients = self.backward(dout[0], Q[0], K[0], V[0], first, scale)
        return (*(each[None] for each in gradients), torch.zeros(()))


@pytest.fixture
def on_cpu():
    """Give the operators to the CPU for one test; their derivatives remain PyTorch's own."""
    operators = OnCPU()
    overriding = torch_library.Library("aten", "IMPL")
    try:
        for form in FORMS:
            for way in ("forward", "backward"):
                implementation = getattr(operators, f"{form}_{way}")
                overriding.impl(f"_{form}_attention_{way}", implementation, "CPU")
        yield operators
    finally:
        overriding._destroy()


def with_gradient(function, QKV, dH1):
    QKV = QKV.detach().requires_grad_()
    H1 = function(QKV)
    H1.backward(dH1)
    return H1.detach(), QKV.grad


def draw(filler: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, D = TOKENS + filler, A * head_size
    return (
        torch.randn(rows, 3 * D, dtype=torch.float64, generator=generator),
        torch.randn(rows, D, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize("name", FORMS)
class TestAroundTheOperators:
    """Oracle: the plain form; the operators are stood in for by their equations."""

    @pytest.mark.parametrize("layout", ["contiguous", "rows apart", "askew", "transposed"])
    @pytest.mark.parametrize("filler", [0, 3])
    @pytest.mark.parametrize("head_size", [8, 20, 64])
    def test_output_and_gradient(self, on_cpu, name, head_size, filler, layout):
        QKV, dH1 = draw(filler, head_size)
        # What lies in rows of no sequence must not matter, and their gradient is 0.
        QKV[TOKENS:] = math.nan
        dH1[TOKENS:] = math.nan
        H1, dQKV = with_gradient(
            lambda QKV: reference.packed_attention(QKV, LENGTHS, A), QKV, dH1.nan_to_num()
        )
        if layout == "rows apart":
            QKV = torch.cat((QKV, QKV[:, :8]), dim=1)[:, : QKV.shape[1]]
        elif layout == "askew":
            QKV = torch.cat((QKV[:, :1], QKV), dim=1)[:, 1:]
        elif layout == "transposed":
            QKV = QKV.t().contiguous().t()
        found = with_gradient(
            lambda QKV: FORMS[name](QKV, boundaries_of(), TOKENS, LONGEST, A), QKV, dH1
        )
        torch.testing.assert_close(found[0], H1, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], dQKV, rtol=0, atol=1e-12)

    def test_reads_in_place_what_it_can(self, on_cpu, name):
        QKV, _ = draw(0, 8)
        FORMS[name](QKV, boundaries_of(), TOKENS, LONGEST, A)
        assert on_cpu.calls[-1].Q.data_ptr() == QKV.data_ptr()

    def test_is_told_the_rate_and_the_longest(self, on_cpu, name):
        QKV, _ = draw(0, 8)
        FORMS[name](QKV, boundaries_of(), TOKENS, 9, A, 0.25)
        assert on_cpu.calls[-1].longest == (9, 9)
        assert on_cpu.calls[-1].dropout == 0.25

    def test_no_token_at_all(self, name):
        QKV = torch.randn(3, 3 * A * 8, requires_grad=True)
        H1 = FORMS[name](QKV, boundaries_of(()), 0, 0, A)
        H1.sum().backward()
        assert H1.shape == (3, A * 8) and not H1.any() and not QKV.grad.any()


class TestEfficient:
    """Oracle: what its operator's backward asks of forward."""

    def test_longest_is_at_most_the_tokens(self, on_cpu):
        QKV, _ = draw(3, 8)
        efficient(QKV, boundaries_of(), TOKENS, 512, A)
        assert on_cpu.calls[-1].longest == (TOKENS, TOKENS)

    @pytest.mark.parametrize("learns", [True, False])
    def test_keeps_for_backward_only_where_there_is_one(self, on_cpu, learns):
        QKV, _ = draw(0, 8)
        efficient(QKV.requires_grad_(learns), boundaries_of(), TOKENS, LONGEST, A)
        assert on_cpu.calls[-1].keep is learns
        with torch.no_grad():
            efficient(QKV, boundaries_of(), TOKENS, LONGEST, A)
        assert on_cpu.calls[-1].keep is False


@pytest.fixture
def card(monkeypatch):
    """Pretend a PyTorch with all operators and a card of a capability; 9.0 unless set."""
    card = SimpleNamespace(capability=(9, 0), operators=True, flash=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card.capability)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: card.operators
    )
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: card.flash)
    monkeypatch.setattr(torch.version, "hip", None)
    return card


class TestWhyNot:
    """Oracle: what each operator is made for."""

    @pytest.mark.parametrize("dtype", varlen_attention._HALF_TYPES, ids=str)
    def test_both_can_be_had(self, card, dtype):
        assert why_no_flash(CUDA, dtype, 256) == ""
        assert why_no_efficient(CUDA, dtype, 256) == ""

    def test_flash_is_for_half_types_and_heads_to_256(self, card):
        assert "found torch.float32" in why_no_flash(CUDA, torch.float32, 64)
        assert "found 257" in why_no_flash(CUDA, torch.float16, 257)
        assert why_no_efficient(CUDA, torch.float32, 257) == ""
        assert "found torch.float64" in why_no_efficient(CUDA, torch.float64, 64)

    def test_older_cards(self, card):
        card.capability = (7, 5)
        assert "needs compute capability 8.0" in why_no_flash(CUDA, torch.float16, 64)
        assert "cuda has 7.5" in why_no_efficient(CUDA, torch.bfloat16, 64)
        assert why_no_efficient(CUDA, torch.float16, 64) == ""
        card.capability = (6, 1)
        assert "needs compute capability 7.0" in why_no_efficient(CUDA, torch.float32, 64)

    @pytest.mark.parametrize("why", [why_no_flash, why_no_efficient])
    def test_other_devices_and_builds(self, card, monkeypatch, why):
        assert "found cpu" in why(torch.device("cpu"), torch.float16, 64)
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert "NVIDIA" in why(CUDA, torch.float16, 64)
        monkeypatch.setattr(torch.version, "hip", None)
        card.operators = False
        assert "built without _" in why(CUDA, torch.float16, 64)

    def test_a_build_without_flash(self, card):
        card.flash = False
        assert "without FlashAttention" in why_no_flash(CUDA, torch.float16, 64)
        assert why_no_efficient(CUDA, torch.float16, 64) == ""
