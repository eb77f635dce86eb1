"""How much arithmetic a batch needs at least, and how fast this machine multiplies matrices.

Per token and layer the linear maps (query, key, value, attention.output; intermediate, output) take

    2 · (4·D² + 2·D·F)  floating-point operations forward, and as many for the gradient of their
                        input; the frozen matrices themselves get none

and attention in a sequence of t tokens, with QKᵀ and the product with V, 2 · 2·t²·D forward and
twice that backward (each product has two gradients). LoRA, biases, LayerNorm, GELU, dropout,
softmax, embeddings, the head and the optimizer are not counted: what they take is what the share
of the floor in the measured time is below 100 %.
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


def forward_flop(config: BertConfig, lengths: Sequence[int], layers: int | None = None) -> float:
    """Give the operations of a forward through so many layers (default: all) on real tokens."""
    D, F = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers if layers is None else layers
    linears = sum(lengths) * 2.0 * (4 * D * D + 2 * D * F)
    attention = sum(2.0 * 2 * t * t * D for t in lengths)
    return layers * (linears + attention)


def step_flop(
    config: BertConfig, lengths: Sequence[int], first_trainable: int, first_computed: int = 0
) -> float:
    """Give the least operations of a training step.

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
    """Give (N, in, out) of a layer's products: query, key and value are one."""
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


def _median_s(product: Callable[[], object], device: torch.device) -> float:
    """Time a product after one that warms up."""
    times = []
    with torch.no_grad():
        for _ in range(1 + _REPEATS):
            began = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return sorted(times[1:])[_REPEATS // 2]
