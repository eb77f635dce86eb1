"""What the best adapter answers on dev stands beside it, whatever happened to the run.

Oracle: the predictions of a fresh model with that adapter, and the same run, uninterrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.interruptions import interrupted
from support.small_runs import SmallRun, make_dataset

import spafit
from spafit.runs.checkpoint import Checkpoints
from spafit.tasks.glue import Dataset
from spafit.training.inference import predict
from spafit.training.saving import Saver

SETTINGS: dict[str, Any] = {"epochs": 3, "eval_every": 2, "save_every": 3}


class KilledError(BaseException):
    """The end of a process, which nothing in it can prevent."""


def rows(folder: Path) -> list[list[str]]:
    lines = (folder / "dev.tsv").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "index\tlabel\tprediction" and lines[-1] == ""
    return [line.split("\t") for line in lines[1:-1]]


def expected(small: SmallRun, folder: Path, dev: Dataset) -> list[list[str]]:
    """Predict dev with the adapter in a folder."""
    model = spafit.load_pretrained(small.folder, num_labels=dev.task.num_labels)
    spafit.load_adapter(model, folder / "adapter.safetensors")
    found = predict(model, small.tokenizer, dev).labels
    return [
        [str(each.index), str(each.label), str(answer)]
        for each, answer in zip(dev, found, strict=True)
    ]


@pytest.fixture(scope="module")
def whole(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "run"
    result = small.fit(out=out, **SETTINGS)
    assert len(result.history) > 1 and result.best_step < result.history[-1]["step"]
    return out


def test_they_are_those_of_the_best_adapter(small: SmallRun, whole: Path) -> None:
    assert rows(whole) == expected(small, whole, small.dev)


def test_scores_are_written_exactly(small: SmallRun, tmp_path: Path) -> None:
    data = make_dataset("sts-b", 13, seed=4), make_dataset("sts-b", 7, "dev", seed=5)
    small.fit(small.model(num_labels=1), out=tmp_path / "run", data=data, epochs=1)
    found, wanted = rows(tmp_path / "run"), expected(small, tmp_path / "run", data[1])
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    scores = [float(row[2]) for row in found]
    assert scores == pytest.approx([float(row[2]) for row in wanted], abs=1e-5)
    state = json.loads(max((tmp_path / "run").glob("checkpoints/*/state.json")).read_text())
    assert state["answers"] == scores


def test_stopped_and_resumed(small: SmallRun, whole: Path, tmp_path: Path) -> None:
    interrupted(small, tmp_path / "run", [3, 4, 9], **SETTINGS)
    assert (tmp_path / "run" / "dev.tsv").read_bytes() == (whole / "dev.tsv").read_bytes()


@pytest.mark.parametrize("owner", [Checkpoints, Saver])
def test_killed_before_and_after_the_best_checkpoint(
    small: SmallRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type[Any]
) -> None:
    """Before the checkpoint of the best evaluation is written; after it, before the answers are."""
    best = json.loads((whole / "run.json").read_text())["result"]["best_step"]
    name = "save" if owner is Checkpoints else "save_adapter"
    usual = getattr(owner, name)

    def dying(self: Any, at: Any, *others: Any) -> Any:
        if getattr(at, "step", at) == best:  # a state, or the step itself
            raise KilledError
        return usual(self, at, *others)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(owner, name, dying)
        small.fit(out=tmp_path / "run", **SETTINGS)
    small.fit(out=tmp_path / "run", **SETTINGS)
    assert (tmp_path / "run" / "dev.tsv").read_bytes() == (whole / "dev.tsv").read_bytes()
