"""Predictions and scores: by name, in the order of the data, for any batch size."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_runs import N, SmallRun, make_dataset, undecided, without_labels

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError, DataError, TrainingError
from spafit.kernels.forms import precision
from spafit.machine.precision import autocast, resolve_device, resolve_precision, tf32_products
from spafit.tasks import scoring
from spafit.tasks.label_order import label_names
from spafit.text.tokenization import Tokenizer
from spafit.text.vocabulary import Recipe
from spafit.training.inference import evaluate, predict
from spafit.weights.pretrained import load_pretrained

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model(small: SmallRun) -> BertForSequenceClassification:
    """Load a model that no test of this module changes."""
    return undecided(small, small.train)


class TestPredict:
    """Oracle: the model on one example at a time, without padding."""

    def test_each_row_is_that_of_its_example(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        predictions = predict(model, small.tokenizer, small.train)
        assert predictions.logits.shape == (N, 2)
        assert predictions.logits.dtype == np.float32
        for row, example in enumerate(small.train.examples):
            encoded = small.tokenizer.encode([example.text_a], [example.text_b], max_length=53)
            ids, types = torch.tensor(encoded.input_ids), torch.tensor(encoded.token_type_ids)
            with torch.no_grad():
                expected = model(ids, None, types)[0].numpy()
            assert np.abs(predictions.logits[row] - expected).max() < 1e-5
            name = small.train.task.labels[int(expected[1] > expected[0])]
            assert predictions.labels[row] == name

    @pytest.mark.parametrize("batch_size", [1, 2, 7, N, 1000])
    def test_batches_do_not_matter(
        self, small: SmallRun, model: BertForSequenceClassification, batch_size: int
    ) -> None:
        usual = predict(model, small.tokenizer, small.train).logits
        other = predict(model, small.tokenizer, small.train, batch_size=batch_size).logits
        assert np.abs(usual - other).max() < 1e-5

    def test_the_order_of_the_data_does_not_matter(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        order = np.random.default_rng(0).permutation(N)
        examples = tuple(small.train.examples[row] for row in order)
        shuffled = dataclasses.replace(small.train, examples=examples)
        usual = predict(model, small.tokenizer, small.train).logits
        other = predict(model, small.tokenizer, shuffled).logits
        assert np.abs(usual[order] - other).max() < 1e-5

    def test_one_text_and_scores(self, small: SmallRun) -> None:
        sts_b = make_dataset("sts-b", N)
        model = load_pretrained(small.folder, num_labels=1)
        predictions = predict(model, small.tokenizer, sts_b)
        assert predictions.labels == predictions.logits[:, 0].tolist()
        cola = make_dataset("cola", N)
        model = load_pretrained(small.folder, num_labels=2)
        assert set(predict(model, small.tokenizer, cola).labels) <= set(cola.task.labels)

    @pytest.mark.parametrize("training", [False, True])
    def test_dropout_is_off_and_the_mode_comes_back(self, small: SmallRun, training: bool) -> None:
        model = small.model().train(training)
        first, second = (predict(model, small.tokenizer, small.train).logits for _ in range(2))
        assert np.array_equal(first, second)
        assert all(module.training == training for module in model.modules())

    def test_the_mode_comes_back_after_an_error(
        self, small: SmallRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = small.model().train()

        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(model.bert.encoder, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            predict(model, small.tokenizer, small.train)
        assert model.training

    def test_truncated_are_counted(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        whole = small.tokenizer.encode(small.train.texts_a, small.train.texts_b, max_length=53)
        longer = sum(tokens > 20 for tokens in whole.lengths)
        assert 0 < longer < N
        cut = predict(model, small.tokenizer, small.train, max_length=20)
        assert cut.truncated == longer
        assert predict(model, small.tokenizer, small.train).truncated == whole.truncated

    def test_bf16_is_another_precision_and_near(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        """Oracle: float32; 8 bits of mantissa through 4 layers."""
        usual = predict(model, small.tokenizer, small.train).logits
        bf16 = predict(model, small.tokenizer, small.train, precision="bf16").logits
        assert 1e-5 < np.abs(usual - bf16).max() < 0.1


class TestEvaluate:
    """Oracle: the metrics on what predict gives."""

    @pytest.mark.parametrize("task", ["mrpc", "cola", "sts-b", "mnli"])
    def test_is_the_metrics_of_predict(self, small: SmallRun, task: str) -> None:
        data = make_dataset(task, N)
        model = undecided(small, data)
        predicted = predict(model, small.tokenizer, data).labels
        scores = evaluate(model, small.tokenizer, data)
        assert scores == scoring.compute(task, predicted, data.labels)
        assert tuple(scores) == data.task.metrics

    def test_data_without_labels_are_predicted_but_not_scored(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        bare = without_labels(small.train)
        labelled = predict(model, small.tokenizer, small.train)
        assert predict(model, small.tokenizer, bare).labels == labelled.labels
        with pytest.raises(DataError, match=r"rte train has no labels to score .*; predict it"):
            evaluate(model, small.tokenizer, bare)


class TestLabelNames:
    """Oracle: names, not numbers, decide."""

    @pytest.fixture
    def reversed_model(self, small: SmallRun) -> BertForSequenceClassification:
        """Turn the head round, and say so in the names."""
        model = small.model()
        assert model.adaptation is not None
        with torch.no_grad():
            model.classifier.weight.copy_(model.classifier.weight.flip(0))
            model.classifier.bias.copy_(model.classifier.bias.flip(0))
        model.adaptation.labels = ("not_entailment", "entailment")
        return model

    def test_a_model_with_another_order_scores_the_same(
        self, small: SmallRun, reversed_model: BertForSequenceClassification
    ) -> None:
        usual = predict(small.model(), small.tokenizer, small.train)
        turned = predict(reversed_model, small.tokenizer, small.train)
        assert np.array_equal(turned.logits, usual.logits[:, ::-1])
        assert turned.labels == usual.labels
        assert len(set(usual.labels)) == 2
        scores = evaluate(reversed_model, small.tokenizer, small.train)
        assert scores == evaluate(small.model(), small.tokenizer, small.train)

    def test_training_goes_on_in_the_models_order(
        self, small: SmallRun, reversed_model: BertForSequenceClassification
    ) -> None:
        """Oracle: the loss by the model's own column of each name."""
        assert reversed_model.adaptation is not None
        logits = torch.tensor(predict(reversed_model, small.tokenizer, small.train).logits)
        names = reversed_model.adaptation.labels
        assert names is not None
        targets = torch.tensor([names.index(str(label)) for label in small.train.labels])
        still = {"batch_size": N, "epochs": 1}
        for module in reversed_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        result = small.fit(reversed_model, data=(small.train, small.train), **still)
        assert result.losses[0] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
        assert reversed_model.adaptation.labels == ("not_entailment", "entailment")

    def test_a_model_without_names_takes_the_tasks(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        assert label_names(model, small.train) == ("entailment", "not_entailment")
        assert label_names(model, make_dataset("wnli", 3)) == ("not_entailment", "entailment")

    @pytest.mark.parametrize(
        ("task", "match"),
        [
            ("cola", "the labels entailment, not_entailment, CoLA has unacceptable, acceptable"),
            ("sts-b", "the labels entailment, not_entailment, STS-B has a score"),
            ("mnli", "the labels entailment, not_entailment, MNLI-m has entailment, neutral"),
        ],
    )
    def test_a_model_of_another_task_is_refused(
        self, small: SmallRun, task: str, match: str
    ) -> None:
        model = small.model()
        assert model.adaptation is not None
        model.adaptation.labels = ("entailment", "not_entailment")
        with pytest.raises(DataError, match=match):
            predict(model, small.tokenizer, make_dataset(task, 3))

    def test_a_model_of_a_score_is_refused_for_classes(self, small: SmallRun) -> None:
        model = small.model(num_labels=1)
        assert model.adaptation is not None
        model.adaptation.labels = ()
        with pytest.raises(DataError, match="trained for the labels of a score, RTE has"):
            predict(model, small.tokenizer, small.train)

    def test_labels_that_are_not_those_of_the_task_it_says(self, small: SmallRun) -> None:
        """Whatever data it is used on; a task in no table may have any labels."""
        model = small.model()
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = "rte", ("positive", "negative")
        match = "trained for RTE, for the labels positive, negative, but RTE has entailment, not_"
        with pytest.raises(DataError, match=match):
            predict(model, small.tokenizer, make_dataset("sst-2", 3))
        with pytest.raises(DataError, match="RTE has entailment"):
            predict(model, small.tokenizer, make_dataset("rte", 3))
        model.adaptation.task = "mood"
        assert len(predict(model, small.tokenizer, make_dataset("sst-2", 3)).labels) == 3

    def test_a_task_of_the_users_own_may_be_called_like_another(self, small: SmallRun) -> None:
        model = small.model()
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = "rte", ("no", "yes")
        data = make_dataset("sst-2", 3)
        own = dataclasses.replace(data.task, name="rte", labels=("yes", "no"))
        found = predict(model, small.tokenizer, dataclasses.replace(data, task=own))
        assert set(found.labels) <= {"yes", "no"}

    @pytest.mark.parametrize(("task", "outputs"), [("mnli", 3), ("sts-b", 1)])
    def test_a_head_of_another_size_is_refused(
        self, small: SmallRun, model: BertForSequenceClassification, task: str, outputs: int
    ) -> None:
        match = f"{outputs} outputs, this model's has 2; load it with num_labels={outputs}"
        with pytest.raises(DataError, match=match):
            predict(model, small.tokenizer, make_dataset(task, 3))


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"max_length": 54}, "max_length = 54 exceeds the model's 53 positions"),
            ({"max_length": 7}, "max_length is 7"),
            ({"batch_size": 0}, "batch_size must be a whole number of at least 1: 0"),
            ({"batch_size": -3}, "batch_size must be a whole number of at least 1: -3"),
            (
                {"precision": "fp8"},
                "precision must be one of auto, float32, tf32, bf16, fp16: 'fp8'",
            ),
            ({"precision": "fp16"}, "fp16 needs a GPU"),
        ],
        ids=str,
    )
    def test_settings(
        self,
        small: SmallRun,
        model: BertForSequenceClassification,
        settings: dict[str, Any],
        match: str,
    ) -> None:
        for call in (predict, evaluate):
            with pytest.raises(ConfigError, match=match):
                call(model, small.tokenizer, small.train, **settings)

    def test_a_tokenizer_larger_than_the_model(
        self, small: SmallRun, model: BertForSequenceClassification
    ) -> None:
        recipe = small.tokenizer.recipe
        grown: Recipe = dataclasses.replace(
            recipe, vocab={**recipe.vocab, "teapot": len(recipe.vocab)}
        )
        size = model.config.vocab_size
        match = f"the tokenizer has {size + 1} entries, the model's embeddings have {size}; load"
        with pytest.raises(ConfigError, match=match):
            predict(model, Tokenizer(grown), small.train)

    def test_logits_that_are_not_finite(self, small: SmallRun) -> None:
        """No label may be made of NaN."""
        model = load_pretrained(small.folder)
        with torch.no_grad():
            model.classifier.bias[1] = float("nan")
        with pytest.raises(TrainingError, match=f"the logits of {N} of {N} examples of rte train"):
            predict(model, small.tokenizer, small.train)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)


