"""The cells of a grid: their plans, settings, folders, order and parts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from support.grids import cells_of, write_grid, write_tasks

from spafit.config import BertConfig
from spafit.errors import CheckpointError, ConfigError
from spafit.experiments.grid import start as grids
from spafit.experiments.grid.cells import Cells, Shadows, expand
from spafit.experiments.grid.choosing import best_rate, mean_scores
from spafit.experiments.grid.file import read_grid
from spafit.experiments.grid.places import as_begun, begin, part_of, result_of
from spafit.tasks import glue
from spafit.tasks.task import Dataset
from spafit.weights import minilm
from weights_tools.tiny import make_tiny

CHOOSE = {"learning_rate": [1e-3, 1e-2], "seed": 100}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny", num_hidden_layers=3)


def folders(cells: Cells) -> list[str]:
    return [cell.folder for cell in cells.cells]


class TestExpansion:
    """Oracle: written by hand."""

    def test_folders_have_what_varies_and_cells_that_share_come_together(
        self, tmp_path: Path, model: Path, data: Path
    ) -> None:
        file = write_grid(
            tmp_path / "g.json",
            model,
            {"method": ["full", "SPAFIT-0-1-II"], "choose": CHOOSE},
            {"method": "lora-ii", "r": [2, 4], "learning_rate": 1e-3},
            {"method": "bitfit", "seed": 1, "init_seed": [2, 3], "order_seed": 5},
            task=["rte", "wnli"],
            seed=[0, 1],
        )
        cells = cells_of(file, data)
        chosen = [
            f"choice/{task}/{method}/learning_rate-{rate}/seed-100"
            for task, method, rate in itertools.product(
                ("rte", "wnli"), ("Full-Fine-tuning", "SPAFIT-0-1-II"), (0.001, 0.01)
            )
        ]
        reported = [
            f"{task}/{name}"
            for task in ("rte", "wnli")
            for name in (
                "Full-Fine-tuning/seed-0",
                "Full-Fine-tuning/seed-1",
                "Full-LoRA-II/r-2/seed-0",
                "Full-LoRA-II/r-2/seed-1",
                "Full-LoRA-II/r-4/seed-0",
                "Full-LoRA-II/r-4/seed-1",
                "Full-BitFit/init_seed-2/seed-1",
                "Full-BitFit/init_seed-3/seed-1",
                "SPAFIT-0-1-II/seed-0",  # one frozen layer, so it comes last
                "SPAFIT-0-1-II/seed-1",
            )
        ]
        assert folders(cells) == chosen + reported
        assert {cell.purpose for cell in cells.cells[:8]} == {"choice"}
        by_folder = {cell.folder: cell for cell in cells.cells}
        cell = by_folder["rte/Full-LoRA-II/r-4/seed-1"]
        assert cell.varied == {"r": 4}
        assert (cell.seed, cell.init_seed, cell.choice) == (1, 1, None)
        assert cell.settings["learning_rate"] == 1e-3 and cell.settings["epochs"] == 1
        cell = by_folder["wnli/Full-BitFit/init_seed-2/seed-1"]
        assert (cell.init_seed, cell.varied) == (2, {"init_seed": 2})
        assert cell.settings["order_seed"] == 5 and cell.settings["dropout_seed"] == 1
        assert by_folder[chosen[0]].varied == {"learning_rate": 0.001}
        assert by_folder["rte/SPAFIT-0-1-II/seed-0"].varied == {}
        # A choice is of a method over all tasks of its block.
        full, spafit = cells.choices
        assert full.title == "Full Fine-tuning"
        assert {
            rate: [folders(cells)[n] for n in tried] for rate, tried in spafit.cells.items()
        } == {
            rate: [
                f"choice/{task}/SPAFIT-0-1-II/learning_rate-{rate}/seed-100"
                for task in ("rte", "wnli")
            ]
            for rate in (0.001, 0.01)
        }

    def test_blocks_may_choose_by_the_same_runs(
        self, tmp_path: Path, model: Path, data: Path
    ) -> None:
        blocks = [{"method": "bitfit", "seed": 0}, {"method": "Full BitFit", "seed": [1, 2]}]
        cells = cells_of(write_grid(tmp_path / "g.json", model, *blocks, choose=CHOOSE), data)
        assert len(cells.cells) == 2 + 3
        assert [choice.cells for choice in cells.choices] == [{1e-3: (0,), 1e-2: (1,)}] * 2

    def test_a_rate_may_be_chosen_on_fewer_tasks_and_in_fewer_epochs(
        self, tmp_path: Path, model: Path, data: Path
    ) -> None:
        choose = {**CHOOSE, "task": ["wnli"], "epochs": 2}
        block = {"method": ["bitfit", "full"], "epochs": 5, "choose": choose}
        cells = cells_of(write_grid(tmp_path / "g.json", model, block), data)
        assert [(c.purpose, c.task, c.settings["epochs"]) for c in cells.cells] == [
            *[("choice", "wnli", 2)] * 4,
            *[("report", "rte", 5)] * 2,
        ]
        assert [choice.cells for choice in cells.choices] == [
            {1e-3: (0,), 1e-2: (1,)},
            {1e-3: (2,), 1e-2: (3,)},
        ]
        assert [cell.choice for cell in cells.cells[4:]] == [0, 1]

    def test_a_prefix_without_dropout_is_kept_on_disk(
        self, tmp_path: Path, model: Path, data: Path
    ) -> None:
        blocks: list[dict[str, Any]] = [
            {"method": "SPAFIT-0-1-II", "dropout_in_group_1": [True, False]},
            {"method": "linear-probe"},
            {"method": "lora-ii", "dropout_in_group_1": False},  # there is no prefix
            {"method": "SPAFIT-0-1-I", "dropout_in_group_1": False, "cache_prefix": "off"},
        ]
        cells = cells_of(write_grid(tmp_path / "g.json", model, *blocks), data)
        assert {cell.folder: cell.settings["cache_prefix"] for cell in cells.cells} == {
            "rte/SPAFIT-0-1-II/dropout_in_group_1-True/seed-0": "off",
            "rte/SPAFIT-0-1-II/dropout_in_group_1-False/seed-0": "disk",
            "rte/Linear-probing/seed-0": "disk",
            "rte/Full-LoRA-II/seed-0": "off",
            "rte/SPAFIT-0-1-I/seed-0": "off",
        }

    def test_plan_files_beside_the_grid(self, tmp_path: Path, model: Path, data: Path) -> None:
        (tmp_path / "plans").mkdir()
        for name in ("one", "two"):
            text = (
                '{"strata": [{"layers": "0-1"}, {"layers": "2", "train": {"all": "bias-delta"}}]}'
            )
            (tmp_path / "plans" / f"{name}.json").write_text(text)
        file = write_grid(tmp_path / "g.json", model, {"method": "plans/one.json"})
        [cell] = cells_of(file, data).cells
        assert (cell.folder, cell.method, cell.frozen) == ("rte/one/seed-0", "one", 2)
        blocks = [{"method": f"plans/{name}.json"} for name in ("one", "two")]
        with pytest.raises(
            ConfigError, match=r"block 2: rte, two, seed 0 is a cell of g.json, block 1"
        ):
            cells_of(write_grid(tmp_path / "g.json", model, *blocks), data)

    def test_numbers_that_are_near_have_folders_of_their_own(
        self, tmp_path: Path, model: Path, data: Path
    ) -> None:
        block = {"method": "lora-ii", "r": 2, "alpha": [4.0, 4.0000001], "learning_rate": 1e-3}
        cells = cells_of(write_grid(tmp_path / "g.json", model, block), data)
        expected = [f"rte/Full-LoRA-II/alpha-{alpha}/seed-0" for alpha in ("4", "4.0000001")]
        assert folders(cells) == expected

    def test_two_cells_of_one_folder(self, tmp_path: Path, model: Path, data: Path) -> None:
        """Whose names differ in signs that a folder's name has not."""
        for number, name in enumerate(("a b", "a_b")):
            (tmp_path / name).symlink_to(model)
            train = {"all": "bias-delta"} if number else {}
            strata = [{"layers": "0-1", "train": train}, {"layers": "2", "train": {"all": "full"}}]
            (tmp_path / f"{name}.json").write_text(json.dumps({"strata": strata}))
        names = [str(tmp_path / name) for name in ("a b", "a_b")]
        block = {"method": "bitfit", "model": names}
        with pytest.raises(ConfigError, match=r"give each model a name with other letters"):
            cells_of(write_grid(tmp_path / "g.json", model, block), data)
        block = {"method": ["a b.json", "a_b.json"]}
        with pytest.raises(ConfigError, match=r"lie in rte/a-b/seed-0, .* give each plan file a"):
            cells_of(write_grid(tmp_path / "g.json", model, block), data)

    @pytest.mark.parametrize(
        ("blocks", "match"),
        [
            ([{"method": "SPAFIT-4-9-II"}], r"g\.json, block 1: SPAFIT-4-9-II on 3 layers"),
            (
                [{"method": "bitfitt"}],
                r"block 1: there is no method 'bitfitt' \(did you mean bitfit",
            ),
            ([{"method": "no.json"}], "block 1: the plan file .*no.json cannot be read"),
            ([{"method": "linear-probe", "r": 4}], "block 1: linear-probe has no r; leave"),
            ([{"method": "lora-ii", "r": 0}], "block 1: .*r "),
            (
                [{"method": "bitfit"}, {"method": "Full BitFit"}],
                "block 2: rte, Full BitFit, .*block 1",
            ),
            ([{"method": "bitfit", "r": [2, 4]}], "block 1: rte, Full BitFit, .* block 1 already"),
            ([{"method": ["bitfit", "Full BitFit"]}], "block 1 already. Name a plan once"),
            ([{"method": "bitfit", "max_length": 5000}], "block 1: max_length = 5000 exceeds"),
            ([{"method": "bitfit", "metric": "pearson"}], "block 1: .*pearson"),
            ([{"method": "bitfit", "accumulation": 7}], "block 1: accumulation = 7 exceeds"),
            ([{"method": "bitfit", "cache_prefix": "disk"}], "block 1: cache_prefix='disk' needs"),
            ([{"method": "bitfit", "recompute": 3}], "block 1: recompute names group 3"),
            (
                [{"method": "bitfit", "class_weights": {"a": 1}}],
                "block 1: class_weights needs each label of RTE",
            ),
            ([{"method": "bitfit", "model": "nowhere"}], "block 1: nowhere is neither"),
        ],
    )
    def test_refusals(
        self, tmp_path: Path, model: Path, data: Path, blocks: list[Any], match: str
    ) -> None:
        with pytest.raises(ConfigError, match=match):
            cells_of(write_grid(tmp_path / "g.json", model, *blocks), data)


