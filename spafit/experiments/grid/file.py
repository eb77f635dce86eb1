"""Grid files: the settings of many runs, in JSON.

Every setting is a value or a list, and a list means each of its values. The settings beside
``cells`` are the defaults of all blocks in it, and a block's own come first::

    {"name": "minilm", "model": "minilm", "task": ["rte", "mrpc"], "seed": [0, 1, 2], "epochs": 10,
     "choose": {"learning_rate": [6e-5, 2e-4], "seed": 100},
     "cells": [
       {"method": ["SPAFIT-1-3-II", "lora-ii"], "batch_size": 16},
       {"method": "full", "choose": {"learning_rate": [2e-5, 6e-5]}}
     ]}

Settings are those of :class:`spafit.TrainConfig` and of :func:`spafit.plan` by name, with ``task``,
``method`` (a name, or a plan file beside the grid file), ``seed``, ``init_seed``, ``model`` and
``revision``. ``recompute`` takes a list of groups, and so a list of lists for several.

``choose`` has the learning rate chosen for each method of a block, with its other settings: that
with the best mean over the block's tasks of each task's first metric, in runs with seeds of their
own; of equal ones the smallest. It may name fewer tasks (``"task"``) or ``"epochs"`` for these runs
than the block has.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spafit.config import is_number, read_json
from spafit.errors import ConfigError, SpafitError, listed, one_line
from spafit.files.durable import is_plain_name
from spafit.plans import did_you_mean
from spafit.runs.train_config import TrainConfig
from spafit.tasks.table import get_task

PLAN_SETTINGS = ("r", "alpha", "lora_dropout", "bias", "numbering")
"""What :func:`spafit.plan` takes beside a method's name."""

TRAIN_SETTINGS = tuple(
    each.name
    for each in dataclasses.fields(TrainConfig)
    if each.name not in ("out", "seed", "overwrite", "quiet")
)
"""The settings of a run that a grid may have."""

SETTINGS = (
    *("task", "method", "model", "revision"),
    *(*PLAN_SETTINGS, *TRAIN_SETTINGS),
    *("init_seed", "seed"),
)
"""All settings, in the order in which they are varied: the last one first."""

DEFAULTS: dict[str, Any] = {"model": "google-bert/bert-large-cased", "seed": 0}

MOST_CELLS = 20_000
"""More in one block is a slip of the hand."""

_PACKAGED = Path(__file__).with_name("grids")


@dataclass(frozen=True)
class Block:
    """A block of a grid file.

    Attributes
    ----------
    place : str
        What it is called in messages.
    settings : dict of str to tuple
        Every setting that is given, with all its values.
    rates : tuple of float
        The learning rates to choose from; empty if it is not chosen.
    seeds : tuple of int
        The seeds of the runs that choose it.
    tried : dict of str to tuple
        What these runs have in place of the block's settings: ``task``, ``epochs`` or nothing.
    """

    place: str
    settings: dict[str, tuple[Any, ...]]
    rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    tried: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Any, ...]:
        """The tasks of its runs, of those that choose a learning rate too."""
        return tuple(dict.fromkeys((*self.settings["task"], *self.tried.get("task", ()))))


@dataclass(frozen=True)
class Grid:
    """A grid file: its name, its blocks, and the folder that its plan files are named from."""

    name: str
    blocks: tuple[Block, ...]
    folder: Path


def packaged() -> list[str]:
    """Return the names of the grids that come with the package."""
    return sorted(path.stem for path in _PACKAGED.glob("*.json"))


def read_grid(name: str | Path) -> Grid:
    """Read a grid file, or a grid that comes with the package.

    Parameters
    ----------
    name : str or Path
        The file; or one of :func:`packaged`, where there is no such file.

    Raises
    ------
    ConfigError
        If there is none, or it is not what a grid file can say; the message names the place, and
        for a misspelt name the nearest one.
    """
    path = Path(name)
    if not path.exists() and str(name) in packaged():
        path = _PACKAGED / f"{name}.json"
    try:
        entries = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no grid file {one_line(str(name))}{did_you_mean(name, packaged())}; those "
            f"that come with the package are {', '.join(packaged())}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the grid file {path} cannot be read: {error!s:.400}") from None
    source = path.name
    _refuse_unknown(source, entries, (*SETTINGS, "name", "choose", "cells"))
    title = entries.get("name", path.stem)
    if not is_plain_name(title) or not title.isprintable():  # it names a folder, too
        raise ConfigError(f"{source}: name must be a plain name, found {title!r:.80}")
    given = entries.get("cells")
    if not isinstance(given, list) or not given:
        raise ConfigError(f'{source}: "cells" must be a list of one block or more: {given!r:.80}')
    common = {key: value for key, value in entries.items() if key not in ("name", "cells")}
    _settings(source, common)
    blocks = []
    for number, block in enumerate(given, 1):
        place = f"{source}, block {number}"
        _refuse_unknown(place, block, (*SETTINGS, "choose"))
        _settings(place, block)
        inherited = dict(common)
        if "learning_rate" in block:  # what the block itself says of the rate comes first
            inherited.pop("choose", None)
        if "choose" in block:
            inherited.pop("learning_rate", None)
        blocks.append(_block(place, {**DEFAULTS, **inherited, **block}))
    seeds = {seed for block in blocks for seed in block.settings["seed"]}
    for block in blocks:
        both = sorted(seeds & set(block.seeds))
        if both:
            raise ConfigError(
                f"{block.place}: seed {both[0]} of choose is also a seed that is reported; give "
                "choose another"
            )
    return Grid(title, tuple(blocks), path.resolve().parent)


