"""What a grid would do: its cells, what trains in them, their steps, and the time they take.

The time of a cell is that of finished runs like it on this machine, if there are any; else a few of
its steps are measured, with the lengths of the task, and the rows of the whole task counted.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from spafit.bert import BertForSequenceClassification, lay_side_by_side
from spafit.config import BertConfig
from spafit.errors import one_line
from spafit.experiments.grid.cells import Cell, Cells, shown
from spafit.experiments.grid.display import clock
from spafit.experiments.grid.places import steps_of
from spafit.experiments.grid.speeds import SLOWING, Speeds
from spafit.plans import Plan
from spafit.strata import adapt
from spafit.tasks.table import get_task
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Tokenizer, load_tokenizer
from spafit.training.fit import fit
from spafit.training.inference import encode
from spafit.weights.pretrained import load_pretrained

_MEASURED_S = 3.0  # of training steps of each method, about
_SAMPLE = 256  # rows whose lengths are counted
_ROW = "    {:<9}{:>6}{:>6}{:>20}{:>12}{:>12}"
_SEEDS = ("order_seed", "dropout_seed", "init_seed")


@dataclasses.dataclass(frozen=True)
class _Speed:
    """Seconds a token of a method: in training, and in an evaluation."""

    training: float
    evaluation: float


class Measured:
    """Speeds measured now, each once.

    Parameters
    ----------
    folder_of : callable
        Returns the folder of a model's weights and tokenizer by name and revision; None if they are
        not at hand.
    config_of : callable
        Returns its sizes.
    data : mapping of str to Dataset
        The training data of each task; without examples where they are not at hand.
    """

    def __init__(
        self,
        folder_of: Callable[[str, str | None], Path | None],
        config_of: Callable[[str, str | None], BertConfig],
        data: Mapping[str, Dataset],
    ) -> None:
        self._folder_of, self._config_of, self._data = folder_of, config_of, data
        self._speeds: dict[tuple[Any, ...], _Speed] = {}
        self._tokens: dict[tuple[Any, ...], float] = {}
        self._drawn: tuple[tuple[str, str | None], dict[str, torch.Tensor]] | None = None
        self.notes: dict[str, None] = {}

    def seconds(self, cell: Cell, rows: int) -> float | None:
        """Return how long a cell takes; None if there are no data to measure with."""
        if not len(self._data[cell.task]):
            return None
        if cell.settings["cache_prefix"] != "off":
            self.notes[
                "where the hidden states after group 1 are kept, it takes less than that"
            ] = None
        tokens, speed = self._tokens_of(cell), self._speed_of(cell)
        task = get_task(cell.task)
        assert task.dev is not None
        steps = steps_of(cell, rows)
        every = cell.settings["eval_every"]
        evaluations = cell.settings["epochs"] if every is None else -(-steps // every)
        trained = rows * cell.settings["epochs"] * speed.training
        return float(tokens * (trained + evaluations * task.dev.rows * speed.evaluation))

    def _tokenizer(self, cell: Cell) -> Tokenizer:
        folder = self._folder_of(cell.model, cell.revision)
        if folder is not None:
            return load_tokenizer(folder)
        self.notes[
            f"{cell.model} is not at hand: its times are of random weights of its shape, and of "
            "words in place of its tokens, which are a little more"
        ] = None
        with tempfile.TemporaryDirectory() as place:
            words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
            Path(place, "vocab.txt").write_text(words, encoding="utf-8")
            return load_tokenizer(place, lowercase=False)

    def _tokens_of(self, cell: Cell) -> float:
        """Return the mean length of the examples of a cell's task."""
        key = (cell.model, cell.revision, cell.task, cell.settings["max_length"])
        if key not in self._tokens:
            sample = self._data[cell.task].from_all_over(_SAMPLE)
            lengths = (
                self._tokenizer(cell)
                .encode(sample.texts_a, sample.texts_b, max_length=cell.settings["max_length"])
                .lengths
            )
            self._tokens[key] = sum(lengths) / len(lengths)
        return self._tokens[key]

    def _speed_of(self, cell: Cell) -> _Speed:
        settings = [str(cell.settings[name]) for name in SLOWING]
        key = (cell.model, cell.revision, cell.plan, *settings)
        if key not in self._speeds:
            print(f"measuring {one_line(cell.method)} ...", file=sys.stderr, flush=True)
            self._speeds[key] = self._measure(cell)
        return self._speeds[key]

    def _measure(self, cell: Cell) -> _Speed:
        data, tokenizer = self._data[cell.task], self._tokenizer(cell)
        model = self._model(cell, data.task.num_labels)
        adapt(model, Plan.from_json(cell.plan))
        batch = int(cell.settings["batch_size"])
        config = dataclasses.replace(
            cell.config(cell.settings["learning_rate"], None),
            epochs=1,
            eval_every=None,
            cache_prefix="off",
        )
        warm = fit(model, tokenizer, data.from_all_over(2), data[:1], config)
        batches = int(max(1, min(8, _MEASURED_S * warm.examples_per_s / batch)))
        sample, dev = data.from_all_over(batches * batch), data.from_all_over(batch)
        result = fit(model, tokenizer, sample, dev, config)
        lengths = [
            sum(encode(model, tokenizer, each, config.max_length).lengths) for each in (sample, dev)
        ]
        training_s = len(sample) / result.examples_per_s
        evaluation_s = max(0.0, result.seconds - training_s)
        return _Speed(training_s / lengths[0], evaluation_s / lengths[1])

    def _model(self, cell: Cell, num_labels: int) -> BertForSequenceClassification:
        """Return the cell's model, or one of its shape with random weights."""
        folder = self._folder_of(cell.model, cell.revision)
        if folder is not None:
            return load_pretrained(folder, num_labels=num_labels)
        base = (cell.model, cell.revision)
        config = self._config_of(*base)
        with torch.device("meta"):
            model = BertForSequenceClassification(config, num_labels)
        if self._drawn is None or self._drawn[0] != base:
            draw = torch.Generator().manual_seed(0)
            self._drawn = (base, {})
            for name, shadow in model.bert.state_dict().items():
                values = torch.empty(shadow.shape).normal_(std=0.02, generator=draw)
                self._drawn[1][f"bert.{name}"] = values
        head = {
            f"classifier.{name}": torch.zeros(shadow.shape)
            for name, shadow in model.classifier.state_dict().items()
        }
        model.load_state_dict({**self._drawn[1], **head}, strict=True, assign=True)
        lay_side_by_side(model)
        return model


