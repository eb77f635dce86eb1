"""A run as an ONNX graph and as a program of torch.export."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import SmallRun, make_dataset

import spafit
from spafit import glue
from spafit.cli.trained import Trained
from spafit.errors import WeightsError
from spafit.methods import plan
from spafit.text.tokenization import Batch
from weights_tools.formats import onnx
from weights_tools.tiny import make_tiny

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TEXTS = [
    (["The cat sleeps."], None),
    (["The old dog sees", "a", "child " * 30 + "sleeps"], ["the cat.", "A teacher likes it.", "b"]),
    (["The old dog sees the cat", "a child"], None),
    (["cat"] * 5, ["dog"] * 5),
]
"""Batches of 1, 3, 2 and 5 rows, of 5 to 38 tokens."""


def train(folder: Path, method: str, num_layers: int, task: spafit.Task) -> Trained:
    """Train a model of so many layers, on texts that have nothing to do with the labels."""
    name = "stsb" if task.is_regression else "mnli"
    train, dev = (
        dataclasses.replace(make_dataset(name, rows, seed=rows), task=task) for rows in (12, 6)
    )
    small = SmallRun(make_tiny(folder / "tiny", num_hidden_layers=num_layers))
    model = small.model(plan(method, num_layers), num_labels=task.num_labels)
    small.fit(
        model,
        data=(train, dev),
        about={"model": str(small.folder)},
        out=folder / "run",
        epochs=1,
        learning_rate=0.05,
    )
    return Trained(folder / "run", None, None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a run of a method that has a merged form, with a layer in each group."""
    return train(tmp_path_factory.mktemp("merged"), "SPAFIT-0-1-II", 3, glue.get_task("mnli"))


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return its export, and the notes."""
    folder = tmp_path_factory.mktemp("exported") / "new"
    return folder, onnx.export(trained, folder)


def opened(folder: Path) -> Any:
    path = str(folder / "model.onnx")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def answers(folder: Path, batch: Batch) -> np.ndarray[Any, Any]:
    given = {name: each.numpy() for name, each in batch._asdict().items()}
    [logits] = opened(folder).run(["logits"], given)
    return np.asarray(logits)


def expected(trained: Trained, batch: Batch) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits = trained.runs[0].model(*batch)
    assert isinstance(logits, torch.Tensor)
    return np.asarray(logits)


def padded(batch: Batch, columns: int) -> Batch:
    """Add padding, whose ids and types are not zeros."""
    B = len(batch.input_ids)
    more = torch.full((B, columns), 9)
    return Batch(
        torch.cat([batch.input_ids, more], 1),
        torch.cat([batch.attention_mask, 0 * more], 1),
        torch.cat([batch.token_type_ids, 0 * more + 1], 1),
    )


class TestTheGraph:
    """Oracle: the run's own model, with its adapters beside the weights, and packed."""

    def test_the_logits_are_the_runs(
        self, trained: Trained, exported: tuple[Path, list[str]]
    ) -> None:
        """For several B and T, and however much padding there is and whatever it holds."""
        shapes = set()
        for first, second in TEXTS:
            batch = trained.runs[0].tokenizer(first, second)
            logits = expected(trained, batch)
            shapes.add(tuple(batch.input_ids.shape))
            for given in (batch, padded(batch, 7)):
                assert np.abs(answers(exported[0], given) - logits).max() < 1e-5
        assert len(shapes) == 4 and {1, 3, 2, 5} == {B for B, _ in shapes}
        with spafit.adapters_disabled(trained.runs[0].model):
            assert np.abs(expected(trained, batch) - logits).max() > 0.1, "training did nothing"

    def test_every_length_up_to_the_longest(
        self, trained: Trained, exported: tuple[Path, list[str]]
    ) -> None:
        tokenizer = trained.runs[0].tokenizer
        longest = trained.runs[0].model.config.max_position_embeddings
        for tokens in (1, 2, longest):
            ids = torch.randint(5, tokenizer.vocab_size, (2, tokens))
            batch = Batch(ids, torch.ones_like(ids), torch.zeros_like(ids))
            assert np.abs(answers(exported[0], batch) - expected(trained, batch)).max() < 1e-5
        longer = padded(batch, 1)
        with pytest.raises(Exception, match="53 by 54"):
            answers(exported[0], longer)

    def test_names_types_and_free_axes(self, exported: tuple[Path, list[str]]) -> None:
        session = opened(exported[0])
        found = [(each.name, each.type, each.shape) for each in session.get_inputs()]
        shape = ["batch", "sequence"]
        assert found == [(name, "tensor(int64)", shape) for name in onnx.INPUTS]
        [logits] = session.get_outputs()
        assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 3])

    def test_the_program_of_torch_export(
        self, trained: Trained, exported: tuple[Path, list[str]]
    ) -> None:
        program = torch.export.load(exported[0] / "model.pt2").module()
        for first, second in TEXTS:
            batch = trained.runs[0].tokenizer(first, second)
            with torch.no_grad():
                logits = np.asarray(program(*batch))
            assert np.abs(logits - expected(trained, batch)).max() < 1e-5

    def test_the_run_is_not_changed(
        self, trained: Trained, exported: tuple[Path, list[str]]
    ) -> None:
        model = trained.runs[0].model
        assert model.bert.packed and model.adaptation is not None
        assert model.bert.encoder.layer[0].attention.self.impl == "auto"

    def test_adapters_without_a_merged_form_a_score_and_a_second_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What has no merged form stands in the graph, and large weights lie beside it."""
        monkeypatch.setattr(onnx, "LARGEST_IN_ONE_FILE", 1000)
        task = spafit.Task("warmth", ("a", "b"), (), ("pearson",), scale=(2.5, 1.5))
        run = train(tmp_path, "pfeiffer", 1, task)
        notes = onnx.export(run, tmp_path / "out")
        assert "unmerged" in notes[0] and "no merged form" in notes[0]
        assert notes[2].endswith("float32 (batch, 1)")
        assert notes[3] == "the score is 2.5 + 1.5 times the logit"
        batch = run.runs[0].tokenizer(*TEXTS[1])
        logits = expected(run, batch)
        assert logits.shape == (3, 1)
        assert np.abs(answers(tmp_path / "out", batch) - logits).max() < 1e-5
        names = "config.json model.onnx model.onnx.data model.pt2 tokenizer.json"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            *names.split(),
            "tokenizer_config.json",
        ]
        entries = json.loads((tmp_path / "out" / "config.json").read_text())
        assert entries["problem_type"] == "regression" and entries["id2label"] == {"0": "score"}


class TestTheFilesBesideIt:
    """Oracle: transformers, which reads them."""

    def test_they_are_all(self, exported: tuple[Path, list[str]]) -> None:
        names = "config.json model.onnx model.pt2 tokenizer.json tokenizer_config.json"
        assert sorted(path.name for path in exported[0].iterdir()) == names.split()

    def test_labels_and_tokenizer(self, trained: Trained, exported: tuple[Path, list[str]]) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.AutoConfig.from_pretrained(exported[0])
        adaptation = trained.runs[0].model.adaptation
        assert adaptation is not None and adaptation.labels is not None
        assert config.id2label == dict(enumerate(adaptation.labels))
        assert config.label2id == {name: k for k, name in enumerate(adaptation.labels)}
        assert config.problem_type == "single_label_classification"
        theirs = transformers.AutoTokenizer.from_pretrained(exported[0])
        for first, second in TEXTS:
            batch = trained.runs[0].tokenizer(first, second)
            found = theirs(first, second, padding=True, return_tensors="pt")
            assert torch.equal(found["input_ids"], batch.input_ids)
            assert torch.equal(found["token_type_ids"], batch.token_type_ids)

    def test_the_notes(self, exported: tuple[Path, list[str]]) -> None:
        notes = exported[1]
        assert notes[0].endswith("int64 (batch, sequence), of at most 53 tokens")
        labels = "entailment, neutral, contradiction"
        assert notes[1] == f"logits: float32 (batch, 3), in the order {labels}"
        assert "torch.export.load" in notes[2] and len(notes) == 3


class TestInt8:
    """Oracles: the run's own logits, and the size of the file."""

    def test_what_the_benchmark_measures(
        self, trained: Trained, exported: tuple[Path, list[str]], tmp_path: Path
    ) -> None:
        pytest.importorskip("peft")  # whose version stands in the rows of every benchmark
        from benchmarks import onnx_int8

        shutil.copyfile(exported[0] / "model.onnx", tmp_path / "model.onnx")
        onnx_int8.quantize(tmp_path)
        dev = make_dataset("mnli", 40, "dev", seed=3)
        for name in onnx_int8.FILES[onnx_int8.OPENVINO]:
            (tmp_path / name).write_bytes(bytes(2**19))
        off = spafit.predict(trained.runs[0].model, trained.runs[0].tokenizer, dev).logits + 0.25
        ours, half, plain, small, other = rows = onnx_int8.compare(
            trained, dev, tmp_path, {onnx_int8.OPENVINO: off}
        )
        forms = ["spafit", "spafit, bf16", "ONNX", "ONNX, int8", "OpenVINO, int8"]
        assert [each["form"] for each in rows] == forms
        assert (plain["score"], plain["lost"], plain["same_answers"]) == (ours["score"], 0.0, 1.0)
        assert plain["largest_difference"] < 1e-5 < half["largest_difference"] < 0.1
        assert half["same_answers"] > 0.8
        assert 1e-5 < small["largest_difference"] < 0.5
        found = spafit.evaluate(trained.runs[0].model, trained.runs[0].tokenizer, dev)
        assert ours["score"] == found["accuracy"] == small["score"] + small["lost"]
        assert small["same_answers"] > 0.8
        assert small["size_mib"] < plain["size_mib"] < 1.0
        assert (other["size_mib"], other["same_answers"]) == (1.0, 1.0)
        assert other["largest_difference"] == pytest.approx(0.25, abs=1e-4)


class TestRefusals:
    """Oracle: one line that names what is missing."""

    def test_without_the_packages(
        self, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
        )
        with pytest.raises(WeightsError, match=r"needs onnxscript: pip install '\.\[onnx\]'"):
            onnx.export(trained, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_full_disk(
        self, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def save(program: object, folder: Path) -> None:
            (folder / "model.onnx").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(onnx, "_program", lambda model: model)
        monkeypatch.setattr(onnx, "_save", save)
        with pytest.raises(WeightsError, match="No space left"):
            onnx.export(trained, tmp_path)
        assert not list(tmp_path.glob("model*")) and not list(tmp_path.glob(".spafit*"))
