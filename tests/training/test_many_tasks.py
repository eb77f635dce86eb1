"""Predictions of several adapters of one model at once.

Oracle: ``predict`` with each adapter alone, on a model of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import N, SmallRun, make_dataset

from spafit.bert import BertForSequenceClassification, Layer, set_impl
from spafit.errors import ConfigError, DataError, PlanError, TrainingError
from spafit.methods import plan
from spafit.strata import adapt, adapters_disabled, use
from spafit.tasks.own import dataset
from spafit.tasks.table import TASKS
from spafit.tasks.task import Task
from spafit.training import inference
from spafit.training.inference import Predictions, predict, predict_all
from spafit.weights.adapter_files import load_adapter, save_adapter
from spafit.weights.pretrained import load_pretrained

STARS = Task("stars", ("text",), (), ("pearson",), scale=(2.5, 1.5))
AGREE = Task("agree", ("one", "other"), (), ("pearson",), scale=(-3.0, 0.25))
MOOD = Task("mood", ("text",), ("so", "sad", "glad"), ("accuracy",))
# The task, the method, and the labels in the order of the logits, which need not be the task's.
ADAPTERS: dict[str, tuple[Task, str, tuple[str, ...]]] = {
    "rte": (TASKS["rte"], "SPAFIT-0-1-II", ("not_entailment", "entailment")),
    "mnli": (TASKS["mnli"], "lora-ii", TASKS["mnli"].labels),
    "sts-b": (TASKS["sts-b"], "SPAFIT-1-2-I", ()),
    "agree": (AGREE, "houlsby", ()),
    "cola": (TASKS["cola"], "full", TASKS["cola"].labels),
    "stars": (STARS, "bitfit", ()),
    "mood": (MOOD, "linear-probe", ("glad", "so", "sad")),
}
PAIRS = [name for name, (task, *_) in ADAPTERS.items() if task.pair]
SINGLES = [name for name, (task, *_) in ADAPTERS.items() if not task.pair]

_RTE = make_dataset("rte", N, seed=1)
TEXTS = {
    True: [(each.text_a, str(each.text_b)) for each in _RTE],
    False: [each.text_a for each in make_dataset("cola", N, seed=4)],
}


@pytest.fixture(scope="module")
def files(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write an adapter file for each task, the values of what it trains drawn."""
    folder = tmp_path_factory.mktemp("adapters")
    model = load_pretrained(small.folder)
    for name, (task, method, labels) in ADAPTERS.items():
        adapt(model, plan(method, 4), name=name, num_labels=task.num_labels)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            head = model.classifier  # so that all labels occur
            model.eval()
            data = as_dataset(TEXTS[task.pair], task)
            logits = predict(model, small.tokenizer, data).logits
            head.bias.sub_(torch.tensor(np.median(logits, axis=0)))
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = task.name, labels
        if task.name not in TASKS:
            model.adaptation.definition = task.to_json_dict()
        save_adapter(model, folder / name)
    return {name: folder / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def model(small: SmallRun, files: dict[str, Path]) -> BertForSequenceClassification:
    """Load all adapters into one model; no test changes it."""
    model = load_pretrained(small.folder)
    for name, file in files.items():
        load_adapter(model, file, name=name)
    use(model, "cola")
    return model


def as_dataset(texts: Sequence[Any], task: Task) -> Any:
    """Return texts as a data set, which ``predict`` needs."""
    return dataset(texts, task=dataclasses.replace(task))


@pytest.fixture(scope="module")
def alone(small: SmallRun, files: dict[str, Path]) -> dict[str, Predictions]:
    """Predict with each adapter on a model of its own."""
    found = {}
    for name, (task, *_) in ADAPTERS.items():
        own = load_pretrained(small.folder, num_labels=task.num_labels)
        load_adapter(own, files[name])
        data = as_dataset(TEXTS[task.pair], task)
        found[name] = predict(own, small.tokenizer, data, max_length=15)
        if not task.is_regression:
            assert set(found[name].labels) == set(task.labels)
    return found


def check(found: Predictions, expected: Predictions, rows: Sequence[int] | slice) -> None:
    assert np.abs(found.logits - expected.logits[rows]).max() < 1e-5
    assert found.logits.dtype == np.float32
    assert found.names == expected.names
    right = np.array(expected.labels)[rows]
    if found.names:
        assert list(found.labels) == right.tolist()
        assert np.abs(found.probabilities - expected.probabilities[rows]).max() < 1e-5
    else:
        assert np.allclose(np.array(found.labels), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("names", [PAIRS, SINGLES], ids=["pairs", "singles"])
def test_all_texts_for_all(
    small: SmallRun,
    model: BertForSequenceClassification,
    alone: dict[str, Predictions],
    names: list[str],
    batch_size: int,
    impl: str,
) -> None:
    texts = TEXTS[names is PAIRS]
    set_impl(model, impl)
    settings: Any = {"max_length": 15, "batch_size": batch_size}
    found = predict_all(model, small.tokenizer, texts, names[::-1], **settings)
    set_impl(model, "auto")
    assert list(found) == names[::-1]
    for name in names:
        check(found[name], alone[name], slice(None))
        assert found[name].truncated == alone[name].truncated
    assert model.adaptation is model.adaptations["cola"]
    assert names is SINGLES or alone["rte"].truncated > 0


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_texts_of_their_own_for_each(
    small: SmallRun,
    model: BertForSequenceClassification,
    alone: dict[str, Predictions],
    impl: str,
) -> None:
    """Texts and pairs, for none, one or several adapters each."""
    texts: list[Any] = []
    tasks: list[list[str]] = []
    rows: dict[str, list[int]] = {name: [] for name in ADAPTERS}
    for row in range(N):
        texts += [TEXTS[True][row], list(TEXTS[True][N - 1 - row]), TEXTS[False][row]]
        tasks += [PAIRS[row % 3 :], [["mnli"], []][row % 2], [SINGLES[row % 3]] * 2]
        for name in PAIRS[row % 3 :]:
            rows[name].append(row)
        if row % 2 == 0:
            rows["mnli"].append(N - 1 - row)
        rows[SINGLES[row % 3]].append(row)
    set_impl(model, impl)
    found = predict_all(model, small.tokenizer, texts, tasks, max_length=15, batch_size=16)
    set_impl(model, "auto")
    assert set(found) == set(ADAPTERS)
    for name in ADAPTERS:
        check(found[name], alone[name], rows[name])
    whole = predict_all(model, small.tokenizer, [TEXTS[True][row] for row in rows["agree"]], PAIRS)
    cut = predict_all(
        model, small.tokenizer, [TEXTS[True][row] for row in rows["agree"]], PAIRS, max_length=15
    )
    assert found["agree"].truncated == cut["agree"].truncated > whole["agree"].truncated == 0


def test_all_adapters_of_the_model(small: SmallRun, files: dict[str, Path]) -> None:
    """And a mode, and the base itself in use, come back."""
    model = load_pretrained(small.folder).train()
    for name in ("stars", "mood"):
        load_adapter(model, files[name], name=name)
    use(model, None)
    found = predict_all(model, small.tokenizer, TEXTS[False])
    assert list(found) == ["stars", "mood"]
    assert model.adaptation is None
    assert all(module.training for module in model.modules())
    again = predict_all(model, small.tokenizer, TEXTS[False], ["mood"])["mood"]  # no dropout
    assert np.abs(again.logits - found["mood"].logits).max() < 1e-5


def test_an_empty_text_is_a_text(small: SmallRun, model: BertForSequenceClassification) -> None:
    for texts in (["", "cat"], [("", ""), ("cat", "")]):
        task = ADAPTERS["mnli" if isinstance(texts[0], tuple) else "cola"][0]
        found = predict_all(model, small.tokenizer, texts, [task.name])[task.name]
        use(model, task.name)
        expected = predict(model, small.tokenizer, as_dataset(texts, task))
        use(model, "cola")
        check(found, expected, slice(None))


def test_layers_that_are_shared_are_computed_once(
    small: SmallRun, model: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: counted by hand: of 4 layers, the first adapted ones are 1, 2 and none."""
    calls: list[int] = []
    forward = Layer.forward

    def counting(self: Layer, X: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(len(X))
        return forward(self, X, *arguments)

    monkeypatch.setattr(Layer, "forward", counting)
    texts = ["a cat sees the old dog " * 8] * 64  # so many tokens are computed in turn
    pairs = [(text, text) for text in texts]
    assert model.adaptations["rte"].depth == 1
    assert model.adaptations["sts-b"].depth == 2
    predict_all(model, small.tokenizer, pairs, ["sts-b", "rte"])
    assert len(calls) == 2 + (4 - 1) + (4 - 2)


class TestMemory:
    """Oracle: what is asked for after each shortage, by hand."""

    def test_batches_are_halved(
        self,
        small: SmallRun,
        model: BertForSequenceClassification,
        alone: dict[str, Predictions],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sizes: list[int] = []
        forward = inference.forward_tasks

        def short(model: Any, batch: Any, sequences: Any) -> dict[str, torch.Tensor]:
            sizes.append(len(batch.layout.lengths))
            if sizes[-1] > 6:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return forward(model, batch, sequences)

        monkeypatch.setattr(inference, "forward_tasks", short)
        found = predict_all(model, small.tokenizer, TEXTS[True], ["rte", "mnli"], max_length=15)
        assert sizes == [25, 12, 6, 6, 6, 6, 1]
        check(found["rte"], alone["rte"], slice(None))
        check(found["mnli"], alone["mnli"], slice(None))
        assert model.adaptation is model.adaptations["cola"]


class TestRefusals:
    def refused(
        self, small: SmallRun, model: BertForSequenceClassification, *arguments: Any, **more: Any
    ) -> str:
        with pytest.raises((ConfigError, DataError, PlanError, TrainingError)) as caught:
            predict_all(model, small.tokenizer, *arguments, **more)
        assert model.adaptation is None or model.adaptation.name == "cola"
        assert "\n" not in str(caught.value)
        return f"{type(caught.value).__name__}: {caught.value}"

    @pytest.mark.parametrize(
        ("texts", "tasks", "said"),
        [
            (["a"], ["cola", "sst-2"], "PlanError: the model has no adapter 'sst-2'; it has 'rte'"),
            (["a"], [["cola"], ["cola"]], "ConfigError: 1 texts need a list of adapters each, fou"),
            (["a", "b"], ["cola", ["cola"]], "ConfigError: tasks must be a list of names of adapt"),
            (["a"], [[3]], "ConfigError: tasks must be a list of names of adapters, or such a lis"),
            (["a"], [None], "ConfigError: tasks must be a list of names of adapters, or such a li"),
            (["a"], "cola", "ConfigError: tasks must be a list of names of adapters, or such a li"),
            (["a"], [], "ConfigError: no adapter is named for any text"),
            (["a"], [[]], "ConfigError: no adapter is named for any text"),
            ([], ["cola"], "DataError: there are no texts to predict"),
            ("a", ["cola"], "DataError: expected a sequence of texts, found one text; give [text]"),
            (["a", 3], ["cola"], "DataError: row 1, first text: expected a string, found 3"),
            (["a", None], ["cola"], "DataError: row 1, first text: expected a string, found None"),
            (["a", "\ud800"], ["cola"], "DataError: row 1, first text: character 0 is a lone surr"),
            ([("a", 3)], ["rte"], "DataError: row 0, second text: expected a string, found 3"),
            ([("a", None)], ["rte"], "DataError: row 0 has no second text"),
            ([("a", "b", "c")], ["rte"], "DataError: row 0 has 3 texts, expected one or two"),
            (["a", ("a", "b")], ["cola"], "DataError: row 1 has pairs of texts, and 'cola' was tr"),
            ([("a", "b"), "a"], ["agree"], "DataError: row 1 has single texts, and 'agree' was tr"),
        ],
        ids=str,
    )
    def test_texts_and_tasks(
        self,
        small: SmallRun,
        model: BertForSequenceClassification,
        texts: Any,
        tasks: Any,
        said: str,
    ) -> None:
        assert self.refused(small, model, texts, tasks).startswith(said)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"max_length": 54}, "ConfigError: max_length = 54 exceeds the model's 53 positions"),
            ({"max_length": 7}, "ConfigError: max_length is 7"),
            ({"batch_size": 0}, "ConfigError: batch_size must be a whole number of at least 1: 0"),
            ({"precision": "fp16"}, "ConfigError: fp16 needs a GPU"),
        ],
        ids=str,
    )
    def test_settings(
        self,
        small: SmallRun,
        model: BertForSequenceClassification,
        settings: dict[str, Any],
        said: str,
    ) -> None:
        assert said in self.refused(small, model, ["a"], ["cola"], **settings)

    def test_an_adapter_that_was_never_trained(self, small: SmallRun) -> None:
        model = load_pretrained(small.folder)
        said = self.refused(small, model, ["a"])
        assert said == "ConfigError: no adapter is named for any text"
        adapt(model, plan("bitfit", 4), name="new")
        use(model, None)
        said = self.refused(small, model, ["a"])
        assert (
            "DataError: the adapter 'new' has no names for its labels, because it was nev" in said
        )

    def test_what_an_adapter_says_of_itself(self, small: SmallRun, files: dict[str, Path]) -> None:
        model = load_pretrained(small.folder)
        adapter = load_adapter(model, files["mood"], name="mood")
        use(model, None)
        adapter.labels = ("so", "sad")
        assert "mood has so, sad, glad; take the file" in self.refused(small, model, ["a"])
        adapter.definition = None
        said = self.refused(small, model, ["a"])
        assert "'mood' has a head with 3 outputs, and 2 names of labels" in said
        adapter.labels = ("a", "b", "c")  # a task in no table: texts and pairs
        assert len(predict_all(model, small.tokenizer, ["a", ("a", "b")])["mood"].labels) == 2

    def test_logits_that_are_not_finite(self, small: SmallRun, files: dict[str, Path]) -> None:
        model = load_pretrained(small.folder)
        for name in ("cola", "mood"):
            load_adapter(model, files[name], name=name)
        with torch.no_grad():
            model.classifier.bias[1] = float("nan")
        use(model, None)
        said = self.refused(small, model, ["a", "cat"])
        assert "the logits of 2 of 2 texts by the adapter 'mood' are not finite" in said

    def test_where_adapters_are_disabled(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        with adapters_disabled(model):
            assert "PlanError: the adapters are disabled" in self.refused(small, model, ["a"])
