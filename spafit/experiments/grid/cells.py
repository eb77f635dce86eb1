"""The cells of a grid: one run each, with its plan, its settings and its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError, SpafitError, one_line
from spafit.experiments.grid.file import PLAN_SETTINGS, TRAIN_SETTINGS, Block, Grid
from spafit.experiments.grid.speeds import Kind, kind_of
from spafit.methods import ALPHA, R
from spafit.methods import plan as make_plan
from spafit.plans import Plan
from spafit.runs.identity import IDLE
from spafit.runs.record import name_of_model
from spafit.runs.train_config import TrainConfig
from spafit.strata import adapt
from spafit.tasks.table import get_task
from spafit.tasks.task import Dataset
from spafit.training.settings import complete

_SEEDS = ("seed", "order_seed", "dropout_seed", "init_seed")

_PLAN_DEFAULTS = dict(zip(PLAN_SETTINGS, (R, ALPHA, 0.0, "delta", "table-2"), strict=True))

_CHOSEN = "chosen"


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes
    ----------
    purpose : {"report", "choice"}
        Whether it is reported, or chooses a learning rate.
    task, model, revision, seed, init_seed
        As the grid file has them; ``init_seed`` is ``seed`` if it is not given.
    method : str
        The plan's name.
    plan : str
        The plan, in JSON.
    training : dict
        The settings of :class:`~spafit.training.settings.TrainConfig` that are given.
    settings : dict
        All of them, completed for model, task and device.
    varied : dict
        What the grid varies besides task, method and seed.
    folder : str
        Where the run lies, from the grid's folder on.
    trainable : int
        The numbers that train.
    frozen : int
        The layers below the first one that trains.
    choice : int or None
        The number of the choice that gives a reported cell its learning rate.
    """

    purpose: str
    task: str
    model: str
    revision: str | None
    seed: int
    init_seed: int
    method: str
    plan: str
    training: dict[str, Any]
    settings: dict[str, Any]
    varied: dict[str, Any]
    folder: str
    trainable: int
    frozen: int
    choice: int | None = None

    @property
    def title(self) -> str:
        """What the cell is called on the screen."""
        more = [f"{name} {shown(value)}" for name, value in self.varied.items()]
        words = ", ".join([self.task, self.method, *more, f"seed {self.seed}"])
        return one_line(words if self.purpose == "report" else f"choice: {words}")

    @property
    def key(self) -> str:
        """What makes the cell this one, wherever it lies.

        A setting that changes no result counts only where the grid varies it.
        """
        plan = {**json.loads(self.plan), "name": ""}
        settings = {
            name: value
            for name, value in self.settings.items()
            if name not in IDLE or name in self.varied
        }
        entries = [self.purpose, self.task, self.model, self.revision, plan, self.seed]
        entries += [self.init_seed, settings, self.choice is not None]
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()

    @property
    def prefix(self) -> tuple[object, ...] | None:
        """What decides which hidden states its run keeps on the disk; None if it keeps none."""
        if self.settings["cache_prefix"] != "disk":
            return None
        names = ("max_length", "precision", "frozen_weights", "cache_dtype", "device")
        place = (self.model, self.revision, self.task, self.frozen)
        return *place, *(self.settings[name] for name in names)

    @property
    def kind(self) -> Kind:
        """What its time depends on."""
        plan = json.loads(self.plan)
        return kind_of(self.task, name_of_model(self.model), plan, self.settings)

    def config(self, learning_rate: float | None, out: Path | None) -> TrainConfig:
        """Return the settings of its run; the learning rate is given if it was chosen."""
        given = dict(self.training)
        if self.choice is not None:
            given["learning_rate"] = learning_rate
        given["recompute"] = tuple(given.get("recompute", ()))
        return TrainConfig(out=out, seed=self.seed, quiet=True, **given)


@dataclass(frozen=True)
class Choice:
    """What chooses a learning rate: for each rate, the numbers of the cells that it is tried in."""

    title: str
    cells: dict[float, tuple[int, ...]]


@dataclass(frozen=True)
class Cells:
    """All cells of a grid in the order in which they are run, and its choices."""

    name: str
    cells: tuple[Cell, ...]
    choices: tuple[Choice, ...]


