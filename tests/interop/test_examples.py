"""The programs of examples/: each trains by another package, and saves what trains alone.

Oracle: the model that was trained, against a fresh base with the adapter file that was written.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import REPOSITORY
from support.code_lines import code_lines
from support.examples import example
from support.small_runs import SmallRun, write_glue

from spafit.bert import BertForSequenceClassification
from spafit.weights.adapter_files import load_adapter, name_in_files
from spafit.weights.pretrained import load_pretrained


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_glue(tmp_path / "glue"))


def check(model: BertForSequenceClassification, out: Path, small: SmallRun) -> None:
    """The file holds what trains, it was trained, and it comes back bit for bit."""
    assert model.adaptation is not None
    fresh = load_pretrained(small.folder, num_labels=2)
    batch = small.tokenizer(["a cat sees", "dog"], ["the child", None])
    untrained = fresh(*batch)
    load_adapter(fresh, out / "adapter.safetensors")
    logits = model.to("cpu").eval()(*batch)
    assert torch.equal(fresh.eval()(*batch), logits)
    assert not torch.equal(logits, untrained)
    assert fresh.adaptation is not None
    assert fresh.adaptation.labels == ("entailment", "not_entailment")
    with safe_open(out / "adapter.safetensors", "pt") as file:
        assert set(file.keys()) == {name_in_files(each) for each in model.adaptation.trainable}


def test_they_are_short() -> None:
    for path in (REPOSITORY / "examples").iterdir():
        if path.suffix == ".py":
            if path.name == "serve.py":
                assert code_lines(path) <= 60
            else:
                assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path


def test_trainer(small: SmallRun, data: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trainer = example("trainer").fine_tune(
        small.folder, data, tmp_path / "out", num_train_epochs=2, disable_tqdm=True, use_cpu=True
    )
    check(trainer.model.model, tmp_path / "out", small)
    best = max(row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row)
    assert trainer.evaluate()["eval_accuracy"] == best


def test_accelerate_loop(small: SmallRun, data: str, tmp_path: Path) -> None:
    """Accelerate's own files, too, hold what trains alone, and come back."""
    pytest.importorskip("accelerate")
    accelerator, wrapped = example("accelerate_loop").fine_tune(
        small.folder, data, tmp_path / "out", epochs=1
    )
    check(wrapped.model, tmp_path / "out", small)
    trained = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    accelerator.save_model(wrapped, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(trained)
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        for name in trained:
            wrapped.get_parameter(name).zero_()
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in wrapped.state_dict().items())


@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_lightning_module(small: SmallRun, data: str, tmp_path: Path) -> None:
    """Lightning's checkpoint, too: training goes on from it with all keys in their places."""
    lightning = pytest.importorskip("pytorch_lightning")
    quiet = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    module = example("lightning_module")
    tuning = module.fine_tune(
        small.folder,
        data,
        tmp_path / "out",
        max_epochs=1,
        callbacks=[lightning.callbacks.ModelCheckpoint(tmp_path / "kept", "last")],
        enable_model_summary=False,
        **quiet,
    )
    check(tuning.model.model, tmp_path / "out", small)
    trainable = tuning.model.model.adaptation.trainable
    assert set(tuning.state_dict()) == {f"model.model.{name}" for name in trainable}
    fresh = small.model(tuning.model.model.adaptation.plan)
    again = module.FineTuning(fresh, ("entailment", "not_entailment"))
    lightning.Trainer(max_epochs=1, enable_checkpointing=False, **quiet).fit(
        again, [], ckpt_path=tmp_path / "kept" / "last.ckpt"
    )
    for name in trainable:
        assert torch.equal(fresh.get_parameter(name), tuning.model.model.get_parameter(name)), name
