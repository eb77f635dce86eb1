"""What the probes of all layers find: in made-up states, where the answer is known.

Oracle: states of which layer 3 alone knows the label; Tenney et al.'s two summaries by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from spafit.errors import ConfigError, DataError
from spafit.experiments.probe import linear_probe
from spafit.experiments.probe.layers import (
    Probed,
    center_of_gravity,
    chance,
    deviation,
    expected_layer,
    probe,
    some_rows,
)
from spafit.experiments.probe.report import what_it_says
from spafit.tasks.task import Dataset, Example, Task

LAYERS, D, N, N_DEV = 4, 6, 180, 120
CLASSES = Task("made", ("text",), ("a", "b", "c"), ("accuracy", "log_loss"))
SCORES = Task("scored", ("text",), (), ("pearson", "mean_squared_error"))


def made(task: Task, knows: int = 3) -> tuple[dict[str, dict[str, torch.Tensor]], list[Dataset]]:
    """Return states of noise, but that "mean" of one layer tells the label, and the rows."""
    generator = torch.Generator().manual_seed(0)
    states, data = {}, []
    for split, n in (("train", N), ("dev", N_DEV)):
        states[split] = {
            name: torch.randn(LAYERS + 1, n, D, generator=generator) for name in ("cls", "mean")
        }
        if task.labels:
            classes = torch.arange(n) % 3
            states[split]["mean"][knows, :, :3] += 5 * torch.eye(3)[classes]
            labels: list[str | float] = [task.labels[k] for k in classes.tolist()]
        else:
            signal = states[split]["mean"][knows, :, 0]
            labels = (100 + 20 * signal + torch.randn(n, generator=generator)).tolist()
        examples = (Example(k, f"text {k}", None, label) for k, label in enumerate(labels))
        data.append(Dataset(task, split, tuple(examples), f"made {split}"))
    return states, data


@pytest.fixture(scope="module", autouse=True)
def few_strengths() -> Iterator[None]:
    """Save time: which λ there are is not the question here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "STRENGTHS", (0.1, 0.01))
        yield


@pytest.fixture(scope="module")
def found(few_strengths: None) -> dict[str, Probed]:
    states, (train, dev) = made(CLASSES)
    return probe(states, train, dev, [0, 1])


