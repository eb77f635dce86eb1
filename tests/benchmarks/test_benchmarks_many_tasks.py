"""Many tasks on one base, at a tiny size on the CPU.

Oracles: spafit's contenders, PEFT and AdapterHub's form against each other, files and adapters
counted, and numbers worked out by hand. A small library of the names of AdapterHub's takes its
place; the real one too, where ADAPTERHUB names a folder with it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.in_thread import InThread
from support.tiny_bert import CONFIG

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import many_tasks
from benchmarks.contenders import one_base
from benchmarks.contenders.models import SHAPES
from benchmarks.harness import child_process, report
from benchmarks.harness.lengths import load_rows
from benchmarks.harness.peak_memory import PeakMemory
from benchmarks.harness.timing import Rows, WrongResultError
from spafit.strata import use

SMALL = dataclasses.replace(CONFIG, vocab_size=28_996, max_position_embeddings=512)
NOWHERE = Path("/nowhere")
METHOD = "SPAFIT-1-3-II"
COMMAND = (
    "--model-shape tiny --task cola --tasks 3 --batch-size 2 --batches 1 --repeats 2 "
    f"--method {METHOD} --data {NOWHERE}"
).split()


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape "tiny" is smaller still, and the sweep shorter."""
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    monkeypatch.setattr(many_tasks, "SWEPT", (1, 3))
    monkeypatch.setattr(many_tasks, "_SWITCHES", 20)


def test_the_contests_and_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def memory(function: str, arguments: dict[str, Any]) -> PeakMemory:
        """Count what would be loaded; each file takes a MiB."""
        module, _, name = function.partition(":")
        loaded = getattr(sys.modules[module], name)(**arguments)()
        asked.append({**arguments, "found": list(loaded.adaptations)})
        return PeakMemory(100.0 + len(loaded.adaptations), 200.0)

    monkeypatch.setattr(many_tasks, "measure_peak_memory", memory)
    out = tmp_path / "x"
    many_tasks.main([*COMMAND, "--out", str(out)])

    rows = report.read_rows(out.with_suffix(".csv"))
    ours = [one_base.ONE_BY_ONE, one_base.IN_TURN, one_base.MIXED]
    theirs = {"every": one_base.PEFT_SWITCHED, "own": one_base.PEFT_MIXED}
    assert [row["contender"] for row in rows] == [
        f"{contest}: {name}" for contest, peft in theirs.items() for name in [*ours, peft]
    ]
    # 3 tasks of 6 layers, 2 of them shared: 18 / (2 + 3 * 4) = 1.2857, and 5 % less.
    assert [row["required_ratio"] for row in rows] == ["", "1.224", "1.224", "", "", "", "", ""]
    data = load_rows("cola", "train", NOWHERE)
    for row in rows:
        tasks = 1 if row["contest"] == "every" else 3
        [batch] = many_tasks.draw(data, 1, 2 * tasks, seed=0)
        assert float(row["tokens_per_task"]) == pytest.approx(batch.tokens / tasks, rel=1e-3)
        assert (row["tasks"], row["batch_size"], row["rounds"]) == ("3", "2", "2")
        assert float(row["median_time_ms"]) > 0 and row["commit"] and row["peft"]

    swept = report.read_rows(tmp_path / "x_sweep.csv")
    assert [(row["contest"], row["batch_size"]) for row in swept] == [
        ("every", "1"), ("every", "3"), ("own", "1"), ("own", "3"),
    ]  # fmt: skip
    assert all(row["contender"].endswith("tokens a task: mixed") for row in swept)

    spafit, peft = report.read_rows(tmp_path / "x_cost.csv")
    assert [len(each["found"]) for each in asked] == [0, 3]
    assert float(spafit["grown_by_files"]) == pytest.approx(3 / float(spafit["files_mib"]), 1e-3)
    assert 0 < float(spafit["switch_ms"]) < 5 and float(peft["switch_ms"]) > 0
    assert peft["files_mib"] == ""


@pytest.mark.parametrize("what", ["mixed", "in turn", "PEFT"])
def test_wrong_results_are_not_timed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each contender has one task's adapter for another's."""
    if what == "PEFT":
        names = one_base.peft_names

        def turned(model: Any) -> list[str]:
            first, *others = names(model)
            return [*others, first]

        monkeypatch.setattr(many_tasks, "peft_names", turned)
    else:
        forward = one_base.forward_tasks

        def wrong(model: Any, batch: Any, sequences: Any, *, mixed: bool) -> Any:
            found = forward(model, batch, sequences, mixed=mixed)
            if mixed == (what == "mixed"):
                found["task1"] = found["task0"]
            return found

        monkeypatch.setattr(one_base, "forward_tasks", wrong)
    with pytest.raises(WrongResultError, match=what):
        many_tasks.main([*COMMAND, "--contests", "every", "--out", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())


def test_deltas_of_biases_are_compared_before_they_are_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = many_tasks.model_of_tasks(SMALL, METHOD, 2, 0, torch.device("cpu"))
    for name in model.adaptations:
        use(model, name)
        trained = [p for p in model.parameters() if p.requires_grad and "classifier" not in name]
        assert all(each.any() for each in trained)
    forward = one_base.forward_tasks

    def without(model: Any, batch: Any, sequences: Any, *, mixed: bool) -> Any:
        if mixed:
            many_tasks.zero_biases(model)
        return forward(model, batch, sequences, mixed=mixed)

    monkeypatch.setattr(one_base, "forward_tasks", without)
    with pytest.raises(WrongResultError, match="mixed"):
        many_tasks.main([*COMMAND, "--contests", "every", "--out", str(tmp_path / "x")])


# As much of the library's names as is asked for: each task by itself, with hooks where its
# bottlenecks stand.
LIBRARY = """
__version__ = "small"
import torch
from torch import nn


