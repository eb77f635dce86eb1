"""What a grid would do: counts, steps and times, without training it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import REPOSITORY
from support.grids import InProcess, cells_of, write_grid, write_tasks
from support.small_runs import N, make_dataset

from spafit.cli import main
from spafit.config import BertConfig
from spafit.experiments.grid import dry_run as dry
from spafit.experiments.grid import start as grids
from spafit.experiments.grid import workers
from spafit.experiments.grid.cells import Cell
from spafit.experiments.grid.dry_run import Measured
from spafit.experiments.grid.speeds import SLOWING, Kind, Speeds, kind_of
from spafit.machine.versions import machine
from spafit.tasks import glue
from spafit.tasks.task import Dataset
from weights_tools.tiny import make_tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_tasks(root / "glue")
    make_tiny(root / "tiny", num_hidden_layers=3)
    return root


class FixedSpeeds(Measured):
    """Measures nothing: 2 s an example of RTE; and says which method would be measured."""

    def seconds(self, cell: Any, rows: int) -> float | None:
        known = len(self._data[cell.task]) > 0
        return 2.0 * rows * cell.settings["epochs"] if known else None


def test_what_is_printed(
    root: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: counted by hand, 25 rows in batches of 6 for 2 epochs."""
    monkeypatch.setattr(grids, "Measured", FixedSpeeds)
    block = {"method": ["bitfit"], "choose": {"learning_rate": [1e-3, 1e-2], "seed": 100}}
    ranks = {"method": "lora-ii", "r": [2, 4], "learning_rate": 1e-3}
    tasks = {"task": ["rte", "qqp", "sts-b"], "seed": [0, 1], "epochs": 2}
    file = write_grid(tmp_path / "g.json", root / "tiny", block, ranks, **tasks)
    out = tmp_path / "out"
    arguments = ["grid", str(file), "--data", str(root / "glue"), "--out", str(out), "--dry-run"]
    assert main([*arguments, "--workers", "2"]) == 0
    text = capsys.readouterr().out
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert lines[0] == " runs done numbers that train steps time"
    assert lines[1] == "to choose the learning rate of Full BitFit: at most 665 numbers train"
    assert lines[2] == " rte 2 0 665 20 0:03:20"
    assert lines[3] == " qqp 2 0 665 242,564 ?"
    at = lines.index("Full LoRA-II, r 4: at most 2,354 numbers train")
    assert lines[at + 1 : at + 4] == [
        " rte 2 0 2,354 20 0:03:20",
        " qqp 2 0 2,354 242,564 ?",  # 363,846 rows
        " sts-b 2 0 2,329 3,836 ?",
    ]
    total = 4 * (20 + 242_564 + 3_836)
    assert lines[-2].startswith(
        f"small: 24 runs, 0 of them done, {total:,} steps; 0:06:40 to go of 2"
    )
    assert lines[-2].endswith("without 16 runs whose time is not known")
    assert "no data of qqp, sts-b" in lines[-1] and "spafit download glue qqp sts-b" in lines[-1]
    assert all(len(line) <= 100 for line in text.splitlines()[:-2])
    assert not out.exists()