class TestParts:
    """Oracle: sets."""

    @pytest.mark.parametrize("parts", [1, 2, 3, 5, 40])
    def test_are_a_partition_that_keeps_choices_together(
        self, tmp_path: Path, model: Path, data: Path, parts: int
    ) -> None:
        blocks: list[dict[str, Any]] = [
            {"method": ["full", "bitfit"], "choose": CHOOSE},
            {"method": "lora-ii", "r": [2, 4, 8], "learning_rate": 1e-3},
        ]
        file = write_grid(tmp_path / "g.json", model, *blocks, task=["rte", "wnli"], seed=[0, 1])
        cells = cells_of(file, data)
        steps = dict.fromkeys(range(len(cells.cells)), 10)
        found = [part_of(cells, part, parts, steps) for part in range(1, parts + 1)]
        assert sorted(itertools.chain(*found)) == list(range(len(cells.cells))) == list(range(28))
        for numbers in found:
            for choice in {cells.cells[n].choice for n in numbers} - {None}:
                assert choice is not None
                tried = set(itertools.chain(*cells.choices[choice].cells.values()))
                assert tried <= set(numbers)
        if parts == 2:
            assert list(map(len, found)) == [14, 14]


class TestChoosing:
    """Oracle: means by hand."""

    def test_each_is_called_by_what_tells_it_apart(
        self, tmp_path: Path, model: Path, data: Path
    ) -> None:
        blocks: list[dict[str, Any]] = [
            {"method": "lora-ii", "epochs": [1, 3], "r": 4},
            {"method": "bitfit", "epochs": 3},
        ]
        cells = cells_of(write_grid(tmp_path / "g.json", model, *blocks, choose=CHOOSE), data)
        assert [each.title for each in cells.choices] == [
            *("Full LoRA-II, epochs 1", "Full LoRA-II, epochs 3"),
            "Full BitFit",
        ]

    def record(self, name: str, score: float) -> dict[str, Any]:
        return {"result": {"metrics": {name: score, "f1": 9.0}}}

    def test_the_best_mean_and_of_equal_ones_the_smallest(self) -> None:
        from spafit.experiments.grid.cells import Choice

        choice = Choice("x", {1e-3: (0, 1), 2e-3: (2, 3), 4e-3: (4, 5)})
        scores = [0.5, 0.75, 0.75, 0.5, 0.25, 0.875]
        records = {n: self.record("accuracy", score) for n, score in enumerate(scores)}
        means = mean_scores(choice, records)
        assert means == {1e-3: 0.625, 2e-3: 0.625, 4e-3: 0.5625}
        assert best_rate(means) == 1e-3
        means = mean_scores(choice, {**records, 1: None})
        assert means[1e-3] is None and best_rate(means) == 2e-3
        errors = {n: self.record("mean_squared_error", score) for n, score in enumerate(scores)}
        assert best_rate(mean_scores(choice, errors)) == 4e-3
        assert best_rate({1e-3: None}) is None


