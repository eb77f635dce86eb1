"""Adapter files: the same logits on a fresh base; everything else is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.small_runs import METHODS, SmallRun, trained

from spafit.adapters import BiasDelta, DirectBias, Full, LoRA
from spafit.bert import BertForSequenceClassification
from spafit.errors import PlanError, WeightsError
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, adapters_disabled, fingerprint
from spafit.trunk.merging import merged_state_dict
from spafit.weights.adapter_files import load_adapter, read_adapter_header, save_adapter
from spafit.weights.pretrained import load_pretrained
from weights_tools.tiny import make_tiny

MIXED = Plan(
    "mixed",
    4,
    [
        Stratum(
            "first", 0, 0, {"layer.output.LayerNorm": [Full()], "intermediate.dense": [Full()]}
        ),
        Stratum(
            "second", 1, 1, {"query": [LoRA(r=3, alpha=4), DirectBias()], "key": [BiasDelta()]}
        ),
        Stratum("third", 2, 2),
        Stratum("fourth", 3, 3, {"layer.output.dense": [BiasDelta(), LoRA(r=7, alpha=9)]}),
    ],
    pooler="full",
)
PLANS = {
    **METHODS,
    "bitfit": plan("bitfit", 4),
    "linear-probe": plan("linear-probe", 4),
    "bitfit-direct": plan("bitfit", 4, bias="direct"),
    "lora-i": plan("lora-i", 4, r=5),
    "lora-ii": plan("lora-ii", 4, r=6, alpha=5.0),
    "from JSON": Plan.from_json(MIXED.to_json()),
    "embeddings too": Plan("embeddings too", 4, [Stratum("all", 0, 3)], embeddings="full"),
}


def move(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """Move everything that trains away from where it was, as training does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def logits(small: SmallRun) -> Callable[[torch.nn.Module], Any]:
    """Return what any BERT makes of one batch; it must be in evaluation mode by itself."""
    encoded = small.tokenizer.encode(small.train.texts_a, small.train.texts_b, max_length=53)
    batch = encoded.batch(range(7))

    def compute(model: torch.nn.Module) -> Any:
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            return model(**batch._asdict())

    return compute


@pytest.fixture
def adapter(small: SmallRun, tmp_path: Path) -> Path:
    """Write the adapter of a SPAFIT model for RTE."""
    model = move(small.model())
    assert model.adaptation is not None
    model.adaptation.task, model.adaptation.labels = "rte", ("entailment", "not_entailment")
    save_adapter(model, tmp_path / "rte.safetensors")
    return tmp_path / "rte.safetensors"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


