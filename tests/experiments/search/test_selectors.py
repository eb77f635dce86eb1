"""The selectors, and N1 and N2 from their scores.

Oracle: their equations written out by hand, in float64, on tiny models; all (N1, N2) by name.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.tiny_bert import CONFIG, L, R, batches, short, tiny_bert

import spafit
from spafit.adaptable import Linear
from spafit.errors import ConfigError
from spafit.experiments.search.selectors import (
    boundaries,
    condition_scores,
    fisher_scores,
    gradient_norms,
    layer_costs,
    representation_changes,
)
from spafit.plans import Plan


def adapted(method: str | Plan = "bitfit") -> spafit.BertForSequenceClassification:
    model = tiny_bert()
    spafit.adapt(model, short(method) if isinstance(method, str) else method)
    return model


def gradients_by_hand(model, made) -> list[dict[str, torch.Tensor]]:
    """Return the gradient of each batch's mean loss, by the names of the parameters."""
    found = []
    for inputs, labels in made:
        model.zero_grad()
        F.cross_entropy(model(**inputs), labels).backward()
        found.append(
            {
                name: each.grad.clone()
                for name, each in model.named_parameters()
                if each.requires_grad and each.grad is not None
            }
        )
    model.zero_grad()
    return found


def of_layer(gradients: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    start = f"bert.encoder.layer.{layer}."
    return torch.cat([each.flatten() for name, each in gradients.items() if name.startswith(start)])


class TestGradients:
    def test_fisher_scores(self) -> None:
        model, made = adapted("lora-ii"), batches(3)
        by_hand = gradients_by_hand(model, made)
        expected = [
            torch.stack([of_layer(each, layer).square().mean() for each in by_hand]).mean()
            for layer in range(L)
        ]
        found = fisher_scores(model, made)
        assert found.shape == (L,) and (found - torch.stack(expected)).abs().max() < 1e-12

    def test_gradient_norms_of_batches_of_other_sizes(self) -> None:
        model = adapted()
        one, two = batches(1, B=2)[0], batches(1, B=5, seed=3)[0]
        by_hand = gradients_by_hand(model, [one, two])
        expected = [
            ((2 * of_layer(by_hand[0], layer) + 5 * of_layer(by_hand[1], layer)) / 7).norm()
            for layer in range(L)
        ]
        found = gradient_norms(model, [one, two])
        assert (found - torch.stack(expected)).abs().max() < 1e-12

    @pytest.mark.parametrize("selector", [fisher_scores, gradient_norms])
    def test_change_nothing_and_give_0_where_nothing_trains(self, selector) -> None:
        model = adapted("SPAFIT-1-3-II")
        expected = selector(model, batches(2))
        for layer in model.bert.encoder.layer:
            layer.dropout = (0.5, 0.5, 0.5)
        model.train()
        before = {name: each.clone() for name, each in model.named_parameters()}
        found = selector(model, iter(batches(2)))
        assert found[:2].tolist() == [0, 0] and found[2:].min() > 0
        assert torch.equal(found, expected)  # without dropout
        assert model.training and all(each.grad is None for each in model.parameters())
        for name, each in model.named_parameters():
            assert torch.equal(each, before[name])

    @pytest.mark.parametrize("selector", [fisher_scores, gradient_norms])
    def test_what_is_refused(self, selector) -> None:
        with pytest.raises(ConfigError, match="there are no batches"):
            selector(adapted(), [])
        with pytest.raises(ConfigError, match="nothing trains in any layer"):
            selector(adapted(spafit.plan("linear-probe", L)), batches(1))


class TestRepresentationChanges:
    def test_by_hand(self) -> None:
        X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-4.0, -1.0]])  # of mean 0
        Y = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
        size = (X.T @ X).square().sum().sqrt() * (Y.T @ Y).square().sum().sqrt()
        cka = (Y.T @ X).square().sum() / size
        found = representation_changes(torch.stack([X + 7, Y - 3]))
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx([1 - float(cka)], abs=1e-6)

    def test_sees_no_rotation_scale_and_shift(self) -> None:
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        Q, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        other = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        found = representation_changes(torch.stack([X, 3 * X @ Q + 5, other]))
        assert found[0] == pytest.approx(0, abs=1e-12) and found[1] > 0.2

    def test_of_a_constant_is_1(self) -> None:
        """Though rounding makes its rows differ."""
        X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        constant = torch.full((5, 3), 0.3)
        constant[2] *= 1 + 1.2e-7
        assert representation_changes(torch.stack([constant, X])).tolist() == [1.0]


