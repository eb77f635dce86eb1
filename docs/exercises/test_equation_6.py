"""Tests of exercise 2: ``python -m pytest docs/exercises/test_equation_6.py``."""

import torch
import torch.nn.functional as F
from equation_6 import attention_output

import spafit

CONFIG = spafit.BertConfig(hidden_size=20, num_hidden_layers=1, num_attention_heads=5)


def _module_and_inputs() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = spafit.BertModel(CONFIG).double().eval().encoder.layer[0]
    module = layer.attention.output
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    H2, X = torch.randn(2, 7, 20, dtype=torch.float64)
    return module, H2, X


def _yours(module: torch.nn.Module, H2: torch.Tensor, X: torch.Tensor, rate: float) -> torch.Tensor:
    dense, norm = module.dense, module.LayerNorm
    return attention_output(
        H2, X, dense.weight, dense.bias, norm.weight, norm.bias, norm.eps,
        lambda tensor: F.dropout(tensor, rate),
    )  # fmt: skip


def test_it_is_what_the_model_computes() -> None:
    """Without dropout, to 1e-12 in float64."""
    module, H2, X = _module_and_inputs()
    torch.testing.assert_close(_yours(module, H2, X, 0.0), module(H2, X), rtol=0, atol=1e-12)


def test_dropout_leaves_the_residual() -> None:
    """If everything is dropped, what is left is LayerNorm(X)."""
    module, H2, X = _module_and_inputs()
    norm = module.LayerNorm
    expected = F.layer_norm(X, (20,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(_yours(module, H2, X, 1.0), expected, rtol=0, atol=1e-12)