def _grouped(cells: Cells, numbers: list[int]) -> dict[tuple[str, str, str], dict[str, list[int]]]:
    """Return the cells of each method and task that differ in nothing but their seeds.

    The key is the model, the method, and what they are called; those that choose a learning rate
    are together, too.
    """
    groups: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for number in numbers:
        cell = cells.cells[number]
        hidden = (*_SEEDS, "learning_rate") if cell.purpose == "choice" else _SEEDS
        varied = [(name, value) for name, value in cell.varied.items() if name not in hidden]
        words = [cell.method, *(f"{name} {shown(value)}" for name, value in varied)]
        if cell.purpose == "choice":
            words = ["to choose the learning rate of " + words[0], *words[1:]]
        elif cell.choice is not None:
            words.append("learning rate chosen")
        key = (cell.model, cell.method, ", ".join(words))
        groups.setdefault(key, {}).setdefault(cell.task, []).append(number)
    return groups


def dry_run(
    cells: Cells,
    numbers: list[int],
    done: set[int],
    rows: Mapping[str, int],
    speeds: Speeds,
    measured: Measured,
    workers: int,
) -> str:
    """Return the text that says what a grid would do.

    Parameters
    ----------
    cells : Cells
        The grid.
    numbers : list of int
        The cells that would be run.
    done : set of int
        Those of them that are finished.
    rows : mapping of str to int
        The rows to train on of each task.
    speeds : Speeds
        Of the runs that are finished.
    measured : Measured
        Measures the others.
    workers : int
        How many processes would share the work.
    """
    unknown: dict[str, None] = {}
    total_steps, total_s, lacking = 0, 0.0, 0
    lines = [_ROW.format("", "runs", "done", "numbers that train", "steps", "time")]
    for (*_, words_said), tasks in _grouped(cells, numbers).items():
        sizes = {cells.cells[each[0]].trainable for each in tasks.values()}
        most = "at most " if len(sizes) > 1 else ""
        lines.append(f"{one_line(words_said)}: {most}{max(sizes):,} numbers train")
        for task, members in tasks.items():
            cell = cells.cells[members[0]]
            steps = sum(steps_of(cells.cells[each], rows[task]) for each in members)
            left = [each for each in members if each not in done]
            seconds: float | None = 0.0
            if left:
                examples = float(rows[task] * cell.settings["epochs"])
                each_s = speeds.seconds(cell.kind, examples, near=False)
                if each_s is None:
                    each_s = measured.seconds(cell, rows[task])
                seconds = None if each_s is None else each_s * len(left)
            total_steps += steps
            if seconds is None:
                lacking += len(left)
                unknown[task] = None
            else:
                total_s += seconds
            time = "?" if seconds is None else clock(seconds)
            counts = len(members), len(members) - len(left), f"{cell.trainable:,}", f"{steps:,}"
            lines.append(_ROW.format(task, *counts, time))
    lacking_said = f"{lacking:,} run{'s' * (lacking != 1)}"
    of = f" of {workers} workers, each as fast as one alone" if workers > 1 else ""
    share = clock(total_s / workers)
    lines += [
        "",
        f"{one_line(cells.name)}: {len(numbers):,} runs, {len(done):,} of them done, "
        f"{total_steps:,} steps; {share} to go{of}"
        + (f", without {lacking_said} whose time is not known" if lacking else ""),
    ]
    if unknown:
        tasks_said = " ".join(unknown)
        lines.append(
            f"no data of {', '.join(unknown)}: the rows are those of GLUE's table, and the time "
            f"cannot be estimated; spafit download glue {tasks_said}, or --data"
        )
    return "\n".join([*lines, *measured.notes])