class TestRoundTrip:
    """Oracle: the model that was saved, bit for bit."""

    @pytest.mark.parametrize("name", PLANS)
    def test_the_same_logits_on_a_fresh_base(
        self, small: SmallRun, tmp_path: Path, logits: Any, name: str
    ) -> None:
        model = move(small.model(PLANS[name]))
        path = tmp_path / "adapter.safetensors"
        save_adapter(model, path)
        fresh = load_pretrained(small.folder, seed=9)  # of another head
        untrained = logits(fresh)
        adaptation = load_adapter(fresh, path)
        assert torch.equal(logits(fresh), logits(model))
        assert not torch.equal(logits(fresh), untrained)
        assert adaptation is fresh.adaptation
        assert adaptation.plan == PLANS[name]
        found, expected = trained(fresh), trained(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert {n for n, p in fresh.named_parameters() if p.requires_grad} == found.keys()
        assert not fresh.training

    @pytest.mark.parametrize("name", ["spafit", "bitfit-direct", "lora-ii"])
    def test_switched_off_it_is_the_base(
        self, small: SmallRun, tmp_path: Path, logits: Any, name: str
    ) -> None:
        """Oracle: the base before loading, its own untrained head included."""
        save_adapter(move(small.model(PLANS[name])), tmp_path / "adapter.safetensors")
        fresh = load_pretrained(small.folder, seed=9)
        untrained = logits(fresh)
        load_adapter(fresh, tmp_path / "adapter.safetensors")
        with adapters_disabled(fresh):
            assert torch.equal(logits(fresh), untrained)
        assert not torch.equal(logits(fresh), untrained)

    @pytest.mark.parametrize("name", ["spafit", "full", "bitfit-direct"])
    def test_after_real_training(
        self, small: SmallRun, tmp_path: Path, logits: Any, name: str
    ) -> None:
        model = small.model(PLANS[name])
        small.fit(model, out=tmp_path, epochs=1)
        fresh = load_pretrained(small.folder)
        load_adapter(fresh, tmp_path / "adapter.safetensors")
        assert torch.equal(logits(fresh), logits(model))

    def test_holds_what_trains_and_nothing_else(self, small: SmallRun, tmp_path: Path) -> None:
        model = move(small.model())
        save_adapter(model, tmp_path / "adapter.safetensors")
        tensors = load_file(tmp_path / "adapter.safetensors")
        # A δ is written without the name of its parameter, as it always was.
        expected = {
            name.replace(".bias_delta.delta", ".bias_delta"): value
            for name, value in trained(model).items()
        }
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert {"classifier.weight", "classifier.bias"} <= tensors.keys()

    def test_header(self, small: SmallRun, adapter: Path) -> None:
        header = read_adapter_header(adapter)
        assert header.plan == METHODS["spafit"]
        assert header.base_fingerprint == fingerprint(load_pretrained(small.folder))
        assert (header.task, header.labels) == ("rte", ("entailment", "not_entailment"))
        assert header.num_labels == 2
        assert header.shapes["bert.encoder.layer.3.attention.self.query.lora_A"] == (5, 24)
        assert metadata_of(adapter)["format"] == "pt"

    @pytest.mark.parametrize(
        ("task", "labels", "num_labels"),
        [(None, None, 2), ("sts-b", (), 1), ("wnli", ("not_entailment", "entailment"), 2)],
    )
    def test_task_and_labels_travel(
        self,
        small: SmallRun,
        tmp_path: Path,
        task: str | None,
        labels: tuple[str, ...] | None,
        num_labels: int,
    ) -> None:
        model = small.model(num_labels=num_labels)
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = task, labels
        save_adapter(model, tmp_path / "adapter.safetensors")
        fresh = load_pretrained(small.folder, num_labels=num_labels)
        adaptation = load_adapter(fresh, tmp_path / "adapter.safetensors")
        assert (adaptation.task, adaptation.labels) == (task, labels)

    def test_a_saved_adapter_can_be_loaded_and_saved_again(
        self, small: SmallRun, adapter: Path, tmp_path: Path
    ) -> None:
        fresh = load_pretrained(small.folder)
        load_adapter(fresh, adapter)
        save_adapter(fresh, tmp_path / "again.safetensors")
        assert metadata_of(tmp_path / "again.safetensors") == metadata_of(adapter)
        first, second = load_file(adapter), load_file(tmp_path / "again.safetensors")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_on_a_model_adapted_by_an_equal_plan(
        self, small: SmallRun, adapter: Path, logits: Any
    ) -> None:
        other = move(move(small.model()))
        load_adapter(other, adapter)
        assert torch.equal(logits(other), logits(move(small.model())))

    def test_on_the_base_in_another_type(self, small: SmallRun, adapter: Path, logits: Any) -> None:
        """Oracle: float32, whose rounding the difference is; the base is the same one."""
        double = load_pretrained(small.folder, dtype=torch.float64)
        load_adapter(double, adapter)
        single = move(small.model())
        assert logits(double).dtype == torch.float64
        assert (logits(double) - logits(single)).abs().max() < 1e-5


class TestMerged:
    """Oracle: transformers' BertForSequenceClassification, loading plain BERT keys from a file."""

    @pytest.mark.parametrize("name", ["spafit", "spafit-direct", "full", "from JSON"])
    def test_loads_in_transformers(
        self, small: SmallRun, tmp_path: Path, logits: Any, name: str
    ) -> None:
        transformers = pytest.importorskip("transformers")
        model = move(small.model(PLANS[name], num_labels=3))
        save_file(merged_state_dict(model), tmp_path / "model.safetensors", {"format": "pt"})
        entries = {**model.config.to_json_dict(), "num_labels": 3}
        (tmp_path / "config.json").write_text(json.dumps(entries))
        theirs, loading = transformers.BertForSequenceClassification.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not any(loading[fault] for fault in ("missing_keys", "unexpected_keys"))
        assert (logits(theirs).logits - logits(model)).abs().max() < 1e-5


class TestRefusedLoads:
    """Oracle: copies from before. A refused load leaves the model bit-identical and unadapted."""

    def refuse(self, model: BertForSequenceClassification, path: Path, match: str) -> str:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adaptation = model.adaptation
        trains = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(WeightsError, match=match) as refusal:
            load_adapter(model, path)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert model.adaptation is adaptation
        assert [parameter.requires_grad for parameter in model.parameters()] == trains
        return str(refusal.value)

    @pytest.fixture
    def base(self, small: SmallRun) -> BertForSequenceClassification:
        return load_pretrained(small.folder)

    def test_another_base_names_both_fingerprints(
        self, small: SmallRun, adapter: Path, tmp_path: Path
    ) -> None:
        other = load_pretrained(make_tiny(tmp_path / "other", seed=1))
        message = self.refuse(other, adapter, "load the base that it was trained on")
        assert fingerprint(other) in message
        assert fingerprint(load_pretrained(small.folder)) in message
        assert str(adapter) in message

    def test_one_changed_number_is_another_base(
        self, base: BertForSequenceClassification, adapter: Path
    ) -> None:
        base.bert.embeddings.word_embeddings.weight.data[7, 3] += 1e-6
        self.refuse(base, adapter, "was trained on the base")

    def test_another_depth(self, adapter: Path, tmp_path: Path) -> None:
        deeper = load_pretrained(make_tiny(tmp_path / "deeper", num_hidden_layers=5))
        self.refuse(deeper, adapter, "is for 4 layers, this model has 5")

    def test_another_number_of_labels(self, small: SmallRun, adapter: Path) -> None:
        wider = load_pretrained(small.folder, num_labels=3)
        match = "a head for 2 labels, this model one for 3; load the base with num_labels=2"
        self.refuse(wider, adapter, match)

    def test_a_model_adapted_by_another_plan(self, small: SmallRun, adapter: Path) -> None:
        model = load_pretrained(small.folder)
        adapt(model, "bitfit")
        before = trained(model)
        with pytest.raises(PlanError, match=r"adapted by Full BitFit, .* needs SPAFIT-0-1-II"):
            load_adapter(model, adapter)
        assert all(torch.equal(before[name], tensor) for name, tensor in trained(model).items())

    def test_tensors_that_do_not_fit_are_all_named(
        self, base: BertForSequenceClassification, adapter: Path
    ) -> None:
        tensors, metadata = load_file(adapter), metadata_of(adapter)
        lost = "bert.encoder.layer.1.output.dense.bias_delta"
        bent = "bert.encoder.layer.3.attention.self.query.lora_A"
        del tensors[lost]
        tensors[bent] = tensors[bent].T.contiguous()
        tensors["bert.pooler.dense.bias"] = torch.zeros(24)
        save_file(tensors, adapter, metadata)
        message = self.refuse(base, adapter, "does not hold what its plan SPAFIT-0-1-II trains")
        assert f"{lost} is missing" in message
        assert f"{bent} has shape (24, 5), expected (5, 24)" in message
        assert "bert.pooler.dense.bias is unexpected" in message

    def test_no_head(self, base: BertForSequenceClassification, adapter: Path) -> None:
        tensors = load_file(adapter)
        for name in ("classifier.weight", "classifier.bias"):
            del tensors[name]
        save_file(tensors, adapter, metadata_of(adapter))
        self.refuse(base, adapter, r"has no head: classifier\.weight \(C, D\) is missing")

    def test_whole_numbers(self, base: BertForSequenceClassification, adapter: Path) -> None:
        tensors = load_file(adapter)
        tensors["classifier.bias"] = torch.zeros(2, dtype=torch.int32)
        save_file(tensors, adapter, metadata_of(adapter))
        self.refuse(base, adapter, "holds classifier.bias in a type that is not floating-point")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(
        self, base: BertForSequenceClassification, adapter: Path, value: float
    ) -> None:
        tensors = load_file(adapter)
        tensors["classifier.bias"][1] = value  # the last that is read
        save_file(tensors, adapter, metadata_of(adapter))
        self.refuse(base, adapter, "classifier.bias holds NaN or infinite values: 1 of 2")

    @pytest.mark.parametrize("key", ["plan", "base_fingerprint", "task", "labels"])
    def test_metadata_that_lack_something(
        self, base: BertForSequenceClassification, adapter: Path, key: str
    ) -> None:
        metadata = metadata_of(adapter)
        del metadata[key]
        save_file(load_file(adapter), adapter, metadata)
        self.refuse(base, adapter, f"the header of .* is damaged: it lacks {key}")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("plan", text) for text in ("", "{", "[]", "null", "{}", "7", "[" * 100_000)),
            ("plan", METHODS["spafit"].to_json().replace('"num_layers": 4', '"num_layers": 10')),
            ("plan", METHODS["spafit"].to_json().replace('"r": 5', '"r": -5')),
            ("plan", METHODS["spafit"].to_json().replace("layer.output.dense", "output.dense")),
            *(("task", text) for text in ("", "rte", "7", '["rte"]', "[" * 100_000)),
            *(("labels", text) for text in ("", "7", '"ab"', "{}", "[1, 2]", '["a"]', "[")),
            ("labels", '["a", "b", "c"]'),
            ("labels", '["a", "a"]'),
            ("labels", "[]"),
        ],
        ids=lambda value: f"{value:.30}",
    )
    def test_damaged_metadata(
        self, base: BertForSequenceClassification, adapter: Path, key: str, value: str
    ) -> None:
        save_file(load_file(adapter), adapter, {**metadata_of(adapter), key: value})
        reason = "the plan in .*" if key == "plan" else "the header of .* is damaged"
        message = self.refuse(base, adapter, reason)
        assert str(adapter) in message

    @pytest.mark.parametrize("found", [None, "2", ""])
    def test_another_format(
        self, base: BertForSequenceClassification, adapter: Path, found: str | None
    ) -> None:
        metadata = metadata_of(adapter)
        metadata.pop("spafit_adapter")
        metadata |= {} if found is None else {"spafit_adapter": found}
        save_file(load_file(adapter), adapter, metadata)
        self.refuse(base, adapter, f"not an adapter file of spafit: .* {found!r}, expected '1'")

    def test_files_that_are_no_adapters(
        self, small: SmallRun, base: BertForSequenceClassification, tmp_path: Path
    ) -> None:
        self.refuse(base, small.folder / "model.safetensors", "is not an adapter file of spafit")
        (tmp_path / "text").write_text("hello")
        self.refuse(base, tmp_path / "text", "is truncated")
        self.refuse(base, tmp_path / "nothing", "cannot be opened")
        self.refuse(base, tmp_path, "cannot be opened|is a directory")

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_a_truncated_file(
        self, base: BertForSequenceClassification, adapter: Path, share: float
    ) -> None:
        content = adapter.read_bytes()
        adapter.write_bytes(content[: int(len(content) * share)])
        self.refuse(base, adapter, "is truncated")


