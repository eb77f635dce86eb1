"""Packed attention on a CUDA device: every form against the plain one. By hand: ``pytest -m gpu``.

The oracle is the equation in float64 on the same device; the yardstick is the error of the plain
form in the type at hand, of which a form may have twice as much.
"""

from __future__ import annotations

import math

import pytest
import torch

from spafit.kernels import reference
from spafit.kernels.forms import why_no_triton
from spafit.kernels.gpu import varlen_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMS = ("triton", "flash", "efficient")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda")
SHORT = (5, 1, 37, 63, 64)
TO_128 = (128, 65, 1, 17)
LONG = (1, 512, 129, 3, 300, 64)


def get(form: str, dtype: torch.dtype, head_size: int):
    """Return a form's function, or skip where the card has none of it."""
    if form == "triton":
        reason = why_no_triton(DEVICE, dtype)
        if not reason:
            from spafit.kernels.gpu.triton_attention import packed_attention_triton as function
    elif form == "flash":
        reason = varlen_attention.why_no_flash(DEVICE, dtype, head_size)
        function = varlen_attention.flash
    else:
        reason = varlen_attention.why_no_efficient(DEVICE, dtype, head_size)
        function = varlen_attention.efficient
    if reason:
        pytest.skip(f"{form}: {reason}")
    return function


