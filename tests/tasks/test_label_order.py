"""A classifier from a file, whose rows are in the order that the file's names say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_runs import SmallRun, make_dataset, undecided, without_labels

from spafit import set_impl
from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, DataError
from spafit.methods import plan
from spafit.strata import adapt, adapters_disabled
from spafit.tasks.glue import TASKS, get_task
from spafit.tasks.label_order import label_names
from spafit.tasks.own import dataset
from spafit.training import plain
from spafit.training.inference import evaluate, predict, probabilities_of
from spafit.weights.adapter_files import load_adapter, read_adapter_header, save_adapter
from spafit.weights.pretrained import load_pretrained
from weights_tools import make_tiny

RTE = ("entailment", "not_entailment")


@pytest.fixture(scope="module")
def folders(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one classifier twice: its rows in RTE's order, and exchanged, with their names."""
    root = tmp_path_factory.mktemp("heads")
    found = {}
    head = undecided(small, small.train).classifier.state_dict()
    for name, order in (("same", (0, 1)), ("other", (1, 0))):
        folder = found[name] = make_tiny(root / name)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {f"classifier.{part}": head[part][list(order)] for part in head}
        save_file(tensors, folder / "model.safetensors")
        say(folder, [RTE[row] for row in order])
    return found


def say(folder: Path, names: list[str] | tuple[str, ...]) -> Path:
    """Give the rows of a folder's classifier names."""
    path = folder / "config.json"
    entries = {**json.loads(path.read_text()), "id2label": dict(enumerate(names))}
    path.write_text(json.dumps(entries))
    return folder