class TestTheProbes:
    def test_only_the_layer_that_knows_scores(self, found: dict[str, Probed]) -> None:
        accuracy = found["mean"].scores["accuracy"].mean(1)
        assert accuracy[3] > 0.95 and found["mean"].best_layer == 3
        assert np.delete(accuracy, 3).max() < 0.5
        assert found["cls"].scores["accuracy"].mean(1).max() < 0.5
        assert found["mean"].scores["log_loss"].mean(1).argmin() == 3

    def test_a_mix_scores_from_that_layer_on(self, found: dict[str, Probed]) -> None:
        cumulative = found["mean"].cumulative.mean(1)
        assert cumulative[:3].max() < 0.5 and cumulative[3:].min() > 0.95
        assert expected_layer(cumulative) == pytest.approx(3, abs=0.3)
        assert found["mean"].first_gain() == 3
        assert found["cls"].first_gain() is None

    def test_the_mix_attends_to_that_layer(self, found: dict[str, Probed]) -> None:
        weights = found["mean"].weights
        assert np.allclose(weights.sum(0), 1, atol=1e-6)
        assert weights[3].min() > 0.8
        assert center_of_gravity(weights) == pytest.approx(3, abs=0.4)

    def test_the_seeds_differ_and_repeat(self, found: dict[str, Probed]) -> None:
        states, (train, dev) = made(CLASSES)
        one = probe(states, train, dev, [1])
        for name in ("cls", "mean"):
            assert len(set(found[name].scores["log_loss"][2])) == 2
            column = found[name].scores["log_loss"][:, 1:2]
            assert np.array_equal(one[name].scores["log_loss"], column)

    def test_the_error_is_that_of_dev(self, found: dict[str, Probed]) -> None:
        p = found["cls"].cumulative[:, 0]
        expected = np.sqrt(p * (1 - p) / N_DEV).max()
        assert found["cls"].error == pytest.approx(expected, rel=0.25)

    def test_a_gain_must_be_twice_its_uncertainty(self) -> None:
        """Whose parts are 0.03 over the seeds and 0.04 over the draws: 0.05 together."""
        half = 0.03 / 2**0.5
        for gain, expected in ((0.101, 2), (0.099, None)):
            cumulative = np.array([[0.5, 0.5], [0.5, 0.5], [0.5 + gain - half, 0.5 + gain + half]])
            drawn = np.array([[0.5, 0.5], [0.5, 0.5], [0.6, 0.6 + 0.04 * 2**0.5]])
            one = Probed({"accuracy": cumulative}, cumulative, cumulative, cumulative, drawn)
            assert one.first_gain() == expected
            assert one.error == pytest.approx(0.04)
            shared = np.array([0.0, 0.3])  # what all layers share does not count
            assert dataclasses.replace(one, drawn=drawn + shared).first_gain() == expected

    def test_says_what_it_means_for_n1(self, found: dict[str, Probed]) -> None:
        said = what_it_says(found)
        assert "layers 0 to 1 add nothing to the embeddings" in said
        assert "layer 2 does: a reason to try N1 = 1." in said
        assert what_it_says({**found, "mean": found["cls"]}).startswith("No mix of layers does")

    def test_says_of_which_states_no_mix_gains(self, found: dict[str, Probed]) -> None:
        """Those that score highest, where the others gain."""
        higher = dataclasses.replace(
            found["cls"], scores={k: v + 1 for k, v in found["cls"].scores.items()}
        )
        said = what_it_says({"cls": found["mean"], "mean": higher})
        assert said.startswith("Of the states that score highest (mean of tokens) no mix of layers")

    @pytest.mark.parametrize(
        ("first", "text"),
        [
            (1, "and so no N1"),
            (2, "layer 0 adds nothing"),
            (3, "N1 = 1. It is"),  # of four layers, 2 and 3 are groups of their own
            (4, "layer 3 does: a reason to try N1 = 1, the largest with which three groups are"),
        ],
    )
    def test_says_it_of_other_layers(
        self, found: dict[str, Probed], first: int, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Probed, "first_gain", lambda _: first)
        assert text in what_it_says(found)

    def test_two_layers_have_no_n1(self, found: dict[str, Probed]) -> None:
        one = dataclasses.replace(
            found["mean"],
            cumulative=np.array([[0.5], [0.5], [0.9]]).repeat(2, 1),
            drawn=np.zeros((3, 2)),
        )
        said = what_it_says({"cls": found["cls"], "mean": one})
        assert said.endswith("too few layers for three groups, and so no N1.")

    def test_one_seed_says_nothing(self, found: dict[str, Probed]) -> None:
        one = {
            name: dataclasses.replace(each, cumulative=each.cumulative[:, :1])
            for name, each in found.items()
        }
        assert what_it_says(one).startswith("One seed does not tell a gain from chance")

    def test_scores(self) -> None:
        states, (train, dev) = made(SCORES, knows=2)
        found = probe(states, train, dev, [0])
        one = found["mean"]
        assert one.scores["pearson"].mean(1)[2] > 0.95 and one.best_layer == 2
        # In the range of the scores: their variance is 400, and of what is not known 1.
        assert one.scores["mean_squared_error"].mean(1)[2] < 3
        assert one.scores["mean_squared_error"].mean(1)[0] > 300
        assert one.first_gain() == 2

    def test_of_a_metric_that_is_to_be_small(self, found: dict[str, Probed]) -> None:
        """Log loss: the same numbers read as a metric that is to be large say something else."""
        loss = found["mean"].scores["log_loss"]
        falls = np.array([[1.0], [1.0], [0.5], [0.6], [0.6]])
        one = dataclasses.replace(
            found["mean"], scores={"log_loss": loss}, cumulative=falls, drawn=np.zeros((5, 2))
        )
        assert one.best_layer == 3 and one.first_gain() == 2
        other = dataclasses.replace(one, scores={"accuracy": loss})
        assert other.best_layer != 3 and other.first_gain() is None


