"""Running a grid: order, choice, failures, other commands; with workers in this process."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.grids import InProcess, cells_of, write_grid, write_tasks
from support.small_runs import N_DEV, N

from spafit.cli import main
from spafit.errors import DataError, DivergedError, InUseError
from spafit.experiments.grid import running, start, workers
from spafit.experiments.grid import worker as worker_module
from spafit.experiments.grid.cells import Cell
from spafit.experiments.grid.display import Display, Watched, clock
from spafit.files.durable import Lock
from spafit.machine.versions import machine
from weights_tools.tiny import make_tiny

Capture = pytest.CaptureFixture[str]
CHOOSE = {"learning_rate": [1e-3, 1e-2], "seed": 100}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_tasks(root / "glue")
    make_tiny(root / "tiny", num_hidden_layers=3)
    return root


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[InProcess]]:
    """Train in this process; ``before`` may be replaced, and ``trained`` is empty."""

    class Own(InProcess):
        trained: list[str] = []  # noqa: RUF012

    monkeypatch.setattr(workers, "_Worker", Own)
    monkeypatch.setattr(running, "_LOOK_S", 0.01)
    yield Own


class Grids:
    """Runs grids of one folder by the command, and gives what they print."""

    def __init__(self, root: Path, folder: Path, capsys: Capture) -> None:
        self.root, self.folder, self.capsys = root, folder, capsys
        self.out = folder / "out"

    def __call__(
        self, *cells: dict[str, Any], options: str = "", **more: Any
    ) -> tuple[int, str, str]:
        file = write_grid(self.folder / "g.json", self.root / "tiny", *cells, **more)
        arguments = ["grid", str(file), "--data", str(self.root / "glue"), "--out", str(self.out)]
        self.capsys.readouterr()
        code = main([*arguments, *options.split()])
        return code, *self.capsys.readouterr()

    def record(self, folder: str) -> dict[str, Any]:
        return dict(json.loads((self.out / folder / "run.json").read_text()))


@pytest.fixture
def grids(root: Path, tmp_path: Path, capsys: Capture) -> Grids:
    return Grids(root, tmp_path, capsys)


class TestRuns:
    """Oracle: what was trained, in which order, and the records."""

    def test_records_and_what_is_finished_is_skipped(
        self, grids: Grids, worker: type[InProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cells = {"method": ["lora-ii"], "r": [2, 4], "learning_rate": 1e-3}
        code, out, err = grids(cells, init_seed=[1], seed=0)
        assert (code, out) == (0, f"2 of 2 runs are done: {grids.out}\n")
        assert "rte, Full LoRA-II, r 2, seed 0: accuracy 0." in err
        assert "(2 of 2 done, 0:00:00 left)" in err
        assert worker.trained == [f"rte/Full-LoRA-II/r-{r}/seed-0" for r in (2, 4)]
        about = grids.record("rte/Full-LoRA-II/r-4/seed-0")["about"]
        assert about["cell"] == {"grid": "small", "purpose": "report", "settings": {"r": 4}}
        assert about["init_seed"] == 1 and about["model"] == str(grids.root / "tiny")
        assert about["data"] == str(grids.root / "glue")

        def load(*_: Any, **__: Any) -> None:
            raise AssertionError("loaded")

        with monkeypatch.context() as patched:
            patched.setattr("spafit.experiments.grid.worker.load_pretrained", load)
            code, out, err = grids(cells, init_seed=[1], seed=0)
        assert (code, err) == (0, "2 of 2 are done already\n")
        # More seeds are more runs; those that are there stay.
        assert grids(cells, init_seed=[1], seed=[0, 1])[0] == 0
        assert worker.trained[2:] == [f"rte/Full-LoRA-II/r-{r}/seed-1" for r in (2, 4)]
        # Another grid would give its runs the place of these.
        code, _, err = grids(cells, init_seed=[1], seed=0, epochs=3)
        assert code == 2 and "another run: epochs is 1, asked for is 3" in err
        assert '"epochs": 3' not in (grids.out / "grid.json").read_text()
        assert len(worker.trained) == 4

    def test_a_run_of_train_is_a_cell_and_the_reverse(
        self, grids: Grids, worker: type[InProcess], capsys: Capture
    ) -> None:
        """Bit for bit: ``spafit train`` finds the grid's run finished, and the grid takes its."""
        assert grids({"method": "bitfit", "learning_rate": 1e-3, "seed": 3})[0] == 0
        shared = "--task rte --method bitfit --epochs 1 --batch-size 6 --max-length 16 --quiet"
        places = ["--model", str(grids.root / "tiny"), "--data", str(grids.root / "glue")]
        arguments = ["train", *shared.split(), *places, "--learning-rate=1e-3", "--device=cpu"]
        before = grids.record("rte/Full-BitFit/seed-3")["result"]["history"]
        place = ["--seed=3", "--out", str(grids.out / "rte/Full-BitFit/seed-3")]
        assert main([*arguments, *place]) == 0
        assert grids.record("rte/Full-BitFit/seed-3")["result"]["history"] == before
        assert (
            main([*arguments, "--seed=4", "--out", str(grids.out / "rte/Full-BitFit/seed-4")]) == 0
        )
        assert grids({"method": "bitfit", "learning_rate": 1e-3, "seed": [3, 4]})[0] == 0
        assert worker.trained == ["rte/Full-BitFit/seed-3"]

    @pytest.mark.parametrize("split", ["train", "dev"])
    def test_a_run_on_other_rows_is_none_of_the_grid(
        self, grids: Grids, worker: type[InProcess], split: str
    ) -> None:
        assert grids({"method": "bitfit", "learning_rate": 1e-3})[0] == 0
        record = grids.record("rte/Full-BitFit/seed-0")
        record["data"][split]["sha256"] = "of other rows"
        (grids.out / "rte/Full-BitFit/seed-0/run.json").write_text(json.dumps(record))
        code, _, err = grids({"method": "bitfit", "learning_rate": 1e-3, "seed": [0, 1]})
        assert code == 2 and f"data.{split} is 'of other rows', asked for is" in err
        assert len(worker.trained) == 1

    def test_runs_on_other_weights_are_none_of_the_grid(
        self, grids: Grids, worker: type[InProcess], tmp_path: Path
    ) -> None:
        """The model's folder holds others now; the digest is that of the weights themselves."""
        moved = tmp_path / "moved"
        shutil.copytree(grids.root / "tiny", moved)
        cells = {"method": "bitfit", "learning_rate": 1e-3, "model": str(moved)}
        assert grids(cells)[0] == 0
        tensors = load_file(moved / "model.safetensors")
        name = next(each for each in tensors if "embeddings" in each)
        save_file({**tensors, name: tensors[name] + 1}, moved / "model.safetensors")
        for seeds in ([0], [0, 1]):
            code, _, err = grids({**cells, "seed": seeds})
            assert code == 2 and "another run: base_fingerprint is" in err
        assert len(worker.trained) == 1

    def test_what_a_model_was_called_before_is_known(
        self, grids: Grids, worker: type[InProcess], tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(grids.root / "tiny", copy)
        block = {"method": "lora-ii", "learning_rate": 1e-3}
        assert grids({**block, "r": 2})[0] == 0
        assert grids({**block, "r": 2, "model": str(copy)})[0] == 0
        assert worker.trained == ["rte/Full-LoRA-II/seed-0"] * 2  # the second loads, and is done
        assert grids({**block, "r": [2, 4]})[0] == 0
        assert worker.trained[2:] == ["rte/Full-LoRA-II/seed-0", "rte/Full-LoRA-II/r-4/seed-0"]

    def test_the_rate_with_the_best_mean_is_chosen(
        self, grids: Grids, worker: type[InProcess]
    ) -> None:
        """Oracle: the scores in the records of the choosing runs, over two tasks."""
        cells = {"method": ["lora-ii", "full"], "choose": CHOOSE}
        code, _, err = grids(cells, task=["rte", "wnli"], seed=[0])
        assert code == 0
        assert [folder.startswith("choice/") for folder in worker.trained] == [True] * 8 + [
            False
        ] * 4
        for method, name in (
            ("Full-LoRA-II", "Full LoRA-II"),
            ("Full-Fine-tuning", "Full Fine-tuning"),
        ):
            means = {}
            for rate in CHOOSE["learning_rate"]:  # type: ignore[attr-defined]
                scores = [
                    grids.record(f"choice/{task}/{method}/learning_rate-{rate}/seed-100")["result"]
                    for task in ("rte", "wnli")
                ]
                means[rate] = sum(score["metrics"]["accuracy"] for score in scores) / 2
            best = max(means, key=lambda rate: (means[rate], -rate))
            assert f"{name}: learning rate {best:g} (" in err
            for task in ("rte", "wnli"):
                record = grids.record(f"{task}/{method}/seed-0")
                assert record["settings"]["learning_rate"] == best
                assert record["about"]["cell"]["settings"] == {}
        about = grids.record("choice/rte/Full-LoRA-II/learning_rate-0.01/seed-100")["about"]
        assert about["cell"]["purpose"] == "choice"
        assert about["cell"]["settings"] == {"learning_rate": 0.01}
        # Another choice now: what was trained with the old rate is not taken for it.
        record = grids.record("rte/Full-LoRA-II/seed-0")
        record["settings"]["learning_rate"] = 0.5
        (grids.out / "rte/Full-LoRA-II/seed-0/run.json").write_text(json.dumps(record))
        code, _, err = grids(cells, task=["rte", "wnli"], seed=[0])
        assert code == 2 and "learning_rate is 0.5, asked for is" in err

    def test_failures_are_listed_and_the_rest_is_done(
        self, grids: Grids, worker: type[InProcess]
    ) -> None:
        def before(cell: Cell) -> None:
            if cell.method == "Full BitFit" and cell.settings["learning_rate"] == 1e-3:
                raise DataError("the disk\nburns")

        worker.before = staticmethod(before)  # type: ignore[assignment]
        blocks = [{"method": "bitfit", "choose": CHOOSE}, {"method": "full", "learning_rate": 1e-3}]
        code, out, err = grids(*blocks, seed=[0, 1])
        assert code == 1
        lines = out.splitlines()
        assert lines[0] == f"3 of 6 runs are done: {grids.out}"
        title = "choice: rte, Full BitFit, learning_rate 0.001, seed 100"
        assert lines[1].startswith(f"failed: {title}: DataError: the disk")
        assert lines[1].endswith(
            f"({grids.out}/choice/rte/Full-BitFit/learning_rate-0.001/seed-100)"
        )
        assert [line.partition(" (")[0] for line in lines[2:]] == [
            f"failed: rte, Full BitFit, seed {seed}: no learning rate: {title} failed"
            for seed in (0, 1)
        ]
        assert f"{title}: failed: DataError" in err
        worker.before = staticmethod(lambda cell: None)
        assert grids(*blocks, seed=[0, 1])[0] == 0
        assert len(worker.trained) == 6

    def test_a_rate_that_diverges_is_not_chosen(
        self, grids: Grids, worker: type[InProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from spafit.training.loop import Loop

        run = Loop.run

        def diverging(self: Loop) -> None:
            if self.config.learning_rate == 1e-2:
                raise DivergedError("the loss is NaN")
            run(self)

        monkeypatch.setattr(Loop, "run", diverging)
        code, _, err = grids({"method": "bitfit", "choose": CHOOSE})
        assert code == 0
        assert "learning rate 0.001 (0.001 0." in err and ", 0.01 diverged)" in err
        tried = list(worker.trained)
        assert grids({"method": "bitfit", "choose": CHOOSE}) == (
            0,
            f"3 of 3 runs are done: {grids.out}\n",
            err[err.index("Full BitFit: learning rate") :].partition("\n")[0]
            + "\n3 of 3 are done already\n",
        )
        assert worker.trained == tried
        choose = {"learning_rate": 1e-2, "seed": 100}
        code, out, _ = grids({"method": "lora-ii", "choose": choose})
        assert code == 1 and "no learning rate: the runs of all of them diverged" in out

    def test_a_worker_that_is_killed_twice(self, grids: Grids, worker: type[InProcess]) -> None:
        """Once its cell is taken up again; the second time it has failed."""
        deaths = [0, 1, 1]

        def before(cell: Cell) -> dict[str, Any] | None:
            return {} if deaths and deaths[0] == cell.seed and deaths.pop(0) >= 0 else None

        worker.before = staticmethod(before)  # type: ignore[assignment]
        code, out, err = grids({"method": "bitfit", "learning_rate": 1e-3, "seed": [0, 1, 2]})
        assert code == 1
        assert (
            "seed 0: its worker (process 4711) was killed by signal 9; it is taken up again" in err
        )
        assert out.count("failed: ") == 1
        assert "failed: rte, Full BitFit, seed 1: its worker (process 4711) was killed by" in out
        assert "for the second time" in out
        assert worker.trained == [f"rte/Full-BitFit/seed-{seed}" for seed in (0, 2)]

    def test_what_another_command_holds_is_left_to_it(
        self, grids: Grids, worker: type[InProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is taken up when its lock is free and it is not finished."""
        place = grids.out / "rte/Full-BitFit/seed-0"
        place.mkdir(parents=True)
        other = Lock(place / "run.lock")
        other.acquire()
        seen: list[int] = []

        def before(cell: Cell) -> None:
            if cell.seed == 1 and not seen:
                seen.append(1)
                raise InUseError("by another command, a moment ago")
            if cell.seed == 2:
                other.release()
            assert cell.seed != 0 or other._file is None, "its lock was not looked at"

        worker.before = staticmethod(before)  # type: ignore[assignment]
        code, _, _ = grids({"method": "bitfit", "learning_rate": 1e-3, "seed": [0, 1, 2]})
        assert code == 0 and seen == [1]
        assert sorted(worker.trained) == [f"rte/Full-BitFit/seed-{seed}" for seed in (0, 1, 2)]
        assert worker.trained.index("rte/Full-BitFit/seed-2") < 2

    def test_parts(self, grids: Grids, worker: type[InProcess]) -> None:
        blocks = {"method": ["bitfit", "lora-ii"], "choose": CHOOSE}
        code, out, _ = grids(blocks, options="--cells 1/2")
        assert code == 0 and out.startswith("part 1 of 2: 3 of 6 runs\n")
        first = list(worker.trained)
        assert len(first) == 3
        assert grids(blocks, options="--cells 2/2")[0] == 0
        assert len(set(worker.trained)) == len(worker.trained) == 6
        code, out, _ = grids(blocks, options="--cells 3/3")
        assert (code, out.splitlines()[0]) == (0, "part 3 of 3: 0 of 6 runs")

    def test_cells_share_what_is_kept_of_the_frozen_layers(
        self,
        grids: Grids,
        worker: type[InProcess],
        computed: list[int],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """Oracle: of how many examples group 1 was computed."""
        monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
        counts: list[int] = []
        worker.before = staticmethod(lambda cell: counts.append(sum(computed)))  # type: ignore[assignment]
        block = {"method": ["SPAFIT-0-1-II", "SPAFIT-0-1-I"], "learning_rate": 1e-3}
        assert grids(block, dropout_in_group_1=False, seed=[0, 1], epochs=2)[0] == 0
        assert counts == [0, N + N_DEV, N + N_DEV, N + N_DEV]
        assert sum(computed) == N + N_DEV

    def test_cells_whose_states_have_no_room_compute_them(
        self, grids: Grids, worker: type[InProcess], computed: list[int]
    ) -> None:
        """Oracle: that it is done, and nothing was computed to be kept."""
        block = {"method": "SPAFIT-0-1-II", "learning_rate": 1e-3, "cache_limit_gib": 1e-6}
        assert grids(block, dropout_in_group_1=False, seed=0)[0] == 0
        assert worker.trained == ["rte/SPAFIT-0-1-II/seed-0"] and computed == []

    def test_a_signal_stops_it(self, grids: Grids, worker: type[InProcess]) -> None:
        def before(cell: Cell) -> None:
            if cell.seed == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        worker.before = staticmethod(before)  # type: ignore[assignment]
        code, _, err = grids({"method": "bitfit", "learning_rate": 1e-3, "seed": [0, 1, 2]})
        assert code == 128 + signal.SIGTERM
        assert "stopped by SIGTERM: " in err and "the same command resumes the grid" in err
        assert not (grids.out / "rte/Full-BitFit/seed-2").exists()


class TestAWorker:
    """Oracle: its answers, and what it leaves in the folder."""

    def test_the_traceback_of_an_error_that_nobody_foresaw(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block = {"method": "bitfit", "learning_rate": 1e-3}
        [cell] = cells_of(
            write_grid(tmp_path / "g.json", root / "tiny", block), root / "glue"
        ).cells
        ours = worker_module.Worker("small", tmp_path / "out", root / "glue")
        trace = tmp_path / "out" / cell.folder / "traceback.txt"

        def broken(*_: Any, **__: Any) -> None:
            raise failure

        with monkeypatch.context() as patched:
            patched.setattr(worker_module, "adapt", broken)
            failure: Exception = DataError("no row")
            assert ours.answer(cell, None) == {"failed": "DataError: no row"}
            assert not trace.exists()
            failure = KeyError("x" * 900)
            said = ours.answer(cell, None)["failed"]
            assert said.startswith("KeyError: 'xxx") and len(said) < 500
            assert said.endswith("(traceback.txt in its folder has the traceback)")
            assert "raise failure\nKeyError: 'xxx" in trace.read_text()
        assert ours.answer(cell, None) == {"done": True} and not trace.exists()


class TestThreads:
    """Oracle: the CPUs that the process may use, of more that the machine has."""

    def test_are_divided_among_the_workers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7, 8, 9, 11}, raising=False)

        def threads(**options: Any) -> int | None:
            return start._threads(start.GridOptions("g.json", None, Path(), **options))

        assert [threads(workers=workers) for workers in (1, 2, 3, 9)] == [None, 3, 2, 1]
        assert threads(workers=2, threads=5) == 5
        assert [threads(ray="auto", threads=each) for each in (None, 5)] == [1, 5]
        monkeypatch.delattr(os, "sched_getaffinity")  # as on a Mac
        assert threads(workers=2) == 32


class TestGpus:
    """Oracle: the environment that each worker is started with, where GPUs are said to be there."""

    @pytest.mark.parametrize(
        ("workers_asked", "devices", "visible", "expected"),
        [
            (3, ["auto"], None, ["0", "1", "0"]),
            (3, ["auto"], "5,GPU-a", ["5", "GPU-a", "5"]),
            (2, ["auto", "cuda:1"], None, [None, None]),  # the grid says which
            (1, ["auto"], None, [None]),
        ],
    )
    def test_each_worker_has_one(
        self,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        workers_asked: int,
        devices: list[str],
        visible: str | None,
        expected: list[str | None],
    ) -> None:
        seen: list[str | None] = []

        class Process:
            pid = 4711

            def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
                seen.append(env.get("CUDA_VISIBLE_DEVICES"))
                self.stdin, self.stdout = io.StringIO(), io.StringIO()

            def wait(self) -> int:
                return 1

        block = {"method": "bitfit", "learning_rate": 1e-3}
        file = write_grid(tmp_path / "g.json", root / "tiny", block, seed=list(range(3)))
        cells = cells_of(file, root / "glue")
        every = [
            replace(each, settings={**each.settings, "device": device})
            for each, device in zip(cells.cells, [*devices, "cuda", "cuda"], strict=False)
        ]
        cells = replace(cells, cells=tuple(every))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr(
            workers, "subprocess", SimpleNamespace(Popen=Process, PIPE=subprocess.PIPE)
        )
        options = start.GridOptions("g.json", tmp_path, root / "glue", workers=workers_asked)
        pool: Any = start._pool(options, cells, tmp_path, Display())
        for number in range(workers_asked):
            pool.train(number, cells.cells[number], None)
        assert seen == expected
        ended = next(each for each in pool._workers if each.cell == workers_asked // 2)
        pool._workers.remove(ended)  # it has died: the next one has its GPU
        pool.train(9, cells.cells[0], None)
        assert seen[-1] == expected[workers_asked // 2]


class Pool:
    """A pool of so many workers that trains nothing; ``asked`` counts the looks at what it has."""

    def __init__(self, at_once: int, *taken: int) -> None:
        self.at_once, self._taken = at_once, list(taken)
        self.trained: list[int] = []
        self.asked = 0

    @property
    def taken(self) -> list[int]:
        self.asked += 1
        return list(self._taken)

    running = property(lambda self: list(self._taken))

    def has_room(self) -> bool:
        return len(self._taken) < self.at_once

    def train(self, number: int, cell: Cell, learning_rate: float | None) -> None:
        self._taken.append(number)
        self.trained.append(number)

    def end(self, number: int) -> None:
        self._taken.remove(number)


class TestHandingOut:
    """Oracle: what the pool is given, in which order, and how often it is asked."""

    def test_in_one_walk(self, root: Path, tmp_path: Path) -> None:
        block = {"method": "bitfit", "learning_rate": 1e-3, "seed": list(range(9))}
        file = write_grid(tmp_path / "g.json", root / "tiny", block)
        cells = cells_of(file, root / "glue")
        pool: Any = Pool(7, 2)
        running.Running(cells, range(9), tmp_path, {"rte": N}, Display())._hand_out(pool)
        assert pool.trained == [0, 1, 3, 4, 5, 6] and pool.asked == 1

    def test_first_what_needs_no_states_that_are_being_computed(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three cells that share them, three that share others, and two with none (LoRA-II)."""
        kept = {"learning_rate": 1e-3, "dropout_in_group_1": False}
        blocks = [
            {"method": "SPAFIT-0-1-II", "seed": [0, 1, 2], **kept},
            {"method": "SPAFIT-0-1-II", "seed": [0, 1, 2], "max_length": 8, **kept},
            {"method": "lora-ii", "seed": [0, 1], **kept},
        ]
        cells = cells_of(write_grid(tmp_path / "g.json", root / "tiny", *blocks), root / "glue")
        prefixes = [cell.prefix for cell in cells.cells]
        none, shared, other = [0, 1], [2, 3, 4], [5, 6, 7]
        assert [prefixes.count(prefixes[each]) for each in (0, 2, 5)] == [2, 3, 3]
        assert prefixes[0] is None
        ours = running.Running(cells, range(8), tmp_path, {"rte": N}, Display(io.StringIO()))
        pool: Any = Pool(2, *none)
        ours._hand_out(pool)
        assert pool.trained == []
        for each in none:
            pool.end(each)
            ours._done(each, None)
        ours._hand_out(pool)
        assert pool.trained == [shared[0], other[0]]  # two workers, two files
        pool.at_once = 3
        ours._hand_out(pool)
        assert pool.trained[2:] == [shared[1]]  # nothing else is left, and it does not wait
        record = {"result": {"metrics": {"accuracy": 0.5}}}
        monkeypatch.setattr(running, "read_run", lambda path: record)
        pool.end(other[0])
        ours._ended(other[0], "", 1)
        pool.at_once = 4
        ours._hand_out(pool)
        assert pool.trained[3:] == other[1:]  # their states are kept now

    @pytest.mark.parametrize("held", [0, 1])
    def test_what_another_command_computes_counts(
        self, root: Path, tmp_path: Path, held: int
    ) -> None:
        """Whether it is seen now, or was before."""
        kept = {"method": "SPAFIT-0-1-II", "learning_rate": 1e-3, "dropout_in_group_1": False}
        file = write_grid(
            tmp_path / "g.json", root / "tiny", {**kept, "max_length": [16, 8]}, seed=[0, 1]
        )
        cells = cells_of(file, root / "glue")
        (tmp_path / cells.cells[held].folder).mkdir(parents=True)
        other = Lock(tmp_path / cells.cells[held].folder / "run.lock")
        other.acquire()
        ours = running.Running(cells, range(4), tmp_path, {"rte": N}, Display())
        assert not held or not ours._can_run(held)
        pool: Any = Pool(1)
        ours._hand_out(pool)
        other.release()
        assert [cells.cells[each].settings["max_length"] for each in pool.trained] == [8]


class TestTimeLeft:
    """Oracle: by hand, from records whose seconds are set."""

    @pytest.fixture
    def ours(self, root: Path, tmp_path: Path) -> running.Running:
        """Four runs of 2 epochs of N examples, one of them with another length."""
        block = {"method": "bitfit", "learning_rate": 1e-3, "epochs": 2}
        blocks = [{**block, "seed": [0, 1, 2]}, {**block, "max_length": 8}]
        cells = cells_of(write_grid(tmp_path / "g.json", root / "tiny", *blocks), root / "glue")
        return running.Running(cells, range(4), tmp_path, {"rte": N}, Display(io.StringIO()))

    def done(self, ours: running.Running, number: int, seconds: float) -> None:
        cell = ours.cells[number]
        ours._done(
            number,
            {
                "task": cell.task,
                "about": {"model": cell.model},
                "plan": json.loads(cell.plan),
                "machine": machine(),
                "settings": cell.settings,
                "data": {"train": {"rows": N}},
                "result": {"seconds": seconds},
            },
        )

    def test_of_what_runs_and_waits(self, ours: running.Running) -> None:
        assert ours._time_left(2) == []
        self.done(ours, 0, 3000.0)
        assert ours._time_left(1) == ["at least 1:40:00 left"]  # the fourth run is another kind
        self.done(ours, 3, 1000.0)
        assert ours._time_left(1) == ["1:40:00 left"]
        assert ours._time_left(2) == ["0:50:00 left"]
        assert ours._time_left(8) == ["0:50:00 left"]  # a run has one worker
        ours._watched[1] = Watched(ours.out / ours.cells[1].folder)
        ours._watched[1].step = 4  # of 10
        assert ours._time_left(1) == ["1:20:00 left"]
        assert ours._time_left(2) == ["0:50:00 left"]
        self.done(ours, 1, 6000.0)  # the mean is 4500 s now
        assert ours._time_left(1) == ["1:15:00 left"]
        ours._fail(2, "for a reason")
        assert ours._time_left(1) == ["0:00:00 left"]

    def test_the_display(self, ours: running.Running) -> None:
        """What runs, with the steps and the best score of its log; counts, and time left."""
        drawn: list[list[str]] = []
        ours.display.draw = lambda lines: drawn.append(list(lines))  # type: ignore[method-assign]
        pool: Any = Pool(2)
        ours._draw(pool)
        assert drawn[-1] == ["small: 0 of 4 done, 0 running, 4 waiting"]
        ours._hand_out(pool)
        ours._draw(pool)
        titles = [f"rte, Full BitFit, max_length 16, seed {seed}" for seed in range(3)]
        assert drawn[-1] == [
            "small: 0 of 4 done, 2 running, 2 waiting",
            *(f"  step 0 of 10: {title}" for title in titles[:2]),
        ]
        pool.end(0)
        self.done(ours, 0, 3000.0)
        self.done(ours, 3, 1000.0)
        folder = ours.out / ours.cells[1].folder
        folder.mkdir(parents=True)
        rows = [{"step": 3, "loss": 1}, {"step": 4, "evaluation": {"accuracy": 0.5, "f1": 0.9}}]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ours._draw(pool)
        assert drawn[-1] == [
            "small: 2 of 4 done, 1 running, 1 waiting, 0:50:00 left",
            f"  step 4 of 10, best accuracy 0.5000: {titles[1]}",
        ]
        pool.at_once = 1
        ours._elsewhere.add(2)
        ours._draw(pool)
        assert drawn[-1][0] == (
            "small: 2 of 4 done, 1 running, 1 elsewhere, 0 waiting, 1:20:00 left"
        )
        ours._elsewhere.clear()
        ours._fail(2, "for a reason")
        ours._draw(pool)
        assert drawn[-1][0] == ("small: 2 of 4 done, 1 failed, 1 running, 0 waiting, 0:30:00 left")


class TestRefusals:
    """Oracle: exit code 2, one line, and nothing made."""

    @pytest.mark.parametrize(
        ("settings", "options", "match"),
        [
            ({"model": "damaged"}, "", "model.safetensors"),
            ({"task": "mrpc"}, "", "no file for the train split of MRPC"),
            ({"method": "SPAFIT-4-9-II"}, "", "block 1: SPAFIT-4-9-II on 3 layers"),
            ({"model": ["minilm", "nowhere"]}, "--model x", "--model is for a grid with one model"),
            ({"model": "nowhere"}, "", "nowhere is neither an existing folder"),
        ],
    )
    def test_before_the_first_run(
        self,
        grids: Grids,
        worker: type[InProcess],
        monkeypatch: pytest.MonkeyPatch,
        settings: Any,
        options: str,
        match: str,
    ) -> None:
        monkeypatch.chdir(grids.folder)
        shutil.copytree(grids.root / "tiny", "damaged")
        os.truncate("damaged/model.safetensors", 1000)
        block = {"method": "bitfit", "learning_rate": 1e-3, **settings}
        code, out, err = grids(block, options=options)
        assert (code, out) == (2, "") and match in err and err.count("\n") == 1
        assert worker.trained == [] and not grids.out.exists()

    def test_a_model_in_place_of_the_grid_s(self, grids: Grids, worker: type[InProcess]) -> None:
        block = {"method": "bitfit", "learning_rate": 1e-3}
        tiny = grids.root / "tiny"
        assert grids(block, model="owner/none", revision="v2", options=f"--model {tiny}")[0] == 0
        assert grids.record("rte/Full-BitFit/seed-0")["about"]["model"] == str(tiny)


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class TestDisplay:
    """Oracle: what a terminal does with the two escape sequences, followed here."""

    def screen(self, text: str) -> list[str]:
        lines: list[str] = []
        for part in text.split("\x1b["):
            if part.startswith("J"):
                part = part[1:]
            elif part[:1].isdigit():
                count, part = part.split("F", 1)
                lines = lines[: -int(count)]
            lines += part.split("\n")[:-1]
        return lines

    def test_a_terminal_is_redrawn_below_what_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        stream = Terminal()
        display = Display(stream)
        display.draw(["a", "b"])
        display.line("stays")
        display.draw(["c", "x" * 200])
        assert self.screen(stream.getvalue()) == ["stays", "c", "x" * 79]
        display.draw([])
        display.line("and this")
        assert self.screen(stream.getvalue()) == ["stays", "and this"]

    def test_more_runs_than_a_terminal_has_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What has left it at its top could not be redrawn."""
        monkeypatch.setenv("LINES", "6")
        stream = Terminal()
        display = Display(stream)
        display.draw(list("abcde"))
        assert self.screen(stream.getvalue()) == list("abcde")
        for _ in range(2):
            display.draw(list("abcdefgh"))
            assert self.screen(stream.getvalue()) == [*"abcd", "  ... and 4 more"]

    def test_elsewhere_lines_alone(self) -> None:
        stream = io.StringIO()
        display = Display(stream)
        display.draw(["a"])
        display.line("stays")
        assert stream.getvalue() == "stays\n"

    def test_the_log_of_a_run_is_followed(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path)
        watched.look()
        assert (watched.step, watched.best) == (0, None)
        log = tmp_path / "log.jsonl"
        log.write_text(
            '{"note": "x"}\n{"step": 1, "loss": 1}\n{"step": 2, "evaluation": {"accuracy": 0.5}}\n'
            '{"step": 3, "evaluation": {"accuracy": 0.25}}\n{"step": 4, "lo'
        )
        watched.look()
        assert (watched.step, watched.best) == (3, ("accuracy", 0.5))
        log.write_text('{"step": 1, "loss": 1}\n')  # resumed
        watched.look()
        assert (watched.step, watched.best) == (1, None)

    def test_a_clock(self) -> None:
        assert [clock(3), clock(3599.6), clock(100_000)] == ["0:00:03", "1:00:00", "27:46:40"]