class Shadows:
    """Adapted models without weights, which count what trains, and complete settings.

    Parameters
    ----------
    config_of : callable
        Returns the sizes of a model by its name and revision.
    """

    def __init__(self, config_of: Callable[[str, str | None], BertConfig]) -> None:
        self._config_of = config_of
        self._configs: dict[tuple[str, str | None], BertConfig] = {}
        self._models: dict[tuple[Any, ...], tuple[BertForSequenceClassification, int]] = {}

    def config(self, model: str, revision: str | None) -> BertConfig:
        """Return the sizes of a model."""
        if (model, revision) not in self._configs:
            self._configs[model, revision] = self._config_of(model, revision)
        return self._configs[model, revision]

    def adapted(
        self, model: str, revision: str | None, plan: Plan, num_labels: int
    ) -> tuple[BertForSequenceClassification, int]:
        """Return an adapted model on the meta device, and how many numbers train with C labels.

        The model has one label, and is the same for every C: its head always trains, and no more of
        it depends on C.
        """
        key = (model, revision, plan.to_json())
        if key not in self._models:
            with torch.device("meta"):
                shadow = BertForSequenceClassification(self.config(model, revision), 1)
            self._models[key] = (shadow, adapt(shadow, plan).trainable)
        shadow, trainable = self._models[key]
        return shadow, trainable + (num_labels - 1) * (shadow.config.hidden_size + 1)


def expand(grid: Grid, shadows: Shadows, data: Mapping[str, Dataset]) -> Cells:
    """Make the cells of a grid, and refuse what no run could be.

    Those that choose a learning rate come first; then those with the same base, task and number of
    frozen layers together.

    Parameters
    ----------
    grid : Grid
        The grid.
    shadows : Shadows
        The models.
    data : mapping of str to Dataset
        The training data of each task; without examples where they are not at hand.

    Raises
    ------
    ConfigError
        If a plan does not fit its model, a setting does not fit its task, or two cells are the
        same; the message names the block.
    """
    found: dict[str, Cell] = {}
    places: dict[str, str] = {}
    choices: dict[str, dict[float, list[str]]] = {}
    for block in grid.blocks:
        for cell, group in _cells_of(block, grid.folder, shadows, data):
            if group:
                rates = choices.setdefault(group, {})
                if cell.purpose == "report":
                    cell = dataclasses.replace(cell, choice=list(choices).index(group))
                else:
                    tried = rates.setdefault(cell.settings["learning_rate"], [])
                    tried += [cell.key] * (cell.key not in tried)  # once for all tasks
            key = cell.key
            if key in found and cell.purpose == "report":
                raise ConfigError(
                    f"{block.place}: {one_line(f'{cell.task}, {cell.method}', 120)}, seed "
                    f"{cell.seed} is a cell of {places[key]} already. Name a plan once: by one of "
                    "its names, or one of the files that hold it. A setting that does nothing to a "
                    "method, as r to BitFit, does not tell its cells apart: give such a method a "
                    "block without it"
                )
            found.setdefault(key, cell)  # two blocks may choose by the same runs
            places[key] = block.place
    bases = list(dict.fromkeys((cell.model, cell.revision) for cell in found.values()))
    tasks = list(dict.fromkeys(cell.task for cell in found.values()))

    def rank(cell: Cell) -> tuple[object, ...]:
        place = bases.index((cell.model, cell.revision)), tasks.index(cell.task)
        return cell.purpose == "report", *place, cell.frozen

    keys = sorted(found, key=lambda key: rank(found[key]))
    numbers = {key: number for number, key in enumerate(keys)}
    return Cells(
        grid.name,
        tuple(_placed([found[key] for key in keys])),
        tuple(
            Choice(title, {rate: tuple(numbers[key] for key in its) for rate, its in rates.items()})
            for title, rates in zip(_titles(choices), choices.values(), strict=True)
        ),
    )


def _titles(groups: Iterable[str]) -> Iterator[str]:
    """Yield what each choice is called: its method, with the settings that other choices vary."""
    alike: dict[str, list[dict[str, Any]]] = {}
    every = [json.loads(group)[1:] for group in groups]
    for method, others in every:
        alike.setdefault(method, []).append(others)
    for method, others in every:
        varied = [
            f"{name} {shown(value)}"
            for name, value in others.items()
            if any(each.get(name) != value for each in alike[method])
        ]
        yield ", ".join([method, *varied])


def _cells_of(
    block: Block, folder: Path, shadows: Shadows, data: Mapping[str, Dataset]
) -> Iterator[tuple[Cell, str]]:
    """Yield the cells of a block, each with what chooses its learning rate, if anything does."""
    varying = [name for name in block.settings if name not in _SEEDS]
    seeding = [name for name in _SEEDS if name in block.settings]
    for values in itertools.product(*(block.settings[name] for name in varying)):
        given = dict(zip(varying, values, strict=True))
        try:
            make = _maker(given, folder, shadows, data)
            group = ""
            if block.rates:
                others = {name: given[name] for name in varying if name not in ("task", "method")}
                name = make({"seed": 0}).method
                group = json.dumps([block.place, name, others], sort_keys=True)
            tasks = block.tried.get("task", (given["task"],))
            fewer = {name: values[0] for name, values in block.tried.items() if name != "task"}
            for task in tasks if block.rates else ():
                try_rate = _maker({**given, **fewer, "task": task}, folder, shadows, data)
                for rate, seed in itertools.product(block.rates, block.seeds):
                    yield try_rate({"seed": seed}, rate), group
            for seeds in itertools.product(*(block.settings[name] for name in seeding)):
                yield make(dict(zip(seeding, seeds, strict=True))), group
        except SpafitError as error:
            raise ConfigError(f"{block.place}: {one_line(str(error), 500)}") from None


