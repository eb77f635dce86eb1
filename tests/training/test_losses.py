"""Weights of labels, smoothing, scores of any range, metrics of the best epoch, early stopping.

Oracle: :mod:`spafit.training.plain`, where ``F.cross_entropy`` has the weights; torch's own loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_runs import SmallRun, make_dataset, trained

import spafit
from spafit import set_impl
from spafit.errors import CheckpointError, ConfigError, DataError
from spafit.tasks.metrics import is_better
from spafit.training import plain
from spafit.training.optimisation import loss_function
from spafit.training.settings import complete

WEIGHTS = {"entailment": 3.0, "not_entailment": 0.25}


def own_scores(n: int, seed: int) -> spafit.Dataset:
    texts = [each.text_a for each in make_dataset("stsb", n, seed=seed)]
    return spafit.dataset(texts, [1000.0 + 50 * len(each) for each in texts], regression=True)


class TestAsThePage:
    @pytest.mark.parametrize(
        "changes",
        [
            {"class_weights": "balanced"},
            {"class_weights": WEIGHTS, "label_smoothing": 0.2},
            {"metric": "log_loss", "label_smoothing": 0.2},
        ],
        ids=str,
    )
    def test_bit_for_bit(self, small: SmallRun, changes: dict[str, Any]) -> None:
        model, other = small.model(), small.model()
        for each in (model, other):
            set_impl(each, "reference")
        result = small.fit(model, epochs=2, **changes)
        config = small.settings(epochs=2, **changes)
        losses, history = plain.fit(other, small.tokenizer, small.train, small.dev, config)
        assert list(result.losses) == losses
        for found, expected in zip(result.history, history, strict=True):  # of other batches
            assert found == {**expected, "metrics": pytest.approx(expected["metrics"], rel=1e-12)}
        assert list(result.losses) != list(small.fit(epochs=2).losses)
        for name, value in trained(model).items():
            assert torch.equal(value, other.get_parameter(name)), name

    def test_scores_of_a_large_range(self, small: SmallRun) -> None:
        train, dev = own_scores(25, 1), own_scores(11, 2)
        model, other = small.model(num_labels=1), small.model(num_labels=1)
        for each in (model, other):
            set_impl(each, "reference")
        result = small.fit(model, data=(train, dev), epochs=2)
        losses, history = plain.fit(other, small.tokenizer, train, dev, small.settings(epochs=2))
        assert (list(result.losses), list(result.history)) == (losses, history)
        assert max(losses) < 10  # it trains on scores of mean 0 and deviation 1
        found = spafit.predict(model, small.tokenizer, dev)
        center, spread = train.task.scale
        assert found.labels == [center + spread * float(x) for x in found.logits[:, 0]]
        assert model.adaptation is not None
        assert model.adaptation.definition == train.task.to_json_dict()


class TestWeights:
    def test_balanced(self, small: SmallRun) -> None:
        config = complete(small.settings(class_weights="balanced"), small.model(), small.train)
        weights = config.class_weights
        assert isinstance(weights, dict)
        counts = {name: small.train.labels.count(name) for name in weights}
        shares = {name: weights[name] * counts[name] for name in weights}
        assert len(set(counts.values())) == 2
        assert shares == pytest.approx(dict.fromkeys(shares, len(small.train) / 2))

    def test_balanced_of_more_labels(self, small: SmallRun) -> None:
        """By n / (C n_c); a label without examples is as one that has one."""
        task = spafit.Task("t", ("text",), tuple("abcd"), ("accuracy",))
        train = spafit.dataset(["x"] * 12, [*"aaaaaabbbbcc"], task=task)
        weights = complete(small.settings(class_weights="balanced"), small.model(), train)
        assert weights.class_weights == pytest.approx({"a": 0.5, "b": 0.75, "c": 1.5, "d": 3.0})

    def test_equation(self) -> None:
        """-(1 - e) w_y log p_y - (e / C) sum of w_c log p_c, added up over the examples."""
        logits = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y, w = torch.tensor([0, 1, 2, 2, 1, 0, 0]), torch.tensor([0.5, 2.0, 1.0]).double()
        logs = logits.log_softmax(1)
        of_y = -0.7 * w[y] * logs[torch.arange(7), y]
        expected = (of_y - 0.3 / 3 * (w * logs).sum(1)).sum()
        found = loss_function(logits, y, class_weights=w.float(), label_smoothing=0.3)
        assert float(found) == pytest.approx(float(expected), abs=1e-12)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"class_weights": {"entailment": 1.0}}, "'not_entailment' is missing"),
            ({"class_weights": {**WEIGHTS, "x": 1.0}}, "'x' is none of them"),
            ({"metric": "pearson"}, "does not fit a task with labels"),
        ],
    )
    def test_refusals(self, small: SmallRun, changes: dict[str, Any], match: str) -> None:
        with pytest.raises((ConfigError, DataError), match=match):
            small.fit(**changes)

    @pytest.mark.parametrize("changes", [{"class_weights": "balanced"}, {"label_smoothing": 0.1}])
    def test_scores_have_neither(self, small: SmallRun, changes: dict[str, Any]) -> None:
        data = (own_scores(12, 1), own_scores(8, 2))
        with pytest.raises(ConfigError, match="are for labels; own has scores"):
            small.fit(small.model(num_labels=1), data=data, **changes)


class TestOwnLoss:
    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    def test_the_usual_one_given(self, small: SmallRun, tmp_path: Any, precision: str) -> None:
        def usual(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            assert logits.dtype == torch.float32
            return F.cross_entropy(logits, targets, reduction="none")

        settings = small.settings(epochs=1, precision=precision, out=tmp_path)
        found = spafit.fit(
            small.model(), small.tokenizer, small.train, small.dev, settings, loss=usual
        )
        expected = small.fit(epochs=1, precision=precision)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        with pytest.raises(CheckpointError, match=r"loss is '.*usual', asked for is None"):
            small.fit(epochs=1, precision=precision, out=tmp_path)

    def test_refusals(self, small: SmallRun) -> None:
        def fit(loss: Any, **changes: Any) -> None:
            settings = small.settings(**changes)
            spafit.fit(small.model(), small.tokenizer, small.train, small.dev, settings, loss=loss)

        with pytest.raises(ConfigError, match=r"one value for each example, \(6,\), found \(\)"):
            fit(F.cross_entropy)
        for changes in ({"class_weights": "balanced"}, {"label_smoothing": 0.1}):
            with pytest.raises(ConfigError, match="has its own class weights"):
                fit(F.cross_entropy, **changes)


class TestBestEpoch:
    def test_by_another_metric(self, small: SmallRun) -> None:
        result = small.fit(metric="log_loss")
        assert list(result.metrics) == ["log_loss", "accuracy"]
        every = [row["metrics"]["log_loss"] for row in result.history]
        assert result.metrics["log_loss"] == min(every)
        assert is_better("log_loss", min(every), max(every))

    def test_early_stopping_and_its_resumption(self, small: SmallRun, tmp_path: Any) -> None:
        """Oracle: the same run without it, whose first evaluations are the same."""
        whole = small.fit(epochs=8, learning_rate=0.2)
        first = {row["epoch"]: row["metrics"]["accuracy"] for row in whole.history}
        best, since = 0.0, 0
        for epoch in sorted(first):
            best, since = (first[epoch], 0) if first[epoch] > best else (best, since + 1)
            if since == 2:
                break
        assert epoch < 8
        stopped = small.fit(epochs=8, learning_rate=0.2, early_stopping=2, out=tmp_path)
        assert stopped.history == whole.history[:epoch]
        assert stopped.losses == whole.losses[: 5 * epoch]
        again = small.fit(epochs=8, learning_rate=0.2, early_stopping=2, out=tmp_path)
        assert (again.history, again.losses) == (stopped.history, stopped.losses)
        assert "finished already after step" in (tmp_path / "log.jsonl").read_text()
        on = small.fit(epochs=8, learning_rate=0.2, out=tmp_path)  # without it, to the end
        assert (on.history, on.losses) == (whole.history, whole.losses)
