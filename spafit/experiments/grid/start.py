"""``spafit grid``: check a grid, run it or say what it would do."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spafit.config import BertConfig
from spafit.errors import ConfigError, WeightsError, one_line
from spafit.experiments.grid.cells import Cells, Shadows, expand
from spafit.experiments.grid.display import Display
from spafit.experiments.grid.dry_run import Measured, dry_run
from spafit.experiments.grid.file import Block, Grid, read_grid
from spafit.experiments.grid.places import as_begun, begin, part_of, steps_of
from spafit.experiments.grid.running import Pool, Running
from spafit.experiments.grid.workers import Workers
from spafit.files.replacing import refuse_place
from spafit.strata import fingerprint
from spafit.tasks import glue
from spafit.tasks.task import Dataset
from spafit.text.tokenization import load_tokenizer
from spafit.weights import minilm
from spafit.weights.hub import local_folder, pinned_revision
from spafit.weights.pretrained import load_pretrained

_LARGE = "google-bert/bert-large-cased"


@dataclass(frozen=True)
class GridOptions:
    """The options of ``spafit grid``.

    Attributes
    ----------
    file : str
        A grid file, or the name of a grid that comes with the package.
    out : Path or None
        The grid's folder; None is ``runs/NAME``.
    data : Path
        GLUE's root.
    model : str or None
        Another place of the grid's one model.
    workers : int
        How many processes train.
    threads : int or None
        The threads of each.
    ray : str or None
        The address of the Ray cluster that trains in their place, each run with so many threads.
    part : tuple of (int, int)
        Which part of how many is run, from 1.
    """

    file: str
    out: Path | None
    data: Path
    model: str | None = None
    workers: int = 1
    threads: int | None = None
    ray: str | None = None
    part: tuple[int, int] = (1, 1)


def run_grid(options: GridOptions, *, dry: bool = False) -> int:
    """Run a grid, or, with ``dry``, print what it would do.

    Returns
    -------
    int
        0; 1 if a cell failed.

    Raises
    ------
    ConfigError, DataError, WeightsError, CheckpointError
        If anything can be refused before the first run.
    StoppedError
        If a signal asked for a stop.
    """
    grid = _with_model(read_grid(options.file), options.model)
    out = Path("runs", grid.name) if options.out is None else options.out
    if not dry:
        refuse_place(out, is_folder=True)
    data, digests = _data(grid, options.data, dry)
    shadows = Shadows(_sizes_at_hand if dry else _sizes)
    cells = expand(grid, shadows, data)
    rows = {name: len(each) or _rows_of(name) for name, each in data.items()}
    cells = as_begun(cells, out)
    every = {number: steps_of(cell, rows[cell.task]) for number, cell in enumerate(cells.cells)}
    numbers = part_of(cells, *options.part, every)
    part, parts = options.part
    if parts > 1:
        print(f"part {part} of {parts}: {len(numbers)} of {len(cells.cells)} runs")
    threads = _threads(options)
    weights = {} if dry else _weights(cells)
    running = Running(cells, numbers, out, rows, Display(), threads, digests, weights)
    running.look()
    if dry:
        if threads is not None:
            torch.set_num_threads(threads)
        measured = Measured(_folder_at_hand, shadows.config, data)
        done = set(running.records)
        print(dry_run(cells, numbers, done, rows, running.speeds, measured, options.workers))
        return 0
    data.clear()  # the workers have their own
    pool = _pool(options, cells, out, running.display)
    begin(cells, out)
    running.run(pool)
    print(f"{len(running.records)} of {len(numbers)} runs are done: {out}")
    for number, reason in running.failed.items():
        cell = cells.cells[number]
        print(f"failed: {cell.title}: {one_line(reason, 600)} ({out / cell.folder})")
    return 1 if running.failed else 0


def _weights(cells: Cells) -> dict[tuple[str, str | None], str]:
    """Return the fingerprint of each model; one that no worker could load is refused here."""
    found = {}
    for model, revision in dict.fromkeys((cell.model, cell.revision) for cell in cells.cells):
        load_tokenizer(model, revision=revision)
        found[model, revision] = fingerprint(load_pretrained(model, revision=revision))
    return found


def _pool(options: GridOptions, cells: Cells, out: Path, display: Display) -> Pool:
    """Return what trains: worker processes of this machine, or a Ray cluster."""
    name, data, threads = cells.name, options.data, _threads(options)
    if options.ray is None:
        gpus = _gpus(cells) if options.workers > 1 else []
        return Workers(name, out, data, options.workers, threads, gpus)
    from spafit.experiments.grid.ray_tasks import RayTasks

    return RayTasks(options.ray, name, out, data, threads or 1, display.line)


def _gpus(cells: Cells) -> list[str]:
    """Return the GPUs to deal out to workers, as CUDA names them; none if the grid says which."""
    if any(cell.settings["device"].startswith("cuda:") for cell in cells.cells):
        return []
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if visible is None else visible.split(",")
    return list(names)[:count]


def _with_model(grid: Grid, model: str | None) -> Grid:
    """Take another place of the model, if the grid has only one."""
    if model is None:
        return grid
    every = {
        (each, revision)
        for block in grid.blocks
        for each in block.settings["model"]
        for revision in block.settings.get("revision", (None,))
    }
    if len(every) > 1:
        raise ConfigError(
            f"--model is for a grid with one model; {one_line(grid.name)} has {len(every)}"
        )

    def changed(block: Block) -> Block:
        others = {name: each for name, each in block.settings.items() if name != "revision"}
        return replace(block, settings={**others, "model": (model,)})

    return replace(grid, blocks=tuple(map(changed, grid.blocks)))


def _data(
    grid: Grid, folder: Path, dry: bool
) -> tuple[dict[str, Dataset], dict[str, dict[str, str]]]:
    """Read the training data of all tasks, and check those to evaluate on; return digests of both.

    In a dry run the data may be missing, and those to evaluate on are not read.
    """
    data: dict[str, Dataset] = {}
    digests: dict[str, dict[str, str]] = {}
    for block in grid.blocks:
        for name in block.tasks:
            task = glue.get_task(name)
            if task.name in data:
                continue
            if dry and not glue.has_file(task, "train", folder):
                data[task.name] = Dataset(task, "train", (), f"{task.display}'s train split")
                continue
            data[task.name] = glue.load(task, "train", folder)
            digests[task.name] = {"train": data[task.name].sha256}
            if not dry:
                digests[task.name]["dev"] = glue.load(task, "dev", folder).sha256
    return data, digests


def _rows_of(task: str) -> int:
    train = glue.get_task(task).train
    assert train is not None
    return train.rows


def _sizes(model: str, revision: str | None) -> BertConfig:
    """Return the sizes of a model, whose files are downloaded once."""
    return BertConfig.from_json(local_folder(model, revision=revision) / "config.json")


def _folder_at_hand(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model that needs no network."""
    is_there = Path(model).is_dir() or model == minilm.NAME
    if not is_there and pinned_revision(model, revision) is None:
        return None
    try:
        return local_folder(model, revision=revision)
    except WeightsError:
        if is_there:
            raise
        return None


def _sizes_at_hand(model: str, revision: str | None) -> BertConfig:
    """Return the sizes of a model without a network; those of bert-large-cased are known."""
    folder = _folder_at_hand(model, revision)
    if folder is not None:
        return BertConfig.from_json(folder / "config.json")
    if model.partition("@")[0] == _LARGE:
        return BertConfig()
    raise WeightsError(f"the sizes of {model} are not at hand; spafit download model {model}")


def _threads(options: GridOptions) -> int | None:
    """Return the threads of a worker: as asked for, else the CPUs divided among the workers.

    A task of a Ray cluster has one; None leaves it to PyTorch and the environment.
    """
    if options.ray is not None:
        return options.threads or 1
    if options.threads is not None or options.workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return options.threads
    affinity = getattr(os, "sched_getaffinity", None)  # the CPUs that this process may use
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cpus // options.workers)
