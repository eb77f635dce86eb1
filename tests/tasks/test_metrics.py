"""The metrics against scikit-learn and scipy, and the majority's score on the real dev files."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spafit.errors import DataError
from spafit.tasks import metrics
from spafit.tasks.glue import TASKS, load
from spafit.tasks.scoring import compute, intervals, majority, mistakes
from spafit.tasks.task import Task

sklearn_metrics = pytest.importorskip("sklearn.metrics")
scipy_stats = pytest.importorskip("scipy.stats")

TOLERANCE = 1e-12
LABELS = ("b", "a", "c")

two_columns = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.sampled_from(LABELS), min_size=n, max_size=n)] * 2)
)
scores = st.one_of(
    st.floats(-10, 10).map(lambda x: round(x, 3)),  # like real ones: with ties
    st.floats(-1e200, 1e200),  # their squares overflow
)
two_score_columns = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[st.lists(scores, min_size=n, max_size=n)] * 2)
)


class TestClassification:
    """Oracle: sklearn.metrics, to 1e-12, on random labels of three classes and on degenerate ones.

    Columns of one element and of one class come up among the random ones, and stand below.
    """

    @settings(max_examples=100, deadline=None)
    @given(columns=two_columns)
    def test_random(self, columns: tuple[list[str], list[str]]) -> None:
        self.check(*columns)

    @pytest.mark.parametrize("predictions", [["a"] * 5, ["b"] * 5, ["a", "b", "b", "a", "b"]])
    @pytest.mark.parametrize("references", [["a"] * 5, ["b"] * 5, ["b", "b", "a", "a", "b"]])
    def test_degenerate(self, predictions: list[str], references: list[str]) -> None:
        self.check(predictions, references)

    def check(self, predictions: list[str], references: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one class and of one label
            f1 = sklearn_metrics.f1_score(
                references, predictions, labels=["a"], average="macro", zero_division=0.0
            )
            matthews = sklearn_metrics.matthews_corrcoef(references, predictions)
        accuracy = sklearn_metrics.accuracy_score(references, predictions)
        assert metrics.accuracy(predictions, references) == pytest.approx(accuracy, abs=TOLERANCE)
        assert metrics.f1(predictions, references, "a") == pytest.approx(f1, abs=TOLERANCE)
        assert metrics.matthews(predictions, references) == pytest.approx(matthews, abs=TOLERANCE)

    def test_as_many_rows_as_qqp(self) -> None:
        """The products under the root pass 2**63 here."""
        random = np.random.default_rng(7)
        references = random.choice(["no", "yes"], size=390_965, p=[0.63, 0.37])
        flips = random.random(len(references)) < 0.1
        predictions = np.where(flips, np.where(references == "no", "yes", "no"), references)
        found = metrics.matthews(predictions.tolist(), references.tolist())
        expected = sklearn_metrics.matthews_corrcoef(references == "yes", predictions == "yes")
        assert found == pytest.approx(expected, abs=TOLERANCE)
        assert found > 0.7


class TestCorrelation:
    """Oracle: scipy.stats, to 1e-12, where scipy calls its own value accurate; 0.0 where NaN."""

    @settings(max_examples=150, deadline=None)
    @given(columns=two_score_columns)
    def test_random(self, columns: tuple[list[float], list[float]]) -> None:
        predictions, references = columns
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pearson = scipy_stats.pearsonr(predictions, references).statistic
            inaccurate = any("nearly constant" in str(w.message) for w in caught)
            spearman = scipy_stats.spearmanr(predictions, references).statistic
        found = metrics.pearson(predictions, references)
        assert -1.0 <= found <= 1.0
        if not inaccurate:
            assert found == pytest.approx(np.nan_to_num(pearson), abs=TOLERANCE)
        found = metrics.spearman(predictions, references)
        assert found == pytest.approx(np.nan_to_num(spearman), abs=TOLERANCE)

    @pytest.mark.parametrize("function", ["pearson", "spearman"])
    def test_constants_correlate_with_nothing(self, function: str) -> None:
        """scipy: NaN and a warning. 0.1 has no exact mean, so its deviations are not quite 0."""
        correlation = getattr(metrics, function)
        reference_function = getattr(scipy_stats, f"{function}r")
        for left, right in (
            ([0.1] * 3, [1.0, 2.0, 4.0]),
            ([1.0, 2.0, 4.0], [0.1] * 3),
            ([0.1] * 3, [0.1] * 3),
        ):
            with pytest.warns(scipy_stats.ConstantInputWarning):
                assert np.isnan(reference_function(left, right).statistic)
            assert correlation(left, right) == 0.0
        assert correlation([3.0], [4.0]) == 0.0

    def test_squares_that_overflow(self) -> None:
        predictions, references = [-3e200, 1e200, 2e200], [1.0, 2.0, 4.0]
        expected = scipy_stats.pearsonr([-3.0, 1.0, 2.0], references).statistic
        assert metrics.pearson(predictions, references) == pytest.approx(expected, abs=TOLERANCE)

    def test_ties(self) -> None:
        predictions, references = [1.0, 1.0, 2.0, 3.0, 3.0, 3.0], [2.0, 1.0, 1.0, 5.0, 4.0, 4.0]
        expected = scipy_stats.spearmanr(predictions, references).statistic
        assert metrics.spearman(predictions, references) == pytest.approx(expected, abs=TOLERANCE)


class TestCompute:
    """Oracle: the task's metrics by name, worked out by hand."""

    def test_mrpc_by_name(self) -> None:
        yes, no = "equivalent", "not_equivalent"
        found = compute("mrpc", [yes, yes, no, no], [yes, no, yes, no])
        assert found == {"f1": 0.5, "accuracy": 0.5}
        assert list(found) == ["f1", "accuracy"]  # the best epoch is chosen by the first
        # TP 1, FP 2, FN 0: F1 of "equivalent" is 0.5, of the other class it would be 0
        assert compute("mrpc", [yes, yes, yes], [yes, no, no])["f1"] == 0.5

    def test_every_task_has_its_metrics(self) -> None:
        for task in TASKS.values():
            values = [1.0, 2.5, 4.0] if task.is_regression else [*task.labels, task.labels[0]]
            assert compute(task, values, values) == pytest.approx(
                dict.fromkeys(task.metrics, 1.0), abs=TOLERANCE
            )

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match="prediction 1 for RTE is 'yes', expected entailment"):
            compute("rte", ["entailment", "yes"], ["entailment"] * 2)
        with pytest.raises(DataError, match="reference 0 for RTE is None"):
            compute("rte", ["entailment"], [None])
        with pytest.raises(DataError, match="prediction 0 for RTE is 1"):
            compute("rte", [1], ["entailment"])
        for wrong in (float("nan"), float("inf"), "3", None, True):
            with pytest.raises(DataError, match=r"prediction 0 for STS-B .*expected a finite"):
                compute("sts-b", [wrong, 1.0], [1.0, 2.0])
        with pytest.raises(DataError, match="found 1 predictions and 2 references"):
            compute("rte", ["entailment"], ["entailment"] * 2)
        with pytest.raises(DataError, match="there are no predictions for RTE"):
            compute("rte", [], ["entailment"])
        with pytest.raises(DataError, match="found 0 predictions and 0 references"):
            metrics.accuracy([], [])