def test_times_are_those_of_finished_runs(
    root: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the seconds in the record of the one that is finished."""

    def measures(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(workers, "_Worker", InProcess)
    monkeypatch.setattr(Measured, "_measure", measures)
    block = {"method": "bitfit", "learning_rate": 1e-3}
    out = tmp_path / "out"
    arguments = ["grid", str(tmp_path / "g.json"), "--data", str(root / "glue"), "--out", str(out)]
    write_grid(tmp_path / "g.json", root / "tiny", block)
    assert main(arguments) == 0
    path = out / "rte/Full-BitFit/seed-0/run.json"
    record = json.loads(path.read_text())
    record["result"]["seconds"] = 1000.0
    path.write_text(json.dumps(record))
    write_grid(tmp_path / "g.json", root / "tiny", block, seed=[0, 1, 2])
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"rte +3 +1 +665 +15 +0:33:20\n", text), text
    assert "3 runs, 1 of them done, 15 steps; 0:33:20 to go\n" in text
    # A run with other threads is another one's time.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(AssertionError, match="measured"):
        main([*arguments, "--dry-run", "--threads", str(torch.get_num_threads() + 1)])


class TestSpeeds:
    """Oracle: by hand."""

    settings: ClassVar[dict[str, Any]] = {"epochs": 2, "batch_size": 8, "cache_prefix": "off"}

    def kind(self, task: str, plan: str, model: str = "m", **settings: Any) -> Kind:
        return kind_of(task, model, {"strata": plan}, {**self.settings, **settings})

    def record(self, task: str, plan: str, seconds: float, **changes: Any) -> dict[str, Any]:
        return {
            "task": task,
            "about": {"model": "m"},
            "plan": {"name": f"{plan} of {task}", "strata": plan},
            "machine": {**machine(), **changes},
            "settings": self.settings,
            "data": {"train": {"rows": 50}},
            "result": {"seconds": seconds},
        }

    def test_of_near_runs(self) -> None:
        speeds, kind = Speeds(), self.kind
        speeds.add({"machine": machine()})
        assert speeds.seconds(kind("rte", "a"), 10) is None
        speeds.add(self.record("rte", "a", 100.0))
        speeds.add(self.record("rte", "a", 300.0))
        speeds.add(self.record("cola", "b", 1000.0))
        assert speeds.seconds(kind("rte", "a"), 10) == 20
        assert speeds.seconds(kind("rte", "b"), 10) == 20
        assert speeds.seconds(kind("wnli", "b"), 10) == 100
        assert speeds.seconds(kind("wnli", "c"), 30) == 30 * 1400 / 300
        assert speeds.seconds(kind("rte", "b"), 10, near=False) is None

    @pytest.mark.parametrize(
        "other",
        [*SLOWING, "cache_prefix", "eval_every", "model"],
        ids=lambda name: f"another-{name}",
    )
    def test_not_of_runs_that_are_slower_or_faster(self, other: str) -> None:
        speeds = Speeds()
        speeds.add(self.record("rte", "a", 100.0))
        assert speeds.seconds(self.kind("rte", "a", seed=5), 10) == 10
        assert speeds.seconds(self.kind("rte", "a", **{other: "another"}), 10) is None

    def test_not_of_other_machines_or_threads(self) -> None:
        for change in ({"processor": "another"}, {"torch_threads": 99}):
            speeds = Speeds()
            speeds.add(self.record("rte", "a", 500.0, **change))
            assert speeds.seconds(self.kind("rte", "a"), 10) is None
        speeds = Speeds(threads=99)
        speeds.add(self.record("rte", "a", 500.0, torch_threads=99))
        speeds.add(self.record("rte", "a", 100.0))
        assert speeds.seconds(self.kind("rte", "a"), 10) == 50


class TestMeasuring:
    """Oracle: what is trained, seen from inside ``fit``."""

    @pytest.mark.parametrize("has_weights", [True, False])
    def test_a_few_steps_of_each_method_on_real_lengths(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_weights: bool
    ) -> None:
        calls: list[tuple[int, int, str]] = []
        fit = dry.fit

        def watched(model: Any, tokenizer: Any, train: Dataset, dev: Dataset, config: Any) -> Any:
            assert config.out is None and model.bert.embeddings.word_embeddings.weight.std() > 0
            calls.append((len(train), len(dev), model.adaptation.plan.name))
            return fit(model, tokenizer, train, dev, config)

        monkeypatch.setattr(dry, "fit", watched)
        monkeypatch.setattr(dry, "_MEASURED_S", 1e-9)
        block = {"method": ["SPAFIT-0-1-II", "full"], "learning_rate": 1e-3}
        file = write_grid(tmp_path / "g.json", root / "tiny", block, seed=[0, 1])
        cells = cells_of(file, root / "glue").cells
        tiny = root / "tiny"
        measured = Measured(
            lambda model, revision: tiny if has_weights else None,
            lambda model, revision: BertConfig.from_json(tiny),
            {"rte": glue.load("rte", "train", root / "glue")},
        )
        times = [measured.seconds(cell, N) for cell in cells]
        assert all(time is not None and time > 0 for time in times)
        assert times[0] == times[1] and times[2] == times[3]  # each measured once
        assert [each[2] for each in calls] == ["Full Fine-tuning"] * 2 + ["SPAFIT-0-1-II"] * 2
        assert calls[1][:2] == (6, 6)
        assert bool(measured.notes) != has_weights
        if not has_weights:
            assert "is not at hand: its times are of random weights" in next(iter(measured.notes))

    def test_settings_that_change_the_time_are_measured_apart(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: tokens by hand, and a speed that is another one at each measurement."""
        settings = {"max_length": [8, 16], "batch_size": [4, 6], "precision": ["float32", "bf16"]}
        settings |= {"recompute": [[], [1]]}  # type: ignore[dict-item]
        file = write_grid(tmp_path / "g.json", root / "tiny", {"method": "lora-ii"}, **settings)
        cells = cells_of(file, root / "glue").cells
        data = glue.load("rte", "train", root / "glue")
        measured = Measured(lambda *_: root / "tiny", lambda *_: BertConfig(), {"rte": data})
        speeds: list[dry._Speed] = []

        def measure(self: Measured, cell: Cell) -> dry._Speed:
            speeds.append(dry._Speed(len(speeds) + 1.0, 0.0))
            return speeds[-1]

        monkeypatch.setattr(Measured, "_measure", measure)
        times = [measured.seconds(cell, N) for cell in cells]
        assert len(cells) == len(speeds) == len(set(times)) == 16
        assert [measured.seconds(cell, N) for cell in cells] == times and len(speeds) == 16
        assert measured._tokens_of(cells[0]) <= 8 < measured._tokens_of(cells[-1])

    def test_the_time_is_of_all_rows_and_evaluations(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: by hand, from speeds that are set."""
        block = {"method": "bitfit", "learning_rate": 1e-3, "epochs": 2}
        file = write_grid(tmp_path / "g.json", root / "tiny", block)
        [cell] = cells_of(file, root / "glue").cells
        measured = Measured(lambda *_: root / "tiny", lambda *_: BertConfig(), {
            "rte": make_dataset("rte", N)
        })  # fmt: skip
        monkeypatch.setattr(Measured, "_speed_of", lambda self, cell: dry._Speed(3.0, 0.5))
        monkeypatch.setattr(Measured, "_tokens_of", lambda self, cell: 10.0)
        assert measured.seconds(cell, 100) == 10 * (2 * 100 * 3.0 + 2 * 277 * 0.5)
        assert measured.seconds(cell, 0) == 10 * (2 * 277 * 0.5)
        assert not measured.notes
        kept = dataclasses.replace(cell, settings={**cell.settings, "cache_prefix": "disk"})
        assert measured.seconds(kept, 100) == measured.seconds(cell, 100)
        assert "where the hidden states after group 1 are kept" in next(iter(measured.notes))
        nothing = Measured(lambda *_: None, lambda *_: BertConfig(), {
            "rte": make_dataset("rte", 0)
        })  # fmt: skip
        assert nothing.seconds(cell, 100) is None


def test_table_2_without_weights_and_data(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the paper's Table 2, and the rows of GLUE."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["grid", "table-2", "--dry-run"]) == 0
    text = re.sub(" +", " ", capsys.readouterr().out)
    for method, number in (
        ("Full Fine-tuning", "333,582,339"),
        ("Full BitFit", "273,411"),
        ("SPAFIT-8-16-II", "3,806,211"),
        ("SPAFIT-4-9-II", "7,485,443"),
    ):
        assert f"{method}: at most {number} numbers train\n" in text
    assert " mnli 3 0 7,485,443 1,472,640 ?\n" in text  # 3 · 10 · 392,702 / 8
    assert " rte 3 0 7,484,418 4,680 ?\n" in text
    assert "table-2: 270 runs, 0 of them done" in text
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_are_not_at_hand(tmp_path: Path, capsys: Capture) -> None:
    file = write_grid(tmp_path / "g.json", Path("owner/none"), {"method": "bitfit"})
    assert main(["grid", str(file), "--dry-run", "--data", str(tmp_path)]) == 2
    assert "the sizes of owner/none are not at hand; spafit download" in capsys.readouterr().err


def test_the_grid_of_the_guide(tmp_path: Path) -> None:
    """It can be read, and has the runs that its words say."""
    text = (REPOSITORY / "docs/guide/grids.md").read_text(encoding="utf-8")
    [block] = [b for b in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if '"cells"' in b]
    (tmp_path / "g.json").write_text(block)
    from spafit.experiments.grid.cells import Shadows, expand
    from spafit.experiments.grid.file import read_grid

    tasks = {name: Dataset(glue.get_task(name), "train", (), "") for name in ("rte", "mrpc")}
    with torch.device("cpu"):
        config = BertConfig(num_hidden_layers=6)
    cells = expand(read_grid(tmp_path / "g.json"), Shadows(lambda *_: config), tasks)
    report = [cell for cell in cells.cells if cell.purpose == "report"]
    assert len(report) == 2 * 3 * (3 + 1 + 2) and len(cells.cells) - len(report) == 2 * (9 + 2)


def test_the_parts_of_the_guide() -> None:
    """The array of jobs is as long as there are parts, whichever jobs are submitted."""
    text = (REPOSITORY / "docs/guide/grids.md").read_text(encoding="utf-8")
    [jobs] = re.findall(r"--array=1-(\d+) ", text)
    assert re.findall(r'--cells "\$SLURM_ARRAY_TASK_ID/(.*)"', text) == [jobs]
