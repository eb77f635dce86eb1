"""Settings that fit refuses, and its defaults."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import N, SmallRun, make_dataset, without_labels

import spafit.training.settings
from spafit.bert import BertForSequenceClassification
from spafit.errors import CheckpointError, ConfigError, DataError, PlanError
from spafit.tasks.glue import Dataset
from spafit.training.settings import TrainConfig, complete
from spafit.weights.pretrained import load_pretrained

NO_NUMBERS = ["3", [1], {}, object(), 1j, True]
NO_FINITE = [math.nan, math.inf, -math.inf, -1e308, 10**400]
WHOLE = (
    *("seed", "epochs", "batch_size", "accumulation", "max_length", "eval_every", "save_every"),
    *("keep_checkpoints", "early_stopping", "order_seed", "dropout_seed"),
)
REAL = ("learning_rate", "weight_decay", "warmup", "max_grad_norm", "label_smoothing")
MAY_BE_NONE = (
    *("out", "batch_size", "learning_rate", "max_length", "eval_every", "save_every"),
    *("metric", "class_weights", "early_stopping", "dropout_in_group_1"),
    *("order_seed", "dropout_seed"),
)

ABSURD: list[tuple[str, Any]] = [
    *((n, v) for n in WHOLE for v in [*NO_NUMBERS, *NO_FINITE, -1, 1.5, 1e308, 2**63, np.int64(9)]),
    *((n, 0) for n in WHOLE if not n.endswith("seed")),
    ("max_length", 7),
    ("keep_checkpoints", 1),
    *((n, v) for n in REAL for v in [*NO_NUMBERS, *NO_FINITE, -1, -5e-324]),
    *((n, v) for n in REAL if n != "max_grad_norm" for v in [1.001, 1e308]),
    *(("learning_rate", v) for v in [0, 0.0, -0.0]),
    *(
        (n, v)
        for n in ("decay_biases", "overwrite", "quiet", "dropout_in_group_1")
        for v in [0, 1, "no", 1e308, []]
    ),
    *((n, v) for n in ("precision", "device") for v in [16, 0, -1, math.nan, ["cpu"], b"cpu"]),
    *(("precision", v) for v in ["fp8", "", "FP16", "float64"]),
    *(
        (n, v)
        for n in ("frozen_weights", "step")
        for v in [16, True, "", "bf16", "graph", ["auto"]]
    ),
    *(("out", v) for v in [0, 1.0, -1, math.nan, 1e308, ["runs"], b"runs", True, "", "a\0b"]),
    *(("metric", v) for v in [0, True, ["f1"]]),
    *(("class_weights", v) for v in ["even", 1, [1.0, 2.0], {"a": -1}, {"a": math.nan}]),
    *(("class_weights", v) for v in [{"a": True}, {"a": "1"}, {1: 1.0}, {"a": math.inf}]),
    *((f.name, None) for f in dataclasses.fields(TrainConfig) if f.name not in MAY_BE_NONE),
]


class TestSettings:
    """Oracle: the ranges of TrainConfig's docstring."""

    @pytest.mark.parametrize(("name", "value"), ABSURD, ids=lambda value: f"{value!s:.20}")
    def test_absurd_values_are_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=rf"^{name}\b"):
            TrainConfig(**{name: value})

    def test_every_setting_was_tried(self) -> None:
        assert {name for name, _ in ABSURD} == {f.name for f in dataclasses.fields(TrainConfig)}

    def test_the_older_name_of_a_setting(self) -> None:
        """Oracle: the setting by its name of today."""
        config = TrainConfig(frozen_dropout=False)  # type: ignore[call-arg]
        assert config == TrainConfig(dropout_in_group_1=False) != TrainConfig()
        assert config.frozen_dropout is False  # type: ignore[attr-defined]
        changed = dataclasses.replace(config, dropout_in_group_1=True)
        older = TrainConfig(frozen_dropout=True)  # type: ignore[call-arg]
        assert changed == TrainConfig(dropout_in_group_1=True) == older
        with pytest.raises(ConfigError, match=r"^dropout_in_group_1 must be True or False: 1"):
            TrainConfig(frozen_dropout=1)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="frozen"):
            TrainConfig(frozen=True)  # type: ignore[call-arg]

    def test_bounds_belong_to_the_range(self) -> None:
        TrainConfig(seed=0, epochs=1, batch_size=1, accumulation=1, max_length=8, eval_every=1)
        TrainConfig(seed=2**63 - 1, learning_rate=1, weight_decay=1, warmup=1, max_grad_norm=1e308)
        TrainConfig(learning_rate=5e-324, weight_decay=0, warmup=0, max_grad_norm=0)
        TrainConfig(batch_size=4, accumulation=4)

    def test_more_parts_than_examples(self, small: SmallRun) -> None:
        with pytest.raises(ConfigError, match="accumulation = 5 exceeds the batch size of 4"):
            TrainConfig(batch_size=4, accumulation=5)
        with pytest.raises(ConfigError, match="accumulation = 17 exceeds the batch size of 16"):
            small.fit(batch_size=None, accumulation=17)  # RTE's batches are of 16

    @pytest.mark.parametrize(
        ("task", "method", "learning_rate", "batch_size"),
        [
            ("rte", "spafit", 6e-5, 16),
            ("rte", "spafit-direct", 6e-5, 16),
            ("rte", "full", 2e-5, 16),
            ("qnli", "spafit", 6e-5, 8),
        ],
    )
    def test_the_papers_where_nothing_is_said(
        self,
        small: SmallRun,
        tmp_path: Path,
        task: str,
        method: str,
        learning_rate: float,
        batch_size: int,
    ) -> None:
        """Oracle: the paper: 6e-5, or 2e-5 for full; batches of 16, or 8 for large tasks."""
        data = make_dataset(task, 3)
        unsaid = {"learning_rate": None, "batch_size": None, "device": "auto"}
        small.fit(small.model(method), data=(data, data), out=tmp_path, **unsaid, epochs=1)
        used = json.loads((tmp_path / "run.json").read_text())["settings"]
        assert (used["learning_rate"], used["batch_size"]) == (learning_rate, batch_size)
        assert (used["weight_decay"], used["warmup"], used["max_grad_norm"]) == (0.01, 0.0, 1.0)
        assert used["max_length"] == 53  # the model's longest
        assert TrainConfig().epochs == 10
        if not torch.cuda.is_available():
            assert (used["precision"], used["device"]) == ("float32", "cpu")
            assert (used["frozen_weights"], used["step"]) == ("float32", "eager")