class TestMajority:
    """Oracle: the published scores of the commonest class on dev, to their three places."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("cola", {"matthews": 0.0}),
            ("sst-2", {"accuracy": 0.509}),
            ("mrpc", {"f1": 0.812, "accuracy": 0.684}),
            ("rte", {"accuracy": 0.527}),
            ("wnli", {"accuracy": 0.563}),
            ("sts-b", {"pearson": 0.0, "spearman": 0.0}),
        ],
    )
    def test_dev(self, shared_data: Path, name: str, expected: dict[str, float]) -> None:
        dev = load(name, "dev", shared_data / "glue")
        found = majority(name, dev.labels)
        assert found == pytest.approx(expected, abs=5e-4)
        assert list(found) == list(expected)

    def test_cola_accuracy_of_the_majority(self, shared_data: Path) -> None:
        labels = load("cola", "dev", shared_data / "glue").labels
        assert labels.count("acceptable") / len(labels) == pytest.approx(0.691, abs=5e-4)

    def test_equally_common_labels(self) -> None:
        """The first in the task's order: MRPC's "not_equivalent", whose F1 is 0."""
        assert majority("mrpc", ["equivalent", "not_equivalent"]) == {"f1": 0.0, "accuracy": 0.5}

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match="reference 1 for RTE"):
            majority("rte", ["entailment", None])
        for name in ("rte", "sts-b"):
            with pytest.raises(DataError, match="there are no references"):
                majority(name, [])


class TestOfOwnTasks:
    """Oracle: sklearn.metrics by the same names, on random labels and scores, to 1e-12."""

    @settings(max_examples=60, deadline=None)
    @given(columns=two_columns)
    @example(columns=(["a", "c"], ["a", "a"]))  # a class that is predicted and never true
    def test_labels(self, columns: tuple[list[str], list[str]]) -> None:
        predictions, references = columns
        every = [f"{a}_{b}" for a in ("macro", "weighted") for b in ("precision", "recall", "f1")]
        task = Task("t", ("text",), LABELS, (*every, "accuracy", "matthews"))
        found = compute(task, predictions, references)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in every:
                average, _, score = name.partition("_")
                function = getattr(sklearn_metrics, f"{score}_score")
                expected = function(references, predictions, average=average, zero_division=0.0)
                assert found[name] == pytest.approx(expected, abs=TOLERANCE), name

    @pytest.mark.parametrize("name", ["precision", "recall", "f1"])
    def test_two_labels(self, name: str) -> None:
        predictions, references = list("aabbbab"), list("abbabaa")
        task = Task("t", ("text",), ("a", "b"), (name,))
        expected = getattr(sklearn_metrics, f"{name}_score")(references, predictions, pos_label="b")
        assert compute(task, predictions, references)[name] == pytest.approx(expected)

    @settings(max_examples=30, deadline=None)
    @given(columns=two_score_columns)
    def test_scores(self, columns: tuple[list[float], list[float]]) -> None:
        names = ("mean_squared_error", "mean_absolute_error")
        with np.errstate(over="ignore"):
            found = compute(Task("t", ("text",), (), names), *columns)
            for name in names:
                expected = getattr(sklearn_metrics, name)(columns[1], columns[0])
                assert found[name] == pytest.approx(expected, rel=1e-9)

    def test_log_loss(self) -> None:
        sure = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])
        task = Task("t", ("text",), ("a", "b", "c"), ("log_loss",))
        expected = sklearn_metrics.log_loss(["a", "c", "b"], sure, labels=["a", "b", "c"])
        found = compute(task, ["a", "b", "c"], ["a", "c", "b"], sure)["log_loss"]
        assert found == pytest.approx(expected, rel=1e-9)
        with pytest.raises(DataError, match="need probabilities"):
            compute(task, ["a"], ["a"])
        shares = -np.mean(np.log([0.5, 0.5, 0.25, 0.25]))
        assert majority(task, ["a", "a", "b", "c"])["log_loss"] == pytest.approx(shares)

    def test_the_mean_score(self) -> None:
        task = Task("t", ("text",), (), ("mean_squared_error",))
        assert majority(task, [0.0, 0.0, 3.0]) == {"mean_squared_error": pytest.approx(2.0)}

    @pytest.mark.parametrize("name", metrics.METRICS)
    def test_which_is_better(self, name: str) -> None:
        is_error = name in ("log_loss", "mean_squared_error", "mean_absolute_error")
        assert metrics.is_better(name, 0.6, 0.5) != is_error
        assert metrics.is_better(name, 0.5, 0.6) == is_error
        assert not metrics.is_better(name, 0.5, 0.5)


class TestIntervals:
    """Oracle: the normal approximation of a share, which holds for many examples."""

    def test_accuracy_of_many(self) -> None:
        task = Task("t", ("text",), ("a", "b"), ("accuracy",))
        references = ["a"] * 1000
        predictions = ["a"] * 800 + ["b"] * 200
        low, high = intervals(task, predictions, references)["accuracy"]
        half = 1.96 * (0.8 * 0.2 / 1000) ** 0.5
        assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.004)
        again = intervals(task, predictions, references, samples=1000, seed=0)
        assert again["accuracy"] == (low, high)

    def test_rows_and_counts_are_drawn_alike(self) -> None:
        """With log loss whole rows are drawn, else the cells of the confusion matrix."""
        generator = np.random.default_rng(0)
        true = generator.integers(2, size=400)
        sure = generator.dirichlet([2, 1], size=400)
        names = np.array(["a", "b"])
        given = names[sure.argmax(1)].tolist(), names[true].tolist()
        bounds = []
        for more in ((), ("log_loss",)):
            task = Task("t", ("text",), ("a", "b"), ("accuracy", "recall", *more))
            found = intervals(task, *given, sure)
            bounds.append((*found["accuracy"], *found["recall"]))
        assert bounds[0] == pytest.approx(bounds[1], abs=0.015)

    def test_scores(self) -> None:
        task = Task("t", ("text",), (), ("mean_absolute_error", "pearson"))
        found = intervals(task, [1.0, 2.0, 3.5, 9.0], [1.5, 2.5, 4.0, 9.5])
        assert found["mean_absolute_error"] == (0.5, 0.5)
        references = [float(k) for k in range(1000)]
        predictions = [k + (k % 5 == 0) for k in references]
        half = 1.96 * (0.8 * 0.2 / 1000) ** 0.5
        found = intervals(task, predictions, references)
        assert found["mean_absolute_error"] == pytest.approx((0.2 - half, 0.2 + half), abs=0.004)


def test_mistakes_the_surest_first() -> None:
    task = Task("t", ("text",), ("a", "b"), ("accuracy",))
    sure = np.array([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2]])
    found = mistakes(task, ["a", "b", "a"], ["b", "a", "a"], sure)
    assert [(each.row, each.weight) for each in found] == [(1, 0.9), (0, 0.6)]
    assert mistakes(task, ["a", "b", "a"], ["b", None, "a"], sure) == found[1:]
    scores = Task("t", ("text",), (), ("pearson",))
    found = mistakes(scores, [1.0, 5.0, 0.0], [2.0, 0.0, 9.0])
    assert [(each.row, each.weight) for each in found] == [(2, 9.0), (1, 5.0), (0, 1.0)]