def _maker(
    given: dict[str, Any], folder: Path, shadows: Shadows, data: Mapping[str, Dataset]
) -> Callable[..., Cell]:
    """Return a function that makes a cell of some settings with its seeds, and a rate to try."""
    task, model, revision = get_task(given["task"]), given["model"], given.get("revision")
    method = given["method"]
    options = {name: given[name] for name in PLAN_SETTINGS if name in given}
    plan = make_plan(
        folder / method if method.lower().endswith(".json") else method,
        shadows.config(model, revision).num_hidden_layers,
        **options,
    )
    task.with_metric(given.get("metric"))  # refuses one that does not fit
    shadow, trainable = shadows.adapted(model, revision, plan, task.num_labels)
    frozen, longest = shadow.bert.frozen_depth, shadow.config.max_position_embeddings
    if (given.get("max_length") or 0) > longest:
        raise ConfigError(
            f"max_length = {given['max_length']} exceeds the {longest} positions of {model}"
        )

    def make(seeds: dict[str, Any], rate: float | None = None) -> Cell:
        training = {name: given[name] for name in TRAIN_SETTINGS if name in given}
        training |= {name: seeds[name] for name in ("order_seed", "dropout_seed") if name in seeds}
        if rate is not None:
            training["learning_rate"] = rate
        seed, initial = seeds["seed"], seeds.get("init_seed")
        defaults = {name: getattr(TrainConfig, name) for name in TRAIN_SETTINGS}
        asked = {
            "model": model,
            "revision": revision,
            **{name: options.get(name) or default for name, default in _PLAN_DEFAULTS.items()},
            **(defaults | training),
            "init_seed": initial,
        }
        training.setdefault("cache_prefix", "auto-disk")  # there the cells share what is kept
        settings = complete(TrainConfig(seed=seed, **training), shadow, data[task.name])
        return Cell(
            purpose="report" if rate is None else "choice",
            task=task.name,
            model=model,
            revision=revision,
            seed=seed,
            init_seed=seed if initial is None else initial,
            method=plan.name,
            plan=plan.to_json(),
            training=training,
            settings=dataclasses.asdict(settings),
            varied=asked,
            folder="",
            trainable=trainable,
            frozen=frozen,
        )

    return make


def _placed(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Give cells their folders, named by what varies among those of a task and method."""
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        alike.setdefault((cell.purpose, cell.task, cell.method), []).append(cell)
    varying = {of: _varying([_asked(cell) for cell in group]) for of, group in alike.items()}
    taken: dict[str, Cell] = {}
    for cell in cells:
        names = varying[cell.purpose, cell.task, cell.method]
        if cell.purpose == "choice":
            names = names | {"learning_rate"}
        varied = {name: value for name, value in _asked(cell).items() if name in names}
        parts = ["choice"] if cell.purpose == "choice" else []
        parts += [_slug(cell.task), _slug(cell.method)]
        parts += [f"{name}-{_slug(value)}" for name, value in varied.items()]
        folder = "/".join([*parts, f"seed-{cell.seed}"])
        if other := taken.get(folder):
            differing = [name for name, value in varied.items() if _asked(other)[name] != value]
            raise ConfigError(
                f"two cells would lie in {folder}, of which one is {cell.task}, {cell.method}, "
                f"seed {cell.seed}; give each {' and '.join(differing) or 'plan file'} a name with "
                "other letters or digits"
            )
        taken[folder] = cell
        for name in ("order_seed", "dropout_seed"):
            if name in varied:
                varied[name] = cell.settings[name]
        if "init_seed" in varied:
            varied["init_seed"] = cell.init_seed
        if varied.get("learning_rate") == _CHOSEN:
            del varied["learning_rate"]
        yield dataclasses.replace(cell, varied=varied, folder=folder)


def _varying(asked: Sequence[dict[str, Any]]) -> set[str]:
    """Return the settings that are not the same in all of them."""
    return {name for name, value in asked[0].items() if any(each[name] != value for each in asked)}


def _asked(cell: Cell) -> dict[str, Any]:
    """Return what a cell that has no folder yet was asked for, besides task, method and seed."""
    return cell.varied if cell.choice is None else {**cell.varied, "learning_rate": _CHOSEN}


def _slug(value: object) -> str:
    """Return a value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.%+]+", "-", shown(value)).strip("-.") or "none"


def shown(value: object) -> str:
    """Return a value of a setting for a reader: 128.0 as 128; no two numbers look the same."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