def _settings(place: str, given: dict[str, Any]) -> None:
    """Check the settings of one place, which are defaults or a block's own."""
    if "learning_rate" in given and given.get("choose") is not None:
        raise ConfigError(f"{place}: learning_rate is given, and choose chooses it; leave one out")
    for name, value in given.items():
        if name != "choose":
            for each in _values(place, name, value):
                _check(place, name, each)


def _block(place: str, given: dict[str, Any]) -> Block:
    choose = given.pop("choose", None)
    for name in ("task", "method"):
        if name not in given:
            raise ConfigError(f"{place}: it has no {name}; name one, or a list")
    settings = {name: _values(place, name, given[name]) for name in SETTINGS if name in given}
    rates, seeds = (), ()
    tried: dict[str, tuple[Any, ...]] = {}
    if choose is not None:
        within = f"{place}, choose"
        _refuse_unknown(within, choose, ("learning_rate", "seed", "task", "epochs"))
        for name in ("learning_rate", "seed"):
            if name not in choose:
                raise ConfigError(f"{within}: it has no {name}")
        for name, value in choose.items():
            values = _values(within, name, value)
            for each in values:
                if each is None and name != "task":
                    raise ConfigError(f"{within}: {name} must be a number")
                _check(within, name, each)
            if name in ("task", "epochs"):
                tried[name] = values
        if len(tried.get("epochs", ())) > 1:
            raise ConfigError(f"{within}: epochs must be one number")
        rates = tuple(sorted(_values(within, "learning_rate", choose["learning_rate"])))
        seeds = _values(within, "seed", choose["seed"])
    block = Block(place, settings, rates, seeds, tried)
    others = math.prod(len(each) for name, each in settings.items() if name != "task")
    count = others * (len(settings["task"]) + len(block.tasks) * len(rates) * len(seeds))
    if count > MOST_CELLS:
        raise ConfigError(f"{place}: it makes {count:,} cells; {MOST_CELLS:,} are accepted")
    return block


def _values(place: str, name: str, given: Any) -> tuple[Any, ...]:
    """Return all values of a setting; those of ``recompute`` are tuples."""
    several = given if isinstance(given, list) else [given]
    if not several:
        raise ConfigError(f"{place}: {name} is an empty list; leave it out, or name a value")
    if name == "recompute":
        is_one = not any(isinstance(each, list) for each in several)
        several = [several] if is_one else several
        several = [tuple(each) if isinstance(each, list) else each for each in several]
    counts = Counter(map(repr, several))
    twice = next((each for each, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"{place}: {name} has {twice:.80} twice")
    return tuple(several)


def _check(place: str, name: str, value: Any) -> None:
    """Refuse a value that no run can have."""
    try:
        if name == "task":
            get_task(value).split("train")
        elif name in ("method", "model") or (name == "revision" and value is not None):
            if not isinstance(value, str) or not value.strip() or not value.isprintable():
                raise ConfigError(f"{name} must be a name: {value!r:.80}")
        elif name in ("seed", "init_seed"):
            is_seed = type(value) is int and 0 <= value < 2**63
            if not is_seed and (value is not None or name == "seed"):
                raise ConfigError(f"{name} must be a whole number of at least 0: {value!r:.80}")
        elif name in ("r", "alpha", "lora_dropout"):
            if value is not None and not (type(value) is int if name == "r" else is_number(value)):
                what = "a whole number" if name == "r" else "a number"
                raise ConfigError(f"{name} must be {what}: {value!r:.80}")
        elif name in TRAIN_SETTINGS:
            # What a setting needs beside it is checked with the others.
            beside = {"cache_prefix": {"dropout_in_group_1": False}}
            TrainConfig(**{name: value, **beside.get(name, {})})
    except SpafitError as error:
        raise ConfigError(f"{place}: {one_line(str(error), 400)}") from None


def _refuse_unknown(place: str, entries: Any, known: Iterable[str]) -> None:
    if not isinstance(entries, dict):
        raise ConfigError(f"{place} must be a JSON object, found {entries!r:.80}")
    known = sorted(known)
    unknown = [name for name in entries if name not in known]
    if unknown:
        raise ConfigError(
            f"{place} has no setting {listed(unknown, ' or ')}{did_you_mean(unknown[0], known)}; "
            f"there are {', '.join(known)}"
        )
