"""The model for other people's trainers, by itself and in the hands of transformers' Trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from support.small_runs import SmallRun, make_dataset
from torch import nn

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError, DataError, PlanError, WeightsError
from spafit.interop import TrainerModel, for_trainer
from spafit.strata import adapters_disabled
from spafit.tasks.glue import Dataset
from spafit.weights.adapter_files import load_adapter

NAMES = ("entailment", "not_entailment")
Rows = list[dict[str, Any]]


@pytest.fixture
def model(small: SmallRun) -> BertForSequenceClassification:
    return small.model().eval()


@pytest.fixture
def batch(small: SmallRun) -> dict[str, torch.Tensor]:
    return {**small.tokenizer(["a cat", "the dog sees", "child"], ["dog", None, "a b c"])}


def rows_of(small: SmallRun, data: Dataset) -> Rows:
    """Give each example its label and its ids, which are not padded."""
    ids = small.tokenizer.encode(data.texts_a, data.texts_b, max_length=40)
    names = data.task.labels
    return [
        {
            "input_ids": ids.input_ids[row],
            "token_type_ids": ids.token_type_ids[row],
            "label": names.index(str(label)) if names else label,
        }
        for row, label in enumerate(data.labels)
    ]


class TestOutput:
    """Oracle: the model's own logits, and the losses of PyTorch on them."""

    def test_classes(self, model: BertForSequenceClassification, batch) -> None:
        wrapped, labels = for_trainer(model), torch.tensor([1, 0, 1])
        out = wrapped(**batch, labels=labels)
        logits = model(**batch)
        assert list(out) == ["loss", "logits"]
        assert isinstance(out, dict)
        assert torch.equal(out.logits, logits)
        assert out.loss is out["loss"]
        assert torch.allclose(out.loss, F.cross_entropy(logits, labels), atol=1e-6)
        assert torch.equal(wrapped(**batch, labels=labels.int()).loss, out.loss)
        part = wrapped(**batch, labels=labels, num_items_in_batch=torch.tensor(12))
        assert torch.allclose(part.loss, out.loss * 3 / 12, atol=1e-6)

    def test_without_labels(self, model: BertForSequenceClassification, batch) -> None:
        with torch.no_grad():
            out = for_trainer(model)(**batch)
        assert list(out) == ["logits"]
        with pytest.raises(AttributeError, match="no loss; it holds logits"):
            out.loss  # noqa: B018
        assert copy.deepcopy(out).keys() == out.keys()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
    def test_scores(self, small: SmallRun, batch, dtype: torch.dtype) -> None:
        model = small.model(num_labels=1).eval()
        labels = torch.tensor([3, 0, 5], dtype=dtype)
        out = for_trainer(model, [])(**batch, labels=labels)
        assert out.logits.shape == (3, 1)
        expected = F.mse_loss(model(**batch)[:, 0], labels.float())
        assert torch.allclose(out.loss, expected, atol=1e-6)

    def test_scores_are_not_rounded_to_half_precision(self, small: SmallRun, batch) -> None:
        wrapped = for_trainer(small.model(num_labels=1).eval(), [])
        labels = torch.tensor([3.8031, 0.0013, 4.9987])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = wrapped(**batch, labels=labels)
        assert out.logits.dtype == torch.bfloat16
        expected = F.mse_loss(out.logits[:, 0].float(), labels)
        assert torch.allclose(out.loss, expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("labels", "says"),
        [
            (torch.tensor([1, 0]), r"shape \(3,\), found \(2,\)"),
            (torch.tensor([[1], [0], [1]]), r"shape \(3,\), found \(3, 1\)"),
            (torch.tensor([1.0, 0.0, 1.0]), "num_labels=1"),
            (torch.tensor([True, False, True]), "integer type, found torch.bool"),
            (torch.tensor([0, 1, 2]), r"lie in 0 \.\. 1, found 0 \.\. 2"),
            (torch.tensor([0, 1, -100]), r"lie in 0 \.\. 1, found -100 \.\. 1"),
        ],
    )
    def test_labels_that_do_not_fit(self, model, batch, labels: torch.Tensor, says: str) -> None:
        with pytest.raises(DataError, match=says):
            for_trainer(model)(**batch, labels=labels)


