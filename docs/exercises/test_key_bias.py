"""Tests of exercise 6: ``python -m pytest docs/exercises/test_key_bias.py``."""

import torch
from key_bias import key_bias_gradient, score_gradient


def test_both_gradients() -> None:
    """Against autograd, in float64; and the second one is nothing but rounding."""
    torch.manual_seed(0)
    Q, K, V, dH1 = torch.randn(4, 7, 5, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    S = Q @ (K + b).T / 5**0.5
    S.retain_grad()
    P = S.softmax(dim=-1)
    P.retain_grad()
    (P @ V * dH1).sum().backward()
    assert S.grad is not None and b.grad is not None and P.grad is not None
    dS = score_gradient(P.detach(), P.grad)
    torch.testing.assert_close(dS, S.grad, rtol=0, atol=1e-12)
    db = key_bias_gradient(dS, Q)
    torch.testing.assert_close(db, b.grad, rtol=0, atol=1e-12)
    assert db.abs().max() < 1e-12 < dS.abs().max()


def test_the_formula_and_not_the_answer() -> None:
    """For a dS that comes from no softmax, db is not 0."""
    dS = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
    Q = torch.tensor([[1.0, 0.0, 2.0, 1.0], [3.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, -0.5, 3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(key_bias_gradient(dS, Q), expected)
