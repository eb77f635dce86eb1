"""The metrics against scikit-learn and scipy, and the majority's score on the real dev files."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spafit.errors import DataError
from spafit.tasks import metrics
from spafit.tasks.glue import TASKS, load
from spafit.tasks.scoring import compute, majority

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