class TestOnAGPU:
    """Oracle: TrainConfig's docstring; the GPU has bf16 and is pretended."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spafit.training.settings, "resolve_device", torch.device)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, ("bf16", "half", "captured")),
            ({"precision": "fp16"}, ("fp16", "half", "captured")),
            ({"precision": "tf32"}, ("tf32", "float32", "captured")),
            ({"precision": "float32"}, ("float32", "float32", "captured")),
            ({"frozen_weights": "float32"}, ("bf16", "float32", "captured")),
            ({"frozen_weights": "half"}, ("bf16", "half", "captured")),
            ({"recompute": (3,)}, ("bf16", "half", "eager")),
            ({"step": "eager"}, ("bf16", "half", "eager")),
            ({"step": "compiled"}, ("bf16", "half", "compiled")),
            ({"step": "captured"}, ("bf16", "half", "captured")),
            ({"device": "cpu"}, ("float32", "float32", "eager")),
        ],
        ids=str,
    )
    def test_what_is_taken(
        self, small: SmallRun, settings: dict[str, Any], expected: tuple[str, ...]
    ) -> None:
        config = TrainConfig(**{"device": "cuda", **settings})
        found = complete(config, small.model(), small.train)
        assert (found.precision, found.frozen_weights, found.step) == expected

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"precision": "tf32", "frozen_weights": "half"}, "this run has tf32"),
            ({"precision": "float32", "frozen_weights": "half"}, "this run has float32"),
            ({"device": "cpu", "frozen_weights": "half"}, "this run has float32"),
            ({"step": "captured", "recompute": (3,)}, "is not available: recomputed layers"),
            ({"step": "captured", "device": "cpu"}, "is not available: CUDA graphs need a GPU"),
            ({"step": "compiled", "recompute": (3,)}, "cannot be combined with recompute"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, small: SmallRun, settings: dict[str, Any], match: str) -> None:
        config = TrainConfig(**{"device": "cuda", **settings})
        with pytest.raises(ConfigError, match=match):
            complete(config, small.model(), small.train)


class TestRefusals:
    """Oracle: copies from before. Each is refused before anything is written or changed."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not (tmp_path / "run").exists()

    @pytest.fixture
    def refuses(self, small: SmallRun, tmp_path: Path) -> Any:
        def check(
            error: type[Exception],
            match: str,
            model: BertForSequenceClassification | None = None,
            data: tuple[Dataset, Dataset] | None = None,
            **changes: Any,
        ) -> None:
            model = small.model() if model is None else model
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            with pytest.raises(error, match=match) as refusal:
                small.fit(model, data=data, **{"out": tmp_path / "run", **changes})
            assert "\n" not in str(refusal.value)
            after = model.state_dict()
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
            assert model.adaptation is None or model.adaptation.task is None

        return check

    def test_a_model_without_a_plan(self, small: SmallRun, refuses: Any) -> None:
        model = load_pretrained(small.folder)
        refuses(PlanError, r"was not adapted; call spafit\.adapt", model)

    @pytest.mark.parametrize(
        ("other", "why"),
        [
            ("wnli", "their order differs"),
            ("cola", "train alone has entailment, not_entailment and dev alone has acceptable, un"),
            ("sts-b", "train alone has entailment, not_entailment; read dev"),
        ],
    )
    def test_data_of_different_tasks(
        self, small: SmallRun, refuses: Any, other: str, why: str
    ) -> None:
        data = (small.train, make_dataset(other, N, "dev"))
        match = rf"train is RTE and dev .*: not the same labels, for {why}.*task=train\.task\)"
        refuses(DataError, match, data=data)

    def test_a_head_of_another_size(self, refuses: Any) -> None:
        mnli = make_dataset("mnli", N)
        match = "MNLI-m needs a head with 3 outputs, this model's has 2; load it with num_labels=3"
        refuses(DataError, match, data=(mnli, mnli))

    def test_a_model_of_another_task(self, small: SmallRun) -> None:
        model = small.model()
        small.fit(model, epochs=1)
        cola = make_dataset("cola", N)
        with pytest.raises(DataError, match="trained for the labels entailment, not_entailment"):
            small.fit(model, data=(cola, cola), epochs=1)

    def test_missing_labels(self, small: SmallRun, refuses: Any) -> None:
        one = dataclasses.replace(small.train.examples[5], label=None)
        examples = (*small.train.examples[:5], one)
        for bad in (
            without_labels(small.train),
            dataclasses.replace(small.train, examples=examples),
            dataclasses.replace(small.train, examples=()),
        ):
            refuses(DataError, "rte train has no labels", data=(bad, small.dev))
            refuses(DataError, "rte train has no labels", data=(small.train, bad))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_parameters_in_half_precision(
        self, small: SmallRun, refuses: Any, dtype: torch.dtype
    ) -> None:
        match = f"parameters in float32, the model has {dtype}; load it with dtype=torch.float32"
        refuses(ConfigError, match, small.model(dtype=dtype))

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"max_length": 54}, "max_length = 54 exceeds the model's 53 positions"),
            ({"max_length": 2**62}, "max_length = .* exceeds"),
            ({"device": "banana"}, "the device 'banana' cannot be used"),
            ({"device": "meta"}, "the device 'meta' cannot be used"),
            ({"device": ""}, "the device '' cannot be used"),
            ({"device": "xla"}, "the device 'xla' cannot be used"),
            ({"device": "cuda:77"}, "the device 'cuda:77' cannot be used"),
            ({"precision": "fp16"}, "fp16 needs a GPU, the device is cpu; use precision float32"),
        ],
        ids=str,
    )
    def test_what_this_model_or_machine_cannot_have(
        self, refuses: Any, changes: dict[str, Any], match: str
    ) -> None:
        refuses(ConfigError, match, **changes)

    def test_a_place_that_cannot_be_written(self, refuses: Any, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("not a folder")
        for out in (file, file / "below"):
            refuses(CheckpointError, "cannot be written", out=out)
        assert file.read_text() == "not a folder"
