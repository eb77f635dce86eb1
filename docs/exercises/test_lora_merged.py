"""Tests of exercise 4: ``python -m pytest docs/exercises/test_lora_merged.py``."""

import torch
from lora_merged import merged

import spafit


def test_it_computes_what_lora_computes() -> None:
    """The oracle is spafit's LoRA, in float64."""
    torch.manual_seed(0)
    linear = spafit.Linear(5, 7).double()
    lora = spafit.LoRALinear(linear, r=3, alpha=4.0)
    for parameter in lora.parameters():  # as if trained
        torch.nn.init.normal_(parameter)
    x, before = torch.randn(11, 5, dtype=torch.float64), linear.weight.clone()
    W = merged(linear.weight, lora.lora_A, lora.lora_B, 4.0)
    assert W.shape == (7, 5) and torch.equal(linear.weight, before)
    torch.testing.assert_close(x @ W.T + linear.bias, lora(x), rtol=0, atol=1e-12)
