"""The training loop: evaluate when it is due, save when it is due, take the next step.

It can start at any step. The state of a run is :class:`~spafit.training.state.TrainingState`, with
model, optimizer and random generators; the next step depends on nothing else, so a resumed run
continues as if it had not been interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from spafit.bert import BertForSequenceClassification
from spafit.errors import DivergedError, StoppedError, TrainingError
from spafit.machine import random_states
from spafit.machine.versions import peak_memory_mib
from spafit.runs.journal import Journal
from spafit.runs.stopping import StopRequests
from spafit.tasks import scoring
from spafit.tasks.metrics import is_better
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Encodings
from spafit.training.batches import Fed, Feed
from spafit.training.inference import AbandonedError, decode, predict_logits, probabilities_of
from spafit.training.make_step import Readings
from spafit.training.optimisation import learning_rate_factor
from spafit.training.phases import Phases
from spafit.training.processes.together import Together
from spafit.training.saving import Saver
from spafit.training.settings import TrainConfig
from spafit.training.state import TrainingState
from spafit.training.step import NoMemoryError, StepResult, TrainingStep

# fp16 skips a few steps at first, until its loss scale fits; so many in a row are a failure.
_MOST_SKIPS = 25


@dataclass(frozen=True)
class Scored:
    """The labelled examples that a run is evaluated on.

    Attributes
    ----------
    dataset : Dataset
        With labels.
    encodings : Encodings
        The tokenized examples.
    names : tuple of str
        Label names in the order of the logits; empty for a score.
    scale : tuple of (float, float)
        The scale of scores that the model is trained on.
    majority : dict of str to float
        The scores of always predicting the commonest class.
    """

    dataset: Dataset
    encodings: Encodings
    names: tuple[str, ...]
    scale: tuple[float, float]
    majority: dict[str, float]


class Loop:
    """Trains a run from its current state to its end.

    Parameters
    ----------
    config : TrainConfig
        Complete (:func:`spafit.training.settings.complete`).
    take_step : TrainingStep
        Takes a step of the optimizer; its model is trained.
    feed : Feed
        The training batches.
    dev : Scored
        The examples to evaluate on.
    phases : Phases
        What trains when, and the kept output of what does not.
    state : TrainingState
        The state of the run; it is kept up to date.
    journal : Journal
        Reports the progress of the run.
    saver : Saver or None
        Saves the run, if it has a folder.
    stop : StopRequests
        Whether a stop was requested.
    together : Together, optional
        What many processes do together that train the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        take_step: TrainingStep,
        feed: Feed,
        dev: Scored,
        phases: Phases,
        state: TrainingState,
        journal: Journal,
        saver: Saver | None,
        stop: StopRequests,
        together: Together | None = None,
    ) -> None:
        self.config, self.take_step, self.feed, self.dev = config, take_step, feed, dev
        self.phases = phases
        self.state, self.journal, self.saver, self.stop = state, journal, saver, stop
        self.together = together
        self.model = take_step.model
        self.eval_every = config.eval_every or feed.steps_an_epoch
        self.readings: Readings[tuple[int, int, int, float]] = Readings(feed.device)
        self._seconds_before = state.seconds
        self._start = self._since = time.perf_counter()

    def run(self) -> None:
        """Train to the end.

        Raises
        ------
        StoppedError
            If a stop was requested; everything is then saved.
        TrainingError
            If the run cannot continue.
        """
        state = self.state
        # An evaluation that is still due belongs to the phase of the step before it.
        self.phases.enter(state.step - self._evaluation_is_due())
        while True:
            self._into_training()
            with closing(self.feed.batches(state.step)) as batches:
                if self._run(batches):
                    break
            self.phases.enter(state.step)  # after their end, because batches are made ahead
        self._pause()

    def _run(self, batches: Iterator[Fed]) -> bool:
        """Train to the end of the phase; return whether it is that of the run."""
        state = self.state
        while True:
            if self._evaluation_is_due() and not self.stop():
                self._evaluate()
            # Read once, because a signal may come at any time: the run stops only after a save.
            is_stopping = self.stop()
            is_over = state.step == self.feed.total_steps or self._gives_up()
            is_last = is_over and not self._evaluation_is_due()
            if self.saver is not None and (is_stopping or is_last or self.saver.is_due(state)):
                self._pause()
                self.saver.save(state, last=is_last or is_stopping)
                self._into_training()
            if is_stopping:
                raise self._stopped()
            if is_last:
                return True
            if self.phases.is_over(state.step):
                return False
            self._take(next(batches))

    def _take(self, fed: Fed) -> None:
        """Take the next step, and read the results that are available."""
        state, step = self.state, self.state.step + 1
        assert self.config.learning_rate is not None
        # A skipped step advances neither the optimizer nor the learning-rate schedule.
        updates = state.updates_before(step, unknown=self.readings.behind)
        factor = learning_rate_factor(updates, self.feed.total_steps, self.config.warmup)
        learning_rate = self.config.learning_rate * factor
        result = self._fitting_in_memory(fed, learning_rate)
        self.readings.add((step, fed.epoch, len(fed.drawn), learning_rate), result)
        state.step = step
        self._read(wait=self._evaluation_is_due() or self.stop() or self._save_is_due())

    def _fitting_in_memory(self, fed: Fed, learning_rate: float) -> StepResult:
        """Take a step; if memory runs out, try again with half the examples at a time."""
        before = random_states.take(self.feed.device)
        while True:
            try:
                if self.together is not None:
                    return self.together.step(self.take_step, fed, learning_rate)
                return self.take_step(fed.micro_batches, learning_rate)
            except NoMemoryError as error:
                reason = str(error)
            # Outside the handler: the exception keeps the tensors that filled the memory alive.
            self.take_step.recover()
            examples = max((len(each.targets) for each in fed.micro_batches), default=0)
            halved = self.feed.halve(fed)
            if halved is None:
                raise TrainingError(
                    f"not enough memory for one example at a time ({reason}); recompute layers in "
                    "backward (--recompute 2 3), or truncate the texts more (--max-length)"
                )
            fed = halved
            self.state.accumulation = self.feed.accumulation
            self.journal.say(
                f"not enough memory for {examples} examples at a time ({reason}); batches are "
                f"computed in {self.feed.accumulation} micro-batches from step "
                f"{self.state.step + 1} on, with the same gradient except for the masks of dropout"
            )
            random_states.put(before, self.feed.device)

    def _read(self, wait: bool = False) -> None:
        """Read the results of steps: those available, or all with ``wait``."""
        state = self.state
        for about, loss, grad_norm in self.readings.ready(wait=wait):
            step, epoch, examples, learning_rate = about
            step_s, self._since = time.perf_counter() - self._since, time.perf_counter()
            state.training_s += step_s
            is_skipped = state.add_step(step, loss, grad_norm)
            self.journal.step(
                step,
                epoch,
                examples=examples,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                step_s=step_s,
                is_skipped=is_skipped,
            )
            if state.skips_in_a_row == _MOST_SKIPS:
                raise DivergedError(
                    f"the loss or the gradient of {_MOST_SKIPS} steps in a row, up to step {step} "
                    f"(epoch {epoch}), was NaN or infinite (the last loss is {loss}), so "
                    "these steps were skipped; try a lower learning rate than "
                    f"{self.config.learning_rate:g}, or precision float32"
                )

    def _evaluation_is_due(self) -> bool:
        """Return whether the last step still has to be evaluated."""
        step, history = self.state.step, self.state.history
        if step == 0 or (history and history[-1]["step"] == step):
            return False
        return step % self.eval_every == 0 or step == self.feed.total_steps

    def _gives_up(self) -> bool:
        return self.state.gives_up(self.config.early_stopping)

    def _save_is_due(self) -> bool:
        return self.saver is not None and self.saver.is_due(self.state)

    def _evaluate(self) -> None:
        """Score the model on dev, and keep the trained values if they are the best so far."""
        state, task = self.state, self.dev.dataset.task
        predicting = predict_logits if self.together is None else self.together.predict_logits
        try:
            logits = predicting(
                self.model,
                self.dev.encodings,
                precision=self.config.precision,
                prefix=self.phases.prefixes.get("dev"),
                abandoned=self.stop,
            )
        except AbandonedError:  # a resumed run evaluates first
            return
        if not np.isfinite(logits).all():
            raise DivergedError(f"the logits on dev after step {state.step} are not finite")
        for prefix in self.phases.prefixes.values():
            while prefix.cache.notes:  # about damaged or removed files
                self.journal.say(prefix.cache.notes.pop(0))
        predicted = decode(logits, self.dev.names, self.dev.scale)
        probabilities = probabilities_of(logits, self.dev.names, task)
        scores = scoring.compute(task, predicted, self.dev.dataset.labels, probabilities)
        first = task.metrics[0]
        is_best = all(
            is_better(first, scores[first], than=earlier["metrics"][first])
            for earlier in state.history
        )
        epoch = math.ceil(state.step / self.feed.steps_an_epoch)
        state.history.append({"step": state.step, "epoch": epoch, "metrics": scores})
        self.journal.evaluation(state.history[-1], self.dev.majority, is_best=is_best)
        if is_best:
            state.best_step, state.answers = state.step, list(predicted)
            state.best = values_that_train(self.model)
        self._into_training()

    def _into_training(self) -> None:
        self.model.train()
        if not self.config.dropout_in_group_1:
            self.model.bert.freeze_dropout()
        self._since = time.perf_counter()

    def _pause(self) -> None:
        """Update the state's times and peak memory; those before an interruption are included."""
        self._read(wait=True)
        self.state.seconds = self._seconds_before + time.perf_counter() - self._start
        used = peak_memory_mib(self.feed.device)
        if self.together is not None:
            used = self.together.most(used)
        self.state.peak_memory_mib = max(self.state.peak_memory_mib, used)

    def _stopped(self) -> StoppedError:
        received = self.stop.received
        assert received is not None
        saved = "nothing is saved, because the run has no folder"
        if self.saver is not None:
            saved = self.saver.resuming
        what = f"stopped by {received.name} after step {self.state.step}; {saved}"
        return StoppedError(what, received)


def values_that_train(model: BertForSequenceClassification) -> dict[str, torch.Tensor]:
    """Return a copy on the host of all parameters that the plan declares."""
    assert model.adaptation is not None
    return {
        name: model.get_parameter(name).detach().to("cpu", copy=True)
        for name in model.adaptation.trainable
    }