class DoubleSeqBnConfig:
    def __init__(self, reduction_factor, leave_out):
        self.factor, self.left_out = reduction_factor, leave_out


class Bottleneck(nn.Module):
    def __init__(self, hidden, size):
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(hidden, size), nn.SiLU())
        self.adapter_up = nn.Linear(size, hidden)


def init(bert):
    ends, forward = [], bert.forward
    for number, layer in enumerate(bert.encoder.layer):
        for end in (layer.attention.output, layer.output):
            end.adapters = nn.ModuleDict()
            ends.append((number, end))

            def hook(module, inputs, H, end=end):
                if bert.now not in end.adapters:
                    return H
                adapter = end.adapters[bert.now]
                return H + adapter.adapter_up(adapter.adapter_down(H))

            end.dropout.register_forward_hook(hook)

    def add_adapter(name, config):
        hidden = bert.config.hidden_size
        for number, end in ends:
            if number not in config.left_out:
                end.adapters[name] = Bottleneck(hidden, int(hidden // config.factor))

    class Output:
        pass

    def every(*arguments, **more):
        found = []
        for bert.now in bert.active_adapters:
            found.append(forward(*arguments, **more).pooler_output)
        output = Output()
        output.pooler_output = torch.cat(found)
        return output

    bert.add_adapter, bert.forward = add_adapter, every
"""


def bottlenecks(library: Path, out: Path) -> None:
    """Measure against a library, and look at the rows."""
    options = ["--contests", "bottlenecks", "--adapterhub", str(library), "--out", str(out)]
    many_tasks.main([*COMMAND, *options])
    rows = report.read_rows(out.with_name(f"{out.name}_bottlenecks.csv"))
    assert [row["contender"].partition(", ")[2] for row in rows] == [
        "a whole pass for each task", "shared trunk, in turn", "shared trunk, mixed", "Parallel",
    ]  # fmt: skip
    assert all(row["adapterhub"].startswith("adapters ") for row in rows)
    assert {row["method"] for row in rows} == {"Houlsby's adapters above layer 1"}


def test_the_other_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: each other's logits."""
    folder = tmp_path / "library"
    (folder / "adapters").mkdir(parents=True)
    (folder / "adapters" / "__init__.py").write_text(LIBRARY)
    (folder / "adapters" / "composition.py").write_text("def Parallel(*names): return names\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(child_process, "Popen", InThread)
    try:
        bottlenecks(folder, tmp_path / "x")
    finally:
        for name in ("adapters", "adapters.composition"):
            sys.modules.pop(name, None)


@pytest.mark.skipif(
    "ADAPTERHUB" not in os.environ,
    reason="set ADAPTERHUB to the folder of an environment with adapters 1.3.0",
)
def test_the_real_library(tmp_path: Path) -> None:
    bottlenecks(Path(os.environ["ADAPTERHUB"]), tmp_path / "x")


def test_a_process_that_ends_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="parallel_child has ended"):
        many_tasks.main([*COMMAND, "--contests", "bottlenecks", "--adapterhub", str(tmp_path)])


def test_the_ratio_that_is_required_of_nine_tasks() -> None:
    """Of 24 layers 5 are shared: (5 + 9 * 19) / (9 * 24) = 0.8148 of the time, and 5 % more."""
    assert 1 / many_tasks.required_ratio(5, 24, 9) == pytest.approx(1.05 * 176 / 216)


def test_rows_occur_again_only_when_all_have() -> None:
    data = load_rows("cola", "train", NOWHERE)
    drawn = many_tasks.draw(data, 2, 16, seed=3)
    assert drawn == data.draw(2, 16, seed=3)
    numbers = [number for rows in many_tasks.draw(data, 3, 192, seed=3) for number in rows.numbers]
    assert sorted(numbers[:256]) == sorted(set(numbers[:512])) == list(range(256))
    assert len(numbers) == 576
    assert Rows(tuple(numbers[:16]), drawn[0].tokens) == drawn[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "1"], "--tasks must be 2 or more"),
        (["--adapterhub", "x", "--dtype", "bf16"], "--adapterhub is compared on the CPU"),
        (["--contests", "bottlenecks"], "give --adapterhub"),
    ],
)
def test_what_cannot_be_measured(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        many_tasks.main([*COMMAND, *options])
    assert said in capsys.readouterr().err
