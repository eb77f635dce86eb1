"""The training runs of a search: each is a run folder, which is resumed, or taken as it is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.bert import BertForSequenceClassification
from spafit.errors import DivergedError, StoppedError
from spafit.experiments.grid.places import DIVERGED
from spafit.experiments.search.candidates import Candidate
from spafit.methods import plan as make_plan
from spafit.runs.record import RUN, read_run
from spafit.runs.stopping import StopRequests
from spafit.strata import adapt
from spafit.tasks.task import Dataset, Task
from spafit.text.tokenization import Tokenizer
from spafit.training.fit import fit
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained

_MEASURED_BATCHES = 8


@dataclass(frozen=True)
class Base:
    """What all runs of a search start from.

    Attributes
    ----------
    model, revision, mapped
        As for :func:`spafit.load_pretrained`.
    tokenizer : Tokenizer
        The model's.
    r, alpha : int, float or None
        LoRA's; None is the default of :func:`spafit.plan`.
    config : TrainConfig
        The settings of a full run.
    """

    model: str
    revision: str | None
    mapped: bool | None
    tokenizer: Tokenizer
    r: int | None
    alpha: float | None
    config: TrainConfig

    def adapted(self, method: str, num_labels: int, seed: int) -> BertForSequenceClassification:
        """Load the model and adapt it by a method with LoRA; the seed draws what is new."""
        model = load_pretrained(
            self.model,
            num_labels=num_labels,
            revision=self.revision,
            seed=seed,
            mapped=self.mapped,
        )
        plan = make_plan(method, model.config.num_hidden_layers, r=self.r, alpha=self.alpha)
        adapt(model, plan, seed=seed)
        return model

    def batch_size(self, task: Task) -> int:
        """Return the examples per step."""
        return self.config.batch_size or task.paper_batch_size

    def steps(self, task: Task, rows: int, epochs: int) -> int:
        """Return the steps of a run on so many rows."""
        return math.ceil(rows / self.batch_size(task)) * epochs


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    purpose : {"selection", "report"}
        Whether it was scored on rows held out of train, or on dev.
    candidate : Candidate
        Its plan.
    seed, rows, epochs, steps : int
        Its seed, the rows that it was trained on, the passes over them, and its steps.
    metrics : dict of str to float, or None
        What it scored after its last step; None if it diverged.
    """

    purpose: str
    candidate: Candidate
    seed: int
    rows: int
    epochs: int
    steps: int
    metrics: dict[str, float] | None

    @property
    def score(self) -> float | None:
        """The first metric; None if it diverged."""
        return None if self.metrics is None else next(iter(self.metrics.values()))


class Trainer:
    """Trains plans, each once, and scores them once, after the last step.

    Parameters
    ----------
    base : Base
        What they start from.
    out : Path
        The folder of the search.
    about : dict
        What the record of a run says of model and data.
    say : callable of str
        Called with a line for each run.

    Attributes
    ----------
    runs : dict of str to Run
        The runs by their folders, in the order in which they were asked for.
    stop : StopRequests
        Within its block a signal that comes between two runs has the next one not begun.
    """

    def __init__(
        self, base: Base, out: Path, about: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.base, self.out, self.about, self._say = base, out, about, say
        self.stop = StopRequests()
        self.runs: dict[str, Run] = {}
        self._cuts = False  # whether it has been said that texts are truncated

    def train(
        self,
        purpose: str,
        candidate: Candidate,
        train: Dataset,
        scored: Dataset,
        *,
        seed: int,
        epochs: int,
    ) -> Run:
        """Train a plan, if that has not been done, and score it.

        Of one ``purpose``, the rows to train on are told by their number.
        """
        part = f"{epochs}x{len(train)}-rows/" if purpose == "selection" else ""
        folder = f"{purpose}/{part}{candidate.name}/seed-{seed}"
        if folder not in self.runs:
            if self.stop.received is not None:  # between two runs; in a run fit takes it
                raise StoppedError(
                    f"stopped by {self.stop.received.name}; the same command resumes the search",
                    self.stop.received,
                )
            steps = self.base.steps(train.task, len(train), epochs)
            config = dataclasses.replace(
                self.base.config,
                out=self.out / folder,
                seed=seed,
                epochs=epochs,
                eval_every=steps,
                quiet=True,
            )
            start = time.monotonic()
            metrics = self._metrics(purpose, candidate, train, scored, config)
            self.runs[folder] = Run(purpose, candidate, seed, len(train), epochs, steps, metrics)
            score = self.runs[folder].score
            shown = "diverged" if score is None else f"{score:.4f}"
            on = "dev" if purpose == "report" else "held-out rows"
            self._say(
                f"{candidate.name}, seed {seed}, {steps:,} steps: {shown} on {on} "
                f"({time.monotonic() - start:.0f} s)"
            )
        return self.runs[folder]

    def _metrics(
        self,
        purpose: str,
        candidate: Candidate,
        train: Dataset,
        scored: Dataset,
        config: TrainConfig,
    ) -> dict[str, float] | None:
        assert config.out is not None
        path = Path(config.out) / RUN
        if path.exists():
            record = read_run(path)
            if record.get("status") == "finished":
                return dict(record["result"]["metrics"])
            if str(record.get("error")).startswith(DIVERGED):
                return None
        model = self.base.adapted(candidate.name, train.task.num_labels, config.seed)
        about = {
            **self.about,
            "cell": {"grid": "search", "purpose": purpose, "settings": {}},
        }
        try:
            result = fit(model, self.base.tokenizer, train, scored, config, about=about)
        except DivergedError:
            return None
        if (cut := sum(result.truncated.values())) and not self._cuts:
            self._cuts = True
            of = len(train) + len(scored)
            self._say(
                f"{cut:,} of {of:,} examples are truncated: they have more tokens than "
                "--max-length or the model allows"
            )
        return result.metrics

    def measure(self, candidate: Candidate, train: Dataset, epochs: int) -> float:
        """Return the seconds that a plan takes to train, by a few steps, without a kept prefix."""
        batch = self.base.batch_size(train.task)
        config = dataclasses.replace(
            self.base.config, out=None, epochs=1, eval_every=None, cache_prefix="off", quiet=True
        )
        model = self.base.adapted(candidate.name, train.task.num_labels, 0)
        fit(model, self.base.tokenizer, train[:batch], train[:1], config)  # to warm up
        sample = train.from_all_over(min(len(train), _MEASURED_BATCHES * batch))
        result = fit(model, self.base.tokenizer, sample, train[:1], config)
        return len(train) * epochs / result.examples_per_s