class TestBegunFolders:
    """Oracle: the folders of before."""

    def test_what_varies_later_moves_nothing(self, tmp_path: Path, model: Path, data: Path) -> None:
        file, out = tmp_path / "g.json", tmp_path / "out"
        before = cells_of(write_grid(file, model, {"method": "lora-ii"}), data)
        begin(before, out)
        assert folders(before) == ["rte/Full-LoRA-II/seed-0"]
        wider = {"method": "lora-ii", "r": [4, 64], "seed": [0, 1]}
        after = cells_of(write_grid(file, model, wider), data)
        assert folders(as_begun(after, out)) == [
            "rte/Full-LoRA-II/r-4/seed-0",
            "rte/Full-LoRA-II/r-4/seed-1",
            "rte/Full-LoRA-II/seed-0",
            "rte/Full-LoRA-II/r-64/seed-1",
        ]
        with pytest.raises(ConfigError, match="another command has begun a grid"):
            begin(after, out)
        begin(as_begun(after, out), out)
        assert as_begun(before, out) == before
        entries = json.loads((out / "grid.json").read_text())
        assert [entry["seed"] for entry in entries["cells"]] == [0, 0, 1, 1]
        assert sorted(path.name for path in out.iterdir()) == ["grid.json"]

    def test_what_changes_no_result_moves_nothing(
        self, tmp_path: Path, model: Path, data: Path
    ) -> None:
        """Unless the grid varies it: then the cells are those of the grid as it varies."""
        file, out = tmp_path / "g.json", tmp_path / "out"
        begin(cells_of(write_grid(file, model, {"method": "lora-ii"}), data), out)
        block = {"method": "lora-ii", "r": [4, 64]}
        other = {"save_every": 7, "keep_checkpoints": 3, "accumulation": 2, "recompute": 1}
        other |= {"step": "eager", "cache_limit_gib": 2}
        for settings in ({}, other):
            cells = as_begun(cells_of(write_grid(file, model, block, **settings), data), out)
            assert folders(cells) == ["rte/Full-LoRA-II/r-4/seed-0", "rte/Full-LoRA-II/seed-0"]
            begin(cells, out)
        assert len(json.loads((out / "grid.json").read_text())["cells"]) == 2
        both = cells_of(write_grid(file, model, block, recompute=[[], [1]]), data)
        assert len(set(folders(as_begun(both, out)))) == 4

    def test_a_grid_with_the_keys_of_before(self, tmp_path: Path, model: Path, data: Path) -> None:
        """Its cells stay where they are, with more seeds and methods beside them."""
        file, out = tmp_path / "g.json", tmp_path / "out"
        block = {"method": "lora-ii", "r": [4, 64]}
        before = cells_of(write_grid(file, model, block, choose=CHOOSE), data)
        begin(before, out)
        content = json.loads((out / "grid.json").read_text())
        for number, entry in enumerate(content["cells"]):
            entry["key"] = f"{number:064}"
        (out / "grid.json").write_text(json.dumps(content))
        assert as_begun(before, out) == before
        more = {**block, "method": ["lora-ii", "lora-i"]}
        after = as_begun(
            cells_of(write_grid(file, model, more, choose=CHOOSE, seed=[0, 1]), data), out
        )
        assert set(folders(before)) < set(folders(after))
        begin(after, out)
        entries = json.loads((out / "grid.json").read_text())["cells"]
        assert [entry["folder"] for entry in entries[:6]] == folders(before)
        assert len(entries) == len(after.cells) and len({e["key"] for e in entries}) == 16

    def test_a_damaged_file(self, tmp_path: Path, model: Path, data: Path) -> None:
        cells = cells_of(write_grid(tmp_path / "g.json", model, {"method": "lora-ii"}), data)
        for text in ("{", "[]", '{"cells": [3]}', '{"cells": [{"key": 3, "folder": "x"}]}'):
            (tmp_path / "grid.json").write_text(text)
            with pytest.raises(ConfigError, match=r"grid\.json cannot be read"):
                begin(cells, tmp_path)


