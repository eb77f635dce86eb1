"""Tests of exercise 1: ``python -m pytest docs/exercises/test_bias_delta.py``."""

import torch
from bias_delta import BiasDelta

BIAS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def test_nothing_is_changed_before_training() -> None:
    """One vector trains, of the bias's length and type, and at first the sum is the bias."""
    module = BiasDelta(BIAS)
    [delta] = module.parameters()
    assert delta.shape == BIAS.shape and delta.dtype == BIAS.dtype
    assert torch.equal(module(BIAS), BIAS)


def test_the_delta_trains_and_the_bias_does_not() -> None:
    """A step of gradient descent moves the sum by the gradient, and leaves b as it was."""
    module, b = BiasDelta(BIAS), BIAS.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(b) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    optimizer.step()
    assert torch.equal(b, BIAS)
    expected = BIAS - 0.1 * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.allclose(module(b), expected, atol=1e-7)


def test_weight_decay_pulls_towards_the_pretrained_bias() -> None:
    """Without a gradient a decayed δ goes to 0, and the sum to b."""
    module = BiasDelta(BIAS)
    [delta] = module.parameters()
    with torch.no_grad():
        delta += 1.0
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(200):
        delta.grad = torch.zeros_like(delta)
        optimizer.step()
    assert torch.allclose(module(BIAS), BIAS, atol=1e-6)
