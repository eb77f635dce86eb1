"""Tests of exercise 7: ``python -m pytest docs/exercises/test_finite_differences.py``."""

import torch
from finite_differences import numerical_gradient

import spafit


def test_a_gradient_that_is_known() -> None:
    """Of Σ x³: 3 x², for which one-sided differences would be off by 3 x ε."""
    x = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 4.0]], dtype=torch.float64)
    before = x.clone()
    found = numerical_gradient(lambda y: (y**3).sum(), x, 1e-4)
    assert torch.equal(x, before)
    torch.testing.assert_close(found, 3 * x**2, rtol=0, atol=1e-7)


def test_loras_gradient() -> None:
    """That of A in spafit's LoRA, which has a backward pass of its own."""
    torch.manual_seed(0)
    lora = spafit.LoRALinear(spafit.Linear(5, 4).double(), r=2, alpha=3.0)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(6, 5, dtype=torch.float64)

    def loss(A: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(lora, {"lora_A": A}, (x,)).square().sum()

    lora(x).square().sum().backward()
    found = numerical_gradient(loss, lora.lora_A.detach())
    torch.testing.assert_close(found, lora.lora_A.grad, rtol=0, atol=1e-6)