class TestPackaged:
    """Oracle: the paper's section 4 and appendix A.2, and the counts of its Table 2."""

    def cells(self, name: str, config: BertConfig) -> Cells:
        grid = read_grid(name)
        tasks = {glue.get_task(task) for block in grid.blocks for task in block.settings["task"]}
        data = {task.name: Dataset(task, "train", (), "") for task in tasks}
        return expand(grid, Shadows(lambda model, revision: config), data)

    def test_table_2(self) -> None:
        cells = self.cells("table-2", BertConfig()).cells
        counts = {(cell.task, cell.method): cell.trainable for cell in cells}
        assert len(counts) == 10 * 9 and len(cells) == 3 * 90
        assert {cell.method: cell.trainable for cell in cells if cell.task == "mnli"} == {
            "Full Fine-tuning": 333_582_339,
            "Full LoRA-I": 9_440_259,
            "Full LoRA-II": 12_585_987,
            "SPAFIT-8-12-I": 4_441_091,
            "SPAFIT-8-12-II": 5_882_883,
            "SPAFIT-8-16-II": 3_806_211,
            "SPAFIT-4-9-I": 5_650_435,
            "SPAFIT-4-9-II": 7_485_443,
            "SPAFIT-4-14-II": 4_889_603,
            "Full BitFit": 273_411,
        }
        for cell in cells:
            settings = cell.settings
            assert settings["learning_rate"] == (
                2e-5 if cell.method == "Full Fine-tuning" else 6e-5
            )
            assert settings["batch_size"] == (8 if cell.task in ("mnli", "qnli", "qqp") else 16)
            assert (settings["epochs"], settings["weight_decay"]) == (10, 0.01)
            assert settings["warmup"] == 0 and settings["max_grad_norm"] == 1
            assert settings["dropout_in_group_1"] is True and settings["cache_prefix"] == "off"
            assert cell.model == "google-bert/bert-large-cased"

    def test_table_1(self) -> None:
        cells = self.cells("table-1", BertConfig())
        assert len(cells.cells) == 9 * 10 * (4 + 3) and len(cells.choices) == 10
        for choice in cells.choices:
            assert sorted(choice.cells) == [2e-5, 6e-5, 2e-3, 6e-3]
            assert {len(tried) for tried in choice.cells.values()} == {9}
        steps = dict.fromkeys(range(len(cells.cells)), 10)
        parts = [part_of(cells, part, 11, steps) for part in range(1, 12)]
        assert sorted(map(len, parts)) == [0] + 10 * [9 * (4 + 3)]  # a method is not divided
        assert all(len({cells.cells[each].method for each in part}) <= 1 for part in parts)

    def test_minilm(self) -> None:
        sizes = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12}
        config = dataclasses.replace(BertConfig(), intermediate_size=1536, **sizes)
        cells = self.cells("minilm", config)
        methods = {cell.method for cell in cells.cells}
        assert len(methods) == 12 and {"Houlsby", "Linear probing"} <= methods
        report = [cell for cell in cells.cells if cell.purpose == "report"]
        seeds = {name: [each.seed for each in report if each.method == name] for name in methods}
        claim = {"Full Fine-tuning", "Full BitFit", "Full LoRA-II", "SPAFIT-0-2-II"}
        for name, its in seeds.items():
            assert sorted(its) == sorted(4 * [0, 1, 2, *([3, 4] if name in claim else [])])
        assert {cell.task for cell in report} == {"rte", "mrpc", "cola", "sts-b"}
        assert all(cell.choice is not None for cell in report)
        assert {cell.model for cell in report} == {minilm.NAME}
        assert "full" not in {cell.training.get("cache_prefix") for cell in report}

    def test_they_come_with_the_package(self) -> None:
        from importlib import resources

        folder = resources.files("spafit.experiments.grid") / "grids"
        there = {path.name for path in folder.iterdir()}
        assert there == {"table-1.json", "table-2.json", "minilm.json"}
        setup = (Path(grids.__file__).parents[3] / "setup.cfg").read_text()
        assert "experiments/grid/grids/*.json" in setup