class TestConfig:
    """Oracle: spafit's and transformers' readers of the same entries."""

    def test_entries(self, model: BertForSequenceClassification) -> None:
        config = for_trainer(model, NAMES).config
        config.to_dict().clear()  # a copy
        entries = json.loads(config.to_json_string())
        assert BertConfig.from_dict(config.to_dict()) == model.config
        assert entries["id2label"] == {"0": "entailment", "1": "not_entailment"}
        assert config.id2label == dict(enumerate(NAMES))
        assert config.label2id == {"entailment": 0, "not_entailment": 1}
        assert (config.num_labels, config.model_type) == (2, "bert")
        config.use_cache = config.hidden_size = 7
        assert model.config.hidden_size != 7
        assert model.adaptation is not None
        assert model.adaptation.labels == NAMES

    def test_transformers_takes_them(self, model: BertForSequenceClassification) -> None:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.BertConfig(**for_trainer(model, NAMES).config.to_dict())
        assert theirs.id2label == dict(enumerate(NAMES))
        assert theirs.hidden_size == model.config.hidden_size

    def test_names_that_are_not_known(self, small: SmallRun) -> None:
        assert for_trainer(small.model()).config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
        config = for_trainer(small.model(num_labels=1)).config
        assert (config.id2label, config.problem_type) == ({0: "LABEL_0"}, "regression")