class TestSaving:
    """Oracle: the folder, before and after."""

    def test_a_model_without_a_plan(self, small: SmallRun, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="was not adapted"):
            save_adapter(load_pretrained(small.folder), tmp_path / "adapter.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_what_trains_beside_the_plan_would_be_lost(
        self, small: SmallRun, adapter: Path
    ) -> None:
        """As after a loop of one's own, in which no other check looks at it."""
        before = adapter.read_bytes()
        model = small.model()
        model.bert.pooler.dense.weight.requires_grad_(True)
        with pytest.raises(PlanError, match=r"pooler\.dense\.weight would train, .* not be saved"):
            save_adapter(model, adapter)
        assert adapter.read_bytes() == before
        model.bert.pooler.dense.weight.requires_grad_(False)
        save_adapter(model, adapter)
        assert adapter.read_bytes() != before

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_sick_values_are_not_written(
        self, small: SmallRun, adapter: Path, value: float
    ) -> None:
        before = adapter.read_bytes()
        model = small.model()
        model.classifier.bias.data[1] = value
        with pytest.raises(WeightsError, match=r"classifier\.bias hold NaN .* nothing was written"):
            save_adapter(model, adapter)
        assert adapter.read_bytes() == before
        assert list(adapter.parent.iterdir()) == [adapter]

    @pytest.mark.parametrize(
        ("call", "error", "raised"),
        [
            ("write", OSError(28, "No space left on device"), WeightsError),
            ("fsync", OSError(5, "Input/output error"), WeightsError),
            ("write", KeyboardInterrupt(), KeyboardInterrupt),
        ],
        ids=["disk full", "disk broken", "interrupt"],
    )
    def test_a_failure_half_way_leaves_the_old_file(
        self,
        small: SmallRun,
        adapter: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        error: BaseException,
        raised: type[BaseException],
    ) -> None:
        """At the third write: after the header and a tensor."""
        written: list[int] = []
        write = os.write

        def half(file: int, content: Any) -> int:
            written.append(write(file, content))
            if call == "write" and len(written) == 3:
                raise error
            return written[-1]

        def fail(file: int) -> None:
            raise error

        before = adapter.read_bytes()
        match = None if raised is KeyboardInterrupt else rf"cannot be written: {error.strerror}"  # type: ignore[attr-defined]
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", half)
            if call == "fsync":
                patched.setattr(os, "fsync", fail)
            with pytest.raises(raised, match=match):
                save_adapter(small.model(), adapter)
        assert len(written) >= 3
        assert sum(written) > 1000
        assert adapter.read_bytes() == before
        assert list(adapter.parent.iterdir()) == [adapter]

    def test_a_folder_that_is_not_there(self, small: SmallRun, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="cannot be written: No such file or directory"):
            save_adapter(small.model(), tmp_path / "nowhere" / "adapter.safetensors")
        assert list(tmp_path.iterdir()) == []