class TestResults:
    """Oracle: run.json, changed by hand."""

    def test_a_finished_run_of_the_cell(self, tmp_path: Path, model: Path, data: Path) -> None:
        blocks = [{"method": "lora-ii", "r": 4}]
        [cell] = cells_of(
            write_grid(tmp_path / "g.json", model, *blocks, learning_rate=1e-3), data
        ).cells
        file = tmp_path / cell.folder / "run.json"
        assert result_of(cell, tmp_path, None) is None
        record: dict[str, Any] = {
            "status": "finished",
            "task": "rte",
            "method": cell.method,
            "plan": json.loads(cell.plan),
            "settings": cell.settings,
            "about": {"model": str(model)},
            "result": {"metrics": {"accuracy": 0.5}},
        }
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(record))
        found = result_of(cell, tmp_path, None)
        assert found is not None and found["result"] == record["result"]
        for change in (
            {"status": "interrupted"},
            {"result": None},
            {"about": {"model": "another"}},  # the weights are compared by fit
            {"about": {"model": str(model), "revision": "v1"}},
        ):
            file.write_text(json.dumps({**record, **change}))
            assert result_of(cell, tmp_path, None) is None
        for setting, value in (("epochs", 3), ("learning_rate", 2e-3), ("early_stopping", 2)):
            file.write_text(json.dumps({**record, "settings": {**cell.settings, setting: value}}))
            with pytest.raises(CheckpointError, match=f"another run: {setting} is {value}, asked"):
                result_of(cell, tmp_path, None)
        file.write_text(json.dumps({**record, "about": {"model": str(model), "init_seed": 3}}))
        with pytest.raises(CheckpointError, match="init_seed is 3, asked for is None"):
            result_of(cell, tmp_path, None)
        file.write_text("{")
        with pytest.raises(CheckpointError, match="cannot be read"):
            result_of(cell, tmp_path, None)
        older = dict(cell.settings)  # by the name that it had
        older["frozen_dropout"] = older.pop("dropout_in_group_1")
        digests = {"train": {"sha256": "abc"}, "dev": {"sha256": "def"}}
        file.write_text(json.dumps({**record, "settings": older, "data": digests}))
        assert result_of(cell, tmp_path, None, {"train": "abc", "dev": "def"}) is not None
        assert result_of(cell, tmp_path, None, {"train": "abc"}) is not None
        with pytest.raises(CheckpointError, match=r"data\.dev is 'def', asked for is 'other'"):
            result_of(cell, tmp_path, None, {"train": "abc", "dev": "other"})
        chosen = dataclasses.replace(cell, choice=0)
        file.write_text(json.dumps(record))
        assert result_of(chosen, tmp_path, None) is not None
        assert result_of(chosen, tmp_path, 1e-3) is not None
        with pytest.raises(CheckpointError, match=r"learning_rate is 0\.001, asked for is 0\.01"):
            result_of(chosen, tmp_path, 1e-2)