class TestSummaries:
    def test_center_of_gravity(self) -> None:
        assert center_of_gravity(np.array([0.25, 0.0, 0.5, 0.25])) == 1.75
        two = center_of_gravity(np.array([[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]]))
        assert two.tolist() == [0.0, 1.5]

    def test_expected_layer(self) -> None:
        # Δ = 0.2, 0.0, 0.2: (1 · 0.2 + 3 · 0.2) / 0.4
        assert expected_layer([0.5, 0.7, 0.7, 0.9]) == pytest.approx(2)
        # A loss that falls by as much.
        assert expected_layer([0.9, 0.7, 0.7, 0.5]) == pytest.approx(2)
        # Δ = 0.4, -0.2: (0.4 - 0.4) / 0.2
        assert expected_layer([0.5, 0.9, 0.7]) == pytest.approx(0)
        assert expected_layer([0.5, 0.9, 0.5]) is None

    def test_deviation(self) -> None:
        assert deviation(np.array([[1.0, 3.0], [2.0, 2.0]])).tolist() == [2**0.5, 0.0]
        assert deviation(np.array([[1.0], [2.0]])).tolist() == [0.0, 0.0]


class TestBaselines:
    def test_chance(self) -> None:
        """Three quarters a: a guess is right with 0.75² + 0.25²."""
        task = Task("t", ("text",), ("a", "b"), ("accuracy", "matthews", "log_loss"))
        examples = tuple(Example(k, "x", None, "b" if k % 4 == 0 else "a") for k in range(400))
        data = Dataset(task, "train", examples, "made")
        found = chance(task, data, data)
        assert found["accuracy"] == pytest.approx(0.625, abs=0.01)
        assert found["matthews"] == pytest.approx(0, abs=0.01)
        entropy = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
        assert found["log_loss"] == pytest.approx(entropy)

    def test_chance_of_scores(self) -> None:
        _, (train, dev) = made(SCORES)
        found = chance(SCORES, train, dev)
        assert found["pearson"] == pytest.approx(0, abs=0.03)
        assert 600 < found["mean_squared_error"] < 1000  # twice the variance


class TestRows:
    def test_some_rows_are_drawn_alike_and_in_order(self) -> None:
        _, (train, dev) = made(CLASSES)
        some = some_rows(train, 40)
        numbers = [each.index for each in some]
        assert len(some) == 40 and numbers == sorted(numbers) and numbers != list(range(40))
        assert some == some_rows(train, 40) and some.sha256 != train.sha256
        assert some_rows(dev, N_DEV) is dev
        with pytest.raises(ConfigError, match="10 rows or more, asked for are 9"):
            some_rows(train, 9)

    @pytest.mark.parametrize(
        ("keep", "count"), [(lambda k: k < 9, "9 with 3"), (lambda k: k % 3 == 0, "60 with 1")]
    )
    def test_too_few_are_refused(self, keep, count: str) -> None:
        states, (train, dev) = made(CLASSES)
        few = tuple(each for each in train if keep(each.index))
        train = Dataset(CLASSES, "train", few, "few.tsv")
        with pytest.raises(DataError, match=f"two labels among them; few.tsv has {count}"):
            probe(states, train, dev, [0])

    def test_a_row_without_a_label_is_refused(self) -> None:
        states, (train, dev) = made(CLASSES)
        dev = Dataset(CLASSES, "dev", (Example(0, "x", None, None),), "dev.tsv")
        with pytest.raises(DataError, match=r"dev\.tsv has no labels, which a probe needs"):
            probe(states, train, dev, [0])
