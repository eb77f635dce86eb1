"""Where the cells of a grid lie: what is in their folders, and how they are divided into parts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spafit.config import read_json
from spafit.errors import CheckpointError, ConfigError, DivergedError
from spafit.experiments.grid.cells import Cell, Cells
from spafit.files.durable import Lock
from spafit.files.replacing import replacing
from spafit.runs.identity import LENGTH, RENAMED, require_same_run
from spafit.runs.record import CHECKPOINTS, RUN, name_of_model, read_run

DIVERGED = f"{DivergedError.__name__}: "
"""How the error of a run begins whose loss, gradient or logits were no longer finite."""

GRID = "grid.json"
"""The grid that was begun in a folder: its cells, and where each of them lies."""

_MEND = "Remove that folder, give another one for the grid (--out), or the same settings"


def result_of(
    cell: Cell,
    out: Path,
    learning_rate: float | None,
    data: Mapping[str, str] | None = None,
    weights: str | None = None,
) -> dict[str, Any] | None:
    """Return the record of a cell's finished run; None if there is something left to do.

    A run that diverged while it tried a learning rate is finished, too.

    Nothing is loaded: what is asked for is compared with ``run.json``. A run of another name or
    revision of the model is left to :func:`spafit.fit`, which compares the weights.

    Parameters
    ----------
    cell : Cell
        The cell.
    out : Path
        The grid's folder.
    learning_rate : float or None
        The learning rate that was chosen for it; None is not compared.
    data : mapping of str to str, optional
        The SHA-256 of train and of dev; one that is not given is not compared.
    weights : str, optional
        The fingerprint of the model's weights, which are not compared without it.

    Raises
    ------
    CheckpointError
        If the folder holds another run; the message names the differences.
    """
    folder = out / cell.folder
    if not (folder / RUN).exists():
        return None
    try:
        old = read_run(folder / RUN)
    except CheckpointError:
        if (folder / CHECKPOINTS).is_dir():
            return None  # one of them may be valid
        raise
    found = old.get("settings")
    before = found if isinstance(found, dict) else {}
    before = {RENAMED.get(name, name): value for name, value in before.items()}
    now = {name: value for name, value in cell.settings.items() if name in before}
    if cell.choice is not None:
        now["learning_rate"] = learning_rate or before.get("learning_rate")
    about = old.get("about")
    about = about if isinstance(about, dict) else {}
    # An older record may lack it.
    base = {"base_fingerprint": weights} if weights and "base_fingerprint" in old else {}
    require_same_run(
        folder,
        {
            "task": old.get("task"),
            "plan": old.get("plan"),
            "settings": before,
            "about": about,
            "data": {split: _digest(old, split) for split in data or ()},
            **{name: old[name] for name in base},
        },
        {
            "task": cell.task,
            "plan": json.loads(cell.plan),
            "settings": now,
            "about": {"init_seed": cell.init_seed},
            "data": dict(data or {}),
            **base,
        },
        _MEND,
    )
    for name in LENGTH:  # `fit` lets them differ when a run is resumed, and a grid does not
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder} holds another run: {name} is {before.get(name)!r:.80}, asked for is "
                f"{now.get(name)!r:.80}. {_MEND}"
            )
    if (about.get("model"), about.get("revision")) != (name_of_model(cell.model), cell.revision):
        return None
    if cell.purpose == "choice" and str(old.get("error")).startswith(DIVERGED):
        return old
    return old if old.get("status") == "finished" and isinstance(old.get("result"), dict) else None


def _digest(record: dict[str, Any], split: str) -> object:
    try:
        return record["data"][split]["sha256"]
    except (KeyError, TypeError):  # damaged
        return None


def as_begun(cells: Cells, out: Path) -> Cells:
    """Return the cells in the folders that ``grid.json`` has for them.

    A setting that is varied later gives new cells other folders, but none to those that are there;
    one that changes no result gives all others, because there nothing tells them apart.

    Raises
    ------
    ConfigError
        If the file cannot be read, or two cells would lie in one folder.
    """
    known = {entry["key"]: entry["folder"] for entry in _read(out / GRID)}
    placed = tuple(
        dataclasses.replace(cell, folder=known.get(cell.key, cell.folder)) for cell in cells.cells
    )
    if len({cell.folder for cell in placed}) < len(placed):
        raise ConfigError(
            f"two cells would lie in one folder of {out}, which holds a grid with other settings; "
            "give another folder (--out)"
        )
    return dataclasses.replace(cells, cells=placed)


def begin(cells: Cells, out: Path) -> None:
    """Write ``grid.json``, with what is in it already.

    Parameters
    ----------
    cells : Cells
        As :func:`as_begun` returns them.
    out : Path
        The grid's folder, which is created.

    Raises
    ------
    ConfigError
        If it cannot be read or written, or another command has begun the cells elsewhere since.
    """
    out.mkdir(parents=True, exist_ok=True)
    guard = Lock(out / f"{GRID}.lock")
    guard.acquire(wait=True)
    try:
        if as_begun(cells, out) != cells:
            raise ConfigError(f"another command has begun a grid in {out}; repeat this one")
        now = {cell.folder: cell for cell in cells.cells}
        entries: dict[str, dict[str, Any]] = {}
        for entry in _read(out / GRID):
            cell = now.get(entry["folder"])
            # What is trained there is known by the name that its model had before, too.
            if cell is None or (out / entry["folder"] / RUN).exists():
                entries[entry["key"]] = entry
            if cell is not None:
                entries[cell.key] = _entry(cell)
        entries |= {cell.key: _entry(cell) for cell in cells.cells}
        content = {"name": cells.name, "cells": list(entries.values())}
        with replacing(out / GRID, ConfigError) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    finally:
        guard.release()


def require_begun(cell: Cell, key: str, out: Path) -> None:
    """Refuse a folder whose ``grid.json`` lacks a cell, as seen from where it is to be trained.

    Parameters
    ----------
    cell : Cell
        The cell.
    key : str
        Its key where the grid was begun; the names of models may be others here.
    out : Path
        The grid's folder.

    Raises
    ------
    ConfigError
        If the cell is not in it.
    """
    if not any(each["key"] == key and each["folder"] == cell.folder for each in _read(out / GRID)):
        raise ConfigError(
            f"{out / GRID} of this grid is not seen here; the folder (--out) must be one that all "
            "machines share, at the same path"
        )


def _entry(cell: Cell) -> dict[str, Any]:
    names = ("folder", "purpose", "task", "method", "seed", "model", "revision", "init_seed")
    entry = {name: getattr(cell, name) for name in names}
    chosen = {} if cell.choice is None else {"learning_rate": "chosen"}
    return {**entry, "training": {**cell.training, **chosen}, "key": cell.key}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = read_json(path)["cells"]
        if not all(isinstance(e["key"], str) and isinstance(e["folder"], str) for e in entries):
            raise TypeError("a cell has no folder")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error!r:.200}). Give another folder (--out), or remove it: "
            "runs are then looked for where this grid alone would have them, and what is elsewhere "
            "is trained again"
        ) from None
    return list(entries)


def part_of(cells: Cells, part: int, parts: int, steps: Mapping[int, int]) -> list[int]:
    """Return the numbers of the cells in one of several parts, which together are all.

    A reported cell is in the same part as all that choose its learning rate. The parts have about
    the same number of steps.

    Parameters
    ----------
    cells : Cells
        All cells.
    part, parts : int
        Which part, from 1, and how many there are.
    steps : mapping of int to int
        The steps of each cell.
    """
    unit = list(range(len(cells.cells)))  # another cell of those that stay together, or itself

    def first(number: int) -> int:
        while unit[number] != number:
            number = unit[number]
        return number

    for number, cell in enumerate(cells.cells):
        if cell.choice is not None:
            for tried in cells.choices[cell.choice].cells.values():
                for each in tried:
                    one, other = sorted((first(number), first(each)))
                    unit[other] = one
    together: dict[int, list[int]] = {}
    for number in range(len(unit)):
        together.setdefault(first(number), []).append(number)
    load, found = [0] * parts, list[int]()
    for members in sorted(together.values(), key=lambda each: (-_sum(each, steps), each)):
        least = min(range(parts), key=lambda k: (load[k], k))
        load[least] += _sum(members, steps)
        if least == part - 1:
            found += members
    return sorted(found)


def _sum(members: list[int], steps: Mapping[int, int]) -> int:
    return sum(steps[each] for each in members)


def steps_of(cell: Cell, rows: int) -> int:
    """Return the steps of a cell with so many rows to train on."""
    return int(math.ceil(rows / cell.settings["batch_size"]) * cell.settings["epochs"])
