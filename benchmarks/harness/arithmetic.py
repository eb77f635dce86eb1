"""The least arithmetic for a batch, and this machine's speed of matrix products.

Per token and layer the linear maps (query, key, value, attention.output; intermediate, output) take

    2 · (4·D² + 2·D·F)  floating-point operations forward, and as many for the gradient of their
                        input; the frozen matrices themselves get none

and attention in a sequence of t tokens, with QKᵀ and the product with V, 2 · 2·t²·D forward and
twice that backward (each product has two gradients). LoRA, biases, LayerNorm, GELU, dropout,
softmax, embeddings, the head and the optimizer are not counted: their time is included in what the
floor's share of the measured time lacks to 100 %.

A GPU's rates are measured with CUDA events over blocks of many calls, so that launching a call
overlaps with the one before. Its best rate is that of large square products; a card's data sheet
gives more, because no card keeps its highest clock under such a load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from spafit.config import BertConfig
from spafit.kernels.products import has_onednn

_REPEATS = 7
_BLOCK_MS = 20.0  # a block of calls on a GPU takes about this long
CARD_SIZES = (4096, 8192, 12_288, 16_384)
COPY_BYTES = 2**30


def forward_flop(config: BertConfig, lengths: Sequence[int], layers: int | None = None) -> float:
    """Return the operations of a forward pass through some layers (default: all) on real tokens."""
    D, F = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers if layers is None else layers
    linears = sum(lengths) * 2.0 * (4 * D * D + 2 * D * F)
    attention = sum(2.0 * 2 * t * t * D for t in lengths)
    return layers * (linears + attention)


def step_flop(
    config: BertConfig, lengths: Sequence[int], first_trainable: int, first_computed: int = 0
) -> float:
    """Return the least operations of a training step.

    The forward of layers ``first_computed`` to L - 1, and the backward, to their inputs, of layers
    ``first_trainable`` to L - 1.

    Parameters
    ----------
    config : BertConfig
        The sizes.
    lengths : sequence of int
        Real tokens of each sequence of the batch.
    first_trainable : int
        The first layer in which anything trains, from 0.
    first_computed : int
        0, or ``first_trainable`` where the hidden states below it were kept.
    """
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linears = sum(lengths) * 2.0 * (4 * D * D + 2 * D * F)
    attention = sum(4.0 * 2 * t * t * D for t in lengths)
    backward = (L - first_trainable) * (linears + attention)
    return forward_flop(config, lengths, L - first_computed) + backward


def product_shapes(config: BertConfig, tokens: int) -> list[tuple[int, int, int]]:
    """Return (N, in, out) of a layer's products; query, key and value are a single product."""
    D, F = config.hidden_size, config.intermediate_size
    return [(tokens, D, 3 * D), (tokens, D, D), (tokens, D, F), (tokens, F, D)]


@dataclass(frozen=True)
class MatmulRate:
    """The rate of matrix products, 10⁹ operations a second.

    Attributes
    ----------
    torch_gflops : float
        By ``torch.mm``: MKL on a CPU, cuBLAS on a GPU.
    onednn_gflops : float or None
        By oneDNN, where torch has it and the device is a CPU.
    """

    torch_gflops: float
    onednn_gflops: float | None

    @property
    def best_gflops(self) -> float:
        """The larger one."""
        return max(self.torch_gflops, self.onednn_gflops or 0.0)


def matmul_rate_gflops(
    shapes: Sequence[tuple[int, int, int]],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> MatmulRate:
    """Measure the rate at a model's own shapes: all operations over all median times.

    Parameters
    ----------
    shapes : sequence of (N, in, out)
        Products of (N, in) and the transpose of (out, in).
    device : torch.device, optional
        Default: the CPU.
    dtype : torch.dtype
        Of the factors.
    """
    device = torch.device("cpu") if device is None else device
    by_onednn = device.type == "cpu" and has_onednn()
    flop = sum(2.0 * n * inner * outer for n, inner, outer in shapes)
    torch_s = onednn_s = 0.0
    for n, inner, outer in shapes:
        x = torch.randn(n, inner, device=device, dtype=dtype)
        w = torch.randn(outer, inner, device=device, dtype=dtype)
        torch_s += _median_s(partial(torch.mm, x, w.t()), device)
        if by_onednn:
            linear = torch.ops.mkldnn._linear_pointwise
            b = torch.zeros(outer, dtype=dtype)
            onednn_s += _median_s(partial(linear, x, w, b, "none", [], ""), device)
    return MatmulRate(flop / torch_s / 1e9, flop / onednn_s / 1e9 if by_onednn else None)


def best_matmul_gflops(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = CARD_SIZES
) -> tuple[float, int]:
    """Measure square products and return the best rate, 10⁹ operations a second, and its size.

    Parameters
    ----------
    device, dtype
        Where, and in what.
    sizes : sequence of int
        n of (n, n) by (n, n); one for which there is no memory is left out, but for the first.
    """
    best = (0.0, 0)
    for n in sizes:
        try:
            x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            rate = 2.0 * n**3 / _median_s(partial(torch.mm, x, w.t()), device) / 1e9
        except torch.OutOfMemoryError:
            if not best[1]:
                raise
            break
        best = max(best, (rate, n))
        del x, w
    return best


def copy_gb_per_s(device: torch.device, size_bytes: int = COPY_BYTES) -> float:
    """Measure a copy within the device's memory: 10⁹ bytes read and written per second."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_s(partial(target.copy_, source), device)
    return 2.0 * source.numel() * 4 / seconds / 1e9


def _median_s(call: Callable[[], object], device: torch.device) -> float:
    """Time a call after some warm-up calls; on a GPU by CUDA events, many calls at a time."""
    with torch.no_grad():
        if device.type == "cuda":
            return _gpu_median_s(call, device)
        times = []
        for _ in range(1 + _REPEATS):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return sorted(times[1:])[_REPEATS // 2]


def _gpu_median_s(call: Callable[[], object], device: torch.device) -> float:
    def block_s(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1000 / calls

    block_s(3)
    calls = max(3, round(_BLOCK_MS / 1000 / max(block_s(3), 1e-7)))
    block_s(calls)  # the clock settles under the load
    return sorted(block_s(calls) for _ in range(_REPEATS))[_REPEATS // 2]