class TestStateDict:
    """Oracle: the names that the plan declares."""

    def test_holds_what_trains_and_comes_back(self, small: SmallRun, model) -> None:
        """Also inside another module, whose other parameters stay, and of a copy."""
        whole = copy.deepcopy(nn.ModuleDict({"a": for_trainer(model), "b": nn.Linear(2, 3)}))
        state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        expected = {f"a.model.{name}" for name in model.adaptation.trainable}
        assert set(state) == expected | {"b.weight", "b.bias"}
        other = nn.ModuleDict({"a": for_trainer(small.model()), "b": nn.Linear(2, 3)})
        for name in expected:
            state[name] += 1.0
        other.load_state_dict(state)  # strictly
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())

    def test_what_trains_is_missed(self, model: BertForSequenceClassification) -> None:
        wrapped = for_trainer(model)
        state = wrapped.state_dict()
        del state["model.classifier.bias"]
        state["model.more"] = torch.zeros(2)
        keys = wrapped.load_state_dict(state, strict=False)
        assert keys.missing_keys == ["model.classifier.bias"]
        assert keys.unexpected_keys == ["model.more"]
        with pytest.raises(RuntimeError, match="Missing key"):
            wrapped.load_state_dict(state)

    def test_none_while_the_adapters_are_disabled(self, model) -> None:
        wrapped = for_trainer(model)
        with adapters_disabled(model), pytest.raises(PlanError, match="disabled"):
            wrapped.state_dict()

    def test_save_pretrained_where_no_folder_can_be(self, model, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(WeightsError, match="cannot be created"):
            for_trainer(model).save_pretrained(tmp_path / "file" / "out")


class TestRefusals:
    """Oracle: the message."""

    def test_a_model_of_which_not_all_would_be_saved(self, small: SmallRun) -> None:
        bare = BertForSequenceClassification(small.model().config)
        with pytest.raises(PlanError, match=r"spafit\.adapt"):
            for_trainer(bare)
        model = small.model()
        model.bert.pooler.dense.weight.requires_grad_(True)
        with pytest.raises(PlanError, match=r"pooler\.dense\.weight would train"):
            for_trainer(model)

    def test_what_is_unfrozen_later(self, small: SmallRun, tmp_path: Path) -> None:
        wrapped = for_trainer(small.model())
        wrapped.model.bert.pooler.dense.weight.requires_grad_(True)
        with pytest.raises(PlanError, match=r"pooler\.dense\.weight would train"):
            wrapped.save_pretrained(tmp_path)
        with pytest.raises(PlanError, match=r"pooler\.dense\.weight would train"):
            wrapped.state_dict()

    @pytest.mark.parametrize(
        "labels", [(), ("yes",), ("a", "b", "c"), ("a", "a"), ("a", 1), ("a", "b\n"), "ab"]
    )
    def test_names_that_do_not_fit(self, model, labels: Any) -> None:
        with pytest.raises(ConfigError, match="2 different names"):
            for_trainer(model, labels)
        assert model.adaptation.labels is None

    def test_names_for_a_score(self, small: SmallRun) -> None:
        with pytest.raises(ConfigError, match="must be none"):
            for_trainer(small.model(num_labels=1), ["score"])

    def test_other_names_than_the_models(self, model) -> None:
        for_trainer(model, NAMES)
        for_trainer(model, NAMES)
        with pytest.raises(ConfigError, match="has the labels entailment, not_entailment"):
            for_trainer(model, NAMES[::-1])


class TestTrainer:
    """transformers' Trainer. Oracle: the same run in other pieces."""

    @pytest.fixture
    def trainer(self, small: SmallRun, tmp_path: Path):
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        reader = transformers.AutoTokenizer.from_pretrained(small.folder)

        def make(wrapped: TrainerModel, train: Rows, dev: Rows | None = None, **settings: Any):
            usual = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 5}
            usual |= {"learning_rate": 1e-2, "num_train_epochs": 1, "weight_decay": 0.1}
            usual |= {"per_device_train_batch_size": 12, "save_strategy": "no"}
            arguments = transformers.TrainingArguments(tmp_path / "out", **{**usual, **settings})
            return transformers.Trainer(wrapped, arguments, None, train, dev, reader)

        return make

    def test_accumulated_gradients_are_those_of_the_batch(self, small: SmallRun, trainer) -> None:
        """Of 23 examples by 12 the last step has 11: micro-batches of 4, 4 and 3."""
        ends = []
        for size, parts in ((12, 1), (4, 3), (5, 2)):
            wrapped = for_trainer(small.model(dtype=torch.float64, dropout=False))
            runs = trainer(
                wrapped,
                rows_of(small, small.train)[:23],
                per_device_train_batch_size=size,
                gradient_accumulation_steps=parts,
            )
            runs.train()
            ends.append(wrapped.state_dict())
        for name, value in ends[0].items():
            assert (ends[1][name] - value).abs().max() < 1e-6, name
        assert any((ends[2][name] - value).abs().max() > 1e-4 for name, value in ends[0].items())

    def test_weight_decay_is_for_matrices_alone(self, small: SmallRun, trainer) -> None:
        """As in spafit's own optimizer."""
        groups = trainer(for_trainer(small.model()), []).create_optimizer().param_groups
        decays = {
            each.dim() > 1: group["weight_decay"] for group in groups for each in group["params"]
        }
        assert decays == {True: 0.1, False: 0.0}

    def test_resumed_from_a_checkpoint(self, small: SmallRun, trainer, tmp_path: Path) -> None:
        """Bit for bit, with dropout; the checkpoint and the adapter file hold what trains alone."""
        rows = rows_of(small, small.train)
        settings = {"save_strategy": "epoch", "num_train_epochs": 2}
        first, second = (for_trainer(small.model(), NAMES) for _ in range(2))
        trainer(first, rows, **settings).train()
        with safe_open(tmp_path / "out" / "checkpoint-3" / "model.safetensors", "pt") as file:
            assert set(file.keys()) == set(first.state_dict())
        resumed = trainer(second, rows, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        for name, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name
        second.save_pretrained(tmp_path / "made" / "here")
        fresh = small.model()
        load_adapter(fresh, tmp_path / "made" / "here" / "adapter.safetensors")
        batch = small.tokenizer(["a cat"])
        assert torch.equal(fresh.eval()(*batch), second.model.eval()(*batch))

    def test_evaluates_scores(self, small: SmallRun, trainer) -> None:
        data = make_dataset("sts-b", 11, "dev")
        rows = rows_of(small, data)
        wrapped = for_trainer(small.model(num_labels=1))
        found = trainer(wrapped, rows, rows, per_device_eval_batch_size=4).predict(rows)
        scores = torch.tensor([row["label"] for row in rows])
        predictions = torch.tensor(found.predictions)
        assert predictions.shape == (11, 1)
        assert found.metrics["test_loss"] == pytest.approx(
            float(F.mse_loss(predictions[:, 0], scores)), rel=1e-5
        )
