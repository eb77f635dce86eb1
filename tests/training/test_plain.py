"""``fit`` compared with its definition, :mod:`spafit.training.plain`."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import METHODS, N_DEV, N, SmallRun, make_dataset, trained
from support.sweeps import quick

from spafit import set_impl
from spafit.errors import ConfigError
from spafit.tasks.glue import Dataset
from spafit.training import plain

SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "warmup and decay of biases": {
        "warmup": 0.3,
        "decay_biases": True,
        "weight_decay": 0.3,
        "epochs": 2,
    },
    "clipped, evaluated within epochs": {"max_grad_norm": 0.5, "eval_every": 3, "epochs": 2},
    "not clipped": {"max_grad_norm": 0.0, "epochs": 2},
    "no dropout in group 1": {"dropout_in_group_1": False, "epochs": 2},
    "one batch an epoch": {"batch_size": N, "epochs": 2},
}
"""What changes between the runs; batches of 6 of 25 examples leave a last batch of one."""


RUNS = [("rte", "spafit"), ("rte", "spafit-direct"), ("rte", "full"), ("stsb", "spafit")]
OF_OTHERS = {
    ("rte", "spafit-direct"): ("warmup and decay of biases", "no dropout in group 1"),
    ("rte", "full"): ("warmup and decay of biases", "not clipped"),
    ("stsb", "spafit"): ("clipped, evaluated within epochs", "one batch an epoch"),
}
"""By default; the first is run with all settings."""


SWEEP = [(*run, name) for name in SETTINGS for run in RUNS]


def _by_default(task: str, method: str, settings: str) -> bool:
    return (task, method) == RUNS[0] or settings in OF_OTHERS[task, method]


def data(small: SmallRun, task: str) -> tuple[Dataset, Dataset]:
    if task == "rte":
        return small.train, small.dev
    return make_dataset(task, N, seed=1), make_dataset(task, N_DEV, "dev", seed=2)


class TestReferenceForm:
    """Oracle: ``plain.fit`` with the same seed. Equal bit for bit, dropout on."""

    @pytest.mark.parametrize(
        ("task", "method", "settings"),
        quick(SWEEP, [case for case in SWEEP if _by_default(*case)]),
    )
    def test_losses_scores_and_final_weights(
        self, small: SmallRun, task: str, method: str, settings: str
    ) -> None:
        assert METHODS[method]
        train, dev = data(small, task)
        ours, theirs = (small.model(method, num_labels=train.task.num_labels) for _ in range(2))
        for model in (ours, theirs):
            set_impl(model, "reference")
        changes = SETTINGS[settings]
        result = small.fit(ours, data=(train, dev), **changes)
        losses, history = plain.fit(theirs, small.tokenizer, train, dev, small.settings(**changes))
        assert list(result.losses) == losses
        assert list(result.history) == history
        assert result.metrics in [each["metrics"] for each in history]
        found, expected = trained(ours), trained(theirs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not ours.training and not theirs.training

    def test_seeds_apart(self, small: SmallRun) -> None:
        """Bit for bit; as one seed where both are it, and each of them changes the losses."""
        train, dev = data(small, "rte")

        def losses(**seeds: int) -> list[float]:
            model, other = small.model(), small.model()
            for each in (model, other):
                set_impl(each, "reference")
            config = small.settings(epochs=2, **seeds)
            expected, _ = plain.fit(other, small.tokenizer, train, dev, config)
            found = small.fit(model, data=(train, dev), epochs=2, **seeds)
            assert list(found.losses) == expected
            return expected

        apart = losses(order_seed=3, dropout_seed=4), losses(order_seed=4, dropout_seed=3)
        assert losses(seed=3) == losses(seed=9, order_seed=3, dropout_seed=3) not in apart
        assert apart[0] != apart[1]

    def test_these_losses_depend_on_dropout(self, small: SmallRun) -> None:
        """Otherwise the test above would not see a mask drawn too many."""
        losses = []
        for dropout in (True, False):
            model = small.model(dropout=dropout)
            set_impl(model, "reference")
            losses.append(small.fit(model, epochs=1).losses)
        assert abs(losses[0][0] - losses[1][0]) > 1e-3

    def test_the_best_is_kept_and_not_the_last(self, small: SmallRun) -> None:
        """At a rate too high to learn from, the last evaluation is not the best."""
        ours, theirs = small.model(), small.model()
        settings = {"learning_rate": 0.3, "eval_every": 1, "epochs": 2}
        for model in (ours, theirs):
            set_impl(model, "reference")
        result = small.fit(ours, **settings)
        config = small.settings(**settings)
        _, history = plain.fit(theirs, small.tokenizer, small.train, small.dev, config)
        assert [each["epoch"] for each in history] == [1] * 5 + [2] * 5
        scores = [each["metrics"]["accuracy"] for each in history]
        assert result.best_step == 1 + scores.index(max(scores)) < len(scores)
        expected = trained(theirs)
        assert all(torch.equal(value, expected[name]) for name, value in trained(ours).items())


class TestFastForms:
    """Oracle: ``plain.fit``, padded and in the reference form. Float64, dropout off: to rounding.

    Accumulation changes nothing but the order in which numbers are added.
    """

    @pytest.mark.parametrize("task", ["rte", "stsb"])
    @pytest.mark.parametrize(("impl", "accumulation"), [("auto", 1), ("auto", 3), ("fused", 1)])
    def test_losses_and_final_weights(
        self, small: SmallRun, task: str, impl: str, accumulation: int
    ) -> None:
        train, dev = data(small, task)
        ours, theirs = (
            small.model(num_labels=train.task.num_labels, dtype=torch.float64, dropout=False)
            for _ in range(2)
        )
        set_impl(ours, impl)
        set_impl(theirs, "reference")
        settings = {"warmup": 0.1, "epochs": 2}
        result = small.fit(ours, data=(train, dev), accumulation=accumulation, **settings)
        config = small.settings(**settings)
        losses, history = plain.fit(theirs, small.tokenizer, train, dev, config)
        assert np.abs(np.subtract(result.losses, losses)).max() < 1e-12
        for ours_at, theirs_at in zip(result.history, history, strict=True):
            assert ours_at["metrics"] == pytest.approx(theirs_at["metrics"], abs=1e-6)
        expected = trained(theirs)
        for name, value in trained(ours).items():
            assert (value - expected[name]).abs().max() < 1e-11, name


class TestThePage:
    def test_it_is_one_function_of_at_most_85_lines(self) -> None:
        tree = ast.parse(inspect.getsource(plain))
        [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        docstring, *_ = function.body
        assert function.end_lineno is not None and docstring.end_lineno is not None
        assert function.end_lineno - docstring.end_lineno <= 85

    def test_it_defines_what_it_is_the_oracle_of(self) -> None:
        """It imports no optimizer, schedule, loss, loop or step of the package."""
        tree = ast.parse(inspect.getsource(plain))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        of_training = {name for name in modules if name and name.startswith("spafit.training")}
        assert of_training == {"spafit.training.settings"}

    def test_another_precision_is_refused(self, small: SmallRun) -> None:
        config = small.settings(precision="bf16")
        with pytest.raises(ConfigError, match="no precision but float32, found bf16"):
            plain.fit(small.model(), small.tokenizer, small.train, small.dev, config)