class TestPrecision:
    """Oracle: NVIDIA's table: bf16 units from compute capability 8.0 on; a V100 is 7.0."""

    @pytest.mark.parametrize(
        ("asked", "expected"), [("auto", "float32"), ("float32", "float32"), ("bf16", "bf16")]
    )
    def test_on_the_cpu(self, asked: str, expected: str) -> None:
        assert resolve_precision(asked, CPU) == expected

    @pytest.mark.parametrize(
        ("name", "capability", "auto"),
        [
            ("Tesla V100-SXM2-16GB", (7, 0), "fp16"),
            ("Tesla T4", (7, 5), "fp16"),
            ("NVIDIA A100-SXM4-40GB", (8, 0), "bf16"),
            ("NVIDIA H100", (9, 0), "bf16"),
            ("NVIDIA B200", (10, 0), "bf16"),
        ],
    )
    def test_on_a_gpu(
        self,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        capability: tuple[int, int],
        auto: str,
    ) -> None:
        pretend_gpu(monkeypatch, name, capability)
        assert resolve_precision("auto", GPU) == auto
        assert resolve_precision("float32", GPU) == "float32"
        assert resolve_precision("fp16", GPU) == "fp16"
        if auto == "bf16":
            assert resolve_precision("bf16", GPU) == "bf16"
            assert resolve_precision("tf32", GPU) == "tf32"
        else:
            with pytest.raises(ConfigError, match=r"tf32 needs a GPU of compute capability 8\.0"):
                resolve_precision("tf32", GPU)
            with pytest.raises(ConfigError, match=f"{name} has no bf16 units; use precision fp16"):
                resolve_precision("bf16", GPU)

    def test_tf32_is_switched_on_inside_alone(self) -> None:
        setting = torch.backends.cuda.matmul
        before = torch.get_float32_matmul_precision()
        with autocast("tf32", GPU):
            assert setting.fp32_precision == "tf32"
            assert precision(torch.float32) == "tf32"
            assert precision(torch.bfloat16) == "bfloat16"
        assert torch.get_float32_matmul_precision() == before == "highest"
        with pytest.raises(ZeroDivisionError), tf32_products():
            _ = 1 / 0
        assert torch.get_float32_matmul_precision() == before == "highest"
        with tf32_products(False):
            assert precision(torch.float32) == "float32"

    @pytest.mark.parametrize("asked", ["fp8", "", "BF16", None, 16])
    def test_unknown(self, asked: Any) -> None:
        with pytest.raises(ConfigError, match="precision must be one of"):
            resolve_precision(asked, CPU)

    @pytest.mark.parametrize(
        ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)]
    )
    def test_autocast_on_the_cpu(self, precision: str, dtype: torch.dtype) -> None:
        x = torch.ones(2, 2)
        with autocast(precision, CPU):
            assert (x @ x).dtype == dtype


class TestDevice:
    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert resolve_device("auto") == CPU
        assert resolve_device("cpu") == CPU

    @pytest.mark.parametrize("name", ["banana", "meta", "", "xla", "hpu", "cuda:77", "cuda:-1"])
    def test_what_is_not_there(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"the device '{name}' cannot be used: .") as refusal:
            resolve_device(name)
        assert "\n" not in str(refusal.value)