def loaded(folder: Path, adapted: bool = False) -> BertForSequenceClassification:
    model = load_pretrained(folder, num_labels=2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    if adapted:
        adapt(model, plan("SPAFIT-0-1-II", 4, r=5))
    return model


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("headed")
    return {
        labels: make_tiny(root / str(labels), num_hidden_layers=1, num_labels=labels)
        for labels in (1, 2, 3)
    }


class TestNamesOfAFile:
    """Oracle: the task's table."""

    @pytest.mark.parametrize(
        ("task", "names", "order"),
        [
            ("rte", "NOT_ENTAILMENT|ENTAILMENT", (1, 0)),
            ("rte", "Entailment|not entailment", (0, 1)),
            ("qnli", "non-entailment|entailment", (1, 0)),
            ("rte", "no_entailment|entailment", (1, 0)),
            ("wnli", "entailment|NotEntailment", (1, 0)),
            ("sst-2", "POSITIVE|NEGATIVE", (1, 0)),
            ("sst-2", "1|0", (1, 0)),
            ("cola", "Acceptable|Unacceptable", (1, 0)),
            ("mrpc", "equivalent|not_equivalent", (1, 0)),
            ("qqp", "Duplicate|Not-Duplicate", (1, 0)),
            ("mnli", "CONTRADICTION|NEUTRAL|ENTAILMENT", (2, 1, 0)),
            ("mnli", "contradiction|entailment|neutral", (2, 0, 1)),
            ("mnli", "LABEL_2|LABEL_1|LABEL_0", (0, 1, 2)),  # not known, so the task's
            ("sts-b", "similarity", ()),
        ],
    )
    def test_are_taken_in_any_spelling(
        self, headed: dict[int, Path], task: str, names: str, order: tuple[int, ...]
    ) -> None:
        labels = get_task(task).labels
        folder = say(headed[len(labels) or 1], names.split("|"))
        model = load_pretrained(folder, num_labels=len(labels) or 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert label_names(model, make_dataset(task, 3)) == tuple(labels[i] for i in order)

    @pytest.mark.parametrize(
        ("task", "names"),
        [("rte", "NEGATIVE|POSITIVE"), ("rte", "1|0"), ("mnli", "entailment|neutral|other")],
    )
    def test_of_another_task_are_told(self, headed: dict[int, Path], task: str, names: str) -> None:
        labels, found = get_task(task).labels, names.split("|")
        model = load_pretrained(say(headed[len(labels)], found), num_labels=len(labels))
        with pytest.warns(UserWarning, match=f"names its outputs {', '.join(found)}; they are "):
            assert label_names(model, make_dataset(task, 3)) == labels


class TestAHeadInAnotherOrder:
    """Oracle: the same classifier with its rows in the task's order."""

    def test_predicts_the_same_labels(self, small: SmallRun, folders: dict[str, Path]) -> None:
        same, other = (loaded(folders[name]) for name in ("same", "other"))
        assert torch.equal(same.classifier.weight, other.classifier.weight.flip(0))
        predicted = predict(same, small.tokenizer, small.train)
        turned = predict(other, small.tokenizer, without_labels(small.train))
        assert turned.labels == predicted.labels
        assert set(predicted.labels) == set(RTE)
        assert (turned.logits == predicted.logits[:, ::-1]).all()
        scores = evaluate(same, small.tokenizer, small.train)
        assert evaluate(other, small.tokenizer, small.train) == scores

    def test_probabilities_are_in_the_order_of_the_task(self) -> None:
        logits = np.log(np.array([[0.5, 0.2, 0.3]], dtype=np.float32))
        found = probabilities_of(logits, ("neutral", "contradiction", "entailment"), TASKS["mnli"])
        assert found is not None
        assert found.tolist() == [pytest.approx([0.3, 0.5, 0.2])]

    def test_trains_alike_and_is_saved_by_name(
        self, small: SmallRun, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        same, other = (loaded(folders[name], adapted=True) for name in ("same", "other"))
        weights = {"entailment": 1.5, "not_entailment": 0.75}
        theirs = small.fit(same, epochs=2, class_weights=weights)
        ours = small.fit(other, epochs=2, class_weights=weights)
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        assert ours.losses[-1] < 0.9 * ours.losses[0]
        assert ours.metrics == theirs.metrics
        expected = predict(same, small.tokenizer, small.dev).labels
        assert predict(other, small.tokenizer, small.dev).labels == expected
        with adapters_disabled(other):
            before = predict(loaded(folders["other"]), small.tokenizer, small.dev).labels
            assert predict(other, small.tokenizer, small.dev).labels == before

        save_adapter(other, tmp_path / "adapter.safetensors")
        assert read_adapter_header(tmp_path / "adapter.safetensors").labels == RTE[::-1]
        # Their encoders are the same base; each keeps its own head for when adapters are disabled.
        fresh = loaded(folders["same"])
        load_adapter(fresh, tmp_path / "adapter.safetensors")
        assert predict(fresh, small.tokenizer, small.dev).labels == expected
        with adapters_disabled(fresh):
            assert label_names(fresh, small.dev) == RTE
        assert label_names(fresh, small.dev) == RTE[::-1]

    def test_the_plain_loop_takes_the_same_order(
        self, small: SmallRun, folders: dict[str, Path]
    ) -> None:
        ours, theirs = (loaded(folders["other"], adapted=True) for _ in range(2))
        for model in (ours, theirs):
            set_impl(model, "reference")
        result = small.fit(ours, epochs=1)
        config = small.settings(epochs=1)
        losses, _ = plain.fit(theirs, small.tokenizer, small.train, small.dev, config)
        assert list(result.losses) == losses

    def test_a_run_is_resumed_in_its_own_order(
        self, small: SmallRun, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        def run(name: str, **changes: Any) -> Any:
            model = loaded(folders[name], adapted=True)
            return small.fit(model, out=tmp_path / "run", **changes)

        result = run("other", epochs=1)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["labels"] == list(RTE[::-1])
        with pytest.raises(CheckpointError, match=r"labels\.0 is 'not_entailment', asked for is"):
            run("same", epochs=2)
        assert run("other", epochs=1).metrics == result.metrics


class TestTextsWithoutLabels:
    """They need no task: they are those of the model's own."""

    TEXTS = ("the cat sees", "a dog sleeps", "students like the teacher")
    PAIRS = (("the cat", "a dog"), ("a child", "the teacher"))

    def test_of_a_task_of_your_own(self, small: SmallRun, tmp_path: Path) -> None:
        data = dataset(list(self.TEXTS) * 4, ["b", "a", "c"] * 4)
        model = small.model(num_labels=3)
        small.fit(model, data=(data, data), epochs=1)
        expected = predict(model, small.tokenizer, dataset(self.TEXTS, task=data.task))
        assert set(expected.labels) <= {"a", "b", "c"}
        (tmp_path / "new.csv").write_text("text\n" + "\n".join(self.TEXTS) + "\n")
        for given in (self.TEXTS, [{"text": text} for text in self.TEXTS], tmp_path / "new.csv"):
            found = predict(model, small.tokenizer, dataset(given))
            assert (found.labels, found.names) == (expected.labels, expected.names)
            assert (found.logits == expected.logits).all()
        with pytest.raises(
            DataError, match="has pairs of texts, and the model was trained for own"
        ):
            predict(model, small.tokenizer, dataset(self.PAIRS))
        with pytest.raises(DataError, match="memory has no labels to score against"):
            evaluate(model, small.tokenizer, dataset(self.TEXTS))
        for both in ((dataset(self.TEXTS), data), (data, dataset(self.TEXTS))):
            with pytest.raises(DataError, match="memory has no labels to learn from"):
                small.fit(model, data=both)
        scores = dataset(self.TEXTS, regression=True)  # that is another task
        with pytest.raises(DataError, match="trained for the labels a, b, c, own has a score"):
            predict(model, small.tokenizer, scores)
        as_scores = dataset(self.TEXTS, [1, 2, 3], task=dataset(self.TEXTS).task)
        with pytest.raises(DataError, match="trained for the labels a, b, c, own has a score"):
            evaluate(model, small.tokenizer, as_scores)
        others = without_labels(dataset(self.TEXTS, ["x", "y", "z"]))
        with pytest.raises(DataError, match="trained for the labels a, b, c, own has x, y, z"):
            predict(model, small.tokenizer, others)

    def test_of_scores(self, small: SmallRun) -> None:
        data = dataset(list(self.TEXTS) * 2, [100.0, 300.0, 200.0] * 2, regression=True)
        model = small.model(num_labels=1)
        small.fit(model, data=(data, data), epochs=1)
        found = predict(model, small.tokenizer, dataset(self.TEXTS))
        assert found.labels == predict(model, small.tokenizer, data[:3]).labels
        assert all(50 < float(score) < 400 for score in found.labels)

    def test_of_a_task_of_glue(self, small: SmallRun) -> None:
        model = small.model()
        small.fit(model, epochs=1)
        found = predict(model, small.tokenizer, dataset(self.PAIRS))
        assert found.names == RTE
        with pytest.raises(DataError, match="single texts, and the model was trained for RTE"):
            predict(model, small.tokenizer, dataset(self.TEXTS))

    def test_of_a_head_from_a_file(self, small: SmallRun, folders: dict[str, Path]) -> None:
        names = predict(loaded(folders["other"]), small.tokenizer, dataset(self.PAIRS)).names
        assert names == RTE[::-1]
        with pytest.raises(DataError, match=r"not trained for any: name the task .*\(task=\)"):
            predict(small.model(), small.tokenizer, dataset(self.PAIRS))