def boundaries_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def make(lengths, num_heads=4, head_size=64, filler=3, dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(1)
    rows, D = sum(lengths) + filler, num_heads * head_size
    QKV = torch.randn(rows, 3 * D, device=DEVICE, generator=generator).to(dtype)
    return QKV, torch.randn(rows, D, device=DEVICE, generator=generator).to(dtype)


def run(function, QKV, dH1, lengths, num_heads, dropout=0.0):
    QKV = QKV.detach().requires_grad_()
    H1 = function(QKV, boundaries_of(lengths), sum(lengths), max(lengths), num_heads, dropout)
    H1.backward(dH1)
    return H1.detach(), QKV.grad


def plain(QKV, dH1, dtype, lengths, num_heads):
    QKV = QKV.detach().to(dtype, copy=True).requires_grad_()
    H1 = reference.packed_attention(QKV, lengths, num_heads)
    H1.backward(dH1.to(dtype))
    return H1.detach(), QKV.grad


def masked(QKV, dH1, masks, dtype, scale, lengths, num_heads):
    """Write the equation out in a type, with masks (A, T, T) a sequence; give H1 and dQKV."""
    QKV = QKV.detach().to(dtype, copy=True).requires_grad_()
    outputs, start = [], 0
    for length, keep in zip(lengths, masks, strict=True):
        Q, K, V = QKV[start : start + length].view(length, 3, num_heads, -1).permute(1, 2, 0, 3)
        P = torch.softmax(Q @ K.mT / math.sqrt(Q.shape[-1]), dim=-1)
        outputs.append(((P * keep * scale) @ V).transpose(0, 1).flatten(1))
        start += length
    outputs.append(QKV.new_zeros(len(QKV) - start, QKV.shape[1] // 3))
    H1 = torch.cat(outputs)
    H1.backward(dH1.to(dtype))
    return H1.detach(), QKV.grad


def recover(function, lengths, num_heads, head_size, dropout, dtype, filler=3):
    """Return the masks, bool (A, T, T) a sequence, and what a kept probability is multiplied by.

    With Q = K = 0 all probabilities are 1/T, and one-hot values show those of Dh keys a call.
    """
    rows = sum(lengths) + filler
    place = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    for first in range(0, max(lengths), head_size):
        QKV = torch.zeros(rows, 3, num_heads, head_size, device=DEVICE, dtype=dtype)
        shown = place[:, None] - first == torch.arange(head_size, device=DEVICE)
        QKV[: len(place), 2] = shown[:, None].to(dtype)
        torch.manual_seed(5)
        H1 = function(
            QKV.flatten(1), boundaries_of(lengths), len(place), max(lengths), num_heads, dropout
        )
        for part, into in zip(H1[: len(place)].split(list(lengths)), found, strict=True):
            length = len(part)
            heads = part.view(length, num_heads, head_size).transpose(0, 1)
            into.append(heads[..., : max(0, length - first)].float() * length)
    weights = [torch.cat(parts, dim=2) for parts in found]
    scale = max(float(weight.max()) for weight in weights)
    return [weight > 0.5 * scale for weight in weights], scale


def assert_errs_at_most_twice(found, low, exact, dtype):
    # In float32 the plain form's error is a few roundings, which may by chance be fewer.
    slack = 16 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    for name, ours, theirs, true in zip(("H1", "dQKV"), found, low, exact, strict=True):
        error = (ours.double() - true).abs().max()
        allowed = 2 * (theirs.double() - true).abs().max() + slack * true.abs().max()
        assert ours.dtype == dtype
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
class TestAgainstThePlainForm:
    @pytest.mark.parametrize("head_size", [20, 32, 64, 96, 128])
    @pytest.mark.parametrize("lengths", [SHORT, TO_128, LONG], ids=["to 64", "to 128", "to 512"])
    def test_output_and_gradient(self, form, dtype, lengths, head_size):
        function = get(form, dtype, head_size)
        QKV, dH1 = make(lengths, 4, head_size, 3, dtype)
        assert_errs_at_most_twice(
            run(function, QKV, dH1, lengths, 4),
            plain(QKV, dH1, dtype, lengths, 4),
            plain(QKV, dH1, torch.float64, lengths, 4),
            dtype,
        )

    @pytest.mark.parametrize("lengths", [SHORT, TO_128, LONG], ids=["to 64", "to 128", "to 512"])
    def test_with_dropout(self, form, dtype, lengths):
        function = get(form, dtype, 64)
        masks, scale = recover(function, lengths, 4, 64, 0.2, dtype)
        kept = torch.cat([mask.flatten() for mask in masks]).double().mean()
        count = sum(mask.numel() for mask in masks)
        # Flash draws 8 bits an element: its rate may be 1/256 off.
        assert abs(kept - 0.8) < 1 / 256 + 4 * math.sqrt(0.16 / count)
        assert scale == pytest.approx(1.25, rel=0.01)
        QKV, dH1 = make(lengths, 4, 64, 3, dtype)
        torch.manual_seed(5)
        found = run(function, QKV, dH1, lengths, 4, 0.2)
        scale = 65536 / (65536 - round(0.2 * 65536)) if form == "triton" else 1.25
        assert_errs_at_most_twice(
            found,
            masked(QKV, dH1, masks, dtype, scale, lengths, 4),
            masked(QKV, dH1, masks, torch.float64, scale, lengths, 4),
            dtype,
        )

    def test_rows_of_no_sequence(self, form, dtype):
        function = get(form, dtype, 64)
        QKV, dH1 = make(SHORT, filler=37, dtype=dtype)
        QKV[sum(SHORT) :] = math.nan
        dH1[sum(SHORT) :] = math.nan
        H1, dQKV = run(function, QKV, dH1, SHORT, 4)
        assert torch.isfinite(H1).all() and torch.isfinite(dQKV).all()
        assert not H1[sum(SHORT) :].any() and not dQKV[sum(SHORT) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
class TestCaptured:
    """Oracle: the same calls, not captured."""

    def capture(self, function, QKV, dH1, boundaries, tokens, longest, dropout):
        """Capture forward and backward; give the graph, H1 and dQKV."""
        QKV.requires_grad_()

        def step():
            H1 = function(QKV, boundaries, tokens, longest, 4, dropout)
            return H1.detach(), torch.autograd.grad(H1, QKV, dH1)[0]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            H1, dQKV = step()
        return graph, H1, dQKV

    def test_a_replay_reads_lengths_anew(self, form, dtype):
        function = get(form, dtype, 64)
        first, second = (40, 20, 60, 8), (1, 64, 30, 33)
        assert sum(first) == sum(second)
        QKV, dH1 = make(first, filler=5, dtype=dtype)
        boundaries = boundaries_of(first)
        graph, H1, dQKV = self.capture(function, QKV, dH1, boundaries, sum(first), 64, 0.0)
        for lengths in (first, second):
            boundaries.copy_(boundaries_of(lengths))
            graph.replay()
            right = plain(QKV, dH1, torch.float64, lengths, 4)
            low = plain(QKV, dH1, dtype, lengths, 4)
            assert_errs_at_most_twice((H1, dQKV), low, right, dtype)

    def test_each_replay_draws_anew_and_backward_the_same(self, form, dtype):
        function = get(form, dtype, 64)
        lengths = (64, 64)
        QKV, dH1 = make(lengths, filler=0, dtype=dtype)
        with torch.no_grad():
            QKV[:, : 2 * 256] = 0
            QKV[:, 2 * 256 :] = torch.eye(64, device=DEVICE, dtype=dtype).repeat(2, 4)
        graph, H1, dQKV = self.capture(function, QKV, dH1, boundaries_of(lengths), 128, 64, 0.5)
        outputs = []
        for _ in range(2):
            graph.replay()
            outputs.append(H1.clone())
            masks = [part.view(64, 4, 64).transpose(0, 1) > 0 for part in H1.split(list(lengths))]
            exact = masked(QKV, dH1, masks, torch.float64, 2.0, lengths, 4)[1]
            low = masked(QKV, dH1, masks, dtype, 2.0, lengths, 4)[1]
            assert_errs_at_most_twice((H1, dQKV), (H1, low), (H1.double(), exact), dtype)
        assert not torch.equal(*outputs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
class TestTriton:
    def test_repeats_bit_for_bit(self, dtype):
        function = get("triton", dtype, 64)
        QKV, dH1 = make(LONG, dtype=dtype)
        results = []
        for _ in range(5):
            torch.manual_seed(6)
            results.append(run(function, QKV, dH1, LONG, 4, 0.1))
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))

    def test_a_replay_may_have_other_tokens(self, dtype):
        function = get("triton", dtype, 64)
        lengths = (40, 20, 60)
        QKV, dH1 = make(lengths, filler=16, dtype=dtype)
        boundaries = boundaries_of((*lengths, 0))
        graph, H1, dQKV = TestCaptured().capture(
            function, QKV, dH1, boundaries, sum(lengths), 64, 0.0
        )
        lengths = (5, 64, 33, 30)
        boundaries.copy_(boundaries_of(lengths))
        graph.replay()
        right = plain(QKV, dH1, torch.float64, lengths, 4)
        assert_errs_at_most_twice((H1, dQKV), plain(QKV, dH1, dtype, lengths, 4), right, dtype)

    def test_offsets_beyond_32_bits(self, dtype):
        if torch.cuda.get_device_properties(DEVICE).total_memory < 16 * 2**30:
            pytest.skip("needs a card of 16 GB")
        function = get("triton", dtype, 64)
        # Rows so far apart that the last sequence's elements lie beyond 2**31.
        lengths, stride = (700, 44), 3_000_000
        base = torch.empty(sum(lengths), stride, device=DEVICE, dtype=dtype)
        QKV, dH1 = make(lengths, filler=0, dtype=dtype)
        base[:, : QKV.shape[1]] = QKV
        apart = base[:, : QKV.shape[1]]
        right = run(function, QKV, dH1, lengths, 4)
        found = run(function, apart, dH1, lengths, 4)
        assert all(map(torch.equal, found, right))
