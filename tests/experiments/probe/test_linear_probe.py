"""The linear probe: what it minimises, what a seed changes, what a mix of layers finds.

Oracle: scikit-learn's LogisticRegression and Ridge; the gradient of the objective; states that are
made so that the answer is known.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from spafit.experiments.probe import linear_probe
from spafit.experiments.probe.linear_probe import (
    STRENGTHS,
    Axes,
    choose_strength,
    fit,
    fit_bootstrap,
    standardise,
)

N, D = 150, 7
CLOSE = 1e-5  # near its minimum the loss changes by the square of that, which float64 resolves


def made(classes: int, layers: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw correlated states (layers, N, D), and labels of which the last layer knows something."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(layers, N, D, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(D, D, generator=generator, dtype=torch.float64)
    X, _ = standardise(X, X)
    logits = X[-1] @ torch.randn(D, classes, generator=generator, dtype=torch.float64)
    noise = torch.randn(N, classes, generator=generator, dtype=torch.float64)
    return X, (logits + noise).argmax(1) if classes > 1 else (logits + noise)[:, 0]


class TestOfOneLayer:
    @pytest.mark.parametrize("classes", [2, 3])
    @pytest.mark.parametrize("strength", [1.0, 1e-3])
    def test_is_scikit_learn_s_logistic_regression(self, classes: int, strength: float) -> None:
        X, y = made(classes)
        probe = fit(X, y, strength, classes, tolerance=1e-10)
        # One of two classes has one vector there: a penalty of half as much on a pair (w, -w).
        C = 1 / (N * strength) * (2 if classes == 2 else 1)
        theirs = LogisticRegression(C=C, tol=1e-12, max_iter=10_000).fit(X[0].numpy(), y.numpy())
        expected = theirs.predict_log_proba(X[0].numpy())
        found = probe(X).log_softmax(1).numpy()
        assert np.abs(found - expected).max() < CLOSE

    def test_is_scikit_learn_s_ridge_for_scores(self) -> None:
        X, y = made(1)
        probe = fit(X, y, 0.01, 1, tolerance=1e-12)
        theirs = Ridge(alpha=0.01 * N).fit(X[0].numpy(), y.numpy())
        assert np.abs(probe(X)[:, 0].numpy() - theirs.predict(X[0].numpy())).max() < CLOSE

    def test_a_weight_counts_as_so_many_rows(self) -> None:
        X, y = made(3)
        rows, times = torch.arange(0, 60, 2), torch.tensor([1, 2, 3, 1, 4]).repeat(6)
        repeated = rows.repeat_interleave(times)
        weighted = fit(X[:, rows], y[rows], 0.1, 3, weights=times, tolerance=1e-10)
        plain = fit(X[:, repeated], y[repeated], 0.1, 3, tolerance=1e-10)
        assert (weighted.W - plain.W).abs().max() < CLOSE

    def test_the_axes_change_no_result(self) -> None:
        X, y = made(3)
        other = Axes(torch.eye(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64))
        one, two = (fit(X, y, 0.01, 3, axes=axes, tolerance=1e-10) for axes in (None, other))
        assert (one.W - two.W).abs().max() < CLOSE

    def test_float32_at_the_usual_tolerance_is_near_it(self) -> None:
        X, y = made(3)
        exact = fit(X, y, 0.01, 3, tolerance=1e-10)(X).softmax(1)
        found = fit(X.float(), y, 0.01, 3)(X.float()).softmax(1)
        assert (found - exact).abs().max() < 0.01


class TestStandardise:
    def test_mean_and_variance_are_those_of_train(self) -> None:
        generator = torch.Generator().manual_seed(0)
        train = 3 + 5 * torch.randn(2, 30, 4, generator=generator)
        dev = torch.randn(2, 9, 4, generator=generator)
        X, X_dev = standardise(train, dev)
        assert X.mean(1).abs().max() < 1e-6
        assert (X.var(1, correction=0) - 1).abs().max() < 1e-5
        mean, scale = train.mean(1, keepdim=True), train.std(1, correction=0, keepdim=True)
        assert torch.allclose(X_dev, (dev - mean) / scale, atol=1e-6)

    def test_a_constant_feature_becomes_0_though_rounding_differs(self) -> None:
        """As [CLS] is before the first layer."""
        train = torch.full((1, 8, 1), 0.3)
        train[0, 3] = train[0, 3] * (1 + 1.2e-7)
        assert train.unique().numel() == 2
        X, X_dev = standardise(train, torch.full((1, 2, 1), 7.0))
        assert X.abs().max() == 0 and X_dev.abs().max() == 0


class TestWhatASeedChanges:
    def test_the_bootstrap_sample(self) -> None:
        X, y = made(2)
        axes = Axes.of(X)
        one, again, other = (fit_bootstrap(X, y, 0.1, 2, seed, axes) for seed in (3, 3, 4))
        assert torch.equal(one.W, again.W)
        assert (one.W - other.W).abs().max() > 1e-3
        drawn = np.random.default_rng((3, 1)).integers(N, size=N)
        plain = fit(X[:, drawn], y[drawn], 0.1, 2, axes=axes)
        assert (one.W - plain.W).abs().max() < 1e-2

    def test_the_rows_held_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fifth, without the others, of every seed its own."""
        seen: list[frozenset[float]] = []

        def noted(X: torch.Tensor, *arguments: object, **more: object) -> linear_probe.Probe:
            seen.append(frozenset(X[0, :, 0].tolist()))
            return fit(X, *arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(linear_probe, "fit", noted)
        X, y = made(2)
        for seed in (0, 1):
            choose_strength(X, y, 2, seed, Axes.of(X))
        assert {len(each) for each in seen} == {N - 30}
        assert len(set(seen)) == 2 and len(seen) == 2 * len(STRENGTHS)

    def test_the_strength_is_that_of_the_least_loss_outside(self) -> None:
        X, y = made(2)
        noise = torch.randn(1, N, D, generator=torch.Generator().manual_seed(5)).double()
        assert choose_strength(noise, y, 2, 0, Axes.of(noise)) >= 0.1
        assert choose_strength(X, (X[0, :, 0] > 0).long(), 2, 0, Axes.of(X)) <= 0.01


class TestAMix:
    def test_finds_the_layer_that_knows(self) -> None:
        X, _ = made(2, layers=5)
        y = (X[3, :, 0] + X[3, :, 1] > 0).long()
        s = fit(X, y, 0.01, 2).s
        assert s.sum() == pytest.approx(1)
        assert s.argmax() == 3 and s[3] > 0.9

    def test_is_at_a_minimum_of_its_objective(self) -> None:
        X, y = made(3, layers=4)
        probe = fit(X, y, 0.1, 3, tolerance=1e-9)
        W, b, a = (each.clone().requires_grad_() for each in (probe.W, probe.b, probe.s.log()))
        mixed = sum(s * layer for s, layer in zip(a.softmax(0), X, strict=True))
        loss = torch.nn.functional.cross_entropy(mixed @ W.T + b, y) + 0.05 * W.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for each in (W, b, a):
            assert each.grad is not None and each.grad.abs().max() < 1e-6
