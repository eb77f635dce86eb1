"""Thaw and freeze strata while a run trains, as its plan says; most plans have a single phase.

What trains at a step is a function of the plan, the step and the length of the run alone
(:meth:`spafit.plans.Trained.trains_at`), so a resumed run is in the phase in which it was stopped.
A frozen parameter has no gradient: AdamW leaves it and its moments as they are, and its moments
begin when it first trains. As the lowest layers freeze, the output of all that is frozen can be
kept (:mod:`spafit.training.prefix.kept`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from spafit.errors import CheckpointError, ConfigError, PlanError, one_line
from spafit.plans import Stratum, Trained
from spafit.training.batches import Feed
from spafit.training.prefix.kept import KeptPrefix
from spafit.training.step import TrainingStep

#: Opens the caches for the output of the layers that are frozen at the moment; the argument is
#: whether they are as pre-trained, so that other runs can use it.
Keep = Callable[[bool], AbstractContextManager[dict[str, KeptPrefix]]]


class Phases:
    """What trains at which step, and the kept output of the layers below.

    Parameters
    ----------
    take_step : TrainingStep
        Takes the steps; its model was adapted by the plan.
    feed : Feed
        The training batches, which have the length of the run and get the kept output.
    keep : Keep
        Opens the caches of a phase.
    must_keep : bool
        Whether the run is refused if the caches of its first phase cannot be opened. Otherwise, as
        in later phases, that is said, and nothing is kept.
    say : callable of str
        Called with one line for each stratum that thaws or freezes.

    Attributes
    ----------
    prefixes : dict of str to KeptPrefix
        The kept output in this phase, of "train" and "dev"; empty if nothing is kept.

    Raises
    ------
    PlanError
        If a stratum would train at no step of the run, or in some phase nothing would.
    """

    def __init__(
        self,
        take_step: TrainingStep,
        feed: Feed,
        keep: Keep,
        must_keep: bool,
        say: Callable[[str], None],
    ) -> None:
        self.take_step, self.feed, self._keep, self._say = take_step, feed, keep, say
        self._must_keep = must_keep
        self._length = (feed.steps_an_epoch, feed.total_steps)
        adaptation = take_step.model.adaptation
        assert adaptation is not None
        self._plan = adaptation.plan
        self._how = {name: adaptation.trained[name] for name in take_step.parameters}
        self._starts = sorted({0, *(end for how in self._how.values() for end in self._ends(how))})
        self._opened = ExitStack()
        self._phase: int | None = None
        self.prefixes: dict[str, KeptPrefix] = {}
        for how in self._how.values():
            if (ends := self._ends(how))[0] >= ends[1]:
                stratum = next(
                    each
                    for each in self._plan.strata
                    if (each.thaw, each.freeze) == (how.thaw, how.freeze)
                )
                epochs = f"{feed.epochs} epoch{'s' if feed.epochs > 1 else ''}"
                raise PlanError(
                    f"{one_line(stratum.name)} (layers {stratum.layers}) would train at no step of "
                    f"this run of {epochs}: it {stratum.times}; let it thaw earlier or freeze "
                    "later, or train for more epochs"
                )
        for start in self._starts:
            if start < feed.total_steps and not self._names(start):
                raise PlanError(
                    f"nothing trains after step {start}: all parameters of {self._plan.name} are "
                    "frozen then, and the head by you; unfreeze it, or let a stratum train longer"
                )

    def close(self) -> None:
        """Close what is kept, and let all train again that a phase froze."""
        self._opened.close()
        self.feed.prefix = None
        for parameter in self.take_step.parameters.values():
            parameter.requires_grad_(True)

    def is_over(self, step: int) -> bool:
        """Return whether the step that follows ``step`` steps belongs to another phase."""
        return bisect_right(self._starts, step) != self._phase

    def enter(self, step: int) -> None:
        """Freeze and thaw for the step that follows ``step`` steps, unless it is in this phase."""
        if not self.is_over(step) or step == self._length[1]:
            return
        names, is_first = self._names(step), self._phase is None
        self._phase = bisect_right(self._starts, step)
        if not is_first:
            self._announce(step)
        if len(names) < len(self._how) or not is_first:
            self.take_step.train_only(names)
        self._opened.close()  # what was kept is freed before more is
        try:
            self.prefixes = self._opened.enter_context(self._keep(self._is_pretrained(step)))
        except (CheckpointError, ConfigError) as error:
            if is_first and self._must_keep:
                raise
            self._say(f"{error}; the output of the frozen layers is computed every time")
            self.prefixes = {}
        self.feed.prefix = self.prefixes.get("train")

    def _ends(self, how: Trained) -> tuple[int, int]:
        first, end = how.steps(*self._length)
        return min(first, self._length[1]), min(end, self._length[1])

    def _names(self, step: int) -> set[str]:
        """Return the names of what trains."""
        return {name for name, how in self._how.items() if how.trains_at(step, *self._length)}

    def _trains(self, stratum: Stratum, step: int) -> bool:
        how = Trained(thaw=stratum.thaw, freeze=stratum.freeze)
        return step < self._length[1] and how.trains_at(step, *self._length)

    def _announce(self, step: int) -> None:
        """Say which strata begin or cease to train after ``step`` steps."""
        epoch = 1 + step // self._length[0]
        for stratum in self._plan.strata:
            now = self._trains(stratum, step)
            if stratum.train and step and now != self._trains(stratum, step - 1):
                self._say(
                    f"epoch {epoch}, after step {step}: {one_line(stratum.name)} (layers "
                    f"{stratum.layers}) {'begins to train' if now else 'is frozen'}"
                )

    def _is_pretrained(self, step: int) -> bool:
        """Return whether nothing in the layers that are frozen now was trained in this run."""
        bert = self.take_step.model.bert
        below = [f"bert.encoder.layer.{number}." for number in range(bert.frozen_depth)]
        below += ["bert.embeddings."] + ["bert.pooler."] * bert.is_frozen
        return not any(
            how.steps(*self._length)[0] < step and name.startswith(tuple(below))
            for name, how in self._how.items()
        )