class TestConditionScores:
    def test_by_hand(self) -> None:
        model = tiny_bert()
        found = condition_scores(model)
        logs = []
        for name, each in model.bert.encoder.layer[3].named_parameters():
            each = each.detach()
            if name.endswith("weight") and each.dim() == 2:
                values = torch.linalg.eigvalsh(
                    each.T @ each if each.shape[0] >= each.shape[1] else each @ each.T
                )
                logs.append(0.5 * math.log(values[-1] / values[0]))
        assert len(logs) == 6
        assert found[3] == pytest.approx(-sum(logs) / 6, rel=1e-6)
        assert found.shape == (L,)

    def test_a_better_conditioned_layer_scores_more(self) -> None:
        model = tiny_bert()
        with torch.no_grad():
            for module in model.bert.encoder.layer[2].modules():
                if isinstance(module, Linear):
                    torch.nn.init.orthogonal_(module.weight)
        found = condition_scores(model)
        assert found.argmax() == 2 and found[2] == pytest.approx(0, abs=1e-9)

    def test_are_of_the_pretrained_matrices(self) -> None:
        model = adapted("lora-ii")
        assert torch.equal(condition_scores(model), condition_scores(tiny_bert()))


def allowed(L: int, costs: tuple[int, int], budget: int) -> dict[tuple[int, int], int]:
    """Return what trains with each N1 and N2 of L layers, if it is within the budget."""
    every = {
        (N1, N2): (N2 - N1) * costs[0] + (L - 1 - N2) * costs[1]
        for N1, N2 in itertools.combinations(range(L - 1), 2)
    }
    return {at: size for at, size in every.items() if size <= budget}


class TestBoundaries:
    @pytest.mark.parametrize("kind", ["I", "II"])
    def test_the_costs_are_those_of_a_plan(self, kind: str) -> None:
        model = tiny_bert()
        summary = spafit.adapt(model, short(f"SPAFIT-0-2-{kind}"))
        group_2, group_3 = layer_costs(CONFIG, kind, R)
        head = CONFIG.hidden_size * 3 + 3
        assert summary.trainable == 2 * group_2 + 3 * group_3 + head

    @pytest.mark.parametrize("at", list(itertools.combinations(range(7), 2)))
    def test_steps_are_found(self, at: tuple[int, int]) -> None:
        N1, N2 = at
        scores = torch.tensor([1.0] * (N1 + 1) + [2.5] * (N2 - N1) + [3.0] * (7 - N2))
        assert boundaries(1e-9 * scores, allowed(8, (1, 10), 1000)) == at

    def test_noise_about_the_steps_and_a_budget(self) -> None:
        scores = torch.tensor([0.1, 0.0, 0.2, 0.9, 1.1, 1.0, 2.0, 2.1])
        assert boundaries(scores, allowed(8, (1, 10), 23)) == (2, 5)  # which trains 3 · 1 + 2 · 10
        # With 22 numbers: of the plans that are cheaper, the nearest by hand.
        found = boundaries(scores, allowed(8, (1, 10), 22))
        assert found == self.by_hand(scores.tolist(), 22) != (2, 5)

    def by_hand(self, scores: list[float], budget: int) -> tuple[int, int]:
        rests = {}
        for N1, N2 in itertools.combinations(range(len(scores) - 1), 2):
            if (N2 - N1) + 10 * (len(scores) - 1 - N2) <= budget:
                groups = [scores[: N1 + 1], scores[N1 + 1 : N2 + 1], scores[N2 + 1 :]]
                means = [sum(group) / len(group) for group in groups]
                assert means == sorted(means)
                rests[N1, N2] = sum(
                    (x - m) ** 2 for group, m in zip(groups, means, strict=True) for x in group
                )
        return min(rests, key=lambda at: rests[at])

    def test_scores_that_fall_decide_nothing(self) -> None:
        """The largest that the budget allows is taken: here 5 · 1 + 2 · 10 of at most 26."""
        assert boundaries(torch.arange(9.0, 1.0, -1), allowed(8, (1, 10), 26)) == (0, 5)

    def test_equal_scores_too(self) -> None:
        assert boundaries(torch.zeros(6), allowed(6, (1, 10), 10**9)) == (0, 1)

    def test_what_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no N1 and N2 are allowed"):
            boundaries(torch.zeros(6), allowed(6, (1, 10), 10))
        assert boundaries(torch.zeros(6), allowed(6, (1, 10), 11)) == (3, 4)
        with pytest.raises(ConfigError, match="is not finite"):
            boundaries(torch.tensor([0.0, -math.inf, 1.0]), {(0, 1): 11})
